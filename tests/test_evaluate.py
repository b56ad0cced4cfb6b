"""Evaluation: every figure against sums by hand and scikit-learn, prediction in batches, and `muka-fast eval` on real folders."""

import contextlib
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk
from transformers import AutoConfig

import muka_fast
from muka_fast.config import EvalConfig
from muka_fast.data import tokenize
from muka_fast.doubt import UncertaintyHead
from muka_fast.errors import UserError
from muka_fast.evaluate import evaluate, expected_calibration_error, main, metrics, predict, teacher_blocks

NAMES = ["a", "b", "c"]


@given(n=st.integers(1, 40), C=st.integers(2, 6), seed=st.integers(0, 2**31), scale=st.sampled_from([0.0, 1.0, 3.0]))
def test_figures_are_those_of_scikit_learn(n, C, seed, scale):
    # (whose log_loss cuts probabilities at 2e-16: logits of a larger scale come that far)
    rng = np.random.default_rng(seed)
    logits, labels = rng.standard_normal((n, C)) * scale, rng.integers(0, C, n)
    found = metrics(torch.from_numpy(logits), torch.from_numpy(labels), [f"c{c}" for c in range(C)])
    probs = torch.softmax(torch.from_numpy(logits), -1).numpy()
    predicted = logits.argmax(-1)
    assert found["num_texts"] == n
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert found["nll"] == pytest.approx(sk.log_loss(labels, probs, labels=range(C)))
    present = sorted(set(labels.tolist()))
    f1 = [sk.f1_score(labels == c, predicted == c, zero_division=0) for c in present]
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    for c in range(C):
        row = found["per_class"][f"c{c}"]
        assert row["support"] == (labels == c).sum()
        assert row["recall"] == pytest.approx((predicted[labels == c] == c).mean() if row["support"] else 0.0)
    assert sum(row["support"] for row in found["per_class"].values()) == n
    bins = found["calibration"]
    assert sum(row["count"] for row in bins) == n and sorted(bins, key=lambda row: row["confidence"]) == bins
    assert found["ece"] == pytest.approx(sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in bins) / n)


def test_log_likelihood_keeps_its_digits_for_extreme_logits():
    found = metrics(np.array([[1e4, 0.0, -1e4]]), [2], NAMES)
    assert found["nll"] == 2e4
    assert found["ece"] == 1.0
    certain = metrics(np.array([[0, -20, -20]], np.float32), [0], NAMES)
    assert certain["nll"] == pytest.approx(2 * math.exp(-20), rel=1e-6)


def test_one_class_is_always_right():
    found = metrics(np.array([[3.0], [-1.0]]), [0, 0], ["only"])
    assert (found["accuracy"], found["macro_f1"], found["nll"], found["ece"]) == (1.0, 1.0, 0.0, 0.0)


def test_calibration_error_by_hand():
    # Bins of 1/15: 0.5 and 0.53 share (7/15, 8/15]; 1.0 lies in the last; 0.2 = 3/15 in (2/15, 3/15].
    confidence = np.array([0.5, 0.53, 1.0, 0.19])
    correct = np.array([True, False, True, True])
    by_hand = (abs((0.5 + 0.53) / 2 - 0.5) * 2 + 0.0 + abs(0.19 - 1)) / 4
    assert expected_calibration_error(confidence, correct) == pytest.approx(by_hand)
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0.0


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_calibration_error_against_a_loop(pairs):
    total = 0.0
    for j in range(15):
        low, high = j / 15, (j + 1) / 15
        inside = [(p, y) for p, y in pairs if math.ceil(p * 15) - 1 == j or (p == 0 and j == 0)]
        assert all(low - 1e-9 <= p <= high + 1e-9 for p, _ in inside)
        if inside:
            total += abs(sum(p for p, _ in inside) / len(inside) - sum(y for _, y in inside) / len(inside)) * len(
                inside
            )
    found = expected_calibration_error(np.array([p for p, _ in pairs]), np.array([y for _, y in pairs]))
    assert found == pytest.approx(total / len(pairs), abs=1e-12)
    assert 0 <= found <= 1


def test_teacher_blocks_by_hand():
    logits = np.array([[2.0, 1, 0], [0, 1, 2], [1, 0, 3], [0, 1, 5]])
    labels = [0, 1, 1, 2]  # predicted: 0, 2, 2, 2
    teachers = [
        {"name": "one", "labels": ["a", "b"]},
        {"name": "two", "labels": ["b", "c"]},
        {"name": "none", "labels": ["z"]},
    ]
    blocks = metrics(logits, labels, NAMES, teachers)["per_teacher_block"]
    third = pytest.approx(1 / 3)
    assert blocks["one"] == {
        "num_classes": 2, "support": 3, "accuracy": third, "in_block": third, "within_block": pytest.approx(2 / 3)
    }  # fmt: skip
    assert blocks["two"] == {
        "num_classes": 2, "support": 3, "accuracy": third, "in_block": 1.0, "within_block": third
    }  # fmt: skip
    assert blocks["none"]["support"] == 0 and blocks["none"]["accuracy"] is None
    assert "per_teacher_block" not in metrics(logits, labels, NAMES)


@pytest.mark.parametrize(
    ("logits", "labels"), [(np.zeros((2, 3)), [0]), (np.zeros((1, 3)), [3]), (np.zeros((1, 2)), [0])]
)
def test_figures_refuse_what_does_not_fit(logits, labels):
    with pytest.raises(ValueError, match=r"fit|predictions"):
        metrics(logits, labels, NAMES)


# ---- predictions ----


def test_predictions_do_not_depend_on_batches_and_leave_the_mode_alone(make_model, make_tokenizer, texts):
    model, tokenizer = make_model("bert", NAMES), make_tokenizer("bert")
    tokens = tokenize(tokenizer, texts, 32)
    with torch.inference_mode():
        expected = torch.cat(
            [model(torch.from_numpy(row)[None].long()).logits for row in np.split(tokens.ids, tokens.offsets[1:-1])]
        )
    model.train()
    for budget in (16, 100, 100_000):
        found = predict(model, tokens, token_budget=budget)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert model.training and not found.is_inference()


def test_a_label_of_another_case_is_told_with_the_model_s(tmp_path, student, texts, caplog):
    data = write_rows(tmp_path / "d.jsonl", [(texts[0], f" {NAMES[0].upper()}"), (texts[1], NAMES[1])])
    evaluate(config(student, data))
    assert f"( {NAMES[0].upper()}, where the model has '{NAMES[0]}')" in caplog.text


def test_texts_that_are_cut_are_told(tmp_path, student, texts, caplog):
    caplog.set_level("INFO", "muka_fast")
    data = write_rows(tmp_path / "d.jsonl", [("short", NAMES[0]), (texts[0] * 5, NAMES[0])])
    evaluate(config(student, data, max_length=12))
    assert "1 of 2 texts fill 12 tokens, to which longer ones are cut (--max_length)" in caplog.text
    predictor = muka_fast.Predictor(student, device="cpu", max_length=12)
    for text in ("short", texts[0] * 5, texts[0] * 5):
        predictor.predict(text)
    assert caplog.text.count("texts of more than 12 tokens are cut to these (--max_length)") == 1
    predictor.tokenizer.backend_tokenizer.post_processor = None
    assert "give no token" not in caplog.text and predictor.predict(["\0", "word"])
    assert "1 texts give no token (control characters only)" in caplog.text


def test_nan_predictions_are_refused(make_model, make_tokenizer):
    model = make_model("bert", NAMES)
    for value, refused in ((math.nan, True), (math.inf, True), (-math.inf, False)):
        with torch.no_grad():
            model.classifier.bias[0] = value
        with pytest.raises(UserError, match="NaN or infinite logits for 2 of 2 texts") if refused else contextlib.nullcontext():
            predict(model, tokenize(make_tokenizer("bert"), ["a", "b"], 8))


def test_predictions_are_ordinary_tensors(make_model, make_tokenizer):
    found = predict(make_model("bert", NAMES), tokenize(make_tokenizer("bert"), ["a", "b"], 8))
    assert not found.is_inference()


def test_columns_of_one_name_are_one_class(make_teacher, texts, tmp_path):
    """Whichever of them is larger, the answer is that name, with the probability of both."""
    folder = make_teacher("bert", ("a", "b", "a"), name="twice")
    predictor = muka_fast.Predictor(folder, device="cpu")
    found = predictor.predict(texts[:8])
    with torch.inference_mode():
        inputs = predictor.tokenizer(texts[:8], padding=True, truncation=True, max_length=128, return_tensors="pt")
        probs = torch.softmax(predictor.model(**inputs).logits, -1)
    both = torch.stack([probs[:, 0] + probs[:, 2], probs[:, 1]], -1)
    assert [answer.label for answer in found] == ["ab"[i] for i in both.argmax(-1)]
    torch.testing.assert_close(torch.tensor([answer.probability for answer in found]), both.amax(-1), rtol=1e-5, atol=1e-6)
    data = write_rows(tmp_path / "d.jsonl", [(text, "a") for text in texts[:8]])
    assert evaluate(config(folder, data))["accuracy"] == pytest.approx((both.argmax(-1) == 0).double().mean().item())


def test_a_long_list_is_answered_in_parts(student, texts, monkeypatch):
    predictor = muka_fast.Predictor(student, device="cpu")
    whole, sizes = predictor.predict(texts[:7]), []
    monkeypatch.setattr(muka_fast.predict, "CHUNK", 3)
    monkeypatch.setattr(muka_fast.predict, "predict", lambda *given, **o: sizes.append(len(given[1])) or predict(*given, **o))
    parts = predictor.predict(texts[:7])
    assert sizes == [3, 3, 1] and [answer.label for answer in parts] == [answer.label for answer in whole]
    assert [answer.probability for answer in parts] == pytest.approx([answer.probability for answer in whole], rel=1e-5)
    assert predictor.predict([]) == []


def test_a_probability_keeps_its_digits(student):
    predictor = muka_fast.Predictor(student, device="cpu")
    with torch.no_grad():
        predictor.model.classifier.weight.zero_()
        predictor.model.classifier.bias.copy_(torch.tensor([20.0, 0, 0]))
    (found,) = predictor.predict("a text")
    assert 1 - found.probability == pytest.approx(2 * math.exp(-20), rel=1e-6)


def test_what_is_no_list_of_texts_and_no_option_is_refused(student):
    import pandas

    predictor = muka_fast.Predictor(student, device="cpu")
    for wrong in (pandas.DataFrame({"text": ["a"]}), {"text": "a"}, None, 5, [["a"]], [None]):
        with pytest.raises(UserError, match="predict takes a list of texts, found"):
            predictor.predict(wrong)
    assert predictor.predict(pandas.Series(["a", "b"])) == predictor.predict(iter(["a", "b"])) == predictor.predict(("a", "b"))
    with pytest.raises(UserError, match="model: a folder or hub name is expected, found BertForSequenceClassification"):
        muka_fast.Predictor(predictor.model)
    for name, value in {"max_length": "x", "token_budget": 0, "device": "gpu"}.items():
        with pytest.raises(UserError, match=f"--{name} {value}: must be"):
            muka_fast.Predictor(student, **{name: value})


def test_a_text_whose_logits_are_no_numbers_is_named_by_its_row(tmp_path, student, texts):
    predictor = muka_fast.Predictor(student, device="cpu")
    token = predictor.tokenizer("zebra")["input_ids"][1]
    with torch.no_grad():
        predictor.model.get_input_embeddings().weight[token] = 3e38  # finite; what follows is not
    predictor.model.save_pretrained(student)
    data = write_rows(tmp_path / "d.jsonl", [("", "a"), (texts[0], "a"), (texts[1], "other"), ("zebra", "a"), ("a zebra", "b")])
    with pytest.raises(UserError, match="NaN or infinite logits for 2 of 3 texts, first for text 3;"):
        evaluate(config(student, data))


def test_no_forward_reads_more_tokens_than_the_budget(tmp_path, student, texts, monkeypatch):
    sizes, forward = [], transformers.BertForSequenceClassification.forward

    def counted(self, **inputs):
        sizes.append(inputs["input_ids"].numel())
        return forward(self, **inputs)

    monkeypatch.setattr(transformers.BertForSequenceClassification, "forward", counted)
    muka_fast.Predictor(student, device="cpu", token_budget=64).predict(texts[:8])
    evaluate(config(student, write_rows(tmp_path / "d.jsonl", [(text, "a") for text in texts[:8]]), token_budget=64))
    assert len(sizes) > 4 and max(sizes) <= 64


# ---- the command ----


@pytest.fixture
def student(make_teacher):
    return make_teacher("bert", NAMES, name="student")


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(dict(zip(("text", "label"), row, strict=True))) for row in rows))
    return path


def config(student, data, **more):
    return EvalConfig(model=str(student), data=str(data), device="cpu", **more)


def test_texts_whose_label_the_map_drops_are_not_taken_for_unknown(tmp_path, student, texts):
    rng, width = np.random.default_rng(0), AutoConfig.from_pretrained(student).hidden_size
    features, logits = (rng.standard_normal((50, size)).astype(np.float32) for size in (width, 3))
    UncertaintyHead.fit(features, logits, rng.uniform(0.1, 0.9, 50)).save(Path(student))
    data = write_rows(tmp_path / "d.jsonl", [(text, ["a", "b", "other"][i % 3]) for i, text in enumerate(texts[:30])])
    (tmp_path / "map.json").write_text(json.dumps({"other": None}))
    unknown, dropped = (evaluate(config(student, data, **more)) for more in ({}, {"label_map": str(tmp_path / "map.json")}))
    for name, found in unknown["doubt"].items():
        assert found["unknown_auroc"] is not None and dropped["doubt"][name]["unknown_auroc"] is None
    assert (unknown["num_unknown"], dropped["num_unknown"], dropped["num_texts"]) == (10, 0, 20)


def test_unknown_labels_are_counted_and_left_out(tmp_path, student, texts, caplog):
    rows = [(text, ["a", "b", "c", "other"][i % 4]) for i, text in enumerate(texts[:12])]
    data = write_rows(tmp_path / "d.jsonl", rows)
    with caplog.at_level(logging.WARNING, "muka_fast"):
        found = evaluate(config(student, data))
    assert found["num_texts"] == 9 and found["num_unknown"] == 3 and found["unknown_labels"] == {"other": 3}
    assert "(other); they are left out (--label_map renames)" in caplog.text
    assert "3 of 12 texts" in caplog.text
    only_known = write_rows(tmp_path / "k.jsonl", [row for row in rows if row[1] != "other"])
    again = evaluate(config(student, only_known))
    assert again["nll"] == pytest.approx(found["nll"]) and again["num_unknown"] == 0
    mapped = tmp_path / "map.json"
    mapped.write_text(json.dumps({"other": "a"}))
    assert evaluate(config(student, data, label_map=str(mapped)))["num_texts"] == 12


def test_labels_that_the_map_drops_are_not_called_unknown(tmp_path, student, texts, caplog):
    data = write_rows(tmp_path / "d.jsonl", [(text, "abc"[i % 3]) for i, text in enumerate(texts[:6])])
    with caplog.at_level(logging.INFO, "muka_fast"):
        found = evaluate(config(student, data, label_map={"a": None}))
    assert found["num_texts"] == 4 and found["num_unknown"] == 0 and "does not know" not in caplog.text
    assert "2 of 6 texts have labels that --label_map drops" in caplog.text


def test_a_name_of_the_map_that_nothing_has_is_told(tmp_path, student, texts, product_log):
    data = write_rows(tmp_path / "d.jsonl", [(text, "abc"[i % 3]) for i, text in enumerate(texts[:6])])
    for label_map, told in (({"b": "a"}, False), ({"other": "a"}, True), ({"t": {"x": None}}, False)):
        product_log.clear()
        evaluate(config(student, data, label_map=label_map))
        assert ("neither these texts nor a teacher have a label 'other' (there are: a, b, c)" in product_log.text) is told


def test_texts_and_label_map_are_read_before_the_model(tmp_path, texts):
    with pytest.raises(UserError, match=r"no\.jsonl: no such file"):
        evaluate(config(tmp_path, tmp_path / "no.jsonl"))  # a folder without a model
    data = write_rows(tmp_path / "data.jsonl", [(texts[0], "a")])
    with pytest.raises(UserError, match=r"map\.yaml"):
        evaluate(config(tmp_path, data, label_map=str(tmp_path / "map.yaml")))


def test_data_without_any_known_label_is_refused(tmp_path, student):
    data = write_rows(tmp_path / "d.jsonl", [("text", "x"), ("text", "y")])
    with pytest.raises(
        UserError, match=r"none of its labels \(x, y, ...\) is a class of .*student \(a, b, c.*--label_map"
    ):
        evaluate(config(student, data))


def test_a_folder_that_is_no_classifier_is_refused(tmp_path):
    with pytest.raises(UserError, match="--model"):
        evaluate(config(tmp_path / "nothing", tmp_path / "d.jsonl"))
    data = write_rows(tmp_path / "d.jsonl", [("a text", "a")])
    with pytest.raises(UserError, match=r"config\.json"):
        evaluate(config(tmp_path, data))


def test_output_is_json_or_tables_on_stdout(tmp_path, student, texts, capsys):
    data = write_rows(tmp_path / "d.jsonl", [(text, NAMES[i % 3]) for i, text in enumerate(texts[:9])])
    (student / "run.json").write_text(
        json.dumps({"teachers": [{"name": "[red]one[/red]", "labels": ["a", "b"]}, {"name": "two", "labels": ["c"]}]})
    )
    assert main(config(student, data, json=True)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_texts"] == 9 and set(found["per_class"]) == set(NAMES)
    assert set(found["per_teacher_block"]) == {"[red]one[/red]", "two"}
    assert main(config(student, data)) == 0
    shown = capsys.readouterr().out
    for text in ("[red]one[/red]", "macro f1", f"{found['accuracy']:.4f}", f"{found['per_class']['c']['f1']:.4f}"):
        assert text in shown
    write_rows(data, [(text, "c") for text in texts[:3]])
    assert main(config(student, data)) == 0
    shown = capsys.readouterr().out
    assert "–" in shown and "2 of 3 classes are not in these texts" in shown  # a teacher without texts has no accuracy


def test_teacher_blocks_come_from_the_run(tmp_path):
    assert teacher_blocks(tmp_path) == []
    for content in ("not json", "[1]", '{"teachers": "x"}', '{"teachers": [1, {"name": "y"}]}'):
        (tmp_path / "run.json").write_text(content)
        assert teacher_blocks(tmp_path) == []
    teacher = {"name": "r", "labels": ["b"], "own_labels": ["x"]}
    (tmp_path / "run.json").write_text(json.dumps({"teachers": [teacher | {"fingerprint": "0"}]}))
    assert teacher_blocks(tmp_path) == [teacher]


@pytest.mark.parametrize(
    ("name", "content", "length"),
    [
        ("run.json", '{"config": {"max_length": 8}}', 8),
        ("teach.json", '{"options": {"max_length": 8}}', 8),
        ("run.json", '{"config": [8]}', 128),
        ("run.json", '{"config": {"max_length": 0}}', 128),
        ("run.json", "{", 128),
        ("none.json", "{}", 128),
    ],
)
def test_texts_are_cut_as_in_training_unless_told_otherwise(tmp_path, student, texts, name, content, length, caplog):
    (student / name).write_text(content)
    data = write_rows(tmp_path / "d.jsonl", [(" ".join(texts[i : i + 4]), NAMES[i % 3]) for i in range(6)])
    losses = {asked: evaluate(config(student, data, max_length=asked))["nll"] for asked in (None, 8, 128)}
    assert losses[None] == losses[length] and losses[8] != losses[128]
    told = [caplog.text.count(f"what it says {part} is not heeded") for part in ("of --max_length", "of the teachers' labels")]
    assert told == ([1, 3] if content == "{" else [0, 0])  # asked for in one of three evaluations, and in each
    lengths = [muka_fast.Predictor(student, device="cpu", max_length=asked).max_length for asked in (None, 12)]
    assert lengths == [length, 12]


def test_the_entries_of_a_single_teacher_rename_the_true_labels(tmp_path, student, texts):
    """The student's run.json tells who owned the old name."""
    write_rows(tmp_path / "data.jsonl", [(text, "old") for text in texts[:3]])
    (tmp_path / "map.json").write_text(json.dumps({"mood": {"old": "a"}}))
    options = {"label_map": str(tmp_path / "map.json")}
    with pytest.raises(UserError, match="none of its labels"):
        evaluate(config(student, tmp_path / "data.jsonl", **options))
    teacher = {"name": "mood", "labels": NAMES, "own_labels": ["old", "b", "c"]}
    (Path(student) / "run.json").write_text(json.dumps({"teachers": [teacher]}))
    assert evaluate(config(student, tmp_path / "data.jsonl", **options))["num_texts"] == 3


def test_a_label_that_the_map_takes_away_from_the_model_is_told_so(tmp_path, student, texts, caplog):
    rows = [(texts[0], NAMES[0]), (texts[1], NAMES[1]), (texts[2], NAMES[1].upper())]
    evaluate(config(student, write_rows(tmp_path / "d.jsonl", rows), label_map={NAMES[0]: "other"}))
    assert f"({NAMES[0]}, which --label_map renames 'other', {NAMES[1].upper()}, where the model has '{NAMES[1]}')" in caplog.text


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_padding_is_told_from_text(family, make_model, make_tokenizer, texts):
    """A decoder's head looks for the last token that is none, RoBERTa counts positions by it."""
    model, tokenizer = make_model(family, NAMES), make_tokenizer(family)
    together = predict(model, tokenize(tokenizer, texts[:8], 64), token_budget=10_000)
    alone = torch.cat([predict(model, tokenize(tokenizer, [text], 64)) for text in texts[:8]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_bin_holds_its_upper_edge_and_not_its_lower_one():
    confidence, correct = np.array([0.2, 0.21]), np.array([False, True])  # 0.2 = 3/15
    assert expected_calibration_error(confidence, correct) == pytest.approx((0.2 + 0.79) / 2)


def test_no_record_makes_a_model_read_more_than_it_can(student):
    (student / "run.json").write_text('{"config": {"max_length": 1000000}}')
    most = muka_fast.Predictor(student, device="cpu", max_length=16384).max_length
    assert muka_fast.Predictor(student, device="cpu").max_length == most < 1000


def test_a_class_behind_columns_of_one_name_keeps_its_name(make_teacher):
    predictor = muka_fast.Predictor(make_teacher("bert", ("a", "a", "b"), name="twice"), device="cpu")
    with torch.no_grad():
        predictor.model.classifier.weight.zero_()
        predictor.model.classifier.bias.copy_(torch.tensor([0.0, 0.0, 5.0]))
    assert predictor.predict("a text")[0].label == "b"
