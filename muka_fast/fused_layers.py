"""On a GPU, the layers of a BERT-type classifier in fewer kernels: one product for queries, keys and values, `self_attention` between
it and the next (16 bits, up to 128 tokens), and `residual_norm`.

The dense layer's bias, its dropout, the residual and the norm are four passes over memory in PyTorch, and one here. On a CPU, and
where a layer is not what this file expects, the modules run as they are.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from muka_fast.first_token import (
    Parts,
    attention,
    covered_calls,
    first_token_only,
    is_known,
    layer_form,
    probability,
)
from muka_fast.intercept import SDPA_NAME, SiteHandler, patched
from muka_fast.ops.reference import LANES, Draws
from muka_fast.ops.residual_norm import residual_norm
from muka_fast.ops.self_attention import self_attention, takes
from muka_fast.postln import PostLayer, layer_parts


class LayerMasks(SiteHandler, Protocol):
    """A handler whose masks a kernel can draw by itself."""

    def draws(self, module: nn.Module) -> tuple[float, Draws | None]:
        """Probability and draws of the next call of a site. Counts as a call."""

    def leave_attention(self) -> None:
        """Told where PyTorch drops attention's probabilities."""


@contextmanager
def fused_layers(model: nn.Module, masks: LayerMasks | None = None) -> Iterator[None]:
    """Inside it `model` runs as under `first_token_only`, its layers fused on a GPU wherever they can be.

    The same function with the same gradient, and dropout by `masks`; without them nothing is fused around a dropout that drops.
    Where PyTorch computes in 16 bits, under autocast, hidden states between layers have 16 bits as well.
    """
    calls = covered_calls(model)
    fitting, fused = [module for module in dict.fromkeys(calls) if fits(model, module)], Fused(masks)
    with ExitStack() as stack:
        for module in fitting:
            stack.enter_context(patched(module, partial(forward, layer_form(model, module, fused))))
        stack.enter_context(first_token_only(model, fused if calls and calls[-1] in fitting else Parts(masks)))
        yield


def forward(run: Any, original: Any, x: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    if is_gpu(x.device) and is_known(attention_mask):
        return run(x, x, attention_mask, *args)
    return original(x, attention_mask, *args, **kwargs)


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def fits(model: nn.Module, module: nn.Module) -> bool:
    """Weights are whole (ZeRO-3's are not), their modules PyTorch's own that nobody listens to, and no activation is recomputed."""
    if model.config._attn_implementation not in ("eager", "sdpa", SDPA_NAME):
        return False
    if any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        return False
    layer = PostLayer(*layer_parts(model, module)[0])
    dense = (layer.query, layer.key, layer.value, layer.output, layer.down)
    norms, dropouts = (layer.norm1, layer.norm2), (layer.output_dropout, layer.ffn_dropout)
    modules = [*dense, *norms, *dropouts]
    return (
        all(type(part) is nn.Linear and part.bias is not None for part in dense)
        and all(type(part) is nn.LayerNorm and part.weight is not None and part.bias is not None for part in norms)
        and all(type(part) in (nn.Dropout, nn.Identity) for part in dropouts)
        and not any(hasattr(weight, "ds_id") for part in modules for weight in part.parameters())
        and not any("forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks for part in modules)
        and not any(part._backward_hooks or part._backward_pre_hooks for part in modules)
    )


class Fused(Parts):
    """The parts on a GPU."""

    def draws(self, module: nn.Module, dropout: nn.Module) -> tuple[float, Draws | None]:
        """Of the site of `module`, where `dropout` would drop: probability, and draws unless it is 0 or there are no masks."""
        return (probability(dropout), None) if self.masks is None else self.masks.draws(module)

    def attention(self, layer: PostLayer, x: Tensor, rows: Tensor, head_dim: int, bias: Tensor | None) -> Tensor:
        """Queries, keys and values of all rows in one product, whose gradient is one as well and needs no sum over three."""
        if not is_gpu(x.device) or rows is not x:
            return super().attention(layer, x, rows, head_dim, bias)
        each = (layer.query, layer.key, layer.value)
        qkv = linear(x, torch.cat([dense.weight for dense in each]), torch.cat([dense.bias for dense in each]))
        if bias is not None and (bias.dtype != torch.bool or bias.shape[1] > 1):  # MPNet's, which learns
            return attention(layer, *qkv.chunk(3, -1), head_dim, bias, self.masks)
        p, draws = self.draws(layer.attends, layer.attention_dropout)
        if (p == 0 or draws is not None) and takes(qkv.dtype, qkv.shape[1], head_dim, qkv.device):
            return self_attention(qkv, layer.query.out_features // head_dim, p=p, draws=draws, mask=bias)
        if draws is not None:
            self.masks.leave_attention()
        return attention(layer, *qkv.chunk(3, -1), head_dim, bias)

    def add_norm(self, dense: nn.Module, dropout: nn.Module, norm: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
        """norm(dropout(dense(x)) + rows) in the dtype of the product."""
        left = probability(dropout) > 0 and (self.masks is None or dense.out_features % LANES)  # whose kernel draws no such masks
        if not is_gpu(x.device) or left:
            return super().add_norm(dense, dropout, norm, x, rows)
        p, draws = self.draws(dropout, dropout)
        product = linear(x, dense.weight)
        return residual_norm(product, dense.bias, rows.to(product.dtype), norm.weight, norm.bias, p=p, eps=norm.eps, draws=draws)
