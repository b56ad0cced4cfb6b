"""Starts several processes of one job as a launcher does: one per rank, on this machine; used by tests of many processes."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TRAIN = (str(Path(__file__).resolve().parent.parent / "muka_fast" / "train.py"),)


def free_port() -> int:
    """A TCP port that nothing holds, below the range from which the kernel serves others between this call and its use."""
    while True:
        port = random.SystemRandom().randrange(15000, 30000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def launcher_variables(count: int) -> list[dict[str, str]]:
    """What deepspeed and torchrun set in the environment of each of `count` processes."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def run_processes(
    options: dict, count: int, extra: tuple[str, ...] = (), program: tuple[str, ...] = TRAIN
) -> list[subprocess.Popen]:
    """Start muka_fast/train.py, or another program, in `count` processes. options: name -> value, None where not given."""
    return start([(options, variables) for variables in launcher_variables(count)], extra, program)


def start(
    jobs: list[tuple[dict, dict[str, str]]], extra: tuple[str, ...] = (), program: tuple[str, ...] = TRAIN
) -> list[subprocess.Popen]:
    """A process for each pair of options, as of `run_processes`, and variables of the environment."""
    processes = []
    for options, variables in jobs:
        words = {key: value if isinstance(value, list) else [value] for key, value in options.items() if value is not None}
        flags = [word for key, values in words.items() for word in (f"--{key}", *map(str, values))]
        command = [sys.executable, *program, *flags, *extra]
        processes.append(subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True))
    return processes


def finish(processes: list[subprocess.Popen]) -> tuple[list[int], str]:
    """Wait for the ends of all; their exit codes, and what they said on stderr."""
    told = [process.communicate(timeout=200)[1] for process in processes]
    return [process.returncode for process in processes], "".join(told)


def wait_for(condition: Callable[[], bool], processes: list[subprocess.Popen], seconds: float = 120.0) -> None:
    """Wait until something has happened, while all processes run."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.05)
