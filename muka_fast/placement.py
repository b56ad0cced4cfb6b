"""A teacher larger than its device: split over GPUs, host memory and disk, by accelerate; each module runs where its weights lie.

What lies in host memory beside a GPU, or on the disk, is copied over for each call and dropped after it. The disk part is read from
the checkpoint itself. Tests hold scores of teachers split over host memory and disk to those of whole ones; a split over several
GPUs takes the same path, and was run on no machine yet.
"""

import gc
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from muka_fast import adapters, checkpoint
from muka_fast.errors import UserError
from muka_fast.memory import free_bytes, sharers

log = logging.getLogger("muka_fast")
SHARE = 0.8  # of the free memory may be weights; the rest is for activations
GIB = 1 << 30


def weight_bytes(folder: Path, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a teacher's weights in memory, an adapter's counted as its base's; only headers are read."""
    what = f"teacher {folder}"
    folder = adapters.base_folder(folder, what) if adapters.is_adapter(folder) else folder
    tensors = checkpoint.read_tensors(folder, what)
    return dtype.itemsize * sum(torch.Size(entry.shape).numel() for entry in tensors.values())


def memory_limits(needed: int, device: torch.device, most_gib: float | None) -> dict[int | str, int] | None:
    """Bytes that each device may hold of a model of `needed` bytes, GPU number or "cpu" -> bytes; None where `device` holds it.

    most_gib: what `device` (each GPU, if it is one) may hold, None = SHARE of what is free. A process of a group leaves the GPUs
    of the others alone, and takes its part of the host memory. The disk takes what is left.
    """

    def room(place: torch.device) -> int:
        if most_gib is not None and place.type == device.type:
            return int(most_gib * GIB)
        return int(SHARE * free_bytes(place)) // sharers(place)

    if needed > room(device):
        gc.collect()  # a split model is a circle of references: gone only now
    if needed <= room(device):
        return None
    limits: dict[int | str, int] = {}
    if device.type == "cuda":
        own = torch.cuda.current_device() if device.index is None else device.index
        all_gpus = device.index is None and sharers(torch.device("cpu")) == 1
        for gpu in range(torch.cuda.device_count()) if all_gpus else [own]:
            limits[gpu] = room(torch.device("cuda", gpu))
    return limits | {"cpu": room(torch.device("cpu"))}


def require_accelerate(needed: int, device: torch.device, what: str) -> None:
    """Raises UserError where a model has to be split and cannot be."""
    if importlib.util.find_spec("accelerate") is None:
        raise UserError(
            f"{what}: its {needed / GIB:.3g} GiB of weights do not fit on {device}, and splitting them needs "
            "pip install 'muka-fast[accelerate]'"
        )


def dispatch(model: nn.Module, limits: dict[int | str, int], what: str) -> nn.Module:
    """Split a model that lies whole in host memory over the devices of `limits`."""
    import accelerate

    options = {"max_memory": limits, "no_split_module_classes": list(getattr(model, "_no_split_modules", None) or ())}
    device_map = accelerate.infer_auto_device_map(model, **options)
    if "disk" in device_map.values():
        raise UserError(f"{what}: GPUs and host memory together do not hold it; merge the adapter into its base on the disk first")
    model.hf_device_map = device_map
    return accelerate.dispatch_model(model, device_map, force_hooks=True)


def is_split(model: nn.Module) -> bool:
    """Whether accelerate moves this model's weights and inputs: parameters may then have no values here (device "meta")."""
    return hasattr(model, "_hf_hook")


def input_device(model: Any) -> torch.device:
    """Where a model takes its inputs."""
    return torch.device(model._hf_hook.execution_device) if is_split(model) else model.device


def describe(model: Any) -> str:
    """The places of a split model in words: "GPU 0, GPU 1, host memory, disk"."""
    words = {"cpu": "host memory", "disk": "disk"}
    return ", ".join(words.get(place, f"GPU {place}") for place in dict.fromkeys(map(str, model.hf_device_map.values())))
