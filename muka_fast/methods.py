"""Methods: from the supervision store to the target and the loss of every text (MUKA, arXiv 2112.07327; MUKI, arXiv
2210.05230).

Letters: n texts of the store · B rows of a batch · N teachers (i) · S kept teacher columns · C classes of the student
· T kd_temperature. Every loss that is a divergence from a composed target goes through `ops.distill_loss`; there is
no second path.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from muka_fast.errors import UserError
from muka_fast.ops.distill_loss import distill_loss
from muka_fast.ops.reference import distill_target_ref, select_teacher_ref
from muka_fast.selection import NEEDS_SAMPLES, choices, label_ids, owners, teacher_scores

if TYPE_CHECKING:
    from muka_fast.config import RunConfig
    from muka_fast.labels import LabelSpace
    from muka_fast.stored import Supervision

log = logging.getLogger("muka_fast")
MARGIN_FLOOR = 1e-6  # as published: a text whose two best teachers tie still counts a little


class StudentOutput(NamedTuple):
    """What a student returns for a batch: logits [B, C] and, for methods that align features, pooled features [B,
    D]."""

    logits: Tensor
    features: Tensor | None = None


# ---- the methods ----


class Method(ABC):
    """Targets and losses of one run over the texts of a store; rows are indices into the store, int64 [B].

    The loss of a global batch is `loss(student, rows).sum() / denominator(all rows of the global batch)`, whatever
    the split into micro-batches and processes: both terms are known per text, so that the layout never enters the
    gradient. Attributes: selected int64 [n] (the teacher that the method trusts most; None where it has no such
    notion), margin [n] (gap of the two best teacher scores, 1 for one teacher; None likewise), num_excluded (texts
    with weight 0).
    """

    needs_labels = False
    needs_features = False  # True: `loss` must get a StudentOutput with features

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

    def loss(self, student: Tensor | StudentOutput, rows: Tensor) -> Tensor:
        """Loss per text [B], weights (margin, exclusion) included, before any mean; differentiable in the student."""
        output = student if isinstance(student, StudentOutput) else StudentOutput(student)
        rows = rows.cpu()
        loss = self._loss(output, rows)
        if self.num_excluded:  # where, not times: an excluded text's loss may be anything
            loss = torch.where(self.included[rows].to(loss.device) > 0, loss, torch.zeros_like(loss))
        return loss

    def union_on(self, device: torch.device) -> Tensor:
        """teacher_to_union there, the same tensor at every call: no copy a step, and the op plans its gather once."""
        if device not in self._union_on:
            self._union_on[device] = self.teacher_to_union.to(device)
        return self._union_on[device]

    @abstractmethod
    def _loss(self, output: StudentOutput, rows: Tensor) -> Tensor:
        """Loss per text [B] before exclusion, weights included."""

    def weights(self, rows: Tensor) -> Tensor:
        """The weight of each text [B] that `loss` already contains: 1, 0 (excluded) or teacher margin + 1e-6."""
        return self.included[rows]

    def denominator(self, rows: Tensor) -> float:
        """What the sum of the losses of a global batch is divided by: the number of texts that count (at least 1)."""
        return max(float(self.included[rows].sum()), 1.0)

    @abstractmethod
    def target_probs(self, rows: Tensor) -> Tensor | None:
        """The composed target q [B, C] of each text; None where the method has none (uhc)."""

    @property
    def num_excluded(self) -> int:
        return self._num_excluded

    _num_excluded = 0

    def _exclude(self, excluded: Tensor) -> None:
        self.included = (~excluded).float()
        self._num_excluded = int(excluded.sum())
        if self._num_excluded == len(excluded):
            raise UserError(
                f"--method {self.config.method}: none of the {len(excluded)} labels is a class of the teachers "
                f"({', '.join(self.label_space.names[:5])}, ...): rename them with --label_map or choose --label_column"
            )
        if self._num_excluded:
            log.warning(
                "%s: %d of %d texts have a label that no teacher owns; they are left out (weight 0)",
                self.config.method,
                self._num_excluded,
                len(excluded),
            )


class Composed(Method):
    """A target composed from teacher probabilities [B, S] and scores [n, N]: KL(q, softmax(student / T)) (MUKA, eq. 3
    to 6)."""

    soft = False
    weighted = False  # times (teacher margin + 1e-6)
    loss_scale = 1.0

    scores: Tensor  # [n, N]
    offsets: list[int]

    def _trust(self, scores: Tensor) -> None:
        self.scores, self.offsets = scores, list(self.sup.offsets)
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
            self.teacher_probs(rows).to(device),
            self.scores[rows].to(device),
            self.offsets,
            self.union_on(device),
            soft=self.soft,
            tau=self.config.score_temperature,
            temperature=self.temperature,
            margin=self.weighted,
        )
        return loss * self.loss_scale if self.loss_scale != 1.0 else loss

    def target_probs(self, rows: Tensor) -> Tensor:
        return distill_target_ref(
            self.teacher_probs(rows),
            self.scores[rows],
            self.offsets,
            self.teacher_to_union,
            self.label_space.num_classes,
            self.soft,
            self.config.score_temperature,
        )


class MukaHard(Composed):
    """muka-hard: the target of the most certain teacher; scores of `--uncertainty`, optionally weighted by the
    teacher margin."""

    def __init__(self, config: RunConfig, sup: Supervision, label_space: LabelSpace, label_ids: Tensor | None) -> None:
        super().__init__(config, sup, label_space, label_ids)
        self.weighted = config.margin
        self._trust(teacher_scores(sup, config.uncertainty))

    def weights(self, rows: Tensor) -> Tensor:
        return self.margin[rows] + MARGIN_FLOOR if self.weighted else super().weights(rows)

    def denominator(self, rows: Tensor) -> float:
        """The number of texts (published), or with normalize_margin the sum of the weights, i.e. B times the batch
        mean of m."""
        if self.weighted and self.config.normalize_margin:
            return float(self.weights(rows).double().sum())
        return super().denominator(rows)


class MukaSoft(MukaHard):
    """muka-soft: all teachers' targets, mixed by softmax(scores / score_temperature)."""

    soft = True


class Oracle(Composed):
    """Upper line: the teacher that owns the true label. Of several owners the one with the highest score, as
    muka-hard would."""

    needs_labels = True

    def __init__(self, config: RunConfig, sup: Supervision, label_space: LabelSpace, label_ids: Tensor | None) -> None:
        super().__init__(config, sup, label_space, label_ids)
        measure = config.uncertainty if config.uncertainty not in NEEDS_SAMPLES else "predictive_entropy"
        owned = owners(label_space)[:, label_ids.clamp_min(0)].T  # [n, N]
        best = select_teacher_ref(torch.where(owned, teacher_scores(sup, measure), -1.0))[0]
        self._trust(torch.nn.functional.one_hot(best, len(sup.teachers)).float())
        self.margin = None  # one-hot scores have no gap worth reporting


class VanillaKD(Composed):
    """vkd: KL x T^2 to one distribution over all teachers' columns, softmax(all logits / T); overlapping classes add
    up."""

    def __init__(self, config: RunConfig, sup: Supervision, label_space: LabelSpace, label_ids: Tensor | None) -> None:
        super().__init__(config, sup, label_space, label_ids)
        self._trust(torch.ones(len(sup.logits), 1))
        self.offsets = [0, sup.offsets[-1]]
        self.loss_scale = self.temperature**2
        # Selection, for reports only: the teacher of the largest logit.
        starts = torch.tensor(sup.offsets[1:-1])
        self.selected, self.margin = torch.bucketize(sup.logits.argmax(-1), starts, right=True), None

    def teacher_probs(self, rows: Tensor) -> Tensor:
        return tempered_softmax(self.sup.logits[rows], self.temperature)


class UnifiedHead(Method):
    """uhc: per teacher, KL from softmax(z_i / T) to the student restricted to L_i and renormalised; their sum x T^2.

    Vongkulbhisal et al., 2019, "Unifying heterogeneous classifiers with distillation". It never says which teacher is
    right: no selection, and no composed target.
    """

    def __init__(self, config: RunConfig, sup: Supervision, label_space: LabelSpace, label_ids: Tensor | None) -> None:
        super().__init__(config, sup, label_space, label_ids)
        blocks = itertools.pairwise(sup.offsets)
        # Per teacher its union classes, sorted, and the place of each of its columns among them (merged ones share it).
        self.blocks = [(slice(a, b), *self.teacher_to_union[a:b].unique(return_inverse=True)) for a, b in blocks]

    def _loss(self, output: StudentOutput, rows: Tensor) -> Tensor:
        student = output.logits if output.logits.dtype == torch.float64 else output.logits.float()
        logits = self.sup.logits[rows].to(student)
        total = student.new_zeros(len(student))
        for columns, classes, place in self.blocks:
            probs = tempered_softmax(logits[:, columns], self.temperature)
            q = probs.new_zeros(len(probs), len(classes)).index_add(1, place.to(probs.device), probs)
            log_p = torch.log_softmax(student[:, classes.to(student.device)] / self.temperature, dim=-1)
            total = total + (torch.special.xlogy(q, q) - torch.where(q == 0, torch.zeros_like(q), q * log_p)).sum(-1)
        return total * self.temperature**2

    def target_probs(self, rows: Tensor) -> None:
        return None


class Supervised(Method):
    """Upper line: cross-entropy with the true label; texts whose label is not a class of the student have weight 0."""

    needs_labels = True

    def _loss(self, output: StudentOutput, rows: Tensor) -> Tensor:
        labels = self.label_ids[rows].clamp_min(0).to(output.logits.device)
        logits = output.logits if output.logits.dtype == torch.float64 else output.logits.float()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    def target_probs(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(self.label_ids[rows].clamp_min(0), self.label_space.num_classes).float()


METHODS: dict[str, type[Method]] = {
    "muka-soft": MukaSoft,
    "muka-hard": MukaHard,
    "vkd": VanillaKD,
    "uhc": UnifiedHead,
    "supervised": Supervised,
    "oracle": Oracle,
}


def build_method(
    config: RunConfig, sup: Supervision, label_space: LabelSpace, labels: Sequence[str] | None = None
) -> Method:
    """The method `config.method` over the store's texts; labels: the true label of every text, for supervised and
    oracle.

    A label map's dropped columns leave each teacher's softmax (its logits are restricted), merged columns add up.
    Raises UserError for an unknown method, or when it needs labels and there are none that match.
    """
    if config.method not in METHODS:
        raise UserError(f"unknown --method {config.method!r}: {choices(config.method, METHODS)}")
    factory = METHODS[config.method]
    if factory.needs_labels and labels is None:
        raise UserError(f"--method {config.method} needs true labels: give texts with a label column (--label_column)")
    if labels is not None and len(labels) != len(sup.logits):
        raise ValueError(f"{len(labels)} labels for {len(sup.logits)} texts")
    ids = None if labels is None else label_ids(labels, label_space)
    return factory(config, sup.restrict(label_space), label_space, ids)


# ---- shared arithmetic ----


def tempered_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(logits / temperature) over the last dimension; the maximum goes first, so that large logits keep their
    digits."""
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)


def block_softmax(logits: Tensor, offsets: Sequence[int], temperature: float = 1.0) -> Tensor:
    """tempered_softmax over each teacher's own columns: [B, S] -> [B, S]."""
    return torch.cat([tempered_softmax(logits[:, a:b], temperature) for a, b in itertools.pairwise(offsets)], dim=-1)


# ---- how good the supervision is, where true labels are known ----


def target_accuracy(method: Method, labels: Sequence[str], label_space: LabelSpace, chunk: int = 8192) -> float | None:
    """Share of texts whose composed target has its maximum at the true label, among texts whose label some teacher
    owns.

    None where the method composes no target (uhc) or no label is known.
    """
    truth = label_ids(labels, label_space)
    rows, hits = torch.nonzero(truth >= 0).flatten(), 0
    for part in rows.split(chunk):
        target = method.target_probs(part)
        if target is None:
            return None
        hits += int((target.argmax(-1) == truth[part]).sum())
    return hits / len(rows) if len(rows) else None


def selection_accuracy(method: Method, labels: Sequence[str], label_space: LabelSpace) -> float | None:
    """Share of texts whose selected teacher owns the true label, among texts whose label some teacher owns; None: no
    selection."""
    truth = label_ids(labels, label_space)
    known = truth >= 0
    if method.selected is None or not known.any():
        return None
    return owners(label_space)[method.selected[known], truth[known]].double().mean().item()


def vote_accuracy(sup: Supervision, labels: Sequence[str], label_space: LabelSpace) -> float | None:
    """Accuracy of the concatenated-logit vote: argmax of softmax(all kept logits), columns of one class added (the
    vkd target at T = 1)."""
    sup, truth = sup.restrict(label_space), label_ids(labels, label_space)
    known = truth >= 0
    probs = torch.softmax(sup.logits[known], dim=-1)
    union = torch.as_tensor(label_space.teacher_to_union, dtype=torch.int64)
    votes = probs.new_zeros(len(probs), label_space.num_classes).index_add(1, union, probs).argmax(-1)
    return (votes == truth[known]).double().mean().item() if known.any() else None
