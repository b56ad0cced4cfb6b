"""What a user gains end to end: muka_fast against the published procedure, same teachers, texts, student and steps, in one run.

    python bench/amalgamation.py --encoder DIR --train F --eval F [--texts 400] [--scopes last:1 head all] [--json F]
    python bench/amalgamation.py --synthetic toy|small|base        random weights and installed docstrings: times only

Teachers are fine-tuned first (kept in --workdir); the pool is a random part of --train. Scoring times are medians of interleaved
repetitions; the published procedure's cost per text is constant (every text is padded), so it may be measured on fewer texts
(--published_texts) and scaled, which the result says. Correctness first: in every scope the deterministic targets must equal the
plain model's.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environment import keep
from published import deterministic_logits, normalized_entropy, padded_batches, soft_targets, train_step
from settings import draw, read_rows, write_rows
from synthetic import SIZES, make_encoder, make_teacher, make_texts
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import muka_fast
from muka_fast import teach
from muka_fast.config import ScoreConfig, TeachConfig, load_config
from muka_fast.data import TextSet, collate, read_texts, token_budget_batches, tokenize
from muka_fast.evaluate import metrics, predict
from muka_fast.labels import LabelSpace, build_label_space
from muka_fast.supervision import Supervision, fill_store
from muka_fast.teachers import Teacher, load_teacher

TOLERANCE = 1e-4  # of the deterministic logits, relative to the largest


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="folder of the pretrained encoder of teachers and student")
    parser.add_argument("--train", help="labelled texts: the teachers' training data and, unlabelled, the pool")
    parser.add_argument("--eval", help="labelled texts for the student's accuracy")
    parser.add_argument("--synthetic", choices=SIZES, help="random teachers of this size over docstrings instead")
    parser.add_argument("--num_teachers", type=int, default=2)
    parser.add_argument("--texts", type=int, default=400, help="texts of the pool")
    parser.add_argument("--eval_texts", type=int, default=600)
    parser.add_argument("--published_texts", type=int, help="texts on which the published procedure is timed (default: all)")
    parser.add_argument("--scopes", nargs="+", default=["last:1", "head", "all"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1, help="students per row; 0 leaves the training out")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--freeze_layers", type=int, default=4, help="leading layers that the teachers share")
    parser.add_argument("--workdir", default="runs/bench_amalgamation")
    parser.add_argument("--json", help="write the rows to this file instead of bench/results")
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)  # a process of its own that scores once and prints its peak memory
    args = parser.parse_args()
    if not args.synthetic and not (args.encoder and args.train and args.eval):
        parser.error("--encoder, --train and --eval, or --synthetic")
    return args


def prepare(args: argparse.Namespace) -> list[str]:
    """Pool, evaluation texts and teachers of consecutive parts of the sorted labels in --workdir; made once. Returns the teachers."""
    work = Path(args.workdir)
    work.mkdir(parents=True, exist_ok=True)
    if args.synthetic:
        args.seeds = 0
        args.train, args.eval = make_texts(work, args.texts)
        args.encoder = str(work / "encoder")
        if not Path(args.encoder).is_dir():
            make_encoder(Path(args.encoder), args.synthetic, read_texts(args.train).texts)
    else:
        # Files may be sorted by label: parts are drawn at random.
        for name, limit in (("train", 2000), ("eval", args.eval_texts)):
            write_rows(work / f"{name}.jsonl", draw(read_rows(Path(getattr(args, name))), limit, 0))
            setattr(args, name, str(work / f"{name}.jsonl"))
    labels = sorted(set(read_texts(args.train, need_labels=True).labels))
    size = -(-len(labels) // args.num_teachers)
    paths = []
    for i in range(args.num_teachers):
        path, part = work / f"teacher{i}", labels[i * size : (i + 1) * size]
        paths.append(str(path))
        if path.is_dir():
            continue
        if args.synthetic:
            layers = SIZES[args.synthetic][1]
            make_teacher(path, args.encoder, part, seed=i, own_layers=max(1, layers - args.freeze_layers))
            continue
        options = {"encoder": args.encoder, "train": args.train, "labels": part, "output": str(path)}
        options |= {"freeze_layers": args.freeze_layers, "epochs": 2, "learning_rate": 2e-4, "max_length": args.max_length}
        teach.main(load_config(TeachConfig, None, options))
    return paths


def plain_pass(teachers: list[Teacher], texts: TextSet, max_length: int) -> list[Tensor]:
    """The yardstick: one ordinary length-bucketed forward of every teacher, tokenisation included."""
    out = []
    with torch.inference_mode():
        for teacher in teachers:
            tokens = tokenize(teacher.tokenizer, texts.texts, max_length)
            logits = torch.empty(len(tokens), len(teacher.labels))
            for rows in token_budget_batches(tokens.lengths, 8192):
                batch = collate(tokens, rows, teacher.pad_id)
                logits[torch.as_tensor(rows)] = teacher.model(**batch).logits
            out.append(logits)
    return out


def published_scores(args: argparse.Namespace, paths: list[str], texts: list[str]) -> Tensor:
    """K sequential forwards in training mode per teacher, padded: teacher scores [n, N]."""
    columns = []
    for path in paths:
        model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        batches = padded_batches(tokenizer, texts, args.max_length, args.batch_size)
        columns.append(1 - torch.cat([normalized_entropy(model, batch, args.samples) for batch in batches]))
    return torch.stack(columns, -1)


def published_student(args: argparse.Namespace, paths: list[str], texts: list[str], scores: Tensor, space: LabelSpace, seed: int):
    """Train the student as published: padded batches, every teacher run again in every step."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(args.encoder)
    student = AutoModelForSequenceClassification.from_pretrained(args.encoder, num_labels=space.num_classes)
    teachers = [AutoModelForSequenceClassification.from_pretrained(path) for path in paths]
    to_union = [torch.as_tensor(space.teacher_to_union[a:b]) for a, b in zip(space.offsets, space.offsets[1:], strict=False)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.01)
    steps = args.epochs * -(-len(texts) // args.batch_size)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    top = scores.topk(2, -1).values if scores.shape[1] > 1 else None
    margin = torch.ones(len(scores)) if top is None else top[:, 0] - top[:, 1]
    for _ in range(args.epochs):
        for rows in torch.randperm(len(texts)).split(args.batch_size):
            batch = padded_batches(tokenizer, [texts[i] for i in rows], args.max_length, len(rows))[0]
            logits = [deterministic_logits(teacher, batch) for teacher in teachers]
            q = soft_targets(logits, scores[rows], to_union, space.num_classes, tau=0.2)
            train_step(student, optimizer, batch, q, margin[rows] + 1e-6)
            schedule.step()
    return student.eval(), tokenizer


def accuracy(student, tokenizer, evaluation: TextSet, space: LabelSpace, max_length: int) -> float:
    tokens = tokenize(tokenizer, evaluation.texts, max_length)
    logits = predict(student, tokens)
    labels = torch.tensor([space.names.index(label) for label in evaluation.labels])
    return metrics(logits, labels, space.names)["accuracy"]


def score_with(args: argparse.Namespace, paths: list[str], texts: TextSet, scope: str, seed: int = 0) -> Supervision:
    """The product's own path, into a store that did not exist."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"teachers": paths, "texts": texts.source, "output": folder, "mc_scope": scope, "mc_samples": args.samples}
        config = load_config(ScoreConfig, None, options | {"seed": seed, "max_length": args.max_length})
        return fill_store(Path(folder) / "store", paths, texts, config)


def clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def selections(supervision: Supervision) -> Tensor:
    return supervision.normalized_entropy.argmin(-1)


def agreement(a: Tensor, b: Tensor) -> float:
    return (a == b).float().mean().item()


def measure_scoring(args: argparse.Namespace, paths: list[str], texts: TextSet) -> dict:
    """Interleaved medians of plain pass and scopes, the published procedure once, and the selections of each scope."""
    teachers = [load_teacher(path, run_seed=0) for path in paths]
    plain = torch.cat(plain_pass(teachers, texts, args.max_length), -1)
    supervision = {scope: score_with(args, paths, texts, scope) for scope in args.scopes}
    for scope, found in supervision.items():
        error = (found.logits - plain).abs().max() / plain.abs().max()
        if not error < TOLERANCE:
            raise SystemExit(f"{scope}: deterministic logits differ from the plain model's by {error:.1e}: no times are shown")
    times = {name: [] for name in ["plain", *args.scopes]}
    for _ in range(args.repetitions):
        times["plain"].append(clock(lambda: plain_pass(teachers, texts, args.max_length)))
        for scope in args.scopes:
            times[scope].append(clock(lambda scope=scope: score_with(args, paths, texts, scope)))
    sample = texts.texts[: args.published_texts]
    scores = None

    def published() -> None:
        nonlocal scores
        scores = published_scores(args, paths, sample)

    published_s = clock(published) * len(texts.texts) / len(sample)
    reference = supervision["all"] if "all" in supervision else score_with(args, paths, texts, "all")
    again = score_with(args, paths, texts, "all", seed=1)
    chosen = selections(reference)
    return {
        "times": {name: statistics.median(values) for name, values in times.items()},
        "published_s": published_s,
        "published_scores": scores,
        "agreement": {scope: agreement(selections(found), chosen) for scope, found in supervision.items()},
        "agreement_all_vs_all": agreement(selections(again), chosen),
    }


def measure_students(
    args: argparse.Namespace, paths: list[str], texts: TextSet, evaluation: TextSet, space: LabelSpace, scoring: dict
) -> tuple[dict, dict]:
    """Accuracy and seconds of training per scope, and of the published procedure, over the seeds."""
    accuracies = {name: [] for name in [*args.scopes, "published"]}
    seconds = {name: [] for name in accuracies}
    for seed in range(args.seeds):
        for scope in args.scopes:
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                result = muka_fast.amalgamate(
                    teachers=paths, student=args.encoder, texts=args.train, limit=args.texts, output=f"{folder}/run", seed=seed,
                    mc_scope=scope, mc_samples=args.samples, epochs=args.epochs, learning_rate=args.learning_rate,
                    batch_size=args.batch_size, max_length=args.max_length, uncertainty="predictive_entropy",
                )  # fmt: skip
                seconds[scope].append(time.perf_counter() - start)
                student = AutoModelForSequenceClassification.from_pretrained(result.output).eval()
                tokenizer = AutoTokenizer.from_pretrained(result.output)
                accuracies[scope].append(accuracy(student, tokenizer, evaluation, space, args.max_length))
        if len(scoring["published_scores"]) == len(texts.texts):
            start = time.perf_counter()
            student, tokenizer = published_student(args, paths, texts.texts, scoring["published_scores"], space, seed)
            seconds["published"].append(time.perf_counter() - start + scoring["published_s"])
            accuracies["published"].append(accuracy(student, tokenizer, evaluation, space, args.max_length))
    return accuracies, seconds


def peak_bytes(scope: str) -> int:
    """Largest resident set of a process of its own that scores the pool once (interpreter, torch and one teacher included)."""
    done = subprocess.run([sys.executable, *sys.argv, "--peak_of", scope], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_peak(args: argparse.Namespace, paths: list[str], texts: TextSet) -> None:
    score_with(args, paths, texts, args.peak_of)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def rows_of(args: argparse.Namespace, scoring: dict, students: tuple[dict, dict] | None) -> list[dict]:
    rows = []
    for scope in args.scopes:
        seconds, plain = scoring["times"][scope], scoring["times"]["plain"]
        row = {
            "scope": scope,
            "scoring_s": seconds,
            "plain_forward_s": plain,
            "published_s": scoring["published_s"],
            "cost_in_plain_forwards": seconds / plain,
            "speedup_vs_published": scoring["published_s"] / seconds,
            "agreement_with_all": scoring["agreement"][scope],
            "agreement_all_vs_all": scoring["agreement_all_vs_all"],
            "end_to_end_speedup": None,
            "student_accuracy": None,
            "peak_bytes": peak_bytes(scope),
        }
        if students is not None:
            accuracies, spent = students
            row["student_accuracy"] = statistics.mean(accuracies[scope])
            if spent["published"]:
                row["end_to_end_speedup"] = statistics.median(spent["published"]) / statistics.median(spent[scope])
                row["student_accuracy_published"] = statistics.mean(accuracies["published"])
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    shown = {
        "scope": "{}", "scoring_s": "{:.2f}", "plain_forward_s": "{:.2f}", "published_s": "{:.1f}", "cost_in_plain_forwards": "{:.2f}",
        "speedup_vs_published": "{:.1f}", "agreement_with_all": "{:.1%}", "agreement_all_vs_all": "{:.1%}",
        "peak_bytes": "{:,}", "end_to_end_speedup": "{:.1f}", "student_accuracy": "{:.1%}", "student_accuracy_published": "{:.1%}",
    }  # fmt: skip
    lines = ["| " + " | ".join(name.replace("_", " ") for name in shown) + " |", "|---" * len(shown) + "|"]
    for row in rows:
        cells = [form.format(row[name]) if row.get(name) is not None else "–" for name, form in shown.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parse_arguments()
    paths = prepare(args)
    texts = read_texts(args.train, limit=args.texts)
    if args.peak_of:
        print_peak(args, paths, texts)
        return
    evaluation = read_texts(args.eval, need_labels=True)
    space = build_label_space([(Path(p).name, load_teacher(p, run_seed=0).labels) for p in paths], None)
    scoring = measure_scoring(args, paths, texts)
    students = measure_students(args, paths, texts, evaluation, space, scoring) if args.seeds else None
    rows = rows_of(args, scoring, students)
    note = f"{len(texts.texts)} texts, {len(paths)} teachers, K = {args.samples}, {args.repetitions} interleaved repetitions"
    if args.published_texts and args.published_texts < len(texts.texts):
        note += f"; published procedure timed on {args.published_texts} texts and scaled"
    markdown = f"# muka_fast against the published procedure\n\n{note}.\n\n{table(rows)}"
    print(markdown)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    else:
        print("kept in", keep("amalgamation", rows, markdown))


if __name__ == "__main__":
    main()
