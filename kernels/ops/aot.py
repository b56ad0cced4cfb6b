"""The form in which each op file lists its ahead-of-time specialisations: what tests/ops/test_aot.py compiles without a GPU."""

from typing import Any, NamedTuple


class Specialisation(NamedTuple):
    """One Triton kernel with everything its machine code depends on.

    signature: argument name -> Triton type ("*fp32", "i32", "i64", "fp32") of every argument that is not a constexpr.
    constexprs: argument name -> value. fast: compiled by the default test run too, not only by the slow one.
    aligned: compiled as Triton's JIT does for pointers that 16 divides, as those of torch's allocations are; else without that.
    least_arch: the first compute capability that it is launched on, 80 for 8.0.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    fast: bool = False
    aligned: bool = False
    least_arch: int = 80
