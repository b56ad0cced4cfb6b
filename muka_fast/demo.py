"""The demo: three small teachers made on the spot from local docstrings, merged by several methods, compared in one table.

Offline and from scratch, so the models are tiny and far from what pretrained encoders reach; what it shows is the whole path of a
user's run (`train.amalgamate`) and what each method does with teachers that know different labels.
"""

import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import transformers

from muka_fast.config import DemoConfig, RunConfig
from muka_fast.console import new_table, stdout_console
from muka_fast.data import TextSet, read_texts
from muka_fast.errors import UserError
from muka_fast.evaluate import load_model
from muka_fast.labels import LabelSpace, build_label_space
from muka_fast.material import MAX_LENGTH, STUDENT_OPTIONS, TEACHERS, Prepared, is_ours, one_thread, prepare
from muka_fast.memory import check_kernels
from muka_fast.methods import build_method, selection_accuracy, target_accuracy
from muka_fast.stored import Supervision
from muka_fast.supervision import fill_store
from muka_fast.teach import measure, rows_to_measure

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger("muka_fast")
PUBLISHED = {"uncertainty": "predictive_entropy"}  # the muka-hard and muka-soft rows are as published, whatever the default
# Row of the table -> options of `muka-fast train`, and whether it sees the true labels.
RUNS = {
    "vanilla KD": ({"method": "vkd"}, False),
    "muka-hard": ({"method": "muka-hard", "margin": False, **PUBLISHED}, False),
    "muka-soft": ({"method": "muka-soft", "margin": False, **PUBLISHED}, False),
    "muka-soft + margin": ({"method": "muka-soft", "margin": True, **PUBLISHED}, False),
    "muka-auto": ({"method": "muka-auto"}, False),
    "oracle": ({"method": "oracle", **PUBLISHED}, True),
    "supervised": ({"method": "supervised"}, True),
}
SHOWN = "muka-auto"  # its student answers the example sentences


# ---- runs and figures ----


def held_out_figures(
    config: RunConfig, sup: Supervision, space: LabelSpace, held_out: TextSet
) -> tuple[float | None, float | None]:
    """Target accuracy and teacher-selection accuracy of one row's method on the held-out texts. config: with their store."""
    from muka_fast.train import pool_features, pool_weights

    if config.method == "supervised":
        return None, None
    store = Path(config.store)
    weights = pool_weights(config, sup, space, held_out, pool_features(config, held_out, store), store)
    method = build_method(config, sup, space, held_out.labels, weights)
    return target_accuracy(method, held_out.labels, space), selection_accuracy(method, held_out.labels, space)


def teacher_rows(prepared: Prepared, held_out: TextSet) -> list[tuple[str, float, float]]:
    """Per teacher: name with its labels, accuracy on the held-out texts of its own labels, and on all held-out texts."""
    rows = []
    for path in prepared.teachers:
        model, tokenizer, labels = load_model(path)
        figures = measure(model, tokenizer, rows_to_measure(held_out, labels), labels, MAX_LENGTH)
        name = Path(path).name
        title = f"teacher {name} ({TEACHERS[name][0]})"
        rows.append((title, figures["accuracy"], figures["accuracy"] * figures["num_texts"] / len(held_out)))
    return rows


def run_all(config: DemoConfig, prepared: Prepared) -> None:
    """Amalgamate by every method over one store, and show all figures in a table."""
    from muka_fast.train import amalgamate

    output = Path(config.output).expanduser()
    common = {"teachers": prepared.teachers, "student": prepared.student, "seed": config.seed, "eval": prepared.eval}
    held_out = read_texts(prepared.eval, need_labels=True)
    rows = teacher_rows(prepared, held_out)
    asked = {"student": prepared.student, "store": str(output / "supervision_held_out"), "seed": config.seed, "max_length": MAX_LENGTH}
    sup = fill_store(asked["store"], prepared.teachers, held_out, RunConfig(**asked))
    space = build_label_space([(teacher["name"], teacher["labels"]) for teacher in sup.teachers])

    table = new_table(f"accuracy in % on {len(held_out)} held-out texts, {space.num_classes} labels", "")
    for title in ("own labels", "all labels", "target", "selection"):
        table.add_column(title, justify="right")
    for title, own, everything in rows:
        table.add_row(title, percent(own), percent(everything), "", "")
    table.add_section()
    for name, (options, labelled) in RUNS.items():
        log.info("student by %s", name)
        folder = output / "students" / name.replace(" + ", "-").replace(" ", "-")
        result = amalgamate(
            **common,
            **STUDENT_OPTIONS,
            **options,
            texts=prepared.texts_labelled if labelled else prepared.texts,
            store=str(output / "supervision"),
            output=str(folder),
            resume=folder.exists(),
        )
        if result.stopped:
            raise KeyboardInterrupt
        target, selection = held_out_figures(RunConfig(**asked, **options), sup, space, held_out)
        title = f"{name} (sees labels)" if labelled else name
        table.add_row(title, "", percent(result.metrics["student"]["accuracy"]), percent(target), percent(selection))
        if name == SHOWN:
            table.add_section()
            shown = folder
    show(table, shown, held_out, space)


def percent(value: float | None) -> str:
    """0.7312 -> 73.1; nothing for None."""
    return "" if value is None else f"{100 * value:.1f}"


def show(table: "Table", folder: Path, held_out: TextSet, space: LabelSpace) -> None:
    """Print the table, what it means, and three held-out sentences through plain transformers."""
    out = stdout_console()
    out.print(table)
    out.print(
        "own labels: held-out texts whose library the teacher knows. target: the composed teacher answer is right. "
        "selection: the chosen teacher knows the text's library. Students saw the teachers' training texts, without labels "
        "unless marked. All models are tiny and trained from scratch here: compare rows, not levels."
    )
    out.print(f'\ntransformers.pipeline("text-classification", "{folder}"):', soft_wrap=True)
    classify = transformers.pipeline("text-classification", str(folder), device="cpu")
    for teacher in range(len(space.teacher_names)):
        # The first held-out text that only this teacher knows: not chosen for a good answer.
        row = next(i for i, label in enumerate(held_out.labels) if space.owners(label) == [teacher])
        text, answer = held_out.texts[row], classify(held_out.texts[row], truncation=True)[0]
        cut = text if len(text) <= 90 else text[:87] + "..."
        out.print(f"  {cut}", soft_wrap=True)
        out.print(f"    -> {answer['label']} ({answer['score']:.2f}), truly {held_out.labels[row]}")


# ---- the command ----


def clear(output: Path) -> None:
    """Remove an earlier demo, whole or not; nothing else. Raises UserError for a folder that no demo wrote."""
    if not output.exists() or not any(output.iterdir()):
        return
    if not is_ours(output):
        raise UserError(f"--output {output}: holds files that no demo wrote; name a new or empty folder")
    output = output.resolve()  # a link stays one
    aside = output.with_name(f".{output.name}.replaced-demo")  # not the name under which a run is set aside
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(output, aside)
    shutil.rmtree(aside)


def main(config: DemoConfig) -> int:
    """`muka-fast demo`: prepare, amalgamate, show. A killed demo continues where it stopped."""
    from muka_fast.engine import quiet_deepspeed, resolve_device
    from muka_fast.group import shut_down

    start = time.monotonic()
    device = resolve_device("auto")
    check_kernels(device)
    quiet_deepspeed(device, config.verbose)
    output = Path(config.output).expanduser()
    if config.overwrite and output.is_dir():
        clear(output)
    prepared = prepare(output, config)
    try:
        with one_thread():
            run_all(config, prepared)
    finally:
        shut_down()
    log.info("demo in %s: %.0f s", output, time.monotonic() - start)
    return 0
