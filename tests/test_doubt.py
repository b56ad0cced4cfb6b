"""The uncertainty head: what it learns and how, what the student keeps of it, and how its doubt is told and measured."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_curve

import muka_fast
from muka_fast import cli, export
from muka_fast.aligned import AlignedStudent, AmalgamatedFeature
from muka_fast.config import EvalConfig
from muka_fast.coverage import doubt_ranks, ranks
from muka_fast.doubt import (
    FILE,
    NAMES,
    WEIGHT,
    Doubt,
    UncertainStudent,
    UncertaintyHead,
    auroc,
    false_positive_rate,
)
from muka_fast.errors import UserError
from muka_fast.evaluate import evaluate

LABELS = ["a", "b", "c"]


# ---- what is learnt ----


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.randoms())
def test_ranks_lie_inside_the_unit_interval_and_hang_on_values_alone(values, random):
    values = np.array(values, float)
    found = ranks(values)
    assert ((found > 0) & (found < 1)).all() and found.mean() == pytest.approx(0.5)
    for b, value in enumerate(values):
        assert found[b] == pytest.approx(((values < value).sum() + (values <= value).sum()) / 2 / len(values))
    order = np.array(random.sample(range(len(values)), len(values)))
    np.testing.assert_array_equal(ranks(values[order]), found[order])
    np.testing.assert_array_equal(ranks(np.exp(values)), found)


def test_a_doubtful_text_is_uncertain_and_far_from_every_teacher():
    from test_coverage import foreign_pool
    from test_evidence import restricted

    sup, _, topic = foreign_pool(seed=1)
    found = doubt_ranks(restricted(sup), "mutual_information")
    assert found.shape == (len(topic), len(NAMES)) and found.dtype == np.float32
    share = sup.mutual_information / torch.tensor(sup.class_counts).log()
    np.testing.assert_allclose(found[:, 0], ranks(share.min(-1).values.numpy()), atol=1e-3)
    assert auroc(found[:, 1], topic < 0) > 0.65
    with pytest.raises(UserError, match="needs two Monte-Carlo passes"):
        doubt_ranks(restricted(foreign_pool(mc=False)[0]), "mutual_information")


@given(cut=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_the_heads_gradient_does_not_depend_on_how_a_batch_is_split(cut, seed):
    generator = torch.Generator().manual_seed(seed)
    doubt = Doubt(torch.rand(9, 2, generator=generator).numpy())
    rows, said = torch.randperm(9, generator=generator)[:6], torch.randn(6, 2, generator=generator)
    grads = []
    for parts in ([slice(0, 6)], [slice(0, cut), slice(cut, 6)]):
        z = said.clone().requires_grad_()
        for part in parts:
            (doubt.loss(z[part], rows[part]).sum() / len(rows)).backward()
        grads.append(z.grad)
    torch.testing.assert_close(grads[0], grads[1])
    expected = WEIGHT / 2 * (torch.sigmoid(said) - doubt.targets[rows]) / 6
    torch.testing.assert_close(grads[0], expected)


def test_every_family_learns_it_and_the_student_feels_nothing(family, make_model, make_tokenizer, texts):
    tokenizer = make_tokenizer(family)
    inputs = dict(tokenizer(texts[:4], return_tensors="pt", padding=True, truncation=True, max_length=16))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    student = make_model(family, LABELS, tokenizer=tokenizer)
    model = UncertainStudent(student, student)
    with torch.no_grad():
        model.uncertainty_head.weight.normal_()
    output = model(**inputs)
    assert output.doubt.shape == (4, 2) and output.penalty is None and torch.equal(output.logits, student(**inputs).logits)
    Doubt(np.full((4, 2), 0.9, np.float32)).loss(output.doubt, torch.arange(4)).sum().backward()
    assert all(parameter.grad is None for parameter in student.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.uncertainty_head.parameters())
    assert all(parameter.base_lr == 1e-3 for parameter in model.uncertainty_head.parameters())
    # The row behind the logits: what a text is padded with changes nothing.
    alone = {name: value[:1, : int(inputs["attention_mask"][0].sum())] for name, value in inputs.items()}
    torch.testing.assert_close(model(**alone).doubt[0], output.doubt[0], atol=1e-4, rtol=1e-4)


def test_it_goes_round_the_modules_of_a_method_and_comes_off_again(make_model, make_tokenizer, texts):
    student = make_model("bert", LABELS)
    aligned = AlignedStudent(student, AmalgamatedFeature, (5, 3), 0)
    model = UncertainStudent(aligned, student)
    inputs = {"input_ids": torch.tensor([[2, 7, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    output = model(teacher_features=torch.ones(1, 8), **inputs)
    assert output.penalty.shape == (1,) and output.doubt.shape == (1, 2) and model.config is student.config
    kept, head = UncertainStudent.split(model.state_dict())
    assert kept.keys() == aligned.state_dict().keys() and head.keys() == {"weight", "bias"}
    assert UncertainStudent.split(None) == (None, None)


# ---- beside the exported student ----


@pytest.fixture
def exported(tmp_path, make_model, make_tokenizer):
    """A student with a head, exported; the head."""
    model, tokenizer = make_model("bert", LABELS), make_tokenizer("bert")
    generator = torch.Generator().manual_seed(0)
    head = UncertaintyHead(torch.randn(2, 16, generator=generator), torch.randn(2, generator=generator))
    export.save_student(model, tokenizer, tmp_path / "out", LABELS, export.Card(title="merged"), head=head)
    return tmp_path / "out", model, head


def test_plain_transformers_never_sees_it_and_ours_reads_it_back(exported, texts):
    folder, model, head = exported
    classify = transformers.pipeline("text-classification", model=str(folder))
    answers = classify(texts[:6], truncation=True, max_length=32)
    found = muka_fast.Predictor(folder, max_length=32, token_budget=64).predict(texts[:6])
    again = UncertaintyHead.load(folder, model)
    assert torch.equal(again.weight, head.weight) and torch.equal(again.bias, head.bias)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text, answer, prediction in zip(texts, answers, found, strict=False):
        assert prediction.label == answer["label"] and prediction.probability == pytest.approx(answer["score"], abs=1e-5)
        inputs = tokenizer(text, truncation=True, max_length=32, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            f = model.bert(**inputs).pooler_output[0]
        expected = torch.sigmoid(head.weight @ f + head.bias).mean().item()
        assert prediction.doubt == pytest.approx(expected, abs=1e-5)
    assert muka_fast.Predictor(folder).predict([]) == []


def test_a_student_without_head_tells_no_doubt(make_teacher, texts):
    assert all(found.doubt is None for found in muka_fast.Predictor(make_teacher("bert", LABELS)).predict(texts[:2]))


def rewrite(path, metadata=None, **changes):
    tensors = {name: value for name, value in (load_file(path) | changes).items() if value is not None}
    save_file(tensors, path, {"format": "muka_fast uncertainty head 1", "outputs": json.dumps(NAMES)} | (metadata or {}))


DAMAGE = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-3]), "truncated or corrupt"),
    "no header": (lambda path: path.write_bytes(b"x"), "no safetensors header"),
    "width": (lambda path: rewrite(path, weight=torch.zeros(2, 15)), "another student's"),
    "name": (lambda path: rewrite(path, bias=None, other=torch.zeros(2)), "another student's"),
    "version": (lambda path: rewrite(path, {"format": "2"}), "no uncertainty head of this version"),
    "outputs": (lambda path: rewrite(path, {"outputs": "[]"}), "no uncertainty head of this version"),
    "nan": (lambda path: rewrite(path, bias=torch.full((2,), math.nan)), "not finite fp32"),
    "type": (lambda path: rewrite(path, bias=torch.zeros(2, dtype=torch.float64)), "not finite fp32"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_file_is_refused_in_one_line(exported, kind, capsys, tmp_path):
    folder = exported[0]
    damage, told = DAMAGE[kind]
    damage(folder / FILE)
    (tmp_path / "t.jsonl").write_text('{"text": "x", "label": "a"}\n')
    for command in (["predict", "--texts"], ["eval", "--data"]):
        words = [command[0], "--model", str(folder), command[1], str(tmp_path / "t.jsonl")]
        assert cli.main([*words, "--device", "cpu"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("muka-fast: error:") and told in error and FILE in error


def test_the_command_writes_one_object_per_text_and_overwrites_nothing(exported, texts, tmp_path, capsys):
    folder = exported[0]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:5]))
    words = ["predict", "--model", str(folder), "--texts", str(tmp_path / "t.jsonl"), "--device", "cpu"]
    assert cli.main(words) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == texts[:5] and all(row.keys() == {"text", "label", "probability", "doubt"} for row in rows)
    assert all(row["label"] in LABELS and 1 / 3 <= row["probability"] <= 1 and 0 <= row["doubt"] <= 1 for row in rows)
    out = tmp_path / "answers.jsonl"
    assert cli.main([*words, "--output", str(out)]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    before = out.read_bytes()
    assert cli.main([*words, "--output", str(out)]) == 2
    assert out.read_bytes() == before and "already there" in capsys.readouterr().err
    assert cli.main([*words, "--output", str(tmp_path / "no" / "answers.jsonl")]) == 2 and "no folder" in capsys.readouterr().err
    (folder / FILE).unlink()
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    assert "no uncertainty head" in captured.err and all("doubt" not in json.loads(line) for line in captured.out.splitlines())


# ---- figures ----


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
def test_figures_of_doubt_against_their_definition(pairs):
    doubt, foreign = np.array([d for d, _ in pairs], float), np.array([f for _, f in pairs])
    own, others = doubt[~foreign], doubt[foreign]
    if not len(own) or not len(others):
        assert auroc(doubt, foreign) is None and false_positive_rate(doubt, foreign) is None
        return
    wins = sum((d > o) + (d == o) / 2 for d in others for o in own)
    assert auroc(doubt, foreign) == pytest.approx(wins / len(own) / len(others))
    # roc_curve with the texts of the teachers as positive: the first threshold that lets 95 % of them pass.
    passing, kept, _ = roc_curve(~foreign, -doubt, drop_intermediate=False)
    assert false_positive_rate(doubt, foreign) == pytest.approx(passing[np.argmax(kept >= 0.95 - 1e-12)])


def test_eval_measures_doubt_on_wrong_answers_and_unknown_labels(exported, texts, tmp_path, capsys):
    folder = exported[0]
    rows = [{"text": text, "label": [*LABELS, "other"][i % 4]} for i, text in enumerate(texts[:20])]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EvalConfig(model=str(folder), data=str(tmp_path / "d.jsonl"), device="cpu")
    found = evaluate(config)
    predictions = muka_fast.Predictor(folder, "cpu").predict(texts[:20])
    doubt, unknown = np.array([p.doubt for p in predictions]), np.array([row["label"] == "other" for row in rows])
    wrong = np.array([p.label != row["label"] for p, row in zip(predictions, rows, strict=True)])
    assert found["doubt"]["uncertainty head"] == {
        "wrong_auroc": pytest.approx(auroc(doubt[~unknown], wrong[~unknown])),
        "unknown_auroc": pytest.approx(auroc(doubt, unknown)),
        "unknown_fpr95": pytest.approx(false_positive_rate(doubt, unknown)),
    }
    softmax = -np.array([p.probability for p in predictions])
    assert found["doubt"]["softmax"]["unknown_auroc"] == pytest.approx(auroc(softmax, unknown))
    assert cli.main(["eval", "--model", str(folder), "--data", str(tmp_path / "d.jsonl")]) == 0
    assert "uncertainty head" in capsys.readouterr().out
    (folder / FILE).unlink()
    without = evaluate(config)
    assert "doubt" not in without and without["accuracy"] == found["accuracy"] and without["nll"] == pytest.approx(found["nll"])
