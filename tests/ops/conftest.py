"""What the tests of the ops share: poisoned memory, the instruction sets, and the tolerance measured against float64."""

import pytest
import torch

from muka_fast.ops.table import _C

torch.set_num_threads(1)


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


@pytest.fixture(params=[0, 1, 2], ids=["baseline", "v3", "v4"])
def isa(request):
    """Every instruction set that this machine can run."""
    if _C is None or request.param > _C.machine_isa():
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
        keep = ~exact.isnan()
        if not keep.any():
            return
        ours, eager, exact = (t.double()[keep] for t in (ours, eager, exact))
        error, theirs = (ours - exact).abs().max().item(), (eager - exact).abs().max().item()
        limit = 2 * theirs + floor * max(scale, exact.abs().max().item())
        assert error <= limit, f"{name}: error {error:.2e}, PyTorch's {theirs:.2e}, limit {limit:.2e}"

    return check
