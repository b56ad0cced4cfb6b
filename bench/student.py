"""The student's training loop under ZeRO stages: texts/s, share of the matrix rate (MFU), memory beside that of the plan.

    python bench/student.py [--size base|1b|...] [--stages 1 2 3 "3 offload"] [--batch_size 64 ...] [--precision bf16] [--device cuda]
        [--workdir DIR]

Random weights and installed docstrings: speed and memory do not depend on the weights. Each stage and batch size runs in a process
of its own; one that fails is told and stops no other.
MFU counts three times the forward's FLOPs at the texts' mean length, against the matrix rate measured in the same run; the loop's rate
is that of a second epoch, in which no shape of a batch is new, without its checkpoint.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch
from ceilings import gemm_flops_per_s
from environment import command, device, markdown_table, result_file, show
from synthetic import DECODERS, SIZES, made_encoder, make_encoder, make_teacher
from timing import largest_resident_bytes, own_process
from transformers import AutoConfig, AutoTokenizer

import muka_fast
from muka_fast.config import ScoreConfig
from muka_fast.data import read_texts, tokenize
from muka_fast.footprint import STAGES, footprint, stage_memory
from muka_fast.supervision import score
from muka_fast.teachers import DTYPES

OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, *DECODERS], default="base")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["0", "1", "2", "3"])
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=60, help="of the largest batch size; the others take more, over the same texts")
    parser.add_argument("--batch_size", nargs="+", type=int, default=[64])
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--workdir", type=Path, help="texts, models and stores, made once for the same options (default: temporary)")
    parser.add_argument("--json", type=result_file, help="write the figures to this file instead of bench/results")
    parser.add_argument("--work", nargs=3, metavar=("FOLDER", "STAGE", "BATCH_SIZE"), help=argparse.SUPPRESS)  # a process of its own
    args = parser.parse_args()
    if min(args.steps, args.max_length, *args.batch_size) < 1:
        parser.error("--steps, --batch_size and --max_length: must be 1 or more")
    return args


def prepare(args: argparse.Namespace, workdir: Path) -> Path:
    """The folder of texts, the student, and a store filled by a small teacher: the loop does not depend on the teachers' size."""
    folder = made_encoder(workdir, args.size, args.steps * max(args.batch_size))
    done = folder / f"scored_{args.max_length}"
    if not done.exists():
        texts = str(folder / "pool.jsonl")
        found = read_texts(texts, need_labels=True)
        small = make_encoder(folder / "small", "toy", found.texts)
        teacher = make_teacher(folder / "small_teacher", small, sorted(set(found.labels))[:4], 0, 1)
        options = {"device": args.device, "max_length": args.max_length, "mc_samples": 2}
        score(ScoreConfig(teachers=[teacher], texts=texts, output=str(store_of(args, folder)), **options))
        done.touch()
    return folder


def store_of(args: argparse.Namespace, folder: Path) -> Path:
    return folder / f"store_{args.max_length}"


def work(args: argparse.Namespace, folder: Path, stage: str, batch_size: int) -> dict:
    """Two epochs under one stage: texts/s of the second, peak bytes of the device (CPU: of the process)."""
    number = int(stage[0])
    ds = {"zero_optimization": {"stage": number} | (OFFLOAD if "offload" in stage else {})}
    ds |= {args.precision: {"enabled": True}} if args.precision != "fp32" else {}
    (folder / "ds.json").write_text(json.dumps(ds))
    texts, steps = str(folder / "pool.jsonl"), -(-args.steps * max(args.batch_size) // batch_size)
    with tempfile.TemporaryDirectory() as output:
        result = muka_fast.amalgamate(
            store=str(store_of(args, folder)), student=str(folder / "encoder"), texts=texts, output=f"{output}/run", method="vkd",
            ds_config=str(folder / "ds.json"), epochs=2, batch_size=batch_size, max_length=args.max_length,
            log_every=steps, save_every=2 * steps, mc_samples=2, device=args.device,
        )  # fmt: skip
        if result.stopped:  # by SIGTERM, as of a time limit
            raise SystemExit("stopped while the student was trained: its speed is not shown")
        lines = [json.loads(line) for line in Path(output, "run", "metrics.jsonl").read_text().splitlines()]
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else largest_resident_bytes()
    (rate,) = [line["texts_per_s"] for line in lines if line["epoch"] == 2]
    return {"texts_per_s": rate, "peak_bytes": peak}


def table(rows: list[dict]) -> str:
    shown = {"stage": "{}", "batch_size": "{}", "texts_per_s": "{:.1f}", "mfu": "{:.1%}"}
    shown |= dict.fromkeys(("peak_MiB", "planned_MiB"), "{:.0f}")
    in_mib = [row | {f"{name}_MiB": row[f"{name}_bytes"] / 2**20 for name in ("peak", "planned")} for row in rows]
    return markdown_table(in_mib, shown)


def main() -> int:
    args = parse_arguments()
    if args.work:
        print(json.dumps(work(args, Path(args.work[0]), args.work[1], int(args.work[2]))))
        return 0
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = prepare(args, args.workdir or Path(name))
        lengths = tokenize(
            AutoTokenizer.from_pretrained(folder / "encoder"), read_texts(folder / "pool.jsonl").texts, args.max_length
        ).lengths
        config = AutoConfig.from_pretrained(folder / "encoder")
        mean, longest = round(float(lengths.mean())), int(lengths.max())
        flops = 3 * footprint(config, 1, mean, args.precision, "the student").forward_flops
        limit = gemm_flops_per_s(args.device, args.size == "toy", DTYPES[args.precision])
        for stage, batch_size in itertools.product(args.stages, args.batch_size):
            cost = footprint(config, batch_size, longest, args.precision, "the student")
            try:
                row = json.loads(own_process(f"ZeRO {stage}, batch {batch_size}", "--work", str(folder), stage, str(batch_size)))
            except SystemExit as failure:
                failed.append(stage)
                print(failure, file=sys.stderr)
                continue
            planned = stage_memory(stage, cost, 1, args.precision)
            row |= {"mfu": row["texts_per_s"] * flops / limit, "planned_bytes": planned.device}
            rows.append({"stage": stage, "batch_size": batch_size, **row})
            told = f"{cost.num_parameters / 1e6:,.0f} M parameters, {args.precision}, {mean} tokens a text, {args.device}"
            text = f"# The student's loop: {args.size}, {told}\n\nMatrix rate {limit / 1e12:.2f} TFLOP/s.\n\n{table(rows)}"
            stem = f"student_{args.size}" + ("_fp32" if args.precision == "fp32" else "")
            show(stem, rows, text, args.device, args.json)  # anew after every row: a run may be cut off
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(command(main))
