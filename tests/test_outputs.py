"""The output folder of a run: what is taken, refused, set aside and removed."""

import pytest

from muka_fast import outputs
from muka_fast.errors import UserError


def test_new_and_empty_folders_are_taken(tmp_path):
    assert outputs.output_guard(tmp_path / "a" / "b").is_dir()
    assert outputs.output_guard(tmp_path / "a" / "b", resume=True).is_dir()
    assert outputs.output_guard(tmp_path / "a" / "b", overwrite=True).is_dir()


def test_scores_that_a_refused_run_left_are_no_run(tmp_path):
    (tmp_path / "out" / "supervision").mkdir(parents=True)
    (tmp_path / "out" / "supervision" / "manifest.json").write_text("{}")
    for options in ({}, {"resume": True}):
        assert outputs.output_guard(tmp_path / "out", **options) == tmp_path / "out"
        assert (tmp_path / "out" / "supervision" / "manifest.json").exists()
    outputs.output_guard(tmp_path / "out", overwrite=True)
    assert (tmp_path / ".out.replaced" / "supervision" / "manifest.json").exists()


def test_a_file_and_foreign_files_are_refused_whatever_the_flags(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="this is a file"):
            outputs.output_guard(tmp_path / "file", **options)
        with pytest.raises(UserError, match=r"thesis\.tex"):
            outputs.output_guard(tmp_path / "folder", **options)
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("marker", [marker for marker in outputs.RUN_MARKERS if marker not in outputs.ANY_MODEL])
def test_a_run_is_refused_resumed_or_set_aside(tmp_path, marker):
    output = tmp_path / "out"
    output.mkdir()
    (output / marker).write_text("old")
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        outputs.output_guard(output)
    assert outputs.output_guard(output, resume=True) == output
    assert (output / marker).read_text() == "old"
    outputs.output_guard(output, overwrite=True)
    assert list(output.iterdir()) == []
    assert (tmp_path / ".out.replaced" / marker).read_text() == "old"
    # The new run fails too, and is replaced in turn: the older one is still there.
    (output / marker).write_text("newer")
    outputs.output_guard(output, overwrite=True)
    assert (tmp_path / ".out.replaced" / marker).read_text() == "old"
    assert (tmp_path / ".out.replaced-2" / marker).read_text() == "newer"
    (tmp_path / ".out.replaced-but-mine").mkdir()
    outputs.discard_replaced(output)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".out.replaced-but-mine", "out"]


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_model_that_no_run_wrote_is_neither_replaced_nor_continued(tmp_path, flags):
    for name in ("config.json", "model.safetensors", "teach.json"):
        (tmp_path / name).write_text("a teacher's")
    with pytest.raises(UserError, match="holds a model that no run wrote"):
        outputs.output_guard(tmp_path, **flags)
    assert (tmp_path / "teach.json").read_text() == "a teacher's"


def test_overwrite_never_moves_what_the_run_reads_or_stands_in(tmp_path, monkeypatch):
    output = tmp_path / "out"
    (output / "teachers" / "a").mkdir(parents=True)
    (output / "run.json").write_text("{}")
    with pytest.raises(UserError, match="which this run reads"):
        outputs.output_guard(output, overwrite=True, inputs=[None, "elsewhere", output / "teachers" / "a"])
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(output / "teachers")
    for same in ("~/out/teachers", tmp_path / "link" / "a"):
        with pytest.raises(UserError, match="which this run reads"):
            outputs.output_guard("~/out", overwrite=True, inputs=[same])
    monkeypatch.chdir(output / "teachers")
    with pytest.raises(UserError, match="folder that you are in"):
        outputs.output_guard("..", overwrite=True)
    assert (output / "run.json").exists()


def test_an_output_that_is_a_link_stays_one(tmp_path):
    real, link = tmp_path / "disk" / "runs", tmp_path / "out"
    (real / "logs").mkdir(parents=True)
    (real / "run.json").write_text("old")
    link.symlink_to(real)
    with pytest.raises(UserError, match="which this run reads"):
        outputs.output_guard(link, overwrite=True, inputs=[real / "logs"])
    outputs.output_guard(link, overwrite=True)
    assert link.is_symlink() and list(real.iterdir()) == []
    assert outputs.replaced(link) == [tmp_path / "disk" / ".runs.replaced"]


def test_runs_set_aside_are_listed_from_the_oldest_on(tmp_path):
    names = [".out.replaced", *(f".out.replaced-{n}" for n in range(2, 12))]
    for name in names:
        (tmp_path / name).mkdir()
    assert [folder.name for folder in outputs.replaced(tmp_path / "out")] == names


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output"):
        outputs.output_guard(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="--output"):
        outputs.output_guard("/proc/muka_fast_out")


@pytest.mark.parametrize("name", ["circle", "zero\0byte"])
def test_a_name_that_leads_nowhere(tmp_path, name):
    (tmp_path / "circle").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "circle")
    with pytest.raises(UserError, match="--output"):
        outputs.check_output(tmp_path / name)


def test_a_folder_below_one_that_cannot_be_listed(tmp_path, monkeypatch):
    """As /home is, for those who do not own it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    original = type(tmp_path).iterdir

    def iterdir(path):
        if path == tmp_path:
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(type(tmp_path), "iterdir", iterdir)
    outputs.output_guard(tmp_path / "out", overwrite=True)
    assert outputs.replaced(tmp_path / "out") == [tmp_path / ".out.replaced"]
    outputs.discard_replaced(tmp_path / "out")
    assert not (tmp_path / ".out.replaced").exists()


def test_logs_alone_are_no_run(tmp_path):
    """A run that was refused after it had begun its logs leaves them; the corrected command just works."""
    logs = tmp_path / "out" / "logs" / "rank0.log"
    logs.parent.mkdir(parents=True)
    logs.write_text("a line\n")
    assert outputs.output_guard(tmp_path / "out") == tmp_path / "out" and logs.exists()


FOREIGN = {"mine/data.csv": "mine", "notes.txt": "notes.txt", "inner/run.json": "inner"}
FOREIGN |= {"logs/notes.txt": "logs/notes.txt"}


@pytest.mark.parametrize(("mine", "told"), FOREIGN.items())
def test_overwrite_removes_nothing_that_no_run_wrote(tmp_path, mine, told):
    output = tmp_path / "out"
    (output / mine).parent.mkdir(parents=True)
    (output / mine).write_text("years of work")
    models = ("vocab.txt", "tokenizer.json", "sentencepiece.bpe.model", "word_shape.json", "model-00001-of-00002.safetensors")
    for name in ("run.json", *models):
        (output / name).write_text("")
    with pytest.raises(UserError, match=f"would remove {told}, which no run wrote; name another folder"):
        outputs.output_guard(output, overwrite=True)
    assert (output / mine).read_text() == "years of work" and outputs.output_guard(output, resume=True) == output


def test_the_way_back_to_a_run_that_was_not_replaced_is_told(tmp_path, product_log):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("old")
    (outputs.output_guard(tmp_path / "out", overwrite=True) / "supervision").mkdir()
    outputs.tell_of_replaced(outputs.output_guard(tmp_path / "out", overwrite=True))  # refused once more: only scores were replaced
    assert f"remove {tmp_path / 'out'} and rename {tmp_path / '.out.replaced'} to it" in product_log.text
    product_log.clear()
    (tmp_path / "out" / "run.json").write_text("new")  # has begun: --resume goes on with it
    outputs.tell_of_replaced(tmp_path / "out")
    assert product_log.text == ""
