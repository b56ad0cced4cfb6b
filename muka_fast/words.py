"""Word features: which words a text is made of, whatever an encoder makes of them (latent semantic analysis, Deerwester et al., 1990).

X, tf-idf of token counts, a token counting 1 + ln(its number in the text); truncated SVD, X ~ U S V^T; features x V, unit rows.
Document frequencies and V come from a sample of the texts; the others are reduced as they are asked for.

n texts · m of the sample · T tokens that occur in two or more texts of the sample, and not in all · e <= DIMENSIONS, the width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_array

from muka_fast.evidence import unit
from muka_fast.features import Features

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfTransformer

    from muka_fast.data import Tokens
    from muka_fast.store import ShardRange

DIMENSIONS = 128


@dataclass(frozen=True)
class WordFeatures:
    """Features [.., e] of rows of `tokens`."""

    tokens: Tokens
    width: int  # largest token id + 1
    known: np.ndarray  # ids of the tokens that count, int [T]
    tf_idf: TfidfTransformer
    directions: np.ndarray  # V [T, e]

    @classmethod
    def fit(cls, tokens: Tokens, rows: np.ndarray, seed: int) -> WordFeatures:
        """On the texts `rows`. Their order changes the directions by rounding alone: the SVD draws its random start per token."""
        # Slow to import, and most methods look at no words.
        from sklearn.feature_extraction.text import TfidfTransformer
        from sklearn.utils.extmath import randomized_svd

        width = int(tokens.ids.max(initial=-1)) + 1
        every = count(tokens, rows, width)
        frequency = np.bincount(every.indices, minlength=every.shape[1])
        known = np.flatnonzero((frequency >= 2) & (frequency < len(rows)))
        tf_idf = TfidfTransformer(sublinear_tf=True)
        if not len(known):
            return cls(tokens, width, known, tf_idf, np.empty((0, 0), np.float32))
        x = tf_idf.fit_transform(every[:, known])
        _, _, directions = randomized_svd(x, min(DIMENSIONS, *x.shape), transpose=False, random_state=seed)
        return cls(tokens, width, known, tf_idf, directions.T.astype(np.float32))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Unit rows fp32 [len(rows), e]; zeros for a text without known tokens."""
        if not len(self.known):
            return np.empty((len(rows), 0), np.float32)
        x = self.tf_idf.transform(count(self.tokens, rows, self.width)[:, self.known])
        return unit(np.asarray(x @ self.directions, np.float32))


def count(tokens: Tokens, rows: np.ndarray, width: int) -> csr_array:
    """How often each token id below `width` occurs in each of the texts, fp32 [len(rows), width]."""
    starts, stops = tokens.offsets[rows], tokens.offsets[rows + 1]
    ids = np.concatenate([tokens.ids[start:stop] for start, stop in zip(starts, stops, strict=True)])
    ends = np.concatenate([[0], np.cumsum(stops - starts)])
    counts = csr_array((np.ones(len(ids), np.float32), ids, ends), shape=(len(rows), width))
    counts.sum_duplicates()
    return counts


def with_words(neutral: Features, tokens: Tokens, rows: np.ndarray, seed: int) -> Features:
    """Unit rows of an encoder's features, [n, d], and beside them those of the words: [n, d + e].

    tokens: of the n texts. rows: the sample.
    """
    words = WordFeatures.fit(tokens, rows, seed)

    def read(shard: ShardRange) -> np.ndarray:
        states = np.asarray(neutral.read(shard), np.float32)
        return np.concatenate([unit(states), words(np.arange(shard.start, shard.stop))], axis=1)

    return Features(neutral.ranges, read)
