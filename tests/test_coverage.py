"""Texts that belong to nobody: found where they stand apart, none taken from teachers that own them, in any order and in a stream."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from test_evidence import make_pool, matrix, o_anchor, restricted, shuffle

from muka_fast.config import RULED_METHODS, RunConfig
from muka_fast.coverage import FEWEST, Familiar, doubt_ranks, familiarity, fit, nobody_weights, ranks
from muka_fast.evidence import CERTAINTY, Sample, evidence_weights, own_scores
from muka_fast.features import Features
from muka_fast.methods import METHODS
from muka_fast.store import ShardRange
from muka_fast.stored import Supervision


def foreign_pool(n=300, foreign=0.25, seed=0, counts=(3, 3), **options):
    """make_pool with texts of a further topic, which no teacher knows: topic -1."""
    shares = [(1 - foreign) / len(counts)] * len(counts) + [foreign]
    sup, neutral, topic = make_pool(n, (*counts, 3), seed=seed, shares=shares, **options)
    last = sup.offsets[-2]
    cut = lambda tensor: tensor[:, :last]
    sup = Supervision(
        logits=cut(sup.logits), mean_probs=cut(sup.mean_probs), total_variance=sup.total_variance[:, :-1],
        predictive_entropy=sup.predictive_entropy[:, :-1], expected_entropy=sup.expected_entropy[:, :-1],
        example_ids=sup.example_ids, teachers=sup.teachers[:-1], offsets=sup.offsets[:-1], features=sup.features[:-1],
    )  # fmt: skip
    return sup, neutral, np.where(topic == len(counts), -1, topic)


def weights_of(sup, neutral, **options):
    sup = restricted(sup)
    rule = evidence_weights(sup, neutral)
    return rule, nobody_weights(sup, rule, neutral, **options)


# ---- the definition, straightforward and slow ----


def o_nobody(sup, rule, neutral):
    e = familiarity(sup, np.arange(len(sup))).astype(float)
    n, owner, b = len(e), rule.argmax(1), matrix(neutral)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    similarity = b @ b.T
    np.fill_diagonal(similarity, -np.inf)
    near = [np.argsort(-row)[:15] for row in similarity]
    r = [0.05] * n
    for _ in range(10):
        ratio = []
        for x in range(n):
            scores = e[:, owner[x]]
            own = [(1 - r[y]) * (owner[y] == owner[x]) for y in range(n)]
            foreign = [1 - value for value in own]
            mine, others = np.average(scores, weights=own), np.average(scores, weights=foreign)
            squares = [own[y] * (scores[y] - mine) ** 2 + foreign[y] * (scores[y] - others) ** 2 for y in range(n)]
            value = (mine - others) / (sum(squares) / n) * (scores[x] - (mine + others) / 2)
            ratio.append(min(max(value, -6), 6))
        l = [ratio[x] / 2 + np.mean([ratio[y] for y in near[x]]) / 2 - 0.25 for x in range(n)]  # noqa: E741
        around = [min(max(np.mean([r[y] for y in near[x]]), 0.01), 0.99) for x in range(n)]
        r = [expit(logit(around[x]) - min(max(l[x], -6), 6)) for x in range(n)]
    return np.array(r)


def test_that_nothing_is_left_out_is_said_only_where_it_was_looked_at(caplog):
    caplog.set_level("INFO", logger="muka_fast")
    for n, foreign, told in ((300, 0.25, ""), (300, 0.0, "no text is left out"), (2 * FEWEST, 0.0, "nothing is left out")):
        caplog.clear()
        sup, neutral, _ = foreign_pool(n, foreign)
        _, found = weights_of(sup, neutral)
        assert (found > 0.5).any() == (told == "")
        assert told in caplog.text and ("left out" in caplog.text) is bool(told)
        assert caplog.text.count("left out") <= 1


@pytest.mark.parametrize("mc", [True, False])
def test_weights_are_those_of_the_definition(mc):
    sup, neutral, _ = foreign_pool(110, seed=2, mc=mc)
    sup = restricted(sup)
    rule = evidence_weights(sup, neutral)
    expected = o_nobody(sup, rule, neutral)
    np.testing.assert_allclose(nobody_weights(sup, rule, neutral), expected, atol=1e-3)
    assert 0.1 < (expected > 0.5).mean() < 0.5


def test_familiarity_is_the_mean_of_three_scores():
    sup = restricted(foreign_pool(90)[0])
    rows = np.arange(90)
    from muka_fast.evidence import own_scores

    for i, (a, b) in enumerate(itertools.pairwise(sup.offsets)):
        share = np.maximum(sup.mutual_information[:, i].double().numpy() / math.log(b - a), 1e-6)
        energy = np.log(np.exp(sup.logits[:, a:b].double().numpy()).sum(1))
        expected = (2 * own_scores(sup, rows, 4.0)[:, i] + o_anchor(-np.log(share)) + o_anchor(energy)) / 4
        np.testing.assert_allclose(familiarity(sup, rows)[:, i], expected, atol=1e-3)


# ---- what it promises ----


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_a_foreign_topic_is_found_and_no_teacher_loses_its_texts(share, seed):
    sup, neutral, topic = foreign_pool(400, share, seed)
    rule, found = weights_of(sup, neutral)
    assert (found[topic < 0] > 0.5).mean() > 0.7 and (found[topic >= 0] > 0.5).mean() < 0.02
    left = rule * (1 - found[:, None])
    assert (left >= 0).all() and (left.sum(1) <= 1 + 1e-6).all()


@pytest.mark.parametrize("counts", [(3, 3), (2, 4, 3)])
@pytest.mark.parametrize("mc", [True, False])
def test_a_pool_without_foreign_texts_keeps_all(counts, mc):
    sup, neutral, _ = make_pool(400, counts, seed=4, mc=mc)
    assert (weights_of(sup, neutral)[1] > 0.5).mean() < 0.01


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 3), st.booleans(), st.integers(3, 90))
def test_any_pool_gives_weights_in_the_unit_interval_whatever_its_order(seed, num_teachers, mc, n):
    sup, neutral, _ = make_pool(n, (3,) * num_teachers, seed=seed, mc=mc)
    rule, found = weights_of(sup, neutral)
    assert found.shape == (n,) and found.dtype == np.float32 and (found >= 0).all() and (found <= 1).all()
    if num_teachers == 1 or n <= 2 * FEWEST:
        assert (found == 0).all()
    order = np.random.default_rng(seed).permutation(n)
    moved, moved_neutral = shuffle(sup, neutral, order, range(len(sup.teachers)))
    again = nobody_weights(restricted(moved), rule[order], moved_neutral)
    np.testing.assert_allclose(again, found[order], atol=5e-3)


def test_a_large_pool_is_fitted_on_a_sample_and_the_rest_follows_in_any_order():
    sup, neutral, topic = foreign_pool(900, 0.3, seed=3)
    rule, found = weights_of(sup, neutral, sample=400)
    assert (found[topic < 0] > 0.5).mean() > 0.7 and (found[topic >= 0] > 0.5).mean() < 0.02
    order = np.random.default_rng(0).permutation(900)
    moved, moved_neutral = shuffle(sup, neutral, order, range(len(sup.teachers)))
    again = nobody_weights(restricted(moved), rule[order], moved_neutral, sample=400)
    np.testing.assert_allclose(again, found[order], atol=5e-3)
    assert not np.array_equal(nobody_weights(restricted(sup), rule, neutral, seed=1, sample=400), found)


def test_a_teacher_that_says_nothing_keeps_its_texts():
    """Both teachers the same to every text: their features and answers tell nothing."""
    sup, neutral, _ = make_pool(200, (3, 3), seed=1)
    for name in ("logits", "predictive_entropy", "expected_entropy"):
        object.__setattr__(sup, name, torch.zeros_like(getattr(sup, name)))
    object.__setattr__(sup, "features", [Features.of(np.zeros((200, 4), np.float32))] * 2)
    rule = np.full((200, 2), 0.5, np.float32)
    rule[100:] = (0.4, 0.6)
    assert (nobody_weights(restricted(sup), rule, neutral) < 0.5).all()
    rule[:, 0] = 1.0  # one of them owns everything: nothing is known of foreign texts
    assert (nobody_weights(restricted(make_pool(200, (3, 3))[0]), rule, neutral) < 0.5).all()


def test_the_option_is_for_methods_that_ask_whose_text_it_is():
    for name in METHODS:
        if name not in RULED_METHODS:
            with pytest.raises(ValueError, match=f"--coverage.*--method {name}.*muka-evidence or muka-auto"):
                RunConfig(method=name, coverage=True, mc_samples=4)
    assert RunConfig(method="muka-auto", coverage=True).coverage and not RunConfig().coverage


def test_the_rest_of_a_large_pool_is_read_shard_by_shard():
    sup, neutral, _ = foreign_pool(300, 0.3, seed=3)
    values = matrix(neutral).astype(np.float32)
    parts = Features([ShardRange(j, a, min(a + 70, 300)) for j, a in enumerate(range(0, 300, 70))], lambda s: values[s.start : s.stop])
    rule, found = weights_of(sup, neutral, sample=150)
    np.testing.assert_allclose(nobody_weights(restricted(sup), rule, parts, sample=150), found, atol=1e-5)


def test_far_is_the_distance_of_the_weighted_gaussians():
    sup = restricted(foreign_pool(seed=1)[0])
    far = -own_scores(sup, np.arange(len(sup)), CERTAINTY).max(1)
    np.testing.assert_array_equal(doubt_ranks(sup, "mutual_information")[:, 1], ranks(far).astype(np.float32))


def test_doubt_of_a_large_pool_hangs_on_the_texts_as_a_set():
    sup, neutral, _ = foreign_pool(200, seed=1)
    order = np.random.default_rng(0).permutation(200)
    found = doubt_ranks(restricted(sup), "mutual_information", sample=80)
    again = doubt_ranks(restricted(shuffle(sup, neutral, order, range(2))[0]), "mutual_information", sample=80)
    np.testing.assert_allclose(again, found[order], atol=0.02)
    assert not np.array_equal(doubt_ranks(restricted(sup), "mutual_information", seed=1, sample=80), found)


def test_a_teacher_with_few_foreign_texts_says_nothing():
    e = np.random.default_rng(0).standard_normal((100, 2))
    owner = np.zeros(100, int)
    owner[:10] = 1
    e[:10, 0] -= 5
    found = Familiar.of(e, owner, np.zeros(100))
    assert np.isneginf(found.middle).all() and (found.ratio(e, owner) == 6).all()


def test_a_teacher_whose_own_texts_look_no_more_familiar_says_nothing():
    e, owner = np.random.default_rng(0).standard_normal((100, 2)), np.arange(100) % 2
    e[owner == 0, 0] -= 3
    e[owner == 1, 1] += 3
    found = Familiar.of(e, owner, np.full(100, 0.05))
    assert np.isneginf(found.middle[0]) and np.isfinite(found.middle[1])


def test_texts_outside_of_the_sample_change_no_scale():
    sup, _, _ = foreign_pool(n=120)
    sup, rows = restricted(sup), np.arange(60)
    other = dataclasses.replace(sup, logits=torch.cat([sup.logits[:60], 9 * sup.logits[60:]]))
    found, changed = familiarity(sup, rows), familiarity(other, rows)
    np.testing.assert_allclose(changed[:60], found[:60], rtol=1e-6)
    assert np.abs(changed[60:] - found[60:]).max() > 0.1


def test_texts_outside_of_the_sample_are_judged_by_their_neighbours_in_it():
    """Steps 3 and 4 of the definition, in loops."""
    sup, neutral, _ = foreign_pool()
    sup = restricted(sup)
    rule, drawn = evidence_weights(sup, neutral), Sample.draw(sup, neutral, 0, 200)
    found, rows, owner = nobody_weights(sup, rule, neutral, sample=200), drawn.rows, rule.argmax(1)
    e = familiarity(sup, rows)
    fitted, r = fit(e[rows], owner[rows], drawn.near)
    ratio, b = fitted.ratio(e, owner), matrix(neutral)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    for x in set(range(len(sup))) - set(rows.tolist()):
        near = np.argsort(-(b[rows] @ b[x]))[:15]
        together = np.clip(ratio[x] / 2 + ratio[rows[near]].mean() / 2 - 0.25, -6, 6)
        assert logit(found[x]) == pytest.approx(logit(np.clip(r[near].mean(), 0.01, 0.99)) - together, abs=0.02)


def test_of_few_texts_nothing_is_told(caplog):
    sup, neutral, _ = make_pool(2 * FEWEST)
    assert (weights_of(sup, neutral)[1] == 0).all()
    assert f"--coverage needs two teachers and more than {2 * FEWEST} texts to tell anything: nothing is left out" in caplog.text
    caplog.clear()
    assert (weights_of(*make_pool(2 * FEWEST + 1)[:2])[1] > 0).all() and not caplog.text
