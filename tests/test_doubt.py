"""The uncertainty head: what it learns and how, what the student keeps of it, and how its doubt is told and measured."""

import copy
import dataclasses
import itertools
import json
import math
import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_curve
from test_methods import make_supervision, space_of

import muka_fast
from muka_fast import cli, export, fit_doubt, predict
from muka_fast.config import EvalConfig, RunConfig
from muka_fast.coverage import doubt_ranks, ranks
from muka_fast.data import TextSet
from muka_fast.doubt import FILE, UncertaintyHead, auroc, false_positive_rate, logistic_scale, with_features
from muka_fast.errors import UserError
from muka_fast.evaluate import doubt_figures, evaluate
from muka_fast.evidence import RelativeMahalanobis
from muka_fast.files import write_beside_others
from muka_fast.pooled import classifier_layer

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
    from test_evidence import make_pool, restricted

    sup, _, topic = foreign_pool(seed=1)
    found = doubt_ranks(restricted(sup), "mutual_information")
    assert found.shape == (len(topic), 2) and found.dtype == np.float32
    share = sup.mutual_information / torch.tensor(sup.class_counts).log()
    np.testing.assert_allclose(found[:, 0], ranks(share.min(-1).values.numpy()), atol=1e-3)
    assert auroc(found[:, 1], topic < 0) > 0.65
    alone = restricted(make_pool(60, (3, 3, 1))[0])
    for column in doubt_ranks(alone, "mutual_information").T:  # the teacher of one class, never in doubt, is not asked
        assert len(np.unique(column)) == 60
    assert (doubt_ranks(restricted(make_pool(60, (1, 1))[0]), "mutual_information") == 0.5).all()
    with pytest.raises(UserError, match="needs two Monte-Carlo passes"):
        doubt_ranks(restricted(foreign_pool(mc=False)[0]), "mutual_information")
    sup.teachers[-1]["mc_samples"] = 1
    with pytest.raises(UserError, match=f"but teacher {sup.teachers[-1]['name']!r} was scored by one"):
        doubt_ranks(restricted(sup), "variance")


NAMES_OF_HEAD = ("mean", "form", "pull", "offset", "scale")


def fitted(seed=0, n=60, D=16, C=3, **options):
    """A head of random features of C classes, with ranks that rise with the distance from them."""
    rng = np.random.default_rng(seed)
    classes, far = rng.integers(0, C, n), rng.uniform(0.2, 3, n)
    features = (3 * rng.standard_normal((C, D))[classes] + far[:, None] * rng.standard_normal((n, D))).astype(np.float32)
    logits = (4 * np.eye(C)[classes] + rng.standard_normal((n, C))).astype(np.float32)
    return UncertaintyHead.fit(features, logits, ranks(far), **options), features, far


def test_doubt_rises_with_the_distance_and_has_the_mean_of_the_ranks():
    head, features, far = fitted()
    doubt = head(torch.from_numpy(features))
    assert ((doubt > 0) & (doubt < 1)).all() and doubt.mean() == pytest.approx(0.5, abs=1e-3)
    assert np.corrcoef(doubt, far)[0, 1] > 0.5 and head.tells
    assert (head(torch.from_numpy(30 * features)) > doubt.max()).all()
    assert head(torch.from_numpy(20 * features)).unique().numel() > 50  # still told apart far outside


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3])
def test_doubt_keeps_its_digits_where_classes_are_narrow(spread):
    """Against the same head in extended precision."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 20, 400)
    centres = rng.standard_normal((20, 64))
    far = rng.uniform(0.2, 3, 400)
    features = (centres[classes] + spread * far[:, None] * rng.standard_normal((400, 64))).astype(np.float32)
    head = UncertaintyHead.fit(features, (9 * np.eye(20)[classes]).astype(np.float32), ranks(far))
    mean, form, pull, offset, scale = (getattr(head, name).numpy().astype(np.longdouble) for name in NAMES_OF_HEAD)
    x = features.astype(np.longdouble) - mean
    distance = -((x @ form) * x).sum(1) - (x @ pull - offset).max(1)
    exact = 1 / (1 + np.exp(-(scale[2] * np.arcsinh((distance - scale[0]) / scale[1]) + scale[3])))
    assert np.abs(head(torch.from_numpy(features)).numpy() - exact).max() < 1e-5


@pytest.mark.filterwarnings("error")  # scikit-learn's, of a fit that does not converge
@pytest.mark.parametrize("count", [6, 60])
def test_no_other_slope_fits_the_ranks_better(count):
    """However few the texts: nothing draws it to zero."""
    distance = np.random.default_rng(count).standard_normal(count) * 5
    told = ranks(distance + np.arange(count) % 3)
    m, d, a, c = logistic_scale(distance, told)
    x = np.arcsinh((distance - m) / d)
    left = told - 1 / (1 + np.exp(-(a * x + c)))
    assert a > 0.1 and abs(left.sum()) < 1e-5 and abs(left @ x) < 1e-5


def test_ranks_that_fall_with_the_distance_give_one_doubt_for_all():
    distance = np.linspace(-3, 5, 40)
    for values, told in itertools.product((distance, distance**3), (ranks(-distance), np.full(40, 0.3), np.full(40, 0.5))):
        *_, a, c = logistic_scale(values, told)
        assert a == 0 and 1 / (1 + math.exp(-c)) == pytest.approx(told.mean())
    for same in (np.full(40, 7.0), 3e4 + 1e-3 * distance):  # to rounding
        *_, a, c = logistic_scale(same, ranks(distance))
        assert a == 0 and c == pytest.approx(0)
    _, features, far = fitted()
    head = UncertaintyHead.fit(features, np.zeros((60, 3), np.float32), ranks(-far))
    assert not head.tells and head(torch.from_numpy(features)).unique().numel() == 1


@given(st.integers(0, 2**16))
def test_a_head_hangs_on_the_texts_as_a_set_and_not_on_those_left_out(seed):
    rng = np.random.default_rng(seed)
    features, logits = rng.standard_normal((50, 6)).astype(np.float32), rng.standard_normal((50, 3)).astype(np.float32)
    told, counts, order = ranks(rng.standard_normal(50)), rng.integers(0, 2, 50), rng.permutation(50)
    counts[:4] = 1
    one = UncertaintyHead.fit(features, logits, told, counts)(torch.from_numpy(features))
    other = UncertaintyHead.fit(features[order], logits[order], told[order], counts[order])(torch.from_numpy(features))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    logits[counts == 0] *= 3  # what the Gaussians never saw
    torch.testing.assert_close(UncertaintyHead.fit(features, logits, told, counts)(torch.from_numpy(features)), one)


def test_the_feature_of_every_family_is_the_row_behind_the_logits(family, make_model, make_tokenizer, texts):
    tokenizer = make_tokenizer(family)
    inputs = dict(tokenizer(texts[:4], return_tensors="pt", padding=True, truncation=True, max_length=16))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    model = make_model(family, LABELS, tokenizer=tokenizer)
    with torch.inference_mode():
        found, logits = with_features(model)(inputs), model(**inputs).logits
        layer = classifier_layer(model)
        torch.testing.assert_close(layer(found[:, 3:]), logits)
        # What a text is padded with changes nothing.
        alone = {name: value[:1, : int(inputs["attention_mask"][0].sum())] for name, value in inputs.items()}
        torch.testing.assert_close(with_features(model)(alone)[0], found[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[:, :3], logits)


@pytest.mark.parametrize("num_labels", [32, 64])
def test_the_output_layer_is_behind_the_encoder(num_labels):
    """XLM-RoBERTa declares its classifier first; layers of the encoder may be as wide as there are labels."""
    config = transformers.XLMRobertaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=60, num_labels=num_labels
    )
    model = transformers.XLMRobertaForSequenceClassification(config)
    assert classifier_layer(model) is model.classifier.out_proj


def test_a_padding_token_inside_a_text_is_a_token(make_model):
    model = make_model("llama", LABELS)
    pad = model.config.pad_token_id
    ids = torch.tensor([[5, 7, pad, 9, 8, pad], [5, 7, 9, pad, pad, pad]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])}
    with torch.inference_mode():
        found, logits = with_features(model)(inputs), model(**inputs).logits
        torch.testing.assert_close(classifier_layer(model)(found[:, 3:]), logits)


# ---- beside the exported student ----


@pytest.fixture
def exported(tmp_path, make_model, make_tokenizer):
    """A student with a head, exported; the head."""
    model, tokenizer = make_model("bert", LABELS), make_tokenizer("bert")
    head = fitted(D=model.classifier.in_features)[0]
    export.save_student(model, tokenizer, tmp_path / "out", LABELS, export.Card(title="merged"))
    export.add_head(tmp_path / "out", head)
    return tmp_path / "out", model, head


def test_plain_transformers_never_sees_it_and_ours_reads_it_back(exported, texts):
    folder, model, head = exported
    classify = transformers.pipeline("text-classification", model=str(folder))
    answers = classify(texts[:6], truncation=True, max_length=32)
    found = muka_fast.Predictor(folder, max_length=32, token_budget=64).predict(texts[:6])
    again = UncertaintyHead.load(folder, model)
    assert all(torch.equal(getattr(again, field.name), getattr(head, field.name)) for field in dataclasses.fields(head))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text, answer, prediction in zip(texts, answers, found, strict=False):
        assert prediction.label == answer["label"] and prediction.probability == pytest.approx(answer["score"], abs=1e-5)
        inputs = tokenizer(text, truncation=True, max_length=32, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            expected = head(model.bert(**inputs).pooler_output).item()
        assert prediction.doubt == pytest.approx(expected, abs=1e-5)
    odd = [muka_fast.predict.Prediction("a", 0.5, 0.1)]
    (line,) = muka_fast.predict.lines(TextSet(["x\u2028y\x85z"], None, np.array([4]), "", "", 0), odd)
    assert line.splitlines() == [line.rstrip("\n")] and json.loads(line)["text"] == "x\u2028y\x85z"
    assert muka_fast.Predictor(folder).predict([]) == []
    predictor = muka_fast.Predictor(folder, max_length=32)
    assert predictor.predict(texts[0]) == predictor.predict(texts[:1])
    for other in ([None], [3], [["a"]]):
        with pytest.raises(UserError, match="takes a list of texts, found"):
            predictor.predict(other)
    with pytest.raises(UserError, match="--device gpu: must be auto"):
        muka_fast.Predictor(folder, device="gpu")


def test_a_student_without_head_tells_no_doubt(make_teacher, texts):
    assert all(found.doubt is None for found in muka_fast.Predictor(make_teacher("bert", LABELS)).predict(texts[:2]))


def rewrite(path, metadata=None, **changes):
    tensors = {name: value for name, value in (load_file(path) | changes).items() if value is not None}
    save_file(tensors, path, {"format": "muka_fast uncertainty head 2"} | (metadata or {}))


DAMAGE = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-3]), "cannot be read ("),
    "no header": (lambda path: path.write_bytes(b"x"), "cannot be read ("),
    "width": (lambda path: rewrite(path, form=torch.zeros(15, 15)), "another student's"),
    "classes": (lambda path: rewrite(path, pull=torch.zeros(16, 4), offset=torch.zeros(4)), "another student's"),
    "no class": (lambda path: rewrite(path, pull=torch.zeros(16, 0), offset=torch.zeros(0)), "another student's"),
    "scalar": (lambda path: rewrite(path, offset=torch.zeros(())), "another student's"),
    "name": (lambda path: rewrite(path, scale=None, other=torch.zeros(4)), "another student's"),
    "version": (lambda path: rewrite(path, {"format": "2"}), "no uncertainty head of this version"),
    "nan": (lambda path: rewrite(path, scale=torch.full((4,), math.nan)), "not finite fp32"),
    "type": (lambda path: rewrite(path, scale=torch.zeros(4, dtype=torch.float64)), "not finite fp32"),
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


def test_the_command_writes_one_object_per_text_and_overwrites_nothing_unasked(exported, texts, tmp_path, capsys):
    folder = exported[0]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *texts[:5]]))
    words = ["predict", "--model", str(folder), "--texts", str(tmp_path / "t.jsonl"), "--device", "cpu"]
    assert cli.main(words) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == texts[:5]
    assert muka_fast.Predictor(folder, device="cpu").predict("half a pair \ud83d")[0].label in LABELS
    assert all(row.keys() == {"row", "text", "label", "probability", "doubt"} for row in rows)
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5]  # the blank one is counted
    assert all(row["label"] in LABELS and 1 / 3 <= row["probability"] <= 1 and 0 <= row["doubt"] <= 1 for row in rows)
    out = tmp_path / "answers.jsonl"
    assert cli.main([*words, "--output", str(out)]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    before = out.read_bytes()
    assert cli.main([*words, "--output", str(out)]) == 2
    assert out.read_bytes() == before and "already there" in capsys.readouterr().err
    out.write_text("of another run")
    assert cli.main([*words, "--output", str(out), "--overwrite"]) == 0 and out.read_bytes() == before
    assert cli.main([*words, "--output", f"{out}.gz"]) == 2 and "leave out .gz" in capsys.readouterr().err
    assert cli.main([*words, "--output", f"{out}.CSV"]) == 2 and "not as .CSV: name it .jsonl" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.gz")) and not list(tmp_path.glob("*.CSV"))
    assert cli.main([*words, "--output", str(tmp_path), "--overwrite"]) == 2 and "name another" in capsys.readouterr().err
    for read in (tmp_path / "t.jsonl", folder / "config.json"):
        content = read.read_bytes()
        assert cli.main([*words, "--output", str(read), "--overwrite"]) == 2 and read.read_bytes() == content
        assert "would replace what this command reads" in capsys.readouterr().err
    assert cli.main([*words, "--output", str(tmp_path / "no" / "answers.jsonl")]) == 2 and "no folder" in capsys.readouterr().err
    assert cli.main([*words, "--output", str(tmp_path / ("x" * 250))]) == 2 and "File name too long" in capsys.readouterr().err
    (folder / FILE).unlink()
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    assert "no uncertainty head" in captured.err and all("doubt" not in json.loads(line) for line in captured.out.splitlines())


def test_the_command_answers_chunk_by_chunk(exported, texts, tmp_path, capsys, monkeypatch):
    """What a killed run had answered is there; a file is whole or not there."""
    (tmp_path / "t.txt").write_text("\n".join(texts[:10]))
    words = ["predict", "--model", str(exported[0]), "--texts", str(tmp_path / "t.txt"), "--device", "cpu"]
    assert cli.main(words) == 0
    whole = capsys.readouterr().out
    monkeypatch.setattr(predict, "CHUNK", 4)
    assert cli.main(words) == 0
    for ours, theirs in zip(capsys.readouterr().out.splitlines(), whole.splitlines(), strict=True):
        ours, theirs = json.loads(ours), json.loads(theirs)
        assert ours.keys() == theirs.keys() and all(ours[name] == theirs[name] for name in ("row", "text", "label"))
        assert ours["probability"] == pytest.approx(theirs["probability"]) and ours["doubt"] == pytest.approx(theirs["doubt"])
    forward, calls = predict.predict, []

    def interrupted(*given, **options):
        calls.append(options["example_ids"].tolist())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*given, **options)

    monkeypatch.setattr(predict, "predict", interrupted)
    assert cli.main(words) == 130 and len(capsys.readouterr().out.splitlines()) == 8
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    calls.clear()
    assert cli.main([*words, "--output", str(tmp_path / "answers.jsonl")]) == 130
    assert not [path for path in tmp_path.iterdir() if "answers" in path.name]


def test_a_run_that_is_ended_leaves_no_unfinished_file(exported, texts, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("\n".join(texts[:3]))
    words = ["predict", "--model", str(exported[0]), "--texts", str(tmp_path / "t.txt"), "--device", "cpu", "--output"]
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(predict, "predict", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        cli.main([*words, str(tmp_path / "answers.jsonl")])
    assert not [path for path in tmp_path.iterdir() if "answers" in path.name] and signal.getsignal(signal.SIGTERM) is before


def test_threads_that_share_a_predictor_get_their_own_answers(exported, texts):
    """And leave the model as it was; where one text is cut from far more, the tokenizer is asked otherwise for a moment."""
    predictor = muka_fast.Predictor(exported[0], device="cpu", max_length=8)
    texts = [*texts[:8], " ".join(texts * 4), *texts[8:]]
    expected = predictor.predict(texts)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: predictor.predict(texts[i % len(texts)]), range(10 * len(texts))))
    assert len({prediction.doubt for prediction in expected}) > len(texts) // 2
    for i, (prediction,) in enumerate(found):
        assert prediction.label == expected[i % len(texts)].label
        assert prediction.doubt == pytest.approx(expected[i % len(texts)].doubt, abs=1e-5)
    again = pickle.loads(pickle.dumps(predictor))
    assert again.predict(texts) == expected and copy.deepcopy(again).predict(texts) == expected


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


def test_answers_replace_nothing_but_what_they_may(exported, texts, tmp_path, capsys, monkeypatch):
    (tmp_path / "t.txt").write_text("\n".join(texts[:3]))
    out, link, neighbour = tmp_path / "answers.jsonl", tmp_path / "link.jsonl", tmp_path / "answers.jsonl.partial"
    words = ["predict", "--model", str(exported[0]), "--texts", str(tmp_path / "t.txt"), "--device", "cpu", "--output"]
    neighbour.write_text("mine")
    assert cli.main([*words, str(out)]) == 0 and neighbour.read_text() == "mine"
    link.symlink_to(out)
    expected = out.read_bytes()
    out.write_text("old")
    assert cli.main([*words, str(link), "--overwrite"]) == 0 and link.is_symlink() and out.read_bytes() == expected
    out.unlink()
    lines = predict.lines
    monkeypatch.setattr(predict, "lines", lambda *given: out.write_text("meanwhile") and lines(*given))
    capsys.readouterr()
    assert cli.main([*words, str(out)]) == 2 and out.read_text() == "meanwhile"
    told = capsys.readouterr().err
    assert "has appeared meanwhile" in told and Path(told.split(" is in ")[1].strip()).read_bytes() == expected


@pytest.mark.parametrize("replace", [False, True])
def test_answers_that_cannot_get_their_name_leave_everything_as_it_was(tmp_path, monkeypatch, replace):
    out = tmp_path / "answers.jsonl"
    if replace:
        out.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        write_beside_others(out, ["a line\n"], replace)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({out.name: "old"} if replace else {})


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


def test_certain_texts_count_most_in_the_head():
    rng = np.random.default_rng(0)
    features, logits = rng.standard_normal((50, 6)).astype(np.float32), 2 * rng.standard_normal((50, 3)).astype(np.float32)
    top = torch.softmax(torch.from_numpy(logits).double(), -1).amax(-1).numpy() ** 4
    head = UncertaintyHead.fit(features, logits, ranks(rng.standard_normal(50)))
    np.testing.assert_allclose(head.mean.numpy(), RelativeMahalanobis.fit(features, logits.argmax(1), top).mean, rtol=1e-5, atol=1e-6)


def test_the_target_of_the_head_is_the_mean_of_the_ranks():
    sup = make_supervision(n=60)
    space = space_of(sup, {"food": None})
    config = RunConfig(uncertainty_head=True, uncertainty="variance")
    expected = doubt_ranks(sup.restrict(space), "variance", 0).mean(1)
    np.testing.assert_allclose(fit_doubt.doubt_targets(config, sup.restrict(space)), expected)


def test_of_twenty_own_texts_one_may_be_refused():
    doubt, foreign = np.array([*range(20), 18.5]), np.arange(21) == 20
    assert false_positive_rate(doubt, foreign) == 0.0 and false_positive_rate(doubt - foreign, foreign) == 1.0


def test_figures_of_doubt_tell_wrong_answers_and_unknown_labels_apart():
    doubt, wrong, unknown = np.array([0.0, 1, 5, 2]), np.array([False, False, True, True]), np.array([False, False, False, True])
    found = doubt_figures(doubt, -doubt, wrong, unknown)
    assert found["uncertainty head"] == {"wrong_auroc": 1.0, "unknown_auroc": pytest.approx(2 / 3), "unknown_fpr95": 1.0}
    assert found["softmax"]["wrong_auroc"] == 0.0
