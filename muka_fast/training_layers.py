"""A student's layers in training: fused on a GPU, and their dropout by the mask contract of the scores.

A text's masks follow from seed, epoch, row and site, so neither a cut into batches nor the number of processes nor a resume changes
one. On a CPU that is faster as well: PyTorch draws its masks on one thread, which is an eighth of the time of a training step of
MiniLM-L6 on two cores.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from muka_fast.first_token import covered_calls
from muka_fast.fused_layers import fits, fused_layers, is_gpu
from muka_fast.intercept import dropout_modules, intercept, patched
from muka_fast.memory import send
from muka_fast.ops import table
from muka_fast.ops.philox import signed_seed
from muka_fast.ops.reference import Draws
from muka_fast.seeds import seed_of
from muka_fast.sites import Masks, Site, sites_of_config

log = logging.getLogger("muka_fast")
MOST = 0.99  # all but everything dropped is nothing that the masks' 16 bits are for
OF_PYTORCH = "%s is PyTorch's: its masks depend on batches and on the number of processes"
NextTexts = Callable[[Tensor, int], None]


class TrainingMasks(Masks):
    """Masks of one sample, the epoch, where a module is in training mode. On a GPU all that changes from step to step lies there, at
    addresses that stay, for steps that are recorded."""

    def __init__(self, model: nn.Module, sites: list[Site], seed: int, device: torch.device, most_texts: int):
        """most_texts: that a forward may have."""
        if is_gpu(device):
            self.key = send(torch.tensor([signed_seed(seed), 0]), device)
            self._ids = torch.zeros(most_texts, dtype=torch.int64, device=device)
        self._told = False
        p_of_site = {site.index: site.p for site in sites if site.p > 0}
        super().__init__(model, sites, p_of_site, seed, torch.zeros(0, dtype=torch.int64), num_samples=1)

    def next_texts(self, example_ids: Tensor, epoch: int) -> None:
        """Before a forward: the example ids int64 [B] of its texts, and the epoch 0, 1, ..."""
        if self.key is None:
            self.restart(example_ids, epoch)
            return
        ids = self._ids[: len(example_ids)]
        ids.copy_(send(example_ids, ids.device))
        self.key[1:].fill_(epoch)
        self.restart(ids, 0)

    def wants(self, module: nn.Module) -> bool:
        return module.training and super().wants(module)

    def apply(self, module: nn.Module, x: Tensor, p: float) -> Tensor:
        return super().apply(module, x, p) if module.training else x

    def draws(self, module: nn.Module) -> tuple[float, Draws | None]:
        """Probability and draws of the next call of a site, for a kernel that masks by itself. Counts as a call."""
        if not self.wants(module):
            return 0.0, None
        site = self._next(module)
        self._calls[module] += 1
        return self.p_of_site[site.index], Draws(self.key, self.example_ids, site.index)

    def leave_attention(self) -> None:
        """Tell, once, that PyTorch drops attention's probabilities."""
        if not self._told:
            log.info(OF_PYTORCH, "dropout of attention")
        self._told = True


@contextmanager
def training_layers(model: nn.Module, seed: int, device: torch.device, most_texts: int) -> Iterator[NextTexts]:
    """Inside it the families of postln.py drop by the contract, with the p of their configuration; on a GPU all but the attention that
    fused_layers.py leaves to PyTorch. Other models drop as PyTorch does, and so does ALBERT, whose layers are calls of one module,
    where calls come in another order (recomputed in the backward) or are not counted (not fused on a GPU).

    Gives what is to be told before every forward: the example ids int64 [B] of its texts, B <= most_texts, and the epoch 0, 1, ...
    """
    masks = _masks(model, seed, device, most_texts)
    with ExitStack() as stack:
        stack.enter_context(fused_layers(model, masks))
        if masks is None:
            yield lambda example_ids, epoch: None
            return
        stack.callback(model.register_forward_pre_hook(lambda *_: masks.rewind()).remove)
        if is_gpu(device):
            for module in dropout_modules(model).values():
                stack.enter_context(patched(module, partial(_drop, masks, module)))
        else:
            stack.enter_context(intercept(model, masks))
        yield masks.next_texts


def _drop(masks: TrainingMasks, module: nn.Module, original: Any, x: Tensor) -> Tensor:
    return masks.apply(module, x, 0.0)


def _masks(model: nn.Module, seed: int, device: torch.device, most_texts: int) -> TrainingMasks | None:
    calls = covered_calls(model)
    if not calls:
        return None
    sites = sites_of_config(model.config)
    if sites is not None and not any(site.p for site in sites):
        return None
    recomputed = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    unfused = [module for module in calls if is_gpu(device) and not fits(model, module)]
    again = any(site.occurrence and isinstance(site.layer, int) for site in sites or [])
    form = table.TABLE["repeat_dropout"].get(device.type, "reference")
    slow = table.BACKEND == "auto" and form == "reference"  # many times slower than PyTorch's dropout
    if slow or sites is None or (again and (recomputed or unfused)) or any(site.p > MOST for site in sites):
        log.info(OF_PYTORCH, "dropout")
        return None
    masks, modules = TrainingMasks(model, sites, seed_of(seed, "student"), device, most_texts), dict(model.named_modules())
    attends = [site for site in sites if site.p > 0 and site.kind == "attention" and not isinstance(modules[site.path], nn.Dropout)]
    if any(calls[site.layer] in unfused and site.layer + 1 < len(calls) for site in attends):  # the last one, of one row, is ours
        masks.leave_attention()
    return masks
