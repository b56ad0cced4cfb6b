"""What scoring costs against the number of teachers, the layers they share, and K: part of bench/amalgamation.py --scaling.

Teachers are the encoder with random own layers: neither time nor memory depends on what the weights are.
"""

import argparse
import statistics
import time

from amalgamation import Row, peak_bytes, score_with
from environment import markdown_table
from synthetic import make_teacher
from transformers import AutoConfig

from muka_fast.data import TextSet

TEACHERS = (1, 2, 4)  # for memory against N, at K = 16
SAMPLES = (4, 16, 64)  # for memory against K, with two teachers
SCOPES = ("last:1", "all")
MEMORY_TEXTS = 96  # a part of the pool: memory is that of a batch, and 64 passes of `all` take their time


def measure_scaling(args: argparse.Namespace, texts: TextSet) -> tuple[list[dict], str]:
    """Rows of figures, and the tables: two teachers that share layers against one; peak memory against N and K."""
    depth = AutoConfig.from_pretrained(args.encoder).num_hidden_layers
    shared = [make_one(args, f"shared{i}", i, depth - args.freeze_layers) for i in range(2)]
    apart = [make_one(args, f"apart{i}", i, depth) for i in range(max(TEACHERS))]
    rows = [sharing_row(args, texts, pair, layers, depth) for pair, layers in ((shared, args.freeze_layers), (apart[:2], 0))]
    for scope in SCOPES:
        for count, samples in [(count, 16) for count in TEACHERS] + [(2, samples) for samples in SAMPLES if samples != 16]:
            peak = peak_bytes(apart[:count], Row(scope), samples, "--texts", str(MEMORY_TEXTS))
            rows.append({"what": "memory", "scope": scope, "teachers": count, "samples": samples, "peak_bytes": peak})
    cost = {"scope": "{}", "shared_layers": "{}", "layers": "{}", "one_s": "{:.2f}", "two_s": "{:.2f}", "ratio": "{:.2f}"}
    memory = {"scope": "{}", "teachers": "{}", "samples": "{}", "peak_bytes": "{:,}"}
    parts = [[row for row in rows if row["what"] == what] for what in ("sharing", "memory")]
    counted = "of the card's" if args.device == "cuda" else "interpreter and torch included"
    return rows, (
        f"# Scoring against teachers, shared layers and passes\n\n{len(texts.texts)} texts, {args.repetitions} interleaved "
        f"repetitions; ratio: two teachers over one.\n\n{markdown_table(parts[0], cost)}\n"
        f"Peak memory of a process that scores {MEMORY_TEXTS} of the texts once, {counted}; teachers share no "
        f"layer.\n\n{markdown_table(parts[1], memory)}"
    )


def make_one(args: argparse.Namespace, name: str, seed: int, own_layers: int) -> str:
    """A teacher of four labels beside the others, made once."""
    path = args.material / f"{name}_{own_layers}"
    if not path.is_dir():
        make_teacher(path, args.encoder, [f"{name} {label}" for label in range(4)], seed=seed, own_layers=own_layers)
    return str(path)


def sharing_row(args: argparse.Namespace, texts: TextSet, pair: list[str], shared_layers: int, layers: int) -> dict:
    """Seconds of scoring one and both of two teachers, last:1, interleaved; ratio: the median over the repetitions."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.repetitions):
        for count, times in seconds.items():
            start = time.perf_counter()
            score_with(args, pair[:count], texts, Row("last:1"))
            times.append(time.perf_counter() - start)
    return {
        "what": "sharing",
        "scope": "last:1",
        "shared_layers": shared_layers,
        "layers": layers,
        "one_s": statistics.median(seconds[1]),
        "two_s": statistics.median(seconds[2]),
        "ratio": statistics.median(two / one for one, two in zip(seconds[1], seconds[2], strict=True)),
    }
