"""The answer by class names: its definition once more in loops, and what it promises."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.special import softmax
from test_auto import start_of
from test_evidence import make_pool, matrix, restricted

from muka_fast.auto import Classes, probs
from muka_fast.evidence import unit
from muka_fast.names import TEMPERATURES, NameAnswer, calibrate, readable


def make(counts=(3, 4), texts=300, width=8, signal=1.0, seed=0, shares=None):
    """Texts around the features of their class's name, and teachers that answer right on their own texts, anything on others."""
    rng, C = np.random.default_rng(seed), sum(counts)
    names = rng.normal(size=(C, width)) + 3  # all names have much in common, and the texts something else
    truth = rng.choice(C, texts, p=shares)
    b = unit(signal * (names - 3)[truth] + 0.5 * rng.normal(size=(texts, width)) - 2).astype(np.float32)
    starts = np.cumsum([0, *counts])
    teacher = np.repeat(np.arange(len(counts)), counts)
    logits = rng.normal(size=(texts, C)) + 5 * np.eye(C)[truth]
    p = np.concatenate([softmax(logits[:, a:z], axis=1) for a, z in itertools.pairwise(starts)], 1).astype(np.float32)
    w = softmax(2.0 * (teacher[truth][:, None] == np.arange(len(counts))) + rng.normal(size=(texts, len(counts))), axis=1)
    part = (teacher == np.arange(len(counts))[:, None]).astype(float)
    return b, names.astype(np.float32), w, p, Classes(starts[:-1], teacher, np.arange(C), None, part), teacher[truth]


def o_answer(b, names, w, p, counts):
    """w [m, N] and the trust, as the head of names.py says it, without overlaps."""
    b, names, C = b.astype(float), names.astype(float), len(names)
    b, a = b - b.mean(0), names - names.mean(0)
    s = np.array([[x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for y in a] for x in b])
    kappas, wanted, sure, start = [], 0.0, np.zeros(len(TEMPERATURES)), 0
    for i, count in enumerate(counts):
        own = slice(start, start + count)
        start += count
        weight = w[:, i] * p[:, own].max(1)
        weight = weight / weight.sum()
        named, said = s[:, own].argmax(1), p[:, own].argmax(1)
        right = sum(weight[x] for x in range(len(b)) if named[x] == said[x])
        chance = sum(weight[named == c].sum() * weight[said == c].sum() for c in range(count))
        kappas.append(max((right - chance) / (1 - chance), 0))
        wanted += w[:, i].mean() * (1 / count + (1 - 1 / count) * kappas[-1])
        for j, t in enumerate(TEMPERATURES):
            sure[j] += w[:, i].mean() * sum(weight[x] * softmax(t * s[x, own]).max() for x in range(len(b)))
    t, pi = np.interp(wanted - 1e-4, sure, TEMPERATURES), np.full(C, 1 / C)
    for _ in range(20):
        pi = np.mean([softmax(t * row + np.log(np.maximum(pi, 0.1 / C))) for row in s], axis=0)
    q = np.array([softmax(t * row + np.log(np.maximum(pi, 0.1 / C))) for row in s])
    blocks = np.split(q, np.cumsum(counts)[:-1], axis=1)
    return np.stack([block.sum(1) for block in blocks], 1), np.mean(kappas)


@pytest.mark.parametrize("counts", [(3, 4), (2, 2, 5)])
def test_it_is_its_definition(counts):
    b, names, w, p, classes, _ = make(counts, texts=80)
    answer = NameAnswer.fit(b, names, w, p, classes)
    expected, trust = o_answer(b, names, w, p, counts)
    assert np.abs(answer(b) - expected).max() < 1e-4 and answer.trust == pytest.approx(trust, abs=1e-6)


def test_names_that_say_something_are_trusted_and_tell_the_owner_whatever_the_shares():
    for shares in (None, [0.05] * 3 + [0.85 / 4] * 4):
        b, names, w, p, classes, owner = make(shares=shares)
        answer = NameAnswer.fit(b, names, w, p, classes)
        assert answer.trust > 0.5 and (answer(b).argmax(1) == owner).mean() > 0.9
    assert answer.shares[:3].sum() == pytest.approx(0.15, abs=0.05)


def test_names_that_say_nothing_are_not_trusted():
    b, names, w, p, classes, _ = make(signal=0.0)
    assert NameAnswer.fit(b, names, w, p, classes).trust < 0.1


@given(st.integers(0, 50), st.lists(st.integers(1, 4), min_size=1, max_size=4))
@example(18, [2, 1])  # names and teacher agree everywhere: two temperatures are equally sure
def test_weights_are_shares_and_the_order_of_the_texts_changes_nothing(seed, counts):
    b, names, w, p, classes, _ = make(tuple(counts), texts=12, seed=seed)
    answer, order = NameAnswer.fit(b, names, w, p, classes), np.random.default_rng(seed).permutation(12)
    found = answer(b)
    assert np.abs(found.sum(1) - 1).max() < 1e-5 and (found >= 0).all() and 0 <= answer.trust <= 1
    again = NameAnswer.fit(b[order], names, w[order], p[order], classes)
    assert np.abs(again(b) - found).max() < 1e-3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("card_arrival", "card arrival"), ("Sci/Tech", "Sci Tech"), ("bookHotel", "book Hotel"), ("LABEL_0", "LABEL 0"),
        ("culture-arts", "culture arts"), ("天気", "天気"), ("?", "?"), ("bank/US dollars", "bank US dollars"),
        ("हिन्दी", "हिन्दी"), ("e\u0301te\u0301", "été"), ("C++", "C++"), ("C#", "C#"), ("<5", "<5"), ("-1", "-1"),
        ("Art & Artists", "Art Artists"), ("tip_>20%", "tip >20%"), ("-other", "other"), ("x=0", "x=0"),
        ("می\u200cخواهم", "می\u200cخواهم"),
    ],
)  # fmt: skip
def test_names_are_read_as_words(name, words):
    assert readable(name) == words


@pytest.mark.parametrize("union", [[0, 1, 2, 1, 3, 4], [0, 1, 2, 4, 3, 1], [3, 1, 0, 2, 1, 4]])
def test_a_shared_class_is_looked_up_where_it_lies_in_the_union(union):
    """In whatever order a teacher has its classes."""
    b, names, w, p, classes, _ = make((3, 3), texts=200)
    kept = [union.index(c) for c in range(5)]  # one class of the second teacher is one of the first
    union, s = np.array(union), unit(b - b.mean(0)) @ unit(names - names.mean(0))[kept].T
    found, expected = calibrate(s, w, p, dataclasses.replace(classes, union=union)), calibrate(s[:, union], w, p, classes)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-12)
    assert found[1] == pytest.approx(expected[1], abs=1e-6) and min(found[0]) > 0


def test_two_columns_of_one_class_are_one_answer():
    """A label map merges them, or a teacher calls two classes alike: as sure, and as right, as if there were one column."""
    b, names, w, p, classes, _ = make((3, 3), texts=200)
    s = unit(b - b.mean(0)) @ unit(names - names.mean(0)).T
    share = np.random.default_rng(0).uniform(0.2, 0.8, p.shape).astype(np.float32)
    split = np.stack([p * share, p * (1 - share)], axis=2).reshape(len(p), -1)
    doubled = dataclasses.replace(classes, starts=2 * classes.starts, union=np.repeat(classes.union, 2))
    joined, found = calibrate(s, w, p, classes), calibrate(s, w, split, doubled)
    np.testing.assert_allclose(found[0], joined[0], atol=1e-6)
    assert found[1] == pytest.approx(joined[1], abs=1e-4) and min(joined[0]) > 0


def test_weights_are_shares_where_classes_are_shared():
    sup, neutral, _ = make_pool(60, (3, 3), labels=[list("abc"), list("cde")])
    sup, b = restricted(sup), unit(matrix(neutral).astype(np.float32))
    names = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    answer = NameAnswer.fit(b, names, start_of(sup), probs(sup, np.arange(60)), Classes.of(sup))
    np.testing.assert_allclose(answer(b).sum(1), 1, atol=1e-5)


def test_a_teacher_of_one_class_has_no_part_in_the_trust():
    """It agrees with whatever names on every text, by chance: its 0 would say nothing of them."""
    b, names, w, p, classes, _ = make((3, 1))
    s = unit(b - b.mean(0)) @ unit(names - names.mean(0)).T
    (kappa,), _ = calibrate(s, w, p, classes)
    assert NameAnswer.fit(b, names, w, p, classes).trust == pytest.approx(kappa) and kappa > 0.5
