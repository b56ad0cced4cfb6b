"""The scoring run: fills the supervision store teacher by teacher, resumably. Memory: the largest teacher, not their sum."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from muka_fast import adapters, checkpoint
from muka_fast.adaptive import WAVE, Crew, sampling_summary
from muka_fast.config import given_alike
from muka_fast.console import log_file, quiet_transformers
from muka_fast.data import TextSet, read_texts
from muka_fast.engine import init_distributed, resolve_device
from muka_fast.errors import UserError
from muka_fast.group import check_alike, one_job, told_once
from muka_fast.memory import check_kernels, device_of, teacher_budget_bytes, tell_precision
from muka_fast.placement import memory_limits, weight_bytes
from muka_fast.scoring import Job, Scoring
from muka_fast.seeds import seed_of
from muka_fast.shard_queue import ShardQueue
from muka_fast.shared import tie_shared_weights, trunk_tree
from muka_fast.sites import Site, active_probabilities, num_site_layers, sites_of_config
from muka_fast.store import (
    OPTION_KEYS,
    company_of,
    default_shard_size,
    differing_options,
    merge_manifest,
    order_teachers,
    read_manifest,
    teacher_key,
)
from muka_fast.stored import Supervision, load_supervision, verify_shards
from muka_fast.teachers import DTYPES, Teacher, TeacherFiles, check_teachers, load_teacher, teacher_names
from muka_fast.trunk import StochasticTeacher

if TYPE_CHECKING:
    from muka_fast.config import ScoreConfig, ScoringOptions

log = logging.getLogger("muka_fast")
FAMILY_BYTES = 1 << 20  # of the largest tensor; whether layers are equal is found out from all of them


def fill_store(
    store: str | Path,
    teacher_paths: Sequence[str],
    texts: TextSet,
    options: ScoringOptions,
    queue: ShardQueue | None = None,
    mean_probs: bool = True,
) -> Supervision:
    """Score the texts with every teacher that the store does not hold completely yet; returns all, in the order given.

    Killed runs continue at the next missing shard; damaged shards are named and computed again; a teacher that is
    complete under the same options is read, not run, nor loaded where its files alone tell so (`TeacherFiles.tokenizer_key`). Each
    distinct tokenizer tokenises the texts once. Teachers run one after another, save those that have their lowest layers in
    common: these run together, the common part once.
    Under --mc_stop they take turns, since all of them decide together when a text has had enough passes.
    With the queue of a process group every process calls this, and each text is scored by one of them; by default this
    process does all. mean_probs: as of `load_supervision`.
    Raises UserError for bad teachers, a store of other texts, a full disk, or a teacher whose logits are not numbers.
    """
    store, queue, names = Path(store), queue or ShardQueue(), teacher_names(teacher_paths)
    with queue:
        files = check_teachers(teacher_paths)
        read = {"texts": texts.fingerprint} | {f"teacher {name}": found.fingerprint for name, found in zip(names, files, strict=True)}
        theirs = queue.agree("read", lambda: read)
        if other := [what for what in read if read[what] != theirs.get(what)]:
            raise UserError(f"process {queue.rank} reads other files of {', '.join(other)} than another one: all must read the same")
        if options.mc:
            check_sites(names, files, options)
        wished = options.shard_size or default_shard_size(len(texts))
        shard_size = queue.agree("shard_size", lambda: merge_manifest(store, texts, wished)["shard_size"])
        if (manifest := read_manifest(store)) is None:
            raise UserError(f"{store} is not visible here: --store and --output must lie on a file system that all nodes share")
        if shard_size != wished:
            log.info("%s was begun with --shard_size %d, which stays", store, shard_size)
        if (shards := -(-len(texts) // shard_size)) < queue.world_size:
            told = "%d of %d processes have no texts to score: %d texts are %d shards of --shard_size %d"
            log.warning(told, queue.world_size - shards, queue.world_size, len(texts), shards, shard_size)
    there = [key for key, entry in manifest["teachers"].items() if _is_one_of(entry, files, options)]
    verify_shards(store, manifest, there, queue)
    with queue:
        device = device_of(options.device)
        tell_precision("--scoring_precision", options.scoring_precision, device)
        sizes = {"shard_size": shard_size, "max_length": options.max_length, "token_budget": options.token_budget}
        run = Scoring(store, texts, torch.device(device), queue=queue, **sizes)
        score_all = _score_adaptively if options.mc and options.mc_stop is not None else _score_in_turn
        keys = score_all(run, teacher_paths, names, files, options)
    with queue:
        manifest = order_teachers(store, keys)
    verify_shards(store, manifest, keys, queue)
    with queue:
        sup = load_supervision(store, manifest, keys, names, mean_probs)
    if sup.num_samples is not None:
        told = sampling_summary(sup.num_samples, options.mc_samples)
        log.info(
            "--mc_stop %g: %.1f of %d passes a text, %.0f %% saved",
            options.mc_stop, told["mean_samples"], options.mc_samples, 100 * told["samples_saved"],
        )  # fmt: skip
    return sup


def _is_one_of(entry: dict[str, Any], files: Sequence[TeacherFiles], options: ScoringOptions) -> bool:
    """Whether an entry of the manifest is of these teachers and options; whether of their tokenizers, its key tells later."""
    return any(entry["fingerprint"] == found.fingerprint for found in files) and not differing_options(entry, option_values(options))


def _score_in_turn(
    run: Scoring, paths: Sequence[str], names: Sequence[str], files: Sequence[TeacherFiles], options: ScoringOptions
) -> list[str]:
    """This process's share of the work, teacher by teacher, those of a family together; returns the teachers' keys."""
    families, device = [family_of(found) for found in files], run.device
    dtype = DTYPES[options.scoring_precision]
    keys, group, family = [""] * len(names), [], None
    for i in sorted(range(len(names)), key=lambda i: families.index(families[i])):
        if files[i].tokenizer_key is not None and _is_complete(run, job := _job_of(run, names[i], files[i], options)):
            keys[i] = job.key
            continue
        fits = lambda found: memory_limits(weight_bytes(found.folder, dtype), device, options.teacher_gib) is None
        if group and (families[i] != family or not fits(files[i])):
            run.score_together(group)
            group = []  # gone before the next one is loaded
        family = families[i]
        teacher = _load(paths[i], names[i], device, options)
        job = _job_of(run, names[i], teacher, options)
        keys[i] = job.key
        if _is_complete(run, job):
            continue
        scorer = _scorer(teacher, options)
        job = replace(job, entry=job.entry | {"sites": scorer.sites}, scorer=scorer)
        del teacher, scorer
        if group and not _related(group[0], job):
            run.score_together(group)
            group = []
        group.append(job)
        del job
        if len(group) > 1:
            tie_shared_weights([member.scorer for member in group])
    if group:
        run.score_together(group)
    return keys


def _score_adaptively(
    run: Scoring, paths: Sequence[str], names: Sequence[str], files: Sequence[TeacherFiles], options: ScoringOptions
) -> list[str]:
    """`_score_in_turn` under --mc_stop: shard by shard, wave by wave, teacher by teacher."""
    if options.mc_samples <= WAVE:
        log.warning("--mc_stop %g saves nothing: every text gets %d passes, here all, before the first look", options.mc_stop, WAVE)
    if all(found.tokenizer_key is not None for found in files):
        jobs = _jobs_together(run, [_entry(name, found, options) for name, found in zip(names, files, strict=True)])
        if not any(job.todo for job in jobs) and all(_is_complete(run, job) for job in jobs):
            return [job.key for job in jobs]
    device, dtype = run.device, DTYPES[options.scoring_precision]
    keep = sum(weight_bytes(found.folder, dtype) for found in files) <= teacher_budget_bytes(device)
    if not keep:
        log.info("the %d teachers do not fit into memory together: each is loaded once per wave", len(paths))
    crew = Crew(lambda i: _scorer(_load(paths[i], names[i], device, options), options), keep)
    entries = []
    for i in range(len(paths)):
        scorer = crew[i]
        entries.append({**_entry(names[i], scorer.teacher, options), "sites": scorer.sites})
        del scorer  # gone before the next one is loaded
    jobs = _jobs_together(run, entries)
    run.score_in_waves(crew, jobs, options)
    return [job.key for job in jobs]


def _jobs_together(run: Scoring, entries: Sequence[dict[str, Any]]) -> list[Job]:
    """`_job_of` for all teachers of one adaptive run, whose scores are each of the company of the others."""
    company = company_of(entries, run.texts.fingerprint)
    return [_job_of_entry(run, entry | {"company": company}) for entry in entries]


def check_sites(names: Sequence[str], files: Sequence[TeacherFiles], options: ScoringOptions) -> None:
    """Refuse a teacher in which --mc_scope leaves nothing random, before the scores of those before it take hours."""
    for name, found in zip(names, files, strict=True):
        sites = _sites(found.folder, f"teacher {name}", checkpoint.file_state(found.folder))
        # Without layers of its own every site is used, whatever the scope (StochasticTeacher).
        if sites and (options.mc_scope == "all" or num_site_layers(sites)):
            active_probabilities(sites, options.mc_scope, options.mc_dropout_p, f"teacher {name}")


@cache
def _sites(folder: Path, what: str, _state: tuple) -> list[Site] | None:
    """The dropout sites of a teacher by its configuration, once per state of its files."""
    if adapters.is_adapter(folder) and not (folder / "config.json").is_file():
        folder = adapters.base_folder(folder, what)
    try:
        with quiet_transformers():
            return sites_of_config(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False), what)
    except checkpoint.LOADING_ERRORS:
        return None  # an adapter's broken base: told with all details when its turn comes


def family_of(files: TeacherFiles) -> str:
    """A cheap hash that teachers with common layers share: of the beginning of the largest tensor, the embeddings."""
    what = f"teacher {files.folder}"
    folder = adapters.base_folder(files.folder, what) if adapters.is_adapter(files.folder) else files.folder
    largest = max(checkpoint.read_tensors(folder, what).values(), key=lambda entry: entry.stop - entry.start)
    digest = hashlib.sha256(f"{largest.dtype} {largest.shape}".encode())
    with open(largest.file, "rb") as file:
        file.seek(largest.start)
        digest.update(file.read(min(largest.stop - largest.start, FAMILY_BYTES)))
    return digest.hexdigest()


def _related(first: Job, other: Job) -> bool:
    """Whether two teachers gain from running together: a common trunk, and the same texts to do."""
    return first.todo == other.todo and trunk_tree([first.scorer, other.scorer])[0].teachers == (0, 1)


def _load(path: str, name: str, device: torch.device, options: ScoringOptions) -> Teacher:
    dtype = DTYPES[options.scoring_precision]
    return load_teacher(path, run_seed=options.seed, device=device, dtype=dtype, name=name, most_gib=options.teacher_gib)


def _job_of(run: Scoring, name: str, teacher: Teacher | TeacherFiles, options: ScoringOptions) -> Job:
    """What is left to do for a teacher; without its scorer."""
    return _job_of_entry(run, _entry(name, teacher, options))


def _job_of_entry(run: Scoring, entry: dict[str, Any]) -> Job:
    key = teacher_key(entry, run.texts.fingerprint)
    return Job(key, entry, None, run.missing_shards(key, entry))


def _is_complete(run: Scoring, job: Job) -> bool:
    """Whether the store holds a teacher completely, which is told."""
    known = read_manifest(run.store)["teachers"].get(job.key)
    if job.todo or known is None:
        return False
    name = job.entry["name"]
    log.info("teacher %s: already scored%s", name, "" if known["name"] == name else f", as {known['name']}")
    return True


def _entry(name: str, teacher: Teacher | TeacherFiles, options: ScoringOptions) -> dict[str, Any]:
    """What the manifest says of a teacher, its sites excepted."""
    return {
        "name": name,
        "fingerprint": teacher.fingerprint,
        "tokenizer_key": teacher.tokenizer_key,
        "labels": list(teacher.labels),
        "seed": seed_of(options.seed, teacher.fingerprint),
        **option_values(options),
    }


def _scorer(teacher: Teacher, options: ScoringOptions) -> StochasticTeacher:
    names = ("mc_scope", "mc_dropout_p", "mc_samples", "mc")
    return StochasticTeacher(teacher, **{name: getattr(options, name) for name in names})


def option_values(options: ScoringOptions) -> dict[str, Any]:
    """The options that determine a teacher's numbers, under the names of OPTION_KEYS."""
    values = {name: options.seed if name == "run_seed" else getattr(options, name) for name in OPTION_KEYS}
    if options.mc_stop is not None:  # which passes a text gets depends on the measure too
        values["mc_stop"] = f"{options.mc_stop:g} of {options.uncertainty}"
    return values


def score(config: ScoreConfig) -> Supervision:
    """Fill or complete the store `config.output` with `config.teachers` over `config.texts`; under torchrun with all processes."""
    launched = "RANK" in os.environ
    with told_once():
        device = resolve_device(config.device) if launched else device_of(config.device)
        check_kernels(device)
    rank, world_size = init_distributed(device, config.verbose) if launched else (0, 1)
    if launched:
        check_alike(given_alike(config))
    with log_file(Path(config.output) / "logs", rank, world_size) if world_size > 1 else nullcontext():
        with told_once():
            texts = read_texts(config.texts, text_column=config.text_column, label_column=None, limit=config.limit)
        return fill_store(config.output, config.teachers, texts, config, ShardQueue(group=world_size > 1), mean_probs=False)


def main(config: ScoreConfig) -> int:
    """`muka-fast score`: score, then say how certain each teacher was and how often it was the most certain one."""
    with one_job():
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
