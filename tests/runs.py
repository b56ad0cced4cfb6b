"""Runs on tiny random models that tests of training share: two teachers, a student and texts, and what a run leaves behind.

conftest.py takes the fixtures from here.
"""

import json
import os
import random
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from muka_fast import loop, train

LABELS = {"news": ("business", "sport", "science"), "home": ("science", "bank", "smart home")}
# Adam divides by the root of the second moment: where a gradient is zero but for rounding (the key biases of attention), it turns
# rounding into full steps. A large eps leaves rounding what it is, so that layouts can be compared closely.
SMOOTH_ADAM = {"optimizer": {"type": "AdamW", "params": {"eps": 1e-3}}}


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token per known word. Trained tokenizers break ties differently in every process, which golden losses do not forgive."""
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = {word: index for index, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **special)


@pytest.fixture(scope="session")
def world(tmp_path_factory, make_model, texts):
    """Two teachers that share a class, a student without head (dropout 0.1), 75 labelled texts with one blank row among them."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = word_tokenizer(texts)
    for seed, (name, labels) in enumerate(LABELS.items()):
        make_model("bert", labels, seed=seed, tokenizer=tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, dropout in (("student", 0.1), ("plain_student", 0.0)):
        model = make_model("distilbert", ("a", "b"), seed=9, tokenizer=tokenizer, dropout=dropout)
        model.base_model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    choose = random.Random(0)
    names = sorted({label for labels in LABELS.values() for label in labels})
    rows = [{"text": f"{choose.choice(texts)} {choose.choice(texts)}", "label": choose.choice(names)} for _ in range(75)]
    rows.insert(3, {"text": " ", "label": "bank"})
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def go(world, tmp_path):
    """go(name, **options) -> RunResult of a run in tmp_path/name; all runs share one store."""

    def run(name: str, ds: dict | None = None, **options) -> train.RunResult:
        return train.amalgamate(**arguments(world, tmp_path, name, ds, options))

    return run


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step): SIGTERM, or another signal, arrives while this step is under way."""

    def arm(step: int, number: signal.Signals = signal.SIGTERM) -> None:
        def train_step(engine, *rest, _original=loop.train_step):
            if engine.completed_steps == step:
                os.kill(os.getpid(), number)
            return _original(engine, *rest)

        monkeypatch.setattr(loop, "train_step", train_step)

    yield arm
    monkeypatch.undo()


@pytest.fixture
def python_hears_ctrl_c():
    """As in a terminal; a shell's job in the background ignores it from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def arguments(world: Path, tmp_path: Path, name: str, ds: dict | None, options: dict) -> dict:
    common = {"teachers": [str(world / teacher) for teacher in LABELS], "student": str(world / "student")}
    common |= {"texts": str(world / "texts.jsonl"), "store": str(world / "store"), "output": str(tmp_path / name)}
    common |= {"epochs": 3, "learning_rate": 1e-3, "log_every": 1, "mc_samples": 4}
    if ds is not None:
        (tmp_path / f"{name}.json").write_text(json.dumps(ds))
        common["ds_config"] = str(tmp_path / f"{name}.json")
    return common | options


def weights(result: train.RunResult) -> dict[str, torch.Tensor]:
    return load_file(result.output / "model.safetensors")


def losses(result: train.RunResult) -> list[float]:
    return [json.loads(line)["loss"] for line in (result.output / "metrics.jsonl").read_text().splitlines()]


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def uncertainty_head(result: train.RunResult) -> dict[str, torch.Tensor]:
    return load_file(result.output / "uncertainty_head.safetensors")
