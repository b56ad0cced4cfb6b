"""distill_loss against the float64 definition: loss and gradient, overlapping classes, extreme logits, NaN, registration."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muka_fast.ops import reference, table
from muka_fast.ops.distill_loss import RAW, distill_loss
from muka_fast.ops.table import BACKEND

INF = math.inf
relaxed = settings(
    max_examples=10 if BACKEND == "triton" else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def case(texts, classes_per_teacher, num_classes, seed=0, scale=3.0, dtype=torch.float32, overlap=False):
    """student logits, teacher probabilities, scores, offsets and the map of a random problem."""
    generator = torch.Generator().manual_seed(seed)
    offsets = [0, *itertools.accumulate(classes_per_teacher)]
    student = (torch.randn(texts, num_classes, generator=generator) * scale).to(dtype)
    blocks = [torch.softmax(torch.randn(texts, n, generator=generator) * scale, -1) for n in classes_per_teacher]
    scores = torch.rand(texts, len(classes_per_teacher), generator=generator)
    mapping = torch.arange(offsets[-1]) % num_classes
    if overlap:
        mapping = torch.randint(num_classes, (offsets[-1],), generator=generator)
    return student, torch.cat(blocks, -1), scores, offsets, mapping


def definition(problem, options, dtype):
    student, probs, scores, offsets, mapping = problem
    leaf = student.detach().to(dtype).requires_grad_()
    loss = reference.distill_loss_ref(leaf, probs.to(dtype), scores.to(dtype), offsets, mapping, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def ours(problem, options):
    student, *rest = problem
    leaf = student.detach().clone().requires_grad_()
    loss = distill_loss(leaf, *rest, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def compare(problem, options, check):
    loss, grad = ours(problem, options)
    eager_loss, eager_grad = definition(problem, options, torch.float32)
    exact_loss, exact_grad = definition(problem, options, torch.float64)
    # The loss is a difference of terms as large as ln C or the spread of the logits.
    finite = problem[0][problem[0].isfinite()].double()
    spread = (finite.max() - finite.min()).item() / options["temperature"] + 5.0 if finite.numel() else 1.0
    check(loss, eager_loss, exact_loss, scale=spread, name="loss")
    eager_grad = eager_grad.to(problem[0].dtype)
    floor = 4e-7 + torch.finfo(problem[0].dtype).eps
    check(grad.float(), eager_grad, exact_grad, floor=floor, scale=1 / options["temperature"], name="gradient")
    return loss, grad


def options_of(soft=True, tau=0.2, temperature=1.0, margin=True):
    return {"soft": soft, "tau": tau, "temperature": temperature, "margin": margin}


@relaxed
@given(
    texts=st.integers(1, 20),
    classes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    num_classes=st.integers(1, 90),
    overlap=st.booleans(),
    soft=st.booleans(),
    tau=st.sampled_from([0.05, 0.2, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    margin=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_matches_the_definition(
    texts, classes, num_classes, overlap, soft, tau, temperature, margin, dtype, seed, isa, assert_as_exact_as
):
    problem = case(texts, classes, num_classes, seed, dtype=dtype, overlap=overlap)
    compare(problem, options_of(soft, tau, temperature, margin), assert_as_exact_as)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize(
    ("texts", "classes", "num_classes"),
    [(1, [1], 1), (63, [1, 2], 3), (2, [1271, 63], 1334), (1, [2] * 17, 34), (2, [10_000, 2], 10_002), (1, [12_000], 12_001)],
)
def test_odd_shapes(texts, classes, num_classes, soft, isa, assert_as_exact_as):
    compare(case(texts, classes, num_classes), options_of(soft), assert_as_exact_as)


def test_no_texts(isa):
    loss, grad = ours(case(0, [2, 3], 5), options_of())
    assert loss.shape == (0,) and grad.shape == (0, 5)


@pytest.mark.parametrize("soft", [True, False])
def test_extreme_student_logits(soft, isa, assert_as_exact_as):
    student, probs, scores, offsets, mapping = case(5, [20, 13], 33)
    student[0] = torch.tensor([1e4, -1e4, 0.0]).repeat(11)
    student[1], student[2] = 1e4, -1e4
    student[3, :32] = -INF  # impossible for the student where q is not: an infinite loss with a finite gradient
    probs[4, :20] = 0.0
    probs[4, 7] = 1.0  # zeros in q
    student[4, 8] = -INF  # harmless in hard mode, where q is 0 too
    scores[4] = torch.tensor([0.9, 0.1])
    loss, grad = compare((student, probs, scores, offsets, mapping), options_of(soft), assert_as_exact_as)
    assert not loss.isnan().any() and grad.isfinite().all()
    assert loss[[0, 1, 2, 4]].isfinite().all() and loss[3] == INF


def test_the_first_thousands_of_classes_impossible(isa, assert_as_exact_as):
    student, probs, scores, offsets, mapping = case(2, [2, 3], 12_000)  # more than a row in registers
    student[:, :11_990] = -INF
    compare((student, probs, scores, offsets, mapping + 11_993), options_of(), assert_as_exact_as)


def test_target_and_student_equal_gives_no_loss(isa):
    student, _, scores, offsets, mapping = case(6, [40], 40)
    loss, grad = ours((student, torch.softmax(student, -1), scores, offsets, mapping), options_of(margin=False))
    assert loss.abs().max() < 2e-6 and grad.abs().max() < 2e-7


@pytest.mark.parametrize("where", ["student", "probs", "scores"])
def test_nan_stays_nan(where, isa):
    student, probs, scores, offsets, mapping = case(3, [20, 13], 33)
    {"student": student, "probs": probs, "scores": scores}[where][1, 0] = math.nan
    loss, grad = ours((student, probs, scores, offsets, mapping), options_of())
    assert loss.isnan().tolist() == [False, True, False]
    assert grad[1].isnan().any() and not grad[[0, 2]].isnan().any()


def test_a_nan_score_is_never_selected(isa, assert_as_exact_as):
    student, probs, scores, offsets, mapping = case(4, [5, 6, 7], 18)
    scores[:, 0] = math.nan
    compare((student, probs, scores, offsets, mapping), options_of(soft=False, margin=False), assert_as_exact_as)


def test_ties_go_to_the_lowest_teacher(isa, assert_as_exact_as):
    student, probs, scores, offsets, mapping = case(4, [5, 6, 7], 18)
    scores[:] = 0.5
    compare((student, probs, scores, offsets, mapping), options_of(soft=False, margin=False), assert_as_exact_as)
    assert torch.allclose(ours((student, probs, scores, offsets, mapping), options_of(soft=False))[0], torch.zeros(4), atol=1e-4)


def test_strides_do_not_matter(isa):
    student, probs, scores, offsets, mapping = case(8, [20, 13], 33)
    plain = ours((student, probs, scores, offsets, mapping), options_of())
    wide = torch.randn(16, 80)
    wide[::2, 3:36] = student
    apart = torch.randn(8, 66)
    apart[:, ::2] = probs
    for problem in (
        (wide[::2, 3:36], apart[:, ::2], scores, offsets, mapping),
        (student.t().contiguous().t(), probs, scores.t().contiguous().t(), offsets, mapping.repeat_interleave(2)[::2]),
    ):
        for a, b in zip(ours(problem, options_of()), plain, strict=True):
            assert torch.equal(a, b)


def test_threads_do_not_matter(isa):
    problem = case(900, [300, 300], 600)
    one = ours(problem, options_of())
    torch.set_num_threads(3)
    try:
        three = ours(problem, options_of())
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_upstream_gradient_is_applied_per_text():
    dtype = torch.float16 if BACKEND == "triton" else torch.bfloat16  # Triton's interpreter truncates to bfloat16
    student, *rest = case(4, [5, 6], 11, dtype=dtype)
    leaf = student.clone().requires_grad_()
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.5])
    (distill_loss(leaf, *rest, **options_of()) * upstream).sum().backward()
    assert leaf.grad.dtype == dtype
    expected = RAW(student, *rest, *options_of().values())[1] * upstream[:, None]
    assert torch.equal(leaf.grad, expected.to(dtype))


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("margin", [True, False])
def test_gradcheck_of_the_definition_and_of_the_op(soft, margin):
    student, probs, scores, offsets, mapping = case(3, [4, 3], 6, overlap=True)
    student, rest = student.double().requires_grad_(), (probs.double(), scores.double(), offsets, mapping)
    options = options_of(soft, temperature=2.0, margin=margin)
    for function in (reference.distill_loss_ref, distill_loss):
        assert torch.autograd.gradcheck(lambda z, f=function: f(z, *rest, **options), student)


def test_a_gradient_of_the_gradient_is_refused_instead_of_wrong():
    student, *rest = case(3, [4, 3], 7)
    student.requires_grad_()
    loss = (distill_loss(student, *rest, **options_of()) * student.sum(-1)).sum()
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_a_map_made_in_inference_mode_is_read_each_time():
    student, probs, scores, offsets, mapping = case(3, [4, 3], 7)
    with torch.inference_mode():
        made = mapping.clone()
    for turned in (made, made.flip(0).clone()):
        got = distill_loss(student, probs, scores, offsets, turned, **options_of())
        torch.testing.assert_close(got, distill_loss(student, probs, scores, offsets, turned.clone(), **options_of()))
        with torch.inference_mode():
            made.copy_(mapping.flip(0))


def test_what_does_not_fit_is_refused():
    student, probs, scores, offsets, mapping = case(3, [4, 3], 7)
    good = {"student": student, "probs": probs, "scores": scores, "offsets": offsets, "mapping": mapping}
    bad = [
        ("probs", probs.clone().requires_grad_(), "requires a gradient"),
        ("scores", scores.clone().requires_grad_(), "requires a gradient"),
        ("probs", probs[:2], "one row per text"),
        ("scores", scores[:, :1], "offsets"),
        ("offsets", [0, 4, 4, 7], "offsets"),
        ("offsets", [0, 5, 6], "offsets"),
        ("mapping", mapping[:-1], "teacher_to_union"),
        ("mapping", mapping.int(), "teacher_to_union"),
        ("mapping", mapping + 1, "outside the student's classes"),
        ("mapping", mapping - 1, "outside the student's classes"),
    ]
    for name, value, message in bad:
        with pytest.raises(ValueError, match=message):
            distill_loss(*{**good, name: value}.values(), **options_of())
    for option in ({"tau": 0.0}, {"temperature": -1.0}, {"temperature": math.nan}):
        with pytest.raises(ValueError, match="must be positive"):
            distill_loss(*good.values(), **{**options_of(), **option})


def test_opcheck():
    student, *rest = case(3, [4, 3], 7)
    torch.library.opcheck(RAW, (student, *rest, True, 0.2, 1.0, True))
    torch.library.opcheck(RAW, (student.requires_grad_(), *rest, False, 0.2, 2.0, False))


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    student, *rest = case(3, [4, 3], 7)

    def step(logits):
        return distill_loss(logits, *rest, **options_of()).mean()

    leaf, again = student.clone().requires_grad_(), student.clone().requires_grad_()
    step(leaf).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(again).backward()
    assert torch.equal(leaf.grad, again.grad)


def test_triton_in_its_interpreter(interpreter):
    interpreter(__file__, "odd_shapes or no_texts or extreme or nan or ties or thousands or inference_mode")


@pytest.mark.slow
def test_triton_in_its_interpreter_with_all_inputs(interpreter):
    interpreter(__file__, "definition or equal_gives or strides or upstream or gradcheck or refused")


def test_the_gather_plan_follows_its_mapping():
    pytest.importorskip("triton")
    from muka_fast.ops.distill_loss import gather_plan

    mapping = torch.tensor([2, 0, 1, 0])
    source, owner, in_order = gather_plan(mapping, (0, 2, 4), 3)
    assert source.tolist() == [[1, 2, 0], [3, -1, -1]] and owner.tolist() == [[0, 1, 0], [1, 0, 0]] and not in_order
    mapping[:] = torch.tensor([0, 1, 2, 0])
    assert gather_plan(mapping, (0, 2, 4), 3)[0].tolist() == [[0, 1, 2], [3, -1, -1]]


def test_a_tensor_that_begins_off_16_bytes_is_copied_for_kernels_compiled_for_others():
    whole = torch.arange(40.0)
    assert table.aligned(whole) is whole and table.dense(whole[::2]).is_contiguous()
    moved = table.aligned(whole[1:])
    assert moved.data_ptr() % 16 == 0 and torch.equal(moved, whole[1:])
