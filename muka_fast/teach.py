"""Fine-tunes a teacher: one encoder, the rows that carry some labels, an ordinary Hugging Face classifier folder as the result."""

import json
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from muka_fast import __version__
from muka_fast.config import TeachConfig, nearest
from muka_fast.console import progress
from muka_fast.data import TextSet, Tokens, collate, cut_length, epoch_batches, read_texts, tell_cut, tokenize
from muka_fast.engine import quiet_deepspeed
from muka_fast.errors import UserError
from muka_fast.evaluate import metrics, predict
from muka_fast.export import clean_tokenizer, set_labels
from muka_fast.files import is_write_error, open_weights, sync_folder
from muka_fast.labels import warn_of_lookalikes
from muka_fast.memory import check_kernels, device_of
from muka_fast.optim import linear_schedule, parameter_groups
from muka_fast.outputs import MODEL_FILES, check_own, check_replaceable
from muka_fast.recipe import default_epochs, default_learning_rate
from muka_fast.student import load_student
from muka_fast.tokenizer import token_limit
from muka_fast.training_layers import training_layers
from muka_fast.vocabulary import TextVocabulary

if TYPE_CHECKING:
    import transformers

log = logging.getLogger("muka_fast")
RECORD = "teach.json"  # how a teacher was made, beside its weights
WRITTEN = re.compile(rf"{RECORD}|{MODEL_FILES}")  # what a teacher's folder holds: all that --overwrite removes


@dataclass(frozen=True)
class Recipe:
    """How a classifier is fitted: AdamW, linear warm-up over `warmup_ratio` of the steps, then linear decay to 0."""

    epochs: int
    learning_rate: float
    batch_size: int = 16
    max_length: int = 128
    seed: int = 0
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


# ---- the rows and labels of a teacher ----


def rows_with_labels(texts: TextSet, labels: Sequence[str] | None, limit: int | None = None) -> tuple[TextSet, list[str]]:
    """The rows whose label is one of `labels` (None: all that occur, sorted), or the first `limit` of them, example ids kept, and the
    label names.

    Raises:
        UserError: a label that no row has (names the nearest), or none of the first; a label named twice, fewer than two labels.
    """
    found = sorted(set(texts.labels))
    labels = found if labels is None else list(labels)
    missing = [label for label in labels if label not in found]
    if missing:
        names = ", ".join(f"'{label}'{nearest(label, found)}" for label in missing[:5])
        raise UserError(f"--labels: no row of {texts.source} has {names}{' and more' if len(missing) > 5 else ''}")
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"--labels: '{twice}' is named twice")
    if len(labels) < 2:
        raise UserError(f"--labels: a teacher needs two labels or more, {texts.source} gives {labels}")
    warn_of_lookalikes(labels, f"correct {texts.source}")
    kept = _keep(texts, set(labels), limit)
    there = set(kept.labels)
    if without := [label for label in labels if label not in there]:
        raise UserError(f"--limit {limit}: the first rows of {texts.source} with these labels have no '{without[0]}'; take more")
    return kept, labels


def _keep(texts: TextSet, labels: set[str], limit: int | None = None) -> TextSet:
    rows = [row for row, label in enumerate(texts.labels) if label in labels][:limit]
    pick = lambda values: [values[row] for row in rows]
    return replace(texts, texts=pick(texts.texts), labels=pick(texts.labels), example_ids=texts.example_ids[rows])


def freeze(model: "transformers.PreTrainedModel", num_layers: int) -> None:
    """Freeze the embeddings, the first `num_layers` layers and whatever all layers share, so that teachers of one encoder keep
    one trunk. What follows the layers (last norm, pooler, head) stays trainable; 0 freezes nothing.

    Raises:
        UserError: the model has fewer layers, or shares one layer's weights among all (ALBERT).
    """
    if num_layers == 0:
        return
    base = model.base_model
    depth = model.config.get_text_config().num_hidden_layers
    stacks = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    stack = next(((name, module) for name, module in stacks if len(module) == depth), None)
    if stack is None:
        raise UserError(
            f"--freeze_layers {num_layers}: {model.config.model_type} has no list of layers of its own weights"
        )
    name, layers = stack
    if num_layers > depth:
        raise UserError(f"--freeze_layers {num_layers}: the encoder has {depth} layers")
    children = [child for child, _ in base.named_children()]
    above = children[children.index(name.split(".")[0]) + 1 :]
    free = {id(p) for layer in layers[num_layers:] for p in layer.parameters()}
    free |= {id(p) for child in above for p in getattr(base, child).parameters()}
    for parameter in base.parameters():
        parameter.requires_grad_(id(parameter) in free)


# ---- training ----


def fine_tune(
    model: "transformers.PreTrainedModel",
    tokenizer: "transformers.PreTrainedTokenizerBase",
    texts: Sequence[str],
    label_ids: Sequence[int],
    recipe: Recipe,
    description: str = "fine-tuning",
) -> float:
    """Fit a classifier in place on n texts with label_ids int [n] in [0, C); returns the mean loss of the last epoch.

    The model ends in eval mode. The result depends on the arguments only (on one machine and thread count): dropout follows from
    recipe.seed, and the caller's random state is left as it was.

    Raises:
        UserError: the loss is not a number.
    """
    max_length = cut_length(recipe.max_length, token_limit(model, tokenizer), "the encoder")
    tokens = tokenize(tokenizer, texts, max_length)
    tell_cut(tokens.lengths, max_length)
    labels = torch.as_tensor(label_ids, dtype=torch.int64)
    steps_per_epoch = math.ceil(len(tokens) / recipe.batch_size)
    total = recipe.epochs * steps_per_epoch
    device = next(model.parameters()).device
    vocabulary = TextVocabulary(model, tokens)
    fused = device.type == "cpu" or None  # there torch's own choice is a loop over tensors, many times as slow
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate, fused=fused)
    warmup = int(recipe.warmup_ratio * total)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: linear_schedule(step, total, warmup))  # after the last: 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), ExitStack() as ends:
        ends.callback(vocabulary.restore, model)
        torch.manual_seed(recipe.seed)
        layers = training_layers(model, recipe.seed, device, recipe.batch_size)
        with progress(total, description, "steps") as bar, layers as next_texts:
            for epoch in range(recipe.epochs):
                losses = []
                for rows in epoch_batches(tokens.lengths, recipe.batch_size, recipe.seed, epoch):
                    next_texts(torch.from_numpy(rows), epoch)
                    loss = _step_loss(model, tokens, labels, rows, device)
                    value = loss.item()
                    if not math.isfinite(value):
                        what = f"{description}: the loss is {value} in epoch {epoch + 1}"
                        raise UserError(f"{what}; lower --learning_rate or check the encoder")
                    loss.backward()
                    nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                    losses.append(value * len(rows))
                    bar.advance(note=f"loss {value:.3f}")
    model.eval()
    return sum(losses) / len(tokens)


def _step_loss(
    model: nn.Module, tokens: Tokens, labels: torch.Tensor, rows: np.ndarray, device: torch.device
) -> torch.Tensor:
    inputs = {
        name: value.to(device)
        for name, value in collate(tokens, rows, model.config.get_text_config().pad_token_id).items()
    }
    return nn.functional.cross_entropy(model(**inputs).logits.float(), labels[torch.from_numpy(rows)].to(device))


# ---- the folder ----


def check_output(output: str | Path, overwrite: bool, inputs: Sequence[str | Path | None] = ()) -> Path:
    """Refuse a folder that cannot be written, or that holds something else than a teacher to replace. Nothing is changed.

    inputs: files and folders that are read, which must not lie in a folder that is replaced.

    Raises:
        UserError: see above; or `output` is a file.
    """
    path = Path(output).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {output}: this is a file; name a folder")
    empty = is_empty(path)
    if path.is_dir() and not empty:
        if not (path / RECORD).is_file():
            what = "a model that this command did not write" if (path / "config.json").is_file() else "files that are no model"
            raise UserError(f"--output {output}: holds {what}; name a new or empty folder")
        if not overwrite:
            raise UserError(f"--output {output}: already holds a model; name a new folder, or replace it with --overwrite")
        check_own(path, WRITTEN, output, "muka-fast teach did not write")
        check_replaceable(path.resolve(), output, inputs)
    above = [path, *path.absolute().parents] if empty else path.absolute().parents  # a new folder is made beside the old one
    there = next(folder for folder in above if folder.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"--output {output}: {there} cannot be written; name another folder")
    return path


def is_empty(folder: Path) -> bool:
    """Whether it is a folder that holds nothing but what a killed `save_classifier`, or one at work, has made."""
    return folder.is_dir() and all(entry.match(".*.partial") for entry in folder.iterdir())


def save_classifier(
    model: "transformers.PreTrainedModel",
    tokenizer: "transformers.PreTrainedTokenizerBase",
    labels: Sequence[str],
    output: Path,
    record: dict[str, Any],
    check: Callable[[], object] = lambda: None,
) -> None:
    """Write safetensors weights, configuration with label names, tokenizer and teach.json aside, then rename to `output`.

    An older teacher there is removed only after the new one is in its place; an empty folder, which may be a mount point or the
    current one, stays and is filled. check: asked right before whether it may be; where it raises UserError, or the renaming fails,
    the new folder is kept under another name.

    Raises:
        UserError: the disk is full or read-only, or see `check`.
    """
    output = output.resolve()  # a link stays one
    mark = uuid.uuid4().hex[:8]
    fill = is_empty(output)
    aside = (output if fill else output.parent) / f".{output.name}.{mark}.partial"
    set_labels(model, labels)
    tokenizer = clean_tokenizer(model, tokenizer)
    try:
        aside.mkdir(parents=True)
        model.save_pretrained(aside)
        open_weights(aside)
        tokenizer.save_pretrained(aside)
        (aside / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        sync_folder(aside)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, UserError) or not is_write_error(error):
            raise
        what = f"--output {output}: the teacher cannot be written ({error})"
        raise UserError(f"{what}; free some space or name another folder") from error
    try:
        check()
        if fill:
            for entry in sorted(aside.iterdir(), key=lambda entry: entry.name == RECORD):  # what says that all is there is last
                os.replace(entry, output / entry.name)
            aside.rmdir()
            return
        old = output.with_name(f".{output.name}.replaced-teacher")  # not the name under which a run is set aside
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(output, old)
        os.replace(aside, output)
        shutil.rmtree(old, ignore_errors=True)
    except (UserError, OSError) as error:
        kept = aside.with_name(f"{output.name}-{mark}")
        os.replace(aside, kept)
        raise UserError(f"{error}. The teacher that was trained meanwhile is {kept}") from error


# ---- the command ----


def rows_to_measure(texts: TextSet, labels: Sequence[str]) -> TextSet:
    """The rows that carry one of the teacher's `labels`.

    Raises:
        UserError: there is no such row.
    """
    kept = _keep(texts, set(labels))
    if not len(kept):
        raise UserError(f"--eval {texts.source}: no row has any of the teacher's labels")
    return kept


def measure(
    model: "transformers.PreTrainedModel",
    tokenizer: "transformers.PreTrainedTokenizerBase",
    texts: TextSet,
    labels: Sequence[str],
    max_length: int,
) -> dict[str, Any]:
    """Figures (evaluate.metrics) over `texts`, all of which carry one of `labels`."""
    tokens = tokenize(tokenizer, texts.texts, min(max_length, token_limit(model, tokenizer)))
    index = {label: i for i, label in enumerate(labels)}
    return metrics(predict(model, tokens), [index[label] for label in texts.labels], labels)


def teach(config: TeachConfig) -> dict[str, Any]:
    """Fine-tune and save the teacher of a configuration; returns what teach.json holds.

    Raises:
        UserError: bad data, labels, encoder or output; the output is then as it was.
    """
    asked = config.output, config.overwrite, [config.train, config.eval, config.encoder]
    output = check_output(*asked)
    device = device_of(config.device)
    check_kernels(device)
    quiet_deepspeed(device, config.verbose)  # transformers imports it
    columns = {"text_column": config.text_column, "label_column": config.label_column, "need_labels": True}
    first = config.limit if config.labels is None else None  # with --labels those with these labels count
    train, labels = rows_with_labels(read_texts(config.train, limit=first, **columns), config.labels, config.limit)
    held_out = rows_to_measure(read_texts(config.eval, split="test", **columns), labels) if config.eval else None
    model, tokenizer = load_student(config.encoder, labels, config.seed, {"zero_optimization": {"stage": 0}}, "encoder")
    freeze(model, config.freeze_layers)
    model.to(device)
    recipe = Recipe(
        config.epochs or default_epochs(len(train), config.batch_size),
        config.learning_rate or default_learning_rate(model.config.get_text_config().hidden_size),
        **{name: getattr(config, name) for name in ("batch_size", "max_length", "seed")},
    )
    index = {label: i for i, label in enumerate(labels)}
    told = (len(labels), len(train), recipe.epochs, recipe.learning_rate)
    log.info("teacher of %d labels: %d texts; epochs: %d; peak learning rate: %g", *told)
    loss = fine_tune(model, tokenizer, train.texts, [index[label] for label in train.labels], recipe)
    record: dict[str, Any] = {
        "version": __version__,
        "options": config.resolved() | {"epochs": recipe.epochs, "learning_rate": recipe.learning_rate},
        "labels": labels,
        "texts": {"source": train.source, "fingerprint": train.fingerprint, "count": len(train)},
        "last_epoch_loss": loss,
    }
    if held_out is not None:
        figures = measure(model, tokenizer, held_out, labels, config.max_length)
        record["eval"] = {name: figures[name] for name in ("accuracy", "macro_f1", "nll", "ece", "num_texts")}
    # What has appeared there meanwhile, from another teach for example, is not ours to replace.
    save_classifier(model.cpu(), tokenizer, labels, output, record, check=lambda: check_output(*asked))
    return record


def main(config: TeachConfig) -> int:
    """`muka-fast teach`."""
    record = teach(config)
    if "eval" in record:
        figures = record["eval"]
        count = figures["num_texts"]
        print(
            f"accuracy {figures['accuracy']:.4f}  macro-F1 {figures['macro_f1']:.4f}  ({count} texts with these labels)"
        )
    log.info("teacher: %s", config.output)
    return 0
