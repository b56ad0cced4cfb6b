"""What the processes of a job notice of each other's end, wherever it comes."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from group_targets import die_while_handing_over, exit_codes, join_beside_others, leave_alone, refused_alone
from launch import launcher_variables

from muka_fast import group
from muka_fast.errors import UserError

OWN_NETWORK = ["unshare", "--map-root-user", "--net"]


def can_have_own_network():
    try:
        return subprocess.run([*OWN_NETWORK, "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_have_own_network(), reason="needs unshare, ip and the right to a network of its own (user namespaces)")
def test_a_lost_network_ends_all_processes():
    """No word comes of it: without keepalive they waited for ever."""
    program = "from group_targets import lose_the_network; lose_the_network({})"
    commands = [shlex.join([sys.executable, "-c", program.format(own)]) for own in launcher_variables(2)]
    script = f"ip link set lo up; {commands[1]} & {commands[0]}; echo $?; wait $!; echo $?"
    done = subprocess.run([*OWN_NETWORK, "sh", "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=100)
    assert done.stdout.split() == ["1", "1"], done.stderr
    assert all(f"process {rank} of 2 is gone: stopping" in done.stderr for rank in range(2)), done.stderr


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_in_the_midst_of_a_message_ends_the_other_process(victim, capfd):
    """There gloo does not notice it: a survivor waited for as long as a process may score."""
    codes = exit_codes(die_while_handing_over, [(own, victim) for own in launcher_variables(2)], seconds=60)
    assert codes[victim] == -9 and codes[1 - victim] == 1, codes
    assert f"process {victim} of 2 is gone: stopping" in capfd.readouterr().err


def test_joining_leaves_a_programs_own_sockets_and_pipes_alone():
    assert exit_codes(join_beside_others, [(own,) for own in launcher_variables(2)]) == [0, 0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_alone_is_refused_does_not_wait_for_the_others(victim, capfd):
    codes = exit_codes(refused_alone, [(own, victim) for own in launcher_variables(2)], seconds=60)
    told = capfd.readouterr().err
    assert codes[victim] == 2 and codes[1 - victim] == 1, (codes, told)
    assert told.count("ds_config: DeepSpeed refuses it: no ninja here") == 1


def test_a_process_that_has_left_well_does_not_end_another_one():
    assert exit_codes(leave_alone, [(own, True) for own in launcher_variables(2)]) == [0, 0]


def test_a_fault_in_one_process_ends_another_one_that_is_busy(capfd):
    assert exit_codes(leave_alone, [(own, False) for own in launcher_variables(2)]) == [1, 1]
    told = capfd.readouterr().err
    assert "ArithmeticError: of process 1" in told and "another process of this job has failed or is gone: stopping" in told


def test_what_differs_between_processes_is_told_by_its_dotted_name_with_both_values(monkeypatch):
    first = {"seed": 0, "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}, "optimizer": {"stage": 1}}
    offload = {"stage": 2, "offload_param": {"device": "nvme"}}
    differing = [
        (first | {"zero_optimization": offload}, "zero_optimization.offload_param.device nvme instead of cpu"),
        (first | {"scheduler": {"type": "OneCycle"}}, "scheduler.type OneCycle instead of None"),
        ({name: first[name] for name in ("zero_optimization", "optimizer")}, "seed None instead of 0"),
    ]
    monkeypatch.setattr(group.torch.distributed, "get_rank", lambda: 0)
    for other, told in differing:
        monkeypatch.setattr(group, "gather", lambda mine, other=other: [mine, mine, group.flat(other)])
        with pytest.raises(UserError, match=rf"^process 2 was given other options than process 0 \({told}\): start"):
            group.check_alike(first)
    monkeypatch.setattr(group, "gather", lambda mine: [mine, mine])
    group.check_alike(first)


def test_of_processes_that_fail_the_first_one_tells_why(monkeypatch):
    monkeypatch.setattr(group.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(group, "gather", lambda mine: [False, True, True, mine])
    for rank, ends in ((1, UserError), (2, SystemExit)):
        monkeypatch.setattr(group.torch.distributed, "get_rank", lambda rank=rank: rank)
        with pytest.raises(ends, match="no such file" if ends is UserError else "^2$"), group.told_once():
            raise UserError("no such file")
    monkeypatch.setattr(group.torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(SystemExit, match=r"^2$"), group.told_once():
        pass
