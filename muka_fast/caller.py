"""What a run in a Python process leaves as it was: random numbers, torch's modes, environment. Runs in threads take turns."""

import logging
import os
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

log = logging.getLogger("muka_fast")
# What it needs to be told: others would take the process for a member of a group, and its children for ones without a GPU.
OF_DEEPSPEED = ("LOCAL_RANK", "DS_ACCELERATOR")
_one_run = threading.RLock()  # the generators are the process's


def _forget_other_threads() -> None:
    global _one_run
    _one_run = threading.RLock()


os.register_at_fork(after_in_child=_forget_other_threads)


@contextmanager
def _outside_of_autocast_blocks() -> Iterator[None]:
    """As if none were open: weights that were cast in one stay as they were, however they are trained, until the outermost ends."""
    depth = torch.autocast_increment_nesting() - 1
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        for _ in range(depth):
            torch.autocast_increment_nesting()


@contextmanager
def modes_of_a_new_process() -> Iterator[None]:
    """torch's modes as a process begins with them, whatever the caller has set: no numbers of a run depend on that."""
    products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    precisions, dtype = [product.fp32_precision for product in products], torch.get_default_dtype()
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            modes.callback(torch.set_autocast_enabled, kind, torch.is_autocast_enabled(kind))
            torch.set_autocast_enabled(kind, False)
        modes.enter_context(_outside_of_autocast_blocks())
        for product, precision in zip(products, precisions, strict=True):
            modes.callback(setattr, product, "fp32_precision", precision)
            product.fp32_precision = "ieee"
        modes.callback(setattr, torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO-3 puts its own there, for good
        modes.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def caller_undisturbed() -> Iterator[None]:
    """Gives a Python caller's random numbers and torch's modes back, since a run seeds torch's generators for each of its steps and
    has modes of its own, and takes OF_DEEPSPEED away where a run has set it. One thread at a time."""
    lock = _one_run
    if not lock.acquire(blocking=False):
        log.info("another thread's run goes first")
        lock.acquire()
    try:
        ours = [name for name in OF_DEEPSPEED if name not in os.environ]
        states = random.getstate(), np.random.get_state()
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            with torch.random.fork_rng(devices), modes_of_a_new_process():
                yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for name in ours:
                os.environ.pop(name, None)
    finally:
        lock.release()
