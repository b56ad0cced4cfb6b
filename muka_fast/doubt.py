"""--uncertainty_head: the student learns how much its teachers doubt, and tells it in the forward that gives the logits.

Two figures a text, in the order of NAMES; high = doubtful:

    uncertainty   u = min_i u_i, what --uncertainty measures (default: mutual information) of the teacher that is least uncertain
    distance      -max_i A_i(RMD): how far the text lies from the classes of every teacher (relative Mahalanobis distance, evidence.py)

They are learnt as ranks in the pool, r = (rank - 1/2) / n in (0, 1), whatever their scale: 0.9 means more doubtful than nine tenths of
the training texts. With f the feature that the student's output layer reads, kept out of the gradient of the student, and z = V f + c,

    loss of a text   1/2 sum_j -r_j ln sigmoid(z_j) - (1 - r_j) ln(1 - sigmoid(z_j))

summed over the texts of the global batch and divided by their number: all count, those that the method leaves out as well. The head
travels beside the student in FILE; plain transformers never sees it.

n texts of the store · B texts of a batch · D width of f.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from muka_fast import checkpoint
from muka_fast.aligned import StudentOutput
from muka_fast.errors import UserError
from muka_fast.pooled import classifier_layer, head_input, last_feature

FILE = "uncertainty_head.safetensors"
FORMAT = "muka_fast uncertainty head 1"
NAMES = ("uncertainty", "distance")
LEARNING_RATE = 1e-3  # of the head
WEIGHT = 0.01  # of its loss: Adam does not feel it, and the clipping of the joint gradient hardly feels the head


class Doubt:
    """What the uncertainty head of a run learns. targets: fp32 [n, 2] in [0, 1], as `coverage.doubt_ranks` gives them."""

    def __init__(self, targets: np.ndarray) -> None:
        self.targets = torch.from_numpy(targets)

    def loss(self, said: Tensor, rows: Tensor) -> Tensor:
        """Loss per text [B], WEIGHT included, before any mean; said: the head's z [B, 2]; rows: of these texts, int64 [B]."""
        targets = self.targets[rows.cpu()].to(said)
        return WEIGHT * nn.functional.binary_cross_entropy_with_logits(said, targets, reduction="none").mean(-1)


class UncertainStudent(nn.Module):
    """What a method trains (the student, or a module that holds it) and the uncertainty head, as one module for one engine."""

    def __init__(self, trained: nn.Module, student: nn.Module) -> None:
        """student: the classifier inside `trained`, or `trained` itself."""
        super().__init__()
        self.trained = trained
        self.inside = [student, classifier_layer(student)]  # in a list: no second name for its weights
        self.uncertainty_head = nn.Linear(self.inside[1].in_features, len(NAMES))
        for parameter in self.uncertainty_head.parameters():
            nn.init.zeros_(parameter)  # every text half doubtful: nothing is drawn, and nothing shifts the student's dropout
            parameter.base_lr = LEARNING_RATE

    @property
    def config(self) -> Any:
        return self.inside[0].config

    def forward(self, **batch: Tensor) -> StudentOutput:
        """batch: what the method's module takes, input_ids and attention_mask [B, L] among it."""
        with head_input(self.inside[1]) as seen:
            output = self.trained(**batch)
        feature = last_feature(self.inside[0], seen[0], batch["input_ids"], batch["attention_mask"])
        said = self.uncertainty_head(feature.detach().to(self.uncertainty_head.weight.dtype))
        return StudentOutput(output.logits, getattr(output, "penalty", None), said.float())

    @staticmethod
    def split(state: Mapping[str, Tensor] | None) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
        """The weights of `trained` and those of the head, each under their own names; None stays None."""
        if state is None:
            return None, None
        parts = {"trained.": {}, "uncertainty_head.": {}}
        for name, value in state.items():
            prefix = next(prefix for prefix in parts if name.startswith(prefix))
            parts[prefix][name.removeprefix(prefix)] = value
        return parts["trained."], parts["uncertainty_head."]


# ---- beside the exported student ----


def overall(said: Tensor) -> Tensor:
    """One doubt per text [B] from the head's two [B, 2]: their mean."""
    return said.mean(-1)


@dataclass(frozen=True)
class UncertaintyHead:
    """The affine map of a finished student: V [2, D] and c [2], fp32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """sigmoid(V f + c), [B, 2] in [0, 1]; features [B, D] of any float type."""
        weight = self.weight.to(features.device)
        return torch.sigmoid(features.float() @ weight.T + self.bias.to(features.device))

    def save(self, folder: Path) -> None:
        """Write FILE into a folder."""
        from safetensors.torch import save_file

        tensors = {"weight": self.weight.float().contiguous(), "bias": self.bias.float().contiguous()}
        save_file(tensors, folder / FILE, {"format": FORMAT, "outputs": json.dumps(NAMES)})

    @classmethod
    def load(cls, folder: Path, model: nn.Module) -> UncertaintyHead | None:
        """The head beside a student, which is `model`; None where there is none.

        Raises UserError for a file that is damaged, of another version, or of another model.
        """
        path = folder / FILE
        if not path.exists():
            return None
        checkpoint.read_header(path, f"--model {folder}")
        try:
            with safe_open(path, "pt") as file:
                told, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({checkpoint.first_line(error)}); export the student again") from error
        if told.get("format") != FORMAT or told.get("outputs") != json.dumps(NAMES):
            raise UserError(f"{path}: is no uncertainty head of this version ({FORMAT}); remove it, or export the student again")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        width = classifier_layer(model).in_features
        if shapes != {"weight": (len(NAMES), width), "bias": (len(NAMES),)}:
            raise UserError(f"{path}: its tensors {shapes} do not fit a student of {width} features; it is another student's")
        if not all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError(f"{path}: holds numbers that are not finite fp32; export the student again")
        return cls(tensors["weight"], tensors["bias"])


def with_head(model: nn.Module, head: UncertaintyHead) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A forward that gives logits and what the head says side by side, [B, C + 2], for `evaluate.predict`."""
    layer = classifier_layer(model)

    def forward(inputs: Mapping[str, Tensor]) -> Tensor:
        with head_input(layer) as seen:
            logits = model(**inputs).logits
        said = head(last_feature(model, seen[0], inputs["input_ids"], inputs["attention_mask"]))
        return torch.cat([logits.float(), said], dim=1)

    return forward


# ---- how well doubt tells texts apart ----


def auroc(doubt: np.ndarray, foreign: np.ndarray) -> float | None:
    """Probability that a foreign text is more doubtful than another one, ties half; None where there is one kind only.

    doubt [n]; foreign bool [n].
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(foreign, doubt)) if 0 < foreign.sum() < len(foreign) else None


def false_positive_rate(doubt: np.ndarray, foreign: np.ndarray, kept: float = 0.95) -> float | None:
    """Share of the foreign texts that pass where at least `kept` of the others pass (FPR at 95 %), texts passing up to a doubt.

    None where there is one kind only. doubt [n]; foreign bool [n].
    """
    if not 0 < foreign.sum() < len(foreign):
        return None
    own = np.sort(doubt[~foreign])
    threshold = own[int(np.ceil(kept * len(own))) - 1]
    return float((doubt[foreign] <= threshold).mean())
