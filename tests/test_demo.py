"""The demo: texts that are real, clean and reproducible; material that is whole or remade; one table by the user's own path."""

import json
import re

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from muka_fast import cli, demo, docstrings, engine, material
from muka_fast.config import DemoConfig, RunConfig, load_config
from muka_fast.errors import UserError
from muka_fast.labels import build_label_space
from muka_fast.ops import table
from muka_fast.teachers import inspect

# ---- texts ----


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        (
            "foo(a, b=None, /) -> int\n\n    Return the sum of all elements of the given array along one axis.\n",
            "Return the sum of all elements of the given array along one axis.",
        ),
        (
            "Compute the mean of a column (or of several ones)\nand return it as a plain number.\n\nParameters\n----------\na : x",
            "Compute the mean of a column (or of several ones) and return it as a plain number.",
        ),
        (
            "Wraps a :class:`~torch.Tensor` so that ``pandas`` can read it without a copy.\n\n>>> wrap(3)\n",
            "Wraps a library.Tensor so that library can read it without a copy.",
        ),
        ("Too short to say anything.", None),
        ("x = 1; y = {2: 3}; z = [[4, 5], [6, 7]]; (8 + 9) ** 2 / 3 != 0 -> 1e-9 %%% === 0", None),
    ],
)
def test_cleaning_keeps_the_opening_prose(docstring, expected):
    assert docstrings.clean(docstring) == expected


@given(st.text())
def test_cleaning_takes_any_text(docstring):
    text = docstrings.clean(docstring)
    assert text is None or docstrings.MIN_WORDS <= len(text.split()) <= docstrings.MAX_WORDS


@pytest.mark.parametrize(
    "name", ["NumPy", "np.array", "sklearn", "scikit-learn", "PyTorch", "torch", "DataFrame", "Python3", "plt"]
)
def test_library_names_are_masked(name):
    text = docstrings.clean(f"Convert the whole input to what {name} needs before it is used again.")
    assert text in (
        "Convert the whole input to what library needs before it is used again.",
        "Convert the whole input to what library.array needs before it is used again.",
    )


def test_names_inside_other_words_stay():
    text = docstrings.clean("The pythonic way of plotting a pandasaurus with enough npm and torches for everybody.")
    assert text == "The pythonic way of plotting a pandasaurus with enough npm and torches for everybody."


def test_near_duplicates_are_dropped():
    seen: set[bytes] = set()
    first = "Return the sorted unique elements of an array together with their counts and first positions"
    assert not docstrings._known(first, seen)
    assert docstrings._known(first.upper() + "!", seen)
    assert docstrings._known(first.replace("positions", "places"), seen)
    assert not docstrings._known("Draw a filled polygon between two curves and return the artist that was added", seen)


def test_few_texts_are_balanced_and_split_without_overlap():
    docs = docstrings.collect(per_class=12, seed=3)
    assert docs.names == sorted(docstrings.LIBRARIES)
    assert {docs.labels.count(name) for name in docs.names} == {12}
    assert sorted(docs.train + docs.test) == list(range(len(docs.texts)))
    again, other = docstrings.collect(per_class=12, seed=3), docstrings.collect(per_class=12, seed=4)
    assert docs == again
    assert docs.texts != other.texts
    names = re.compile(rf"(?<![A-Za-z0-9])({docstrings.NAMES})(?![A-Za-z0-9])", re.IGNORECASE)
    assert not [text for text in docs.texts if names.search(text)]


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(docstrings.LIBRARIES, "nolib", "no_such_library")
    with pytest.raises(UserError, match="docstrings of nolib, which is not installed"):
        docstrings.library_root("nolib")


@pytest.mark.slow
def test_the_demo_has_enough_texts():
    docs = docstrings.collect()
    assert len(docs.names) >= 8
    assert len(docs.texts) >= 3000
    assert len(set(docs.texts)) == len(docs.texts)
    assert min(docs.labels.count(name) for name in docs.names) >= 200


# ---- material ----


@pytest.fixture
def short_recipe(monkeypatch):
    monkeypatch.setattr(
        material, "TEACHER_RECIPE", material.Recipe(epochs=1, learning_rate=1e-3, batch_size=32, max_length=32)
    )


@pytest.fixture
def config(tmp_path):
    return DemoConfig(output=str(tmp_path / "demo"), limit=10 * len(material.LIBRARIES))


def test_material_is_made_once_and_used_again(config, short_recipe):
    prepared = material.prepare(config.output, config)
    labels = [inspect(teacher).labels for teacher in prepared.teachers]
    space = build_label_space(list(zip(material.TEACHERS, labels, strict=True)))
    assert space.overlaps == ("scipy",)
    assert set(space.names) == set(docstrings.LIBRARIES)
    families = {
        json.loads((material.Path(path) / "config.json").read_text())["model_type"] for path in prepared.teachers
    }
    assert len(families) == 2
    rows = lambda path: [json.loads(line) for line in material.Path(path).read_text().splitlines()]
    assert all(set(row) == {"text"} for row in rows(prepared.texts))  # nothing to peek at
    assert [row["text"] for row in rows(prepared.texts)] == [row["text"] for row in rows(prepared.texts_labelled)]
    assert not {row["text"] for row in rows(prepared.eval)} & {row["text"] for row in rows(prepared.texts)}
    transformers.AutoModel.from_pretrained(prepared.student)

    weights = material.Path(prepared.teachers[0]) / "model.safetensors"
    before = weights.stat().st_mtime_ns, weights.read_bytes()
    assert material.prepare(config.output, config) == prepared
    assert weights.stat().st_mtime_ns == before[0]
    with pytest.raises(UserError, match=r"holds a demo with seed 0 \(now 1\)"):
        material.prepare(config.output, config.model_copy(update={"seed": 1}))
    (material.Path(config.output) / "material" / material.MARKER).unlink()  # as a killed demo leaves it
    material.prepare(config.output, config)
    assert weights.stat().st_mtime_ns != before[0]
    assert weights.read_bytes() == before[1]  # the same seed gives the same teacher


def test_a_link_to_a_demo_stays_one(config, short_recipe, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "demo").symlink_to("real")
    (tmp_path / ".real.replaced").mkdir()  # a run, set aside by `train --overwrite`
    material.prepare(config.output, config)
    demo.clear(tmp_path / "demo")
    assert not (tmp_path / "real").exists() and [path.name for path in tmp_path.glob(".*")] == [".real.replaced"]


def test_other_peoples_folders_are_left_alone(config, tmp_path):
    for name in ("thesis.txt", "material/notes.txt"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("years of work")
        for overwrite in (False, True):
            with pytest.raises(UserError, match="holds files that no demo wrote"):
                demo.main(config.model_copy(update={"output": str(folder), "overwrite": overwrite}))
        assert (folder / name).read_text() == "years of work"


def test_too_few_texts_are_refused(capsys, tmp_path):
    fewest = 10 * len(material.LIBRARIES)
    assert cli.main(["demo", "--limit", str(fewest - 1), "--output", str(tmp_path / "x")]) == 2
    assert f"--limit {fewest - 1}: must be an integer >= {fewest}" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_gpu_without_kernels_is_refused_before_anything_is_made(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(engine, "resolve_device", lambda _: "cuda")
    monkeypatch.setattr(table, "why_no_launch", lambda: "no compiler")
    assert cli.main(["demo", "--output", str(tmp_path / "x")]) == 2
    assert "Triton can start no kernels there (no compiler)" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_run_without_teachers_gets_the_demos(monkeypatch, tmp_path):
    asked = []
    prepared = material.Prepared(["a", "b"], "encoder", "texts", "labelled", "held-out")
    monkeypatch.setattr(material, "prepare", lambda workdir, config: asked.append((workdir, config.seed)) or prepared)
    filled = material.fill_in(RunConfig(seed=7, epochs=1))
    assert asked == [("runs/demo", 7)]
    assert (filled.teachers, filled.texts, filled.eval) == (["a", "b"], "texts", "held-out")
    assert filled.output == "runs/demo/student"
    assert filled.epochs == 1  # given
    assert filled.learning_rate == material.STUDENT_OPTIONS["learning_rate"]  # not given
    assert filled.student == "encoder"
    (tmp_path / "run.yaml").write_text("batch_size: 16\nlearning_rate: 1e-4\n")
    filled = material.fill_in(load_config(RunConfig, tmp_path / "run.yaml", {"ds_config": {"zero_optimization": {"stage": 1}}}))
    assert (filled.batch_size, filled.learning_rate) == (16, 1e-4)  # given in a file
    assert material.fill_in(RunConfig(student="mine")).student == "mine"
    assert material.fill_in(RunConfig(output=str(tmp_path / "mine"))).output == str(tmp_path / "mine")
    assert material.fill_in(RunConfig(method="oracle")).texts == "labelled"
    with pytest.raises(UserError, match="--limit 50: must be an integer >= 100"):
        material.fill_in(RunConfig(limit=50))


# ---- the whole ----


@pytest.mark.slow
@pytest.mark.timeout(1800)  # twenty-one small runs
def test_the_demo_prints_its_table_and_continues_where_it_stopped(config, short_recipe, monkeypatch, capsys):
    monkeypatch.setattr(demo, "STUDENT_OPTIONS", material.STUDENT_OPTIONS | {"epochs": 1})
    assert demo.main(config) == 0
    first = capsys.readouterr().out
    for row in ("teacher arrays", "teacher symbols", "teacher learning", *demo.RUNS):
        assert re.search(rf"{re.escape(row)}.*\d", first), row
    assert first.count("-> ") == 3
    student = material.Path(config.output) / "students" / "muka-auto"
    assert transformers.AutoModelForSequenceClassification.from_pretrained(student).config.num_labels == len(
        docstrings.LIBRARIES
    )
    before = (student / "model.safetensors").stat().st_mtime_ns
    assert demo.main(config) == 0
    assert capsys.readouterr().out == first
    assert (student / "model.safetensors").stat().st_mtime_ns == before
    assert demo.main(config.model_copy(update={"overwrite": True})) == 0
    assert capsys.readouterr().out == first  # the same seed, the same table
