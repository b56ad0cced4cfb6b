"""The device, and how much of its memory a run may take: batches, replicas that run at once, teachers that stay loaded; copies to and
from it."""

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from muka_fast.errors import UserError
from muka_fast.ops import table

log = logging.getLogger("muka_fast")
# On a CPU more replicas at once are no faster, and slower where a tensor of theirs exceeds 32 MiB: glibc maps such memory anew for
# each, a page fault for every 4 KiB (a tenth of the time of --mc_scope all).
CPU_REPLICA_BYTES = 128 << 20
CPU_TOKENS = 8192
GPU_TOKENS = 262_144  # on an H200 65,536 to 262,144 tokens of a BERT-base in bf16 score as fast, 32,768 3 % slower
TOKEN_WIDTHS = 24  # activations of a token in hidden sizes: a feed-forward layer holds two times four, attention four
UNKNOWN_FREE_BYTES = 2 << 30  # where the system does not tell (not Linux)


def device_of(name: str) -> str:
    """The torch device that --device names; auto takes a GPU where there is one. Raises UserError where it is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: must be auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not count:
        raise UserError(f"--device {name}: PyTorch finds no GPU on this machine, use --device cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {name}: this machine has {count} GPUs, and they are counted from 0")
    return name


def check_kernels(device: str) -> None:
    """Refuse a GPU on which Triton can start no kernel. Raises UserError."""
    if device.startswith("cuda") and (reason := table.why_no_launch()) is not None:
        raise UserError(f"--device {device}: Triton can start no kernels there ({reason}): {table.TRITON_NEEDS}")


def tell_precision(option: str, precision: str, device: str) -> None:
    """Say where another precision would be faster; option: the one that sets it."""
    if device != "cpu":
        if precision == "fp32":
            log.info("%s is fp32; bf16 is faster on most GPUs", option)
        return
    able = getattr(torch.cpu, "get_capabilities", dict)()
    if precision == "fp32" and able.get("amx_bf16"):
        log.info("%s is fp32; bf16 is faster on this CPU", option)
    units = [f"{unit}_{precision}" for unit in ("avx512", "amx")]
    if able.get("architecture") == "x86_64" and precision != "fp32" and not any(able.get(unit) for unit in units):
        log.warning("%s %s: this CPU does not compute in it, so that it is slower than fp32", option, precision)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, what torch holds in reserve included; of the host's what the limits of containers and jobs leave."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return UNKNOWN_FREE_BYTES
    available = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), UNKNOWN_FREE_BYTES)
    return min([available, *group_bytes()])


# Of cgroups of version 2 and 1: folder under their root, limit, memory in use, and its part that is copies of files and goes first.
GROUP_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def group_bytes(mine: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What each limited cgroup that this process is in leaves of memory: Docker, Kubernetes and Slurm set such limits."""
    try:
        lines = mine.read_text().splitlines()
    except OSError:  # no Linux
        return
    for kind, path in (line.split(":", 2)[1:] for line in lines):
        if kind not in GROUP_FILES:
            continue
        folder, limit, used, file_copies = GROUP_FILES[kind]
        group = root / folder / path.lstrip("/")
        for place in (group, *group.parents):  # within a container the path may be the host's, which is not there
            if place == root.parent:
                break
            try:
                most = (place / limit).read_text().strip()
                copies = dict(line.split() for line in (place / "memory.stat").read_text().splitlines()).get(file_copies, 0)
                if most != "max":
                    yield max(0, int(most) - int((place / used).read_text()) + int(copies))
            except OSError:
                continue


def replica_budget_bytes(device: torch.device) -> int:
    """What the activations of replicas may take: half of the free GPU memory; on a CPU a quarter, at most CPU_REPLICA_BYTES."""
    free = free_bytes(device)
    return free // 2 if device.type == "cuda" else min(free // 4, CPU_REPLICA_BYTES)


def teacher_budget_bytes(device: torch.device) -> int:
    """What the weights of teachers that stay loaded together may take: a quarter of this process's part of the free memory."""
    return free_bytes(device) // sharers(device) // 4


def sharers(device: torch.device) -> int:
    """How many processes take their part of a device's memory: all of the job on this host that of the host, one that of a GPU."""
    if device.type != "cpu" or not torch.distributed.is_initialized():
        return 1
    of_host = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ""  # by torchrun; by deepspeed
    everyone = torch.distributed.get_world_size()
    return min(int(of_host), everyone) if of_host.isdigit() and int(of_host) else everyone


def token_budget(asked: int | None, model: PreTrainedModel, device: torch.device) -> int:
    """Padded tokens per forward: as asked, else CPU_TOKENS, which a GPU raises to what an eighth of its free memory holds.

    A large batch hides the time that the host takes to launch a forward's kernels; beyond GPU_TOKENS it is hidden anyhow.
    """
    if asked is not None or device.type != "cuda":
        return asked or CPU_TOKENS
    token_bytes = TOKEN_WIDTHS * model.config.get_text_config().hidden_size * model.dtype.itemsize
    fits = free_bytes(device) // 8 // token_bytes
    return max(CPU_TOKENS, min(GPU_TOKENS, 1 << max(0, fits.bit_length() - 1)))


ALIGNED = 16  # entries: views begin at multiples of 128 bytes, so that a kernel needs no second form for odd addresses


def send(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, without waiting for what the device has still to do."""
    if device.type == "cuda" and torch.cuda.is_available() and not values.is_cuda:
        values = values.pin_memory()  # a copy from ordinary memory would wait
    return values.to(device, non_blocking=True)


class Fetch:
    """Values on their way to the host; what the device is given after them does not delay them."""

    def __init__(self, values: Tensor):
        self.values = values.detach().to("cpu", non_blocking=True)
        self.arrived = None
        if values.is_cuda and torch.cuda.is_available():
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(values.device))

    def tensor(self) -> Tensor:
        """They on the host; waits until they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values

    def read(self) -> list[float]:
        """`tensor` as numbers."""
        return self.tensor().tolist()


def to_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """int64 arrays of the host as tensors of their shapes on `device`, in one copy that waits for nothing."""
    starts, end = {}, 0
    for name, array in arrays.items():
        starts[name] = end
        end += -(-array.size // ALIGNED) * ALIGNED
    values = np.zeros(end, np.int64)
    for name, array in arrays.items():
        values[starts[name] : starts[name] + array.size] = array.ravel()
    on_device = send(torch.from_numpy(values), device)
    return {name: on_device.narrow(0, starts[name], array.size).view(array.shape) for name, array in arrays.items()}
