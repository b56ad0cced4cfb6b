"""Does the student know what it does not know? Its uncertainty head on clinc150's out-of-scope texts, against softmax and teachers.

    python bench/doubt.py --data DIR --encoder path/to/encoder [--seeds 3] [--labels 40]

DIR holds clinc150/{train,test,oos_test}.jsonl and google_snippets/train.jsonl. Every seed draws labels, texts and students anew.
In-scope: clinc150's test texts with these labels; out of scope: oos_test. Pools: `plain`, the teachers' training texts, and `mixed`,
a quarter of which are texts from another data set. No method sees an out-of-scope text before the measurement. What was done is kept
in --workdir, under a name that holds the options: a killed run continues.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import RESULTS, command, keep
from settings import Rows, digest, draw, read_rows, slug, write_rows

import muka_fast
from muka_fast.config import ScoreConfig, TeachConfig, load_config
from muka_fast.console import setup_logging
from muka_fast.data import tokenize
from muka_fast.doubt import UncertaintyHead, auroc, false_positive_rate, with_head
from muka_fast.errors import UserError
from muka_fast.evaluate import load_model, predict
from muka_fast.evidence import CERTAINTY, RelativeMahalanobis
from muka_fast.files import write_json
from muka_fast.selection import UNCERTAINTY
from muka_fast.stored import Supervision, open_store
from muka_fast.supervision import score
from muka_fast.teach import teach

TEXTS_PER_LABEL = 30  # to train on
FOREIGN, SHARE = "google_snippets", 0.25  # texts that belong to nobody in `mixed`
# Options that change texts, teachers and stores, and those that change the students, hence the names of their folders.
TEACHER_NUMBERS = ("data", "encoder", "labels", "teachers", "oos", "max_length")
TEACHER_NUMBERS += ("teacher_epochs", "teacher_learning_rate", "freeze_layers")
STUDENT_NUMBERS = ("method", "epochs", "learning_rate", "batch_size")
# Row of the tables -> pool and options of the student.
STUDENTS = {
    "plain, no head": ("plain", {}),
    "plain": ("plain", {"uncertainty_head": True}),
    "mixed": ("mixed", {"uncertainty_head": True}),
    "mixed, --coverage": ("mixed", {"uncertainty_head": True, "coverage": True}),
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--encoder", type=Path, required=True, help="of teachers and students")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--labels", type=int, default=40, help="of clinc150's 150, drawn at random")
    parser.add_argument("--teachers", type=int, default=2, help="that share the labels")
    parser.add_argument("--oos", type=int, default=1000, help="out-of-scope texts, drawn at random")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS), metavar="S", help="; ".join(STUDENTS))
    parser.add_argument("--method", default="muka-auto")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="of the students")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--teacher_epochs", type=int, default=5)
    parser.add_argument("--teacher_learning_rate", type=float, default=3e-4)
    parser.add_argument("--freeze_layers", type=int, default=4, help="leading encoder layers that teachers do not train")
    parser.add_argument("--max_length", type=int, default=48)
    parser.add_argument("--workdir", type=Path, default=Path("runs/doubt"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if min(args.seeds, args.teachers, args.oos) < 1 or args.labels < 2 * args.teachers:
        parser.error("--seeds, --teachers and --oos: must be 1 or more; --labels: two for each teacher, or more")
    return args


# ---- texts, teachers, students of one seed ----


def numbers(args: argparse.Namespace, names: Sequence[str]) -> dict[str, str]:
    values = {name: getattr(args, name) for name in names}
    return {name: str(value.resolve() if isinstance(value, Path) else value) for name, value in values.items()}


def seed_folder(args: argparse.Namespace, seed: int) -> Path:
    """One folder per set of options that change a teacher or a text, and seed."""
    return args.workdir / digest(numbers(args, TEACHER_NUMBERS)) / f"seed{seed}"


def prepare(args: argparse.Namespace, seed: int, folder: Path) -> list[Path]:
    """Write teachers, the pools and the texts of the measurement (scored by all teachers, K = 16); the teachers' folders."""
    folder.mkdir(parents=True, exist_ok=True)
    choose = random.Random(seed)
    test, train = (read_rows(args.data / "clinc150" / f"{part}.jsonl") for part in ("test", "train"))
    names = sorted({label for _, label in train})
    if len(names) < args.labels:
        raise UserError(f"--labels {args.labels}: {args.data / 'clinc150' / 'train.jsonl'} has {len(names)}")
    labels = choose.sample(names, args.labels)
    known = {text for text, _ in test}
    train = [row for row in train if row[1] in labels and row[0] not in known]
    train = draw(train, TEXTS_PER_LABEL * args.labels, seed)
    foreign = draw(read_rows(args.data / FOREIGN / "train.jsonl"), None, seed)
    foreign = foreign[: round(len(train) * SHARE / (1 - SHARE))]
    oos = draw(read_rows(args.data / "clinc150" / "oos_test.jsonl"), args.oos, seed)
    mixed: Rows = [*train, *foreign]
    choose.shuffle(mixed)
    write_rows(folder / "plain.jsonl", train)
    write_rows(folder / "mixed.jsonl", mixed)
    write_rows(folder / "test.jsonl", [row for row in test if row[1] in labels])
    write_rows(folder / "measure.jsonl", [*(row for row in test if row[1] in labels), *((text, "oos") for text, _ in oos)])
    teachers = []
    for i in range(args.teachers):
        mine, path = sorted(labels)[i :: args.teachers], folder / f"teacher{i}"
        teachers.append(path)
        if not (path / "teach.json").is_file():
            options = {"encoder": args.encoder, "train": folder / "plain.jsonl", "labels": mine, "output": path}
            options |= {"seed": seed * 100 + i, "epochs": args.teacher_epochs, "learning_rate": args.teacher_learning_rate}
            teach(load_config(TeachConfig, None, options | {"freeze_layers": args.freeze_layers, "max_length": args.max_length}))
    return teachers


def scored(args: argparse.Namespace, seed: int, folder: Path, teachers: list[Path], name: str) -> float:
    """Fill the store of <name>.jsonl; seconds that it took the first time."""
    done = folder / f"store-{name}.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    start = time.perf_counter()
    options = {"teachers": teachers, "texts": folder / f"{name}.jsonl", "output": folder / f"store-{name}", "seed": seed}
    score(load_config(ScoreConfig, None, options | {"max_length": args.max_length}))
    write_json(done, time.perf_counter() - start)
    return time.perf_counter() - start


def student_name(args: argparse.Namespace, name: str) -> str:
    return f"student-{slug(name)}-{digest(numbers(args, STUDENT_NUMBERS))}"


def student(args: argparse.Namespace, seed: int, folder: Path, name: str) -> Path:
    """The folder of one row's student, trained where it is not there yet."""
    pool, options = STUDENTS[name]
    output = folder / student_name(args, name)
    common = {"store": folder / f"store-{pool}", "texts": folder / f"{pool}.jsonl", "student": args.encoder, "seed": seed}
    common |= {"method": args.method, "output": output, "resume": True, "max_length": args.max_length}
    common |= {key: getattr(args, key) for key in ("epochs", "learning_rate", "batch_size")}
    if muka_fast.amalgamate(**common, **options).stopped:
        raise KeyboardInterrupt
    return output


# ---- the measurement ----


def student_doubts(args: argparse.Namespace, folder: Path, rows: Rows) -> tuple[float, float, dict[str, np.ndarray]]:
    """Accuracy on the in-scope texts, seconds for all texts, and every doubt of the student, [n] each."""
    model, tokenizer, labels = load_model(folder)
    head = UncertaintyHead.load(folder, model)
    tokens = tokenize(tokenizer, [text for text, _ in rows], args.max_length)
    start = time.perf_counter()
    found = predict(model, tokens, forward=with_head(model, head) if head else None)
    seconds = time.perf_counter() - start
    logits = found[:, : len(labels)].double()
    log_p = torch.log_softmax(logits, -1)
    right = [labels[c] == label for c, (_, label) in zip(logits.argmax(-1).tolist(), rows, strict=True) if label != "oos"]
    doubts = {"max softmax": -log_p.max(-1).values, "entropy": -(log_p.exp() * log_p).sum(-1), "energy": -logits.logsumexp(-1)}
    if head:
        doubts["uncertainty head"] = found[:, len(labels)]
    return sum(right) / len(right), seconds, {name: values.numpy() for name, values in doubts.items()}


def teacher_doubts(pool: Supervision, sup: Supervision) -> dict[str, np.ndarray]:
    """Natural doubts of the ensemble over the measured texts, [n] each; the distance is fitted on the pool."""
    doubts = {}
    for name, measure in UNCERTAINTY.items():
        values = measure(sup)
        doubts |= {f"least {name}": values.min(-1).values, f"mean {name}": values.mean(-1)}
    blocks = list(itertools.pairwise(sup.offsets))
    doubts["max softmax"] = -torch.stack([sup.mean_probs[:, a:b].amax(-1) for a, b in blocks]).amax(0)
    doubts["max joint softmax"] = -torch.softmax(sup.logits, -1).amax(-1)
    doubts["energy"] = -torch.stack([sup.logits[:, a:b].logsumexp(-1) for a, b in blocks]).amax(0)
    return {name: values.numpy() for name, values in doubts.items()} | {"distance": distance(pool, sup)}


def distance(pool: Supervision, sup: Supervision) -> np.ndarray:
    """Least relative Mahalanobis distance to the classes of any teacher, in standard deviations over the pool, [n]."""
    found = []
    for i, (a, b) in enumerate(itertools.pairwise(sup.offsets)):
        every = lambda s, i=i: s.features[i].rows(np.arange(len(s)))
        probs = torch.softmax(pool.logits[:, a:b], -1)
        gaussians = RelativeMahalanobis.fit(every(pool), probs.argmax(-1).numpy(), probs.amax(-1).double().numpy() ** CERTAINTY)
        known = gaussians.scores(every(pool))
        found.append((gaussians.scores(every(sup)) - known.mean()) / known.std())
    return -np.max(found, axis=0)


def figures(doubt: np.ndarray, foreign: np.ndarray) -> dict[str, float]:
    return {"auroc": auroc(doubt, foreign), "fpr95": false_positive_rate(doubt, foreign)}


def run_seed(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Every row of one seed."""
    folder = seed_folder(args, seed)
    teachers = prepare(args, seed, folder)
    seconds = {name: scored(args, seed, folder, teachers, name) for name in ("plain", "mixed", "measure")}
    rows = read_rows(folder / "measure.jsonl")
    foreign = np.array([label == "oos" for _, label in rows])
    out: dict[str, Any] = {"seed": seed, "texts": len(rows), "foreign": int(foreign.sum()), "teacher_seconds": seconds["measure"]}
    sup = open_store(folder / "store-measure")
    out["students"], out["teachers"] = {}, {}
    for pool in ("plain", "mixed"):
        found = teacher_doubts(open_store(folder / f"store-{pool}"), sup)
        out["teachers"] |= {name if name != "distance" else f"distance, {pool}": figures(v, foreign) for name, v in found.items()}
    for name in args.students:
        output = student(args, seed, folder, name)
        accuracy, took, doubts = student_doubts(args, output, rows)
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
        out["students"][name] = {"accuracy": accuracy, "seconds": took, "left_out": record.get("coverage", {}).get("texts")}
        out["students"][name]["doubts"] = {kind: figures(values, foreign) for kind, values in doubts.items()}
        print(json.dumps({name: out["students"][name]}), flush=True)
    return out


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, and of several seeds the least and the largest."""
    shown = f"{statistics.mean(values):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown(args: argparse.Namespace, seeds: list[dict[str, Any]]) -> str:
    """Tables of means over seeds."""
    each = lambda get: spread([100 * get(seed) for seed in seeds])
    row = lambda what, kind, get: f"| {what} | {kind} | {each(lambda s: get(s)['auroc'])} | {each(lambda s: get(s)['fpr95'])} |"
    lines = [
        "# Doubt on clinc150's out-of-scope texts\n",
        f"{args.teachers} teachers of {args.labels // args.teachers} labels each, method {args.method}; {len(seeds)} seed(s)"
        f"{', mean (least to largest)' if len(seeds) > 1 else ''}. FPR: out-of-scope texts that pass where 95 % "
        "of the in-scope ones do.",
        f"`mixed`: {100 * SHARE:.0f} % of the pool are texts of {FOREIGN}. "
        f"{seeds[0]['texts'] - seeds[0]['foreign']} in-scope, {seeds[0]['foreign']} out-of-scope texts.\n",
        "| who | doubt | AUROC in % | FPR at 95 % |",
        "|---|---|---|---|",
    ]
    rows: list[tuple[str, str, Callable]] = []
    for name in args.students:
        for kind in seeds[0]["students"][name]["doubts"]:
            rows.append((f"student, {name}", kind, lambda s, name=name, kind=kind: s["students"][name]["doubts"][kind]))
    for kind in seeds[0]["teachers"]:
        rows.append(("all teachers, K = 16", kind, lambda s, kind=kind: s["teachers"][kind]))
    lines += [row(*entry) for entry in rows]
    lines += ["\n| student | accuracy in % | texts left out | s for all texts |", "|---|---|---|---|"]
    for name in args.students:
        left = [seed["students"][name]["left_out"] for seed in seeds]
        told = "–" if left[0] is None else ", ".join(map(str, left))
        took = spread([seed["students"][name]["seconds"] for seed in seeds])
        lines.append(f"| {name} | {each(lambda s, name=name: s['students'][name]['accuracy'])} | {told} | {took} |")
    took = spread([seed["teacher_seconds"] for seed in seeds])
    return "\n".join([*lines, f"\nAll teachers took {took} s for the same texts (loading and the store included)."])


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    setup_logging()
    seeds = [run_seed(args, seed) for seed in range(args.seeds)]
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    options = {key: value for key, value in options.items() if key not in ("data", "encoder", "workdir", "results")}
    text = markdown(args, seeds)
    print(text)
    keep("doubt_clinc150", {"options": options | {"encoder": args.encoder.name}, "seeds": seeds}, text, folder=args.results)
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
