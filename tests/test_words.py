"""Word features: what they are by definition, what their order may change, and texts that have no words."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muka_fast import words
from muka_fast.data import Tokens
from muka_fast.features import Features
from muka_fast.words import WordFeatures, count, with_words


def tokens_of(texts):
    ids = np.array([token for text in texts for token in text], np.int32)
    return Tokens(ids, np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64))


def a_pool(n=60, topics=3, seed=0):
    """Texts of tokens of one topic each, between a first and a last token that all of them share."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, topics, n)
    return [[1, *(10 + 20 * t + rng.integers(0, 20, rng.integers(1, 9))).tolist(), 2] for t in topic], topic


def test_tokens_are_counted():
    tokens = tokens_of([[3, 1, 3], [], [0], [2, 2]])
    assert count(tokens, np.array([0, 3, 1]), 4).toarray().tolist() == [[0, 1, 0, 2], [0, 0, 2, 0], [0, 0, 0, 0]]


def test_they_are_the_truncated_svd_of_tf_idf(monkeypatch):
    monkeypatch.setattr(words, "DIMENSIONS", 3)
    texts, _ = a_pool(300)
    tokens, rows = tokens_of(texts), np.arange(300)
    found = WordFeatures.fit(tokens, rows, 0)(rows)

    counts = count(tokens, rows, int(tokens.ids.max()) + 1).toarray()
    frequency = (counts > 0).sum(0)
    known = (frequency > 1) & (frequency < 300)
    idf = np.log(301 / (1 + frequency[known])) + 1
    x = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0)[:, known] * idf
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    expected = x @ np.linalg.svd(x)[2][:3].T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    # A singular vector has no sign: what counts is how alike two texts are.
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=0.01)


def test_texts_of_one_topic_lie_together_and_others_are_reduced_alike():
    texts, topic = a_pool(400)
    features = WordFeatures.fit(tokens_of(texts), np.arange(300), 0)(np.arange(400))
    alike = features[300:] @ features[:300].T
    assert (topic[:300][alike.argmax(1)] == topic[300:]).mean() > 0.95


@given(st.integers(0, 1000), st.integers(2, 30))
def test_the_order_of_the_texts_changes_only_rounding(seed, n):
    texts, _ = a_pool(n, seed=seed)
    order = np.random.default_rng(seed).permutation(n)
    features = WordFeatures.fit(tokens_of(texts), np.arange(n), seed)(np.arange(n))
    shuffled = WordFeatures.fit(tokens_of([texts[i] for i in order]), np.arange(n), seed)(np.arange(n))
    np.testing.assert_allclose(shuffled @ shuffled.T, (features @ features.T)[np.ix_(order, order)], atol=1e-3)


def test_where_directions_hardly_differ_the_seed_decides_and_not_the_order_of_the_texts(monkeypatch):
    monkeypatch.setattr(words, "DIMENSIONS", 8)
    texts, _ = a_pool(300)
    order = np.random.default_rng(0).permutation(300)

    def kept(texts, seed):
        directions = WordFeatures.fit(tokens_of(texts), np.arange(300), seed).directions
        return directions @ directions.T

    base = kept(texts, 0)
    np.testing.assert_allclose(kept([texts[i] for i in order], 0), base, atol=1e-3)
    assert np.abs(kept(texts, 1) - base).max() > 0.05


@pytest.mark.parametrize("texts", [[[5]], [[1, 2], [1, 2]], [[3], [4], [5]], [[], [7, 7]]])
def test_texts_without_common_words_have_no_features(texts):
    features = WordFeatures.fit(tokens_of(texts), np.arange(len(texts)), 0)(np.arange(len(texts)))
    assert features.shape == (len(texts), 0)


def test_a_text_of_unknown_words_is_zero():
    texts = [[1, 2], [1, 3], [2, 3], [9]]
    features = WordFeatures.fit(tokens_of(texts), np.arange(3), 0)(np.arange(4))
    assert features.shape[1] == 3 and not features[3].any() and np.isfinite(features).all()


def test_they_stand_beside_the_encoders_features():
    texts, _ = a_pool(50)
    states = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float16)
    joined = with_words(Features.of(states), tokens_of(texts), np.arange(40), 0)
    [(part, both)] = joined.chunks()
    assert part == slice(0, 50) and both.dtype == np.float32
    unit = states.astype(np.float32) / np.linalg.norm(states.astype(np.float32), axis=1, keepdims=True)
    np.testing.assert_allclose(both[:, :6], unit, atol=1e-6)
    words_alone = WordFeatures.fit(tokens_of(texts), np.arange(40), 0)(np.array([7, 49]))
    np.testing.assert_allclose(joined.rows(np.array([7, 49]))[:, 6:], words_alone, atol=1e-6)


def test_a_token_twice_in_one_text_is_one_text():
    texts = [[1, 2], [1, 3], [2, 3], [7, 7]]
    assert WordFeatures.fit(tokens_of(texts), np.arange(4), 0).known.tolist() == [1, 2, 3]


def test_a_token_that_repeats_counts_by_its_logarithm():
    features = WordFeatures.fit(tokens_of([[5] * 8 + [6], [5, 6], [7], [7, 7]]), np.arange(4), 0)(np.arange(2))  # all are in two texts
    often = 1 + np.log(8)
    assert features[0] @ features[1] == pytest.approx((often + 1) / np.sqrt(2 * (often**2 + 1)), abs=1e-5)
