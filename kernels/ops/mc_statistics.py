"""mc_statistics: everything the method needs to know about K stochastic passes of N teachers, in one pass over their logits."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from muka_fast.ops.reference import mc_statistics_ref
from muka_fast.ops.table import _C, register

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in csrc/cpu/mc_statistics.cpp


class McStatistics(NamedTuple):
    mean_probs: Tensor
    var_probs: Tensor
    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    normalized_entropy: Tensor
    selected: Tensor
    teacher_margin: Tensor


def check(logits: Tensor, offsets: Sequence[int]) -> None:
    """Raises ValueError unless logits are [K >= 1, B, S] floats and the offsets cut S into teachers of at least one class."""
    if logits.dim() != 3 or logits.shape[0] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be floats of shape [samples, texts, classes], not {logits.dtype} {list(logits.shape)}")
    width = logits.shape[2]
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != width or any(b <= a for a, b in pairwise(offsets)):
        raise ValueError(f"offsets {list(offsets)} do not cut {width} logits into teachers: they must rise from 0 to {width}")


def empty_outputs(logits: Tensor, teachers: int) -> tuple[Tensor, ...]:
    """The eight outputs; no views of one buffer, because results of an op must not share memory."""
    _, texts, width = logits.shape
    device, dtype, empty = logits.device, torch.float64 if logits.dtype == torch.float64 else torch.float32, torch.empty
    return (
        empty(texts, width, dtype=dtype, device=device),
        empty(texts, width, dtype=dtype, device=device),
        empty(texts, teachers, dtype=dtype, device=device),
        empty(texts, teachers, dtype=dtype, device=device),
        empty(texts, teachers, dtype=dtype, device=device),
        empty(texts, teachers, dtype=dtype, device=device),
        empty(texts, dtype=torch.int64, device=device),
        empty(texts, dtype=dtype, device=device),
    )


def mc_statistics_reference(logits: Tensor, offsets: list[int]) -> tuple[Tensor, ...]:
    check(logits, offsets)
    return mc_statistics_ref(logits, offsets)


def mc_statistics_cpu(logits: Tensor, offsets: list[int]) -> tuple[Tensor, ...]:
    check(logits, offsets)
    code = DTYPE_CODES.get(logits.dtype)
    if code is None:  # float64: for gradients and tests, where speed is nothing
        return mc_statistics_ref(logits, offsets)
    samples, texts, _ = logits.shape
    sample_stride, text_stride, class_stride = logits.stride()
    if class_stride != 1:
        logits = logits.contiguous()
        sample_stride, text_stride, _ = logits.stride()
    out = empty_outputs(logits, len(offsets) - 1)
    pointers = [tensor.data_ptr() for tensor in out]
    threads = torch.get_num_threads()
    _C.mc_statistics(logits.data_ptr(), code, samples, texts, sample_stride, text_stride, offsets, *pointers, threads)
    return out


def mc_statistics_fake(logits: Tensor, offsets: list[int]) -> tuple[Tensor, ...]:
    return empty_outputs(logits, len(offsets) - 1)


RAW = register(
    "mc_statistics",
    "(Tensor logits, int[] offsets) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=mc_statistics_reference,
    cpu=None if _C is None else mc_statistics_cpu,
    triton=None,
    fake=mc_statistics_fake,
)


def mc_statistics(logits: Tensor, offsets: Sequence[int]) -> McStatistics:
    return McStatistics(*RAW(logits, offsets))
