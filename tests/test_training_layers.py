"""Layers in training: the contract's masks, whatever the batch, in every form that the layers take, on a GPU as well (here with the
plain forms of its ops), and nothing left behind."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from muka_fast import fused_layers as fused
from muka_fast import intercept as intercept_module
from muka_fast import training_layers as training
from muka_fast.fused_layers import fused_layers
from muka_fast.intercept import dropout_modules, intercept, layer_modules
from muka_fast.ops import table
from muka_fast.postln import LAYERS, layer_calls
from muka_fast.seeds import seed_of
from muka_fast.sites import Masks, list_sites
from muka_fast.training_layers import training_layers

LENGTHS, IDS, EPOCH, SEED = (9, 4, 1, 6), (70, 3, 2**32 - 1, 0), 2, 5
CPU, ALL = torch.device("cpu"), (0, 1, 2, 3)
FAMILIES = [(family, {}) for family in LAYERS] + [("albert", {"num_hidden_groups": 3, "layers": 6}), ("bert", {"layers": 1})]
FAMILIES += [("bert", {"hidden": 20})]  # no multiple of eight
EACH_FAMILY = pytest.mark.parametrize(("family", "options"), FAMILIES, ids=str)


def as_on_a_gpu(monkeypatch, takes: bool = True) -> None:
    """Layers take the form of a GPU, whose attention has an op of its own where `takes`."""
    for module in (fused, training):
        monkeypatch.setattr(module, "is_gpu", lambda device: True)
    monkeypatch.setattr(fused, "takes", lambda *states: takes)


@pytest.fixture(params=["cpu", "gpu"])
def place(request, monkeypatch) -> str:
    """Where the layers are made to believe they are."""
    if request.param == "gpu":
        as_on_a_gpu(monkeypatch)
    return request.param


def is_intercepted(model) -> bool:
    return model.config._attn_implementation == intercept_module.ATTENTION_NAME


def batch(model, rows=ALL) -> dict[str, torch.Tensor]:
    """Texts of several lengths, padded on the right to the longest of `rows`."""
    ids = torch.randint(5, model.config.vocab_size, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor(LENGTHS)[list(rows)]
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.where(mask.bool(), ids[list(rows), : mask.shape[1]], model.config.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}


def logits_and_gradients(model, inputs) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(**inputs).logits
    (logits * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
    return [logits.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())]


def trained(model, rows=ALL, seed: int = SEED, epoch: int = EPOCH) -> list[torch.Tensor]:
    with training_layers(model, seed, CPU, len(IDS)) as next_texts:
        next_texts(torch.tensor([IDS[row] for row in rows]), epoch)
        return logits_and_gradients(model, batch(model, rows))


def assert_close(found, expected, **limits) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **limits)


@EACH_FAMILY
def test_masks_are_those_of_a_scoring_pass(family, options, make_model, place):
    """The whole model as scores take it, eval mode and no token left out: the same logits, the same gradients."""
    model = make_model(family, ("a", "b", "c"), dropout=0.3, **options)
    sites = list_sites(model)
    masks = Masks(model, sites, {site.index: site.p for site in sites}, seed_of(SEED, "student"), torch.tensor(IDS), 1, EPOCH)
    with intercept(model, masks):
        expected = logits_and_gradients(model, batch(model))
    assert_close(trained(model.train()), expected, rtol=1e-4, atol=1e-5)
    assert model.training and not any("forward" in vars(module) for module in model.modules())
    assert not is_intercepted(model) and not model._forward_pre_hooks


@EACH_FAMILY
def test_batches_change_no_mask(family, options, make_model, place):
    model = make_model(family, ("a", "b", "c"), dropout=0.3, **options).train()
    together = trained(model)
    parts = [trained(model, rows) for rows in ([2], [3, 1], [0])]
    order = torch.cat([part[0] for part in parts])[[3, 2, 0, 1]]
    summed = [torch.stack(gradients).sum(0) for gradients in zip(*(part[1:] for part in parts), strict=True)]
    assert_close([order, *summed], together, rtol=1e-4, atol=1e-5)


def test_another_epoch_seed_or_text_has_other_masks(make_model, place):
    model = make_model("bert", ("a", "b", "c"), dropout=0.3).train()
    one, again = trained(model)[0], trained(model)[0]
    assert torch.equal(one, again)
    others = [trained(model, epoch=EPOCH + 1)[0], trained(model, seed=SEED + 1)[0]]
    assert all((other - one).abs().amax(1).min() > 1e-4 for other in others)
    with training_layers(model, SEED, CPU, len(IDS)) as next_texts:
        next_texts(torch.tensor([70, 4, 5, 6]), EPOCH)
        moved = (model(**batch(model)).logits - one).abs().amax(1)
    assert moved[0] < 1e-5 and moved[1:].min() > 1e-4


def test_every_probability_of_the_model_is_its_own(make_model):
    """What is dropped at a site is p of it, the rest is scaled."""
    model = make_model("bert", ("a", "b", "c"), attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.25).train()
    seen = []
    dropout = model.bert.encoder.layer[0].output.dropout
    with training_layers(model, SEED, CPU, len(IDS)) as next_texts:
        forward = dropout.forward
        dropout.forward = lambda x: seen.append((x, forward(x))) or seen[-1][1]
        for epoch in range(20):
            next_texts(torch.tensor(IDS), epoch)
            model(**batch(model))
        dropout.forward = forward
    before, after = (torch.cat([pair[place] for pair in seen]) for place in (0, 1))
    kept = after != 0
    assert 1 - kept.float().mean() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(after[kept], before[kept] / 0.75)


@pytest.mark.parametrize(("family", "recomputed_alike"), [("roberta", True), ("albert", False)])
def test_recomputed_layers_draw_the_same_masks(family, recomputed_alike, make_model):
    """ALBERT, whose backward would call one module in another order, takes PyTorch's dropout and not the wrong masks."""
    model = make_model(family, ("a", "b", "c"), dropout=0.3, layers=3).train()
    expected = trained(model)
    if recomputed_alike:
        model.gradient_checkpointing_enable()
    else:
        model.base_model.encoder.gradient_checkpointing = True  # what that sets; transformers 5.23 refuses it for ALBERT
    with training_layers(model, SEED, CPU, len(IDS)):
        assert is_intercepted(model) == recomputed_alike
    if recomputed_alike:
        assert_close(trained(model), expected)


@pytest.mark.parametrize(("family", "device"), [("deberta-v2", "cpu"), ("llama", "cpu"), ("llama", "cuda"), ("bert", "meta")])
def test_other_models_and_devices_drop_as_pytorch_does(family, device, make_model):
    model = make_model(family, ("a", "b", "c"), dropout=0.3).train()
    dropout = nn.functional.dropout
    with training_layers(model, SEED, torch.device(device), len(IDS)) as next_texts:
        next_texts(torch.tensor(IDS), 0)
        assert nn.functional.dropout is dropout and not is_intercepted(model) and not model._forward_pre_hooks
        assert not any("forward" in vars(module) for module in dropout_modules(model).values())
        torch.manual_seed(0)
        one = model(**batch(model)).logits
        torch.manual_seed(1)
        assert not torch.equal(one, model(**batch(model)).logits)


@pytest.mark.parametrize("p", [1.0, 0.999999])
def test_what_16_bits_are_not_for_is_pytorchs(p, make_model):
    """All but everything dropped. Beside such a site the others are PyTorch's too."""
    model = make_model("bert", ("a", "b", "c"), dropout=0.0, classifier_dropout=p).train()
    with training_layers(model, SEED, CPU, len(IDS)) as next_texts:
        next_texts(torch.tensor(IDS), 0)
        logits = model(**batch(model)).logits
    torch.testing.assert_close(logits, model.classifier.bias.expand_as(logits), rtol=0, atol=1e-3)


def test_a_model_that_does_not_train_drops_nothing(make_model):
    model = make_model("bert", ("a", "b", "c"), dropout=0.3)
    plain = model(**batch(model)).logits
    with training_layers(model, SEED, CPU, len(IDS)) as next_texts:
        next_texts(torch.tensor(IDS), 0)
        torch.testing.assert_close(model(**batch(model)).logits, plain)


def test_another_model_is_left_alone(make_model):
    """While one trains: its dropout, in a layer that `first_token_only` cuts as well, and a call of the function outside of any."""
    one, other = (make_model("bert", ("a", "b", "c"), seed=seed, dropout=0.3).train() for seed in (0, 1))
    with training_layers(one, SEED, CPU, len(IDS)), fused_layers(other):
        torch.manual_seed(3)
        found = other(**batch(other)).logits
        torch.manual_seed(4)
        assert (nn.functional.dropout(torch.ones(1000), 0.5) == 0).any()
        assert nn.functional.dropout(torch.ones(1000), 0.5, training=False).sum() == 1000
    with fused_layers(other):
        torch.manual_seed(3)
        assert torch.equal(other(**batch(other)).logits, found)


def test_what_others_put_in_the_place_of_dropout_stays_theirs(make_model, monkeypatch):
    """Also where they do it inside our block and undo it after its end, which puts ours back; and Ctrl-C while ours is put there."""
    plain = nn.functional.dropout
    model = make_model("bert", ("a", "b", "c"), dropout=0.3).train()
    foreign = lambda *args, **kwargs: plain(*args, **kwargs)
    with training_layers(model, SEED, CPU, len(IDS)):
        theirs, nn.functional.dropout = nn.functional.dropout, foreign
    assert nn.functional.dropout is foreign
    nn.functional.dropout = theirs
    for _ in range(2):
        with training_layers(model, SEED, CPU, len(IDS)):
            assert nn.functional.dropout(torch.ones(9), 0.0).sum() == 9
    assert nn.functional.dropout is plain

    class Interrupted(dict):
        def __setitem__(self, *item):
            raise KeyboardInterrupt

    monkeypatch.setattr(intercept_module, "_handler_of", Interrupted())
    with pytest.raises(KeyboardInterrupt), training_layers(model, SEED, CPU, len(IDS)):
        pytest.fail("the block was entered")
    assert nn.functional.dropout is plain


def test_without_the_extension_dropout_is_pytorchs(make_model, monkeypatch):
    model = make_model("bert", ("a", "b", "c"), dropout=0.3).train()
    monkeypatch.setitem(table.TABLE["repeat_dropout"], "cpu", "reference")
    monkeypatch.setattr(table, "BACKEND", "auto")
    with training_layers(model, SEED, CPU, len(IDS)):
        assert not is_intercepted(model)
    monkeypatch.setattr(table, "BACKEND", "reference")  # asked for, however slow
    with training_layers(model, SEED, CPU, len(IDS)):
        assert is_intercepted(model)


def test_on_a_gpu_every_step_reads_its_masks_at_the_same_addresses(make_model, monkeypatch):
    """As a recorded step does, whatever its texts and its epoch; every site has masks of its own."""
    as_on_a_gpu(monkeypatch)
    told, original = [], fused.residual_norm
    op = lambda *states, draws, **options: told.append(draws) or original(*states, draws=draws, **options)
    monkeypatch.setattr(fused, "residual_norm", op)
    model = make_model("bert", ("a", "b", "c"), dropout=0.3).train()
    with training_layers(model, SEED, CPU, len(IDS)) as next_texts:
        for rows, epoch in ((ALL, 0), ([1, 3], 6)):
            next_texts(torch.tensor(IDS)[list(rows)], epoch)
            model(**batch(model, rows))
            assert told[-1].key.tolist()[1] == epoch and told[-1].example_ids.tolist() == [IDS[row] for row in rows]
    assert len({(draws.key.data_ptr(), draws.example_ids.data_ptr()) for draws in told}) == 1
    assert len(told) == 8 and len({draws.site for draws in told[:4]}) == 4


def hook(modules) -> None:
    """So that these layers are not fused."""
    for layer in modules:
        layer.output.dense.register_forward_hook(lambda *call: None)


@pytest.mark.parametrize("why", ["long texts", "hooks", "both"])
def test_attention_that_a_gpu_leaves_to_pytorch_is_told(why, make_model, monkeypatch, caplog):
    """Once; every other site has the contract's masks."""
    caplog.set_level("INFO", logger="muka_fast")
    as_on_a_gpu(monkeypatch, takes=why == "hooks")
    model = make_model("bert", ("a", "b", "c"), dropout=0.3, layers=4).train()
    hook({"long texts": [], "hooks": layer_modules(model), "both": layer_modules(model)[:1]}[why])
    first = trained(model)
    assert [record.message for record in caplog.records] == [training.OF_PYTORCH % "dropout of attention"]
    assert not torch.equal(first[0], trained(model)[0])
    for layer in layer_modules(model)[:-1]:  # the last one, of one row, is the contract's
        layer.attention.self.dropout.p = 0.0
    assert_close(trained(model), trained(model), rtol=0, atol=0)


@pytest.mark.parametrize("why", ["nothing drops there", "the last layer", "MPNet"])
def test_attention_that_is_ours_is_not_told(why, make_model, monkeypatch, caplog):
    """MPNet, fused or not, has probabilities in memory."""
    caplog.set_level("INFO", logger="muka_fast")
    as_on_a_gpu(monkeypatch)
    options = {"attention_probs_dropout_prob": 0.0} if why == "nothing drops there" else {}
    model = make_model("mpnet" if why == "MPNet" else "bert", ("a", "b", "c"), layers=3, **{"dropout": 0.3, **options}).train()
    hook(layer_modules(model)[-1 if why == "the last layer" else 0 :])
    assert_close(trained(model), trained(model), rtol=0, atol=0)
    assert not caplog.records


def test_layers_of_one_module_that_are_not_fused_drop_as_pytorch_does(make_model, monkeypatch, caplog):
    """On a GPU, where attention would not be counted in ALBERT's."""
    caplog.set_level("INFO", logger="muka_fast")
    as_on_a_gpu(monkeypatch)
    model = make_model("albert", ("a", "b", "c"), dropout=0.3, layers=3).train()
    layer_calls(model)[0].albert_layers[0].ffn_output.register_forward_hook(lambda *call: None)
    assert not torch.equal(trained(model)[0], trained(model)[0])
    assert {record.message for record in caplog.records} == {training.OF_PYTORCH % "dropout"}


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_a_forward_that_ended_early_changes_no_later_masks(family, make_model, place):
    """ALBERT's layers are calls of one module, which are counted."""
    model = make_model(family, ("a", "b", "c"), dropout=0.3, layers=4).train()
    expected = trained(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    with training_layers(model, SEED, CPU, len(IDS)) as next_texts:
        next_texts(torch.tensor(IDS), EPOCH)
        handle = layer_calls(model)[-1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch(model))
        handle.remove()
        assert_close(logits_and_gradients(model, batch(model)), expected)


def test_models_of_two_threads_end_in_any_order(make_model):
    dropout = nn.functional.dropout
    models = [make_model("bert", ("a", "b", "c"), seed=seed, dropout=0.3).train() for seed in (0, 1)]
    alone = [trained(model) for model in models]
    first, second = (ExitStack(), ExitStack())
    layers = [training_layers(model, SEED, CPU, len(IDS)) for model in models]
    told = [block.enter_context(form) for block, form in zip((first, second), layers, strict=True)]
    for next_texts in told:
        next_texts(torch.tensor(IDS), EPOCH)
    first.close()
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(logits_and_gradients, models[1], batch(models[1])).result()
    second.close()
    assert_close(found, alone[1], rtol=1e-4, atol=1e-5)
    assert nn.functional.dropout is dropout and not intercept_module._handler_of


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_kernels_of_a_gpu_draw_the_masks_of_a_scoring_pass(interpreter):
    interpreter(__file__, "scoring_pass and gpu and (albert or mpnet) and not kernels")
