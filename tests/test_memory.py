"""What containers and jobs leave of the host's memory; a GPU on which Triton can start no kernel."""

import subprocess

import pytest
import torch
import triton

from muka_fast import doctor, memory
from muka_fast.errors import UserError
from muka_fast.ops import table

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


class Driver:
    """Triton's driver, whose making fails."""

    def __init__(self, fault):
        self.fault = fault

    @property
    def active(self):
        raise self.fault


FAULTS = {
    "Failed to find C compiler": RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    "libcuda.so cannot found!": AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up"),
    "/usr/bin/gcc cannot compile": subprocess.CalledProcessError(1, ["/usr/bin/gcc", "/tmp/x/main.c", "-O3"]),
}


@pytest.mark.parametrize("told", FAULTS)
def test_a_gpu_without_what_triton_compiles_with_is_refused_in_one_line(told, monkeypatch):
    monkeypatch.setattr(table, "BACKEND", "auto")
    monkeypatch.setattr(triton.runtime, "driver", Driver(FAULTS[told]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"^--device cuda:1: .*python3-dev.*MUKA_FAST_BACKEND=reference$") as refused:
        memory.check_kernels("cuda:1")
    assert told in str(refused.value) and "\n" not in str(refused.value)
    (finding,) = doctor.op_table()[1]
    assert finding.state == "broken" and finding.value.startswith(told) and "python3-dev" in finding.way_out
    memory.check_kernels("cpu")
    monkeypatch.setattr(table, "BACKEND", "reference")
    memory.check_kernels("cuda:1")
    assert doctor.op_table()[1] == []


def test_a_gpu_whose_driver_answers_is_taken(monkeypatch):
    monkeypatch.setattr(table, "BACKEND", "auto")
    monkeypatch.setattr(triton.runtime, "driver", type("Working", (), {"active": object()})())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory.check_kernels("cuda")
    assert doctor.op_table()[1] == []
