"""bench/gpu.sh rehearsed on the CPU, so that a chance at a GPU is not lost to a fault of the script."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def gpu_script(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "bench/gpu.sh", *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--fast"], "unknown option --fast"),
        (["--stage"], "--stage needs a value"),
        (["--stage", "build,corect"], "unknown stage corect"),
        (["--stage", "matrix", "--data", "data"], "the stage matrix needs --data and --encoders"),
        (["--seconds", "ten"], "--seconds ten is no number"),
    ],
)
def test_what_it_does_not_know_is_refused(words, told, tmp_path):
    done = gpu_script("--out", str(tmp_path / "out"), *words)
    assert done.returncode == 2 and not done.stdout
    assert told in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_tuned_table_comes_back_and_is_not_lost(tmp_path):
    """With a `python` that does nothing: in the archive of the stage that tunes, and left alone by others."""
    python, out, archive = tmp_path / "python", tmp_path / "out", tmp_path / "all.tar.gz"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python)}
    words = ["bash", "bench/gpu.sh", "--out", str(out), "--archive", str(archive), "--stage"]
    subprocess.run([*words, "build,tune"], cwd=ROOT, env=env, check=True, capture_output=True, timeout=60)
    with tarfile.open(archive) as packed:
        assert "./tuning.py" in packed.getnames()
    (out / "tuning.py").write_text("tuned")
    subprocess.run([*words, "build,ceilings"], cwd=ROOT, env=env, check=True, capture_output=True, timeout=60)
    assert (out / "tuning.py").read_text() == "tuned"


def is_running(pid: str) -> bool:
    """Not gone, and not a zombie that nobody has waited for."""
    try:
        return "State:\tZ" not in Path("/proc", pid, "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_it_ends_in_time_and_what_is_cut_off_takes_its_own_with_it(tmp_path):
    """A stage that sleeps, and has started a process that does; `python` is a script that does so."""
    python, mark = tmp_path / "python", tmp_path / "child"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    python.write_text(f"#!{sys.executable}\nimport subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\n")
    python.chmod(0o755)
    archive = tmp_path / "all.tar.gz"
    words = ["--stage", "ceilings,tune", "--dry-run", "--seconds", "30", "--out", str(tmp_path / "out"), "--archive", str(archive)]
    env = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(["bash", "bench/gpu.sh", *words], cwd=ROOT, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 1
    rows = [row.split()[:3] for row in done.stdout.split("--- bench/gpu.sh")[1].splitlines()[1:]]
    assert rows == [["ceilings", "rc", "124"], ["tune", "rc", "none"]]
    deadline = time.monotonic() + 10  # it has been told to end: it sleeps for ten minutes else
    while is_running(mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(mark.read_text())
    with tarfile.open(archive) as packed:
        assert "./gpu_ceilings.log" in packed.getnames()


def test_a_failing_stage_is_reported_and_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON", "false")
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "--dry-run", "--stage", "correct,ceilings", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert [row.split()[:3] for row in done.stdout.split("--- bench/gpu.sh")[1].splitlines()[1:]] == [
        ["correct", "rc", "1"],
        ["ceilings", "rc", "1"],
    ]


def test_wheels_that_do_not_install_end_it(tmp_path):
    done = gpu_script("--dry-run", "--stage", "ceilings", "--out", str(tmp_path / "out"), "--wheels", str(tmp_path))
    assert done.returncode == 1
    assert "---" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device, on which everything would run")
def test_without_a_device_nothing_is_measured(tmp_path):
    done = gpu_script("--stage", "ceilings", "--out", str(tmp_path))
    assert done.returncode == 1 and "torch finds no usable CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_results_lie_where_they_were_asked_for_and_in_one_archive(tmp_path):
    out, archive = tmp_path / "out", tmp_path / "all.tar.gz"
    done = gpu_script("--dry-run", "--stage", "ceilings", "--out", str(out), "--archive", str(archive))
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(archive) as packed:
        assert {"./ceilings.json", "./gpu_ceilings.log", "./gpu_stages.txt"} <= set(packed.getnames())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_dry_run(tmp_path):
    stages = ["correct", "sanitize", "ceilings", "tune", "ops", "predicted", "launches", "amalgamation", "end_to_end"]
    stages += ["train", "large", "matrix"]
    done = gpu_script("--dry-run", "--stage", ",".join(stages), "--out", str(tmp_path), "--", "--methods", "vkd", "oracle")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for name in ("ceilings", "tuning", "throughput", "launches", "amalgamation", "step", "student", "teacher"):
        assert json.loads((tmp_path / f"{name}.json").read_text())
    assert json.loads((tmp_path / "amalgamation_end_to_end.json").read_text())[0]["end_to_end_speedup"] > 0
    rows = done.stdout.split("--- bench/gpu.sh")[1].splitlines()[1:]
    runs = [name for name in stages for _ in range(2 if name == "train" else 1)]
    assert [row.split()[:2] for row in rows] == [[name, "ok"] for name in runs]
    assert list(tmp_path.glob("paper_quick_*.md"))
