"""dropout_add_layer_norm: what follows every dense layer of a post-LN encoder, over K replicas, in one pass over memory.

    y[r, i, :] = layer_norm(mask(x[r, i, :]) + residual[(r,) i, :]) * weight + bias
    mask: the contract of philox.py, sample first_sample + r; with plain_first replica 0 is unmasked and r - 1 counts

Bytes: x read and y written once; the residual of the first stochastic layer is one [rows, D] for all replicas.
Operations: ten Philox rounds for eight elements (on a GPU twice as many where a row begins inside a call), then about eight each;
without masks (p = 0) the latter alone.
Letters: R replicas (r) · rows (i) · D columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from muka_fast.ops import philox, table, tuning
from muka_fast.ops.aot import Specialisation
from muka_fast.ops.reference import dropout_add_layer_norm_ref

SCHEMA = (
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, float p, int seed, int site, Tensor example_ids,"
    " Tensor offsets, int first_sample, bool plain_first) -> Tensor"
)


def bytes_moved(replicas: int, rows: int, width: int, itemsize: int = 4, shared_residual: bool = True) -> int:
    """Bytes the op must read and write."""
    return itemsize * rows * width * (2 * replicas + (1 if shared_residual else replicas)) + 16 * rows + 2 * itemsize * width


def _cpu(x, residual, weight, bias, eps, p, seed, site, example_ids, offsets, first_sample, plain_first) -> Tensor:
    replicas, rows, width = x.shape
    threshold, scale = philox.mask_parameters(p)
    dtype = x.dtype
    x, residual, weight, bias = (t.float().contiguous() for t in (x, residual, weight, bias))
    out = torch.empty_like(x)
    table._C.dropout_add_layer_norm(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(), example_ids.data_ptr(),
        offsets.data_ptr(), replicas, rows, width, 0 if residual.dim() == 2 else rows * width, eps, philox.unsigned_seed(seed), site,
        first_sample, threshold, scale, int(plain_first), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(dtype)


_triton: Callable | None = None
SPECIALISATIONS: list[Specialisation] = []
if philox.triton is not None:
    import triton
    import triton.language as tl

    from muka_fast.ops.fast_math import FUSED
    from muka_fast.ops.norm_tiles import load_columns, mean_and_rstd, tile

    @triton.jit
    def write_replicas(
        p_x, p_residual, p_weight, p_bias, p_y, m_i, b_call, shift, b_id, first, last,
        seed, site, first_sample, threshold, scale, num_plain, eps, rows, residual_rows,
        D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, SHIFTED: tl.constexpr,
    ):  # fmt: skip
        """Replicas first ... last - 1 of the rows at p_x, [ROWS, 1], whose column 0 is lane `shift` of b_call's first."""
        TILES: tl.constexpr = (D + BLOCK - 1) // BLOCK
        o_d = tl.arange(0, BLOCK)[None, :]
        b_weight, b_bias = load_columns(p_weight, o_d, D, BLOCK), load_columns(p_bias, o_d, D, BLOCK)
        p_x += first.to(tl.int64) * rows * D
        p_y += first.to(tl.int64) * rows * D
        p_residual += first.to(tl.int64) * residual_rows * D
        for i_r in range(first, last):
            # The plain replica keeps every lane.
            b_threshold, b_scale = tl.where(i_r < num_plain, 0, threshold), tl.where(i_r < num_plain, 1.0, scale)
            sample = first_sample + i_r - num_plain
            b_y, b_sum = (), tl.zeros([ROWS, BLOCK], tl.float32)
            for t in tl.static_range(TILES):
                m = m_i & (t * BLOCK + o_d < D)
                b_yt = tl.load(p_x + t * BLOCK + o_d, mask=m, other=0.0).to(tl.float32)
                if MASKED:
                    b_tile = b_call + t * (BLOCK // 8)
                    if SHIFTED:
                        keep = philox.keep_shifted_lanes(seed, b_tile, shift, sample, site, b_id, b_threshold, BLOCK // 8, ROWS)
                    else:
                        keep = philox.keep_lanes(seed, b_tile, sample, site, b_id, b_threshold, BLOCK // 8, ROWS)
                    b_yt = tl.where(keep, b_yt, 0.0) * b_scale
                b_yt += tl.load(p_residual + t * BLOCK + o_d, mask=m, other=0.0).to(tl.float32)  # 0 behind the last column
                b_y += (b_yt,)
                b_sum += b_yt
            b_mean, b_rstd = mean_and_rstd(b_y, b_sum, o_d, eps, D, BLOCK)
            for t in tl.static_range(TILES):
                b_out = (b_y[t] - b_mean) * b_rstd * b_weight[t] + b_bias[t]
                tl.store(p_y + t * BLOCK + o_d, b_out.to(p_y.dtype.element_ty), mask=m_i & (t * BLOCK + o_d < D))
            p_x += rows.to(tl.int64) * D
            p_y += rows.to(tl.int64) * D
            p_residual += residual_rows.to(tl.int64) * D

    @triton.jit(
        do_not_specialize=[
            "seed", "site", "first_sample", "threshold", "num_plain", "R", "replicas_at_once", "rows", "residual_rows"
        ]
    )  # fmt: skip
    def dropout_add_layer_norm_kernel(
        p_x,  # [R, rows, D]
        p_residual,  # [rows, D], or [R, rows, D] where residual_rows is rows
        p_weight,  # [D]
        p_bias,  # [D]
        p_y,  # [R, rows, D]
        p_ids,  # int64 [rows]
        p_offsets,  # int64 [rows]: element of column 0
        seed, site, first_sample, threshold, scale, num_plain, eps, R,
        replicas_at_once,  # of one program: they share weight, bias and the first rounds of Philox
        rows,
        residual_rows,  # 0 or rows
        D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        """ROWS rows, each of a warp of its own up to 1024 columns, so that no sum leaves it in 16 bits."""
        o_i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        m_i = o_i < rows
        first = tl.program_id(1) * replicas_at_once
        last = tl.minimum(first + replicas_at_once, R)
        b_id, offset = tl.load(p_ids + o_i, mask=m_i, other=0), tl.load(p_offsets + o_i, mask=m_i, other=0)
        b_call = ((offset >> 3) + tl.arange(0, BLOCK // 8)[None, :]).to(tl.int32)
        shift = (offset & 7).to(tl.int32)
        p_x, p_residual, p_y = p_x + o_i * D, p_residual + o_i * D, p_y + o_i * D
        # Rows begin with a call where D is a multiple of eight: half the Philox calls.
        if tl.max(tl.max(shift, 1), 0) == 0 or not MASKED:
            write_replicas(
                p_x, p_residual, p_weight, p_bias, p_y, m_i, b_call, shift, b_id, first, last,
                seed, site, first_sample, threshold, scale, num_plain, eps, rows, residual_rows, D, ROWS, BLOCK, MASKED, False,
            )  # fmt: skip
        else:
            write_replicas(
                p_x, p_residual, p_weight, p_bias, p_y, m_i, b_call, shift, b_id, first, last,
                seed, site, first_sample, threshold, scale, num_plain, eps, rows, residual_rows, D, ROWS, BLOCK, MASKED, True,
            )  # fmt: skip

    LONE = 1024  # columns up to which a row has one warp
    FULL = 4096  # programs that fill a card: below, one takes fewer replicas

    def shape_class(width: int) -> str:
        """Of tuning.py."""
        return next((most for most in tuning.CANDIDATES["dropout_add_layer_norm"] if width <= int(most)), "4096")

    def _triton(x, residual, weight, bias, eps, p, seed, site, example_ids, offsets, first_sample, plain_first) -> Tensor:
        replicas, rows, width = x.shape
        threshold, scale = philox.mask_parameters(p)
        x, residual, weight, bias = (table.dense(t) for t in (x, residual, weight, bias))
        out = torch.empty_like(x)
        if out.numel() == 0:
            return out
        most, num_warps = tuning.choose("dropout_add_layer_norm", shape_class(width), x.device)
        constexprs = tile(width, num_warps, LONE)
        programs = triton.cdiv(rows, constexprs["ROWS"])
        at_once = max(1, min(most, replicas * programs // FULL))
        with table.on_device_of(x):
            dropout_add_layer_norm_kernel[(programs, triton.cdiv(replicas, at_once))](
                x, residual, weight, bias, out, example_ids, offsets, seed, site, first_sample, threshold, scale, int(plain_first),
                eps, replicas, at_once, rows, 0 if residual.dim() == 2 else rows,
                MASKED=threshold > 0, num_warps=num_warps, **constexprs, **FUSED,
            )  # fmt: skip
        return out

    _TYPES = {"p_ids": "*i64", "p_offsets": "*i64", "seed": "i64", "scale": "fp32", "eps": "fp32"}
    _TYPES |= dict.fromkeys(
        ("site", "first_sample", "threshold", "num_plain", "R", "replicas_at_once", "rows", "residual_rows"), "i32"
    )
    SPECIALISATIONS = [
        Specialisation(
            f"dropout_add_layer_norm {dtype} D={width}{' masked' * masked} {most, num_warps}",
            dropout_add_layer_norm_kernel,
            {**dict.fromkeys(("p_x", "p_residual", "p_weight", "p_bias", "p_y"), f"*{dtype}"), **_TYPES},
            tile(width, num_warps, LONE) | {"MASKED": masked},
            num_warps=num_warps,
            fast=dtype == "bf16" and width == 768 and masked,
            aligned=True,
            lone_warps=width == 768 and dtype != "fp32",  # whose masks change places: four numbers a lane are 16 bytes, lanes eight
            tuned=(shape_class(width), (most, num_warps)),
        )
        for dtype in ("fp32", "fp16", "bf16")
        for width in (63, 768, 1024, 2048, 4096)
        for masked in (True, False)
        for most, num_warps in tuning.CANDIDATES["dropout_add_layer_norm"][shape_class(width)]
    ]

_op = table.register(
    "dropout_add_layer_norm",
    SCHEMA,
    reference=dropout_add_layer_norm_ref,
    cpu=None if table._C is None else _cpu,
    triton=_triton,
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    seed: int,
    site: int,
    example_ids: Tensor,
    offsets: Tensor,
    first_sample: int = 0,
    plain_first: bool = False,
) -> Tensor:
    """layer_norm(dropout(x) + residual): [R, rows, D], in the dtype of x. For frozen teachers: no gradient.

    x: [R, rows, D]. residual: [rows, D] (the same for all replicas) or [R, rows, D]. weight, bias: [D]. eps > 0.
    p, seed, site, example_ids, offsets, first_sample: as in `repeat_dropout`. plain_first: replica 0 is the deterministic pass.
    Raises ValueError for shapes, eps, p, seed, site, samples or ids outside their ranges.
    """
    if x.dim() != 3 or residual.shape not in (x.shape, x.shape[1:]):
        raise ValueError(f"x {list(x.shape)} must be [R, rows, D] and residual {list(residual.shape)} the same or [rows, D]")
    if weight.shape != x.shape[2:] or bias.shape != x.shape[2:]:
        raise ValueError(f"weight {list(weight.shape)} and bias {list(bias.shape)} must have shape [{x.shape[2]}]")
    if not (x.is_floating_point() and residual.is_floating_point()):
        raise ValueError(f"x and residual must be of floating-point types, not {x.dtype} and {residual.dtype}")
    if not eps > 0:
        raise ValueError(f"eps {eps} must be positive")
    philox.check_counters(site, first_sample, max(0, x.shape[0] - int(plain_first)))
    ids = philox.check_rows("example_ids", example_ids, x.shape[1], x.device)
    offsets = philox.check_rows("offsets", offsets, x.shape[1], x.device)
    philox.mask_parameters(p)
    return _op(x, residual, weight, bias, eps, p, philox.signed_seed(seed), site, ids, offsets, first_sample, plain_first)
