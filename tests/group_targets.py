"""What processes of a test do that form a group of their own; each is started anew, since a fork inherits its parent's group."""

import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from transformers import AutoTokenizer

from muka_fast import engine
from muka_fast.cli import guarded
from muka_fast.config import RunConfig
from muka_fast.data import read_texts
from muka_fast.ds_config import prepare_ds_config
from muka_fast.engine import Engine, init_distributed
from muka_fast.errors import UserError
from muka_fast.group import shut_down
from muka_fast.pool_tokens import PoolTokens
from muka_fast.shard_queue import ShardQueue
from muka_fast.snapshots import save_snapshot


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


def save_on_full_disk(variables: dict[str, str], output: Path) -> None:
    """ZeRO 2, a file per tensor, of which process 0 cannot write the second; ends with the exit code."""
    os.environ.update(variables)
    init_distributed()
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
    os.environ.update(variables)
    logging.getLogger("muka_fast").addHandler(logging.StreamHandler())
    init_distributed()
    if variables["RANK"] == "0":
        with ShardQueue(group=True) as queue:
            while True:
                queue.check()
                time.sleep(0.01)
    os._exit(7)


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
    os.environ.update(variables)
    init_distributed()
    pool = PoolTokens(read_texts(texts), AutoTokenizer.from_pretrained(tokenizer), 8, store)
    made, make = [], pool._make
    pool._make = lambda shard: (made.append(shard.start), make(shard))[1]
    np.savez(output, ids=pool.whole(ShardQueue(group=True)).ids, made=made)
    shut_down()
