"""adamw against torch's own clipping and AdamW in float64: weights, moments, casts and norm over several steps; what stays."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muka_fast.ops.adamw import AdamW, Rule, Tensors
from muka_fast.ops.reference import adamw_ref
from muka_fast.ops.table import BACKEND

SHAPES = [(1,), (7,), (33, 5), (2048,), (2049,), (3, 2048), (50, 90)]
LR = (1e-2, 3e-3, 5e-2)


def new_tensors(shapes, casts, decays, device="cpu"):
    """Weights of these shapes, every other one with a cast where `casts`."""
    weights = [torch.randn(shape, device=device) for shape in shapes]
    kept = [w.bfloat16() if casts and i % 2 == 0 else None for i, w in enumerate(weights)]
    return Tensors(weights, [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights], kept, decays)


def gradients(tensors, missing=()):
    return [
        None if i in missing else torch.randn_like(w).to(torch.float32 if cast is None else cast.dtype)
        for i, (w, cast) in enumerate(zip(tensors.weights, tensors.casts, strict=True))
    ]


def torch_step(parameters, optimizer, grads, lr, max_norm):
    """The same by PyTorch; the norm."""
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = None if grad is None else grad.to(parameter.dtype)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm


def check(shapes, casts, max_norm, coupled=False, missing=(), device="cpu"):
    """Three steps; weights in `missing` have no gradient in the third."""
    decays = [0.1 * (i % 3) for i in range(len(shapes))]
    tensors, rule = new_tensors(shapes, casts, decays, device), Rule((0.9, 0.99), 1e-6, max_norm, coupled)
    parameters = [torch.nn.Parameter(w.double()) for w in tensors.weights]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(parameters, decays, strict=True)]
    optimizer = (torch.optim.Adam if coupled else torch.optim.AdamW)(groups, betas=rule.betas, eps=rule.eps)
    ours, before = AdamW(tensors, rule), [w.clone() for w in tensors.weights]
    assert (ours.kinds is not None) is (BACKEND == "triton" or device == "cuda")
    for step, lr in enumerate(LR, 1):
        # A weight without a gradient has made fewer steps by torch's count: ours counts the run's, so it is missing from the last.
        grads = ours.readable(gradients(tensors, missing if step == len(LR) else ()))
        rates = torch.tensor(rule.rates(lr, step), device=device)
        norm = ours.step(grads, rates, ours.addresses(grads).to(device))
        assert norm.item() == pytest.approx(torch_step(parameters, optimizer, grads, lr, max_norm).item(), rel=1e-5)
    for i, (weight, exact, cast) in enumerate(zip(tensors.weights, parameters, tensors.casts, strict=True)):
        assert not torch.equal(weight, before[i])
        torch.testing.assert_close(weight.double(), exact.detach(), rtol=2e-6, atol=2e-6)
        for values, key in ((tensors.exp_avgs[i], "exp_avg"), (tensors.exp_avg_sqs[i], "exp_avg_sq")):
            torch.testing.assert_close(values.double(), optimizer.state[exact][key], rtol=2e-5, atol=1e-6)
        if cast is not None and BACKEND != "triton":  # the interpreter truncates
            assert torch.equal(cast, weight.bfloat16())
        elif cast is not None:
            torch.testing.assert_close(cast.float(), weight, rtol=2**-7, atol=0)


@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
def test_steps_are_those_of_torch(casts, max_norm):
    check(SHAPES, casts, max_norm)


def test_decay_as_part_of_the_gradient():
    check(SHAPES, True, 1.0, coupled=True)


def test_weights_without_a_gradient_stay():
    tensors, rule = new_tensors(SHAPES, True, [0.1] * len(SHAPES)), Rule((0.9, 0.99), 1e-6, 1.0)
    ours, missing = AdamW(tensors, rule), {0, 1, 5}
    kept = [[None if t is None else t.clone() for t in column] for column in tensors[:4]]
    grads = ours.readable(gradients(tensors, missing))
    norm = ours.step(grads, torch.tensor(rule.rates(1e-2, 1)), ours.addresses(grads))
    assert norm.item() == pytest.approx(sum(g.double().square().sum().item() for g in grads if g is not None) ** 0.5, rel=1e-5)
    for column, before in zip(tensors[:4], kept, strict=True):
        for i, (now, then) in enumerate(zip(column, before, strict=True)):
            assert now is None or torch.equal(now, then) is (i in missing), i


def test_a_step_without_any_gradient_changes_nothing():
    weights = [torch.ones(3)]
    moments = [torch.zeros(3)], [torch.zeros(3)]
    norm = adamw_ref(weights, *moments, [None], [0.1], [None], torch.tensor([1e-3, 1e-3, 1.0]), (0.9, 0.999), 1e-8, 1.0, False)
    assert norm == 0 and torch.equal(weights[0], torch.ones(3))


def test_what_is_missing_from_one_step_alone_is_as_torch_has_it():
    check(SHAPES, True, 0.5, missing=(2, 3))


@settings(max_examples=10)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=5), st.booleans(), st.sampled_from([0.1, 1e6]))
def test_any_sizes(sizes, casts, max_norm):
    check([(size,) for size in sizes], casts, max_norm)


def test_gradients_that_lie_otherwise_are_read_all_the_same():
    tensors, rule = new_tensors([(6, 8), (5,)], True, [0.0, 0.0]), Rule((0.9, 0.99), 1e-6, 1e6)
    across, off = torch.randn(8, 6).bfloat16().t(), torch.randn(6)[1:]
    ours = AdamW(tensors, rule)
    grads = ours.readable([across, off])
    assert all(grad.is_contiguous() and grad.data_ptr() % 16 == 0 for grad in grads)
    ours.step(grads, torch.tensor(rule.rates(1e-2, 1)), ours.addresses(grads))
    for exp_avg, grad in zip(tensors.exp_avgs, (across, off), strict=True):
        torch.testing.assert_close(exp_avg, 0.1 * grad.float(), rtol=1e-5, atol=1e-8)


def test_weights_that_lie_otherwise_are_changed_all_the_same():
    across = torch.randn(8, 6).t()
    before = across.clone()
    tensors = Tensors([across], [torch.zeros_like(across)], [torch.zeros_like(across)], [None], [0.0])
    ours, grads = AdamW(tensors, Rule((0.9, 0.99), 1e-6, 1e6)), [torch.ones(6, 8)]
    ours.step(grads, torch.tensor(ours.rule.rates(1e-2, 1)), ours.addresses(grads))
    torch.testing.assert_close(across, before - 1e-2, rtol=1e-4, atol=1e-5)


def test_tiny_and_huge_gradients():
    """Norms from 1e-15 to 1e15: squares are within float32."""
    for size in (1e-18, 1e15):
        tensors, rule = new_tensors([(100,)], False, [0.0]), Rule((0.9, 0.99), 1e-30, 1.0)
        grads, before = [torch.full((100,), size)], tensors.weights[0].clone()
        norm = AdamW(tensors, rule).step(grads, torch.tensor(rule.rates(1e-2, 1)), torch.tensor([grads[0].data_ptr()]))
        assert norm.item() == pytest.approx(10 * size, rel=1e-5)
        torch.testing.assert_close(tensors.weights[0], before - 1e-2, rtol=1e-4, atol=1e-5)


def test_gradients_that_are_no_numbers_spoil_all_weights_as_in_torch():
    tensors, rule = new_tensors([(7,), (2049,)], False, [0.0, 0.0]), Rule((0.9, 0.99), 1e-6, 1.0)
    ours, grads = AdamW(tensors, rule), gradients(tensors)
    grads[0][3] = float("nan")
    norm = ours.step(grads, torch.tensor(rule.rates(1e-2, 1)), ours.addresses(grads))
    assert norm.isnan() and all(weight.isnan().all() for weight in tensors.weights)


def test_in_tritons_interpreter(interpreter):
    if BACKEND == "triton":
        pytest.skip("this is the interpreter")
    interpreter(__file__, "not in_tritons")
