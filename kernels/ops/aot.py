"""What compiles ahead of time: the form in which each op file lists its kernels, and their machine code, without a GPU."""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from muka_fast.ops import tuning


class Specialisation(NamedTuple):
    """One Triton kernel with everything its machine code depends on.

    signature: argument name -> Triton type ("*fp32", "i32", "i64", "fp32") of every argument that is not a constexpr.
    constexprs: argument name -> value. fast: compiled by the default test run too, not only by the slow one.
    aligned: compiled as Triton's JIT does for pointers that 16 divides, as those of torch's allocations are; else without that.
    multiples: integers that 16 divides as well. least_arch: the first compute capability that it is launched on, 80 for 8.0.
    lone_warps: its innermost loops wait for no other warp, whatever layouts a version of Triton gives its tiles.
    at_once: programs that must fit the registers of a multiprocessor together, as they are launched so on sm_90; 0 for any.
    tuned: the class of shape and the candidate of tuning.py that it is, where an architecture may take another one.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    fast: bool = False
    aligned: bool = False
    multiples: tuple[str, ...] = ()
    least_arch: int = 80
    lone_warps: bool = False
    at_once: int = 0
    tuned: tuple[str, tuning.Entry] | None = None

    def launched(self, arch: int) -> bool:
        """Whether a launch takes it there, and not bench/tune.py alone."""
        if self.tuned is None:
            return True
        shape, entry = self.tuned
        return entry == tuning.taken(f"sm_{arch}", self.name.split()[0], shape)


def specialisations() -> Iterator[Specialisation]:
    """Whatever the op files list under SPECIALISATIONS: a new op needs no line here."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem != "__init__":
            yield from getattr(importlib.import_module(f"muka_fast.ops.{path.stem}"), "SPECIALISATIONS", [])


class MachineCode(NamedTuple):
    """registers of a thread, stack bytes of it (spills, local arrays), shared bytes of a program; the machine code itself."""

    registers: int
    stack: int
    shared: int
    cubin: bytes

    def instructions(self) -> list[tuple[int, str]]:
        """Addresses and texts."""
        listing = _cuobjdump("-sass", self.cubin)
        return [(int(a, 16), text) for a, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", listing, re.MULTILINE)]

    def loops(self) -> list[list[str]]:
        """The instructions of every innermost loop."""
        code = self.instructions()
        place = {address: i for i, (address, _) in enumerate(code)}
        back = ((re.search(r"\bBRA\b.*0x([0-9a-f]+)", text), i) for i, (_, text) in enumerate(code))
        spans = [(place[int(found[1], 16)], i) for found, i in back if found and place[int(found[1], 16)] < i]
        inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
        return [[text for _, text in code[a : b + 1]] for a, b in inner]


def _cuobjdump(option: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def machine_code(item: Specialisation, arch: int) -> MachineCode:
    """What Triton would load for `item` on a GPU of compute capability `arch`, 90 for 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from muka_fast.ops.fast_math import FUSED

    names = item.kernel.arg_names
    divided = [name for name in names if item.signature.get(name, "").startswith("*")] if item.aligned else []
    source = ASTSource(
        fn=item.kernel,
        signature={**item.signature, **dict.fromkeys(item.constexprs, "constexpr")},
        constexprs=item.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*divided, *item.multiples)},
    )
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages, **FUSED}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    listing = _cuobjdump("-res-usage", compiled.asm["cubin"])
    registers, stack, static = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", listing).groups())
    return MachineCode(registers, stack, max(static, compiled.metadata.shared), compiled.asm["cubin"])
