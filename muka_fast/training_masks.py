"""Dropout in training on a CPU by the mask contract of the scores: a text's masks follow from seed, epoch, row and site.

So neither a cut into batches nor the number of processes nor a resume changes one. PyTorch draws its masks on one thread, which is an
eighth of the time of a training step of MiniLM-L6 on two cores. On a GPU dropout is that of fused_layers.py, or PyTorch's.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from muka_fast.first_token import covered_calls
from muka_fast.fused_layers import MOST
from muka_fast.intercept import intercept
from muka_fast.ops import table
from muka_fast.seeds import seed_of
from muka_fast.sites import Masks, sites_of_config

log = logging.getLogger("muka_fast")
NextTexts = Callable[[Tensor, int], None]


class TrainingMasks(Masks):
    """Masks where a module is in training mode."""

    def wants(self, module: nn.Module) -> bool:
        return module.training and super().wants(module)

    def apply(self, module: nn.Module, x: Tensor, p: float) -> Tensor:
        return super().apply(module, x, p) if module.training else x


@contextmanager
def training_masks(model: nn.Module, seed: int, device: torch.device) -> Iterator[NextTexts]:
    """Inside it the families of postln.py drop by the contract on a CPU, with the p of their configuration; others as PyTorch does. So
    does a layer that is called several times (ALBERT's) and recomputed, as the backward does that in another order.

    Gives what is to be told before every forward: the example ids int64 [B] of its texts, and the epoch 0, 1, ..., which is the
    contract's sample.
    """
    masks = _masks(model, seed) if device.type == "cpu" and covered_calls(model) else None
    if masks is None:
        yield lambda example_ids, epoch: None
        return
    with intercept(model, masks):
        yield masks.restart


def _masks(model: nn.Module, seed: int) -> TrainingMasks | None:
    sites = sites_of_config(model.config)
    recomputed = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    again = any(site.occurrence and isinstance(site.layer, int) for site in sites or [])
    slow = table.BACKEND == "auto" and table._C is None  # the reference is many times slower than PyTorch's dropout
    if slow or sites is None or (recomputed and again) or any(site.p > MOST for site in sites):
        log.info("dropout is PyTorch's: its masks depend on batches and on the number of processes")
        return None
    p_of_site = {site.index: site.p for site in sites if site.p > 0}
    no_texts = torch.zeros(0, dtype=torch.int64)
    return TrainingMasks(model, sites, p_of_site, seed_of(seed, "student"), no_texts, num_samples=1) if p_of_site else None
