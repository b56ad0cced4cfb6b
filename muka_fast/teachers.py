"""Loads teachers: checks, names, fingerprints and seeds them.

A teacher is any single-label `*ForSequenceClassification` folder (or hub name) with safetensors weights and a
tokenizer, or a LoRA adapter of one. Whatever else is met ends in a UserError that names the teacher and the way out.
"""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import transformers

from muka_fast import adapters, checkpoint, placement
from muka_fast.data import tokenizer_key
from muka_fast.errors import UserError, first_line
from muka_fast.probe import check_padding, trace_inputs
from muka_fast.seeds import seed_of
from muka_fast.tokenizer import fit_tokenizer, load_tokenizer, token_limit

log = logging.getLogger("muka_fast")

SHOWN_NAMES = 3  # of a list in a message
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Teacher:
    """A loaded, frozen classifier.

    tokenizer_key: equal keys turn every text into the same token ids (truncation included).
    fingerprint: sha256 (hex) of configuration, labels and weights. seed: 64 bits, of the run's seed and the fingerprint.
    max_length: most tokens a text may have, special tokens included.
    """

    name: str
    path: str
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    tokenizer_key: str
    labels: list[str]
    fingerprint: str
    seed: int
    pad_id: int
    max_length: int


@dataclass(frozen=True)
class TeacherFiles:
    """What is known of a `Teacher` before its weights are loaded. tokenizer_key: None where only loading tells."""

    folder: Path
    labels: list[str]
    fingerprint: str
    tokenizer_key: str | None = None


def teacher_names(paths: Sequence[str | Path]) -> list[str]:
    """A unique name for each path: its last part, with parents joined on ("a-model", "b-model") where two are equal.

    A name depends on the set of paths, not on their order, unless the same path is given twice. A snapshot in the hub's cache has the
    name that the hub has for it.
    """
    parts = [list(Path(path).expanduser().absolute().parts[1:]) or ["teacher"] for path in paths]
    for part in parts:
        if part[-2:-1] == ["snapshots"] and part[-3:-2] and part[-3].startswith("models--"):
            part[-3:] = [part[-1], *part[-3].split("--")[1:]]
    depth = [1] * len(parts)
    while True:
        names = ["-".join(part[-length:]) for part, length in zip(parts, depth, strict=True)]
        clashing = [i for i, name in enumerate(names) if names.count(name) > 1 and depth[i] < len(parts[i])]
        if not clashing:
            break
        for i in clashing:
            depth[i] += 1
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        names[i] = name if seen[name] == 1 else f"{name}-{seen[name]}"
    return names


def inspect(path: str | Path) -> TeacherFiles:
    """Check a teacher's files without loading it: labels and fingerprint. Reads every weight once per process."""
    what = f"teacher {path}"
    folder = checkpoint.resolve_folder(path)
    if adapters.is_adapter(folder):
        labels = adapters.adapter_labels(folder, what)
        return TeacherFiles(folder, labels, adapters.adapter_fingerprint(folder, what))
    labels = checkpoint.check_classifier(checkpoint.read_config(folder, what), what)
    checkpoint.check_tokenizer_files(folder, what)
    return TeacherFiles(folder, labels, checkpoint.folder_fingerprint(folder, what))


def check_teachers(paths: Sequence[str | Path], warn: bool = True) -> list[TeacherFiles]:
    """Check the files of all teachers before any work starts; warns (where `warn`) of code of their own, which is not run.

    Raises UserError for no teacher, for the same teacher twice (same folder or same content) and for every fault that
    `inspect` and `rehearse` find.
    """
    if not paths:
        raise UserError("--teachers: no teacher given; name at least one folder or hub model, better two")
    found: dict[object, str | Path] = {}
    files = []
    for path in paths:
        folder = checkpoint.resolve_folder(path).resolve()
        if folder in found:
            raise UserError(f"--teachers: {path} is given twice (also as {found[folder]}); name every teacher once")
        found[folder] = path
        inspected = inspect(path)
        key = rehearse(inspected.folder, f"teacher {path}", checkpoint.file_state(inspected.folder))
        files.append(replace(inspected, tokenizer_key=key))
        twin = found.setdefault(files[-1].fingerprint, path)
        if twin != path:
            raise UserError(f"--teachers: {path} and {twin} are the same model; name every teacher once")
        if warn and not adapters.is_adapter(files[-1].folder):
            checkpoint.tell_of_own_code(checkpoint.read_config(files[-1].folder, f"teacher {path}"), f"teacher {path}")
    return files


@cache
def rehearse(folder: Path, what: str, _state: tuple) -> str | None:
    """Load a teacher without its weights, so that what `load_teacher` would refuse later is refused before the hours in between.

    Once per state of its files. The model's part needs accelerate; without it a missing head shows when its turn comes. Returns the
    tokenizer_key; None without that part, and of an adapter.
    """
    if adapters.is_adapter(folder):
        adapters.import_peft(what)
        return None
    before, log.disabled = log.disabled, True  # the warnings come with the real loading
    try:
        tokenizer = load_tokenizer(folder, what)
        if importlib.util.find_spec("accelerate") is not None:
            model = load_classifier(folder, torch.float32, what, device_map="meta")
            fit_tokenizer(model, tokenizer, what)
            return tokenizer_key(tokenizer, token_limit(model, tokenizer))
    finally:
        log.disabled = before
    return None


def load_teacher(
    path: str | Path,
    *,
    run_seed: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
    most_gib: float | None = None,
) -> Teacher:
    """Load one teacher: eval mode, frozen, checked, padded on the right.

    dtype: of the weights in memory, whatever they are stored in. most_gib: of weights on the device; a larger teacher, or one that
    does not fit there, is split over several (placement.py). Raises UserError for every fault, naming `path`.
    """
    what = f"teacher {path}"
    files, device = inspect(path), torch.device(device)
    needed = placement.weight_bytes(files.folder, dtype)
    limits = placement.memory_limits(needed, device, most_gib)
    if limits is not None:
        placement.require_accelerate(needed, device, what)
    model, tokenizer, labels = open_classifier(files.folder, what, device, dtype, limits)
    model.requires_grad_(False)
    if placement.is_split(model):
        check_split(model, needed, what)
    check_padding(model, what)
    max_length = token_limit(model, tokenizer)
    return Teacher(
        name=name or teacher_names([path])[0],
        path=str(path),
        model=model,
        tokenizer=tokenizer,
        tokenizer_key=tokenizer_key(tokenizer, max_length),
        labels=labels,
        fingerprint=files.fingerprint,
        seed=seed_of(run_seed, files.fingerprint),
        pad_id=tokenizer.pad_token_id,
        max_length=max_length,
    )


def open_classifier(
    folder: Path, what: str, device: str | torch.device, dtype: torch.dtype = torch.float32, limits: dict[int | str, int] | None = None
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, list[str]]:
    """Of a folder or LoRA adapter: model in eval mode, tokenizer fitted to it, label names in logit order.

    limits: bytes that each place may hold of a model that is split over several, in place of `device`. Raises UserError for every
    fault, naming `what`.
    """
    if adapters.is_adapter(folder):
        labels = adapters.adapter_labels(folder, what)
        model = adapters.load_merged(folder, labels, dtype, what)
        model = model if limits is None else placement.dispatch(model, limits, what)
        tokenizer_folder = adapters.tokenizer_folder(folder, what)
    else:
        labels = checkpoint.check_classifier(checkpoint.read_config(folder, what), what)
        model = load_classifier(folder, dtype, what, "sequential" if limits else None, limits)
        tokenizer_folder = folder
    model = model.eval()
    if not placement.is_split(model):
        model = model.to(device)
    check_finite(model, what)
    tokenizer = load_tokenizer(tokenizer_folder, what)
    fit_tokenizer(model, tokenizer, what)
    return model, tokenizer, labels


def load_classifier(
    folder: Path,
    dtype: torch.dtype,
    what: str,
    device_map: str | None = None,
    max_memory: dict[int | str, int] | None = None,
) -> transformers.PreTrainedModel:
    """The classifier of a folder, with every weight found and of the right shape.

    device_map "meta": shapes only; "sequential": over the devices of max_memory, in their order, and the disk.
    """
    checkpoint.read_tensors(folder, what)  # names a damaged file or a pickle; transformers would not
    with checkpoint.loading(f"{what}: transformers cannot load it"):
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, device_map=device_map, max_memory=max_memory, ignore_mismatched_sizes=True, **checkpoint.SAFE_LOADING
        )
    check_loading(info, what)
    settle_forward(model)
    return model


def check_loading(info: dict, what: str, supplied: frozenset[str] = frozenset()) -> None:
    """Refuse weights that would be random or of another shape; `supplied`: names that an adapter brings."""
    mismatched = sorted((str(key), tuple(have), tuple(want)) for key, have, want in info["mismatched_keys"])
    mismatched = [item for item in mismatched if item[0] not in supplied]
    if mismatched:
        key, have, want = mismatched[0]
        raise UserError(
            f"{what}: {key} has shape {list(have)} in the weights, but config.json (labels, sizes) asks for "
            f"{list(want)}; correct id2label or save the model again"
        )
    missing = sorted(set(info["missing_keys"]) - supplied)
    if missing:
        raise UserError(
            f"{what}: the weights lack {some(missing)}, which would be random; save the whole fine-tuned classifier"
        )
    if info["unexpected_keys"]:
        log.warning("%s: weights that the model does not use: %s", what, some(sorted(info["unexpected_keys"])))


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    rest = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def check_finite(model: torch.nn.Module, what: str) -> None:
    """Refuse a model with NaN or infinite weights, naming the tensor."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))  # ten times as fast as to look at each
        if torch.isfinite(total) or torch.isfinite(tensor).all():
            continue
        count = int((~torch.isfinite(tensor)).sum())
        raise UserError(f"{what}: {name} holds {count} NaN or infinite of {tensor.numel()} values; use a sound checkpoint")


@torch.inference_mode()
def check_split(model: transformers.PreTrainedModel, needed: int, what: str) -> None:
    """Refuse an architecture that reads weights of a module without calling it: accelerate brings them only for a call."""
    ids, mask = trace_inputs(model, 1, 3)
    try:
        model(input_ids=ids, attention_mask=mask)
    except RuntimeError as error:
        raise UserError(
            f"{what}: its {needed / placement.GIB:.3g} GiB of weights do not fit on the device, and {type(model).__name__} cannot be "
            f"split ({first_line(error)}); score it on a larger one, or raise --teacher_gib"
        ) from error
    log.info("%s: %.3g GiB of weights, placed on: %s", what, needed / placement.GIB, placement.describe(model))


def settle_forward(model: transformers.PreTrainedModel) -> None:
    """Named outputs and no more than the answer, whatever a saved configuration asks for: no keys and values kept for a next token;
    feed-forward layers in one piece: cut into chunks, which changes no number, they take only texts whose length divides by the
    chunk's; BigBird's full attention."""
    config = model.config
    if getattr(config.get_text_config(), "use_cache", False):
        config.get_text_config().use_cache = False
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    for part in (config, *model.modules()):
        if getattr(part, "chunk_size_feed_forward", 0):
            part.chunk_size_feed_forward = 0
    if hasattr(model.base_model, "set_attention_type"):  # BigBird: what itself it changes to for texts of up to 704 tokens
        model.base_model.set_attention_type("original_full")
        config.attention_type = "original_full"
