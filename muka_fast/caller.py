"""What a run in a Python process leaves as it was: its caller's random numbers and environment. Runs in threads take turns."""

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_ONE_RUN = threading.Lock()  # the generators are the process's


@contextmanager
def caller_undisturbed() -> Iterator[None]:
    """Gives a Python caller's random numbers back, since a run seeds torch's generators for each of its steps, and takes LOCAL_RANK
    away where DeepSpeed alone needed it: others would take the process for a member of a group. One thread at a time."""
    with _ONE_RUN:
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
