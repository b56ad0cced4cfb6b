"""mc_statistics: everything the method needs to know about K stochastic passes of N teachers, in one pass over their logits.

    p[k, c] = softmax of sample k over one teacher's classes; MUKA (arXiv 2112.07327), section 3.2
    mean[c] = 1/K sum_k p[k, c],  var[c] = 1/K sum_k (p[k, c] - mean[c])^2
    H = -sum_c mean ln mean,  E = 1/K sum_k (ln sum_c e[k, c] - sum_c e d / sum_c e),  d = z - max z, e = exp(d);  0 ln 0 = 0
    I = max(H - E, 0),  u = H / ln C_i (0 for one class),  selected = argmin u,  margin = gap of the two best 1 - u

Bytes: every logit once in; a row of 2 S + 4 N + 2 numbers per text out. Operations: one exponential per logit, two logarithms per
class or sample. Nothing of size K is in memory but the input. No gradient: scores are data. On a GPU the logits of more than 1024
classes a teacher are read three times, mostly from the cache, with two exponentials each, and three numbers per text, teacher and
sample are kept in between: see mc_statistics_triton.py.
Letters: K samples (k) · B texts (b) · S = sum of the teachers' class counts (c) · N teachers (i).
"""

from collections.abc import Iterator, Sequence
from operator import lt

import torch
from torch import Tensor

from muka_fast.ops import table
from muka_fast.ops.philox import triton
from muka_fast.ops.reference import mc_statistics_ref

if triton is not None:
    from muka_fast.ops.mc_statistics_triton import launch

SCHEMA = "(Tensor logits, int[] offsets) -> Tensor"


def bytes_moved(num_samples: int, texts: int, teachers: int, width: int, itemsize: int = 4) -> int:
    """Bytes the op must read and write; itemsize: of a logit. width: S."""
    return texts * (itemsize * num_samples * width + 4 * (2 * width + 4 * teachers + 2))


def operations(num_samples: int, texts: int, teachers: int, width: int) -> int:
    """Exponentials and logarithms."""
    return texts * (num_samples * width + num_samples * teachers + width)


def _column(place: int, meaning: str) -> property:
    return property(lambda self: self._columns()[place], doc=meaning)


class McStatistics:
    """Uncertainty of N teachers about B texts; entropies in nats, float32 (float64 for float64 logits).

    per_text [B, 2 S + 4 N + 2] holds all of it, a text's numbers side by side. The fields are views of its columns, made when the
    first is read: they take half as long as the smallest problem. Iterating gives the eight fields in this order.
    """

    def __init__(self, per_text: Tensor, num_classes: int, num_teachers: int):
        self.per_text, self.num_classes, self.num_teachers = per_text, num_classes, num_teachers
        self._made: tuple[Tensor, ...] | None = None

    def _columns(self) -> tuple[Tensor, ...]:
        if self._made is None:  # not a cached_property: torch.compile cannot trace its lock
            C, N = self.num_classes, self.num_teachers
            *matrices, selection = self.per_text.split_with_sizes((C, C, N, N, N, N, 2), 1)
            selected, margin = selection.unbind(1)
            self._made = (*matrices, selected.long(), margin)
        return self._made

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._columns())

    mean_probs = _column(0, "[B, S], every teacher's block a distribution.")
    var_probs = _column(1, "[B, S], population variance, in [0, 1/4].")
    predictive_entropy = _column(2, "[B, N], in [0, ln C_i].")
    expected_entropy = _column(3, "[B, N], in [0, ln C_i].")
    mutual_information = _column(4, "[B, N], in [0, ln C_i].")
    normalized_entropy = _column(5, "[B, N], in [0, 1] but for rounding.")
    selected = _column(6, "int64 [B], the most certain teacher.")
    teacher_margin = _column(7, "[B], in [0, 1].")
    FIELDS = (
        "mean_probs", "var_probs", "predictive_entropy", "expected_entropy", "mutual_information", "normalized_entropy", "selected",
        "teacher_margin",
    )  # fmt: skip


def check(logits: Tensor, offsets: Sequence[int]) -> None:
    """Raises ValueError unless logits are [K >= 1, B, S] floats and the offsets cut S into teachers of at least one class."""
    shape = logits.shape
    if len(shape) != 3 or shape[0] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be floats of shape [samples, texts, classes], not {logits.dtype} {list(shape)}")
    width = shape[2]
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != width or not all(map(lt, offsets, offsets[1:])):
        raise ValueError(f"offsets {list(offsets)} do not cut {width} logits into teachers: they must rise from 0 to {width}")


def empty_output(logits: Tensor, teachers: int) -> Tensor:
    """per_text of McStatistics. One tensor: eight took three times as long to allocate as the smallest problem to compute."""
    texts, width = logits.shape[1], 2 * logits.shape[2] + 4 * teachers + 2
    if logits.dtype in (torch.float32, torch.float64):
        return logits.new_empty(texts, width)  # naming the dtype would cost more than asking for it
    return logits.new_empty(texts, width, dtype=torch.float32)


def mc_statistics_reference(logits: Tensor, offsets: list[int]) -> Tensor:
    check(logits, offsets)
    *per_class_and_teacher, selected, margin = mc_statistics_ref(logits, offsets)
    return torch.cat([*per_class_and_teacher, selected[:, None].to(margin), margin[:, None]], 1)


def mc_statistics_cpu(logits: Tensor, offsets: list[int]) -> Tensor:
    check(logits, offsets)
    code = table.DTYPE_CODES[logits.dtype]
    samples, texts, _ = logits.shape
    sample_stride, text_stride, class_stride = logits.stride()
    if class_stride != 1:
        logits = logits.contiguous()
        sample_stride, text_stride, _ = logits.stride()
    out = empty_output(logits, len(offsets) - 1)
    threads = torch.get_num_threads()
    table._C.mc_statistics(logits.data_ptr(), code, samples, texts, sample_stride, text_stride, offsets, out.data_ptr(), threads)
    return out


def mc_statistics_fake(logits: Tensor, offsets: list[int]) -> Tensor:
    return empty_output(logits, len(offsets) - 1)


def mc_statistics_triton(logits: Tensor, offsets: list[int]) -> Tensor:
    check(logits, offsets)
    out = empty_output(logits, len(offsets) - 1)
    if len(out):
        launch(logits if logits.stride(2) == 1 else logits.contiguous(), offsets, out)
    return out


RAW = table.register(
    "mc_statistics",
    SCHEMA,
    reference=mc_statistics_reference,
    cpu=None if table._C is None else mc_statistics_cpu,
    triton=None if triton is None else mc_statistics_triton,
    fake=mc_statistics_fake,
)


def mc_statistics(logits: Tensor, offsets: Sequence[int]) -> McStatistics:
    """Statistics of K stochastic passes of N teachers.

    logits: [K >= 1, B, S], float32, float16, bfloat16 or float64, at temperature 1; rows may lie apart. offsets: N + 1 rising ints
    from 0 to S; teacher i owns columns offsets[i]:offsets[i + 1]. Population variance; ties go to the lowest teacher; one teacher
    has margin 1. -inf logits are classes of probability 0. A NaN or +inf logit, or a sample of nothing but -inf, makes that
    teacher's entropies and the text's margin NaN, and such a teacher is never selected.
    Raises ValueError where logits or offsets do not have this form.
    """
    return McStatistics(RAW(logits, offsets), offsets[-1], len(offsets) - 1)
