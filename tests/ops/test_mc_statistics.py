"""mc_statistics against the float64 definition: odd shapes, extreme logits, NaN, strides, threads, 16-bit inputs, registration."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muka_fast.ops import reference
from muka_fast.ops.mc_statistics import RAW, McStatistics, mc_statistics
from muka_fast.ops.reference import mc_statistics_ref
from muka_fast.ops.table import BACKEND

INF = math.inf
relaxed = settings(
    max_examples=10 if BACKEND == "triton" else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def offsets_of(classes):
    return [0, *itertools.accumulate(classes)]


def compare(logits, offsets, check):
    ours = mc_statistics(logits, offsets)
    eager, exact = (
        SimpleNamespace(**dict(zip(McStatistics.FIELDS, reference.mc_statistics_ref(logits.to(dtype), offsets), strict=True)))
        for dtype in (torch.float32, torch.float64)
    )
    largest_entropy = math.log(max(stop - start for start, stop in itertools.pairwise(offsets))) + 1
    for name in McStatistics.FIELDS:
        if name != "selected":
            # Mutual information is the difference of two entropies, and inherits the rounding of their magnitude.
            check(getattr(ours, name), getattr(eager, name), getattr(exact, name), scale=largest_entropy, name=name)
    clear = ~(exact.teacher_margin.abs() <= 1e-5)  # a near tie may fall either way; NaN margins still have a selection
    assert torch.equal(ours.selected[clear], exact.selected[clear])
    return ours


@relaxed
@given(
    samples=st.integers(1, 20),
    texts=st.integers(0, 37),
    classes=st.lists(st.integers(1, 80), min_size=1, max_size=5),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_matches_the_definition(samples, texts, classes, scale, dtype, seed, isa, assert_as_exact_as):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(samples, texts, sum(classes), generator=generator) * scale).to(dtype)
    compare(logits, offsets_of(classes), assert_as_exact_as)


@pytest.mark.parametrize(
    ("samples", "texts", "classes"),
    [
        (1, 1, [1]), (1, 1, [2]), (3, 63, [1, 63]), (2, 2, [1271, 1]), (16, 1, [31, 32, 33]), (2, 3, [10_000, 2]),
        (3, 2, [700, 8193, 512]), (70, 2, [3, 40]),
    ],
)
def test_odd_shapes(samples, texts, classes, isa, assert_as_exact_as):
    compare(torch.randn(samples, texts, sum(classes)) * 4, offsets_of(classes), assert_as_exact_as)


def test_no_texts():
    result = mc_statistics(torch.empty(4, 0, 5), [0, 2, 5])
    assert [tuple(t.shape) for t in result] == [(0, 5), (0, 5), (0, 2), (0, 2), (0, 2), (0, 2), (0,), (0,)]


@pytest.mark.parametrize("classes", [2, 7, 33, 64, 150])
def test_extreme_logits(classes, isa, assert_as_exact_as):
    logits = torch.randn(3, 5, 2 * classes)
    logits[:, 0, :classes] = torch.tensor([1e4, -1e4]).repeat(classes)[:classes]
    logits[:, 1, :classes] = -INF
    logits[:, 1, classes - 1] = 3.0  # all but one class impossible: certainty, not NaN
    logits[0, 2, 0] = -INF
    logits[:, 3] = 1e4
    logits[:, 4] = -1e4
    ours = compare(logits, [0, classes, 2 * classes], assert_as_exact_as)
    assert not any(t.isnan().any() for t in ours)
    assert ours.mean_probs[1, :classes].tolist() == [0.0] * (classes - 1) + [1.0]
    assert ours.predictive_entropy[1, 0] == 0 and ours.expected_entropy[1, 0] == 0


@pytest.mark.parametrize("classes", [2, 33, 64, 77])
@pytest.mark.parametrize("bad", ["nan", "all -inf", "+inf"])
def test_nonsense_never_becomes_certainty(classes, bad, isa, assert_as_exact_as):
    for position in {0, 1, classes // 2, classes - 1}:
        logits = torch.randn(4, 3, 3 * classes)
        if bad == "all -inf":
            logits[2, 1, classes : 2 * classes] = -INF
        else:
            logits[2, 1, classes + position] = float("nan") if bad == "nan" else INF
        ours = compare(logits, [0, classes, 2 * classes, 3 * classes], assert_as_exact_as)
        assert ours.normalized_entropy[1, 1].isnan() and ours.predictive_entropy[1, 1].isnan() and ours.teacher_margin[1].isnan()
        assert ours.expected_entropy[1, 1].isnan() and ours.mutual_information[1, 1].isnan()
        assert ours.selected[1] != 1
        assert not ours.teacher_margin[[0, 2]].isnan().any()


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_nonsense_among_ten_thousand_classes(bad, isa, assert_as_exact_as):
    logits = torch.randn(2, 3, 10_003) * 4
    logits[1, 0, 9_500], logits[0, 1, :10_000] = bad, -INF
    logits[:, 2, :10_000] = -INF
    logits[:, 2, 9_999] = 1e4  # certain
    ours = compare(logits, [0, 10_000, 10_003], assert_as_exact_as)
    assert ours.normalized_entropy.isnan().tolist() == [[True, False], [True, False], [False, False]]
    assert ours.selected.tolist() == [1, 1, 0]


@pytest.mark.parametrize("samples", [1, 2, 3, 16])
@pytest.mark.parametrize("classes", [2, 5, 40])
def test_variance_is_never_negative(samples, classes, isa):
    texts = 30 if BACKEND == "triton" else 400
    logits = torch.randn(1, texts, classes).expand(samples, -1, -1) * 3  # the true variance is 0
    assert (mc_statistics(logits, [0, classes]).var_probs >= 0).all()


def test_fields_are_columns_that_do_not_overlap():
    result = mc_statistics(torch.randn(3, 4, 7), [0, 2, 7])
    kept = [field.clone() for field in result]
    assert [tuple(t.shape) for t in kept] == [(4, 7), (4, 7), (4, 2), (4, 2), (4, 2), (4, 2), (4,), (4,)]
    assert result.selected.dtype == torch.int64 and result.per_text.shape == (4, 24)
    for place, name in enumerate(McStatistics.FIELDS):
        if name == "selected":
            continue
        getattr(result, name).fill_(-1.0)
        kept[place].fill_(-1.0)
        assert all(torch.equal(now, then) for now, then in zip(result, kept, strict=True)), name


def test_one_class_is_certain_and_margin_of_one_teacher_is_one(isa):
    result = mc_statistics(torch.randn(4, 3, 1), [0, 1])
    assert torch.equal(result.mean_probs, torch.ones(3, 1)) and torch.equal(result.normalized_entropy, torch.zeros(3, 1))
    assert torch.equal(result.var_probs, torch.zeros(3, 1)) and torch.equal(result.teacher_margin, torch.ones(3))


def test_ties_go_to_the_lowest_teacher(isa):
    logits = torch.randn(4, 6, 5).repeat(1, 1, 3)
    result = mc_statistics(logits, [0, 5, 10, 15])
    assert result.selected.tolist() == [0] * 6 and result.teacher_margin.tolist() == [0.0] * 6


def test_the_surest_of_several_sure_teachers_is_selected(isa):
    """fp32 rounds one less their entropies to 1."""
    logits = torch.tensor([[[22.0, 0.0, 24.0, 0.0, 20.0, 0.0]]])
    assert mc_statistics(logits, [0, 2, 4, 6]).selected.tolist() == mc_statistics_ref(logits, [0, 2, 4, 6])[-2].tolist() == [1]


def test_strides_do_not_matter(isa):
    wide = torch.randn(7, 9, 130)
    for view in (wide[::2, 1::2, :90], wide[:, :, ::2][:, :, :45], wide.transpose(0, 1)[:, :, :45]):
        offsets = [0, 3, 40, view.shape[2]]
        for a, b in zip(mc_statistics(view, offsets), mc_statistics(view.contiguous(), offsets), strict=True):
            assert torch.equal(a, b)


def test_16_bit_inputs_are_widened_exactly(isa):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        logits = every.view(dtype)
        logits = logits[logits.isfinite()][: 2**15 // 77 * 77].reshape(1, -1, 77)
        for cut in ([0, 77], [0, 2, 5, 77]):
            for a, b in zip(mc_statistics(logits, cut), mc_statistics(logits.float(), cut), strict=True):
                assert torch.equal(a, b)


def test_threads_do_not_matter(isa):
    logits = torch.randn(16, 700, 154)
    one = mc_statistics(logits, [0, 77, 154])
    torch.set_num_threads(3)
    try:
        three = mc_statistics(logits, [0, 77, 154])
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_float64_is_computed_in_float64():
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    for a, b in zip(mc_statistics(logits, [0, 2, 5]), reference.mc_statistics_ref(logits, [0, 2, 5]), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("offsets", [[0], [0, 4], [1, 5], [0, 3, 3, 5], [0, 6, 5], []])
def test_bad_offsets_are_refused(offsets):
    with pytest.raises(ValueError, match="offsets"):
        mc_statistics(torch.randn(2, 3, 5), offsets)


@pytest.mark.parametrize("logits", [torch.zeros(2, 3), torch.zeros(0, 3, 5), torch.zeros(2, 3, 5, dtype=torch.int64)])
def test_bad_logits_are_refused(logits):
    with pytest.raises(ValueError, match="logits"):
        mc_statistics(logits, [0, 5])


def test_opcheck():
    torch.library.opcheck(RAW, (torch.randn(3, 4, 5), [0, 2, 5]))


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    logits = torch.randn(3, 4, 5)
    compiled = torch.compile(lambda x: mc_statistics(x, [0, 2, 5]).teacher_margin * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), mc_statistics(logits, [0, 2, 5]).teacher_margin * 2)


def test_triton_in_its_interpreter(interpreter):
    some = "odd_shapes or no_texts or ties or surest or (nonsense and 33) or (ten_thousand and nan) or (never_negative and 5-3)"
    interpreter(__file__, some)


@pytest.mark.slow
def test_triton_in_its_interpreter_with_all_inputs(interpreter):
    interpreter(__file__, "definition or extreme or nonsense or one_class or strides or float64 or refused")


def test_information_of_the_definition_is_never_negative():
    logits = torch.randn(1, 500, 5, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    _, _, predictive, expected, information, *_ = mc_statistics_ref(logits, [0, 5])
    assert (predictive < expected).any() and (information >= 0).all()
