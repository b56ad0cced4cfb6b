"""muka_fast.ops: the fused ops, one per file; importing this registers them with torch.library."""
from muka_fast.ops import repeat_dropout as repeat_dropout
from muka_fast.ops import mc_head as mc_head
