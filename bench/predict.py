"""What every kernel should take on a GPU, written down before it runs there; with --measured, the figures of a run beside it.

    python bench/predict.py [--machine h200] [--dtype bfloat16] [--measured bench/results/throughput_h200_202611.json]

The floor of an op is the slowest of: bytes / copy bandwidth, products / matrix rate, random lanes / integer rate, exponentials / rate
of the special-function units. The prediction: floor / SHARE + one launch for each kernel. Nothing here is a measurement, and the
file says so; where a run differs by more than a quarter the cause belongs into its results.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from environment import RESULTS, command
from registry import CASES, Case

from muka_fast.errors import UserError

SHARE = 0.85  # of the floor's rate that a kernel with enough work is expected to reach
LAUNCH_S = 2.5e-6  # device time of a launch that does nothing, back to back in one stream


class Machine(NamedTuple):
    """Rates per second. copy and matrix_16bit were measured on the card; the others are units x clock, from the data sheet.

    memory_bytes: of the data sheet as well.
    """

    copy_bytes: float
    matrix_16bit: float
    matrix_float32: float  # PyTorch's exact products, on the ordinary units: 2 x 128 per SM and cycle
    instructions: float  # 128 lanes per SM and cycle
    exponentials: float  # 16 per SM and cycle
    memory_bytes: int


SMS, CLOCK = 132, 1.83e9  # H200 SXM; the clock under load lies below the boost of 1.98 GHz
UNITS = (SMS * 256 * CLOCK, SMS * 128 * CLOCK, SMS * 16 * CLOCK)
# One chip, two memories.
MACHINES = {"h100": Machine(3.0e12, 790e12, *UNITS, 80 * 10**9), "h200": Machine(4.3e12, 790e12, *UNITS, 141 * 10**9)}
# Instructions per random lane: ten rounds of two wide products (two issue slots each) and two xors, the key's two additions, an
# eighth of that each, plus unpacking, comparing and selecting.
LANE_INSTRUCTIONS = 10 * (2 * 2 + 2 + 2) / 8 + 3
# Forward and backward (of distill_loss the scaling of the kept gradient; of residual_norm also one sum over its programs' sums).
# Of adamw the addresses of the gradients and their norm, in four, as well.
KERNELS = {"distill_loss": 2, "self_attention": 2, "residual_norm": 3, "adamw": 6}
REASONS = {
    "mc_statistics": "reads K logits a class and writes two; small shapes are one launch",
    "mc_head": "K masks of every feature: the random lanes",
    "repeat_dropout": "writes K rows for one read; close to the lanes' rate in 16 bits",
    "distill_loss": "probabilities in, gradient out; backward reads and writes the gradient once more",
    "dropout_add_layer_norm": "reads states and residual, writes states: four times what the random lanes take in 16 bits",
    "one_query_attention": "keys and values once, K rows out of one softmax",
    "residual_norm": "states and residual in, states out and kept; gradients of all three likewise",
    "self_attention": "queries, keys and values in, states out; all of them and three gradients backward",
    "adamw": "gradients twice, weights and moments in and out, casts out",
    "packed_attention": "bytes while every replica has states of its own; from 400 tokens on the random lanes",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=sorted(MACHINES), default="h200")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--measured", type=Path, help="JSON of bench/throughput.py on that machine, for that dtype")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    return parser.parse_args()


def floors(case: Case, machine: Machine, dtype: torch.dtype) -> dict[str, float]:
    """Seconds that each resource needs for one op at one shape."""
    problem = case.build(case.shape, dtype, "meta")  # sizes without memory
    # Our kernels multiply float32 as three products of TF32, each at half the rate of 16 bits.
    matrix = machine.matrix_16bit / (6 if dtype == torch.float32 else 1)
    what, count = problem.counted
    rate = machine.instructions / LANE_INSTRUCTIONS if what == "random lanes" else machine.exponentials
    return {"bytes": problem.bytes_moved / machine.copy_bytes, "products": problem.flops / matrix, what: count / rate}


def measured_ms(path: Path | None, machine: str, dtype: str) -> dict[tuple[str, str], float]:
    """(op, shape) -> median milliseconds of our implementation. Raises UserError for a file that is not of this machine and dtype."""
    if path is None:
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        gpu, rows = kept["environment"]["gpu"], kept["results"]["rows"]
        found = {row["dtype"] for row in rows}
    except OSError as error:
        raise UserError(f"--measured {path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"--measured {path}: is no result of bench/throughput.py") from error
    if machine not in (gpu or "").lower().split():
        raise UserError(f"--measured {path}: was measured on {gpu or 'a CPU'}, not on --machine {machine}")
    if found != {dtype}:
        raise UserError(f"--measured {path}: holds {', '.join(sorted(found)) or 'no row'}, not --dtype {dtype}")
    return {(row["op"], row["shape"]): row["median_ms"] for row in rows if row["impl"] == "ours" and row["median_ms"]}


def main() -> None:
    args = parse_arguments()
    machine, measured = MACHINES[args.machine], measured_ms(args.measured, args.machine, args.dtype)
    lines = [
        f"# Predicted for {args.machine}, {args.dtype}{', with measured times' if measured else ': nothing here was measured'}",
        "",
        f"`python bench/predict.py --machine {args.machine} --dtype {args.dtype}`; model and rates at the head of that file.",
        "",
        "| op | shape | bound by | floor us | predicted us | measured us | measured / predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        if "cuda" not in case.devices or args.dtype not in case.dtypes:
            continue
        seconds = floors(case, machine, getattr(torch, args.dtype))
        bound = max(seconds, key=seconds.get)
        predicted = 1e6 * (seconds[bound] / SHARE + KERNELS.get(case.op, 1) * LAUNCH_S)
        got = measured.get((case.op, case.label))
        cells = [case.op, case.label, bound, f"{1e6 * seconds[bound]:.2f}", f"{predicted:.1f}"]
        cells += ["", ""] if got is None else [f"{1e3 * got:.1f}", f"{1e3 * got / predicted:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {op}: {reason}" for op, reason in REASONS.items())]
    print("\n".join(lines))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from error
    path = args.out / f"predicted_{args.machine}_{args.dtype}.md"
    if measured or not path.exists() or "with measured times" not in path.read_text(encoding="utf-8"):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        print(f"{path} has measured times and stays (--measured)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(command(main))
