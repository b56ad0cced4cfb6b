"""Scoring with one large teacher of random weights: texts/s, peak memory and time beside those of `muka-fast plan`.

    python bench/teacher.py [--size 1b] [--texts 512] [--scopes last:1 last:2] [--precisions fp32 bf16] [--device cuda] [--json F]
        [--workdir DIR]

Speed and memory do not depend on the weights. Scoring runs in a process of its own, whose start and loading are not counted into the
time; one that fails is told and stops no other. The plan's speed is what this machine reaches on two layers of such a model, its
memory the weights alone.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from environment import command, device, markdown_table, result_file, show
from synthetic import DECODERS, SIZES, check_scopes, made_encoder, make_teacher
from timing import largest_resident_bytes, own_process

from muka_fast.config import PlanConfig
from muka_fast.data import collate, read_texts, token_budget_batches, tokenize
from muka_fast.memory import token_budget
from muka_fast.plan import plan
from muka_fast.scoring import fetched
from muka_fast.teachers import DTYPES, load_teacher
from muka_fast.trunk import StochasticTeacher


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, *DECODERS], default="1b")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--scopes", nargs="+", default=["last:1", "last:2"])
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workdir", type=Path, help="texts and models, made once for the same options (default: temporary)")
    parser.add_argument("--json", type=result_file, help="write the figures to this file instead of bench/results")
    parser.add_argument("--work", nargs=3, metavar=("FOLDER", "SCOPE", "PRECISION"), help=argparse.SUPPRESS)  # a process of its own
    args = parser.parse_args()
    if min(args.texts, args.samples, args.max_length) < 1:
        parser.error("--texts, --samples and --max_length: must be 1 or more")
    return args


def work(args: argparse.Namespace, folder: Path, scope: str, precision: str) -> dict:
    """Seconds of the second of two scorings of all texts (the first compiles), tokens, and peak bytes of the device (CPU: process)."""
    teacher = load_teacher(folder / "teacher", run_seed=0, device=args.device, dtype=DTYPES[precision])
    scorer = StochasticTeacher(teacher, mc_scope=scope, mc_samples=args.samples, mc_dropout_p=0.1)
    tokens = tokenize(teacher.tokenizer, read_texts(folder / "pool.jsonl").texts, args.max_length)
    batches = token_budget_batches(tokens.lengths, token_budget(None, teacher.model, teacher.model.device))
    for _ in range(2):
        start = time.perf_counter()
        parts = []
        for rows in batches:
            inputs = collate(tokens, rows, teacher.pad_id)
            parts.append(scorer.launch(inputs["input_ids"], inputs["attention_mask"], rows))
        scores = [field.tensor() for field in fetched(parts)]  # waits for the device
        seconds = time.perf_counter() - start
    if not all(values.isfinite().all() for values in scores):
        sys.exit(f"{scope}, {precision}: scores that are not finite")
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else largest_resident_bytes()
    return {"seconds": seconds, "tokens": int(tokens.lengths.sum()), "texts": len(tokens), "peak_bytes": peak}


def prepare(args: argparse.Namespace, workdir: Path) -> Path:
    """The folder of texts, encoder and teacher."""
    folder = made_encoder(workdir, args.size, args.texts)
    if not (folder / "teacher").is_dir():
        labels = sorted(set(read_texts(folder / "pool.jsonl", need_labels=True).labels))[:4]
        Path(make_teacher(folder / "teacher.part", str(folder / "encoder"), labels, 0, 1)).rename(folder / "teacher")
    return folder


def measure(args: argparse.Namespace, folder: Path, scope: str, precision: str) -> dict:
    """Figures of a process that scores, beside those of the plan."""
    figures = json.loads(own_process(f"scope {scope}, {precision}", "--work", str(folder), scope, precision))
    row = {"scope": scope, "precision": precision, **figures}
    options = {"teachers": [str(folder / "teacher")], "student": str(folder / "encoder"), "num_texts": row["texts"]}
    options |= {"tokens_per_text": round(row["tokens"] / row["texts"]), "mc_scope": scope, "mc_samples": args.samples}
    options |= {"scoring_precision": precision}
    planned = plan(PlanConfig(**options, device=args.device))["teachers"][0]
    row |= {"texts_per_s": row["texts"] / row["seconds"], "mc_tokens_per_s": row["tokens"] * args.samples / row["seconds"]}
    row |= {"parameters": planned["parameters"]}
    return row | {"planned_seconds": 3600 * planned["hours"], "weights_bytes": planned["weights_bytes"]}


def page(args: argparse.Namespace, rows: list[dict]) -> str:
    millions = rows[0]["parameters"] / 1e6
    shown = {
        "scope": "{}", "precision": "{}", "texts_per_s": "{:.1f}", "mc_tokens_per_s": "{:,.0f}", "seconds": "{:.2f}",
        "planned_seconds": "{:.2f}", "peak_bytes": "{:,}", "weights_bytes": "{:,}",
    }  # fmt: skip
    title = f"# One teacher: {args.size}, {millions:,.0f} M parameters, K = {args.samples}, {args.device}"
    return f"{title}\n\n{markdown_table(rows, shown)}"


def main() -> int:
    args = parse_arguments()
    if args.work:
        print(json.dumps(work(args, Path(args.work[0]), *args.work[1:])))
        return 0
    check_scopes(args.scopes, args.size)
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = prepare(args, args.workdir or Path(name))
        for precision, scope in itertools.product(args.precisions, args.scopes):
            try:
                rows.append(measure(args, folder, scope, precision))
            except SystemExit as failure:
                failed.append(scope)
                print(failure, file=sys.stderr)
                continue
            show(f"teacher_{args.size}", rows, page(args, rows), args.device, args.json)  # anew after every row: a run may be cut off
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(command(main))
