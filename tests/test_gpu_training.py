"""On a CUDA device (bench/gpu.sh): the student's training, fused layers and recorded steps against what they stand for, waiting."""

import math
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import muka_fast.ops
from muka_fast import fused_layers as fused
from muka_fast import recorded, teach, vocabulary
from muka_fast.config import RunConfig
from muka_fast.data import Tokens
from muka_fast.ds_config import prepare_ds_config
from muka_fast.engine import Engine, init_distributed
from muka_fast.fused_layers import fused_layers
from muka_fast.loop import train_step
from muka_fast.methods import METHODS
from muka_fast.ops import table
from muka_fast.ops.adamw import AdamW, Rule, Tensors
from muka_fast.ops.reference import Draws, adamw_ref, residual_norm_ref, self_attention_ref
from muka_fast.ops.residual_norm import residual_norm
from muka_fast.ops.self_attention import self_attention, takes
from muka_fast.training_layers import training_layers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draws(texts):
    return Draws(torch.tensor([-(2**62) - 3, 2**32 - 1], device="cuda"), torch.arange(texts, device="cuda") * 7 + 2**32 - 3, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("width", [33, 384, 768, 1024, 2048, 4096])
@pytest.mark.parametrize("rows", [1, 70, 5000])
def test_residual_norm(rows, width, p, dtype):
    """Result and five gradients against float64 autograd of the definition. 16 bits round z between the directions."""
    tensors = [torch.randn(rows, width, device="cuda").to(dtype) for _ in range(3)]
    tensors += [torch.randn(width, device="cuda") for _ in range(3)]
    texts = rows // 5 or 1
    drawn = draws(texts)

    def results(form, x, residual, dy, dense_bias, weight, bias):
        leaves = [t.detach().requires_grad_() for t in (x, dense_bias, residual, weight, bias)]
        y = form(*(t.unflatten(0, (texts, -1)) if t.dim() == 2 else t for t in leaves), p=p, eps=1e-12, draws=drawn).flatten(0, 1)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    slack = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    got, exact = results(residual_norm, *tensors), results(residual_norm_ref, *(t.double() for t in tensors))
    for ours, truth in zip(got, exact, strict=True):
        assert not ours.isnan().any()
        assert (ours.double() - truth).abs().max() <= slack * truth.abs().max().clamp_min(1)


def test_a_replayed_graph_of_residual_norm_draws_anew():
    x, residual = (torch.randn(100, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    dense_bias, weight, bias = (torch.randn(768, device="cuda", requires_grad=True) for _ in range(3))
    leaves, dy, drawn = (x, dense_bias, residual, weight, bias), torch.randn_like(x), draws(100)

    def step(drawn=drawn):
        y = residual_norm(*leaves, p=0.1, eps=1e-5, draws=drawn)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = []
    for changed in (drawn.key[1:], drawn.key[:1], drawn.example_ids):
        changed.add_(1)
        graph.replay()
        seen.append(captured[0].clone())
        fresh = step(Draws(drawn.key.clone(), drawn.example_ids.clone(), drawn.site))
        assert all(torch.equal(replayed, launched) for replayed, launched in zip(captured, fresh, strict=True))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("p", "padded"), [(0.0, True), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("length", [1, 31, 64, 65, 128])
def test_self_attention(length, head_dim, p, padded, dtype):
    """Result and gradient against float64 autograd of the definition."""
    if not takes(dtype, length, head_dim, torch.device("cuda")):
        pytest.skip(f"texts of {length} tokens are PyTorch's on this card")
    heads, texts = 12, 5
    qkv = torch.randn(texts, length, 3 * heads * head_dim, device="cuda").to(dtype)
    dy = torch.randn(texts, length, heads * head_dim, device="cuda").to(dtype)
    lengths = torch.tensor([length, 1, max(1, length - 1), max(1, length // 2), length], device="cuda")
    mask = (torch.arange(length, device="cuda") < lengths[:, None])[:, None, None].expand(-1, 1, length, -1) if padded else None

    def results(form, qkv, dy):
        qkv = qkv.detach().requires_grad_()
        y = form(qkv, heads, p=p, draws=draws(texts), mask=mask)
        return y.detach(), *torch.autograd.grad(y, qkv, dy)

    slack = {torch.float16: 2**-8, torch.bfloat16: 2**-5}[dtype]  # probabilities and gradients of scores have 16 bits in the products
    got, exact = results(self_attention, qkv, dy), results(self_attention_ref, qkv.double(), dy.double())
    for ours, truth in zip(got, exact, strict=True):
        assert not ours.isnan().any()
        assert (ours.double() - truth).abs().max() <= slack * truth.abs().max().clamp_min(1)


@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
def test_adamw_as_a_graph_whose_addresses_are_filled_in_afterwards(max_norm, casts):
    """Four replays with other gradients against float64; one weight has no gradient."""
    shapes, rule = [(1,), (7,), (2049,), (768, 768), (30_000, 384), (5,)], Rule((0.9, 0.999), 1e-8, max_norm)
    weights = [torch.randn(shape, device="cuda") for shape in shapes]
    moments = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    kept = [w.bfloat16() if casts and i != 2 else None for i, w in enumerate(weights)]
    tensors = Tensors(weights, *moments, kept, [0.1 * (i % 2) for i in range(len(shapes))])
    exact = Tensors(*([None if t is None else t.double() for t in column] for column in tensors[:4]), tensors.decays)
    before, ours = weights[-1].clone(), AdamW(tensors, rule)
    grads = [torch.zeros_like(w if cast is None else cast) for w, cast in zip(weights, kept, strict=True)]
    grads[-1], rates = None, torch.zeros(3, device="cuda")
    addresses = torch.zeros(len(shapes), dtype=torch.int64, device="cuda")
    ours.step(grads, rates, addresses)  # compiles, and finds no gradient
    assert torch.equal(weights[-1], before) and not any(m.any() for m in tensors.exp_avgs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = ours.step(grads, rates, addresses)
    addresses.copy_(ours.addresses(grads))
    for step in range(1, 5):
        for grad in grads[:-1]:
            grad.normal_()
        rates.copy_(torch.tensor(rule.rates(1e-3 / step, step)))
        graph.replay()
        wanted = adamw_ref(*exact, grads, rates.double(), *rule)
        assert norm.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.equal(weights[-1], before)
    for column, truth in zip(tensors[:3], exact[:3], strict=True):
        for got, want in zip(column, truth, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert all(cast is None or torch.equal(cast, w.bfloat16()) for w, cast in zip(weights, kept, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "mpnet", "albert"])
def test_fused_layers_train_as_the_plain_model(family, autocast, make_model, monkeypatch):
    model = make_model(family, ("a", "b", "c"), hidden=128, dropout=0.0, layers=3).cuda().train()
    ids = torch.randint(5, 50, (6, 24), device="cuda")
    mask = (torch.arange(24, device="cuda") < torch.tensor([24, 9, 1, 17, 24, 2], device="cuda")[:, None]).long()

    def results(autocast=autocast):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, attention_mask=mask).logits
        (logits.float() * torch.linspace(-1, 2, logits.numel(), device="cuda").view(logits.shape)).sum().backward()
        return [logits.detach().float(), *(p.grad.clone() for p in model.parameters())]

    attentions = []
    monkeypatch.setattr(fused, "self_attention", lambda *given, **more: attentions.append(given) or self_attention(*given, **more))
    exact, plain = results(False), results()
    with fused_layers(model):
        ours = results()
        assert len(attentions) == (2 if autocast and family != "mpnet" else 0)
    for truth, theirs, found in zip(exact, plain, ours, strict=True):  # bf16: ours rounds what lies between layers as well
        assert (found - truth).norm() <= 3 * (theirs - truth).norm() + 1e-4 * truth.norm().clamp_min(1)


def seen_by_training(model, device, rows, epoch, autocast=False):
    """Logits and gradients of some of eight texts, in one batch, as a training step of this epoch has them."""
    ids = torch.randint(5, 50, (8, 24), generator=torch.Generator().manual_seed(1)).to(device)
    lengths = torch.tensor([24, 9, 1, 17, 24, 2, 11, 20], device=device)
    mask, rows = (torch.arange(24, device=device) < lengths[:, None]).long(), list(rows)
    model.to(device).zero_grad()
    with training_layers(model, 3, torch.device(device), 8) as next_texts:
        next_texts(torch.tensor(rows) + 2**32 - 4, epoch)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids[rows], attention_mask=mask[rows]).logits
        logits.float().square().sum().backward()
    return torch.cat([logits.detach().flatten(), *(p.grad.flatten() for p in model.parameters())]).double().cpu()


@pytest.mark.skipif(table._C is None, reason="the extension is not built: a CPU would drop as PyTorch does")
@pytest.mark.parametrize("width", [128, 132])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "mpnet", "albert"])
def test_training_draws_the_masks_of_a_cpu(family, width, make_model):
    """In fp32, without the attention's, which is PyTorch's there; in bf16 with it, apart by far less than from another epoch.
    Width 132 is no multiple of eight, and has heads that attention's kernel does not take."""
    attention = {"attention_dropout" if family == "distilbert" else "attention_probs_dropout_prob": 0.0}
    for autocast in (False, True):
        dropout = {"dropout": 0.3} | ({} if autocast and width == 128 else attention)
        model = make_model(family, ("a", "b", "c"), hidden=width, layers=3, **dropout).train()
        exact, other = (seen_by_training(model, "cpu", range(8), epoch) for epoch in (4, 5))
        error = (seen_by_training(model, "cuda", range(8), 4, autocast) - exact).norm() / (other - exact).norm()
        assert error < (0.1 if autocast else 1e-3)


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_neither_batches_nor_order_change_a_mask_of_training(family, make_model):
    model = make_model(family, ("a", "b", "c"), hidden=128, layers=3, dropout=0.3).train()
    whole, other = (seen_by_training(model, "cuda", range(8), epoch, True)[24:] for epoch in (4, 5))
    parts = sum(seen_by_training(model, "cuda", rows, 4, True)[3 * len(rows) :] for rows in ([7, 2], [0], [5, 1, 3, 6, 4]))
    assert (parts - whole).norm() < 0.1 * (other - whole).norm()


def test_a_teacher_learns_the_same_from_the_word_vectors_of_its_texts(make_model, make_tokenizer, texts, monkeypatch):
    tokenizer, recipe, found = make_tokenizer(), teach.Recipe(epochs=2, learning_rate=1e-3, batch_size=4, weight_decay=0.0), []
    for share in (0.9, 0.0):
        monkeypatch.setattr(vocabulary, "WORTHWHILE", share)
        model = make_model("bert", tokenizer=tokenizer).cuda()
        teach.fine_tune(model, tokenizer, texts[:8], [0, 1] * 4, recipe)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (found[0] - found[1]).norm() < 1e-3 * found[1].norm()


def student_steps(model, ds, precision, **options):
    """An engine over six texts and two teachers, and its step over some of their rows, not yet settled, told whom to tell of them."""
    config = RunConfig(method="muka-soft", uncertainty="predictive_entropy", batch_size=6, learning_rate=1e-3, **options)
    init_distributed("cuda")
    ds, config = prepare_ds_config(ds | {"bf16": {"enabled": precision == "bf16"}}, config, 1, "cuda")
    torch.manual_seed(0)
    space = SimpleNamespace(teacher_to_union=[0, 1, 1, 2, 3], num_classes=4)
    measures = dict.fromkeys(("predictive_entropy", "expected_entropy", "mutual_information", "normalized_entropy"), torch.rand(6, 2))
    sup = SimpleNamespace(logits=torch.randn(6, 5), offsets=[0, 2, 5], teachers=[0, 1], class_counts=[2, 3], **measures)
    method = METHODS[config.method](config, sup, space, None)
    engine = Engine.create(model, config, ds, 20)
    lengths = np.array([5, 5, 5, 12, 12, 12])
    tokens = Tokens(np.arange(lengths.sum(), dtype=np.int32) % 40 + 5, np.concatenate([[0], lengths.cumsum()]))
    layers = training_layers(engine.ds.module, 0, engine.device, 6)

    def step(rows, next_texts):
        masked = lambda rows: next_texts(torch.from_numpy(rows), engine.completed_steps)
        return train_step(engine, method, tokens, np.array(rows), config, lambda: 0.0, 0, masked)

    return engine, layers, step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "modernbert", "llama"])
def test_recorded_steps_are_those_launched_one_by_one(precision, family, make_model, monkeypatch):
    """Of three shapes, each first launched, then recorded, then replayed, the last one first met after replays of others; beside steps
    of the same kind that are never recorded, and DeepSpeed's."""
    outcomes = []
    A, B, C = [0, 1, 2], [3, 4, 5], [0, 1]
    for largest, graphs in ((recorded.LARGEST, True), (0, True), (0, False)):
        monkeypatch.setattr(recorded, "LARGEST", largest)
        engine, layers, step = student_steps(make_model(family, ("a", "b", "c", "d")), {}, precision, cuda_graphs=graphs)
        before = [parameter.detach().clone() for parameter in engine.ds.module.parameters()]
        with layers as next_texts:
            losses = [step(rows, next_texts).settle(None, None)[0] for rows in (A, A, B, A, B, C, A, C, B, C)]
        moved = torch.cat([(b - a.detach()).flatten() for a, b in zip(engine.ds.module.parameters(), before, strict=True)])
        outcomes.append((losses, moved, engine.grad_norm))
        if graphs and engine.recorded.possible:  # MPNet of some versions of transformers waits
            assert len(engine.recorded.met) == 3 and all((r is not None) == (largest > 0) for r in engine.recorded.met.values())
        elif graphs:
            assert family == "mpnet"
        assert (engine.recorded is None) is not graphs
    (losses, moved, norm), (wanted_losses, wanted_moved, wanted_norm), (deepspeed_losses, _, _) = outcomes
    assert losses == pytest.approx(wanted_losses, rel=1e-4) and norm == pytest.approx(wanted_norm, rel=1e-2)
    assert (moved - wanted_moved).norm() < 1e-2 * wanted_moved.norm()  # AdamW moves by a sign where a gradient is rounding alone
    assert losses == pytest.approx(deepspeed_losses, rel=5e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_steps_go_on_from_a_checkpoint(precision, make_model, tmp_path):
    rows = ([0, 1, 2], [3, 4, 5])
    whole, layers, step = student_steps(make_model("bert", ("a", "b", "c", "d")), {}, precision)
    with layers as next_texts:
        for _ in range(3):
            [step(some, next_texts).settle(None, None) for some in rows]
        state = whole.save_checkpoint(tmp_path)
        wanted = [step(some, next_texts).settle(None, None)[0] for _ in range(3) for some in rows]
    resumed, layers, step = student_steps(make_model("bert", ("a", "b", "c", "d")), {}, precision)
    resumed.load_checkpoint(tmp_path, state)
    with layers as next_texts:
        found = [step(some, next_texts).settle(None, None)[0] for _ in range(3) for some in rows]
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1])
def test_no_training_step_of_ours_waits_for_the_device(stage, precision, make_model):
    """Through DeepSpeed, whose own waiting is its business: the files that a wait is told of must not be ours."""
    ds = {"train_micro_batch_size_per_gpu": 6 if stage == 0 else 3, "zero_optimization": {"stage": stage}}
    _, layers, all_rows = student_steps(make_model("bert", ("a", "b", "c", "d")), ds, precision)
    with layers as next_texts:
        step = lambda: all_rows(range(6), next_texts)
        for _ in range(3):  # compiles, allocates, records
            step().settle(None, None)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                last = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(last.settle(None, None)[0])
    waits = {f"{warning.filename}:{warning.lineno}" for warning in told if "synchroniz" in str(warning.message)}
    ours = tuple(str(Path(package.__file__).parent) + os.sep for package in (muka_fast, muka_fast.ops))
    assert not [place for place in waits if place.startswith(ours)], waits
    assert stage > 0 or not waits
