"""--uncertainty_head: the student learns how much its teachers doubt, and tells it in the forward that gives the logits.

From the finished student's features f, which its output layer reads, and the classes c that it predicts, over the training texts:

    s = maha(f; mu_c, S) of the nearest class - maha(f; mu, S0)     relative Mahalanobis distance (Ren et al., 2021; evidence.py)
    doubt = sigmoid(a arsinh((s - m) / d) + c)                      m, d: mean and standard deviation of s over the texts

where a >= 0 and c minimise the sum over the texts of -r ln doubt - (1 - r) ln(1 - doubt), r in (0, 1) being the teachers' doubt:
the mean of two ranks in the pool (coverage.doubt_ranks). So doubt is on the teachers' scale, and outside of the pool it follows the
distance; arsinh, as distances there are tens of d, where the sigmoid would give 1 to all. An affine map from f to r, trained beside
the student, fits the pool well and tells nothing of other texts (docs/measured.md, "Doubt"). For mu and S a text counts (top
probability of the student)^4, one that belongs to no teacher (--coverage) not at all; a and c are fitted to all of them.

Nothing of it reaches the student's weights. It travels beside the student in FILE; plain transformers never sees it.

n texts · B texts of a batch · D width of f · C classes of the student, G of them predicted at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from muka_fast.errors import UserError, first_line
from muka_fast.pooled import classifier_layer, head_input, student_feature, student_reads

FILE = "uncertainty_head.safetensors"
FORMAT = "muka_fast uncertainty head 2"
KEPT = 0.95  # of the texts that are not foreign, in `false_positive_rate`


@dataclass(frozen=True)
class UncertaintyHead:
    """The Gaussians of a student's features and the map to doubt, fp32."""

    mean: Tensor  # [D], this and the next three as in evidence.RelativeMahalanobis
    form: Tensor  # [D, D]
    pull: Tensor  # [D, G]
    offset: Tensor  # [G]
    scale: Tensor  # m, d, a, c [4]

    @classmethod
    def fit(cls, features: np.ndarray, logits: np.ndarray, ranks: np.ndarray, counts: np.ndarray | None = None) -> UncertaintyHead:
        """features [n, D], logits [n, C] of the student; ranks [n] in (0, 1), the teachers' doubt; counts [n] of 0 and 1: texts
        that the Gaussians are fitted on (default: all)."""
        # Here, as it brings scikit-learn, which is slow to import and which no prediction needs.
        from muka_fast.evidence import CERTAINTY, RelativeMahalanobis

        top = np.exp(logits.max(1) - np.logaddexp.reduce(logits.astype(np.float64), axis=1)) ** CERTAINTY
        used = np.ones(len(logits), bool) if counts is None else counts > 0
        gaussians = RelativeMahalanobis.fit(features[used], logits[used].argmax(1), top[used])
        scale = logistic_scale(-gaussians.scores(features.astype(np.float32)), ranks).astype(np.float32)
        return cls(*map(torch.from_numpy, (gaussians.mean, gaussians.form, gaussians.pull, gaussians.offset, scale)))

    @property
    def tells(self) -> bool:
        """Whether any two texts get different doubt."""
        return bool(self.scale[2] > 1e-6)

    def __call__(self, features: Tensor) -> Tensor:
        """doubt [B] in [0, 1]; features [B, D] of any float type."""
        # In fp64, as it was fitted: of a form with large entries fp32 leaves little.
        mean, form, pull, offset, scale = (getattr(self, field.name).to(features.device).double() for field in fields(self))
        x = features.double() - mean
        distance = -((x @ form) * x).sum(1) - (x @ pull - offset).amax(1)
        return torch.sigmoid(scale[2] * torch.asinh((distance - scale[0]) / scale[1]) + scale[3]).float()

    def save(self, folder: Path) -> None:
        """Write FILE into a folder."""
        from safetensors.torch import save_file

        save_file({field.name: getattr(self, field.name).contiguous() for field in fields(self)}, folder / FILE, {"format": FORMAT})

    @classmethod
    def load(cls, folder: Path, model: nn.Module) -> UncertaintyHead | None:
        """The head beside a student, which is `model`; None where there is none.

        Raises UserError for a file that is damaged, of another version, or of another model.
        """
        path = folder / FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                told, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({first_line(error)}); export the student again") from error
        if told.get("format") != FORMAT:
            raise UserError(f"{path}: is no uncertainty head of this version ({FORMAT}); remove it, or export the student again")
        layer = classifier_layer(model)
        D, G = layer.in_features, tensors["offset"].numel() if "offset" in tensors else 0
        expected = {"mean": (D,), "form": (D, D), "pull": (D, G), "offset": (G,), "scale": (4,)}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != expected or not 1 <= G <= layer.out_features:
            raise UserError(f"{path}: its tensors {shapes} do not fit a student of {D} features; it is another student's")
        if not all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError(f"{path}: holds numbers that are not finite fp32; export the student again")
        return cls(**tensors)


def logistic_scale(distance: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """(m, d, a, c) float64: mean and standard deviation of distance [n], and the a >= 0 and c that fit ranks [n] best.

    a = 0, the same doubt for all, where the ranks do not rise with the distance or the distances do not differ.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import, and no prediction needs it

    m, d, odds = distance.mean(dtype=np.float64), distance.std(dtype=np.float64), np.log(ranks.mean() / (1 - ranks.mean()))
    if d <= 1e-6 * max(1.0, abs(m)):
        return np.array([m, 1.0, 0.0, odds])
    x, n = np.arcsinh((distance - m) / d)[:, None], len(distance)
    if ((ranks - ranks.mean()) * x[:, 0]).mean(dtype=np.float64) <= 1e-6:  # the slope at a = 0: scikit-learn warns where it is none
        return np.array([m, d, 0.0, odds])
    fit = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-9)  # of each text once as unsure, once as sure
    fit.fit(np.concatenate([x, x]), np.repeat([1, 0], n), np.concatenate([ranks, 1 - ranks]))
    return np.array([m, d, fit.coef_[0, 0], fit.intercept_[0]])


# ---- forwards ----


def with_features(model: nn.Module) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A forward that gives logits and features side by side, [B, C + D], for `evaluate.predict`."""
    layer, reads = classifier_layer(model), student_reads(model)

    def forward(inputs: Mapping[str, Tensor]) -> Tensor:
        with head_input(layer) as seen:
            logits = model(**inputs).logits
        feature = student_feature(model, seen[0], reads, inputs["input_ids"], inputs["attention_mask"])
        return torch.cat([logits.float(), feature.float()], dim=1)

    return forward


def with_head(model: nn.Module, head: UncertaintyHead) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A forward that gives logits and doubt side by side, [B, C + 1], for `evaluate.predict`."""
    both, num_labels = with_features(model), model.config.num_labels

    def forward(inputs: Mapping[str, Tensor]) -> Tensor:
        found = both(inputs)
        return torch.cat([found[:, :num_labels], head(found[:, num_labels:])[:, None]], dim=1)

    return forward


# ---- how well doubt tells texts apart ----


def auroc(doubt: np.ndarray, foreign: np.ndarray) -> float | None:
    """Probability that a foreign text is more doubtful than another one, ties half; None where there is one kind only.

    doubt [n]; foreign bool [n].
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(foreign, doubt)) if 0 < foreign.sum() < len(foreign) else None


def false_positive_rate(doubt: np.ndarray, foreign: np.ndarray) -> float | None:
    """Share of the foreign texts that pass where at least KEPT of the others pass (FPR at 95 %), texts passing up to a doubt.

    None where there is one kind only. doubt [n]; foreign bool [n].
    """
    if not 0 < foreign.sum() < len(foreign):
        return None
    own = np.sort(doubt[~foreign])
    threshold = own[int(np.ceil(KEPT * len(own))) - 1]
    return float((doubt[foreign] <= threshold).mean())
