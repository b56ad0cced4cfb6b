"""What the tests of the ops share: poisoned memory, instruction sets, tolerance against float64, NumPy Philox."""

import numpy as np
import pytest
import torch
from hypothesis import settings

from muka_fast.ops.table import _C, BACKEND

torch.set_num_threads(1)
settings.register_profile("muka_fast_ops", deadline=None, print_blob=True)
settings.load_profile("muka_fast_ops")


def poison(tensor):
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).min) if tensor.dtype != torch.bool else tensor


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty* hand out NaN, so that an output element that a kernel never writes fails the comparison."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        real = getattr(owner, name)

        def poisoned(*args, _real=real, **kwargs):
            tensor = _real(*args, **kwargs)
            return tensor if torch.compiler.is_compiling() else poison(tensor)

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture(autouse=True)
def seeded():
    """As in the conftest above, which the interpreter's process does not load."""
    torch.manual_seed(0)


@pytest.fixture(params=[0, 1, 2], ids=["baseline", "v3", "v4"])
def isa(request):
    """Every instruction set that this machine can run."""
    if BACKEND == "triton" and request.param == 0:
        yield None  # one run is enough where no C++ runs
        return
    if BACKEND == "triton" or _C is None or request.param > _C.machine_isa():
        pytest.skip("this machine (or this build) has no such instruction set")
    _C.limit_isa(request.param)
    yield request.param
    _C.limit_isa(_C.machine_isa())


@pytest.fixture(scope="session")
def assert_as_exact_as():
    """assert_as_exact_as(ours, eager, exact): the error against float64 is at most twice eager PyTorch's plus a floor.

    floor: a few roundings of the largest magnitude (at least `scale`), for the cases where PyTorch happens to be exact.
    """

    def check(ours, eager, exact, floor=4e-7, scale=1.0, name=""):
        assert ours.shape == exact.shape, name
        assert torch.equal(ours.isnan(), exact.isnan()), f"{name}: NaN in other places"
        keep = exact.isfinite()
        infinite = exact.isinf()
        assert torch.equal(ours[infinite].double(), exact[infinite]), f"{name}: other infinities"
        if not keep.any():
            return
        ours, eager, exact = (t.double()[keep] for t in (ours, eager, exact))
        error, theirs = (ours - exact).abs().max().item(), (eager - exact).abs().max().item()
        limit = 2 * theirs + floor * max(scale, exact.abs().max().item())
        assert error <= limit, f"{name}: error {error:.2e}, PyTorch's {theirs:.2e}, limit {limit:.2e}"

    return check


def philox_numpy(counter, key):
    """Philox4x32-10 on arrays, written from the paper and from nothing in this repository: four uint64 arrays of 32-bit words."""
    x = [np.asarray(word, np.uint64) & np.uint64(0xFFFFFFFF) for word in np.broadcast_arrays(*counter)]
    k = [int(key) & 0xFFFFFFFF, int(key) >> 32]
    half = np.uint64(32)
    for _ in range(10):
        first, second = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        low = np.uint64(0xFFFFFFFF)
        x = [(second >> half) ^ x[1] ^ np.uint64(k[0]), second & low, (first >> half) ^ x[3] ^ np.uint64(k[1]), first & low]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x


def keep_numpy(num_samples, width, threshold, seed, site, example_ids, offsets, first_sample=0):
    """The mask contract from its text (True = kept, [K, rows, width]): words to little-endian bytes, bytes to 16-bit lanes."""
    keep = np.empty((num_samples, len(example_ids), width), bool)
    for k in range(num_samples):
        for row, (example, offset) in enumerate(zip(example_ids, offsets, strict=True)):
            calls = np.arange(offset // 8, (offset + width + 7) // 8 + 1, dtype=np.uint64)
            words = philox_numpy((calls, first_sample + k, site, example % 2**32), seed)
            lanes = np.stack(words, -1).astype("<u4").view("<u2").reshape(-1)
            keep[k, row] = lanes[offset % 8 :][:width] >= threshold
    return keep


@pytest.fixture(scope="session")
def numpy_philox():
    return philox_numpy


@pytest.fixture(scope="session")
def numpy_keep():
    return keep_numpy
