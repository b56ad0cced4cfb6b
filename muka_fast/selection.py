"""Selection: how far each teacher is trusted on each text, and which teachers own a class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muka_fast.config import NEEDS_SAMPLES
from muka_fast.errors import UserError

if TYPE_CHECKING:
    from muka_fast.labels import LabelSpace
    from muka_fast.stored import Supervision


def _entropy_share(entropy: Tensor, class_counts: Sequence[int]) -> Tensor:
    """Entropies in nats [n, N] over their upper bound ln C_i, in [0, 1]; a one-class teacher is certain."""
    upper = torch.tensor([math.log(count) or math.inf for count in class_counts]).to(entropy)
    return (entropy / upper).clamp(0, 1)


def _variance_share(sup: Supervision) -> Tensor:
    """Sum over classes of the population variance, over its upper bound 1 - 1/C_i (K one-hot samples, uniform mean)."""
    upper = torch.tensor([1 - 1 / count or math.inf for count in sup.class_counts]).to(sup.total_variance)
    return (sup.total_variance / upper).clamp(0, 1)


UNCERTAINTY: dict[str, Callable[[Supervision], Tensor]] = {
    "predictive_entropy": lambda sup: _entropy_share(sup.predictive_entropy, sup.class_counts),
    "mutual_information": lambda sup: _entropy_share(sup.mutual_information, sup.class_counts),
    "expected_entropy": lambda sup: _entropy_share(sup.expected_entropy, sup.class_counts),
    "variance": _variance_share,
}


def uncertainties(sup: Supervision, uncertainty: str) -> Tensor:
    """Uncertainty u [n, N] of each teacher in [0, 1]: a measure over its upper bound. The teacher score is 1 - u (MUKA, section 3.2);
    rules compare -u, of which fp32 holds small differences that 1 - u would round to ties.

    Entropies over ln C_i, variance (summed over classes) over 1 - 1/C_i; u = 0 where
    C_i = 1. C_i and the measure are those of the teacher's full label set, also where a label map drops some of
    its columns. Raises UserError for a measure that is zero everywhere because a teacher was scored by a single pass.
    """
    if uncertainty in NEEDS_SAMPLES:
        for teacher in sup.teachers:
            if not sampled(teacher):
                raise UserError(
                    f"--uncertainty {uncertainty} needs two Monte-Carlo passes, but teacher {teacher['name']!r} "
                    "was scored by one: use --mc with --mc_samples 2 or more, or --uncertainty predictive_entropy"
                )
    return UNCERTAINTY[uncertainty](sup)


def sampled(teacher: dict[str, Any]) -> bool:
    """Whether a store's teacher was scored by several Monte-Carlo passes."""
    return teacher["mc"] and teacher["mc_samples"] > 1


def owners(label_space: LabelSpace) -> Tensor:
    """bool [N, C]: teacher i has class c."""
    return torch.from_numpy(label_space.owned)


def label_ids(labels: Sequence[str], label_space: LabelSpace) -> Tensor:
    """Index of every label in the union label space, int64 [n]; -1 where no teacher has it."""
    index = {name: i for i, name in enumerate(label_space.names)}
    return torch.tensor([index.get(label, -1) for label in labels], dtype=torch.int64)
