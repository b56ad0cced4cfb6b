"""Training checkpoints of a run: written aside and renamed, checksummed, rotated; the last two whole ones exist until it is complete.

`checkpoints/step-00000040/` holds `state-*.safetensors` (weights and moments, whole tensors), and `state.json`: the engine's state
and the SHA-256 of each file. A folder without a suffix is complete; one that is damaged is found by its checksums, and renamed
`.damaged` when a resume passes it over.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from muka_fast.engine import Engine
from muka_fast.errors import UserError
from muka_fast.files import is_write_error, sync_folder, write_json
from muka_fast.group import on_first_process, told_once
from muka_fast.outputs import discard_replaced

log = logging.getLogger("muka_fast")
KEPT = 2
STEP = re.compile(r"step-(\d{8})")


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def snapshots(output: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = output / "checkpoints"
    return sorted(entry for entry in folder.iterdir() if STEP.fullmatch(entry.name)) if folder.is_dir() else []


def save_snapshot(engine: Engine, output: Path) -> None:
    """Checkpoint the engine and drop all but the last two. Collective. Raises UserError where the disk is full."""
    final = output / "checkpoints" / f"step-{engine.completed_steps:08d}"
    partial = final.with_name(final.name + ".partial")
    with told_once(), writing(final, partial):
        if engine.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with told_once(), writing(final, partial):
        state = engine.save_checkpoint(partial)
        if state is not None:
            files = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
            write_json(partial / "state.json", {"engine": state, "sha256": files})
            sync_folder(partial)
            if final.exists():  # the same step, saved before a resume: the same content
                shutil.rmtree(final)
            os.replace(partial, final)
            rotate(output)


@contextlib.contextmanager
def writing(final: Path, partial: Path) -> Iterator[None]:
    """Leaves no half checkpoint behind, and tells a full disk in one line."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not is_write_error(error):
            raise
        raise UserError(
            f"{final}: the checkpoint cannot be written ({error}); free some space, then continue with --resume"
        ) from error


def rotate(output: Path) -> None:
    for old in snapshots(output)[:-KEPT]:
        # Renamed first: a removal that is cut off must not leave something that looks whole.
        doomed = old.with_name(old.name + ".partial")
        os.replace(old, doomed)
        shutil.rmtree(doomed)


def discard(output: Path) -> None:
    """Remove all checkpoints."""
    folder = output / "checkpoints"
    if folder.exists():
        shutil.rmtree(folder)


def discard_unfinished(output: Path) -> None:
    """Remove what only an unfinished run needs: its checkpoints, and the run that it replaces."""
    discard(output)
    discard_replaced(output)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = dict(state["sha256"])
        if not isinstance(state["engine"]["completed_steps"], int) or not files:
            return "state.json is incomplete"
        for name, digest in files.items():
            if Path(name).name != name or not (folder / name).is_file():
                return f"{name} is missing"
            if file_digest(folder / name) != digest:
                return f"{name} does not match its checksum"
        surplus = {path.name for path in folder.glob("state-*.safetensors")} - files.keys()
        return f"{min(surplus)} does not belong to it" if surplus else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"state.json cannot be read ({error})"


def newest_whole(output: Path) -> Path | None:
    """The newest checkpoint whose files match their checksums; damaged ones are named and passed over."""
    for leftover in (output / "checkpoints").glob("*.partial"):
        shutil.rmtree(leftover)
    for folder in reversed(snapshots(output)):
        problem = damage(folder)
        if problem is None:
            return folder
        log.warning("%s is damaged (%s): going back to the one before", folder, problem)
        # Out of the count: else it would take the place of a whole one when older ones are dropped.
        aside = folder.with_name(folder.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    return None


def restore_newest(engine: Engine, output: Path) -> Path | None:
    """Continue from the newest whole checkpoint, if there is one; returns it. Collective."""
    folder = on_first_process(lambda: newest_whole(output))
    if folder is None:
        return None
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    engine.load_checkpoint(folder, state["engine"])
    return folder
