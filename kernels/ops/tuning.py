"""Block sizes, warps and pipeline stages of the Triton kernels: candidates for each class of shape, and what an architecture takes.

The first candidate is the default, chosen without a card: about the largest tile that compiles without spills. What a card has
measured stands under MEASURED, which `python bench/tune.py --write` writes. tests/ops/test_aot.py compiles what an architecture takes
(`make test`, `make test-slow`) and every other candidate (`make test-candidates`) ahead of time.
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
        "32 bit d64 biased": [(32, 32, 4, 1)],
        "32 bit d128": [(32, 32, 4, 1), (16, 32, 4, 1)],
        "32 bit d128 masked": [(16, 32, 4, 1)],
        "32 bit d128 biased": [(16, 32, 4, 1)],
        "16 bit one row": [(16, 32, 4, 1)],
        "16 bit d32": [(64, 64, 4, 2), (64, 64, 4, 1)],
        "16 bit d32 masked": [(64, 64, 4, 2), (64, 64, 4, 1)],
        "16 bit d32 biased": [(32, 32, 4, 2)],
        "16 bit d64": [(64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 2), (32, 64, 2, 2)],
        "16 bit d64 masked": [(64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 2)],
        "16 bit d64 biased": [(64, 32, 4, 2)],
        "16 bit d128": [(64, 64, 4, 2), (64, 64, 4, 1)],
        "16 bit d128 masked": [(64, 64, 4, 2), (64, 64, 4, 1)],
        "16 bit d128 biased": [(32, 32, 4, 2)],
    },
    "one_query_attention": {  # keys at a time, warps
        "d32": [(32, 2)],
        "d64": [(32, 2), (32, 8)],
        "d128": [(32, 4), (32, 8)],
    },
    "repeat_dropout": {  # Philox calls of a row at a time (eight elements each), calls of a program, stores past the caches, warps
        "any": [(32, 32, 0, 1), (64, 64, 0, 1), (32, 128, 0, 4), (128, 128, 0, 4), (32, 32, 1, 1), (64, 64, 1, 1), (32, 128, 1, 4)],
    },
    "dropout_add_layer_norm": {  # replicas of a program where there are many, warps, by columns; up to 1024 a row is one warp's
        "1024": [(4, 4), (4, 1), (4, 2), (16, 4), (1, 4), (8, 8)],
        "2048": [(4, 4), (16, 4), (4, 2), (1, 4)],
        "4096": [(4, 8), (4, 4), (1, 8)],
    },
    "mc_statistics": {  # samples of a warp, warps (a teacher each), by most classes: sums stay in a warp, no spills
        "16": [(8, 8), (8, 4), (16, 8)],
        "128": [(4, 8), (2, 8), (4, 4), (4, 1), (2, 1)],
        "160": [(2, 8), (4, 8), (2, 4), (4, 4), (2, 1)],
        "256": [(2, 8), (1, 8), (2, 4), (2, 1)],
        "512": [(1, 8), (1, 4), (1, 1)],
        "1024": [(1, 4), (1, 2), (1, 1)],
    },
    "mc_head": {  # texts a program, features a step, warps, stages, by class tile
        "32 bit 16": [(4, 32, 4, 1), (8, 64, 8, 1)],
        "32 bit 32": [(4, 32, 8, 1)],
        "32 bit 64": [(2, 64, 8, 1)],
        "32 bit 128": [(2, 32, 8, 1)],
        "16 bit 16": [(4, 64, 4, 1), (4, 32, 4, 1), (2, 64, 2, 1), (8, 64, 8, 1), (4, 128, 8, 1), (1, 64, 1, 2), (1, 128, 2, 2)],
        "16 bit 32": [(4, 64, 4, 1), (4, 32, 4, 1)],
        "16 bit 64": [(4, 64, 8, 1), (2, 64, 8, 2)],
        "16 bit 128": [(2, 64, 8, 1)],
    },
    "distill_loss": {  # warps of a row, by its classes; other numbers spill a few bytes somewhere
        "512": [(4,)],
        "1280": [(1,)],
        "2048": [(4,)],
        "10240": [(16,)],
        "wider": [(8,)],
    },
}

# Architecture ("sm_90") -> op -> class of shape -> candidate, and the command, card and versions that measured it.
# -- written by bench/tune.py --
MEASURED: dict[str, dict[str, dict[str, Entry]]] = {'sm_90': {'mc_head': {'16 bit 16': (4, 64, 4, 1), '32 bit 16': (4, 32, 4, 1)},
           'mc_statistics': {'128': (4, 4), '160': (2, 8), '256': (1, 8), '512': (1, 8)},
           'one_query_attention': {'d64': (32, 2)},
           'packed_attention': {'16 bit d64': (64, 32, 4, 2),
                                '16 bit d64 masked': (64, 32, 4, 2),
                                '32 bit d64': (64, 32, 4, 1),
                                '32 bit d64 masked': (64, 32, 4, 1)},
           'repeat_dropout': {'any': (32, 32, 0, 1)}}}
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
    return _trial.get((op, shape)) or taken(architecture(device), op, shape)


def taken(arch: str, op: str, shape: str) -> Entry:
    """What was measured on an architecture, or the default."""
    return MEASURED.get(arch, {}).get(op, {}).get(shape, CANDIDATES[op][shape][0])
