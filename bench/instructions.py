"""Registers, shared memory and the instructions of the innermost loops of a Triton kernel, without a GPU.

    python bench/instructions.py "mc_head bf16 BC=16" [--arch 90]

What a kernel that is bound by neither bytes nor products takes is about its instructions: a multiprocessor of a GH100 begins four a
cycle, one a quarter, each for 32 lanes. Barriers and shared memory in a loop that has no need of them tell of a layout that this
version of Triton has chosen otherwise than the one that the kernel was measured with.
"""

import argparse
import re
from collections import Counter

import triton

from muka_fast.ops.aot import MachineCode, machine_code, specialisations

# Units of a multiprocessor by the first letters of an instruction; whatever else is told as "integer and logic".
UNITS = {
    "multiply and add": ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "IMAD", "UIMAD"),
    "special functions": ("MUFU", "I2F", "F2I"),
    "matrix": ("HMMA", "HGMMA", "IMMA", "WARPGROUP"),
    "global memory": ("LDG", "STG", "RED", "ATOM"),
    "shared memory": ("LDS", "STS", "LDSM", "STSM"),
    "between lanes": ("SHFL", "REDUX"),
    "barriers": ("BAR",),
}


def unit_of(instruction: str) -> str:
    word = re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]
    return next((unit for unit, first in UNITS.items() if word.startswith(first)), "integer and logic")


def describe(name: str, code: MachineCode) -> str:
    lines = [
        f"{name}: {code.registers} registers, {code.stack} bytes spilled, {code.shared} bytes shared, "
        f"{len(code.instructions())} instructions"
    ]
    for loop in sorted(code.loops(), key=len, reverse=True):
        units = Counter(map(unit_of, loop)).most_common()
        lines.append(f"    loop of {len(loop)}: " + ", ".join(f"{unit} {count}" for unit, count in units))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", help="regular expression over the names of the specialisations")
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for 9.0 (default)")
    arguments = parser.parse_args()
    print(f"Triton {triton.__version__}, sm_{arguments.arch}")
    found = [item for item in specialisations() if re.search(arguments.pattern, item.name)]
    if not found:
        parser.error(f"no specialisation is called {arguments.pattern!r}: kernels/ops/*.py list them")
    for item in found:
        print(describe(item.name, machine_code(item, arguments.arch)))


if __name__ == "__main__":
    main()
