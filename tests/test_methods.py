"""Methods: scores, targets and losses from a store, label maps, weights of a global batch, and what is refused."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from muka_fast import config as configuration
from muka_fast import runinfo
from muka_fast.aligned import StudentOutput
from muka_fast.data import TextSet
from muka_fast.errors import UserError
from muka_fast.features import Features
from muka_fast.labels import build_label_space
from muka_fast.methods import (
    METHODS,
    build_method,
    selection_accuracy,
    target_accuracy,
)
from muka_fast.ops.mc_statistics import mc_statistics
from muka_fast.selection import UNCERTAINTY, owners, uncertainties
from muka_fast.stored import Supervision
from muka_fast.targets import block_softmax, tempered_softmax, text_weights

# `mean` is for teachers of one label set.
COMMON = tuple(name for name in METHODS if name != "mean")
LABELS = (["sport", "art"], ["art", "food", "law"], ["tax"])  # "art" is shared; the last teacher has one class


def make_supervision(labels=LABELS, n=7, K=4, seed=0, scale=2.0, mc=True):
    """A supervision as the store would load it, from random logits of K passes."""
    generator = torch.Generator().manual_seed(seed)
    offsets = [0, *itertools.accumulate(len(names) for names in labels)]
    base = torch.randn(n, offsets[-1], generator=generator) * scale
    passes = base + torch.randn(K, n, offsets[-1], generator=generator) * (0.5 if mc else 0.0)
    statistics = mc_statistics(passes, offsets)
    teachers = [
        {"name": f"t{i}", "labels": list(names), "mc": mc, "mc_samples": K if mc else 1}
        for i, names in enumerate(labels)
    ]
    return Supervision(
        logits=base,
        mean_probs=statistics.mean_probs,
        total_variance=torch.stack([v.sum(-1) for v in statistics.var_probs.split(list(map(len, labels)), -1)], -1),
        predictive_entropy=statistics.predictive_entropy,
        expected_entropy=statistics.expected_entropy,
        example_ids=torch.arange(n),
        teachers=teachers,
        offsets=offsets,
        features=[Features.of(torch.randn(n, 4 + i, generator=generator).numpy()) for i in range(len(labels))],
    )


def space_of(sup, label_map=None):
    return build_label_space([(t["name"], t["labels"]) for t in sup.teachers], label_map)


def options(method="muka-soft", **more):
    return configuration.RunConfig(method=method, **more)


def build(method, sup=None, label_map=None, labels=None, **more):
    """The method; muka's scores are the published ones unless `uncertainty` says otherwise."""
    sup = make_supervision() if sup is None else sup
    space, weights = space_of(sup, label_map), None
    if METHODS[method].rule is not None:
        neutral = Features.of(torch.randn(len(sup), 6, generator=torch.Generator().manual_seed(5)).numpy())
        names = torch.randn(space.num_classes, 6, generator=torch.Generator().manual_seed(6)).numpy()
        weights = METHODS[method].rule(sup.restrict(space), neutral, 0, lambda: names)
    return build_method(options(method, **{"uncertainty": "predictive_entropy"} | more), sup, space, labels, weights)


def kl(q, log_p):
    return torch.nn.functional.kl_div(log_p, q, reduction="none").sum(-1)


def student_logits(n=7, C=5, seed=1):
    return torch.randn(n, C, generator=torch.Generator().manual_seed(seed), requires_grad=True)


ROWS = torch.arange(7)


def test_tables_name_what_the_options_offer():
    assert set(METHODS) == set(configuration.METHODS)
    assert set(UNCERTAINTY) == set(configuration.UNCERTAINTIES)


# ---- scores ----


@pytest.mark.parametrize("method", ["muka-hard", "oracle"])
def test_the_surer_of_two_that_are_very_sure_is_chosen(method):
    """1 - u would be 1 for both in fp32."""
    sup = make_supervision(labels=(("a", "b"), ("a", "b")), n=2)
    tiny = torch.tensor([[2.9e-8, 1e-12], [1e-12, 2.9e-8]])
    sup = dataclasses.replace(sup, predictive_entropy=tiny, expected_entropy=torch.zeros_like(tiny))
    found = build_method(options(method, uncertainty="predictive_entropy"), sup, space_of(sup), ["a", "b"])
    assert found.selected.tolist() == [1, 0]


def test_a_space_that_drops_nothing_takes_no_copy():
    sup = make_supervision()
    space = space_of(sup)
    assert sup.restrict(space).logits is sup.logits and sup.restrict(space).label_space is space
    dropping = space_of(sup, {sup.teachers[0]["labels"][0]: None})
    assert sup.restrict(dropping).logits.shape[1] == sup.logits.shape[1] - 1


@pytest.mark.parametrize("measure", UNCERTAINTY)
def test_scores_lie_in_the_unit_interval_and_a_one_class_teacher_is_certain(measure):
    scores = 1 - uncertainties(make_supervision(scale=0.01, n=50), measure)
    assert scores.shape == (50, 3)
    assert (scores >= 0).all() and (scores <= 1).all()
    assert (scores[:, 2] == 1).all()
    assert scores[:, :2].std() > 0


def test_a_teacher_of_one_class_is_told(caplog):
    build("muka-hard", make_supervision((["a", "b"], ["c"]), n=9))
    assert "teacher t1 has one class, so that it is never in doubt: --method muka-hard trusts it most on every text" in caplog.text
    caplog.clear()
    build("muka-hard", make_supervision((["a", "b"], ["c", "d"]), n=9))
    build("muka-hard", make_supervision((["c"],), n=9))
    assert "one class" not in caplog.text


def test_the_configuration_names_the_methods_that_need_labels_and_those_with_a_rule():
    assert {name for name in METHODS if METHODS[name].needs_labels} == set(configuration.LABELLED_METHODS)
    assert {name for name in METHODS if METHODS[name].rule is not None} == set(configuration.RULED_METHODS)


def test_predictive_entropy_scores_are_those_of_the_op():
    labels = (["a", "b"], ["c", "d", "e"])
    passes = torch.randn(5, 9, 5, generator=torch.Generator().manual_seed(3))
    statistics = mc_statistics(passes, [0, 2, 5])
    sup = make_supervision(labels, n=9)
    for name in ("predictive_entropy", "expected_entropy", "mean_probs"):
        object.__setattr__(sup, name, getattr(statistics, name))
    torch.testing.assert_close(uncertainties(sup, "predictive_entropy"), statistics.normalized_entropy)
    torch.testing.assert_close(sup.mutual_information, statistics.mutual_information)
    method = build("muka-hard", sup)
    assert torch.equal(method.selected, statistics.selected)
    torch.testing.assert_close(method.margin, statistics.teacher_margin)


def test_variance_reaches_its_bound_for_certain_but_contradicting_passes():
    passes = torch.full((4, 1, 4), -50.0)
    passes[torch.arange(4), 0, torch.arange(4)] = 50.0  # each pass is sure of another class
    statistics = mc_statistics(passes, [0, 4])
    sup = make_supervision((["a", "b", "c", "d"],), n=1)
    object.__setattr__(sup, "total_variance", statistics.var_probs.sum(-1, keepdim=True))
    assert uncertainties(sup, "variance").item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("measure", ["mutual_information", "variance"])
def test_measures_of_spread_are_refused_after_a_single_pass(measure):
    for sup in (make_supervision(mc=False), make_supervision(K=1)):
        with pytest.raises(UserError, match=f"--uncertainty {measure}.*'t0'"):
            uncertainties(sup, measure)
    build("muka-soft", make_supervision(mc=False))


# ---- targets and losses ----


def test_muka_hard_takes_the_most_certain_teacher():
    sup = make_supervision((["a", "b"], ["c", "d"]))
    method = build("muka-hard", sup, margin=False)
    scores = 1 - uncertainties(sup, "predictive_entropy")
    expected = torch.zeros(7, 4)
    for b in range(7):
        i = 0 if scores[b, 0] >= scores[b, 1] else 1
        expected[b, 2 * i : 2 * i + 2] = torch.softmax(sup.logits[b, 2 * i : 2 * i + 2], -1)
    torch.testing.assert_close(method.target_probs(ROWS), expected)
    student = student_logits(C=4)
    torch.testing.assert_close(method.loss(student, ROWS), kl(expected, torch.log_softmax(student, -1)))


def test_muka_soft_mixes_by_scores_over_tau_and_adds_overlapping_classes():
    sup = make_supervision()
    method = build("muka-soft", sup, margin=False, score_temperature=0.5, kd_temperature=2.0)
    weights = torch.softmax((1 - uncertainties(sup, "predictive_entropy")) / 0.5, -1)
    probs = block_softmax(sup.logits / 2.0, sup.offsets)
    expected = torch.zeros(7, 5)
    for column, (i, c) in enumerate([(0, 0), (0, 1), (1, 1), (1, 2), (1, 3), (2, 4)]):
        expected[:, c] += weights[:, i] * probs[:, column]
    torch.testing.assert_close(method.target_probs(ROWS), expected)
    student = student_logits()
    torch.testing.assert_close(method.loss(student, ROWS), kl(expected, torch.log_softmax(student / 2.0, -1)))


def test_mc_mean_targets_use_the_mean_of_the_passes():
    sup = make_supervision((["a", "b"], ["c", "d"]))
    method = build("muka-hard", sup, target="mc_mean")
    torch.testing.assert_close(method.teacher_probs(ROWS), sup.mean_probs)
    assert not torch.allclose(method.teacher_probs(ROWS), block_softmax(sup.logits, sup.offsets), atol=1e-3)


def test_vkd_is_one_softmax_over_all_columns_times_temperature_squared():
    sup = make_supervision()
    method = build("vkd", sup, kd_temperature=3.0)
    probs, expected = torch.softmax(sup.logits / 3.0, -1), torch.zeros(7, 5)
    for column, c in enumerate([0, 1, 1, 2, 3, 4]):
        expected[:, c] += probs[:, column]
    torch.testing.assert_close(method.target_probs(ROWS), expected)
    student = student_logits()
    torch.testing.assert_close(method.loss(student, ROWS), 9 * kl(expected, torch.log_softmax(student / 3.0, -1)))
    assert torch.equal(method.selected, torch.tensor([0, 0, 1, 1, 1, 2])[sup.logits.argmax(-1)])


def test_uhc_compares_each_teacher_with_the_student_restricted_to_its_classes():
    sup = make_supervision()
    method = build("uhc", sup, kd_temperature=2.0)
    student, expected = student_logits(), torch.zeros(7)
    for (a, b), classes in zip([(0, 2), (2, 5), (5, 6)], [[0, 1], [1, 2, 3], [4]], strict=True):
        q = torch.softmax(sup.logits[:, a:b] / 2.0, -1)
        expected = expected + 4 * kl(q, torch.log_softmax(student[:, classes] / 2.0, -1))
    torch.testing.assert_close(method.loss(student, ROWS), expected)
    assert method.selected is None and method.target_probs(ROWS) is None


def test_uhc_does_not_depend_on_the_mass_between_disjoint_teachers():
    sup = make_supervision((["a", "b"], ["c", "d", "e"]))
    method = build("uhc", sup)
    torch.testing.assert_close(method.loss(sup.logits, ROWS), torch.zeros(7), atol=1e-6, rtol=0)
    shifted = sup.logits + torch.tensor([5.0, 5, 0, 0, 0])
    torch.testing.assert_close(method.loss(shifted, ROWS), torch.zeros(7), atol=1e-6, rtol=0)


def test_supervised_is_cross_entropy_and_leaves_out_unknown_labels(caplog):
    labels = ["sport", "art", "nobody's", "law", "tax", "food", "art"]
    method = build("supervised", labels=labels)
    student = student_logits()
    loss = method.loss(student, ROWS)
    ids = torch.tensor([0, 1, 0, 3, 4, 2, 1])
    expected = -torch.log_softmax(student, -1)[ROWS, ids] * torch.tensor([1, 1, 0, 1, 1, 1, 1.0])
    torch.testing.assert_close(loss, expected)
    assert method.num_excluded == 1 and method.denominator(ROWS) == 6
    assert "1 of 7 texts" in caplog.text
    assert target_accuracy(method, labels, space_of(make_supervision())) == 1.0


def test_oracle_takes_an_owner_of_the_true_label_and_the_more_certain_one_of_two():
    sup = make_supervision()
    labels = ["sport", "art", "nobody's", "law", "tax", "food", "art"]
    method = build("oracle", sup, labels=labels)
    scores = 1 - uncertainties(sup, "predictive_entropy")
    of_art = [0 if scores[b, 0] >= scores[b, 1] else 1 for b in (1, 6)]
    expected = [0, of_art[0], None, 1, 2, 1, of_art[1]]
    assert [int(i) for b, i in enumerate(method.selected) if b != 2] == [i for i in expected if i is not None]
    assert selection_accuracy(method, labels, space_of(sup)) == 1.0
    student = student_logits()
    loss = method.loss(student, ROWS)
    assert loss[2] == 0
    loss.sum().backward()
    assert (student.grad[2] == 0).all() and (student.grad[0] != 0).any()
    q = torch.zeros(5)
    q[[1, 2, 3]] = torch.softmax(sup.logits[3, 2:5], -1)
    torch.testing.assert_close(loss[3], kl(q, torch.log_softmax(student[3], -1)))


def test_an_excluded_text_cannot_poison_the_gradient():
    labels = ["sport", "nobody's"]
    method = build("oracle", make_supervision(n=2), labels=labels)
    student = torch.zeros(2, 5, requires_grad=True)
    method.loss(student, torch.tensor([0, 1])).sum().backward()
    assert student.grad.isfinite().all()


# ---- rules over the pool ----


def test_a_rules_weights_mix_the_teachers_and_a_text_that_nobody_owns_is_left_out(caplog):
    sup, student = make_supervision(), student_logits()
    weights = torch.softmax(torch.randn(7, 3, generator=torch.Generator().manual_seed(2)), -1)
    weights[3] *= 0.4  # 0.6 for "no teacher"
    weights[5] = torch.tensor([0.0, 1.0, 0.0])
    method = build_method(options("muka-evidence"), sup, space_of(sup), None, weights.numpy())
    probs, expected = block_softmax(sup.logits, sup.offsets), torch.zeros(7, 5)
    for column, (i, c) in enumerate([(0, 0), (0, 1), (1, 1), (1, 2), (1, 3), (2, 4)]):
        expected[:, c] += (weights / weights.sum(-1, keepdim=True))[:, i] * probs[:, column]
    torch.testing.assert_close(method.target_probs(ROWS), expected)
    loss = method.loss(student, ROWS)
    torch.testing.assert_close(loss, kl(expected, torch.log_softmax(student, -1)) * method.balance * (torch.arange(7) != 3))
    assert method.num_excluded == 1 and method.denominator(ROWS) == 6 and "1 of 7 texts belong to no teacher" in caplog.text
    assert torch.equal(method.selected, weights.argmax(-1))
    with pytest.raises(UserError, match="all 7 texts belong to no teacher"):
        build_method(options("muka-evidence"), sup, space_of(sup), None, weights.numpy() * 0.3)


def test_weights_are_for_methods_with_a_rule_and_only_for_them():
    sup = make_supervision()
    with pytest.raises(ValueError, match="weights"):
        build_method(options("muka-evidence"), sup, space_of(sup))
    with pytest.raises(ValueError, match="weights"):
        build_method(options("vkd"), sup, space_of(sup), None, torch.ones(7, 3).numpy())


def test_mean_takes_teachers_of_one_label_set_in_any_order():
    sup = make_supervision((["a", "b", "c"], ["c", "a", "b"]))
    method = build("mean", sup, kd_temperature=2.0)
    mean = (sup.logits[:, :3] + sup.logits[:, [4, 5, 3]]) / 2
    torch.testing.assert_close(method.target_probs(ROWS), torch.softmax(mean / 2.0, -1))
    sup.logits[0] = torch.tensor([0.0, -math.inf, -math.inf, 0.0, -math.inf, 0.0])  # each rules out what the other says
    torch.testing.assert_close(build("mean", sup).target_probs(ROWS)[0], torch.full((3,), 1 / 3))
    with pytest.raises(UserError, match="--method mean needs teachers of one label set, but teacher 't0' lacks 'd'"):
        build("mean", make_supervision((["a", "b"], ["a", "d"])))
    with pytest.raises(UserError, match="teacher 't0' has two labels of one class"):
        build("mean", sup, {"t0": {"b": "a"}, "t1": {"b": None}} | {"c": "c"})


# ---- weights and the global batch ----


def test_margin_multiplies_the_loss_of_each_text():
    sup, student = make_supervision(), student_logits()
    plain, weighted = build("muka-soft", sup, margin=False), build("muka-soft", sup, margin=True)
    torch.testing.assert_close(
        weighted.loss(student, ROWS), plain.loss(student, ROWS) * (weighted.margin + 1e-6), atol=1e-7, rtol=1e-5
    )
    best = (1 - uncertainties(sup, "predictive_entropy")).sort(-1, descending=True).values
    torch.testing.assert_close(weighted.margin, best[:, 0] - best[:, 1])
    assert weighted.denominator(ROWS) == 7 and plain.denominator(ROWS) == 7


def test_normalize_margin_divides_by_the_batch_mean_of_the_margin():
    sup, student = make_supervision((["a", "b"], ["c", "d", "e"])), student_logits()
    plain = build("muka-soft", sup, margin=False)
    method = build("muka-soft", sup, normalize_margin=True)
    batch_loss = method.loss(student, ROWS).sum() / method.denominator(ROWS)
    expected = (plain.loss(student, ROWS) * method.margin).mean() / method.margin.mean()
    torch.testing.assert_close(batch_loss, expected, atol=1e-5, rtol=1e-4)


def test_normalize_margin_survives_a_batch_of_ties():
    sup = make_supervision((["a"], ["b"]))  # one-class teachers: every score is 1, every margin 0
    method = build("muka-hard", sup, normalize_margin=True)
    student = student_logits(C=2)
    batch_loss = method.loss(student, ROWS).sum() / method.denominator(ROWS)
    torch.testing.assert_close(batch_loss, -torch.log_softmax(student, -1)[:, 0].mean())


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_texts_of_a_pool_count_by_the_share_of_their_teachers(power, caplog):
    caplog.set_level("INFO", "muka_fast")
    sup, student = make_supervision(), student_logits()
    weights = torch.eye(3)[[0, 0, 0, 0, 1, 1, 2]]
    weights[4] = torch.tensor([0.25, 0.5, 0.25])
    weights[5] *= 0.3  # belongs to nobody: neither learnt nor counted
    method = build_method(options("muka-auto", teacher_balance=power), sup, space_of(sup), None, weights.numpy())
    share = torch.tensor([4.25, 0.5, 1.25]) / 6  # of the six that count
    counts = torch.tensor([*[share[0] ** -power] * 4, (weights[4] * share**-power).sum(), 0, share[2] ** -power])
    expected = counts / counts.sum() * 6
    torch.testing.assert_close(method.balance * method.included, expected)
    divergence = kl(method.target_probs(ROWS), torch.log_softmax(student, -1))
    torch.testing.assert_close(method.loss(student, ROWS), expected * divergence)
    assert method.denominator(ROWS) == 6
    assert ("t0 1.00 (4 texts), t1 1.00 (1 text), t2 1.00 (1 text)" in caplog.text) == (power == 0)
    assert "trusted most on no text" not in caplog.text


def test_a_teacher_that_no_text_goes_to_is_told(caplog):
    """Those of texts that do not count are none; a method that selects none has none to tell of."""
    weights = torch.eye(3)[[0, 0, 2, 0, 1, 0, 2]]
    weights[4] *= 0.3  # belongs to nobody
    sup = make_supervision()
    build_method(options("muka-auto"), sup, space_of(sup), None, weights.numpy())
    assert caplog.text.count("trusted most on no text") == 1 and "teacher t1: trusted most on no text" in caplog.text
    build_method(options("muka-auto"), sup, space_of(sup), None, torch.eye(3)[[0] * 7].numpy())
    assert "teachers t1, t2: trusted most on no text" in caplog.text
    caplog.clear()
    alike = make_supervision((("a", "b"), ("b", "a")))  # nothing that one knows alone
    build_method(options("muka-auto"), alike, space_of(alike), None, torch.eye(2)[[0] * 7].numpy())
    assert "trusted most on no text" not in caplog.text
    sup.logits[:, :3] = 9.0  # vkd would take t0 for every text, but learns from all
    for method in ("uhc", "vkd"):
        build_method(options(method), sup, space_of(sup))
    assert "no text" not in caplog.text


@given(
    weights=hnp.arrays(np.float64, st.tuples(st.integers(2, 40), st.integers(1, 6)), elements=st.floats(1e-6, 1)),
    left_out=st.integers(0, 2**16),
    power=st.floats(0, 1),
)
def test_what_texts_count_for(weights, left_out, power):
    counted = torch.from_numpy(np.random.default_rng(left_out).random(len(weights)) < 0.8)
    counted[0] = True
    weights = torch.from_numpy(weights)
    found = text_weights(weights, counted, power)
    assert found[counted].mean().item() == pytest.approx(1, abs=1e-5)
    assert (found > 0).all() and found.max() / found.min() <= (10 * weights.shape[1]) ** power * (1 + 1e-5)
    if power == 0 or weights.shape[1] == 1:
        torch.testing.assert_close(found, torch.ones(len(weights)))
    torch.testing.assert_close(text_weights(weights.flip(1), counted, power), found)


@given(st.lists(st.integers(0, 2), min_size=3, max_size=20).filter(lambda owners: len(set(owners)) == 3))
def test_at_power_one_every_teachers_texts_count_as_much_together(owners):
    owners = torch.tensor(owners)
    counts = text_weights(torch.nn.functional.one_hot(owners).double(), torch.ones(len(owners), dtype=bool), 1.0)
    sums = torch.zeros(3).index_add(0, owners, counts)
    torch.testing.assert_close(sums, torch.full((3,), len(owners) / 3))


@given(
    method=st.sampled_from(sorted(COMMON)),
    normalize=st.booleans(),
    cut=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_the_gradient_does_not_depend_on_how_a_batch_is_split(method, normalize, cut, seed):
    labels = ["sport", "art", "nobody's", "law", "tax", "food", "art"]
    built = build(method, make_supervision(seed=seed), labels=labels, normalize_margin=normalize)
    grads = []
    for parts in ([ROWS], [ROWS[:cut], ROWS[cut:]]):
        student = student_logits(seed=seed + 1)
        for rows in parts:
            (built.loss(student[rows], rows).sum() / built.denominator(ROWS)).backward()
        grads.append(student.grad)
    torch.testing.assert_close(*grads)


def test_one_teacher_has_margin_one():
    method = build("muka-hard", make_supervision((["a", "b", "c"],)))
    assert (method.margin == 1).all() and (method.selected == 0).all()


# ---- label maps ----


def test_dropped_columns_leave_the_softmax_and_merged_ones_add_up():
    sup = make_supervision()
    label_map = {"sport": None, "t1": {"food": "law"}}  # t0 keeps art; t1: art, law + law
    for method in ("muka-hard", "vkd"):
        built = build(method, sup, label_map, margin=False)
        kept = sup.logits[:, 1:]
        if method == "vkd":
            probs = torch.softmax(kept, -1)
            expected = torch.stack([probs[:, 0] + probs[:, 1], probs[:, 2] + probs[:, 3], probs[:, 4]], -1)
        else:
            blocks = [torch.softmax(kept[:, a:b], -1) for a, b in ((0, 1), (1, 4), (4, 5))]
            zero = torch.zeros(7)
            per_teacher = torch.stack(
                [
                    torch.stack([blocks[0][:, 0], zero, zero], -1),
                    torch.stack([blocks[1][:, 0], blocks[1][:, 1] + blocks[1][:, 2], zero], -1),
                    torch.stack([zero, zero, blocks[2][:, 0]], -1),
                ]
            )
            expected = per_teacher[built.selected, ROWS]
        torch.testing.assert_close(built.target_probs(ROWS), expected)
    uhc = build("uhc", sup, label_map)
    student = student_logits(C=3)
    p = torch.softmax(sup.logits[:, 2:5], -1)
    q = torch.stack([p[:, 0], p[:, 1] + p[:, 2]], -1)
    torch.testing.assert_close(uhc.loss(student, ROWS), kl(q, torch.log_softmax(student[:, :2], -1)))


def test_uncertainty_stays_that_of_the_full_label_set():
    sup = make_supervision()
    space = space_of(sup, {"food": None})
    restricted = sup.restrict(space)
    for measure in UNCERTAINTY:
        assert torch.equal(uncertainties(sup, measure), uncertainties(restricted, measure))
    assert restricted.restrict(space) is restricted
    with pytest.raises(ValueError, match="other teachers"):
        restricted.restrict(space_of(sup))
    with pytest.raises(ValueError, match="other teachers"):
        sup.restrict(space_of(make_supervision(LABELS[:-1])))


def test_mean_probs_are_renormalised_over_kept_columns():
    sup = make_supervision()
    kept = sup.restrict(space_of(sup, {"food": None})).mean_probs
    torch.testing.assert_close(
        kept[:, 2:4], sup.mean_probs[:, [2, 4]] / sup.mean_probs[:, [2, 4]].sum(-1, keepdim=True)
    )


def test_a_teacher_without_any_mass_on_its_kept_classes_becomes_uniform():
    sup = make_supervision((["a", "b", "c"], ["d", "e"]), n=1)
    sup.logits[0, :2], sup.mean_probs[0, :3] = -math.inf, torch.tensor([0.0, 0, 1])
    restricted = sup.restrict(space_of(sup, {"c": None}))
    torch.testing.assert_close(restricted.mean_probs[0, :2], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(block_softmax(restricted.logits, restricted.offsets)[0, :2], torch.tensor([0.5, 0.5]))
    assert sup.logits[0, 0] == -math.inf  # the store's own tensors stay
    sup.logits[0, :2] = torch.tensor([-200.0, -201])  # probabilities that underflowed: the logits still tell them apart
    restricted = sup.restrict(space_of(sup, {"c": None}))
    torch.testing.assert_close(restricted.mean_probs[0, :2], torch.softmax(torch.tensor([1.0, 0]), -1))


# ---- students, accuracies, refusals ----


def test_a_penalty_is_added_and_half_precision_is_not_lost():
    method, student = build("muka-soft"), student_logits()
    rows = ROWS[2:5]
    plain = method.loss(student[rows], rows)
    penalty = torch.tensor([0.5, 0.0, 2.0])
    tied = build("dfa")
    torch.testing.assert_close(
        tied.loss(StudentOutput(student[rows], penalty), rows), tied.loss(student[rows], rows) + penalty
    )
    half = method.loss(student[rows].bfloat16(), rows)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("method", COMMON)
def test_every_method_stays_finite_for_extreme_logits(method):
    sup = make_supervision(scale=1e4)
    built = build(method, sup, labels=["sport", "art", "law", "law", "tax", "food", "art"])
    student = (student_logits().detach() * 1e4).requires_grad_()
    loss = built.loss(student, ROWS)
    loss.sum().backward()
    assert loss.isfinite().all() and student.grad.isfinite().all()
    assert (loss > -1e-5).all()


def test_accuracies_count_only_labels_that_some_teacher_owns():
    sup = make_supervision((["a", "b"], ["b", "c"]), n=4)
    sup.logits[:] = torch.tensor([[9.0, 0, 0, 0], [0, 9, 0, 0], [0, 5, 5, 9], [0, 0, 0, 9]])
    space = space_of(sup)
    labels = ["a", "b", "b", "nobody's"]
    vkd = build_method(options("vkd"), sup, space)
    assert target_accuracy(vkd, labels, space) == pytest.approx(2 / 3)
    assert selection_accuracy(vkd, labels, space) == 1.0  # the second teacher owns b as well
    assert target_accuracy(build_method(options("uhc"), sup, space), labels, space) is None
    assert selection_accuracy(build_method(options("uhc"), sup, space), labels, space) is None
    assert target_accuracy(vkd, ["?"] * 4, space) is None
    vkd._leave_out(torch.tensor([False, False, True, False]), "belong to nobody")
    assert target_accuracy(vkd, labels, space) == 1.0
    figures = {"selection_accuracy": 1.0, "target_accuracy": 1.0, "num_labelled_texts": 2}
    assert runinfo.supervision_metrics(vkd, labels, space) == figures
    assert owners(space).tolist() == [[True, True, False], [False, True, True]]


def test_refusals_name_the_option():
    sup = make_supervision()
    space = space_of(sup)
    with pytest.raises(UserError, match="--method oracle needs true labels"):
        build_method(options("oracle"), sup, space)
    with pytest.raises(UserError, match="--method supervised: none of the 7 labels"):
        build_method(options("supervised"), sup, space, ["x"] * 7)


def test_a_text_at_exactly_half_is_kept():
    sup = make_supervision()
    weights = np.tile(np.float32([0.25, 0.5, 0.25]), (7, 1))
    weights[0] /= 2  # exactly half
    weights[1] /= 4
    assert build_method(options("muka-evidence"), sup, space_of(sup), None, weights).included.tolist() == [1, 0, 1, 1, 1, 1, 1]


def test_the_owner_counts_even_where_it_knows_nothing():
    sup = make_supervision((["a", "b"], ["c", "d"]), n=1)
    sup.predictive_entropy[:] = float(np.log(2))
    sup.expected_entropy[:] = 0
    assert (1 - uncertainties(sup, "predictive_entropy")).abs().max() < 1e-6
    object.__setattr__(sup, "predictive_entropy", torch.full((1, 2), 0.7))  # clamped: score 0
    assert build("oracle", sup, labels=["c"]).selected.tolist() == [1]


def test_the_mean_of_the_passes_has_no_temperature():
    sup = make_supervision()
    torch.testing.assert_close(build("muka-hard", sup, target="mc_mean", kd_temperature=2.0).teacher_probs(ROWS), sup.mean_probs)


def test_the_margin_of_a_rule_is_the_gap_of_its_weights():
    sup = make_supervision()
    weights = torch.softmax(torch.randn(7, 3, generator=torch.Generator().manual_seed(2)), -1)
    method = build_method(options("muka-evidence"), sup, space_of(sup), None, weights.numpy())
    top = weights.sort(-1, descending=True).values
    torch.testing.assert_close(method.margin, top[:, 0] - top[:, 1])


def test_a_text_without_any_weight_does_not_poison_the_gradient():
    sup = make_supervision()
    weights = torch.softmax(torch.randn(7, 3, generator=torch.Generator().manual_seed(2)), -1)
    weights[3] = 0
    method = build_method(options("muka-evidence"), sup, space_of(sup), None, weights.numpy())
    student = torch.zeros(7, 5, requires_grad=True)
    method.loss(student, ROWS).sum().backward()
    assert student.grad.isfinite().all()


def test_no_text_is_shown_twice():
    sup = make_supervision(n=8)
    method = build("muka-hard", sup)
    texts = TextSet([str(i) for i in range(8)], None, np.arange(8), "x", "f", 0)
    found = runinfo.supervision_summary(method, sup, space_of(sup), texts)
    shown = [row["example_id"] for part in ("lowest_margin", "highest_margin") for row in found[part]]
    assert sorted(shown) == list(range(8))


def test_what_is_shown_of_a_text_is_said_of_classes_by_their_names_in_the_student():
    """Two columns of the first teacher are one class: together they are its answer, though a third one is larger than either."""
    sup = make_supervision((["a", "b", "c"], ["d", "e"]), n=1)
    sup.logits[0] = torch.tensor([0.3, 0.3, 0.4, 0.5, 0.5]).log()
    space = space_of(sup, {"a": "life", "b": "life"})
    method = build_method(options("oracle"), sup, space, ["life"])
    texts = TextSet(["x"], ["a"], np.arange(1), "x", "f", 0)
    found = runinfo.supervision_summary(method, sup, space, texts, ["life"])
    (shown,) = found["lowest_margin"]
    assert (shown["teacher"], shown["says"], shown["label"]) == (space.teacher_names[0], "life", "life")
    assert shown["probability"] == pytest.approx(0.6)
    # The oracle has a selection of its own, and no margin.
    assert (found["source"], found["margin_source"]) == ("oracle", "predictive entropy") and list(found["shares"].values()) == [1, 0]
    nobody = build_method(options("uhc"), sup, space, None)
    assert nobody.selected is None and runinfo.supervision_summary(nobody, sup, space, texts)["source"] == "predictive entropy"


def test_the_oracle_goes_by_entropy_where_one_teacher_was_scored_by_a_single_pass():
    sup = make_supervision((["a", "b"], ["b", "c"]))
    sup.teachers[1]["mc"] = False
    found = build("oracle", sup, labels=["b"] * 7, uncertainty="mutual_information").selected
    assert torch.equal(found, uncertainties(sup, "predictive_entropy").argmin(-1))


def test_the_mean_of_large_logits_keeps_its_digits():
    sup = make_supervision((["a", "b"], ["a", "b"]))
    sup.logits[0] = torch.tensor([2.0**24, 2.0**24, 2.0**24 + 2, 2.0**24])  # means differ by 1, sums are rounded to 4
    torch.testing.assert_close(build("mean", sup).target_probs(ROWS)[0], torch.softmax(torch.tensor([1.0, 0.0]), -1))


def test_large_logits_over_a_small_temperature_keep_their_digits():
    logits = torch.tensor([[3e33, 0.0], [1e4 + 0.01, 1e4]])
    assert tempered_softmax(logits, 1e-6)[0].tolist() == [1, 0]  # 3e39 is beyond fp32
    expected = torch.softmax(logits[1].double() / 0.01, -1)
    torch.testing.assert_close(tempered_softmax(logits, 0.01)[1].double(), expected, atol=1e-5, rtol=0)


def test_margins_are_counted_between_zero_and_one_whatever_the_least_and_largest():
    sup = make_supervision(n=5)
    method = build("muka-hard", sup)
    method.margin = torch.tensor([0.41, 0.42, 0.48, 0.52, 0.59])
    texts = TextSet(list("vwxyz"), None, np.arange(5), "x", "f", 0)
    histogram = runinfo.supervision_summary(method, sup, space_of(sup), texts)["margin_histogram"]
    assert histogram == [0] * 8 + [2, 1, 1, 1] + [0] * 8


def test_examples_of_what_nobody_covers_are_spread_over_the_texts():
    sup = make_supervision(n=70)
    weights = np.tile(np.float32([0.25, 0.5, 0.25]), (70, 1))
    weights[10:] *= 0.3  # belong to nobody
    method = build_method(options("muka-evidence"), sup, space_of(sup), None, weights)
    found = runinfo.coverage_summary(method, TextSet([str(i) for i in range(70)], None, np.arange(70), "x", "f", 0))
    assert found["texts"] == 60 and found["share"] == pytest.approx(6 / 7)
    assert [example["example_id"] for example in found["examples"]] == [10, 20, 30, 40, 50, 60]
