"""adamw: gradients clipped to a joint norm and a step of AdamW over all tensors of a model, in a few launches on a GPU.

    s = min(1, max_norm / (|g| + 1e-6))       |g|: joint norm of the gradients
    g <- s g                                  coupled decay: s g + decay w, and none below
    m <- m + (1 - beta1) (g - m)              v <- beta2 v + (1 - beta2) g^2
    w <- (1 - lr decay) w - r0 m / (r1 sqrt(v) + eps)
    cast <- w in bf16                         of weights whose forward reads that, and whose gradient has it
    r0 = lr / (1 - beta1^t), r1 = 1 / sqrt(1 - beta2^t) at step t = 1, 2, ...

Source: Loshchilov and Hutter, arXiv 1711.05101; clipping as torch.nn.utils.clip_grad_norm_.
Bytes of a weight: g read twice, w, m and v read and written, the cast written: 30 with a cast, 32 without. By PyTorch, with copies of
the gradients in fp32, 52 and 40.
The kernels read the tensors' addresses from memory, so that a CUDA graph may be recorded before the gradients' are known
(muka_fast/recorded.py, which alone uses this); each program does PART elements of one tensor.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from muka_fast.ops import table
from muka_fast.ops.aot import Specialisation
from muka_fast.ops.philox import triton
from muka_fast.ops.reference import adamw_ref

_kinds: Callable | None = None
SPECIALISATIONS: list[Specialisation] = []


class Tensors(NamedTuple):
    """Of a model, one entry a weight: fp32 weight and moments of one shape, its bf16 cast or None, its decay."""

    weights: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    casts: Sequence[Tensor | None]
    decays: Sequence[float]


class Rule(NamedTuple):
    """betas in [0, 1), eps > 0, max_norm > 0, infinite for no clipping. coupled: the decay is part of the gradient (Adam with L2)."""

    betas: tuple[float, float]
    eps: float
    max_norm: float
    coupled: bool = False

    def rates(self, lr: float, step: int) -> tuple[float, float, float]:
        """lr, r0 and r1 of step 1, 2, ...: what changes from step to step."""
        return lr, lr / (1 - self.betas[0] ** step), (1 - self.betas[1] ** step) ** -0.5


def bytes_moved(elements: int, casts: bool) -> int:
    """Bytes the op must read and write for weights with bf16 gradients and casts, or with fp32 gradients and none."""
    return elements * (30 if casts else 32)


class AdamW:
    """Steps over the same tensors, which it changes in place. By Triton on a GPU where all are contiguous, else by PyTorch."""

    def __init__(self, tensors: Tensors, rule: Rule) -> None:
        self.tensors, self.rule = tensors, rule
        there = [t for column in tensors[:4] for t in column if t is not None]
        fits = tensors.weights[0].dtype == torch.float32 and all(table.dense(t) is t for t in there)
        self.kinds = _kinds(tensors) if _kinds is not None and table.runs_triton(tensors.weights[0]) and fits else None

    def readable(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients as `step` takes them: dense, where they lie otherwise copies."""
        return [None if grad is None else table.dense(grad) for grad in grads]

    def addresses(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Of `readable` gradients, int64 [T] on the host."""
        return torch.tensor([0 if grad is None else grad.data_ptr() for grad in grads], dtype=torch.int64)

    def step(self, grads: Sequence[Tensor | None], rates: Tensor, addresses: Tensor) -> Tensor:
        """The joint norm of the gradients before clipping, a scalar.

        grads: `readable`, of the shape of their weights, bf16 where these have casts, else fp32; weights whose gradient is None stay.
        rates: fp32 [3] of `Rule.rates` on the device; addresses: those of grads on the device, read when the kernels run.
        """
        if self.kinds is None:
            return adamw_ref(*self.tensors, grads, rates, *self.rule)
        return _step(self.kinds, self.rule, rates, addresses)


if triton is not None:
    import triton.language as tl

    from muka_fast.ops.fast_math import FUSED

    BLOCK, PART = 256, 2048  # elements of a step of a warp, and of a program, which is one warp

    @triton.jit
    def at(address, dtype: tl.constexpr):
        """The tensor at an address, which 16 divides."""
        return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)

    @triton.jit
    def part(p_parts, p_grads, p_sizes, PART: tl.constexpr):
        """Tensor and gradient of this program, and its elements' first and end; none where there is no gradient."""
        i, start = tl.load(p_parts + 2 * tl.program_id(0)), tl.load(p_parts + 2 * tl.program_id(0) + 1).to(tl.int64) * PART
        grad = tl.load(p_grads + i)
        return i, grad, start, tl.where(grad == 0, start, tl.minimum(start + PART, tl.load(p_sizes + i)))

    @triton.jit
    def elements(start, end, FULL: tl.constexpr, BLOCK: tl.constexpr):
        """BLOCK of them, and which are there: all where FULL, so that their memory moves in 16 bytes a lane."""
        o = start + tl.arange(0, BLOCK)
        return o, tl.full([BLOCK], True, tl.int1) if FULL else o < end

    @triton.jit
    def square(p_grad, start, end, FULL: tl.constexpr, BLOCK: tl.constexpr):
        o, m = elements(start, end, FULL, BLOCK)
        b_g = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32)
        return b_g * b_g

    @triton.jit
    def squares_kernel(
        p_parts,  # int32 [programs, 2]: tensor, part of it
        p_grads,  # int64 [T], addresses
        p_sizes,  # int64 [T]
        p_squares,  # fp32 [programs], their sum
        CASTS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        _, grad, first, end = part(p_parts, p_grads, p_sizes, PART)
        p_grad = at(grad, tl.bfloat16 if CASTS else tl.float32)
        b_sum = tl.zeros([BLOCK], tl.float32)
        for start in range(first, end, BLOCK):
            if start + BLOCK <= end:
                b_sum += square(p_grad, start, end, True, BLOCK)
            else:
                b_sum += square(p_grad, start, end, False, BLOCK)
        tl.store(p_squares + tl.program_id(0), tl.sum(b_sum, 0))

    @triton.jit
    def update(
        p_grad, p_weight, p_exp_avg, p_exp_avg_sq, p_cast, start, end, scale, decay, lr, rate, root, rest1, beta2, rest2, eps,
        CASTS: tl.constexpr, COUPLED: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        o, m = elements(start, end, FULL, BLOCK)
        b_g = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32) * scale
        b_w = tl.load(p_weight + o, mask=m, other=0.0)
        b_m = tl.load(p_exp_avg + o, mask=m, other=0.0)
        b_v = tl.load(p_exp_avg_sq + o, mask=m, other=0.0)
        if COUPLED:
            b_g += decay * b_w
        else:
            b_w -= lr * decay * b_w
        b_m += rest1 * (b_g - b_m)
        b_v = beta2 * b_v + rest2 * b_g * b_g
        b_w -= rate * b_m / (root * tl.sqrt(b_v) + eps)
        tl.store(p_weight + o, b_w, mask=m)
        tl.store(p_exp_avg + o, b_m, mask=m)
        tl.store(p_exp_avg_sq + o, b_v, mask=m)
        if CASTS:
            tl.store(p_cast + o, b_w.to(tl.bfloat16), mask=m)

    @triton.jit
    def adamw_kernel(
        p_parts,  # int32 [programs, 2]: tensor, part of it
        p_grads,  # int64 [T], addresses, as are
        p_weights,  # int64 [T]
        p_exp_avgs,  # int64 [T]
        p_exp_avg_sqs,  # int64 [T]
        p_casts,  # int64 [T], 0 unless CASTS
        p_sizes,  # int64 [T]
        p_decays,  # fp32 [T]
        p_rates,  # fp32 [3]: lr, r0, r1
        p_norm,  # fp32 [1]
        rest1, beta2, rest2, eps, max_norm,
        CASTS: tl.constexpr, COUPLED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """rest: 1 - beta."""
        i, grad, first, end = part(p_parts, p_grads, p_sizes, PART)
        p_grad = at(grad, tl.bfloat16 if CASTS else tl.float32)
        p_weight = at(tl.load(p_weights + i), tl.float32)
        p_exp_avg = at(tl.load(p_exp_avgs + i), tl.float32)
        p_exp_avg_sq = at(tl.load(p_exp_avg_sqs + i), tl.float32)
        p_cast = at(tl.load(p_casts + i), tl.bfloat16)
        scale = tl.minimum(max_norm / (tl.load(p_norm) + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
        decay, lr, rate, root = tl.load(p_decays + i), tl.load(p_rates), tl.load(p_rates + 1), tl.load(p_rates + 2)
        for start in range(first, end, BLOCK):
            if start + BLOCK <= end:
                update(
                    p_grad, p_weight, p_exp_avg, p_exp_avg_sq, p_cast, start, end, scale, decay, lr, rate, root, rest1, beta2, rest2,
                    eps, CASTS, COUPLED, True, BLOCK,
                )  # fmt: skip
            else:
                update(
                    p_grad, p_weight, p_exp_avg, p_exp_avg_sq, p_cast, start, end, scale, decay, lr, rate, root, rest1, beta2, rest2,
                    eps, CASTS, COUPLED, False, BLOCK,
                )  # fmt: skip

    class Kind(NamedTuple):
        """Tensors with casts, or those without: where they are and what a launch needs of them."""

        casts: bool
        place: Tensor  # int64 [T of the kind]: which of all tensors
        parts: Tensor
        addresses: Tensor  # int64 [5, T]: weights, moments, casts, and sizes
        decays: Tensor

    def _kinds(tensors: Tensors) -> list[Kind]:
        kinds, device = [], tensors.weights[0].device
        for casts in (True, False):
            rows = [row for row in zip(*tensors, strict=True) if (row[3] is not None) is casts]
            if not rows:
                continue
            sizes = torch.tensor([row[0].numel() for row in rows])
            counts = -(-sizes // PART)
            which = torch.arange(len(rows)).repeat_interleave(counts)
            number = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
            addresses = [[0 if t is None else t.data_ptr() for t in column] for column in list(zip(*rows, strict=True))[:4]]
            kinds.append(
                Kind(
                    casts,
                    torch.tensor([i for i, cast in enumerate(tensors.casts) if (cast is not None) is casts]).to(device),
                    torch.stack([which, number], 1).int().to(device),
                    torch.cat([torch.tensor(addresses), sizes[None]]).to(device),
                    torch.tensor([row[4] for row in rows], dtype=torch.float32).to(device),
                )
            )
        return kinds

    def _step(kinds: list[Kind], rule: Rule, rates: Tensor, addresses: Tensor) -> Tensor:
        grads = [addresses[kind.place] for kind in kinds]
        squares = [torch.empty(len(kind.parts), dtype=torch.float32, device=rates.device) for kind in kinds]
        beta1, beta2 = rule.betas
        with table.on_device_of(rates):
            for kind, grad, out in zip(kinds, grads, squares, strict=True):
                squares_kernel[(len(out),)](
                    kind.parts, grad, kind.addresses[4], out, CASTS=kind.casts, PART=PART, BLOCK=PART // 2, num_warps=1, **FUSED
                )
            norm = torch.cat(squares).sum().sqrt()
            for kind, grad in zip(kinds, grads, strict=True):
                adamw_kernel[(len(kind.parts),)](
                    kind.parts, grad, *kind.addresses, kind.decays, rates, norm,
                    1 - beta1, float(beta2), 1 - beta2, float(rule.eps), float(rule.max_norm),  # an integer would be compiled in
                    CASTS=kind.casts, COUPLED=rule.coupled, PART=PART, BLOCK=BLOCK, num_warps=1, **FUSED,
                )  # fmt: skip
        return norm

    def _specialisation(kernel, casts: bool, **constexprs: bool) -> Specialisation:
        of = {"p_parts": "*i32", "p_decays": "*fp32", "p_rates": "*fp32", "p_norm": "*fp32", "p_squares": "*fp32"}
        of |= dict.fromkeys(("p_grads", "p_weights", "p_exp_avgs", "p_exp_avg_sqs", "p_casts", "p_sizes"), "*i64")
        of |= dict.fromkeys(("rest1", "beta2", "rest2", "eps", "max_norm"), "fp32")
        return Specialisation(
            f"adamw {'step' if constexprs else 'norm'}{' casts' * casts}{' coupled' * constexprs.get('COUPLED', False)}",
            kernel,
            {name: of[name] for name in kernel.arg_names if name in of},
            {"CASTS": casts, "PART": PART, "BLOCK": BLOCK if constexprs else PART // 2, **constexprs},
            num_warps=1,
            lone_warps=True,
            fast=casts and not constexprs.get("COUPLED", False),
        )

    SPECIALISATIONS = [_specialisation(squares_kernel, casts) for casts in (True, False)]
    SPECIALISATIONS += [_specialisation(adamw_kernel, casts, COUPLED=coupled) for casts in (True, False) for coupled in (False, True)]
