"""Rerouting a model's dropout, attention probabilities and layer calls to our own code inside a with-block.

Nothing is left behind by a block: instance attributes are removed, the attention implementation is restored. What the functions
`..._without_waiting` change stays.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION_NAME = "muka_mc"  # the name under which transformers finds `attention`
SDPA_NAME = "muka_sdpa"  # PyTorch's attention as transformers calls it, with `_sdpa_mask`


class SiteHandler(Protocol):
    """What a dropout site calls instead of dropping at random."""

    def wants(self, module: nn.Module) -> bool:
        """False: the probabilities of this call are not needed, a fused attention may run. Counts as a call."""

    def apply(self, module: nn.Module, x: Tensor, p: float) -> Tensor:
        """x in, masked x out. p is what the module itself would drop, as far as it says so."""


_handler_of: dict[int, SiteHandler] = {}  # by the id of every module of the models that are inside a block of `intercept`
_changing = threading.Lock()  # it, and with it torch.nn.functional.dropout
_dropout = nn.functional.dropout  # what ours stands for


def _forget_other_threads() -> None:
    global _changing
    _changing = threading.Lock()


os.register_at_fork(after_in_child=_forget_other_threads)


def intercepted(module: nn.Module) -> bool:
    """Whether its model is inside a block of `intercept`."""
    return id(module) in _handler_of


def attention(
    module: nn.Module,
    query: Tensor,  # [B, H, Lq, d]
    key: Tensor,  # [B, H / groups, Lk, d]
    value: Tensor,
    attention_mask: Tensor | None,  # additive, or bool, true where a query sees a key: [B, 1 | H, Lq, Lk]
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,  # [1 | B, H, Lq, Lk]
    handler: SiteHandler | None = None,  # instead of the model's
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; probabilities pass through the handler. Returns [B, Lq, H, d].

    softcap: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118). position_bias: added to them (T5).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[-2]]
    if position_bias is not None:
        attention_mask = position_bias if attention_mask is None else position_bias + attention_mask
    handler = handler or _handler_of.get(id(module))
    masked = handler is not None and handler.wants(module)
    if not masked and softcap is None:
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        scores = torch.matmul(query, key.transpose(2, 3)) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        elif attention_mask is not None:
            scores = scores + attention_mask
        probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        out = torch.matmul(handler.apply(module, probs, dropout) if masked else probs, value)
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """4-D, additive: 0, and the lowest number where a query does not see a key. As transformers' `eager_mask`, which on a GPU waits:
    for the values that tell whether a mask of zeros could be left out, and (in 5.17) for a number that it copies there."""
    looks = kwargs.get("allow_is_bidirectional_skip", False) and torch.device(kwargs["device"]).type == "cpu"
    seen = sdpa_mask(*args, **(kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": looks}))
    if seen is None:
        return None
    return torch.where(seen, torch.zeros((), dtype=dtype, device=seen.device), torch.finfo(dtype).min)


def _sdpa_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of PyTorch's attention, built without a look at the padding, and hence also where it hides nothing."""
    return sdpa_mask(*args, **(kwargs | {"allow_is_bidirectional_skip": False, "allow_is_causal_skip": False}))


AttentionInterface.register(ATTENTION_NAME, attention)
AttentionMaskInterface.register(ATTENTION_NAME, _mask)
AttentionInterface.register(SDPA_NAME, sdpa_attention_forward)
AttentionMaskInterface.register(SDPA_NAME, _sdpa_mask)


def run_without_waiting(model: nn.Module) -> None:
    """For a model that runs as it is on a GPU: transformers asks at every forward whether a batch has padding, which waits for all
    work before it. (A model without PyTorch's attention, such as MPNet, still asks.)"""
    for config in _configs(model):
        if config._attn_implementation == "sdpa":
            config._attn_implementation = SDPA_NAME
    build_positions_without_waiting(model)


def build_positions_without_waiting(model: nn.Module) -> None:
    """MPNet of older transformers builds its relative positions on the CPU, so that a GPU's pass would wait for the copy."""
    encoder = getattr(getattr(model, "base_model", None), "encoder", None)  # the student of a rehearsal has no such parts
    original = getattr(encoder, "compute_position_bias", None)
    if original is None or "compute_position_bias" in vars(encoder):
        return

    def on_the_device(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with x.device:
            return original(x, *args, **kwargs)

    encoder.compute_position_bias = on_the_device


def dropout_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that drops activations, by path: nn.Dropout, and nn.Identity in the place of a dropout of p = 0."""
    found = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Dropout) or (isinstance(module, nn.Identity) and "drop" in name):
            found[path] = module
    return found


def layer_modules(model: PreTrainedModel) -> list[nn.Module] | None:
    """The encoder's layers in order (ALBERT: its shared groups), or None where the model has no such list."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for _, module in model.base_model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and depth:
            return list(module)
    encoder = getattr(model.base_model, "encoder", None)
    groups = getattr(encoder, "albert_layer_groups", None)
    return None if groups is None else list(groups)


def _configs(model: nn.Module) -> list[PretrainedConfig]:
    configs = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PretrainedConfig)}
    return list(configs.values())


@contextmanager
def patched(module: nn.Module, forward: Callable) -> Iterator[None]:
    """`module` calls `forward(original, *args, **kwargs)` inside the block."""
    original = module.forward
    shadowed = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: forward(original, *args, **kwargs)
    try:
        yield
    finally:
        if shadowed is None:
            del module.forward
        else:
            module.forward = shadowed


@contextmanager
def intercept(model: PreTrainedModel, handler: SiteHandler) -> Iterator[None]:
    """Every dropout and attention call of `model` goes to `handler` inside the block.

    A call of torch.nn.functional.dropout counts as one of the module in whose forward it stands.
    """
    configs = _configs(model)
    implementations = [config._attn_implementation for config in configs]
    modules, dropouts = list(model.modules()), list(dropout_modules(model).values())
    before, shadows = [_handler_of.get(id(module)) for module in modules], [module.__dict__.get("forward") for module in dropouts]
    try:
        _handle(modules, [handler] * len(modules))
        for config in configs:
            config._attn_implementation = ATTENTION_NAME
        for module in dropouts:
            module.forward = _site_forward(handler, module)
        yield
    finally:
        _handle(modules, before)
        for config, name in zip(configs, implementations, strict=True):
            config._attn_implementation = name
        for module, shadow in zip(dropouts, shadows, strict=True):
            if shadow is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = shadow


def _handle(modules: list[nn.Module], handlers: list[SiteHandler | None]) -> None:
    """Give each module its handler; torch.nn.functional.dropout is ours as long as any has one. What somebody else puts in its place
    meanwhile stays."""
    global _dropout
    with _changing:
        if not _handler_of and nn.functional.dropout is not _functional_dropout:
            _dropout, nn.functional.dropout = nn.functional.dropout, _functional_dropout
        for module, handler in zip(modules, handlers, strict=True):
            if handler is None:
                _handler_of.pop(id(module), None)
            else:
                _handler_of[id(module)] = handler
        if not _handler_of and nn.functional.dropout is _functional_dropout:
            nn.functional.dropout = _dropout


def _functional_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """The handler's, where the innermost module whose method is being executed has one."""
    frame = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), nn.Module):
        frame = frame.f_back
    module = None if frame is None else frame.f_locals["self"]
    handler = _handler_of.get(id(module))
    return _dropout(input, p, training, inplace) if handler is None else handler.apply(module, input, p)


def _site_forward(handler: SiteHandler, module: nn.Module) -> Callable[[Tensor], Tensor]:
    p = float(getattr(module, "p", 0.0))
    return lambda x: handler.apply(module, x, p)
