"""mc_statistics: everything the method needs to know about K stochastic passes of N teachers, in one pass over their logits.

    p[k, c] = softmax of sample k over one teacher's classes; MUKA (arXiv 2112.07327), section 3.2
    mean[c] = 1/K sum_k p[k, c],  var[c] = 1/K sum_k (p[k, c] - mean[c])^2
    H = -sum_c mean ln mean,  E = 1/K sum_k (ln sum_c e[k, c] - sum_c e d / sum_c e),  d = z - max z, e = exp(d);  0 ln 0 = 0
    I = max(H - E, 0),  u = H / ln C_i (0 for one class),  selected = argmin u,  margin = gap of the two best 1 - u

Bytes: every logit once in; a row of 2 S + 4 N + 2 numbers per text out. Operations: one exponential per logit, two logarithms per
class or sample. Nothing of size K is in memory but the input. No gradient: scores are data. On a GPU the row of a teacher of more
than 8192 classes does not fit the registers: its logits are read three times, mostly from the cache, with two exponentials each,
and two numbers per text and sample are kept in between.
Letters: K samples (k) · B texts (b) · S = sum of the teachers' class counts (c) · N teachers (i).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from operator import lt

import torch
from torch import Tensor

from muka_fast.ops import table, tuning
from muka_fast.ops.aot import Specialisation
from muka_fast.ops.philox import triton
from muka_fast.ops.reference import mc_statistics_ref

SCHEMA = "(Tensor logits, int[] offsets) -> Tensor"
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in csrc/cpu/mc_statistics.cpp


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
    normalized_entropy = _column(5, "[B, N], in [0, 1].")
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
    code = DTYPE_CODES.get(logits.dtype)
    if code is None:  # float64: for gradients and tests, where speed is nothing
        return mc_statistics_reference(logits, offsets)
    check(logits, offsets)
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


mc_statistics_triton: Callable | None = None
SPECIALISATIONS: list[Specialisation] = []
if triton is not None:
    import triton.language as tl

    @triton.jit
    def teacher_statistics(
        p_z,  # [K, C] of one text and teacher, rows z_stride apart
        p_mean, p_var,  # [C]
        K, C, z_stride,
        SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Writes mean and variance; returns predictive and expected entropy. SAMPLES rows at a time are merged into the running
        mean and sum of squares (Chan, Golub, LeVeque, 1979); with one row this is Welford's update."""
        o_c = tl.arange(0, BLOCK)
        m_c = o_c < C
        b_mean, b_m2 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        b_expected = 0.0
        if SAMPLES == 1:  # of its own, because a row of 8192 classes and its two sums just fit the registers
            for i_k in range(0, K):
                b_d = tl.load(p_z + o_c, mask=m_c, other=float("-inf")).to(tl.float32)
                b_d -= tl.max(b_d, 0)  # NaN for a NaN logit and for a row of -inf, and so is all that follows
                b_e = tl.exp(b_d)
                b_sum = tl.sum(b_e, 0)
                b_expected += tl.log(b_sum) - tl.sum(tl.where(b_e == 0, 0.0, b_e * b_d), 0) / b_sum
                b_p = b_e * (1.0 / b_sum)
                b_delta = b_p - b_mean
                b_mean += b_delta * (1.0 / (i_k + 1))
                b_m2 += b_delta * (b_p - b_mean)
                p_z += z_stride
        else:
            for i_k in range(0, K, SAMPLES):
                o_k = i_k + tl.arange(0, SAMPLES)
                m_k = (o_k < K)[:, None]
                b_z = tl.load(p_z + o_k.to(tl.int64)[:, None] * z_stride + o_c[None, :], mask=m_k & m_c[None, :], other=0.0)
                b_z = tl.where(m_c[None, :], b_z.to(tl.float32), float("-inf"))
                b_d = b_z - tl.max(b_z, 1)[:, None]
                b_e = tl.exp(b_d)
                b_sum = tl.sum(b_e, 1)
                b_inner = tl.log(b_sum) - tl.sum(tl.where(b_e == 0, 0.0, b_e * b_d), 1) / b_sum
                b_expected += tl.sum(tl.where(o_k < K, b_inner, 0.0), 0)
                b_p = tl.where(m_k, b_e * (1.0 / b_sum)[:, None], 0.0)
                count = tl.minimum(K - i_k, SAMPLES) * 1.0
                share = count / (i_k + count)
                b_new = tl.sum(b_p, 0) * (1.0 / count)
                b_off = tl.where(m_k, b_p - b_new[None, :], 0.0)
                b_delta = b_new - b_mean
                b_mean += b_delta * share
                b_m2 += tl.sum(b_off * b_off, 0) + b_delta * b_delta * (i_k * share)
        tl.store(p_mean + o_c, b_mean, mask=m_c)
        tl.store(p_var + o_c, tl.where(b_m2 < 0, 0.0, b_m2 * (1.0 / K)), mask=m_c)  # fused, a sum of squares may fall below 0
        b_predictive = -tl.sum(tl.where(b_mean == 0, 0.0, b_mean * tl.log(b_mean)), 0)
        return b_predictive, b_expected / K

    @triton.jit
    def chunked_statistics(
        p_z,  # [K, C] of one text and teacher, rows z_stride apart
        p_mean, p_var,  # [C]
        p_scale,  # [2, K]: maximum and 1 / sum of the exponentials of each sample
        K, C, z_stride,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """As teacher_statistics for a row that the registers do not hold: first the softmax of every sample, chunk by chunk, then mean
        and variance of every chunk over the samples."""
        p_row = p_z
        b_expected = 0.0
        for i_k in range(0, K):
            b_top = float("-inf")
            for i_c in range(0, C, BLOCK):
                o_c = i_c + tl.arange(0, BLOCK)
                b_top = tl.maximum(b_top, tl.max(tl.load(p_row + o_c, mask=o_c < C, other=float("-inf")).to(tl.float32), 0))
            b_sum, b_dot = 0.0, 0.0
            for i_c in range(0, C, BLOCK):
                o_c = i_c + tl.arange(0, BLOCK)
                b_z = tl.load(p_row + o_c, mask=o_c < C, other=float("-inf")).to(tl.float32)
                b_d = b_z - b_top  # NaN for a NaN logit and for a row of -inf, and so is all that follows
                b_e = tl.where(o_c < C, tl.exp(b_d), 0.0)
                b_sum += tl.sum(b_e, 0)
                b_dot += tl.sum(tl.where(b_e == 0, 0.0, b_e * b_d), 0)
            b_expected += tl.log(b_sum) - b_dot / b_sum
            tl.store(p_scale + i_k, b_top)
            tl.store(p_scale + K + i_k, 1.0 / b_sum)
            p_row += z_stride
        tl.debug_barrier()
        b_predictive = 0.0
        for i_c in range(0, C, BLOCK):
            o_c = i_c + tl.arange(0, BLOCK)
            m_c = o_c < C
            b_mean, b_m2 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            p_row = p_z
            for i_k in range(0, K):
                b_z = tl.load(p_row + o_c, mask=m_c, other=float("-inf")).to(tl.float32)
                b_p = tl.exp(b_z - tl.load(p_scale + i_k)) * tl.load(p_scale + K + i_k)
                b_delta = b_p - b_mean
                b_mean += b_delta * (1.0 / (i_k + 1))
                b_m2 += b_delta * (b_p - b_mean)
                p_row += z_stride
            tl.store(p_mean + o_c, b_mean, mask=m_c)
            tl.store(p_var + o_c, tl.where(b_m2 < 0, 0.0, b_m2 * (1.0 / K)), mask=m_c)
            b_predictive -= tl.sum(tl.where(m_c & (b_mean != 0), b_mean * tl.log(b_mean), 0.0), 0)
        tl.debug_barrier()  # the next teacher writes p_scale anew
        return b_predictive, b_expected / K

    @triton.jit
    def mc_statistics_kernel(
        p_z,  # [K, B, S], strides z_sample, z_text, 1
        p_offsets,  # int32 [N + 1]
        p_log_classes,  # [N] ln C_i
        p_out,  # [B, 2 S + 4 N + 2], the columns of McStatistics
        p_scale,  # [B, 2, K], written and read where CHUNKED
        K, N, S, z_sample, z_text,
        SMALL_SAMPLES: tl.constexpr, SMALL: tl.constexpr, LARGE_SAMPLES: tl.constexpr, LARGE: tl.constexpr, CHUNKED: tl.constexpr,
    ):  # fmt: skip
        """One text per program, so that the selection needs no second launch. Teachers of up to SMALL classes take a small block;
        LARGE is 0 where there are no others."""
        i_b = tl.program_id(0).to(tl.int64)
        p_z += i_b * z_text
        p_scale += i_b * 2 * K
        p_mean = p_out + i_b * (2 * S + 4 * N + 2)
        p_var = p_mean + S
        p_entropy = p_var + S
        for i_n in range(0, N):
            start = tl.load(p_offsets + i_n)
            C = tl.load(p_offsets + i_n + 1) - start
            if LARGE == 0 or C <= SMALL:
                b_h, b_x = teacher_statistics(p_z + start, p_mean + start, p_var + start, K, C, z_sample, SMALL_SAMPLES, SMALL)
            elif CHUNKED:
                b_h, b_x = chunked_statistics(p_z + start, p_mean + start, p_var + start, p_scale, K, C, z_sample, max(LARGE, 1))
            else:
                b_h, b_x = teacher_statistics(
                    p_z + start, p_mean + start, p_var + start, K, C, z_sample, LARGE_SAMPLES, max(LARGE, 1)
                )
            # NaN fails every comparison and is kept: a teacher that computed nonsense must not look certain.
            b_h = tl.where(b_h < 0, 0.0, b_h)
            b_x = tl.where(b_x < 0, 0.0, b_x)
            b_upper = tl.load(p_log_classes + i_n)
            b_u = tl.where(b_upper > 0, b_h / tl.where(b_upper > 0, b_upper, 1.0), b_h * 0.0)
            tl.store(p_entropy + i_n, b_h)
            tl.store(p_entropy + N + i_n, b_x)
            tl.store(p_entropy + 2 * N + i_n, tl.where(b_h - b_x < 0, 0.0, b_h - b_x))
            tl.store(p_entropy + 3 * N + i_n, b_u)
        # The selection reads back what it needs: carried through the loop above, it would spill beside a row of 8192 classes.
        tl.debug_barrier()
        b_best, b_second, b_nan, b_selected = float("-inf"), float("-inf"), 0.0, 0.0
        for i_n in range(0, N):
            b_score = 1.0 - tl.load(p_entropy + 3 * N + i_n)
            b_nan += b_score * 0.0
            better = b_score > b_best
            b_second = tl.where(better, b_best, tl.where(b_score > b_second, b_score, b_second))
            b_best = tl.where(better, b_score, b_best)
            b_selected = tl.where(better, i_n * 1.0, b_selected)
        tl.store(p_entropy + 4 * N, b_selected)
        tl.store(p_entropy + 4 * N + 1, tl.where(b_nan == 0, tl.where(N == 1, 1.0, b_best - b_second), float("nan")))

    CANDIDATES = {int(size): entries for size, entries in tuning.CANDIDATES["mc_statistics"].items()}
    TILES = {size: entries[0] for size, entries in CANDIDATES.items()}  # classes of one block -> samples at a time and warps
    CHUNK, CHUNK_WARPS = 2048, 16  # classes at a time of teachers beyond the last tile
    SMALL_BLOCKS = (16, 512)  # of the second block, for teachers that would leave most of a block of 2048 to 8192 classes idle

    def configuration(
        counts: list[int], num_samples: int, tiles: Mapping[int, tuple[int, ...]] = TILES
    ) -> tuple[dict[str, int], int]:
        """Constexprs and number of warps for these class counts."""
        if max(counts) > max(tiles):
            small = SMALL_BLOCKS[-1]
            samples = tiles[small][0] if num_samples > 1 else 1
            return {"SMALL_SAMPLES": samples, "SMALL": small, "LARGE_SAMPLES": 1, "LARGE": CHUNK, "CHUNKED": True}, CHUNK_WARPS
        block = next(size for size in tiles if size >= max(counts))
        samples, warps = tiles[block] if num_samples > 1 else (1, tiles[block][1])
        idle = max((count for count in counts if 2 * count <= block), default=0)
        small = next((size for size in SMALL_BLOCKS if size >= idle), None)
        sizes = {"SMALL_SAMPLES": samples, "SMALL": block, "LARGE_SAMPLES": 1, "LARGE": 0}
        if idle and block >= 2048 and small is not None and num_samples > 1:
            sizes = {"SMALL_SAMPLES": tiles[small][0], "SMALL": small, "LARGE_SAMPLES": samples, "LARGE": block}
        return {**sizes, "CHUNKED": False}, warps

    @lru_cache(maxsize=64)
    def on_device(offsets: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """Offsets and ln C_i where the kernel reads them; kept, because a copy to the device costs more than the launch."""
        bounds = torch.tensor(offsets, dtype=torch.int32)
        return bounds.to(device), bounds.diff().double().log().float().to(device)

    def mc_statistics_triton(logits: Tensor, offsets: list[int]) -> Tensor:
        if logits.dtype not in DTYPE_CODES:
            return mc_statistics_reference(logits, offsets)
        check(logits, offsets)
        counts = [stop - start for start, stop in pairwise(offsets)]
        logits = logits if logits.stride(2) == 1 else logits.contiguous()
        samples, texts, width = logits.shape
        out = empty_output(logits, len(counts))
        if texts == 0:
            return out
        tiles = {size: tuning.choose("mc_statistics", str(size), logits.device) for size in TILES}
        constexprs, warps = configuration(counts, samples, tiles)
        scale = torch.empty((texts, 2, samples if constexprs["CHUNKED"] else 0), dtype=torch.float32, device=logits.device)
        bounds, log_classes = on_device(tuple(offsets), logits.device)
        # Triton launches on the current device, which need not be that of the logits.
        with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
            mc_statistics_kernel[(texts,)](
                logits, bounds, log_classes, out, scale, samples, len(counts), width, logits.stride(0), logits.stride(1),
                **constexprs, num_warps=warps,
            )  # fmt: skip
        return out

    _TYPES = dict.fromkeys(("p_log_classes", "p_out", "p_scale"), "*fp32") | {"p_offsets": "*i32"}
    _TYPES |= {"K": "i32", "N": "i32", "S": "i32", "z_sample": "i64", "z_text": "i64"}
    _CASES = [([block], samples, "fp32", TILES) for samples in (16, 1) for block in (*TILES, 10_000)]
    _CASES += [([small, block], 16, "fp32", TILES) for small in SMALL_BLOCKS for block in TILES if block >= 2048]
    _CASES += [([block], 16, dtype, TILES) for dtype in ("fp16", "bf16") for block in (16, 256, 8192, 10_000)]
    _CASES += [
        ([size], 16, dtype, TILES | {size: entry})
        for size, entries in CANDIDATES.items()
        for entry in entries[1:]
        for dtype in ("fp32", "bf16")
    ]
    SPECIALISATIONS = [
        Specialisation(
            f"mc_statistics {dtype} C={counts} K={samples} {tiles.get(counts[-1], '')}",
            mc_statistics_kernel,
            {"p_z": f"*{dtype}", **_TYPES},
            configuration(counts, samples, tiles)[0],
            num_warps=configuration(counts, samples, tiles)[1],
            fast=dtype == "fp32" and samples == 16 and tiles is TILES and counts in ([16], [256], [16, 8192], [10_000]),
        )
        for counts, samples, dtype, tiles in _CASES
    ]

RAW = table.register(
    "mc_statistics",
    SCHEMA,
    reference=mc_statistics_reference,
    cpu=None if table._C is None else mc_statistics_cpu,
    triton=mc_statistics_triton,
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
