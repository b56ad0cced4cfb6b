"""muka-evidence: which teacher owns a text, from the evidence of the whole pool (no label, no further teacher forward).

1. Two scores per teacher, high = mine: relative Mahalanobis distance of its features to the classes it predicts (Ren et al.,
   2021), and -ln mutual information, or the energy logsumexp(z) (Liu et al., 2020) where there was a single pass.
2. Both on one scale, assuming nothing about the teachers' shares: A(s) = 4 ((s - q_a) / (q_{1-a} - q_a) - 1/2), q its
   quantiles over the pool. Evidence e_i [n, N]: their mean.
3. Start: 2 e, smoothed over the k-nearest-neighbour graph of the neutral features b (neutral.py, words.py).
4. R times: t = argmax w; logistic regression of t on b / |b|, weighted by the top-2 gap of w, whose intercepts learn the
   shares; w = softmax(ln p(i | b) + lambda e).

n texts · N teachers (i) · m texts of the sample · D, d widths of teacher and neutral features. Quantiles, Gaussians, graph and
regression come from a sample of at most SAMPLE texts, and all others are scored in a stream: memory is that of the sample, of
one shard, and of [n, N].
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import log_softmax, softmax

from muka_fast.selection import sampled, uncertainties

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

    from muka_fast.features import Features
    from muka_fast.stored import Supervision

QUANTILE = 0.10  # a
NEIGHBOURS = 15  # k
HOPS = 3
ALPHA = 0.7  # share of the neighbours in a hop
EVIDENCE_WEIGHT = 1.0  # lambda
ROUNDS = 5  # R
C = 1.0  # inverse strength of the L2 penalty
SHRINK = 0.1  # of covariances, towards the identity
CERTAINTY = 4.0  # power of the top probability by which a text counts in the Gaussians, where muka-auto and coverage fit them
LEAST_WITHIN = 1e-4  # of S, of the mean variance: fp32 holds no distances to classes without any spread
MI_FLOOR = 1e-6
LARGEST = 20.0  # of |A|: a score that is almost the same for most texts has almost no span, and must not outvote the others
SAMPLE = 20_000
GRAPH_BLOCK = 1024


def evidence_weights(sup: Supervision, neutral: Features, seed: int = 0, sample: int = SAMPLE) -> np.ndarray:
    """The weight of each teacher for each text, fp32 [n, N]; rows sum to 1.

    sup: with features, restricted to the label space. neutral: [n, d]. seed, sample: which texts, and how many of them at
    most, everything is fitted on. A function of the teachers and of the texts with their example ids as sets: their order changes
    nothing but rounding. (In a file of another order a text has another id, which decides where not all are in the sample.)
    """
    if len(sup.teachers) == 1:
        return np.ones((len(sup), 1), np.float32)
    drawn = Sample.draw(sup, neutral, seed, sample)
    return owner_weights(sup, neutral, drawn, own_scores(sup, drawn.rows))


@dataclass(frozen=True)
class Sample:
    """The texts that everything is fitted on."""

    rows: np.ndarray  # int [m], ascending
    b: np.ndarray  # their neutral features, unit rows fp32 [m, d]
    near: np.ndarray  # int [m, k], the neighbours of each among them

    @classmethod
    def draw(cls, sup: Supervision, neutral: Features, seed: int, limit: int) -> Sample:
        rows = sample_rows(sup.example_ids.numpy(), seed, limit)
        b = unit(neutral.rows(rows))
        return cls(rows, b, neighbours(b, NEIGHBOURS))


def outside(sample: Sample, neutral: Features) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The texts that are not in the sample, part by part: their rows [r], unit rows of neutral features [r, d], neighbours in the
    sample [r, k]."""
    rest = np.ones(neutral.ranges[-1].stop, bool)
    rest[sample.rows] = False
    for part, chunk in neutral.chunks() if rest.any() else ():
        at = np.flatnonzero(rest[part])
        if len(at):
            b = unit(chunk[at])
            yield part.start + at, b, neighbours(b, NEIGHBOURS, among=sample.b)


def owner_weights(sup: Supervision, neutral: Features, sample: Sample, own: np.ndarray) -> np.ndarray:
    """The weights of at least two teachers, fp32 [n, N]. own: `own_scores`, all texts of the sample counting alike."""
    second = second_scores(sup)
    anchored = [Anchors.of(scores[sample.rows])(scores) for scores in second.T]
    evidence = ((own + np.stack(anchored, axis=1)) / 2).astype(np.float32)
    owner = fit_owner(sample.b, sample.near, evidence[sample.rows])
    for part, chunk in neutral.chunks():
        evidence[part] = softmax(owner.log_probs(unit(chunk)) + EVIDENCE_WEIGHT * evidence[part], axis=1)
    return evidence


def sample_rows(example_ids: np.ndarray, seed: int, limit: int) -> np.ndarray:
    """At most `limit` rows, ascending: those whose example ids hash lowest, whatever order they come in."""
    if len(example_ids) <= limit:
        return np.arange(len(example_ids))
    x = example_ids.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15) & (2**64 - 1))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return np.sort(np.argsort(x ^ (x >> np.uint64(31)), kind="stable")[:limit])


# ---- scores of single teachers ----


def own_scores(sup: Supervision, rows: np.ndarray, power: float = 0.0) -> np.ndarray:
    """A(RMD) of each teacher on each text, fp32 [n, N]: how much a text looks like those that the teacher knows.

    Fitted on the texts `rows`, of which each counts (top probability of the teacher)^power.
    """
    return own_scores_by_power(sup, rows, [power])[0]


def own_scores_by_power(sup: Supervision, rows: np.ndarray, powers: Sequence[float]) -> list[np.ndarray]:
    """`own_scores` for each of several powers; the features, by far the most of a store, are read as often as for one."""
    out = [np.empty((len(sup), len(sup.teachers)), np.float32) for _ in powers]
    for i, (start, stop) in enumerate(itertools.pairwise(sup.offsets)):
        probs, features = torch.softmax(sup.logits[rows, start:stop], dim=-1).numpy(), sup.features[i].rows(rows)
        if sup.label_space is not None:
            probs = by_class(probs, sup.label_space.teacher_to_union[start:stop])
        fits = [RelativeMahalanobis.fit(features, probs.argmax(1), probs.max(1).astype(np.float64) ** power) for power in powers]
        scales = [Anchors.of(gaussians.scores(features)) for gaussians in fits]
        for part, chunk in sup.features[i].chunks():
            for scores, gaussians, anchors in zip(out, fits, scales, strict=True):
                scores[part, i] = anchors(gaussians.scores(chunk))
    return out


def by_class(probs: np.ndarray, union: Sequence[int]) -> np.ndarray:
    """A teacher's probabilities of its classes, in the order of their numbers in the union, from those of its columns [m, columns];
    `union` has each column's number, and two columns may be one class."""
    order = np.argsort(union, kind="stable")
    _, starts = np.unique(np.asarray(union)[order], return_index=True)
    return np.add.reduceat(probs[:, order], starts, axis=1)


def second_scores(sup: Supervision) -> np.ndarray:
    """-ln(MI / ln C_i), MI / ln C_i >= 1e-6, where every teacher was sampled, else logsumexp of the logits; fp32 [n, N]."""
    if all(map(sampled, sup.teachers)):
        return -np.log(np.maximum(uncertainties(sup, "mutual_information").numpy(), MI_FLOOR))
    return energies(sup)


def energies(sup: Supervision) -> np.ndarray:
    """logsumexp of each teacher's logits, fp32 [n, N]."""
    blocks = itertools.pairwise(sup.offsets)
    return torch.stack([sup.logits[:, a:b].logsumexp(-1) for a, b in blocks], dim=-1).numpy()


@dataclass(frozen=True)
class Anchors:
    """A(s): -2 at the lower quantile of a score, 2 at the upper one; 0 where the score is the same for most texts."""

    low: float
    span: float

    @classmethod
    def of(cls, scores: np.ndarray) -> Anchors:
        low, high = np.quantile(scores.astype(np.float64), [QUANTILE, 1 - QUANTILE])
        rounding = 1e-5 * float(np.abs(scores).max())
        # For a teacher of one class or one that predicts one class only; where it tells a few texts apart, the scale is unknown.
        useless = high - low <= max(rounding, 1e-12)
        return cls(float(low), math.inf if useless else float(high - low))

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        if math.isinf(self.span):
            return np.zeros(len(scores))
        return np.clip(4 * ((scores - self.low) / self.span - 0.5), -LARGEST, LARGEST)


@dataclass(frozen=True)
class RelativeMahalanobis:
    """RMD(F) = maha(F, mu, S0) - min_c maha(F, mu_c, S), squared distances: how much more a text looks like one of the teacher's
    classes (mean mu_c, pooled covariance S) than like any text of the pool (mu, S0).

    With x = F - mu and m_c = mu_c - mu it is x^T (S0^-1 - S^-1) x + max_c (2 x^T S^-1 m_c - m_c^T S^-1 m_c). Kept in fp32, summed in
    fp64: where classes hardly spread, the two terms are 1 / LEAST_WITHIN times their sum.
    """

    mean: np.ndarray  # mu [D]
    form: np.ndarray  # S0^-1 - S^-1 [D, D]
    pull: np.ndarray  # 2 S^-1 m_c [D, G], G classes that are predicted at all
    offset: np.ndarray  # m_c^T S^-1 m_c [G]

    @classmethod
    def fit(cls, features: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None) -> RelativeMahalanobis:
        """features fp32 [m, D]; predicted: the teacher's own class of each text, int [m]; weights > 0 of the texts [m]."""
        weights = np.ones(len(features)) if weights is None else weights / weights.mean()
        mean = np.average(features.astype(np.float64), axis=0, weights=weights)
        centred = features - mean
        classes, inverse = np.unique(predicted, return_inverse=True)
        sums = np.zeros((len(classes), centred.shape[1]))
        np.add.at(sums, inverse, weights[:, None] * centred)
        means = sums / np.bincount(inverse, weights)[:, None]
        root = np.sqrt(weights)[:, None]
        background, within = root * centred, root * (centred - means[inverse])
        outer, inner = precision(background, 0.0), precision(within, LEAST_WITHIN * (background**2).mean())
        toward = inner @ means.T
        parts = mean, outer - inner, 2 * toward, (means.T * toward).sum(0)
        if len(classes) == 1:  # S = S0 and m_c = 0: rounding would be all there is
            parts = mean, *(np.zeros_like(part) for part in parts[1:])
        return cls(*(part.astype(np.float32) for part in parts))

    def scores(self, features: np.ndarray) -> np.ndarray:
        """RMD of features [n, D], fp32."""
        x = (features - self.mean).astype(np.float64)
        return (((x @ self.form) * x).sum(1) + (x @ self.pull - self.offset).max(1)).astype(np.float32)


def precision(deviations: np.ndarray, least: float) -> np.ndarray:
    """(cov + ridge I)^-1 [D, D], ridge = SHRINK mean(diag cov), at least `least`; deviations from their mean, fp64 [m, D]."""
    covariance = deviations.T @ deviations / len(deviations)
    ridge = max(SHRINK * covariance.diagonal().mean(), least, 1e-12)
    return np.linalg.inv(covariance + ridge * np.eye(len(covariance)))


# ---- the neutral view ----


def unit(features: np.ndarray) -> np.ndarray:
    """b / |b|, fp32."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def neighbours(b: np.ndarray, k: int, among: np.ndarray | None = None) -> np.ndarray:
    """Rows of the k most similar other texts (all of them where there are fewer), int64 [m, k]; b: unit rows [m, d].

    among: look among these unit rows, which hold none of b; None: among b, each text but itself.
    """
    base = b if among is None else among
    k = min(k, len(base) - (among is None))
    found = np.empty((len(b), k), np.int64)
    for start in range(0, len(b), GRAPH_BLOCK):
        similarity = torch.from_numpy(b[start : start + GRAPH_BLOCK] @ base.T)
        if among is None:
            own = torch.arange(len(similarity))
            similarity[own, start + own] = -torch.inf
        found[start : start + GRAPH_BLOCK] = similarity.topk(k, dim=1, sorted=False).indices.numpy()
    return found


def smooth(values: np.ndarray, graph: np.ndarray) -> np.ndarray:
    """HOPS times v = alpha (mean over the neighbours of v) + (1 - alpha) v; [m, N]."""
    for _ in range(HOPS if graph.shape[1] else 0):
        values = ALPHA * values[graph].mean(1) + (1 - ALPHA) * values
    return values


@dataclass(frozen=True)
class Owner:
    """p(i | b) by logistic regression; teachers that own no text of the sample get the share of half a text."""

    model: LogisticRegression | None  # None: a single teacher owns all
    owners: np.ndarray  # int [<= N], the teachers that own a text
    num_teachers: int
    num_texts: int

    def log_probs(self, b: np.ndarray) -> np.ndarray:
        """ln p(i | b), [.., N]; b: unit rows [.., d]."""
        out = np.full((len(b), self.num_teachers), -math.log(2 * self.num_texts))
        out[:, self.owners] = 0.0 if self.model is None else self.model.predict_log_proba(b)
        return log_softmax(out, axis=1)


def fit_owner(b: np.ndarray, near: np.ndarray, evidence: np.ndarray) -> Owner:
    """Steps 3 and 4 on the sample: b unit rows [m, d], near int [m, k], evidence [m, N]."""
    w = softmax(smooth(2 * evidence, near), axis=1)
    b = b.astype(np.float64)
    for _ in range(ROUNDS):
        owner = regress(b, w)
        w = softmax(owner.log_probs(b) + EVIDENCE_WEIGHT * evidence, axis=1)
    return owner


def regress(b: np.ndarray, w: np.ndarray) -> Owner:
    """One round: the most trusted teacher of each text on its neutral features, clear texts counting most."""
    # Slow to import, and most methods have no such rule.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    target, best = w.argmax(1), np.sort(w, axis=1)
    gap = best[:, -1] - best[:, -2]
    weight = gap / gap.mean() if gap.mean() > 0 else np.ones(len(gap))
    owners = np.unique(target)
    if len(owners) == 1:
        return Owner(None, owners, w.shape[1], len(w))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the next round goes on from there
        warnings.filterwarnings("ignore", "The number of unique classes")  # many teachers, few texts
        # For two classes scikit-learn penalises one vector w = w_1 - w_2, not w_1 and w_2: twice as much.
        model = LogisticRegression(C=2 * C if len(owners) == 2 else C, max_iter=300)
        model.fit(b, target, sample_weight=weight)
    return Owner(model, owners, w.shape[1], len(w))
