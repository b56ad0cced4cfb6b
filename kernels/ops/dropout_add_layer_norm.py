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
from muka_fast.ops.philox import PHILOX_CALL_OPERATIONS, philox_calls
from muka_fast.ops.reference import dropout_add_layer_norm_ref

SCHEMA = (
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, float p, int seed, int site, Tensor example_ids,"
    " Tensor offsets, int first_sample, bool plain_first) -> Tensor"
)


def bytes_moved(replicas: int, rows: int, width: int, itemsize: int = 4, shared_residual: bool = True) -> int:
    """Bytes the op must read and write."""
    return itemsize * rows * width * (2 * replicas + (1 if shared_residual else replicas)) + 16 * rows + 2 * itemsize * width


def operations(replicas: int, rows: int, width: int) -> int:
    """32-bit operations of the masks (rows that begin at a multiple of eight) and of the normalisation."""
    return replicas * rows * (philox_calls(0, width) * PHILOX_CALL_OPERATIONS + 8 * width)


def _fake(x, residual, weight, bias, eps, p, seed, site, example_ids, offsets, first_sample, plain_first) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _reference(x, residual, weight, bias, eps, p, seed, site, example_ids, offsets, first_sample, plain_first) -> Tensor:
    seed = philox.unsigned_seed(seed)
    return dropout_add_layer_norm_ref(
        x, residual, weight, bias, eps, p, seed, site, example_ids, offsets, first_sample, plain_first
    ).contiguous()


def _cpu(x, residual, weight, bias, eps, p, seed, site, example_ids, offsets, first_sample, plain_first) -> Tensor:
    if x.dtype == torch.float64:  # only tests ask for it
        return _reference(x, residual, weight, bias, eps, p, seed, site, example_ids, offsets, first_sample, plain_first)
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

    @triton.jit
    def write_replicas(
        p_x, p_residual, p_weight, p_bias, p_y, b_call, shift, b_id, first, last,
        seed, site, first_sample, threshold, scale, num_plain, eps, rows, D, residual_rows,
        CALLS: tl.constexpr, MASKED: tl.constexpr, SHIFTED: tl.constexpr,
    ):  # fmt: skip
        """Replicas first ... last - 1 of the row at p_x, whose column 0 is lane `shift` of b_call's first [1, CALLS]."""
        o_d = tl.arange(0, CALLS * 8)[None, :]
        m_d = o_d < D
        b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
        p_x += first.to(tl.int64) * rows * D
        p_y += first.to(tl.int64) * rows * D
        p_residual += first.to(tl.int64) * residual_rows * D
        for i_r in range(first, last):
            b_x = tl.load(p_x + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_residual = tl.load(p_residual + o_d, mask=m_d, other=0.0).to(tl.float32)
            if MASKED:
                # The plain replica keeps every lane.
                b_threshold, b_scale = tl.where(i_r < num_plain, 0, threshold), tl.where(i_r < num_plain, 1.0, scale)
                sample = first_sample + i_r - num_plain
                if SHIFTED:
                    keep = philox.keep_shifted_lanes(seed, b_call, shift, sample, site, b_id, b_threshold, CALLS, 1)
                else:
                    keep = philox.keep_lanes(seed, b_call, sample, site, b_id, b_threshold, CALLS, 1)
                b_x = tl.where(keep, b_x, 0.0) * b_scale
            b_y = b_x + b_residual  # 0 behind the last column
            b_centred = tl.where(m_d, b_y - tl.sum(b_y, 1, keep_dims=True) / D, 0.0)
            b_y = b_centred * tl.rsqrt(tl.sum(b_centred * b_centred, 1, keep_dims=True) / D + eps)
            tl.store(p_y + o_d, (b_y * b_weight + b_bias).to(p_y.dtype.element_ty), mask=m_d)
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
        rows, D,
        residual_rows,  # 0 or rows
        CALLS: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        i_i = tl.program_id(0).to(tl.int64)
        first = tl.program_id(1) * replicas_at_once
        last = tl.minimum(first + replicas_at_once, R)
        b_id = tl.load(p_ids + i_i)
        offset = tl.load(p_offsets + i_i)
        b_call = ((offset >> 3) + tl.arange(0, CALLS)).to(tl.int32)[None, :]
        shift = (offset & 7).to(tl.int32)
        if shift == 0 or not MASKED:  # the row begins with a call, as where D is a multiple of eight: half the Philox calls
            write_replicas(
                p_x + i_i * D, p_residual + i_i * D, p_weight, p_bias, p_y + i_i * D, b_call, shift, b_id, first, last,
                seed, site, first_sample, threshold, scale, num_plain, eps, rows, D, residual_rows, CALLS, MASKED, False,
            )  # fmt: skip
        else:
            write_replicas(
                p_x + i_i * D, p_residual + i_i * D, p_weight, p_bias, p_y + i_i * D, b_call, shift, b_id, first, last,
                seed, site, first_sample, threshold, scale, num_plain, eps, rows, D, residual_rows, CALLS, MASKED, True,
            )  # fmt: skip

    FULL = 4096  # programs that fill a card: below, one takes fewer replicas

    def block(width: int) -> tuple[int, str]:
        """CALLS of one row, and its class of shape in tuning.py."""
        calls = triton.next_power_of_2(philox_calls(0, width))
        return calls, next((most for most in tuning.CANDIDATES["dropout_add_layer_norm"] if calls <= int(most)), "4096")

    def _triton(x, residual, weight, bias, eps, p, seed, site, example_ids, offsets, first_sample, plain_first) -> Tensor:
        if x.dtype == torch.float64:  # only tests ask for it
            return _reference(x, residual, weight, bias, eps, p, seed, site, example_ids, offsets, first_sample, plain_first)
        replicas, rows, width = x.shape
        threshold, scale = philox.mask_parameters(p)
        x, residual, weight, bias = (t.contiguous() for t in (x, residual, weight, bias))
        out = torch.empty_like(x)
        if out.numel() == 0:
            return out
        CALLS, shape = block(width)
        most, num_warps = tuning.choose("dropout_add_layer_norm", shape, x.device)
        at_once = max(1, min(most, replicas * rows // FULL))
        with table.on_device_of(x):
            dropout_add_layer_norm_kernel[(rows, triton.cdiv(replicas, at_once))](
                x, residual, weight, bias, out, example_ids, offsets, seed, site, first_sample, threshold, scale, int(plain_first),
                eps, replicas, at_once, rows, width, 0 if residual.dim() == 2 else rows, CALLS=CALLS, MASKED=threshold > 0,
                num_warps=num_warps,
            )  # fmt: skip
        return out

    _TYPES = {"p_ids": "*i64", "p_offsets": "*i64", "seed": "i64", "scale": "fp32", "eps": "fp32"}
    _TYPES |= dict.fromkeys(
        ("site", "first_sample", "threshold", "num_plain", "R", "replicas_at_once", "rows", "D", "residual_rows"), "i32"
    )
    SPECIALISATIONS = [
        Specialisation(
            f"dropout_add_layer_norm {dtype} D={width}{' masked' * masked} {num_warps}",
            dropout_add_layer_norm_kernel,
            {**dict.fromkeys(("p_x", "p_residual", "p_weight", "p_bias", "p_y"), f"*{dtype}"), **_TYPES},
            {"CALLS": block(width)[0], "MASKED": masked},
            num_warps=num_warps,
            fast=dtype == "bf16" and width == 768 and num_warps == 2 and masked,
        )
        for dtype in ("fp32", "fp16", "bf16")
        for width in (63, 768, 2048, 4096)
        for masked in (True, False)
        for num_warps in dict.fromkeys(warps for _, warps in tuning.CANDIDATES["dropout_add_layer_norm"][block(width)[1]])
    ]

_op = table.register(
    "dropout_add_layer_norm",
    SCHEMA,
    reference=_reference,
    cpu=None if table._C is None else _cpu,
    triton=_triton,
    fake=_fake,
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
    if not eps > 0:
        raise ValueError(f"eps {eps} must be positive")
    philox.check_counters(site, first_sample, max(0, x.shape[0] - int(plain_first)))
    ids = philox.check_rows("example_ids", example_ids, x.shape[1], x.device)
    offsets = philox.check_rows("offsets", offsets, x.shape[1], x.device)
    philox.mask_parameters(p)
    return _op(x, residual, weight, bias, eps, p, philox.signed_seed(seed), site, ids, offsets, first_sample, plain_first)
