"""The last layer of a BERT-type classifier for the first token alone, the only one that its head reads: in training and prediction.

The same function with the same gradient for less work: keys and values are those of all tokens; query, attention, feed-forward and
norms run on one row a text. Everything else is the model's own forward.

B texts · L tokens · R rows · D width · H heads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from muka_fast import intercept
from muka_fast.intercept import SiteHandler, patched
from muka_fast.postln import PostLayer, layer_calls, layer_parts


class Parts:
    """What a layer is computed by; muka_fast/fused_layers.py has another form of it."""

    def __init__(self, masks: SiteHandler | None = None):
        """masks: of the attention of single rows; without them it is `intercept`'s, or PyTorch's."""
        self.masks = masks

    def attention(self, layer: PostLayer, x: Tensor, rows: Tensor, head_dim: int, bias: Tensor | None) -> Tensor:
        """Of the rows [B, R, D] to x [B, L, D], before the dense layer; bias as of `layer_rows`."""
        return attention(layer, layer.query(rows), layer.key(x), layer.value(x), head_dim, bias, self.masks)

    def add_norm(self, dense: nn.Module, dropout: nn.Module, norm: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
        return norm(dropout(dense(x)) + rows)


PLAIN = Parts()


def attention(
    layer: PostLayer, query: Tensor, key: Tensor, value: Tensor, head_dim: int, bias: Tensor | None, masks: SiteHandler | None = None
) -> Tensor:
    """PyTorch's own, of heads side by side: query [B, R, D], key and value [B, L, D]. With masks, and under `intercept`, by these."""
    query, key, value = (states.unflatten(-1, (-1, head_dim)).transpose(1, 2) for states in (query, key, value))
    if masks is not None or intercept.intercepted(layer.attends):
        return intercept.attention(layer.attends, query, key, value, bias, handler=masks)[0].flatten(-2)
    p = probability(layer.attention_dropout)
    return scaled_dot_product_attention(query, key, value, bias, dropout_p=p).transpose(1, 2).flatten(-2)


def probability(dropout: nn.Module) -> float:
    """With which a site drops now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


@contextmanager
def first_token_only(model: nn.Module, parts: Parts = PLAIN) -> Iterator[None]:
    """Inside it the last layer of a sequence classifier gives [B, 1, D]; a model that postln.py does not cover stays as it is.

    All sequence classifiers of the families there read token 0 of what it gives, and nothing else. Weights are reached through their
    modules' calls alone, where ZeRO-3 gathers them, and dropout falls on the same sites with the same p (PyTorch's own on other
    elements). With activation checkpointing this layer keeps its activations (transformers 5.23), since its backward comes first, so
    that they would be recomputed at once, or is recomputed all the same (5.17).
    """
    calls = covered_calls(model)
    if not calls:
        yield
        return
    last = calls[-1]
    run = layer_form(model, last, parts)
    remaining = 0

    def restart(*_: Any) -> None:
        nonlocal remaining
        remaining = calls.count(last)  # ALBERT: only the last of them is cut

    def forward(original: Any, x: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        nonlocal remaining
        remaining -= 1  # below 0: a checkpoint's recomputation, which begins with the last call
        if remaining not in (0, -1) or not is_known(attention_mask):
            return original(x, attention_mask, *args, **kwargs)
        return run(x, x[:, :1], attention_mask, *args)

    handle = model.base_model.register_forward_pre_hook(restart)
    try:
        with patched(last, forward):
            yield
    finally:
        handle.remove()


def covered_calls(model: nn.Module) -> list[nn.Module]:
    """As postln.py's `layer_calls`, of any module; empty for what is not covered."""
    return (layer_calls(model) if hasattr(getattr(model, "config", None), "model_type") else None) or []


def is_known(attention_mask: Any) -> bool:
    """Flash and flex attention bring masks of another form."""
    return attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4)


def layer_form(model: nn.Module, module: nn.Module, parts: Parts) -> Callable[..., Any]:
    """One of `covered_calls` as (x [B, L, D], its first rows [B, R, D], attention_mask, MPNet's position bias) -> what it gives."""
    layer = PostLayer(*layer_parts(model, module)[0])
    head_dim, is_mpnet = model.config.hidden_size // model.config.num_attention_heads, model.config.model_type == "mpnet"

    def run(x: Tensor, rows: Tensor, attention_mask: Tensor | None, *args: Any) -> Any:
        bias = None if attention_mask is None else attention_mask[:, :, : rows.shape[1]]
        if not is_mpnet:
            return layer_rows(layer, x, rows, head_dim, bias, parts)
        positions = args[0][:, :, : rows.shape[1]]  # float, as MPNet's mask is
        return (layer_rows(layer, x, rows, head_dim, positions if bias is None else positions + bias, parts),)

    return run


def layer_rows(layer: PostLayer, x: Tensor, rows: Tensor, head_dim: int, bias: Tensor | None, parts: Parts) -> Tensor:
    """The first R rows of a layer's result [B, R, D] from hidden states [B, L, D] and the first R of these.

    bias: what a query does not see (bool, False) or what is added to its scores (float), [B, 1 | H, 1 | R, L].
    """
    y = parts.add_norm(layer.output, layer.output_dropout, layer.norm1, parts.attention(layer, x, rows, head_dim, bias), rows)
    return parts.add_norm(layer.down, layer.ffn_dropout, layer.norm2, layer.activation(layer.up(y)), y)
