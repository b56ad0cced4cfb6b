"""The last layer of a BERT-type classifier for the first token alone, the only one that its head reads: in training and prediction.

The same function with the same gradient for less work: keys and values are those of all tokens; query, attention, feed-forward and
norms run on one row a text. Everything else is the model's own forward.

B texts · L tokens · D width · H heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from muka_fast.intercept import patched
from muka_fast.postln import PostLayer, layer_calls, layer_parts


@contextmanager
def first_token_only(model: nn.Module) -> Iterator[None]:
    """Inside it the last layer of a sequence classifier gives [B, 1, D]; a model that postln.py does not cover stays as it is.

    All sequence classifiers of the families there read token 0 of what it gives, and nothing else. Weights are reached through their
    modules' calls alone, where ZeRO-3 gathers them, and dropout falls on the same sites with the same p, on other elements. With
    activation checkpointing this layer keeps its activations (transformers 5.23), since its backward comes first, so that they would
    be recomputed at once, or is recomputed all the same (5.17).
    """
    calls = layer_calls(model) if hasattr(getattr(model, "config", None), "model_type") else None
    if calls is None:
        yield
        return
    last, is_mpnet = calls[-1], model.config.model_type == "mpnet"
    layer = PostLayer(*layer_parts(model, last)[0])
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    remaining = 0

    def restart(*_: Any) -> None:
        nonlocal remaining
        remaining = calls.count(last)  # ALBERT: only the last of them is cut

    def forward(original: Any, x: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        nonlocal remaining
        remaining -= 1  # below 0: a checkpoint's recomputation, which begins with the last call
        # Flash and flex attention bring masks of another form.
        known = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4)
        if remaining not in (0, -1) or not known:
            return original(x, attention_mask, *args, **kwargs)
        bias = None if attention_mask is None else attention_mask[:, :, :1]
        if not is_mpnet:
            return first_row(layer, x, head_dim, bias)
        positions = args[0][:, :, :1]  # float, as MPNet's mask is
        return (first_row(layer, x, head_dim, positions if bias is None else positions + bias),)

    handle = model.base_model.register_forward_pre_hook(restart)
    try:
        with patched(last, forward):
            yield
    finally:
        handle.remove()


def first_row(layer: PostLayer, x: Tensor, head_dim: int, bias: Tensor | None) -> Tensor:
    """Row 0 of a layer's result [B, 1, D] from hidden states [B, L, D].

    bias: what its query does not see (bool, False) or what is added to its scores (float), [B, 1 | H, 1, L].
    """
    rows = x[:, :1]
    query, key, value = (
        states.unflatten(-1, (-1, head_dim)).transpose(1, 2) for states in (layer.query(rows), layer.key(x), layer.value(x))
    )
    p = layer.attention_dropout.p if layer.attention_dropout.training else 0.0
    attention = scaled_dot_product_attention(query, key, value, bias, dropout_p=p)
    y = layer.norm1(layer.output_dropout(layer.output(attention.transpose(1, 2).flatten(-2))) + rows)
    return layer.norm2(layer.ffn_dropout(layer.down(layer.activation(layer.up(y)))) + y)
