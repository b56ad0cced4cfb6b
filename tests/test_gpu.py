"""On a CUDA device (bench/gpu.sh): ops against float64, masks and scores against the CPU's, graphs, waiting, memory."""


import pytest
import torch

from muka_fast.ops import table
from muka_fast.ops.distill_loss import distill_loss
from muka_fast.ops.dropout_add_layer_norm import dropout_add_layer_norm
from muka_fast.ops.mc_head import mc_head
from muka_fast.ops.mc_statistics import mc_statistics
from muka_fast.ops.one_query_attention import one_query_attention
from muka_fast.ops.packed_attention import packed_attention
from muka_fast.ops.reference import (
    distill_loss_ref,
    keep_mask_ref,
    mc_head_ref,
    mc_statistics_ref,
    packed_attention_ref,
)
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


@pytest.mark.parametrize("op", sorted(table.TABLE))
def test_the_fused_form_runs(op):
    """Where it cannot, the reference takes its place, and every other test here would pass."""
    assert table.TABLE[op]["cuda"] == "triton"


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


@pytest.mark.parametrize("rows", [6, 8192])  # of many rows a program takes several replicas
def test_tail_ops_equal_the_cpu(rows):
    torch.manual_seed(0)
    x, residual = torch.randn(5, rows, 384), torch.randn(rows, 384)
    weight, bias, ids = torch.randn(384), torch.randn(384), torch.arange(rows)
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
        ids = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
        mask = (ids != 0).long()
        scores[device] = StochasticTeacher(teacher, mc_scope=scope, mc_samples=8).launch(ids, mask, torch.tensor([3, 2**32 - 1]))
    for name, value in vars(scores["cpu"]).items():
        torch.testing.assert_close(getattr(scores["cuda"], name).cpu(), value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scope", ["last:1", "all"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_half_precision_errs_on_the_gpu_as_on_the_cpu(family, dtype, scope, make_teacher, make_tokenizer, texts):
    inputs = make_tokenizer(family)(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=24)
    batch = inputs["input_ids"], inputs["attention_mask"], torch.arange(len(texts))
    ways = {"exact": ("cpu", torch.float32), "cpu": ("cpu", dtype), "cuda": ("cuda", dtype)}
    scores = {}
    for way, (device, weights) in ways.items():
        teacher = load_teacher(make_teacher(family), run_seed=0, device=device, dtype=weights)
        scores[way] = vars(StochasticTeacher(teacher, mc_scope=scope, mc_samples=8, mc_dropout_p=0.1).launch(*batch))
    for name, value in scores["exact"].items():
        error = {way: (scores[way][name].cpu() - value).square().mean().sqrt() for way in ("cpu", "cuda")}
        assert error["cuda"] <= 2 * error["cpu"] + torch.finfo(dtype).eps / 10, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_row", [False, True])
def test_packed_attention(one_row, dtype):
    lengths, heads, head_dim, samples = [1, 7, 64, 64, 300], 4, 64, 3
    starts = torch.tensor([0, *lengths]).cumsum(0)
    queries = len(lengths) if one_row else int(starts[-1])
    query_starts = torch.arange(len(lengths) + 1) if one_row else starts
    positions = torch.tensor([n - 1 if one_row else 0 for n in lengths])
    query = torch.randn(samples, queries, heads * head_dim)
    key, value = (torch.randn(samples, int(starts[-1]), heads * head_dim) for _ in range(2))
    states = [t.to(dtype) for t in (query, key, value)]
    places, masks = (query_starts, positions, starts), (samples, 0.1, 5, 3, torch.arange(len(lengths)))
    on_gpu = [t.cuda() for t in (*states, *places)]
    got = packed_attention(*on_gpu, max(lengths), heads, 0.125, *masks[:-1], masks[-1].cuda()).cpu()
    exact = packed_attention_ref(*(t.double() for t in states), *places, heads, 0.125, *masks)
    eager = packed_attention_ref(*states, *places, heads, 0.125, *masks)
    # The weights enter the second product in 16 bits, as in every fused attention: one more rounding than eager float32 makes.
    no_worse_than_pytorch(got, eager, exact, 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps * float(exact.abs().max()))


def test_a_replayed_graph_draws_the_masks_of_its_texts():
    """Example ids are data: what a CUDA graph has captured is the formula, not the masks."""
    x, ids = torch.ones(8, 256, device="cuda"), torch.arange(8, device="cuda")
    offsets = torch.zeros_like(ids)
    weight, bias = torch.randn(16, 256, device="cuda"), torch.randn(16, device="cuda")

    def run():
        return repeat_dropout(x, 4, 0.1, 7, 0, ids, offsets), mc_head(x, weight, bias, 4, 0.1, 7, 0, ids).mean_probs

    run()  # compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    seen = []
    for first in (100, 2**32 - 4):
        ids.copy_(torch.arange(first, first + 8))
        graph.replay()
        for replayed, fresh in zip(captured, run(), strict=True):
            assert torch.equal(replayed, fresh)
        seen.append(captured[0].clone())
    assert not torch.equal(*seen)


def test_no_op_waits_for_the_device():
    logits = torch.randn(16, 32, 6, device="cuda")
    x, residual, weight = torch.randn(4, 8, 64, device="cuda"), torch.randn(8, 64, device="cuda"), torch.ones(64, device="cuda")
    ids, starts = torch.arange(8, device="cuda"), torch.arange(9, device="cuda")
    student = torch.randn(32, 6, device="cuda", requires_grad=True)
    union = torch.arange(6, device="cuda")

    def step():
        scores = 1 - mc_statistics(logits, [0, 2, 6]).normalized_entropy
        distill_loss(student, logits[0], scores, [0, 2, 6], union, soft=True, tau=0.2, temperature=1.0, margin=True).sum().backward()
        mc_head(residual, weight[None].expand(3, -1), None, 4, 0.1, 5, 2, ids)
        dropped = repeat_dropout(residual, 4, 0.1, 5, 2, ids, ids)
        dropout_add_layer_norm(dropped, residual, weight, weight, 1e-5, 0.1, 5, 2, ids, ids)
        one_query_attention(residual, residual, residual, starts, 2, 0.2, 4, 0.1, 5, 2, ids, ids)
        packed_attention(x, x, x, starts, ids, starts, 1, 2, 0.2, 4, 0.1, 5, 2, ids)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES[::2])
@pytest.mark.parametrize("scope", ["last:1", "head", "all"])
@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert", "llama"])
def test_no_scoring_step_waits_for_the_device(family, scope, dtype, make_teacher):
    if (family, scope) == ("llama", "head"):
        scope = "last:1"  # decoders have no dropout site in their head
    teacher = load_teacher(make_teacher(family), run_seed=0, device="cuda", dtype=dtype)
    scorer = StochasticTeacher(teacher, mc_scope=scope, mc_samples=4, mc_dropout_p=0.1)
    scorer._budget = lambda: 1 << 16
    ids = torch.tensor([[5, 7, 9, 11, 6], [5, 8, 6, 0, 0]])
    batch = ids, (ids != 0).long(), torch.tensor([3, 2**32 - 1])
    scorer.launch(*batch)  # compiles, and copies the class counts once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores = scorer.launch(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert scorer.fast is not None and not any(value.isnan().any() for value in vars(scores).values())


@pytest.mark.parametrize("scope", ["last:1", "all"])
def test_memory_of_scoring_is_bounded_in_the_samples(scope, make_teacher):
    """Beyond what the budget admits at once, more samples take no more memory."""
    peaks = []
    for samples in (8, 64):
        teacher = load_teacher(make_teacher("bert"), run_seed=0, device="cuda")
        scorer = StochasticTeacher(teacher, mc_scope=scope, mc_samples=samples)
        scorer._budget = lambda: 1 << 20
        ids = torch.randint(5, 50, (64, 24))
        arguments = (ids, torch.ones_like(ids), torch.arange(64))
        scorer.launch(*arguments)
        torch.cuda.reset_peak_memory_stats()
        scorer.launch(*arguments)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0] + (1 << 20)
