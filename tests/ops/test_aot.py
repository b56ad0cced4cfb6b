"""Every Triton specialisation compiles for A100, H100 and B200 without a GPU: no spills, and shared memory that the chip has."""

import importlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET has replaced the compiler", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not on this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402 - only where Triton is
from triton.compiler import ASTSource  # noqa: E402

OPS = Path(importlib.import_module("muka_fast.ops.table").__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one block may have


def specialisations():
    """Whatever the op files list under SPECIALISATIONS: a new op needs no line here."""
    for path in sorted(OPS.glob("*.py")):
        if path.stem != "__init__":
            module = importlib.import_module(f"muka_fast.ops.{path.stem}")
            yield from getattr(module, "SPECIALISATIONS", [])


def cases():
    for item in specialisations():
        for arch in (arch for arch in SHARED_LIMIT if arch >= item.least_arch):
            yield pytest.param(item, arch, id=f"{item.name} sm_{arch}", marks=[] if item.fast else pytest.mark.slow)


def usage(item, arch):
    """Registers, stack bytes (spills and local arrays) and shared memory of the machine code that Triton would load."""
    pointers = [place for place, name in enumerate(item.kernel.arg_names) if item.signature.get(name, "").startswith("*")]
    source = ASTSource(
        fn=item.kernel,
        signature={**item.signature, **dict.fromkeys(item.constexprs, "constexpr")},
        constexprs=item.constexprs,
        attrs={(place,): [["tt.divisibility", 16]] for place in pointers} if item.aligned else {},
    )
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack, static = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", listing.stdout + listing.stderr).groups()
    )
    return registers, stack, max(static, compiled.metadata.shared)


def test_every_triton_op_is_listed():
    names = {item.name.split()[0] for item in specialisations()}
    assert names == {
        "repeat_dropout", "mc_head", "mc_statistics", "distill_loss", "dropout_add_layer_norm", "one_query_attention",
        "packed_attention", "residual_norm", "self_attention",
    }  # fmt: skip


@pytest.mark.parametrize(("item", "arch"), list(cases()))
def test_no_spills_and_shared_memory_fits(item, arch, record_property):
    registers, stack, shared = usage(item, arch)
    line = f"{item.name:<48} sm_{arch:<4} {registers:>4} registers {stack:>5} B spilled {shared:>7} B shared"
    print(line)
    record_property("resources", line)
    assert stack == 0, line
    assert shared <= SHARED_LIMIT[arch], line
