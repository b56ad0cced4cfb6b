"""On a CUDA device (bench/gpu.sh): every op against float64, masks bit-equal to the CPU's, a teacher's scores equal on both."""

import pytest
import torch

from muka_fast.ops.distill_loss import distill_loss
from muka_fast.ops.dropout_add_layer_norm import dropout_add_layer_norm
from muka_fast.ops.mc_head import mc_head
from muka_fast.ops.mc_statistics import mc_statistics
from muka_fast.ops.one_query_attention import one_query_attention
from muka_fast.ops.reference import distill_loss_ref, keep_mask_ref, mc_head_ref, mc_statistics_ref
from muka_fast.ops.repeat_dropout import repeat_dropout
from muka_fast.teachers import load_teacher
from muka_fast.trunk import StochasticTeacher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The two ends of the benchmark's registry, and odd ones.
SHAPES = [
    (16, 32, [2, 2]),
    (16, 256, [77] * 4),
    (16, 1024, [150] * 8),
    (4, 7, [10_000, 2]),
    (1, 1, [1]),
    (3, 0, [5, 3]),
    (5, 63, [1, 63, 1271]),
]


def offsets_of(counts):
    return [0, *torch.tensor(counts).cumsum(0).tolist()]


def no_worse_than_pytorch(got, eager, exact, slack):
    """At most twice the error that PyTorch itself makes on the same input against float64."""
    error, allowed = (got.double() - exact).abs(), 2 * (eager.double() - exact).abs().max() if exact.numel() else 0
    assert not got.isnan().any()
    assert bool((error <= allowed + slack).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("samples", "texts", "counts"), SHAPES)
def test_mc_statistics(samples, texts, counts, dtype):
    logits = (8 * torch.randn(samples, texts, sum(counts), device="cuda")).to(dtype)
    offsets = offsets_of(counts)
    got, exact = mc_statistics(logits, offsets), mc_statistics_ref(logits.double(), offsets)
    eager = mc_statistics_ref(logits, offsets)
    for ours, theirs, truth in zip([*got][:6], eager[:6], exact[:6], strict=True):
        no_worse_than_pytorch(ours, theirs, truth, 1e-6 * max(1.0, float(truth.max()) if truth.numel() else 1.0))
    clear = exact[7] > 1e-5
    assert torch.equal(got.selected[clear], exact[6][clear])


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_are_those_of_the_contract(dtype):
    ids = torch.randint(0, 2**32, (37,), device="cuda")
    for width, offsets in ((1271, torch.arange(37) * 1271), (768, torch.randint(0, 2**35, (37,)))):
        x = torch.ones(37, width, device="cuda", dtype=dtype)
        got = repeat_dropout(x, 5, 0.1, 2**64 - 3, 7, ids, offsets.cuda(), 11) != 0
        assert torch.equal(got.cpu(), keep_mask_ref(5, width, 0.1, 2**64 - 3, 7, ids.cpu(), offsets, 11))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("texts", "width", "classes"), [(1024, 768, 16), (256, 768, 77), (5, 130, 1), (3, 64, 10_000), (0, 8, 3)])
def test_mc_head(texts, width, classes, dtype):
    x = torch.randn(texts, width, device="cuda").to(dtype)
    weight = (torch.randn(classes, width, device="cuda") / width**0.5).to(dtype)
    bias = torch.randn(classes, device="cuda").to(dtype)
    ids = torch.arange(texts, device="cuda")
    got = mc_head(x, weight, bias, 16, 0.1, 5, 2, ids)
    # Float64 of the same masked products; on the CPU, where the reference is the definition.
    exact = mc_head_ref(x.double().cpu(), weight.double().cpu(), bias.double().cpu(), 16, 0.1, 5, 2, ids.cpu())
    slack = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]  # of the matrix product at that precision
    for ours, truth in zip(got, exact, strict=True):
        assert not ours.isnan().any()
        torch.testing.assert_close(ours.double().cpu(), truth, atol=slack * 4, rtol=slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize(
    ("texts", "counts", "classes"), [(256, [77] * 4, 308), (63, [3, 5, 1], 6), (1, [2], 2), (8, [10_000] * 2, 12_000)]
)
def test_distill_loss(texts, counts, classes, soft, dtype):
    offsets = offsets_of(counts)
    to_union = torch.randint(0, classes, (sum(counts),), device="cuda")
    probs = torch.cat([torch.randn(texts, n, device="cuda").softmax(-1) for n in counts], -1)
    scores = torch.rand(texts, len(counts), device="cuda")
    student = (5 * torch.randn(texts, classes, device="cuda")).to(dtype).requires_grad_()
    loss = distill_loss(student, probs, scores, offsets, to_union, soft=soft, tau=0.2, temperature=1.0, margin=True)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    exact_student = student.detach().double().requires_grad_()
    exact = distill_loss_ref(exact_student, probs.double(), scores.double(), offsets, to_union, soft, 0.2, 1.0, True)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), exact_student)
    eager = distill_loss_ref(student.detach(), probs, scores, offsets, to_union, soft, 0.2, 1.0, True)
    no_worse_than_pytorch(loss.detach(), eager, exact.detach(), 1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, atol=1e-6 if dtype == torch.float32 else 4e-3, rtol=1e-2)


def test_tail_ops_equal_the_cpu():
    torch.manual_seed(0)
    x, residual = torch.randn(5, 6, 384), torch.randn(6, 384)
    weight, bias, ids = torch.randn(384), torch.randn(384), torch.arange(6)
    norm = (x, residual, weight, bias)
    want = dropout_add_layer_norm(*norm, 1e-12, 0.1, 9, 4, ids, ids * 384, 0, True)
    got = dropout_add_layer_norm(*(t.cuda() for t in norm), 1e-12, 0.1, 9, 4, ids.cuda(), (ids * 384).cuda(), 0, True)
    torch.testing.assert_close(got.cpu(), want, atol=2e-5, rtol=1e-5)
    starts = torch.tensor([0, 3, 70, 71])
    query, key, value = torch.randn(3, 384), torch.randn(71, 384), torch.randn(71, 384)
    attention = (query, key, value, starts)
    want = one_query_attention(*attention, 12, 0.2, 4, 0.1, 9, 4, ids[:3], ids[:3], None, 0, True)
    got = one_query_attention(*(t.cuda() for t in attention), 12, 0.2, 4, 0.1, 9, 4, ids[:3].cuda(), ids[:3].cuda(), None, 0, True)
    torch.testing.assert_close(got.cpu(), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("scope", ["last:1", "head", "all"])
def test_scores_of_a_teacher_are_the_cpus(scope, make_teacher):
    scores = {}
    for device in ("cpu", "cuda"):
        teacher = load_teacher(make_teacher("bert"), run_seed=0, device=device)
        ids = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]], device=device)
        mask = (ids != 0).long()
        scores[device] = StochasticTeacher(teacher, mc_scope=scope, mc_samples=8).score(ids, mask, torch.tensor([3, 2**32 - 1]))
    for name, value in vars(scores["cpu"]).items():
        torch.testing.assert_close(getattr(scores["cuda"], name).cpu(), value, atol=1e-4, rtol=1e-4)
