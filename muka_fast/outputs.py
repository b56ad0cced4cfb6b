"""The output folder of a run: whether it may be taken, by one run at a time; the run that it replaces, aside until the new one is
complete; what --overwrite removes, and what it must not."""

import contextlib
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from muka_fast.errors import UserError
from muka_fast.files import LOCK, held

log = logging.getLogger("muka_fast")

PARTIAL, READY = ".export.partial", ".export.ready"  # an export under way
# Any of these shows that a folder belongs to a run (or to an exported model).
RUN_MARKERS = (
    "run.json",
    "run.yaml",
    "config.json",
    "model.safetensors",
    "metrics.jsonl",
    "supervision",
    "checkpoints",
)
RUN_MARKERS += (PARTIAL, READY)
# What a folder that holds a saved model may consist of, tokenizer files of all kinds included.
MODEL_FILES = (
    r"config\.json|generation_config\.json|model.*\.safetensors(\.index\.json)?|tokenizer.*|special_tokens_map\.json|added_tokens\.json"
    r"|.*vocab.*\.(txt|json)|merges\.txt|.*\.model|.*\.codes|dict\.txt|emojis?\.json|word_(shape|pronunciation)\.json"
    r"|chat_template\..*|additional_chat_templates"
)
RUN_FILES = re.compile(
    rf"{MODEL_FILES}|run\.(json|yaml)|metrics\.jsonl|README\.md|report\.html|uncertainty_head\.safetensors|logs|supervision|checkpoints"
    rf"|tensorboard|{re.escape(LOCK)}|{re.escape(PARTIAL)}|{re.escape(READY)}|.*\.partial"
)
LOG_FILES = re.compile(r"rank\d+\.log")
ANY_MODEL = ("config.json", "model.safetensors")  # of the markers: no run has these alone


def check_output(
    output: str | Path, resume: bool = False, overwrite: bool = False, inputs: Sequence[str | Path | None] = ()
) -> bool:
    """Refuse an output folder that `output_guard` would refuse, and change nothing; returns whether it holds a run.

    Called before the inputs are read, so that neither fault waits for the other. Raises UserError.
    """
    given, output = output, Path(output).expanduser()
    try:
        output.resolve()
        if output.is_symlink():
            with contextlib.suppress(FileNotFoundError):
                output.stat()  # tells of links in a circle, which resolve() does before Python 3.13 alone
        if output.exists() and not output.is_dir():
            raise UserError(f"--output {given}: this is a file; name a folder")
        # Logs alone are no run: a refused one leaves them.
        found = sorted({entry.name for entry in output.iterdir()} - {"logs", LOCK}) if output.exists() else []
        if (output / LOCK).exists():
            with held(output):
                pass
    except BlockingIOError as error:
        raise busy(given) from error
    except (OSError, RuntimeError, ValueError) as error:  # Path's own for links in a circle and names with a zero byte
        told = getattr(error, "strerror", None) or error
        raise UserError(f"--output {given}: {told}; name a folder that can be written") from error
    if found and not any((output / marker).exists() for marker in RUN_MARKERS):
        raise UserError(f"--output {given}: holds files that no run wrote ({found[0]}); name a new or empty folder")
    if found == ["supervision"] and (output / "supervision").is_dir() and not overwrite:
        return False  # scores that a refused run left: they serve this one where its texts are the same
    if found and not any((output / marker).exists() for marker in RUN_MARKERS if marker not in ANY_MODEL):
        raise UserError(f"--output {given}: holds a model that no run wrote; name a new or empty folder")
    if found and not (resume or overwrite):
        raise UserError(
            f"--output {given}: already holds a run; continue it with --resume or replace it with --overwrite"
        )
    if found and overwrite:
        check_replaceable(output.resolve(), given, inputs)
        check_own(output, RUN_FILES, given, "no run wrote")
        if (output / "logs").is_dir():
            check_own(output, LOG_FILES, given, "no run wrote", "logs")
    return bool(found)


def output_guard(
    output: str | Path, resume: bool = False, overwrite: bool = False, inputs: Sequence[str | Path | None] = ()
) -> Path:
    """Make the output folder of a run ready, or refuse; returns it, existing. Called when the inputs have been found good.

    An empty or new folder is taken. One that holds a run is continued with `resume`; with `overwrite` it is renamed to a
    sibling `.<name>.replaced`, which `discard_replaced` removes once the new run is complete. inputs: files and folders
    that the new run reads, which must not be moved away so. Raises UserError, and has then changed nothing.
    """
    found = check_output(output, resume, overwrite, inputs)
    given, output = output, Path(output).expanduser()
    try:
        if found and overwrite:
            _set_aside(output.resolve(), given)
        elif resume and not found:
            log.info("no training to resume in %s: starting from the beginning, with whatever scores are there", given)
        output.resolve().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {given}: {error.strerror or error}; name a folder that can be written") from error
    return output


def busy(output: str | Path) -> UserError:
    """What to raise for a folder that another run holds."""
    return UserError(f"--output {output}: another run is writing there; wait for its end or name another folder")


def check_own(folder: Path, own: re.Pattern, given: str | Path, stranger: str, inside: str = "") -> None:
    """Refuse to remove what is not ours: entries of a folder, or of one inside, whose names are others than `own`. stranger: "no run
    wrote"."""
    foreign = sorted(str(entry.relative_to(folder)) for entry in (folder / inside).iterdir() if not own.fullmatch(entry.name))
    if foreign:
        raise UserError(f"--output {given}: --overwrite would remove {foreign[0]}, which {stranger}; name another folder")


def check_replaceable(folder: Path, given: str | Path, inputs: Sequence[str | Path | None]) -> None:
    """Refuse to move away the current folder, a mount point, which cannot be renamed, or anything that the new run reads."""
    if folder.is_mount():
        raise UserError(f"--output {given}: --overwrite cannot replace a mount point; name a folder in it")
    if Path.cwd().is_relative_to(folder):
        raise UserError(f"--output {given}: --overwrite cannot replace the folder that you are in; name another one")
    for path in inputs:
        if path is not None and Path(path).expanduser().resolve().is_relative_to(folder):
            raise UserError(
                f"--output {given}: --overwrite would move away {path}, which this run reads; name another output"
            )


def _asides(folder: Path) -> Iterator[Path]:
    """Where a run may be set aside, in this order."""
    return (folder.with_name(f".{folder.name}.replaced" + (f"-{n}" if n > 1 else "")) for n in itertools.count(1))


def _set_aside(folder: Path, given: str | Path) -> None:
    """Rename a finished or broken run; it stays on the disk until `discard_replaced`."""
    aside = next(path for path in _asides(folder) if not path.exists())
    os.replace(folder, aside)
    folder.mkdir()
    log.info("the run in %s is kept as %s until the new one is complete", given, aside)


def replaced(output: Path) -> list[Path]:
    """The runs that `--overwrite` has set aside and no complete run has replaced yet, in this order.

    By name: whoever may write to a folder may not be allowed to list the one above.
    """
    return list(itertools.takewhile(Path.exists, _asides(output.resolve())))


def tell_of_replaced(output: Path) -> None:
    """The way back to what `--overwrite` has set aside, where the new run ends before it has begun to train."""
    asides = [folder for folder in replaced(output) if (folder / "run.json").exists()]  # not what another refused run left
    if asides and not (output / "run.json").exists():
        log.warning("the run that was to be replaced is whole: to have it back, remove %s and rename %s to it", output, asides[-1])


def discard_replaced(output: str | Path) -> None:
    """Remove what `--overwrite` had set aside; to be called when the new run is complete."""
    for folder in reversed(replaced(Path(output).expanduser())):  # so that one that is killed leaves no gap
        shutil.rmtree(folder)
