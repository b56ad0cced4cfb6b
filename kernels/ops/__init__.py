"""muka_fast.ops: the fused ops, one per file; importing this registers those of scoring and of the loss with torch.library."""

from muka_fast.ops import distill_loss as distill_loss
from muka_fast.ops import dropout_add_layer_norm as dropout_add_layer_norm
from muka_fast.ops import mc_head as mc_head
from muka_fast.ops import mc_statistics as mc_statistics
from muka_fast.ops import one_query_attention as one_query_attention
from muka_fast.ops import packed_attention as packed_attention
from muka_fast.ops import repeat_dropout as repeat_dropout
