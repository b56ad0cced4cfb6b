"""The command line: parsers generated from the configuration models, one exit code for every kind of bad input."""

import argparse
import errno
import importlib
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, get_origin

from pydantic.fields import FieldInfo

from muka_fast import __version__, config
from muka_fast.config import help_text, load_config, nearest, option_name, plain_type
from muka_fast.console import first_of_node_tells, setup_logging
from muka_fast.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
# What a full or read-only disk and the like raise: the user's to mend, not a fault of the program.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ESTALE)
DISK_ERRORS += (errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP)


class Command(NamedTuple):
    """A sub-command: the module whose main(config) runs it, its options and one line of help. shared: processes do it together."""

    module: str
    config: type[config.Config]
    help: str
    positional: str | None = None
    reads_yaml: bool = True
    shared: bool = False


COMMANDS = {
    "demo": Command(
        "demo", config.DemoConfig, "make three small teachers from local docstrings and merge them", reads_yaml=False
    ),
    "teach": Command("teach", config.TeachConfig, "fine-tune a teacher on labelled texts, on all of their labels or some"),
    "score": Command("supervision", config.ScoreConfig, "score teachers: fill or complete a supervision store", shared=True),
    "train": Command("train", config.RunConfig, "merge teachers into one student", shared=True),
    "eval": Command("evaluate", config.EvalConfig, "measure a classifier on labelled texts"),
    "predict": Command("predict", config.PredictConfig, "label texts; with an uncertainty head, tell the doubt of each"),
    "plan": Command("plan", config.PlanConfig, "estimate memory, time and disk of a merge beforehand", reads_yaml=False),
    "report": Command("report", config.ReportConfig, "write a page about a run", "run", reads_yaml=False),
    "doctor": Command("doctor", config.DoctorConfig, "check this machine and, if given, teachers", reads_yaml=False),
}


# What commands, or DeepSpeed's own examples, call by other names.
SAME_THING = (
    {"--texts", "--data", "--train"}, {"--data", "--eval"}, {"--store", "--output"}, {"--encoder", "--student"},
    {"--deepspeed", "--ds_config"}, {"--deepspeed_config", "--ds_config"},
)  # fmt: skip


class _Help(argparse.HelpFormatter):
    """Help with one spelling per option and `--margin, --no-margin` for switches."""

    def __init__(self, prog: str):
        width = shutil.get_terminal_size((110, 24)).columns
        super().__init__(prog, max_help_position=34, width=min(120, max(80, width)))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, _Switch):
            return ", ".join(action.shown)
        return super()._format_action_invocation(action)


class _Parser(argparse.ArgumentParser):
    """Mistakes become UserError, so that Python callers and the command line see the same line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


class _Switch(argparse.Action):
    """`--name` and `--no-name`; the latter is shown in the help only where the default is true."""

    def __init__(self, option_strings: Sequence[str], dest: str, default_on: bool, **kwargs: Any):
        name = option_strings[0]
        negative = "--no_" + name.removeprefix("--")
        self.shown = [name, negative.replace("--no_", "--no-")] if default_on else [name]
        super().__init__([name, negative], dest, nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, not str(option_string).startswith("--no_"))


class _Extend(argparse.Action):
    """A list given at once or by repeating the option; labels also as a,b,c (quotes protect a comma)."""

    def __init__(self, *args: Any, split: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.split = split

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.split:
            values = config.split_labels(values)
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *values])


def _metavar(field: FieldInfo) -> str:
    kind = plain_type(field)
    if get_origin(kind) is Literal:
        return "NAME"
    if kind in (int, float):
        return "N" if kind is int else "X"
    return "PATH" if field.json_schema_extra["group"] == config.FILES else "TEXT"


def _add_option(group: Any, name: str, field: FieldInfo) -> None:
    common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": help_text(field).replace("%", "%%")}
    if plain_type(field) is bool:
        group.add_argument(f"--{name}", action=_Switch, default_on=field.default is True, **common)
    elif get_origin(plain_type(field)) is list:
        split = name == "labels"
        metavar = "A,B" if split else "NAME" if name == "store_teachers" else "DIR"
        group.add_argument(f"--{name}", action=_Extend, split=split, nargs="+", metavar=metavar, **common)
    else:
        group.add_argument(f"--{name}", metavar=_metavar(field), **common)


def build_parser(command: Command, prog: str) -> argparse.ArgumentParser:
    """The parser of one sub-command, its options in the groups of its model. Only given options appear in the result."""
    usage = f"{prog} {'DIR ' if command.positional else ''}[OPTIONS]"
    summary = f"{command.help[0].upper()}{command.help[1:]}."
    parser = _Parser(prog=prog, usage=usage, description=summary, formatter_class=_Help, allow_abbrev=False)
    if command.reads_yaml:
        parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags override it")
    used = {field.json_schema_extra["group"] for field in command.config.model_fields.values()}
    groups = {title: parser.add_argument_group(title) for title in config.GROUPS if title in used}
    for name, field in command.config.model_fields.items():
        if name == command.positional:
            parser.add_argument(name, metavar="DIR", help=field.description)
            continue
        _add_option(groups[field.json_schema_extra["group"]], option_name(name, field), field)
    return parser


def parse(command: Command, argv: Sequence[str], prog: str) -> config.Config:
    """Arguments of one sub-command to its configuration; `--a-b` equals `--a_b`.

    Raises:
        UserError: unknown option (names the nearest), missing or bad value.
    """
    parser = build_parser(command, prog)
    spelled = []
    for word in argv:
        name, equals, value = word.partition("=")
        spelled.append(
            name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word
        )
    known, unknown = parser.parse_known_args(spelled)
    if unknown:
        fields = command.config.model_fields.items()
        names = [f"--{option_name(key, field)}" for key, field in fields if key != command.positional]
        name = unknown[0].partition("=")[0]
        if not name.startswith("-"):
            several = " (several files of texts: one pattern in quotes, 'pool/*.jsonl')" if os.path.isfile(name) else ""
            raise UserError(f"unexpected argument '{name}': see {prog} --help{several}")
        if command.positional and name == f"--{command.positional}":
            raise UserError(f"'{name}' is given without its name: {prog} DIR")
        same = [other for other in names if any({name, other} <= thing for thing in SAME_THING)]
        hint = f" (here it is {same[0]})" if same else nearest(name.replace("--no_", "--"), names)
        raise UserError(f"unknown option '{name}'{hint or f': see {prog} --help'}")
    flags = vars(known)
    return load_config(command.config, flags.pop("config", None), flags)


def parse_train_args(argv: Sequence[str]) -> config.RunConfig:
    """Options of train for `deepspeed muka_fast/train.py ...`, whose launcher adds --local_rank N (it is in LOCAL_RANK too)."""
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--local_rank", "--local-rank", type=int)
    _, rest = launcher.parse_known_args(argv)
    with first_of_node_tells():
        return parse(COMMANDS["train"], rest, "train.py")


def guarded(function: Callable[[], Any]) -> int:
    """Run a command: 0 or its own exit code; 2 and one line on stderr for bad input or a full disk; 130 for Ctrl-C."""
    try:
        return function() or 0
    except UserError as error:
        print(f"muka-fast: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        # `muka-fast eval ... | head`: the reader has what it wanted. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"muka-fast: error: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("muka-fast: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(name: str, argv: Sequence[str]) -> int:
    command = COMMANDS[name]
    with first_of_node_tells():
        try:
            os.getcwd()
        except FileNotFoundError as error:
            raise UserError("the folder that you are in is gone: change to another one") from error
        options = parse(command, argv, f"muka-fast {name}")
        if not command.shared and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(f"muka-fast {name} runs in one process: start it without torchrun or deepspeed")
    setup_logging(options.verbose, int(os.environ.get("RANK", "0")))
    return importlib.import_module(f"muka_fast.{command.module}").main(options)


def spin_briefly() -> None:
    """Before torch is imported: have idle threads of OpenMP sleep after a millisecond instead of ten, and at once where other programs
    run on the same cores, unless the user says otherwise.

    A thread that spins waits for one that does not run, and takes the core that it needs: the fewer, the better for a machine that is
    shared. One without other programs loses by it, as threads that sleep wake slowly.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000" if cores_are_free() else "0")


def cores_are_free(status: str = "/proc/loadavg") -> bool:
    """Whether there is, now and then in the next 20 ms, a core for each thread of ours beside all that runs. status: whose fourth word
    counts that, us included; true where there is no such file."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    for wait in (0, 0.005, 0.005, 0.01):
        time.sleep(wait)
        try:
            with open(status) as file:
                running = int(file.read().split()[3].partition("/")[0])
        except (OSError, ValueError, IndexError):
            return True
        threads = int(wanted) if wanted.isdigit() else len(os.sched_getaffinity(0))
        if running - 1 + threads <= os.cpu_count():
            return True
    return False


def settle_stdout() -> None:
    """Let results be printed whatever standard output is: closed, as under some daemons, or of an encoding that lacks letters."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `muka-fast`; returns the exit code."""
    spin_briefly()
    settle_stdout()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return guarded(lambda: _run(argv[0], argv[1:]))
    parser = _Parser(
        prog="muka-fast",
        usage="muka-fast COMMAND [OPTIONS]",
        description="Merge several fine-tuned text classifiers into one student, without labels.",
        epilog="muka-fast COMMAND --help lists the options of a command; --a_b and --a-b are the same.",
    )
    parser.add_argument("--version", action="version", version=f"muka-fast {__version__}")
    commands = parser.add_argument_group("commands")
    for name, command in COMMANDS.items():
        commands.add_argument(name, nargs="?", metavar=name, help=command.help)
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    if argv[0] == "--version":
        print(f"muka-fast {__version__}")
        return 0
    message = f"unknown command '{argv[0]}'{nearest(argv[0], list(COMMANDS))}: see muka-fast --help"
    print(f"muka-fast: error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
