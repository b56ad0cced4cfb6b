"""Recorded steps before anything is recorded: what they learn, and in what precision; which runs have them.

Recording itself needs a device: tests/test_gpu_training.py.
"""

import contextlib
import gc
import warnings
import weakref

import pytest
import torch

from muka_fast.config import RunConfig
from muka_fast.ds_config import prepare_ds_config
from muka_fast.errors import UserError
from muka_fast.optim import clip_gradients, parameter_groups
from muka_fast.recorded import RecordedSteps, recordable

IDS = torch.tensor([[5, 7, 9, 11, 6], [5, 8, 6, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def new_optimizer(model, kind=torch.optim.AdamW):
    """With moments, as the engine gives it them."""
    optimizer = kind(parameter_groups(model, 0.1), lr=1.0)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.state[parameter] = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    return optimizer


def new_steps(make_model, in_bf16):
    model = make_model("bert", ("a", "b", "c"), dropout=0.1).train()
    steps = RecordedSteps(model, in_bf16, new_optimizer(model), max_norm=0.5)
    steps.possible = False  # no device to try it on
    return model, steps


def learn(model, logits, update, count=4):
    """Losses and norms of a few steps."""
    told = []
    for step in range(count):
        torch.manual_seed(step)
        loss = torch.nn.functional.cross_entropy(logits().float(), torch.tensor([0, 2]))
        loss.backward()
        told.append((loss.item(), update(1e-2 / (step + 1), step + 1).item()))
    return told


def by_hand(model, context=contextlib.nullcontext):
    """The same with PyTorch alone."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1))

    def logits():
        with context():
            return model(**BATCH).logits

    def update(lr, _):
        for group in optimizer.param_groups:
            group["lr"] = lr
        norm = clip_gradients(optimizer.param_groups, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    return learn(model, logits, update)


def test_fp32_learns_as_by_hand(make_model):
    model, steps = new_steps(make_model, in_bf16=False)
    plain = make_model("bert", ("a", "b", "c"), dropout=0.1).train()
    told, wanted = learn(model, lambda: steps.logits(BATCH), steps.update), by_hand(plain)
    for figures, wanted_figures in zip(told, wanted, strict=True):
        assert figures == pytest.approx(wanted_figures, rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is None
        if not name.endswith("key.bias"):  # whose gradient is rounding alone
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bf16_learns_as_under_autocast_over_fp32_weights(make_model):
    model, steps = new_steps(make_model, in_bf16=True)
    plain = make_model("bert", ("a", "b", "c"), dropout=0.1).train()
    told = learn(model, lambda: steps.logits(BATCH), steps.update)
    wanted = by_hand(plain, lambda: torch.autocast("cpu", torch.bfloat16))
    for (loss, norm), (wanted_loss, wanted_norm) in zip(told, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, abs=2e-2) and norm == pytest.approx(wanted_norm, rel=5e-2)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.rpartition(".")[0] for name in steps.casts} == linear  # autocast leaves norms and embeddings in fp32
    assert steps.casts and all(cast.dtype == torch.bfloat16 and cast.grad is None for cast in steps.casts.values())
    for cast, parameter in zip(steps.casts.values(), steps.cast_from, strict=True):
        assert torch.equal(cast.detach(), parameter.detach().bfloat16())


def test_a_resumed_run_goes_on_with_its_moments_and_its_own_rule(make_model):
    """The fourth step, by betas and an eps that are not AdamW's own."""
    models = [make_model("bert", ("a", "b", "c"), dropout=0.0).train() for _ in range(2)]
    ours, theirs = (torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2, betas=(0.7, 0.9), eps=1e-2) for model in models)
    for optimizer in (ours, theirs):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            moments = {"exp_avg": torch.full_like(p, 0.02), "exp_avg_sq": torch.full_like(p, 0.003)}
            optimizer.state[p] = moments | {"step": torch.tensor(3.0)}
    steps = RecordedSteps(models[0], False, ours, max_norm=0.5)
    steps.possible = False
    for logits in (steps.logits(BATCH), models[1](**BATCH).logits):
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    clip_gradients(theirs.param_groups, 0.5)
    theirs.step()
    steps.update(1e-2, 4)
    for mine, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_frozen_weights_stay(make_model):
    model = make_model("bert", ("a", "b", "c")).train()
    frozen = list(model.bert.encoder.layer[0].parameters())
    for parameter in frozen:
        parameter.requires_grad = False
    before = [parameter.clone() for parameter in frozen]
    steps = RecordedSteps(model, True, new_optimizer(model), 1.0)
    steps.possible = False
    learn(model, lambda: steps.logits(BATCH), steps.update)
    assert all(cast.grad is None for cast in steps.casts.values())  # nor is a gradient of them computed and kept
    assert all(torch.equal(now, then) for now, then in zip(frozen, before, strict=True))


@pytest.mark.parametrize("waits", [False, True])
def test_a_model_whose_forward_waits_is_told_and_not_recorded(waits, make_model, monkeypatch, product_log):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    _, steps = new_steps(make_model, in_bf16=True)
    steps.possible = None
    with torch.no_grad():
        steps.cast_from[0].add_(1)  # as a checkpoint does

    def forward(*_, _original=steps.model.forward, **inputs):
        warnings.warn("Synchronization debug mode is a prototype feature, does not detect all synchronizing operations", stacklevel=1)
        warnings.warn("of the model", stacklevel=1)
        if waits:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return _original(**inputs)

    monkeypatch.setattr(steps.model, "forward", forward)
    with pytest.warns(UserWarning, match="of the model") as shown:
        steps.logits(BATCH)
    assert len(shown) == 1 and modes == ["warn", 0]
    assert steps.possible is not waits and ("waits for the GPU (" in product_log.text) is waits
    assert torch.equal(next(iter(steps.casts.values())).detach(), steps.cast_from[0].detach().bfloat16())


class FakeGraph:
    """What is between its begin and end runs as if launched; memory runs out in the first `failures` of all."""

    failures = 0

    def capture_begin(self, *_, **__):
        pass

    def capture_end(self):
        FakeGraph.failures -= 1
        if FakeGraph.failures >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def replay(self):
        pass


@pytest.fixture
def emptied(monkeypatch):
    """A device of which nothing but FakeGraph is there; how often its caches were emptied."""
    told = []
    device = {"CUDAGraph": FakeGraph, "Stream": lambda: None, "stream": lambda _: contextlib.nullcontext()}
    device |= {"synchronize": lambda: None, "graph_pool_handle": lambda: (0, 1), "empty_cache": lambda: told.append(1)}
    for name, value in device.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return told


@pytest.mark.parametrize(("failures", "recorded"), [(0, True), (1, True), (2, False)])
def test_without_memory_for_a_recording_caches_are_emptied_and_then_steps_are_launched(
    failures, recorded, make_model, monkeypatch, emptied, product_log
):
    monkeypatch.setattr(FakeGraph, "failures", failures)
    model, steps = new_steps(make_model, in_bf16=True)
    learn(model, lambda: steps.logits(BATCH), steps.update, count=1)
    steps.possible = True
    loss = steps.logits(BATCH).sum()
    assert (steps.met[tuple(IDS.shape)] is not None) is recorded and len(emptied) == (failures > 0)
    assert ("no memory is left to record steps of 2 texts of 5 tokens" in product_log.text) is not recorded
    assert all(leaf.grad is None for leaf in steps.leaves)
    if not recorded:
        loss.backward()
        assert torch.isfinite(steps.update(1e-3, 2))
        steps.logits(BATCH)
        assert len(emptied) == 1 and steps.met[tuple(IDS.shape)] is None  # not tried at every step


def test_the_second_batch_of_a_shape_is_recorded_and_replays_read_what_is_new(make_model, emptied):
    """The first one compiles its kernels, which a recording cannot."""
    model, steps = new_steps(make_model, in_bf16=False)
    shape, steps.possible = tuple(IDS.shape), True
    learn(model, lambda: steps.logits(BATCH), steps.update, count=1)
    assert steps.met == {shape: None}
    steps.logits(BATCH)
    recording = steps.met[shape]
    other, weight = {name: values.flip(0) for name, values in BATCH.items()}, torch.arange(6.0).view(2, 3)
    (steps.logits(other) * weight).sum().backward()
    steps.update(1e-3, 2)
    assert steps.met[shape] is recording and torch.equal(recording.grad, weight)
    assert all(torch.equal(recording.inputs[name], values) for name, values in other.items())


def test_a_failed_recording_leaves_neither_its_memory_nor_its_pool(make_model, monkeypatch, emptied):
    """What it held is free at once, not at the next garbage collection; a recording that is there keeps its pool."""
    monkeypatch.setattr(FakeGraph, "failures", 1)
    pools, original = [], FakeGraph.capture_begin
    monkeypatch.setattr(FakeGraph, "capture_begin", lambda self, pool, **more: pools.append(pool) or original(self, pool, **more))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, len(pools)))
    model, steps = new_steps(make_model, in_bf16=False)
    learn(model, lambda: steps.logits(BATCH), steps.update, count=1)
    held, forward = [], steps._logits
    monkeypatch.setattr(steps, "_logits", lambda batch: held.append(weakref.ref(logits := forward(batch))) or logits)
    gc.disable()
    try:
        assert steps._record(BATCH) is None and held[0]() is None
    finally:
        gc.enable()
    steps.met[tuple(IDS.shape)] = steps._record(BATCH)
    steps._record(BATCH)
    assert len(set(pools)) == 2 and len(pools) == 5 and pools[1] == pools[-1]


def test_what_a_failed_recording_says_is_the_first_error(make_model, monkeypatch, emptied):
    _, steps = new_steps(make_model, in_bf16=False)

    def capture_end(_):
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def logits(_):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(FakeGraph, "capture_end", capture_end)
    monkeypatch.setattr(steps, "_logits", logits)
    with pytest.raises(UserError, match=r"CUDA graph \(CUDA error: operation not permitted when stream is capturing\)"):
        steps._record(BATCH)


@pytest.mark.parametrize(
    ("ds", "options", "expected"),
    [
        ({}, {}, True),
        ({}, {"precision": "bf16"}, True),
        ({}, {"cuda_graphs": False}, False),
        ({}, {"activation_checkpointing": True}, False),
        ({}, {"precision": "fp16"}, False),  # ZeRO 1
        ({"zero_optimization": {"stage": 2}}, {}, False),
        ({"train_micro_batch_size_per_gpu": 4}, {}, False),
        ({"scheduler": {"type": "WarmupLR"}}, {}, False),
        ({"tensorboard": {"enabled": True}}, {}, False),
        ({"tensorboard": {"enabled": False}, "wall_clock_breakdown": False}, {}, True),
        ({"wall_clock_breakdown": True}, {}, False),
    ],
)
def test_steps_of_one_process_with_whole_weights_are_recorded(ds, options, expected, make_model):
    ds, config = prepare_ds_config(ds, RunConfig(batch_size=8, **options), 1, "cuda")
    assert recordable(make_model("bert"), config, ds) is expected
    assert not recordable(torch.nn.Linear(2, 2), config, ds)
    skips = make_model("bert")
    skips.bert.encoder.layerdrop = 0.1
    assert not recordable(skips, config, ds)
