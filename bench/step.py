"""One step of the student, over and over: launched kernel by kernel, recorded as CUDA graphs, with fused layers; ms and MFU.

    python bench/step.py [--size base] [--batch_size 16 64 2048] [--length 56] [--precision bf16] [--json F]

Random weights, one batch of texts of --length tokens and a few less; loss and labels are of no account. `launched, plain layers` is
the step as DeepSpeed and transformers run it. Times are of ten steps in a row, those of the host of single ones; recorded steps are
shown only where they have lost what launched ones do, under the same masks, and fused layers only where, without dropout, they lose
what plain ones do, with gradients of the same norm. MFU counts three times the forward's products over all padded tokens, against the
matrix rate measured in the same run. On a CPU only the first row exists.
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
from environment import command, device, markdown_table, result_file, show
from synthetic import SIZES, shape_of
from transformers import BertConfig, BertForSequenceClassification

from muka_fast.config import RunConfig
from muka_fast.ds_config import prepare_ds_config
from muka_fast.engine import Engine, init_distributed
from muka_fast.footprint import footprint
from muka_fast.teachers import DTYPES
from muka_fast.training_layers import NextTexts, training_layers

CLASSES, VOCABULARY = 20, 8000
Layers = Callable[[torch.nn.Module, torch.device, int], AbstractContextManager[NextTexts]]
Step = Callable[[int, NextTexts], tuple[torch.Tensor, torch.Tensor, Callable[[], float]]]


def plain(model: torch.nn.Module, device: torch.device, texts: int) -> AbstractContextManager[NextTexts]:
    return nullcontext(lambda example_ids, epoch: None)


def fused(model: torch.nn.Module, device: torch.device, texts: int) -> AbstractContextManager[NextTexts]:
    return training_layers(model, 0, device, texts)


WAYS: dict[str, tuple[bool, Layers]] = {"launched, plain layers": (False, plain), "launched": (False, fused)}
WAYS |= {"recorded, plain layers": (True, plain), "recorded": (True, fused)}
CHECKED = 8  # steps
# Of fused from plain layers at most: on a CPU, with plain forms of the ops, 1.2e-2 in bf16 for `base`, whose layers round in between.
FUSED_ERROR = {"fp32": 1e-3, "bf16": 3e-2}
IN_A_ROW = 10  # between two waits: then the host's work hides behind the device's, as in the loop


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch_size", nargs="+", type=int, default=[16, 64, 2048])
    parser.add_argument("--length", type=int, default=56)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing a row")
    parser.add_argument("--json", type=result_file, help="write the figures to this file instead of bench/results")
    args = parser.parse_args()
    if min(args.length, *args.batch_size) < 1:
        parser.error("--length and --batch_size: must be 1 or more")
    return args


def stepper(
    args: argparse.Namespace, model_config: BertConfig, batch_size: int, graphs: bool
) -> tuple[Engine, Step]:
    """The engine of a new student, and its step by number, which its masks follow from: loss, logits [B, C], and the gradient's norm
    once called."""
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
    example_ids = torch.arange(batch_size)

    def step(number: int, next_texts: NextTexts) -> tuple[torch.Tensor, torch.Tensor, Callable[[], float]]:
        torch.manual_seed(number)
        next_texts(example_ids, number)
        logits = engine(**batch).logits.float()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        engine.backward(loss)
        engine.step()
        return loss.detach(), logits.detach(), lambda: engine.grad_norm

    return engine, step


def measure(
    args: argparse.Namespace, model_config: BertConfig, batch_size: int, graphs: bool, layers: Layers
) -> tuple[list[float], dict, bool] | None:
    """The first losses, median milliseconds of a step, of the device and of the host, and whether it replays a recording; None for a
    batch that is too large to be recorded."""
    engine, step = stepper(args, model_config, batch_size, graphs)
    if engine.recorded is not None and not engine.recorded.fits(batch_size, args.length):
        return None
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    with layers(engine.ds.module, torch.device(args.device), batch_size) as next_texts:
        losses = torch.stack([step(number, next_texts)[0] for number in range(CHECKED)]).tolist()
        replays = engine.recorded is not None and engine.recorded.replayed is not None
        times, hosts, begin = [], [], time.perf_counter()
        while len(times) < 3 or time.perf_counter() - begin < args.seconds:
            wait()
            start = time.perf_counter()
            step(CHECKED, next_texts)
            hosts.append(time.perf_counter() - start)
            wait()
            start = time.perf_counter()
            for _ in range(IN_A_ROW):
                step(CHECKED, next_texts)
            wait()
            times.append((time.perf_counter() - start) / IN_A_ROW)
    return losses, {"ms": 1e3 * statistics.median(times), "host_ms": 1e3 * statistics.median(hosts)}, replays


def fused_errors(args: argparse.Namespace, model_config: BertConfig, batch_size: int) -> dict[str, float]:
    """Without dropout, whose masks differ: the largest relative differences of fused from plain layers over the first steps."""
    config = copy.deepcopy(model_config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    told = []
    for _, layers in (WAYS["launched, plain layers"], WAYS["launched"]):
        engine, step = stepper(args, config, batch_size, False)
        with layers(engine.ds.module, torch.device(args.device), batch_size) as next_texts:
            told_by = (step(number, next_texts) for number in range(CHECKED))
            steps = [(loss, logits, torch.tensor(norm())) for loss, logits, norm in told_by]
        told.append([torch.stack([value.cpu() for value in values]) for values in zip(*steps, strict=True)])
    relative = lambda ours, plain: max(float((a - b).norm() / b.norm()) for a, b in zip(ours, plain, strict=True))
    return {name: relative(*both) for name, *both in zip(("loss", "logits", "gradient's norm"), told[1], told[0], strict=True)}


def fused_as_plain(args: argparse.Namespace, model_config: BertConfig, batch_size: int) -> bool:
    """Whether fused layers may be timed; says at once why not."""
    errors = fused_errors(args, model_config, batch_size)
    give_back()
    limit = FUSED_ERROR[args.precision]
    if all(error <= limit for error in errors.values()):  # NaN is not
        return True
    told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(f"batch {batch_size}, fused layers: off the plain ones' by {told} (limit {limit:g}); they are not timed", file=sys.stderr)
    return False


def give_back() -> None:
    """Memory of engines that are done with."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    args = parse_arguments()
    init_distributed(args.device)
    wrong = 0
    rows, config = [], BertConfig(**shape_of(args.size, VOCABULARY), num_labels=CLASSES)
    limit = gemm_flops_per_s(args.device, args.size == "toy", DTYPES[args.precision])
    flops = 3 * footprint(config, 1, args.length, args.precision, "the student").forward_flops
    ways = WAYS if args.device == "cuda" else {"launched, plain layers": WAYS["launched, plain layers"]}
    for batch_size in args.batch_size:
        found, first = {}, 0.0
        refused = fused if args.device == "cuda" and not fused_as_plain(args, config, batch_size) else None
        wrong += refused is not None
        for way, (graphs, layers) in ways.items():
            if layers is refused:
                continue
            measured = measure(args, config, batch_size, graphs, layers)
            give_back()
            if measured is None:
                continue
            found[way], figures, replays = measured
            if replays != graphs:
                print(f"batch {batch_size}, {way}: the step was not recorded; its time is not shown", file=sys.stderr)
                wrong += 1
                continue
            first = first or figures["ms"]
            launched = found[way.replace("recorded", "launched")]
            if any(not abs(one - other) <= 2e-3 * abs(other) for one, other in zip(found[way], launched, strict=True)):
                print(f"batch {batch_size}, {way}: loses {found[way]}, launched {launched}; its time is not shown", file=sys.stderr)
                wrong += 1
                continue
            mfu = batch_size * flops / (figures["ms"] / 1e3) / limit
            rows.append({"batch_size": batch_size, "way": way, **figures, "speedup": first / figures["ms"], "mfu": mfu})
        shown = {"batch_size": "{}", "way": "{}", "ms": "{:.2f}", "host_ms": "{:.2f}", "speedup": "{:.2f}", "mfu": "{:.1%}"}
        told = f"{args.precision}, {args.length} tokens a text, {args.device}; matrix rate {limit / 1e12:.2f} TFLOP/s"
        text = f"# A step of the student: {args.size}, {told}\n\n{markdown_table(rows, shown)}"
        show(f"step_{args.size}", rows, text, args.device, args.json)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(command(main))
