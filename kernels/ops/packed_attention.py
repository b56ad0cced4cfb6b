"""packed_attention: attention inside every text of a packed batch, for R replicas with masked probabilities.

    probs[r, h, i, l] = softmax_l(scaling * q[r, i, h] . k[r, start_b + l, h] + bias[h, position_i, l])
    y[r, i, h, :]     = sum_l mask[r, b, h, position_i, l] probs[r, h, i, l] v[r, start_b + l, h, :]
    mask: contract of philox.py, element = (head * 16384 + query position) * 16384 + l; sample first_sample + r (plain_first: r - 1)

No padding and no probabilities in memory: an online softmax over blocks of keys (Milakov, Gimelshein, arXiv 1805.02867; Dao et al.,
arXiv 2205.14135), the masks struck after the exponential, where they leave the sum alone. Products run on the matrix units, those of
float32 as three of TF32, whose error is that of float32 (infinite states give NaN).

Bytes: queries, keys, values and the result once each per replica (shared ones once, from the cache after that). Operations: 4 d per
query, key and head on the matrix units, and one Philox call per eight pairs on the integer units: by bench/predict.py, with d = 64
and 16 bits an H200 spends a little longer on the random numbers than on the products.
Letters: R replicas · B texts · T tokens, packed · Q queries: T, or one a text · H heads of d, G key heads · D = H d.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from muka_fast.ops import philox, table, tuning
from muka_fast.ops.aot import Specialisation
from muka_fast.ops.reference import ATTENTION_STRIDE, packed_attention_ref
from muka_fast.ops.repeat_dropout import repeat_dropout

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor query_starts, Tensor first_positions, Tensor starts, int longest, int num_heads,"
    " float scaling, int num_samples, float p, int seed, int site, Tensor example_ids, Tensor? position_bias, int first_sample,"
    " bool plain_first) -> Tensor"
)


def bytes_moved(replicas: int, queries: int, tokens: int, width: int, itemsize: int = 4) -> int:
    """Bytes the op must read and write with states of its own for every replica (as many key heads as query heads, no bias)."""
    return itemsize * width * replicas * (2 * queries + 2 * tokens)


def operations(replicas: int, scores: int, width: int) -> int:
    """Floating-point operations of `scores` pairs of query and key."""
    return 4 * replicas * scores * width


def _replicas(query: Tensor, key: Tensor, num_samples: int, p: float, plain_first: bool) -> int:
    """R; 0 where nothing tells the replicas apart, and the result has no such dimension."""
    return num_samples + int(plain_first) if p > 0 or query.dim() == 3 or key.dim() == 3 else 0


def _empty(query: Tensor, key: Tensor, num_samples: int, p: float, plain_first: bool) -> Tensor:
    replicas = _replicas(query, key, num_samples, p, plain_first)
    return query.new_empty((*([replicas] if replicas else []), *query.shape[-2:]))


def _cpu(
    query, key, value, query_starts, first_positions, starts, longest, num_heads, scaling, num_samples, p, seed, site, example_ids,
    position_bias, first_sample, plain_first,
) -> Tensor:  # fmt: skip
    """Texts of equal length at once (they lie side by side, sorted), by PyTorch's matrix products and the masks of C++."""
    head_dim = query.shape[-1] // num_heads
    lengths, queries, first = (t.tolist() for t in (starts.diff(), query_starts.diff(), first_positions))
    repeats = query.shape[-1] // key.shape[-1]

    def heads(x: Tensor, row: int, texts: int, rows: int) -> Tensor:  # [(R,) n, H, rows, d]
        x = x.narrow(-2, row, texts * rows).unflatten(-1, (-1, head_dim))
        return x.unflatten(-3, (texts, rows)).transpose(-3, -2)

    def masked(probs: Tensor, place: int, first_query: int) -> Tensor:  # [(R,) n, H, rows, L] -> [R, n, H, rows, L]
        n, _, rows, length = probs.shape[-4:]
        element = torch.arange(num_heads)[:, None] * ATTENTION_STRIDE + first_query
        element = (element + torch.arange(rows)).flatten() * ATTENTION_STRIDE
        ids = example_ids[place : place + n].repeat_interleave(len(element))
        shared = probs.dim() == 4
        source = (probs if shared else probs[int(plain_first) :]).reshape(*([] if shared else [num_samples]), -1, length)
        struck = repeat_dropout(source, num_samples, p, philox.unsigned_seed(seed), site, ids, element.repeat(n), first_sample)
        struck = struck.view(num_samples, n, num_heads, rows, length)
        return torch.cat([probs[None] if shared else probs[:1], struck]) if plain_first else struck

    out, place, row, query_row = [], 0, 0, 0
    for (length, rows, first_query), group in itertools.groupby(zip(lengths, queries, first, strict=True)):
        n = len(list(group))
        q, k, v = heads(query, query_row, n, rows), heads(key, row, n, length), heads(value, row, n, length)
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)
        bias = None if position_bias is None else position_bias[:, first_query : first_query + rows, :length]
        if p == 0:
            shape = torch.broadcast_shapes(q.shape[:-4], k.shape[:-4])
            flat = [x.expand(*shape, *x.shape[-4:]).flatten(0, -4) for x in (q, k, v)]
            mixed = torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=bias, scale=scaling)
            mixed = mixed.reshape(*shape, *q.shape[-4:])
        else:
            scores = torch.matmul(q * scaling, k.transpose(-1, -2))
            probs = torch.softmax(scores if bias is None else scores + bias, -1)
            mixed = torch.matmul(masked(probs, place, first_query), v)
        out.append(mixed.transpose(-3, -2).flatten(-2).flatten(-3, -2))
        place, row, query_row = place + n, row + n * length, query_row + n * rows
    return out[0] if len(out) == 1 else torch.cat(out, -2) if out else _empty(query, key, num_samples, p, plain_first)


_triton: Callable | None = None
SPECIALISATIONS: list[Specialisation] = []

if philox.triton is not None:
    import triton
    import triton.language as tl

    from muka_fast.ops.fast_math import FUSED, LOG2_E, LOWEST

    @triton.jit
    def halves(x):
        """float32 rounded to the 19 bits that TF32 keeps, and the rest, of which it keeps all but the last bit."""
        high = (x.to(tl.int32, bitcast=True) + 4096 & -8192).to(tl.float32, bitcast=True)
        return high, x - high

    @triton.jit
    def product(a, b):
        """a b, accumulated in float32. Of float32 factors all but low * low: 2^-22 of the result."""
        if a.dtype == tl.float32:
            a_high, a_low = halves(a)
            b_high, b_low = halves(b)
            mixed = tl.dot(a_low, b_high, tl.dot(a_high, b_low, input_precision="tf32"), input_precision="tf32")
            return tl.dot(a_high, b_high, mixed, input_precision="tf32")
        else:
            return tl.dot(a, b)

    @triton.jit
    def column_keys(BLOCK_N: tl.constexpr):
        """Key of every column of a block: of 32, column 8 i + 2 t + j holds key 8 t + 2 i + j, which attention does not mind.

        The matrix units leave columns 2 t and 2 t + 1 of every eight to thread t of four. In this order those are the eight keys of
        one Philox call: every thread draws its own lanes, and none travels through shared memory.
        """
        o_n = tl.arange(0, BLOCK_N)
        return o_n // 32 * 32 + o_n // 2 % 4 * 8 + o_n // 8 % 4 * 2 + o_n % 2

    @triton.jit
    def columns_of_keys(x, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
        """[ROWS, BLOCK_N] by keys -> by the columns of `column_keys`."""
        return tl.reshape(tl.permute(tl.reshape(x, [ROWS, BLOCK_N // 32, 4, 4, 2]), (0, 1, 3, 2, 4)), [ROWS, BLOCK_N])

    @triton.jit(
        do_not_specialize=[
            "seed", "site", "first_sample", "threshold", "num_plain", "Q", "T", "q_replica", "kv_replica", "bias_head", "bias_row",
        ]
    )  # fmt: skip
    def packed_attention_kernel(
        p_q,  # [(R,) Q, H * d]
        p_k,  # [(R,) T, G * d]
        p_v,  # [(R,) T, G * d]
        p_query_starts,  # int64 [B + 1]
        p_positions,  # int64 [B]: position of a text's first query
        p_starts,  # int64 [B + 1]
        p_bias,  # [H | 1, positions, positions], read where HAS_BIAS
        p_y,  # [R, Q, H * d]
        p_ids,  # int64 [B]
        scaling, seed, site, first_sample, threshold, scale, num_plain, Q, T, H, G,
        q_replica, kv_replica,  # 1 where every replica has its own rows, else 0
        bias_head, bias_row,  # strides
        D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr,
        MASKED: tl.constexpr,
    ):  # fmt: skip
        i_r, i_h, i_b = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1).to(tl.int64)
        first_query = tl.load(p_query_starts + i_b)
        num_queries = (tl.load(p_query_starts + i_b + 1) - first_query).to(tl.int32)
        o_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
        if tl.program_id(2) * BLOCK_M < num_queries:
            o_d, m_m = tl.arange(0, D_PAD), o_m < num_queries
            m_d = (o_d < D)[None, :]
            first_key = tl.load(p_starts + i_b)
            length = (tl.load(p_starts + i_b + 1) - first_key).to(tl.int32)
            o_q, m_q = o_m[:, None] * (H * D) + o_d[None, :], m_m[:, None] & m_d
            b_q = tl.load(p_q + ((i_r * q_replica * Q + first_query) * H + i_h) * D + o_q, mask=m_q, other=0.0)
            kv = ((i_r * kv_replica * T + first_key) * G + i_h // (H // G)) * D  # first_query and first_key are int64
            position = tl.load(p_positions + i_b).to(tl.int32) + o_m
            o_n = column_keys(BLOCK_N)
            # The exponential of two is the machine's own. A bias may be the lowest number there is: it is not multiplied.
            UNIT: tl.constexpr = LOG2_E if HAS_BIAS else 1.0
            if not HAS_BIAS:
                scaling *= LOG2_E
            if MASKED:
                # element // 8 of key 0: the stride of a row of probabilities is a multiple of eight.
                first_call = (i_h * 16384 + position) * 2048
                sample, text_id = first_sample - num_plain + i_r, tl.load(p_ids + i_b)
                plain = i_r < num_plain  # the plain replica keeps every lane
                b_threshold, b_scale = tl.where(plain, 0, threshold), tl.where(plain, 1.0, scale)
            highest, total = tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)
            b_y = tl.zeros([BLOCK_M, D_PAD], tl.float32)
            for l in range(0, length, BLOCK_N):  # noqa: E741
                o_l = l + o_n
                m_l = o_l < length
                o_kv, m_kv = o_l[:, None] * (G * D) + o_d[None, :], m_l[:, None] & m_d
                b_k = tl.load(p_k + kv + o_kv, mask=m_kv, other=0.0)
                b_s = product(b_q, tl.trans(b_k)) * scaling
                if HAS_BIAS:
                    p_row = p_bias + i_h.to(tl.int64) * bias_head + position.to(tl.int64)[:, None] * bias_row
                    m_bias = m_m[:, None] & m_l[None, :]
                    b_s += tl.load(p_row + o_l[None, :], mask=m_bias, other=-float("inf")).to(tl.float32)
                else:
                    b_s = tl.where(m_l[None, :], b_s, -float("inf"))
                higher = tl.maximum(highest, tl.max(b_s, 1))
                shrink = tl.exp2((highest - higher) * UNIT)
                b_p = tl.exp2((b_s - higher[:, None]) * UNIT)
                total = total * shrink + tl.sum(b_p, 1)
                highest = higher
                if MASKED:
                    b_call = first_call[:, None] + (l // 8 + tl.arange(0, BLOCK_N // 8))[None, :]
                    keep = philox.keep_lanes(seed, b_call, sample, site, text_id, b_threshold, BLOCK_N // 8, BLOCK_M)
                    b_p = tl.where(columns_of_keys(keep, BLOCK_M, BLOCK_N), b_p, 0.0)
                b_v = tl.load(p_v + kv + o_kv, mask=m_kv, other=0.0)
                b_y = b_y * shrink[:, None] + product(b_p.to(b_v.dtype), b_v)
            b_y = b_y / total[:, None]
            if MASKED:
                b_y *= b_scale
            tl.store(p_y + ((i_r * Q + first_query) * H + i_h) * D + o_q, b_y.to(p_y.dtype.element_ty), mask=m_q)

    def pad(size: int) -> int:
        return max(16, triton.next_power_of_2(size))  # the least that tl.dot takes

    def width_class(head_dim: int) -> str:
        """Of tuning.py."""
        return f"d{next((width for width in (32, 64) if pad(head_dim) <= width), 128)}"

    def shape_class(itemsize: int, head_dim: int, longest_query: int, masked: bool, biased: bool) -> str:
        """Of tuning.py."""
        if longest_query <= 16:
            return f"{8 * itemsize} bit one row"
        return f"{8 * itemsize} bit {width_class(head_dim)}{' biased' if biased else ' masked' if masked else ''}"

    def _triton(
        query, key, value, query_starts, first_positions, starts, longest, num_heads, scaling, num_samples, p, seed, site, example_ids,
        position_bias, first_sample, plain_first,
    ) -> Tensor:  # fmt: skip
        query, key, value = (t.contiguous() for t in (query, key, value))
        out = _empty(query, key, num_samples, p, plain_first)
        if out.numel() == 0:
            return out
        threshold, scale = philox.mask_parameters(p)
        texts, tokens, queries, head_dim = len(starts) - 1, key.shape[-2], query.shape[-2], query.shape[-1] // num_heads
        longest_query = 1 if queries == texts else longest
        shape = shape_class(query.element_size(), head_dim, longest_query, p > 0, position_bias is not None)
        BLOCK_M, BLOCK_N, num_warps, num_stages = tuning.choose("packed_attention", shape, query.device)
        bias = query.new_empty(1, 1, 1) if position_bias is None else position_bias
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
        with table.on_device_of(query):
            grid = (num_heads * (out.shape[0] if out.dim() == 3 else 1), texts, triton.cdiv(longest_query, BLOCK_M))
            packed_attention_kernel[grid](
                query, key, value, query_starts, first_positions, starts, bias, out, example_ids, scaling, seed, site, first_sample,
                threshold, scale, int(plain_first), queries, tokens, num_heads, key.shape[-1] // head_dim, int(query.dim() == 3),
                int(key.dim() == 3), bias.stride(0) if bias.shape[0] > 1 else 0, bias.stride(1), D=head_dim, D_PAD=pad(head_dim),
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, HAS_BIAS=position_bias is not None, MASKED=p > 0, num_warps=num_warps,
                num_stages=num_stages, **FUSED,
            )  # fmt: skip
        return out

    _TYPES = dict.fromkeys(("p_query_starts", "p_positions", "p_starts", "p_ids"), "*i64")
    _TYPES |= {"seed": "i64", "scale": "fp32", "scaling": "fp32"}
    _INTEGERS = "site first_sample threshold num_plain Q T H G q_replica kv_replica bias_head bias_row"
    _TYPES |= dict.fromkeys(_INTEGERS.split(), "i32")

    def _specialisation(
        dtype: str, head_dim: int, longest_query: int, biased: bool, masked: bool, shape: str, tile: tuple[int, ...]
    ) -> Specialisation:
        BLOCK_M, BLOCK_N, num_warps, num_stages = tile
        constexprs = {"D": head_dim, "D_PAD": pad(head_dim), "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
        return Specialisation(
            f"packed_attention {dtype} d={head_dim} rows={min(longest_query, 99)}{' biased' * biased}{' masked' * masked} {tile}",
            packed_attention_kernel,
            {**dict.fromkeys(("p_q", "p_k", "p_v", "p_bias", "p_y"), f"*{dtype}"), **_TYPES},
            constexprs | {"HAS_BIAS": biased, "MASKED": masked},
            num_warps=num_warps,
            num_stages=num_stages,
            fast=dtype == "bf16" and shape == "16 bit d64 masked",
            aligned=True,
            tuned=(shape, tile),
        )

    CANDIDATES = tuning.CANDIDATES["packed_attention"]
    SPECIALISATIONS = [
        _specialisation(dtype, head_dim, rows, biased, masked, shape, tile)
        for dtype in ("fp32", "fp16", "bf16")
        for head_dim in (32, 64, 128)
        for rows, biased, masked in ((128, False, False), (128, False, True), (128, True, True), (1, True, True))
        for shape in [shape_class(4 if dtype == "fp32" else 2, head_dim, rows, masked, biased)]
        for tile in CANDIDATES[shape]
    ]

_op = table.register(
    "packed_attention",
    SCHEMA,
    reference=lambda *args: packed_attention_ref(*args[:6], *args[7:]),
    cpu=_cpu,
    triton=_triton,
    fake=lambda query, key, *args: _empty(query, key, *args[7:9], args[-1]),
)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    first_positions: Tensor,
    starts: Tensor,
    longest: int,
    num_heads: int,
    scaling: float,
    num_samples: int,
    p: float,
    seed: int,
    site: int,
    example_ids: Tensor,
    position_bias: Tensor | None = None,
    first_sample: int = 0,
    plain_first: bool = False,
) -> Tensor:
    """Attention inside every text: [R, Q, H * d], R = num_samples (+ 1 with plain_first). For frozen teachers: no gradient.

    query [(R,) Q, H * d]; key, value [(R,) T, G * d] packed, H a multiple of G; starts int64 [B + 1]: text b owns keys starts[b] to
    starts[b + 1], at least one and at most `longest` <= 16384; query_starts int64 [B + 1] likewise its queries, all of its tokens or
    one for every text, whose positions count from first_positions int64 [B]. position_bias [H or 1, >= longest, >= longest] or None
    is added to the scaled scores at (query position, key position). Without masks (p = 0) over states that all replicas share the
    result is theirs as well: [Q, H * d].
    d up to 128 is what the kernel is made for: wider heads run, and spill registers.
    Raises ValueError where shapes, positions, site or samples do not fit or there are more than 128 heads.
    """
    texts, width, replicas = len(starts) - 1, query.shape[-1], num_samples + int(plain_first)
    if num_heads < 1 or key.shape != value.shape or width % num_heads or key.shape[-1] % (width // num_heads) or width % key.shape[-1]:
        raise ValueError(f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)} do not share {num_heads} heads")
    for name, states in (("query", query), ("key", key)):
        if states.dim() not in (2, 3) or (states.dim() == 3 and len(states) != replicas):
            raise ValueError(f"{name} {list(states.shape)} must be [rows, width] or [{replicas}, rows, width]")
    if p > 0 and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    if query_starts.shape != starts.shape or query.shape[-2] not in (texts, key.shape[-2]):
        raise ValueError(f"{query.shape[-2]} queries are neither one for each of {texts} texts nor one for each of their tokens")
    if p > 0 and (num_heads > 128 or longest > ATTENTION_STRIDE):
        raise ValueError(f"the masks of attention reach 128 heads and {ATTENTION_STRIDE} tokens, not {num_heads} and {longest}")
    if position_bias is not None and (position_bias.shape[0] not in (1, num_heads) or min(position_bias.shape[1:]) < longest):
        raise ValueError(f"position_bias {list(position_bias.shape)} does not reach {num_heads} heads and {longest} positions")
    starts, query_starts = (t.to(device=query.device, dtype=torch.int64).contiguous() for t in (starts, query_starts))
    if not starts.is_cuda:  # on a GPU their values are not looked at: that would wait for the device
        for name, ends, rows in (("starts", starts, key.shape[-2]), ("query_starts", query_starts, query.shape[-2])):
            if ends[0] != 0 or ends[-1] != rows or (texts and not 1 <= ends.diff().min() <= ends.diff().max() <= longest):
                raise ValueError(f"{name} must rise from 0 to {rows} by at least 1 and at most {longest}")
    ids = philox.check_rows("example_ids", example_ids, texts, query.device)
    positions = philox.check_rows("first_positions", first_positions, texts, query.device)
    if not positions.is_cuda and texts:
        last = int((positions + query_starts.diff()).max())
        beyond = last > (ATTENTION_STRIDE if position_bias is None else min(ATTENTION_STRIDE, position_bias.shape[1]))
        if positions.min() < 0 or beyond:
            raise ValueError(f"first_positions give queries positions in [{int(positions.min())}, {last}), out of reach")
    philox.check_counters(site, first_sample, num_samples)
    philox.mask_parameters(p)
    return _op(
        query, key, value, query_starts, positions, starts, longest, num_heads, scaling, num_samples, p, philox.signed_seed(seed),
        site, ids, position_bias, first_sample, plain_first,
    )  # fmt: skip
