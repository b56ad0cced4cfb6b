"""self_attention: the attention of an encoder layer in training, from the product of queries, keys and values and back to it.

    P = softmax_l(q_i . k_l / sqrt(d))           of the keys l that query i sees; a query that sees none has P = 0
    y = mask(P) v
    mask: the contract of philox.py, element = (head * 16384 + i) * 16384 + l, drawn again for the gradient

    dv = mask(P)^T dy
    dS = P * (dP - sum_l P dP),  dP = mask(dy v^T)
    dq = dS k / sqrt(d),  dk = dS^T q / sqrt(d)

A program has all keys of one text and head in registers and takes its queries block by block, so that a row of P is whole: nothing but
the inputs is kept for the gradient, and P is computed anew. Therefore texts of at most LONGEST tokens.

Bytes: forward qkv read, y written; backward qkv and dy read, dqkv written: 4 and 7 times the hidden states. Nothing is transposed,
split or joined on the way. Operations: 4 d per query, key and head forward, 10 d backward.
Letters: B texts · L tokens, padded · H heads of d.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from muka_fast.ops import philox, table
from muka_fast.ops.aot import Specialisation
from muka_fast.ops.reference import Draws, self_attention_ref

# Tokens, and d: keys, values, their gradients and a block of scores fit the registers of a program; of texts of more than SHORT tokens
# where the matrix units read shared memory alone (9.x and 10.x). Float32, three products for one on the matrix units, does not fit.
SHORT, LONGEST, WIDEST = 64, 128, 64
MOST_HEADS = 128  # that the masks of attention reach

_triton: Callable | None = None
SPECIALISATIONS: list[Specialisation] = []
if philox.triton is not None:
    import triton
    import triton.language as tl

    from muka_fast.ops.fast_math import FUSED, LOG2_E
    from muka_fast.ops.packed_attention import column_keys, columns_of_keys, pad

    @triton.jit
    def keys_and_values(p_qkv, L, H, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr):
        """Of the text and head whose first query is at p_qkv: k and v [BLOCK_N, D_PAD], offsets of such rows, and which are there."""
        o_d, o_l = tl.arange(0, D_PAD)[None, :], column_keys(BLOCK_N)[:, None]
        o_kv, m_kv = o_l * (3 * H * D) + o_d, (o_l < L) & (o_d < D)
        b_k = tl.load(p_qkv + H * D + o_kv, mask=m_kv, other=0.0)
        return b_k, tl.load(p_qkv + 2 * H * D + o_kv, mask=m_kv, other=0.0), o_kv, m_kv

    @triton.jit
    def probabilities(
        b_q, b_k, p_mask, o_m, L, mask_query, mask_key, scaling,
        BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    ):  # fmt: skip
        """P [BLOCK_M, BLOCK_N] of the queries o_m of a text."""
        o_l = column_keys(BLOCK_N)
        b_seen = (o_l < L)[None, :]
        if HAS_MASK:
            o = o_m.to(tl.int64)[:, None] * mask_query + o_l[None, :] * mask_key
            b_seen = tl.load(p_mask + o, mask=(o_m < L)[:, None] & b_seen, other=0) != 0
        b_s = tl.where(b_seen, tl.dot(b_q, tl.trans(b_k)) * (scaling * LOG2_E), -float("inf"))
        b_e = tl.where(b_seen, tl.exp2(b_s - tl.max(b_s, 1)[:, None]), 0.0)
        return b_e / tl.maximum(tl.sum(b_e, 1), 1.0)[:, None]  # the largest of a row is 1

    @triton.jit
    def struck(b_p, seed, sample, site, example, i_h, o_m, threshold, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """mask(b_p) of the queries o_m."""
        b_call = ((i_h * 16384 + o_m) * 2048)[:, None] + tl.arange(0, BLOCK_N // 8)[None, :]
        b_keep = philox.keep_lanes(seed, b_call, sample, site, example, threshold, BLOCK_N // 8, BLOCK_M)
        return tl.where(columns_of_keys(b_keep, BLOCK_M, BLOCK_N), b_p * scale, 0.0)

    @triton.jit(do_not_specialize=["site", "threshold", "L", "mask_text", "mask_query", "mask_key"])
    def self_attention_kernel(
        p_qkv,  # [B, L, 3, H, d]
        p_mask,  # bool [B, L, L] by its strides, read where HAS_MASK: true where a query sees a key
        p_y,  # [B, L, H, d]
        p_key,  # int64 [2], read where MASKED, as are
        p_ids,  # int64 [B]
        site, scaling, threshold, scale, L, H, mask_text, mask_query, mask_key,
        D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
        MASKED: tl.constexpr,
    ):  # fmt: skip
        i_b, i_h, o_d = tl.program_id(0) // H, tl.program_id(0) % H, tl.arange(0, D_PAD)[None, :]
        p_qkv += (i_b.to(tl.int64) * L * 3 * H + i_h) * D
        p_y += (i_b.to(tl.int64) * L * H + i_h) * D
        p_mask += i_b.to(tl.int64) * mask_text
        b_k, b_v, _, _ = keys_and_values(p_qkv, L, H, D, D_PAD, BLOCK_N)
        if MASKED:
            seed, sample, example = tl.load(p_key), tl.load(p_key + 1), tl.load(p_ids + i_b)
        last = BLOCK_N if BLOCK_M == BLOCK_N else L  # one block: no loop, which would keep keys and values in registers
        for first in range(0, last, BLOCK_M):
            o_m = first + tl.arange(0, BLOCK_M)
            m_q = (o_m < L)[:, None] & (o_d < D)
            b_q = tl.load(p_qkv + o_m[:, None] * (3 * H * D) + o_d, mask=m_q, other=0.0)
            b_p = probabilities(b_q, b_k, p_mask, o_m, L, mask_query, mask_key, scaling, BLOCK_N, HAS_MASK)
            if MASKED:
                b_p = struck(b_p, seed, sample, site, example, i_h, o_m, threshold, scale, BLOCK_M, BLOCK_N)
            b_y = tl.dot(b_p.to(b_v.dtype), b_v)
            tl.store(p_y + o_m[:, None] * (H * D) + o_d, b_y.to(p_y.dtype.element_ty), mask=m_q)

    @triton.jit(do_not_specialize=["site", "threshold", "L", "mask_text", "mask_query", "mask_key"])
    def self_attention_backward_kernel(
        p_qkv,  # [B, L, 3, H, d]
        p_mask,  # as above
        p_dy,  # [B, L, H, d]
        p_dqkv,  # [B, L, 3, H, d]
        p_key,  # int64 [2], read where MASKED, as are
        p_ids,  # int64 [B]
        site, scaling, threshold, scale, L, H, mask_text, mask_query, mask_key,
        D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
        MASKED: tl.constexpr,
    ):  # fmt: skip
        i_b, i_h, o_d = tl.program_id(0) // H, tl.program_id(0) % H, tl.arange(0, D_PAD)[None, :]
        p_qkv += (i_b.to(tl.int64) * L * 3 * H + i_h) * D
        p_dqkv += (i_b.to(tl.int64) * L * 3 * H + i_h) * D
        p_dy += (i_b.to(tl.int64) * L * H + i_h) * D
        p_mask += i_b.to(tl.int64) * mask_text
        b_k, b_v, o_kv, m_kv = keys_and_values(p_qkv, L, H, D, D_PAD, BLOCK_N)
        b_dk = tl.zeros([BLOCK_N, D_PAD], tl.float32)
        b_dv = tl.zeros([BLOCK_N, D_PAD], tl.float32)
        if MASKED:
            seed, sample, example = tl.load(p_key), tl.load(p_key + 1), tl.load(p_ids + i_b)
        last = BLOCK_N if BLOCK_M == BLOCK_N else L  # one block: no loop, which would keep keys and values in registers
        for first in range(0, last, BLOCK_M):
            o_m = first + tl.arange(0, BLOCK_M)
            m_q = (o_m < L)[:, None] & (o_d < D)
            b_q = tl.load(p_qkv + o_m[:, None] * (3 * H * D) + o_d, mask=m_q, other=0.0)
            b_dy = tl.load(p_dy + o_m[:, None] * (H * D) + o_d, mask=m_q, other=0.0)  # 0 behind the last query, as then all below
            b_p = probabilities(b_q, b_k, p_mask, o_m, L, mask_query, mask_key, scaling, BLOCK_N, HAS_MASK)
            b_dp, b_kept = tl.dot(b_dy, tl.trans(b_v)), b_p
            if MASKED:
                b_kept = struck(b_p, seed, sample, site, example, i_h, o_m, threshold, scale, BLOCK_M, BLOCK_N)
                b_dp = tl.where(b_kept != 0, b_dp * scale, 0.0)
            b_dv += tl.dot(tl.trans(b_kept.to(b_dy.dtype)), b_dy)
            b_ds = (b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None]) * scaling).to(b_q.dtype)
            b_dq = tl.dot(b_ds, b_k)
            tl.store(p_dqkv + o_m[:, None] * (3 * H * D) + o_d, b_dq.to(p_dqkv.dtype.element_ty), mask=m_q)
            b_dk += tl.dot(tl.trans(b_ds), b_q)
        tl.store(p_dqkv + H * D + o_kv, b_dk.to(p_dqkv.dtype.element_ty), mask=m_kv)
        tl.store(p_dqkv + 2 * H * D + o_kv, b_dv.to(p_dqkv.dtype.element_ty), mask=m_kv)

    def tile(length: int, head_dim: int) -> tuple[dict[str, int], int]:
        """Constants of a launch, and warps."""
        BLOCK_N = max(32, triton.next_power_of_2(length))
        BLOCK_M = BLOCK_N if BLOCK_N <= SHORT or head_dim <= 32 else 32
        return {"D": head_dim, "D_PAD": pad(head_dim), "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}, 4 if BLOCK_N <= SHORT else 8

    def launch(kernel: Any, tensors: tuple, draws: tuple[Tensor | None, Tensor | None, int], mask: Tensor | None, p: float) -> None:
        """`kernel` over a program per text and head; tensors: qkv [B, L, 3, H, d] first, what is read and written beside it."""
        qkv, *others = tensors
        texts, length, _, heads, head_dim = qkv.shape
        if qkv.numel() == 0:
            return
        sizes, warps = tile(length, head_dim)
        threshold, scale = philox.mask_parameters(p)
        seen = qkv if mask is None else mask.expand(texts, 1, length, length)[:, 0]
        strides = (0, 0, 0) if mask is None else seen.stride()
        with table.on_device_of(qkv):
            kernel[(texts * heads,)](
                qkv, seen, *others, *draws, head_dim**-0.5, threshold, scale, length, heads, *strides, HAS_MASK=mask is not None,
                MASKED=threshold > 0, num_warps=warps, num_stages=1, **sizes, **FUSED,
            )  # fmt: skip

    class SelfAttention(torch.autograd.Function):
        """qkv [B, L, 3, H, d] contiguous; key, ids and site: of the draws."""

        @staticmethod
        def forward(ctx: Any, qkv: Tensor, p: float, key: Tensor | None, ids: Tensor | None, site: int, mask: Tensor | None) -> Tensor:
            y = qkv.new_empty(*qkv.shape[:2], *qkv.shape[3:])
            launch(self_attention_kernel, (qkv, y), (key, ids, site), mask, p)
            ctx.save_for_backward(qkv, key, ids, mask)
            ctx.p, ctx.site = p, site
            return y

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            qkv, key, ids, mask = ctx.saved_tensors
            dqkv = torch.empty_like(qkv)
            launch(self_attention_backward_kernel, (qkv, dy.contiguous(), dqkv), (key, ids, ctx.site), mask, ctx.p)
            return dqkv, *(None,) * 5

    def _triton(qkv: Tensor, num_heads: int, p: float, draws: Draws | None, mask: Tensor | None) -> Tensor:
        drawn = (None, None, 0) if draws is None else draws
        return SelfAttention.apply(qkv.contiguous().unflatten(-1, (3, num_heads, -1)), p, *drawn, mask).flatten(-2)

    def _specialisation(dtype: str, length: int, head_dim: int, has_mask: bool, masked: bool, backward: bool) -> Specialisation:
        kernel = self_attention_backward_kernel if backward else self_attention_kernel
        types = dict.fromkeys(("p_qkv", "p_y", "p_dy", "p_dqkv"), f"*{dtype}") | {"p_mask": "*i1", "p_key": "*i64", "p_ids": "*i64"}
        types |= dict.fromkeys(("site", "threshold", "L", "H", "mask_text", "mask_query", "mask_key"), "i32")
        types |= dict.fromkeys(("scaling", "scale"), "fp32")
        sizes, warps = tile(length, head_dim)
        words = f"{' padded' * has_mask}{' masked' * masked}{' backward' * backward}"
        return Specialisation(
            f"self_attention {dtype} L={length} d={head_dim}{words}",
            kernel,
            {name: types[name] for name in kernel.arg_names if name in types},
            sizes | {"HAS_MASK": has_mask, "MASKED": masked},
            num_warps=warps,
            num_stages=1,
            fast=dtype == "bf16" and length == 64 and head_dim == 64 and has_mask and masked,
            aligned=True,
            least_arch=80 if length <= SHORT else 90,
        )

    SPECIALISATIONS = [
        _specialisation(dtype, length, head_dim, *mode, backward)
        for dtype in ("fp16", "bf16")
        for length in (32, 64, 128)
        for head_dim in (32, 64)
        for mode in ((False, False), (True, False), (False, True), (True, True))
        for backward in (False, True)
    ]


def takes(dtype: torch.dtype, length: int, head_dim: int, device: torch.device) -> bool:
    """Whether on this GPU the fused form takes texts of L tokens and heads of d."""
    generation, _ = torch.cuda.get_device_capability(device)
    longest = LONGEST if generation in (9, 10) else SHORT if generation >= 8 else 0
    return dtype in (torch.float16, torch.bfloat16) and length <= longest and head_dim in (32, WIDEST)


def self_attention(qkv: Tensor, num_heads: int, *, p: float, draws: Draws | None, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with dropout of the probabilities: [B, L, H d], dtype of qkv; differentiable in it. For training.

    qkv: [B, L, 3 H d], L <= 128 and d <= 64: queries, keys and values side by side, H heads each.
    mask: bool [B | 1, 1, L | 1, L | 1], true where a query sees a key; None: all see all. A query that sees none gets zeros.
    p: dropout probability in [0, 65535.5 / 65536), to 16 bits; no masks are drawn where it is 0.
    draws: of the B texts; may be None where p is 0.
    Scores and probabilities are fp32 (float64 for float64). By Triton on a GPU that `takes` them, else by PyTorch, with equal masks.
    Raises ValueError for shapes, p or draws that do not fit.
    """
    if not 1 <= num_heads <= MOST_HEADS:
        raise ValueError(f"the masks of attention reach 1 to {MOST_HEADS} heads, not {num_heads}")
    if qkv.dim() != 3 or qkv.shape[-1] % (3 * num_heads) or qkv.shape[1] > LONGEST or qkv.shape[-1] > 3 * num_heads * WIDEST:
        raise ValueError(f"qkv {list(qkv.shape)} must be [B, L <= {LONGEST}, 3 * {num_heads} * d], d <= {WIDEST}")
    whole = (len(qkv), 1, qkv.shape[1], qkv.shape[1])
    if mask is not None and (
        mask.dtype != torch.bool or mask.dim() != 4 or any(m not in (1, n) for m, n in zip(mask.shape, whole, strict=True))
    ):
        raise ValueError(f"mask {list(mask.shape)} of {mask.dtype} must be bool and of shape {list(whole)}, or 1 where all are alike")
    philox.check_draws(draws, p, len(qkv), qkv.device)
    head_dim = qkv.shape[2] // (3 * num_heads)
    fused = takes(qkv.dtype, qkv.shape[1], head_dim, qkv.device) if qkv.is_cuda else qkv.dtype != torch.float64
    form = _triton if _triton is not None and table.runs_triton(qkv) and fused else self_attention_ref
    return form(qkv, num_heads, p, draws, mask)
