"""Loads teachers: checks, names, fingerprints and seeds them, and settles their padding.

A teacher is any single-label `*ForSequenceClassification` folder (or hub name) with safetensors weights and a
tokenizer, or a LoRA adapter of one. Whatever else is met ends in a UserError that names the teacher and the way out.
"""

import hashlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from muka_fast import adapters, checkpoint, placement
from muka_fast.console import quiet_transformers
from muka_fast.data import tokenizer_key
from muka_fast.errors import UserError, first_line
from muka_fast.sites import trace_inputs

log = logging.getLogger("muka_fast")

# What transformers raises for a configuration or weights it cannot use.
LOADING_ERRORS = (
    OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, AssertionError, ImportError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
SHOWN_NAMES = 3  # of a list in a message
NO_LIMIT = 10**6  # a tokenizer without a length limit says 1e30
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
    """What is known of a teacher before its weights are loaded."""

    folder: Path
    labels: list[str]
    fingerprint: str


def teacher_names(paths: Sequence[str | Path]) -> list[str]:
    """A unique name for each path: its last part, with parents joined on ("a-model", "b-model") where two are equal.

    A name depends on the set of paths, not on their order, unless the same path is given twice.
    """
    parts = [list(Path(path).expanduser().absolute().parts[1:]) or ["teacher"] for path in paths]
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
    """Check the files of all teachers before any work starts; warns (where `warn`) when there is only one.

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
        files.append(inspect(path))
        rehearse(files[-1].folder, f"teacher {path}", checkpoint.file_state(files[-1].folder))
        twin = found.setdefault(files[-1].fingerprint, path)
        if twin != path:
            raise UserError(f"--teachers: {path} and {twin} are the same model; name every teacher once")
    if len(paths) == 1 and warn:
        log.warning("only one teacher (%s): this is plain distillation, there is nothing to select between", paths[0])
    return files


@cache
def rehearse(folder: Path, what: str, _state: tuple) -> None:
    """Load a teacher without its weights, so that what `load_teacher` would refuse later is refused before the hours in between.

    Once per state of its files. The model's part needs accelerate; without it a missing head shows when its turn comes.
    """
    if adapters.is_adapter(folder):
        adapters.import_peft(what)
        return
    log.disabled = True  # the warnings come with the real loading
    try:
        tokenizer = load_tokenizer(folder, what)
        if importlib.util.find_spec("accelerate") is not None:
            model = load_classifier(folder, torch.float32, what, device_map="meta")
            settle_tokenizer(model, tokenizer, what)
            check_vocabulary(model, tokenizer, what)
    finally:
        log.disabled = False


def teacher_seed(run_seed: int, fingerprint: str) -> int:
    """The 64-bit seed of a teacher's masks: it depends on what the teacher is, not on its place in the list."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{fingerprint}".encode()).digest()[:8], "little")


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
    max_length = token_limit(model, tokenizer)
    return Teacher(
        name=name or teacher_names([path])[0],
        path=str(path),
        model=model,
        tokenizer=tokenizer,
        tokenizer_key=tokenizer_key(tokenizer, max_length),
        labels=labels,
        fingerprint=files.fingerprint,
        seed=teacher_seed(run_seed, files.fingerprint),
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
    settle_tokenizer(model, tokenizer, what)
    check_vocabulary(model, tokenizer, what)
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
    try:
        with quiet_transformers():
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=dtype,
                device_map=device_map,
                max_memory=max_memory,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except LOADING_ERRORS as error:
        raise UserError(f"{what}: transformers cannot load it: {first_line(error)}") from error
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


def load_tokenizer(folder: Path, what: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a folder, padding on the right."""
    checkpoint.check_tokenizer_files(folder, what)
    try:
        with quiet_transformers():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, padding_side="right"
            )
    except LOADING_ERRORS as error:
        raise UserError(f"{what}: its tokenizer cannot be loaded: {first_line(error)}") from error
    return tokenizer


def settle_forward(model: transformers.PreTrainedModel) -> None:
    """Named outputs and no more than the answer, whatever a saved configuration asks for: no keys and values kept for a next token;
    feed-forward layers in one piece: cut into chunks, which changes no number, they take only texts whose length divides by the
    chunk's."""
    config = model.config
    if getattr(config.get_text_config(), "use_cache", False):
        config.get_text_config().use_cache = False
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    for part in (config, *model.modules()):
        if getattr(part, "chunk_size_feed_forward", 0):
            part.chunk_size_feed_forward = 0


def settle_tokenizer(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, what: str
) -> None:
    """Give tokenizer and configuration the same padding token, and keep texts from spelling an end token that the head looks for.

    Order of choice for padding: the tokenizer's, the one that config.pad_token_id names, the end-of-text token (usual for decoders;
    said aloud), and where the tokenizer ends every text with that one, which a head that reads the last token would then take for
    padding, the unknown token.
    """
    config = model.config.get_text_config()
    if tokenizer.pad_token_id is None:
        named = tokenizer.convert_ids_to_tokens(config.pad_token_id) if isinstance(config.pad_token_id, int) else None
        if named is None:
            ends = tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]
            named = tokenizer.unk_token if ends else tokenizer.eos_token
            if named is None or (ends and named == tokenizer.eos_token):
                raise UserError(f"{what}: its tokenizer has no padding token; set tokenizer.pad_token and save it again")
            log.warning("%s: no padding token; %r takes the place", what, named)
        tokenizer.pad_token = named
    config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    # An encoder with a decoder (BART, T5) refuses a batch whose texts hold "</s>" in different numbers, as HTML does.
    tokenizer.split_special_tokens |= model.config.is_encoder_decoder


def check_vocabulary(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, what: str
) -> None:
    """Refuse a tokenizer whose ids the model cannot embed: it belongs to another model."""
    rows = embedded_tokens(model)
    if rows is None:
        log.info("%s: has no table of tokens that its tokenizer could be compared with", what)
        return
    beyond = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ >= rows)
    if not beyond:
        return
    special = set(tokenizer.all_special_ids) - {tokenizer.pad_token_id}
    if all(id_ in special for id_, _ in beyond):
        log.warning("%s: its model has no row for the special token %r; texts must not hold it", what, beyond[0][1])
        return
    raise UserError(
        f"{what}: its tokenizer has token {beyond[0][1]!r} with id {beyond[0][0]}, but the model embeds only {rows} tokens; "
        "copy the tokenizer that the model was trained with"
    )


def embedded_tokens(model: transformers.PreTrainedModel) -> int | None:
    """Rows of the table of tokens; None for a model without one: CANINE hashes characters, Perceiver begins with a projection."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # raised by transformers for a model that has none; `check_vocabulary` tells it
        return None
    if isinstance(table, torch.nn.Embedding):
        return table.num_embeddings  # ZeRO-3 leaves no rows in its weight
    weight = getattr(table, "weight", None)  # I-BERT's table is a class of its own
    return None if weight is None else len(weight)


def token_limit(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """Most tokens of a text: the least of what position table (or configuration) and tokenizer allow."""
    limit = tokenizer.model_max_length
    return int(min(position_limit(model), limit if limit > 0 else NO_LIMIT))


def position_limit(model: transformers.PreTrainedModel) -> int:
    """Most tokens that a model's position table, or else its configuration, allows; its weights may be on the meta device."""
    named = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    tables = [module for module in named if isinstance(module, torch.nn.Embedding)]
    # RoBERTa's kin count positions from padding_idx + 1.
    limits = [table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1) for table in tables]
    limits = limits or [getattr(model.config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT]
    return min(limit for limit in (*limits, NO_LIMIT) if limit > 0)  # XLNet's -1: none
