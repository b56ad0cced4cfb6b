"""bench/launches.py: what counts as a launch, and how many tokens a step has."""

import importlib
from pathlib import Path

import pytest
import torch

from muka_fast import packed


@pytest.fixture
def launches(monkeypatch):
    """bench/launches.py as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "bench"))
    return importlib.import_module("launches")


def test_views_and_allocations_launch_nothing_and_our_ops_launch_once(launches):
    op = packed.repeat_dropout
    x, ids = torch.ones(4, 6), torch.arange(4)
    with launches.Launches() as counted, launches.ours_counted(counted):
        rows = torch.empty(3, 2).new_empty(5).view(5, 1).expand(5, 2)[1:].T.unsqueeze(0)
        assert counted.count == 0
        torch.cat([rows + 1, rows * 2])
        assert counted.count == 3
        packed.repeat_dropout(x, 2, 0.5, 1, 0, ids, ids)
        assert counted.count == 4
    assert packed.repeat_dropout is op


def test_a_step_has_the_tokens_that_the_card_holds(launches):
    assert (launches.tokens_of("h100"), launches.tokens_of("h200")) == (32_768, 65_536)
