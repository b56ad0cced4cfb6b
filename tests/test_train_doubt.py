"""What the student learns besides, its uncertainty head, and texts that it does not learn from: whole runs."""

import json

import numpy as np
import pytest
import torch
from runs import SMOOTH_ADAM, largest_difference, losses, uncertainty_head, weights

from muka_fast import export, fit_doubt, train
from muka_fast.errors import UserError
from muka_fast.evidence import sample_rows


def test_the_uncertainty_head_hangs_on_no_layout_and_the_student_feels_nothing(go, world):
    options = {"student": str(world / "plain_student"), "uncertainty_head": True}
    whole = go("whole", ds=SMOOTH_ADAM, eval=str(world / "texts.jsonl"), **options)
    head = uncertainty_head(whole)
    assert set(whole.metrics["student"]["doubt"]) == {"uncertainty head", "softmax"}
    for number, layout in enumerate([{"train_micro_batch_size_per_gpu": 4}, {"zero_optimization": {"stage": 3}}]):
        other = go(f"layout{number}", ds=SMOOTH_ADAM | layout, **options)
        assert losses(other) == pytest.approx(losses(whole), rel=1e-5, abs=1e-8)
        found = uncertainty_head(other)
        torch.testing.assert_close(found["mean"], head["mean"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found["scale"], head["scale"], atol=1e-2, rtol=1e-2)
    alone = go("alone", ds=SMOOTH_ADAM, **options | {"uncertainty_head": False})
    assert largest_difference(weights(whole), weights(alone)) == 0 and losses(whole) == losses(alone)
    assert not (alone.output / "uncertainty_head.safetensors").exists()
    cards = [(result.output / "README.md").read_text() for result in (whole, alone)]
    assert ["uncertainty_head.safetensors" in card for card in cards] == [True, False]
    assert not any("Predictor" in card for card in cards)  # of these random teachers it tells nothing


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_with_an_uncertainty_head_resumes_bit_for_bit(go, stop_at, monkeypatch, stage):
    options = {"ds": {"zero_optimization": {"stage": stage}}, "uncertainty_head": True, "method": "dfa"}
    whole = go("whole", **options)
    stop_at(7)
    assert go("cut", **options).stopped
    monkeypatch.undo()
    with pytest.raises(UserError, match="uncertainty_head true -> false"):
        go("cut", resume=True, **options | {"uncertainty_head": False})
    with monkeypatch.context() as patch:  # killed between the student and its head
        patch.setattr(train, "fit_head", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            go("cut", resume=True, **options)
    assert not (whole.output.parent / "cut" / "uncertainty_head.safetensors").exists()
    resumed = go("cut", resume=True, **options)
    assert losses(resumed) == losses(whole) and largest_difference(weights(resumed), weights(whole)) == 0
    assert largest_difference(uncertainty_head(resumed), uncertainty_head(whole)) == 0


def test_the_weights_are_written_once_and_what_comes_later_is_repaired(go, world, monkeypatch):
    options, seen = {"uncertainty_head": True, "eval": str(world / "texts.jsonl"), "epochs": 1}, []

    def look(name, real):
        def call(config, output, *rest):
            state = (output / "model.safetensors").stat()
            seen.append((name, state.st_ino, state.st_mtime_ns, (output / "uncertainty_head.safetensors").exists()))
            return real(config, output, *rest)

        monkeypatch.setattr(train, name, call)

    look("fit_head", train.fit_head)
    look("evaluate_student", train.evaluate_student)
    whole = go("whole", **options)
    state, card = (whole.output / "model.safetensors").stat(), (whole.output / "README.md").read_text()
    written = (state.st_ino, state.st_mtime_ns)
    assert seen == [("fit_head", *written, False), ("evaluate_student", *written, True)]
    assert "macro" in card
    with monkeypatch.context() as patch:  # killed between the figures and the card that tells them
        patch.setattr(export, "replace_card", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            go("cut", **options)
    cut = whole.output.parent / "cut"
    assert "macro" not in (cut / "README.md").read_text() and json.loads((cut / "run.json").read_text())["state"] == "training"
    resumed = go("cut", resume=True, **options)
    assert (cut / "README.md").read_text().replace("cut", "whole") == card
    assert resumed.metrics["student"] | {"model": str(whole.output)} == whole.metrics["student"]
    assert largest_difference(weights(resumed), weights(whole)) == 0


def test_what_can_tell_nothing_says_so(go, world, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("muka_fast.fit_doubt.predict", lambda model, tokens, **_: torch.zeros(len(tokens), 5 + 32))
    few = {"texts": str(tmp_path / "few.txt"), "store": str(tmp_path / "store"), "coverage": True, "epochs": 1}
    (tmp_path / "few.txt").write_text("".join(f"text {i} of a few\n" for i in range(20)))
    go("few", **few, uncertainty_head=True)
    assert "every text gets the same doubt" in caplog.text
    assert "--coverage needs two teachers and more than 40 texts" in caplog.text
    caplog.clear()
    go("one", **few, teachers=[str(world / "news")])
    assert "--coverage needs two teachers and more than 40 texts" in caplog.text


def test_texts_that_belong_to_nobody_are_told_and_not_learnt_from(go, monkeypatch, caplog):
    nobody = lambda sup, weights, neutral, seed: (torch.arange(len(sup)) % 5 == 0).float().numpy()
    monkeypatch.setattr(train, "nobody_weights", nobody)
    caplog.set_level("WARNING", logger="muka_fast")
    result = go("holes", method="muka-evidence", coverage=True, uncertainty_head=True, epochs=1)
    assert "muka-evidence: 15 of 75 texts belong to no teacher" in caplog.text
    record = json.loads((result.output / "run.json").read_text())
    assert record["coverage"]["texts"] == 15 and record["coverage"]["share"] == pytest.approx(0.2)
    assert [row["example_id"] % 5 in (0, 1) for row in record["coverage"]["examples"]] == [True] * 6  # a blank row comes fourth
    assert "| texts that belong to no teacher, left out | 15 |" in (result.output / "README.md").read_text()
    monkeypatch.setattr(train, "nobody_weights", lambda sup, *_: torch.zeros(len(sup)).numpy())
    again = go("again", method="muka-evidence", coverage=True, epochs=1)
    assert json.loads((again.output / "run.json").read_text())["coverage"] == {"texts": 0, "share": 0.0, "examples": []}
    plain = go("plain", method="muka-evidence", epochs=1)
    assert largest_difference(weights(again), weights(plain)) == 0 and largest_difference(weights(result), weights(plain)) > 0


def test_the_head_is_fitted_on_texts_as_long_as_the_student_read(go, monkeypatch):
    seen, real = [], fit_doubt.tokenize
    monkeypatch.setattr(fit_doubt, "tokenize", lambda tokenizer, texts, most: seen.append(most) or real(tokenizer, texts, most))
    go("run", uncertainty_head=True, epochs=1, max_length=12)
    assert seen == [12]


def fitted_with(go, monkeypatch, **more):
    seen, real = [], fit_doubt.UncertaintyHead.fit
    monkeypatch.setattr(fit_doubt.UncertaintyHead, "fit", classmethod(lambda cls, *given: seen.append(given) or real(*given)))
    go("run", uncertainty_head=True, epochs=1, **more)
    return seen[0]


def test_of_a_large_pool_each_text_has_its_own_doubt_and_nobodys_do_not_count(go, monkeypatch):
    nobody = lambda sup, weights, neutral, seed: (torch.arange(len(sup)) % 5 == 0).float().numpy()
    monkeypatch.setattr(train, "nobody_weights", nobody)
    monkeypatch.setattr(fit_doubt, "SAMPLE", 40)
    told, real = [], fit_doubt.doubt_targets
    monkeypatch.setattr(train, "doubt_targets", lambda *given: told.append(real(*given)) or told[0])
    _, logits, doubt, counts = fitted_with(go, monkeypatch, method="muka-evidence", coverage=True)
    ids = np.arange(76)
    rows = sample_rows(np.delete(ids, 3), 0, 40)
    assert len(logits) == 40
    np.testing.assert_array_equal(doubt, told[0][rows])
    np.testing.assert_array_equal(counts, rows % 5 != 0)
