"""The command line: spellings, help, exit codes and what reaches each command."""

import errno
import importlib
import io
import logging
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from muka_fast import __version__, cli, config
from muka_fast.cli import COMMANDS, cores_are_free, guarded, main, parse, parse_train_args
from muka_fast.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def called(monkeypatch):
    """Every command's module is replaced by one that records its configuration; logging is left as it was."""
    seen = {}

    def load(name):
        return types.SimpleNamespace(main=lambda options: seen.update({name: options}))

    monkeypatch.setattr(cli.importlib, "import_module", load)
    monkeypatch.setattr(cli, "setup_logging", lambda *args: None)
    return seen


REQUIRED = {
    "demo": [],
    "teach": ["--encoder", "e", "--train", "t", "--output", "o"],
    "score": ["--teachers", "a", "b", "--texts", "t", "--output", "o"],
    "train": [],
    "eval": ["--model", "m", "--data", "d"],
    "predict": ["--model", "m", "--texts", "t"],
    "report": ["runs/x"],
    "doctor": [],
    "plan": ["--teachers", "a", "--student", "s", "--num_texts", "9"],
}


@pytest.mark.parametrize("name", REQUIRED)
def test_a_launcher_is_for_commands_that_processes_share(called, monkeypatch, capsys, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = name in ("score", "train")
    assert main([name, *REQUIRED[name]]) == (0 if shared else 2) and bool(called) is shared
    assert shared or f"muka-fast {name} runs in one process: start it without torchrun or deepspeed" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "1")  # left over from something else
    assert main([name, *REQUIRED[name]]) == 0 and called


def test_what_the_package_offers_is_what_it_lists():
    import inspect

    import muka_fast

    assert dir(muka_fast) == ["Prediction", "Predictor", "RunResult", "UserError", "__version__", "amalgamate"]
    assert all(hasattr(muka_fast, name) for name in dir(muka_fast)) and not hasattr(muka_fast, "Amalgamate")
    parameters = inspect.signature(muka_fast.amalgamate).parameters
    assert parameters.keys() == {*config.RunConfig.model_fields, "config"} and next(iter(parameters)) == "teachers"
    assert str(parameters["mc_dropout_p"]) == "mc_dropout_p: float | None = None"
    assert "mc_samples: stochastic passes per text (K) (an integer from 1 to 4096; default: 16)" in muka_fast.amalgamate.__doc__


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_reaches_its_module_with_its_configuration(called, name):
    assert main([name, *REQUIRED[name]]) == 0
    assert set(called) == {f"muka_fast.{COMMANDS[name].module}"}
    assert type(*called.values()) is COMMANDS[name].config


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_option_once_with_underscores(name, capsys):
    with pytest.raises(SystemExit) as done:
        main([name, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for key, field in COMMANDS[name].config.model_fields.items():
        if key != COMMANDS[name].positional:
            assert f"--{config.option_name(key, field)}" in text
        assert field.description.split()[0] in text
    for line in text.splitlines():
        option = line.split()[0] if line.startswith("  --") else ""
        assert "-" not in option[2:]


def test_help_tells_defaults_and_ranges(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "an integer from 1 to 4096; default: 16" in text
    assert "--margin, --no-margin" in text
    assert "all, last:M (M >= 1) or head; default: last:1" in text
    assert "10 %" in text or "default: 0.1" in text


def test_bare_call_prints_help_and_version(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"muka-fast {__version__}\n"


def test_hyphen_and_underscore_are_the_same(called):
    main(["train", "--mc-samples", "4", "--learning_rate=1e-3", "--kd-temperature=2", "--no-margin", "--no_mc"])
    options = called["muka_fast.train"]
    assert (options.mc_samples, options.learning_rate, options.kd_temperature) == (4, 1e-3, 2.0)
    assert options.margin is False and options.mc is False
    # A value keeps its hyphens.
    main(["train", "--output=a-b-c", "--method", "muka-hard"])
    assert (called["muka_fast.train"].output, called["muka_fast.train"].method) == ("a-b-c", "muka-hard")


def test_switches_and_lists(called):
    main(["train", "--margin", "--no-margin", "--margin", "--resume", "--teachers", "a", "b", "--teachers", "c"])
    options = called["muka_fast.train"]
    assert options.margin is True and options.resume is True
    assert options.teachers == ["a", "b", "c"]
    main(["teach", *REQUIRED["teach"], "--labels", "a, b,c", "--labels", 'd "e,f"', '"g,h",i'])
    assert called["muka_fast.teach"].labels == ["a", "b", "c", 'd "e', 'f"', "g,h", "i"]
    main(["teach", *REQUIRED["teach"], "--labels", "a,", "b,,c"])
    assert called["muka_fast.teach"].labels == ["a", "b", "c"]


def test_only_given_options_count_as_given(called):
    main(["train", "--epochs", "3"])
    assert called["muka_fast.train"].model_fields_set == {"epochs"}


def test_yaml_is_read_and_flags_override_it(called, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("epochs: 5\nmargin: false\nbatch-size: 4\n", encoding="utf-8")
    assert main(["train", "--config", str(path), "--epochs", "6"]) == 0
    options = called["muka_fast.train"]
    assert (options.epochs, options.margin, options.batch_size) == (6, False, 4)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["trian"], ["unknown command 'trian'", "nearest: train"]),
        (["--epochs", "3"], ["unknown command '--epochs'"]),
        (["train", "--epcohs", "3"], ["unknown option '--epcohs'", "--epochs"]),
        (["train", "--no-margn"], ["--margin"]),
        (["train", "--epochs"], ["--epochs", "expected one argument"]),
        (["train", "--epochs", "0"], ["--epochs 0", "from 1 to"]),
        (["train", "--weight_decay", "-1"], ["--weight_decay -1", "from 0 to 1"]),
        (["train", "--method", "muka"], ["--method muka", "muka-hard", "oracle"]),
        (["train", "--epo", "3"], ["unknown option '--epo'"]),
        (["train", "stray"], ["unexpected argument 'stray'"]),
        (["train", "--texts", "a.jsonl", __file__], ["unexpected argument", "one pattern in quotes, 'pool/*.jsonl'"]),
        (["train", "--config", "no.yaml"], ["no.yaml", "No such file"]),
        (["eval", "--json"], ["--model", "--data"]),
        (["report"], ["DIR"]),
        (["doctor", "--config", "x"], ["unknown option '--config'", "see muka-fast doctor --help"]),
        (["eval", "--texts", "a.jsonl"], ["unknown option '--texts'", "here it is --data"]),
        (["predict", "--data", "a.jsonl"], ["unknown option '--data'", "here it is --texts"]),
        (["train", "--deepspeed", "ds.json"], ["unknown option '--deepspeed'", "here it is --ds_config"]),
        (["train", "--deepspeed_config", "ds.json"], ["unknown option '--deepspeed_config'", "here it is --ds_config"]),
        (["score", "--store", "s"], ["unknown option '--store'", "here it is --output"]),
        (["teach", "--student=x"], ["unknown option '--student'", "here it is --encoder"]),
        (["score", "--label_column", "x"], ["unknown option '--label_column'"]),
        (["report", "--run", "out"], ["'--run' is given without its name: muka-fast report DIR"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, parts, capsys, called):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and called == {}
    assert captured.err.startswith("muka-fast: error: ")
    assert captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err


def raising(error):
    def function():
        raise error

    return function


def test_exit_codes(capsys):
    assert guarded(lambda: None) == 0
    assert guarded(lambda: 3) == 3
    assert guarded(raising(UserError("teacher 'x': broken"))) == 2
    assert capsys.readouterr().err == "muka-fast: error: teacher 'x': broken\n"
    assert guarded(raising(KeyboardInterrupt())) == 130
    assert guarded(raising(OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors"))) == 2
    assert capsys.readouterr().err.endswith("muka-fast: error: out/model.safetensors: No space left on device\n")


@pytest.mark.parametrize("error", [ValueError("bug"), OSError(errno.EIO, "broken disk"), RuntimeError("bug")])
def test_faults_of_the_program_are_not_hidden(error):
    with pytest.raises(type(error)):
        guarded(raising(error))


@pytest.mark.parametrize("rank", [["--local_rank", "1"], ["--local-rank=1"], []])
def test_the_launchers_rank_is_ignored(rank):
    options = parse_train_args([*rank, "--teachers", "a", "b", "--ds-config", "ds.json"])
    assert options == config.RunConfig(teachers=["a", "b"], ds_config="ds.json")


def test_parse_needs_no_command_line_around_it():
    assert parse(COMMANDS["demo"], ["--limit", "500"], "demo").limit == 500
    with pytest.raises(UserError, match="unknown option"):
        parse_train_args(["--local_rank", "0", "--teecher", "x"])


def test_help_is_quick():
    """Measured 0.5 s on a busy core; importing torch alone takes 3."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "muka_fast.cli", "train", "--help"], capture_output=True, check=True
        )
        seconds.append(time.perf_counter() - start)
    assert b"--teachers" in done.stdout
    assert min(seconds) < 2.5


class TestConsole:
    """Logging and progress outside of a terminal."""

    @pytest.fixture(autouse=True)
    def _restore(self, monkeypatch):
        self.console = importlib.import_module("muka_fast.console")
        handlers, level, propagate = self.console.log.handlers[:], self.console.log.level, self.console.log.propagate
        libraries = {name: logging.getLogger(name).level for name in self.console.CHATTY}
        monkeypatch.setattr(self.console, "_state", {"rank": 0, "console": None})
        bars = "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"
        for variable in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", *bars):
            monkeypatch.setenv(variable, "kept")
        yield
        self.console.log.handlers[:], self.console.log.propagate = handlers, propagate
        self.console.log.setLevel(level)
        for name, value in libraries.items():
            logging.getLogger(name).setLevel(value)

    def test_warnings_are_marked_and_rank_1_is_silent(self, capsys):
        self.console.setup_logging(verbose=False, rank=0)
        self.console.log.info("plain")
        self.console.log.warning("look")
        self.console.log.debug("detail")
        assert capsys.readouterr().err == "plain\nwarning: look\n"
        self.console.setup_logging(verbose=True, rank=1)
        self.console.log.warning("look")
        with self.console.progress(3, "quiet") as bar:
            bar.advance(3)
        assert capsys.readouterr() == ("", "")

    def test_plain_lines_every_tenth(self, capsys, monkeypatch):
        self.console.setup_logging()
        clock = iter(range(0, 100_000, 1))
        monkeypatch.setattr(self.console.time, "monotonic", lambda: next(clock))
        with self.console.progress(1000, "scoring bert") as bar:
            for _ in range(500):
                bar.advance(2, note="loss 0.5")
        lines = capsys.readouterr().err.splitlines()
        assert 9 <= len(lines) <= 11
        assert lines[-1].startswith("scoring bert: 1000/1000 (100%)")
        assert "texts/s" in lines[0] and "s left" in lines[0] and "loss 0.5" in lines[0]

    def test_short_work_leaves_no_line(self, capsys):
        self.console.setup_logging()
        with self.console.progress(3, "short") as bar:
            for _ in range(3):
                bar.advance()
        assert bar.done == 3
        assert capsys.readouterr().err == ""

    def test_the_log_file_of_a_process_holds_what_its_console_keeps_quiet(self, tmp_path, capsys):
        self.console.setup_logging(rank=1)
        log, folder = self.console.log, tmp_path / "run" / "logs"
        with self.console.log_file(folder, 1, 2):
            log.info("scored %d texts", 7)
            log.debug("detail")
        log.info("after")
        with pytest.raises(UserError), self.console.log_file(folder, 1, 2):
            raise UserError("the disk is full")
        with pytest.raises(ZeroDivisionError), self.console.log_file(folder, 1, 2):
            1 / 0  # noqa: B018
        lines = (folder / "rank1.log").read_text().splitlines()
        assert re.fullmatch(r"[-\d]+ [:,\d]+ INFO process 1 of 2 on .*, pid \d+, muka_fast .*", lines[0])
        assert lines[1].endswith("INFO scored 7 texts") and lines[3].endswith("ERROR the disk is full")
        assert "ended by ZeroDivisionError" in lines[5] and lines[-1] == "ZeroDivisionError: division by zero"
        assert "detail" not in str(lines) and "after" not in str(lines)
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize(("level", "seen"), [(logging.NOTSET, ["look"]), (logging.ERROR, []), (logging.DEBUG, ["plain", "look"])])
    def test_the_log_file_of_a_python_caller_holds_more_than_its_handlers_see(self, level, seen, tmp_path, monkeypatch):
        log, told, theirs = self.console.log, [], logging.Handler()
        theirs.emit = lambda record: told.append(record.getMessage())
        log.handlers[:], log.propagate = [], True
        log.setLevel(level)  # NOTSET: as the root logger has it
        monkeypatch.setattr(logging.getLogger(), "handlers", [theirs])
        with self.console.log_file(tmp_path, 0, 1):
            log.info("plain")
            log.warning("look")
        assert told == seen and log.level == level and not log.filters
        assert re.findall(r" ([A-Z]+ (?:plain|look))\n", (tmp_path / "rank0.log").read_text()) == ["INFO plain", "WARNING look"]

    def test_the_hubs_retries_stay_quiet_when_it_is_imported_later(self):
        env = {name: value for name, value in os.environ.items() if name != "HF_HUB_VERBOSITY"}
        code = "from muka_fast import console; console.setup_logging(); from huggingface_hub.utils import logging as l; "
        done = subprocess.check_output([sys.executable, "-c", f"{code}print(l.get_verbosity())"], env=env, cwd=ROOT, text=True)
        assert done == f"{logging.ERROR}\n"

    def test_an_error_leaves_the_bar(self, monkeypatch):
        from rich.console import Console

        monkeypatch.setitem(self.console._state, "console", Console(force_terminal=True, quiet=True))
        bar = self.console.progress(10, "bar")

        def work():
            with bar:
                bar.advance(1)
                raise ValueError("bug")

        with pytest.raises(ValueError, match="bug"):
            work()
        assert bar.done == 1
        assert not bar._bar.live.is_started


def test_results_are_printed_whatever_stdout_is(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    cli.settle_stdout()
    print("nowhere")
    sys.stdout.close()
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    cli.settle_stdout()
    print("Zürich", flush=True)
    assert narrow.buffer.getvalue() == b"Z?rich\n"


def test_a_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    assert main(["doctor"]) == 2 and "the folder that you are in is gone" in capsys.readouterr().err


FIRST_SEEN = """
import os, runpy, sys

class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch at", os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Spy())
from muka_fast import cli
cli.cores_are_free = lambda: {free}
sys.argv[1:] = ["--texts", "nowhere.jsonl"]
{start}
"""


STARTS = ["runpy.run_path('muka_fast/train.py', run_name='__main__')", "from muka_fast import cli; cli.main(['train', *sys.argv[1:]])"]


@pytest.mark.parametrize("start", STARTS)
def test_idle_threads_spin_briefly(start):
    """OpenMP reads the environment when torch is loaded, so that later is too late."""
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    given = {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}
    for free, more, seen in ((True, {}, "30000"), (False, {}, "0"), (False, given[0], "7"), (False, given[1], "None")):
        code = FIRST_SEEN.format(start=start, free=free)
        done = subprocess.run([sys.executable, "-c", code], env=env | more, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == f"torch at {seen}\n", done.stderr


@pytest.mark.parametrize(
    ("threads", "running", "free"), [("2", [3], True), ("2", [4], False), ("", [3], False), ("2", [9, 4, 3], True)]
)
def test_cores_are_free_where_each_thread_has_one_beside_what_runs(threads, running, free, tmp_path, monkeypatch):
    """On four cores, this process being one of those that run; what runs for a moment does not count."""
    status, seen = tmp_path / "loadavg", iter(running)
    tell = lambda seconds: status.write_text(f"0.5 0.5 0.5 {next(seen, running[-1])}/70 123\n")
    monkeypatch.setattr(time, "sleep", tell)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert cores_are_free(status) is free


@pytest.mark.parametrize("content", [None, "", "0.5 0.5 0.5 many 1"])
def test_where_nothing_tells_what_runs_cores_are_free(content, tmp_path):
    if content is not None:
        (tmp_path / "loadavg").write_text(content)
    assert cores_are_free(tmp_path / "loadavg")
