"""The Triton kernels of mc_statistics, whose file holds the formulas.

Up to 1024 classes a teacher: one launch, a program a text, each logit read once, and every sum over classes within a warp. More
classes: three launches, so that few texts fill the card as well: softmax sums by sample, then mean and variance by block of
classes, then the selection. They read every logit three times, mostly from the cache.
"""

import math
import os
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
    from triton.language.extra import libdevice

    LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
    TINY = tl.constexpr(2.0**-126)
    INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

    @triton.jit
    def fast_log2(x):
        """One instruction instead of twenty, and as exact as its argument: each errs by about 1e-7 near 1."""
        if INTERPRETED:  # which lacks the function
            return tl.log2(x)
        return libdevice.fast_log2f(x)

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
            b_score = 1.0 - tl.load(p_entropy + 3 * N + i_n)
            b_nan += b_score * 0.0
            better = b_score > b_best
            b_second = tl.where(better, b_best, tl.where(b_score > b_second, b_score, b_second))
            b_best = tl.where(better, b_score, b_best)
            b_selected = tl.where(better, i_n * 1.0, b_selected)
        tl.store(p_entropy + 4 * N, b_selected)
        tl.store(p_entropy + 4 * N + 1, tl.where(b_nan == 0, tl.where(N == 1, 1.0, b_best - b_second), float("nan")))

    @triton.jit
    def load_tiles(p_row, o_head, o_tail, C, FULL: tl.constexpr):
        """Logits of the head's and the tail's classes, -inf beyond the last. FULL: the head has no class beyond it."""
        b_tail = tl.load(p_row + o_tail, mask=o_tail < C, other=float("-inf"))
        if FULL:
            return tl.load(p_row + o_head), b_tail
        return tl.load(p_row + o_head, mask=o_head < C, other=float("-inf")), b_tail

    @triton.jit
    def store_classes(p_mean, p_var, m_c, K, b_mean, b_m2, SAMPLES: tl.constexpr):
        """Merges means and sums of squares of SAMPLES equal parts of the samples (Chan, Golub, LeVeque, 1979), along the first axis.
        Returns -mean ln mean of each class; 0 for 0."""
        b_all = tl.sum(b_mean, 0, keep_dims=True) * (1.0 / SAMPLES)
        b_off = b_mean - b_all
        tl.store(p_mean, b_all, mask=m_c)
        tl.store(p_var, tl.sum(b_m2 * (1.0 / K) + b_off * b_off * (1.0 / SAMPLES), 0, keep_dims=True), mask=m_c)
        return b_all * fast_log2(tl.maximum(b_all, TINY)) * -LN_2

    @triton.jit
    def mc_statistics_kernel(
        p_z,  # [K, B, S], strides z_sample, z_text, 1
        p_offsets,  # int32 [N + 1]
        p_log_classes,  # [N] ln C_i
        p_out,  # [B, 2 S + 4 N + 2], the columns of McStatistics
        K, N, S, z_sample, z_text,
        TEACHERS: tl.constexpr, SAMPLES: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, FULL: tl.constexpr,
    ):  # fmt: skip
        """One text per program, so that the selection needs no second launch; one teacher per warp, so that no sum leaves a warp.

        Tiles are [SAMPLES, TEACHERS, classes / LANES, LANES]: Triton gives the last axis and then the first to the lanes of a warp,
        the second to the warps and the third to the registers. A tile's sides are powers of two: two tiles waste less than one.
        """
        LANES: tl.constexpr = 32 // SAMPLES
        i_b = tl.program_id(0).to(tl.int64)
        p_text = p_out + i_b * (2 * S + 4 * N + 2)
        o_k = tl.arange(0, SAMPLES)[:, None, None, None]
        o_head = (tl.arange(0, HEAD // LANES) * LANES)[None, None, :, None]
        o_tail = (tl.arange(0, TAIL // LANES) * LANES + HEAD)[None, None, :, None]
        o_lane = tl.arange(0, LANES)[None, None, None, :]
        for i_n in range(0, N, TEACHERS):
            o_n = tl.minimum(i_n + tl.arange(0, TEACHERS), N - 1)[None, :, None, None]  # idle warps repeat the last teacher
            b_start = tl.load(p_offsets + o_n)
            C = tl.load(p_offsets + o_n + 1) - b_start - o_lane  # classes from this lane on
            p_row = p_z + i_b * z_text + o_k.to(tl.int64) * z_sample + (b_start + o_lane)
            stride = tl.full([], SAMPLES, tl.int64) * z_sample
            b_head, b_tail = load_tiles(p_row, o_head, o_tail, C, FULL)
            b_mean = tl.zeros([SAMPLES, TEACHERS, HEAD // LANES, LANES], tl.float32)
            b_tail_mean = tl.zeros([SAMPLES, TEACHERS, TAIL // LANES, LANES], tl.float32)
            b_m2, b_tail_m2, b_expected = b_mean, b_tail_mean, tl.zeros([SAMPLES, TEACHERS, 1, 1], tl.float32)
            for i_k in tl.range(SAMPLES, K + SAMPLES, SAMPLES):
                b_z, b_tail_z = b_head.to(tl.float32), b_tail.to(tl.float32)
                if i_k < K:  # the next samples, on their way while these are computed
                    p_row += stride
                    b_head, b_tail = load_tiles(p_row, o_head, o_tail, C, FULL)
                b_top = tl.maximum(tl.max(b_z, 2, keep_dims=True), tl.max(b_tail_z, 2, keep_dims=True))
                b_top = tl.max(b_top, 3, keep_dims=True)
                b_e, b_ed = exponentials(b_z, b_top)
                b_tail_e, b_tail_ed = exponentials(b_tail_z, b_top)
                b_sum = tl.sum(tl.sum(b_e, 2, keep_dims=True) + tl.sum(b_tail_e, 2, keep_dims=True), 3, keep_dims=True)
                b_dot = tl.sum(tl.sum(b_ed, 2, keep_dims=True) + tl.sum(b_tail_ed, 2, keep_dims=True), 3, keep_dims=True)
                b_scale = 1.0 / b_sum
                b_expected += fast_log2(b_sum) * LN_2 - b_dot * b_scale
                share = SAMPLES / (i_k * 1.0)
                b_mean, b_m2 = welford(b_e * b_scale, b_mean, b_m2, share)
                b_tail_mean, b_tail_m2 = welford(b_tail_e * b_scale, b_tail_mean, b_tail_m2, share)
            p_mean = p_text + (b_start + o_lane + 0 * o_k)  # of the tile's whole shape, so that its values stay in their lanes
            p_var = p_mean + S
            b_h = store_classes(p_mean + o_head, p_var + o_head, o_head < C, K, b_mean, b_m2, SAMPLES)
            b_tail_h = store_classes(p_mean + o_tail, p_var + o_tail, o_tail < C, K, b_tail_mean, b_tail_m2, SAMPLES)
            b_h = tl.sum(tl.sum(b_h, 2, keep_dims=True) + tl.sum(b_tail_h, 2, keep_dims=True), 3, keep_dims=True)
            store_entropies(p_text + 2 * S, p_log_classes, o_n, N, b_h, tl.sum(b_expected, 0, keep_dims=True) * (1.0 / K))
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
        tl.store(p_sample + 2 * K, fast_log2(b_sum) * LN_2 - b_dot / b_sum)

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
        p_mean = p_out + i_b * (2 * S + 4 * N + 2) + start + o_c
        b_h = store_classes(p_mean, p_mean + S, m_c, K, b_mean, b_m2, SAMPLES)
        tl.store(p_parts + (i_b * N + i_n) * PARTS + i_part, tl.sum(tl.sum(b_h, 1), 0))  # 0 beyond the last class

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
    TILES = {size: entries[0] for size, entries in CANDIDATES.items()}  # most classes -> samples of a warp and warps
    # Beyond the tiles: classes (or numbers) at a time and warps of the three kernels, and samples at a time of the second.
    MANY, AT_ONCE = {"sample": (2048, 4), "class": (256, 4), "selection": (128, 1)}, 8
    CROWD = 2048  # texts that fill a card at one warp each

    def size_class(most: int) -> int:
        """Of tuning.py."""
        return next(size for size in TILES if size >= most)

    def configuration(counts: Sequence[int], samples: int, texts: int, entry: tuple[int, ...]) -> dict[str, int]:
        """Constexprs of mc_statistics_kernel; as many warps as TEACHERS."""
        most, (at_once, warps) = max(counts), entry
        at_once = math.gcd(at_once, samples)
        lanes, head = 32 // at_once, triton.next_power_of_2(most) // 2
        head = max(lanes, head)
        tail = max(lanes, triton.next_power_of_2(most - head))
        # Many texts fill the card in any case, and then no warp shall idle.
        teachers = math.gcd(warps, len(counts)) if texts >= CROWD else min(warps, triton.next_power_of_2(len(counts)))
        return {"TEACHERS": teachers, "SAMPLES": at_once, "HEAD": head, "TAIL": tail, "FULL": min(counts) >= head}

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
            logits, bounds, of_samples, samples, teachers, *strides, BLOCK=row, num_warps=row_warps
        )
        class_kernel[(texts, teachers, parts)](
            logits, bounds, of_samples, of_parts, out, samples, teachers, width, *strides, parts,
            SAMPLES=at_once, BLOCK=block, num_warps=block_warps,
        )  # fmt: skip
        selection_kernel[(texts,)](
            log_classes, of_samples, of_parts, out, samples, teachers, width, parts, BLOCK=few, num_warps=few_warps
        )

    def launch(logits: Tensor, offsets: Sequence[int], out: Tensor) -> None:
        """Fills out [B, 2 S + 4 N + 2]; at least one text, and classes side by side in memory."""
        counts = [stop - start for start, stop in pairwise(offsets)]
        samples, texts, width = logits.shape
        bounds, log_classes = on_device(tuple(offsets), logits.device)
        with table.on_device_of(logits):
            if max(counts) > max(TILES):
                launch_many_classes(logits, bounds, log_classes, out, max(counts))
                return
            entry = tuning.choose("mc_statistics", str(size_class(max(counts))), logits.device)
            constexprs = configuration(counts, samples, texts, entry)
            mc_statistics_kernel[(texts,)](
                logits, bounds, log_classes, out, samples, len(counts), width, logits.stride(0), logits.stride(1),
                **constexprs, num_warps=constexprs["TEACHERS"],
            )  # fmt: skip

    _TYPES = {"p_offsets": "*i32"} | dict.fromkeys(("p_log_classes", "p_samples", "p_parts", "p_out"), "*fp32")
    _TYPES |= dict.fromkeys(("K", "N", "S", "PARTS"), "i32") | {"z_sample": "i64", "z_text": "i64"}

    def _specialisation(name: str, kernel: Callable, dtype: str, constexprs: dict[str, int], warps: int, fast: bool) -> Specialisation:
        types = {"p_z": f"*{dtype}", **_TYPES}
        signature = {argument: types[argument] for argument in kernel.arg_names if argument in types}
        return Specialisation(f"mc_statistics {dtype} {name}", kernel, signature, constexprs, num_warps=warps, fast=fast)

    _CASES = [([size] * 8, samples, "fp32", entry) for samples in (16, 1) for size, entry in TILES.items()]
    _CASES += [
        ([2] + [size] * 7, 16, dtype, TILES[size_class(size)]) for dtype in ("fp32", "fp16", "bf16") for size in (16, 150, 1024)
    ]
    _CASES += [
        ([size] * 8, 16, dtype, entry)
        for size, entries in CANDIDATES.items()
        for entry in entries
        for dtype in ("fp32", "bf16")
        if entry != TILES[size] or dtype != "fp32"
    ]
    for _counts, _samples, _dtype, _entry in _CASES:
        _constexprs = configuration(_counts, _samples, 1, _entry)
        _name = f"C={_counts[0]}..{_counts[-1]} K={_samples} {[*_constexprs.values()][:2]}"
        _fast = _dtype == "fp32" and _samples == 16 and _entry == TILES.get(_counts[-1]) and _counts[-1] in (16, 256)
        SPECIALISATIONS.append(
            _specialisation(_name, mc_statistics_kernel, _dtype, _constexprs, _constexprs["TEACHERS"], _fast)
        )
    for _kernel, (_block, _warps) in zip((sample_kernel, class_kernel, selection_kernel), MANY.values(), strict=True):
        _at_once = {"SAMPLES": AT_ONCE} if "SAMPLES" in _kernel.arg_names else {}
        SPECIALISATIONS += [
            _specialisation(f"C=10000 {_kernel.__name__}", _kernel, _dtype, {"BLOCK": _block} | _at_once, _warps, _dtype == "fp32")
            for _dtype in ("fp32", "fp16", "bf16")
        ]
