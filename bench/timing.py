"""Timing that survives a busy machine: implementations are called in turn, and ratios are medians over rounds, not of totals.

And the peak memory of a process.
"""

import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

WAITS = (10**6, 10**7, 5 * 10**7, 2 * 10**8)  # cycles of a GPU: about 0.5, 5, 25 and 100 ms
MOST_CALLS = {"cpu": 1000, "cuda": 50}  # in a row: a GPU takes about a thousand launches ahead, and a call may be a dozen


class Spread(NamedTuple):
    """Seconds of one call."""

    median: float
    p20: float
    p80: float


def spread(seconds: list[float]) -> Spread:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return Spread(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


def seconds_per_call(run: Callable[[], object], device: str, calls: int) -> float:
    """Mean of `calls` calls in a row. On CUDA the device's time alone: the calls are queued behind a wait of the device.

    The wait is repeated longer where it ended before the host had launched all. Calls that the longest does not cover, such as
    those that wait for the device themselves, count with the gaps that the host leaves.
    """
    if device == "cuda":
        for cycles in WAITS:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles)
            start.record()
            for _ in range(calls):
                run()
            stop.record()
            queued = not start.query()
            stop.synchronize()
            if queued:
                break
        return start.elapsed_time(stop) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def interleaved(runs: Mapping[str, Callable[[], object]], device: str, budget_s: float) -> dict[str, list[float]]:
    """Seconds per call of every implementation in every round; a round times each of them once, one after the other.

    Short calls are timed several at a time (1 ms together, at most MOST_CALLS). As many rounds as fit the budget, 3 to 101.
    """
    calls = {}
    for name, run in runs.items():
        run()
        fitting = int(1e-3 / max(seconds_per_call(run, device, 1), 1e-7))
        calls[name] = max(1, min(MOST_CALLS[device], fitting))
    begin, rounds = time.perf_counter(), 0
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    while rounds < 3 or (rounds < 101 and time.perf_counter() - begin < budget_s):
        for name, run in runs.items():
            seconds[name].append(seconds_per_call(run, device, calls[name]))
        rounds += 1
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over rounds of slow / fast: a disturbance that lasts longer than a round hits both. Of the medians, where the two
    were not timed in the same rounds."""
    if len(slow) != len(fast):
        return statistics.median(slow) / statistics.median(fast)
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def largest_resident_bytes() -> int:
    """Peak of this process. Linux counts a parent's memory into ru_maxrss of what it starts, hence the file."""
    try:
        return int(re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) << 10
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def own_process(what: str, *options: str) -> str:
    """Run the present script once more with further options, for a peak of memory that is its own; the last line that it prints.

    Ends the script where that one fails; `what` says whose failure it was.
    """
    done = subprocess.run([sys.executable, *sys.argv, *options], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stderr[-3000:]}")
    return done.stdout.splitlines()[-1]
