"""Evaluation: predictions of a classifier over labelled texts, and the figures that describe them.

n texts · C classes of the model.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from muka_fast import adapters, checkpoint, memory
from muka_fast.console import fill, new_table, progress, stdout_console
from muka_fast.data import Tokens, collate, cut_length, read_texts, tell_cut, token_budget_batches, tokenize
from muka_fast.doubt import UncertaintyHead, auroc, false_positive_rate, with_head
from muka_fast.errors import UserError
from muka_fast.first_token import first_token_only
from muka_fast.labels import plain_form, read_label_map, rename_labels, tell_of_unknown
from muka_fast.memory import device_of
from muka_fast.probe import check_padding
from muka_fast.teachers import open_classifier
from muka_fast.tokenizer import token_limit

if TYPE_CHECKING:
    import transformers

    from muka_fast.config import EvalConfig

log = logging.getLogger("muka_fast")
ECE_BINS = 15


# ---- predictions ----


def load_model(
    source: str | Path, device: str = "cpu", role: str = "--model"
) -> tuple["transformers.PreTrainedModel", "transformers.PreTrainedTokenizerBase", list[str]]:
    """A classifier folder (or hub name, or LoRA adapter): model in eval mode, tokenizer, label names in logit order.

    role: what messages call it.

    Raises UserError for every fault that a teacher would be refused for.
    """
    what = f"{role} {source}"
    model, tokenizer, labels = open_classifier(checkpoint.resolve_folder(source, role), what, device)
    check_padding(model, what)
    return model, tokenizer, labels


def predict(
    model: nn.Module,
    tokens: Tokens,
    *,
    token_budget: int | None = None,
    forward: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    example_ids: np.ndarray | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Logits of every text, fp32 [n, C] on the CPU, in the order of the texts; batches are cut by length.

    model: a Hugging Face classifier; its mode (train, eval) is the same afterwards. token_budget: padded tokens
    per forward, None: by the device. forward: what is kept of a batch instead of its logits, [B, anything]. example_ids: what
    errors call the texts (default: their numbers, from 0). done: is told the number of texts of every batch.
    Raises UserError for the first text whose logits are NaN or infinite (-inf, of a class that cannot be, is none of these).
    """
    pad_id = model.config.get_text_config().pad_token_id or 0
    device = next(model.parameters()).device
    was_training = model.training
    batches = token_budget_batches(tokens.lengths, memory.token_budget(token_budget, model, device))
    logits: Tensor | None = None

    def launch(rows: np.ndarray) -> tuple[np.ndarray, memory.Fetch]:
        inputs = {name: memory.send(value, device) for name, value in collate(tokens, rows, pad_id).items()}
        return rows, memory.Fetch((model(**inputs).logits if forward is None else forward(inputs)).float())

    model.eval()
    try:
        with torch.inference_mode(), first_token_only(model):
            for (rows, found), _ in pairwise(chain(map(launch, batches), [None])):  # waited for when the device has the next batch
                if logits is None:
                    with torch.inference_mode(False):  # an ordinary tensor
                        logits = torch.empty(len(tokens), found.values.shape[1], dtype=torch.float32)
                logits[torch.from_numpy(rows)] = found.tensor()
                done(len(rows))
    finally:
        model.train(was_training)
    if logits is None:
        raise ValueError("no texts to predict")
    bad = (logits.isnan() | logits.isposinf()).any(-1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise UserError(
            f"the model gives NaN or infinite logits for {int(bad.sum())} of {len(logits)} texts, first for text "
            f"{first if example_ids is None else example_ids[first]}; "
            "check the checkpoint"
        )
    return logits


def join_columns(logits: Tensor, names: Sequence[str]) -> Tensor:
    """Logits of the distinct names, in first-seen order: columns of one name are one class, by the sum of their probabilities."""
    columns: dict[str, list[int]] = {}
    for column, name in enumerate(names):
        columns.setdefault(name, []).append(column)
    if len(columns) == len(names):
        return logits
    return torch.stack([logits[:, same].logsumexp(-1) for same in columns.values()], -1)


# ---- figures ----


def metrics(
    logits: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    names: Sequence[str],
    teachers: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Figures of n predictions: logits [n, C], labels int [n] in [0, C), names of the C classes.

    accuracy, macro_f1 (mean over the classes that occur in `labels`), nll (nats), ece, calibration (its bins), num_texts;
    per_class: name -> precision, recall, f1, support; per_teacher_block (where `teachers` with name and labels are given): name ->
    num_classes, support, accuracy, in_block (share predicted as any class of the teacher), within_block (accuracy when
    only the teacher's classes may be predicted), over the texts whose label the teacher owns; None without such texts.
    """
    # Slow to import (scipy), and not needed for predictions.
    from scipy.special import log_softmax
    from sklearn.metrics import precision_recall_fscore_support

    logits = np.asarray(logits, dtype=np.float64)
    labels = np.asarray(labels, dtype=np.int64)
    if len(logits) != len(labels) or not len(labels):
        raise ValueError(f"{len(logits)} predictions for {len(labels)} labels")
    if logits.shape[1] != len(names) or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"labels or logits [{logits.shape[1]}] do not fit {len(names)} class names")
    log_probs = log_softmax(logits, axis=-1)
    predicted = logits.argmax(-1)
    right, confidence = predicted == labels, np.exp(log_probs.max(-1))
    per_class = precision_recall_fscore_support(labels, predicted, labels=np.arange(len(names)), zero_division=0)
    columns = ("precision", "recall", "f1", "support")
    result = {
        "num_texts": len(labels),
        "accuracy": float(right.mean()),
        "macro_f1": float(per_class[2][np.unique(labels)].mean()),
        "nll": float(-log_probs[np.arange(len(labels)), labels].mean()),
        "ece": expected_calibration_error(confidence, right),
        "calibration": calibration_bins(confidence, right),
        "per_class": {
            name: {
                column: int(values[c]) if column == "support" else float(values[c])
                for column, values in zip(columns, per_class, strict=True)
            }
            for c, name in enumerate(names)
        },
    }
    if teachers:
        result["per_teacher_block"] = {
            teacher["name"]: _block(logits, labels, predicted, names, teacher["labels"]) for teacher in teachers
        }
    return result


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean gap between confidence and accuracy over ECE_BINS equal-width bins, weighted by their texts (Guo et al., 2017).

    confidence [n] in [0, 1]: probability of the predicted class; correct bool [n]. Bin j holds (j / ECE_BINS,
    (j + 1) / ECE_BINS], the first one also 0.
    """
    gaps = (part["count"] * abs(part["confidence"] - part["accuracy"]) for part in calibration_bins(confidence, correct))
    return sum(gaps) / len(confidence)


def calibration_bins(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, float]]:
    """The bins of `expected_calibration_error` that hold texts: count, mean confidence, accuracy; lowest first."""
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    parts = [bins == index for index in np.unique(bins)]
    return [
        {"count": int(part.sum()), "confidence": float(confidence[part].mean()), "accuracy": float(correct[part].mean())}
        for part in parts
    ]


def _block(
    logits: np.ndarray, labels: np.ndarray, predicted: np.ndarray, names: Sequence[str], owned: Sequence[str]
) -> dict[str, Any]:
    """Figures over the texts whose label a teacher owns."""
    mine = set(owned)
    classes = np.array([c for c, name in enumerate(names) if name in mine], dtype=np.int64)
    rows = np.isin(labels, classes)
    figures = {"num_classes": len(classes), "support": int(rows.sum()), "accuracy": None, "in_block": None}
    if not rows.any():
        return figures | {"within_block": None}
    restricted = classes[logits[rows][:, classes].argmax(-1)]
    return figures | {
        "accuracy": float((predicted[rows] == labels[rows]).mean()),
        "in_block": float(np.isin(predicted[rows], classes).mean()),
        "within_block": float((restricted == labels[rows]).mean()),
    }


def teacher_blocks(folder: Path) -> list[dict[str, Any]]:
    """The teachers behind a student, from its run.json: name, labels (classes of the student), own_labels (before the label map).

    Empty for a model that is no student of ours, or whose run.json says nothing about them.
    """
    teachers = _record(folder / "run.json", "of the teachers' labels").get("teachers")
    found = [t for t in teachers if isinstance(t, dict)] if isinstance(teachers, list) else []
    return [
        {"name": str(t["name"]), "labels": t["labels"], "own_labels": t.get("own_labels", [])}
        for t in found
        if "name" in t and "labels" in t
    ]


def kept_length(
    given: int | None, folder: Path, model: "transformers.PreTrainedModel", tokenizer: "transformers.PreTrainedTokenizerBase"
) -> int:
    """Tokens kept of each text: as given, else as `muka-fast train` or `teach` did by the record in the model's folder, 128 without
    one; never more than the model takes."""
    limit = token_limit(model, tokenizer)
    if given is not None:
        return cut_length(given, limit, f"model {folder}")
    for name, section in (("run.json", "config"), ("teach.json", "options")):
        options = _record(folder / name, "of --max_length").get(section)
        length = options.get("max_length") if isinstance(options, dict) else None
        if isinstance(length, int) and length > 0:
            return min(length, limit)
    return min(128, limit)


def _record(path: Path, part: str) -> dict[str, Any]:
    """What a run wrote about itself; {} where there is no such file, or it is damaged, which is told. part: what is looked up."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read (%s): what it says %s is not heeded", path, error, part)
        return {}
    return content if isinstance(content, dict) else {}


# ---- the command ----


def evaluate(config: "EvalConfig") -> dict[str, Any]:
    """Figures of `config.model` on `config.data`; texts with a label unknown to the model are left out and counted.

    Adds model, data, num_unknown and unknown_labels (label -> texts) to the figures of `metrics`, and `doubt_figures` as doubt where
    the model has an uncertainty head.
    Raises UserError where no label of the data is a class of the model.
    """
    folder = checkpoint.resolve_folder(config.model, "--model")
    texts = read_texts(
        config.data,
        text_column=config.text_column,
        label_column=config.label_column,
        need_labels=True,
        limit=config.limit,
        split="test",
    )
    label_map = read_label_map(config.label_map) if config.label_map else None
    model, tokenizer, columns = load_model(config.model, device_of(config.device))
    names = list(dict.fromkeys(columns))
    teachers = teacher_blocks(folder)
    owners = [{"name": teacher["name"], "labels": teacher["own_labels"]} for teacher in teachers]
    tell_of_unknown(label_map or {}, texts.labels, owners)
    renamed = rename_labels(texts.labels, label_map, owners)
    index = {name: c for c, name in enumerate(names)}
    known = np.array([label in index for label in renamed])
    unknown = unknown_labels(config, texts.labels, renamed, names)
    head = None if adapters.is_adapter(folder) else UncertaintyHead.load(folder, model)
    kept = np.array([label is not None for label in renamed])  # by the label map
    rows = np.flatnonzero(known if head is None else kept)  # doubt is measured on unknown labels as well
    max_length = kept_length(config.max_length, folder, model, tokenizer)
    tokens = tokenize(tokenizer, [texts.texts[row] for row in rows], max_length)
    tell_cut(tokens.lengths, max_length)
    forward = None if head is None else with_head(model, head)
    options = {"token_budget": config.token_budget, "forward": forward, "example_ids": texts.example_ids[rows]}
    with progress(len(rows), "predicting") as bar:
        found = predict(model, tokens, **options, done=bar.advance)
    outputs, mine = join_columns(found[:, : len(columns)], columns), known[rows]
    logits, labels = outputs[mine], [index[renamed[row]] for row in rows[mine]]
    figures = metrics(logits, labels, names, teachers)
    if head is not None:
        doubt, wrong = found[:, len(columns)].numpy(), np.ones(len(rows), bool)
        wrong[mine] = logits.argmax(-1).numpy() != labels
        figures["doubt"] = doubt_figures(doubt, -torch.softmax(outputs, -1).amax(-1).numpy(), wrong, ~mine)
    told = {"model": str(config.model), "data": str(config.data), "num_unknown": sum(unknown.values())}
    return told | {"unknown_labels": unknown} | figures


def unknown_labels(config: "EvalConfig", labels: list[str], renamed: list[str | None], names: list[str]) -> dict[str, int]:
    """The number of texts with each label that the model does not know, told in the log as those are which the label map drops.

    labels, renamed: of each text, in the data and by the label map (None: dropped); names: the model's classes. Raises UserError where
    no text is left.
    """
    known, unknown, now = {None, *names}, dict[str, int](), dict(zip(labels, renamed, strict=True))
    for label, name in zip(labels, renamed, strict=True):
        if name not in known:
            unknown[label] = unknown.get(label, 0) + 1
    dropped = renamed.count(None)
    alike = {plain_form(name): name for name in names}

    def shown(label: str) -> str:
        if now[label] not in (label, None):
            return f"{label}, which --label_map renames '{now[label]}'"
        return f"{label}, where the model has '{alike[plain_form(label)]}'" if plain_form(label) in alike else label

    if dropped + sum(unknown.values()) == len(labels):
        some = list(unknown or dict.fromkeys(labels))[:3]
        raise UserError(
            f"{config.data}: none of its labels ({', '.join(map(shown, some))}, ...) is a class of {config.model} "
            f"({', '.join(names[:3])}, ...); rename them with --label_map or choose --label_column"
        )
    if dropped:
        log.info("%s: %d of %d texts have labels that --label_map drops; they are left out", config.data, dropped, len(labels))
    if unknown:
        told = config.data, sum(unknown.values()), len(labels), ", ".join(map(shown, list(unknown)[:5]))
        log.warning("%s: %d of %d texts have labels that the model does not know (%s); they are left out (--label_map renames)", *told)
    return unknown


def doubt_figures(doubt: np.ndarray, softmax: np.ndarray, wrong: np.ndarray, unknown: np.ndarray) -> dict[str, dict[str, Any]]:
    """How well the uncertainty head tells wrong answers, and texts with unknown labels, and how well the softmax does so alone.

    doubt, softmax (largest probability, negative) [n], high = doubtful; wrong, unknown bool [n]: the answer is not the label, the
    label is no class of the model. AUROC of wrong among the known, AUROC and FPR at 95 % of unknown against known; None where
    there is one kind only.
    """
    known = ~unknown
    return {
        name: {
            "wrong_auroc": auroc(values[known], wrong[known]),
            "unknown_auroc": auroc(values, unknown),
            "unknown_fpr95": false_positive_rate(values, unknown),
        }
        for name, values in (("uncertainty head", doubt), ("softmax", softmax))
    }


def print_tables(figures: dict[str, Any]) -> None:
    """The figures as text tables on stdout."""
    console = stdout_console()

    def show(title: str, columns: Sequence[str], lines: Sequence[tuple[str, dict[str, Any]]]) -> None:
        table = new_table(title)
        table.add_column(title.split()[-1], overflow="fold")
        for column in columns:
            table.add_column(column.replace("_", " "), justify="right")
        console.print(fill(table, [(name, *(_cell(values[column]) for column in columns)) for name, values in lines]))

    overall = ("num_texts", "num_unknown", "accuracy", "macro_f1", "nll", "ece")
    show("All texts, per model", overall, [(figures["model"], figures)])
    blocks = figures.get("per_teacher_block")
    if blocks:
        show("Per teacher", ("num_classes", "support", "accuracy", "in_block", "within_block"), list(blocks.items()))
    if "doubt" in figures:
        show("Doubt, per measure", ("wrong_auroc", "unknown_auroc", "unknown_fpr95"), list(figures["doubt"].items()))
    classes = list(figures["per_class"].items())
    met = [(name, values) for name, values in classes if values["support"]]  # the others say nothing
    show("Per class", ("support", "precision", "recall", "f1"), met)
    if len(met) < len(classes):
        console.print(f"{len(classes) - len(met)} of {len(classes)} classes are not in these texts")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def main(config: "EvalConfig") -> int:
    """`muka-fast eval`: print the figures, as tables or (--json) as one JSON object on stdout."""
    figures = evaluate(config)
    if config.json_output:
        print(json.dumps(figures, ensure_ascii=False, indent=1))
    else:
        print_tables(figures)
    return 0
