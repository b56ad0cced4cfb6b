"""Methods: from the supervision store to the target and the loss of every text (MUKA, arXiv 2112.07327; MUKI, arXiv
2210.05230).

Letters: n texts of the store · B rows of a batch · N teachers (i) · S kept teacher columns · C classes of the student
· T kd_temperature. What they have in common is in targets.py.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from muka_fast.aligned import AlignedStudent, Alignment, AmalgamatedFeature, CommonFeatures, StudentOutput
from muka_fast.auto import auto_weights
from muka_fast.errors import UserError
from muka_fast.evidence import evidence_weights
from muka_fast.memory import send
from muka_fast.ops.reference import select_teacher_ref
from muka_fast.selection import label_ids, owners, sampled, uncertainties
from muka_fast.store import half
from muka_fast.targets import Composed, Method, tempered_softmax, text_weights

if TYPE_CHECKING:
    from muka_fast.config import RunConfig
    from muka_fast.labels import LabelSpace
    from muka_fast.stored import Supervision

log = logging.getLogger("muka_fast")
CHUNK = 8192  # texts whose targets are composed at once to be looked at
MARGIN_FLOOR = 1e-6  # as published: a text whose two best teachers tie still counts a little


# ---- the methods ----


class MukaHard(Composed):
    """muka-hard: the target of the most certain teacher; scores of `--uncertainty`, optionally weighted by the
    teacher margin."""

    options = (*Composed.options, "uncertainty", "margin", "normalize_margin")

    def __init__(self, config: RunConfig, sup: Supervision, label_space: LabelSpace, label_ids: Tensor | None) -> None:
        super().__init__(config, sup, label_space, label_ids)
        self.weighted = config.margin
        if len(sup.teachers) > 1 and 1 in sup.class_counts:
            alone = label_space.teacher_names[sup.class_counts.index(1)]
            told = "teacher %s has one class, so that it is never in doubt: --method %s trusts it most on every text"
            log.warning(told, alone, config.method)
        self._trust(-uncertainties(sup, config.uncertainty))

    def denominator(self, rows: Tensor) -> float:
        """The number of texts (published), or with normalize_margin the sum of the weights, i.e. B times the batch
        mean of m."""
        if self.weighted and self.config.normalize_margin:
            return float((self.margin[rows] + MARGIN_FLOOR).double().sum())
        return super().denominator(rows)


class MukaSoft(MukaHard):
    """muka-soft: all teachers' targets, mixed by softmax(scores / score_temperature)."""

    options = (*MukaHard.options, "score_temperature")
    soft = True


class RuledSoft(Composed):
    """All teachers' targets, mixed by weights w [n, N] that a rule drew from the whole pool: q = sum_i w_i pad(p^_i); each text's loss
    times what it counts (`text_weights`)."""

    options = (*Composed.options, "neutral_encoder", "teacher_balance")
    soft = True

    def __init__(
        self,
        config: RunConfig,
        sup: Supervision,
        label_space: LabelSpace,
        label_ids: Tensor | None,
        weights: np.ndarray,
    ) -> None:
        super().__init__(config, sup, label_space, label_ids)
        weights = torch.from_numpy(weights)
        self._trust(weights.clamp_min(1e-30).log())  # the op takes the softmax of scores over tau
        self.tau = 1.0
        self.margin = select_teacher_ref(weights)[1]
        held = weights.sum(-1)
        if not (held >= 0.5).all():
            self._leave_out(held < 0.5, "belong to no teacher by the rule")
        self.balance = text_weights(weights, self.included > 0, config.teacher_balance)
        mine = [self.balance[(self.selected == i) & (self.included > 0)] for i in range(len(sup.teachers))]
        parts = zip(label_space.teacher_names, mine, strict=True)
        told = [f"{name} {b.mean():.2f} ({len(b)} text{'s' * (len(b) > 1)})" for name, b in parts if len(b)]
        if len(mine) > 1:
            log.info("weight of a text, by its teacher: %s; --teacher_balance 0 weighs all alike", ", ".join(told))

    def _loss(self, output: StudentOutput, rows: Tensor) -> Tensor:
        loss = super()._loss(output, rows)
        return loss * send(self.balance[rows], loss.device).to(loss)


class MukaEvidence(RuledSoft):
    """muka-evidence: weights from the pool's evidence (muka_fast/evidence.py)."""

    rule = staticmethod(lambda sup, neutral, seed, names: evidence_weights(sup, neutral, seed))


class MukaAuto(RuledSoft):
    """muka-auto: weights from a pool of three answers, by class, teacher and class names (muka_fast/auto.py)."""

    rule = staticmethod(lambda sup, neutral, seed, names: auto_weights(sup, neutral, seed, names=names()))


class Oracle(Composed):
    """Upper bound: the teacher that owns the true label. Of several owners the one with the highest score, as muka-hard would;
    after a single pass by predictive entropy."""

    options = (*Composed.options, "uncertainty")
    needs_labels = True

    def __init__(self, config: RunConfig, sup: Supervision, label_space: LabelSpace, label_ids: Tensor | None) -> None:
        super().__init__(config, sup, label_space, label_ids)
        measure = config.uncertainty if all(map(sampled, sup.teachers)) else "predictive_entropy"
        owned = owners(label_space)[:, label_ids.clamp_min(0)].T  # [n, N]
        best = select_teacher_ref(torch.where(owned, -uncertainties(sup, measure), -torch.inf))[0]
        self._trust(torch.nn.functional.one_hot(best, len(sup.teachers)).float())
        self.margin = None  # one-hot scores have no gap worth reporting


class VanillaKD(Composed):
    """vkd: KL x T^2 to one distribution over all teachers' columns, softmax(all logits / T); overlapping classes add
    up."""

    options = ("kd_temperature",)

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


class TiedFeatures(VanillaKD):
    """vkd, and the student's features tied to the teachers' by modules that are trained with it (muka_fast/aligned.py)."""

    alignment: type[Alignment]
    own_rates = True

    def __init__(self, config: RunConfig, sup: Supervision, label_space: LabelSpace, label_ids: Tensor | None) -> None:
        super().__init__(config, sup, label_space, label_ids)
        self.widths = [next(features.chunks())[1].shape[1] for features in sup.features]
        self.features = torch.empty(len(sup), sum(self.widths), dtype=torch.float16)  # [n, sum D_i]
        for features, columns in zip(sup.features, self.features.split(self.widths, 1), strict=True):
            for part, chunk in features.chunks():
                columns[part] = torch.from_numpy(half(chunk))

    def wrap(self, student: nn.Module) -> nn.Module:
        return AlignedStudent(student, self.alignment, self.widths, self.config.seed)

    def student_inputs(self, rows: Tensor) -> dict[str, Tensor]:
        return {"teacher_features": self.features[rows].float()}


class DFA(TiedFeatures):
    """dfa: vkd + two squared errors: of the auto-encoder over the teachers' features, and of the student's to its code."""

    alignment = AmalgamatedFeature


class CFL(TiedFeatures):
    """cfl: vkd + maximum mean discrepancy in a common space + squared error of the teachers' reconstructed features."""

    alignment = CommonFeatures
    needs_whole_batch = True


class MeanLogits(Composed):
    """mean: KL x T^2 to softmax(mean over teachers of z_i / T), for teachers of one label set, in whatever order each has it."""

    options = ("kd_temperature",)

    @staticmethod
    def check_space(label_space: LabelSpace) -> None:
        for name, labels in zip(label_space.teacher_names, label_space.teacher_labels, strict=True):
            lacking = sorted(set(label_space.names) - set(labels))
            if lacking or len(labels) != label_space.num_classes:
                fault = f"lacks {lacking[0]!r}" if lacking else "has two labels of one class"
                raise UserError(
                    f"--method mean needs teachers of one label set, but teacher {name!r} {fault}; choose another "
                    "method, or bring the labels in line with --label_map"
                )

    def __init__(self, config: RunConfig, sup: Supervision, label_space: LabelSpace, label_ids: Tensor | None) -> None:
        super().__init__(config, sup, label_space, label_ids)
        self.check_space(label_space)
        num_classes = label_space.num_classes
        self._trust(torch.ones(len(sup.logits), 1))
        self.offsets = [0, num_classes]
        self.loss_scale = self.temperature**2
        blocks = self.teacher_to_union.view(-1, num_classes).argsort(-1) + torch.tensor(sup.offsets[:-1])[:, None]
        self.columns = blocks  # [N, C]: of class c in teacher i
        self.teacher_to_union = torch.arange(num_classes)
        self.selected = self.margin = None

    def teacher_probs(self, rows: Tensor) -> Tensor:
        mean = self.sup.logits[rows][:, self.columns].double().mean(1)  # the sum of large logits rounds in fp32
        nothing = (mean == -torch.inf).all(-1, keepdim=True)
        return tempered_softmax(mean.masked_fill(nothing, 0.0), self.temperature).float()


class UnifiedHead(Method):
    """uhc: per teacher, KL from softmax(z_i / T) to the student restricted to L_i and renormalised; their sum x T^2.

    Vongkulbhisal et al., 2019, "Unifying heterogeneous classifiers with distillation". It never says which teacher is
    right: no selection, and no composed target.
    """

    options = ("kd_temperature",)

    def __init__(self, config: RunConfig, sup: Supervision, label_space: LabelSpace, label_ids: Tensor | None) -> None:
        super().__init__(config, sup, label_space, label_ids)
        blocks = itertools.pairwise(sup.offsets)
        # Per teacher its union classes, sorted, and the place of each of its columns among them (merged ones share it).
        self.blocks = [(slice(a, b), *self.teacher_to_union[a:b].unique(return_inverse=True)) for a, b in blocks]

    def _loss(self, output: StudentOutput, rows: Tensor) -> Tensor:
        student = output.logits if output.logits.dtype == torch.float64 else output.logits.float()
        logits = send(self.sup.logits[rows], student.device).to(student)
        total = student.new_zeros(len(student))
        for columns, classes, place in self.blocks:
            probs = tempered_softmax(logits[:, columns], self.temperature)
            q = probs.new_zeros(len(probs), len(classes)).index_add(1, send(place, probs.device), probs)
            log_p = torch.log_softmax(student[:, send(classes, student.device)] / self.temperature, dim=-1)
            total = total + (torch.special.xlogy(q, q) - torch.where(q == 0, torch.zeros_like(q), q * log_p)).sum(-1)
        return total * self.temperature**2

    def target_probs(self, rows: Tensor) -> None:
        return None


class Supervised(Method):
    """Upper bound: cross-entropy with the true label; texts whose label is not a class of the student have weight 0."""

    needs_labels = True

    def _loss(self, output: StudentOutput, rows: Tensor) -> Tensor:
        labels = send(self.label_ids[rows].clamp_min(0), output.logits.device)
        logits = output.logits if output.logits.dtype == torch.float64 else output.logits.float()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    def target_probs(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(self.label_ids[rows].clamp_min(0), self.label_space.num_classes).float()


METHODS: dict[str, type[Method]] = {
    "muka-soft": MukaSoft,
    "muka-hard": MukaHard,
    "muka-evidence": MukaEvidence,
    "muka-auto": MukaAuto,
    "vkd": VanillaKD,
    "uhc": UnifiedHead,
    "dfa": DFA,
    "cfl": CFL,
    "mean": MeanLogits,
    "supervised": Supervised,
    "oracle": Oracle,
}


def neutral_encoder(config: RunConfig) -> str | None:
    """The encoder whose features the method's rule looks at; None where it has no rule."""
    return None if METHODS[config.method].rule is None else config.neutral_encoder or config.student


def unused_options(config: RunConfig) -> list[str]:
    """The options of single methods that this run does not look at."""
    used = set(METHODS[config.method].options)
    if config.mc_stop is not None or config.uncertainty_head:
        used.add("uncertainty")
    if not config.margin:
        used.discard("normalize_margin")
    return [name for name in dict.fromkeys(name for method in METHODS.values() for name in method.options) if name not in used]


def build_method(
    config: RunConfig,
    sup: Supervision,
    label_space: LabelSpace,
    labels: Sequence[str] | None = None,
    weights: np.ndarray | None = None,
) -> Method:
    """The method `config.method` over the store's texts.

    labels: the true label of every text, for supervised and oracle. weights: what the method's rule gives for the
    restricted supervision, fp32 [n, N], for methods that have one.
    A label map's dropped columns leave each teacher's softmax (its logits are restricted), merged columns add up.
    Raises UserError where it needs labels and there are none that match.
    """
    factory = METHODS[config.method]
    if factory.needs_labels and labels is None:
        raise UserError(f"--method {config.method} needs true labels: give texts with a label column (--label_column)")
    if labels is not None and len(labels) != len(sup.logits):
        raise ValueError(f"{len(labels)} labels for {len(sup.logits)} texts")
    if (factory.rule is None) != (weights is None):
        raise ValueError(f"--method {config.method}: weights are for methods with a rule, and only for them")
    ids = None if labels is None else label_ids(labels, label_space)
    args = (config, sup.restrict(label_space), label_space, ids)
    method = factory(*args) if weights is None else factory(*args, weights)
    if idle := idle_teachers(method):
        told = f"teacher{'s' * (len(idle) > 1)} {', '.join(idle)}"
        log.warning("%s: trusted most on no text, so that the student hardly learns what no other teacher knows", told)
    return method


def idle_teachers(method: Method) -> list[str]:
    """The teachers that no text which counts selects, of those that know a class alone; none where the method goes by no selection."""
    if method.selected is None or method.margin is None:
        return []
    chosen = torch.bincount(method.selected[method.included > 0], minlength=len(method.sup.teachers))
    owned, names = method.label_space.owned, method.label_space.teacher_names
    alone = owned[:, owned.sum(0) == 1].any(1)
    return [name for name, count, own in zip(names, chosen.tolist(), alone, strict=True) if own and not count]


# ---- how good the supervision is, where true labels are known ----


def target_accuracy(method: Method, labels: Sequence[str], label_space: LabelSpace) -> float | None:
    """Share of texts whose composed target has its maximum at the true label, among texts that count and whose label some teacher
    owns.

    None where the method composes no target (uhc) or no label is known.
    """
    truth = label_ids(labels, label_space)
    rows, hits = torch.nonzero((truth >= 0) & (method.included > 0)).flatten(), 0
    for part in rows.split(CHUNK):
        target = method.target_probs(part)
        if target is None:
            return None
        hits += int((target.argmax(-1) == truth[part]).sum())
    return hits / len(rows) if len(rows) else None


def selection_accuracy(method: Method, labels: Sequence[str], label_space: LabelSpace) -> float | None:
    """Share of texts whose selected teacher owns the true label, among texts that count and whose label some teacher owns; None: no
    selection."""
    truth = label_ids(labels, label_space)
    known = (truth >= 0) & (method.included > 0)
    if method.selected is None or not known.any():
        return None
    return owners(label_space)[method.selected[known], truth[known]].double().mean().item()

