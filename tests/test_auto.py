"""muka-auto: the definition in plain float64, in every odd pool, in any order, with overlapping labels, and in bounded time."""

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from test_evidence import make_pool, matrix, o_anchor, o_rmd, o_weights, restricted, shuffle

from muka_fast import auto
from muka_fast.auto import Answer, Classes, Ridge, View, Views, auto_weights, beside, class_weights, probs, slopes
from muka_fast.evidence import (
    CERTAINTY,
    RelativeMahalanobis,
    Sample,
    evidence_weights,
    neighbours,
    own_scores,
    sample_rows,
    unit,
)
from muka_fast.features import Features
from muka_fast.names import NameAnswer
from muka_fast.store import ShardRange
from muka_fast.stored import Supervision

# ---- the definition, in float64, one text, one class and one target at a time ----


def o_weighted_rmd(F, predicted, weight, shrink=0.1):
    ridge = lambda S: S + shrink * np.mean(np.diag(S)) * np.eye(F.shape[1])
    centre = lambda rows: np.average(F[rows], axis=0, weights=weight[rows])
    scatter = lambda X: sum(a * np.outer(x, x) for a, x in zip(weight, X, strict=True)) / weight.sum()
    mu = {c: centre(predicted == c) for c in set(predicted.tolist())}
    inner = np.linalg.inv(ridge(scatter(F - np.stack([mu[c] for c in predicted.tolist()]))))
    outer = np.linalg.inv(ridge(scatter(F - centre(np.ones(len(F), bool)))))
    maha = lambda x, P: x @ P @ x
    return np.array([maha(x - centre(np.ones(len(F), bool)), outer) - min(maha(x - m, inner) for m in mu.values()) for x in F])


def o_ridge(b, target, penalty):
    """Leave-one-out for real: a fit without each text, its intercept free."""
    out = []
    for left in range(len(b)):
        rest = np.arange(len(b)) != left
        X, Y = b[rest] - b[rest].mean(0), target[rest] - target[rest].mean(0)
        W = np.linalg.solve(X.T @ X + penalty * len(b) * np.eye(b.shape[1]), X.T @ Y)
        out.append((b[left] - b[rest].mean(0)) @ W + target[rest].mean(0))
    return np.stack(out)


def o_slope(e, w):
    own, other = np.average(e, weights=w), np.average(e, weights=1 - w)
    within = np.mean([a * (x - own) ** 2 + (1 - a) * (x - other) ** 2 for a, x in zip(w, e, strict=True)])
    return min(max((own - other) / within, 0), 4)


def o_view(F, length, width=32):
    """Along the principal directions, each text of the same length."""
    left, values, _ = np.linalg.svd(F - F.mean(0), full_matrices=False)
    along = (left * values)[:, :width]
    return length * along / np.linalg.norm(along, axis=1, keepdims=True)


def o_auto(sup, neutral, teacher_labels):
    names = list(dict.fromkeys(label for labels in teacher_labels for label in labels))
    owners = {c: [i for i, labels in enumerate(teacher_labels) if c in labels] for c in names}
    n, N, C = len(sup), len(teacher_labels), len(names)
    z = [sup.logits[:, a:b].double().numpy() for a, b in itertools.pairwise(sup.offsets)]
    p = np.zeros((n, N, C))
    for i, labels in enumerate(teacher_labels):
        p[:, i, [names.index(label) for label in labels]] = softmax(z[i], axis=1)
    e = np.stack(
        [o_anchor(o_weighted_rmd(matrix(sup.features[i]), z[i].argmax(1), p[:, i].max(1) ** 4)) for i in range(N)], 1
    )
    b = matrix(neutral) / np.linalg.norm(matrix(neutral), axis=1, keepdims=True)
    near = np.argsort(-(b @ b.T - 9 * np.eye(n)), axis=1)[:, :15]
    e = e * (1 + np.array([o_slope(e[:, i], softmax(2 * e, axis=1)[:, i]) for i in range(N)]))
    b = np.concatenate([b, *[o_view(matrix(F), 0.6 / math.sqrt(N)) for F in sup.features]], axis=1)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    w, penalty = softmax(e, axis=1), None
    for _ in range(5):
        q = np.einsum("ni,nic->nc", w, p)
        if penalty is None:
            penalty = min((1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), key=lambda x: ((o_ridge(b, q, x) - q) ** 2).sum())
        f, mass, after = o_ridge(b, q, penalty), q.mean(0), np.zeros((n, N))
        share = [sum(mass[c] / len(owners[names[c]]) for c in range(C) if i in owners[names[c]]) for i in range(N)]
        prior = [np.sum([share[i] ** 2 / len(teacher_labels[i]) for i in owners[c]]) / len(owners[c]) for c in names]
        for text in range(n):
            g = np.array([prior[c] * max(f[text, c] / mass[c], 0.1) ** 2 for c in range(C)])
            around = (w[near[text]].mean(0) + 0.02) / (w.mean(0) + 0.02)
            found = [math.exp(e[text, i]) * (p[text, i] @ g / g.sum() + 1e-9) * math.sqrt(around[i]) for i in range(N)]
            after[text] = np.array(found) / sum(found)
        w = after
    pooled = ((w + 1e-4) ** 2 * (o_weights(sup, neutral) + 1e-4)) ** (1 / 3)
    return pooled / pooled.sum(1, keepdims=True)


@pytest.mark.parametrize("labels", [None, ["abc", "cde"], ["ab", "cdef", "abg"]])
@pytest.mark.parametrize("mc", [True, False])
def test_weights_are_those_of_the_definition(labels, mc):
    counts = [len(row) for row in labels] if labels else (3, 3)
    sup, neutral, _ = make_pool(70, counts, seed=2, mc=mc, separation=1.5, labels=labels and [list(row) for row in labels])
    sup = restricted(sup)
    found, expected = auto_weights(sup, neutral), o_auto(sup, neutral, [teacher["labels"] for teacher in sup.teachers])
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=0.01)


def joined(plain, answer, named):
    """The pool with the names' answer in it: six times the trust, times Cohen's kappa of its owners and the pool's, of three."""
    one, other = named.argmax(1), plain.argmax(1)
    by_chance = sum((one == i).mean() * (other == i).mean() for i in range(plain.shape[1]))
    kappa = max(((one == other).mean() - by_chance) / (1 - by_chance), 0)
    return softmax(np.log(plain) + 6 * answer.trust * kappa / 3 * np.log(named + 1e-4), axis=1), kappa


def start_of(sup):
    e = own_scores(sup, np.arange(len(sup)), CERTAINTY)
    return softmax(e * (1 + slopes(e)), axis=1)


def test_class_names_join_the_pool_with_six_times_the_trust_that_they_have_earned():
    """Names that lie where their class's texts lie, as far as the predictions tell, and names that lie anywhere."""
    sup, neutral, _ = make_pool(90, (3, 4), seed=2, separation=1.5)
    sup, b = restricted(sup), unit(matrix(neutral).astype(np.float32))
    p, w, plain = probs(sup, np.arange(90)), start_of(sup), auto_weights(sup, neutral)
    told = (p * np.repeat(w, (3, 4), axis=1)).T @ b
    trust, moved = [], []
    for names in (told, np.random.default_rng(1).standard_normal(told.shape).astype(np.float32)):
        answer = NameAnswer.fit(b, names, w, p, Classes.of(sup))
        expected, kappa = joined(plain, answer, answer(b))
        trust.append(answer.trust * kappa)
        moved.append(np.abs(expected - plain).max())
        np.testing.assert_allclose(auto_weights(sup, neutral, names=names), expected, atol=1e-4)
    assert trust[0] > max(0.2, 2 * trust[1]) and moved[0] > moved[1]


def test_names_are_compared_with_the_encoders_features_alone():
    """Whatever stands behind them: here columns that tell the owner."""
    sup, neutral, owner = make_pool(90, (3, 4), seed=2, separation=1.5)
    sup, b = restricted(sup), unit(matrix(neutral).astype(np.float32))
    p, w = probs(sup, np.arange(90)), start_of(sup)
    names = (p * np.repeat(w, (3, 4), axis=1)).T @ b
    view = Features.of(np.concatenate([b, np.eye(2, dtype=np.float32)[owner]], axis=1))
    answer = NameAnswer.fit(b, names, w, p, Classes.of(sup))
    expected, kappa = joined(auto_weights(sup, view), answer, answer(b))
    assert kappa > 0.1
    np.testing.assert_allclose(auto_weights(sup, view, names=names), expected, atol=1e-4)


def test_the_slope_is_the_log_odds_of_two_normal_distributions_per_unit():
    rng, own = np.random.default_rng(0), np.arange(40_000) % 2 == 0
    e = np.where(own, 1.5, -0.5) + rng.standard_normal(40_000)  # log-odds (1.5 + 0.5) / 1 per unit
    certain = np.where(own, -30.0, 30.0)  # of the other teacher: w is 0 or 1, and nothing varies within
    assert slopes(np.stack([e, certain], 1).astype(np.float32)) == pytest.approx([2, 4], rel=0.03)
    assert np.array_equal(slopes(np.zeros((5, 2), np.float32)), [0, 0])


def test_what_lies_apart_in_the_teachers_features_counts_although_no_neutral_feature_tells_it():
    sup, _, owner = make_pool(300, (3, 3), seed=3)
    sup, rows = restricted(sup), np.arange(300)
    b = unit(np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32))  # noise
    weak = (np.eye(2)[owner] + 1.5 * np.random.default_rng(1).standard_normal((300, 2))).astype(np.float32)
    right = []
    for features in (sup.features, [Features.of(np.ones((300, 1), np.float32))] * 2):
        seen = Supervision(**{**vars(sup), "features": features})
        found = class_weights(seen, Features.of(b), Sample(rows, b, neighbours(b, 15)), weak, Classes.of(sup))
        right.append((found.argmax(1) == owner).mean())
    assert right[0] > right[1] + 0.05


def test_views_are_unit_rows_of_bounded_width():
    rng = np.random.default_rng(0)
    features, b = [Features.of(rng.standard_normal((60, 40)).astype(np.float32)) for _ in range(64)], np.eye(60, 5, dtype=np.float32)
    views, fitted = Views.fit(features, np.arange(0, 60, 2))
    seen = beside(b, views(np.arange(60)))
    np.testing.assert_allclose(views(np.arange(0, 60, 2)), fitted, atol=1e-6)
    assert seen.shape == (60, 5 + 64 * 16) and seen[:5].any()
    np.testing.assert_allclose(np.linalg.norm(seen, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(seen[:5, 5:], axis=1) / seen[:5, :5].max(1), 0.6, rtol=1e-5)


def test_the_ridge_regression_leaves_each_text_out():
    rng = np.random.default_rng(0)
    b, target = rng.standard_normal((40, 6)).astype(np.float32), rng.random((40, 3)).astype(np.float32)
    fitted = Ridge.of(b).fit(target, 1e-2)
    np.testing.assert_allclose(fitted.leave_one_out(), o_ridge(b.astype(float), target.astype(float), 1e-2), atol=1e-5)
    X = b - b.mean(0)
    expected = X @ np.linalg.solve(X.T @ X + 0.4 * np.eye(6), X.T @ (target - target.mean(0))) + target.mean(0)
    np.testing.assert_allclose(fitted(b), expected, atol=1e-5)


def test_weights_of_the_gaussians_count_as_repeated_texts():
    rng = np.random.default_rng(0)
    F, predicted, times = rng.standard_normal((50, 5)).astype(np.float32), rng.integers(0, 3, 50), rng.integers(1, 4, 50)
    repeated = RelativeMahalanobis.fit(np.repeat(F, times, 0), np.repeat(predicted, times))
    weighted = RelativeMahalanobis.fit(F, predicted, times.astype(float))
    np.testing.assert_allclose(weighted.scores(F), repeated.scores(F), rtol=1e-3, atol=1e-3)
    plain = RelativeMahalanobis.fit(F, predicted).scores(F)
    np.testing.assert_allclose(plain, o_rmd(F.astype(float), predicted), rtol=1e-3, atol=1e-3)


def test_a_large_class_swallows_no_other_of_its_teacher():
    """Two classes of one teacher, nine texts in ten of the first: where the regression says nothing, both count the same."""
    sup, _, _ = make_pool(10, (2, 1))
    classes = Classes.of(sup)
    q = np.tile(np.float32([0.45, 0.05, 0.5]), (10, 1))
    answer = Answer.of(classes, q, np.full((10, 2), 0.5, np.float32))
    p, near = np.float32([[1, 0, 1], [0, 1, 1]]), np.zeros((2, 1), int)
    weights = answer(p, np.zeros((2, 2)), q[:2], near)
    np.testing.assert_allclose(weights, [[1 / 3, 2 / 3]] * 2, atol=1e-6)  # share^2 / C_i: 1/8 each against 1/4


# ---- odd pools ----


def test_pools_that_say_nothing_and_classes_without_probability():
    sup, neutral, _ = make_pool(60, (3, 3), mc=False)
    sup.logits[:, 1] = -math.inf
    assert np.isfinite(auto_weights(sup, neutral)).all()
    flat = Features.of(np.ones((60, 4), np.float32))
    sup = Supervision(**{**vars(sup), "features": [flat] * 2, "logits": torch.zeros_like(sup.logits)})
    weights = auto_weights(sup, flat)
    np.testing.assert_allclose(weights, weights[:1].repeat(60, 0), atol=1e-5)
    assert weights[0].argmax() == 0  # nothing tells them apart: the lowest index, as everywhere


def test_few_texts_are_left_to_evidence():
    sup, neutral, _ = make_pool(3, (2, 3))
    assert np.array_equal(auto_weights(sup, neutral), evidence_weights(sup, neutral))


# ---- order, sample, stream ----


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), N=st.integers(2, 5), mc=st.booleans(), data=st.data())
def test_the_order_of_texts_and_teachers_changes_no_selection(seed, N, mc, data):
    sup, neutral, _ = make_pool(70, [2 + i % 3 for i in range(N)], seed=seed, mc=mc)
    weights = auto_weights(restricted(sup), neutral, seed)
    rows = np.array(data.draw(st.permutations(range(70))))
    order = data.draw(st.permutations(range(N)))
    moved, neutral = shuffle(sup, neutral, rows, order)
    found, expected = auto_weights(restricted(moved), neutral, seed), weights[rows][:, order]
    np.testing.assert_allclose(found, expected, atol=0.02)
    clear = np.diff(np.sort(expected, axis=1)[:, -2:])[:, 0] > 0.05
    assert (found.argmax(1) == expected.argmax(1))[clear].all()


def test_a_sample_decides_nearly_as_the_whole_pool_does():
    sup, neutral, topic = make_pool(9000, (3, 3, 3), seed=4)  # more than one chunk
    whole, part = auto_weights(sup, neutral).argmax(1), auto_weights(sup, neutral, sample=800)
    assert (whole == part.argmax(1)).mean() > 0.97 and (part.argmax(1) == topic).mean() > 0.97
    assert np.array_equal(part, auto_weights(sup, neutral, sample=800))
    assert not np.array_equal(part, auto_weights(sup, neutral, seed=1, sample=800))


def test_shards_that_lie_in_the_sample_as_a_whole():
    sup, neutral, _ = make_pool(60, (3, 3), seed=4)
    single = Features([ShardRange(j, j, j + 1) for j in range(60)], lambda shard: matrix(neutral)[shard.start : shard.stop])
    found, expected = (auto_weights(sup, features, sample=50) for features in (single, neutral))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_neighbours_among_others():
    b = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    others, base = b[:10], b[10:]
    expected = np.sort(np.argsort(-others @ base.T, axis=1)[:, :5], axis=1)
    assert np.array_equal(np.sort(neighbours(others, 5, among=base), axis=1), expected)
    assert neighbours(others, 50, among=base).shape == (10, 20)


def test_probabilities_are_those_of_single_teachers():
    sup, _, _ = make_pool(8, (3, 2))
    expected = [softmax(sup.logits[[5, 1], a:b].numpy(), axis=1) for a, b in ((0, 3), (3, 5))]
    np.testing.assert_allclose(probs(sup, np.array([5, 1])), np.concatenate(expected, 1), atol=1e-6)


@pytest.mark.slow
def test_time_at_twenty_thousand_texts():
    """In processor time; half of the texts beyond the sample, so that both ways of answering are in it."""
    sup, neutral, topic = make_pool(20_000, [20] * 5, widths=[384] * 5, seed=0)
    start = time.process_time()
    weights = auto_weights(sup, neutral, sample=10_000)
    assert time.process_time() - start < 60
    assert (weights.argmax(1) == topic).mean() > 0.9


def test_no_answer_can_veto_a_teacher(monkeypatch):
    sup, neutral, _ = make_pool(10, (2, 2))
    by_class, by_teacher = (np.tile(np.float32(row), (10, 1)) for row in ([1, 0], [1e-6, 1 - 1e-6]))
    monkeypatch.setattr(auto, "class_weights", lambda *_: by_class)
    monkeypatch.setattr(auto, "owner_weights", lambda *_: by_teacher)
    expected = ((by_class + 1e-4) ** 2 * (by_teacher + 1e-4)) ** (1 / 3)
    np.testing.assert_allclose(auto_weights(restricted(sup), neutral), expected / expected.sum(1, keepdims=True), rtol=1e-3)


def test_names_are_compared_with_unit_features_also_of_texts_without_words():
    sup, neutral, owner = make_pool(90, (3, 4), seed=2, separation=1.5)
    sup, b = restricted(sup), unit(matrix(neutral).astype(np.float32))
    p, w = probs(sup, np.arange(90)), start_of(sup)
    names = (p * np.repeat(w, (3, 4), axis=1)).T @ b
    words = np.eye(2, dtype=np.float32)[owner]
    words[::2] = 0  # texts without known words
    view = Features.of(np.concatenate([b, words], axis=1))
    answer = NameAnswer.fit(b, names, w, p, Classes.of(sup))
    expected, _ = joined(auto_weights(sup, view), answer, answer(b))
    np.testing.assert_allclose(auto_weights(sup, view, names=names), expected, atol=1e-4)


def test_a_view_keeps_the_directions_of_most_variance():
    F = (np.random.default_rng(0).standard_normal((200, 40)) * np.linspace(5, 0.1, 40)).astype(np.float32)
    found, expected = View.fit(F, 8, 0.6)(F), o_view(F.astype(float), 0.6, 8)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-3)


def test_a_class_that_nobody_predicts_has_no_say():
    sup, _, _ = make_pool(10, (2, 1))
    q = np.tile(np.float32([0.5, 0, 0.5]), (10, 1))
    answer = Answer.of(Classes.of(sup), q, np.full((10, 2), 0.5, np.float32))
    f = q[:1] + np.float32([[0, 1e-3, 0]])  # what a regression of zeros gives to rounding
    weights = answer(np.float32([[0.5, 0.5, 1]]), np.zeros((1, 2)), f, np.zeros((1, 1), int))
    g = np.array([1, 0.1**2, 1]) * [1 / 8, 1 / 8, 1 / 4]
    expected = np.array([(g[0] + g[1]) / 2, g[2]])
    np.testing.assert_allclose(weights[0], expected / expected.sum(), atol=1e-3)


def test_texts_outside_of_the_sample_do_not_change_how_far_names_are_trusted():
    sup, neutral, _ = make_pool(200, mc=False)
    b, weights = unit(matrix(neutral).astype(np.float32)), start_of(sup)
    names = (probs(sup, np.arange(200)) * np.repeat(weights, (3, 3), axis=1)).T @ b
    others = np.setdiff1d(np.arange(200), sample_rows(sup.example_ids.numpy(), 0, 100))
    logits = sup.logits.clone()
    logits[others[:50]] = 9 * logits[others[:50]].flip(1)
    pools = sup, dataclasses.replace(sup, logits=logits)
    found, changed = (auto_weights(pool, neutral, sample=100, names=names) for pool in pools)
    rest = np.setdiff1d(np.arange(200), others[:50])
    np.testing.assert_allclose(changed[rest], found[rest], atol=1e-6)
    assert np.abs(found - auto_weights(sup, neutral, sample=100)).max() > 0.01  # the names do matter
