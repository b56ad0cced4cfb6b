"""What a run records about itself: versions, timings, metrics, a summary of the teachers' supervision. Its identity: identity.py."""

import importlib.metadata
import importlib.util
import json
import logging
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from muka_fast import __version__
from muka_fast.adaptive import sampling_summary
from muka_fast.errors import UserError
from muka_fast.files import write_json, write_text
from muka_fast.methods import selection_accuracy, target_accuracy
from muka_fast.ops.reference import select_teacher_ref
from muka_fast.selection import uncertainties

if TYPE_CHECKING:
    from muka_fast.config import RunConfig
    from muka_fast.data import TextSet
    from muka_fast.labels import LabelSpace
    from muka_fast.stored import Supervision
    from muka_fast.targets import Method

log = logging.getLogger("muka_fast")
PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "safetensors", "tokenizers", "datasets")
MARGIN_BINS = 20
EXAMPLES = 6
EXAMPLE_CHARACTERS = 400


class Clock:
    """Wall seconds per stage, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def tensorboard(folder: Path, completed_steps: int) -> Any | None:
    """A writer of TensorBoard events, where it is installed; events of steps that a resume repeats are hidden."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=completed_steps + 1)  # the first step that is repeated


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that decide numbers."""
    found = {"muka_fast": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def begin_run(output: Path, config: "RunConfig", record: dict[str, Any]) -> None:
    """Write run.yaml, which repeats this run with `--config`, and the first run.json."""
    options = {key: value for key, value in record["config"].items() if key not in ("resume", "overwrite") and value is not None}
    if not config.teachers:  # whoever else is scored into the store, and in whatever order
        options["store_teachers"] = [teacher["name"] for teacher in record["teachers"]]
    if record["identity"]["scheduler"] is not None:
        del options["warmup_ratio"]  # the ds_config's scheduler has its own
    write_text(output / "run.yaml", yaml.safe_dump(options, sort_keys=False, allow_unicode=True))
    write_json(output / "run.json", record)


def read_run(output: Path) -> dict[str, Any]:
    """run.json of a run, {} where there is none. Raises UserError where it is damaged."""
    path = output / "run.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); start anew with --overwrite") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(part, {}), dict) for part in ("config", "identity")):
        raise UserError(f"{path}: is not the record of a run; start anew with --overwrite")
    return content


def supervision_record(
    config: "RunConfig", method: "Method", sup: "Supervision", space: "LabelSpace", texts: "TextSet", labels: list[str] | None
) -> dict[str, Any]:
    """What run.json tells of the supervision."""
    record = {"metrics": supervision_metrics(method, labels, space)}
    record["supervision"] = supervision_summary(method, sup, space, texts, labels)
    if config.coverage:
        record["coverage"] = coverage_summary(method, texts)
    if sup.num_samples is not None:
        record["sampling"] = sampling_summary(sup.num_samples, sup.teachers[0]["mc_samples"])
    return record


def supervision_metrics(method: "Method", labels: list[str] | None, space: "LabelSpace") -> dict[str, Any]:
    """How good the supervision was, where the texts happen to have labels, and how many of those that count have a class for one: what
    it rests on."""
    names = set(space.names)
    known = 0 if labels is None else sum(label in names for label, counts in zip(labels, method.included, strict=True) if counts > 0)
    if not known:
        return {}
    figures = {
        "selection_accuracy": selection_accuracy(method, labels, space),
        "target_accuracy": target_accuracy(method, labels, space),
    }
    found = {name: value for name, value in figures.items() if value is not None}
    return found | {"num_labelled_texts": known} if found else {}


def supervision_summary(
    method: "Method", sup: "Supervision", space: "LabelSpace", texts: "TextSet", labels: list[str] | None = None
) -> dict[str, Any]:
    """Which teacher was trusted how often and by how much, with the clearest and the least clear texts.

    Methods without a teacher margin get that of muka-hard with predictive entropy, those without a selection both. labels: of the
    texts, by the names of the label space, "" where it has none.
    """
    selected, margin, source, sup = method.selected, method.margin, method.config.method, sup.restrict(space)
    by_margin = source
    if margin is None:
        by_entropy, margin = select_teacher_ref(-uncertainties(sup, "predictive_entropy"))
        by_margin = "predictive entropy"
        if selected is None:
            selected, source = by_entropy, by_margin
    counts = torch.bincount(selected, minlength=len(space.teacher_names)).tolist()
    histogram = torch.histc(margin.float(), MARGIN_BINS, 0.0, 1.0).int().tolist()
    order = margin.argsort(stable=True)
    show = lambda rows: [example(int(row), selected, margin, sup, space, texts, labels) for row in rows]
    return {
        "source": source,
        "margin_source": by_margin,
        "shares": {name: count / len(selected) for name, count in zip(space.teacher_names, counts, strict=True)},
        "margin_histogram": histogram,
        "margin_mean": float(margin.double().mean()),
        "lowest_margin": show(order[:EXAMPLES]),
        "highest_margin": show(order.flip(0)[: min(EXAMPLES, len(order) - EXAMPLES)] if len(order) > EXAMPLES else order[:0]),
    }


def coverage_summary(method: "Method", texts: "TextSet") -> dict[str, Any]:
    """How many texts belong to no teacher, and some of them: what the teachers together do not cover."""
    rows = torch.nonzero(method.included == 0).flatten().tolist()
    shown = rows[:: max(1, len(rows) // EXAMPLES)][:EXAMPLES]
    return {
        "texts": len(rows),
        "share": len(rows) / len(texts),
        "examples": [{"example_id": int(texts.example_ids[row]), "text": shorten(texts.texts[row])} for row in shown],
    }


def shorten(text: str) -> str:
    """The text, cut where it is long."""
    return text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + " …"


def example(
    row: int, selected: Tensor, margin: Tensor, sup: "Supervision", space: "LabelSpace", texts: "TextSet", labels: list[str] | None
) -> dict[str, Any]:
    """One text with its most trusted teacher and what that teacher says; sup: restricted to the label space."""
    teacher = int(selected[row])
    start, stop = space.offsets[teacher], space.offsets[teacher + 1]
    says: dict[str, float] = {}
    for name, prob in zip(space.teacher_labels[teacher], torch.softmax(sup.logits[row, start:stop], -1).tolist(), strict=True):
        says[name] = says.get(name, 0.0) + prob  # two columns may be one class
    best = max(says, key=says.__getitem__)
    return {
        "example_id": int(texts.example_ids[row]),
        "text": shorten(texts.texts[row]),
        "teacher": space.teacher_names[teacher],
        "margin": float(margin[row]),
        "says": best,
        "probability": says[best],
        "label": (labels[row] or None) if labels else None,
    }


def truncate_metrics(path: Path, completed_steps: int) -> None:
    """Drop the lines after the checkpoint that a resumed run continues from, and a line that a kill cut off."""
    if path.exists():
        kept = [record for record in read_metrics(path) if record.get("step", 0) <= completed_steps]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def read_metrics(path: Path) -> Sequence[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a kill cut off is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict)]
