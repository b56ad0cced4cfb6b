"""Layers fused as on a GPU, here with the plain form of the op: the plain model's logits and gradients, dropout, what stays."""

import contextlib

import pytest
import torch
from test_first_token import EACH_FAMILY, batch, logits_and_gradients

from muka_fast import fused_layers as fused
from muka_fast import training_layers
from muka_fast.config import RunConfig
from muka_fast.ds_config import prepare_ds_config
from muka_fast.engine import Engine
from muka_fast.first_token import first_token_only
from muka_fast.fused_layers import fused_layers
from muka_fast.intercept import layer_modules
from muka_fast.postln import layer_calls


@pytest.fixture
def calls(monkeypatch):
    """Options and dtypes of every call of residual_norm."""
    told = []

    def op(x, dense_bias, residual, *norm, **options):
        told.append(options | {"dtypes": {x.dtype, residual.dtype}})
        return original(x, dense_bias, residual, *norm, **options)

    original = fused.residual_norm
    monkeypatch.setattr(fused, "residual_norm", op)
    return told


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """One that self_attention takes everything on."""
    for module in (fused, training_layers):
        monkeypatch.setattr(module, "is_gpu", lambda device: True)
    monkeypatch.setattr(fused, "takes", lambda *states: True)


@pytest.fixture
def attentions(monkeypatch):
    """Dropout probability and draws of every call of self_attention."""
    told = []
    original = fused.self_attention
    op = lambda *states, p, draws, mask: told.append((p, draws)) or original(*states, p=p, draws=draws, mask=mask)
    monkeypatch.setattr(fused, "self_attention", op)
    return told


def compare(model, inputs, rtol=1e-5, atol=1e-5):
    plain = logits_and_gradients(model, inputs)
    with fused_layers(model):
        ours = logits_and_gradients(model, inputs)
    for one, other in zip(plain, ours, strict=True):
        torch.testing.assert_close(other, one, rtol=rtol, atol=atol)
    assert not any("forward" in vars(module) for module in model.modules()) and not model.base_model._forward_pre_hooks


@EACH_FAMILY
@pytest.mark.parametrize("padded", [True, False])
def test_same_logits_and_gradients(family, options, padded, make_model, as_on_a_gpu, calls, attentions):
    model = make_model(family, ("a", "b", "c"), dropout=0.0, **options).train()
    inputs = batch(model)
    compare(model, inputs if padded else {name: value[:1] for name, value in inputs.items()})
    assert len(calls) == 2 * len(layer_calls(model))
    assert all(call["p"] == 0 and call["draws"] is None for call in calls)
    assert attentions == ([] if family == "mpnet" else [(0.0, None)] * (len(layer_calls(model)) - 1))  # all but the last, of one row


@EACH_FAMILY
def test_every_fused_dropout_drops(family, options, make_model, as_on_a_gpu, calls):
    model = make_model(family, ("a", "b", "c"), dropout=0.1, **options).train()
    inputs = batch(model)
    ids = torch.arange(len(inputs["input_ids"]))
    with training_layers.training_layers(model, 0, ids.device, len(ids)) as next_texts:
        next_texts(ids, 0)
        model(**inputs)
        sites = [call for call in calls if call["p"] == 0.1]
        assert len(sites) >= len(layer_calls(model))  # DistilBERT and ALBERT have one a layer, the others two
        assert len({call["draws"].site for call in sites}) == len(sites)
        calls.clear()
        model.eval()(**inputs)
    assert calls and all(call["p"] == 0 and call["draws"] is None for call in calls)


@EACH_FAMILY
def test_what_attention_drops_is_of_sites_of_its_own(family, options, make_model, as_on_a_gpu, calls, attentions):
    model = make_model(family, ("a", "b", "c"), dropout=0.1, **options).train()
    inputs = batch(model)
    ids = torch.arange(len(inputs["input_ids"]))
    with training_layers.training_layers(model, 0, ids.device, len(ids)) as next_texts:
        next_texts(ids, 0)
        model(**inputs)
    drawn = {draws.site for p, draws in attentions if p == 0.1} - {call["draws"].site for call in calls if call["p"]}
    assert len(drawn) == len(attentions) == (0 if family == "mpnet" else len(layer_calls(model)) - 1)


def test_without_masks_nothing_is_fused_around_a_dropout(make_model, as_on_a_gpu, calls, attentions):
    model = make_model("bert", ("a", "b", "c"), dropout=0.1).train()
    with fused_layers(model):
        torch.manual_seed(0)
        one = model(**batch(model)).logits
        assert not torch.equal(one, model(**batch(model)).logits)
    assert not calls and not attentions


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_attention_that_the_op_does_not_take_is_pytorchs(p, make_model, as_on_a_gpu, attentions, monkeypatch):
    model = make_model("bert", dropout=0.0, layers=3).train()
    monkeypatch.setattr(fused, "takes", lambda *states: p > 0)
    for layer in layer_modules(model):
        layer.attention.self.dropout.p = p
    compare(model, batch(model))
    assert not attentions


def test_dropping_everything_is_the_modules_own(make_model, as_on_a_gpu, calls):
    model = make_model("bert", dropout=0.0).train()
    layer_modules(model)[0].output.dropout.p = 1.0
    compare(model, batch(model))
    assert len(calls) == 3


def test_under_autocast_rows_have_the_dtype_of_the_product(make_model, as_on_a_gpu, calls):
    model = make_model("roberta", dropout=0.0).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(model, batch(model), rtol=5e-2, atol=5e-2)
    assert all(call["dtypes"] == {torch.bfloat16} for call in calls)


def test_on_the_cpu_nothing_is_fused(family, make_model, calls):
    model = make_model(family, dropout=0.0).train()
    with first_token_only(model):
        before = logits_and_gradients(model, batch(model))
    with fused_layers(model):
        after = logits_and_gradients(model, batch(model))
    assert not calls and all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def sharded(layer):
    layer.output.dense.weight.ds_id = 0


def hooked(layer):
    layer.output.LayerNorm.register_forward_hook(lambda *call: None)


def without_bias(layer):
    layer.attention.output.dense.bias = None


def subclassed(layer):
    layer.output.dense.__class__ = type("Adapted", (torch.nn.Linear,), {})


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("change", [sharded, hooked, without_bias, subclassed])
def test_a_layer_that_is_not_plain_runs_as_it_is(change, place, make_model, as_on_a_gpu, calls):
    model = make_model("bert", dropout=0.0, layers=3).train()
    change(layer_modules(model)[place])
    compare(model, batch(model))
    assert len(calls) == 4


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_with_activation_checkpointing_no_layer_is_fused(family, make_model, as_on_a_gpu, calls):
    model = make_model(family, dropout=0.0).train()
    model.gradient_checkpointing_enable()
    compare(model, batch(model))
    assert not calls


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_under_deepspeed_they_learn_as_the_plain_model(stage, make_model, as_on_a_gpu, calls):
    ids = torch.tensor([[5, 7, 9, 11, 6], [5, 8, 6, 0, 0]])
    told = []
    for layers in (lambda model: contextlib.nullcontext(), fused_layers):
        ds, config = prepare_ds_config({"zero_optimization": {"stage": stage}}, RunConfig(batch_size=2, learning_rate=1e-2), 1)
        model = make_model("bert", ("a", "b", "c"), dropout=0.0)
        engine = Engine.create(model, config, ds, 10)
        with layers(model):
            for _ in range(3):
                loss = engine(input_ids=ids, attention_mask=(ids != 0).long()).logits.square().sum()
                engine.backward(loss)
                engine.step()
                told.append((loss.item(), engine.grad_norm))
    assert len(calls) == 3 * 2 * 2  # steps, layers, norms of each
    for plain, ours in zip(told[:3], told[3:], strict=True):
        assert ours == pytest.approx(plain, rel=1e-3)
