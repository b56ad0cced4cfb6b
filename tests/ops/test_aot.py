"""Every Triton specialisation compiles for A100, H100 and B200 without a GPU: no spills, shared memory that the chip has, and no
exchange between warps where a kernel is made without."""

import ast
import os
from pathlib import Path

import pytest

from muka_fast.ops import aot, tuning
from muka_fast.ops.aot import machine_code, specialisations

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET has replaced the compiler", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not on this platform")

REGISTERS = 65_536  # of a multiprocessor
# Bytes that one block may have; of 8.0 that of 8.6 and 8.9, which run the same code (an A100 itself has 163 KiB).
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def cases():
    for item in specialisations():
        for arch in (arch for arch in SHARED_LIMIT if arch >= item.least_arch):
            mark = pytest.mark.candidate if not item.launched(arch) else [] if item.fast else pytest.mark.slow
            yield pytest.param(item, arch, id=f"{item.name} sm_{arch}", marks=mark)


def test_every_triton_op_is_listed():
    names = {item.name.split()[0] for item in specialisations()}
    assert names == {
        "repeat_dropout", "mc_head", "mc_statistics", "distill_loss", "dropout_add_layer_norm", "one_query_attention",
        "packed_attention", "residual_norm", "self_attention", "adamw",
    }  # fmt: skip


def test_what_an_architecture_takes_is_compiled_for_it():
    by_ci = [case.values for case in cases() if pytest.mark.candidate not in case.marks]
    assert {(item.name.split()[0], *item.tuned, arch) for item, arch in by_ci if item.tuned} == {
        (op, shape, tuning.taken(f"sm_{arch}", op, shape), arch)
        for op, shapes in tuning.CANDIDATES.items()
        for shape in shapes
        for arch in SHARED_LIMIT
    }


def test_every_launch_asks_for_fused_multiply_adds_as_the_compilation_here_does():
    launches = 0
    for path in Path(aot.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launches += 1
                assert "FUSED" in [ast.unparse(more.value) for more in node.keywords if more.arg is None], ast.unparse(node.func)
    assert launches >= 13


@pytest.mark.parametrize(("item", "arch"), list(cases()))
def test_no_spills_and_shared_memory_fits(item, arch, record_property):
    code = machine_code(item, arch)
    line = f"{item.name:<48} sm_{arch:<4} {code.registers:>4} registers {code.stack:>5} B spilled {code.shared:>7} B shared"
    print(line)
    record_property("resources", line)
    assert code.stack == 0, line
    assert code.shared <= SHARED_LIMIT[arch], line
    taken = -(-code.registers // 8) * 8 * 32 * item.num_warps * item.at_once  # registers come in eights
    assert arch != 90 or taken <= REGISTERS, f"{line}: {item.at_once} programs do not fit"
    if item.lone_warps:
        assert code.loops(), line
        waiting = [text for loop in code.loops() for text in loop if "BAR." in text or "STS" in text]
        assert not waiting, f"{line}: a loop over its samples exchanges numbers between warps ({waiting[0]})"
