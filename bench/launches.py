"""Does the host keep up with a GPU? Kernels of one scoring step and the host's time to launch them, beside the device's least time.

    python bench/launches.py [--size base] [--machine h100|h200] [--json F]

Kernels are counted where PyTorch dispatches them (views and allocations launch none) and at our own ops. The host's time is measured
on this machine with one text of a few tokens and a model of as many layers but NARROW values wide, where there is next to nothing to
compute: a little more than launching takes. The device's is arithmetic: the products of a batch of the tokens that --machine (by
default the card present, else an H200) takes, at the rate of its exact fp32 units or of its matrix units in bf16
(--scoring_precision). While that is the longer one, launches hide behind the work of the step before, and a captured graph would
save nothing.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import torch
from environment import command, machine_name, markdown_table, result_file, show
from predict import MACHINES
from synthetic import SIZES, check_scopes, make_encoder, make_teacher, make_texts
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, PreTrainedConfig

from muka_fast import memory, packed, trunk
from muka_fast.data import read_texts
from muka_fast.footprint import footprint
from muka_fast.plan import scoring_forwards
from muka_fast.store import default_shard_size
from muka_fast.teachers import DTYPES, load_teacher
from muka_fast.trunk import StochasticTeacher

OURS = {
    packed: ("dropout_add_layer_norm", "one_query_attention", "packed_attention", "repeat_dropout"),
    trunk: ("mc_head", "mc_statistics"),
}
NARROW = 96
MEAN_TOKENS = 40  # of a text
FORMS = {"tokens": "{:,}", "least_ms": "{:.1f}", "times_host": "{:.1f}"}  # of the columns of each precision
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided")


class Launches(TorchDispatchMode):
    """Counts the operators that would launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, _types, args=(), kwargs=None):
        if not operator.is_view and operator.overloadpacket.__name__ not in ALLOCATIONS:
            self.count += 1
        return operator(*args, **kwargs or {})


@contextmanager
def ours_counted(launches: Launches) -> Iterator[None]:
    """Each call of an op of ours is one launch; what it does on a CPU, checks of values among it, is not counted."""

    def counted(original):
        def call(*args, **kwargs):
            before = launches.count
            result = original(*args, **kwargs)
            launches.count = before + 1
            return result

        return call

    originals = {(module, name): getattr(module, name) for module, names in OURS.items() for name in names}
    for (module, name), original in originals.items():
        setattr(module, name, counted(original))
    try:
        yield
    finally:
        for (module, name), original in originals.items():
            setattr(module, name, original)


def parse_arguments() -> argparse.Namespace:
    present = machine_name("cuda") if torch.cuda.is_available() else ""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["small", "base"], help="of teachers with random weights")
    parser.add_argument("--scopes", nargs="+", default=["last:1", "head", "all"])
    parser.add_argument("--machine", choices=sorted(MACHINES), default=present if present in MACHINES else "h200")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--json", type=result_file, help="write the rows to this file instead of bench/results")
    args = parser.parse_args()
    if args.repetitions < 1:
        parser.error("--repetitions: must be 1 or more")
    return args


def tokens_of(machine: str, config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Tokens of a scoring step where the card's memory is free: of a whole shard, or as many as it takes."""
    model = SimpleNamespace(config=config, dtype=dtype)
    with mock.patch.object(memory, "free_bytes", return_value=MACHINES[machine].memory_bytes):
        return min(memory.token_budget(None, model, torch.device("cuda")), default_shard_size(10**9) * MEAN_TOKENS)


def measure(scorer: StochasticTeacher, tokens: int, repetitions: int) -> tuple[int, float]:
    """Kernels of a step, and median host seconds for one text of so many tokens."""
    ids = torch.full((1, tokens), 5)
    batch = ids, torch.ones_like(ids), torch.arange(1)
    scorer.launch(*batch)
    with Launches() as launches, ours_counted(launches):
        scorer.launch(*batch)
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        scorer.launch(*batch)
        times.append(time.perf_counter() - start)
    return launches.count, median(times)


def main() -> int:
    args, rows = parse_arguments(), []
    for size in args.size:
        check_scopes(args.scopes, size)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool = read_texts(make_texts(folder, 200)[0], need_labels=True)
        for size in args.size:
            _, layers, heads = SIZES[size]
            SIZES["narrow"] = (NARROW, layers, heads)
            encoder = make_encoder(folder / f"narrow-{size}", "narrow", pool.texts)
            path = make_teacher(folder / f"teacher-{size}", encoder, sorted(set(pool.labels))[:4], 0, 1)
            config = AutoConfig.from_pretrained(make_encoder(folder / size, size, pool.texts))
            text_flops = footprint(config, 1, MEAN_TOKENS, "fp32", size).forward_flops
            for scope in args.scopes:
                scorer = StochasticTeacher(load_teacher(path, run_seed=0), mc_scope=scope, mc_samples=16)
                kernels, host_s = measure(scorer, 3, args.repetitions)
                row = {"teacher": size, "scope": scope, "kernels": kernels, "host_ms": 1e3 * host_s}
                card = MACHINES[args.machine]
                for precision, rate in (("fp32", card.matrix_float32), ("bf16", card.matrix_16bit)):
                    tokens = tokens_of(args.machine, config, DTYPES[precision])
                    least_s = tokens / MEAN_TOKENS * text_flops * scoring_forwards(config, scope, 16) / rate
                    figures = {"tokens": tokens, "least_ms": 1e3 * least_s, "times_host": least_s / host_s}
                    row |= {f"{precision}_{name}": value for name, value in figures.items()}
                rows.append(row)
    shown = {"teacher": "{}", "scope": "{}", "kernels": "{}", "host_ms": "{:.2f}"}
    shown |= {f"{precision}_{what}": form for precision in ("fp32", "bf16") for what, form in FORMS.items()}
    lines = [
        "# Launching a scoring step against computing it",
        "",
        f"Random weights, K = 16, a step of as many tokens as an {args.machine} takes. Nothing here was measured on "
        "one: its least time is products / rate of its units, fp32 or bf16. Where that is a multiple of the host's time, which was "
        "measured here, launches hide behind the work.",
        "",
        markdown_table(rows, shown),
    ]
    show("launches", rows, "\n".join(lines), "cpu", args.json)
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
