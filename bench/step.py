"""One step of the student, over and over: launched kernel by kernel, recorded as CUDA graphs, with fused layers; ms and MFU.

    python bench/step.py [--size base] [--batch_size 16 64 2048] [--length 56] [--precision bf16] [--json F]

Random weights, one batch of texts of --length tokens and a few less; loss and labels are of no account. `launched, plain layers` is
the step as DeepSpeed and transformers run it. Times are of ten steps in a row, those of the host of single ones; recorded steps are
shown only where they have lost what launched ones do, under the same masks. MFU counts three times the forward's products over all
padded tokens, against the matrix rate measured in the same run. On a CPU only the first row exists.
"""

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from ceilings import gemm_flops_per_s
from environment import markdown_table, show
from synthetic import SIZES, shape_of
from transformers import BertConfig, BertForSequenceClassification

from muka_fast.config import RunConfig
from muka_fast.ds_config import prepare_ds_config
from muka_fast.engine import Engine, init_distributed
from muka_fast.footprint import DTYPES, footprint
from muka_fast.fused_layers import fused_layers

CLASSES, VOCABULARY = 20, 8000
WAYS = {"launched, plain layers": (False, lambda model: nullcontext()), "launched": (False, fused_layers)}
WAYS |= {"recorded, plain layers": (True, lambda model: nullcontext()), "recorded": (True, fused_layers)}
CHECKED = 8  # steps
IN_A_ROW = 10  # between two waits: then the host's work hides behind the device's, as in the loop


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch_size", nargs="+", type=int, default=[16, 64, 2048])
    parser.add_argument("--length", type=int, default=56)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing a row")
    parser.add_argument("--json", help="write the figures to this file instead of bench/results")
    return parser.parse_args()


def measure(
    args: argparse.Namespace, model_config: BertConfig, batch_size: int, graphs: bool, layers: Callable[..., AbstractContextManager]
) -> tuple[list[float], dict]:
    """The first losses, and median seconds of a step, of the device and of the host."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(copy.deepcopy(model_config))  # the engine changes it
    options = {"batch_size": batch_size, "learning_rate": 5e-5, "precision": args.precision, "cuda_graphs": graphs}
    ds, config = prepare_ds_config(None, RunConfig(**options, device=args.device), 1, args.device)
    engine = Engine.create(model, config, ds, 1000)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(max(1, args.length - 4), args.length + 1, (batch_size,), generator=generator)
    lengths[0] = args.length
    ids = torch.randint(5, VOCABULARY, (batch_size, args.length), generator=generator)
    batch = {"input_ids": ids, "attention_mask": (torch.arange(args.length) < lengths[:, None]).long()}
    labels = torch.randint(CLASSES, (batch_size,), generator=generator).to(engine.device)
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None

    def step(number: int) -> torch.Tensor:
        torch.manual_seed(number)
        loss = torch.nn.functional.cross_entropy(engine(**batch).logits.float(), labels)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    with layers(model):
        losses = torch.stack([step(number) for number in range(CHECKED)]).tolist()
        times, hosts, begin = [], [], time.perf_counter()
        while len(times) < 3 or time.perf_counter() - begin < args.seconds:
            wait()
            start = time.perf_counter()
            step(CHECKED)
            hosts.append(time.perf_counter() - start)
            wait()
            start = time.perf_counter()
            for _ in range(IN_A_ROW):
                step(CHECKED)
            wait()
            times.append((time.perf_counter() - start) / IN_A_ROW)
    return losses, {"ms": 1e3 * statistics.median(times), "host_ms": 1e3 * statistics.median(hosts)}


def main() -> int:
    args = parse_arguments()
    init_distributed(args.device)
    wrong: list[str] = []
    rows, config = [], BertConfig(**shape_of(args.size, VOCABULARY), num_labels=CLASSES)
    limit = gemm_flops_per_s(args.device, args.size == "toy", DTYPES[args.precision])
    flops = 3 * footprint(config, 1, args.length, args.precision, "the student").forward_flops
    ways = WAYS if args.device == "cuda" else {"launched, plain layers": WAYS["launched, plain layers"]}
    for batch_size in args.batch_size:
        found, first = {}, 0.0
        for way, (graphs, layers) in ways.items():
            found[way], figures = measure(args, config, batch_size, graphs, layers)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
            first = first or figures["ms"]
            launched = found[way.replace("recorded", "launched")]
            if any(not abs(one - other) <= 2e-3 * abs(other) for one, other in zip(found[way], launched, strict=True)):
                wrong.append(f"batch {batch_size}, {way}: loses {found[way]}, launched {launched}; its time is not shown")
                continue
            mfu = batch_size * flops / (figures["ms"] / 1e3) / limit
            rows.append({"batch_size": batch_size, "way": way, **figures, "speedup": first / figures["ms"], "mfu": mfu})
        shown = {"batch_size": "{}", "way": "{}", "ms": "{:.2f}", "host_ms": "{:.2f}", "speedup": "{:.2f}", "mfu": "{:.1%}"}
        told = f"{args.precision}, {args.length} tokens a text, {args.device}; matrix rate {limit / 1e12:.2f} TFLOP/s"
        text = f"# A step of the student: {args.size}, {told}\n\n{markdown_table(rows, shown)}"
        show(f"step_{args.size}", rows, text, args.device, args.json)
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
