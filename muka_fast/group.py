"""What the processes of a job do as one: how long they wait for each other, work of process 0 for all, a death among them, leaving."""

import contextlib
import ctypes
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch

from muka_fast.console import first_of_node_tells
from muka_fast.errors import UserError, first_line

T = TypeVar("T")
log = logging.getLogger("muka_fast")
# To join the group: nothing tells a process that one which it waits for died before they were connected.
JOINING = timedelta(minutes=10)
# Within it: one may score for hours while the others wait; a process that dies ends the wait, at once or after a grace (`Watch`).
PATIENCE = timedelta(days=7)
GRACE_S = 10.0  # for a process to end by itself after another one's death: mostly gloo wakes it, or it leaves at the next shard
TOLD_S = 2.0  # an exchange fails in one thread, and the watch is told in another
LIFETIME = timedelta(days=3650)  # of a job, at most
WATCH_TAG = 7  # of a watch's messages
# Of a connection on which nothing comes: when the kernel asks the other node whether it is there, how often, and how many times.
ASK_AFTER_S, ASK_EVERY_S, ASK_TIMES = 60, 15, 4
# Gloo's threads, which nothing ends, let go of the tensors of the last exchange a moment after it. Where the interpreter is gone by
# then they abort the process, whose work was done (one in eight of the smallest scripts).
LETTING_GO_S = 0.2


class Watch:
    """Ends this process where another one of the group is gone and this one does not end by itself within GRACE_S.

    Gloo raises in an exchange whose connection closes, save where the message itself is half written or half read: of that its
    `Pair::signalException` does not know, and the exchange waits for PATIENCE. So it goes for a process that hands a result to one
    which has just died, before gloo's thread has seen the end: the write fails and counts as not yet done. NCCL notices no end at
    all. What hangs so cannot be woken, so the process is ended, with exit code 1.

    Each process has a receive open, and a thread that waits for it, for one word of the process before it: that it leaves, or that
    one of the job is gone, which goes round. Until that word comes nothing of it is read: there gloo does raise.
    All processes create their watches together. gone: what has ended, None while all is well.
    """

    gone: str | None = None

    def __init__(self) -> None:
        rank, self._size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._previous, self._next = (rank - 1) % self._size, (rank + 1) % self._size
        self._group: Any = None  # that of all processes
        if torch.distributed.get_backend() != "gloo":
            self._group = torch.distributed.new_group(backend="gloo", timeout=JOINING)
        self._well = torch.zeros(1)
        self._receive = torch.distributed.irecv(self._well, src=self._previous, group=self._group, tag=WATCH_TAG)
        self._told, self._send = False, None
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="muka_fast watch")
        self._thread.start()

    def leave(self, well: bool) -> None:
        """Tell the next process that this one leaves, after a fault if not `well`, and wait until the one before it leaves as well;
        nothing ends this process any more.

        The wait ends the thread: Python aborts where it ends under one that comes back from gloo.
        """
        self._leaving.set()
        self._tell(well)
        self._thread.join()

    def _tell(self, well: bool) -> None:
        """Once; not waited for, since the next process may be the one that is gone."""
        if not self._told:
            self._told = True
            with contextlib.suppress(RuntimeError):
                self._send = torch.distributed.isend(torch.full((1,), float(well)), self._next, self._group, WATCH_TAG)

    def _run(self) -> None:
        what = "another process of this job has failed or is gone"
        try:
            self._receive.wait(LIFETIME)
        except RuntimeError:
            what = f"process {self._previous} of {self._size} is gone"
        if self._well.item():
            return
        self.gone = what
        self._tell(False)
        if not self._leaving.wait(GRACE_S):
            log.error("%s: stopping; its log has the reason", what)
            os._exit(1)


_watch: Watch | None = None


def check_launch() -> None:
    """Raises UserError where the variables that a launcher sets are not all there, or are no place in a group."""
    given = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")}
    numbers = all(given[name].isdigit() for name in list(given)[:3])
    if not (numbers and given["MASTER_ADDR"] and int(given["RANK"]) < int(given["WORLD_SIZE"])):
        told = " ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{told} is no process of a job: start it by torchrun or deepspeed, or with none of these variables")


def joined(before: Collection[str] = ()) -> None:
    """From now on until `shut_down` processes wait for each other, and notice where one is gone. Collective. before: `open_sockets`
    from before the group was made, which are not the job's."""
    global _watch
    torch.distributed.distributed_c10d._set_pg_timeout(PATIENCE)
    if torch.distributed.get_world_size() > 1:
        try:
            _watch = Watch()
        except RuntimeError as error:  # NCCL has other ways from node to node
            way_out = "name the network that joins the nodes in GLOO_SOCKET_IFNAME (`ip address` lists them)"
            raise UserError(f"the processes cannot watch each other over gloo ({first_line(error)}): {way_out}") from error
        keep_asking({name: handle for name, handle in open_sockets().items() if name not in before}.values())


def open_sockets() -> dict[str, int]:
    """The sockets of this process: the kernel's name and the descriptor of each; none where there is no /proc."""
    found = {}
    for handle in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # closed by now
            found[os.readlink(f"/proc/self/fd/{handle}")] = int(handle)
    return {name: handle for name, handle in found.items() if name.startswith("socket:")}


def keep_asking(handles: Iterable[int]) -> None:
    """Have the kernel close connections to a node that has lost its power or network: of that no word comes, and gloo, which asks for
    nothing of the kind, would wait. A process that is stopped or busy is there: its kernel answers. (While data are on their way the
    kernel sends them again and again instead, and gives up after a quarter of an hour.)
    """
    # By C's function: a socket of Python's on the same descriptor takes the default timeout, with which it blocks no more.
    set_option = ctypes.CDLL(None).setsockopt
    times = {socket.TCP_KEEPIDLE: ASK_AFTER_S, socket.TCP_KEEPINTVL: ASK_EVERY_S, socket.TCP_KEEPCNT: ASK_TIMES}
    options = {(socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1} | {(socket.IPPROTO_TCP, name): value for name, value in times.items()}
    for handle in handles:  # what is no connection refuses it
        for (level, name), value in options.items():
            set_option(handle, level, name, ctypes.byref(ctypes.c_int(value)), 4)


def gone() -> str | None:
    """What is known of a process of this job that has failed or is gone, in words; None while all is well."""
    return None if _watch is None else _watch.gone


def gone_behind_a_failure() -> str | None:
    """`gone` after an exchange has failed: the watch may be told of it a moment later."""
    end = time.monotonic() + TOLD_S
    while _watch is not None and not gone() and time.monotonic() < end:
        time.sleep(0.02)
    return gone()


def gather(mine: T, world_size: int | None = None) -> list[T]:
    """What each process gives, in all of them. Collective. world_size: None for that of the group."""
    found = [mine] * (torch.distributed.get_world_size() if world_size is None else world_size)
    if len(found) > 1:
        torch.distributed.all_gather_object(found, mine)
    return found


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
def told_by_one() -> Iterator[None]:
    """Around work that is collective itself: of processes that meet a UserError in it the first tells it, and each ends with exit code
    2. No exchange follows, as in `told_once`, for which those that meet none would be missed: their watches end them."""
    try:
        yield
    except UserError as error:
        if torch.distributed.get_world_size() > 1:
            rank, store = str(torch.distributed.get_rank()), torch.distributed.distributed_c10d._get_default_store()
            if store.compare_set("muka_fast/told", "", rank).decode() != rank:
                raise SystemExit(2) from error
        raise


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
    failed = gather(failure is not None)
    if any(failed):
        raise failure if failed.index(True) == torch.distributed.get_rank() else SystemExit(2) from failure


def check_alike(given: dict[str, Any], done: str = "was given other options") -> None:
    """Refuse a job whose processes were given different things: they would wait for each other, or train apart. Collective.

    given: what must be the same everywhere, by the names that users know. done: what one did that differs. Raises UserError on process
    0, which tells it.
    """
    found = gather(flat(given))
    for rank, other in enumerate(found):
        if names := [name for name in {**found[0], **other} if other.get(name) != found[0].get(name)]:
            told = ", ".join(f"{name} {other.get(name)} instead of {found[0].get(name)}" for name in names[:3])
            raise told_by_first(f"process {rank} {done} than process 0 ({told[:200]}): start all with the same")


def flat(given: dict[str, Any]) -> dict[str, Any]:
    """The values of a dictionary and of those in it, by dotted names."""
    found = {}
    for name, value in given.items():
        found |= {f"{name}.{inner}": part for inner, part in flat(value).items()} if isinstance(value, dict) else {name: value}
    return found


def told_by_first(message: str) -> BaseException:
    """What to raise where every process has met the same bad input: process 0 tells it, the others end quietly."""
    return UserError(message) if torch.distributed.get_rank() == 0 else SystemExit(2)


@contextlib.contextmanager
def one_job() -> Iterator[None]:
    """Around all that processes do together: they leave the group behind it. Where an exchange in it fails because another process
    has failed or is gone, this one ends in one line, with exit code 1."""
    try:
        yield
    except RuntimeError as error:
        if (what := gone_behind_a_failure()) is None:
            raise
        log.error("%s: stopping; its log has the reason, what is finished is kept", what)
        raise SystemExit(1) from error
    finally:
        shut_down()


def shut_down(at_exit: bool = False) -> None:
    """Leave the process group, so that interpreters end without torch's warning about it.

    A group of one stays until exit: DeepSpeed keeps references to it, which a second run in this interpreter would meet.
    """
    global _watch
    if torch.distributed.is_initialized() and (at_exit or torch.distributed.get_world_size() > 1):
        if _watch is not None:
            _watch.leave(well=sys.exc_info()[1] is None and getattr(sys, "last_value", None) is None)
            _watch = None
        if torch.distributed.get_world_size() > 1:
            time.sleep(LETTING_GO_S)
        torch.distributed.destroy_process_group()
