"""Loads the student: any encoder or classifier as a classifier over the union of labels, with a fresh, seeded head."""

import hashlib
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from muka_fast import checkpoint
from muka_fast.engine import partitioned_loading, whole_parameters
from muka_fast.errors import UserError, first_line
from muka_fast.probe import check_padding
from muka_fast.seeds import seed_of
from muka_fast.teachers import settle_forward, some
from muka_fast.tokenizer import fit_tokenizer, forget_token_types, load_tokenizer

log = logging.getLogger("muka_fast")


def load_student(
    source: str | Path, labels: Sequence[str], seed: int, ds_config: dict[str, Any], role: str = "student"
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The student in fp32 and its tokenizer, padding on the right.

    source: folder (an encoder without head will do) or hub name; labels: the C class names; role: what errors call it.
    Weights that the folder lacks, and the output layer in any case, are drawn from N(0, initializer_range) by a generator that
    depends on `seed` and the tensor's name alone: the same whatever the architecture's own way, the ZeRO stage or the number of
    processes.

    Raises:
        UserError: no such folder, weights as pickle only, damaged or not a text model, an encoder whose weights are elsewhere.
    """
    what = f"{role} {source}"
    folder = checkpoint.resolve_folder(source, role)
    checkpoint.weight_files(folder, what)
    tokenizer = load_tokenizer(folder, what)
    names = dict(enumerate(labels))
    with checkpoint.loading(f"{what}: transformers cannot load it"), partitioned_loading(ds_config):
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, num_labels=len(labels)
        )
        checkpoint.tell_of_own_code(config.to_dict(), what)
        vars(config).pop("auto_map", None)  # so that what is saved says whose class it is
        config.id2label, config.label2id = names, {name: index for index, name in names.items()}
        config.problem_type = "single_label_classification" if len(labels) > 1 else None
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, **checkpoint.SAFE_LOADING
        )
    settle_forward(model)
    # ZeRO-3 loading records even legacy renamings (LayerNorm.gamma), and saving would apply them backwards.
    if ds_config["zero_optimization"]["stage"] == 3:
        vars(model).pop("_weight_conversions", None)
    fresh = draw_fresh(model, info, len(labels), seed)
    base = [name for name, _ in model.named_parameters() if name.startswith(model.base_model_prefix + ".")]
    random = sorted(set(base) & fresh)
    if len(random) > len(base) // 2:
        raise UserError(f"{what}: its files hold no weights for {some(random)}; give a pretrained encoder")
    if random:
        level = logging.INFO if all("pooler" in name for name in random) else logging.WARNING  # a pooler is made anew like the head
        log.log(level, "%s: starts with random weights for %s, which its files do not hold", what, some(random))
    forget_token_types(model, tokenizer)
    fit_tokenizer(model, tokenizer, what)
    check_padding(model, what)
    return model, tokenizer


def checkpoint_activations(model: transformers.PreTrainedModel, what: str) -> None:
    """Let the model recompute its layers in the backward, under the same dropout masks. Raises UserError where it cannot."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # the older name
    try:
        enable()
    except ValueError as error:
        raise UserError(f"{what}: {first_line(error)}; leave out --activation_checkpointing") from error


def encoder_fingerprint(source: str | Path, role: str = "student") -> str:
    """SHA-256 (hex) over configuration and weight files of an encoder's folder, read once per process as long as no file changes.

    role: what errors call it.
    """
    folder = checkpoint.resolve_folder(source, role)
    files = tuple(checkpoint.weight_files(folder, f"{role} {source}"))
    return _files_digest(folder / "config.json", files, checkpoint.file_state(folder))


@cache
def _files_digest(config: Path, weights: tuple[Path, ...], _state: tuple) -> str:
    digest = hashlib.sha256(config.read_bytes())
    for path in weights:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def draw_fresh(model: transformers.PreTrainedModel, info: dict, num_labels: int, seed: int) -> set[str]:
    """Draw the parameters that were not loaded and the output layer; returns their names."""
    parameters = dict(model.named_parameters())
    shape = lambda name: tuple(getattr(parameters[name], "ds_shape", parameters[name].shape))
    fresh = {str(key) for key in info["missing_keys"]} | {str(item[0]) for item in info["mismatched_keys"]}
    prefix = model.base_model_prefix + "."
    as_wide = [name for name in parameters if not name.startswith(prefix) and shape(name)[0] == num_labels]
    module = lambda name: name.rpartition(".")[0]
    fresh |= {name for name in as_wide if module(name) == module(as_wide[-1])}  # the last one; a layer below may be as wide
    fresh &= parameters.keys()
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    with whole_parameters([parameters[name] for name in sorted(fresh)]), torch.no_grad():
        for name in sorted(fresh):
            draw(parameters[name], name, std, seed)
    return fresh


def draw(parameter: nn.Parameter, name: str, std: float, seed: int) -> None:
    """N(0, std) for matrices, 1 for the scales of norms, 0 for biases."""
    if parameter.ndim > 1:
        generator = torch.Generator().manual_seed(seed_of(seed, name) >> 1)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    else:
        parameter.fill_(1.0 if name.endswith("weight") else 0.0)
