"""What containers and jobs leave of the host's memory, and what a run takes of it and of a GPU's; a GPU without kernels."""

import subprocess
from types import SimpleNamespace

import pytest
import torch
import triton

from muka_fast import doctor, memory
from muka_fast.errors import UserError
from muka_fast.ops import table

GIB, GPU, CPU = 1 << 30, torch.device("cuda"), torch.device("cpu")


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
    "/usr/bin/gcc fails": subprocess.CalledProcessError(1, ["/usr/bin/gcc", "/tmp/x/main.c", "-O3"]),
    "/home/me/cuda_utils.so: failed to map": ImportError("/home/me/cuda_utils.so: failed to map segment from shared object"),
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
    for module, name, value in ((table, "BACKEND", "reference"), (table.philox, "triton", None), (table.philox, "INTERPRETED", True)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            memory.check_kernels("cuda:1")
            assert doctor.op_table()[1] == []


def test_a_gpu_whose_driver_answers_is_taken(monkeypatch):
    monkeypatch.setattr(table, "BACKEND", "auto")
    monkeypatch.setattr(triton.runtime, "driver", type("Working", (), {"active": object()})())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory.check_kernels("cuda")
    assert doctor.op_table()[1] == []


def test_the_hosts_memory_is_what_is_available_and_not_what_no_cache_holds(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:  99 kB\nMemFree:  4 kB\nMemAvailable:  16 kB\n")
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "meminfo")
    monkeypatch.setattr(memory, "group_bytes", lambda: iter([]))
    assert memory.free_bytes(CPU) == 16 << 10


def test_what_torch_holds_in_reserve_is_free_memory_of_a_gpu(monkeypatch):
    told = {"mem_get_info": (40 * GIB, 80 * GIB), "memory_reserved": 5 * GIB, "memory_allocated": 3 * GIB}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_bytes(GPU) == 42 * GIB


def test_replicas_and_teachers_take_a_part_of_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 64 * GIB)
    assert memory.replica_budget_bytes(GPU) == 32 * GIB and memory.replica_budget_bytes(CPU) == 128 << 20
    assert memory.teacher_budget_bytes(GPU) == 16 * GIB
    monkeypatch.setattr(memory, "sharers", lambda device: 8)
    assert memory.teacher_budget_bytes(CPU) == 2 * GIB
    monkeypatch.setattr(memory, "free_bytes", lambda device: 256 << 20)
    assert memory.replica_budget_bytes(CPU) == 64 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_on_a_gpu_holds_what_an_eighth_of_its_memory_does(dtype, monkeypatch):
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=768)), dtype=dtype)
    token = 24 * 768 * dtype.itemsize
    for free, expected in ((16 * GIB, 1 << (14 if dtype.itemsize == 4 else 15)), (2000 * GIB, 262_144), (GIB, 8192), (0, 8192)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert memory.token_budget(None, model, GPU) == expected
        assert free != 16 * GIB or expected * token <= free // 8 < 2 * expected * token
        assert memory.token_budget(100, model, GPU) == 100
    assert memory.token_budget(None, model, CPU) == 8192 and memory.token_budget(100, model, CPU) == 100


def test_no_more_processes_share_a_host_than_there_are(monkeypatch):
    """A variable that a job around this one has left."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert memory.sharers(CPU) == 2


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_what_only_x86_tells_of_its_units_is_not_told_of_others(architecture, monkeypatch, product_log):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": architecture}, raising=False)
    memory.tell_precision("--precision", "bf16", "cpu")
    assert ("does not compute in it" in product_log.text) == (architecture == "x86_64")
