"""The definition of every op in plain PyTorch: same signature, no tricks, computed in float64 where the input is float64, else in
float32. The fast implementations are tested against these, and these against an oracle written from the method's formulas.
Over 400 lines: all definitions in one place, to be read beside each other.

Letters: K samples (k) · B texts (b) · S = sum of the teachers' class counts · N teachers (i) · D features · C student classes.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF
LANES = 8  # 16-bit lanes per Philox call
# Attention probabilities: element = (head * 16384 + query position) * 16384 + key position, head < 128: padding changes nothing.
ATTENTION_STRIDE = 16384


class Draws(NamedTuple):
    """Masks of one site in training. The tensors lie on the device: a step recorded as a CUDA graph reads there what holds by then.

    key: int64 [2], the 64 bits of the seed, and the sample. example_ids: int64 [B]. site: 0 ... 2^32 - 1.
    """

    key: Tensor
    example_ids: Tensor
    site: int


def dropout_threshold(p: float) -> int:
    """t = round-half-even(p * 65536): a lane below it is dropped. Raises ValueError outside 0 <= t < 65536 or for NaN."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability {p} is outside [0, 1)")
    threshold = round(p * 65536)
    if threshold >= 65536:
        raise ValueError(f"dropout probability {p} drops everything: at most 65535/65536")
    return threshold


def dropout_scale(p: float) -> float:
    """65536 / (65536 - t), which makes the mean of a kept-or-dropped value exact; used rounded to float32."""
    return 65536.0 / (65536 - dropout_threshold(p))


def philox4x32_ref(counter: Sequence[Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., 2011). counter: four int64 tensors holding uint32 values; seed: the 64-bit key."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(10):
        # The signed 64-bit product wraps, but its bits are those of the unsigned one.
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & MASK32, product0 & MASK32
        high1, low1 = (product1 >> 32) & MASK32, product1 & MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + PHILOX_WEYL[0]) & MASK32, (k1 + PHILOX_WEYL[1]) & MASK32
    return c0, c1, c2, c3


def keep_mask_ref(
    num_samples: int, width: int, p: float, seed: int, site: int, example_ids: Tensor, offsets: Tensor, first_sample: int = 0
) -> Tensor:
    """The mask contract: True where an element is kept, bool [K, rows, width].

    Element `offsets[row] + column` of text `example_ids[row]` under sample `first_sample + k` at `site`. Philox counter
    (element // 8, sample, site, example id), all modulo 2^32; the call's 128 bits are eight 16-bit lanes, low half first.
    """
    device = example_ids.device
    element = offsets.to(torch.int64)[:, None] + torch.arange(width, device=device)  # [rows, width]
    sample = torch.arange(first_sample, first_sample + num_samples, device=device)[:, None, None]
    counter = ((element // LANES) & MASK32, sample & MASK32, torch.tensor(site & MASK32, device=device), example_ids[:, None] & MASK32)
    words = torch.stack(philox4x32_ref(counter, seed), dim=-1)  # [K, rows, width, 4]
    lane = (element % LANES).expand(words.shape[:-1])
    word = words.gather(-1, (lane // 2)[..., None])[..., 0]
    return ((word >> (16 * (lane % 2))) & 0xFFFF) >= dropout_threshold(p)


def repeat_dropout_ref(
    x: Tensor, num_samples: int, p: float, seed: int, site: int, example_ids: Tensor, offsets: Tensor, first_sample: int = 0
) -> Tensor:
    """K differently masked copies of x: [rows, D] or [K, rows, D] -> [K, rows, D], in the dtype of x.

    Kept values are multiplied by float32(65536 / (65536 - t)) in float32 (float64 for a float64 x), then rounded once.
    """
    keep = keep_mask_ref(num_samples, x.shape[-1], p, seed, site, example_ids, offsets, first_sample)
    work = x if x.dtype == torch.float64 else x.float()
    scale = torch.tensor(dropout_scale(p), dtype=torch.float32, device=x.device).to(work.dtype)
    return torch.where(keep, work * scale, torch.zeros((), dtype=work.dtype, device=x.device)).to(x.dtype)


def masked_ref(x: Tensor, p: float, draws: Draws, first: Tensor) -> Tensor:
    """Dropout of one sample by `draws`: x [B * R, D] of texts with R rows each, whose first elements are `first` [R]."""
    texts, (seed, sample) = len(draws.example_ids), draws.key.tolist()
    ids = draws.example_ids.repeat_interleave(len(first))
    return repeat_dropout_ref(x, 1, p, seed, draws.site, ids, first.repeat(texts), sample)[0]


def entropy_ref(log_probs: Tensor) -> Tensor:
    """-sum p ln p over the last dimension in nats, with 0 ln 0 = 0."""
    probs = log_probs.exp()
    return -torch.where(probs == 0, torch.zeros_like(probs), probs * log_probs).sum(-1)


def mc_statistics_ref(logits: Tensor, offsets: Sequence[int]) -> tuple[Tensor, ...]:
    """Statistics of K stochastic passes of N teachers: logits [K, B, S], teacher i owns columns offsets[i]:offsets[i + 1].

    Returns mean_probs [B, S], var_probs [B, S] (population variance), predictive_entropy [B, N], expected_entropy [B, N],
    mutual_information [B, N] (clamped at 0), normalized_entropy [B, N], selected int64 [B] (lowest normalised entropy, ties to the
    lowest teacher), teacher_margin [B] (gap of the two best 1 - normalised entropies; 1 for one teacher).
    A NaN logit makes that teacher's statistics and the margin of that text NaN; such a teacher is never selected.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    mean_probs, var_probs, predictive, expected = [], [], [], []
    for start, stop in pairwise(offsets):
        log_probs = torch.log_softmax(logits[:, :, start:stop], dim=-1)
        probs = log_probs.exp()
        mean = probs.mean(0)
        mean_probs.append(mean)
        var_probs.append(probs.var(0, correction=0))
        predictive.append(entropy_ref(mean.log()))
        expected.append(entropy_ref(log_probs).mean(0))
    H, E = torch.stack(predictive, -1), torch.stack(expected, -1)
    upper = torch.tensor([math.log(stop - start) for start, stop in pairwise(offsets)])
    upper = upper.to(H)
    normalized = torch.where(upper == 0, H * 0, H / torch.where(upper == 0, 1, upper))
    selected, margin = select_teacher_ref(-normalized)
    return (torch.cat(mean_probs, -1), torch.cat(var_probs, -1), H, E, (H - E).clamp_min(0), normalized, selected, margin)


def select_teacher_ref(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Best teacher (ties to the lowest index, NaN never) and the gap to the second best: scores [B, N] -> int64 [B], [B]."""
    clean = torch.where(scores.isnan(), -math.inf, scores)
    best = clean.max(-1, keepdim=True).values
    index = torch.arange(scores.shape[-1], device=scores.device)
    selected = torch.where(clean == best, index, scores.shape[-1]).amin(-1)
    if scores.shape[-1] == 1:
        return selected, torch.where(scores[:, 0].isnan(), scores[:, 0], 1.0)
    top = clean.topk(2, dim=-1).values
    return selected, torch.where(scores.isnan().any(-1), math.nan, top[:, 0] - top[:, 1])


def mc_head_ref(
    features: Tensor, weight: Tensor, bias: Tensor | None, num_samples: int, p: float, seed: int, site: int, example_ids: Tensor
) -> tuple[Tensor, ...]:
    """Statistics of `linear(dropout(features))` over K masks: features [B, D], weight [C, D], bias [C] or None, one teacher.

    The element of the mask contract is the feature's column. Returns mean_probs [B, C], var_probs [B, C], predictive_entropy [B],
    expected_entropy [B], mutual_information [B], normalized_entropy [B], and the deterministic logits [B, C] (no dropout).
    """
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    x, w, b = features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    masked = repeat_dropout_ref(x, num_samples, p, seed, site, example_ids, torch.zeros_like(example_ids))
    logits = torch.nn.functional.linear(masked, w, b)  # [K, B, C]
    statistics = mc_statistics_ref(logits, [0, weight.shape[0]])
    return (*statistics[:2], *(s[:, 0] for s in statistics[2:6]), torch.nn.functional.linear(x, w, b))


def distill_target_ref(
    teacher_probs: Tensor, scores: Tensor, offsets: Sequence[int], teacher_to_union: Tensor, num_classes: int, soft: bool, tau: float
) -> Tensor:
    """q [B, C] in union space: the selected teacher's probabilities (hard), or all weighted by softmax(scores / tau) (soft)."""
    if soft:
        weights = torch.softmax(scores / tau, dim=-1)
    else:
        weights = torch.nn.functional.one_hot(select_teacher_ref(scores)[0], scores.shape[-1])
    owner = torch.repeat_interleave(
        torch.arange(len(offsets) - 1, device=scores.device), torch.tensor(offsets, device=scores.device).diff()
    )
    weighted = weights.to(teacher_probs)[:, owner] * teacher_probs
    q = torch.zeros(len(teacher_probs), num_classes, dtype=weighted.dtype, device=weighted.device)
    return q.index_add(1, teacher_to_union, weighted)


def distill_loss_ref(
    student_logits: Tensor,
    teacher_probs: Tensor,
    scores: Tensor,
    offsets: Sequence[int],
    teacher_to_union: Tensor,
    soft: bool,
    tau: float,
    temperature: float,
    margin: bool,
) -> Tensor:
    """KL(q, softmax(student_logits / temperature)) per text, times (teacher margin + 1e-6) where `margin`: [B].

    student_logits [B, C]; teacher_probs [B, S], each teacher's block a distribution (or zero); scores [B, N], high = trust;
    teacher_to_union int64 [S]; tau: temperature of the scores (soft only). Differentiable in student_logits.
    """
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    probs, scores = teacher_probs.to(dtype), scores.to(dtype)
    q = distill_target_ref(probs, scores, offsets, teacher_to_union, student_logits.shape[-1], soft, tau)
    log_p = torch.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    # xlogy: 0 ln 0 = 0; where q is 0 the student's log-probability must not enter, be it -inf.
    loss = (torch.special.xlogy(q, q) - torch.where(q == 0, torch.zeros_like(q), q * log_p)).sum(-1)
    return loss * (select_teacher_ref(scores)[1] + 1e-6) if margin else loss


def replica_dropout_ref(
    x: Tensor,
    plain_first: bool,
    p: float,
    seed: int,
    site: int,
    example_ids: Tensor,
    offsets: Tensor,
    first_sample: int,
) -> Tensor:
    """Masks for replicas [R, rows, D]; with plain_first replica 0 passes unmasked and the samples count from replica 1."""
    plain, masked = x[: int(plain_first)], x[int(plain_first) :]
    if len(masked):
        masked = repeat_dropout_ref(masked, len(masked), p, seed, site, example_ids, offsets, first_sample)
    return torch.cat([plain, masked])


def dropout_add_layer_norm_ref(
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
    """layer_norm(dropout(x) + residual) over replicas: x [R, rows, D], residual [R, rows, D] or [rows, D] (read once for all R).

    weight, bias [D]; example_ids, offsets int64 [rows] as in `repeat_dropout`. plain_first: replica 0 is the deterministic pass,
    unmasked; replica r is sample first_sample + r - 1. Computed in float32 (float64 for float64), returned in the dtype of x.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dropped = replica_dropout_ref(x.to(dtype), plain_first, p, seed, site, example_ids, offsets, first_sample)
    summed = dropped + residual.to(dtype)
    return torch.nn.functional.layer_norm(summed, (x.shape[-1],), weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


def residual_norm_ref(
    x: Tensor, dense_bias: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float, eps: float, draws: Draws | None
) -> Tensor:
    """layer_norm(dropout(x + dense_bias) + residual): x, residual [B, ..., D], L rows a text; dense_bias, weight, bias [D].

    Mask element: column d of row l of its text is l D + d. Computed in float32 (float64 for float64), returned in the dtype of x.
    Differentiable.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    width = x.shape[-1]
    z = x.to(dtype) + dense_bias.to(dtype)
    if dropout_threshold(p):
        first = torch.arange(x.shape[1:-1].numel(), device=x.device) * width
        z = masked_ref(z.reshape(-1, width), p, draws, first).view_as(x)
    z = z + residual.to(dtype)
    return torch.nn.functional.layer_norm(z, (width,), weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


def self_attention_ref(qkv: Tensor, num_heads: int, p: float, draws: Draws | None, mask: Tensor | None) -> Tensor:
    """Attention with dropout of its probabilities: qkv [B, L, 3 H d] -> [B, L, H d]; mask bool, [B | 1, 1, L | 1, L | 1], or None.

    Mask element = (head * 16384 + query) * 16384 + key. A query that sees no key gets zeros. In float32 (float64 for float64),
    returned in the dtype of qkv. Differentiable.
    """
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    length = qkv.shape[1]
    query, key, value = qkv.to(dtype).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, L, d] each
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    some = seen.any(-1, keepdim=True)
    probs = torch.softmax(scores.masked_fill(some & ~seen, -torch.inf), -1) * some
    if dropout_threshold(p):
        element = torch.arange(num_heads, device=qkv.device)[:, None] * ATTENTION_STRIDE + torch.arange(length, device=qkv.device)
        probs = masked_ref(probs.reshape(-1, length), p, draws, (element * ATTENTION_STRIDE).flatten()).view_as(probs)
    return (probs @ value).transpose(1, 2).flatten(-2).to(qkv.dtype)


def adamw_ref(
    weights: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    casts: Sequence[Tensor | None],
    decays: Sequence[float],
    grads: Sequence[Tensor | None],
    rates: Tensor,
    betas: tuple[float, float],
    eps: float,
    max_norm: float,
    coupled: bool,
) -> Tensor:
    """Clip gradients to a joint norm, which is returned, and change weights, moments and casts as the head of adamw.py says.

    rates [3]: lr, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t). In the dtype of the weights.
    """
    squares = [grad.to(weights[0].dtype).square().sum() for grad in grads if grad is not None]
    norm = torch.stack([weights[0].new_zeros(()), *squares]).sum().sqrt()
    scale, (lr, rate, root) = (max_norm / (norm + 1e-6)).clamp_max(1.0), rates
    for weight, exp_avg, exp_avg_sq, cast, decay, grad in zip(weights, exp_avgs, exp_avg_sqs, casts, decays, grads, strict=True):
        if grad is None:
            continue
        grad = grad.to(weight.dtype) * scale
        if coupled:
            grad += decay * weight
        else:
            weight -= lr * decay * weight
        exp_avg.lerp_(grad, 1 - betas[0])
        exp_avg_sq.lerp_(grad * grad, 1 - betas[1])
        weight -= rate * exp_avg / (root * exp_avg_sq.sqrt() + eps)
        if cast is not None:
            cast.copy_(weight)
    return norm


def one_query_attention_ref(
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
    """Attention of one query per text over all its keys, K masks of the probabilities on one softmax.

    query [B, H * d]; key, value [T, G * d] packed tokens (G key heads, H a multiple of G); text b owns rows starts[b]:starts[b + 1],
    starts int64 [B + 1]; position_bias [H, >= longest text] or None is added to the scaled scores. query_positions int64 [B]: the
    position of the query's token, for the masks: element = (head * 16384 + query position) * 16384 + key position.
    Returns [R, B, H * d], R = num_samples, + 1 with plain_first (replica 0 unmasked). Every text must have a token.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    head_dim = query.shape[-1] // num_heads
    group = query.shape[-1] // key.shape[-1]  # query heads per key head
    replicas = num_samples + int(plain_first)
    output = query.new_empty((replicas, *query.shape))
    heads = torch.arange(num_heads, device=query.device)
    for b, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        q = query[b].to(dtype).view(num_heads, 1, head_dim)
        k, v = (t[start:stop].to(dtype).view(stop - start, -1, head_dim).repeat_interleave(group, 1) for t in (key, value))
        scores = (q * k.transpose(0, 1)).sum(-1) * scaling  # [H, L]
        if position_bias is not None:
            scores = scores + position_bias[:, : stop - start].to(dtype)
        probs = torch.softmax(scores, -1).expand(replicas, -1, -1)
        offsets = (heads * ATTENTION_STRIDE + query_positions[b]) * ATTENTION_STRIDE
        masked = replica_dropout_ref(probs, plain_first, p, seed, site, example_ids[b].expand(num_heads), offsets, first_sample)
        output[:, b] = torch.einsum("rhl,lhd->rhd", masked, v).reshape(replicas, -1).to(query.dtype)
    return output


def packed_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    first_positions: Tensor,
    starts: Tensor,
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
    """Attention inside every text, its probabilities masked, for replicas that share their states or have their own.

    query [(R,) Q, H * d]; key, value [(R,) T, G * d]: text b owns rows starts[b]:starts[b + 1] and queries
    query_starts[b]:query_starts[b + 1], the first at position first_positions[b]; position_bias [H | 1, positions, positions] or None
    is added to the scaled scores. Mask element = (head * 16384 + query position) * 16384 + key position.
    Returns [R, Q, H * d], R = num_samples, + 1 with plain_first (replica 0 unmasked); [Q, H * d] where the replicas are equal.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    head_dim = query.shape[-1] // num_heads
    group = query.shape[-1] // key.shape[-1]  # query heads per key head
    shared = p == 0 and query.dim() == key.dim() == 2
    replicas = 1 if shared else num_samples + int(plain_first)
    q, k, v = (t.to(dtype).unflatten(-1, (-1, head_dim)) for t in (query, key, value))
    q, k, v = (t.expand(replicas, *t.shape[-3:]) for t in (q, k.repeat_interleave(group, -2), v.repeat_interleave(group, -2)))
    output = q.new_empty(replicas, *query.shape[-2:])
    heads = torch.arange(num_heads, device=query.device)[:, None]
    for b, position in enumerate(first_positions.tolist()):
        rows, columns = slice(*query_starts[b : b + 2].tolist()), slice(*starts[b : b + 2].tolist())
        scores = torch.einsum("rihd,rlhd->rhil", q[:, rows], k[:, columns]) * scaling
        positions = torch.arange(position, position + scores.shape[2], device=query.device)
        if position_bias is not None:
            scores = scores + position_bias[:, positions, : scores.shape[3]].to(dtype)
        probs = torch.softmax(scores, -1)
        if p > 0:
            offsets = ((heads * ATTENTION_STRIDE + positions) * ATTENTION_STRIDE).flatten()
            ids = example_ids[b].expand(len(offsets))
            probs = replica_dropout_ref(probs.flatten(1, 2), plain_first, p, seed, site, ids, offsets, first_sample).view_as(probs)
        output[:, rows] = torch.einsum("rhil,rlhd->rihd", probs, v[:, columns]).flatten(2)
    output = output.to(query.dtype)
    return output[0] if shared else output
