"""muka-auto: whose text is this? A log-linear pool of three answers, w_i ~ prod_a (w_ai + 1e-4)^(power_a / 3).

By class, power 2 (below); by teacher, power 1 (muka-evidence, evidence.py); by the names of the classes (names.py), power 6 times
the trust that they have earned: as far as they find the teachers' own classes, times as far as they find the owners that the other
two answers agree on. No label of a text, and no further forward of a teacher.

By class, with p_ic the probability that teacher i gives union class c, and e_i (1 + slope_i) how much it takes a text for its own:
e_i its relative Mahalanobis distance (Ren et al., 2021), anchored, its Gaussians fitted with weights (max_c p_ic)^4: texts that a
teacher does not know blur its classes; slope_i how far own and foreign texts lie apart, in log-odds per unit of e_i: where teachers
know the pool by heart, the distance decides, where it hardly tells, the rest does.

1. Start: w = softmax(e (1 + slope)).
2. R times: q_c = sum_i w_i p_ic, the composed target; f_c, its ridge regression, leave-one-out, on the neutral features with the
   teachers' own beside them (Views); g_c ~ (share_i^2 / C_i) max(f_c / mean q_c, 0.1)^2, so that no class swallows another of its
   teacher, while the shares of the teachers, share_i = sum_c mean q_c over its classes, stay (squared: they start too equal);
   summing to 1 over c; w_i ~ exp(e_i (1 + slope_i)) (sum_c p_ic g_c) sqrt(K_i / mean w_i), K_i the mean of w_i over the k nearest
   neighbours by the neutral features.

Figures, and what did not help: docs/selection.md. Letters as in evidence.py, and C union classes, S kept teacher columns. The neutral
features are an encoder's (neutral.py) with those of the texts' words beside them (words.py).
A class of several owners counts for each of them in equal parts (share_i and g_c alike).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.special import softmax

from muka_fast.evidence import (
    CERTAINTY,
    SAMPLE,
    Sample,
    evidence_weights,
    outside,
    own_scores_by_power,
    owner_weights,
    unit,
)
from muka_fast.names import NameAnswer, cohens_kappa

if TYPE_CHECKING:
    from muka_fast.features import Features
    from muka_fast.stored import Supervision

CLASS_POWER, TEACHER_POWER = 2.0, 1.0
NAMES_POWER = 6.0  # times the trust in the names
FLOOR = 1e-4  # of an answer in the pool: none can veto a teacher
STEEPEST = 4.0  # slope: scores of a few values only must not decide alone
ROUNDS = 5  # R
VIEW_LENGTH = 0.6  # of all teachers' features together, where encoder and words have length 1 each
VIEW_WIDTH, VIEWS_WIDTH = 32, 1024  # principal directions of a teacher's features, and at most of all teachers'
PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of the ridge regression, per text
LEAST = 0.1  # of f_c / mean q_c: ridge regression gives negative probabilities as well
SMALLEST_SHARE = 0.02  # added to K_i and to mean w_i
FEWEST_TEXTS = 4  # below, there is nothing to regress on


def auto_weights(
    sup: Supervision, neutral: Features, seed: int = 0, sample: int = SAMPLE, names: np.ndarray | None = None
) -> np.ndarray:
    """The weight of each teacher for each text, fp32 [n, N]; rows sum to 1.

    sup: with features, restricted to the label space (else every column is a class of its own). neutral: [n, d + e], the first d
    an encoder's, whatever comes after them. seed, sample: which texts, and how many of them at most, everything is fitted on.
    names: what the encoder gives for the C class names, [C, d]; None: they are not looked at. A function of teachers and texts as
    sets, as `evidence_weights` says.
    """
    if len(sup.teachers) == 1 or len(sup) < FEWEST_TEXTS:
        return evidence_weights(sup, neutral, seed, sample)
    drawn = Sample.draw(sup, neutral, seed, sample)
    (own, alike), classes, rows = own_scores_by_power(sup, drawn.rows, (CERTAINTY, 0.0)), Classes.of(sup), drawn.rows
    own *= 1 + slopes(own[rows])
    by_teacher, by_class = owner_weights(sup, neutral, drawn, alike), class_weights(sup, neutral, drawn, own, classes)
    pooled = CLASS_POWER * np.log(by_class + FLOOR) + TEACHER_POWER * np.log(by_teacher + FLOOR)
    if names is not None:
        width = names.shape[1]
        answer = NameAnswer.fit(unit(drawn.b[:, :width]), names, softmax(own[rows], axis=1), probs(sup, rows), classes)
        named = np.concatenate([answer(unit(chunk[:, :width])) for _, chunk in neutral.chunks()])
        owners = cohens_kappa(named[rows].argmax(1), pooled[rows].argmax(1), len(sup.teachers))
        pooled += NAMES_POWER * answer.trust * owners * np.log(named + FLOOR)
    return softmax(pooled / (CLASS_POWER + TEACHER_POWER), axis=1).astype(np.float32)


def slopes(e: np.ndarray) -> np.ndarray:
    """(mean of e_i over a teacher's own texts - mean over the others) / variance within them, [N]; own as far as w = softmax(2 e)
    says, [m, N]. For two normal distributions of one variance the log-odds of "own" grow by this much per unit of e_i. In
    [0, STEEPEST]."""
    w = softmax(2 * e.astype(np.float64), axis=1)
    own, other = ((weights * e).sum(0) / np.maximum(weights.sum(0), 1e-12) for weights in (w, 1 - w))
    within = (w * (e - own) ** 2 + (1 - w) * (e - other) ** 2).mean(0)
    return np.clip((own - other) / np.maximum(within, 1e-12), 0, STEEPEST)


def class_weights(sup: Supervision, neutral: Features, drawn: Sample, own: np.ndarray, classes: Classes) -> np.ndarray:
    """The answer by class, fp32 [n, N], from each text's own scores e (1 + slope) = own [n, N]. The texts of the sample, at least two,
    keep their leave-one-out answer, all others get the regression's prediction, in a stream."""
    rows, b, near = drawn.rows, drawn.b, drawn.near
    views, seen = Views.fit(sup.features, rows)
    p, e, ridge = probs(sup, rows), own[rows], Ridge.of(beside(b, seen))
    w = softmax(e, axis=1)
    penalty = ridge.best_penalty(classes.compose(w, p))
    for _ in range(ROUNDS):
        q = classes.compose(w, p)
        answer, fitted = Answer.of(classes, q, w), ridge.fit(q, penalty)
        w = answer(p, e, fitted.leave_one_out(), near)
    out = np.empty(own.shape, np.float32)
    out[rows] = w
    for here, others, around in outside(drawn, neutral):
        f = fitted(beside(others, views(here)))
        out[here] = answer(probs(sup, here), own[here], f, around)
    return out


def probs(sup: Supervision, rows: np.ndarray) -> np.ndarray:
    """softmax(z_i) of every teacher, side by side, fp32 [len(rows), S]."""
    blocks = sup.logits[rows].split(np.diff(sup.offsets).tolist(), dim=1)
    return torch.cat([torch.softmax(block, dim=-1) for block in blocks], dim=1).numpy()


@dataclass(frozen=True)
class Classes:
    """Where the teachers' columns lie among the union classes."""

    starts: np.ndarray  # int [N], first column of each teacher
    teacher: np.ndarray  # int [S], of each column
    union: np.ndarray  # int [S], class of each column
    padding: csr_array  # fp32 [S, C], 1 where a column is of a class
    part: np.ndarray  # [N, C]: 1 / (number of owners) where teacher i has class c, else 0

    @classmethod
    def of(cls, sup: Supervision) -> Classes:
        """Of a restricted supervision; without a label space no two columns are one class."""
        S = sup.offsets[-1]
        union = np.arange(S) if sup.label_space is None else np.asarray(sup.label_space.teacher_to_union)
        teacher = np.repeat(np.arange(len(sup.teachers)), np.diff(sup.offsets))
        padding = csr_array((np.ones(S, np.float32), (np.arange(S), union)), shape=(S, int(union.max()) + 1))
        has = np.zeros((len(sup.teachers), padding.shape[1]))
        has[teacher, union] = 1
        return cls(np.array(sup.offsets[:-1]), teacher, union, padding, has / has.sum(0))

    def compose(self, w: np.ndarray, p: np.ndarray) -> np.ndarray:
        """q_c = sum_i w_i p_ic: [.., N] and [.., S] -> [.., C]."""
        return (w[:, self.teacher] * p) @ self.padding

    def expect(self, values: np.ndarray, p: np.ndarray) -> np.ndarray:
        """sum_c p_ic values_c: [.., C] and [.., S] -> [.., N]."""
        return np.add.reduceat(p * values[:, self.union], self.starts, axis=1)


@dataclass(frozen=True)
class View:
    """One teacher's features along their principal directions, rows of length `length`."""

    mean: np.ndarray  # of the features [D]
    directions: np.ndarray  # [D, <= VIEW_WIDTH]
    length: float

    @classmethod
    def fit(cls, values: np.ndarray, width: int, length: float) -> View:
        """values [m, D]."""
        _, vectors = np.linalg.eigh(np.cov(values.astype(np.float64), rowvar=False, bias=True).reshape(values.shape[1], -1))
        return cls(values.mean(0, dtype=np.float64), vectors[:, -width:].astype(np.float32), length)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return self.length * unit((values - self.mean).astype(np.float32) @ self.directions)


@dataclass(frozen=True)
class Views:
    """The teachers' features as they stand beside the neutral ones, all together of length VIEW_LENGTH. What a teacher knows by
    heart lies apart in its own features."""

    features: Sequence[Features]
    views: list[View]

    @classmethod
    def fit(cls, features: Sequence[Features], rows: np.ndarray) -> tuple[Views, np.ndarray]:
        """On these texts, and what it gives for them; of each teacher they are read once."""
        width, views, seen = min(VIEW_WIDTH, max(VIEWS_WIDTH // len(features), 1)), [], []
        for teacher in features:
            values = teacher.rows(rows)
            views.append(View.fit(values, width, VIEW_LENGTH / math.sqrt(len(features))))
            seen.append(views[-1](values))
        return cls(features, views), np.concatenate(seen, axis=1)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """[len(rows), sum of the widths] of the texts `rows`."""
        return np.concatenate([view(teacher.rows(rows)) for view, teacher in zip(self.views, self.features, strict=True)], axis=1)


def beside(b: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Unit rows [.., d + width] of neutral features b (unit rows) and the teachers' views of the same texts."""
    return unit(np.concatenate([b, seen], axis=1))


@dataclass(frozen=True)
class Answer:
    """Step 2 after its regression, from what the texts of the sample hold: w [m, N] of the round before, and its target q."""

    classes: Classes
    mass: np.ndarray  # mean q_c [C]
    prior: np.ndarray  # share_i^2 / C_i [C], mean over the owners of a class
    before: np.ndarray  # w [m, N]

    @classmethod
    def of(cls, classes: Classes, q: np.ndarray, w: np.ndarray) -> Answer:
        """q [m, C], w [m, N]."""
        mass = q.mean(0, dtype=np.float64)
        share = classes.part @ mass
        prior = (share**2 / (classes.part > 0).sum(1)) @ classes.part
        # A class that nobody predicts would have any ratio f_c / mass.
        return cls(classes, np.maximum(mass, 0.1 / len(mass)).astype(np.float32), prior.astype(np.float32), w)

    def __call__(self, p: np.ndarray, e: np.ndarray, f: np.ndarray, near: np.ndarray) -> np.ndarray:
        """w [.., N] of texts with p [.., S], e [.., N], f [.., C] and neighbours int [.., k] in the sample."""
        g = np.maximum(f / self.mass, LEAST) ** 2 * self.prior
        g /= np.maximum(g.sum(1, keepdims=True), 1e-30)
        around = (self.before[near].mean(1) + SMALLEST_SHARE) / (self.before.mean(0) + SMALLEST_SHARE)
        return softmax(np.log(self.classes.expect(g, p) + 1e-9) + e + np.log(around) / 2, axis=1)


# ---- ridge regression of many targets, leave-one-out ----


@dataclass(frozen=True)
class Ridge:
    """Ridge regression with a free intercept, from one eigendecomposition of the texts' covariance."""

    mean: np.ndarray  # of b [d]
    vectors: np.ndarray  # V [d, d]
    values: np.ndarray  # v [d] of sum (b - mean)(b - mean)^T
    u: np.ndarray  # (b - mean) V [m, d]

    @classmethod
    def of(cls, b: np.ndarray) -> Ridge:
        """b: unit rows fp32 [m, d]."""
        mean = b.mean(0, dtype=np.float64).astype(np.float32)
        x = b - mean
        values, vectors = np.linalg.eigh(x.T.astype(np.float64) @ x)
        vectors = vectors.astype(np.float32)
        return cls(mean, vectors, np.maximum(values, 0), x @ vectors)

    def best_penalty(self, target: np.ndarray) -> float:
        """That of PENALTIES with the least leave-one-out squared error of target [m, C]."""
        errors = [((self.fit(target, penalty).leave_one_out() - target) ** 2).sum(dtype=np.float64) for penalty in PENALTIES]
        return PENALTIES[int(np.argmin(errors))]

    def fit(self, target: np.ndarray, penalty: float) -> Fitted:
        """min over W of sum of squared errors + penalty m |W|^2; target fp32 [m, C]."""
        mean = target.mean(0, dtype=np.float64).astype(np.float32)
        inverse = (1 / (self.values + penalty * len(target))).astype(np.float32)
        return Fitted(self, target, mean, inverse, inverse[:, None] * (self.u.T @ (target - mean)))


@dataclass(frozen=True)
class Fitted:
    """f(b) = (b - mean) V W + mean target."""

    ridge: Ridge
    target: np.ndarray  # [m, C]
    mean: np.ndarray  # of the target [C]
    inverse: np.ndarray  # 1 / (v + penalty m) [d]
    coefficients: np.ndarray  # W [d, C]

    def __call__(self, b: np.ndarray) -> np.ndarray:
        """Predictions [.., C] for unit rows b [.., d] of other texts."""
        return (b - self.ridge.mean) @ self.ridge.vectors @ self.coefficients + self.mean

    def leave_one_out(self) -> np.ndarray:
        """For each text of the fit the prediction of a fit to all others, [m, C]: (f - h t) / (1 - h), h its leverage."""
        h = (self.ridge.u**2 @ self.inverse + 1 / len(self.target))[:, None]
        fitted = self.ridge.u @ self.coefficients + self.mean
        return (fitted - h * self.target) / np.maximum(1 - h, 1e-3)
