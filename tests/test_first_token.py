"""The last layer for the first token alone: the plain model's logits and gradients, its dropout sites, nothing left behind."""

import pytest
import torch
from torch import nn

from muka_fast.first_token import first_token_only
from muka_fast.intercept import layer_modules
from muka_fast.postln import LAYERS

LENGTHS = (9, 4, 1, 6)
FAMILIES = [(family, {}) for family in LAYERS] + [("albert", {"num_hidden_groups": 3, "layers": 6}), ("bert", {"layers": 1})]
EACH_FAMILY = pytest.mark.parametrize(("family", "options"), FAMILIES, ids=str)


def batch(model) -> dict[str, torch.Tensor]:
    """Texts of several lengths, padded on the right."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(5, model.config.vocab_size, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": torch.where(mask.bool(), ids, model.config.pad_token_id), "attention_mask": mask}


def logits_and_gradients(model, inputs) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(**inputs).logits
    (logits.float() * torch.linspace(-1, 2, logits.numel()).view(logits.shape)).sum().backward()
    unread = [name for name, p in model.named_parameters() if p.grad is None]
    assert unread == []
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


def compare(model, inputs, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Both forms agree, and the second one did cut the last layer."""
    plain = logits_and_gradients(model, inputs)
    widths = []
    handle = layer_modules(model)[-1].register_forward_hook(
        lambda *call: widths.append((call[-1][0] if isinstance(call[-1], tuple) else call[-1]).shape[1])
    )
    with first_token_only(model):
        cut = logits_and_gradients(model, inputs)
    assert widths[-1] == 1 and all(width == inputs["input_ids"].shape[1] for width in widths[:-1])
    for one, other in zip(plain, cut, strict=True):
        torch.testing.assert_close(other, one, rtol=rtol, atol=atol)
    handle.remove()
    assert "forward" not in vars(layer_modules(model)[-1]) and not model.base_model._forward_pre_hooks


@EACH_FAMILY
@pytest.mark.parametrize("padded", [True, False])
def test_same_logits_and_gradients(family, options, padded, make_model):
    model = make_model(family, ("a", "b", "c"), dropout=0.0, **options).train()
    inputs = batch(model)
    if not padded:
        inputs = {name: value[:1] for name, value in inputs.items()}
    compare(model, inputs)


@EACH_FAMILY
def test_every_dropout_of_the_last_layer_still_drops(family, options, make_model):
    """p = 1 at one module after the other: drop at random, and no two forms could be compared."""
    model = make_model(family, ("a", "b", "c"), dropout=0.0, **options).train()
    last = layer_modules(model)[-1]
    sites = [module for module in last.modules() if isinstance(module, nn.Dropout)]
    assert len(sites) >= 2
    without = logits_and_gradients(model, batch(model))[0]
    moved = 0
    for site in sites:
        site.p = 1.0
        compare(model, batch(model))
        moved += not torch.allclose(model(**batch(model)).logits, without, atol=1e-4)
        site.p = 0.0
    assert moved >= 2  # ALBERT has a dropout that its forward never calls


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_implementations(implementation, make_model):
    model = make_model("bert", dropout=0.0).train()
    model.set_attn_implementation(implementation)
    compare(model, batch(model))


def test_half_precision(make_model):
    model = make_model("roberta", dropout=0.0).train().bfloat16()
    compare(model, batch(model), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_with_activation_checkpointing(family, make_model):
    model = make_model(family, dropout=0.1, layers=3).train()
    inputs = batch(model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)  # recomputed layers draw the same masks again
        with first_token_only(model):
            found.append(logits_and_gradients(model, inputs))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", ["deberta-v2", "modernbert", "llama"])
def test_other_models_stay_as_they_are(family, make_model):
    model = make_model(family)
    before = model(**batch(model)).logits
    with first_token_only(model):
        assert not any("forward" in vars(module) for module in model.modules())
        assert torch.equal(model(**batch(model)).logits, before)
