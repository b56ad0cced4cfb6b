"""Small files that are whole or not there: written aside, then renamed, so that a reader sees the old one or the new one; files that
the disk has confirmed; a folder for one process alone."""

import contextlib
import errno
import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from muka_fast.errors import UserError

LOCK = ".lock"


def _write(aside: Path, lines: Iterable[str]) -> None:
    """UTF-8, and the disk confirms it: else a loss of power may leave an empty file under the name that it gets next."""
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """UTF-8."""
    aside = path.with_name(path.name + ".partial")
    try:
        _write(aside, [text])
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_beside_others(path: Path, lines: Iterable[str], replace: bool) -> None:
    """UTF-8, in a folder of the user's, where nothing else is touched. Raises UserError where the file is there, unless `replace`: it
    has appeared while the lines were made, which then lie beside it."""
    path = path.resolve()  # a link stays one
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        _write(aside, lines)
        if not replace:
            path.open("x").close()
    except FileExistsError as error:
        raise UserError(f"{path}: has appeared meanwhile and stays as it is; what was to be written is in {aside}") from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    try:
        os.replace(aside, path)
    except OSError:
        for half in (aside, *[path] * (not replace)):
            half.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def is_write_error(error: BaseException) -> bool:
    """Whether the disk, not the program, is at fault: OSError, or what the Rust writers of weights and tokenizers raise."""
    text = str(error)
    return isinstance(error, OSError) or "os error" in text or "I/O error" in text or os.strerror(errno.ENOSPC) in text


def sync_folder(folder: Path) -> None:
    """Have the disk confirm every file of a folder, and the folder."""
    sync(*folder.rglob("*"), folder)


def sync(*paths: Path) -> None:
    """Have the disk confirm files, and the names in folders."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def open_weights(folder: Path) -> None:
    """Give the weight files the usual rights: safetensors makes them for the owner alone, whatever the umask."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def lock(file: IO, wait: bool = True) -> None:
    """Lock an open file until it is closed. Raises BlockingIOError where another process has it and `wait` is false, and UserError
    where the file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise UserError(f"{file.name}: its file system has no locks; mount it with flock or name a folder elsewhere") from error


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder for this process alone, by a lock on its LOCK. Raises BlockingIOError where another process holds it."""
    path = folder / LOCK
    while True:
        file = open(path, "a")  # noqa: SIM115 - closed below
        try:
            lock(file, wait=False)
        except (OSError, UserError):
            file.close()
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its last holder removed it between our opening and our lock
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
