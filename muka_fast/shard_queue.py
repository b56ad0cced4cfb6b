"""Hands the shards of a scoring run to the processes of a group, each shard to one; a fault or a death in one of them ends all.

Which shard is whose is counted in torch.distributed's own key-value store. That store lives and dies with the job: a resumed run
finds no claim of the killed one, only the files that it finished. Each process takes the next shard when it is done with one, so a
slow process takes fewer. Two jobs on one store do not know of each other and may score a shard twice, which does no harm.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn, Self, TypeVar

import torch
from torch import distributed

from muka_fast.errors import UserError, first_line
from muka_fast.group import gather, gone, gone_behind_a_failure

T, P = TypeVar("T"), TypeVar("P")
log = logging.getLogger("muka_fast")


class _Stopped(Exception):
    """Another process of the group met bad input, which it tells."""


class ShardQueue:
    """The scoring of one store by this process alone or, with `group`, by all processes of torch.distributed's group.

    Use it as a context: all processes enter it; on leaving, each waits for all others. A UserError in one of them is raised there,
    while the others end with SystemExit(2) at their next `check`. A process that is gone ends the others with SystemExit(1).
    It may be entered again; what was agreed on before is then forgotten.
    """

    def __init__(self, group: bool = False) -> None:
        self.rank, self.world_size = 0, 1
        if group and distributed.is_initialized():
            self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()

    def __enter__(self) -> Self:
        if self.world_size == 1:
            self._store = distributed.HashStore()
            return self
        store = distributed.distributed_c10d._get_default_store()
        with self._reachable():
            entries = store.add(f"muka_fast/scoring/{self.rank}", 1)  # the same in every process, and a fresh name each time
            self._store = distributed.PrefixStore(f"muka_fast/scoring/{entries}", store)
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> bool:
        if self.world_size == 1:
            return False
        if error is not None and not isinstance(error, (UserError, _Stopped)):
            return False  # this process ends, and the others notice
        with self._reachable():
            if isinstance(error, UserError):
                self._store.set("failed", str(self.rank))
            told = self.gather(str(error) if isinstance(error, UserError) else None)
        failed = [rank for rank, message in enumerate(told) if message is not None]
        if failed and failed[0] != self.rank:
            raise SystemExit(2) from error
        return False

    def check(self) -> None:
        """Leave where another process has failed or is gone. Cheap: called for every batch."""
        if self.world_size == 1:
            return
        if (what := gone()) is not None:
            self._end(what)
        with self._reachable():
            if self._store.check(["failed"]):
                raise _Stopped

    def gather(self, mine: T) -> list[T]:
        """What each process gives, in all of them. Collective."""
        with self._reachable():
            return gather(mine, self.world_size)

    def agree(self, name: str, propose: Callable[[], T]) -> T:
        """What the first process to ask for `name` proposes, in every process alike. Of JSON's types."""
        with self._reachable():
            if self._store.check([name]):
                return json.loads(self._store.get(name))
        proposal = json.dumps(propose())
        with self._reachable():
            return json.loads(self._store.compare_set(name, "", proposal))

    def work(
        self,
        name: str,
        count: int,
        prepare: Callable[[int], P],
        begin: Callable[[int, P], Callable[[], None]],
        device: torch.device,
    ) -> bool:
        """Run `begin` for the numbers 0 to count - 1, each in one process only; whether all of them, of all processes, are finished.

        `begin` takes a number and what `prepare` made of it; what it returns finishes the number. With a GPU both run in threads of
        their own while `begin` is at the number between, so that the device waits neither for the tokenizer nor for the disk; one
        number at a time, so that three shards at most are in memory. (Beside a CPU's own threads it would cost 2 %.) Their faults
        are raised here.
        """
        numbers = self.take(name, count)
        if device.type == "cpu":
            for number in numbers:
                begin(number, prepare(number))()
                self._add(f"{name} finished", 1)
            return self._add(f"{name} finished", 0) == count
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as behind:
            start = lambda number: None if number is None else ahead.submit(prepare, number)
            number, last = next(numbers, None), None
            prepared = start(number)
            while prepared is not None:
                following = next(numbers, None)
                found, prepared = prepared.result(), start(following)
                finish = begin(number, found)
                self._settle(name, last)
                number, last = following, behind.submit(finish)
            self._settle(name, last)
        return self._add(f"{name} finished", 0) == count

    def take(self, name: str, count: int) -> Iterator[int]:
        """The numbers 0 to count - 1, each in one process only."""
        while True:
            self.check()
            number = self._add(f"{name} taken", 1) - 1
            if number >= count:
                return
            yield number

    def _settle(self, name: str, last: Future[None] | None) -> None:
        """Wait until a number is finished, and count it."""
        if last is not None:
            last.result()
            self._add(f"{name} finished", 1)

    def advance(self, name: str, amount: int) -> int:
        """Add to the texts that are done; returns those of all processes."""
        return self._add(f"{name} texts", amount)

    def _add(self, name: str, amount: int) -> int:
        with self._reachable():
            return self._store.add(name, amount)

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of gloo and of the store alike
            self._end(gone_behind_a_failure() or f"another process is gone ({first_line(error)})")

    def _end(self, what: str) -> NoReturn:
        log.error("%s while scoring: stopping; its log has the reason, finished shards are kept", what)
        raise SystemExit(1)
