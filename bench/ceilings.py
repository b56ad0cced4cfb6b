"""What this machine can do at most, measured: copy bandwidth, matrix-product rate, Philox lanes. Shares of a limit refer to these.

    python bench/ceilings.py [--device cpu|cuda] [--toy] [--json F]

Bandwidth counts bytes read plus bytes written; products are on random data, since zeros run faster (seen: 13 % on an H200).
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environment import keep

from muka_fast.ops.repeat_dropout import repeat_dropout


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="sizes that prove the script, not the machine")
    parser.add_argument("--json", help="write the figures to this file instead of bench/results")
    return parser.parse_args()


def median_seconds(run: Callable[[], object], device: str, repetitions: int = 11) -> float:
    """Median of single calls after two warm-ups; device events on CUDA."""
    for _ in range(2):
        run()
    seconds = []
    for _ in range(repetitions):
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            seconds.append(start.elapsed_time(stop) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[repetitions // 2]


def copy_bytes_per_s(device: str, toy: bool) -> float:
    elements = 1 << 18 if toy else (1 << 30 if device == "cuda" else 1 << 26)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def gemm_flops_per_s(device: str, toy: bool, dtype: torch.dtype) -> float:
    size = 256 if toy else (8192 if device == "cuda" else 1536)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b, out=out), device)


def philox_lanes_per_s(device: str, toy: bool) -> float:
    """Masked elements of repeat_dropout over a row block that stays in cache."""
    rows = 64 if toy else (4096 if device == "cuda" else 512)
    x = torch.randn(rows, 1024, device=device)
    ids = torch.arange(rows, device=device)
    seconds = median_seconds(lambda: repeat_dropout(x, 16, 0.1, 7, 0, ids, ids * 1024), device)
    return 16 * x.numel() / seconds


def main() -> None:
    args = parse_arguments()
    figures = {
        "copy_bytes_per_s": copy_bytes_per_s(args.device, args.toy),
        "gemm_fp32_flops_per_s": gemm_flops_per_s(args.device, args.toy, torch.float32),
        "philox_lanes_per_s": philox_lanes_per_s(args.device, args.toy),
    }
    if args.device == "cuda":  # on a CPU without the instructions bf16 is hundreds of times slower than fp32
        figures["gemm_bf16_flops_per_s"] = gemm_flops_per_s(args.device, args.toy, torch.bfloat16)
    rows = "".join(f"| {name.replace('_', ' ')} | {value / 1e9:,.2f} G/s |\n" for name, value in figures.items())
    markdown = f"# Ceilings of this machine\n\n| what | measured |\n|---|---|\n{rows}"
    print(markdown)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    else:
        print("kept in", keep("ceilings", figures, markdown, args.device))


if __name__ == "__main__":
    main()
