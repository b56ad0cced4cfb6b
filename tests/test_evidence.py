"""muka-evidence: against the definition in plain float64, in every odd pool, in any order, and in bounded time."""

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from muka_fast import evidence
from muka_fast.auto import auto_weights
from muka_fast.evidence import (
    Anchors,
    Owner,
    RelativeMahalanobis,
    evidence_weights,
    neighbours,
    own_scores,
    regress,
    sample_rows,
    second_scores,
    unit,
)
from muka_fast.features import Features
from muka_fast.labels import build_label_space
from muka_fast.stored import Supervision


def make_pool(n=120, counts=(3, 3), widths=None, seed=0, mc=True, shares=None, labels=None, separation=3.0):
    """A pool in which teacher i knows topic i: its features show its classes there, elsewhere noise. -> sup, neutral, topic."""
    rng = np.random.default_rng(seed)
    N, widths = len(counts), widths or [8 + 4 * i for i in range(len(counts))]
    topic = rng.choice(N, n, p=shares)
    neutral = rng.standard_normal((n, 12)) + separation * rng.standard_normal((N, 12))[topic]
    logits, features = [], []
    for i, (C, D) in enumerate(zip(counts, widths, strict=True)):
        means = 4 * rng.standard_normal((C, D))
        x = rng.standard_normal((n, D)) + (topic == i)[:, None] * means[rng.integers(0, C, n)]
        logits.append(x @ means.T / math.sqrt(D))
        features.append(Features.of(x.astype(np.float32)))
    z = torch.from_numpy(np.concatenate(logits, 1)).float()
    offsets = [0, *np.cumsum(counts).tolist()]
    blocks = [torch.softmax(z[:, a:b], -1) for a, b in itertools.pairwise(offsets)]
    entropy = torch.stack([-torch.special.xlogy(p, p).sum(-1) for p in blocks], -1)
    noise = torch.from_numpy(rng.uniform(0.3, 0.9, entropy.shape)).float()
    names = labels or [[f"{i}.{c}" for c in range(C)] for i, C in enumerate(counts)]
    teachers = [{"name": f"t{i}", "labels": names[i], "mc": mc, "mc_samples": 16 if mc else 1} for i in range(N)]
    sup = Supervision(
        logits=z, mean_probs=torch.cat(blocks, 1), total_variance=torch.zeros_like(entropy), predictive_entropy=entropy,
        expected_entropy=entropy * noise, example_ids=torch.arange(n) * 3, teachers=teachers, offsets=offsets,
        features=features,
    )  # fmt: skip
    return sup, Features.of(neutral.astype(np.float32)), topic


def restricted(sup):
    return sup.restrict(build_label_space([(teacher["name"], teacher["labels"]) for teacher in sup.teachers]))


def matrix(features):
    return np.concatenate([chunk for _, chunk in features.chunks()]).astype(np.float64)


def test_two_columns_of_one_class_are_one_class():
    """How sure a teacher is, and of what, is asked of classes, whatever columns its head has for them."""
    sup = make_pool(200, (3, 4))[0]
    share = torch.from_numpy(np.random.default_rng(0).uniform(0.2, 0.8, sup.logits.shape)).float()
    parts = torch.stack([sup.logits + share.log(), sup.logits + (1 - share).log()], -1)
    doubled = [teacher | {"labels": [name for name in teacher["labels"] for _ in range(2)]} for teacher in sup.teachers]
    split = dataclasses.replace(
        sup, logits=parts.flatten(1), mean_probs=None, offsets=[2 * offset for offset in sup.offsets], teachers=doubled
    )
    rows = np.arange(len(sup))
    for power in (0.0, 4.0):
        joined = own_scores(restricted(sup), rows, power)
        np.testing.assert_allclose(own_scores(restricted(split), rows, power), joined, atol=2e-3)


def shuffle(sup, neutral, rows, order):
    """The same pool with its texts and teachers in another order."""
    columns = [c for i in order for c in range(sup.offsets[i], sup.offsets[i + 1])]
    moved = Supervision(
        logits=sup.logits[rows][:, columns], mean_probs=sup.mean_probs[rows][:, columns],
        total_variance=sup.total_variance[rows][:, order],
        predictive_entropy=sup.predictive_entropy[rows][:, order], expected_entropy=sup.expected_entropy[rows][:, order],
        example_ids=sup.example_ids[rows], teachers=[sup.teachers[i] for i in order],
        offsets=[0, *np.cumsum([len(sup.teachers[i]["labels"]) for i in order]).tolist()],
        features=[Features.of(matrix(sup.features[i])[rows].astype(np.float32)) for i in order],
    )  # fmt: skip
    return moved, Features.of(matrix(neutral)[rows].astype(np.float32))


# ---- the definition, in float64, straightforward and slow ----


def o_rmd(F, predicted, shrink=0.1):
    D = F.shape[1]
    ridge = lambda S: S + shrink * np.mean(np.diag(S)) * np.eye(D)
    classes = sorted(set(predicted.tolist()))
    mu = {c: F[predicted == c].mean(0) for c in classes}
    residual = np.stack([F[b] - mu[int(predicted[b])] for b in range(len(F))])
    inner = np.linalg.inv(ridge(residual.T @ residual / len(F)))
    outer = np.linalg.inv(ridge(np.cov(F.T, bias=True).reshape(D, D)))
    maha = lambda x, m, P: (x - m) @ P @ (x - m)
    return np.array([-(min(maha(x, mu[c], inner) for c in classes) - maha(x, F.mean(0), outer)) for x in F])


def o_anchor(s, a=0.1):
    low, high = np.quantile(s, a), np.quantile(s, 1 - a)
    return 4 * ((s - low) / max(high - low, 1e-12) - 0.5)


def o_regression(b, target, weight, N):
    """min over W, c of sum of weighted cross-entropies + |W|^2 / 2."""
    d = b.shape[1]

    def loss(x):
        W, c = x[: N * d].reshape(N, d), x[N * d :]
        log_p = log_softmax(b @ W.T + c, axis=1)
        value = -(weight * log_p[np.arange(len(b)), target]).sum() + 0.5 * (W**2).sum()
        g = weight[:, None] * (np.exp(log_p) - np.eye(N)[target])
        return value, np.concatenate([(g.T @ b + W).ravel(), g.sum(0)])

    x = minimize(loss, np.zeros(N * d + N), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-9}).x
    return log_softmax(b @ x[: N * d].reshape(N, d).T + x[N * d :], axis=1)


def o_weights(sup, neutral):
    N = len(sup.teachers)
    e = []
    for i, (a, b) in enumerate(itertools.pairwise(sup.offsets)):
        z = sup.logits[:, a:b].double().numpy()
        if sup.teachers[i]["mc"]:
            mi = (sup.predictive_entropy - sup.expected_entropy)[:, i].double().numpy()
            second = -np.log(np.maximum(mi / math.log(b - a), 1e-6))
        else:
            second = np.log(np.exp(z).sum(1))
        e.append((o_anchor(o_rmd(matrix(sup.features[i]), z.argmax(1))) + o_anchor(second)) / 2)
    e = np.stack(e, 1)
    b = matrix(neutral) / np.linalg.norm(matrix(neutral), axis=1, keepdims=True)
    similarity = b @ b.T
    np.fill_diagonal(similarity, -np.inf)
    near = np.argsort(-similarity, axis=1)[:, :15]
    v = 2 * e
    for _ in range(3):
        v = 0.7 * np.stack([v[row].mean(0) for row in near]) + 0.3 * v
    w = softmax(v, axis=1)
    for _ in range(5):
        top = np.sort(w, axis=1)
        gap = top[:, -1] - top[:, -2]
        w = softmax(o_regression(b, w.argmax(1), gap / gap.mean(), N) + e, axis=1)
    return w


@pytest.mark.parametrize("counts", [(3, 3), (2, 4, 3)])
@pytest.mark.parametrize("mc", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_those_of_the_definition(counts, mc, seed):
    sup, neutral, _ = make_pool(90, counts, seed=seed, mc=mc, separation=1.5)
    found, expected = evidence_weights(sup, neutral), o_weights(sup, neutral)
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.98


@pytest.mark.parametrize(("rule", "least"), [(evidence_weights, 0.98), (auto_weights, 0.95)])
def test_it_finds_the_owner_where_a_teacher_is_confident_abroad(rule, least):
    """The first teacher is certain of everything, below the floor of the score; features and neighbourhood tell who knows what."""
    sup, neutral, topic = make_pool(600, (4, 4, 4), seed=1, shares=[0.7, 0.2, 0.1])
    sup.predictive_entropy[:, 0] = sup.expected_entropy[:, 0] = 0
    sup.predictive_entropy[:, 1:] += 0.01
    by_entropy = (sup.normalized_entropy.argmin(-1).numpy() == topic).mean()
    assert by_entropy < 0.75 < least < (rule(sup, neutral).argmax(1) == topic).mean()


# ---- odd pools ----


@pytest.mark.parametrize(
    ("n", "counts", "options"),
    [
        (1, (2, 3), {}),
        (2, (2, 3), {}),
        (3, (2, 3), {}),
        (4, (2, 3), {}),
        (5, (2, 3, 1), {}),
        (30, (4,), {}),
        (50, (3, 3, 3), {}),
        (50, (1, 1), {}),
        (60, (1, 4, 2), {"mc": False}),
        (80, tuple([2] * 20), {}),
        (80, (3, 3), {"widths": [400, 3]}),
        (40, (30, 2), {}),  # most classes are never predicted
        (60, (3, 3), {"shares": [1.0, 0.0]}),
        (60, (2, 2), {"labels": [["a", "b"], ["b", "a"]]}),  # everything overlaps
        (60, (3, 2), {"labels": [["a", "b", "a"], ["b", "c"]]}),  # two columns of one teacher are one class
    ],
)
@pytest.mark.parametrize("rule", [evidence_weights, auto_weights])
def test_every_pool_gets_finite_weights(rule, n, counts, options):
    sup, neutral, _ = make_pool(n, counts, **options)
    weights = rule(restricted(sup), neutral)
    assert weights.shape == (n, len(counts)) and weights.dtype == np.float32 and np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)


def test_constant_scores_are_no_evidence():
    """A one-class teacher, constant logits, features that are all equal, and mutual information below the floor."""
    assert (Anchors.of(np.full(50, 3.7, np.float32))(np.full(50, 3.7)) == 0).all()
    sup, neutral, _ = make_pool(60, (2, 2))
    flat = [Features.of(np.ones((60, 4), np.float32))] * 2
    sup = Supervision(**{**vars(sup), "features": flat, "expected_entropy": sup.predictive_entropy})
    weights = evidence_weights(sup, neutral)
    assert (weights == weights[0]).all() and weights[0].argmax() == 0  # nothing tells them apart: the lowest index, as everywhere


def test_a_score_with_hardly_any_span_cannot_outvote_the_other():
    scores = np.linspace(0, 1e-3, 100, dtype=np.float32)
    scores[0] = -5
    assert Anchors.of(scores)(scores).min() == -20


@pytest.mark.parametrize("different", [0, 1, 30, 59])
def test_a_score_that_is_the_same_for_most_texts_says_nothing(different):
    """As mutual information at its floor: the texts above it would be an infinite number of spans away."""
    sup, neutral, topic = make_pool(600, (3, 3), separation=1.0)
    expected = sup.expected_entropy.clone()
    expected[different:, 0] = sup.predictive_entropy[different:, 0]
    sup = Supervision(**{**vars(sup), "expected_entropy": expected})
    assert (evidence_weights(sup, neutral).argmax(1) == topic).all()


@pytest.mark.parametrize("rule", [evidence_weights, auto_weights])
@pytest.mark.parametrize("counts", [(1, 3), (3, 3), (4, 4, 1)])
def test_a_teacher_that_names_one_class_only_is_judged_by_the_others(rule, counts):
    """Its distance is the same for all texts; rounding must not be taken for evidence, nor hang on the order of the texts."""
    for seed in range(3):
        sup, neutral, topic = make_pool(400, counts, widths=[64] * len(counts), seed=seed, separation=1.5)
        if counts == (3, 3):
            sup.logits[:, 0] += 50
        weights = rule(restricted(sup), neutral)
        assert (weights.argmax(1) == topic).mean() > 0.98
        rows = np.random.default_rng(seed).permutation(400)
        moved, there = shuffle(sup, neutral, rows, range(len(counts)))
        np.testing.assert_allclose(rule(restricted(moved), there), weights[rows], atol=1e-3)


def test_classes_without_spread_have_distances():
    """Every class one text, many times: S = 0."""
    rng = np.random.default_rng(0)
    predicted = rng.integers(0, 5, 200)
    F = rng.standard_normal((5, 16))[predicted]
    found = RelativeMahalanobis.fit(F.astype(np.float32), predicted).scores(F.astype(np.float32))
    assert all(np.ptp(found[predicted == c]) < 1e-3 * np.abs(found).max() for c in range(5)) and np.abs(found).max() < 1e3


def test_one_teacher_owns_everything_and_texts_without_logits_count():
    sup, neutral, _ = make_pool(30, (4,))
    assert (evidence_weights(sup, neutral) == 1).all()
    sup, neutral, _ = make_pool(60, (3, 3), mc=False)
    sup.logits[:, 1] = -torch.inf
    assert np.isfinite(evidence_weights(sup, neutral)).all()


def test_the_second_score_needs_samples_of_every_teacher():
    sup, _, _ = make_pool(20, (2, 3))
    energy = torch.stack([sup.logits[:, :2].logsumexp(-1), sup.logits[:, 2:].logsumexp(-1)], -1).numpy()
    assert not np.allclose(second_scores(sup), energy)
    sup.teachers[1]["mc_samples"] = 1
    np.testing.assert_allclose(second_scores(sup), energy)


def test_an_even_split_leaves_no_text_without_weight():
    owner = regress(np.eye(6), np.full((6, 2), 0.5))
    assert np.isfinite(owner.log_probs(np.eye(6))).all()


# ---- order, sample, stream ----


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), N=st.integers(2, 5), mc=st.booleans(), data=st.data())
def test_the_order_of_texts_and_teachers_changes_no_selection(seed, N, mc, data):
    sup, neutral, _ = make_pool(70, [2 + i % 3 for i in range(N)], seed=seed, mc=mc)
    weights = evidence_weights(sup, neutral, seed)
    rows = np.array(data.draw(st.permutations(range(70))))
    order = data.draw(st.permutations(range(N)))
    found = evidence_weights(*shuffle(sup, neutral, rows, order), seed)
    np.testing.assert_allclose(found, weights[rows][:, order], atol=0.02)
    clear = np.diff(np.sort(weights, axis=1)[:, -2:])[:, 0] > 0.05
    assert (found.argmax(1) == weights[rows][:, order].argmax(1))[clear[rows]].all()


def test_the_sample_is_seeded_and_independent_of_the_order():
    ids = np.arange(0, 5000, 3)
    rows = sample_rows(ids, 0, 100)
    assert len(rows) == 100 and (np.diff(rows) > 0).all() and rows[0] < 200 and rows[-1] > 1500
    assert set(ids[rows]) == set(ids[::-1][sample_rows(ids[::-1], 0, 100)])
    assert set(rows) != set(sample_rows(ids, 1, 100))
    assert np.array_equal(sample_rows(ids, 0, len(ids)), np.arange(len(ids)))


def test_a_sample_decides_nearly_as_the_whole_pool_does():
    sup, neutral, topic = make_pool(9000, (3, 3, 3), seed=4)  # more than one chunk
    whole = evidence_weights(sup, neutral).argmax(1)
    part = evidence_weights(sup, neutral, sample=800).argmax(1)
    assert (whole == part).mean() > 0.97 and (part == topic).mean() > 0.97
    assert np.array_equal(part, evidence_weights(sup, neutral, sample=800).argmax(1))


def test_neighbours_are_the_most_similar_others(monkeypatch):
    monkeypatch.setattr("muka_fast.evidence.GRAPH_BLOCK", 7)
    b = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    similarity = b @ b.T - 9 * np.eye(30)
    expected = np.sort(np.argsort(-similarity, axis=1)[:, :5], axis=1)
    assert np.array_equal(np.sort(neighbours(b, 5), axis=1), expected)
    assert neighbours(b[:3], 5).shape == (3, 2) and neighbours(b[:1], 5).shape == (1, 0)


def test_the_streamed_distance_is_that_of_the_fit():
    rng = np.random.default_rng(0)
    F, predicted = rng.standard_normal((200, 12)) * np.linspace(0.1, 30, 12), rng.integers(0, 5, 200)
    fitted = RelativeMahalanobis.fit(F.astype(np.float32), predicted)
    expected = o_rmd(F, predicted)
    np.testing.assert_allclose(fitted.scores(F.astype(np.float32)), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.slow
def test_time_is_linear_beyond_the_sample():
    """The target is 100,000 texts and 5 teachers in 60 s on 2 cores; here a quarter of it, in processor time."""
    sup, neutral, topic = make_pool(25_000, [20] * 5, widths=[384] * 5, seed=0)
    start = time.process_time()
    weights = evidence_weights(sup, neutral)
    assert time.process_time() - start < 60
    assert (weights.argmax(1) == topic).mean() > 0.9


def test_a_teacher_that_owns_no_text_has_the_share_of_half_a_text():
    found = np.exp(Owner(None, np.array([0]), 2, 100).log_probs(np.eye(3)))
    np.testing.assert_allclose(found, [[200 / 201, 1 / 201]] * 3)


def test_rounding_of_a_large_score_is_no_evidence():
    scores = np.float32(1e4) + np.float32(1e-3) * (np.arange(50) % 3).astype(np.float32)
    assert np.ptp(scores) > 0 and (Anchors.of(scores)(scores) == 0).all()


def test_clear_texts_count_most_where_texts_of_one_kind_disagree():
    b = np.repeat(np.eye(2, dtype=np.float32), 20, axis=0)
    w = np.array([[1.0, 0.0]] * 10 + [[0.49, 0.51]] * 10 + [[0.0, 1.0]] * 20)
    assert np.exp(regress(b, w).log_probs(b[:1]))[0, 0] > 0.7


def test_the_first_regression_is_on_twice_the_evidence(monkeypatch):
    rng, given = np.random.default_rng(0), []
    monkeypatch.setattr(evidence, "regress", lambda b, w: given.append(w) or regress(b, w))
    e = rng.standard_normal((30, 3))
    evidence.fit_owner(rng.standard_normal((30, 4)).astype(np.float32), np.empty((30, 0), np.int64), e)
    np.testing.assert_allclose(given[0], softmax(2 * e, axis=1))


@pytest.mark.parametrize("rule", [evidence_weights, auto_weights])
def test_texts_outside_of_the_sample_change_no_other_text(rule):
    sup, neutral, _ = make_pool(200, mc=False)
    others = np.setdiff1d(np.arange(200), sample_rows(sup.example_ids.numpy(), 0, 100))
    logits = sup.logits.clone()
    logits[others[:50]] *= 9
    found, changed = (rule(pool, neutral, sample=100) for pool in (sup, dataclasses.replace(sup, logits=logits)))
    rest = np.setdiff1d(np.arange(200), others[:50])
    np.testing.assert_allclose(changed[rest], found[rest], atol=1e-6)


def test_how_clear_the_texts_are_all_together_does_not_matter_to_the_regression():
    rng = np.random.default_rng(0)
    b, gap = unit(rng.standard_normal((60, 4))), rng.uniform(0.1, 1, 60) * rng.choice([-1, 1], 60)
    clear, unclear = (np.stack([0.5 + s * gap / 2, 0.5 - s * gap / 2], axis=1) for s in (1, 0.01))
    np.testing.assert_allclose(regress(b, unclear).log_probs(b), regress(b, clear).log_probs(b), atol=1e-6)


def test_distances_to_narrow_classes_keep_their_digits():
    """Against the same form in float64: its terms are 100,000 times their sum."""
    rng = np.random.default_rng(0)
    predicted = rng.integers(0, 4, 200)
    F = (10 * rng.standard_normal((4, 32))[predicted] + 1e-3 * rng.standard_normal((200, 32))).astype(np.float32)
    fitted = RelativeMahalanobis.fit(F, predicted)
    mean, form, pull, offset = (part.astype(np.float64) for part in dataclasses.astuple(fitted))
    x = F - mean
    np.testing.assert_allclose(fitted.scores(F), ((x @ form) * x).sum(1) + (x @ pull - offset).max(1), atol=1e-3)
