"""residual_norm: what follows every dense layer of a post-LN encoder in training, one pass over memory in each direction.

    z = mask(x + dense_bias) + residual          x: the dense layer's product, without its bias
    y = (z - mean) rstd * weight + bias          mean, rstd = 1 / sqrt(variance + eps) of a row of z
    mask: the contract of philox.py, element l D + d at column d of row l of a text, drawn again for the gradient

    dz = rstd (g - mean(g) - xhat mean(g xhat))  g = dy * weight, xhat = (z - mean) rstd; also the gradient of residual
    dx = mask(dz)                                dweight = sum dy xhat, dbias = sum dy, ddense_bias = sum dx, over rows

Bytes: forward x and residual read, y and z written; backward dy and z read, dz and dx written (p = 0: dz alone, it is dx).
A program takes rows until there are none, each a warp's own up to 768 columns (1024 forward), so that hardly a warp waits for another
in 16 bits; the sums of the columns stay in registers, and one sum over programs ends the gradient.
Letters: B texts of L rows (tokens) · D columns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from muka_fast.ops import norm_tiles, philox, table
from muka_fast.ops.aot import Specialisation
from muka_fast.ops.reference import LANES, Draws, dropout_threshold, residual_norm_ref

_triton: Callable | None = None
SPECIALISATIONS: list[Specialisation] = []
if philox.triton is not None:
    import triton
    import triton.language as tl

    from muka_fast.ops.fast_math import FUSED
    from muka_fast.ops.norm_tiles import load_columns, mean_and_rstd

    @triton.jit
    def first_draws(p_ids, o_i, m_i, L, D: tl.constexpr):
        """Text, and Philox call of column 0, of the rows o_i, [ROWS, 1] each."""
        tl.static_assert(D % 8 == 0)
        return tl.load(p_ids + o_i // L, mask=m_i, other=0), o_i % L * (D // 8)

    @triton.jit
    def kept(key, site, b_id, b_call, column, threshold, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """True where kept, [ROWS, BLOCK] from `column` on, which eight divides; key: seed and sample."""
        b_call += (column // 8 + tl.arange(0, BLOCK // 8))[None, :]
        return philox.keep_lanes(key[0], b_call, key[1], site, b_id, threshold, BLOCK // 8, ROWS)

    @triton.jit(do_not_specialize=["site", "threshold", "rows", "L"])
    def residual_norm_kernel(
        p_x,  # [rows, D]
        p_residual,  # [rows, D]
        p_y,  # [rows, D]
        p_z,  # [rows, D], written where SAVED, as are
        p_mean,  # fp32 [rows]
        p_rstd,  # fp32 [rows]
        p_dense_bias,  # [D]
        p_weight,  # [D]
        p_bias,  # [D]
        p_key,  # int64 [2], read where MASKED, as are
        p_ids,  # int64 [B]
        site, threshold, scale, eps, rows, L,
        D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, SAVED: tl.constexpr,
    ):  # fmt: skip
        TILES: tl.constexpr = (D + BLOCK - 1) // BLOCK
        o_d = tl.arange(0, BLOCK)[None, :]
        b_dense_bias = load_columns(p_dense_bias, o_d, D, BLOCK)
        b_weight = load_columns(p_weight, o_d, D, BLOCK)
        b_bias = load_columns(p_bias, o_d, D, BLOCK)
        if MASKED:
            key = tl.load(p_key), tl.load(p_key + 1)
        for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
            o_i = first + tl.arange(0, ROWS)[:, None]
            m_i = o_i < rows
            o = o_i.to(tl.int64) * D + o_d
            b_z, b_sum = (), tl.zeros([ROWS, BLOCK], tl.float32)
            if MASKED:
                b_id, b_call = first_draws(p_ids, o_i, m_i, L, D)
            for t in tl.static_range(TILES):
                m = m_i & (t * BLOCK + o_d < D)
                b_zt = tl.load(p_x + o + t * BLOCK, mask=m, other=0.0).to(tl.float32) + b_dense_bias[t]
                if MASKED:
                    b_zt = tl.where(kept(key, site, b_id, b_call, t * BLOCK, threshold, ROWS, BLOCK), b_zt, 0.0) * scale
                b_zt += tl.load(p_residual + o + t * BLOCK, mask=m, other=0.0).to(tl.float32)  # 0 behind the last column
                if SAVED:
                    tl.store(p_z + o + t * BLOCK, b_zt.to(p_z.dtype.element_ty), mask=m)
                b_z += (b_zt,)
                b_sum += b_zt
            b_mean, b_rstd = mean_and_rstd(b_z, b_sum, o_d, eps, D, BLOCK)
            for t in tl.static_range(TILES):
                b_y = (b_z[t] - b_mean) * b_rstd * b_weight[t] + b_bias[t]
                tl.store(p_y + o + t * BLOCK, b_y.to(p_y.dtype.element_ty), mask=m_i & (t * BLOCK + o_d < D))
            if SAVED:
                tl.store(p_mean + o_i, b_mean, mask=m_i)
                tl.store(p_rstd + o_i, b_rstd, mask=m_i)

    @triton.jit(do_not_specialize=["site", "threshold", "rows", "L"])
    def residual_norm_backward_kernel(
        p_dy,  # [rows, D]
        p_z,  # [rows, D]
        p_mean,  # fp32 [rows]
        p_rstd,  # fp32 [rows]
        p_weight,  # [D]
        p_dz,  # [rows, D]
        p_dx,  # [rows, D], written where MASKED
        p_sums,  # fp32 [3, programs, D]: of dweight, dbias, ddense_bias
        p_key,  # int64 [2], read where MASKED, as are
        p_ids,  # int64 [B]
        site, threshold, scale, rows, L,
        D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        TILES: tl.constexpr = (D + BLOCK - 1) // BLOCK
        o_d = tl.arange(0, BLOCK)[None, :]
        b_weight = load_columns(p_weight, o_d, D, BLOCK)
        if MASKED:
            key = tl.load(p_key), tl.load(p_key + 1)
        b_dweight, b_dbias, b_ddense_bias = (), (), ()
        for _ in tl.static_range(TILES):
            b_dweight += (tl.zeros([ROWS, BLOCK], tl.float32),)
            b_dbias += (tl.zeros([ROWS, BLOCK], tl.float32),)
            b_ddense_bias += (tl.zeros([ROWS, BLOCK], tl.float32),)
        for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
            o_i = first + tl.arange(0, ROWS)[:, None]
            m_i = o_i < rows
            o = o_i.to(tl.int64) * D + o_d
            b_mean, b_rstd = tl.load(p_mean + o_i, mask=m_i, other=0.0), tl.load(p_rstd + o_i, mask=m_i, other=0.0)
            b_dy, b_xhat = (), ()
            b_sum, b_along = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
            for t in tl.static_range(TILES):
                m = m_i & (t * BLOCK + o_d < D)
                b_dyt = tl.load(p_dy + o + t * BLOCK, mask=m, other=0.0).to(tl.float32)
                b_zt = tl.load(p_z + o + t * BLOCK, mask=m, other=0.0).to(tl.float32)
                b_xt = (b_zt - b_mean) * b_rstd
                b_g = b_dyt * b_weight[t]  # 0 behind the last column, so that xhat does not count there
                b_sum += b_g
                b_along += b_g * b_xt
                b_dy += (b_dyt,)
                b_xhat += (b_xt,)
            b_sum = tl.sum(b_sum, 1, keep_dims=True) * (1.0 / D)
            b_along = tl.sum(b_along, 1, keep_dims=True) * (1.0 / D)
            dweight, dbias, ddense_bias = (), (), ()
            if MASKED:
                b_id, b_call = first_draws(p_ids, o_i, m_i, L, D)
            for t in tl.static_range(TILES):
                m = m_i & (t * BLOCK + o_d < D)
                b_dz = (b_dy[t] * b_weight[t] - b_sum - b_xhat[t] * b_along) * b_rstd
                tl.store(p_dz + o + t * BLOCK, b_dz.to(p_dz.dtype.element_ty), mask=m)
                if MASKED:
                    b_dz = tl.where(kept(key, site, b_id, b_call, t * BLOCK, threshold, ROWS, BLOCK), b_dz, 0.0) * scale
                    tl.store(p_dx + o + t * BLOCK, b_dz.to(p_dx.dtype.element_ty), mask=m)
                dweight += (b_dweight[t] + b_dy[t] * b_xhat[t],)
                dbias += (b_dbias[t] + b_dy[t],)
                ddense_bias += (b_ddense_bias[t] + b_dz,)
            b_dweight, b_dbias, b_ddense_bias = dweight, dbias, ddense_bias
        p_sums += tl.program_id(0) * D
        sums = tl.num_programs(0) * D
        for t in tl.static_range(TILES):
            o, m = t * BLOCK + o_d, t * BLOCK + o_d < D
            tl.store(p_sums + o, tl.sum(b_dweight[t], 0, keep_dims=True), mask=m)
            tl.store(p_sums + sums + o, tl.sum(b_dbias[t], 0, keep_dims=True), mask=m)
            tl.store(p_sums + 2 * sums + o, tl.sum(b_ddense_bias[t], 0, keep_dims=True), mask=m)

    def tile(width: int, backward: bool) -> tuple[dict[str, int], int]:
        """Constexprs, and warps; a row has one of them up to 768 columns, 1024 forward."""
        warps = min(16, max(4, triton.next_power_of_2(triton.cdiv(width, 2)) // 256))
        return norm_tiles.tile(width, warps, 768 if backward else 1024), warps

    def programs_at_once(width: int, backward: bool) -> int:
        """On a multiprocessor, as registers allow: those of one tile, of two, and of three or four."""
        constexprs, warps = tile(width, backward)
        tiles = triton.cdiv(width, constexprs["BLOCK"])
        return max(1, ((16, 12, 8, 8) if backward else (24, 16, 16, 12))[min(tiles, 4) - 1] // warps)

    def launch_options(rows: int, width: int, device: torch.device, backward: bool) -> tuple[int, dict[str, int]]:
        """Programs, all of them at work at once. In the interpreter three."""
        constexprs, warps = tile(width, backward)
        programs = 3
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            programs = processors * programs_at_once(width, backward)
        return min(programs, triton.cdiv(rows, constexprs["ROWS"])), {**constexprs, "num_warps": warps}

    class ResidualNorm(torch.autograd.Function):
        """x and residual contiguous, of one dtype; key, ids, site: of the draws; saved: z in the dtype of x, mean and rstd in fp32."""

        @staticmethod
        def forward(ctx: Any, x, dense_bias, residual, weight, bias, p, eps, key, ids, site, saved) -> Tensor:
            y, (width, rows) = torch.empty_like(x), (x.shape[-1], x.shape[:-1].numel())
            z = torch.empty_like(x) if saved else None
            mean, rstd = (torch.empty(rows if saved else 0, dtype=torch.float32, device=x.device) for _ in range(2))
            (threshold, scale), (dense_bias, bias) = philox.mask_parameters(p), map(table.dense, (dense_bias, bias))
            weight = table.dense(weight)
            if rows:
                programs, options = launch_options(rows, width, x.device, backward=False)
                with table.on_device_of(x):
                    residual_norm_kernel[(programs,)](
                        x, residual, y, z, mean, rstd, dense_bias, weight, bias, key, ids, site, threshold, scale, eps,
                        rows, x.shape[1:-1].numel(), MASKED=threshold > 0, SAVED=saved, **options, **FUSED,
                    )  # fmt: skip
            ctx.save_for_backward(z, mean, rstd, weight, key, ids)
            ctx.p, ctx.site, ctx.dtypes = p, site, (weight.dtype, bias.dtype, dense_bias.dtype)
            return y

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            z, mean, rstd, weight, key, ids = ctx.saved_tensors
            width, rows = z.shape[-1], len(mean)
            threshold, scale = philox.mask_parameters(ctx.p)
            dz = torch.empty_like(z)
            dx = torch.empty_like(z) if threshold else dz
            programs, options = launch_options(rows, width, z.device, backward=True)
            # A program's sums are traffic as well: few rows share fewer programs, eight each.
            programs = min(programs, triton.cdiv(rows, 8))
            sums = torch.empty(3, programs, width, dtype=torch.float32, device=z.device)
            if rows:
                with table.on_device_of(z):
                    residual_norm_backward_kernel[(programs,)](
                        table.dense(dy), z, mean, rstd, weight, dz, dx, sums, key, ids, ctx.site, threshold, scale, rows,
                        z.shape[1:-1].numel(), MASKED=threshold > 0, **options, **FUSED,
                    )  # fmt: skip
            dweight, dbias, ddense_bias = (s.to(dtype) for s, dtype in zip(sums.sum(1), ctx.dtypes, strict=True))
            return dx, ddense_bias, dz, dweight, dbias, *(None,) * 6

    def _triton(x, dense_bias, residual, weight, bias, p, eps, draws) -> Tensor:
        saved = torch.is_grad_enabled() and any(t.requires_grad for t in (x, dense_bias, residual, weight, bias))
        key, ids, site = (None, None, 0) if draws is None else draws
        return ResidualNorm.apply(table.dense(x), dense_bias, table.dense(residual), weight, bias, p, eps, key, ids, site, saved)

    def _specialisation(dtype: str, parameters: str, width: int, masked: bool, direction: str) -> Specialisation:
        backward = direction == "backward"
        constexprs, warps = tile(width, backward)
        kernel = residual_norm_backward_kernel if backward else residual_norm_kernel
        types = dict.fromkeys(("p_x", "p_residual", "p_y", "p_z", "p_dy", "p_dz", "p_dx"), f"*{dtype}")
        types |= dict.fromkeys(("p_dense_bias", "p_weight", "p_bias"), f"*{parameters}")
        types |= dict.fromkeys(("p_mean", "p_rstd", "p_sums"), "*fp32")
        types |= {"p_key": "*i64", "p_ids": "*i64", "scale": "fp32", "eps": "fp32"}
        types |= dict.fromkeys(("site", "threshold", "rows", "L"), "i32")
        return Specialisation(
            f"residual_norm {dtype} {parameters} D={width} {direction}{' masked' * masked}",
            kernel,
            {name: types[name] for name in kernel.arg_names if name in types},
            constexprs | {"MASKED": masked} | ({} if backward else {"SAVED": direction == "forward"}),
            num_warps=warps,
            fast=dtype == "bf16" and width == 768 and masked,
            aligned=True,
            lone_warps=backward and width == 768 and dtype != "fp32",
            at_once=programs_at_once(width, backward),
        )

    _MODES = [(True, "forward"), (True, "backward"), (False, "forward"), (False, "backward"), (False, "inference")]
    SPECIALISATIONS = [
        _specialisation(*dtypes, width, *mode)
        for dtypes in (("fp32", "fp32"), ("fp16", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"))
        for width in (33, 40, 384, 768, 1024, 2048, 4096)
        for mode in _MODES
        if width % LANES == 0 or not mode[0]
    ]


def residual_norm(
    x: Tensor, dense_bias: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, p: float, eps: float, draws: Draws | None
) -> Tensor:
    """layer_norm(dropout(x + dense_bias) + residual), shape and dtype of x; differentiable in all five. For training.

    x, residual: [B, ..., D], one dtype, as many rows (tokens) of every text.
    dense_bias, weight, bias: [D] (fp32 under autocast); their gradients are summed in fp32.
    p: dropout probability in [0, 65535.5 / 65536), to 16 bits; no masks are drawn where it is 0. eps > 0.
    draws: of the B texts; may be None where p is 0.
    Computed in fp32 (float64 for float64). On a GPU by Triton, elsewhere and for masks of a D that eight does not divide by PyTorch:
    equal masks. Raises ValueError for shapes, dtypes, p, eps or draws that do not fit.
    """
    if x.dim() < 2 or x.shape[-1] == 0 or residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"x {list(x.shape)} and residual {list(residual.shape)} must have one shape [B, ..., D > 0] and one dtype")
    if any(t.shape != x.shape[-1:] for t in (dense_bias, weight, bias)):
        shapes = ", ".join(str(list(t.shape)) for t in (dense_bias, weight, bias))
        raise ValueError(f"dense_bias, weight and bias must have shape [{x.shape[-1]}], not {shapes}")
    if not eps > 0:
        raise ValueError(f"eps {eps} must be positive")
    philox.check_draws(draws, p, len(x), x.device)
    fits = x.dtype != torch.float64 and (x.shape[-1] % LANES == 0 or dropout_threshold(p) == 0)
    form = _triton if _triton is not None and table.runs_triton(x) and fits else residual_norm_ref
    return form(x, dense_bias, residual, weight, bias, p, eps, draws)
