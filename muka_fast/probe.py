"""What a model does with a few arbitrary tokens: whether padding changes its logits, and equality of logits to rounding."""

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from muka_fast.errors import UserError, first_line
from muka_fast.placement import input_device

SHORT = 5  # an odd number: Funnel and CANINE draw two and four tokens together
log = logging.getLogger("muka_fast")
# Of logits computed in two ways: up to 0.04 and 0.004 by two forms of attention in six random models of 22 to 32 layers.
ROUNDING = {torch.bfloat16: 0.1, torch.float16: 0.01}


def trace_inputs(model: PreTrainedModel, texts: int, tokens: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [texts, tokens] of arbitrary tokens, none of which is padding; the last one ends a text where
    the model is an encoder with a decoder, whose head looks for it."""
    config = model.config.get_text_config()
    pad, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None) or 64  # CANINE has none
    end = getattr(model.config, "eos_token_id", None) if model.config.is_encoder_decoder else None
    end = end[0] if isinstance(end, list) else end
    vocabulary = [i for i in range(min(size, 64)) if i not in (pad, end)]
    ids = torch.tensor([vocabulary[(7 * i + 3) % len(vocabulary)] for i in range(texts * tokens)])
    ids = ids.view(texts, tokens).to(input_device(model))
    if end is not None:
        ids[:, -1] = end
    return ids, torch.ones_like(ids)


def padded_inputs(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Two texts of 9 and SHORT tokens, padded on the right; both end as those of `trace_inputs` do."""
    ids, mask = trace_inputs(model, 2, 9)
    mask[1, SHORT:] = 0
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    if model.config.is_encoder_decoder:
        ids[1, SHORT - 1] = ids[1, -1]
    ids[1, SHORT:] = 0 if pad is None else pad
    return ids, mask


def agree(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Equal to the rounding of the dtype that a model computes in; the scale is that of the logits b."""
    tolerance = ROUNDING.get(dtype, 1e-4)
    return bool((a.float() - b.float()).abs().max() <= tolerance * max(1.0, b.float().abs().max().item()))


@torch.inference_mode()
def reads_token_types(model: PreTrainedModel) -> bool:
    """Whether token types of 0 change what a model computes: GPT-2, which has no table of them, takes them for words. False where the
    weights are not here."""
    if hasattr(model.config.get_text_config(), "type_vocab_size"):
        return False
    if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return False
    ids, mask = trace_inputs(model, 1, SHORT)
    without, zeros = (model(input_ids=ids, attention_mask=mask, **more)[0] for more in ({}, {"token_type_ids": torch.zeros_like(ids)}))
    return bool(without.isfinite().all()) and not agree(zeros, without, model.dtype)


@torch.inference_mode()
def check_padding(model: PreTrainedModel, what: str) -> None:
    """Refuse a head that reads the last column of a batch, which here is padding, and warn where padding changes the logits otherwise.

    model: in eval mode, its padding token settled. Of ZeRO-3's shares of weights, which run in an engine alone, nothing is asked.
    """
    architecture = type(model).__name__
    if any(getattr(module, "summary_type", None) == "last" for module in model.modules()):
        raise UserError(
            f"{what}: {architecture} reads the last column of a batch (summary_type in config.json), which is padding where texts "
            "are padded on the right, as here; use another architecture"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return
    ids, mask = padded_inputs(model)
    try:
        together = model(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[1:, :SHORT], attention_mask=mask[1:, :SHORT]).logits
    except Exception as error:  # whatever an architecture says of a configuration that it cannot run
        told = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{what}: {architecture} fails on a text of {ids.shape[1]} and one of {SHORT} tokens ({told})") from error
    if together.isfinite().all() and not agree(alone, together[1:], model.dtype):
        log.warning("%s: padding changes the logits of %s: they depend on the batch a text is in (--token_budget)", what, architecture)
