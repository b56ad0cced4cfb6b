"""Block sizes, warps and pipeline stages of the Triton kernels: candidates for each class of shape, and what an architecture takes.

The first candidate is the default, chosen without a card: about the largest tile that compiles without spills. What a card has
measured stands under MEASURED, which `python bench/tune.py --write` writes. All candidates are compiled ahead of time by
tests/ops/test_aot.py, so entries of MEASURED, each one of them, are as well. distill_loss keeps its own: one row a program, no choice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch

Entry = tuple[int, ...]

# op -> class of shape -> candidates. What the numbers are stands beside each op; the last one or two are warps (and stages).
CANDIDATES: dict[str, dict[str, Sequence[Entry]]] = {
    "packed_attention": {  # queries at a time, keys at a time, warps, stages
        "32 bit one row": [(16, 32, 4, 1)],
        "32 bit d32": [(64, 32, 4, 1), (128, 32, 8, 1)],
        "32 bit d32 masked": [(64, 32, 4, 1), (128, 32, 8, 1)],
        "32 bit d32 biased": [(64, 32, 4, 1)],
        "32 bit d64": [(64, 32, 4, 1), (128, 32, 8, 1), (32, 32, 4, 1)],
        "32 bit d64 masked": [(64, 32, 4, 1), (128, 32, 8, 1)],
        "32 bit d64 biased": [(64, 32, 8, 1), (32, 32, 4, 1)],
        "32 bit d128": [(32, 32, 4, 1), (16, 32, 4, 1)],
        "32 bit d128 masked": [(16, 32, 4, 1)],
        "32 bit d128 biased": [(16, 32, 4, 1)],
        "16 bit one row": [(16, 32, 2, 1), (16, 32, 4, 1)],
        "16 bit d32": [(64, 64, 4, 2), (64, 64, 4, 1)],
        "16 bit d32 masked": [(64, 64, 4, 2), (64, 64, 4, 1)],
        "16 bit d32 biased": [(32, 32, 4, 2)],
        "16 bit d64": [(64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 2), (32, 64, 2, 2)],
        "16 bit d64 masked": [(64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 2)],
        "16 bit d64 biased": [(64, 64, 4, 2), (64, 32, 4, 2)],
        "16 bit d128": [(64, 64, 4, 2), (64, 64, 4, 1)],
        "16 bit d128 masked": [(64, 64, 4, 2), (64, 64, 4, 1)],
        "16 bit d128 biased": [(32, 32, 4, 2)],
    },
    "one_query_attention": {  # keys at a time, warps
        "d32": [(32, 2)],
        "d64": [(32, 2), (32, 8)],
        "d128": [(32, 4), (32, 8)],
    },
    "repeat_dropout": {  # Philox calls of a program (eight elements each), warps
        "any": [(128, 4), (256, 4), (256, 8)],
    },
    "dropout_add_layer_norm": {  # warps, by Philox calls of a row
        "16": [(1,)],
        "128": [(4,), (2,), (8,)],
        "256": [(8,), (4,)],
        "4096": [(16,)],
    },
    "mc_statistics": {  # samples at a time, warps, by classes of one block: enough loads in flight, no spills
        "16": [(16, 1)],
        "64": [(16, 4), (16, 2)],
        "256": [(16, 4), (16, 8)],
        "512": [(4, 4), (8, 8)],
        "1024": [(4, 8)],
        "2048": [(2, 8)],
        "4096": [(1, 8)],
        "8192": [(1, 16)],  # a row of 16384 and its two sums spill on sm_90 and sm_100
    },
    "mc_head": {  # texts a program, features a step, warps, stages, by class tile
        "32 bit 16": [(2, 32, 4, 1)],
        "32 bit 32": [(2, 32, 4, 1)],
        "32 bit 64": [(2, 64, 8, 1)],
        "32 bit 128": [(2, 32, 8, 1)],
        "16 bit 16": [(1, 64, 4, 2), (2, 64, 4, 2)],
        "16 bit 32": [(1, 64, 4, 2)],
        "16 bit 64": [(2, 64, 8, 2)],
        "16 bit 128": [(2, 64, 8, 2)],
    },
}
CHOSEN = "chosen without a card"

# Architecture ("sm_90") -> op -> class of shape -> candidate, and the command, card and versions that measured it.
# -- written by bench/tune.py --
MEASURED: dict[str, dict[str, dict[str, Entry]]] = {'sm_90': {'dropout_add_layer_norm': {'128': (4,), '256': (4,)},
           'mc_head': {'16 bit 16': (2, 64, 4, 2)},
           'mc_statistics': {'256': (16, 4), '512': (4, 4), '64': (16, 2)},
           'repeat_dropout': {'any': (128, 4)}}}
SOURCES: dict[str, str] = {'sm_90': 'python bench/tune.py --write; NVIDIA H200, torch 2.11.0+cu130, 2026-11'}
# -- end --


@cache
def architecture(device: torch.device) -> str:
    """Of a GPU, as "sm_90"; of anything else "none"."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "none"


_trial: dict[tuple[str, str], Entry] = {}


@contextmanager
def trying(op: str, shape: str, entry: Entry) -> Iterator[None]:
    """Launches inside take this candidate: for bench/tune.py and tests."""
    _trial[op, shape] = entry
    try:
        yield
    finally:
        del _trial[op, shape]


def choose(op: str, shape: str, device: torch.device) -> Entry:
    """The numbers that a launch of `op` takes for this class of shape."""
    if (op, shape) in _trial:
        return _trial[op, shape]
    return MEASURED.get(architecture(device), {}).get(op, {}).get(shape, CANDIDATES[op][shape][0])


def source(arch: str) -> str:
    """Where the numbers of an architecture come from."""
    return SOURCES.get(arch, CHOSEN)
