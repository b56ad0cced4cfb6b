"""What processes of a test do that form a group of their own; each is started anew, since a fork inherits its parent's group."""

import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from transformers import AutoTokenizer

from muka_fast import engine, group
from muka_fast import store as store_module
from muka_fast.cli import guarded
from muka_fast.config import RunConfig
from muka_fast.data import read_texts
from muka_fast.ds_config import prepare_ds_config
from muka_fast.engine import Engine, init_distributed
from muka_fast.errors import UserError
from muka_fast.group import on_first_process, shut_down
from muka_fast.pool_tokens import PoolTokens
from muka_fast.shard_queue import ShardQueue
from muka_fast.snapshots import save_snapshot
from muka_fast.stored import open_store


def exit_codes(target: Callable, arguments: list[tuple[Any, ...]], seconds: float = 120) -> list[int | None]:
    """Run `target` in a process for each tuple of arguments; their exit codes, None for one that has not ended in time."""
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=target, args=given) for given in arguments]
    for child in children:
        child.start()
    deadline = time.monotonic() + seconds
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


def join(variables: dict[str, str], grace_s: float = group.GRACE_S) -> int:
    """Join the group, with the messages of ours on stderr; the rank."""
    os.environ.update(variables)
    logging.getLogger("muka_fast").addHandler(logging.StreamHandler())
    group.GRACE_S = grace_s
    return init_distributed()[0]


def save_on_full_disk(variables: dict[str, str], output: Path) -> None:
    """ZeRO 2, a file per tensor, of which process 0 cannot write the second; ends with the exit code."""
    join(variables)
    ds, config = prepare_ds_config({"zero_optimization": {"stage": 2}}, RunConfig(batch_size=4, learning_rate=1e-3), 2)
    made = Engine.create(torch.nn.Linear(3, 2), config, ds, 10)
    engine.SHARD_BYTES, calls = 1, []

    def save_file(*rest, _original=safetensors.torch.save_file):
        calls.append(rest)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        _original(*rest)

    safetensors.torch.save_file = save_file
    os._exit(guarded(lambda: save_snapshot(made, output)))


def leave_or_enter(variables: dict[str, str]) -> None:
    """Process 1 leaves as soon as it has joined the group; process 0 enters the queue and notices."""
    if join(variables) == 0:
        with ShardQueue(group=True) as queue:
            while True:
                queue.check()
                time.sleep(0.01)
    os._exit(7)


def lose_the_store(variables: dict[str, str]) -> None:
    """The store of process 0 fails in process 1 a moment before its watch is told that process 0 is gone."""
    rank = join(variables)
    if rank == 0:
        time.sleep(2)
        os._exit(7)
    with ShardQueue(group=True) as queue:
        while group.gone() is None:
            time.sleep(0.01)
        told, group._watch.gone = group._watch.gone, None
        threading.Timer(0.5, setattr, (group._watch, "gone", told)).start()
        queue.check()


def lose_the_network(variables: dict[str, str]) -> None:
    """In a network of their own, which process 0 takes away."""
    group.ASK_AFTER_S, group.ASK_EVERY_S, group.ASK_TIMES = 2, 1, 3
    rank = join(variables, grace_s=1.0)
    time.sleep(1)
    if rank == 0:
        subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    time.sleep(60)
    os._exit(7)


def join_beside_others(variables: dict[str, str]) -> None:
    """In a program that has sockets of its own, a default timeout for them, and a pipe to a child."""
    os.environ.update(variables)
    socket.setdefaulttimeout(30)
    ours = socket.create_server(("127.0.0.1", 0))
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    init_distributed()
    with ShardQueue(group=True) as queue:
        assert [queue.agree(str(i), lambda: 5) for i in range(5)] == [5] * 5
    socket.setdefaulttimeout(None)

    def keeps_asking(handle: int) -> bool:
        with socket.socket(fileno=os.dup(handle)) as connection:
            return bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

    assert not keeps_asking(ours.fileno()) and sum(map(keeps_asking, group.open_sockets().values())) >= 2
    child.stdin.close()
    assert child.wait(timeout=20) == 0  # nobody else holds its pipe
    shut_down()


def refused_alone(variables: dict[str, str], victim: int) -> None:
    """DeepSpeed refuses its configuration in one process alone, as where a package is missing on its node."""
    rank = join(variables, grace_s=1.0)
    import deepspeed

    if rank == victim:
        deepspeed.initialize = lambda **_: (_ for _ in ()).throw(ImportError("no ninja here"))
    content = {"zero_optimization": {"stage": 2}}
    ds, config = prepare_ds_config(content, RunConfig(batch_size=4, device="cpu", ds_config=content), 2)

    def work() -> int:
        with group.one_job(), group.told_by_one():
            engine.rehearse(config, ds)
        return 0

    sys.exit(guarded(work))


def wait_alone(variables: dict[str, str]) -> None:
    """Joins a group whose other process never starts."""
    os.environ.update(variables)
    engine.JOINING = timedelta(seconds=1)
    try:
        init_distributed()
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(2)


def tokenise_whole(variables: dict[str, str], texts: Path, tokenizer: Path, store: Path, output: Path) -> None:
    """All tokens of a pool, of which this process makes a share; writes its shards' first rows and all ids."""
    join(variables)
    pool = PoolTokens(read_texts(texts), AutoTokenizer.from_pretrained(tokenizer), 8, store)
    made, make = [], pool._make
    pool._make = lambda shard: (made.append(shard.start), make(shard))[1]
    np.savez(output, ids=pool.whole(ShardQueue(group=True)).ids, made=made)
    shut_down()


def open_together(variables: dict[str, str], store: Path, output: Path) -> None:
    """Open a store; writes its logits, and how many checksums this process has made."""
    join(variables)
    made, digest = [], store_module._digest
    store_module._digest = lambda tensors: made.append(1) or digest(tensors)
    sup = open_store(store, queue=ShardQueue(group=True))
    np.savez(output, logits=sup.logits.numpy(), made=len(made))
    shut_down()


def die_while_handing_over(variables: dict[str, str], victim: int) -> None:
    """The victim is killed when process 0 has written and process 1 has read a part of a result of process 0."""
    rank = join(variables, grace_s=1.0)
    pids, calls = [None, None], []
    torch.distributed.all_gather_object(pids, os.getpid())
    stopped = lambda pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def broadcast(*rest, _original=torch.distributed.distributed_c10d.broadcast, **options):
        calls.append(rest)
        if len(calls) == 2 and rank == 1:  # the first one is of the result's size; stop when ready for the result
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        elif len(calls) == 2:
            while not stopped(pids[1]):
                time.sleep(0.01)
            subprocess.Popen(["sh", "-c", f"sleep 1; kill -KILL {pids[victim]}; kill -CONT {pids[1 - victim]}"])
        return _original(*rest, **options)

    torch.distributed.distributed_c10d.broadcast = broadcast
    on_first_process(lambda: bytes(1 << 25))  # more than a connection holds
    os._exit(7)


def leave_alone(variables: dict[str, str], well: bool) -> None:
    """Process 1 leaves the group, well or after a fault, while process 0 is busy for longer than the grace."""
    rank = join(variables, grace_s=1.0)
    if rank == 0:
        time.sleep(4)
        return
    try:
        if not well:
            raise ArithmeticError("of process 1")
    finally:
        shut_down()
