"""What dfa and cfl train beside the student: modules that tie its features to those of the teachers; never exported.

B texts · D_s features of the student · D_i features of teacher i. The features are what the output layers read (pooled.py), where
the published scripts take every token's hidden states; layers, losses and their weights (1) are those of the scripts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from muka_fast.pooled import classifier_layer, head_input, student_feature, student_reads

LEARNING_RATE = 1e-3  # of these modules, as published
RBF_WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the mean squared distance


class StudentOutput(NamedTuple):
    """What a student returns for a batch: logits [B, C] and, where a method ties features, the loss of that, [B]."""

    logits: Tensor
    penalty: Tensor | None = None


class Alignment(nn.Module, ABC):
    """Modules that compare features of the student [B, D_s] with those of the teachers [B, sum D_i]: a loss per text, [B]."""

    def __init__(self, teacher_widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = list(teacher_widths)

    @abstractmethod
    def forward(self, student: Tensor, teachers: Tensor) -> Tensor: ...


class AmalgamatedFeature(Alignment):
    """dfa (Shen et al., 2019): an auto-encoder compresses the teachers' joint feature; the student's is drawn to the code."""

    def __init__(self, student_width: int, teacher_widths: Sequence[int]) -> None:
        super().__init__(teacher_widths)
        self.encoder = nn.Linear(sum(teacher_widths), student_width)
        self.decoder = nn.Linear(student_width, sum(teacher_widths))
        self.student = nn.Linear(student_width, student_width)

    def forward(self, student: Tensor, teachers: Tensor) -> Tensor:
        code = self.encoder(teachers)
        aligned = (self.student(student) - code.detach()).square().mean(-1)
        return aligned + reconstruction(self.decoder(code), teachers, self.widths)


class CommonFeatures(Alignment):
    """cfl (Luo et al., 2019): student and teachers meet in a space of D_s / 4, compared by the maximum mean discrepancy
    (MMD), from which the teachers' features are reconstructed.

    The discrepancy compares whole batches: it is added to every text's loss, and a batch must not be split.
    """

    def __init__(self, student_width: int, teacher_widths: Sequence[int]) -> None:
        super().__init__(teacher_widths)
        common = max(1, student_width // 4)
        self.align_teachers = nn.ModuleList(nn.Linear(width, common) for width in teacher_widths)
        self.align_student = nn.Linear(student_width, common)
        self.extractor = nn.Sequential(nn.Linear(common, common), nn.ReLU(), nn.Linear(common, common))
        self.decoders = nn.ModuleList(
            nn.Sequential(nn.Linear(common, width), nn.ReLU(), nn.Linear(width, width)) for width in teacher_widths
        )

    def forward(self, student: Tensor, teachers: Tensor) -> Tensor:
        mine = self.extractor(torch.relu(self.align_student(student)))
        parts = zip(self.align_teachers, teachers.split(self.widths, -1), strict=True)
        theirs = [self.extractor(torch.relu(align(part))) for align, part in parts]
        rebuilt = torch.cat([decode(code) for decode, code in zip(self.decoders, theirs, strict=True)], -1)
        return sum(discrepancy(mine, code) for code in theirs) + reconstruction(rebuilt, teachers, self.widths)


def reconstruction(rebuilt: Tensor, features: Tensor, widths: Sequence[int]) -> Tensor:
    """Sum over teachers of the mean squared error of their features, per text [B]."""
    errors = (rebuilt - features).square().split(list(widths), -1)
    return sum(error.mean(-1) for error in errors)


def discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """MMD^2 of two batches of directions [B, D] under a sum of five RBF kernels (biased estimate, >= 0); a scalar."""
    # In fp64: directions may be so close to each other that their distances, which the width is measured by, are fp32's rounding.
    both = normalize(torch.cat([x, y]).double(), dim=-1)
    # exp(0) on the diagonal, whose gradient is 0; cdist's would not be finite there.
    distances = (2 - 2 * both @ both.T).clamp_min(1e-12)
    width = distances.detach().mean().clamp_min(1e-12)
    kernel = sum(torch.exp(-distances / (2 * scale * width)) for scale in RBF_WIDTHS)
    n = len(x)
    return torch.relu((kernel[:n, :n] + kernel[n:, n:] - 2 * kernel[:n, n:]).mean())


class AlignedStudent(nn.Module):
    """The student and an alignment as one module, so that one engine trains, shards and saves both."""

    def __init__(self, student: nn.Module, alignment: type[Alignment], teacher_widths: Sequence[int], seed: int) -> None:
        """alignment: built with weights that depend on `seed` alone."""
        super().__init__()
        self.student = student
        self.output_layer = [classifier_layer(student)]  # in a list: no second name for its weights
        self.reads = student_reads(student)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.alignment = alignment(self.output_layer[0].in_features, teacher_widths)
        for parameter in self.alignment.parameters():
            parameter.base_lr = LEARNING_RATE

    @property
    def config(self) -> object:
        return self.student.config

    def forward(self, teacher_features: Tensor, **batch: Tensor) -> StudentOutput:
        """teacher_features [B, sum D_i]; batch: what the student takes, input_ids and attention_mask among it."""
        with head_input(self.output_layer[0]) as seen:
            logits = self.student(**batch).logits
        features = student_feature(self.student, seen[0], self.reads, batch["input_ids"], batch["attention_mask"])
        return StudentOutput(logits, self.alignment(features, teacher_features.to(features.dtype)).float())


def student_part(state: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The student's own weights from an AlignedStudent's, under their own names; None stays None."""
    if state is None:
        return None
    return {name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")}
