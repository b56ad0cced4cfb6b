"""one_query_attention: the last layer of an encoder whose head reads one token, for K masks of one softmax.

    probs[b, h, l] = softmax_l(scaling * q[b, h] . k[start_b + l, h] + bias[h, l])          once per text
    y[r, b, h, :]  = sum_l mask[r, b, h, l] probs[b, h, l] v[start_b + l, h, :]             for every replica
    mask: contract of philox.py, element = (head * 16384 + query position) * 16384 + l; sample first_sample + r (plain_first: r - 1)

Bytes: keys and values once per text, R rows out. Operations: 2 T D (scores) + 2 R T D (values); exact, since other rows of the
layer's output are read by nobody. The values' products run on the matrix units as several of TF32, whose error is that of float32.
Letters: R replicas · B texts · T tokens, packed · H heads of d · D = H d.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from muka_fast.ops import philox, table, tuning
from muka_fast.ops.aot import Specialisation
from muka_fast.ops.reference import ATTENTION_STRIDE, one_query_attention_ref

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor starts, int num_heads, float scaling, int num_samples, float p, int seed,"
    " int site, Tensor example_ids, Tensor query_positions, Tensor? position_bias, int first_sample, bool plain_first) -> Tensor"
)


def bytes_moved(replicas: int, texts: int, tokens: int, width: int, itemsize: int = 4) -> int:
    """Bytes the op must read and write (as many key heads as query heads, no position bias)."""
    return itemsize * width * (texts + 2 * tokens + replicas * texts) + 24 * texts


def operations(replicas: int, tokens: int, width: int) -> int:
    """Floating-point operations of scores and weighted values."""
    return 2 * tokens * width * (1 + replicas)


def _cpu(
    query, key, value, starts, num_heads, scaling, num_samples, p, seed, site, example_ids, query_positions, position_bias,
    first_sample, plain_first,
) -> Tensor:  # fmt: skip
    dtype = query.dtype
    query, key, value = (t.float().contiguous() for t in (query, key, value))
    bias = None if position_bias is None else position_bias.float().contiguous()
    threshold, scale = philox.mask_parameters(p)
    replicas, head_dim = num_samples + int(plain_first), query.shape[1] // num_heads
    out = torch.empty((replicas, *query.shape), dtype=torch.float32)
    table._C.one_query_attention(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), starts.data_ptr(), 0 if bias is None else bias.data_ptr(),
        out.data_ptr(), example_ids.data_ptr(), query_positions.data_ptr(), replicas, query.shape[0], num_heads,
        key.shape[1] // head_dim, head_dim, 0 if bias is None else bias.shape[1], scaling, philox.unsigned_seed(seed), site,
        first_sample, threshold, scale, int(plain_first), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(dtype)


_triton: Callable | None = None
SPECIALISATIONS: list[Specialisation] = []
if philox.triton is not None:
    import triton
    import triton.language as tl

    from muka_fast.ops.fast_math import FUSED, LOWEST
    from muka_fast.ops.packed_attention import halves, pad, product, width_class

    @triton.jit
    def weighted(b_p, b_v):
        """b_p b_v in float32; values of 16 bits are numbers of TF32 as they are."""
        if b_v.dtype == tl.float32:
            return product(b_p, b_v)
        else:
            b_high, b_low = halves(b_p)
            b_v = b_v.to(tl.float32)
            return tl.dot(b_high, b_v, tl.dot(b_low, b_v, input_precision="tf32"), input_precision="tf32")

    @triton.jit(do_not_specialize=["seed", "site", "first_sample", "threshold", "num_plain", "R", "B", "bias_stride"])
    def one_query_attention_kernel(
        p_q,  # [B, H * d]
        p_k,  # [T, G * d]
        p_v,  # [T, G * d]
        p_starts,  # int64 [B + 1]
        p_bias,  # [H, bias_stride], read where HAS_BIAS
        p_y,  # [R, B, H * d]
        p_ids,  # int64 [B]
        p_positions,  # int64 [B]: position of the query's token
        scaling, seed, site, first_sample, threshold, scale, num_plain, R, B, H, G, bias_stride,
        D: tl.constexpr, D_PAD: tl.constexpr, R_PAD: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    ):  # fmt: skip
        i_b, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
        o_d, o_r = tl.arange(0, D_PAD), tl.program_id(2) * R_PAD + tl.arange(0, R_PAD)
        m_d = o_d < D
        b_start = tl.load(p_starts + i_b)
        length = (tl.load(p_starts + i_b + 1) - b_start).to(tl.int32)
        b_q = tl.load(p_q + (i_b * H + i_h) * D + o_d, mask=m_d, other=0.0).to(tl.float32) * scaling
        b_id = tl.load(p_ids + i_b + tl.zeros([R_PAD, 1], tl.int64))
        # element // 8 of key 0: the stride of a row of probabilities is a multiple of eight.
        first_call = ((i_h.to(tl.int64) * 16384 + tl.load(p_positions + i_b)) * 2048).to(tl.int32)
        b_sample = (first_sample - num_plain + o_r)[:, None]
        b_threshold = tl.where(o_r < num_plain, 0, threshold)[:, None]  # the plain replica keeps every lane
        b_scale = tl.where(o_r < num_plain, 1.0, scale)[:, None]
        # Masks act after the softmax, so the online softmax carries one maximum and one sum for all replicas.
        highest, total = tl.full([], LOWEST, tl.float32), 0.0
        b_y = tl.zeros([R_PAD, D_PAD], tl.float32)
        # Columns of a block: of 32 keys, column 4 i + t holds key 8 t + i. A matrix unit takes columns t, t + 4, ... of a factor from
        # thread t of four: the eight keys of one Philox call, so that no lane has to change threads.
        o_n = tl.arange(0, BLOCK)
        o_n = o_n // 32 * 32 + o_n % 4 * 8 + o_n // 4 % 8
        for l in range(0, length, BLOCK):  # noqa: E741
            o_l = l + o_n
            m_l = o_l < length
            o_kv = (b_start + o_l)[:, None] * (G * D) + (i_h // (H // G)) * D + o_d[None, :]
            m_kv = m_l[:, None] & m_d[None, :]
            b_k = tl.load(p_k + o_kv, mask=m_kv, other=0.0).to(tl.float32)
            b_s = tl.sum(b_k * b_q[None, :], 1)
            if HAS_BIAS:
                b_s += tl.load(p_bias + i_h * bias_stride + o_l, mask=m_l, other=0.0).to(tl.float32)
            b_s = tl.where(m_l, b_s, -float("inf"))
            higher = tl.maximum(highest, tl.max(b_s, 0))
            shrink = tl.exp(highest - higher)
            b_p = tl.exp(b_s - higher)
            total = total * shrink + tl.sum(b_p, 0)
            highest = higher
            b_call = (first_call + l // 8 + tl.arange(0, BLOCK // 8))[None, :] + tl.zeros([R_PAD, 1], tl.int32)
            keep = philox.keep_lanes(seed, b_call, b_sample, site, b_id, b_threshold, BLOCK // 8, R_PAD)
            keep = tl.permute(tl.reshape(keep, [R_PAD, BLOCK // 32, 4, 8]), (0, 1, 3, 2))
            b_masked = tl.where(tl.reshape(keep, [R_PAD, BLOCK]), b_p[None, :] * b_scale, 0.0)
            b_v = tl.load(p_v + o_kv, mask=m_kv, other=0.0)
            b_y = b_y * shrink + weighted(b_masked, b_v)
        p_y += (o_r[:, None].to(tl.int64) * B + i_b) * (H * D) + i_h * D + o_d[None, :]
        tl.store(p_y, (b_y / total).to(p_y.dtype.element_ty), mask=(o_r < R)[:, None] & m_d[None, :])

    MOST_REPLICAS = 32  # of one program; more share a text over several

    def _triton(
        query, key, value, starts, num_heads, scaling, num_samples, p, seed, site, example_ids, query_positions, position_bias,
        first_sample, plain_first,
    ) -> Tensor:  # fmt: skip
        query, key, value = (t.contiguous() for t in (query, key, value))
        bias = query if position_bias is None else position_bias.contiguous()
        threshold, scale = philox.mask_parameters(p)
        texts, replicas, head_dim = query.shape[0], num_samples + int(plain_first), query.shape[1] // num_heads
        out = query.new_empty((replicas, *query.shape))
        if out.numel() == 0:
            return out
        BLOCK, num_warps = tuning.choose("one_query_attention", width_class(head_dim), query.device)
        R_PAD = min(pad(replicas), MOST_REPLICAS)
        with table.on_device_of(query):
            one_query_attention_kernel[(texts, num_heads, triton.cdiv(replicas, R_PAD))](
                query, key, value, starts, bias, out, example_ids, query_positions, scaling, seed, site, first_sample, threshold,
                scale, int(plain_first), replicas, texts, num_heads, key.shape[1] // head_dim, bias.shape[1], D=head_dim,
                D_PAD=pad(head_dim), R_PAD=R_PAD, BLOCK=BLOCK, HAS_BIAS=position_bias is not None, num_warps=num_warps,
                num_stages=1, **FUSED,
            )  # fmt: skip
        return out

    _TYPES = dict.fromkeys(("p_starts", "p_ids", "p_positions"), "*i64") | {"seed": "i64", "scale": "fp32", "scaling": "fp32"}
    _TYPES |= dict.fromkeys(("site", "first_sample", "threshold", "num_plain", "R", "B", "H", "G", "bias_stride"), "i32")
    SPECIALISATIONS = [
        Specialisation(
            f"one_query_attention {dtype} d={head_dim} R<={replicas}{' biased' if biased else ''} {block, num_warps}",
            one_query_attention_kernel,
            {**dict.fromkeys(("p_q", "p_k", "p_v", "p_bias", "p_y"), f"*{dtype}"), **_TYPES},
            {"D": head_dim, "D_PAD": pad(head_dim), "R_PAD": replicas, "BLOCK": block, "HAS_BIAS": biased},
            num_warps=num_warps,
            num_stages=1,
            fast=dtype == "bf16" and head_dim == 64 and not biased,
            aligned=True,
            tuned=(width_class(head_dim), (block, num_warps)),
        )
        for dtype in ("fp32", "fp16", "bf16")
        for head_dim, replicas, biased in ((32, 32, False), (64, 16, False), (64, 32, True), (128, 32, False))
        for block, num_warps in tuning.CANDIDATES["one_query_attention"][width_class(head_dim)]
    ]

_op = table.register(
    "one_query_attention",
    SCHEMA,
    reference=one_query_attention_ref,
    cpu=None if table._C is None else _cpu,
    triton=_triton,
    fake=lambda query, key, value, starts, heads, scaling, num_samples, *rest: query.new_empty((num_samples + rest[-1], *query.shape)),
)


def check(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, num_heads: int, position_bias: Tensor | None) -> None:
    """Raises ValueError where shapes do not fit or a text is empty or too long: the kernels read what they are told is there."""
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if query.dim() != 2 or key.dim() != 2 or key.shape != value.shape:
        raise ValueError(f"{shapes}: must be [texts, H * d] and twice [tokens, G * d]")
    texts, width = query.shape
    head_dim = width // num_heads if num_heads > 0 else 0
    if not head_dim or width % num_heads or not key.shape[1] or key.shape[1] % head_dim or width % key.shape[1]:
        raise ValueError(f"{shapes} do not share {num_heads} heads")
    looked_at = texts > 0 and not starts.is_cuda  # on a GPU its values are not looked at: that would wait for the device
    rising = starts.shape == (texts + 1,)
    if rising and looked_at:
        lengths = starts.diff()
        rising = bool(starts[0] == 0 and starts[-1] == key.shape[0] and lengths.min() >= 1)
    if not rising:
        raise ValueError(f"starts must rise strictly from 0 to {key.shape[0]} in {texts} steps")
    longest = int(lengths.max()) if looked_at else 0
    if num_heads > 128 or longest > ATTENTION_STRIDE:
        raise ValueError(f"the masks of attention reach 128 heads and {ATTENTION_STRIDE} tokens")
    if position_bias is not None:
        if position_bias.dim() != 2 or position_bias.shape[0] != num_heads:
            raise ValueError(f"position_bias must be [{num_heads}, >= longest text], not {list(position_bias.shape)}")
        if position_bias.shape[1] < longest:
            raise ValueError(f"position_bias {list(position_bias.shape)} is shorter than the longest text ({longest})")


def one_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    num_heads: int,
    scaling: float,
    num_samples: int,
    p: float,
    seed: int,
    site: int,
    example_ids: Tensor,
    query_positions: Tensor,
    position_bias: Tensor | None = None,
    first_sample: int = 0,
    plain_first: bool = False,
) -> Tensor:
    """Attention of one query per text: [R, B, H * d], R = num_samples (+ 1 with plain_first). For frozen teachers: no gradient.

    query [B, H * d]; key, value [T, G * d] packed, H a multiple of G; starts int64 [B + 1]: text b owns tokens starts[b] to
    starts[b + 1], at least one and at most 16384; position_bias [H, >= longest text] or None; query_positions int64 [B].
    site, first_sample and its successors: uint32. query_positions: below 16384.
    Raises ValueError where shapes do not fit, a text is empty or too long, there are more than 128 heads, or a number is outside its
    range; values of tensors on a GPU are not looked at.
    """
    check(query, key, value, starts, num_heads, position_bias)
    if num_samples < 0 or num_samples + int(plain_first) < 1:
        raise ValueError(f"num_samples {num_samples} gives no replica: at least 1, or 0 with plain_first")
    philox.check_counters(site, first_sample, num_samples)
    texts = query.shape[0]
    starts = philox.check_rows("starts", starts, texts + 1, query.device)
    ids = philox.check_rows("example_ids", example_ids, texts, query.device)
    positions = philox.check_rows("query_positions", query_positions, texts, query.device)
    if texts and not positions.is_cuda and not 0 <= int(positions.min()) <= int(positions.max()) < ATTENTION_STRIDE:
        raise ValueError(f"query_positions must be in [0, {ATTENTION_STRIDE})")
    philox.mask_parameters(p)
    return _op(
        query, key, value, starts, num_heads, scaling, num_samples, p, philox.signed_seed(seed), site,
        ids, positions, position_bias, first_sample, plain_first,
    )  # fmt: skip
