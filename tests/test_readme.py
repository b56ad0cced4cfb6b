"""README, CONTRIBUTING and docs stay true: the file tree is that of the repository, links lead somewhere, commands and code parse."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from muka_fast import cli
from muka_fast.config import RunConfig
from muka_fast.errors import UserError
from muka_fast.labels import build_label_space, read_label_map

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "docs/measured.md", "docs/selection.md")
LAUNCHERS = ("deepspeed", "torchrun")

if not (ROOT / "README.md").is_file():
    pytest.skip("these tests read a checkout", allow_module_level=True)


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", page(name), re.DOTALL)


def commands():
    for name in PAGES:
        for block in blocks(name, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield pytest.param(words, id=line[:60])


def parse(words):
    """Parse one shown command as it would be when typed; raises UserError or AssertionError."""
    program, *rest = words
    if program == "muka-fast":
        assert rest[0] in cli.COMMANDS, rest[0]
        return cli.parse(cli.COMMANDS[rest[0]], drop_config(rest[1:]), f"muka-fast {rest[0]}")
    if program in LAUNCHERS and "muka_fast.cli" in rest:
        return parse(["muka-fast", *rest[rest.index("muka_fast.cli") + 1 :]])
    if program in LAUNCHERS:
        config = cli.parse_train_args(drop_config(rest[rest.index("muka_fast/train.py") + 1 :]))
        assert (ROOT / config.ds_config).is_file(), config.ds_config
        return config
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), rest
        return rest
    script = rest[0] if program == "python" else program
    assert (ROOT / script).is_file(), f"{words}: neither a command of ours nor a file"
    return script


def drop_config(words):
    """--config names a file of the reader's, which is not here."""
    if "--config" in words:
        at = words.index("--config")
        words = words[:at] + words[at + 2 :]
    return words


@pytest.mark.parametrize("words", list(commands()))
def test_every_command_parses(words):
    parse(words)


def test_a_wrong_command_would_be_noticed():
    with pytest.raises(UserError, match="unknown option"):
        parse(shlex.split("muka-fast train --teacher a --texts b"))
    for line in (
        "muka-fast trian",
        "make tests",
        "bench/none.py",
        "deepspeed muka_fast/train.py --ds_config none.json",
    ):
        with pytest.raises(AssertionError):
            parse(shlex.split(line))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if not target.startswith("http"):
            file, _, heading = target.partition("#")
            file = (ROOT / name).parent / file if file else ROOT / name
            assert file.exists(), target
            if heading:
                titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_python_code_calls_what_exists():
    found = blocks("README.md", "python")
    assert found
    for block in found:
        for call in ast.walk(ast.parse(block)):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "amalgamate":
                RunConfig(**{keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords})
                break
        else:
            pytest.fail("no call of amalgamate in it")


def test_the_label_map_shown_does_what_its_comments_say(tmp_path):
    (block,) = blocks("README.md", "yaml")
    path = tmp_path / "labels.yaml"
    path.write_text(block)
    assert yaml.safe_load(block)
    teachers = [("news", ["politics", "other"]), ("world", ["world politics", "other"])]
    assert build_label_space(teachers, read_label_map(path)).names == ("world politics", "other")


def tree():
    """Path -> description of README's file tree; folders end in a slash."""
    lines = re.search(r"<!-- tree -->\n```text\n(.*?)\n```", page("README.md"), re.DOTALL)[1].splitlines()
    entries, folders = {}, []
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, description = line.strip().partition(" ")
        path = "".join([*folders[:depth], name])
        assert path not in entries, f"twice in the tree: {path}"
        entries[path] = description.strip()
        if name.endswith("/"):
            folders[depth:] = [name]
    return entries


def test_the_file_tree_is_that_of_the_repository():
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, which knows its files")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    files = {name for name in tracked if name and (ROOT / name).exists()}
    entries = tree()
    # A folder without lines below it stands for all it holds.
    whole = {
        path for path in entries if path.endswith("/") and not any(p != path and p.startswith(path) for p in entries)
    }
    missing = {name for name in files if name not in entries and not any(name.startswith(folder) for folder in whole)}
    gone = {path for path in entries if not (ROOT / path).exists()}
    assert not missing, "files that README's tree lacks"
    assert not gone, "lines of README's tree without a file"
    silent = {path for path, text in entries.items() if not text and (path in whole or not path.endswith("/"))}
    assert not silent, "lines of README's tree that say nothing"


def test_figures_come_from_results():
    in_short = page("README.md").split("## Measured")[1].split("\n## ")[0]
    for line in (in_short + page("docs/measured.md")).splitlines():
        if re.search(r"\d", line) and not line.startswith("|"):
            assert "bench/results/" in line or not re.search(r"\d\s?(x|%|texts/s)", line), (
                f"a figure without its source: {line}"
            )
