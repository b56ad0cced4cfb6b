"""The supervision store on disk: file format and integrity checks. Over 400 lines: the format stands here as a whole.

    STORE/manifest.json                          what the store holds
    STORE/.lock                                  held while the manifest is merged
    STORE/<teacher key>/shard-00000.safetensors  one row range of one teacher
    STORE/neutral-<key>/shard-00000.safetensors  one row range of an encoder's neutral features (neutral.py)
    STORE/tokens-<key>/shard-00000.safetensors   one row range of a tokenizer's token ids (pool_tokens.py)
    STORE/logs/rank0.log                         what each of several processes said, where `muka-fast score` ran in them

Invariants, each with a test:
1.  A store belongs to one text set (fingerprint over example ids and texts) and one shard_size; both are fixed by its
    first writer.
2.  Shard j holds the rows [j * shard_size, min((j + 1) * shard_size, count)) of the text set, in that order, and
    nothing else.
3.  The teacher key is a hash of everything that determines a teacher's numbers: its fingerprint (configuration and
    every weight), its tokenizer, the texts, max_length, scoring_precision and, where passes are stochastic, run seed,
    mc_samples, mc_scope and mc_dropout_p; under --mc_stop also its level, its measure and the company: the teachers that
    decide together how many passes a text gets. Batch sizes, devices, file paths and the order of the teachers are not in it.
4.  Tensors of a shard, C = classes of the teacher: logits, mean_probs, var_probs fp32 [rows, C], predictive_entropy,
    expected_entropy fp32 [rows] in nats, example_ids int64 [rows], features fp16 [rows, D], what the output layer reads;
    under --mc_stop also num_samples int64 [rows], the passes behind the statistics. All are finite, save logits of -inf.
5.  A shard's metadata name format, teacher key and row range and hold a SHA-256 of its tensors: a shard is whole or
    it is recognised as damaged. Equal content gives equal files. A damaged shard is named and computed again, never read.
6.  Files appear by os.replace under a name unique to the writer, so a reader sees no half file and two writers of one
    shard do no harm: both wrote the same numbers.
7.  The manifest is merged under the lock and names a teacher only after its last shard: a named teacher is complete.
8.  Teachers and option sets are added beside each other; nothing is deleted or rewritten, damaged shards excepted.
9.  The manifest is plain JSON, the shards are safetensors: reading a store runs no code from it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from muka_fast.errors import UserError
from muka_fast.files import lock

if TYPE_CHECKING:
    from muka_fast.data import TextSet

log = logging.getLogger("muka_fast")
FORMAT = 1
MANIFEST = "manifest.json"
METADATA = "muka_fast"  # the one metadata entry of a shard, JSON
SCORE_AGAIN = "run `muka-fast score` with the same teachers, texts and options to compute it again"
LEFT_S = 3600.0  # an aside-file of this age is left over
MATRICES = ("logits", "mean_probs", "var_probs")
VECTORS = ("predictive_entropy", "expected_entropy")
FEATURES = "features"
# Half precision halves what is by far the largest tensor. Rules compare distances between features, and an error of 2^-11 of a
# value is far below the spread of a class: against fp32 it changed no selection of muka-evidence in 6 of 8 pools of real
# teachers, and 0.1 and 0.3 % in the others. Values beyond its range are cut to it.
FEATURE_TYPE = np.float16
# What tells two option sets of one teacher apart; order as shown in messages.
OPTION_KEYS = ("max_length", "mc", "mc_samples", "mc_scope", "mc_dropout_p", "mc_stop", "scoring_precision", "run_seed")


# ---- keys ----


def teacher_key(entry: dict[str, Any], texts_fingerprint: str) -> str:
    """Folder name of one teacher under one option set (invariant 3): 16 hex digits."""
    stochastic = ("run_seed", "mc_samples", "mc_scope", "mc_dropout_p") if entry["mc"] else ()
    parts = {name: entry[name] for name in ("fingerprint", "tokenizer_key", "max_length", "mc", *stochastic)}
    parts |= {"format": FORMAT, "texts": texts_fingerprint}
    if entry["scoring_precision"] != "fp32":  # keys are older than the option
        parts["scoring_precision"] = entry["scoring_precision"]
    if is_adaptive(entry):
        parts |= {"mc_stop": entry["mc_stop"], "company": entry.get("company")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def is_adaptive(entry: dict[str, Any]) -> bool:
    """Whether --mc_stop decided per text how many passes these scores are of."""
    return bool(entry["mc"]) and entry["mc_stop"] is not None


def company_of(entries: Sequence[dict[str, Any]], texts_fingerprint: str) -> list[str]:
    """What stands for the teachers of one adaptive run, in any order: the keys that they would have without --mc_stop, sorted."""
    return sorted(teacher_key(entry | {"mc_stop": None}, texts_fingerprint) for entry in entries)


# ---- writing files ----


def write_atomically(path: Path, content: bytes) -> None:
    """Write aside, flush to the disk, then rename. Raises UserError when the disk is full or not writable; leaves
    nothing behind."""
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{_process_space()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: the disk is full; make room (or choose another folder) and run the same command again: "
                "finished shards are kept"
            ) from error
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def remove_leftovers(folder: Path) -> None:
    """Delete the aside-files of processes of this machine that no longer run.

    Of another container under the same name, whose processes are not seen here, those that are older than any writing takes.
    """
    if not Path("/proc/self").exists():
        return
    for path in folder.glob(f".*.{socket.gethostname()}.*.tmp"):
        space, pid = path.name.split(".")[-4:-2]
        with contextlib.suppress(FileNotFoundError):
            ended = not Path("/proc", pid).exists() if space == _process_space() else time.time() - path.stat().st_mtime > LEFT_S
            if pid.isdigit() and ended:
                path.unlink()


def _process_space() -> str:
    """What a process id means something in: the number of the kernel's name space, 0 where it has none."""
    with contextlib.suppress(OSError):
        return str(os.stat("/proc/self/ns/pid").st_ino)
    return "0"


def _digest(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


# ---- shards ----


class DamagedShard(Exception):
    """Why a shard file cannot be believed."""


@dataclass(frozen=True)
class ShardRange:
    """Shard number and the rows [start, stop) of the text set that it holds."""

    number: int
    start: int
    stop: int

    def path(self, folder: Path) -> Path:
        return folder / f"shard-{self.number:05d}.safetensors"


def default_shard_size(count: int) -> int:
    """Texts per shard where nobody says: enough shards for several processes, and no more files than that needs.

    A function of the texts alone, as a batch never crosses shards: so the numbers do not depend on the processes.
    """
    return min(4096, max(256, -(-count // 16)))


def shard_ranges(count: int, shard_size: int) -> list[ShardRange]:
    """The row ranges of `count` texts in shards of `shard_size` (the last one may be smaller)."""
    return [ShardRange(j, a, min(a + shard_size, count)) for j, a in enumerate(range(0, count, shard_size))]


def shards_there(folder: Path) -> list[int]:
    """The numbers of the shards that a folder has files of, whole or not."""
    numbers = (path.stem.removeprefix("shard-") for path in folder.glob("shard-*.safetensors"))
    return sorted(int(number) for number in numbers if number.isdigit())


def _identity(shard: ShardRange, key: str) -> dict[str, Any]:
    return {"format": FORMAT, "teacher": key, "start": shard.start, "stop": shard.stop}


def write_shard(folder: Path, shard: ShardRange, key: str, tensors: dict[str, np.ndarray]) -> None:
    """Write one shard atomically (invariants 2, 4, 5, 6)."""
    note = {**_identity(shard, key), "sha256": _digest(tensors)}
    # One entry: safetensors writes several in random order, and equal shards shall be equal files.
    write_atomically(shard.path(folder), save(tensors, {METADATA: json.dumps(note)}))


def half(values: np.ndarray) -> np.ndarray:
    """Features as they are stored: fp16, cut to its range; NaN stays NaN."""
    limit = np.finfo(FEATURE_TYPE).max
    return np.clip(values, -limit, limit).astype(FEATURE_TYPE)


def read_shard(
    folder: Path, shard: ShardRange, key: str, num_classes: int, adaptive: bool = False, only: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Read and verify one shard; adaptive: of a run under --mc_stop; only: the tensors to give (all, where none is named). Raises
    FileNotFoundError where there is none, DamagedShard where it breaks invariant 2, 4 or 5."""
    rows = shard.stop - shard.start
    shapes = {name: ((rows, num_classes), np.float32) for name in MATRICES}
    shapes |= {name: ((rows,), np.float32) for name in VECTORS} | {"example_ids": ((rows,), np.int64)}
    shapes[FEATURES] = ((rows, None), FEATURE_TYPE)
    shapes |= {"num_samples": ((rows,), np.int64)} if adaptive else {}
    return read_tensors(folder, shard, key, shapes, only)


VERIFIED: set[tuple] = set()  # files that `read_tensors` has found whole, or another process of this job: path, size, time, key


def read_tensors(
    folder: Path,
    shard: ShardRange,
    key: str,
    shapes: dict[str, tuple[tuple[int | None, ...], type]],
    only: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Read the tensors of one shard, or `only` some of them, and verify all by `shapes`; an extent None may be any. Of a file in
    VERIFIED, which has not changed since, `only` these are read, and no checksum is made anew.

    Raises FileNotFoundError where there is none, DamagedShard where it breaks invariant 2, 4 or 5.
    """
    path = shard.path(folder)
    try:
        state = path.stat()
        seen = (str(path), state.st_size, state.st_mtime_ns, key)
        with safe_open(path, framework="np") as file:
            known = seen in VERIFIED
            note = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            tensors = {name: file.get_tensor(name) for name in (known and only) or file.keys()}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).partition("\n")[0] or repr(error)
        raise DamagedShard(f"not a readable safetensors file ({reason})") from error
    if not isinstance(note, dict) or not (known or note.get("sha256") == _digest(tensors)):
        raise DamagedShard("checksum does not match")
    if {name: value for name, value in note.items() if name != "sha256"} != _identity(shard, key):
        raise DamagedShard("it belongs to another teacher, option set or row range")
    for name, (shape, dtype) in shapes.items():
        if known and only and name not in only:
            continue
        found = tensors.get(name)
        fits = found is not None and found.dtype == dtype and found.ndim == len(shape)
        if not fits or any(wanted not in (None, there) for wanted, there in zip(shape, found.shape, strict=True)):
            raise DamagedShard(f"tensor {name!r} is missing or has another shape or type")
    VERIFIED.add(seen)
    return {name: tensors[name] for name in only} if only else tensors


def missing_shards(folder: Path, ranges: Sequence[ShardRange], read: Callable[[ShardRange], object]) -> list[int]:
    """The numbers of the shards that `read` does not find, or finds damaged (those are named)."""
    missing = []
    for shard in ranges:
        try:
            read(shard)
            continue
        except FileNotFoundError:
            pass  # missing, as its number says
        except DamagedShard as error:
            log.warning("%s is damaged (%s): computing it again", shard.path(folder), error)
        missing.append(shard.number)
    return missing


def read_or_refuse(
    folder: Path, shard: ShardRange, read: Callable[[ShardRange], dict[str, np.ndarray]], way_out: str = SCORE_AGAIN
) -> dict[str, np.ndarray]:
    """`read(shard)`; raises UserError that names a missing or damaged shard of `folder` and how to get it back."""
    try:
        return read(shard)
    except (FileNotFoundError, DamagedShard) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged: {error}"
        raise UserError(f"{shard.path(folder)} {what}; {way_out}") from error


# ---- manifest ----


def read_manifest(store: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is no store yet. Raises UserError where it cannot be understood."""
    path = store / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable manifest ({error}); restore it or choose another folder") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise UserError(f"{path}: store format {found!r}, this version reads {FORMAT}; choose another folder")
    problem = _manifest_problem(manifest)
    if problem:
        raise UserError(f"{path}: {problem}; restore it or choose another folder")
    return manifest


def _manifest_problem(manifest: dict[str, Any]) -> str | None:
    texts, teachers, size = manifest.get("texts"), manifest.get("teachers"), manifest.get("shard_size")
    if (
        not isinstance(texts, dict)
        or not isinstance(texts.get("fingerprint"), str)
        or not _is_count(texts.get("count"))
    ):
        return "'texts' is incomplete"
    if not _is_count(size):
        return "'shard_size' is not a positive integer"
    if not isinstance(teachers, dict):
        return "'teachers' is not a table"
    for key, entry in teachers.items():
        fields = {*OPTION_KEYS, "name", "fingerprint", "tokenizer_key", "labels"}
        if not isinstance(entry, dict) or any(name not in entry for name in fields):
            return f"teacher {key!r} is incomplete"
        labels = entry["labels"]
        if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
            return f"teacher {key!r} has no list of labels"
        if (
            not isinstance(entry["name"], str)
            or not isinstance(entry["mc"], bool)
            or not _is_count(entry["mc_samples"])
        ):
            return f"teacher {key!r} has values of the wrong type"
        company = entry.get("company") if is_adaptive(entry) else []
        if not isinstance(company, list) or not all(isinstance(member, str) for member in company):
            return f"teacher {key!r} has no list of the teachers scored with it"
        if teacher_key(entry, texts["fingerprint"]) != key:
            return f"teacher {key!r} does not match its own fingerprints and options"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@contextlib.contextmanager
def _locked(store: Path) -> Iterator[None]:
    try:
        store.mkdir(parents=True, exist_ok=True)
        file = open(store / ".lock", "a")  # noqa: SIM115 - closed below
    except OSError as error:
        rather = ", or have `train` learn from what it holds, without --teachers" if (store / MANIFEST).exists() else ""
        raise UserError(f"{store}: the store cannot be written ({error.strerror or error}); name another folder{rather}") from error
    with file:
        lock(file)
        yield


def merge_manifest(
    store: Path, texts: TextSet, shard_size: int, teacher: tuple[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Create the manifest, or add one complete teacher (key, entry) to it; returns what is now on disk (invariants 1,
    7, 8).

    Raises UserError, with the difference, where the store holds other texts, and for a model's folder.
    """
    if (store / "config.json").exists():
        raise UserError(f"{store}: a model's folder cannot hold scores; name another one")
    with _locked(store):
        remove_leftovers(store)
        known = read_manifest(store)
        described = {
            "fingerprint": texts.fingerprint,
            "count": len(texts.texts),
            "source": texts.source,
            "num_blank": texts.num_blank,
        }
        manifest = known or {"format": FORMAT, "texts": described, "shard_size": shard_size, "teachers": {}}
        check_texts(store, manifest, texts)
        if teacher is not None:
            manifest["teachers"][teacher[0]] = teacher[1]
        if known is None or teacher is not None:
            write_atomically(store / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    return manifest


def order_teachers(store: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Have the manifest name these teachers in this order, in the places that they take in it; returns it.

    Its order is that of the teachers (and so of the classes) for whoever opens the store without naming them.
    """
    with _locked(store):
        manifest = read_manifest(store)
        entries, wished = manifest["teachers"], iter(keys)
        order = [next(wished) if key in keys else key for key in entries]
        if order != list(entries):
            manifest["teachers"] = {key: entries[key] for key in order}
            write_atomically(store / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    return manifest


def take_over(old: Path, store: Path, texts: TextSet) -> bool:
    """Give `store`, where nothing is, the shards of the store `old` if it is one of these texts; whether that was done.

    Both have the same files then, which nobody writes to (invariant 6): `old` stays whole. The manifest names no teacher before a run
    asks for it, so that whoever opens the store has the teachers of that run.
    """
    if store.exists():
        return False
    try:
        manifest = read_manifest(old)
        if manifest is None or manifest["texts"]["fingerprint"] != texts.fingerprint:
            return False
        shutil.copytree(old, store, copy_function=os.link, ignore=shutil.ignore_patterns(MANIFEST, "logs", ".*"))
    except (UserError, OSError) as error:  # a file system without links among them
        log.info("the scores in %s cannot be taken over (%s)", old, error)
        shutil.rmtree(store, ignore_errors=True)
        return False
    merge_manifest(store, texts, manifest["shard_size"])
    return True


def check_texts(store: Path, manifest: dict[str, Any], texts: TextSet) -> None:
    """Raises UserError where the manifest describes other texts than these."""
    have = manifest["texts"]
    if have["fingerprint"] != texts.fingerprint:
        raise UserError(
            f"{store} holds the scores of other texts: {have['count']} of {have.get('source')!r} "
            f"(fingerprint {have['fingerprint'][:12]}), this run has {len(texts.texts)} of {texts.source!r} "
            f"({texts.fingerprint[:12]}); give the same --texts, --text_column and --limit, or another folder (a run's own is "
            "replaced by --overwrite)"
        )


def differing_options(entry: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """Names of the options that differ, where they matter: a deterministic pass has no samples, scope, p or seed."""
    names = OPTION_KEYS if options.get("mc", entry["mc"]) and entry["mc"] else ("max_length", "mc", "scoring_precision")
    return [name for name in names if name in options and entry[name] != options[name]]
