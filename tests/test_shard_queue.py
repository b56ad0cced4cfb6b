"""The queue of shards: each number once, one answer for all, nothing left from before. Deaths and faults: tests/test_processes.py."""

import re
import threading

from group_targets import exit_codes, leave_or_enter, wait_alone
from launch import launcher_variables

from muka_fast.shard_queue import ShardQueue


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


def test_a_process_that_is_gone_before_the_queue_begins_ends_the_others(capfd):
    assert exit_codes(leave_or_enter, [(own,) for own in launcher_variables(2)]) == [1, 7]
    assert "is gone" in capfd.readouterr().err


def test_a_job_whose_processes_do_not_all_start_says_so(capfd):
    assert exit_codes(wait_alone, [(launcher_variables(2)[0],)]) == [2]
    assert re.search(r"not all processes of this job have started \(.*1/2 clients joined.*\)", capfd.readouterr().err)
