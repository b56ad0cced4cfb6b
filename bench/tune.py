"""Times the candidates of kernels/ops/tuning.py on the card present, and writes the fastest of each class of shape into that file.

    python bench/tune.py [--write] [--op packed_attention,...] [--seconds 0.5] [--json F]
    python bench/tune.py --device cpu --toy --json F        proves the script: the C++ ops know no candidates

A candidate counts only where its result is correct, and replaces the default only where its median is more than 2 % below.
Both files are rewritten after every class of shape, so that a run which is cut off loses no more than one.
"""

import argparse
import json
import pprint
import re
import time
from pathlib import Path

import torch
from environment import device, environment, result_file
from registry import (
    K,
    attention_problem,
    dropout_problem,
    head_problem,
    norm_problem,
    one_query_problem,
    plain_attention_problem,
    statistics_problem,
)
from timing import interleaved, spread

from muka_fast.errors import first_line
from muka_fast.ops import tuning

FILE = Path(__file__).resolve().parent.parent / "kernels" / "ops" / "tuning.py"
WORTH = 0.98  # of the default's time
# op, class of shape, dtype, the registry's problem and its shape: one that fills the card, in the method's own proportions
WORK = [
    ("packed_attention", "32 bit d64 masked", "float32", attention_problem, (K, 32, 128, 12)),
    ("packed_attention", "32 bit d64", "float32", plain_attention_problem, (K, 32, 128, 12)),
    ("packed_attention", "16 bit d64 masked", "bfloat16", attention_problem, (K, 64, 128, 12)),
    ("packed_attention", "16 bit d64", "bfloat16", plain_attention_problem, (K, 64, 128, 12)),
    ("one_query_attention", "d64", "bfloat16", one_query_problem, (K, 512, 128, 12)),
    ("repeat_dropout", "any", "bfloat16", dropout_problem, (K, 16_384, 768)),
    ("dropout_add_layer_norm", "1024", "bfloat16", norm_problem, (K, 16_384, 768)),  # fewer rows clip its candidates
    ("dropout_add_layer_norm", "2048", "bfloat16", norm_problem, (K, 4096, 2048)),
    ("mc_statistics", "128", "float32", statistics_problem, (K, 8192, 8, 77)),
    ("mc_statistics", "160", "float32", statistics_problem, (K, 4096, 8, 150)),
    ("mc_statistics", "256", "float32", statistics_problem, (K, 4096, 8, 200)),
    ("mc_statistics", "512", "float32", statistics_problem, (K, 2048, 4, 500)),
    ("mc_head", "16 bit 16", "bfloat16", head_problem, (K, 1024, 768, 16)),
    ("mc_head", "32 bit 16", "float32", head_problem, (K, 1024, 768, 16)),
]
TOYS = {attention_problem: (4, 4, 24, 2), one_query_problem: (4, 4, 24, 2), dropout_problem: (4, 32, 384), norm_problem: (4, 32, 384)}
TOYS |= {plain_attention_problem: (4, 4, 24, 2), statistics_problem: (4, 32, 2, 2), head_problem: (4, 32, 384, 2)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ops = list(dict.fromkeys(row[0] for row in WORK))
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", default=",".join(ops), help="comma-separated")
    parser.add_argument("--seconds", type=float, default=0.5, help="for all candidates of a class together")
    parser.add_argument("--toy", action="store_true", help="sizes that prove the script, not the card")
    parser.add_argument("--write", action="store_true", help="write what was found into kernels/ops/tuning.py")
    parser.add_argument("--json", type=result_file, help="write every candidate's milliseconds to this file")
    args = parser.parse_args()
    if args.write and args.device == "cpu":
        parser.error("--write needs a GPU: a CPU has nothing to say about Triton's tiles")
    args.op = args.op.split(",")
    if unknown := set(args.op) - set(ops):
        parser.error(f"--op {', '.join(sorted(unknown))}: one or more of {', '.join(ops)}")
    return args


def time_candidates(op: str, shape: str, problem, device: str, seconds: float) -> dict[tuple[int, ...], float]:
    """Median milliseconds of every candidate whose result is right."""

    def run(entry: tuple[int, ...]) -> None:
        with tuning.trying(op, shape, entry):
            problem.ours()

    right = []
    for entry in tuning.CANDIDATES[op][shape]:
        with tuning.trying(op, shape, entry):
            try:
                wrong = problem.check()
            except Exception as error:  # one candidate's, which must not cost the others their time on a card
                wrong = f"{type(error).__name__}: {first_line(error)}"
        if wrong:
            print(f"{op} {shape} {entry}: WRONG, not timed: {wrong}", flush=True)
        else:
            right.append(entry)
    times = interleaved({str(entry): lambda entry=entry: run(entry) for entry in right}, device, seconds)
    return {entry: 1e3 * spread(times[str(entry)]).median for entry in right}


def best(times: dict[tuple[int, ...], float], default: tuple[int, ...]) -> tuple[int, ...]:
    """The fastest, where it is worth leaving the default."""
    fastest = min(times, key=times.get)
    return fastest if default not in times or times[fastest] < WORTH * times[default] else default


def with_table(text: str, arch: str, found: dict[str, dict[str, tuple[int, ...]]], told: str) -> str:
    """tuning.py with what an architecture has measured put in the place of what it had measured before."""
    before = tuning.MEASURED.get(arch, {})
    measured = {**tuning.MEASURED, arch: before | {op: before.get(op, {}) | shapes for op, shapes in found.items()}}
    sources = {**tuning.SOURCES, arch: told}
    block = f"MEASURED: dict[str, dict[str, dict[str, Entry]]] = {pprint.pformat(measured, width=110)}\n"
    block += f"SOURCES: dict[str, str] = {pprint.pformat(sources, width=110)}\n"
    head, tail = "# -- written by bench/tune.py --\n", "# -- end --\n"
    return re.sub(f"{re.escape(head)}.*{re.escape(tail)}", lambda _: head + block + tail, text, flags=re.DOTALL)


def write_table(found: dict[str, dict[str, tuple[int, ...]]]) -> None:
    """Puts what was found on the card present into kernels/ops/tuning.py."""
    arch, where = tuning.architecture(torch.device("cuda")), environment("cuda")
    told = f"python bench/tune.py --write; {where.get('gpu') or arch}, torch {torch.__version__}, {time.strftime('%Y-%m')}"
    aside = FILE.with_suffix(".new")
    aside.write_text(with_table(FILE.read_text(), arch, found, told))
    aside.replace(FILE)


def main() -> None:
    args = parse_arguments()
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    rows = []
    for op, shape, dtype, build, size in WORK:
        if op not in args.op:
            continue
        size, dtype = (TOYS[build], "float32") if args.toy else (size, dtype)
        problem = build(size, getattr(torch, dtype), args.device)
        times = time_candidates(op, shape, problem, args.device, 0.05 if args.toy else args.seconds)
        if not times:
            continue
        default = tuning.CANDIDATES[op][shape][0]
        found.setdefault(op, {})[shape] = best(times, default)
        for entry, ms in times.items():
            note = "taken" if entry == found[op][shape] else ""
            rows.append({"op": op, "shape": shape, "size": size, "dtype": dtype, "entry": entry, "ms": ms, "taken": bool(note)})
            print(f"{op:<24}{shape:<20}{entry!s:<18}{ms:10.4f} ms  {'default ' if entry == default else ''}{note}", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
        if args.write:
            write_table(found)
    if args.write:
        print("written to", FILE)


if __name__ == "__main__":
    main()
