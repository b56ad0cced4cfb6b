"""muka-fast predict and muka_fast.Predictor: label, probability and, of a student with an uncertainty head, doubt of every text."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from muka_fast import adapters, checkpoint
from muka_fast.config import FinishedModelOptions, load_config
from muka_fast.console import progress
from muka_fast.data import NO_TOKEN, TextSet, read_texts, tokenize_quietly
from muka_fast.doubt import UncertaintyHead, with_head
from muka_fast.errors import UserError
from muka_fast.evaluate import join_columns, kept_length, load_model, predict
from muka_fast.files import write_beside_others
from muka_fast.memory import device_of
from muka_fast.readers import encodable, find_files

if TYPE_CHECKING:
    from muka_fast.config import PredictConfig

log = logging.getLogger("muka_fast")
CHUNK = 8192  # texts that are cut into batches together, and whose answers are written together


class Prediction(NamedTuple):
    """label: the class of the largest logit, of this probability. doubt: from 0, like the least doubtful texts that the student
    was trained on, to 1, like the most doubtful; None where it has no uncertainty head."""

    label: str
    probability: float
    doubt: float | None


class Predictor:
    """A classifier folder, with the uncertainty head beside it where there is one. Threads that share one take turns.

    Example:
        muka_fast.Predictor("runs/merged").predict(["Why was my card declined?"])

    Raises UserError for every fault that a teacher would be refused for, and for an uncertainty head that does not fit the model.
    """

    def __init__(
        self, model: str | Path, device: str = "auto", max_length: int | None = None, token_budget: int | None = None
    ) -> None:
        """model: folder or hub name; device: auto, cpu, cuda or cuda:N; max_length: tokens kept of each text (None: as the model was
        trained, see `kept_length`); token_budget: padded tokens per forward (None: by the device). Raises UserError for others."""
        if not isinstance(model, (str, os.PathLike)):
            raise UserError(f"model: a folder or hub name is expected, found {type(model).__name__}")
        # The options' own checks.
        options = load_config(
            FinishedModelOptions, None, {"device": str(device), "max_length": max_length, "token_budget": token_budget}
        )
        folder = checkpoint.resolve_folder(model, "--model")
        self.model, self.tokenizer, self.labels = load_model(model, device_of(options.device))
        self.head = None if adapters.is_adapter(folder) else UncertaintyHead.load(folder, self.model)
        self.max_length = kept_length(options.max_length, folder, self.model, self.tokenizer)
        self.token_budget = options.token_budget
        self._told = False  # that texts are cut
        self._turn = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _turn=threading.Lock())

    def predict(self, texts: str | Iterable[str]) -> list[Prediction]:
        """One prediction per text, in their order, by one forward each.

        A single text is a list of one. Raises UserError for what is no text, and for tables, whose column it cannot know.
        """
        if not isinstance(texts, Iterable) or isinstance(texts, Mapping) or hasattr(texts, "columns"):
            raise UserError(f"predict takes a list of texts, found {type(texts).__name__}")
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"predict takes a list of texts, found {text!r}")
        return list(self._stream([encodable(text) for text in texts], np.arange(len(texts))))

    def _stream(
        self, texts: Sequence[str], example_ids: np.ndarray, done: Callable[[int], None] = lambda count: None
    ) -> Iterator[Prediction]:
        """One prediction per text, in their order, CHUNK texts at a time. example_ids, done: as of `evaluate.predict`."""
        for start in range(0, len(texts), CHUNK):
            chunk = slice(start, start + CHUNK)
            yield from self._predict(texts[chunk], example_ids=example_ids[chunk], done=done)

    def _predict(self, texts: Sequence[str], **options: Any) -> list[Prediction]:
        """Of one text at least. options: those of `evaluate.predict`."""
        with self._turn:  # what is changed in tokenizer and model for a forward is changed for all threads
            tokens, num_empty = tokenize_quietly(self.tokenizer, texts, self.max_length)
            if num_empty:
                log.warning(NO_TOKEN, num_empty)
            if not self._told and (tokens.lengths >= self.max_length).any():
                log.info("texts of more than %d tokens are cut to these (--max_length)", self.max_length)
                self._told = True
            forward = None if self.head is None else with_head(self.model, self.head)
            found = predict(self.model, tokens, token_budget=self.token_budget, forward=forward, **options)
        best = torch.softmax(join_columns(found[:, : len(self.labels)].double(), self.labels), dim=-1).max(-1)
        doubts = [None] * len(texts) if self.head is None else found[:, len(self.labels)].tolist()
        rows, names = zip(best.indices.tolist(), best.values.tolist(), doubts, strict=True), list(dict.fromkeys(self.labels))
        return [Prediction(names[c], probability, value) for c, probability, value in rows]


# ---- the command ----

LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}  # what other readers than JSON's take for them


def lines(texts: TextSet, predictions: Iterable[Prediction]) -> Iterator[str]:
    """One JSON object per text that is not blank, with its row in the source, from 0, blank lines counted; without an uncertainty
    head it has no doubt."""
    for number, text, prediction in zip(texts.example_ids.tolist(), texts.texts, predictions, strict=True):
        row: dict[str, Any] = {"row": number, "text": text} | prediction._asdict()
        if prediction.doubt is None:
            del row["doubt"]
        yield json.dumps(row, ensure_ascii=False).translate(LINE_ENDS) + "\n"


def shown(predictor: Predictor, texts: TextSet) -> Iterator[Prediction]:
    """Their predictions, with progress."""
    with progress(len(texts), "predicting") as bar:
        yield from predictor._stream(texts.texts, texts.example_ids, bar.advance)


def check_unread(config: PredictConfig, output: Path) -> None:
    """Refuse to replace what is read: one of the files of texts, or a part of the model."""
    model = Path(config.model).resolve()
    if output.resolve().is_relative_to(model) or any(output.samefile(name) for name in find_files(config.texts)):
        raise UserError(f"--output {output}: --overwrite would replace what this command reads; name another file")


def main(config: PredictConfig) -> int:
    """`muka-fast predict`: JSON lines on stdout, or in a new file."""
    output = None if config.output is None else Path(config.output)
    if output is not None and output.suffix.lower() == ".gz":
        way_out = "leave out .gz, or leave out --output and end the command with"
        raise UserError(f"--output {output}: answers are written as plain text; {way_out}: | gzip > {output}")
    if output is not None and output.suffix.lower() in (".csv", ".tsv", ".parquet"):
        raise UserError(f"--output {output}: answers are written as JSON lines, not as {output.suffix}: name it .jsonl")
    if output is not None and output.exists():
        if not (config.overwrite and output.is_file()):
            raise UserError(f"--output {output}: is already there; name another file{', or --overwrite it' * output.is_file()}")
        check_unread(config, output)
    elif output is not None and not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; make it, or name another file")
    texts = read_texts(config.texts, text_column=config.text_column, label_column=None, limit=config.limit, split="test")
    predictor = Predictor(config.model, config.device, config.max_length, config.token_budget)
    if predictor.head is None:
        log.warning("%s has no uncertainty head: its answers come without doubt (train with --uncertainty_head)", config.model)
    answers = lines(texts, shown(predictor, texts))
    if output is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # JSON, whatever the terminal's
        sys.stdout.writelines(list(answers) if sys.stdout.isatty() else answers)  # a terminal shows progress in between
        return 0
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the unfinished file goes with the process
    try:
        write_beside_others(output, answers, config.overwrite)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or error}; name another file") from error
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
