"""Filling the shards of a store: which are missing, the batches of texts, teachers that run together, and waves of passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from muka_fast.adaptive import Crew, run_waves, token_batches
from muka_fast.console import progress
from muka_fast.data import MAX_PADDING, TextSet, Tokens, collate, cut_length, token_budget_batches
from muka_fast.errors import NOT_FINITE, UserError
from muka_fast.memory import Fetch, replica_budget_bytes, token_budget
from muka_fast.pool_tokens import PoolTokens
from muka_fast.shard_queue import ShardQueue
from muka_fast.shared import score_together, trunk_tree
from muka_fast.store import (
    FEATURE_TYPE,
    FEATURES,
    MATRICES,
    VECTORS,
    ShardRange,
    half,
    is_adaptive,
    merge_manifest,
    missing_shards,
    read_shard,
    remove_leftovers,
    shard_ranges,
    write_shard,
)
from muka_fast.teachers import Teacher
from muka_fast.trunk import StochasticTeacher, TeacherScores

if TYPE_CHECKING:
    from muka_fast.config import ScoringOptions

log = logging.getLogger("muka_fast")
Tensors = dict[str, np.ndarray]  # of one shard, by name
Fill = Callable[[], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One teacher with shards to compute. scorer: None where a `Crew` loads it."""

    key: str
    entry: dict[str, Any]
    scorer: StochasticTeacher | None
    todo: list[ShardRange]


@dataclass(frozen=True)
class Scoring:
    """What all teachers of one scoring run have in common."""

    store: Path
    texts: TextSet
    device: torch.device
    shard_size: int
    max_length: int
    token_budget: int | None
    queue: ShardQueue

    def tokens_of(self, teacher: Teacher) -> PoolTokens:
        max_length = cut_length(self.max_length, teacher.max_length, f"teacher {teacher.name}")
        return PoolTokens(self.texts, teacher.tokenizer, max_length, self.store)

    def missing_shards(self, key: str, entry: dict[str, Any]) -> list[ShardRange]:
        """The shards of a teacher that are not there, or damaged (those are named)."""
        folder, ranges = self.store / key, shard_ranges(len(self.texts), self.shard_size)
        remove_leftovers(folder)
        read = lambda shard: read_shard(folder, shard, key, len(entry["labels"]), is_adaptive(entry), ("example_ids",))
        # Agreed on: others may have written shards by the time that this process looks.
        return [ranges[number] for number in self.queue.agree(key, lambda: missing_shards(folder, ranges, read))]

    def score_together(self, group: Sequence[Job]) -> None:
        """Compute the missing shards of related teachers (or of one)."""
        scorers, todo, work = [job.scorer for job in group], group[0].todo, " ".join(job.key for job in group)
        if todo:
            pool, pad_id = self.tokens_of(scorers[0].teacher), scorers[0].teacher.pad_id
            budget = token_budget(self.token_budget, scorers[0].teacher.model, self.device)
            tree = trunk_tree(scorers) if len(scorers) > 1 else None  # which reads every weight
            # A GPU is given all that fits at once: packed teachers compute nothing of the padding, and small steps wait for the host.
            packed = self.device.type == "cuda" and all(scorer.fast is not None for scorer in scorers)
            most_padding = 1.0 if packed else MAX_PADDING

        def score(tokens: Tokens, ids: np.ndarray, shards: Sequence[Tensors], done: Callable[[int], None]) -> Fill:
            batches = token_budget_batches(tokens.lengths, budget, most_padding)
            results = []
            for batch in batches:
                inputs = collate(tokens, batch, pad_id)
                results.append(score_together(scorers, inputs["input_ids"], inputs["attention_mask"], ids[batch], tree))
                done(len(batch))

            rows, on_the_way = np.concatenate(batches), [fetched(parts) for parts in zip(*results, strict=True)]

            def fill() -> None:
                for job, tensors, scores in zip(group, shards, on_the_way, strict=True):
                    self._keep(job, tensors, rows, TeacherScores(*(part.tensor() for part in scores)))

            return fill

        self._compute(group, todo, work, lambda shard: pool.shard(shard), score)

    def score_in_waves(self, crew: Crew, jobs: Sequence[Job], options: ScoringOptions) -> None:
        """`score_together` for all teachers under --mc_stop: the passes of as many texts as fit are kept until these are decided."""
        numbers = sorted({shard.number for job in jobs for shard in job.todo})
        todo = [shard_ranges(len(self.texts), self.shard_size)[number] for number in numbers]
        pools, settings = [], []
        for i in range(len(jobs) if todo else 0):
            teacher = crew[i].teacher
            pools.append(self.tokens_of(teacher))
            settings.append((teacher.pad_id, token_budget(self.token_budget, teacher.model, self.device)))
            del teacher  # gone before the next one is loaded
        rule = options.mc_samples, options.mc_stop, options.uncertainty
        text_bytes = 4 * options.mc_samples * sum(len(job.entry["labels"]) for job in jobs)
        at_once = max(1, replica_budget_bytes(torch.device("cpu")) // text_bytes)

        def score(found: list[Tokens], ids: np.ndarray, shards: Sequence[Tensors], done: Callable[[int], None]) -> Fill:
            for first in range(0, len(ids), at_once):
                part = np.arange(first, min(first + at_once, len(ids)))
                batches = [token_batches(tokens, *setting, part) for tokens, setting in zip(found, settings, strict=True)]
                results, counts = run_waves(crew, batches, torch.from_numpy(ids[part]), *rule)
                for job, tensors, result in zip(jobs, shards, results, strict=True):
                    self._keep(job, tensors, part, result)
                    tensors.setdefault("num_samples", np.empty(len(ids), np.int64))[part] = counts.numpy()
                done(len(part))
            return lambda: None

        self._compute(jobs, todo, " ".join(job.key for job in jobs), lambda shard: [pool.shard(shard) for pool in pools], score)

    def _compute(
        self,
        jobs: Sequence[Job],
        todo: Sequence[ShardRange],
        work: str,
        tokens_of: Callable[[ShardRange], T],
        score: Callable[[T, np.ndarray, Sequence[Tensors], Callable[[int], None]], Fill],
    ) -> None:
        """Every shard that this process gets, written as soon as it is whole; once all are, the manifest.

        score(the shard's tokens, example ids, its tensors of each job, done): tells `done` how many texts it did, again and again;
        what it returns fills the tensors, and may wait for the device.
        """
        names, num_texts, mine = ", ".join(job.entry["name"] for job in jobs), sum(s.stop - s.start for s in todo), 0
        if 0 < num_texts < len(self.texts):
            log.info("teacher %s: %d of %d texts were scored before", names, len(self.texts) - num_texts, len(self.texts))

        def done(count: int) -> None:
            nonlocal mine
            mine += count
            bar.advance(self.queue.advance(work, count) - bar.done)
            self.queue.check()

        open_of = [set(job.todo) for job in jobs]

        def begin(number: int, tokens: T) -> Fill:
            shard = todo[number]
            ids = self.texts.example_ids[shard.start : shard.stop].astype(np.int64)
            shards = [empty_shard(ids, len(job.entry["labels"])) for job in jobs]
            fill = score(tokens, ids, shards, done)

            def write() -> None:
                fill()
                for job, still_open, tensors in zip(jobs, open_of, shards, strict=True):
                    if shard in still_open:
                        write_shard(self.store / job.key, shard, job.key, tensors)

            return write

        with progress(num_texts, f"scoring {names}") if todo else nullcontext() as bar:
            all_done = self.queue.work(work, len(todo), lambda number: tokens_of(todo[number]), begin, self.device)
        if todo and self.queue.world_size > 1:
            log.info("process %d scored %d of %d texts with %s", self.queue.rank, mine, num_texts, names)
        if all_done:
            for job in jobs:
                merge_manifest(self.store, self.texts, self.shard_size, (job.key, job.entry))

    def _keep(self, job: Job, tensors: Tensors, rows: np.ndarray, scores: TeacherScores) -> None:
        """Put the scores of a batch into its shard. NaN must never turn into certainty: refused here, whatever produced it."""
        if FEATURES not in tensors:
            tensors[FEATURES] = np.empty((len(tensors["example_ids"]), scores.features.shape[1]), FEATURE_TYPE)
        tensors[FEATURES][rows] = half(scores.features.float().cpu().numpy())
        for part in (*MATRICES, *VECTORS):
            tensors[part][rows] = getattr(scores, part).float().cpu().numpy()
        good = ~(np.isnan(tensors["logits"][rows]) | np.isposinf(tensors["logits"][rows])).any(-1)
        for part in (*MATRICES[1:], *VECTORS, FEATURES):
            good &= np.isfinite(tensors[part][rows]).reshape(len(rows), -1).all(-1)
        if not good.all():
            example = int(tensors["example_ids"][rows[~good][0]])
            raise UserError(
                f"teacher {job.entry['name']!r}: its output for text {example} of {self.texts.source!r} (row, counted from 0) is NaN "
                f"or infinite; {NOT_FINITE}"
            )


def fetched(parts: Sequence[TeacherScores]) -> list[Fetch]:
    """The fields of several batches' scores, each as one. Given to the device here, before what comes next: copies that another thread
    asks for later stand behind the next shard, and the device then waits while this one is written."""
    return [Fetch(torch.cat(values)) for values in zip(*(vars(part).values() for part in parts), strict=True)]


def empty_shard(example_ids: np.ndarray, num_classes: int) -> Tensors:
    """Room for the scores of one shard; features come with the first batch, which tells their width."""
    count = len(example_ids)
    tensors = {name: np.empty((count, num_classes), np.float32) for name in MATRICES}
    tensors |= {name: np.empty(count, np.float32) for name in VECTORS}
    return tensors | {"example_ids": example_ids}
