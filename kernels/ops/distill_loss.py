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

import contextlib
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from muka_fast.ops import table
from muka_fast.ops.aot import Specialisation
from muka_fast.ops.philox import triton
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
    check_classes(teacher_to_union, student_logits.shape[1])
    # The gradient in closed form: autograd is off below the dispatcher. The tests hold it against autograd of distill_loss_ref.
    loss = distill_loss_ref(student_logits, teacher_probs, scores, offsets, teacher_to_union, soft, tau, temperature, margin)
    probs, scores = teacher_probs.to(loss.dtype), scores.to(loss.dtype)
    q = distill_target_ref(probs, scores, offsets, teacher_to_union, student_logits.shape[1], soft, tau)
    p = torch.softmax(student_logits.to(loss.dtype) / temperature, dim=-1)
    factor = select_teacher_ref(scores)[1][:, None] + 1e-6 if margin else 1.0
    return loss, (q.sum(-1, keepdim=True) * p - q) * factor / temperature


def check_classes(teacher_to_union: Tensor, classes: int) -> None:
    if len(teacher_to_union) and not 0 <= int(teacher_to_union.min()) <= int(teacher_to_union.max()) < classes:
        raise ValueError("teacher_to_union has an entry outside the student's classes")


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
SPECIALISATIONS: list[Specialisation] = []
if triton is not None:
    import triton.language as tl

    @triton.jit
    def choose_weights(p_scores, N, inverse_tau, SOFT: tl.constexpr, BLOCK_N: tl.constexpr):
        """Of one text: the largest score / tau and the sum of the exponentials (soft), the selected teacher, the teacher margin."""
        o_n = tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_s = tl.load(p_scores + o_n, mask=m_n, other=float("-inf"))
        b_nan = tl.max(tl.where(m_n & (b_s != b_s), 1, 0), 0)
        b_clean = tl.where(b_s != b_s, float("-inf"), b_s)
        b_best = tl.max(b_clean, 0)
        b_selected = tl.min(tl.where(m_n & (b_clean == b_best), o_n, BLOCK_N), 0)
        b_second = tl.max(tl.where(o_n == b_selected, float("-inf"), b_clean), 0)
        b_margin = tl.where(b_nan > 0, float("nan"), tl.where(N == 1, 1.0, b_best - b_second))
        b_top = b_best * inverse_tau
        b_sum = 1.0
        if SOFT:
            b_sum = tl.sum(tl.where(m_n, tl.exp(b_s * inverse_tau - b_top), 0.0), 0)  # NaN where a score is
        return b_top, b_sum, b_selected, b_margin

    @triton.jit
    def gather_target(
        p_probs, p_scores, p_source, p_owner, o_c, m_c, b_top, b_sum, b_selected, inverse_tau, C, M, SOFT: tl.constexpr
    ):  # fmt: skip
        """q of the classes o_c: every class reads its own columns, so that nothing is scattered and the order of sums is fixed."""
        b_q = tl.zeros(o_c.shape, tl.float32)
        for i_m in range(0, M):
            b_source = tl.load(p_source + i_m * C + o_c, mask=m_c, other=-1)
            b_owner = tl.load(p_owner + b_source, mask=b_source >= 0, other=0)
            if SOFT:
                b_p = tl.load(p_probs + b_source, mask=b_source >= 0, other=0.0).to(tl.float32)
                b_s = tl.load(p_scores + b_owner, mask=b_source >= 0, other=float("-inf"))
                b_q += tl.where(b_source >= 0, tl.exp(b_s * inverse_tau - b_top) / b_sum * b_p, 0.0)
            else:
                b_q += tl.load(p_probs + b_source, mask=(b_source >= 0) & (b_owner == b_selected), other=0.0).to(tl.float32)
        return b_q

    @triton.jit(do_not_specialize=["N", "M"])
    def distill_loss_kernel(
        p_z,  # [B, C], rows z_stride apart
        p_probs,  # [B, S], rows probs_stride apart
        p_scores,  # [B, N]
        p_source,  # int32 [M, C]: the columns of teacher_probs that land on each class, -1 where there are no more
        p_owner,  # int32 [S]: the teacher of each column
        p_loss,  # [B]
        p_grad,  # [B, C]
        C, N, M, z_stride, probs_stride, inverse_tau, inverse_temperature,
        SOFT: tl.constexpr, MARGIN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKED: tl.constexpr,
    ):  # fmt: skip
        """One text per program. Up to BLOCK classes stay in registers; more (CHUNKED) are read a second time, from the cache, for
        the gradient."""
        i_b = tl.program_id(0).to(tl.int64)
        p_z += i_b * z_stride
        p_probs += i_b * probs_stride
        p_scores += i_b * N
        p_grad += i_b * C
        b_top, b_weights, b_selected, b_margin = choose_weights(p_scores, N, inverse_tau, SOFT, BLOCK_N)
        o_c = tl.arange(0, BLOCK)
        m_c = o_c < C
        b_z = tl.load(p_z + o_c, mask=m_c, other=float("-inf")).to(tl.float32) * inverse_temperature
        b_q = gather_target(p_probs, p_scores, p_source, p_owner, o_c, m_c, b_top, b_weights, b_selected, inverse_tau, C, M, SOFT)
        b_max = tl.max(b_z, 0)
        b_d = b_z - b_max
        if CHUNKED:  # a first chunk of nothing but -inf says nothing yet
            b_d = tl.where(b_z == float("-inf"), float("-inf"), b_d)
        b_e = tl.exp(b_d)
        b_sum, b_mass = tl.sum(b_e, 0), tl.sum(b_q, 0)
        # Where q is 0 the student's log-probability must not enter, be it -inf.
        b_cross = tl.sum(tl.where(b_q == 0, 0.0, b_q * (tl.log(b_q) - b_d)), 0)
        if CHUNKED:
            for i_c in range(BLOCK, C, BLOCK):
                o_c = i_c + tl.arange(0, BLOCK)
                m_c = o_c < C
                b_z = tl.load(p_z + o_c, mask=m_c, other=float("-inf")).to(tl.float32) * inverse_temperature
                b_q = gather_target(
                    p_probs, p_scores, p_source, p_owner, o_c, m_c, b_top, b_weights, b_selected, inverse_tau, C, M, SOFT
                )
                b_new = tl.maximum(b_max, tl.max(b_z, 0))
                # Before the first finite logit both are -inf, and nothing has been added that would need rescaling.
                b_shift = tl.where(b_new == b_max, 0.0, b_new - b_max)
                b_d = tl.where(b_z == float("-inf"), float("-inf"), b_z - b_new)
                b_sum = b_sum * tl.exp(-b_shift) + tl.sum(tl.exp(b_d), 0)
                b_cross += tl.where(b_mass == 0, 0.0, b_mass * b_shift)
                b_cross += tl.sum(tl.where(b_q == 0, 0.0, b_q * (tl.log(b_q) - b_d)), 0)
                b_mass += tl.sum(b_q, 0)
                b_max = b_new
        b_factor = (b_margin + 1e-6) if MARGIN else 1.0
        tl.store(p_loss + i_b, (b_cross + b_mass * tl.log(b_sum)) * b_factor)
        b_step = b_factor * inverse_temperature
        if CHUNKED:
            for i_c in range(0, C, BLOCK):
                o_c = i_c + tl.arange(0, BLOCK)
                m_c = o_c < C
                b_z = tl.load(p_z + o_c, mask=m_c, other=float("-inf")).to(tl.float32) * inverse_temperature
                b_q = gather_target(
                    p_probs, p_scores, p_source, p_owner, o_c, m_c, b_top, b_weights, b_selected, inverse_tau, C, M, SOFT
                )
                tl.store(p_grad + o_c, (b_mass / b_sum * tl.exp(b_z - b_max) - b_q) * b_step, mask=m_c)
        else:
            tl.store(p_grad + o_c, (b_mass / b_sum * b_e - b_q) * b_step, mask=m_c)

    _plans = WeakTensorKeyDictionary()

    def gather_plan(teacher_to_union: Tensor, offsets: tuple[int, ...], classes: int) -> tuple[Tensor, Tensor, int]:
        """The map turned round: columns of each class [M, C] and owner of each column, int32 on the map's device, and M.

        Kept for as long as the map lives and is not written to: it is the same in every step of a run.
        """
        key = (offsets, classes, teacher_to_union._version)
        plan = _plans.get(teacher_to_union)
        if plan is None or plan[0] != key:
            mapping, device = teacher_to_union.cpu(), teacher_to_union.device
            check_classes(mapping, classes)
            order = mapping.argsort(stable=True)
            counts = torch.bincount(mapping, minlength=classes)
            place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[mapping[order]]  # how many columns of its class come before
            depth = int(counts.max())
            source = torch.full((depth, classes), -1, dtype=torch.int32)
            source[place, mapping[order]] = order.to(torch.int32)
            owner = torch.repeat_interleave(torch.arange(len(offsets) - 1, dtype=torch.int32), torch.tensor(offsets).diff())
            plan = _plans[teacher_to_union] = (key, source.to(device), owner.to(device), depth)
        return plan[1:]

    def configuration(classes: int, teachers: int, soft: bool, margin: bool) -> tuple[dict[str, int], int]:
        """Constexprs and number of warps."""
        block = max(16, min(4096, triton.next_power_of_2(classes)))
        constexprs = {"SOFT": soft, "MARGIN": margin, "BLOCK": block, "BLOCK_N": triton.next_power_of_2(teachers)}
        warps = 8 if block == 4096 else max(1, min(4, block // 256))  # eight at 2048 spill on sm_100 in half precision
        return {**constexprs, "CHUNKED": classes > block}, warps

    def distill_loss_triton(
        student_logits: Tensor, teacher_probs: Tensor, scores: Tensor, offsets: list[int], teacher_to_union: Tensor,
        soft: bool, tau: float, temperature: float, margin: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if student_logits.dtype not in DTYPE_CODES:
            return distill_loss_reference(
                student_logits, teacher_probs, scores, offsets, teacher_to_union, soft, tau, temperature, margin
            )
        logits, probs, scores = row_major(student_logits), row_major(teacher_probs), scores.float().contiguous()
        loss, grad = empty_outputs(logits)
        texts, classes = logits.shape
        source, owner, depth = gather_plan(teacher_to_union, tuple(offsets), classes)
        constexprs, warps = configuration(classes, scores.shape[1], soft, margin)
        if texts == 0:
            return loss, grad
        # Triton launches on the current device, which need not be that of the logits.
        with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
            distill_loss_kernel[(texts,)](
                logits, probs, scores, source, owner, loss, grad, classes, scores.shape[1], depth, logits.stride(0), probs.stride(0),
                1.0 / tau, 1.0 / temperature, **constexprs, num_warps=warps,
            )  # fmt: skip
        return loss, grad

    _TYPES = dict.fromkeys(("p_probs", "p_scores", "p_loss", "p_grad"), "*fp32") | {"p_source": "*i32", "p_owner": "*i32"}
    _TYPES |= dict.fromkeys(("C", "N", "M"), "i32") | dict.fromkeys(("z_stride", "probs_stride"), "i64")
    _TYPES |= dict.fromkeys(("inverse_tau", "inverse_temperature"), "fp32")
    SPECIALISATIONS = [
        Specialisation(
            f"distill_loss {dtype} {'soft' if soft else 'hard'} C={classes} N={teachers}",
            distill_loss_kernel,
            {"p_z": f"*{dtype}", **_TYPES},
            configuration(classes, teachers, soft, soft)[0],
            num_warps=configuration(classes, teachers, soft, soft)[1],
            fast=dtype == "fp32" and classes in (308, 20_000),
        )
        for dtype in ("fp32", "fp16", "bf16")
        for soft in (True, False)
        for classes, teachers in ((4, 2), (308, 4), (1200, 8), (4000, 2), (20_000, 2))
    ]

RAW = table.register(
    "distill_loss",
    SCHEMA,
    reference=distill_loss_reference,
    cpu=None if table._C is None else distill_loss_cpu,
    triton=distill_loss_triton,
    fake=distill_loss_fake,
)


class WithGradient(torch.autograd.Function):
    """The loss with the gradient that the kernel has computed beside it. Three tensors are cheaper to carry than nine arguments."""

    @staticmethod
    def forward(ctx, student_logits: Tensor, loss: Tensor, grad: Tensor, ours: bool) -> Tensor:
        """ours: nobody else holds `grad`."""
        ctx.dtype, ctx.ours = student_logits.dtype, ours
        ctx.save_for_backward(grad)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        # From a mean or a sum every text's factor is the same, stored once: a product with a scalar takes half the time.
        same = grad_loss.stride(0) == 0 and grad_loss.shape[0] > 0
        factor = grad_loss[0] if same else grad_loss[:, None]
        # In place where no further backward can ask for it: no second [B, C], and autograd keeps this one as the leaf's gradient.
        product = grad.mul_(factor) if ctx.ours and not graph_is_kept() else grad * factor
        return product if product.dtype == ctx.dtype else product.to(ctx.dtype), None, None, None


# Whether the running backward was called with retain_graph. Private to PyTorch, so not taken for granted.
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def distill_loss_autograd(student_logits: Tensor, *others, ours: bool = False) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        loss, grad = RAW(student_logits, *others)
    if torch.is_grad_enabled() and student_logits.requires_grad:
        loss = WithGradient.apply(student_logits, loss, grad, ours)
    return loss, grad


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
    # Called here as the dispatcher would call it, which saves its way through C++ and back; a compiler must see the op itself.
    arguments = (student_logits, teacher_probs, scores, offsets, teacher_to_union, soft, tau, temperature, margin)
    return RAW(*arguments)[0] if torch.compiler.is_compiling() else distill_loss_autograd(*arguments, ours=True)[0]
