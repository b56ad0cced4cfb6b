"""mc_head: the statistics of a linear classifier under K dropout masks of its input, in one pass over features and weights.

    z_k[b] = W (mask_k[b] * scale * x[b]) + bias,  P_k = softmax(z_k);  mean, variance and entropies of P_k over k
    mask_k: element = feature column (philox.py); deterministic logits: W x + bias

Bytes: features, weight and bias once, outputs once. Operations: K masks of D lanes a text (ten Philox rounds for eight lanes), and
2 K B C D floating-point operations for a dense product; the C++ kernel sums only the columns that a mask drops, the share p of
them. Never in memory: masks, [K, B, D], [K, B, C].
Letters: K samples (k) · B texts (b) · D features (d) · C classes (c).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from muka_fast.ops import philox, table, tuning
from muka_fast.ops.aot import Specialisation
from muka_fast.ops.reference import mc_head_ref

SCHEMA = (
    "(Tensor features, Tensor weight, Tensor? bias, int num_samples, float p, int seed, int site, Tensor example_ids)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class McHeadStatistics(NamedTuple):
    """Statistics of one teacher over its K masks, float32 (float64 for float64 features)."""

    mean_probs: Tensor  # [B, C]
    var_probs: Tensor  # [B, C] population variance
    predictive_entropy: Tensor  # [B] nats
    expected_entropy: Tensor  # [B] nats
    mutual_information: Tensor  # [B] nats, clamped at 0
    normalized_entropy: Tensor  # [B] in [0, 1]
    logits: Tensor  # [B, C] without dropout


def bytes_moved(num_texts: int, width: int, classes: int, itemsize: int = 4) -> int:
    """Bytes the op must read (features, weight, bias, ids) and write (three [B, C], four [B]), each once."""
    read = itemsize * (num_texts * width + classes * width + classes) + 8 * num_texts
    return read + 4 * (3 * num_texts * classes + 4 * num_texts)


def operations(num_samples: int, num_texts: int, width: int, classes: int) -> dict[str, int]:
    """What the op must compute: random lanes, dense-product flops, exponentials."""
    return {
        "philox_lanes": num_samples * num_texts * width,
        "dense_flops": 2 * (num_samples + 1) * num_texts * width * classes,
        "exponentials": num_samples * num_texts * classes,
    }


def _empty_outputs(features: Tensor, classes: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    texts = features.shape[0]
    shapes = [(texts, classes)] * 2 + [(texts,)] * 4 + [(texts, classes)]
    return tuple(features.new_empty(shape, dtype=dtype) for shape in shapes)


def mc_head_cpu(
    features: Tensor, weight: Tensor, bias: Tensor | None, num_samples: int, p: float, seed: int, site: int, example_ids: Tensor
) -> tuple[Tensor, ...]:
    x, w = features.float().contiguous(), weight.float().contiguous()
    b = None if bias is None else bias.float().contiguous()
    threshold, scale = philox.mask_parameters(p)
    outputs = _empty_outputs(x, w.shape[0], torch.float32)
    table._C.mc_head(
        x.data_ptr(), w.data_ptr(), 0 if b is None else b.data_ptr(), example_ids.data_ptr(), num_samples,
        *x.shape, w.shape[0], philox.unsigned_seed(seed), site, threshold, scale, *(o.data_ptr() for o in outputs),
        torch.get_num_threads(),
    )  # fmt: skip
    return outputs


mc_head_triton: Callable | None = None
SPECIALISATIONS: list[Specialisation] = []
if philox.triton is not None:
    import triton
    import triton.language as tl

    from muka_fast.ops.fast_math import FUSED, LN_2, LOG2_E, LOWEST, log2, minus_p_log_p

    SAMPLES = tl.constexpr(16)  # rows of one matrix product that belong to one text; more samples are merged in turns

    @triton.jit
    def tile_logits(
        p_x, p_w, p_b, b_text, b_sample, b_id, o_c, seed, site, threshold, scale, B, C, D,
        BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        """Logits [BM, BC] of the texts b_text, where MASKED under the mask of b_sample."""
        b_z = tl.zeros([BM, BC], tl.float32)
        for i_d in range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            b_x = tl.load(p_x + b_text[:, None] * D + o_d[None, :], mask=(b_text < B)[:, None] & (o_d < D)[None, :], other=0.0)
            b_w = tl.load(p_w + o_c.to(tl.int64)[None, :] * D + o_d[:, None], mask=(o_c < C)[None, :] & (o_d < D)[:, None], other=0.0)
            if b_x.dtype != b_w.dtype:
                b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
            if MASKED:
                b_call = (i_d // 8 + tl.arange(0, BD // 8))[None, :]
                keep = philox.keep_lanes(seed, b_call, b_sample[:, None], site, b_id[:, None], threshold, BD // 8, BM)
                b_x = tl.where(keep, b_x, 0.0).to(b_w.dtype)
            b_z = tl.dot(b_x, b_w, b_z, input_precision=PRECISION)
        if MASKED:
            b_z = b_z * scale  # not before: the mask leaves x exact in its own dtype
        if HAS_BIAS:
            b_z += tl.load(p_b + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
        return b_z

    @triton.jit
    def row_sums(b_z):
        """Of each row: maximum, e = exp(d) with d = z - maximum, sum e, sum e * d; NaN reaches both sums."""
        b_top = tl.maximum(tl.max(b_z, 1), LOWEST)
        b_d = b_z - b_top[:, None]
        b_e = tl.exp2(b_d * LOG2_E)
        return b_top, b_e, tl.sum(b_e, 1), tl.sum(b_e * tl.maximum(b_d, -200.0), 1)  # 0 * -inf would be NaN

    @triton.jit
    def merge(b_mean, b_m2, b_p, m_row, i_k, K, BT: tl.constexpr, BC: tl.constexpr):
        """Mean and squared deviations of i_k samples and of up to SAMPLES more (Chan, Golub and LeVeque, 1983)."""
        m_3 = tl.reshape(tl.broadcast_to(m_row[:, None], [BT * SAMPLES, BC]), [BT, SAMPLES, BC])
        b_3 = tl.where(m_3, tl.reshape(b_p, [BT, SAMPLES, BC]), 0.0)
        count = tl.minimum(K - i_k, SAMPLES).to(tl.float32)
        share = count / (i_k + count)
        b_new = tl.sum(b_3, 1) * (1.0 / count)
        b_off = tl.where(m_3, b_3 - b_new[:, None, :], 0.0)
        b_delta = b_new - b_mean
        return b_mean + b_delta * share, b_m2 + tl.sum(b_off * b_off, 1) + b_delta * b_delta * (i_k * share)

    @triton.jit
    def statistics(
        p_x, p_w, p_b, p_ids, p_lse, p_parts, p_mean, p_var, p_predictive, p_expected, p_information, p_normalized,
        i_b, i_c, tiles, seed, site, threshold, scale, per_log, K, B, C, D,
        BT: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, STAGE: tl.constexpr,
    ):  # fmt: skip
        """All samples of BT texts over one tile of classes, SAMPLES of them at a time."""
        BM: tl.constexpr = BT * SAMPLES
        o_m = tl.arange(0, BM)
        o_c = i_c * BC + tl.arange(0, BC)
        o_t = i_b * BT + tl.arange(0, BT)
        b_text = i_b * BT + o_m // SAMPLES
        b_id = tl.load(p_ids + b_text, mask=b_text < B, other=0)
        b_mean, b_m2 = tl.zeros([BT, BC], tl.float32), tl.zeros([BT, BC], tl.float32)
        b_inner = tl.zeros([BT], tl.float32)
        for i_k in range(0, K, SAMPLES):
            b_sample = i_k + o_m % SAMPLES
            m_row = (b_text < B) & (b_sample < K)
            b_z = tile_logits(
                p_x, p_w, p_b, b_text, b_sample, b_id, o_c, seed, site, threshold, scale, B, C, D,
                BM, BC, BD, HAS_BIAS, PRECISION, True,
            )  # fmt: skip
            b_z = tl.where((o_c < C)[None, :], b_z, float("-inf"))
            if STAGE == 2:
                b_p = tl.exp2((b_z - tl.load(p_lse + b_text * K + b_sample, mask=m_row, other=0.0)[:, None]) * LOG2_E)
            else:
                b_top, b_e, b_sum, b_dot = row_sums(b_z)
                b_p = b_e * (1.0 / b_sum)[:, None]
            if STAGE == 1:
                p_part = p_parts + (b_text * K + b_sample) * tiles + i_c
                part = B.to(tl.int64) * K * tiles
                tl.store(p_part, b_top, mask=m_row)
                tl.store(p_part + part, b_sum, mask=m_row)
                tl.store(p_part + 2 * part, b_dot, mask=m_row)
            else:
                b_mean, b_m2 = merge(b_mean, b_m2, b_p, m_row, i_k, K, BT, BC)
            if STAGE == 0:
                b_h = tl.where(m_row, log2(b_sum) * LN_2 - b_dot / b_sum, 0.0)
                b_inner += tl.sum(tl.reshape(b_h, [BT, SAMPLES]), 1)
        m_t = o_t < B
        if STAGE != 1:
            p_out, m_out = o_t[:, None] * C + o_c[None, :], m_t[:, None] & (o_c < C)[None, :]
            tl.store(p_mean + p_out, b_mean, mask=m_out)
            tl.store(p_var + p_out, b_m2 * (1.0 / K), mask=m_out)
            b_predictive = tl.sum(minus_p_log_p(b_mean), 1)
        if STAGE == 2:
            tl.store(p_predictive + o_t * tiles + i_c, b_predictive, mask=m_t)
        if STAGE == 0:  # `where` keeps NaN, which a maximum does not
            b_predictive = tl.where(b_predictive < 0, 0.0, b_predictive)
            b_expected = tl.where(b_inner < 0, 0.0, b_inner / K)
            tl.store(p_predictive + o_t, b_predictive, mask=m_t)
            tl.store(p_expected + o_t, b_expected, mask=m_t)
            tl.store(p_information + o_t, tl.where(b_predictive < b_expected, 0.0, b_predictive - b_expected), mask=m_t)
            tl.store(p_normalized + o_t, b_predictive * per_log, mask=m_t)

    @triton.jit(do_not_specialize=["seed", "site", "threshold", "K", "B", "C"])
    def mc_head_kernel(
        p_x,  # [B, D]
        p_w,  # [C, D]
        p_b,  # [C]
        p_ids,  # int64 [B]
        p_lse,  # [B, K] ln sum exp z over all classes; read where STAGE == 2
        p_parts,  # [3, B, K, tiles] maximum, sum e, sum e * d of each tile; written where STAGE == 1
        p_mean, p_var,  # [B, C]; written where STAGE != 1
        p_predictive,  # [B, tiles] -sum p ln p of each tile's mean; written where STAGE != 1
        p_expected, p_information, p_normalized,  # [B]; written where STAGE == 0
        p_logits,  # [B, C]; written where STAGE != 2
        seed, site, threshold, scale, per_log, K, B, C, D,
        BT: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
        STAGE: tl.constexpr,  # 0: all classes in one tile; 1: softmax sums of a tile; 2: statistics of a tile
    ):  # fmt: skip
        """The first programs compute the logits without dropout, a text in each row of their tile; the others the statistics."""
        i_b, i_c, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
        BM: tl.constexpr = BT * SAMPLES
        plain = 0 if STAGE == 2 else tl.cdiv(B, BM)
        if i_b < plain:
            o_t, o_c = i_b * BM + tl.arange(0, BM), i_c * BC + tl.arange(0, BC)
            b_z = tile_logits(p_x, p_w, p_b, o_t, 0, 0, o_c, 0, 0, 0, 1.0, B, C, D, BM, BC, BD, HAS_BIAS, PRECISION, False)
            tl.store(p_logits + o_t[:, None] * C + o_c[None, :], b_z, mask=(o_t < B)[:, None] & (o_c < C)[None, :])
        else:
            statistics(
                p_x, p_w, p_b, p_ids, p_lse, p_parts, p_mean, p_var, p_predictive, p_expected, p_information, p_normalized,
                i_b - plain, i_c, tiles, seed, site, threshold, scale, per_log, K, B, C, D,
                BT, BC, BD, HAS_BIAS, PRECISION, STAGE,
            )  # fmt: skip

    def block(classes: int) -> int:
        """Classes of one tile: wider ones than 128 spill."""
        return min(128, max(16, triton.next_power_of_2(classes)))

    def shape_class(bits: int, classes: int) -> str:
        """Of tuning.py."""
        return f"{bits} bit {block(classes)}"

    def options(tile: int, entry: tuple[int, ...]) -> dict[str, int]:
        """Tile sizes and launch options of an entry of tuning.py."""
        BT, BD, num_warps, num_stages = entry
        return {"BT": BT, "BC": tile, "BD": BD, "num_warps": num_warps, "num_stages": num_stages}

    def merge_tiles(parts: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax sums of all tiles, [3, B, K, tiles] -> ln sum exp z and entropy, [B, K]."""
        top, total, dot = parts
        best = top.amax(-1, keepdim=True)
        weight = (top - best).exp()
        merged, inner = (weight * total).sum(-1), (weight * (dot + (top - best) * total)).sum(-1)
        return best[..., 0] + merged.log(), merged.log() - inner / merged

    def mc_head_triton(
        features: Tensor, weight: Tensor, bias: Tensor | None, num_samples: int, p: float, seed: int, site: int, example_ids: Tensor
    ) -> tuple[Tensor, ...]:
        if features.dtype == torch.bfloat16 and philox.INTERPRETED:  # its dot takes the bits of bfloat16 for integers
            features = features.float()
        x, w, b = table.dense(features), table.dense(weight), None if bias is None else table.dense(bias)
        (texts, width), classes = x.shape, w.shape[0]
        outputs = _empty_outputs(x, classes, torch.float32)
        if texts == 0:
            return outputs
        mean, var, predictive, expected, information, normalized, logits = outputs
        threshold, scale = philox.mask_parameters(p)
        per_log = 1 / math.log(classes) if classes > 1 else 0.0
        bits = 8 * x.element_size() if x.dtype == w.dtype else 32  # the product is 16-bit only where both factors are
        config = options(block(classes), tuning.choose("mc_head", shape_class(bits, classes), x.device))
        tiles = triton.cdiv(classes, config["BC"])

        def launch(stage: int, lse: Tensor, parts: Tensor, by_tile: Tensor) -> None:
            programs = triton.cdiv(texts, config["BT"]) + (0 if stage == 2 else triton.cdiv(texts, config["BT"] * SAMPLES.value))
            mc_head_kernel[(programs, tiles)](
                x, w, w if b is None else b, example_ids, lse, parts, mean, var, by_tile, expected, information, normalized, logits,
                seed, site, threshold, scale, per_log, num_samples, texts, classes, width,
                HAS_BIAS=b is not None, PRECISION="tf32x3", STAGE=stage, **config, **FUSED,
            )  # fmt: skip

        with table.on_device_of(x):
            if tiles == 1:
                launch(0, mean, mean, predictive)
                return outputs
            parts, by_tile = mean.new_empty((3, texts, num_samples, tiles)), mean.new_empty((texts, tiles))
            launch(1, mean, parts, by_tile)
            lse, entropy = merge_tiles(parts)
            launch(2, lse.contiguous(), parts, by_tile)
        # `where` keeps NaN, which clamping on some devices does not.
        predictive, expected = (torch.where(h < 0, 0.0, h) for h in (by_tile.sum(1), entropy.mean(1)))
        information = torch.where(predictive < expected, 0.0, predictive - expected)
        return mean, var, predictive, expected, information, predictive * per_log, logits

    def _shape_class(dtype: str, classes: int) -> str:
        return shape_class(32 if dtype == "fp32" else 16, classes)

    def _specialisation(
        dtype: str, classes: int, stage: int, entry: tuple[int, ...], multiples: tuple[str, ...], has_bias: bool = True
    ) -> Specialisation:
        config = options(block(classes), entry)
        warps, stages = config.pop("num_warps"), config.pop("num_stages")
        outputs = dict.fromkeys(mc_head_kernel.arg_names[4:13], "*fp32")
        scalars = dict.fromkeys(("site", "threshold", "K", "B", "C", "D"), "i32") | {"seed": "i64", "scale": "fp32", "per_log": "fp32"}
        return Specialisation(
            f"mc_head {dtype} BC={config['BC']} stage {stage}{'' if multiples else ' any D'}"
            f"{'' if has_bias else ' without bias'} {entry}",
            mc_head_kernel,
            {**dict.fromkeys(("p_x", "p_w", "p_b"), f"*{dtype}"), "p_ids": "*i64", **outputs, **scalars},
            {**config, "HAS_BIAS": has_bias, "PRECISION": "tf32x3", "STAGE": stage},
            num_warps=warps,
            num_stages=stages,
            fast=dtype == "fp32" and (classes, stage) in ((16, 0), (1000, 2)),
            aligned=True,
            multiples=multiples,
            tuned=(_shape_class(dtype, classes), entry),
        )

    SPECIALISATIONS = [
        _specialisation(dtype, classes, stage, entry, multiples)
        for dtype in ("fp32", "fp16", "bf16")
        for classes, stage in ((16, 0), (32, 0), (64, 0), (128, 0), (1000, 1), (1000, 2))
        for entry in tuning.CANDIDATES["mc_head"][_shape_class(dtype, classes)]
        for multiples in ((), ("D",))
    ] + [_specialisation("fp32", 16, 0, entry, ("D",), has_bias=False) for entry in tuning.CANDIDATES["mc_head"]["32 bit 16"]]

_op = table.register(
    "mc_head",
    SCHEMA,
    reference=mc_head_ref,
    cpu=None if table._C is None else mc_head_cpu,
    triton=mc_head_triton,
    fake=lambda x, weight, *_: _empty_outputs(x, len(weight), torch.float64 if x.dtype == torch.float64 else torch.float32),
)


def mc_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_samples: int,
    p: float,
    seed: int,
    site: int,
    example_ids: Tensor,
) -> McHeadStatistics:
    """Statistics over K dropout masks of `linear(features)`, and the deterministic logits. Not differentiable.

    features: [B, D], float32, float16, bfloat16 or float64. weight: [C, D]. bias: [C] or None. num_samples: K >= 1.
    p: dropout probability, 0 <= p < 1 (rounded to 1/65536). seed: 64 bits, unsigned. site: 0 ... 2^32 - 1.
    example_ids: int64 [B], wrap at 2^32. A NaN feature makes the text's statistics NaN unless every mask drops it.
    Raises ValueError for anything outside these ranges.
    """
    if features.dim() != 2 or weight.dim() != 2 or features.shape[1] != weight.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"features [B, D] and weight [C, D] do not match: {list(features.shape)}, {list(weight.shape)}")
    if not (features.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"features and weight must be of floating-point types, not {features.dtype} and {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], not {list(bias.shape)}")
    if num_samples < 1 or not 0 <= site < 1 << 32:
        raise ValueError(f"num_samples {num_samples} must be at least 1 and site {site} in [0, 2^32)")
    philox.mask_parameters(p)
    ids = philox.check_rows("example_ids", example_ids, features.shape[0], features.device)
    return McHeadStatistics(*_op(features, weight, bias, num_samples, p, philox.signed_seed(seed), site, ids))
