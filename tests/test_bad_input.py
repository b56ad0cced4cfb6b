"""Bad input through the command line: exit code 2, one line on stderr that names the culprit and the way out, nothing lost."""

import json
import os
import resource
import shutil

import pytest
from safetensors.torch import load_file, save_file

from muka_fast import cli

LABELS_A, LABELS_B = ("sport", "money"), ("weather", "music")


@pytest.fixture
def world(tmp_path, make_teacher, texts, monkeypatch):
    """Two teachers, a student, unlabelled and labelled texts in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    make_teacher("bert", LABELS_A, seed=1, name="first")
    make_teacher("bert", LABELS_B, seed=2, name="second")
    make_teacher("bert", ("x", "y"), seed=3, name="student")
    names = [*LABELS_A, *LABELS_B]
    rows = [{"text": text, "label": names[i % 4]} for i, text in enumerate(texts[:24])]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def command(world):
    """command(name, **changes) -> the argument list of a sound call of that command, with options changed (None: left out)."""
    sound = {
        "train": {"teachers": ["first", "second"], "student": "student", "texts": "texts.jsonl", "output": "out"},
        "score": {"teachers": ["first", "second"], "texts": "texts.jsonl", "output": "store"},
        "teach": {"encoder": "student", "train": "texts.jsonl", "labels": "sport,money", "output": "out"},
        "eval": {"model": "first", "data": "texts.jsonl"},
    }
    cheap = {"train": {"epochs": 1, "mc_samples": 2, "max_length": 16}, "score": {"mc_samples": 2, "max_length": 16}}

    def argv(name, **changes):
        words = [name]
        for option, value in (sound[name] | cheap.get(name, {"max_length": 16}) | changes).items():
            if value is True:
                words.append(f"--{option}")
            elif value is not None:
                words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
        return words

    return argv


def snapshot(folder):
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(world, capsys):
    """refused(argv, *words): exit code 2, the one error line holds the words, and no file that was there changed."""

    def check(argv, *words):
        before = snapshot(world)
        capsys.readouterr()
        code = cli.main(argv)
        err = capsys.readouterr().err
        assert code == 2, err
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        errors = [line for line in lines if line.startswith("muka-fast: error: ")]
        assert len(errors) == 1 and lines[-1] == errors[0], err
        assert "Traceback" not in err
        for word in words:
            assert str(word) in errors[0], errors[0]
        after = snapshot(world)
        assert {name: content for name, content in after.items() if name in before} == before
        for name in set(after) - set(before):
            assert os.path.basename(name) not in ("config.json", "model.safetensors"), f"{name} was written"
        return errors[0]

    return check


def accepted(argv, capsys):
    """Run a sound command; returns what it told."""
    code = cli.main(argv)
    err = capsys.readouterr().err
    assert code == 0, err
    return err


# ---- texts ----

TEXT_OPTION = {"train": "texts", "score": "texts", "teach": "train", "eval": "data"}


@pytest.fixture(params=TEXT_OPTION)
def with_texts(request, command):
    """with_texts(file, **changes): a command of each kind that reads `file`."""
    name = request.param
    return lambda file, **changes: command(name, **{TEXT_OPTION[name]: file}, **changes)


def test_missing_file(with_texts, refused):
    refused(with_texts("nowhere.jsonl"), "nowhere.jsonl", "no such file")


def test_a_folder_instead_of_a_file(with_texts, refused):
    refused(with_texts("first"), "first", "is a folder")


def test_empty_file(with_texts, refused, world):
    (world / "empty.jsonl").touch()
    refused(with_texts("empty.jsonl"), "empty.jsonl", "empty")


def test_only_blank_texts(with_texts, refused, world):
    (world / "blank.csv").write_text('text,label\n"  ",sport\n,money\n')
    refused(with_texts("blank.csv"), "blank.csv", "no text", "2 blank")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_wrong_encoding(with_texts, refused, world, encoding):
    (world / "odd.csv").write_bytes("text,label\nfine,sport\ncafé,money\n".encode(encoding))
    refused(with_texts("odd.csv"), "odd.csv", "UTF-8", "iconv")


def test_missing_text_column(with_texts, refused, world):
    (world / "other.csv").write_text("sentence,label\na,sport\nb,money\n")
    refused(with_texts("other.csv"), "other.csv", "'text'", "'sentence'", "--text_column")


def test_missing_label_column(command, refused, world):
    (world / "bare.csv").write_text("text,topic\na,sport\nb,money\n")
    for argv in (
        command("teach", train="bare.csv"),
        command("eval", data="bare.csv"),
        command("train", texts="bare.csv", method="supervised"),
        command("train", texts="bare.csv", method="oracle"),
    ):
        refused(argv, "bare.csv", "'label'", "'topic'", "--label_column")


def test_broken_json(with_texts, refused, world):
    (world / "broken.jsonl").write_text('{"text": "a", "label": "sport"}\n{"text": "b"\n')
    refused(with_texts("broken.jsonl"), "broken.jsonl, line 2", "not valid JSON")


def test_unknown_kind_of_file(with_texts, refused, world):
    (world / "texts.docx").write_bytes(b"PK")
    refused(with_texts("texts.docx"), "texts.docx", ".jsonl")


def test_blank_texts_are_skipped_and_counted(command, world, capsys):
    lines = (world / "texts.jsonl").read_text().splitlines()
    blank = [
        '{"text": "  \\n", "label": "sport"}',
        '{"text": "", "label": "money"}',
        '{"text": null, "label": "sport"}',
    ]
    (world / "some.jsonl").write_text("\n".join([blank[0], *lines[:4], blank[1], *lines[4:8], blank[2]]))
    assert "some.jsonl: 3 blank texts skipped" in accepted(command("score", texts="some.jsonl"), capsys)


def test_a_text_of_a_megabyte(command, world, capsys):
    rows = [{"text": "word " * 200_000}, {"text": "x" * 1_000_000}, {"text": "short"}]
    (world / "huge.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    accepted(command("score", texts="huge.jsonl"), capsys)


def test_labels_that_no_row_has(command, refused):
    refused(command("teach", labels="sport,monye"), "--labels", "'monye'", "money")


# ---- teachers ----


def spoil_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def configure(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def put_nan(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_head(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


# What happens to a model folder, and words of the line that says so.
FAULTS = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no tokenizer": (spoil_tokenizer, "no tokenizer"),
    "truncated weights": (truncate, "model.safetensors is truncated or corrupt"),
    "only a pickle": (only_pickle, "pickle"),
    "regression": (configure(problem_type="regression"), "regression"),
    "multi-label": (configure(problem_type="multi_label_classification"), "multi-label"),
    "NaN weights": (put_nan, "classifier.weight holds NaN"),
    "no head": (drop_head, "classifier.bias"),
    "another model": (configure(architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
    "gap in the labels": (configure(id2label={"0": "weather", "2": "music"}), "id2label"),
    "too many labels": (configure(id2label={"0": "a", "1": "b", "2": "c"}), "id2label"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["train", "score"])
def test_a_broken_teacher(fault, name, command, refused, world):
    spoil, word = FAULTS[fault]
    spoil(world / "second")
    refused(command(name), "second", word)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_model_to_measure(fault, command, refused, world):
    spoil, word = FAULTS[fault]
    spoil(world / "first")
    refused(command("eval"), "first", word.replace(" holds NaN", ""))


@pytest.mark.parametrize("name", ["train", "score", "teach", "eval"])
def test_a_gpu_that_is_not_there(name, command, refused):
    refused(command(name, device="cuda:77"), "--device cuda:77")


@pytest.mark.parametrize("name", ["train", "score"])
def test_no_teacher(name, command, refused):
    refused(command(name, teachers=None), "--teachers")
    refused(command(name, teachers=[]), "--teachers")


@pytest.mark.parametrize("name", ["train", "score"])
def test_one_teacher_works_and_where_that_is_all_there_is_a_warning_says_so(name, command, capsys):
    """A store may get others before and after."""
    told = accepted(command(name, teachers=["first"]), capsys)
    assert told.count("only one teacher (first)") == (name == "train")


@pytest.mark.parametrize("name", ["train", "score"])
def test_the_same_teacher_twice(name, command, refused, world):
    refused(command(name, teachers=["first", "second", "./first"]), "first", "given twice")
    shutil.copytree(world / "first", world / "copy")
    refused(command(name, teachers=["first", "copy"]), "first", "copy", "same model")


def test_teachers_without_dropout(command, refused, make_teacher):
    make_teacher("bert", LABELS_B, dropout=0.0, name="dry")
    refused(command("train", teachers=["first", "dry"]), "dry", "--mc_dropout_p")


@pytest.mark.parametrize("name", ["train", "score"])
def test_a_second_teacher_that_cannot_be_sampled_is_refused_before_the_first_is_scored(
    name, command, refused, make_teacher, world
):
    make_teacher("bert", LABELS_B, dropout=0.0, name="dry")
    make_teacher("bert", LABELS_B, name="low")
    refused(command(name, teachers=["first", "dry"]), "dry", "--mc_dropout_p")
    refused(command(name, teachers=["first", "low"], mc_scope="last:9"), "--mc_scope last:9", "first")
    assert not list(world.rglob("shard-*"))


@pytest.mark.parametrize("changes", [{"eval": "foreign.jsonl"}, {"texts": "foreign.jsonl", "method": "oracle"}])
@pytest.mark.parametrize("filled", [False, True])
def test_labels_that_are_no_class_are_refused_before_any_work(changes, filled, command, refused, world, capsys):
    rows = [{"text": json.loads(line)["text"], "label": "other"} for line in (world / "texts.jsonl").open()]
    (world / "foreign.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if filled:  # a store instead of teachers
        accepted(command("score", texts=changes.get("texts", "texts.jsonl")), capsys)
        changes = changes | {"teachers": None, "store": "store"}
    refused(command("train", **changes), "foreign.jsonl", "--label_map")
    assert not list((world / "out").rglob("shard-*")) and not (world / "out" / "run.json").exists()


# ---- the student ----


@pytest.mark.parametrize("fault", ["no folder", "no config", "no tokenizer", "truncated weights", "only a pickle"])
@pytest.mark.parametrize(("name", "word"), [("train", "student"), ("teach", "student")])
def test_a_broken_student(fault, name, word, command, refused, world):
    FAULTS[fault][0](world / "student")
    refused(command(name), word)


# ---- options ----


def test_label_map_with_unknown_names(command, refused, world):
    for content, word in (
        ({"sprot": "sport"}, "'sprot'"),
        ({"frist": {"sport": None}}, "'frist'"),
        ({"first": {"music": "m"}}, "'music'"),
        ({"first": {"sport": None, "money": None}}, "first"),
    ):
        (world / "map.json").write_text(json.dumps(content))
        refused(command("train", label_map="map.json"), word)


@pytest.mark.parametrize("content", ["[1, 2]", "{", "text", '{"sport": 1.5}'])
def test_a_label_map_that_is_none(command, refused, world, content):
    (world / "map.json").write_text(content)
    refused(command("train", label_map="map.json"), "map.json")


def test_missing_label_map(command, refused):
    refused(command("train", label_map="nowhere.json"), "nowhere.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "muka-sotf"}, ("--method", "muka-sotf", "muka-soft")),
        ({"uncertainty": "entropy"}, ("--uncertainty", "predictive_entropy")),
        ({"mc_scope": "last"}, ("--mc_scope", "last:M")),
        ({"mc_scope": "last:9"}, ("--mc_scope", "last:9")),
        ({"mc_samples": 0}, ("--mc_samples", "0")),
        ({"score_temperature": -1}, ("--score_temperature",)),
        ({"epochs": "three"}, ("--epochs", "three")),
        ({"techers": "x"}, ("--techers", "--teachers")),
        ({"ds_config": "nowhere.json"}, ("nowhere.json",)),
        ({"config": "nowhere.yaml"}, ("nowhere.yaml",)),
        ({"texts": None}, ("--texts",)),
        ({"student": None}, ("--student",)),
        ({"output": None}, ("--output",)),
        ({"resume": True, "overwrite": True}, ("--resume", "--overwrite")),
    ],
)
def test_bad_options_of_train(command, refused, options, words):
    refused(command("train", **options), *words)


def test_unknown_command(refused):
    assert "(nearest: train)" in refused(["trian"], "trian")
    assert "nearest" not in refused(["foo"], "foo")  # 'score' is not near


# ---- the output ----


def finished_run(world):
    """What a run leaves behind, as far as the guard looks."""
    (world / "out").mkdir()
    for name, content in (("run.json", "{}"), ("config.json", "{}"), ("model.safetensors", "weights")):
        (world / "out" / name).write_text(content)


def test_an_output_that_holds_a_run(command, refused, world):
    finished_run(world)
    refused(command("train"), "--output", "out", "--overwrite")
    for more in ({}, {"overwrite": True}):
        refused(command("teach", **more), "--output", "out", "did not write")


@pytest.mark.parametrize("name", ["train", "teach"])
def test_an_output_with_foreign_files(name, command, refused, world):
    (world / "out").mkdir()
    (world / "out" / "thesis.tex").write_text("mine")
    refused(command(name), "--output out", "new or empty folder")
    refused(command(name, overwrite=True), "--output out", "new or empty folder")


def test_an_output_that_is_a_file(command, refused, world):
    (world / "out").write_text("mine")
    for name in ("train", "teach", "score"):
        refused(command(name, output="out"), "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"texts": "nowhere.jsonl"},
        {"student": "nowhere"},
        {"teachers": ["first", "nowhere"]},
        {"label_map": "no.json"},
        {"eval": "nowhere.csv"},
    ],
)
def test_bad_input_with_overwrite_leaves_the_old_run_in_place(changes, command, refused, world):
    finished_run(world)
    refused(command("train", overwrite=True, **changes), "no")
    assert (world / "out" / "run.json").exists()


@pytest.mark.parametrize(("name", "option"), [("score", "output"), ("train", "store")])
def test_a_store_in_a_models_folder(name, option, command, refused, world):
    refused(command(name, **{option: "first"}), "first: a model's folder cannot hold scores; name another one")


def test_a_store_of_other_texts(command, refused, world, capsys):
    accepted(command("score"), capsys)
    (world / "other.jsonl").write_text('{"text": "something else"}\n')
    refused(command("score", texts="other.jsonl"), "store")
    refused(command("train", texts="other.jsonl", store="store"), "store")


@pytest.mark.parametrize(
    ("name", "limit"),
    [("score", 100), ("score", 1_500)]
    + [(name, limit) for name in ("teach", "train") for limit in (100, 3_000, 30_000)],
)
def test_a_disk_that_takes_no_more(name, limit, command, refused, capsys):
    # As in tests/test_export.py: every file that grows beyond the limit is cut, as on a full disk.
    argv = command(name)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        refused(argv, "store" if name == "score" else "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # With room again the same command, resumed, comes to its end.
    accepted([*argv, "--resume"] if name == "train" else argv, capsys)
