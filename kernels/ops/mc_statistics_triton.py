"""The Triton kernels of mc_statistics, whose file holds the formulas.

Up to 1024 classes a teacher: one launch, a program a text, each logit read once, and every sum over classes within a warp. More
classes: three launches, so that few texts fill the card as well: softmax sums by sample, then mean and variance by block of
classes, then the selection. They read every logit three times, mostly from the cache.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from muka_fast.ops import table, tuning
from muka_fast.ops.aot import Specialisation
from muka_fast.ops.philox import triton

SPECIALISATIONS: list[Specialisation] = []
if triton is not None:
    import triton.language as tl

    from muka_fast.ops.fast_math import FUSED, LN_2, LOG2_E, log2, minus_p_log_p, reciprocal

    @triton.jit
    def exponentials(b_z, b_top):
        """exp(d) and exp(d) d, d = z - top: NaN for a NaN logit and for a row of -inf, and so is all that follows."""
        b_d = b_z - b_top
        b_e = tl.exp2(b_d * LOG2_E)
        return b_e, b_e * tl.maximum(b_d, -200.0)  # exp(-200) is 0 in float32: the product is 0 for -inf too

    @triton.jit
    def welford(b_p, b_mean, b_m2, share):
        """Mean and sum of squares about it after one more value, which is `share` of all."""
        b_delta = b_p - b_mean
        return b_mean + b_delta * share, b_m2 + b_delta * b_delta * (1.0 - share)

    @triton.jit
    def store_entropies(p_entropy, p_log_classes, o_n, N, b_h, b_x):
        """Predictive and expected entropy of teachers o_n, and what follows from them: 4 N columns."""
        # NaN fails every comparison and is kept: a teacher that computed nonsense must not look certain.
        b_h = tl.where(b_h < 0, 0.0, b_h)
        b_x = tl.where(b_x < 0, 0.0, b_x)
        b_upper = tl.load(p_log_classes + o_n)
        tl.store(p_entropy + o_n, b_h)
        tl.store(p_entropy + N + o_n, b_x)
        tl.store(p_entropy + 2 * N + o_n, tl.where(b_h - b_x < 0, 0.0, b_h - b_x))
        tl.store(p_entropy + 3 * N + o_n, tl.where(b_upper > 0, b_h / tl.where(b_upper > 0, b_upper, 1.0), b_h * 0.0))

    @triton.jit
    def store_selection(p_entropy, N):
        """Reads back what this program's store_entropies wrote."""
        tl.debug_barrier()
        b_best, b_second, b_nan, b_selected = float("-inf"), float("-inf"), 0.0, 0.0
        for i_n in range(0, N):
            b_score = -tl.load(p_entropy + 3 * N + i_n)
            b_nan += b_score * 0.0
            better = b_score > b_best
            b_second = tl.where(better, b_best, tl.where(b_score > b_second, b_score, b_second))
            b_best = tl.where(better, b_score, b_best)
            b_selected = tl.where(better, i_n * 1.0, b_selected)
        tl.store(p_entropy + 4 * N, b_selected)
        tl.store(p_entropy + 4 * N + 1, tl.where(b_nan == 0, tl.where(N == 1, 1.0, b_best - b_second), float("nan")))

    @triton.jit
    def load_classes(p_row, C, LANES: tl.constexpr, TILES: tl.constexpr, FULL: tl.constexpr):
        """Every LANES-th logit of a lane, -inf beyond the last class; the first FULL tiles have no class beyond it."""
        b_z = ()
        for t in tl.static_range(TILES):
            if t < FULL:
                b_z += (tl.load(p_row + t * LANES),)
            else:
                b_z += (tl.load(p_row + t * LANES, mask=t * LANES < C, other=float("-inf")),)
        return b_z

    @triton.jit
    def over_samples(b, SAMPLES: tl.constexpr):
        """Sums of SAMPLES rows each, in every one of them: [rows, columns]."""
        b_3 = tl.reshape(b, [b.shape[0] // SAMPLES, SAMPLES, b.shape[1]])
        return tl.reshape(tl.broadcast_to(tl.sum(b_3, 1, keep_dims=True), b_3.shape), b.shape)

    @triton.jit
    def merge(b_mean, b_m2, K, SAMPLES: tl.constexpr):
        """Mean and variance of SAMPLES equal parts of the samples, a row each (Chan, Golub, LeVeque, 1979)."""
        b_all = over_samples(b_mean, SAMPLES) * (1.0 / SAMPLES)
        b_off = b_mean - b_all
        return b_all, over_samples(b_m2 * (1.0 / K) + b_off * b_off * (1.0 / SAMPLES), SAMPLES)

    @triton.jit
    def mc_statistics_kernel(
        p_z,  # [K, B, S], strides z_sample, z_text, 1
        p_offsets,  # int32 [N + 1]
        p_log_classes,  # [N] ln C_i
        p_out,  # [B, 2 S + 4 N + 2], the columns of McStatistics
        K, N, S, z_sample, z_text,
        TEACHERS: tl.constexpr, SAMPLES: tl.constexpr, TILES: tl.constexpr, FULL: tl.constexpr,
    ):  # fmt: skip
        """One text per program, so that the selection needs no second launch; one teacher per warp, so that no sum leaves a warp.

        A tile is [TEACHERS * SAMPLES, LANES], one number a lane: every Triton gives its columns and then its rows to the lanes of a
        warp. Zeros are added to what a row has one of, so that it keeps that shape and stays in its lanes.
        """
        LANES: tl.constexpr = 32 // SAMPLES
        i_b = tl.program_id(0).to(tl.int64)
        p_text = p_out + i_b * (2 * S + 4 * N + 2)
        o_row = tl.arange(0, TEACHERS * SAMPLES)[:, None]
        o_lane = tl.arange(0, LANES)[None, :]
        for i_n in range(0, N, TEACHERS):
            o_n = tl.minimum(i_n + o_row // SAMPLES, N - 1)  # idle warps repeat the last teacher
            b_start = tl.load(p_offsets + o_n)
            C = tl.load(p_offsets + o_n + 1) - b_start - o_lane  # classes from this lane on
            p_row = p_z + i_b * z_text + (o_row % SAMPLES).to(tl.int64) * z_sample + (b_start + o_lane)
            stride = tl.full([], SAMPLES, tl.int64) * z_sample
            b_next = load_classes(p_row, C, LANES, TILES, FULL)
            b_mean, b_m2 = (), ()
            for _ in tl.static_range(TILES):
                b_mean += (tl.zeros([TEACHERS * SAMPLES, LANES], tl.float32),)
                b_m2 += (tl.zeros([TEACHERS * SAMPLES, LANES], tl.float32),)
            b_expected = tl.zeros([TEACHERS * SAMPLES, 1], tl.float32)
            for i_k in tl.range(SAMPLES, K + SAMPLES, SAMPLES):
                b_z = b_next
                if i_k < K:  # the next samples, on their way while these are computed
                    p_row += stride
                    b_next = load_classes(p_row, C, LANES, TILES, FULL)
                b_top = b_z[0].to(tl.float32)
                for t in tl.static_range(1, TILES):
                    b_top = tl.maximum(b_top, b_z[t].to(tl.float32))
                b_top = tl.max(b_top, 1, keep_dims=True)
                b_sum, b_dot, b_e = tl.zeros_like(b_mean[0]), tl.zeros_like(b_mean[0]), ()
                for t in tl.static_range(TILES):
                    b_et, b_ed = exponentials(b_z[t].to(tl.float32), b_top)
                    b_e += (b_et,)
                    b_sum += b_et
                    b_dot += b_ed
                b_sum, b_dot = tl.sum(b_sum, 1, keep_dims=True), tl.sum(b_dot, 1, keep_dims=True)
                b_scale = reciprocal(b_sum)
                b_expected += log2(b_sum) * LN_2 - b_dot * b_scale
                share, means, squares = SAMPLES * reciprocal(i_k * 1.0), (), ()
                for t in tl.static_range(TILES):
                    b_mt, b_st = welford(b_e[t] * b_scale, b_mean[t], b_m2[t], share)
                    means += (b_mt,)
                    squares += (b_st,)
                b_mean, b_m2 = means, squares
            b_h = tl.zeros([TEACHERS * SAMPLES, LANES], tl.float32)
            for t in tl.static_range(TILES):
                b_all, b_var = merge(b_mean[t], b_m2[t], K, SAMPLES)
                p_mean = p_text + (b_start + o_lane + t * LANES)
                tl.store(p_mean, b_all, mask=t * LANES < C)
                tl.store(p_mean + S, b_var, mask=t * LANES < C)
                b_h += minus_p_log_p(b_all)
            b_expected = over_samples(b_expected, SAMPLES) * (1.0 / K)
            b_h = tl.sum(b_h, 1, keep_dims=True)
            store_entropies(p_text + 2 * S, p_log_classes, o_n + 0 * o_lane, N, b_h + 0 * o_lane, b_expected + 0 * o_lane)
        store_selection(p_text + 2 * S, N)

    @triton.jit
    def sample_kernel(p_z, p_offsets, p_samples, K, N, z_sample, z_text, BLOCK: tl.constexpr):
        """Many classes, first: of one sample of one text and teacher the maximum, 1 / sum of the exponentials and the entropy."""
        i_n = tl.program_id(1)
        i_b, i_k = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
        start = tl.load(p_offsets + i_n)
        C = tl.load(p_offsets + i_n + 1) - start
        p_row = p_z + i_b * z_text + i_k.to(tl.int64) * z_sample + start
        b_top = tl.full([BLOCK], float("-inf"), tl.float32)
        for i_c in range(0, C, BLOCK):
            o_c = i_c + tl.arange(0, BLOCK)
            b_top = tl.maximum(b_top, tl.load(p_row + o_c, mask=o_c < C, other=float("-inf")).to(tl.float32))
        b_top = tl.max(b_top, 0)
        b_sum, b_dot = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for i_c in range(0, C, BLOCK):
            o_c = i_c + tl.arange(0, BLOCK)
            b_e, b_ed = exponentials(tl.load(p_row + o_c, mask=o_c < C, other=float("-inf")).to(tl.float32), b_top)
            b_sum += b_e
            b_dot += b_ed
        b_sum, b_dot = tl.sum(b_sum, 0), tl.sum(b_dot, 0)
        p_sample = p_samples + (i_b * N + i_n) * 3 * K + i_k
        tl.store(p_sample, b_top)
        tl.store(p_sample + K, 1.0 / b_sum)
        tl.store(p_sample + 2 * K, log2(b_sum) * LN_2 - b_dot / b_sum)

    @triton.jit
    def class_kernel(
        p_z, p_offsets, p_samples, p_parts, p_out, K, N, S, z_sample, z_text, PARTS, SAMPLES: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """Many classes, second: mean and variance of BLOCK classes of one text and teacher, and their part of the mean's entropy."""
        i_b, i_n, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        start = tl.load(p_offsets + i_n)
        o_k, o_c = tl.arange(0, SAMPLES)[:, None], i_part * BLOCK + tl.arange(0, BLOCK)[None, :]
        m_c = o_c < tl.load(p_offsets + i_n + 1) - start
        p_row = p_z + i_b * z_text + start + o_k.to(tl.int64) * z_sample + o_c
        stride = tl.full([], SAMPLES, tl.int64) * z_sample
        p_sample = p_samples + (i_b * N + i_n) * 3 * K + o_k
        b_mean, b_m2 = tl.zeros([SAMPLES, BLOCK], tl.float32), tl.zeros([SAMPLES, BLOCK], tl.float32)
        for i_k in range(0, K, SAMPLES):
            b_z = tl.load(p_row, mask=m_c, other=float("-inf")).to(tl.float32)
            b_e, _ = exponentials(b_z, tl.load(p_sample + i_k))
            b_mean, b_m2 = welford(b_e * tl.load(p_sample + K + i_k), b_mean, b_m2, SAMPLES / (i_k + SAMPLES * 1.0))
            p_row += stride
        p_mean = p_out + i_b * (2 * S + 4 * N + 2) + start + o_c + 0 * o_k
        b_all, b_var = merge(b_mean, b_m2, K, SAMPLES)
        tl.store(p_mean, b_all, mask=m_c & (o_k == 0))
        tl.store(p_mean + S, b_var, mask=m_c & (o_k == 0))
        b_h = tl.sum(tl.sum(minus_p_log_p(b_all), 1), 0) * (1.0 / SAMPLES)  # 0 beyond the last class; every row has the same
        tl.store(p_parts + (i_b * N + i_n) * PARTS + i_part, b_h)

    @triton.jit
    def selection_kernel(p_log_classes, p_samples, p_parts, p_out, K, N, S, PARTS, BLOCK: tl.constexpr):
        """Many classes, third: the entropies of one text and the selection."""
        i_b = tl.program_id(0).to(tl.int64)
        p_entropy = p_out + i_b * (2 * S + 4 * N + 2) + 2 * S
        o_i = tl.arange(0, BLOCK)
        for i_n in range(0, N):
            b_h, b_x = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            for i_i in range(0, PARTS, BLOCK):
                b_h += tl.load(p_parts + (i_b * N + i_n) * PARTS + i_i + o_i, mask=i_i + o_i < PARTS, other=0.0)
            for i_i in range(0, K, BLOCK):
                b_x += tl.load(p_samples + ((i_b * N + i_n) * 3 + 2) * K + i_i + o_i, mask=i_i + o_i < K, other=0.0)
            store_entropies(p_entropy, p_log_classes, i_n, N, tl.sum(b_h, 0), tl.sum(b_x, 0) / K)
        store_selection(p_entropy, N)

    CANDIDATES = {int(size): entries for size, entries in tuning.CANDIDATES["mc_statistics"].items()}
    SIZES = {size: entries[0] for size, entries in CANDIDATES.items()}  # most classes -> samples of a warp and warps
    # Beyond the tiles: classes (or numbers) at a time and warps of the three kernels, and samples at a time of the second.
    MANY, AT_ONCE = {"sample": (2048, 4), "class": (256, 4), "selection": (128, 1)}, 8
    CROWD = 2048  # texts that fill a card at one warp each

    def size_class(most: int) -> int:
        """Of tuning.py."""
        return next(size for size in SIZES if size >= most)

    def configuration(counts: Sequence[int], samples: int, texts: int, entry: tuple[int, ...]) -> dict[str, int]:
        """Constexprs of mc_statistics_kernel; as many warps as TEACHERS."""
        at_once, warps = entry
        at_once = math.gcd(at_once, samples)
        tiles = triton.cdiv(max(counts), 32 // at_once)
        full = tiles - 1 if min(counts) >= (tiles - 1) * 32 // at_once else 0
        # Many texts fill the card in any case, and then no warp shall idle.
        teachers = math.gcd(warps, len(counts)) if texts >= CROWD else min(warps, triton.next_power_of_2(len(counts)))
        return {"TEACHERS": teachers, "SAMPLES": at_once, "TILES": tiles, "FULL": full}

    @lru_cache(maxsize=64)
    def on_device(offsets: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """Offsets and ln C_i where the kernel reads them; kept, because a copy to the device costs more than the launch."""
        bounds = torch.tensor(offsets, dtype=torch.int32)
        return bounds.to(device), bounds.diff().double().log().float().to(device)

    def launch_many_classes(logits: Tensor, bounds: Tensor, log_classes: Tensor, out: Tensor, most: int) -> None:
        """The three kernels that share a teacher's classes between programs."""
        (samples, texts, width), teachers = logits.shape, len(log_classes)
        (row, row_warps), (block, block_warps), (few, few_warps) = MANY.values()
        at_once, parts = math.gcd(AT_ONCE, samples), triton.cdiv(most, block)
        of_samples = torch.empty((texts, teachers, 3, samples), dtype=torch.float32, device=logits.device)
        of_parts = torch.empty((texts, teachers, parts), dtype=torch.float32, device=logits.device)
        strides = logits.stride()[:2]
        sample_kernel[(texts * samples, teachers)](
            logits, bounds, of_samples, samples, teachers, *strides, BLOCK=row, num_warps=row_warps, **FUSED
        )
        class_kernel[(texts, teachers, parts)](
            logits, bounds, of_samples, of_parts, out, samples, teachers, width, *strides, parts,
            SAMPLES=at_once, BLOCK=block, num_warps=block_warps, **FUSED,
        )  # fmt: skip
        selection_kernel[(texts,)](
            log_classes, of_samples, of_parts, out, samples, teachers, width, parts, BLOCK=few, num_warps=few_warps, **FUSED
        )

    def launch(logits: Tensor, offsets: Sequence[int], out: Tensor) -> None:
        """Fills out [B, 2 S + 4 N + 2]; at least one text, and classes side by side in memory."""
        counts = [stop - start for start, stop in pairwise(offsets)]
        samples, texts, width = logits.shape
        bounds, log_classes = on_device(tuple(offsets), logits.device)
        with table.on_device_of(logits):
            if max(counts) > max(SIZES):
                launch_many_classes(logits, bounds, log_classes, out, max(counts))
                return
            entry = tuning.choose("mc_statistics", str(size_class(max(counts))), logits.device)
            constexprs = configuration(counts, samples, texts, entry)
            mc_statistics_kernel[(texts,)](
                logits, bounds, log_classes, out, samples, len(counts), width, logits.stride(0), logits.stride(1),
                num_warps=constexprs["TEACHERS"], **constexprs, **FUSED,
            )  # fmt: skip

    _TYPES = {"p_offsets": "*i32"} | dict.fromkeys(("p_log_classes", "p_samples", "p_parts", "p_out"), "*fp32")
    _TYPES |= dict.fromkeys(("K", "N", "S", "PARTS"), "i32") | {"z_sample": "i64", "z_text": "i64"}

    def _specialisation(
        name: str, kernel: Callable, dtype: str, constexprs: dict[str, int], warps: int, fast: bool,
        tuned: tuple[str, tuning.Entry] | None = None,
    ) -> Specialisation:  # fmt: skip
        types = {"p_z": f"*{dtype}", **_TYPES}
        signature = {argument: types[argument] for argument in kernel.arg_names if argument in types}
        return Specialisation(
            f"mc_statistics {dtype} {name}", kernel, signature, constexprs, num_warps=warps, fast=fast,
            lone_warps=kernel is mc_statistics_kernel, tuned=tuned,
        )  # fmt: skip

    _CASES = [
        (least, most, samples, dtype, entry)
        for most, entries in CANDIDATES.items()
        for entry in entries
        for least, samples, dtypes in ((most, 16, ("fp32", "bf16")), (most, 1, ("fp32",)), (2, 16, ("fp32", "fp16", "bf16")))
        for dtype in dtypes
    ]
    for _least, _most, _samples, _dtype, _entry in _CASES:
        _constexprs = configuration([_least] + [_most] * 7, _samples, 1, _entry)
        _fast = _dtype == "fp32" and _samples == 16 and _least == _most and _most in (16, 256)
        SPECIALISATIONS.append(
            _specialisation(
                f"C={_least}..{_most} K={_samples} {_entry}", mc_statistics_kernel, _dtype, _constexprs, _constexprs["TEACHERS"],
                _fast, (str(_most), _entry),
            )
        )  # fmt: skip
    for _kernel, (_block, _warps) in zip((sample_kernel, class_kernel, selection_kernel), MANY.values(), strict=True):
        _at_once = {"SAMPLES": AT_ONCE} if "SAMPLES" in _kernel.arg_names else {}
        SPECIALISATIONS += [
            _specialisation(f"C=10000 {_kernel.__name__}", _kernel, _dtype, {"BLOCK": _block} | _at_once, _warps, _dtype == "fp32")
            for _dtype in ("fp32", "fp16", "bf16")
        ]
