"""The one place for log lines, progress (bars on a terminal, a plain line every tenth of the way elsewhere) and tables."""

import contextlib
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from muka_fast import __version__
from muka_fast.errors import LoneError, UserError

log = logging.getLogger("muka_fast")

# Libraries that talk at INFO or WARNING about things a user of muka-fast cannot act on.
CHATTY = (
    "accelerate",
    "transformers",
    "datasets",
    "huggingface_hub",
    "httpx",
    "urllib3",
    "filelock",
    "DeepSpeed",
    "deepspeed",
    "torch",
)
PLAIN_LINE_SECONDS = 5.0
# Shorter work gets no line of its own outside of terminals.
QUIET_SECONDS = 2.0

_state: dict[str, Any] = {"rank": 0, "console": None}


class _PlainFormatter(logging.Formatter):
    """`warning: ...` for what matters, the bare message otherwise."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return f"{record.levelname.lower()}: {message}" if record.levelno >= logging.WARNING else message


def console() -> Any:
    """The rich console on stderr that log lines and bars share (stdout is left to results)."""
    if _state["console"] is None:
        from rich.console import Console

        _state["console"] = Console(stderr=True, highlight=False)
    return _state["console"]


def stdout_console() -> Any:
    """The rich console on stdout, where results go; names from outside are never read as markup."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 120)


def new_table(title: str, *columns: str) -> Any:
    """An empty rich table in the style of all of them."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD)


def fill(table: Any, rows: Sequence[Sequence[object]]) -> Any:
    """Add rows of plain text, or of rich.text.Text, to a table; returns it."""
    from rich.text import Text

    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return table


def setup_logging(verbose: bool = False, rank: int = 0) -> None:
    """Send the log of muka_fast to stderr and quiet other libraries; processes with rank != 0 show errors only.

    Call it once, before transformers, datasets or deepspeed are imported, so that their own settings follow.
    """
    _state["rank"] = rank
    if console().is_terminal:
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(console=console(), show_time=False, show_path=False, show_level=True)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_PlainFormatter("%(message)s"))
    handler.setLevel(logging.ERROR if rank else logging.NOTSET)
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else tokenizers turn their threads off after a fork
    if verbose:
        return
    warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated", category=FutureWarning)  # peft's use of it
    # Read by the libraries when they are imported; a user's own setting stays.
    for variable, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(variable, value)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
        sys.modules["transformers"].utils.logging.set_verbosity_error()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own reports and bars off the screen: what matters in them is raised or logged by us."""
    from transformers import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


@contextlib.contextmanager
def first_of_node_tells() -> Iterator[None]:
    """Around what the processes of a job check before they are connected: one a node tells bad input, all end with exit code 2. A
    `LoneError` is told by whoever meets it."""
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0" and not isinstance(error, LoneError):
            raise SystemExit(2) from error
        raise


@contextlib.contextmanager
def log_file(folder: Path, rank: int, world_size: int) -> Iterator[None]:
    """Also append what this process logs, with the time, to `folder`/rank<N>.log, and what ends the block if an error does.

    From INFO on, as the command line has it: what a Python caller's logging would not have let pass goes to the file alone. One block
    at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank{rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.handleError = lambda record: None  # a full disk is told by whoever writes results
    tell = lambda level, message, error=None: handler.handle(
        log.makeRecord(log.name, level, "", 0, message, (), error and (type(error), error, error.__traceback__))
    )
    own, wanted = log.level, log.getEffectiveLevel()

    def for_all(record: logging.LogRecord) -> bool:
        if record.levelno < wanted:
            handler.handle(record)
        return record.levelno >= wanted

    log.addFilter(for_all)
    log.setLevel(min(wanted, logging.INFO))
    log.addHandler(handler)
    tell(logging.INFO, f"process {rank} of {world_size} on {platform.node()}, pid {os.getpid()}, muka_fast {__version__}")
    try:
        yield
    except SystemExit as end:
        tell(logging.INFO, f"ended by another process, exit code {end.code}")
        raise
    except UserError as error:
        tell(logging.ERROR, str(error))
        raise
    except BaseException as error:
        tell(logging.ERROR, f"ended by {type(error).__name__}", error)
        raise
    finally:
        log.removeHandler(handler)
        log.removeFilter(for_all)
        log.setLevel(own)
        with contextlib.suppress(OSError):  # the same full disk, met by what was not flushed
            handler.close()


class Progress:
    """Progress over `total` units; made by `progress`, a context manager."""

    def __init__(self, total: int, description: str, unit: str):
        self.total, self.description, self.unit = total, description, unit
        self.done, self.note = 0, ""
        self._bar, self._task = None, None

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        self._last_done = 0
        if _state["rank"] == 0 and console().is_terminal:
            from rich import progress as bars

            self._bar = bars.Progress(
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TextColumn("{task.fields[rate]}"),
                bars.TimeRemainingColumn(elapsed_when_finished=True),
                bars.TextColumn("{task.fields[note]}"),
                console=console(),
            )
            self._task = self._bar.add_task(self.description, total=self.total, rate="", note="")
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.done > self._last_done and exc_info[0] is None and time.monotonic() - self._start > QUIET_SECONDS:
            self._line()

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Count `amount` more units as done; `note` (a loss, a file name) is shown beside the bar until the next one."""
        self.done += amount
        self.note = self.note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, rate=self._rate(), note=self.note)
            return
        if self.done - self._last_done >= self.total / 10 and time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._line()

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        return f"{self.done / seconds:.3g} {self.unit}/s"

    def _line(self) -> None:
        self._last_done, self._last_line = self.done, time.monotonic()
        left = ""
        if 0 < self.done < self.total:
            left = f", {(self.total - self.done) * (self._last_line - self._start) / self.done:.0f} s left"
        note = f", {self.note}" if self.note else ""
        done = f"{self.done}/{self.total} ({self.done / self.total:.0%})"
        log.info("%s: %s, %s%s%s", self.description, done, self._rate(), left, note)


def progress(total: int, description: str, unit: str = "texts") -> Progress:
    """Show progress over `total` units:

        with progress(len(texts), "scoring bert") as bar:
            bar.advance(len(batch))

    A bar with rate and time left on a terminal, otherwise a log line about every tenth of the way (at most one in
    5 seconds) and one at the end of work of more than 2; on the screen nothing from processes with rank != 0.
    """
    return Progress(total, description, unit)
