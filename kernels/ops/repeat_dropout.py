"""repeat_dropout: K differently masked copies of the same rows, without a mask in memory.

    y[k, r, d] = x[r, d] * scale  where lane(offset[r] + d, first_sample + k, site, id[r]) >= t,  else 0
    t = round-half-even(p * 65536), scale = float32(65536 / (65536 - t)); lanes: philox.py
    gradient: dx[r, d] = sum_k mask[k, r, d] * scale * dy[k, r, d]

Bytes: x once, K copies written. Operations: ten Philox rounds for eight elements of every copy, on a GPU twice as many where
a row begins inside a call.
Letters: K samples (k) · rows (r) · D columns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from muka_fast.ops import philox, table, tuning
from muka_fast.ops.aot import Specialisation
from muka_fast.ops.philox import LANES, philox_calls
from muka_fast.ops.reference import repeat_dropout_ref

SCHEMA = (
    "(Tensor x, int num_samples, float p, int seed, int site, Tensor example_ids, Tensor offsets, int first_sample, Tensor? key=None)"
    " -> Tensor"
)


def bytes_moved(num_samples: int, rows: int, width: int, itemsize: int = 4, repeated: bool = True) -> int:
    """Bytes the op must read and write; repeated: x is [rows, D] (read once), else [K, rows, D]."""
    return itemsize * rows * width * ((1 if repeated else num_samples) + num_samples) + 16 * rows


def repeat_dropout_reference(
    x: Tensor, num_samples: int, p: float, seed: int, site: int, example_ids: Tensor, offsets: Tensor, first_sample: int, key=None
) -> Tensor:
    seed, first_sample = philox.on_the_host(seed, first_sample, key)
    return repeat_dropout_ref(x, num_samples, p, seed, site, example_ids, offsets, first_sample).contiguous()


def repeat_dropout_cpu(
    x: Tensor, num_samples: int, p: float, seed: int, site: int, example_ids: Tensor, offsets: Tensor, first_sample: int, key=None
) -> Tensor:
    source = x.float().contiguous()
    rows, width = source.shape[-2:]
    threshold, scale = philox.mask_parameters(p)
    seed, first_sample = philox.on_the_host(seed, first_sample, key)
    out = torch.empty((num_samples, rows, width), dtype=torch.float32)
    table._C.repeat_dropout(
        source.data_ptr(), out.data_ptr(), example_ids.data_ptr(), offsets.data_ptr(), num_samples, rows, width,
        0 if source.dim() == 2 else rows * width, seed, site, first_sample, threshold, scale,
        torch.get_num_threads(),
    )  # fmt: skip
    return out.to(x.dtype)


repeat_dropout_triton: Callable | None = None
SPECIALISATIONS: list[Specialisation] = []
if philox.triton is not None:
    import triton
    import triton.language as tl

    from muka_fast.ops.fast_math import FUSED

    @triton.jit
    def write_copies(
        p_x, p_y, mask, b_call, shift, b_id, seed, site, first_sample, threshold, scale, K, y_stride,
        ROWS: tl.constexpr, CALLS: tl.constexpr, REPEATED: tl.constexpr, STORE: tl.constexpr, SHIFTED: tl.constexpr,
    ):  # fmt: skip
        """K copies of a tile [ROWS, CALLS * 8] whose first column is lane `shift` [ROWS, 1] of b_call's first."""
        if REPEATED:
            b_x = tl.load(p_x, mask=mask, other=0.0)
        for k in range(K):
            if not REPEATED:
                b_x = tl.load(p_x, mask=mask, other=0.0)
                p_x += y_stride
            if SHIFTED:
                keep = philox.keep_shifted_lanes(seed, b_call, shift, first_sample + k, site, b_id, threshold, CALLS, ROWS)
            else:
                keep = philox.keep_lanes(seed, b_call, first_sample + k, site, b_id, threshold, CALLS, ROWS)
            b_y = tl.where(keep, b_x.to(tl.float32) * scale, 0.0)
            tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=mask, cache_modifier=STORE)
            p_y += y_stride

    @triton.jit(do_not_specialize=["seed", "site", "first_sample", "threshold", "K"])
    def repeat_dropout_kernel(
        p_x,  # [rows, D], or [K, rows, D] where not REPEATED
        p_y,  # [K, rows, D]
        p_ids,  # int64 [rows]
        p_offsets,  # int64 [rows]: element of column 0
        p_key,  # int64 [2]: seed and first sample, where KEYED
        seed, site, first_sample, threshold, scale, K, rows, D,
        y_stride,  # rows * D
        ROWS: tl.constexpr, CALLS: tl.constexpr, REPEATED: tl.constexpr, STORE: tl.constexpr, KEYED: tl.constexpr,
    ):  # fmt: skip
        if KEYED:
            seed, first_sample = tl.load(p_key), tl.load(p_key + 1).to(tl.int32)
        # Programs side by side write side by side: neighbours in time are neighbours in memory.
        i_r, i_c = tl.program_id(0) // tl.cdiv(D, CALLS * 8), tl.program_id(0) % tl.cdiv(D, CALLS * 8)
        o_r = i_r.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        o_d = i_c * CALLS * 8 + tl.arange(0, CALLS * 8)
        m_r = o_r < rows
        b_id = tl.load(p_ids + o_r, mask=m_r, other=0)[:, None]
        b_offset = tl.load(p_offsets + o_r, mask=m_r, other=0)[:, None]
        b_call = ((b_offset >> 3) + (i_c * CALLS + tl.arange(0, CALLS))[None, :]).to(tl.int32)  # [ROWS, CALLS]
        shift = (b_offset & 7).to(tl.int32)
        o_x = o_r[:, None] * D + o_d[None, :]
        mask = m_r[:, None] & (o_d < D)[None, :]
        if tl.max(shift) == 0:  # every row begins with a call, as where D is a multiple of eight: half the Philox calls
            write_copies(
                p_x + o_x, p_y + o_x, mask, b_call, shift, b_id, seed, site, first_sample, threshold, scale, K, y_stride,
                ROWS, CALLS, REPEATED, STORE, False,
            )  # fmt: skip
        else:
            write_copies(
                p_x + o_x, p_y + o_x, mask, b_call, shift, b_id, seed, site, first_sample, threshold, scale, K, y_stride,
                ROWS, CALLS, REPEATED, STORE, True,
            )  # fmt: skip

    def block(width: int, calls_of_row: int, calls: int, streamed: int) -> dict[str, Any]:
        """Constexprs of a program that makes `calls` at once, at most `calls_of_row` of them in one row."""
        calls_of_row = min(calls_of_row, triton.next_power_of_2(philox_calls(width)))
        return {"ROWS": calls // calls_of_row, "CALLS": calls_of_row, "STORE": ".cs" if streamed else ""}

    def repeat_dropout_triton(
        x: Tensor, num_samples: int, p: float, seed: int, site: int, example_ids: Tensor, offsets: Tensor, first_sample: int, key=None
    ) -> Tensor:
        source = x.contiguous()
        rows, width = source.shape[-2:]
        threshold, scale = philox.mask_parameters(p)
        out = torch.empty((num_samples, rows, width), dtype=x.dtype, device=x.device)
        if out.numel() == 0:
            return out
        *entry, num_warps = tuning.choose("repeat_dropout", "any", x.device)
        constexprs = block(width, *entry)
        grid = (triton.cdiv(rows, constexprs["ROWS"]) * triton.cdiv(width, constexprs["CALLS"] * LANES),)
        with table.on_device_of(x):
            repeat_dropout_kernel[grid](
                source, out, example_ids, offsets, key, seed, site, first_sample, threshold, scale, num_samples, rows, width,
                rows * width, REPEATED=source.dim() == 2, KEYED=key is not None, num_warps=num_warps, **constexprs, **FUSED,
            )  # fmt: skip
        return out

    _TYPES = dict.fromkeys(("p_ids", "p_offsets", "p_key"), "*i64") | {"seed": "i64", "scale": "fp32"}
    _TYPES |= dict.fromkeys(("site", "first_sample", "threshold", "K", "rows", "D", "y_stride"), "i32")
    SPECIALISATIONS = [
        Specialisation(
            f"repeat_dropout {dtype} {'[rows, D]' if repeated else '[K, rows, D]'} D={width} {(*entry, num_warps)}{' keyed' * keyed}",
            repeat_dropout_kernel,
            {"p_x": f"*{dtype}", "p_y": f"*{dtype}", **_TYPES},
            block(width, *entry) | {"REPEATED": repeated, "KEYED": keyed},
            num_warps=num_warps,
            fast=dtype == "fp32" and width == 1024 and not keyed,
            tuned=("any", (*entry, num_warps)),
        )
        for dtype in ("fp32", "fp16", "bf16")
        for repeated in (True, False)
        for width in (63, 1024)
        for *entry, num_warps in tuning.CANDIDATES["repeat_dropout"]["any"]
        for keyed in ((False, True) if width == 1024 and not repeated else (False,))  # as training asks
    ]

_op = table.register(
    "repeat_dropout",
    SCHEMA,
    reference=repeat_dropout_reference,
    cpu=None if table._C is None else repeat_dropout_cpu,
    triton=repeat_dropout_triton,
    fake=lambda x, num_samples, *_: x.new_empty((num_samples, *x.shape[-2:])),
)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x, ctx.num_samples, ctx.p, ctx.seed, ctx.site, example_ids, offsets, ctx.first_sample, key = inputs
    ctx.repeated = x.dim() == 2
    ctx.save_for_backward(example_ids, offsets, key)


def _backward(ctx, grad: Tensor) -> tuple:
    example_ids, offsets, key = ctx.saved_tensors
    masked = _op(grad, ctx.num_samples, ctx.p, ctx.seed, ctx.site, example_ids, offsets, ctx.first_sample, key)
    return masked.sum(0) if ctx.repeated else masked, *(None,) * 8


torch.library.register_autograd("muka_fast::repeat_dropout", _backward, setup_context=_save, lib=table.LIBRARY)


def repeat_dropout(
    x: Tensor,
    num_samples: int,
    p: float,
    seed: int,
    site: int,
    example_ids: Tensor,
    offsets: Tensor,
    first_sample: int = 0,
    key: Tensor | None = None,
) -> Tensor:
    """K masked copies of x, [K, rows, D], in its dtype; differentiable in x.

    x: [rows, D], read once, or [K, rows, D]; float32, float16, bfloat16 or float64.
    p: dropout probability, 0 <= p < 1 (rounded to 1/65536; 0 copies). seed: 64 bits, unsigned. site: 0 ... 2^32 - 1.
    example_ids, offsets: int64 [rows]: the text of each row and the element index of its first column (philox.py); both wrap,
    ids at 2^32 and offsets at 2^35. first_sample: sample number of copy 0, so that K copies can be made in several calls.
    key: that of `Draws` (reference.py), on the device of x, for seed and first_sample.
    Raises ValueError for anything outside these ranges.
    """
    if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] != num_samples):
        raise ValueError(f"x must be [rows, D] or [{num_samples}, rows, D], not {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating-point type, not {x.dtype}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    philox.check_counters(site, first_sample, num_samples)
    philox.mask_parameters(p)
    ids = philox.check_rows("example_ids", example_ids, x.shape[-2], x.device)
    offsets = philox.check_rows("offsets", offsets, x.shape[-2], x.device)
    if key is not None:
        philox.check_key(key, x.device)
    return _op(x, num_samples, p, philox.signed_seed(seed), site, ids, offsets, first_sample, key)
