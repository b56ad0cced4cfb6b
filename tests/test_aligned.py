"""dfa and cfl: their losses in plain float64, what they train, and what is left of them in the student."""

import itertools
import math

import pytest
import torch
from torch import nn

from muka_fast.aligned import AlignedStudent, AmalgamatedFeature, CommonFeatures, discrepancy, student_part
from muka_fast.optim import parameter_groups

WIDTHS = (5, 3)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    torch.manual_seed(0)  # of the modules
    return draw(6, 32).requires_grad_(), draw(6, sum(WIDTHS))


def o_mse(x, y):
    return sum((a - b) ** 2 for a, b in zip(x.tolist(), y.tolist(), strict=True)) / len(x)


def o_mmd(x, y):
    """MMD^2 with five RBF kernels around the mean squared distance of all pairs, of directions, in loops."""
    rows = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in torch.cat([x, y]).double().tolist()]
    squared = lambda a, b: sum((u - v) ** 2 for u, v in zip(a, b, strict=True))
    mean = sum(squared(a, b) for a, b in itertools.product(rows, rows)) / len(rows) ** 2
    kernel = lambda a, b: sum(math.exp(-squared(a, b) / (2 * mean * scale)) for scale in (0.25, 0.5, 1, 2, 4))
    n = len(x)
    average = lambda left, right: sum(kernel(a, b) for a, b in itertools.product(left, right)) / n**2
    return average(rows[:n], rows[:n]) + average(rows[n:], rows[n:]) - 2 * average(rows[:n], rows[n:])


def test_dfa_is_reconstruction_and_distance_to_the_code(batch):
    student, teachers = batch
    module = AmalgamatedFeature(32, WIDTHS)
    loss = module(student, teachers)
    for b in range(6):
        code = module.encoder(teachers[b])
        rebuilt = module.decoder(code)
        expected = o_mse(module.student(student[b]), code)
        expected += o_mse(rebuilt[:5], teachers[b, :5]) + o_mse(rebuilt[5:], teachers[b, 5:])
        assert loss[b].item() == pytest.approx(expected, rel=1e-5)


def test_dfa_draws_the_student_to_the_code_and_not_the_code_to_the_student(batch):
    student, teachers = batch
    module = AmalgamatedFeature(32, WIDTHS)
    reconstruct = nn.functional.mse_loss
    module(student, teachers).sum().backward()
    found = module.encoder.weight.grad.clone()
    module.zero_grad()
    rebuilt = module.decoder(module.encoder(teachers))
    parts = zip(rebuilt.split(WIDTHS, -1), teachers.split(WIDTHS, -1), strict=True)
    sum(6 * reconstruct(a, b) for a, b in parts).backward()
    torch.testing.assert_close(found, module.encoder.weight.grad)
    assert student.grad.abs().sum() > 0


def test_cfl_compares_distributions_in_the_common_space(batch):
    student, teachers = batch
    module = CommonFeatures(32, WIDTHS)
    loss = module(student, teachers)
    relu = torch.relu
    mine = module.extractor(relu(module.align_student(student)))
    expected, common = torch.zeros(6), 0.0
    for i, part in enumerate(teachers.split(WIDTHS, -1)):
        code = module.extractor(relu(module.align_teachers[i](part)))
        assert code.shape == (6, 8)  # a quarter of the student's width
        common += o_mmd(mine, code)
        expected += torch.tensor([o_mse(row, truth) for row, truth in zip(module.decoders[i](code), part, strict=True)])
    torch.testing.assert_close(loss.detach(), expected + common, atol=1e-4, rtol=1e-4)


def test_the_discrepancy_is_zero_for_equal_batches_only_and_differentiable_everywhere():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert discrepancy(x, x.detach().flip(0)).item() == pytest.approx(0, abs=1e-6)
    assert discrepancy(x, -x.detach()).item() > 0.1
    for y in (x.detach(), torch.zeros(9, 4), x.detach()[:1].expand(9, 4)):
        (gradient,) = torch.autograd.grad(discrepancy(x, y), x)
        assert gradient.isfinite().all()
    one = x[:1].detach().requires_grad_()
    assert torch.autograd.grad(discrepancy(one, one.detach()), one)[0].isfinite().all()


@pytest.mark.parametrize("alignment", [AmalgamatedFeature, CommonFeatures])
def test_every_family_of_students_is_trained_and_comes_out_alone(family, alignment, make_model, make_tokenizer, texts):
    tokenizer, labels = make_tokenizer(family), ("a", "b", "c")
    make = lambda seed=3: AlignedStudent(make_model(family, labels, tokenizer=tokenizer), alignment, WIDTHS, seed)
    model, twin, other = make(), make(), make(4)
    inputs = dict(tokenizer(texts[:4], return_tensors="pt", padding=True, truncation=True, max_length=16))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    features = torch.randn(4, sum(WIDTHS), generator=torch.Generator().manual_seed(0))
    output = model(teacher_features=features, **inputs)
    assert output.penalty.shape == (4,) and torch.equal(output.logits, model.student(**inputs).logits)
    assert torch.equal(output.penalty, twin(teacher_features=features, **inputs).penalty)
    assert not torch.equal(output.penalty, other(teacher_features=features, **inputs).penalty)
    output.penalty.sum().backward()
    assert next(model.student.base_model.parameters()).grad is not None
    assert all(parameter.grad is not None for parameter in model.alignment.parameters())
    alone = student_part(model.state_dict())
    assert alone.keys() == model.student.state_dict().keys() and student_part(None) is None


def test_the_modules_have_a_learning_rate_of_their_own(make_model):
    model = AlignedStudent(make_model("bert"), AmalgamatedFeature, WIDTHS, 0)
    groups = parameter_groups(model, 0.01)
    assert [(group["weight_decay"], group.get("base_lr")) for group in groups] == [
        (0.01, None),
        (0.0, None),
        (0.01, 1e-3),
        (0.0, 1e-3),
    ]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert [group["weight_decay"] for group in parameter_groups(model.student, 0.01)] == [0.01, 0.0]


def test_the_width_of_the_kernels_is_a_constant_to_the_gradient():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    x.requires_grad_()
    both = nn.functional.normalize(torch.cat([x, y]), dim=-1)
    squared = (both[:, None] - both).square().sum(-1)
    width = squared.mean().item()
    kernel = sum(torch.exp(-squared / (2 * scale * width)) for scale in (0.25, 0.5, 1, 2, 4))
    expected = (kernel[:6, :6] + kernel[6:, 6:] - 2 * kernel[:6, 6:]).mean()
    found = discrepancy(x, y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))
