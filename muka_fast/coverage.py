"""What no teacher knows: texts that belong to nobody (--coverage), and how doubtful a text is to all teachers (--uncertainty_head).

Nobody's texts, without labels. A text of another teacher shows each teacher what a text looks like that it does not know:

1. e_i = (2 A_i(RMD) + A_i(second score) + A_i(energy)) / 4, scores and anchors A as in evidence.py, Gaussians weighted as in auto.py.
2. A rule's weights name an owner i of every text. By two normal distributions of one variance, of e_i on the texts that i owns and on
   all others, the log-likelihood ratio own against foreign is l = (m_own - m_foreign) / v (e_i - (m_own + m_foreign) / 2).
3. Half l, half the mean over the k nearest neighbours in the neutral view, less BIAS; at most 6 either way.
4. R times: nobody's weight r = sigmoid(logit(mean r over the neighbours) - l), between 0.01 and 0.99 before the logit; then 2 anew,
   a text counting 1 - r among its owner's and r among the foreign ones. Start: r = 0.05.

A scattered hard text keeps its owner, as its neighbours do; a group of texts that looks foreign even to its owner has none. Where a
teacher owns too few texts, or its own look no more familiar to it than others, it says nothing and no text is taken from it.

n texts · m texts of the sample · N teachers (i). Figures, failures among them: docs/selection.md.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit, logit

from muka_fast.evidence import (
    CERTAINTY,
    SAMPLE,
    Anchors,
    Sample,
    energies,
    outside,
    own_scores,
    sample_rows,
    second_scores,
)
from muka_fast.selection import uncertainties

if TYPE_CHECKING:
    from muka_fast.features import Features
    from muka_fast.stored import Supervision

log = logging.getLogger("muka_fast")
START = 0.05  # nobody's weight before anything is known
SURE = 0.01  # no neighbourhood is surer than this
BIAS = 0.25  # more finds more, and takes texts from teachers that own them
MOST = 6.0  # of |l|
ROUNDS = 10  # R
FEWEST = 20  # texts that a teacher must own, and as many foreign ones
GROUP = 0.5  # share of the neighbours in l


def nobody_weights(
    sup: Supervision, weights: np.ndarray, neutral: Features, seed: int = 0, sample: int = SAMPLE
) -> np.ndarray:
    """The weight of "no teacher" for each text, fp32 [n] in [0, 1]; above 0.5 the text is a hole in the teachers' coverage.

    sup: with features, restricted to the label space. weights: of each teacher by a rule, [n, N]. neutral: [n, d]. seed, sample:
    which texts, and how many of them at most, everything is fitted on. 0 for all texts where there is one teacher: it has never
    seen a foreign text. A function of the texts as a set, as `evidence_weights` says.
    """
    n, num_teachers = weights.shape
    if num_teachers == 1 or n <= 2 * FEWEST:
        log.warning("--coverage needs two teachers and more than %d texts to tell anything: nothing is left out", 2 * FEWEST)
        return np.zeros(n, np.float32)
    drawn = Sample.draw(sup, neutral, seed, sample)
    rows = drawn.rows
    familiar, owner = familiarity(sup, rows), weights.argmax(1)
    fitted, r = fit(familiar[rows], owner[rows], drawn.near)
    out = np.empty(n, np.float32)
    out[rows] = r
    ratio = fitted.ratio(familiar[rows], owner[rows])
    for here, _, around in outside(drawn, neutral):
        out[here] = posterior(r, together(fitted.ratio(familiar[here], owner[here]), ratio, around), around)
    if not (out > 0.5).any():
        log.info("no text is left out: all %d belong to some teacher, as far as can be told", n)
    return out


def familiarity(sup: Supervision, rows: np.ndarray) -> np.ndarray:
    """e_i of every text, fp32 [n, N]; Gaussians and quantiles are fitted on the texts `rows`."""
    own = own_scores(sup, rows, CERTAINTY)
    for scores in (second_scores(sup), energies(sup)):
        own += np.stack([Anchors.of(column[rows])(column) for column in scores.T], axis=1).astype(np.float32) / 2
    return own / 2


@dataclass(frozen=True)
class Familiar:
    """Step 2 of every teacher: l = slope (e - middle); infinite where the teacher says nothing."""

    slope: np.ndarray  # [N]
    middle: np.ndarray  # [N]

    @classmethod
    def of(cls, e: np.ndarray, owner: np.ndarray, r: np.ndarray) -> Familiar:
        """e [m, N], owner int [m], r [m]: nobody's weight so far."""
        slope, middle = np.zeros(e.shape[1]), np.full(e.shape[1], -np.inf)
        for i in range(e.shape[1]):
            own = np.where(owner == i, 1 - r, 0.0)
            foreign, scores = 1 - own, e[:, i].astype(np.float64)
            if min(own.sum(), foreign.sum()) < FEWEST:
                continue
            means = np.average(scores, weights=own), np.average(scores, weights=foreign)
            variance = (own * (scores - means[0]) ** 2 + foreign * (scores - means[1]) ** 2).mean()
            if means[0] > means[1] and variance > 0:
                slope[i], middle[i] = (means[0] - means[1]) / variance, (means[0] + means[1]) / 2
        return cls(slope, middle)

    def ratio(self, e: np.ndarray, owner: np.ndarray) -> np.ndarray:
        """l of texts with e [.., N] and these owners, [..]; MOST where the owner says nothing."""
        mine = e[np.arange(len(e)), owner]
        silent = np.isneginf(self.middle[owner])
        told = self.slope[owner] * (mine - np.where(silent, 0.0, self.middle[owner]))
        return np.clip(np.where(silent, MOST, told), -MOST, MOST)


def together(mine: np.ndarray, all_ratios: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Step 3: l of texts [..] with these neighbours int [.., k] among the sample's l [m]."""
    return np.clip((1 - GROUP) * mine + GROUP * all_ratios[near].mean(1) - BIAS, -MOST, MOST)


def posterior(r: np.ndarray, ratio: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Step 4: nobody's weight of texts with l [..] and neighbours int [.., k] among the sample's r [m]."""
    return expit(logit(np.clip(r[near].mean(1), SURE, 1 - SURE)) - ratio)


def fit(e: np.ndarray, owner: np.ndarray, near: np.ndarray) -> tuple[Familiar, np.ndarray]:
    """Steps 2 to 4 on the sample: e [m, N], owner int [m], near int [m, k] -> the teachers' view of the last round, r [m]."""
    r = np.full(len(e), START)
    for _ in range(ROUNDS):
        familiar = Familiar.of(e, owner, r)
        ratio = familiar.ratio(e, owner)
        r = posterior(r, together(ratio, ratio, near), near)
    return familiar, r


# ---- what the uncertainty head learns ----


def doubt_ranks(sup: Supervision, uncertainty: str, seed: int = 0, sample: int = SAMPLE) -> np.ndarray:
    """Ranks of the pool's texts, fp32 [n, 2] in (0, 1), high = doubtful: by the uncertainty of the least uncertain teacher, and by the
    distance to the classes of the nearest one, -max_i A_i(RMD). Equal texts get equal ranks. Teachers of one class, which are never
    in doubt, are not asked; where there are no others, all texts are equal.

    sup: with features, restricted to the label space. uncertainty: a measure of selection.py. seed, sample: which texts, and how
    many at most, the Gaussians are fitted on. A function of the texts as a set, likewise. Raises UserError for a measure that a
    single pass does not give, and for a teacher without features.
    """
    rows, asked = sample_rows(sup.example_ids.numpy(), seed, sample), np.array(sup.class_counts) > 1
    uncertain = uncertainties(sup, uncertainty).numpy().min(1, where=asked, initial=np.inf)
    far = -own_scores(sup, rows, CERTAINTY).max(1, where=asked, initial=-np.inf)
    return np.stack([ranks(uncertain), ranks(far)], axis=1).astype(np.float32)


def ranks(values: np.ndarray) -> np.ndarray:
    """(mean rank of equal values - 1/2) / n, in (0, 1), [n]."""
    from scipy.stats import rankdata

    return (rankdata(values) - 0.5) / len(values)
