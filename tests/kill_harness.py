"""Runs a whole run, then kills copies of it at random moments and resumes them; used by test_processes.py.

    python tests/kill_harness.py OPTIONS.json KILLS SEED [PROCESSES]

A run of several processes loses one of them, drawn at random, or all at once; those left must end by themselves.
Each kill aims at a stage of the run, in turn, and comes a random while after the run has reached it.
Prints JSON: kills, moments (what the run had on the disk when it was killed, counted), runs (completed ones), same (all of them
equal to the undisturbed run, bit for bit), longest (seconds that a process outlived another one that was killed). Each process is
a fork, so that importing torch is paid once.
"""

import collections
import faulthandler
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[0] = str(Path(__file__).resolve().parent.parent)
sys.path.append(str(Path(__file__).resolve().parent))

import deepspeed  # noqa: E402, F401 - after the path is set; paid here, not in every fork
from launch import launcher_variables  # noqa: E402

from muka_fast.cli import guarded  # noqa: E402
from muka_fast.config import RunConfig, load_config  # noqa: E402
from muka_fast.train import main as train  # noqa: E402

# Where kills aim, and the longest that one waits there, as a share of what the whole run takes; every other one strikes at once.
STAGES = {"scoring": 0.3, "training": 0.2, "saving": 0.01, "exporting": 0.01}
PATIENCE = 60.0  # seconds; a process that outlives another one's death by more hangs


class Job:
    """The processes of one run, new or resumed; each ends with the exit code of `muka-fast train`."""

    def __init__(self, options: dict, count: int) -> None:
        self.codes: dict[int, int | None] = {}  # by process id, None while it runs
        for variables in launcher_variables(count) if count > 1 else [{}]:
            child = os.fork()
            if child == 0:
                os.environ.update(variables)
                faulthandler.register(signal.SIGUSR1)
                code = 1
                try:
                    code = guarded(lambda: train(load_config(RunConfig, None, options | {"resume": True})))
                except BaseException:
                    traceback.print_exc()
                os._exit(code)
            self.codes[child] = None

    def joined(self, folder: Path) -> bool:
        """Whether all are members of the process group. Before that a launcher has to end those that wait for a dead one."""
        told = "".join(path.read_text() for path in folder.glob("logs/rank*.log"))
        return all(f"pid {child}," in told for child in self.codes)

    @property
    def running(self) -> list[int]:
        return [child for child, code in self.codes.items() if code is None]

    def wait(self, over: Callable[[], bool] = lambda: False) -> bool:
        """Wait until all have ended, or until `over`; True where they have ended."""
        while self.running and not over():
            for child in self.running:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    self.codes[child] = os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return not self.running

    def kill(self, doomed: list[int]) -> float:
        """SIGKILL some; returns the seconds until the others had ended."""
        for child in doomed:
            os.kill(child, signal.SIGKILL)
        start = time.monotonic()
        ended = self.wait(after(PATIENCE))
        for child in self.running:
            os.kill(child, signal.SIGUSR1)  # says where it hangs
            time.sleep(1)
            os.kill(child, signal.SIGKILL)
        assert ended, f"a process outlived another one's death by {PATIENCE} s"
        return time.monotonic() - start


def after(seconds: float) -> Callable[[], bool]:
    """Whether that much time has gone by since this call."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def attempt(options: dict, count: int, stage: str | None, delay: float, choose: random.Random) -> float | None:
    """Run until `delay` seconds into a stage, then kill; None where it came to its end, else how long one outlived another."""
    job, folder = Job(options, count), Path(options["output"])
    ended = job.wait(lambda: moment(folder) == stage and job.joined(folder)) or job.wait(after(delay))
    assert not any(job.codes.values()), f"the run failed by itself: {job.codes}"
    if ended:
        return None
    everyone = choose.random() < 1 / 3
    return job.kill(job.running if everyone else [choose.choice(job.running)])


def moment(folder: Path) -> str:
    """How far a killed run had come, by its files."""
    if (folder / "model.safetensors").exists():
        return "after the export"
    if list(folder.glob(".export.*")):
        return "exporting"
    if list(folder.glob("checkpoints/*.partial")):
        return "saving"
    if (folder / "metrics.jsonl").exists():
        return "training"
    if (folder / "run.json").exists():
        return "loading"
    return "scoring" if (folder / "supervision").exists() else "starting"


def main(options: dict, kills: int, seed: int, processes: int) -> dict:
    folder, choose = Path(options["output"]), random.Random(seed)
    place = lambda where: options | {"output": str(where), "store": str(where / "supervision")}
    start = time.monotonic()
    assert attempt(place(folder / "whole"), processes, None, 0.0, choose) is None
    whole_seconds = time.monotonic() - start
    expected = (folder / "whole" / "model.safetensors").read_bytes()
    moments, runs, same, outlived = collections.Counter(), 0, True, []
    victim, stages = folder / "victim", itertools.cycle(STAGES)
    while True:
        stage = next(stages) if len(outlived) < kills else None
        delay = choose.choice([0.0, choose.uniform(0.0, STAGES.get(stage, 0.0))]) * whole_seconds
        longest = attempt(place(victim), processes, stage, delay, choose)
        if longest is not None:
            outlived.append(longest)
            moments[moment(victim)] += 1
            continue
        runs += 1
        same = same and (victim / "model.safetensors").read_bytes() == expected
        shutil.rmtree(victim)
        if stage is None:
            found = {"kills": len(outlived), "moments": dict(moments), "runs": runs, "same": same}
            return found | {"seconds": whole_seconds, "longest": max(outlived)}


if __name__ == "__main__":
    options, *numbers = sys.argv[1:]
    kills, seed, processes = (int(number) for number in [*numbers, "1"][:3])
    print(json.dumps(main(json.loads(Path(options).read_text()), kills, seed, processes)))
