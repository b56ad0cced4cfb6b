"""Dropout in training on a CPU by the mask contract of the scores: a text's masks follow from seed, epoch, row and site.

So neither a cut into batches nor the number of processes nor a resume changes one. PyTorch draws its masks on one thread, which is an
eighth of the time of a training step of MiniLM-L6 on two cores. On a GPU dropout is that of fused_layers.py, or PyTorch's.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from muka_fast.first_token import covered_calls
from muka_fast.intercept import intercept
from muka_fast.sites import Masks, sites_of_config

NextTexts = Callable[[Tensor, int], None]


@contextmanager
def training_masks(model: nn.Module, seed: int, device: torch.device) -> Iterator[NextTexts]:
    """Inside it the families of postln.py drop by the contract on a CPU, others as PyTorch does; so does a layer that is called
    several times (ALBERT's) and recomputed, as the backward does that in another order.

    Gives what is to be told before every forward: the example ids int64 [B] of its texts, and the epoch 0, 1, ..., which is the
    contract's sample.
    """
    recomputed = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    covered = device.type == "cpu" and bool(covered_calls(model))
    sites = (sites_of_config(model.config) if covered else None) or []
    p_of_site = {site.index: site.p for site in sites if 0 < site.p < 1}
    again = any(site.occurrence and isinstance(site.layer, int) for site in sites)
    if not p_of_site or (recomputed and again):
        yield lambda example_ids, epoch: None
        return
    masks = Masks(model, sites, p_of_site, student_seed(seed), torch.zeros(0, dtype=torch.int64), 1)
    with intercept(model, masks):
        yield masks.restart


def student_seed(run_seed: int) -> int:
    """The 64-bit seed of the masks of whatever a run trains: no teacher's, whose seeds follow from their fingerprints."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:student".encode()).digest()[:8], "little")
