"""Adaptive K (--mc_stop): passes come in waves, and a text gets no more once it is decided which teacher it selects.

K most passes of a text · k its passes so far · n texts · N teachers (i) · C_i classes of teacher i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from muka_fast.data import Tokens, collate, token_budget_batches
from muka_fast.trunk import StochasticTeacher, TeacherScores, scores_of_passes

WAVE = 4  # passes between two looks, and the fewest of a text

# (places of texts, int64) -> of every batch of them: places, input_ids and attention_mask [B, L]
Batches = Callable[[Tensor], Iterator[tuple[Tensor, Tensor, Tensor]]]


def waves(mc_samples: int) -> list[tuple[int, int]]:
    """The passes [first, stop) of each wave. They depend on K alone: pass k of a text has the same masks as without --mc_stop."""
    return [(first, min(first + WAVE, mc_samples)) for first in range(0, mc_samples, WAVE)]


def uncertainty_per_pass(logits: Tensor, measure: str) -> Tensor:
    """What each pass adds to a measure of selection.py, over its upper bound: logits [k, n, C] -> [k, n], float64.

    With p = 1/k sum_s p_s: predictive entropy -sum_c p_sc ln p_c, expected entropy H(p_s), mutual information their difference
    KL(p_s, p), variance sum_c (p_sc - p_c)^2. The mean over the passes is the measure, exactly; the derivative by the share of one
    pass is that of the measure, so that the spread is its sampling error to first order (influence function). 0 for one class.
    """
    probs, num_classes = torch.softmax(logits.double(), -1), logits.shape[-1]
    mean = probs.mean(0)
    if measure == "variance":
        return (probs - mean).square().sum(-1) / (1 - 1 / num_classes or math.inf)
    predictive = -torch.special.xlogy(probs, mean).sum(-1)
    expected = torch.special.entr(probs).sum(-1)
    values = {"predictive_entropy": predictive, "expected_entropy": expected, "mutual_information": predictive - expected}
    return values[measure] / (math.log(num_classes) or math.inf)


@cache
def _critical(error: float, dof: int) -> float:
    """Student's t that is exceeded with probability `error`."""
    from scipy.special import stdtrit

    return float(stdtrit(dof, 1 - error))


def decided(uncertainty: Tensor, mc_samples: int, error: float) -> Tensor:
    """Which texts would select the same teacher after all K passes: bool [n].

    uncertainty [N, k, n]: `uncertainty_per_pass` of every teacher. mc_samples: K >= k. error: most probability, per text and
    over all looks, that the selection (least mean of `uncertainty`) changes until pass K.

    Tested for the selected teacher i against each rival j: d_s = h_js - h_is over the passes s, mean d_k, standard deviation s_d.
    Where d is normal, t = (d_k - d_K) / (s_d sqrt(1/k - 1/K)) is Student's with k - 1 degrees of freedom and independent of d_K,
    so that P(d_k > c s_d sqrt(1/k - 1/K), d_K < 0) + P(the same with both signs turned) <= P(t > c), whatever the true gap.
    The error is shared evenly among the looks and the N - 1 rivals. Ties and NaN are never decided. The order of the teachers
    does not matter.
    """
    num_teachers, k, num_texts = uncertainty.shape
    if num_teachers == 1 or k == mc_samples:
        return torch.ones(num_texts, dtype=torch.bool)
    if k < 2:
        return torch.zeros(num_texts, dtype=torch.bool)
    looks = len(waves(mc_samples)) - 1
    threshold = _critical(error / (looks * (num_teachers - 1)), k - 1) * math.sqrt(1 / k - 1 / mc_samples)
    best = uncertainty.mean(1).argmin(0)
    gap = uncertainty - uncertainty.gather(0, best.expand(1, k, num_texts))
    clear = gap.mean(1) > threshold * gap.std(1)
    clear[best, torch.arange(num_texts)] = True
    return clear.all(0)


def run_waves(
    teachers: Sequence[StochasticTeacher],
    batches: Sequence[Batches],
    example_ids: Tensor,
    mc_samples: int,
    error: float,
    measure: str,
) -> tuple[list[TeacherScores], Tensor]:
    """Scores of n texts by each of N teachers, and the passes that each text got, int64 [n].

    teachers: may load one at each access (`Crew`): a wave goes through them one after another. batches: for each teacher,
    its batches of the texts given by row. example_ids int64 [n]. All teachers make equally many passes of a text. Where no text
    is decided early the scores are those of `StochasticTeacher.launch`, to float rounding.
    """
    num_texts, undecided = len(example_ids), torch.arange(len(example_ids))
    plain: list[Tensor] = [None] * len(batches)
    passes: list[Tensor] = [None] * len(batches)
    features: list[Tensor] = [None] * len(batches)
    num_samples = torch.zeros(num_texts, dtype=torch.int64)
    for first, stop in waves(mc_samples):
        for i in range(len(batches)):
            teacher, found = teachers[i], []
            for rows, ids, mask in batches[i](undecided):
                trunk = teacher.trunk(teacher.texts(ids, mask, example_ids[rows]))
                found.append((rows, *teacher.passes(trunk, first, stop - first, plain=first == 0)))
            for rows, out, read in found:  # fetched together: to wait for each batch would leave the device idle between them
                out = out.cpu()
                if passes[i] is None:
                    plain[i] = torch.empty(num_texts, out.shape[-1])
                    passes[i] = torch.empty(mc_samples, num_texts, out.shape[-1])
                    features[i] = torch.empty(num_texts, read.shape[-1])
                if first == 0:
                    plain[i][rows], features[i][rows], out = out[0], read.float().cpu(), out[1:]
                passes[i][first:stop, rows] = out
            del teacher  # gone before the next one is loaded
        num_samples[undecided] = stop
        uncertainty = torch.stack([uncertainty_per_pass(logits[:stop, undecided], measure) for logits in passes])
        undecided = undecided[~decided(uncertainty, mc_samples, error)]
        if not len(undecided):
            break
    return [_scores(*found, num_samples) for found in zip(plain, passes, features, strict=True)], num_samples


def _scores(plain: Tensor, passes: Tensor, features: Tensor, num_samples: Tensor) -> TeacherScores:
    """Statistics over the first num_samples[b] passes of each text b: plain [n, C], passes [K, n, C], features [n, D]."""
    fields: dict[str, Tensor] = {}
    for count in num_samples.unique().tolist():
        rows = (num_samples == count).nonzero()[:, 0]
        for name, value in vars(scores_of_passes(plain[rows], passes[:count, rows], features[rows])).items():
            fields.setdefault(name, value.new_empty(len(plain), *value.shape[1:]))[rows] = value
    return TeacherScores(**fields)


def token_batches(tokens: Tokens, pad_id: int, token_budget: int, rows: np.ndarray) -> Batches:
    """The batches of one teacher over any of the texts `rows` of a shard, which are named by their place in `rows`."""

    def batches(places: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        chosen = rows[places.numpy()]
        for batch in token_budget_batches(tokens.lengths[chosen], token_budget):
            inputs = collate(tokens, chosen[batch], pad_id)
            yield places[batch], inputs["input_ids"], inputs["attention_mask"]

    return batches


class Crew:
    """Teachers by index: all stay loaded where `keep` says that they fit together, else only the one used last."""

    def __init__(self, load: Callable[[int], StochasticTeacher], keep: bool):
        self._load, self._keep = load, keep
        self._loaded: dict[int, StochasticTeacher] = {}

    def __getitem__(self, index: int) -> StochasticTeacher:
        if index not in self._loaded:
            if not self._keep:
                self._loaded.clear()
            self._loaded[index] = self._load(index)
        return self._loaded[index]


def sampling_summary(num_samples: Tensor, mc_samples: int) -> dict[str, Any]:
    """What --mc_stop saved: mean passes of a text, the share of K that was not run, and how many texts took how many passes."""
    values, counts = num_samples.unique(return_counts=True)
    mean = float(num_samples.double().mean())
    return {
        "mc_samples": mc_samples,
        "mean_samples": mean,
        "samples_saved": 1 - mean / mc_samples,
        "texts_by_samples": {str(value): count for value, count in zip(values.tolist(), counts.tolist(), strict=True)},
    }
