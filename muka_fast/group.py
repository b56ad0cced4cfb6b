"""What the processes of a job do as one: how long they wait for each other, work of process 0 for all, leaving."""

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch

from muka_fast.console import first_of_node_tells
from muka_fast.errors import UserError

T = TypeVar("T")
# To join the group: nothing tells a process that one which it waits for died before they were connected.
JOINING = timedelta(minutes=10)
# Within it: one may score for hours while the others wait; a process that dies closes its connections, which ends the wait at once.
PATIENCE = timedelta(days=7)
# Gloo's threads, which nothing ends, let go of the tensors of the last exchange a moment after it. Where the interpreter is gone by
# then they abort the process, whose work was done (one in eight of the smallest scripts).
LETTING_GO_S = 0.2


def set_patience(timeout: timedelta, group: Any = None) -> None:
    """How long an exchange within a group (None: of all processes) may take from now on."""
    torch.distributed.distributed_c10d._set_pg_timeout(timeout, group)


def on_first_process(work: Callable[[], T]) -> T:
    """Run `work` on process 0 and hand its result to all. Collective.

    A UserError there ends the other processes quietly with exit code 2: process 0 tells it.
    """
    if torch.distributed.get_world_size() == 1:
        return work()
    told: list[Any] = [None, None]
    failure = None
    if torch.distributed.get_rank() == 0:
        try:
            told[0] = work()
        except UserError as error:
            failure, told[1] = error, str(error)
    torch.distributed.broadcast_object_list(told)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise SystemExit(2)
    return told[0]


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Around a check that all processes make: a UserError of any is told by one of them, and ends all with exit code 2.

    Collective, save before the processes are connected, when they have seen no more than the command line.
    """
    if not torch.distributed.is_initialized():
        with first_of_node_tells():
            yield
        return
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    failed = [failure is not None]
    if torch.distributed.get_world_size() > 1:
        failed = [False] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(failed, failure is not None)
    if any(failed):
        raise failure if failed.index(True) == torch.distributed.get_rank() else SystemExit(2) from failure


def told_by_first(message: str) -> BaseException:
    """What to raise where every process has met the same bad input: process 0 tells it, the others end quietly."""
    return UserError(message) if torch.distributed.get_rank() == 0 else SystemExit(2)


def shut_down(at_exit: bool = False) -> None:
    """Leave the process group, so that interpreters end without torch's warning about it.

    A group of one stays until exit: DeepSpeed keeps references to it, which a second run in this interpreter would meet.
    """
    if torch.distributed.is_initialized() and (at_exit or torch.distributed.get_world_size() > 1):
        if torch.distributed.get_world_size() > 1:
            time.sleep(LETTING_GO_S)
        torch.distributed.destroy_process_group()
