"""The pure parts of bench/training.py: its tables and the processes that it starts. The rest needs a quiet machine."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "bench"))
    return importlib.import_module("training")


def test_tables_show_the_parts_that_were_measured(training):
    args = training.parse_arguments(["--encoder", "enc", "--train", "set/train.jsonl", "--eval", "e", "--texts", "7", "--rounds", "3"])
    rows = {"ours": (30.0, 0.5), "trainer": (20.0, 0.25), "grouped": (25.0, 0.5)}
    found = {name: {"texts_per_s": speed, "accuracy": accuracy} for name, (speed, accuracy) in rows.items()}
    results = {"trainer": {"rows": found}, "memory": {"processes": 2, "peak_bytes": {"0": [3 << 20, 5 << 20]}}}
    text = training.markdown(args, results)
    assert "| Trainer | 20.0 | 1.50 x | 25.0 |" in text and "7 texts" in text and "| 0 | 3 | 5 |" in text
    assert "Scoring" not in text and "first step" not in text


def test_processes_share_the_cores_and_a_failure_is_not_a_result(training, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os; print(os.environ['RANK'], os.environ['OMP_NUM_THREADS'], bytes(30_000_000)[-1])")
    told, peaks = training.finish(training.launch([str(script)], 2))
    assert told.split() == ["0", str(max(1, training.CORES // 2)), "0"]
    assert len(peaks) == 2 and min(peaks) > 30_000_000
    script.write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="exit codes"):
        training.finish(training.launch([str(script)]))
