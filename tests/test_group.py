"""What the processes of a job notice of each other's end, wherever it comes."""

import pytest
from group_targets import die_while_handing_over, exit_codes, leave_alone
from launch import launcher_variables


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_in_the_midst_of_a_message_ends_the_other_process(victim, capfd):
    """There gloo does not notice it: a survivor waited for as long as a process may score."""
    codes = exit_codes(die_while_handing_over, [(own, victim) for own in launcher_variables(2)], seconds=60)
    assert codes[victim] == -9 and codes[1 - victim] == 1, codes
    assert f"process {victim} of 2 is gone: stopping" in capfd.readouterr().err


def test_a_process_that_has_left_well_does_not_end_another_one():
    assert exit_codes(leave_alone, [(own, True) for own in launcher_variables(2)]) == [0, 0]


def test_a_fault_in_one_process_ends_another_one_that_is_busy(capfd):
    assert exit_codes(leave_alone, [(own, False) for own in launcher_variables(2)]) == [1, 1]
    told = capfd.readouterr().err
    assert "ArithmeticError: of process 1" in told and "another process of this job has failed or is gone: stopping" in told
