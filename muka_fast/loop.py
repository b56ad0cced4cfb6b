"""The training loop: which texts each step sees, one step whose gradient no layout changes, metrics, checkpoints, signals to stop."""

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from muka_fast import runinfo
from muka_fast.aligned import StudentOutput
from muka_fast.config import RunConfig
from muka_fast.console import progress
from muka_fast.data import TextSet, Tokens, collate, epoch_batches
from muka_fast.engine import Engine
from muka_fast.errors import UserError
from muka_fast.group import gather, on_first_process, told_by_first
from muka_fast.memory import Fetch
from muka_fast.seeds import seed_of
from muka_fast.snapshots import restore_newest, save_snapshot
from muka_fast.targets import Method
from muka_fast.training_layers import NextTexts

log = logging.getLogger("muka_fast")
# Seconds between two checkpoints where nobody says --save_every: at the least, since of short epochs they would take their share; and
# at the most, since of a long epoch a kill would take all.
SAVE_S, MOST_S = 60.0, 1800.0
SAVE, STOP = 0.5, 1.0  # what processes ask for at a step: the first one a checkpoint, any of them to stop; their sum is told to all


class Plan:
    """Which texts each step sees: a pure function of lengths, batch size and seed, so that a resumed run sees the same."""

    def __init__(self, lengths: np.ndarray, config: RunConfig) -> None:
        self.lengths, self.config = lengths, config
        self.steps_per_epoch = -(-len(lengths) // config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self._epoch, self._batches = -1, []

    def rows(self, step: int) -> np.ndarray:
        """Text rows of the global batch of this step, int64, shortest first."""
        epoch = step // self.steps_per_epoch
        if epoch != self._epoch:
            self._epoch = epoch
            self._batches = epoch_batches(self.lengths, self.config.batch_size, self.config.seed, epoch)
        rows = self._batches[step % self.steps_per_epoch]
        return rows[np.argsort(self.lengths[rows], kind="stable")]


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """The signals to stop that have arrived so far: SIGTERM, or Ctrl-C, of which a second one ends at once. Only the main thread can
    listen; what a shell ignores for us (Ctrl-C, of a job in the background) stays ignored, and what C code handles stays with it."""
    arrived: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return

    def arrive(number: int, _frame: Any) -> None:
        arrived.append(signal.Signals(number))
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])
            log.warning("interrupted: stopping after a checkpoint (Ctrl-C once more: at once, without)")

    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.getsignal(number) for number in heard}
    try:
        for number in heard:
            signal.signal(number, arrive)
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    engine: Engine,
    method: Method,
    tokens: Tokens,
    texts: TextSet,
    plan: Plan,
    config: RunConfig,
    output: Path,
    pad_id: int,
    next_texts: NextTexts,
) -> bool:
    """All steps that are left; False where SIGTERM ended it (after a checkpoint). Raises KeyboardInterrupt, after one, for Ctrl-C.

    next_texts: of `training_layers`.
    """
    if config.resume:
        found = restore_newest(engine, output)
        if found:
            log.info("resuming after step %d of %d (%s)", engine.completed_steps, plan.total_steps, found)
    saved = time.monotonic()

    def save_due(step: int) -> bool:
        if config.save_every and step < plan.total_steps:
            return step % config.save_every == 0
        # At the end too, where the export follows: it is for what may go wrong there.
        return step % plan.steps_per_epoch == 0 and on_first_process(lambda: time.monotonic() - saved >= SAVE_S)

    def asks() -> float:
        overdue = engine.rank == 0 and not config.save_every and time.monotonic() - saved >= MOST_S
        return STOP * bool(arrived) + SAVE * overdue

    with stop_signals() as arrived, Metrics(output, engine, plan, config) as metrics:
        bar = progress(plan.total_steps - engine.completed_steps, "training", "steps")
        with bar if engine.rank == 0 else nullcontext():
            running: list[Step] = []
            while engine.completed_steps < plan.total_steps:
                rows = plan.rows(engine.completed_steps)
                epoch = engine.completed_steps // plan.steps_per_epoch
                masked = lambda rows, epoch=epoch: next_texts(torch.from_numpy(texts.example_ids[rows]), epoch)
                running.append(train_step(engine, method, tokens, rows, config, asks, pad_id, masked))
                save, stop = save_due(engine.completed_steps), False
                # A step's loss is looked at while the next one runs, so that the device never waits for the host; before anything is
                # written, all that are left.
                while len(running) > (0 if save or metrics.due else 1):
                    oldest = running.pop(0)
                    loss, asked = oldest.settle(texts, config)
                    save, stop = save or asked > 0, stop or asked >= STOP
                    metrics.step(oldest.number, loss, len(oldest.rows))
                    if engine.rank == 0:
                        bar.advance(note=f"loss {loss:.4f}")
                if save:
                    save_snapshot(engine, output)
                    saved = time.monotonic()
                if stop:
                    done = engine.completed_steps
                    by = arrived[0].name if arrived else "a signal to another process"
                    log.warning("stopped by %s after step %d of %d; continue with --resume", by, done, plan.total_steps)
                    if signal.SIGINT in arrived:
                        raise KeyboardInterrupt
                    return False
    return True


class Step(NamedTuple):
    """A step of the optimizer that the device may still be at work on. number: from 1 on; rows: its texts, of all processes."""

    number: int
    rows: np.ndarray
    outcome: Fetch  # loss, and what processes asked for
    seen: list[tuple[np.ndarray, torch.Tensor]]  # rows and losses of this process's micro-batches

    def settle(self, texts: TextSet, config: RunConfig) -> tuple[float, float]:
        """Loss, and what processes asked for. Raises UserError where the loss is no number: the weights are spoilt, but not saved."""
        value, asked = self.outcome.read()
        if not np.isfinite(value):
            raise told_by_first(describe_bad_loss(value, self.number, self.seen, texts, config))
        return value, asked


def train_step(
    engine: Engine,
    method: Method,
    tokens: Tokens,
    rows: np.ndarray,
    config: RunConfig,
    asks: Callable[[], float],
    pad_id: int,
    masked: Callable[[np.ndarray], None],
) -> Step:
    """One optimizer step over the global batch `rows`. Nothing in it waits for the device.

    asks: gives what this process asks for, SAVE or STOP. masked: told the rows of every forward.

    The loss is sum_b loss_b / method.denominator(rows): known from the whole batch on every process, so that neither the cut into
    micro-batches nor the number of processes enters the gradient.
    """
    step, denominator = engine.completed_steps, method.denominator(torch.from_numpy(rows))
    parts = np.array_split(rows, engine.micro_batches * engine.world_size)[engine.rank :: engine.world_size]
    total = torch.zeros((), device=engine.device)
    seen: list[tuple[np.ndarray, torch.Tensor]] = []
    for micro, part in enumerate(parts):
        torch.manual_seed(seed_of(config.seed, step, micro, engine.rank) >> 1)  # a dropout that is PyTorch's: a resume needs no state
        used = part if len(part) else rows[:1]  # the last batch may leave a process without texts: it takes part with weight 0
        texts_used = torch.from_numpy(used)
        masked(used)
        batch = collate(tokens, used, pad_id, few_shapes=engine.device.type != "cpu")
        output = engine(**batch, **method.student_inputs(texts_used))
        losses = method.loss(StudentOutput(output.logits.float(), getattr(output, "penalty", None)), texts_used)
        loss = losses.sum() / denominator if len(part) else losses.sum() * 0.0
        total += loss.detach()
        seen.append((used, losses.detach()))
        if micro + 1 == len(parts):
            outcome = engine.sum_both(total, asks())
        engine.backward(loss)
        engine.step()
    return Step(step + 1, rows, outcome, seen)


def describe_bad_loss(
    value: float, step: int, seen: list[tuple[np.ndarray, torch.Tensor]], texts: TextSet, config: RunConfig
) -> str:
    """One line with the example ids behind a loss that is no number, from all processes."""
    mine = [int(texts.example_ids[row]) for rows, losses in seen for row in rows[~torch.isfinite(losses).cpu().numpy()]]
    ids = sorted(set().union(*gather(mine)))
    named = f"for the texts with example ids {', '.join(map(str, ids[:20]))}{' ...' if len(ids) > 20 else ''}" if ids else "in the sum"
    return (
        f"the loss became {value} at step {step} {named} of {texts.source}: check these texts, or lower --learning_rate "
        f"(now {config.learning_rate:g}), and start anew with --overwrite; the scores are kept"
    )


class Metrics:
    """metrics.jsonl and, where TensorBoard is installed, its events: means over the steps since the last line. Process 0 writes."""

    def __init__(self, output: Path, engine: Engine, plan: Plan, config: RunConfig) -> None:
        self.engine, self.plan, self.config = engine, plan, config
        self.path, self.file, self.board = output / "metrics.jsonl", None, None

    def __enter__(self) -> "Metrics":
        if self.engine.rank == 0:
            runinfo.truncate_metrics(self.path, self.engine.completed_steps)
            self.file = open(self.path, "a", encoding="utf-8")
            self.board = runinfo.tensorboard(self.path.parent / "tensorboard", self.engine.completed_steps)
        self._restart()
        return self

    def __exit__(self, fault: type | None, *_: object) -> None:
        with suppress(OSError) if fault else nullcontext():  # closing tries once more what could not be written
            for writer in (self.board, self.file):
                if writer is not None:
                    writer.close()

    def _restart(self) -> None:
        self.losses, self.num_texts, self.start = [], 0, time.perf_counter()

    @property
    def due(self) -> bool:
        """Whether the last completed step ends a line."""
        return self._ends_line(self.engine.completed_steps)

    def _ends_line(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.plan.total_steps

    def step(self, step: int, loss: float, num_texts: int) -> None:
        """Count a completed step; every log_every steps, and at the last one, write a line."""
        self.losses.append(loss)
        self.num_texts += num_texts
        if not self._ends_line(step):
            return
        line = {
            "step": step,
            "epoch": round(step / self.plan.steps_per_epoch, 4),
            "loss": sum(self.losses) / len(self.losses),
            "lr": self.engine.last_lr,
            "grad_norm": self.engine.grad_norm,
            "texts_per_s": round(self.num_texts / (time.perf_counter() - self.start), 2),
        }
        if self.file is not None:
            try:
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()
            except OSError as error:
                way_out = "free some space, then continue with --resume"
                raise UserError(f"{self.path}: {error.strerror or error}; {way_out}") from error
        if self.board is not None:
            for name in ("loss", "lr", "grad_norm", "texts_per_s"):
                if line[name] is not None:
                    self.board.add_scalar(name, line[name], step)
        self._restart()
