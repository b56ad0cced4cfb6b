"""The op table: which implementation of each op runs on which device, chosen once at import.

MUKA_FAST_BACKEND = auto | reference | cpu | triton overrides the choice (for tests and for hunting a fault); it never changes a
result beyond float rounding. `auto` takes C++ on the CPU and Triton on CUDA, and the PyTorch reference where neither exists.
Floats that no kernel is written for, float64 above all, run the reference in any case.
"""

import contextlib
import os
import subprocess
from collections.abc import Callable

import torch
from torch import Tensor

from muka_fast.errors import first_line
from muka_fast.ops import philox

try:
    from muka_fast import _C
except ImportError:  # a checkout that was never built; `muka-fast doctor` says so
    _C = None

ABI = 2  # of the compiled extension; raised with every change of a C++ signature
if _C is not None and _C.ABI != ABI:
    raise ImportError(f"muka_fast._C has ABI {_C.ABI}, this Python code needs {ABI}: run `pip install -e .` again")

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # what kernels take; the codes are those of csrc/cpu

BACKENDS = ("auto", "reference", "cpu", "triton")
BACKEND = os.environ.get("MUKA_FAST_BACKEND", "auto")
if BACKEND not in BACKENDS:
    raise ImportError(f"MUKA_FAST_BACKEND={BACKEND!r} is not one of {', '.join(BACKENDS)}")

TRITON_NEEDS = (
    "it needs gcc, Python's headers (python3-dev) and a cache to write to and load from (TRITON_CACHE_DIR); "
    "without them, slower: MUKA_FAST_BACKEND=reference"
)
LIBRARY = torch.library.Library("muka_fast", "DEF")
TABLE: dict[str, dict[str, str]] = {}  # op -> device type -> implementation in use


def register(
    name: str,
    schema: str,
    *,
    reference: Callable,
    cpu: Callable | None,
    triton: Callable | None,
    fake: Callable,
) -> Callable:
    """Register one op with torch.library and return the callable `torch.ops.muka_fast.<name>`.

    schema: the argument list and result in torch's schema language, without the name. The first argument is a tensor: where it
    holds floats outside of DTYPE_CODES, the reference runs.
    cpu, triton: None where the extension or Triton is missing.
    Raises ImportError where MUKA_FAST_BACKEND names an implementation that is not there.
    """
    have = {"reference": reference, "cpu": cpu, "triton": triton}
    wish = {"CPU": ("cpu", "reference"), "CUDA": ("triton", "reference")}
    LIBRARY.define(name + schema)
    TABLE[name] = {}
    for device, order in wish.items():
        if BACKEND != "auto":
            # The C++ kernels read host memory and Triton reads it only in its interpreter.
            order = (BACKEND,) if not (BACKEND == "cpu" and device == "CUDA") else ("reference",)
        chosen = next((backend for backend in order if have[backend] is not None), None)
        if chosen is None:
            raise ImportError(f"MUKA_FAST_BACKEND={BACKEND}: {name} has no such implementation on this machine")
        TABLE[name][device.lower()] = chosen
        LIBRARY.impl(name, reference if chosen == "reference" else _or_reference(have[chosen], reference), device)
    torch.library.register_fake(f"muka_fast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.muka_fast, name)


def _or_reference(kernel: Callable, reference: Callable) -> Callable:
    """The kernel, or the reference for the floats that it does not take. Integers stay: some kernels refuse what that would round."""

    def run(x: Tensor, *rest):
        return (kernel if x.dtype in DTYPE_CODES or not x.is_floating_point() else reference)(x, *rest)

    return run


def runs_triton(x: Tensor) -> bool:
    """Of ops that stand outside of the table (their backward is their own): whether Triton computes them where x lies."""
    return BACKEND == "triton" or (BACKEND == "auto" and x.is_cuda)


def why_no_launch() -> str | None:
    """Why Triton, which compiles a file in C before its first launch, can start no kernel on a GPU here; None where it can, or nothing
    is launched."""
    if BACKEND not in ("auto", "triton") or philox.triton is None or philox.INTERPRETED:
        return None
    try:
        _ = philox.triton.runtime.driver.active
    except subprocess.CalledProcessError as error:
        return f"{error.cmd[0]} fails"
    except (RuntimeError, AssertionError, OSError, ImportError) as error:
        return first_line(error)
    return None


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Around a launch: Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def aligned(x: Tensor) -> Tensor:
    """x, copied where it begins off 16 bytes: kernels are compiled ahead of time, and known to spill nothing, for others alone."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def dense(x: Tensor) -> Tensor:
    """x, contiguous and aligned."""
    return aligned(x.contiguous())
