"""The scoring run: fills the supervision store teacher by teacher, resumably. Memory: the largest teacher, not their sum."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig

from muka_fast import adapters, checkpoint
from muka_fast.adaptive import Crew, run_waves, sampling_summary, token_batches
from muka_fast.console import progress
from muka_fast.data import TextSet, Tokens, collate, read_texts, token_budget_batches, tokenize
from muka_fast.errors import UserError
from muka_fast.memory import replica_budget_bytes, teacher_budget_bytes
from muka_fast.shared import score_together, tie_shared_weights, trunk_tree
from muka_fast.sites import Site, active_probabilities, num_site_layers, sites_of_config
from muka_fast.store import (
    MATRICES,
    OPTION_KEYS,
    VECTORS,
    DamagedShard,
    ShardRange,
    company_of,
    is_adaptive,
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
from muka_fast.trunk import StochasticTeacher, TeacherScores

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


def fill_store(store: str | Path, teacher_paths: Sequence[str], texts: TextSet, options: ScoringOptions) -> Supervision:
    """Score the texts with every teacher that the store does not hold completely yet; returns all, in the order given.

    Killed runs continue at the next missing shard; damaged shards are named and computed again; a teacher that is
    complete under the same options is read, not run. Each distinct tokenizer tokenises the texts once. Teachers run
    one after another, save those that have their lowest layers in common: these run together, the common part once.
    Under --mc_stop they take turns, since all of them decide together when a text has had enough passes.
    Raises UserError for bad teachers, a store of other texts, a full disk, or a teacher whose logits are not numbers.
    """
    store = Path(store)
    files = check_teachers(teacher_paths)
    if options.mc:
        check_sites(teacher_names(teacher_paths), files, options)
    shard_size = merge_manifest(store, texts, options.shard_size)["shard_size"]
    if shard_size != options.shard_size:
        log.info("%s was begun with --shard_size %d, which stays", store, shard_size)
    if options.mc and options.mc_stop is not None:
        return _fill_adaptively(store, teacher_paths, files, texts, options, shard_size)
    names, families = teacher_names(teacher_paths), [family_of(found) for found in files]
    tokens: dict[str, Tokens] = {}
    keys, group, family = [""] * len(names), [], None
    for i in sorted(range(len(names)), key=lambda i: families.index(families[i])):
        if group and families[i] != family:
            _run(store, group, texts, tokens, options, shard_size)
            group = []  # gone before the next one is loaded
        family = families[i]
        device = device_of(options.device)
        teacher = load_teacher(teacher_paths[i], run_seed=options.seed, device=device, name=names[i])
        job = _prepare(store, teacher, texts, options, shard_size)
        del teacher
        keys[i] = job.key
        if job.scorer is None:
            continue
        if group and not _related(group[0], job):
            _run(store, group, texts, tokens, options, shard_size)
            group = []
        group.append(job)
        del job
        if len(group) > 1:
            tie_shared_weights([member.scorer for member in group])
    if group:
        _run(store, group, texts, tokens, options, shard_size)
    return load_supervision(store, order_teachers(store, keys), keys, names)


def _fill_adaptively(
    store: Path,
    paths: Sequence[str],
    files: Sequence[TeacherFiles],
    texts: TextSet,
    options: ScoringOptions,
    shard_size: int,
) -> Supervision:
    """`fill_store` under --mc_stop: shard by shard, wave by wave, teacher by teacher."""
    names, device = teacher_names(paths), torch.device(device_of(options.device))
    keep = sum(weight_bytes(found) for found in files) <= teacher_budget_bytes(device)
    if not keep:
        log.info("the %d teachers do not fit into memory together: each is loaded once per wave", len(paths))
    crew = Crew(
        lambda i: _scorer(load_teacher(paths[i], run_seed=options.seed, device=device, name=names[i]), options), keep
    )
    entries, ranges = [], shard_ranges(len(texts), shard_size)
    for i in range(len(paths)):
        scorer = crew[i]
        entries.append({**_entry(scorer.teacher, options), "sites": scorer.sites})
        del scorer  # gone before the next one is loaded
    company = company_of(entries, texts.fingerprint)
    jobs = []
    for entry in entries:
        entry["company"] = company
        key = teacher_key(entry, texts.fingerprint)
        remove_leftovers(store / key)
        jobs.append(Job(key, entry, None, _missing_shards(store / key, ranges, key, entry)))
    todo = [shard for shard in ranges if any(shard in job.todo for job in jobs)]
    if todo:
        _score_adaptively(store, crew, jobs, todo, texts, options)
    for job in jobs:
        merge_manifest(store, texts, shard_size, (job.key, job.entry))
    keys = [job.key for job in jobs]
    sup = load_supervision(store, order_teachers(store, keys), keys, names)
    told = sampling_summary(sup.num_samples, options.mc_samples)
    log.info(
        "--mc_stop %g: %.1f of %d passes a text, %.0f %% saved",
        options.mc_stop, told["mean_samples"], options.mc_samples, 100 * told["samples_saved"],
    )  # fmt: skip
    return sup


def _score_adaptively(
    store: Path, crew: Crew, jobs: Sequence[Job], todo: Sequence[ShardRange], texts: TextSet, options: ScoringOptions
) -> None:
    """Score the texts of the shards that some teacher lacks; the passes of as many texts as fit are kept until these are decided."""
    tokens: dict[str, Tokens] = {}
    mine = []
    for i in range(len(jobs)):
        teacher = crew[i].teacher
        if teacher.tokenizer_key not in tokens:  # the key covers the teacher's own limit
            max_length = min(options.max_length, teacher.max_length)
            tokens[teacher.tokenizer_key] = tokenize(teacher.tokenizer, texts.texts, max_length)
        mine.append((tokens[teacher.tokenizer_key], teacher.pad_id))
        del teacher
    device = torch.device(device_of(options.device))
    names = [job.entry["name"] for job in jobs]
    text_bytes = 4 * options.mc_samples * sum(len(job.entry["labels"]) for job in jobs)
    at_once = max(1, replica_budget_bytes(torch.device("cpu")) // text_bytes)
    with progress(sum(shard.stop - shard.start for shard in todo), f"scoring {', '.join(names)}") as bar:
        for shard in todo:
            ids = texts.example_ids[shard.start : shard.stop].astype(np.int64)
            shards = [_empty_shard(ids, len(job.entry["labels"])) for job in jobs]
            num_samples = np.empty(len(ids), np.int64)
            for first in range(0, len(ids), at_once):
                part = np.arange(first, min(first + at_once, len(ids)))
                batches = [token_batches(*found, shard.start + part, options.token_budget, device) for found in mine]
                results, counts = run_waves(crew, batches, torch.from_numpy(ids[part]), options.mc_samples, options.mc_stop)
                num_samples[part] = counts.numpy()
                for name, tensors, result in zip(names, shards, results, strict=True):
                    _keep(name, texts.source, tensors, part, result)
                bar.advance(len(part))
            for job, tensors in zip(jobs, shards, strict=True):
                if shard in job.todo:
                    write_shard(store / job.key, shard, job.key, tensors | {"num_samples": num_samples})


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


def weight_bytes(files: TeacherFiles) -> int:
    """Bytes of a teacher's weights in memory (float32), an adapter's counted as its base's."""
    what = f"teacher {files.folder}"
    folder = adapters.base_folder(files.folder, what) if adapters.is_adapter(files.folder) else files.folder
    return 4 * sum(math.prod(entry.shape) for entry in checkpoint.read_tensors(folder, what).values())


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


def _prepare(store: Path, teacher: Teacher, texts: TextSet, options: ScoringOptions, shard_size: int) -> Job:
    """What is left to do for a teacher; its scorer is None where the store holds it completely."""
    entry = _entry(teacher, options)
    key = teacher_key(entry, texts.fingerprint)
    remove_leftovers(store / key)
    todo = _missing_shards(store / key, shard_ranges(len(texts), shard_size), key, entry)
    if not todo and key in read_manifest(store)["teachers"]:
        log.info("teacher %s: already scored", teacher.name)
        return Job(key, entry, None, todo)
    return Job(key, entry, _scorer(teacher, options), todo)


def _entry(teacher: Teacher, options: ScoringOptions) -> dict[str, Any]:
    """What the manifest says of a teacher, without what is known of its scorer only."""
    return {
        "name": teacher.name,
        "fingerprint": teacher.fingerprint,
        "tokenizer_key": teacher.tokenizer_key,
        "labels": list(teacher.labels),
        "seed": teacher.seed,
        **option_values(options),
    }


def _scorer(teacher: Teacher, options: ScoringOptions) -> StochasticTeacher:
    names = ("mc_scope", "mc_dropout_p", "mc_samples", "mc")
    return StochasticTeacher(teacher, **{name: getattr(options, name) for name in names})


def _run(
    store: Path,
    group: Sequence[Job],
    texts: TextSet,
    tokens: dict[str, Tokens],
    options: ScoringOptions,
    shard_size: int,
) -> None:
    """Compute the missing shards of a group of related teachers (or of one), then name them in the manifest."""
    if group[0].todo:
        teacher = group[0].scorer.teacher
        if teacher.tokenizer_key not in tokens:  # the key covers the teacher's own limit
            max_length = min(options.max_length, teacher.max_length)
            tokens[teacher.tokenizer_key] = tokenize(teacher.tokenizer, texts.texts, max_length)
        _score_shards(store, group, texts, tokens[teacher.tokenizer_key], options.token_budget)
    for job in group:
        merge_manifest(store, texts, shard_size, (job.key, {**job.entry, "sites": job.scorer.sites}))


def option_values(options: ScoringOptions) -> dict[str, Any]:
    """The options that determine a teacher's numbers, under the names of OPTION_KEYS."""
    return {name: options.seed if name == "run_seed" else getattr(options, name) for name in OPTION_KEYS}


def _missing_shards(folder: Path, ranges: Iterable[ShardRange], key: str, entry: dict[str, Any]) -> list[ShardRange]:
    """The shards that are not there or damaged (those are named)."""
    missing = []
    for shard in ranges:
        try:
            read_shard(folder, shard, key, len(entry["labels"]), is_adaptive(entry))
        except FileNotFoundError:
            missing.append(shard)
        except DamagedShard as error:
            log.warning("%s is damaged (%s): computing it again", shard.path(folder), error)
            missing.append(shard)
    return missing


def _score_shards(store: Path, group: Sequence[Job], texts: TextSet, tokens: Tokens, token_budget: int) -> None:
    """Score the texts of the missing shards, one shard in memory at a time, each written as soon as it is whole."""
    todo, scorers = group[0].todo, [job.scorer for job in group]
    names = ", ".join(scorer.teacher.name for scorer in scorers)
    pad_id, device = scorers[0].teacher.pad_id, next(scorers[0].teacher.model.parameters()).device
    num_texts = sum(shard.stop - shard.start for shard in todo)
    if num_texts < len(texts):
        log.info("teacher %s: %d of %d texts were scored before", names, len(texts) - num_texts, len(texts))
    tree = trunk_tree(scorers) if len(group) > 1 else None
    with progress(num_texts, f"scoring {names}") as bar:
        for shard in todo:
            ids = texts.example_ids[shard.start : shard.stop].astype(np.int64)
            shards = [_empty_shard(ids, len(scorer.teacher.labels)) for scorer in scorers]
            for batch in token_budget_batches(tokens.lengths[shard.start : shard.stop], token_budget):
                inputs = collate(tokens, shard.start + batch, pad_id)
                inputs = (
                    inputs["input_ids"].to(device),
                    inputs["attention_mask"].to(device),
                    torch.from_numpy(ids[batch]),
                )
                results = score_together(scorers, *inputs, tree) if tree is not None else [scorers[0].score(*inputs)]
                for scorer, tensors, result in zip(scorers, shards, results, strict=True):
                    _keep(scorer.teacher.name, texts.source, tensors, batch, result)
                bar.advance(len(batch))
            for job, tensors in zip(group, shards, strict=True):
                write_shard(store / job.key, shard, job.key, tensors)


def _empty_shard(example_ids: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    count = len(example_ids)
    tensors = {name: np.empty((count, num_classes), np.float32) for name in MATRICES}
    tensors |= {name: np.empty(count, np.float32) for name in VECTORS}
    return tensors | {"example_ids": example_ids}


def _keep(name: str, source: str, tensors: dict[str, np.ndarray], batch: np.ndarray, scores: TeacherScores) -> None:
    """Put the scores of a batch into its shard. NaN must never turn into certainty: refused here, whatever produced it."""
    for part in (*MATRICES, *VECTORS):
        tensors[part][batch] = getattr(scores, part).float().cpu().numpy()
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
