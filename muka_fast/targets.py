"""What a method is: a target, a loss and a weight for every text; and the loss of all that compose one target.

Letters: n texts of the store · B rows of a batch · N teachers (i) · S kept teacher columns · C classes of the student
· T kd_temperature. Every loss that is a divergence from a composed target goes through `ops.distill_loss`; there is
no second path.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from muka_fast.aligned import StudentOutput
from muka_fast.errors import UserError
from muka_fast.memory import send
from muka_fast.ops.distill_loss import distill_loss
from muka_fast.ops.reference import distill_target_ref, select_teacher_ref

if TYPE_CHECKING:
    from muka_fast.config import RunConfig
    from muka_fast.features import Features
    from muka_fast.labels import LabelSpace
    from muka_fast.stored import Supervision

log = logging.getLogger("muka_fast")
LEAST_SHARE = 0.1  # of an even one: a teacher that hardly any text belongs to does not rule the training


class Method(ABC):
    """Targets and losses of one run over the texts of a store; rows are indices into the store, int64 [B].

    The loss of a global batch is `loss(student, rows).sum() / denominator(all rows of the global batch)`, whatever
    the split into micro-batches and processes: both terms are known per text, so that the layout never enters the
    gradient. Attributes: selected int64 [n] (the teacher that the method trusts most; None where it has no such
    notion), margin [n] (gap of the two best teacher scores, 1 for one teacher; None likewise), num_excluded (texts
    with weight 0).
    """

    options: tuple[str, ...] = ()  # of RunConfig, those that the method reads and others do not
    needs_labels = False
    needs_whole_batch = False  # True: the loss compares the texts of a batch, which must not be split
    own_rates = False  # True: modules of its own are trained beside the student, at a learning rate of their own
    # How the texts' teachers are chosen over the whole pool, where the method does so: (supervision, neutral features, seed, what
    # computes the neutral features of the class names) -> weights [n, N], whose rows sum to 1 or less; what is missing is the
    # weight of "no teacher".
    rule: Callable[[Supervision, Features, int, Callable[[], np.ndarray]], np.ndarray] | None = None

    def __init__(self, config: RunConfig, sup: Supervision, label_space: LabelSpace, label_ids: Tensor | None) -> None:
        self.config, self.sup, self.label_space, self.label_ids = config, sup, label_space, label_ids
        self.temperature = float(config.kd_temperature)
        self.teacher_to_union = torch.as_tensor(label_space.teacher_to_union, dtype=torch.int64)
        self._union_on: dict[torch.device, Tensor] = {}
        self.selected: Tensor | None = None
        self.margin: Tensor | None = None
        self.included = torch.ones(len(sup.logits))
        if self.needs_labels:
            self._exclude(label_ids < 0)

    @staticmethod  # noqa: B027 - most methods take any
    def check_space(label_space: LabelSpace) -> None:
        """Raises UserError where the method cannot merge teachers of these labels."""

    def loss(self, student: Tensor | StudentOutput, rows: Tensor) -> Tensor:
        """Loss per text [B], weights (margin, exclusion) included, before any mean; differentiable in the student."""
        output = student if isinstance(student, StudentOutput) else StudentOutput(student)
        rows = rows.cpu()
        loss = self._loss(output, rows)
        if self.num_excluded:  # where, not times: an excluded text's loss may be anything
            loss = torch.where(send(self.included[rows], loss.device) > 0, loss, torch.zeros_like(loss))
        return loss

    def union_on(self, device: torch.device) -> Tensor:
        """teacher_to_union there, the same tensor at every call: no copy a step, and the op plans its gather once."""
        if device not in self._union_on:
            self._union_on[device] = send(self.teacher_to_union, device)
        return self._union_on[device]

    @abstractmethod
    def _loss(self, output: StudentOutput, rows: Tensor) -> Tensor:
        """Loss per text [B] before exclusion, weights included."""

    def wrap(self, student: nn.Module) -> nn.Module:
        """What is trained: the student, or a module that holds it together with the method's own modules."""
        return student

    def student_inputs(self, rows: Tensor) -> dict[str, Tensor]:
        """What the wrapped student takes besides the tokens of these texts."""
        return {}

    def denominator(self, rows: Tensor) -> float:
        """What the sum of the losses of a global batch is divided by: the number of texts that count (at least 1)."""
        return max(float(self.included[rows].sum()), 1.0)

    @abstractmethod
    def target_probs(self, rows: Tensor) -> Tensor | None:
        """The composed target q [B, C] of each text; None where the method has none (uhc)."""

    num_excluded = 0

    def _exclude(self, excluded: Tensor) -> None:
        if excluded.all():
            raise UserError(
                f"--method {self.config.method}: none of the {len(excluded)} labels is a class of the teachers "
                f"({', '.join(self.label_space.names[:5])}, ...): rename them with --label_map or choose --label_column"
            )
        self._leave_out(excluded, "have a label that no teacher owns")

    def _leave_out(self, excluded: Tensor, why: str) -> None:
        """Give these texts (bool [n]) weight 0, and say so."""
        self.included = (~excluded).float()
        self.num_excluded = int(excluded.sum())
        if self.num_excluded == len(excluded):
            raise UserError(f"--method {self.config.method}: all {len(excluded)} texts {why}; give other texts")
        if self.num_excluded:
            told = (self.config.method, self.num_excluded, len(excluded), why)
            log.warning("%s: %d of %d texts %s; they are left out (weight 0)", *told)


class Composed(Method):
    """A target composed from teacher probabilities [B, S] and scores [n, N]: KL(q, softmax(student / T)) (MUKA, eq. 3
    to 6)."""

    options = ("target", "kd_temperature")
    soft = False
    weighted = False  # times (teacher margin + 1e-6)
    loss_scale = 1.0

    scores: Tensor  # [n, N]
    offsets: list[int]
    tau: float

    def _trust(self, scores: Tensor) -> None:
        self.scores, self.offsets, self.tau = scores, list(self.sup.offsets), self.config.score_temperature
        self.selected, self.margin = select_teacher_ref(scores)

    def teacher_probs(self, rows: Tensor) -> Tensor:
        """p^_i [B, S]: each teacher's softmax(z_i / T) over its kept columns, or its Monte-Carlo mean renormalised
        over them."""
        if self.config.target == "mc_mean":
            return self.sup.mean_probs[rows]
        return block_softmax(self.sup.logits[rows], self.sup.offsets, self.temperature)

    def _loss(self, output: StudentOutput, rows: Tensor) -> Tensor:
        device = output.logits.device
        loss = distill_loss(
            output.logits,
            send(self.teacher_probs(rows), device),
            send(self.scores[rows], device),
            self.offsets,
            self.union_on(device),
            soft=self.soft,
            tau=self.tau,
            temperature=self.temperature,
            margin=self.weighted,
        )
        loss = loss * self.loss_scale if self.loss_scale != 1.0 else loss
        return loss if output.penalty is None else loss + output.penalty.to(loss)

    def target_probs(self, rows: Tensor) -> Tensor:
        return distill_target_ref(
            self.teacher_probs(rows),
            self.scores[rows],
            self.offsets,
            self.teacher_to_union,
            self.label_space.num_classes,
            self.soft,
            self.tau,
        )


def text_weights(weights: Tensor, counted: Tensor, power: float) -> Tensor:
    """What each text counts for, fp32 [n], 1 on average over the `counted` ones (bool [n]): sum_i w_i / share_i^power.

    weights: of the teachers, w [n, N]; share_i is the part of the pool that is teacher i's by them, at least LEAST_SHARE of an even
    one. power 0: every text alike; 1: every teacher's texts together as much as any other's; between them (the square root: Mahajan
    et al., 2018, arXiv 1805.00932) the few of a skewed pool are learnt without ruling the training.
    """
    weights = weights.double() / weights.double().sum(-1, keepdim=True).clamp_min(1e-30)
    share = weights[counted].mean(0).clamp_min(LEAST_SHARE / weights.shape[1])
    counts = weights @ share**-power
    return (counts / counts[counted].mean()).float()


def tempered_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(logits / temperature) over the last dimension; the maximum goes first, so that large logits keep their
    digits."""
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)


def block_softmax(logits: Tensor, offsets: Sequence[int], temperature: float = 1.0) -> Tensor:
    """tempered_softmax over each teacher's own columns: [B, S] -> [B, S]."""
    return torch.cat([tempered_softmax(logits[:, a:b], temperature) for a, b in itertools.pairwise(offsets)], dim=-1)
