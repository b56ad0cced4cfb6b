"""How much memory a run may take: for replicas that run at once, and for teachers that stay loaded together."""

from pathlib import Path

import torch

CPU_REPLICA_BYTES = 512 << 20  # more replicas at once than this are no faster on a CPU
UNKNOWN_FREE_BYTES = 2 << 30  # where the system does not tell (not Linux)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, what torch holds in reserve included."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return UNKNOWN_FREE_BYTES
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), UNKNOWN_FREE_BYTES)


def replica_budget_bytes(device: torch.device) -> int:
    """What the activations of replicas may take: half of the free GPU memory; on a CPU a quarter, at most CPU_REPLICA_BYTES."""
    free = free_bytes(device)
    return free // 2 if device.type == "cuda" else min(free // 4, CPU_REPLICA_BYTES)


def teacher_budget_bytes(device: torch.device) -> int:
    """What the weights of teachers that stay loaded together may take: a quarter of the free memory."""
    return free_bytes(device) // 4
