"""The queue of shards: each number once, one answer for all, nothing left from before. Deaths and faults: tests/test_processes.py."""

import re
import threading

import pytest
import torch
from group_targets import exit_codes, leave_or_enter, lose_the_store, wait_alone
from launch import launcher_variables
from torch import distributed

from muka_fast.errors import UserError
from muka_fast.shard_queue import ShardQueue, _Stopped

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # the latter's numbers are finished in a second thread


def two_queues():
    """Two queues of one thread each on one key-value store, as two processes have them."""
    one, other = ShardQueue().__enter__(), ShardQueue()
    other._store = one._store
    return one, other


def numbers(queue, name, count):
    """The numbers that a queue works on, finished in order."""
    begun, finished = [], []
    queue.work(name, count, str, lambda number, text: begun.append(int(text)) or (lambda: finished.append(number)), CPU)
    assert begun == finished
    return begun


def test_every_number_is_given_once_whoever_asks():
    queues = two_queues()
    taken, told = [[], []], [[], []]
    start = threading.Barrier(2)

    def work(i):
        start.wait()
        told[i].append(queues[i].work("teacher", 500, str, lambda number, _: taken[i].append(number) or (lambda: None), CPU))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken[0] + taken[1]) == list(range(500))
    assert [True] in told  # the last one to finish knows that all is done


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_number_counts_when_it_is_finished_and_not_before(device):
    """What is under way when a process dies must not count as done."""
    one, other = two_queues()
    counted = []
    finish = lambda: counted.append(other._add("teacher finished", 0))
    assert one.work("teacher", 3, str, lambda number, _: finish, device)
    assert counted == [0, 1, 2] and other.work("teacher", 3, None, None, device)  # no number is left


def test_beside_a_gpu_a_number_is_finished_while_the_next_one_is_begun_and_never_two():
    begun, under_way = threading.Event(), []

    def begin(number, _):
        if number == 1:
            begun.set()

        def finish():
            under_way.append(number)
            assert number or begun.wait(timeout=30)
            assert under_way == [number]
            under_way.clear()

        return finish

    with ShardQueue() as queue:
        assert queue.work("teacher", 4, str, begin, GPU)


def test_beside_a_gpu_the_next_number_is_prepared_meanwhile_and_no_other():
    prepared, begun = [threading.Event() for _ in range(3)], []

    def prepare(number):
        assert number <= len(begun) + 1
        prepared[number].set()
        return 10 * number

    def begin(number, found):
        assert found == 10 * number
        assert number == 2 or prepared[number + 1].wait(timeout=30)
        begun.append(number)
        return lambda: None

    with ShardQueue() as queue:
        assert queue.work("teacher", 3, prepare, begin, GPU)
    assert begun == [0, 1, 2]


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_fault_in_preparing_is_raised_where_the_work_is(wrong, device):
    def prepare(number):
        if number == wrong:
            raise UserError("no room beside the special tokens")

    with ShardQueue() as queue, pytest.raises(UserError, match="no room"):
        queue.work("teacher", 2, prepare, lambda number, _: lambda: None, device)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_fault_in_finishing_is_raised_where_the_work_is(wrong, device):
    def begin(number, _):
        def finish():
            if number == wrong:
                raise UserError("the disk is full")

        return finish

    with ShardQueue() as queue:
        with pytest.raises(UserError, match="the disk is full"):
            queue.work("teacher", 2, str, begin, device)
        assert not queue.work("teacher", 2, str, begin, device)


def test_the_first_proposal_holds_for_all():
    one, other = two_queues()
    assert one.agree("missing", lambda: [3, 4]) == other.agree("missing", lambda: [4]) == [3, 4]
    assert other.agree("nothing", lambda: []) == one.agree("nothing", lambda: [1]) == []
    assert one.agree("missing", None) == [3, 4]  # not asked: to propose may be slow


def test_progress_is_that_of_all():
    one, other = two_queues()
    assert [one.advance("teacher", 4), other.advance("teacher", 3), one.advance("teacher", 2)] == [4, 7, 9]


def test_entering_again_forgets_what_was():
    queue = ShardQueue()
    for _ in range(2):
        with queue:
            assert numbers(queue, "teacher", 3) == [0, 1, 2] and queue.agree("key", lambda: 7) == 7


# ---- several processes ----


def test_processes_of_a_group_agree_each_time_anew_and_others_not_at_all(monkeypatch):
    store = distributed.HashStore()
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.distributed_c10d, "_get_default_store", lambda: store)
    queues = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        queues += [ShardQueue(group=True), ShardQueue()]
    for turn in ("first", "second"):
        for queue in queues:
            queue.__enter__()
        found = [queue.agree("what", lambda told=f"{turn} of {i}": told) for i, queue in enumerate(queues)]
        assert found == [f"{turn} of 0", f"{turn} of 1", f"{turn} of 0", f"{turn} of 3"]


@pytest.mark.parametrize(
    ("told", "codes"),
    [([None, None], [None, None]), (["bad", None], [None, 2]), ([None, "bad"], [2, None]), (["bad", "worse"], [None, 2])],
)
def test_the_first_process_with_bad_input_tells_it_and_the_others_end(told, codes, monkeypatch):
    monkeypatch.setattr(distributed, "all_gather_object", lambda found, _: found.__setitem__(slice(None), told))
    for rank, code in enumerate(codes):
        queue = ShardQueue().__enter__()
        queue.rank, queue.world_size = rank, 2
        error = None if told[rank] is None else UserError(told[rank])
        if code is None:
            assert not queue.__exit__(None, error, None)  # what was raised goes on
            continue
        with pytest.raises(SystemExit) as ended:
            queue.__exit__(None, error, None)
        assert ended.value.code == code


def test_no_number_is_taken_after_another_process_has_failed(monkeypatch):
    monkeypatch.setattr("muka_fast.shard_queue.gone", lambda: None)
    queue, other = two_queues()
    queue.world_size = 2
    assert next(queue.take("teacher", 3)) == 0
    other._store.set("failed", "1")
    with pytest.raises(_Stopped):
        next(queue.take("teacher", 3))


def test_a_process_that_is_gone_before_the_queue_begins_ends_the_others(capfd):
    assert exit_codes(leave_or_enter, [(own,) for own in launcher_variables(2)]) == [1, 7]
    assert "is gone" in capfd.readouterr().err


def test_a_store_that_fails_before_the_watch_knows_is_told_as_a_process_that_is_gone(capfd):
    assert exit_codes(lose_the_store, [(own,) for own in launcher_variables(2)]) == [7, 1]
    assert "process 0 of 2 is gone while scoring: stopping" in capfd.readouterr().err


def test_a_job_whose_processes_do_not_all_start_says_so(capfd):
    assert exit_codes(wait_alone, [(launcher_variables(2)[0],)]) == [2]
    assert re.search(r"not all processes of this job have started \(.*1/2 clients joined.*\)", capfd.readouterr().err)
