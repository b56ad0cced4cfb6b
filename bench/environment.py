"""What every result is kept with: machine, versions, commit and command; and where it is kept."""

import argparse
import itertools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from muka_fast.errors import UserError
from muka_fast.files import write_text
from muka_fast.ops import tuning

BENCH = Path(__file__).resolve().parent
# gpu.sh --out sets the variable, for all scripts at once.
RESULTS = Path(os.environ.get("BENCH_RESULTS", BENCH / "results"))
PACKAGES = ("muka-fast", "torch", "transformers", "triton", "deepspeed", "numpy")


def command(main: Callable[[], int | None]) -> int:
    """The exit code of a script: of its main, or 2 after one line about bad input."""
    try:
        return main() or 0
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2


def device(name: str) -> str:
    """A script's --device, as a type for argparse: cpu, or cuda where there is a card."""
    if name not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name}: cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no usable CUDA device here")
    return name


def result_file(name: str) -> str:
    """A script's --json, as a type for argparse: a file in a folder that exists, so that nothing is measured in vain."""
    if not Path(name).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name}: there is no folder {Path(name).parent}")
    return name


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def git(*arguments: str) -> str:
    """What git prints, or "" outside a checkout and where there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(BENCH), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"torch": torch.__version__}  # which says whose build it is


def driver() -> str | None:
    """The version of the GPU's driver; None where nvidia-smi does not tell."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def usable_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(device: str = "cpu") -> dict:
    """Machine, versions, commit ("+" where the tree was changed) and command, ready for JSON; device: what was measured."""
    # What bench/tune.py has found on this card may stand in the tree: a result names the entries beside its commit.
    changed = bool(git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)kernels/ops/tuning.py"))
    return {
        "date": date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "driver": driver() if device == "cuda" else None,
        "tuning": tuning.MEASURED.get(tuning.architecture(torch.device("cuda"))) if device == "cuda" else None,
        "versions": versions(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
        "command": shlex.join(["python", *map(portable, sys.argv)]),
    }


def portable(argument: str) -> str:
    """An argument of the command without the absolute path of this checkout, or of wherever else it lies."""
    path, root = Path(argument), BENCH.parent
    if not path.is_absolute():
        return argument
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def markdown_table(rows: list[dict], shown: dict[str, str]) -> str:
    """shown: column -> format of its cells; a dash where a row has no value."""
    lines = ["| " + " | ".join(name.replace("_", " ") for name in shown) + " |", "|---" * len(shown) + "|"]
    for row in rows:
        cells = [form.format(row[name]) if row.get(name) is not None else "–" for name, form in shown.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def machine_name(device: str = "cpu") -> str:
    """Short name for file names: "h200" for a GPU, else the processor and its cores, such as "epyc-2c"."""
    if device == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().replace("nvidia", "")).strip("-").split("-")[0]
    family = re.search(r"epyc|xeon|core|ryzen|apple|graviton|neoverse", cpu_model().lower())
    return f"{family[0] if family else platform.machine()}-{os.cpu_count()}c"


def environment_lines(env: dict) -> str:
    """The environment as the last lines of a Markdown result."""
    packages = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    host = f"{env['cpu']}, {env['cores']} cores, {env['torch_threads']} torch threads"
    machine = f"{env['gpu']} (driver {env['driver']}) beside {host}" if env["gpu"] else host
    return f"\nMeasured {env['date']} on {machine}; {packages}; commit {env['commit']}.\n\n    {env['command']}\n"


def show(stem: str, rows: object, text: str, device: str, json_file: str | None) -> None:
    """Print a table and keep it with its rows, or write the rows alone into `json_file`."""
    print(text)
    if json_file:
        Path(json_file).write_text(json.dumps(rows, indent=1) + "\n")
    else:
        print("kept in", keep(stem, rows, text, device))


def _is_ours(path: Path, env: dict) -> bool:
    """Whether a result may be written here: nothing is, or one of the same command on the same machine."""
    if not path.is_file():
        return True
    there = json.loads(path.read_text(encoding="utf-8"))["environment"]
    return all(there.get(key) == env[key] for key in ("cpu", "gpu", "command"))


def keep(stem: str, results: object, markdown: str, device: str = "cpu", folder: Path = RESULTS) -> Path:
    """Write `<stem>_<machine>_<yyyymm>.json` and `.md` with the environment; returns the Markdown's path. What another processor or
    card of the same short name has left there, or another command, stays: a number follows the name."""
    env = environment(device)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{stem}_{machine_name(device)}_{date.today():%Y%m}"
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    path = next(path for path in (folder / f"{name}.md" for name in names) if _is_ours(path.with_suffix(".json"), env))
    write_text(path.with_suffix(".json"), json.dumps({"environment": env, "results": results}, indent=1) + "\n")
    write_text(path, markdown.rstrip() + "\n" + environment_lines(env))
    return path
