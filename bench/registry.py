"""The ops under test: shapes, our call, the eager forms it is compared with, the exact result, and what the op must move.

Letters: K samples · B texts (residual_norm: rows) · N teachers · C classes of each (of the one teacher for mc_head) · D features ·
S = N * C · L tokens of the longest text · H heads · T matrices. One list of all ops, hence more than 400 lines.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from muka_fast.ops import (
    adamw,
    distill_loss,
    dropout_add_layer_norm,
    mc_head,
    mc_statistics,
    one_query_attention,
    packed_attention,
    philox,
    reference,
    repeat_dropout,
    residual_norm,
    self_attention,
)

K, P, SEED, SITE = 16, 0.1, 0x9E3779B97F4A7C15, 3


class Problem(NamedTuple):
    """One op at one shape. ours and eager return results only as a side effect of being timed; `check` compares values."""

    ours: Callable[[], object]
    eager: dict[str, Callable[[], object]]  # "eager": the best batched form; others: further forms worth a line
    check: Callable[[], str]  # "" or what is wrong
    bytes_moved: int
    flops: int
    counted: tuple[str, int]  # what else the op is made of: ("exponentials", how many)


class Case(NamedTuple):
    op: str
    shape: tuple[int, ...]
    letters: str
    build: Callable[..., Problem]  # (shape, dtype, device) -> Problem
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    compiled: bool = False  # compared with torch.compile by default (compiling takes half a minute on a small machine)
    toy: bool = False

    @property
    def label(self) -> str:
        return " ".join(f"{letter}{size}" for letter, size in zip(self.letters, self.shape, strict=True))


def errors(ours: tuple, eager: tuple, exact: tuple, scales: tuple[float, ...]) -> str:
    """The tests' tolerance: at most twice the error of eager float32, plus a few roundings of the result's magnitude."""
    for place, (a, b, c, scale) in enumerate(zip(ours, eager, exact, scales, strict=True)):
        if not a.is_floating_point():
            continue  # a selection may differ where two teachers tie
        error, theirs = ((t.double() - c).abs().max().item() for t in (a, b))
        limit = 2 * theirs + 4e-7 * max(scale, c.abs().max().item())
        if not error <= limit:
            return f"output {place}: error {error:.1e}, limit {limit:.1e}"
    return ""


def loop_statistics(logits: Tensor, offsets: list[int]) -> tuple[Tensor, ...]:
    """How one would write it: one teacher after the other."""
    means, variances, predictive, expected, normalized = [], [], [], [], []
    for start, stop in pairwise(offsets):
        probs = torch.softmax(logits[:, :, start:stop].float(), -1)
        mean = probs.mean(0)
        means.append(mean)
        variances.append(probs.var(0, correction=0))
        predictive.append(-torch.xlogy(mean, mean).sum(-1))
        expected.append(-torch.xlogy(probs, probs).sum(-1).mean(0))
        normalized.append(predictive[-1] / torch.tensor(float(stop - start)).log())
    H, E, u = torch.stack(predictive, -1), torch.stack(expected, -1), torch.stack(normalized, -1)
    top = (1 - u).topk(min(2, u.shape[1]), -1).values
    return torch.cat(means, -1), torch.cat(variances, -1), H, E, (H - E).clamp_min(0), u, u.argmin(-1), top[:, 0] - top[:, -1]


def batched_statistics(logits: Tensor, teachers: int) -> tuple[Tensor, ...]:
    """The best eager form, for teachers of equal size: one view, as few and as cheap passes as PyTorch allows."""
    samples, texts, width = logits.shape
    log_probs = torch.log_softmax(logits.float().view(samples, texts, teachers, -1), -1)
    probs = log_probs.exp()
    mean = probs.mean(0)
    variance = (probs * probs).mean(0).sub_(mean * mean)
    H, E = torch.special.entr(mean).sum(-1), -probs.mul_(log_probs).sum(-1).mean(0)
    u = H / torch.tensor(float(width // teachers)).log()
    top, index = u.topk(min(2, teachers), -1, largest=False)
    return mean.view(texts, width), variance.view(texts, width), H, E, (H - E).clamp_min_(0), u, index[:, 0], top[:, -1] - top[:, 0]


def statistics_problem(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Problem:
    samples, texts, teachers, classes = shape
    width, offsets = teachers * classes, list(range(0, teachers * classes + 1, classes))
    logits = (torch.randn(samples, texts, width, device=device) * 3).to(dtype)

    def check() -> str:
        few = logits[:, :64]
        exact, eager = (reference.mc_statistics_ref(few.to(t), offsets) for t in (torch.float64, torch.float32))
        return errors(tuple(mc_statistics.mc_statistics(few, offsets)), eager, exact, (1, 1, 1, 1, 10, 1, 1, 1))

    return Problem(
        lambda: mc_statistics.mc_statistics(logits, offsets),
        {"eager": lambda: batched_statistics(logits, teachers), "eager loop": lambda: loop_statistics(logits, offsets)},
        check,
        mc_statistics.bytes_moved(samples, texts, teachers, width, logits.element_size()),
        0,
        ("exponentials", mc_statistics.operations(samples, texts, teachers, width)),
    )


def eager_loss(student: Tensor, probs: Tensor, scores: Tensor, owner: Tensor, mapping: Tensor) -> Tensor:
    weighted = torch.softmax(scores / 0.2, -1)[:, owner] * probs
    q = torch.zeros(student.shape, device=student.device).index_add_(1, mapping, weighted)
    top = scores.topk(2, -1).values
    return F.kl_div(torch.log_softmax(student.float(), -1), q, reduction="none").sum(-1) * (top[:, 0] - top[:, 1] + 1e-6)


def loss_problem(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Problem:
    """Forward and backward."""
    texts, teachers, classes = shape
    width, offsets = teachers * classes, list(range(0, teachers * classes + 1, classes))
    student = torch.randn(texts, width, device=device).to(dtype).requires_grad_()
    probs = torch.softmax(torch.randn(texts, teachers, classes, device=device), -1).view(texts, width)
    scores, mapping = torch.rand(texts, teachers, device=device), torch.arange(width, device=device)
    owner = mapping // classes
    options = {"soft": True, "tau": 0.2, "temperature": 1.0, "margin": True}

    def backward(loss: Tensor) -> None:
        student.grad = None
        loss.mean().backward()

    def check() -> str:
        results = []
        ours, definition = (distill_loss.distill_loss, dtype), reference.distill_loss_ref
        for function, to in (ours, (definition, torch.float32), (definition, torch.float64)):
            leaf, rest = student.detach().to(to).requires_grad_(), torch.promote_types(to, torch.float32)
            loss = function(leaf, probs.to(rest), scores.to(rest), offsets, mapping, **options)
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
        return errors(*results, scales=(10, 1 + torch.finfo(dtype).eps / 4e-7))

    return Problem(
        lambda: backward(distill_loss.distill_loss(student, probs, scores, offsets, mapping, **options)),
        {"eager": lambda: backward(eager_loss(student, probs, scores, owner, mapping))},
        check,
        # Forward as the op's file says; backward: the kept gradient in, float32, the student's out.
        distill_loss.bytes_moved(texts, teachers, width, width, student.element_size()) + (4 + student.element_size()) * texts * width,
        0,
        ("exponentials", distill_loss.operations(texts, teachers, width)),
    )


def head_problem(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Problem:
    samples, texts, width, classes = shape
    x, w = torch.randn(texts, width, device=device).to(dtype), torch.randn(classes, width, device=device).to(dtype) / width**0.5
    bias, ids = torch.randn(classes, device=device).to(dtype), torch.arange(texts, device=device)

    def eager() -> tuple[Tensor, ...]:
        masked = F.dropout(x.expand(samples, texts, width), P)
        return *batched_statistics(F.linear(masked, w, bias), 1)[:6], F.linear(x, w, bias)

    def check() -> str:
        few, few_ids = x[:24], ids[:24]
        mask = (samples, P, SEED, SITE, few_ids)
        exact, in_float = (reference.mc_head_ref(few.to(t), w.to(t), bias.to(t), *mask) for t in (torch.float64, torch.float32))
        ours = mc_head.mc_head(few, w, bias, *mask)
        # 16-bit products are accumulated in float32, yet enter in 16 bits.
        scale = 10 * max(1.0, torch.finfo(dtype).eps / 1e-5)
        return errors(tuple(ours), in_float, exact, (scale,) * 7)

    work = mc_head.operations(samples, texts, width, classes)
    return Problem(
        lambda: mc_head.mc_head(x, w, bias, samples, P, SEED, SITE, ids),
        {"eager": eager},
        check,
        mc_head.bytes_moved(texts, width, classes, x.element_size()),
        work["dense_flops"],
        ("random lanes", work["philox_lanes"]),
    )


def dropout_problem(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Problem:
    samples, rows, width = shape
    x = torch.randn(rows, width, device=device).to(dtype)
    ids, offsets = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)

    def check() -> str:
        few = (x[:8], samples, P, SEED, SITE, ids[:8], offsets[:8])
        same = torch.equal(repeat_dropout.repeat_dropout(*few), reference.repeat_dropout_ref(*few))
        return "" if same else "masks or values differ from the contract"

    return Problem(
        lambda: repeat_dropout.repeat_dropout(x, samples, P, SEED, SITE, ids, offsets),
        {"eager": lambda: F.dropout(x.expand(samples, rows, width), P)},
        check,
        repeat_dropout.bytes_moved(samples, rows, width, x.element_size()),
        0,
        ("random lanes", samples * rows * width),
    )


def attention_problem(shape: tuple[int, ...], dtype: torch.dtype, device: str, p: float = P) -> Problem:
    """Texts of 1/4 to all of L tokens, evenly; every replica has states of its own, as in scope all. eager and sdpa are padded."""
    samples, texts, length, heads = shape
    lengths = torch.linspace(max(1, length // 4), length, texts).long()
    width, tokens, scaling = 64 * heads, int(lengths.sum()), 0.125
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    query, key, value = (torch.randn(samples, tokens, width, device=device).to(dtype) for _ in range(3))
    padded = [torch.randn(samples * texts, heads, length, 64, device=device).to(dtype) for _ in range(3)]
    unseen = (torch.arange(length) >= lengths[:, None]).repeat(samples, 1)[:, None, None].to(device)
    bias = torch.zeros(unseen.shape, dtype=dtype, device=device).masked_fill_(unseen, -torch.inf)
    starts, ids, zeros = ends.to(device), torch.arange(texts, device=device), torch.zeros(texts, dtype=torch.int64, device=device)
    masks = (samples, p, SEED, SITE)

    def eager() -> Tensor:
        probs = torch.softmax(padded[0] @ padded[1].transpose(2, 3) * scaling + bias, -1)
        return F.dropout(probs, p) @ padded[2]

    def check() -> str:
        first = max(0, texts - 3)  # the longest, which take several blocks of keys
        states = [t[:, int(ends[first]) :] for t in (query, key, value)]
        bounds = starts[first:] - starts[first]
        places, rest = (bounds, zeros[first:], bounds), (heads, scaling, *masks, ids[first:])
        ours = packed_attention.packed_attention(*states, *places, length, *rest)
        exact, in_float = (
            reference.packed_attention_ref(*(t.to(to) for t in states), *places, *rest) for to in (torch.float64, torch.float32)
        )
        return errors((ours,), (in_float,), (exact,), scales=(4 * max(1.0, torch.finfo(dtype).eps / 4e-7),))

    pairs = int((lengths * lengths).sum())
    return Problem(
        lambda: packed_attention.packed_attention(query, key, value, starts, zeros, starts, length, heads, scaling, *masks, ids),
        {"eager": eager, "sdpa": lambda: F.scaled_dot_product_attention(*padded, attn_mask=bias, dropout_p=p)},
        check,
        packed_attention.bytes_moved(samples, tokens, tokens, width, query.element_size()),
        packed_attention.operations(samples, pairs, width),
        ("random lanes", samples * pairs * heads if p else 0),
    )


def plain_attention_problem(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Problem:
    """What the deterministic layers of a trunk do."""
    return attention_problem(shape, dtype, device, 0.0)


def rows_of_texts(rows: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """Example ids, and first elements of rows that are tokens of texts of 64."""
    row = torch.arange(rows, device=device)
    return row // 64, row % 64 * width


def norm_problem(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Problem:
    """What follows a dense layer in scope all: every replica has a residual of its own."""
    samples, rows, width = shape
    x, residual = (torch.randn(samples, rows, width, device=device).to(dtype) for _ in range(2))
    weight, bias = torch.randn(width, device=device).to(dtype), torch.randn(width, device=device).to(dtype)
    ids, offsets = rows_of_texts(rows, width, device)

    def check() -> str:
        # Rows of the call that is timed: a smaller one would run with other parameters of its launch.
        some = torch.cat([torch.arange(4), torch.arange(rows - 4, rows)]).to(device)
        few = [x[:, some], residual[:, some], weight, bias]
        masks = (1e-5, P, SEED, SITE, ids[some], offsets[some])
        exact, in_float = (
            reference.dropout_add_layer_norm_ref(*(t.to(to) for t in few), *masks) for to in (torch.float64, torch.float32)
        )
        ours = dropout_add_layer_norm.dropout_add_layer_norm(x, residual, weight, bias, 1e-5, P, SEED, SITE, ids, offsets)[:, some]
        return errors((ours,), (in_float,), (exact,), scales=(8 * max(1.0, torch.finfo(dtype).eps / 4e-7),))

    return Problem(
        lambda: dropout_add_layer_norm.dropout_add_layer_norm(x, residual, weight, bias, 1e-5, P, SEED, SITE, ids, offsets),
        {"eager": lambda: F.layer_norm(F.dropout(x, P) + residual, (width,), weight, bias)},
        check,
        dropout_add_layer_norm.bytes_moved(samples, rows, width, x.element_size(), shared_residual=False),
        0,
        ("random lanes", samples * rows * width),
    )


def one_query_problem(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Problem:
    """The last layer in scope last:1, texts of L tokens: one softmax a text, K masks of it."""
    samples, texts, length, heads = shape
    width, tokens, scaling = 64 * heads, texts * length, 0.125
    query, key, value = (torch.randn(rows, width, device=device).to(dtype) for rows in (texts, tokens, tokens))
    starts = torch.arange(0, tokens + 1, length, device=device)
    ids, positions = torch.arange(texts, device=device), torch.zeros(texts, dtype=torch.int64, device=device)
    masks = (samples, P, SEED, SITE)

    def eager() -> Tensor:
        split = lambda t: t.view(texts, -1, heads, 64).transpose(1, 2)
        probs = torch.softmax(split(query) @ split(key).transpose(2, 3) * scaling, -1)
        # The samples in the place of the one query: a product over [K, B, H] would copy the values K times.
        return F.dropout(probs.expand(texts, heads, samples, length), P) @ split(value)

    def check() -> str:
        few = min(texts, 3)
        states = query[:few], key[: few * length], value[: few * length]
        rest = (starts[: few + 1], heads, scaling, *masks, ids[:few], positions[:few])
        ours = one_query_attention.one_query_attention(*states, *rest)
        exact, in_float = (
            reference.one_query_attention_ref(*(t.to(to) for t in states), *rest) for to in (torch.float64, torch.float32)
        )
        return errors((ours,), (in_float,), (exact,), scales=(4 * max(1.0, torch.finfo(dtype).eps / 4e-7),))

    return Problem(
        lambda: one_query_attention.one_query_attention(query, key, value, starts, heads, scaling, *masks, ids, positions),
        {"eager": eager},
        check,
        one_query_attention.bytes_moved(samples, texts, tokens, width, query.element_size()),
        one_query_attention.operations(samples, tokens, width),
        ("random lanes", samples * tokens * heads),
    )


def with_gradients(form: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    y = form(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def as_exact(ours: Callable, definition: Callable, leaves: list[Tensor], dy: Tensor) -> str:
    """Result and gradients of an op for training, against its definition."""
    cast = lambda to: ([t.detach().to(to).requires_grad_() for t in leaves], dy.to(to))
    exact, in_float = (with_gradients(definition, *cast(to)) for to in (torch.float64, torch.float32))
    scale = 8 * max(1.0, torch.finfo(dy.dtype).eps / 4e-7)
    return errors(with_gradients(ours, leaves, dy), in_float, exact, scales=(scale,) * (1 + len(leaves)))


def draws(texts: int, device: str) -> reference.Draws:
    return reference.Draws(torch.tensor([philox.signed_seed(SEED), 0], device=device), torch.arange(texts, device=device), SITE)


def of_first(drawn: reference.Draws, texts: Tensor) -> reference.Draws:
    """Of as many texts as there are."""
    return drawn._replace(example_ids=drawn.example_ids[: len(texts)])


def residual_norm_problem(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Problem:
    """What follows a dense layer in training, both ways; parameters fp32."""
    rows, width = shape
    x, residual, dy = (torch.randn(rows, width, device=device).to(dtype) for _ in range(3))
    parameters = [torch.randn(width, device=device) for _ in range(3)]
    leaves = [t.requires_grad_() for t in (x, parameters[0], residual, *parameters[1:])]
    drawn = draws(rows, device)
    ours = lambda *tensors: residual_norm.residual_norm(*tensors, p=P, eps=1e-5, draws=of_first(drawn, tensors[0]))

    def eager(x, dense_bias, residual, weight, bias) -> Tensor:
        z = F.dropout(x + dense_bias.to(x.dtype), P) + residual
        return F.layer_norm(z.float(), (width,), weight, bias).to(x.dtype)

    def check() -> str:
        few = [t.detach()[:24].requires_grad_() if t.dim() > 1 else t for t in leaves]
        definition = lambda *tensors: reference.residual_norm_ref(*tensors, P, 1e-5, of_first(drawn, tensors[0]))
        return as_exact(ours, definition, few, dy[:24])

    return Problem(
        lambda: with_gradients(ours, leaves, dy),
        {"eager": lambda: with_gradients(eager, leaves, dy)},
        check,
        8 * rows * width * x.element_size(),
        0,
        ("random lanes", 2 * rows * width),
    )


def adamw_problem(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Problem:
    """T matrices of D x D with gradients of `dtype`, of which 16 bits come with casts."""
    count, width = shape
    casts = dtype != torch.float32

    def weights(count: int) -> tuple[adamw.Tensors, list[Tensor]]:
        masters = [torch.randn(width, width, device=device) for _ in range(count)]
        moments = [[torch.rand_like(w) for w in masters] for _ in range(2)]
        kept = [w.to(dtype) if casts else None for w in masters]
        return adamw.Tensors(masters, *moments, kept, [0.01] * count), [torch.randn_like(w).to(dtype) for w in masters]

    tensors, grads = weights(count)
    rule = adamw.Rule((0.9, 0.999), 1e-8, 1.0)
    rates = torch.tensor(rule.rates(1e-6, 100), device=device)
    ours, places = adamw.AdamW(tensors, rule), torch.tensor([grad.data_ptr() for grad in grads], device=device)
    parameters = [torch.nn.Parameter(w.clone()) for w in tensors.weights]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def eager() -> None:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = torch.empty_like(parameter) if casts else grad
        if casts:
            torch._foreach_copy_([p.grad for p in parameters], grads)
        torch.nn.utils.clip_grad_norm_(parameters, rule.max_norm)
        optimizer.step()
        if casts:
            torch._foreach_copy_(list(tensors.casts), [p.detach() for p in parameters])

    def check() -> str:
        few, some = weights(2)
        exact = adamw.Tensors(*([None if t is None else t.double() for t in column] for column in few[:4]), few.decays)
        norm = adamw.AdamW(few, rule).step(some, rates, torch.tensor([grad.data_ptr() for grad in some], device=device))
        truth = reference.adamw_ref(*exact, some, rates.double(), *rule)
        if not (norm - truth).abs() <= 1e-5 * truth:
            return f"norm {norm.item()}, exactly {truth.item()}"
        columns = zip(few[:3], exact[:3], strict=True)
        error = max((a - b).abs().max().item() for one, other in columns for a, b in zip(one, other, strict=True))
        return "" if error <= 1e-6 else f"error {error:.1e}"

    moved = adamw.bytes_moved(count * width * width, casts)
    return Problem(lambda: ours.step(grads, rates, places), {"eager": eager}, check, moved, 0, ("square roots", count * width * width))


def self_attention_problem(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Problem:
    """A layer's attention in training, both ways, on texts of 3/4 to all of L tokens; sdpa and eager begin and end as ours does."""
    texts, length, heads = shape
    width = 64 * heads
    qkv, dy = (torch.randn(texts, length, columns, device=device).to(dtype) for columns in (3 * width, width))
    seen = torch.arange(length, device=device) < torch.linspace(length * 3 // 4, length, texts, device=device)[:, None]
    mask, drawn = seen[:, None, None].expand(-1, 1, length, -1), draws(texts, device)
    leaves = [qkv.requires_grad_()]
    ours = lambda qkv: self_attention.self_attention(qkv, heads, p=P, draws=of_first(drawn, qkv), mask=mask[: len(qkv)])

    def split(qkv: Tensor) -> list[Tensor]:
        return [t.unflatten(-1, (heads, 64)).transpose(1, 2) for t in qkv.chunk(3, -1)]

    def eager(qkv: Tensor) -> Tensor:
        query, key, value = split(qkv)
        scores = (query @ key.transpose(2, 3) * 0.125).masked_fill(~mask, -torch.inf)
        return (F.dropout(torch.softmax(scores, -1), P) @ value).transpose(1, 2).flatten(-2)

    def sdpa(qkv: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*split(qkv), attn_mask=mask, dropout_p=P).transpose(1, 2).flatten(-2)

    def check() -> str:
        few = [qkv.detach()[:3].requires_grad_()]
        definition = lambda qkv: reference.self_attention_ref(qkv, heads, P, of_first(drawn, qkv), mask[: len(qkv)])
        return as_exact(ours, definition, few, dy[:3])

    pairs = texts * length * length
    return Problem(
        lambda: with_gradients(ours, leaves, dy),
        {form.__name__: lambda form=form: with_gradients(form, leaves, dy) for form in (eager, sdpa)},
        check,
        11 * texts * length * width * qkv.element_size(),
        14 * pairs * width,
        ("random lanes", 2 * pairs * heads),
    )


CASES = [
    Case("mc_statistics", (K, 32, 2, 2), "KBNC", statistics_problem, toy=True),
    Case("mc_statistics", (K, 256, 4, 77), "KBNC", statistics_problem, compiled=True),
    Case("mc_statistics", (K, 1024, 8, 150), "KBNC", statistics_problem),
    Case("mc_statistics", (K, 32, 2, 10_000), "KBNC", statistics_problem),
    Case("mc_statistics", (K, 8192, 8, 150), "KBNC", statistics_problem, devices=("cuda",)),
    Case("mc_head", (K, 32, 384, 2), "KBDC", head_problem, toy=True),
    Case("mc_head", (K, 256, 768, 77), "KBDC", head_problem, compiled=True),
    Case("mc_head", (K, 1024, 768, 16), "KBDC", head_problem),
    Case("repeat_dropout", (K, 32, 384), "KBD", dropout_problem, toy=True),
    Case("repeat_dropout", (K, 4096, 384), "KBD", dropout_problem),
    Case("repeat_dropout", (K, 65_536, 768), "KBD", dropout_problem, devices=("cuda",)),
    Case("packed_attention", (4, 4, 24, 2), "KBLH", attention_problem, toy=True),
    Case("packed_attention", (K, 32, 64, 12), "KBLH", attention_problem),
    Case("packed_attention", (K, 64, 256, 12), "KBLH", attention_problem, devices=("cuda",)),
    Case("dropout_add_layer_norm", (4, 32, 384), "KBD", norm_problem, toy=True),
    Case("dropout_add_layer_norm", (K, 2048, 768), "KBD", norm_problem),
    Case("dropout_add_layer_norm", (K, 16_384, 768), "KBD", norm_problem, devices=("cuda",)),
    Case("one_query_attention", (K, 4, 24, 2), "KBLH", one_query_problem, toy=True),
    Case("one_query_attention", (K, 256, 64, 12), "KBLH", one_query_problem),
    Case("one_query_attention", (K, 512, 128, 12), "KBLH", one_query_problem, devices=("cuda",)),
    Case("distill_loss", (32, 2, 2), "BNC", loss_problem, toy=True),
    Case("distill_loss", (256, 4, 77), "BNC", loss_problem, compiled=True),
    Case("distill_loss", (1024, 8, 150), "BNC", loss_problem),
    Case("distill_loss", (64, 2, 10_000), "BNC", loss_problem),
    Case("distill_loss", (16_384, 8, 150), "BNC", loss_problem, devices=("cuda",)),
    Case("residual_norm", (896, 768), "BD", residual_norm_problem, devices=("cuda",)),
    Case("residual_norm", (114_688, 768), "BD", residual_norm_problem, devices=("cuda",)),
    Case("adamw", (144, 768), "TD", adamw_problem, devices=("cuda",), dtypes=("float32", "bfloat16")),
    Case("self_attention", (16, 56, 12), "BLH", self_attention_problem, devices=("cuda",), dtypes=("float16", "bfloat16")),
    Case("self_attention", (2048, 56, 12), "BLH", self_attention_problem, devices=("cuda",), dtypes=("float16", "bfloat16")),
    Case("self_attention", (1024, 128, 12), "BLH", self_attention_problem, devices=("cuda",), dtypes=("float16", "bfloat16")),
]
