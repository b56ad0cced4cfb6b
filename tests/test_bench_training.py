"""bench/training.py, student.py, teacher.py, step.py and the like: tables, processes, folders, bad arguments. The rest needs quiet."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig

import muka_fast
from muka_fast import fused_layers as fused
from muka_fast import training_layers
from muka_fast.errors import UserError
from muka_fast.train import RunResult

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    """bench("student") -> the module bench/student.py."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def training(bench):
    return bench("training")


@pytest.fixture
def refusal(bench, monkeypatch, capsys):
    """refusal("student", option, ...) -> what the script says of bad arguments, after its exit code is seen to be 2."""

    def run(name, *options):
        module = bench(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
        try:
            code = bench("environment").command(module.main)
        except SystemExit as end:  # argparse's
            code = end.code
        assert code == 2
        *usage, told = capsys.readouterr().err.splitlines()
        assert told.startswith(f"{name}.py: error: ") and not any("Traceback" in line for line in usage)
        return told

    return run


# ---- training.py ----


def test_tables_show_the_parts_that_were_measured(training):
    args = training.parse_arguments(["--encoder", "enc", "--train", "s/train.jsonl", "--eval", "e", "--texts", "60", "--rounds", "3"])
    # A disturbance hits a whole round: ours is faster by 1.5, 2 and 2, of the medians by 2.5.
    seconds = {"ours": [2.0, 8.0, 1.0], "trainer": [3.0, 16.0, 5.0], "grouped": [3.0, 16.0, 2.0]}
    found = training.compared({name: {"seconds": values, "accuracy": [0.25, 0.5, 0.25]} for name, values in seconds.items()}, 60)
    assert found["rows"]["ours"]["seconds"] == [2.0, 8.0, 1.0]
    results = {"trainer": found, "memory": {"processes": 2, "peak_bytes": {"0": [3 << 20, 5 << 20]}}}
    text = training.markdown(args, results)
    assert "| Trainer | 12.0 | 2.00 x | 25.0 |" in text and "60 texts" in text and "| 0 | 3 | 5 |" in text
    assert "Scoring" not in text and "first step" not in text


def test_processes_share_the_cores_and_a_failure_is_not_a_result(training, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os; print(os.environ['RANK'], os.environ['OMP_NUM_THREADS'])")
    told = training.finish(training.launch([str(script)], 2))
    assert [line.split() for line in told] == [[rank, str(max(1, training.usable_cores() // 2))] for rank in "01"]
    script.write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="exit codes"):
        training.finish(training.launch([str(script)]))


def test_the_peak_of_a_run_is_its_own(training, monkeypatch, tmp_path):
    """Not that of the process that starts it, which Linux counts into ru_maxrss."""
    monkeypatch.setattr(muka_fast.train, "script", lambda options: 0)
    monkeypatch.setattr(training, "largest_resident_bytes", lambda: 7)
    assert training.work_train(argparse.Namespace(options=[])) == {"peak_bytes": 7}
    args = training.parse_arguments(["--encoder", "e", "--train", "t", "--eval", "e", "--workdir", str(tmp_path)])
    started = []
    monkeypatch.setattr(training, "launch", lambda command, processes: started.append(command) or [None] * processes)
    monkeypatch.setattr(training, "finish", lambda runs: ['log\n{"peak_bytes": 5}', '{"peak_bytes": 6}'])
    assert training.memory_part(args, ["one"])["peak_bytes"] == {str(stage): [5, 6] for stage in range(4)}
    given = training.parse_arguments(started[0][1:])  # as the process of its own reads it
    assert given.work == "train" and given.options[-2:] == ["--teachers", "one"] and given.options.count("--store") == 1


def test_a_folder_of_somebody_else_stays(training, refusal, tmp_path):
    mine, texts = tmp_path / "mine", tmp_path / "texts.jsonl"
    mine.mkdir()
    (mine / "precious").write_text("x")
    given = ["--encoder", str(tmp_path / "encoder"), "--eval", str(texts), "--workdir", str(mine), "--train"]
    assert "nope.jsonl" in refusal("training", *given, str(tmp_path / "nope.jsonl"))
    texts.write_text('{"text": "a", "label": "b"}\n')
    assert "holds no config.json" in refusal("training", *given, str(texts))
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text("{}")
    assert "is not of this benchmark" in refusal("training", *given, str(texts))
    assert (mine / "precious").read_text() == "x"
    for _ in range(2):  # its own, and one that is empty or not there yet
        training.renew(tmp_path / "new")
        (tmp_path / "new" / "old").touch()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [training.MARKER, "old"]


# ---- student.py, teacher.py, step.py ----


def test_other_options_have_another_folder(bench, tmp_path):
    """And the same one the same: what lies there is not made anew. gpu.sh copies the texts into the work folder."""
    synthetic = bench("synthetic")
    for name in ("pool", "eval"):
        rows = [{"text": f"the text {i} of {name}", "label": "ab"[i % 2]} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = synthetic.made_encoder(tmp_path, "toy", 30)
    assert "the text 29 of pool" in (folder / "pool.jsonl").read_text().splitlines()[-1]
    weights = (folder / "encoder" / "model.safetensors").stat().st_mtime_ns
    assert synthetic.made_encoder(tmp_path, "toy", 30) == folder
    assert (folder / "encoder" / "model.safetensors").stat().st_mtime_ns == weights
    others = [synthetic.made_encoder(tmp_path, "toy", 40), synthetic.made_encoder(tmp_path, "small", 30)]
    sizes = [json.loads((path / "encoder" / "config.json").read_text())["hidden_size"] for path in (folder, *others)]
    assert len({folder, *others}) == 3 and sizes == [32, 32, 384]


def test_a_stopped_student_has_no_speed(bench, monkeypatch, tmp_path):
    student = bench("student")
    monkeypatch.setattr(muka_fast, "amalgamate", lambda **options: RunResult(Path(options["output"]), stopped=True))
    args = argparse.Namespace(precision="fp32", steps=1, batch_size=[1], max_length=8, device="cpu")
    with pytest.raises(SystemExit, match="stopped"):
        student.work(args, tmp_path, "0", 1)


def test_a_row_of_a_teacher_that_fails_loses_no_other(bench, monkeypatch, capsys, tmp_path):
    teacher, shown = bench("teacher"), []

    def measure(args, folder, scope, precision):
        if scope == "last:2":
            raise SystemExit("no memory")
        return {"scope": scope, "parameters": 1}

    monkeypatch.setattr(teacher, "measure", measure)
    monkeypatch.setattr(teacher, "prepare", lambda args, folder: folder)
    monkeypatch.setattr(teacher, "show", lambda stem, rows, *more: shown.append([row["scope"] for row in rows]))
    monkeypatch.setattr(teacher, "page", lambda args, rows: "")
    monkeypatch.setattr(sys, "argv", ["teacher.py", "--size", "toy", "--scopes", "last:1", "last:2", "last:3", "--device", "cpu"])
    assert teacher.main() == 1
    assert shown == [["last:1"], ["last:1", "last:3"]] and "no memory" in capsys.readouterr().err


@pytest.mark.parametrize("error", [0.0, 0.5])
def test_fused_layers_that_are_wrong_are_not_timed(bench, monkeypatch, capsys, error):
    step, original, calls = bench("step"), fused.residual_norm, []
    for module in (fused, training_layers):
        monkeypatch.setattr(module, "is_gpu", lambda device: True)
    monkeypatch.setattr(fused, "takes", lambda *states: True)
    op = lambda product, *more, **options: calls.append(options["p"]) or original((1 + error) * product, *more, **options)
    monkeypatch.setattr(fused, "residual_norm", op)
    args = argparse.Namespace(device="cpu", precision="fp32", length=8)
    config = BertConfig(**step.shape_of("toy", step.VOCABULARY), num_labels=step.CLASSES)
    step.init_distributed("cpu")
    assert step.fused_as_plain(args, config, 4) == (error == 0)
    assert ("they are not timed" in capsys.readouterr().err) == (error > 0)
    assert calls and not any(calls) and config.hidden_dropout_prob == 0.1


# ---- bad arguments ----


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("student", "--steps 0", "1 or more"),
        ("student", "--json no/such/folder.json", "there is no folder"),
        ("teacher", "--size toy --scopes last:4", "last:1 to last:3"),
        ("teacher", "--texts 0", "1 or more"),
        ("teacher", "--device tpu", "cpu or cuda"),
        ("step", "--length 0", "1 or more"),
        ("step", "--size toy --device cpu --precision fp16 --batch_size 1", "--precision"),
        ("selection", "--texts 0", "1 or more"),
        ("ceilings", "--json no/such/folder.json", "there is no folder"),
        ("launches", "--scopes nope", "--scopes nope: must be all"),
        ("launches", "--repetitions 0", "1 or more"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_made(refusal, name, options, told):
    assert told in refusal(name, *options.split())


@pytest.mark.parametrize("name", ["fetch_encoders", "fetch_wheels"])
def test_a_fetch_without_a_folder(name):
    done = subprocess.run(["bash", str(BENCH / f"{name}.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and done.stderr.count("\n") == 1


def test_only_results_of_that_machine_and_dtype_stand_beside_a_prediction(bench, refusal, tmp_path):
    predict = bench("predict")
    row = {"op": "mc_head", "shape": "B1", "impl": "ours", "median_ms": 2.0, "dtype": "float32"}

    def kept(gpu, **more):
        path = tmp_path / "throughput.json"
        path.write_text(json.dumps({"environment": {"gpu": gpu}, "results": {"rows": [row | more]}}))
        return path

    assert predict.measured_ms(kept("NVIDIA H200"), "h200", "float32") == {("mc_head", "B1"): 2.0}
    half = {"dtype": "bfloat16"}
    for gpu, more, told in ((None, {}, "on a CPU"), ("NVIDIA GH200 480GB", {}, "GH200"), ("NVIDIA H200", half, "--dtype")):
        with pytest.raises(UserError, match=told):
            predict.measured_ms(kept(gpu, **more), "h200", "float32")
    out = ["--out", str(tmp_path)]
    assert "No such file" in refusal("predict", *out, "--measured", str(tmp_path / "nope.json"))
    (tmp_path / "figures.json").write_text("[1]")
    assert "is no result of bench/throughput.py" in refusal("predict", *out, "--measured", str(tmp_path / "figures.json"))
    assert not list(tmp_path.glob("*.md"))
    assert "--out" in refusal("predict", "--out", str(tmp_path / "figures.json"))
