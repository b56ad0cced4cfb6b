"""What containers and jobs leave of the host's memory."""

import pytest
import torch

from muka_fast import memory

GIB = 1 << 30


def group(folder, names, limit, used, copies):
    folder.mkdir(parents=True, exist_ok=True)
    most, current, stat = names
    (folder / most).write_text(f"{limit}\n")
    (folder / current).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 17\n{stat} {copies}\n")


NAMES = {
    "0::": ("", ("memory.max", "memory.current", "inactive_file")),
    "4:memory:": ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
}


@pytest.mark.parametrize("kind", NAMES)
def test_the_narrowest_group_counts_less_what_is_in_use(tmp_path, kind, monkeypatch):
    folder, names = NAMES[kind]
    group(tmp_path / "root" / folder / "job", names, 8 * GIB, 3 * GIB, GIB)
    group(tmp_path / "root" / folder / "job" / "step", names, "max" if kind == "0::" else 1 << 62, 3 * GIB, GIB)
    (tmp_path / "mine").write_text(f"9:cpu:/elsewhere\n{kind}/job/step\n")
    found = list(memory.group_bytes(tmp_path / "mine", tmp_path / "root"))
    assert min(found) == 6 * GIB and all(left >= 6 * GIB for left in found)
    monkeypatch.setattr(memory, "group_bytes", lambda: iter([5]))
    assert memory.free_bytes(torch.device("cpu")) == 5


@pytest.mark.parametrize(
    ("told", "expected"), [({}, 64), ({"LOCAL_WORLD_SIZE": "8"}, 8), ({"LOCAL_SIZE": "4"}, 4), ({"LOCAL_WORLD_SIZE": "x"}, 64)]
)
def test_processes_share_the_memory_of_their_own_host(monkeypatch, told, expected):
    """By torchrun, by deepspeed, by none: then all are taken to be on this host."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 64)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert memory.sharers(torch.device("cpu")) == expected and memory.sharers(torch.device("cuda")) == 1


def test_a_container_that_knows_its_hosts_path_has_its_own_limit(tmp_path):
    _, names = NAMES["0::"]
    group(tmp_path / "root", names, 2 * GIB, 3 * GIB, 0)  # more in use than allowed leaves nothing
    (tmp_path / "mine").write_text("0::/docker/0123\n")
    assert list(memory.group_bytes(tmp_path / "mine", tmp_path / "root")) == [0]


def test_where_there_are_no_groups_nothing_is_limited(tmp_path):
    assert list(memory.group_bytes(tmp_path / "none", tmp_path)) == []
    (tmp_path / "mine").write_text("0::/\n")
    assert list(memory.group_bytes(tmp_path / "mine", tmp_path / "root")) == []
