"""Epochs and learning rate where nobody says: the rule, and that every command follows it and records it."""

import json

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from runs import losses

from muka_fast import runinfo, teach
from muka_fast.config import TeachConfig
from muka_fast.errors import UserError
from muka_fast.recipe import default_epochs, default_learning_rate

RATE = default_learning_rate(16)  # of the models of runs.py


@given(st.integers(1, 10**7), st.integers(1, 4096))
@example(111, 1)  # full batches alone: of one step more an epoch, nine epochs would do
def test_no_fewer_epochs_make_a_thousand_steps(num_texts, batch_size):
    epochs, steps_per_epoch = default_epochs(num_texts, batch_size), -(-num_texts // batch_size)
    assert 3 <= epochs <= 20
    assert epochs == 20 or epochs * steps_per_epoch >= 1000
    assert epochs == 3 or (epochs - 1) * steps_per_epoch < 1000


def test_the_rule_in_figures():
    assert [default_epochs(texts, 16) for texts in (1, 600, 2000, 10_000, 10**7)] == [20, 20, 8, 3, 3]
    assert [default_learning_rate(width) for width in (384, 768, 1024, 4096)] == [6e-5, 3e-5, 2.3e-5, 5.6e-6]


def test_a_run_follows_the_rule_records_what_it_took_and_is_repeated_by_it(go, tmp_path):
    first = go("run", epochs=None, learning_rate=None)
    record = json.loads((first.output / "run.json").read_text())
    assert (record["config"]["epochs"], record["config"]["learning_rate"]) == (20, RATE)
    steps = [json.loads(line) for line in (first.output / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 20 * 5 and max(line["lr"] for line in steps) == RATE
    written = yaml.safe_load((first.output / "run.yaml").read_text())
    assert (written["epochs"], written["learning_rate"]) == (20, RATE)  # also where the rule changes one day
    assert losses(go("named", epochs=20, learning_rate=written["learning_rate"])) == losses(first)
    assert "| epochs | 20 |" in (first.output / "README.md").read_text()
    for options in ({"epochs": None, "learning_rate": None}, {"epochs": 20, "learning_rate": written["learning_rate"]}):
        assert go("run", resume=True, **options).metrics == first.metrics
    with pytest.raises(UserError, match=r"epochs 20 -> 3.*--overwrite"):
        go("run", resume=True, learning_rate=None)


def test_a_stopped_run_continues_by_the_rule_only_if_it_was_begun_by_it(go, stop_at, monkeypatch):
    stop_at(3)
    go("cut", learning_rate=None)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"epochs 3 -> 20.*--overwrite"):
        go("cut", resume=True, epochs=None, learning_rate=None)
    assert len(losses(go("cut", resume=True, learning_rate=None))) == 15


def test_the_rate_of_the_ds_config_stands(go):
    found = go("run", epochs=1, learning_rate=None, ds={"optimizer": {"params": {"lr": 1e-4}}})
    assert runinfo.read_run(found.output)["config"]["learning_rate"] == 1e-4


def test_a_teacher_follows_the_rule(world, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(teach, "fine_tune", lambda *given: used.append(given[-1]) or 0.5)
    options = {"encoder": world / "student", "train": world / "texts.jsonl", "output": tmp_path / "teacher"}
    for more in ({}, {"epochs": 7, "learning_rate": 1e-3, "overwrite": True}):
        record = teach.teach(TeachConfig(**{name: str(value) for name, value in options.items()}, **more))
        told = (record["options"]["epochs"], record["options"]["learning_rate"])
        assert told == (used[-1].epochs, used[-1].learning_rate)
    assert [(recipe.epochs, recipe.learning_rate) for recipe in used] == [(20, RATE), (7, 1e-3)]
