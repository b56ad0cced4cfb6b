"""What this machine can do at most, measured: bandwidth, matrix-product rate, Philox lanes. Shares of a limit refer to these.

    python bench/ceilings.py [--device cpu|cuda] [--toy] [--json F]

Bandwidth counts bytes read plus bytes written; products are on random data, since zeros run faster (seen: 13 % on an H200).
"""

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from environment import command, device, result_file, show
from timing import seconds_per_call

from muka_fast.ops import philox
from muka_fast.ops.repeat_dropout import repeat_dropout

CALLS, COUNTED_SAMPLES, P = 128, 64, 0.1  # of count_lanes_kernel
if philox.triton is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def kept(words, top):
        return (words << 16 >= top).to(tl.int32) + (words >= top).to(tl.int32)

    @triton.jit(do_not_specialize=["seed", "site", "first_sample", "threshold", "K"])
    def count_lanes_kernel(p_count, seed, site, first_sample, threshold, K, CALLS: tl.constexpr):
        """Lanes of K samples of CALLS * 8 elements a program; one number is written: how many are kept."""
        b_call, b_zero = tl.arange(0, CALLS).to(tl.uint32), tl.zeros([CALLS], tl.uint32)
        b_site, b_id = b_zero + site.to(tl.uint32), b_zero + tl.program_id(0).to(tl.uint32)
        b_count, top = tl.zeros([CALLS], tl.int32), threshold.to(tl.uint32) << 16  # compared as in keep_lanes
        for k in range(K):
            w0, w1, w2, w3 = philox.philox_words(seed, b_call, b_zero + (first_sample + k).to(tl.uint32), b_site, b_id)
            b_count += kept(w0, top) + kept(w1, top) + kept(w2, top) + kept(w3, top)
        tl.store(p_count + tl.program_id(0), tl.sum(b_count))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="sizes that prove the script, not the machine")
    parser.add_argument("--json", type=result_file, help="write the figures to this file instead of bench/results")
    args = parser.parse_args()
    if args.toy and not args.json:
        parser.error("--json F: a toy run does not replace the result in bench/results")
    return args


def median_seconds(run: Callable[[], object], device: str, repetitions: int = 11) -> float:
    """Median of single calls after two warm-ups."""
    for _ in range(2):
        run()
    return statistics.median(seconds_per_call(run, device, 1) for _ in range(repetitions))


def copy_bytes_per_s(device: str, toy: bool) -> float:
    elements = 1 << 18 if toy else (1 << 30 if device == "cuda" else 1 << 26)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def fill_bytes_per_s(device: str, toy: bool) -> float:
    """Of writes alone, as repeat_dropout's nearly are."""
    target = torch.empty(1 << 18 if toy else (1 << 30 if device == "cuda" else 1 << 26), device=device)
    return target.nbytes / median_seconds(lambda: target.fill_(1.5), device)


def gemm_flops_per_s(device: str, toy: bool, dtype: torch.dtype) -> float:
    size = 256 if toy else (8192 if device == "cuda" else 1536)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b, out=out), device)


def philox_lanes_per_s(device: str, toy: bool) -> float:
    """Elements of masks: on a GPU counted in registers, on a CPU repeat_dropout into 2 MiB, which stay in cache."""
    if device == "cuda":
        counts = torch.empty(64 if toy else 16_384, dtype=torch.int32, device=device)
        arguments = counts, 7, 0, 0, philox.mask_parameters(P)[0], COUNTED_SAMPLES
        seconds = median_seconds(lambda: count_lanes_kernel[(len(counts),)](*arguments, CALLS=CALLS), device)
        lanes = len(counts) * CALLS * 8 * COUNTED_SAMPLES
        if abs(counts.sum().item() / lanes - (1 - P)) > 1e-3:
            raise SystemExit(f"{counts.sum().item() / lanes:.4f} of the lanes are kept, not {1 - P}: no rate is shown")
        return lanes / seconds
    x, ids = torch.randn(32, 1024), torch.arange(32)
    return 16 * x.numel() / median_seconds(lambda: repeat_dropout(x, 16, P, 7, 0, ids, ids * 1024), device)


def main() -> None:
    args = parse_arguments()
    figures = {
        "copy_bytes_per_s": copy_bytes_per_s(args.device, args.toy),
        "fill_bytes_per_s": fill_bytes_per_s(args.device, args.toy),
        "gemm_fp32_flops_per_s": gemm_flops_per_s(args.device, args.toy, torch.float32),
        "philox_lanes_per_s": philox_lanes_per_s(args.device, args.toy),
    }
    if args.device == "cuda":  # on a CPU without the instructions bf16 is hundreds of times slower than fp32
        figures["gemm_bf16_flops_per_s"] = gemm_flops_per_s(args.device, args.toy, torch.bfloat16)
    rows = "".join(f"| {name.replace('_', ' ')} | {value / 1e9:,.2f} G/s |\n" for name, value in figures.items())
    markdown = f"# Ceilings of this machine\n\n| what | measured |\n|---|---|\n{rows}"
    show("ceilings", figures, markdown, args.device, args.json)


if __name__ == "__main__":
    sys.exit(command(main))
