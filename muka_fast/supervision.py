"""Supervision: the scoring run that fills the store teacher by teacher, and its loaded form that the methods read.

n texts · N teachers (i) · S columns of all teachers · C_i classes of teacher i. Memory of the run: the largest
teacher, not their sum.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from muka_fast.console import progress
from muka_fast.data import TextSet, Tokens, collate, read_texts, token_budget_batches, tokenize
from muka_fast.errors import UserError
from muka_fast.selection import UNCERTAINTY
from muka_fast.store import (
    MATRICES,
    OPTION_KEYS,
    VECTORS,
    DamagedShard,
    ShardRange,
    check_texts,
    differing_options,
    merge_manifest,
    read_manifest,
    read_shard,
    remove_leftovers,
    shard_ranges,
    teacher_key,
    write_shard,
)
from muka_fast.teachers import Teacher, check_teachers, load_teacher, teacher_names
from muka_fast.trunk import StochasticTeacher

if TYPE_CHECKING:
    from muka_fast.config import ScoreConfig, ScoringOptions
    from muka_fast.labels import LabelSpace

log = logging.getLogger("muka_fast")


# ---- the loaded form ----


@dataclass(frozen=True)
class Supervision:
    """All teachers' statistics over all texts, in the order of the text set. n texts, N teachers, S columns of all
    teachers.

    logits, mean_probs, var_probs fp32 [n, S]; predictive_entropy, expected_entropy fp32 [n, N] in nats; example_ids
    int64 [n]; teachers: manifest entries (name, labels, fingerprint, mc, ...); offsets: teacher i owns columns
    offsets[i]:offsets[i + 1]. total_variance [n, N]: var_probs summed over all classes of the teacher. Entropies and
    total_variance are those of the full label set, also after `restrict`.
    """

    logits: Tensor
    mean_probs: Tensor
    var_probs: Tensor
    predictive_entropy: Tensor
    expected_entropy: Tensor
    example_ids: Tensor
    teachers: Sequence[dict[str, Any]]
    offsets: list[int]
    total_variance: Tensor = None
    label_space: LabelSpace | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.total_variance is None:
            sums = [self.var_probs[:, a:b].sum(-1) for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]
            object.__setattr__(self, "total_variance", torch.stack(sums, dim=-1))

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def class_counts(self) -> list[int]:
        """C_i, classes of each teacher's full label set."""
        return [len(teacher["labels"]) for teacher in self.teachers]

    @cached_property
    def mutual_information(self) -> Tensor:
        """max(H - E, 0) [n, N] in nats (BALD, Houlsby et al., 2011); rounding noise below zero is cut."""
        return (self.predictive_entropy - self.expected_entropy).clamp_min(0)

    @cached_property
    def normalized_entropy(self) -> Tensor:
        """H / ln C_i [n, N] in [0, 1]; 0 for a one-class teacher."""
        return UNCERTAINTY["predictive_entropy"](self)

    def restrict(self, label_space: LabelSpace) -> Supervision:
        """Only the columns that the label space keeps: logits lose the dropped columns before any softmax, mean_probs
        are renormalised.

        A text to which a teacher gives none of its kept classes any probability gets equal kept logits there
        (uniform): dropping every class that a teacher can see leaves no opinion. Raises ValueError where the space
        was built for other teachers.
        """
        if self.label_space is label_space:
            return self
        if self.label_space is not None or len(label_space.offsets) != len(self.offsets):
            raise ValueError("this label space was built for other teachers than the supervision's")
        columns = torch.as_tensor(label_space.columns, dtype=torch.int64)
        logits, mean = self.logits[:, columns], self.mean_probs[:, columns]
        for a, b in zip(label_space.offsets[:-1], label_space.offsets[1:], strict=True):
            block = logits[:, a:b]
            block.masked_fill_((block == -torch.inf).all(-1, keepdim=True), 0.0)
            mass = mean[:, a:b].sum(-1, keepdim=True)
            mean[:, a:b] = torch.where(mass > 0, mean[:, a:b] / mass, torch.softmax(block, dim=-1))
        return replace(
            self,
            logits=logits,
            mean_probs=mean,
            var_probs=self.var_probs[:, columns],
            offsets=list(label_space.offsets),
            label_space=label_space,
        )


# ---- reading a whole store ----


def load_supervision(
    store: Path, manifest: dict[str, Any], keys: Sequence[str], names: Sequence[str] | None = None
) -> Supervision:
    """All shards of these teachers, verified, in one piece; names replace those in the manifest.

    Raises UserError naming the first missing or damaged shard.
    """
    entries = [dict(manifest["teachers"][key]) for key in keys]
    for entry, name in zip(entries, names or (), strict=bool(names)):
        entry["name"] = name
    counts = [len(entry["labels"]) for entry in entries]
    offsets = [0, *np.cumsum(counts).tolist()]
    n, ranges = manifest["texts"]["count"], shard_ranges(manifest["texts"]["count"], manifest["shard_size"])
    matrices = {name: torch.empty(n, offsets[-1]) for name in MATRICES}
    vectors = {name: torch.empty(n, len(keys)) for name in VECTORS}
    ids = torch.empty(n, dtype=torch.int64)
    for i, key in enumerate(keys):
        for shard in ranges:
            try:
                tensors = read_shard(store / key, shard, key, counts[i])
            except (FileNotFoundError, DamagedShard) as error:
                what = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged: {error}"
                raise UserError(
                    f"{shard.path(store / key)} {what}; run `muka-fast score` with the same teachers, texts and "
                    "options to compute it again"
                ) from error
            rows = slice(shard.start, shard.stop)
            for name in MATRICES:
                matrices[name][rows, offsets[i] : offsets[i + 1]] = torch.from_numpy(tensors[name])
            for name in VECTORS:
                vectors[name][rows, i] = torch.from_numpy(tensors[name])
            found = torch.from_numpy(tensors["example_ids"])
            if i == 0:
                ids[rows] = found
            elif not torch.equal(ids[rows], found):
                raise UserError(
                    f"{shard.path(store / key)}: its example ids differ from those of the other teachers of the store"
                )
    return Supervision(**matrices, **vectors, example_ids=ids, teachers=entries, offsets=offsets)


def open_store(store: str | Path, texts: TextSet | None = None, options: dict[str, Any] | None = None) -> Supervision:
    """Every complete teacher of a store, without running or even finding a teacher.

    texts: refuse a store of other texts. options: only teachers scored with these values of OPTION_KEYS; a differing
    run_seed is accepted where it leaves no choice, so that students of several seeds can share a store.
    Raises UserError where there is no store, nothing complete, nothing with these options, or one teacher under
    several option sets.
    """
    store, options = Path(store), options or {}
    manifest = read_manifest(store)
    if manifest is None or not manifest["teachers"]:
        raise UserError(
            f"--store {store} holds no completely scored teacher: fill it with "
            f"`muka-fast score --teachers ... --output {store}`"
        )
    if texts is not None:
        check_texts(store, manifest, texts)
    entries = manifest["teachers"]
    differences = {key: differing_options(entry, options) for key, entry in entries.items()}
    candidates: dict[str, list[str]] = {}
    for key, entry in entries.items():
        if set(differences[key]) <= {"run_seed"}:
            candidates.setdefault(entry["fingerprint"], []).append(key)
    if not candidates:
        key, names = min(differences.items(), key=lambda pair: len(pair[1]))
        shown = ", ".join(f"{name} {entries[key][name]!r} (asked: {options[name]!r})" for name in names)
        raise UserError(
            f"--store {store} holds no teacher scored with these options: {entries[key]['name']!r} has {shown}; "
            "give --teachers to score them again, or the options of the store"
        )
    return load_supervision(store, manifest, [_only(store, keys, entries, differences) for keys in candidates.values()])


def _only(store: Path, keys: list[str], entries: dict[str, Any], differences: dict[str, list[str]]) -> str:
    """The one key of a teacher that is meant: the only one, or the only one of the seed that was asked for."""
    same_seed = [key for key in keys if not differences[key]]
    if len(keys) > 1 and len(same_seed) == 1:
        keys = same_seed
    if len(keys) > 1:
        differing = [name for name in OPTION_KEYS if len({json.dumps(entries[key][name]) for key in keys}) > 1]
        raise UserError(
            f"--store {store} holds teacher {entries[keys[0]]['name']!r} under several options "
            f"({', '.join(differing) or 'tokenizer'}): name --teachers, or give the options that differ"
        )
    return keys[0]


# ---- the scoring run ----


def fill_store(store: str | Path, teacher_paths: Sequence[str], texts: TextSet, options: ScoringOptions) -> Supervision:
    """Score the texts with every teacher that the store does not hold completely yet, and return them all, in the
    order given.

    Killed runs continue at the next missing shard; damaged shards are named and computed again; a teacher that is
    complete under the same options is read, not run. Each distinct tokenizer tokenises the texts once. Raises
    UserError for bad teachers, a store of other texts, a full disk, or a teacher whose logits are not numbers.
    """
    store = Path(store)
    check_teachers(teacher_paths)
    shard_size = merge_manifest(store, texts, options.shard_size)["shard_size"]
    if shard_size != options.shard_size:
        log.info("%s was begun with --shard_size %d, which stays", store, shard_size)
    tokens: dict[str, Tokens] = {}
    names = teacher_names(teacher_paths)
    keys = []
    for path, name in zip(teacher_paths, names, strict=True):
        teacher = load_teacher(path, run_seed=options.seed, device=device_of(options.device), name=name)
        keys.append(_complete_teacher(store, teacher, texts, tokens, options, shard_size))
        del teacher  # before the next one is loaded
    return load_supervision(store, read_manifest(store), keys, names)


def device_of(name: str) -> str:
    """The torch device that --device names; auto takes a GPU where there is one. Raises UserError where there is none."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no usable GPU; use --device cpu or auto")
    return name


def _complete_teacher(
    store: Path, teacher: Teacher, texts: TextSet, tokens: dict[str, Tokens], options: ScoringOptions, shard_size: int
) -> str:
    """Make every shard of one teacher exist and name it in the manifest; returns its key."""
    entry = {
        "name": teacher.name,
        "fingerprint": teacher.fingerprint,
        "tokenizer_key": teacher.tokenizer_key,
        "labels": list(teacher.labels),
        "seed": teacher.seed,
        **option_values(options),
    }
    key = teacher_key(entry, texts.fingerprint)
    folder = store / key
    remove_leftovers(folder)
    todo = _missing_shards(folder, shard_ranges(len(texts), shard_size), key, len(teacher.labels))
    if not todo and key in read_manifest(store)["teachers"]:
        log.info("teacher %s: already scored", teacher.name)
        return key
    scorer = StochasticTeacher(
        teacher,
        mc_scope=options.mc_scope,
        mc_dropout_p=options.mc_dropout_p,
        mc_samples=options.mc_samples,
        mc=options.mc,
    )
    if todo:
        if teacher.tokenizer_key not in tokens:  # the key covers the teacher's own limit
            tokens[teacher.tokenizer_key] = tokenize(
                teacher.tokenizer, texts.texts, min(options.max_length, teacher.max_length)
            )
        _score_shards(folder, key, todo, scorer, texts, tokens[teacher.tokenizer_key], options.token_budget)
    merge_manifest(store, texts, shard_size, (key, {**entry, "sites": scorer.sites}))
    return key


def option_values(options: ScoringOptions) -> dict[str, Any]:
    """The options that determine a teacher's numbers, under the names of OPTION_KEYS."""
    return {name: options.seed if name == "run_seed" else getattr(options, name) for name in OPTION_KEYS}


def _missing_shards(folder: Path, ranges: Iterable[ShardRange], key: str, num_classes: int) -> list[ShardRange]:
    """The shards that are not there or damaged (those are named)."""
    missing = []
    for shard in ranges:
        try:
            read_shard(folder, shard, key, num_classes)
        except FileNotFoundError:
            missing.append(shard)
        except DamagedShard as error:
            log.warning("%s is damaged (%s): computing it again", shard.path(folder), error)
            missing.append(shard)
    return missing


def _score_shards(
    folder: Path,
    key: str,
    todo: Sequence[ShardRange],
    scorer: StochasticTeacher,
    texts: TextSet,
    tokens: Tokens,
    token_budget: int,
) -> None:
    """Score the texts of these shards, one shard in memory at a time, each written as soon as it is whole."""
    teacher, device = scorer.teacher, next(scorer.teacher.model.parameters()).device
    num_texts = sum(shard.stop - shard.start for shard in todo)
    if num_texts < len(texts):
        log.info("teacher %s: %d of %d texts were scored before", teacher.name, len(texts) - num_texts, len(texts))
    with progress(num_texts, f"scoring {teacher.name}") as bar:
        for shard in todo:
            count, num_classes = shard.stop - shard.start, len(teacher.labels)
            tensors = {name: np.empty((count, num_classes), np.float32) for name in MATRICES}
            tensors |= {name: np.empty(count, np.float32) for name in VECTORS}
            tensors["example_ids"] = texts.example_ids[shard.start : shard.stop].astype(np.int64)
            for batch in token_budget_batches(tokens.lengths[shard.start : shard.stop], token_budget):
                inputs = collate(tokens, shard.start + batch, teacher.pad_id)
                scores = scorer.score(
                    inputs["input_ids"].to(device),
                    inputs["attention_mask"].to(device),
                    torch.from_numpy(tensors["example_ids"][batch]),
                )
                for name in (*MATRICES, *VECTORS):
                    tensors[name][batch] = getattr(scores, name).float().cpu().numpy()
                _check_numbers(teacher.name, texts.source, tensors, batch)
                bar.advance(len(batch))
            write_shard(folder, shard, key, tensors)


def _check_numbers(name: str, source: str, tensors: dict[str, np.ndarray], batch: np.ndarray) -> None:
    """NaN must never turn into certainty: refuse it here, whatever produced it."""
    good = ~(np.isnan(tensors["logits"][batch]) | np.isposinf(tensors["logits"][batch])).any(-1)
    for part in (*MATRICES[1:], *VECTORS):
        good &= np.isfinite(tensors[part][batch]).reshape(len(batch), -1).all(-1)
    if not good.all():
        example = int(tensors["example_ids"][batch[~good][0]])
        raise UserError(
            f"teacher {name!r}: its output for text {example} of {source!r} (row, counted from 0) is NaN or infinite; "
            "check the checkpoint, or score it on another --device"
        )


def score(config: ScoreConfig) -> Supervision:
    """Fill or complete the store `config.output` with `config.teachers` over `config.texts`."""
    texts = read_texts(
        config.texts, text_column=config.text_column, label_column=config.label_column, limit=config.limit
    )
    return fill_store(config.output, config.teachers, texts, config)


def main(config: ScoreConfig) -> int:
    """`muka-fast score`: score, then say how certain each teacher was and how often it was the most certain one."""
    sup = score(config)
    selected = sup.normalized_entropy.argmin(-1)
    for i, teacher in enumerate(sup.teachers):
        log.info(
            "%s: %d classes, mean normalised entropy %.3f, most certain on %.1f %% of %d texts",
            teacher["name"],
            len(teacher["labels"]),
            sup.normalized_entropy[:, i].mean(),
            100 * (selected == i).float().mean(),
            len(sup),
        )
    log.info("store: %s", config.output)
    return 0
