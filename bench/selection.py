"""Time and memory of choosing teachers over a whole pool: muka-evidence and muka-auto, against the number of texts.

    python bench/selection.py [--texts 25000 50000 100000] [--teachers 5] [--json F]

Synthetic statistics and tokens, and features on disk as a store holds them: teacher i knows topic i, its features show its classes
there and noise elsewhere. Correctness first: nearly all texts must go to the teacher of their topic. Each size runs in a process of
its own; its memory is the largest resident set while it chooses, the libraries and all teachers' statistics included.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from environment import command, markdown_table, result_file, show
from timing import largest_resident_bytes, own_process

from muka_fast.auto import auto_weights
from muka_fast.data import Tokens
from muka_fast.evidence import SAMPLE, evidence_weights, sample_rows
from muka_fast.features import Features
from muka_fast.labels import build_label_space
from muka_fast.ops.mc_statistics import mc_statistics
from muka_fast.store import FEATURE_TYPE, ShardRange, default_shard_size, shard_ranges
from muka_fast.stored import Supervision
from muka_fast.words import with_words

RULES = {"muka-evidence": evidence_weights, "muka-auto": auto_weights}
LEAST_ACCURACY = 0.9
VOCABULARY = 30_000  # tokens
CLASSES, WIDTH = 20, 384  # of a teacher; of features, the neutral encoder's included


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", type=int, default=[25_000, 50_000, 100_000])
    parser.add_argument("--teachers", type=int, default=5)
    parser.add_argument("--json", type=result_file, help="write the rows to this file instead of bench/results")
    parser.add_argument("--work", nargs=2, metavar=("RULE", "TEXTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.teachers, *args.texts) < 1:
        parser.error("--texts and --teachers: must be 1 or more")
    return args


def make_features(path: Path, rng: np.random.Generator, means: np.ndarray) -> Features:
    """On disk, [n, D]: one row of `means` [n, D] and noise."""
    ranges = shard_ranges(len(means), default_shard_size(len(means)))
    values = np.memmap(path, FEATURE_TYPE, "w+", shape=means.shape)
    for shard in ranges:
        part = means[shard.start : shard.stop]
        values[shard.start : shard.stop] = part + rng.standard_normal(part.shape, np.float32)
    values.flush()
    width = means.shape[1]

    def read(shard: ShardRange) -> np.ndarray:
        count, offset = (shard.stop - shard.start) * width, shard.start * width * values.itemsize
        return np.fromfile(path, FEATURE_TYPE, count, offset=offset).reshape(-1, width)

    return Features(ranges, read)


def make_tokens(rng: np.random.Generator, topic: np.ndarray) -> Tokens:
    """Texts of 8 to 24 tokens, rare ones rarely: every third token is of the text's topic."""
    offsets = np.concatenate([[0], np.cumsum(rng.integers(8, 25, len(topic)))])
    ids = np.minimum(rng.zipf(1.3, offsets[-1]), VOCABULARY - 1)
    own = rng.random(len(ids)) < 1 / 3
    ids[own] = (ids + 997 * (1 + np.repeat(topic, np.diff(offsets))))[own] % VOCABULARY
    return Tokens(ids.astype(np.int32), offsets)


def make_pool(args: argparse.Namespace, count: int, folder: Path) -> tuple[Supervision, Features, Tokens, np.ndarray]:
    """Supervision, neutral features, tokens and the topic of each text."""
    rng = np.random.default_rng(0)
    topic = rng.integers(0, args.teachers, count)
    logits, features = [], []
    for i in range(args.teachers):
        means = 4 * rng.standard_normal((CLASSES, WIDTH), np.float32)
        mine, classes = (topic == i).astype(np.float32), rng.integers(0, CLASSES, count)
        features.append(make_features(folder / f"teacher{i}", rng, mine[:, None] * means[classes]))
        certain = rng.standard_normal((count, CLASSES), np.float32)
        certain[np.arange(count), classes] += 4 * mine
        logits.append(torch.from_numpy(certain))
    noise = torch.from_numpy(rng.standard_normal((4, count, args.teachers * CLASSES), np.float32))
    offsets, z = list(range(0, args.teachers * CLASSES + 1, CLASSES)), torch.cat(logits, 1)
    found = mc_statistics(z + noise, offsets)
    teachers = [
        {"name": f"t{i}", "labels": [f"{i}.{c}" for c in range(CLASSES)], "mc": True, "mc_samples": 4}
        for i in range(args.teachers)
    ]
    parts = {name: getattr(found, name) for name in ("mean_probs", "predictive_entropy", "expected_entropy")}
    parts["total_variance"] = found.var_probs.unflatten(-1, (args.teachers, CLASSES)).sum(-1)
    sup = Supervision(z, **parts, example_ids=torch.arange(count), teachers=teachers, offsets=offsets, features=features)
    neutral = 3 * rng.standard_normal((args.teachers, WIDTH), np.float32)[topic]
    space = build_label_space([(teacher["name"], teacher["labels"]) for teacher in teachers])
    return sup.restrict(space), make_features(folder / "neutral", rng, neutral), make_tokens(rng, topic), topic


def work(args: argparse.Namespace, rule: str, count: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        sup, neutral, tokens, topic = make_pool(args, count, Path(folder))
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        start = time.perf_counter()
        weights = RULES[rule](sup, with_words(neutral, tokens, sample_rows(sup.example_ids.numpy(), 0, SAMPLE), 0))
        seconds = time.perf_counter() - start
    right = float((weights.argmax(1) == topic).mean())
    if right < LEAST_ACCURACY:
        raise SystemExit(f"{rule}, {count} texts: only {right:.1%} of them go to the teacher of their topic")
    return {"rule": rule, "texts": count, "seconds": seconds, "peak_bytes": largest_resident_bytes(), "accuracy": right}


def main() -> int:
    args = parse_arguments()
    if args.work:
        print(json.dumps(work(args, args.work[0], int(args.work[1]))))
        return 0
    rows = [
        json.loads(own_process(f"{rule}, {count} texts", "--work", rule, str(count))) for rule in RULES for count in args.texts
    ]
    shown = {"rule": "{}", "texts": "{:,}", "seconds": "{:.1f}", "peak_bytes": "{:,}", "accuracy": "{:.1%}"}
    title = f"# Choosing teachers: {args.teachers} teachers of {CLASSES} classes, features {WIDTH} wide, "
    title += f"{torch.get_num_threads()} threads"
    show("selection", rows, f"{title}\n\n{markdown_table(rows, shown)}", "cpu", args.json)
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
