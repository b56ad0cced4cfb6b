"""residual_norm against float64 autograd of its definition: result and five gradients, masks of both directions, shapes, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muka_fast.ops.reference import Draws, dropout_threshold, residual_norm_ref
from muka_fast.ops.residual_norm import residual_norm
from muka_fast.ops.table import BACKEND

# 16 bits: results rounded once, or truncated as Triton's interpreter does; z rounded between the directions; sums over rows.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
NAMES = ("x", "dense_bias", "residual", "weight", "bias")


def case(rows, width, dtype=torch.float32, parameters=torch.float32):
    """x, dense_bias, residual, weight, bias that require gradients, and dy."""
    x, residual, dy = (torch.randn(*rows, width).to(dtype) for _ in range(3))
    dense_bias, weight, bias = (torch.randn(width).to(parameters) for _ in range(3))
    return [t.requires_grad_() for t in (x, dense_bias, residual, weight, bias)], dy


def draws(texts, seed=-5, sample=2, site=7):
    """Of texts with other ids than their rows, of which the last wraps."""
    ids = torch.arange(texts) * 3 + 11
    ids[-1:] = 2**32 + 4
    return Draws(torch.tensor([seed, sample]), ids, site)


def results(form, leaves, dy, *options):
    y = form(*leaves, *options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def op(x, dense_bias, residual, weight, bias, p, eps, draws):
    return residual_norm(x, dense_bias, residual, weight, bias, p=p, eps=eps, draws=draws)


def compare(leaves, dy, p):
    options = p, 1e-5, draws(len(dy))
    ours = results(op, leaves, dy, *options)
    exact = results(residual_norm_ref, [t.detach().double().requires_grad_() for t in leaves], dy.double(), *options)
    for name, got, truth, like in zip(("y", *NAMES), ours, exact, (leaves[0], *leaves), strict=True):
        assert got.shape == like.shape and got.dtype == like.dtype, name
        error, scale = (got.double() - truth).abs().max(), truth.abs().max().clamp_min(1)
        assert error <= TOLERANCE[dy.dtype] * scale, f"{name}: {error:.1e} of {scale:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("width", [8, 33, 384, 768])
@pytest.mark.parametrize("rows", [(1,), (5,), (10, 7)])
def test_result_and_gradients(rows, width, p, dtype):
    compare(*case(rows, width, dtype), p)


@pytest.mark.parametrize("parameters", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1272, 4096])
def test_wide_rows_of_half_precision(width, parameters):
    compare(*case((2, 3), width, torch.float16, parameters), 0.3)


def masks(texts, tokens, width, p, drawn):
    """What the forward and what the backward pass kept, bool [rows, width] each: of ones every row's result has two values."""
    (x, dense_bias, residual, weight, bias), dy = case((texts, tokens), width)
    with torch.no_grad():
        x.fill_(0.75), dense_bias.fill_(0.25), residual.zero_(), weight.fill_(1), bias.zero_()
    y = residual_norm(x, dense_bias, residual, weight, bias, p=p, eps=1e-5, draws=drawn)
    dx, dz = torch.autograd.grad(y, (x, residual), dy)
    assert (dz != 0).all()
    return (y > 0).flatten(0, 1), (dx != 0).flatten(0, 1)


@settings(max_examples=15)
@given(
    st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1), st.integers(1, 3), st.integers(1, 4),
    st.sampled_from([8, 40, 136]), st.sampled_from([0.2, 0.5]),
)  # fmt: skip
def test_both_directions_draw_the_masks_of_the_contract(numpy_keep, seed, sample, site, texts, tokens, width, p):
    drawn = draws(texts, seed, sample, site)
    ids, first = drawn.example_ids.repeat_interleave(tokens).tolist(), [width * token for token in range(tokens)] * texts
    keep = numpy_keep(1, width, dropout_threshold(p), seed % 2**64, site, ids, first, sample)[0]
    forward, backward = masks(texts, tokens, width, p, drawn)
    mixed = keep.any(1) & ~keep.all(1)  # a row of one value normalises to zero
    assert np.array_equal(forward.numpy()[mixed], keep[mixed])
    assert np.array_equal(backward.numpy()[mixed], keep[mixed])


def test_masks_of_other_seeds_samples_sites_and_rows_are_others():
    """35,840 elements at p = 0.1: six standard deviations, of the share kept and of the share kept by two."""
    kept = lambda *changed: masks(10, 7, 512, 0.1, draws(10, *changed))[0].float()
    one = kept(3, 1, 5)
    for first, second in ((one, kept(4, 1, 5)), (one, kept(3, 2, 5)), (one, kept(3, 1, 6)), (one[1:], one[:-1]), (one[7:], one[:-7])):
        assert abs(first.mean() - 0.9) < 6 * (0.09 / first.numel()) ** 0.5
        assert abs((first * second).mean() - 0.81) < 6 * (0.81 * 0.19 / first.numel()) ** 0.5
    assert torch.equal(one, kept(3, 1, 5))


def test_without_masks_no_draws_are_read_and_nothing_written_twice():
    leaves, dy = case((5,), 40)
    y = op(*leaves, 0.0, 1e-5, None)
    dx, dz = torch.autograd.grad(y, (leaves[0], leaves[2]), dy)
    assert torch.equal(dx, dz)
    if BACKEND == "triton":
        assert dx.data_ptr() == dz.data_ptr()


def test_without_a_gradient_the_same_result():
    leaves, _ = case((7,), 40)
    with torch.no_grad():
        y = op(*leaves, 0.1, 1e-5, draws(7))
    assert not y.requires_grad and torch.equal(y, op(*leaves, 0.1, 1e-5, draws(7)))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_no_rows(p):
    leaves, dy = case((0, 3), 40)
    y, dx, *rest = results(op, leaves, dy, p, 1e-5, draws(0))
    assert y.shape == dx.shape == (0, 3, 40) and not any(gradient.any() for gradient in rest)


def test_strides_do_not_matter():
    leaves, dy = case((4, 5), 40)
    plain = results(op, leaves, dy, 0.1, 1e-5, draws(4))
    strided = [torch.stack([t.detach()] * 2, -1)[..., 0].requires_grad_() for t in leaves]
    apart = results(op, strided, torch.stack([dy] * 2, -1)[..., 0], 0.1, 1e-5, draws(4))
    assert all(torch.equal(a, b) for a, b in zip(plain, apart, strict=True))


@pytest.mark.parametrize("form", [residual_norm_ref, op])
def test_gradcheck_in_float64(form):
    leaves, _ = case((3, 2), 6, torch.float64, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: form(*t, 0.3, 1e-5, draws(3)), leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4), "residual": torch.ones(4)}, "x .* must have"),
        ({"x": torch.ones(3, 4)}, "x .* must have"),
        ({"residual": torch.ones(2, 4).half()}, "one dtype"),
        ({"dense_bias": torch.ones(3)}, "dense_bias, weight and bias"),
        ({"weight": torch.ones(2, 4)}, "dense_bias, weight and bias"),
        ({"eps": 0.0}, "eps"),
        ({"p": 1.0}, "dropout probability"),
        ({"draws": None}, "draws"),
        ({"draws": draws(2)._replace(key=torch.ones(2))}, "key"),
        ({"draws": draws(2)._replace(key=torch.tensor([1]))}, "key"),
        ({"draws": draws(2)._replace(site=-1)}, "site"),
        ({"draws": draws(3)}, "example_ids"),
        ({"draws": draws(2)._replace(example_ids=torch.ones(2))}, "example_ids"),
        ({"draws": draws(2)._replace(example_ids=torch.arange(4)[::2])}, "example_ids"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    good = dict(zip(NAMES, (torch.ones(2, 4), torch.ones(4), torch.ones(2, 4), torch.ones(4), torch.ones(4)), strict=True))
    with pytest.raises(ValueError, match=message):
        residual_norm(**good | {"p": 0.1, "eps": 1e-5, "draws": draws(2)} | change)


def test_triton_in_the_interpreter(interpreter):
    interpreter(__file__, "result_and or wide or masks or without or no_rows or strides")
