"""Dawid-Skene on the teachers' votes, an outside baseline: each teacher is an annotator that names its most probable class."""

import importlib.util

import numpy as np
import torch
from torch import Tensor

from muka_fast.labels import LabelSpace
from muka_fast.stored import Supervision

INSTALLED = importlib.util.find_spec("crowdkit") is not None


def votes(sup: Supervision, space: LabelSpace) -> Tensor:
    """The class in the label space that each teacher gives each text, int64 [n, N]."""
    sup, union = sup.restrict(space), torch.as_tensor(space.teacher_to_union)
    blocks = zip(sup.offsets[:-1], sup.offsets[1:], strict=True)
    return torch.stack([union[a + sup.logits[:, a:b].argmax(-1)] for a, b in blocks], dim=-1)


def aggregate(found: Tensor, rounds: int = 100) -> np.ndarray:
    """The class of each text, int64 [n], by expectation-maximisation over confusion matrices (Dawid and Skene, 1979).

    Raises ImportError where crowd-kit is not installed.
    """
    import pandas
    from crowdkit.aggregation import DawidSkene

    n, num_teachers = found.shape
    rows = {"task": np.repeat(np.arange(n), num_teachers), "worker": np.tile(np.arange(num_teachers), n)}
    labels = DawidSkene(n_iter=rounds).fit_predict(pandas.DataFrame(rows | {"label": found.flatten().numpy()}))
    return labels.sort_index().to_numpy(np.int64)
