"""bench/launches.py: what counts as a launch, and how many tokens a step has."""

import importlib
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

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
    tokens = lambda machine, width, dtype: launches.tokens_of(machine, BertConfig(hidden_size=width), dtype)
    assert tokens("h100", 768, torch.float32) == 131_072 and tokens("h100", 4096, torch.bfloat16) == 32_768
    assert tokens("h200", 4096, torch.float32) == 32_768
    assert tokens("h200", 768, torch.bfloat16) == 4096 * launches.MEAN_TOKENS  # a whole shard
