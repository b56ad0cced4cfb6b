"""mc_head: statistics against the float64 definition, shapes from none to 10,000 classes, extreme and nonsense input, registration."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muka_fast.ops import table
from muka_fast.ops.mc_head import McHeadStatistics, bytes_moved, mc_head, operations
from muka_fast.ops.reference import mc_head_ref, mc_statistics_ref, repeat_dropout_ref

fixtures_are_constant = settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
SEED, SITE = 2**64 - 7, 3


def problem(texts, width, classes, scale=0.3, dtype=torch.float32):
    features = torch.randn(texts, width).to(dtype)
    weight, bias = (torch.randn(classes, width) * scale).to(dtype), torch.randn(classes).to(dtype)
    return features, weight, bias, torch.randint(0, 2**33, (texts,))


def check(features, weight, bias, samples, p, ids, assert_as_exact_as):
    """Every output within twice PyTorch's error, plus what one float32 rounding of the largest logit does to a probability."""
    ours = mc_head(features, weight, bias, samples, p, SEED, SITE, ids)
    # The masked rows of the reference are rounded to float32 by definition; the exact answer starts from the unrounded ones.
    plain = mc_head_ref(features, weight, bias, samples, p, SEED, SITE, ids)
    exact = mc_head_ref(
        features.double(), weight.double(), None if bias is None else bias.double(), samples, p, SEED, SITE, ids
    )
    size = exact[-1][exact[-1].isfinite()].abs().max().item() if exact[-1].isfinite().any() else 1.0
    for name, o, e, x in zip(McHeadStatistics._fields, ours, plain, exact, strict=True):
        assert o.dtype == torch.float32 and o.is_contiguous()
        floor = 4e-7 if name == "logits" else 4e-7 * max(1.0, size)
        # Mutual information is a small difference of two entropies: it has their rounding.
        scale = math.log(max(3, exact[0].shape[-1])) if name == "mutual_information" else 1.0
        if name == "logits":  # where terms cancel, their sum has the rounding of the terms, which PyTorch's order may happen to spare
            terms = (features.double().abs() @ weight.double().abs().T).max().item()
            scale = max(1.0, terms * 2**-25 / floor)
        assert_as_exact_as(o, e, x, floor=floor, scale=scale, name=name)
    return ours


@pytest.mark.parametrize(
    ("texts", "width", "classes", "samples", "p"),
    [
        (1, 1, 1, 1, 0.5), (1, 63, 2, 1, 0.1), (33, 130, 2, 3, 0.3), (5, 63, 1, 2, 0.1), (1, 1271, 77, 1, 0.1),
        (7, 768, 150, 16, 0.9), (3, 64, 1000, 3, 0.5), (4, 32, 5, 3, 0.0), (20, 100, 31, 17, 0.25), (18, 65, 96, 5, 0.1),
        (2, 70, 97, 40, 0.6), (1, 40, 63, 4, 65535 / 65536),
    ],
)  # fmt: skip
def test_odd_shapes(texts, width, classes, samples, p, isa, assert_as_exact_as):
    features, weight, bias, ids = problem(texts, width, classes)
    check(features, weight, bias, samples, p, ids, assert_as_exact_as)


def test_ten_thousand_classes(isa, assert_as_exact_as):
    features, weight, bias, ids = problem(2, 48, 10_000)
    check(features, weight, bias, 3, 0.1, ids, assert_as_exact_as)


@fixtures_are_constant
@given(
    texts=st.integers(1, 40),
    width=st.integers(1, 200),
    classes=st.integers(1, 120),
    samples=st.integers(1, 20),
    p=st.floats(0, 0.99),
    scale=st.sampled_from([0.01, 0.3, 3.0]),
)
def test_matches_the_definition(texts, width, classes, samples, p, scale, isa, assert_as_exact_as):
    features, weight, bias, ids = problem(texts, width, classes, scale)
    check(features, weight, bias, samples, p, ids, assert_as_exact_as)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_input(dtype, assert_as_exact_as):
    features, weight, bias, ids = problem(6, 100, 20, dtype=dtype)
    check(features, weight, bias, 4, 0.1, ids, assert_as_exact_as)


def test_mixed_dtypes_and_no_bias(assert_as_exact_as):
    features, weight, _, ids = problem(6, 100, 20)
    check(features.half(), weight, None, 4, 0.1, ids, assert_as_exact_as)


def test_float64_is_the_reference():
    features, weight, bias, ids = problem(4, 20, 3, dtype=torch.float64)
    ours = mc_head(features, weight, bias, 5, 0.2, SEED, SITE, ids)
    for o, r in zip(ours, mc_head_ref(features, weight, bias, 5, 0.2, SEED, SITE, ids), strict=True):
        assert o.dtype == torch.float64
        torch.testing.assert_close(o, r)


def test_it_is_the_ops_it_replaces():
    """The masks of repeat_dropout, a dense product and mc_statistics, all in float64."""
    features, weight, bias, ids = problem(5, 77, 9, dtype=torch.float64)
    masked = repeat_dropout_ref(features, 6, 0.1, SEED, SITE, ids, torch.zeros_like(ids))
    expected = mc_statistics_ref(torch.einsum("kbd,cd->kbc", masked, weight) + bias, [0, 9])
    ours = mc_head(features.float(), weight.float(), bias.float(), 6, 0.1, SEED, SITE, ids)
    for o, e in zip(ours[:6], expected[:6], strict=True):
        torch.testing.assert_close(o.double(), e.reshape(o.shape), rtol=0, atol=3e-5)


@pytest.mark.parametrize("classes", [2, 5, 40, 130])
def test_extreme_logits(classes, isa, assert_as_exact_as):
    """Logits of +-1e4, and -inf in all but one class: finite statistics."""
    features, weight, bias, ids = problem(9, 64, classes, scale=1500.0)
    check(features, weight, bias, 4, 0.1, ids, assert_as_exact_as)
    bias = torch.full((classes,), -math.inf)
    bias[classes // 2] = 1.0
    ours = check(features, weight / 1500, bias, 4, 0.1, ids, assert_as_exact_as)
    assert (ours.mean_probs[:, classes // 2] == 1).all() and (ours.predictive_entropy == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("classes", [3, 40, 130])
def test_nonsense_never_becomes_certainty(bad, classes, isa):
    features, weight, bias, ids = problem(6, 64, classes)
    clean = mc_head(features, weight, bias, 8, 0.3, SEED, SITE, ids)
    features[2, 5] = bad
    ours = mc_head(features, weight, bias, 8, 0.3, SEED, SITE, ids)
    for name, o, c in zip(McHeadStatistics._fields, ours, clean, strict=True):
        others = [0, 1, 3, 4, 5]
        torch.testing.assert_close(o[others], c[others], msg=name)
        if name != "logits":
            assert o[2].isnan().all(), name


def test_one_large_feature_does_not_drown_the_rest(isa, assert_as_exact_as):
    """Where the large one is dropped, the small ones decide: W x minus the dropped part would have lost them."""
    features, weight, bias, ids = problem(12, 100, 7)
    features[:, 17] = 1e7
    ours = mc_head(features, weight, bias, 1, 0.5, SEED, SITE, ids)
    plain = mc_head_ref(features, weight, bias, 1, 0.5, SEED, SITE, ids)
    exact = mc_head_ref(features.double(), weight.double(), bias.double(), 1, 0.5, SEED, SITE, ids)
    dropped = repeat_dropout_ref(features, 1, 0.5, SEED, SITE, ids, torch.zeros_like(ids))[0, :, 17] == 0
    assert dropped.any() and not dropped.all()
    assert_as_exact_as(ours.mean_probs[dropped], plain[0][dropped], exact[0][dropped], floor=1e-5)


def test_statistics_do_not_depend_on_the_batch():
    features, weight, bias, ids = problem(40, 96, 12)
    whole = mc_head(features, weight, bias, 4, 0.1, SEED, SITE, ids)
    order = torch.tensor([17, 3, 30])
    part = mc_head(features[order], weight, bias, 4, 0.1, SEED, SITE, ids[order])
    for w, p in zip(whole, part, strict=True):
        torch.testing.assert_close(w[order], p)


def test_no_texts():
    features, weight, bias, ids = problem(0, 8, 3)
    ours = mc_head(features, weight, bias, 4, 0.1, SEED, SITE, ids)
    assert [tuple(o.shape) for o in ours] == [(0, 3)] * 2 + [(0,)] * 4 + [(0, 3)]


def test_strides_do_not_matter():
    features, weight, bias, ids = problem(6, 64, 5)
    straight = mc_head(features, weight, bias, 4, 0.1, SEED, SITE, ids)
    wide = torch.randn(6, 128)
    wide[:, ::2] = features
    bent = mc_head(wide[:, ::2], weight.t().contiguous().t(), bias.repeat(2, 1).t()[:, 0], 4, 0.1, SEED, SITE, ids)
    for s, b in zip(straight, bent, strict=True):
        assert torch.equal(s, b)


def test_threads_do_not_matter():
    features, weight, bias, ids = problem(300, 512, 4)
    one = mc_head(features, weight, bias, 16, 0.1, SEED, SITE, ids)
    try:
        torch.set_num_threads(2)
        two = mc_head(features, weight, bias, 16, 0.1, SEED, SITE, ids)
    finally:
        torch.set_num_threads(1)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)  # not equal bit for bit: blocks of texts begin elsewhere


def test_opcheck():
    features, weight, bias, ids = problem(3, 10, 4)
    for b in (bias, None):
        torch.library.opcheck(torch.ops.muka_fast.mc_head, (features, weight, b, 2, 0.1, -3, 1, ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3, 5)}, "do not match"),
        ({"weight": torch.ones(0, 4)}, "do not match"),
        ({"bias": torch.ones(2)}, "bias"),
        ({"features": torch.ones(2, 4, dtype=torch.int64)}, "floating-point"),
        ({"num_samples": 0}, "num_samples"),
        ({"p": 1.0}, "dropout probability"),
        ({"seed": 2**64}, "seed"),
        ({"site": -1}, "site"),
        ({"example_ids": torch.arange(3)}, "example_ids"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    good = {"features": torch.ones(2, 4), "weight": torch.ones(3, 4), "bias": torch.ones(3), "num_samples": 2, "p": 0.1}
    good |= {"seed": 0, "site": 0, "example_ids": torch.arange(2)}
    with pytest.raises(ValueError, match=message):
        mc_head(**good | change)


def test_counts_of_bytes_and_operations():
    assert bytes_moved(256, 768, 77) == 4 * (256 * 768 + 77 * 768 + 77) + 8 * 256 + 4 * (3 * 256 * 77 + 4 * 256)
    counts = operations(16, 256, 768, 77)
    assert counts["philox_lanes"] == 16 * 256 * 768 and counts["exponentials"] == 16 * 256 * 77
    assert counts["dense_flops"] == 2 * 17 * 256 * 768 * 77


def test_triton_in_the_interpreter(interpreter):
    interpreter(__file__, "odd_shapes and (5-63 or 4-32 or 18-65) or mixed or no_texts or implementation")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_triton_in_the_interpreter_with_all_inputs(interpreter):
    interpreter(__file__, "odd_shapes and not 768 or 16_bit or it_is_the_ops or extreme or nonsense or strides or refused")


def test_the_implementation_under_test():
    """A silent fallback would make every test above pass without C++ or Triton."""
    assert table.TABLE["mc_head"]["cpu"] == ("cpu" if table.BACKEND == "auto" else table.BACKEND)
