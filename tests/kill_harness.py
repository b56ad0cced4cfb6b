"""Runs a whole run, then kills copies of it at random moments and resumes them; used by test_train.py.

    python tests/kill_harness.py OPTIONS.json KILLS SEED

Prints JSON: kills, moments (what the run had on the disk when it was killed, counted), runs (completed ones), same (all of them
equal to the undisturbed run, bit for bit). Each attempt is a fork, so that importing torch is paid once.
"""

import collections
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import deepspeed  # noqa: E402, F401 - after the path is set; paid here, not in every fork

from muka_fast.train import amalgamate  # noqa: E402


def attempt(options: dict, seconds: float | None) -> bool:
    """Run in a child, for at most `seconds`; True where it came to its end. A failure of its own ends the harness."""
    child = os.fork()
    if child == 0:
        try:
            amalgamate(**options, resume=True)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"the run failed by itself: {status}"
            return True
        if end is not None and time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.002)


def moment(folder: Path) -> str:
    """How far a killed run had come, by its files."""
    if (folder / "model.safetensors").exists():
        return "after the export"
    if list(folder.glob(".export.*")):
        return "exporting"
    if list(folder.glob("checkpoints/*.partial")):
        return "saving"
    if (folder / "run.json").exists():
        return "training"
    return "scoring" if (folder / "supervision").exists() else "starting"


def main(options: dict, kills: int, seed: int) -> dict:
    folder = Path(options["output"])
    place = lambda where: options | {"output": str(where), "store": str(where / "supervision")}
    start = time.monotonic()
    attempt(place(folder / "whole"), None)
    whole_seconds = time.monotonic() - start
    expected = (folder / "whole" / "model.safetensors").read_bytes()
    choose, moments, runs, same, done = random.Random(seed), collections.Counter(), 0, True, 0
    victim = folder / "victim"
    while True:
        finished = attempt(place(victim), choose.uniform(0.0, 0.8) * whole_seconds if done < kills else None)
        if not finished:
            done += 1
            moments[moment(victim)] += 1
            continue
        runs += 1
        same = same and (victim / "model.safetensors").read_bytes() == expected
        shutil.rmtree(victim)
        if done >= kills:
            return {"kills": done, "moments": dict(moments), "runs": runs, "same": same, "seconds": whole_seconds}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3]))))
