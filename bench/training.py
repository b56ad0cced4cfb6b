"""Training and scoring as jobs: our loop against the Hugging Face Trainer, scoring in 1 and 2 processes, memory by ZeRO stage, resume.

    python bench/training.py --encoder DIR --train train.jsonl --eval test.jsonl [--texts 1000] [--parts trainer scoring memory resume]

trainer: same student (seed, head), texts, batch, optimizer, schedule and fp32; both learn the true labels; the Trainer with its random
batches and, for its best, with its own grouping by length (it needs accelerate: the extra `bench`). Rounds are interleaved: times are
medians, and what one is faster by is the median of the rounds' ratios. Everything runs in processes of its own, on all cores
together; teachers are the encoder with random heads, as speed does not depend on what they know.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from environment import RESULTS, command, keep, usable_cores
from settings import draw, read_rows, write_rows
from synthetic import make_teacher
from timing import largest_resident_bytes, ratio

from muka_fast.config import EvalConfig, ScoreConfig, load_config
from muka_fast.data import read_texts
from muka_fast.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TRAIN = str(ROOT / "muka_fast" / "train.py")
PARTS = ("trainer", "scoring", "memory", "resume")
EVAL_TEXTS = 500
MARKER = ".bench_training"  # in a work folder: this script made it and may replace it


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, type=Path, help="encoder folder of student and teachers")
    parser.add_argument("--train", required=True, type=Path, help="labelled texts")
    parser.add_argument("--eval", required=True, type=Path, help="labelled texts")
    parser.add_argument("--texts", type=int, default=1000, help="training texts, drawn at random")
    parser.add_argument("--scored_texts", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2, help="interleaved repetitions")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench_training"), help="is replaced, where it is of this script")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the Markdown and JSON result")
    parser.add_argument("--work", choices=("trainer", "grouped", "score", "train"), help=argparse.SUPPRESS)  # a process of its own
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # of `muka-fast train`
    args = parser.parse_args(argv)
    if min(args.texts, args.scored_texts, args.batch_size, args.max_length, args.rounds) < 1:
        parser.error("--texts, --scored_texts, --batch_size, --max_length and --rounds: must be 1 or more")
    return args


# ---- processes ----


def launch(command: list[str], processes: int = 1) -> list[subprocess.Popen]:
    """Start one command per rank, with the cores shared out."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Idle threads spin as long in the Trainer's process as `muka-fast train` has them spin (cli.py).
    common = {"GOMP_SPINCOUNT": "30000"} | os.environ | {"OMP_NUM_THREADS": str(max(1, usable_cores() // processes))}
    common["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    if processes > 1:
        common |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    runs = []
    for rank in range(processes):
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        runs.append(subprocess.Popen([sys.executable, *command], env=common | mine, stdout=subprocess.PIPE, text=True))
    return runs


def finish(runs: list[subprocess.Popen], expected: int = 0) -> list[str]:
    """What each process printed. Raises where one failed."""
    told = [run.stdout.read() for run in runs]
    codes = [run.wait() for run in runs]
    if codes != [expected] * len(runs):
        raise RuntimeError(f"{' '.join(runs[0].args)}: exit codes {codes}")
    return told


def own_work(args: argparse.Namespace, work: str, output: Path, processes: int = 1, options: Sequence[str] = ()) -> list[dict]:
    """Run this file's `--work` in processes of its own; the result of each."""
    same = ["--encoder", "--train", "--eval", "--batch_size", "--learning_rate", "--max_length", "--workdir"]
    values = [word for name in same for word in (name, str(getattr(args, name[2:])))]
    runs = launch([__file__, *values, "--work", work, "--output", str(output), "--options", *options], processes)
    return [json.loads(told.splitlines()[-1]) for told in finish(runs)]


def training(args: argparse.Namespace, output: Path, **more: object) -> list[str]:
    """Options of a run of ours on the prepared texts and store."""
    options = {"store": args.workdir / "store", "student": args.encoder, "texts": args.workdir / "train.jsonl", "output": output}
    options |= {"batch_size": args.batch_size, "learning_rate": args.learning_rate, "max_length": args.max_length, "epochs": 1}
    options["device"] = "cpu"  # as the Trainer's
    return [word for name, value in (options | more).items() for word in (f"--{name}", str(value))]


def renew(folder: Path) -> None:
    """An empty folder. Raises UserError for one that holds what this script did not write."""
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).is_file()):
            raise UserError(f"--workdir {folder}: is not of this benchmark, which would replace it; name a new folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


def prepare(args: argparse.Namespace) -> list[str]:
    """Texts and two teachers in a new --workdir; the teachers' folders."""
    sets = (("train", args.train, args.texts), ("test", args.eval, EVAL_TEXTS), ("pool", args.train, args.scored_texts))
    drawn = {name: draw(read_rows(source), limit, 0) for name, source, limit in sets}
    if not (args.encoder / "config.json").is_file():
        raise UserError(f"--encoder {args.encoder}: holds no config.json; name the folder of an encoder")
    renew(args.workdir)
    for name, rows in drawn.items():
        write_rows(args.workdir / f"{name}.jsonl", rows)
    labels = sorted(set(read_texts(args.workdir / "train.jsonl", need_labels=True).labels))
    half = (len(labels) + 1) // 2
    parts = (labels[:half], labels[half:])
    return [make_teacher(args.workdir / f"teacher{i}", str(args.encoder), part, i, 1) for i, part in enumerate(parts)]


# ---- the parts ----


def trainer_part(args: argparse.Namespace, teachers: list[str]) -> dict:
    """Texts per second of the training itself (one epoch; no checkpoint, as ours writes none within a minute) and accuracy of each."""
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "accuracy": []} for name in ("ours", "trainer", "grouped")}
    for turn in range(args.rounds):
        output = args.workdir / f"ours{turn}"
        finish(launch([TRAIN, *training(args, output, method="supervised", eval=args.workdir / "test.jsonl")]))
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
        figures = {"ours": (record["seconds"]["train"], record["metrics"]["student"]["accuracy"])}
        for name in ("trainer", "grouped"):
            (result,) = own_work(args, name, args.workdir / f"{name}{turn}")
            figures[name] = (result["seconds"], result["accuracy"])
        for name, (seconds, accuracy) in figures.items():
            found[name]["seconds"].append(seconds)
            found[name]["accuracy"].append(accuracy)
    return compared(found, args.texts)


def compared(found: dict[str, dict[str, list[float]]], texts: int) -> dict:
    """Medians of the rounds, and the seconds of each. found: name -> seconds and accuracy by round."""
    rows = {
        name: {
            "texts_per_s": texts / statistics.median(lists["seconds"]),
            "accuracy": statistics.median(lists["accuracy"]),
            "seconds": lists["seconds"],
        }
        for name, lists in found.items()
    }
    speedup = {name: ratio(found[name]["seconds"], found["ours"]["seconds"]) for name in ("trainer", "grouped")}
    return {"rows": rows, "speedup": speedup["trainer"], "speedup_grouped": speedup["grouped"]}


def work_trainer(args: argparse.Namespace) -> dict:
    """One epoch of transformers.Trainer from the student that our run starts from."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from muka_fast.evaluate import evaluate
    from muka_fast.student import load_student

    found = read_texts(args.workdir / "train.jsonl", need_labels=True)
    names = sorted(set(found.labels))
    model, tokenizer = load_student(args.encoder, names, 0, {"zero_optimization": {"stage": 0}})
    encoded = tokenizer(found.texts, truncation=True, max_length=args.max_length)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": names.index(label), "length": len(ids)}
        for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], found.labels, strict=True)
    ]
    collator = DataCollatorWithPadding(tokenizer)
    without_length = lambda batch: collator([{key: value for key, value in row.items() if key != "length"} for row in batch])
    options = TrainingArguments(
        str(args.output), num_train_epochs=1, per_device_train_batch_size=args.batch_size, learning_rate=args.learning_rate,
        weight_decay=0.01, max_grad_norm=1.0, warmup_steps=round(0.1 * -(-len(rows) // args.batch_size)), lr_scheduler_type="linear",
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=0, logging_strategy="no",
        train_sampling_strategy="group_by_length" if args.work == "grouped" else "random", remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model, options, data_collator=without_length, train_dataset=rows)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model(str(args.output))
    tokenizer.save_pretrained(args.output)
    options = {"model": args.output, "data": args.workdir / "test.jsonl", "max_length": args.max_length, "device": "cpu"}
    return {"seconds": seconds, "accuracy": evaluate(load_config(EvalConfig, None, options))["accuracy"]}


def scoring_part(args: argparse.Namespace, teachers: list[str]) -> dict:
    """Seconds to fill a store in one process with a thread per core, and in one process per core."""
    times: dict[str, list[float]] = {"one process": [], "processes": []}
    for turn in range(args.rounds):
        for name, processes in (("one process", 1), ("processes", usable_cores())):
            times[name].append(own_work(args, "score", args.workdir / f"scored-{processes}-{turn}", processes)[0]["seconds"])
    one, many = (statistics.median(values) for values in times.values())
    speedup = ratio(times["one process"], times["processes"])
    counted = {"processes": usable_cores(), "texts": args.scored_texts}
    return counted | {"one_s": one, "many_s": many, "speedup": speedup, "seconds": times}


def work_score(args: argparse.Namespace) -> dict:
    """Fill a store as `muka-fast score` does, loading of the teachers included."""
    from muka_fast.supervision import score

    teachers = [str(args.workdir / f"teacher{i}") for i in range(2)]
    options = {"teachers": teachers, "texts": args.workdir / "pool.jsonl", "output": args.output}
    config = load_config(ScoreConfig, None, options | {"max_length": args.max_length, "device": "cpu"})
    start = time.perf_counter()
    score(config)
    return {"seconds": time.perf_counter() - start}


def memory_part(args: argparse.Namespace, teachers: list[str]) -> dict:
    """Largest resident set of each of two processes that train under each ZeRO stage, libraries and export included."""
    rows = {}
    for stage in range(4):
        ds = args.workdir / f"zero{stage}.json"
        ds.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        # A few steps do: the peak does not grow with their number.
        output = args.workdir / f"zero{stage}"
        options = training(args, output, ds_config=ds, method="vkd", limit=4 * args.batch_size, store=args.workdir / "small_store")
        found = own_work(args, "train", output, 2, [*options, "--teachers", *teachers])
        rows[str(stage)] = [result["peak_bytes"] for result in found]
    return {"processes": 2, "peak_bytes": rows}


def work_train(args: argparse.Namespace) -> dict:
    """A run of ours; the peak of this process."""
    from muka_fast.train import script

    if code := script(args.options):
        raise SystemExit(code)
    return {"peak_bytes": largest_resident_bytes()}


def resume_part(args: argparse.Namespace, teachers: list[str]) -> dict:
    """Seconds from the command to the first new step: of a fresh run, and of one that was stopped and continues."""
    output = args.workdir / "stopped"
    command = [TRAIN, *training(args, output, method="vkd", log_every=1)]
    seconds = {"fresh": first_step(command, output, 0)}
    seconds["resumed"] = first_step([*command, "--resume"], output, len((output / "metrics.jsonl").read_text().splitlines()))
    return seconds


def first_step(command: list[str], output: Path, before: int) -> float:
    """Start a run, stop it by SIGTERM once it has done a step more; seconds until that step."""
    metrics, start = output / "metrics.jsonl", time.perf_counter()
    runs = launch(command)
    while not metrics.exists() or len(metrics.read_text().splitlines()) <= before:
        if runs[0].poll() is not None:
            raise RuntimeError(f"{' '.join(command)}: ended before its first step")
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    runs[0].send_signal(signal.SIGTERM)
    finish(runs, expected=143)
    return seconds


# ---- the result ----


def markdown(args: argparse.Namespace, results: dict) -> str:
    """The tables of the parts that were measured."""
    lines = [f"# Training and scoring as jobs: {args.encoder.name}, {args.train.parent.name}", ""]
    if found := results.get("trainer"):
        recipe = f"{args.texts} texts, 1 epoch, batch {args.batch_size}, learning rate {args.learning_rate:g}, fp32"
        lines += [f"Our loop against the Hugging Face Trainer, both on true labels ({recipe}; medians of {args.rounds}):", ""]
        lines += ["| | texts/s | ours is faster by | accuracy (test) |", "|---|---|---|---|"]
        faster = {"ours": "", "trainer": f"{found['speedup']:.2f} x", "grouped": f"{found['speedup_grouped']:.2f} x"}
        titles = {"ours": "muka-fast train", "trainer": "Trainer", "grouped": "Trainer, grouped by length"}
        for name, row in found["rows"].items():
            lines.append(f"| {titles[name]} | {row['texts_per_s']:.1f} | {faster[name]} | {100 * row['accuracy']:.1f} |")
        lines.append("")
    if found := results.get("scoring"):
        count = found["processes"]
        times = f"{found['one_s']:.1f} s in a process with {count} threads, {found['many_s']:.1f} s in {count} processes with one each"
        lines += [f"Scoring {found['texts']} texts with two teachers: {times} ({found['speedup']:.2f} x).", ""]
    if found := results.get("memory"):
        lines += [f"Largest resident set of each of {found['processes']} processes in training, libraries and export included:", ""]
        lines += ["| ZeRO stage | process 0, MiB | process 1, MiB |", "|---|---|---|"]
        for stage, peaks in found["peak_bytes"].items():
            lines.append(f"| {stage} | " + " | ".join(f"{peak / 2**20:.0f}" for peak in peaks) + " |")
        lines.append("")
    if found := results.get("resume"):
        fresh = f"{found['fresh']:.1f} s for a fresh run with a filled store"
        lines.append(f"From the command to the first step: {fresh}, {found['resumed']:.1f} s for one that continues a checkpoint.")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.work:
        works = {"score": work_score, "train": work_train}
        print(json.dumps(works.get(args.work, work_trainer)(args)))
        return 0
    teachers = prepare(args)
    scoring = ["-m", "muka_fast.cli", "score", "--texts", str(args.workdir / "train.jsonl"), "--output", str(args.workdir / "store")]
    finish(launch([*scoring, "--device", "cpu", "--max_length", str(args.max_length), "--teachers", *teachers]))
    parts = {"trainer": trainer_part, "scoring": scoring_part, "memory": memory_part, "resume": resume_part}
    results: dict[str, dict] = {}
    for name in args.parts:
        start = time.perf_counter()
        results[name] = parts[name](args, teachers)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    text = markdown(args, results)
    print(text)
    keep("training", results, text, folder=args.results)
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
