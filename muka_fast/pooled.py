"""What a classifier's output layer reads: the pooled feature of a text, captured from a forward that runs anyway."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from muka_fast.probe import agree, padded_inputs


class OutputLayer(NamedTuple):
    """reads: which rows of what the layer sees make the logits, where it sees all tokens of a text: "first", "last" (unpadded) or
    "mean"."""

    layer: nn.Linear
    reads: str


@torch.inference_mode()
def output_layer(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[OutputLayer | None, Tensor]:
    """The linear layer whose output the logits are, None where the head ends otherwise, and the logits [B, C] of that forward.

    input_ids, attention_mask [B, L]: any small batch, some of it padding. The layer may see one row per text or all tokens of it.
    """
    calls: list[tuple[nn.Linear, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_hook(lambda layer, _, out: calls.append((layer, out))) for layer in layers]
    try:
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    finally:
        for handle in handles:
            handle.remove()
    scale = logits.abs().max().clamp_min(1e-30)
    for layer, out in reversed(calls):
        out = out.to(logits.device)
        if out.dim() not in (2, 3) or out.shape[0] != len(logits) or out.shape[-1] != logits.shape[-1]:
            continue
        for reads in ("first", "last"):
            if torch.equal(pool(out, attention_mask, reads), logits):
                return OutputLayer(layer, reads), logits
        if out.dim() == 3 and agree(pool(out, attention_mask, "mean") / scale, logits / scale, logits.dtype):
            return OutputLayer(layer, "mean"), logits
    return None, logits


def classifier_layer(model: nn.Module) -> nn.Linear:
    """The output layer of a classifier by its place alone: under ZeRO-3 no forward could be run to see it (`output_layer`).

    Raises TypeError where the model has no linear layer as wide as its labels behind its encoder.
    """
    encoder = model.base_model_prefix + "."  # some classifiers are declared before it
    behind = [module for name, module in model.named_modules() if not name.startswith(encoder)]
    fitting = [module for module in behind if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels]
    if not fitting:
        raise TypeError(f"{type(model).__name__} has no linear output layer")
    return fitting[-1]


def student_reads(model: nn.Module) -> str:
    """`OutputLayer.reads` of a student, for `student_feature`; "last" where that cannot be seen: of ZeRO-3's shares of weights, which
    run in an engine alone, and of heads that end in no linear layer."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "last"
    training = model.training
    found, _ = output_layer(model.eval(), *padded_inputs(model))
    model.train(training)
    return "last" if found is None else found.reads


def student_feature(model: nn.Module, seen: Tensor, reads: str, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The feature [B, D] behind the logits of a student, padding on the right, from what entered its output layer.

    seen [B, D] or, of heads that run over all tokens, [B, L, D]; reads: of `student_reads`; input_ids, attention_mask [B, L].
    """
    pad = model.config.get_text_config().pad_token_id
    if pad is not None and reads == "last":  # of those that are not padding, transformers has it; one inside the text is a token
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (position * ((input_ids != pad) & (attention_mask > 0))).amax(1, keepdim=True)
        attention_mask = (position <= last).long()
    return pool(seen, attention_mask, reads)


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


def pool(x: Tensor, attention_mask: Tensor, reads: str) -> Tensor:
    """One row per text [B, D] of what enters or leaves the output layer, [B, D] or [B, L, D]; reads: of `OutputLayer`."""
    attention_mask = attention_mask.to(x.device)
    if x.dim() == 2:
        return x
    if x.shape[1] == 1:
        return x[:, 0]
    if reads == "mean":
        weights = attention_mask.to(x)[..., None]
        return (x * weights).sum(1) / weights.sum(1).clamp_min(1)
    row = attention_mask.sum(1) - 1 if reads == "last" else torch.zeros_like(attention_mask[:, 0])
    return x[torch.arange(len(x), device=x.device), row]
