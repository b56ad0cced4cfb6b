"""A CUDA device that holds no values: PyTorch's fake tensors, on which a step runs as on a GPU and fails where it would wait for one.

Fake tensors say "cuda" and take the CUDA branches of the code, but nothing can be read from them: item(), a shape that depends on
values (nonzero, boolean masks, unique, repeat_interleave) and copies to or from the host that block raise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# What a fake tensor raises where a real one would make the host wait.
WAITS = (DataDependentOutputException, DynamicOutputShapeException)


class WouldWait(RuntimeError):
    """The host would wait for the device here."""


class _Watch(TorchDispatchMode):
    """Refuses copies from the device and to it that block."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and not args[0].numel():
            pass  # nothing is copied
        elif func is torch.ops.aten._to_copy.default:
            self._check(args[0].device, torch.device(kwargs.get("device") or args[0].device), kwargs.get("non_blocking", False))
        elif func is torch.ops.aten.copy_.default:
            self._check(args[1].device, args[0].device, bool(args[2]) if len(args) > 2 else kwargs.get("non_blocking", False))
        elif func.overloadpacket is torch.ops.aten.to:  # in inference mode a copy arrives whole
            named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
            target = named["other"].device if "other" in named else torch.device(named.get("device") or args[0].device)
            self._check(args[0].device, target, named.get("non_blocking", False))
        return func(*args, **kwargs)

    @staticmethod
    def _check(source: torch.device, target: torch.device, non_blocking: bool) -> None:
        if source.type != target.type and not non_blocking:
            raise WouldWait(f"a blocking copy from {source} to {target}")


class _Methods(TorchFunctionMode):
    """x[...] and a few methods as the ATen operations they stand for: Python's own ask for a CUDA runtime, which a CPU build lacks."""

    NAMES = ("copy_", "nonzero", "contiguous", "bitwise_not")
    PLAIN = MappingProxyType({getattr(Tensor, n): getattr(torch.ops.aten, n).default for n in NAMES})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], Tensor) and args[0].device.type == "cuda":
            if func is Tensor.__getitem__:
                return self._select(*args)
            func = self.PLAIN.get(Tensor.bitwise_not if func is Tensor.__invert__ else func, func)
        if func is Tensor.numpy and not isinstance(args[0], FakeTensor):  # under the mode even a host tensor's array would be empty
            with _disable_current_modes():
                return func(*args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _select(x: Tensor, index) -> Tensor:
        index, dim, tensors = index if isinstance(index, tuple) else (index,), 0, {}
        named = sum(item is not None and item is not Ellipsis for item in index)
        for item in index:
            if item is Ellipsis:
                dim += x.dim() - dim - (named - sum(i is not None for i in index[: index.index(Ellipsis)]))
            elif item is None:
                x, dim = torch.unsqueeze(x, dim), dim + 1
            elif isinstance(item, slice):
                start, stop, step = item.indices(x.shape[dim])
                x, dim = torch.ops.aten.slice.Tensor(x, dim, start, stop, step), dim + 1
            elif isinstance(item, int):
                x = torch.select(x, dim, item)
            elif item.dtype == torch.bool:
                raise WouldWait("a boolean index")
            else:
                tensors[dim], dim = item, dim + 1
        if not tensors:
            return x
        return torch.ops.aten.index.Tensor(x, [tensors.get(place) for place in range(max(tensors) + 1)])


def move(model: nn.Module) -> None:
    """Parameters and buffers of a model to the fake device, for good."""
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, value in kept.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    kept[name] = nn.Parameter(fake, requires_grad=value.requires_grad) if kept is module._parameters else fake


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, device "cuda" exists and holds no values. Tensors of the host keep theirs as long as only NumPy touches them."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Methods(), _Watch():
        yield
