"""one_query_attention: the last layer of an encoder whose head reads one token, for K masks of one softmax.

    probs[b, h, l] = softmax_l(scaling * q[b, h] . k[start_b + l, h] + bias[h, l])          once per text
    y[r, b, h, :]  = sum_l mask[r, b, h, l] probs[b, h, l] v[start_b + l, h, :]             for every replica
    mask: contract of philox.py, element = (head * 16384 + query position) * 16384 + l; sample first_sample + r (plain_first: r - 1)

Bytes: keys and values once per text, R rows out. Operations: 2 T D (scores) + 2 R T D (values); exact, since other rows of the
layer's output are read by nobody.
Letters: R replicas · B texts · T tokens, packed · H heads of d · D = H d.
"""

import torch
from torch import Tensor

from muka_fast.ops import philox, table
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


def _fake(
    query, key, value, starts, num_heads, scaling, num_samples, p, seed, site, example_ids, query_positions, position_bias,
    first_sample, plain_first,
) -> Tensor:  # fmt: skip
    return query.new_empty((num_samples + int(plain_first), *query.shape))


def _reference(
    query, key, value, starts, num_heads, scaling, num_samples, p, seed, site, example_ids, query_positions, position_bias,
    first_sample, plain_first,
) -> Tensor:  # fmt: skip
    return one_query_attention_ref(
        query, key, value, starts, num_heads, scaling, num_samples, p, philox.unsigned_seed(seed), site, example_ids,
        query_positions, position_bias, first_sample, plain_first,
    )  # fmt: skip


def _cpu(
    query, key, value, starts, num_heads, scaling, num_samples, p, seed, site, example_ids, query_positions, position_bias,
    first_sample, plain_first,
) -> Tensor:  # fmt: skip
    if query.dtype != torch.float32:
        return _reference(
            query, key, value, starts, num_heads, scaling, num_samples, p, seed, site, example_ids, query_positions,
            position_bias, first_sample, plain_first,
        )  # fmt: skip
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
    return out


_op = table.register(
    "one_query_attention", SCHEMA, reference=_reference, cpu=None if table._C is None else _cpu, triton=None, fake=_fake
)


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
    Raises ValueError where shapes do not fit, a text is empty or too long, or there are more than 128 heads.
    """
    texts, width = query.shape
    lengths = starts.diff()
    if key.shape != value.shape or width % num_heads or key.shape[1] % (width // num_heads) or width % key.shape[1]:
        raise ValueError(f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)} do not share {num_heads} heads")
    if starts.shape != (texts + 1,) or (texts and (starts[0] != 0 or starts[-1] != key.shape[0] or lengths.min() < 1)):
        raise ValueError(f"starts must rise strictly from 0 to {key.shape[0]} in {texts} steps")
    if num_heads > 128 or (texts and lengths.max() > ATTENTION_STRIDE):
        raise ValueError(f"the masks of attention reach 128 heads and {ATTENTION_STRIDE} tokens")
    if position_bias is not None and texts and position_bias.shape[1] < lengths.max():
        raise ValueError(f"position_bias {list(position_bias.shape)} is shorter than the longest text ({int(lengths.max())})")
    ids = philox.check_rows("example_ids", example_ids, texts, query.device)
    positions = philox.check_rows("query_positions", query_positions, texts, query.device)
    philox.mask_parameters(p)
    return _op(
        query, key, value, starts.to(torch.int64).contiguous(), num_heads, scaling, num_samples, p, philox.signed_seed(seed), site,
        ids, positions, position_bias, first_sample, plain_first,
    )  # fmt: skip
