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
from torch.utils.weak import WeakTensorKeyDictionary

from muka_fast.ops import table, tuning
from muka_fast.ops.aot import Specialisation
from muka_fast.ops.philox import triton
from muka_fast.ops.reference import distill_loss_ref, distill_target_ref, select_teacher_ref
from muka_fast.ops.scale_rows import scale_rows

SCHEMA = (
    "(Tensor student_logits, Tensor teacher_probs, Tensor scores, int[] offsets, Tensor teacher_to_union, bool soft, float tau, "
    "float temperature, bool margin) -> (Tensor, Tensor)"
)


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
    logits, probs = row_major(student_logits), row_major(teacher_probs.float())
    scores, mapping = scores.float().contiguous(), teacher_to_union.contiguous()
    loss, grad = empty_outputs(logits)
    table._C.distill_loss(
        logits.data_ptr(), table.DTYPE_CODES[logits.dtype], *logits.shape, logits.stride(0), probs.data_ptr(), probs.stride(0),
        scores.data_ptr(), offsets, mapping.data_ptr(), soft, tau, temperature, margin, loss.data_ptr(), grad.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return loss, grad


distill_loss_triton: Callable | None = None
SPECIALISATIONS: list[Specialisation] = []
if triton is not None:
    import triton.language as tl

    from muka_fast.ops.fast_math import FUSED, LN_2, LOG2_E, TINY, log2

    @triton.jit
    def choose_weights(p_scores, N, inverse_tau, BLOCK_N: tl.constexpr):
        """Of one text: w of every teacher (soft), the selected teacher (hard), the teacher margin."""
        o_n = tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_s = tl.load(p_scores + o_n, mask=m_n, other=float("-inf"))
        b_nan = tl.max(tl.where(m_n & (b_s != b_s), 1, 0), 0)
        b_clean = tl.where(b_s != b_s, float("-inf"), b_s)
        b_best = tl.max(b_clean, 0)
        b_selected = tl.min(tl.where(m_n & (b_clean == b_best), o_n, BLOCK_N), 0)
        b_second = tl.max(tl.where(o_n == b_selected, float("-inf"), b_clean), 0)
        b_margin = tl.where(b_nan > 0, float("nan"), tl.where(N == 1, 1.0, b_best - b_second))
        b_e = tl.where(m_n, tl.exp(b_s * inverse_tau - b_best * inverse_tau), 0.0)  # NaN where a score is
        return b_e / tl.sum(b_e, 0), b_selected, b_margin

    @triton.jit
    def load_column(teachers, i_m, o_c, C, SOFT: tl.constexpr, IN_ORDER: tl.constexpr):
        """Of one column of every class o_c: its teacher and its probability (hard: 0 where the teacher is not the selected one)."""
        p_probs, p_source, p_owner, b_selected = teachers
        m_c = o_c < C
        b_owner = tl.load(p_owner + i_m * C + o_c, mask=m_c, other=0)
        if not IN_ORDER:
            o_c = tl.load(p_source + i_m * C + o_c, mask=m_c, other=-1)
            m_c = o_c >= 0
        return b_owner, tl.load(p_probs + o_c, mask=m_c if SOFT else m_c & (b_owner == b_selected), other=0.0).to(tl.float32)

    @triton.jit
    def compose(teachers, b_w, column, o_c, C, M, SOFT: tl.constexpr, IN_ORDER: tl.constexpr):
        """q of the classes o_c from their first column and the others: nothing is scattered, and the order of sums is fixed."""
        b_owner, b_p = column
        b_q = tl.gather(b_w, b_owner, 0) * b_p if SOFT else b_p
        for i_m in range(1, M):
            b_owner, b_p = load_column(teachers, i_m, o_c, C, SOFT, IN_ORDER)
            b_q += tl.gather(b_w, b_owner, 0) * b_p if SOFT else b_p
        return b_q

    @triton.jit
    def load_logits(p_z, o_c, C, inverse_temperature):
        return tl.load(p_z + o_c, mask=o_c < C, other=float("-inf")).to(tl.float32) * inverse_temperature

    @triton.jit
    def divergence(b_q, b_d):
        """q ln q - q d. Where q is 0 the student's log-probability must not enter, be it -inf."""
        return tl.where(b_q == 0, 0.0, b_q * (log2(tl.maximum(b_q, TINY)) * LN_2 - b_d))

    @triton.jit
    def short_row(
        p_z, p_grad, teachers, b_w, C, M, inverse_temperature, b_step,
        SOFT: tl.constexpr, IN_ORDER: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Writes the gradient and returns loss / f of a row that stays in registers, TILES blocks of it."""
        b_max = tl.full([BLOCK], float("-inf"), tl.float32)
        b_z, columns, b_e, b_q = (), (), (), ()
        for t in tl.static_range(TILES):  # all loads are under way before the first gather, which is a barrier
            o_c = t * BLOCK + tl.arange(0, BLOCK)
            b_z += (load_logits(p_z, o_c, C, inverse_temperature),)
            columns += (load_column(teachers, 0, o_c, C, SOFT, IN_ORDER),)
            b_max = tl.maximum(b_max, b_z[t])
        b_max = tl.max(b_max, 0)
        b_sum, b_mass, b_cross = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for t in tl.static_range(TILES):
            b_d = b_z[t] - b_max
            b_e += (tl.exp2(b_d * LOG2_E),)
            b_q += (compose(teachers, b_w, columns[t], t * BLOCK + tl.arange(0, BLOCK), C, M, SOFT, IN_ORDER),)
            b_sum += b_e[t]
            b_mass += b_q[t]
            b_cross += divergence(b_q[t], b_d)
        b_sum, b_mass = tl.sum(b_sum, 0), tl.sum(b_mass, 0)
        for t in tl.static_range(TILES):
            o_c = t * BLOCK + tl.arange(0, BLOCK)
            tl.store(p_grad + o_c, (b_mass / b_sum * b_e[t] - b_q[t]) * b_step, mask=o_c < C)
        return tl.sum(b_cross, 0) + b_mass * log2(b_sum) * LN_2

    @triton.jit
    def long_row(
        p_z, p_grad, teachers, b_w, C, M, inverse_temperature, b_step,
        SOFT: tl.constexpr, IN_ORDER: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The same of a row that registers do not hold: read three times, twice from the cache."""
        b_max = tl.full([BLOCK], float("-inf"), tl.float32)
        for i_c in range(0, C, BLOCK):
            b_max = tl.maximum(b_max, load_logits(p_z, i_c + tl.arange(0, BLOCK), C, inverse_temperature))
        b_max = tl.max(b_max, 0)
        b_sum, b_mass, b_cross = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for i_c in range(0, C, BLOCK):
            o_c = i_c + tl.arange(0, BLOCK)
            b_d = load_logits(p_z, o_c, C, inverse_temperature) - b_max
            b_q = compose(teachers, b_w, load_column(teachers, 0, o_c, C, SOFT, IN_ORDER), o_c, C, M, SOFT, IN_ORDER)
            b_sum += tl.exp2(b_d * LOG2_E)
            b_mass += b_q
            b_cross += divergence(b_q, b_d)
        b_sum, b_mass = tl.sum(b_sum, 0), tl.sum(b_mass, 0)
        for i_c in range(0, C, BLOCK):
            o_c = i_c + tl.arange(0, BLOCK)
            b_e = tl.exp2((load_logits(p_z, o_c, C, inverse_temperature) - b_max) * LOG2_E)
            b_q = compose(teachers, b_w, load_column(teachers, 0, o_c, C, SOFT, IN_ORDER), o_c, C, M, SOFT, IN_ORDER)
            tl.store(p_grad + o_c, (b_mass / b_sum * b_e - b_q) * b_step, mask=o_c < C)
        return tl.sum(b_cross, 0) + b_mass * log2(b_sum) * LN_2

    @triton.jit(do_not_specialize=["N"])  # M = 1 is compiled for itself, without a loop
    def distill_loss_kernel(
        p_z,  # [B, C], rows z_stride apart
        p_probs,  # [B, S], rows probs_stride apart
        p_scores,  # [B, N]
        p_source,  # int32 [M, C]: the columns of teacher_probs that land on each class, -1 where there are no more
        p_owner,  # int32 [M, C]: the teachers of these columns
        p_loss,  # [B]
        p_grad,  # [B, C]
        C, N, M, z_stride, probs_stride, inverse_tau, inverse_temperature,
        SOFT: tl.constexpr, MARGIN: tl.constexpr, IN_ORDER: tl.constexpr,  # IN_ORDER: class c has column c and no other
        TILES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """One text per program."""
        i_b = tl.program_id(0).to(tl.int64)
        p_z += i_b * z_stride
        p_grad += i_b * C
        b_w, b_selected, b_margin = choose_weights(p_scores + i_b * N, N, inverse_tau, BLOCK_N)
        b_factor = (b_margin + 1e-6) if MARGIN else 1.0
        b_step = b_factor * inverse_temperature
        teachers = (p_probs + i_b * probs_stride, p_source, p_owner, b_selected)
        if TILES:
            b_loss = short_row(p_z, p_grad, teachers, b_w, C, M, inverse_temperature, b_step, SOFT, IN_ORDER, TILES, BLOCK)
        else:
            b_loss = long_row(p_z, p_grad, teachers, b_w, C, M, inverse_temperature, b_step, SOFT, IN_ORDER, BLOCK)
        tl.store(p_loss + i_b, b_loss * b_factor)

    _plans = WeakTensorKeyDictionary()

    def gather_plan(teacher_to_union: Tensor, offsets: tuple[int, ...], classes: int) -> tuple[Tensor, Tensor, bool]:
        """The map turned round: columns of each class and their teachers, int32 [M, C] on the map's device, and IN_ORDER.

        Kept for as long as the map lives and is not written to: it is the same in every step of a run.
        """
        kept = not teacher_to_union.is_inference()  # of those nothing tells whether they were written to
        key = (offsets, classes, teacher_to_union._version if kept else None)
        plan = _plans.get(teacher_to_union) if kept else None
        if plan is None or plan[0] != key:
            mapping, device = teacher_to_union.cpu(), teacher_to_union.device
            check_classes(mapping, classes)
            order = mapping.argsort(stable=True)
            counts = torch.bincount(mapping, minlength=classes)
            place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[mapping[order]]  # how many columns of its class come before
            teachers = torch.repeat_interleave(torch.arange(len(offsets) - 1, dtype=torch.int32), torch.tensor(offsets).diff())
            source = torch.full((int(counts.max()), classes), -1, dtype=torch.int32)
            owner = torch.zeros_like(source)
            source[place, mapping[order]] = order.to(torch.int32)
            owner[place, mapping[order]] = teachers[order]
            plan = (key, source.to(device), owner.to(device), torch.equal(mapping, torch.arange(classes)))
            if kept:
                _plans[teacher_to_union] = plan
        return plan[1:]

    def row_class(classes: int) -> str:
        """Of tuning.py."""
        return next((size for size in ("512", "1280", "2048", "10240") if classes <= int(size)), "wider")

    def row_tiles(classes: int, warps: int) -> dict[str, int]:
        """TILES and BLOCK: four classes a lane and tile are 16 bytes of float32; up to 40 a lane stay in registers."""
        tiles = triton.cdiv(classes, 128 * warps)
        return {"TILES": tiles if tiles <= 10 else 0, "BLOCK": 128 * warps}

    def distill_loss_triton(
        student_logits: Tensor, teacher_probs: Tensor, scores: Tensor, offsets: list[int], teacher_to_union: Tensor,
        soft: bool, tau: float, temperature: float, margin: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        logits, probs = (table.aligned(row_major(t)) for t in (student_logits, teacher_probs))
        scores = table.dense(scores.float())
        loss, grad = empty_outputs(logits)
        (texts, classes), teachers = logits.shape, scores.shape[1]
        source, owner, in_order = gather_plan(teacher_to_union, tuple(offsets), classes)
        if texts == 0:
            return loss, grad
        (warps,) = tuning.choose("distill_loss", row_class(classes), logits.device)
        with table.on_device_of(logits):
            distill_loss_kernel[(texts,)](
                logits, probs, scores, source, owner, loss, grad, classes, teachers, len(source), logits.stride(0), probs.stride(0),
                1.0 / tau, 1.0 / temperature, SOFT=soft, MARGIN=margin, IN_ORDER=in_order,
                BLOCK_N=triton.next_power_of_2(teachers), **row_tiles(classes, warps), num_warps=warps, **FUSED,
            )  # fmt: skip
        return loss, grad

    _TYPES = dict.fromkeys(("p_probs", "p_scores", "p_loss", "p_grad"), "*fp32") | {"p_source": "*i32", "p_owner": "*i32"}
    _TYPES |= dict.fromkeys(("C", "N", "M"), "i32") | dict.fromkeys(("z_stride", "probs_stride"), "i64")
    _TYPES |= dict.fromkeys(("inverse_tau", "inverse_temperature"), "fp32")
    SPECIALISATIONS = [
        Specialisation(
            f"distill_loss {dtype} {'soft' if soft else 'hard'} C={classes} N={teachers} {columns} {warps} warps"
            f"{'' if multiples else ' any C'}",
            distill_loss_kernel,
            {"p_z": f"*{dtype}", **_TYPES},
            {"SOFT": soft, "MARGIN": soft, "IN_ORDER": columns == "in order", "BLOCK_N": triton.next_power_of_2(teachers)}
            | row_tiles(classes, warps) | ({} if columns == "shared" else {"M": 1}),
            fast=dtype == "fp32" and soft and columns == "shared" and classes in (308, 20_000),
            num_warps=warps, aligned=True, multiples=multiples, tuned=(row_class(classes), (warps,)),
        )
        for dtype in ("fp32", "fp16", "bf16")
        for soft, columns in ((True, "in order"), (True, "mapped"), (True, "shared"), (False, "shared"))
        for classes, teachers in ((4, 2), (308, 4), (1200, 8), (2048, 8), (4000, 2), (10_000, 2), (20_000, 2))
        for (warps,) in tuning.CANDIDATES["distill_loss"][row_class(classes)]
        for multiples in ((), ("C", "z_stride", "probs_stride"))
    ]

RAW = table.register(
    "distill_loss",
    SCHEMA,
    reference=distill_loss_reference,
    cpu=None if table._C is None else distill_loss_cpu,
    triton=distill_loss_triton,
    fake=lambda student_logits, *_: empty_outputs(student_logits),
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
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        # In place where no further backward can ask for it: no second [B, C], and autograd keeps this one as the leaf's gradient.
        alone = ctx.ours and not graph_is_kept()
        if alone and type(grad) is Tensor and table.TABLE["distill_loss"].get(grad.device.type) == "triton":  # no tracer's fake
            return scale_rows(grad, grad_loss, ctx.dtype), None, None, None
        # From a sum every text's factor is the same, stored once: a product with a scalar takes half the time.
        same = grad_loss.stride(0) == 0 and grad_loss.shape[0] > 0
        factor = grad_loss[0] if same else grad_loss[:, None]
        return (grad.mul_(factor) if alone else grad * factor).to(ctx.dtype), None, None, None


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
