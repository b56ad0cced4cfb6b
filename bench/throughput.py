"""Microbenchmarks of the ops: correct first, then milliseconds, ratios against eager PyTorch and torch.compile, shares of the limit.

    python bench/throughput.py [--op mc_statistics,distill_loss] [--device cpu|cuda] [--dtype float32|float16|bfloat16]
                               [--compare eager,compile,ours] [--threads 1] [--base REF] [--json F] [--plot F] [--toy]

Every round calls each implementation once, in turn; medians, 20th and 80th percentiles are over rounds. The limit is the larger of
bytes / measured copy bandwidth and products / measured matrix-product rate. A GPU's cache is faster than the first, so that no
share is given of bytes that it holds ("in L2"). Results go to bench/results/ unless --json is given, after every op and shape.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from ceilings import copy_bytes_per_s, gemm_flops_per_s
from environment import device, environment, environment_lines, keep, result_file, usable_cores
from registry import CASES, Case, Problem
from timing import interleaved, ratio, seconds_per_call, spread

from muka_fast.errors import first_line
from muka_fast.ops import distill_loss, mc_statistics, table

ROOT = Path(__file__).resolve().parent.parent
BASE_ROUNDS = 3  # of --base
COLUMNS = ["op", "shape", "implementation", "ms", "p20", "p80", "x eager", "x loop", "x compile", "GB/s", "of limit", "work"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default=",".join(dict.fromkeys(case.op for case in CASES)), help="comma-separated")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument(
        "--compare", help="of eager, compile, ours; default: all, with compile at one shape of three ops (it takes long)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the ratios; ours is also timed with all of them")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each op and shape")
    parser.add_argument("--base", metavar="REF", help="a commit to compare with, built in a worktree of its own")
    parser.add_argument("--json", type=result_file, help="write the list of results to this file instead of bench/results")
    parser.add_argument("--plot", metavar="F", help="bar chart of the ratios, .png or .svg")
    parser.add_argument("--toy", action="store_true", help="the smallest shapes, briefly: proves the script, not the machine")
    args = parser.parse_args()
    if not args.json and (args.toy or args.op != parser.get_default("op")):
        parser.error("--json F: a toy run, or one of some ops alone, does not replace the result in bench/results")
    unknown = set(args.op.split(",")) - {case.op for case in CASES}
    unknown |= set((args.compare or "").split(",")) - {"eager", "compile", "ours", ""}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return args


def implementations(problem: Problem, case: Case, compare: str | None) -> dict:
    """What to time. Compiled: the best eager form, with its warm-up done here."""
    wanted = set(compare.split(",")) if compare else {"eager", "ours"} | ({"compile"} if case.compiled else set())
    runs = {"ours": problem.ours} if "ours" in wanted else {}
    if "eager" in wanted:
        runs |= problem.eager
    if "compile" in wanted:
        compiled = torch.compile(problem.eager["eager"])
        for _ in range(2):
            compiled()
        runs["compile"] = compiled
    return runs


def description(case: Case, args: argparse.Namespace) -> dict:
    return {"op": case.op, "shape": case.label, "device": args.device, "dtype": args.dtype}


def not_timed(case: Case, args: argparse.Namespace, why: str) -> list[dict]:
    """The one row of what is wrong or does not run."""
    print(f"{case.op} {case.label}: WRONG, not timed: {why}", flush=True)
    nothing = dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "ratio_vs_eager", "share_of_limit"))
    return [description(case, args) | {"impl": "ours"} | nothing | {"correct": False}]


def run_case(case: Case, args: argparse.Namespace, rates: dict[str, float], cores: int) -> list[dict]:
    """The rows of one op at one shape; timings only of what is correct."""
    problem = case.build(case.shape, getattr(torch, args.dtype), args.device)
    wrong = problem.check()
    if wrong:
        return not_timed(case, args, wrong)
    base = description(case, args)
    runs = implementations(problem, case, None if args.toy else args.compare)
    budget = 0.2 if args.toy else args.seconds
    seconds = interleaved(runs, args.device, budget)
    if "ours" in runs and args.device == "cpu" and cores > args.threads:
        # Not in turn with the others: a change of the number of threads makes PyTorch's next call milliseconds slower.
        torch.set_num_threads(cores)
        seconds |= {f"ours, {cores} threads": interleaved({"ours": problem.ours}, args.device, budget / 4)["ours"]}
        torch.set_num_threads(args.threads)
    bytes_s, products_s = problem.bytes_moved / rates["copy_bytes_per_s"], problem.flops / rates["gemm_flops_per_s"]
    in_cache = products_s < bytes_s and problem.bytes_moved < rates.get("l2_bytes", 0)
    rows = []
    for name, values in seconds.items():
        median, p20, p80 = spread(values)
        row = base | {"impl": name, "median_ms": 1e3 * median, "p20_ms": 1e3 * p20, "p80_ms": 1e3 * p80}
        alike = "threads" not in name  # as eager and the limit: those are of --threads
        row["ratio_vs_eager"] = ratio(seconds["eager"], values) if "eager" in seconds and alike else None
        row |= {"share_of_limit": max(bytes_s, products_s) / median if alike and not in_cache else None, "correct": True}
        keys = {"x loop": "eager loop", "x compile": "compile"} if alike else {}
        others = {column: ratio(seconds[key], values) for column, key in keys.items() if key in seconds}
        others |= {"in cache": in_cache}
        what, count = problem.counted
        extra = {"GB/s": problem.bytes_moved / median / 1e9, "work": f"{count / median / 1e9:.2f} G {what}/s"}
        rows.append(row | {"_table": others | extra})
    return rows


def markdown(rows: list[dict], header: str) -> str:
    """The table that is printed and kept."""
    lines = [header, "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        if not row["correct"]:
            lines.append(f"| {row['op']} | {row['shape']} | ours | wrong result, not timed |" + " |" * (len(COLUMNS) - 4))
            continue
        more = row.get("_table", {})
        number = lambda value, digits=2: "" if value is None else f"{value:.{digits}f}"
        times = [f"{row[name]:.4g}" for name in ("median_ms", "p20_ms", "p80_ms")]
        ratios = [number(row["ratio_vs_eager"]), number(more.get("x loop")), number(more.get("x compile"))]
        share = "" if row["share_of_limit"] is None else f"{100 * row['share_of_limit']:.0f} %"
        share = "in L2" if more.get("in cache") else share
        cells = [row["op"], row["shape"], row["impl"], *times, *ratios, number(more.get("GB/s")), share, more.get("work", "")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def call_overhead(device: str) -> str:
    """One call of the smallest op through torch.library, beside the implementation and the bare kernel."""
    logits, offsets = torch.randn(16, 32, 4, device=device), [0, 2, 4]
    runs = {
        "the public function and views of its eight fields": lambda: tuple(mc_statistics.mc_statistics(logits, offsets)),
        "the public function": lambda: mc_statistics.mc_statistics(logits, offsets),
        "through torch.library": lambda: mc_statistics.RAW(logits, offsets),
    }
    if device == "cpu" and table._C is not None:
        out = mc_statistics.empty_output(logits, 2)
        runs["direct call"] = lambda: mc_statistics.mc_statistics_cpu(logits, offsets)
        runs["allocation alone"] = lambda: mc_statistics.empty_output(logits, 2)
        runs["bare kernel"] = lambda: table._C.mc_statistics(logits.data_ptr(), 0, 16, 32, 128, 4, offsets, out.data_ptr(), 1)
    elif device == "cuda":
        runs["direct call"] = lambda: mc_statistics.mc_statistics_triton(logits, offsets)
    # Host time on either device: the launch is what a small call costs.
    seconds = interleaved(runs, "cpu", 0.5)
    if device == "cuda":
        torch.cuda.synchronize()
    figures = ", ".join(f"{name} {1e6 * spread(values).median:.1f} us" for name, values in seconds.items())
    return f"One call of mc_statistics at K16 B32 N2 C2: {figures}."


def loss_limit(device: str) -> str:
    """What a training step at B256 N4 C77 spends outside of the kernel: PyTorch's autograd around a gradient that is there already."""
    problem = next(case for case in CASES if case.op == "distill_loss" and case.compiled)
    built = problem.build(problem.shape, torch.float32, device)
    student = torch.randn(256, 308, device=device, requires_grad=True)
    loss, grad = torch.rand(256, device=device), torch.rand(256, 308, device=device)

    def step() -> None:
        student.grad = None
        distill_loss.WithGradient.apply(student, loss, grad, True).mean().backward()

    # Host time on either device, as above: the kernels of so small a step end sooner.
    seconds = interleaved({"ours": built.ours, "eager": built.eager["eager"], "autograd": step}, "cpu", 2.0)
    if device == "cuda":
        torch.cuda.synchronize()
    ours, eager, autograd = (1e6 * spread(seconds[name]).median for name in ("ours", "eager", "autograd"))
    host = " of the host" if device == "cuda" else ""
    return (
        f"One step of distill_loss at B256 N4 C77: {ours:.0f} us{host}, eager {eager:.0f} us; {autograd:.0f} us of ours remain "
        "without any kernel (Function, mean, backward, one product)."
    )


def measure_rates(device: str, toy: bool, dtype: torch.dtype) -> dict[str, float]:
    """The limits, in this run and with this number of threads; the rate of torch.exp in cache for scale.

    On a GPU these are 32 MiB, enough to fill it: the rate of its L2 cache rather than of the units for exponentials.
    """
    elements, calls = (1 << 22, 20) if device == "cuda" else (1 << 12, 200)
    values, out = torch.randn(elements, device=device), torch.empty(elements, device=device)
    each = min(seconds_per_call(lambda: torch.exp(values, out=out), device, calls) for _ in range(20))
    products = gemm_flops_per_s(device, toy, dtype)
    if device == "cuda" and dtype == torch.float32:  # our kernels multiply by three products of TF32, each at half the rate of 16 bits
        products = max(products, gemm_flops_per_s(device, toy, torch.bfloat16) / 6)
    cache = {"l2_bytes": torch.cuda.get_device_properties(0).L2_cache_size} if device == "cuda" else {}
    return cache | {
        "copy_bytes_per_s": copy_bytes_per_s(device, toy),
        "gemm_flops_per_s": products,
        "exp_per_s": values.numel() / each,
    }


def timed_elsewhere(tree: Path, args: argparse.Namespace, file: Path) -> dict[tuple[str, str], float]:
    """Milliseconds of `ours` by op and shape, measured by the script of that tree with its own package in a process of its own."""
    command = [sys.executable, tree / "bench" / "throughput.py", "--compare", "ours", "--json", file, "--op", args.op]
    command += ["--device", args.device, "--dtype", args.dtype, "--threads", args.threads, "--seconds", args.seconds / BASE_ROUNDS]
    env = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run([str(word) for word in (*command, *(["--toy"] if args.toy else []))], cwd=tree, env=env, capture_output=True)
    if done.returncode:  # the file may hold a part
        sys.exit(f"bench/throughput.py of {tree} ended with {done.returncode}: {(done.stdout + done.stderr).decode()[-1000:]}")
    return {(row["op"], row["shape"]): row["median_ms"] for row in json.loads(file.read_text()) if row["impl"] == "ours"}


def against_base(args: argparse.Namespace) -> str:
    """One line per op and shape: how many times as fast as another commit, which is built in a worktree that is removed again.

    Both trees are timed alone, in turn: a process that also runs eager PyTorch has colder caches, and a busy machine changes.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree, file = Path(folder) / "tree", Path(folder) / "rows.json"
        steps = [["git", "-C", ROOT, "worktree", "add", "--detach", tree, args.base]]
        steps += [[sys.executable, "setup.py", "-q", "build_ext", "--inplace"]]
        try:
            for step in steps:
                done = subprocess.run(step, cwd=tree if tree.exists() else ROOT, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"--base {args.base}: {' '.join(map(str, step))} failed: {done.stderr[-1000:]}")
            rounds = [(timed_elsewhere(tree, args, file), timed_elsewhere(ROOT, args, file)) for _ in range(BASE_ROUNDS)]
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=False, capture_output=True)
    lines = [f"\nAgainst {args.base}, {BASE_ROUNDS} processes each in turn:\n"]
    for op, shape in rounds[0][1]:
        pairs = [(before.get((op, shape)), now.get((op, shape))) for before, now in rounds]
        if all(old and new for old, new in pairs):
            old, new = (statistics.median(values) for values in zip(*pairs, strict=True))
            each = ", ".join(f"{before / now:.2f}" for before, now in pairs)
            lines.append(f"- {op} {shape}: {old / new:.2f} times as fast ({old:.4g} -> {new:.4g} ms; by round {each})")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: str) -> None:
    """Ratios against the best eager form, one bar per op and shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row["ratio_vs_eager"] and row["impl"] not in ("eager",)]
    names = [f"{row['op']} {row['shape']}\n{row['impl']}" for row in timed]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 + 0.42 * len(timed)), layout="constrained")
    axes.barh(names, [row["ratio_vs_eager"] for row in timed])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as the best eager PyTorch form")
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=150)


def save(args: argparse.Namespace, rates: dict[str, float], rows: list[dict], report: str, finished: bool = False) -> Path:
    """Rewrites the file with what is measured so far: a run that is cut off loses no more than one op and shape."""
    plain = [{name: value for name, value in row.items() if name != "_table"} for row in rows]
    if not args.json:
        stem = "throughput" if args.dtype == "float32" else f"throughput_{args.dtype}"
        return keep(stem, {"rates": rates, "rows": plain} | ({} if finished else {"unfinished": True}), report, args.device)
    Path(args.json).write_text(json.dumps(plain, indent=1) + "\n")
    return Path(args.json)


def main() -> int:
    args = parse_arguments()
    begin, cores = time.perf_counter(), usable_cores()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rates = measure_rates(args.device, args.toy, getattr(torch, args.dtype))
    header = (
        f"# Throughput of the ops on {args.device}, {args.dtype}\n\n"
        f"Copy bandwidth {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s, matrix products {rates['gemm_flops_per_s'] / 1e9:.1f} Gflop/s, "
        f"torch.exp in cache {rates['exp_per_s'] / 1e9:.2f} G/s"
        + (f" ({args.threads} thread{'s' if args.threads > 1 else ''})." if args.device == "cpu" else ".")
    )
    if "l2_bytes" in rates:
        header += f' "in L2": less than the {rates["l2_bytes"] / 1e6:.0f} MB of that cache, which copy bandwidth does not limit.'
    rows = []
    for case in CASES:
        runs = args.device in case.devices and args.dtype in case.dtypes and (case.toy or not args.toy)
        if case.op in args.op.split(",") and runs:
            try:
                new = run_case(case, args, rates, cores)
            except Exception as error:  # one op's, which must not cost those after it their time on a card
                new = not_timed(case, args, f"{type(error).__name__}: {first_line(error)}")
            print(markdown(new, "").strip() if not rows else "\n".join(markdown(new, "").strip().splitlines()[2:]), flush=True)
            rows += new
            save(args, rates, rows, markdown(rows, f"{header} Unfinished."))
    overheads = [call_overhead(args.device)] + ([] if args.toy else [loss_limit(args.device)])
    report = markdown(rows, header) + "\n" + "\n\n".join(overheads) + "\n"
    if args.base:
        save(args, rates, rows, report)
        report += against_base(args)
    print(f"\n{header}\n" + report.split("\n\n", 3)[-1] + environment_lines(environment(args.device)))
    print(f"{time.perf_counter() - begin:.0f} s")
    if args.plot:
        plot(rows, args.plot)
    print("kept in", save(args, rates, rows, report, finished=True))
    return 0 if all(row["correct"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
