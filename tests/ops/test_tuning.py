"""The tuning table: entries are candidates, launches take what is chosen, and bench/tune.py writes what it says."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from muka_fast.ops import tuning

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def tune(monkeypatch):
    """bench/tune.py as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("tune", BENCH / "tune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("environment", "registry", "timing"):
        sys.modules.pop(name, None)


def test_what_was_measured_is_a_candidate_and_has_a_source():
    assert set(tuning.MEASURED) == set(tuning.SOURCES)
    for ops in tuning.MEASURED.values():
        for op, shapes in ops.items():
            for shape, entry in shapes.items():
                assert entry in tuning.CANDIDATES[op][shape]


def test_an_architecture_takes_what_it_measured_and_else_the_default(monkeypatch):
    device, (default, other, *_) = torch.device("cpu"), tuning.CANDIDATES["repeat_dropout"]["any"]
    assert tuning.choose("repeat_dropout", "any", device) == default
    monkeypatch.setattr(tuning, "MEASURED", {"none": {"repeat_dropout": {"any": other}}})
    assert tuning.choose("repeat_dropout", "any", device) == other
    with tuning.trying("repeat_dropout", "any", default):
        assert tuning.choose("repeat_dropout", "any", device) == default
    assert tuning.choose("repeat_dropout", "any", device) == other


def test_the_default_stays_where_nothing_is_clearly_faster(tune):
    assert tune.best({(1,): 1.0, (2,): 0.99}, (1,)) == (1,)
    assert tune.best({(1,): 1.0, (2,): 0.90, (3,): 0.95}, (1,)) == (2,)
    assert tune.best({(2,): 5.0}, (1,)) == (2,)  # the default was wrong, hence not timed


def test_the_written_table_reads_as_what_was_found(tune):
    text = tune.FILE.read_text()
    once = tune.with_table(text, "sm_90", {"repeat_dropout": {"any": (256, 8)}}, "a card's figures")
    twice = tune.with_table(once, "sm_90", {"repeat_dropout": {"any": (256, 4)}}, "another's")
    names: dict = {}
    exec(compile(twice, "tuning.py", "exec"), names)
    assert names["MEASURED"]["sm_90"]["repeat_dropout"]["any"] == (256, 4) and names["SOURCES"]["sm_90"] == "another's"
    assert names["CANDIDATES"] == tuning.CANDIDATES and twice.count("MEASURED: dict") == 1


def test_what_was_measured_before_stays(tune, monkeypatch):
    monkeypatch.setattr(tuning, "MEASURED", {"sm_90": {"mc_statistics": {"64": (16, 2)}, "repeat_dropout": {"any": (256, 4)}}})
    text, names = tune.with_table(tune.FILE.read_text(), "sm_90", {"mc_statistics": {"256": (16, 8)}}, ""), {}
    exec(compile(text, "tuning.py", "exec"), names)
    assert names["MEASURED"]["sm_90"] == {"mc_statistics": {"64": (16, 2), "256": (16, 8)}, "repeat_dropout": {"any": (256, 4)}}


def test_a_run_that_is_cut_off_keeps_what_it_has_measured(tune, monkeypatch, tmp_path):
    """The second class of shape ends it."""
    file, table = tmp_path / "tuning.json", tmp_path / "tuning.py"
    table.write_text(tune.FILE.read_text())
    results = iter([{(16, 16, 4): 2.0, (32, 16, 4): 1.0}])
    monkeypatch.setattr(tune, "FILE", table)
    monkeypatch.setattr(tuning, "MEASURED", {"sm_90": {"packed_attention": {"32 bit d32": (64, 32, 4, 1)}}})
    monkeypatch.setattr(tune, "time_candidates", lambda *given: next(results))
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "environment", lambda device: {"gpu": "a card"})
    monkeypatch.setattr(sys, "argv", ["tune.py", "--toy", "--device", "cpu", "--json", str(file)])
    args = tune.parse_arguments()
    args.write = True
    monkeypatch.setattr(tune, "parse_arguments", lambda: args)
    with pytest.raises(StopIteration):
        tune.main()
    assert [(row["entry"], row["taken"]) for row in json.loads(file.read_text())] == [([16, 16, 4], False), ([32, 16, 4], True)]
    names: dict = {}
    exec(compile(table.read_text(), "tuning.py", "exec"), names)
    assert names["MEASURED"]["sm_90"] == {"packed_attention": {"32 bit d32": (64, 32, 4, 1), "32 bit d64 masked": (32, 16, 4)}}
    assert "a card" in names["SOURCES"]["sm_90"]


def test_every_class_that_is_timed_has_a_choice(tune):
    for op, shape, *_ in tune.WORK:
        assert len(tuning.CANDIDATES[op][shape]) > 1
