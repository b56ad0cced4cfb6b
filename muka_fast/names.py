"""Whose text is this, by what the classes are called: how close a text lies to each class name in the neutral view.

s_c = cos(b - mean b, a_c - mean a), b a text's neutral features, a_c those of the name of class c. A name may say nothing
(ABBR, LABEL_0), and not every encoder reads names, so that the teachers' own answers decide how much s is worth:

1. k_i: Cohen's kappa between the class of L_i whose name is closest and teacher i's own answer, on the texts that look like its
   own; a text counts w_i max_c p_ic, w = softmax(e (1 + slope)) as in step 1 of auto.py. Trust: the mean of max(k_i, 0).
2. t: softmax over L_i of t s is as sure as it is right: its mean maximum is 1 / C_i + (1 - 1 / C_i) k_i, as a mean over teachers.
3. q_c ~ pi_c exp(t s_c), the classes' shares pi by expectation-maximisation (Saerens et al., 2002); w_i = sum of q_c over L_i.

Letters as in evidence.py and auto.py. A class of several owners counts for each of them in equal parts.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import softmax

from muka_fast.evidence import by_class, unit

if TYPE_CHECKING:
    from muka_fast.auto import Classes

TEMPERATURES = np.array([0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40], np.float32)  # of t
SURE_ENOUGH = 1e-4  # below what is wanted: where all are sure, rounding would choose between the highest temperatures
ROUNDS = 20  # of expectation-maximisation
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
TELLING = "+#<>=%"  # C and C++, <5 and >5


def readable(name: str) -> str:
    """A class name as words: card_arrival, Sci/Tech, bookHotel -> "card arrival", "Sci Tech", "book Hotel"."""
    kept = [letter if of_a_word(letter) else " " for letter in CAMEL.sub(" ", unicodedata.normalize("NFC", name))]
    sign = "-" if re.match(r"-\d", name) else ""
    return sign + " ".join("".join(kept).split()) or name


def of_a_word(letter: str) -> bool:
    """Letters, digits, what joins them in other scripts (marks, joiners), and TELLING signs."""
    return letter.isalnum() or letter in TELLING or unicodedata.category(letter) in ("Mn", "Mc", "Me", "Cf")


@dataclass(frozen=True)
class NameAnswer:
    """The answer by class names, fitted on a sample of texts. trust in [0, 1]: 0 where names and teachers agree by chance."""

    center: np.ndarray  # mean b [d]
    names: np.ndarray  # unit rows along a_c - mean a [C, d]
    temperature: float  # t
    shares: np.ndarray  # pi [C]
    part: np.ndarray  # [N, C]: 1 / (number of owners) where teacher i has class c, else 0
    trust: float

    @classmethod
    def fit(cls, b: np.ndarray, names: np.ndarray, w: np.ndarray, p: np.ndarray, classes: Classes) -> NameAnswer:
        """On a sample: b [m, d], unit rows; w [m, N]; p [m, S], every teacher's probabilities of its own classes. names [C, d]."""
        center, names = b.mean(0), unit(names - names.mean(0))
        s = unit(b - center) @ names.T
        kappas, temperature = calibrate(s, w, p, classes)
        shares = np.full(len(names), 1 / len(names))
        for _ in range(ROUNDS):
            shares = posterior(s, temperature, shares).mean(0)
        return cls(center, names, temperature, shares, classes.part, float(np.mean(kappas)) if kappas else 0.0)

    def __call__(self, b: np.ndarray) -> np.ndarray:
        """w [.., N] of unit rows b [.., d]."""
        return posterior(unit(b - self.center) @ self.names.T, self.temperature, self.shares) @ self.part.T


def posterior(s: np.ndarray, temperature: float, shares: np.ndarray) -> np.ndarray:
    """q [.., C] of similarities [.., C]; no class is held for rarer than a tenth of its even share."""
    return softmax(temperature * s + np.log(np.maximum(shares, 0.1 / len(shares))), axis=1)


def calibrate(s: np.ndarray, w: np.ndarray, p: np.ndarray, classes: Classes) -> tuple[list[float], float]:
    """max(k_i, 0) of each teacher with several classes, and t."""
    kappas, wanted, sure = [], 0.0, np.zeros(len(TEMPERATURES))
    for i, (start, stop) in enumerate(itertools.pairwise([*classes.starts, p.shape[1]])):
        own = np.unique(classes.union[start:stop])
        C = len(own)
        if C < 2:  # it has nothing to be right about
            continue
        similar, probs, share = s[:, own], by_class(p[:, start:stop], classes.union[start:stop]), float(w[:, i].mean())
        weight = w[:, i] * probs.max(1)
        weight = weight / max(float(weight.sum()), 1e-30)
        kappa = cohens_kappa(similar.argmax(1), probs.argmax(1), C, weight)
        kappas.append(kappa)
        wanted += share * (1 / C + (1 - 1 / C) * kappa)
        sure += share * np.array([weight @ softmax(t * similar, axis=1).max(1) for t in TEMPERATURES])
    return kappas, float(np.interp(wanted - SURE_ENOUGH, sure, TEMPERATURES))


def cohens_kappa(one: np.ndarray, other: np.ndarray, count: int, weights: np.ndarray | None = None) -> float:
    """How far two answers in [0, count) agree beyond chance, in [0, 1], at least 0; weights of the texts sum to 1 (None: equal)."""
    weights = np.full(len(one), 1 / len(one)) if weights is None else weights
    by_chance = np.bincount(one, weights, count) @ np.bincount(other, weights, count)
    return float(np.clip((weights @ (one == other) - by_chance) / max(1 - by_chance, 1e-9), 0, 1))
