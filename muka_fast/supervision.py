"""The scoring run: fills the supervision store teacher by teacher, resumably. Memory: the largest teacher, not their sum."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig

from muka_fast import adapters, checkpoint
from muka_fast.console import log_file, progress
from muka_fast.data import TextSet, Tokens, collate, read_texts, token_budget_batches, tokenize
from muka_fast.engine import init_distributed, resolve_device, shut_down
from muka_fast.errors import UserError
from muka_fast.shard_queue import ShardQueue
from muka_fast.shared import score_together, tie_shared_weights, trunk_tree
from muka_fast.sites import Site, active_probabilities, num_site_layers, sites_of_config
from muka_fast.store import (
    MATRICES,
    OPTION_KEYS,
    VECTORS,
    DamagedShard,
    ShardRange,
    default_shard_size,
    merge_manifest,
    order_teachers,
    read_manifest,
    read_shard,
    remove_leftovers,
    shard_ranges,
    teacher_key,
    write_shard,
)
from muka_fast.stored import Supervision, load_supervision, open_store
from muka_fast.teachers import (
    LOADING_ERRORS,
    Teacher,
    TeacherFiles,
    check_teachers,
    load_teacher,
    quiet_transformers,
    teacher_names,
)
from muka_fast.trunk import StochasticTeacher

if TYPE_CHECKING:
    from muka_fast.config import ScoreConfig, ScoringOptions

__all__ = ["Supervision", "check_sites", "device_of", "fill_store", "load_supervision", "main", "open_store", "option_values", "score"]

log = logging.getLogger("muka_fast")
FAMILY_BYTES = 1 << 20  # of the largest tensor; whether layers are equal is found out from all of them


@dataclass(frozen=True)
class Job:
    """One teacher with shards to compute."""

    key: str
    entry: dict[str, Any]
    scorer: StochasticTeacher | None
    todo: list[ShardRange]


def fill_store(
    store: str | Path, teacher_paths: Sequence[str], texts: TextSet, options: ScoringOptions, queue: ShardQueue | None = None
) -> Supervision:
    """Score the texts with every teacher that the store does not hold completely yet; returns all, in the order given.

    Killed runs continue at the next missing shard; damaged shards are named and computed again; a teacher that is
    complete under the same options is read, not run. Each distinct tokenizer tokenises the texts once. Teachers run
    one after another, save those that have their lowest layers in common: these run together, the common part once.
    With the queue of a process group every process calls this, and each text is scored by one of them; by default this
    process does all.
    Raises UserError for bad teachers, a store of other texts, a full disk, or a teacher whose logits are not numbers.
    """
    store, queue = Path(store), queue or ShardQueue()
    with queue:
        keys = _score_teachers(store, teacher_paths, texts, options, queue)
    with queue:
        return load_supervision(store, order_teachers(store, keys), keys, teacher_names(teacher_paths))


def _score_teachers(
    store: Path, teacher_paths: Sequence[str], texts: TextSet, options: ScoringOptions, queue: ShardQueue
) -> list[str]:
    """This process's share of the work of `fill_store`; returns the teachers' keys."""
    files = check_teachers(teacher_paths)
    if options.mc:
        check_sites(teacher_names(teacher_paths), files, options)
    wished = options.shard_size or default_shard_size(len(texts))
    shard_size = queue.agree("shard_size", lambda: merge_manifest(store, texts, wished)["shard_size"])
    if read_manifest(store) is None:
        raise UserError(f"{store} is not visible here: --store and --output must lie on a file system that all nodes share")
    if shard_size != wished:
        log.info("%s was begun with --shard_size %d, which stays", store, shard_size)
    names, families = teacher_names(teacher_paths), [family_of(found) for found in files]
    tokens: dict[str, Tokens] = {}
    run = lambda group: _run(store, group, texts, tokens, options, shard_size, queue)
    keys, group, family = [""] * len(names), [], None
    for i in sorted(range(len(names)), key=lambda i: families.index(families[i])):
        if group and families[i] != family:
            run(group)
            group = []  # gone before the next one is loaded
        family = families[i]
        device = device_of(options.device)
        teacher = load_teacher(teacher_paths[i], run_seed=options.seed, device=device, name=names[i])
        job = _prepare(store, teacher, texts, options, shard_size, queue)
        del teacher
        keys[i] = job.key
        if job.scorer is None:
            continue
        if group and not _related(group[0], job):
            run(group)
            group = []
        group.append(job)
        del job
        if len(group) > 1:
            tie_shared_weights([member.scorer for member in group])
    if group:
        run(group)
    return keys


def check_sites(names: Sequence[str], files: Sequence[TeacherFiles], options: ScoringOptions) -> None:
    """Refuse a teacher in which --mc_scope leaves nothing random, before the scores of those before it take hours."""
    for name, found in zip(names, files, strict=True):
        sites = _sites(found.folder, checkpoint.file_state(found.folder))
        # Without layers of its own every site is used, whatever the scope (StochasticTeacher).
        if sites and (options.mc_scope == "all" or num_site_layers(sites)):
            active_probabilities(sites, options.mc_scope, options.mc_dropout_p, f"teacher {name}")


@cache
def _sites(folder: Path, _state: tuple) -> list[Site] | None:
    """The dropout sites of a teacher by its configuration, once per state of its files."""
    what = f"teacher {folder}"
    if adapters.is_adapter(folder) and not (folder / "config.json").is_file():
        folder = adapters.base_folder(folder, what)
    try:
        with quiet_transformers():
            return sites_of_config(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except LOADING_ERRORS:
        return None  # an adapter's broken base: told with all details when its turn comes


def family_of(files: TeacherFiles) -> str:
    """A cheap hash that teachers with common layers share: of the beginning of the largest tensor, the embeddings."""
    what = f"teacher {files.folder}"
    folder = adapters.base_folder(files.folder, what) if adapters.is_adapter(files.folder) else files.folder
    largest = max(checkpoint.read_tensors(folder, what).values(), key=checkpoint.tensor_bytes)
    digest = hashlib.sha256(f"{largest.dtype} {largest.shape}".encode())
    with open(largest.file, "rb") as file:
        file.seek(largest.start)
        digest.update(file.read(min(largest.stop - largest.start, FAMILY_BYTES)))
    return digest.hexdigest()


def _related(first: Job, other: Job) -> bool:
    """Whether two teachers gain from running together: a common trunk, and the same texts to do."""
    return first.todo == other.todo and trunk_tree([first.scorer, other.scorer])[0].teachers == (0, 1)


def device_of(name: str) -> str:
    """The torch device that --device names; auto takes a GPU where there is one. Raises UserError where there is none."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no usable GPU; use --device cpu or auto")
    return name


def _prepare(
    store: Path, teacher: Teacher, texts: TextSet, options: ScoringOptions, shard_size: int, queue: ShardQueue
) -> Job:
    """What is left to do for a teacher; its scorer is None where the store holds it completely."""
    entry = {
        "name": teacher.name,
        "fingerprint": teacher.fingerprint,
        "tokenizer_key": teacher.tokenizer_key,
        "labels": list(teacher.labels),
        "seed": teacher.seed,
        **option_values(options),
    }
    key = teacher_key(entry, texts.fingerprint)
    remove_leftovers(store / key)
    ranges, num_labels = shard_ranges(len(texts), shard_size), len(teacher.labels)
    # Agreed on: others may have written shards by the time that this process looks.
    missing = queue.agree(key, lambda: [shard.number for shard in _missing_shards(store / key, ranges, key, num_labels)])
    todo = [ranges[number] for number in missing]
    if not todo and key in read_manifest(store)["teachers"]:
        log.info("teacher %s: already scored", teacher.name)
        return Job(key, entry, None, todo)
    scorer = StochasticTeacher(
        teacher,
        mc_scope=options.mc_scope,
        mc_dropout_p=options.mc_dropout_p,
        mc_samples=options.mc_samples,
        mc=options.mc,
    )
    return Job(key, entry, scorer, todo)


def _run(
    store: Path,
    group: Sequence[Job],
    texts: TextSet,
    tokens: dict[str, Tokens],
    options: ScoringOptions,
    shard_size: int,
    queue: ShardQueue,
) -> None:
    """Compute the missing shards of a group of related teachers (or of one); once all are there, name them in the manifest."""
    work = " ".join(job.key for job in group)
    if group[0].todo:
        teacher = group[0].scorer.teacher
        if teacher.tokenizer_key not in tokens:  # the key covers the teacher's own limit
            max_length = min(options.max_length, teacher.max_length)
            tokens[teacher.tokenizer_key] = tokenize(teacher.tokenizer, texts.texts, max_length)
        _score_shards(store, group, texts, tokens[teacher.tokenizer_key], options.token_budget, queue, work)
    for job in group if queue.finished(work) == len(group[0].todo) else ():
        merge_manifest(store, texts, shard_size, (job.key, {**job.entry, "sites": job.scorer.sites}))


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
    store: Path,
    group: Sequence[Job],
    texts: TextSet,
    tokens: Tokens,
    token_budget: int,
    queue: ShardQueue,
    work: str,
) -> None:
    """Score the missing shards that this process gets, one shard in memory at a time, each written as soon as it is whole."""
    todo, scorers = group[0].todo, [job.scorer for job in group]
    names = ", ".join(scorer.teacher.name for scorer in scorers)
    pad_id, device = scorers[0].teacher.pad_id, next(scorers[0].teacher.model.parameters()).device
    num_texts = sum(shard.stop - shard.start for shard in todo)
    if num_texts < len(texts):
        log.info("teacher %s: %d of %d texts were scored before", names, len(texts) - num_texts, len(texts))
    tree = trunk_tree(scorers) if len(group) > 1 else None
    mine = 0
    with progress(num_texts, f"scoring {names}") as bar:
        for shard in (todo[number] for number in queue.take(work, len(todo))):
            ids = texts.example_ids[shard.start : shard.stop].astype(np.int64)
            shards = [empty_shard(ids, len(scorer.teacher.labels)) for scorer in scorers]
            for batch in token_budget_batches(tokens.lengths[shard.start : shard.stop], token_budget):
                queue.check()
                inputs = collate(tokens, shard.start + batch, pad_id)
                inputs = (
                    inputs["input_ids"].to(device),
                    inputs["attention_mask"].to(device),
                    torch.from_numpy(ids[batch]),
                )
                results = score_together(scorers, *inputs, tree) if tree is not None else [scorers[0].score(*inputs)]
                for scorer, tensors, result in zip(scorers, shards, results, strict=True):
                    for name in (*MATRICES, *VECTORS):
                        tensors[name][batch] = getattr(result, name).float().cpu().numpy()
                    _check_numbers(scorer.teacher.name, texts.source, tensors, batch)
                mine += len(batch)
                bar.advance(queue.advance(work, len(batch)) - bar.done)
            for job, tensors in zip(group, shards, strict=True):
                write_shard(store / job.key, shard, job.key, tensors)
    if queue.world_size > 1:
        log.info("process %d scored %d of %d texts with %s", queue.rank, mine, num_texts, names)


def empty_shard(example_ids: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Room for the results of one shard, by name."""
    count = len(example_ids)
    tensors = {name: np.empty((count, num_classes), np.float32) for name in MATRICES}
    tensors |= {name: np.empty(count, np.float32) for name in VECTORS}
    return tensors | {"example_ids": example_ids}


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
    """Fill or complete the store `config.output` with `config.teachers` over `config.texts`; under torchrun with all processes."""
    rank, world_size = init_distributed(resolve_device(config.device), config.verbose) if "RANK" in os.environ else (0, 1)
    with log_file(Path(config.output) / "logs", rank, world_size) if world_size > 1 else nullcontext():
        texts = read_texts(
            config.texts, text_column=config.text_column, label_column=config.label_column, limit=config.limit
        )
        return fill_store(config.output, config.teachers, texts, config, ShardQueue(group=world_size > 1))


def main(config: ScoreConfig) -> int:
    """`muka-fast score`: score, then say how certain each teacher was and how often it was the most certain one."""
    try:
        sup = score(config)
    finally:
        shut_down()
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
