"""distill_loss: the divergence from the composed teacher target and its gradient, in one pass that never writes the target.

    w = softmax(scores / tau) (soft), or 1 for the best score, ties to the lowest teacher, NaN never (hard)
    q[c] = sum over s with teacher_to_union[s] = c of w[teacher of s] * teacher_probs[s]
    p = softmax(student_logits / T),  Q = sum q
    loss = (sum q ln q - sum q ln p) * f,  0 ln 0 = 0,  f = teacher margin + 1e-6 (margin) or 1
    gradient: d loss / d student_logits = (Q p - q) * f / T

MUKA (arXiv 2112.07327), equations 3 to 6. The forward pass computes the gradient as well; the backward pass only multiplies.
Bytes: student logits, teacher probabilities and scores once in, loss and gradient once out. Operations: one exponential and one
logarithm per student class.
Letters: B texts (b) · N teachers (i) · S = sum of their class counts (s) · C student classes (c).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from muka_fast.ops import table
from muka_fast.ops.reference import distill_loss_ref, distill_target_ref, select_teacher_ref

SCHEMA = (
    "(Tensor student_logits, Tensor teacher_probs, Tensor scores, int[] offsets, Tensor teacher_to_union, bool soft, float tau, "
    "float temperature, bool margin) -> (Tensor, Tensor)"
)
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in csrc/cpu/distill_loss.cpp


def bytes_moved(texts: int, teachers: int, width: int, classes: int, itemsize: int = 4) -> int:
    """Bytes the op must read and write; itemsize: of a student logit. width: S, classes: C."""
    return texts * (itemsize * classes + 4 * width + 4 * teachers + 4 + 4 * classes) + 8 * width


def operations(texts: int, teachers: int, classes: int) -> int:
    """Exponentials and logarithms."""
    return texts * (2 * classes + teachers + 1)


def empty_outputs(student_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [B] and gradient [B, C], float32 (float64 for float64 logits)."""
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    loss = torch.empty(student_logits.shape[0], dtype=dtype, device=student_logits.device)
    return loss, torch.empty(student_logits.shape, dtype=dtype, device=student_logits.device)


def distill_loss_fake(
    student_logits: Tensor, teacher_probs: Tensor, scores: Tensor, offsets: list[int], teacher_to_union: Tensor,
    soft: bool, tau: float, temperature: float, margin: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_outputs(student_logits)


def distill_loss_reference(
    student_logits: Tensor, teacher_probs: Tensor, scores: Tensor, offsets: list[int], teacher_to_union: Tensor,
    soft: bool, tau: float, temperature: float, margin: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # The gradient in closed form: autograd is off below the dispatcher. The tests hold it against autograd of distill_loss_ref.
    loss = distill_loss_ref(student_logits, teacher_probs, scores, offsets, teacher_to_union, soft, tau, temperature, margin)
    probs, scores = teacher_probs.to(loss.dtype), scores.to(loss.dtype)
    q = distill_target_ref(probs, scores, offsets, teacher_to_union, student_logits.shape[1], soft, tau)
    p = torch.softmax(student_logits.to(loss.dtype) / temperature, dim=-1)
    factor = select_teacher_ref(scores)[1][:, None] + 1e-6 if margin else 1.0
    return loss, (q.sum(-1, keepdim=True) * p - q) * factor / temperature


def row_major(tensor: Tensor) -> Tensor:
    """The tensor with consecutive columns; rows may lie apart."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def distill_loss_cpu(
    student_logits: Tensor, teacher_probs: Tensor, scores: Tensor, offsets: list[int], teacher_to_union: Tensor,
    soft: bool, tau: float, temperature: float, margin: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    code = DTYPE_CODES.get(student_logits.dtype)
    if code is None:  # float64: only tests ask for it
        return distill_loss_reference(
            student_logits, teacher_probs, scores, offsets, teacher_to_union, soft, tau, temperature, margin
        )
    logits, probs = row_major(student_logits), row_major(teacher_probs.float())
    scores, mapping = scores.float().contiguous(), teacher_to_union.contiguous()
    loss, grad = empty_outputs(logits)
    table._C.distill_loss(
        logits.data_ptr(), code, *logits.shape, logits.stride(0), probs.data_ptr(), probs.stride(0), scores.data_ptr(), offsets,
        mapping.data_ptr(), soft, tau, temperature, margin, loss.data_ptr(), grad.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return loss, grad


distill_loss_triton: Callable | None = None

RAW = table.register(
    "distill_loss",
    SCHEMA,
    reference=distill_loss_reference,
    cpu=None if table._C is None else distill_loss_cpu,
    triton=distill_loss_triton,
    fake=distill_loss_fake,
)


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            loss, grad = RAW(*inputs)
        ctx.dtype = inputs[0].dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(grad)
        ctx.save_for_backward(grad)
        return loss, grad

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, _) -> tuple:
        if grad_loss is None:
            return (None,) * 9
        (grad,) = ctx.saved_tensors
        return (grad * grad_loss[:, None]).to(ctx.dtype), *(None,) * 8


def distill_loss_autograd(*inputs) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and inputs[0].requires_grad:
        return _DistillLoss.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return RAW(*inputs)


# Not torch.library.register_autograd: its generic wrapper costs as much per step as the kernel at 256 x 308 (80 us).
table.LIBRARY.impl("distill_loss", distill_loss_autograd, "Autograd")


def check(student_logits: Tensor, teacher_probs: Tensor, scores: Tensor, offsets: Sequence[int], teacher_to_union: Tensor) -> None:
    """Raises ValueError where shapes or types do not fit together, or a teacher's tensor asks for a gradient."""
    for name, tensor in (("student_logits", student_logits), ("teacher_probs", teacher_probs), ("scores", scores)):
        if tensor.dim() != 2 or not tensor.is_floating_point() or tensor.shape[0] != student_logits.shape[0]:
            raise ValueError(f"{name} must be a float matrix with one row per text, not {tensor.dtype} {list(tensor.shape)}")
        if tensor.requires_grad and tensor is not student_logits:
            raise ValueError(f"{name} requires a gradient: the loss has one for the student only; detach the teachers")
    width, teachers = teacher_probs.shape[1], scores.shape[1]
    rising = all(a < b for a, b in pairwise(offsets))
    if len(offsets) != teachers + 1 or not teachers or offsets[0] != 0 or offsets[-1] != width or not rising:
        raise ValueError(f"offsets {list(offsets)} do not cut {width} columns into {teachers} teachers")
    if teacher_to_union.dtype != torch.int64 or teacher_to_union.shape != (width,):
        raise ValueError(f"teacher_to_union must be int64 [{width}], not {teacher_to_union.dtype} {list(teacher_to_union.shape)}")


def distill_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    scores: Tensor,
    offsets: Sequence[int],
    teacher_to_union: Tensor,
    *,
    soft: bool,
    tau: float,
    temperature: float,
    margin: bool,
) -> Tensor:
    """KL(q, softmax(student_logits / temperature)) per text, [B] in float32 (float64 for float64 logits); differentiable in them.

    student_logits: [B, C >= 1], float32, float16, bfloat16 or float64. teacher_probs: [B, S], every teacher's block a distribution
    or zero, computed in float32. scores: [B, N], high = trust. offsets: N + 1 rising ints, teacher i owns columns
    offsets[i]:offsets[i + 1]. teacher_to_union: int64 [S], the class of each column; several columns may share one.
    soft: all teachers weighted by softmax(scores / tau), else the best one alone. tau, temperature > 0; no factor T^2.
    margin: times (gap of the two best scores + 1e-6).
    Raises ValueError where shapes do not fit, a class is out of range (on the CPU) or a teacher's tensor requires a gradient.
    """
    check(student_logits, teacher_probs, scores, offsets, teacher_to_union)
    if not (tau > 0 and temperature > 0):
        raise ValueError(f"tau {tau} and temperature {temperature} must be positive")
    return RAW(student_logits, teacher_probs, scores, offsets, teacher_to_union, soft, tau, temperature, margin)[0]
