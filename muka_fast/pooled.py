"""What a classifier's output layer reads: the pooled feature of a text, captured from a forward that runs anyway."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.inference_mode()
def output_layer(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[nn.Linear | None, Tensor]:
    """The linear layer whose output the logits are, None where the head ends otherwise, and the logits [B, C] of that forward.

    input_ids, attention_mask [B, L]: any small batch. The layer may see one row per text or all tokens of it.
    """
    calls: list[tuple[nn.Linear, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_hook(lambda layer, _, out: calls.append((layer, out))) for layer in layers]
    try:
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    finally:
        for handle in handles:
            handle.remove()
    for layer, out in reversed(calls):
        out = out.to(logits.device)
        rows = out[:, None] if out.dim() == 2 else out
        same_shape = rows.dim() == 3 and rows.shape[0] == len(logits) and rows.shape[-1] == logits.shape[-1]
        if same_shape and bool((rows == logits[:, None]).all(-1).any(1).all()):
            return layer, logits
    return None, logits


def classifier_layer(model: nn.Module) -> nn.Linear:
    """The output layer of a classifier by its place alone: under ZeRO-3 no forward could be run to see it (`output_layer`).

    Raises TypeError where the model has no linear layer as wide as its labels.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    fitting = [layer for layer in layers if layer.out_features == model.config.num_labels]
    if not fitting:
        raise TypeError(f"{type(model).__name__} has no linear output layer")
    return fitting[-1]


def last_feature(model: nn.Module, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The feature [B, D] behind the logits of a student, padding on the right, from what entered its output layer.

    seen [B, D] or, of heads that run over all tokens, [B, L, D]; input_ids, attention_mask [B, L].
    """
    pad = model.config.get_text_config().pad_token_id
    if pad is not None:  # transformers looks for the last token that is not padding; one inside the text is a token
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (position * ((input_ids != pad) & (attention_mask > 0))).amax(1, keepdim=True)
        attention_mask = (position <= last).long()
    return pool(seen, attention_mask, "last")


@contextmanager
def head_input(layer: nn.Linear | None) -> Iterator[list[Tensor]]:
    """A list that receives what enters the layer in its first call inside the block; it stays empty without a layer."""
    seen: list[Tensor] = []
    if layer is None:
        yield seen
        return
    handle = layer.register_forward_pre_hook(lambda _, inputs: None if seen else seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def pool(x: Tensor, attention_mask: Tensor, reads: str | None) -> Tensor:
    """One row per text [B, D] of what enters the output layer, [B, D] or [B, L, D].

    reads: which token's row makes the logits, "first" or "last" (unpadded); None: the mean over the text's tokens.
    """
    attention_mask = attention_mask.to(x.device)
    if x.dim() == 2:
        return x
    if x.shape[1] == 1:
        return x[:, 0]
    if reads is None:
        weights = attention_mask.to(x)[..., None]
        return (x * weights).sum(1) / weights.sum(1).clamp_min(1)
    row = attention_mask.sum(1) - 1 if reads == "last" else torch.zeros_like(attention_mask[:, 0])
    return x[torch.arange(len(x), device=x.device), row]
