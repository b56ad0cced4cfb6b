"""The tuning table: entries are candidates, launches take what is chosen, and bench/tune.py writes what it says."""

import importlib.util
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
                assert entry in tuning.CANDIDATES[op][shape]  # which tests/ops/test_aot.py compiles
    assert tuning.source("sm_00") == "chosen without a card"


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


def test_every_class_that_is_timed_has_a_choice(tune):
    for op, shape, *_ in tune.WORK:
        assert len(tuning.CANDIDATES[op][shape]) > 1
