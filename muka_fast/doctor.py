"""`muka-fast doctor`: what this machine and these teachers offer, what is missing, and the way out."""

import importlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from muka_fast import __version__
from muka_fast.config import DoctorConfig
from muka_fast.console import fill, new_table, stdout_console
from muka_fast.errors import UserError

log = logging.getLogger("muka_fast")

SHOWN_PACKAGES = ("torch", "transformers", "triton", "deepspeed", "datasets", "safetensors", "tokenizers", "numpy")
OPTIONAL_PACKAGES = {
    "peft": "LoRA teachers",
    "accelerate": "teachers over several GPUs, and a full check of all before the first is scored",
    "tensorboard": "TensorBoard events of a run",
}
MARKS = {"ok": "green", "note": "yellow", "broken": "bold red"}
STALE_LOCK_SECONDS = 600  # a build that is still running renews nothing, but rarely takes longer
SCOPES = ("head", "last:1", "all")


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. state: "ok", "note" (works, could be better) or "broken" (something essential)."""

    what: str
    value: str
    state: str = "ok"
    way_out: str = ""


@dataclass(frozen=True)
class TeacherFacts:
    """What is shown of a teacher. sites: (scope, number of sites, their probabilities), for each of SCOPES; of one that cannot be
    split those of "all", which is used. prefixes: content hashes of its leading layers (muka_fast/shared.py)."""

    name: str
    architecture: str
    num_parameters: int
    labels: list[str]
    max_length: int
    fingerprint: str
    tokenizer_key: str
    splits: bool
    sites: list[tuple[str, int, list[float]]]
    prefixes: tuple[str, ...]


def main(config: DoctorConfig) -> int:
    """Print the diagnosis; 0, or 1 where something essential is broken."""
    console = stdout_console()
    findings = [*package_findings(), *machine_findings(), *extension_findings(), *folder_findings()]
    show_findings(console, f"muka_fast {__version__} on this machine", findings)
    ops, op_findings = op_table()
    if ops:
        show_ops(console, ops)
    findings += op_findings
    if config.teachers:
        facts, teacher_findings = examine_teachers(config.teachers)
        findings += teacher_findings
        if facts:
            show_teachers(console, facts)
        op_findings = [*op_findings, *teacher_findings]
    if op_findings:
        show_findings(console, "Findings", op_findings)
    broken = [finding for finding in findings if finding.state == "broken"]
    notes = sum(finding.state == "note" for finding in findings)
    console.print(f"{len(broken)} broken, {notes} to note." if broken or notes else "Everything is in place.")
    return 1 if broken else 0


# ---- the machine ----


def requirements() -> dict[str, Requirement]:
    """Package name -> the range that this version of muka_fast asks for; empty where it is not installed."""
    try:
        lines = importlib.metadata.requires("muka-fast") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    return {item.name: item for item in parsed if "extra" not in str(item.marker or "")}


def package_findings() -> Iterator[Finding]:
    """Python and the packages, by their metadata: nothing heavy is imported for it."""
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    yield Finding(
        "python", f"{version}, {sys.executable}", "ok" if good else "broken", "" if good else "use 3.11 or later"
    )
    wanted = requirements()
    if not wanted:
        yield Finding(
            "muka-fast", "not installed, run from its source", "note", "pip install -e . builds the extension too"
        )
    for name in [*SHOWN_PACKAGES, *sorted(set(wanted) - set(SHOWN_PACKAGES))]:
        item = wanted.get(name)
        if item is not None and item.marker is not None and not item.marker.evaluate():
            continue
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", "broken", f"pip install '{item or name}'")
            continue
        if item is not None and not item.specifier.contains(have, prereleases=True):
            yield Finding(name, have, "broken", f"pip install '{item}'")
        elif name in SHOWN_PACKAGES:
            yield Finding(name, have)
    for name, purpose in OPTIONAL_PACKAGES.items():
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, f"not installed (optional: {purpose})", "ok", f"pip install 'muka-fast[{name}]'")


def machine_findings() -> Iterator[Finding]:
    """Cores, threads, memory and GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = "unknown"
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        memory = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    yield Finding("CPU", f"{platform.machine()}, {cores} cores usable, {memory} memory")
    try:
        import torch
    except ImportError as error:
        yield Finding(
            "torch", f"cannot be imported: {one_line(error)}", "broken", "pip install --force-reinstall torch"
        )
        return
    threads, limit = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    note = f"{threads}" + (f" (OMP_NUM_THREADS={limit})" if limit else "")
    idle = threads < (cores or 1)
    yield Finding(
        "threads of torch", note, "note" if idle else "ok", f"OMP_NUM_THREADS={cores} uses all cores" if idle else ""
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            value = f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
            yield Finding(f"GPU {index}", value)
    elif Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
        reason = "torch is a CPU build" if torch.version.cuda is None else "the driver does not answer"
        yield Finding(
            "GPU", f"present, but unusable: {reason}", "note", "install a CUDA build of torch / check nvidia-smi"
        )
    else:
        yield Finding("GPU", "none: everything runs on the CPU")


def extension_findings() -> Iterator[Finding]:
    """The compiled kernels."""
    try:
        extension = importlib.import_module("muka_fast._C")
    except ImportError as error:
        compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
        way = "pip install -e . builds it" + ("" if compiler else " (install a C++ compiler first)")
        reason = "not built" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded: {one_line(error)}"
        yield Finding("C++ kernels", f"{reason}; the slower PyTorch forms are used", "note", way)
        return
    yield Finding("C++ kernels", f"{extension.__file__} (ABI {extension.ABI})")


def folder_findings() -> Iterator[Finding]:
    """Free disk here, and locks that a killed build of DeepSpeed or torch left behind (a later build would wait forever)."""
    try:
        usage = shutil.disk_usage(".")
        low = usage.free < 2**30
        way = "a student of 100 million parameters takes 0.4 GiB" if low else ""
        yield Finding("free disk here", f"{usage.free / 2**30:.1f} GiB", "note" if low else "ok", way)
    except OSError as error:
        yield Finding("free disk here", one_line(error), "note", "run it in a folder that can be read")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(caches, "torch_extensions"))
    for lock in stale_locks(root):
        yield Finding(
            "build lock", str(lock), "note", "left by a killed build: delete the file, or the next build waits for ever"
        )


def stale_locks(root: Path) -> list[Path]:
    """Lock files under a torch extension folder that are older than any build."""
    if not root.is_dir():
        return []
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    return sorted(lock for lock in locks if time.time() - lock.stat().st_mtime > STALE_LOCK_SECONDS)


def op_table() -> tuple[dict[str, dict[str, str]], list[Finding]]:
    """Op -> device -> implementation in use, and why there is none where the table cannot be loaded, or none that a GPU can start."""
    try:
        importlib.import_module("muka_fast.ops")
        table = importlib.import_module("muka_fast.ops.table")
    except ImportError as error:
        return {}, [Finding("ops", f"cannot be loaded: {one_line(error)}", "broken", "pip install -e . again")]
    reason = table.why_no_launch() if table.torch.cuda.is_available() else None
    return table.TABLE, [Finding("Triton's kernels", reason, "broken", table.TRITON_NEEDS)] if reason else []


# ---- the teachers ----


def examine_teachers(paths: Sequence[str]) -> tuple[list[TeacherFacts], list[Finding]]:
    """Load the teachers one after another; facts of the sound ones, a finding for each fault."""
    from muka_fast.labels import build_label_space
    from muka_fast.teachers import check_teachers, teacher_names

    facts, findings = [], []
    for path, name in zip(paths, teacher_names(paths), strict=True):
        try:
            facts.append(teacher_facts(path, name))
        except UserError as error:
            findings.append(Finding(name, str(error), "broken"))
            continue
        if not facts[-1].splits:
            way = "any --mc_scope is scored as all: mc_samples passes of the whole model"
            findings.append(Finding(name, "cannot be split into layers", "note", way))
        silent = [scope for scope, count, ps in facts[-1].sites if not count or not any(ps)]
        if "all" in silent:
            findings.append(
                Finding(name, "its dropout probabilities are all 0", "note", "score it with --mc_dropout_p 0.1")
            )
        elif "last:1" in silent:
            way = "use --mc_scope all, or --mc_dropout_p 0.1"
            findings.append(Finding(name, "no dropout in the last layer and the head (--mc_scope last:1)", "note", way))
    if len(facts) == len(paths):
        try:
            check_teachers(paths)
            space = build_label_space([(fact.name, fact.labels) for fact in facts])
            shared = f", {len(space.overlaps)} of them shared" if space.overlaps else ""
            findings.append(Finding("label space", f"{space.num_classes} classes{shared}"))
            if len(facts) > 1:
                findings.append(trunk_rows(facts)[1])
        except UserError as error:
            findings.append(Finding("teachers", str(error), "broken"))
    return facts, findings


def teacher_facts(path: str, name: str) -> TeacherFacts:
    """Load one teacher and keep what is shown of it. Raises UserError for every fault."""
    from muka_fast.shared import Prefixes
    from muka_fast.sites import active_sites
    from muka_fast.teachers import load_teacher
    from muka_fast.trunk import StochasticTeacher

    teacher = load_teacher(path, run_seed=0, name=name)
    scorer = StochasticTeacher(teacher, mc=False)
    splits, sites = scorer.encoder.depth > 0, []
    for scope in SCOPES:
        try:
            active = active_sites(scorer.all_sites, scope if splits else "all", name)
        except UserError:  # a model without a site in its head
            active = []
        sites.append((scope, len(active), sorted({site.p for site in active})))
    return TeacherFacts(
        name=name,
        architecture=type(teacher.model).__name__.removesuffix("ForSequenceClassification"),
        num_parameters=sum(parameter.numel() for parameter in teacher.model.parameters()),
        labels=teacher.labels,
        max_length=teacher.max_length,
        fingerprint=teacher.fingerprint,
        tokenizer_key=teacher.tokenizer_key,
        splits=splits,
        sites=sites,
        prefixes=tuple(Prefixes(scorer)),
    )


def trunk_rows(facts: Sequence[TeacherFacts]) -> tuple[list[tuple[str, str]], Finding]:
    """(layers, teachers) of every part of the tree of common trunks under --mc_scope last:1, children indented; and what it saves.

    A forward is that of a whole teacher; layers with masks and the head are each teacher's own and not in the tree.
    """
    from muka_fast.shared import TrunkNode, grow_trunks

    depths = [len(fact.prefixes) - 1 for fact in facts]
    layers = [max(0, depth - 1) for depth in depths]  # below the last layer nothing is random
    rows, saved, skipped = [], 0.0, 0

    def visit(node: TrunkNode, level: int) -> None:
        nonlocal saved, skipped
        if node.stop > node.start:
            first, names = node.start + 1, ", ".join(facts[i].name for i in node.teachers)
            span = f"layer {first}" if node.stop == first else f"layers {first} to {node.stop}"
            rows.append(("  " * level + ("embeddings, " if node.start == 0 else "") + span, names))
            skipped += (node.stop - node.start) * (len(node.teachers) - 1)
            saved += (node.stop - node.start) * sum(1 / depths[i] for i in node.teachers[1:])
        for child in node.children:
            visit(child, level + 1)

    for node in grow_trunks(layers, [fact.prefixes for fact in facts]):
        visit(node, 0)
    if not skipped:
        way_out = "muka-fast teach --freeze_layers N gives teachers of one encoder common layers"
        return rows, Finding("common layers", "none: every teacher runs all of its layers", "ok", way_out)
    value = f"{skipped} of {sum(depths)} layers are run for another teacher anyway: saves {saved:.2f} of {len(facts)} forwards a text"
    return rows, Finding("common layers", value)


# ---- tables ----


def one_line(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def show_findings(console: Console, title: str, findings: Sequence[Finding]) -> None:
    """Print what was found, what it means and the way out."""
    table = new_table(title, "what", "found", "state", "way out")
    rows = [(f.what, f.value, Text(f.state, MARKS[f.state]), f.way_out) for f in findings]
    console.print(fill(table, rows))


def show_ops(console: Console, ops: dict[str, dict[str, str]]) -> None:
    """Print which implementation each op uses."""
    devices = sorted({device for row in ops.values() for device in row})
    table = new_table("Ops", "op", *devices)
    console.print(fill(table, [(op, *(ops[op].get(device, "") for device in devices)) for op in sorted(ops)]))


def tokenizer_groups(keys: Sequence[str]) -> list[str]:
    """A, B, ... by first appearance: teachers with the same letter share one tokenisation of the texts."""
    order = list(dict.fromkeys(keys))
    letter: Callable[[int], str] = lambda i: chr(ord("A") + i) if i < 26 else str(i + 1)
    return [letter(order.index(key)) for key in keys]


def show_teachers(console: Console, facts: Sequence[TeacherFacts]) -> None:
    """Print the teachers and their dropout sites by scope."""
    columns = ("teacher", "architecture", "parameters", "classes", "labels", "max tokens", "tokenizer", "fingerprint")
    rows = []
    for fact, group in zip(facts, tokenizer_groups([fact.tokenizer_key for fact in facts]), strict=True):
        first = ", ".join(fact.labels[:3]) + (", ..." if len(fact.labels) > 3 else "")
        size = f"{fact.num_parameters:,}"
        rows.append(
            (fact.name, fact.architecture, size, len(fact.labels), first, fact.max_length, group, fact.fingerprint[:12])
        )
    console.print(fill(new_table("Teachers", *columns), rows))
    table = new_table("Dropout sites", "teacher", *(f"--mc_scope {scope}" for scope in SCOPES))
    cells = [
        (
            fact.name,
            *(
                f"{count} {'site' if count == 1 else 'sites'}, p = {', '.join(f'{p:g}' for p in ps)}"
                if count
                else "none"
                for _, count, ps in fact.sites
            ),
        )
        for fact in facts
    ]
    console.print(fill(table, cells))
    if len(facts) > 1:
        table = new_table("Layers below --mc_scope last:1, each line run once", "layers", "teachers")
        console.print(fill(table, trunk_rows(facts)[0]))
