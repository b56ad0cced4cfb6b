"""LoRA adapter folders as teachers: what they are an adapter of, their labels, and loading them merged into their base."""

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from muka_fast import checkpoint
from muka_fast.errors import UserError

if TYPE_CHECKING:
    import torch
    import transformers

HEAD_WEIGHTS = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "out_proj.weight")
PREFIX = "base_model.model."


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter instead of a whole model. Raises UserError for one that holds both."""
    adapter = (folder / "adapter_config.json").is_file()
    if adapter and any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise UserError(f"{folder}: holds a whole model and an adapter (adapter_config.json); give each a folder of its own")
    return adapter


def adapter_settings(folder: Path, what: str) -> dict:
    """adapter_config.json, checked: a LoRA of a sequence classifier with a known base."""
    settings = checkpoint.read_json(folder / "adapter_config.json", what)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{what}: {settings.get('peft_type')} adapters are not read; merge it into its base first")
    if settings.get("task_type") != "SEQ_CLS":
        raise UserError(f"{what}: the adapter's task_type is {settings.get('task_type')!r}, not SEQ_CLS (a classifier)")
    if not settings.get("base_model_name_or_path"):
        raise UserError(
            f"{what}: adapter_config.json names no base model; add its folder or name as base_model_name_or_path"
        )
    if settings.get("auto_mapping"):
        raise UserError(f"{what}: the adapter needs code of its own (auto_mapping), which is never run here")
    return settings


def base_folder(folder: Path, what: str, files: tuple[str, ...] = checkpoint.HUB_FILES) -> Path:
    """The base model's folder: as named, beside the adapter, or from the hub, with these of its files."""
    base = str(adapter_settings(folder, what)["base_model_name_or_path"])
    beside = folder / base
    if not os.path.isdir(base) and os.path.isdir(beside):
        return beside
    return checkpoint.resolve_folder(base, f"{what}: base_model_name_or_path of adapter_config.json", files)


def adapter_tensors(folder: Path, what: str) -> dict[str, checkpoint.TensorEntry]:
    """The adapter's tensors, named as in the base model."""
    tensors = checkpoint.read_tensors(folder, what, stem="adapter_model")
    return {name.removeprefix(PREFIX): entry for name, entry in tensors.items()}


def adapter_classifier(folder: Path, what: str, files: tuple[str, ...] = checkpoint.HUB_FILES) -> dict:
    """The configuration of the classifier that adapter and base make together. files: as of `base_folder`.

    The adapter's own config.json where it has one; else the base's, with LABEL_n for the head that the adapter brings
    where its size differs from the base's.
    """
    if (folder / "config.json").is_file():
        return checkpoint.read_config(folder, what) | {"architectures": []}  # peft names the base's; the task_type tells the head
    config = checkpoint.read_config(base_folder(folder, what, files), f"{what}: base model")
    heads = [entry.shape for name, entry in adapter_tensors(folder, what).items() if name.endswith(HEAD_WEIGHTS)]
    if sizes := [shape[0] for shape in heads if len(shape) == 2]:
        config = config | {"architectures": []}
        if len(checkpoint.config_labels(config, what)) != sizes[0]:
            config["id2label"] = {str(index): f"LABEL_{index}" for index in range(sizes[0])}
            config.pop("num_labels", None)
    return config


def adapter_labels(folder: Path, what: str, files: tuple[str, ...] = checkpoint.HUB_FILES) -> list[str]:
    """The label names in the order of the logits. files: as of `base_folder`."""
    return checkpoint.check_classifier(adapter_classifier(folder, what, files), what)


def tokenizer_folder(folder: Path, what: str) -> Path:
    """Where the tokenizer lies: in the adapter's folder, else in the base's."""
    own = any((folder / name).is_file() for name in checkpoint.TOKENIZER_FILES)
    return folder if own else base_folder(folder, what)


def adapter_fingerprint(folder: Path, what: str) -> str:
    """sha256 (hex) over the adapter's settings and weights and over its base; computed once per process as long as no file changes."""
    checkpoint.check_tokenizer_files(tokenizer_folder(folder, what), what)
    base = base_folder(folder, what)
    return _fingerprint(folder.resolve(), base, what, checkpoint.file_state(folder), checkpoint.file_state(base))


@cache
def _fingerprint(folder: Path, base: Path, what: str, *_states: tuple) -> str:
    settings = adapter_settings(folder, what)
    settings = {key: value for key, value in settings.items() if key not in ("base_model_name_or_path", "revision")}
    labels = adapter_labels(folder, what)
    parts = [
        checkpoint.fingerprint(settings, labels, adapter_tensors(folder, what), what),
        checkpoint.fingerprint(
            adapter_classifier(folder, what), labels, checkpoint.read_tensors(base, f"{what}: base model"), what
        ),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def import_peft(what: str) -> ModuleType:
    """The optional library that reads adapters; UserError naming the extra where it is missing."""
    try:
        import peft
    except ImportError:
        raise UserError(f"{what}: this is a LoRA adapter, which needs pip install 'muka-fast[peft]'") from None
    return peft


def load_merged(folder: Path, labels: list[str], dtype: "torch.dtype", what: str) -> "transformers.PreTrainedModel":
    """Base and adapter merged in memory into one plain classifier; nothing is written."""
    peft = import_peft(what)
    import transformers

    from muka_fast import teachers

    names = {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    base = base_folder(folder, what)
    source = folder if (folder / "config.json").is_file() else base
    with checkpoint.loading(f"{what}: the adapter cannot be loaded"):
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False, **names)
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            base, config=config, dtype=dtype, ignore_mismatched_sizes=True, **checkpoint.SAFE_LOADING
        )
        supplied = frozenset(adapter_tensors(folder, what))
        teachers.check_loading(info, f"{what} (base {base})", supplied)
        adapted = peft.PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
        # peft itself only warns where its file lacks a weight.
        whole = {"save_embedding_layers": False}
        wanted = {name.removeprefix(PREFIX) for name in peft.get_peft_model_state_dict(adapted, **whole)}
        if wanted - supplied:
            lost = teachers.some(sorted(wanted - supplied))
            raise UserError(f"{what}: the adapter lacks {lost}, which would be random; save it again")
        merged = adapted.merge_and_unload()
    teachers.settle_forward(merged)
    return merged
