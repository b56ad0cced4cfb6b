"""Supervision as the methods read it: the statistics of all teachers over all texts, loaded from the store and verified.

n texts · N teachers (i) · S columns of all teachers · C_i classes of teacher i.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from muka_fast.console import Progress, progress
from muka_fast.errors import UserError
from muka_fast.features import Features, teacher_features
from muka_fast.memory import sharers
from muka_fast.selection import UNCERTAINTY
from muka_fast.shard_queue import ShardQueue
from muka_fast.store import (
    FEATURES,
    OPTION_KEYS,
    VECTORS,
    VERIFIED,
    DamagedShard,
    ShardRange,
    check_texts,
    differing_options,
    is_adaptive,
    read_manifest,
    read_or_refuse,
    read_shard,
    shard_ranges,
    shards_there,
)

if TYPE_CHECKING:
    from muka_fast.data import TextSet
    from muka_fast.labels import LabelSpace


log = logging.getLogger("muka_fast")
READERS = 16  # threads of a process that verify shards
FEW_FILES = 256  # verified within seconds
COLUMNS = ("logits", "mean_probs")  # fields of a Supervision that are [n, S]
PER_TEACHER = (*VECTORS, "total_variance")  # those that are [n, N]


@dataclass(frozen=True)
class Supervision:
    """All teachers' statistics over all texts, in the order of the text set. n texts, N teachers, S columns of all
    teachers.

    logits, mean_probs (None where it was not asked for) fp32 [n, S]; predictive_entropy, expected_entropy in nats and
    total_variance (the variances of the probabilities, summed over all classes of the teacher) fp32 [n, N]; example_ids
    int64 [n]; teachers: manifest entries (name, labels, fingerprint, mc, ...); offsets: teacher i owns columns
    offsets[i]:offsets[i + 1]. Entropies and total_variance are those of the full label set, also after `restrict`.
    num_samples int64 [n]: passes that each text got under --mc_stop, of every teacher; None: mc_samples for all. features:
    per teacher what its output layer reads, [n, D_i], on disk until a method asks for it; None where the supervision comes
    from no store.
    """

    logits: Tensor
    mean_probs: Tensor | None
    predictive_entropy: Tensor
    expected_entropy: Tensor
    total_variance: Tensor
    example_ids: Tensor
    teachers: Sequence[dict[str, Any]]
    offsets: list[int]
    features: Sequence[Features] | None = field(default=None, repr=False)
    num_samples: Tensor | None = None
    label_space: LabelSpace | None = field(default=None, repr=False)

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
        if torch.equal(columns, torch.arange(self.offsets[-1])):  # none is dropped: no copy, which may be gigabytes
            return replace(self, label_space=label_space)
        logits = self.logits[:, columns]
        mean = None if self.mean_probs is None else self.mean_probs[:, columns]
        for a, b in zip(label_space.offsets[:-1], label_space.offsets[1:], strict=True):
            block = logits[:, a:b]
            block.masked_fill_((block == -torch.inf).all(-1, keepdim=True), 0.0)
            if mean is not None:
                mass = mean[:, a:b].sum(-1, keepdim=True)
                mean[:, a:b] = torch.where(mass > 0, mean[:, a:b] / mass, torch.softmax(block, dim=-1))
        return replace(
            self,
            logits=logits,
            mean_probs=mean,
            offsets=list(label_space.offsets),
            label_space=label_space,
        )


# ---- reading a whole store ----


def verify_shards(store: Path, manifest: dict[str, Any], keys: Sequence[str], queue: ShardQueue) -> None:
    """Verify the shards of these teachers, each of them in one process of the queue, whose word the others take for a file of the same
    size and time. What is damaged or missing is met by whoever reads it. Collective.

    Of ten million texts and 50 teachers a terabyte, which else every process would read and hash.
    """
    n, size = manifest["texts"]["count"], manifest["shard_size"]
    entries, readers = manifest["teachers"], {}
    for key in keys:
        readers[key] = shard_reader(store / key, key, len(entries[key]["labels"]), is_adaptive(entries[key]), ("example_ids",))

    ended = threading.Event()

    def share(files: Sequence[tuple[str, int]], bar: Progress | None) -> None:
        for place in queue.take("verify", len(files)):
            if ended.is_set():
                return
            key, number = files[place]
            if key in readers:  # else this process has read the manifest before another job added the teacher
                with contextlib.suppress(FileNotFoundError, DamagedShard):
                    readers[key](ShardRange(number, number * size, min((number + 1) * size, n)))
            done = queue.advance("verify", 1)
            if bar is not None:
                bar.advance(done - bar.done)

    threads = max(1, min(READERS, (os.cpu_count() or 1) // sharers(torch.device("cpu"))))
    with queue, ThreadPoolExecutor(threads) as pool:
        files = queue.agree("files", lambda: [(key, number) for key in keys for number in shards_there(store / key)])
        before = set(VERIFIED)
        with progress(len(files), "verifying", "shards") if len(files) > FEW_FILES else contextlib.nullcontext() as bar:
            try:
                for work in [pool.submit(share, files, None if thread else bar) for thread in range(threads)]:
                    work.result()
            finally:  # of Ctrl-C the threads know nothing
                ended.set()
        VERIFIED.update(*queue.gather(VERIFIED - before))


def load_supervision(
    store: Path, manifest: dict[str, Any], keys: Sequence[str], names: Sequence[str] | None = None, mean_probs: bool = True
) -> Supervision:
    """All shards of these teachers, verified, in one piece; names replace those in the manifest. mean_probs: whether they are
    wanted, of ten million texts gigabytes that `--target mc_mean` alone reads.

    Raises UserError naming the first missing or damaged shard.
    """
    entries = [dict(manifest["teachers"][key]) for key in keys]
    for entry, name in zip(entries, names or (), strict=bool(names)):
        entry["name"] = name
    counts = [len(entry["labels"]) for entry in entries]
    offsets = [0, *np.cumsum(counts).tolist()]
    n, size, adaptive = manifest["texts"]["count"], manifest["shard_size"], check_company(store, entries)
    last = (n - 1) // size
    for key, count in zip(keys, counts, strict=True):  # before memory is taken for n texts: a damaged manifest may hold any number
        read = shard_reader(store / key, key, count, adaptive, ("example_ids",))
        read_or_refuse(store / key, ShardRange(last, last * size, n), read)
    ranges, features = shard_ranges(n, size), []
    matrices = {name: torch.empty(n, offsets[-1]) for name in COLUMNS if mean_probs or name != "mean_probs"}
    wanted = (*matrices, *VECTORS, "var_probs", "example_ids", *(["num_samples"] if adaptive else []))  # features are most of a shard
    vectors = {name: torch.empty(n, len(keys)) for name in PER_TEACHER}
    ids = torch.empty(n, dtype=torch.int64)
    num_samples = torch.empty(n, dtype=torch.int64) if adaptive else None
    for i, key in enumerate(keys):
        read = shard_reader(store / key, key, counts[i], adaptive, wanted)
        of_features = shard_reader(store / key, key, counts[i], adaptive, (FEATURES,))
        features.append(teacher_features(store / key, ranges, entries[i]["name"], of_features))
        for shard in ranges:
            tensors = read_or_refuse(store / key, shard, read)
            rows = slice(shard.start, shard.stop)
            tensors["total_variance"] = tensors["var_probs"].sum(-1)
            for name in matrices:
                matrices[name][rows, offsets[i] : offsets[i + 1]] = torch.from_numpy(tensors[name])
            for name in vectors:
                vectors[name][rows, i] = torch.from_numpy(tensors[name])
            found = torch.from_numpy(tensors["example_ids"])
            if i == 0:
                ids[rows] = found
            elif not torch.equal(ids[rows], found):
                raise UserError(
                    f"{shard.path(store / key)}: its example ids differ from those of the other teachers of the store"
                )
            if adaptive:
                num_samples[rows] = torch.from_numpy(tensors["num_samples"])
    tensors = {"mean_probs": None, **matrices, **vectors, "example_ids": ids, "num_samples": num_samples}
    return Supervision(**tensors, teachers=entries, offsets=offsets, features=features)


def shard_reader(
    folder: Path, key: str, num_classes: int, adaptive: bool, only: Sequence[str] = ()
) -> Callable[[ShardRange], dict[str, np.ndarray]]:
    """`read_shard` of one teacher."""
    return lambda shard: read_shard(folder, shard, key, num_classes, adaptive, only)


def check_company(store: Path, entries: Sequence[dict[str, Any]]) -> bool:
    """Whether these teachers were scored under --mc_stop. Raises UserError where they were not all scored together: then
    they made different numbers of passes of a text, and the stated error is not that of a choice between them."""
    companies = {tuple(entry["company"]) if is_adaptive(entry) else () for entry in entries}
    if companies == {()}:
        return False
    if len(companies) > 1 or len(next(iter(companies))) != len(entries):
        names = ", ".join(entry["name"] for entry in entries)
        raise UserError(
            f"--store {store}: its teachers ({names}) were not scored together under --mc_stop; name --teachers to score them so, "
            "or give --mc_stop exact"
        )
    return True


def open_store(
    store: str | Path,
    texts: TextSet | None = None,
    options: dict[str, Any] | None = None,
    names: Sequence[str] = (),
    mean_probs: bool = True,
    queue: ShardQueue | None = None,
) -> Supervision:
    """Every complete teacher of a store, or those with these names in this order, without running or even finding a teacher; all else
    as `chosen_teachers` and `load_supervision`. With the queue of a process group every process calls this."""
    store, queue = Path(store), queue or ShardQueue()
    with queue:
        manifest, keys = chosen_teachers(store, texts, options or {}, names)
    seed = (options or {}).get("run_seed")
    if others := [entry for entry in map(manifest["teachers"].get, keys) if entry["mc"] and seed not in (None, entry["run_seed"])]:
        told = ", ".join(f"{entry['name']} {entry['run_seed']}" for entry in others)
        log.info("%s: scores of another --seed than %d: %s", store, seed, told)
    verify_shards(store, manifest, keys, queue)
    with queue:
        return load_supervision(store, manifest, keys, mean_probs=mean_probs)


def chosen_teachers(
    store: Path, texts: TextSet | None, options: dict[str, Any], names: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The manifest of a store, and the keys of its teachers that are meant.

    texts: refuse a store of other texts. options: only teachers scored with these values of OPTION_KEYS; a differing
    run_seed is accepted where it leaves no choice, so that students of several seeds can share a store.
    Raises UserError where there is no store, nothing complete, nothing with these options, one teacher under several option sets, or
    several of one name, which may be one before and after its files changed.
    """
    manifest = read_manifest(store)
    if manifest is None or not manifest["teachers"]:
        raise UserError(
            f"--store {store} holds no completely scored teacher: fill it with "
            f"`muka-fast score --teachers ... --output {store}`"
        )
    if texts is not None:
        check_texts(store, manifest, texts)
    entries = manifest["teachers"]
    known = list(dict.fromkeys(entry["name"] for entry in entries.values()))
    for name in names:
        if name not in known:
            raise UserError(f"--store_teachers {name}: {store} holds no teacher of this name (it has {', '.join(known)})")
    if names:
        entries = {key: entry for key, entry in entries.items() if entry["name"] in names}
    differences = {key: differing_options(entry, options) for key, entry in entries.items()}
    candidates: dict[str, list[str]] = {}
    for key, entry in entries.items():
        if set(differences[key]) <= {"run_seed"}:
            candidates.setdefault(entry["fingerprint"], []).append(key)
    if not candidates:
        key, differing = min(differences.items(), key=lambda pair: len(pair[1]))
        shown = ", ".join(f"{name} {entries[key][name]!r} (this run: {options[name]!r})" for name in differing)
        raise UserError(
            f"--store {store} holds no teacher scored with these options: {entries[key]['name']!r} has {shown}; "
            "give --teachers to score them again, or the options of the store"
        )
    keys = [_only(store, found, entries, differences) for found in candidates.values()]
    there = [entries[key]["name"] for key in keys]
    for key, entry in entries.items():
        if not names and entry["name"] not in there:
            shown = ", ".join(f"{option} {entry[option]!r} (this run: {options[option]!r})" for option in differences[key])
            log.warning("--store %s: %s is left out, as it was scored with %s", store, entry["name"], shown)
    for name in names or there:
        if list(names).count(name) > 1:
            raise UserError(f"--store_teachers: {name} is given twice; name every teacher once")
        if there.count(name) > 1:
            raise UserError(
                f"--store {store} holds several teachers named {name!r}, or one before and after its files changed: "
                "give --teachers to say which is meant"
            )
        if name not in there:
            raise UserError(f"--store_teachers {name}: {store} holds it only with other options ({', '.join(OPTION_KEYS)})")
    return manifest, [keys[there.index(name)] for name in names] if names else keys


def _only(store: Path, keys: list[str], entries: dict[str, Any], differences: dict[str, list[str]]) -> str:
    """The one key of a teacher that is meant: the only one, or the only one of the seed that was asked for."""
    same_seed = [key for key in keys if not differences[key]]
    if len(keys) > 1 and len(same_seed) == 1:
        keys = same_seed
    if len(keys) > 1:
        differing = [name for name in OPTION_KEYS if len({json.dumps(entries[key][name]) for key in keys}) > 1]
        if len({json.dumps(entries[key].get("company")) for key in keys}) > 1:
            differing.append("teachers scored with it")
        raise UserError(
            f"--store {store} holds teacher {entries[keys[0]]['name']!r} under several options "
            f"({', '.join(differing) or 'tokenizer'}): name --teachers, or give the options that differ"
        )
    return keys[0]
