"""What a run in a Python process leaves as it was: its caller's random numbers and environment. Runs in threads take turns."""

import logging
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

log = logging.getLogger("muka_fast")
_one_run = threading.RLock()  # the generators are the process's


def _forget_other_threads() -> None:
    global _one_run
    _one_run = threading.RLock()


os.register_at_fork(after_in_child=_forget_other_threads)


@contextmanager
def caller_undisturbed() -> Iterator[None]:
    """Gives a Python caller's random numbers back, since a run seeds torch's generators for each of its steps, and takes LOCAL_RANK
    away where DeepSpeed alone needed it: others would take the process for a member of a group. One thread at a time."""
    lock = _one_run
    if not lock.acquire(blocking=False):
        log.info("another thread's run goes first")
        lock.acquire()
    try:
        launched = "LOCAL_RANK" in os.environ
        states = random.getstate(), np.random.get_state()
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            if not launched:
                os.environ.pop("LOCAL_RANK", None)
    finally:
        lock.release()
