"""The queue of shards: each number once, one answer for all, nothing left from before. Deaths and faults: tests/test_train.py."""

import logging
import multiprocessing
import os
import re
import sys
import threading
import time
from datetime import timedelta

from launch import launcher_variables

from muka_fast import engine
from muka_fast.engine import init_distributed
from muka_fast.errors import UserError
from muka_fast.shard_queue import ShardQueue

FORK = multiprocessing.get_context("fork")


def two_queues():
    """Two queues of one thread each on one key-value store, as two processes have them."""
    one, other = ShardQueue().__enter__(), ShardQueue()
    other._store = one._store
    return one, other


def test_every_number_is_given_once_whoever_asks():
    queues = two_queues()
    taken = [[], []]
    start = threading.Barrier(2)

    def work(i):
        start.wait()
        taken[i] += queues[i].take("teacher", 500)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken[0] + taken[1]) == list(range(500))
    assert queues[0].finished("teacher") == queues[1].finished("teacher") == 500


def test_a_number_is_finished_only_when_the_next_one_is_asked_for():
    """What is under way when a process dies must not count as done."""
    with ShardQueue() as queue:
        numbers = queue.take("teacher", 2)
        assert next(numbers) == 0 and queue.finished("teacher") == 0
        assert next(numbers) == 1 and queue.finished("teacher") == 1
        assert list(numbers) == [] and queue.finished("teacher") == 2
        assert list(queue.take("other teacher", 1)) == [0]


def test_the_first_proposal_holds_for_all():
    one, other = two_queues()
    assert one.agree("missing", lambda: [3, 4]) == other.agree("missing", lambda: [4]) == [3, 4]
    assert other.agree("nothing", lambda: []) == one.agree("nothing", lambda: [1]) == []


def test_progress_is_that_of_all():
    one, other = two_queues()
    assert [one.advance("teacher", 4), other.advance("teacher", 3), one.advance("teacher", 2)] == [4, 7, 9]


def test_entering_again_forgets_what_was():
    queue = ShardQueue()
    for _ in range(2):
        with queue:
            assert list(queue.take("teacher", 3)) == [0, 1, 2] and queue.agree("key", lambda: 7) == 7


# ---- several processes ----


def leave_or_enter(rank, variables):
    """Process 1 leaves as soon as it has joined the group; process 0 enters the queue and notices."""
    os.environ.update(variables)
    logging.getLogger("muka_fast").addHandler(logging.StreamHandler())
    init_distributed()
    if rank == 0:
        with ShardQueue(group=True) as queue:
            while True:
                queue.check()
                time.sleep(0.01)
    os._exit(7)


def test_a_process_that_is_gone_before_the_queue_begins_ends_the_others(capfd):
    children = [FORK.Process(target=leave_or_enter, args=(rank, own)) for rank, own in enumerate(launcher_variables(2))]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [1, 7]
    assert "is gone" in capfd.readouterr().err


def wait_alone(variables):
    os.environ.update(variables)
    engine.JOINING = timedelta(seconds=1)
    try:
        init_distributed()
    except UserError as error:
        print(error, file=sys.stderr)
        os._exit(2)


def test_a_job_whose_processes_do_not_all_start_says_so(capfd):
    child = FORK.Process(target=wait_alone, args=(launcher_variables(2)[0],))
    child.start()
    child.join(60)
    assert child.exitcode == 2
    assert re.search(r"not all processes of this job have started \(.*1/2 clients joined.*\)", capfd.readouterr().err)
