"""bench/timing.py, throughput.py and ceilings.py without a GPU: what is timed there is what they say."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
COUNTED = """
import torch
from ceilings import CALLS, P, count_lanes_kernel
from muka_fast.ops import philox, reference

counts = torch.empty(3, dtype=torch.int32)
count_lanes_kernel[(3,)](counts, 7, 0, 0, philox.mask_parameters(P)[0], 5, CALLS=CALLS)
ones, ids, zeros = torch.ones(3, CALLS * 8), torch.arange(3), torch.zeros(3, dtype=torch.int64)
assert counts.tolist() == reference.repeat_dropout_ref(ones, 5, P, 7, 0, ids, zeros).count_nonzero((0, 2)).tolist()
"""


@pytest.fixture
def bench(monkeypatch):
    """bench("timing") -> the module bench/timing.py."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


class Card:
    """A device whose waits end after as many calls of the host as they have cycles for."""

    def __init__(self, monkeypatch, cycles_a_call):
        self.waits, self.called, self.cycles_a_call = [], 0, cycles_a_call
        card = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            record = synchronize = lambda self: None

            def query(self):
                return card.called * card.cycles_a_call > card.waits[-1]

            def elapsed_time(self, stop):
                return 1e3 * card.called

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)

    def sleep(self, cycles):
        self.waits.append(cycles)
        self.called = 0

    def run(self):
        self.called += 1


def test_a_wait_of_the_device_covers_all_launches(bench, monkeypatch):
    timing = bench("timing")
    for cycles_a_call, waits in ((1e3, 1), (1e5, 2), (1e6, 3), (5e6, 4), (1e8, 4)):  # the last is never covered
        card = Card(monkeypatch, cycles_a_call)
        assert timing.seconds_per_call(card.run, "cuda", 20) == 1.0
        assert card.waits == list(timing.WAITS[:waits])


def test_a_gpu_is_given_few_calls_at_a_time(bench, monkeypatch):
    timing, calls = bench("timing"), []
    monkeypatch.setattr(timing, "seconds_per_call", lambda run, device, count: calls.append((device, count)) or 1e-6)
    for device in ("cpu", "cuda"):
        timing.interleaved({"one": lambda: None}, device, 0)
    assert max(count for device, count in calls if device == "cuda") == 50
    assert max(count for device, count in calls if device == "cpu") > 900


def test_no_share_of_copy_bandwidth_for_what_the_cache_holds(bench):
    throughput = bench("throughput")
    case = next(case for case in throughput.CASES if case.op == "repeat_dropout" and case.toy)
    args = argparse.Namespace(device="cpu", dtype="float32", toy=True, compare="ours", threads=1)
    rates = {"copy_bytes_per_s": 1e10, "gemm_flops_per_s": 1e11}
    for more, shown in (({}, " % |"), ({"l2_bytes": 100}, " % |"), ({"l2_bytes": 50e6}, "| in L2 |")):
        rows = throughput.run_case(case, args, rates | more, cores=1)
        assert all((row["share_of_limit"] is None) == (shown == "| in L2 |") for row in rows)
        assert shown in throughput.markdown(rows, "")


def test_a_result_of_a_card_names_its_driver_and_its_host(bench):
    environment = bench("environment")
    env = environment.environment() | {"gpu": "NVIDIA H200", "driver": "580.1", "cpu": "EPYC"}
    assert "on NVIDIA H200 (driver 580.1) beside EPYC, " in environment.environment_lines(env)
    assert torch.__version__ in environment.environment_lines(env)


@pytest.mark.parametrize(("op", "shape"), [("residual_norm", (30, 40)), ("self_attention", (4, 9, 2)), ("adamw", (2, 8))])
def test_the_check_of_an_op_for_training_finds_what_is_off(bench, monkeypatch, op, shape):
    """Here on a CPU, where these are not timed."""
    registry = bench("registry")
    build = next(case.build for case in registry.CASES if case.op == op)
    assert build(shape, torch.float32, "cpu").check() == ""
    definition = getattr(registry.reference, f"{op}_ref")
    monkeypatch.setattr(registry.reference, f"{op}_ref", lambda *given: definition(*given) * (1 + 1e-3))
    assert build(shape, torch.float32, "cpu").check() != ""


def test_all_threads_are_not_compared_with_one(bench):
    throughput = bench("throughput")
    case = next(case for case in throughput.CASES if case.op == "repeat_dropout" and case.toy)
    args = argparse.Namespace(device="cpu", dtype="float32", toy=True, compare="ours,eager", threads=1)
    before = torch.get_num_threads()
    try:
        rows = throughput.run_case(case, args, {"copy_bytes_per_s": 1e10, "gemm_flops_per_s": 1e11}, cores=2)
    finally:
        torch.set_num_threads(before)
    given = {row["impl"]: (row["ratio_vs_eager"] is not None, row["share_of_limit"] is not None) for row in rows}
    assert given == {"ours": (True, True), "eager": (True, True), "ours, 2 threads": (False, False)}


def test_an_op_that_fails_leaves_the_others_their_time(bench, monkeypatch, tmp_path, capsys):
    throughput = bench("throughput")
    good = next(case for case in throughput.CASES if case.op == "repeat_dropout" and case.toy)

    def broken(*given):
        raise ValueError("out of resources")

    monkeypatch.setattr(throughput, "CASES", [good._replace(build=broken), good._replace(shape=(*good.shape[:1], 7, *good.shape[2:]))])
    monkeypatch.setattr(throughput, "call_overhead", lambda device: "")
    file = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--device", "cpu", "--toy", "--compare", "ours", "--json", str(file)])
    before = torch.get_num_threads()
    try:
        assert throughput.main() == 1
    finally:
        torch.set_num_threads(before)
    assert "WRONG, not timed: ValueError: out of resources" in capsys.readouterr().out
    rows = json.loads(file.read_text())
    assert [row["correct"] for row in rows][:2] == [False, True]


def test_the_lanes_that_are_counted_are_those_of_the_masks():
    pytest.importorskip("triton", reason="Triton is not on this platform")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(BENCH), str(BENCH.parent)])}
    done = subprocess.run([sys.executable, "-c", COUNTED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("script", "words"), [("throughput", ["--toy"]), ("throughput", ["--op", "repeat_dropout"]), ("ceilings", ["--toy"])], ids=str
)
def test_what_is_no_whole_run_does_not_replace_one(script, words, bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--device", "cpu", *words])
    with pytest.raises(SystemExit) as ended:
        bench(script).main()
    assert ended.value.code == 2 and "does not replace the result in bench/results" in capsys.readouterr().err


def test_a_prediction_does_not_replace_measured_times(bench, tmp_path, monkeypatch, capsys):
    predict, file = bench("predict"), tmp_path / "predicted_h200_float32.md"
    monkeypatch.setattr(sys, "argv", ["predict.py", "--machine", "h200", "--dtype", "float32", "--out", str(tmp_path)])
    predict.main()
    assert "nothing here was measured" in file.read_text()
    file.write_text("# Predicted for h200, float32, with measured times")
    predict.main()
    assert file.read_text().endswith("with measured times") and "stays" in capsys.readouterr().err


def test_a_result_of_another_command_or_machine_stays(bench, tmp_path, monkeypatch):
    environment = bench("environment")
    for command in ("python a --seeds 1", "python a --seeds 2", "python a --seeds 1"):
        env = environment.environment() | {"command": command}
        monkeypatch.setattr(environment, "environment", lambda device, env=env: env)
        environment.keep("step", [command], "| a |", folder=tmp_path)
        monkeypatch.undo()
    kept = [json.loads(path.read_text())["results"] for path in sorted(tmp_path.glob("*.json"), key=lambda path: len(path.name))]
    assert kept == [["python a --seeds 1"], ["python a --seeds 2"]]
