"""What lies in a Hugging Face model folder, read without torch: configuration, labels, weight files, fingerprint.

Every fault is a UserError in one line that names the folder or file and the way out. No pickle is ever opened and no
code of a model repository is ever run.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from muka_fast.console import quiet_transformers
from muka_fast.errors import OUT_OF_REACH, UserError, first_line
from muka_fast.readers import encodable

log = logging.getLogger("muka_fast")
# What transformers raises for a configuration or weights it cannot use.
LOADING_ERRORS = (
    OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, AssertionError, ImportError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
# Into every from_pretrained of a model: nothing is unpickled, no code of the folder's runs, and what was not found is told.
SAFE_LOADING = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
HUB_FILES = (*SMALL_FILES, "*.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "spm.model", "tokenizer.model", "sentencepiece.model")
TOKENIZER_FILES += ("sentencepiece.bpe.model",)
WITHOUT_VOCABULARY = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")  # of bytes and characters
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WAY_TO_SAFETENSORS = (
    "if you trust its source, convert it once: "
    "AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder)"
)
FLOAT_DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
# What may change without changing a single logit.
VOLATILE_KEYS = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "id2label", "label2id"}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int  # absolute, bytes
    stop: int


@contextmanager
def loading(fault: str) -> Iterator[None]:
    """Around a from_pretrained: transformers keeps quiet, and what it cannot use is a UserError, which begins with `fault`."""
    try:
        with quiet_transformers():
            yield
    except LOADING_ERRORS as error:
        raise UserError(f"{fault}: {first_line(error)}") from error


def resolve_folder(source: str | Path, what: str = "teacher", files: tuple[str, ...] = HUB_FILES) -> Path:
    """The local folder of a model: the path itself, else a snapshot from the hub with these of its files."""
    path = Path(source).expanduser()
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise UserError(f"{what} {source}: this is a file; give the folder that holds config.json and the weights")
    if not HUB_NAME.fullmatch(str(source)) or str(source).startswith("."):
        raise UserError(f"{what} {str(source)[:200]}: no such folder; check the path")
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return _hub_folder(str(source), files)
    except RepositoryNotFoundError:
        reason = "and the hub has no public model of this name"
    except LocalEntryNotFoundError:
        reason = f"and {OUT_OF_REACH}"
    except (OSError, ValueError) as error:
        reason = f"and the hub refused: {first_line(error)}"
    raise UserError(f"{what} {source}: no such folder, {reason}; check the path or the name")


@cache
def _hub_folder(name: str, files: tuple[str, ...]) -> Path:
    """A snapshot from the hub, asked for once per process, so that a run sees one revision."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, etag_timeout=10, allow_patterns=list(files), ignore_patterns="*/*"))


def read_json(file: Path, what: str) -> dict:
    """A JSON object from a file of a model folder."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what}: {file} is not readable JSON ({first_line(error)}); save the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{what}: {file} does not hold a JSON object; save the model again")
    return content


def read_config(folder: Path, what: str) -> dict:
    """config.json of a model folder, as it is written there."""
    file = folder / "config.json"
    if not file.is_file():
        way_out = "point to a folder written by save_pretrained"
        if steps := list(folder.glob("checkpoint-*/config.json")):  # what `transformers.Trainer` leaves
            way_out = f"name one of its checkpoints, the newest is {max(steps, key=lambda step: step.stat().st_mtime).parent}"
        raise UserError(f"{what}: no config.json in {folder}; {way_out}")
    return read_json(file, what)


def config_labels(config: dict, what: str) -> list[str]:
    """The label names in the order of the logits; LABEL_n where the configuration names none.

    Raises UserError where id2label has gaps, contradicts num_labels or holds a blank name.
    """
    id2label = config.get("id2label")
    if id2label is None:
        count = config.get("num_labels", 2)
        if not isinstance(count, int) or count < 1:
            raise UserError(f"{what}: num_labels in config.json is {count!r}; it must be a whole number from 1 up")
        return [f"LABEL_{index}" for index in range(count)]
    try:
        named = {int(index): name for index, name in id2label.items()}
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{what}: id2label in config.json must map 0, 1, ... to names") from None
    if not named or sorted(named) != list(range(len(named))):
        missing = sorted(set(range(max(named, default=0) + 1)) - set(named))[:3]
        raise UserError(
            f"{what}: id2label in config.json must number its labels from 0 on without gaps"
            f"{f' (missing: {missing})' if missing else ''}; correct the file"
        )
    if config.get("num_labels", len(named)) != len(named):
        raise UserError(f"{what}: config.json says num_labels {config['num_labels']} but names {len(named)} labels")
    names = ["" if named[index] is None else encodable(str(named[index])) for index in range(len(named))]
    blank = [index for index, name in enumerate(names) if not name.strip()]
    if blank:
        raise UserError(f"{what}: label {blank[0]} has a blank name in id2label of config.json; give it a name")
    return names


def check_classifier(config: dict, what: str) -> list[str]:
    """The labels of a single-label classifier; UserError for every other kind of model.

    One class is allowed, but one unnamed class without a problem type is how transformers spells regression.
    """
    auto_map = config.get("auto_map") or {}
    if any(str(key).startswith(("AutoModel", "AutoConfig")) for key in auto_map) and not is_native(config):
        raise UserError(
            f"{what}: the model needs code from its own repository (auto_map in config.json), which is never run here; "
            "use a model that transformers itself supports"
        )
    architectures = config.get("architectures") or []
    if architectures and not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        raise UserError(
            f"{what}: {architectures[0]} is not a sequence classifier; fine-tune it first (`muka-fast teach --encoder`)"
        )
    problem = config.get("problem_type")
    labels = config_labels(config, what)
    if problem in ("regression", "multi_label_classification"):
        kind = problem.removesuffix("_classification").replace("_", "-")
        raise UserError(f"{what}: it has a {kind} head (problem_type in config.json); only single-label classifiers are read")
    if problem is None and labels == ["LABEL_0"]:
        raise UserError(
            f"{what}: it has a regression head (one output, no class); only single-label classifiers are read "
            "(a true one-class teacher names its class in id2label of config.json)"
        )
    if problem not in (None, "single_label_classification"):
        raise UserError(f"{what}: problem_type in config.json is {problem!r}, not single_label_classification")
    return labels


def tell_of_own_code(config: dict, what: str) -> None:
    """Warn where the repository has code of its own for a type of model that transformers has as well."""
    if config.get("auto_map"):
        kind = config["model_type"]
        log.warning("%s: its own code (auto_map) is not run, but transformers' %s; see that both give the same", what, kind)


def is_native(config: dict) -> bool:
    """Whether transformers itself has this type of model; then it is what runs, whatever code of its own the repository offers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.get("model_type") in CONFIG_MAPPING_NAMES


def check_tokenizer_files(folder: Path, what: str) -> None:
    """Refuse a folder without a tokenizer, or with one that runs its own code."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file, what) if file.is_file() else {}
    there = any((folder / name).is_file() for name in TOKENIZER_FILES) or settings.get("tokenizer_class") in WITHOUT_VOCABULARY
    if not there:
        raise UserError(f"{what}: no tokenizer in {folder}; add it with tokenizer.save_pretrained({str(folder)!r})")
    if settings.get("auto_map") and not ((folder / "config.json").is_file() and is_native(read_config(folder, what))):
        raise UserError(f"{what}: its tokenizer needs code from its own repository (auto_map), which is never run here")


def weight_files(folder: Path, what: str, stem: str = "model") -> list[Path]:
    """The safetensors files of a folder, in name order: one file, or the shards of its index."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index, what).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{what}: {index} has no weight_map; save the model again")
        files = [folder / name for name in sorted(set(map(str, weight_map.values())))]
        for file in files:
            if file.parent != folder or not file.is_file():
                raise UserError(f"{what}: shard {file} of {index.name} is missing; copy or download it again")
        return files
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    pickles = [name for name in pickles if name != "training_args.bin"]
    if pickles:
        raise UserError(
            f"{what}: only a pickle ({pickles[0]}) in {folder}, which is never opened here; {WAY_TO_SAFETENSORS}"
        )
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):  # no pickle is fetched there
        way_out = f"pickles are never opened here; {WAY_TO_SAFETENSORS}"
        raise UserError(f"{what}: no safetensors weights in the hub's cache: it is incomplete, or the hub has none, and {way_out}")
    raise UserError(f"{what}: no {single.name} in {folder}; save the model with save_pretrained")


def read_header(file: Path, what: str) -> list[TensorEntry]:
    """The tensors of one safetensors file; UserError naming the file where header and size do not fit together."""
    try:
        with safe_open(file, framework="np"), file.open("rb") as stream:  # which checks all but does not say where bytes lie
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = []
        for name, item in header.items():
            start, stop = (8 + length + place for place in item["data_offsets"])
            entries.append(TensorEntry(name, str(item["dtype"]), tuple(item["shape"]), file, start, stop))
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{what}: {file} is truncated or corrupt ({first_line(error)}); copy or download it again") from error
    return entries


def read_tensors(folder: Path, what: str, stem: str = "model") -> dict[str, TensorEntry]:
    """Every tensor of a folder's weights by name, files checked; nothing but headers is read."""
    tensors: dict[str, TensorEntry] = {}
    for file in weight_files(folder, what, stem):
        tensors |= {entry.name: entry for entry in read_header(file, what)}
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file() and not (folder / f"{stem}.safetensors").is_file():
        lost = sorted(set(read_json(index, what)["weight_map"]) - set(tensors))
        if lost:
            raise UserError(f"{what}: {index} lists {lost[0]}, which no shard holds; copy or download the shards again")
    return tensors


def fingerprint(config: dict, labels: Sequence[str], tensors: dict[str, TensorEntry], what: str) -> str:
    """sha256 (hex) over the configuration, the labels and every weight's name, dtype, shape and bytes.

    Neither the split into shards nor the order in a file enters, so the same model saved twice is recognised. Raises
    UserError for a NaN, found here in passing, before anything slow begins.
    """
    essentials = {key: value for key, value in config.items() if key not in VOLATILE_KEYS}
    head = json.dumps([essentials, list(labels)], sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(head.encode())
    for name in sorted(tensors):
        entry = tensors[name]
        digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
        for block in tensor_blocks(entry, what):
            digest.update(block)
            if has_nan(block, entry.dtype):
                raise UserError(f"{what}: {name} holds NaN values; use a sound checkpoint")
    return digest.hexdigest()


def tensor_blocks(entry: TensorEntry, what: str) -> Iterator[bytes]:
    """The bytes of one tensor, in blocks of at most 16 MiB."""
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        left = entry.stop - entry.start
        while left:
            block = stream.read(min(left, 1 << 24))
            if not block:
                raise UserError(f"{what}: {entry.file} became shorter while it was read; copy or download it again")
            left -= len(block)
            yield block


def has_nan(block: bytes, dtype: str) -> bool:
    """Whether a block of a floating-point tensor holds a NaN; False for other dtypes."""
    if dtype == "BF16":
        return bool(((np.frombuffer(block, np.uint16) & 0x7FFF) > 0x7F80).any())
    if dtype in FLOAT_DTYPES:
        return bool(np.isnan(np.frombuffer(block, FLOAT_DTYPES[dtype])).any())
    return False


def file_state(folder: Path) -> tuple:
    """Names, sizes and times of a model's files in a folder: changes when its fingerprint or its tokenizer could change."""
    files = sorted({file for pattern in HUB_FILES for file in folder.glob(pattern) if file.is_file()})  # no link to nowhere
    return tuple((file.name, *(lambda s: (s.st_size, s.st_mtime_ns, s.st_ino))(file.stat())) for file in files)


def folder_fingerprint(folder: Path, what: str) -> str:
    """The fingerprint of a model folder; computed once per process as long as its files do not change."""
    return _folder_fingerprint(folder.resolve(), what, file_state(folder))


@cache
def _folder_fingerprint(folder: Path, what: str, _state: tuple) -> str:
    config = read_config(folder, what)
    return fingerprint(config, config_labels(config, what), read_tensors(folder, what), what)
