"""self_attention against float64 autograd of its definition: result and gradient, padding, masks of both directions, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muka_fast.ops.reference import ATTENTION_STRIDE, Draws, dropout_scale, dropout_threshold, self_attention_ref
from muka_fast.ops.self_attention import self_attention, takes

# 16 bits: probabilities and gradients of scores are rounded before the matrix units. Triton's interpreter multiplies no bfloat16: that
# is for tests/test_gpu_training.py.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-9}


def draws(texts, seed=-5, sample=2, site=7):
    """Of texts with other ids than their rows, of which the last wraps."""
    ids = torch.arange(texts) * 3 + 11
    ids[-1:] = 2**32 + 4
    return Draws(torch.tensor([seed, sample]), ids, site)


def op(qkv, num_heads, p, draws, mask):
    return self_attention(qkv, num_heads, p=p, draws=draws, mask=mask)


def results(form, qkv, dy, *options):
    qkv = qkv.detach().requires_grad_()
    y = form(qkv, *options)
    return y.detach(), torch.autograd.grad(y, qkv, dy)[0]


def padding(texts, length, form="rows"):
    """A mask of texts of length, length - 1, ... tokens, as a model may bring it: of equal rows, or one row for all queries."""
    lengths = (length - torch.arange(texts)).clamp_min(1)
    mask = (torch.arange(length) < lengths[:, None])[:, None, None]
    return {"rows": mask.expand(-1, -1, length, -1).contiguous(), "expanded": mask.expand(-1, -1, length, -1), "row": mask}[form]


def compare(texts, length, heads, head_dim, dtype, p, mask):
    qkv, dy = torch.randn(texts, length, 3 * heads * head_dim).to(dtype), torch.randn(texts, length, heads * head_dim).to(dtype)
    options = heads, p, draws(texts), mask
    ours, exact = results(op, qkv, dy, *options), results(self_attention_ref, qkv.double(), dy.double(), *options)
    for name, got, truth in zip(("y", "dqkv"), ours, exact, strict=True):
        assert got.shape == truth.shape and got.dtype == dtype, name
        error, scale = (got.double() - truth).abs().max(), truth.abs().max().clamp_min(1)
        assert error <= TOLERANCE[dtype] * scale, f"{name}: {error:.1e} of {scale:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("p", "padded"), [(0.0, True), (0.1, False), (0.1, True)])
@pytest.mark.parametrize(("length", "head_dim"), [(1, 32), (7, 8), (33, 64), (64, 33), (128, 16)])
def test_result_and_gradient(length, head_dim, p, padded, dtype):
    compare(3, length, 2, head_dim, dtype, p, padding(3, length) if padded else None)


@pytest.mark.parametrize("form", ["rows", "expanded", "row"])
def test_every_form_of_padding(form):
    compare(4, 20, 3, 32, torch.float32, 0.3, padding(4, 20, form))


def test_a_mask_may_differ_from_query_to_query_and_one_that_sees_nothing_gets_zeros():
    """Of a decoder's kind; the first query of the second text sees no key."""
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    mask[1, 0, 0] = False
    compare(2, 40, 2, 16, torch.float32, 0.1, mask)
    y, gradient = results(op, torch.randn(2, 40, 96), torch.randn(2, 40, 32), 2, 0.1, draws(2), mask)
    assert not y[1, 0].any() and not gradient[1, 0, :32].any() and not y.isnan().any() and not gradient.isnan().any()


def test_large_scores_stay_finite():
    qkv = 60 * torch.randn(2, 33, 96)
    y, gradient = results(op, qkv, torch.randn(2, 33, 32), 2, 0.0, None, None)
    assert y.isfinite().all() and gradient.isfinite().all()


def masks(texts, length, heads, p, drawn):
    """What the forward and what the backward pass kept, bool [texts, heads, length, length].

    Queries of zero make all probabilities equal. Values are one-hot, so that column l of a result is what was kept of key l; with one
    at a time as gradient of the result, the gradient of the values is what was kept of that query.
    """
    values = torch.eye(length).expand(texts, heads, length, length)
    zero = torch.zeros_like(values)
    qkv = torch.stack([zero, zero, values], 2).permute(0, 3, 2, 1, 4).flatten(2)  # [texts, length, 3 heads length]
    ones = torch.eye(length).repeat(1, heads).expand(texts, -1, -1)
    y, gradient = results(op, qkv, ones, heads, p, drawn, None)
    forward = y.unflatten(-1, (heads, length)).transpose(1, 2)
    backward = gradient.unflatten(-1, (3, heads, length))[:, :, 2].permute(0, 2, 3, 1)
    for found in (forward, backward):
        kept = found[found != 0]
        torch.testing.assert_close(kept, torch.full_like(kept, dropout_scale(p) / length))
    return forward != 0, backward != 0


@settings(max_examples=15)
@given(
    st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1), st.integers(1, 3),
    st.sampled_from([1, 9, 33]), st.sampled_from([0.2, 0.5]),
)  # fmt: skip
def test_both_directions_draw_the_masks_of_the_contract(numpy_keep, seed, sample, site, texts, length, p):
    heads, drawn = 2, draws(texts, seed, sample, site)
    ids = drawn.example_ids.tolist()
    rows = [(b, (h * ATTENTION_STRIDE + i) * ATTENTION_STRIDE) for b in ids for h in range(heads) for i in range(length)]
    keep = numpy_keep(1, length, dropout_threshold(p), seed % 2**64, site, *zip(*rows, strict=True), sample)[0]
    for found in masks(texts, length, heads, p, drawn):
        assert np.array_equal(found.numpy().reshape(-1, length), keep)


def test_masks_of_other_seeds_samples_sites_texts_and_heads_are_others():
    """16,384 elements at p = 0.2: six standard deviations, of the share kept and of the share kept by two."""
    kept = lambda *changed: masks(2, 64, 2, 0.2, draws(2, *changed))[0].float()
    one, others = kept(3, 1, 5), [kept(4, 1, 5), kept(3, 2, 5), kept(3, 1, 6)]
    for first, second in (*((one, other) for other in others), (one[:1], one[1:]), (one[:, :1], one[:, 1:])):
        assert abs(first.mean() - 0.8) < 6 * (0.16 / first.numel()) ** 0.5
        assert abs((first * second).mean() - 0.64) < 6 * (0.64 * 0.36 / first.numel()) ** 0.5
    assert torch.equal(one, kept(3, 1, 5))


def test_no_texts():
    y, gradient = results(op, torch.randn(0, 5, 96), torch.randn(0, 5, 32), 2, 0.1, draws(0), None)
    assert y.shape == (0, 5, 32) and gradient.shape == (0, 5, 96)


def test_strides_do_not_matter():
    qkv, dy, options = torch.randn(2, 9, 96), torch.randn(2, 9, 32), (2, 0.1, draws(2), padding(2, 9))
    apart = results(op, torch.stack([qkv] * 2, -1)[..., 0], torch.stack([dy] * 2, -1)[..., 0], *options)
    assert all(torch.equal(a, b) for a, b in zip(results(op, qkv, dy, *options), apart, strict=True))


@pytest.mark.parametrize("form", [self_attention_ref, op])
def test_gradcheck_in_float64(form):
    qkv = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: form(t, 2, 0.3, draws(2), padding(2, 4)), qkv)


def test_without_dropout_it_is_pytorchs_attention():
    qkv, mask = torch.randn(3, 12, 96, dtype=torch.float64), padding(3, 12)
    query, key, value = qkv.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(op(qkv, 2, 0.0, None, mask), theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.ones(2, 96)}, "qkv .* must be"),
        ({"qkv": torch.ones(2, 4, 95)}, "qkv .* must be"),
        ({"qkv": torch.ones(2, 129, 96)}, "L <= 128"),
        ({"qkv": torch.ones(2, 4, 3 * 2 * 65)}, "d <= 64"),
        ({"qkv": torch.ones(2, 4, 3 * 129), "num_heads": 129}, "1 to 128 heads"),
        ({"num_heads": 0}, "1 to 128 heads"),
        ({"mask": torch.ones(2, 1, 4, 4)}, "bool"),
        ({"mask": torch.ones(2, 4, 4, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(2, 2, 4, 4, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(2, 1, 4, 5, dtype=torch.bool)}, "mask"),
        ({"p": 1.0}, "dropout probability"),
        ({"draws": None}, "draws"),
        ({"draws": draws(2)._replace(key=torch.ones(2))}, "key"),
        ({"draws": draws(3)}, "example_ids"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    good = {"qkv": torch.ones(2, 4, 96), "num_heads": 2, "p": 0.1, "draws": draws(2), "mask": None}
    with pytest.raises(ValueError, match=message):
        self_attention(**good | change)


def test_triton_in_the_interpreter(interpreter):
    interpreter(__file__, "result_and or every_form or differ or large or masks or no_texts or strides")


@pytest.mark.parametrize(("generation", "longest"), [(7, 0), (8, 64), (9, 128), (10, 128), (12, 64)])
def test_a_gpu_takes_the_lengths_that_were_compiled_for_it(generation, longest, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    taken = [length for length in (1, 64, 65, 128, 129) if takes(torch.bfloat16, length, 64, torch.device("cuda"))]
    assert max(taken, default=0) == longest
