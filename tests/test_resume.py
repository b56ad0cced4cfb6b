"""A run that was stopped goes on bit for bit, or says why it does not; faults of the loss and of the disk."""

import argparse
import errno
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from runs import SMOOTH_ADAM, largest_difference, losses, weights

from muka_fast import identity, loop, runinfo, snapshots, train
from muka_fast.config import RunConfig
from muka_fast.errors import UserError
from muka_fast.files import held, write_beside_others, write_json


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_sigterm_saves_and_resume_continues_bit_for_bit(go, stop_at, monkeypatch, stage):
    ds = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 8}
    whole = go("whole", ds=ds)
    stop_at(7)
    stopped = go("cut", ds=ds)
    assert stopped.stopped and not (stopped.output / "model.safetensors").exists()
    monkeypatch.undo()
    resumed = go("cut", ds=ds, resume=True)
    assert not resumed.stopped and losses(resumed) == losses(whole)
    assert largest_difference(weights(resumed), weights(whole)) == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ctrl_c_saves_and_a_second_one_ends_at_once(go, stop_at, monkeypatch, caplog, python_hears_ctrl_c):
    caplog.set_level("WARNING", logger="muka_fast")
    before, whole = signal.getsignal(signal.SIGINT), go("whole")
    stop_at(7, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        go("cut")
    monkeypatch.undo()
    assert "stopped by SIGINT after step 8 of 15; continue with --resume" in caplog.text
    assert losses(go("cut", resume=True)) == losses(whole)
    with loop.stop_signals() as arrived:
        signal.raise_signal(signal.SIGINT)
        assert arrived == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with loop.stop_signals() as arrived:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        assert arrived == [signal.SIGTERM] and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_of_a_caller_cannot_listen_and_runs_all_the_same():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def listen():
        with loop.stop_signals() as arrived:
            return arrived, [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(listen).result() == ([], before)


def test_metrics_on_a_full_disk_name_their_file(tmp_path):
    run = argparse.Namespace(rank=0, completed_steps=0, last_lr=1.0, grad_norm=1.0)
    plan, config = argparse.Namespace(total_steps=1, steps_per_epoch=1), argparse.Namespace(log_every=1)
    told = r"metrics\.jsonl: No space left on device; .* --resume"

    def write():
        with loop.Metrics(tmp_path, run, plan, config) as metrics:
            metrics.file.close()
            metrics.file = open("/dev/full", "w")  # noqa: SIM115 - closed by Metrics
            metrics.step(1, 0.5, 2)

    with pytest.raises(UserError, match=told):
        write()


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    for begun_at, steps in ((0, (10, 20)), (0, (10, 20, 30)), (20, (30, 40))):  # without a checkpoint; from that of step 20
        board = runinfo.tensorboard(tmp_path, begun_at)
        for step in steps:
            board.add_scalar("loss", begun_at + step, step)
        board.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 10), (20, 20), (30, 50), (40, 60)]


def test_a_signal_that_c_code_handles_stays_with_it(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    set_to = []
    monkeypatch.setattr(signal, "signal", lambda *given: set_to.append(given))
    with loop.stop_signals() as arrived:
        assert arrived == []
    assert set_to == []


def test_resume_in_another_layout(go, stop_at, monkeypatch, world):
    options = {"student": str(world / "plain_student"), "method": "muka-soft"}  # whose texts have weights
    whole = go("whole", ds=SMOOTH_ADAM, **options)
    stop_at(7)
    go("cut", ds={**SMOOTH_ADAM, "zero_optimization": {"stage": 3}}, **options)
    monkeypatch.undo()
    resumed = go("cut", ds={**SMOOTH_ADAM, "train_micro_batch_size_per_gpu": 4}, resume=True, **options)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6, abs=1e-8)
    assert largest_difference(weights(resumed), weights(whole)) < 1e-6


def keep_checkpoints(monkeypatch):
    """The names of the checkpoints that a run leaves for its end to remove."""
    names = []

    def discard(output, _original=snapshots.discard):
        names.extend(sorted(path.name for path in output.glob("checkpoints/*")))
        _original(output)

    monkeypatch.setattr(snapshots, "discard", discard)
    return names


def test_the_last_two_checkpoints_stay_until_the_end_and_a_damaged_one_is_passed_over(go, stop_at, monkeypatch, caplog):
    whole = go("whole")
    stop_at(9)
    cut = go("cut", save_every=3)
    monkeypatch.undo()
    newest = snapshots.snapshots(cut.output)[-1]
    assert newest.name == "step-00000010"
    with open(newest / "state-00000.safetensors", "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x01")
    (cut.output / "checkpoints" / "step-00000012.partial").mkdir()  # as a kill leaves it
    caplog.set_level("WARNING", logger="muka_fast")
    left = keep_checkpoints(monkeypatch)
    resumed = go("cut", resume=True, save_every=3)
    assert "step-00000010 is damaged (state-00000.safetensors does not match its checksum)" in caplog.text
    assert losses(resumed) == losses(whole) and largest_difference(weights(resumed), weights(whole)) == 0
    # The damaged one takes no whole one's place. A complete run needs none.
    assert left == ["step-00000009", "step-00000010.damaged", "step-00000012"]
    assert not (resumed.output / "checkpoints").exists()


@pytest.mark.parametrize(
    ("seconds", "save_every", "kept"),
    [(0, None, [10, 15]), (60, None, []), (0, 4, [12, 15]), (60, 4, [8, 12])],  # the end is not short of one for --save_every
)
def test_epochs_leave_checkpoints_unless_they_are_short(go, monkeypatch, seconds, save_every, kept):
    monkeypatch.setattr(loop, "SAVE_S", seconds)
    left = keep_checkpoints(monkeypatch)
    go("run", save_every=save_every)
    assert left == [f"step-{step:08d}" for step in kept]


@pytest.mark.parametrize(("save_every", "kept"), [(None, [14, 15]), (4, [12])])
def test_a_long_epoch_leaves_checkpoints_by_the_clock(go, monkeypatch, save_every, kept):
    whole = go("whole")
    monkeypatch.setattr(loop, "MOST_S", 0)
    left = keep_checkpoints(monkeypatch)
    run = go("run", save_every=save_every)
    assert left[-len(kept) :] == [f"step-{step:08d}" for step in kept]
    assert losses(run) == losses(whole) and largest_difference(weights(run), weights(whole)) == 0


@pytest.mark.parametrize("last", [13, 14])
def test_a_signal_in_the_last_steps_ends_the_run(go, stop_at, monkeypatch, last):
    whole = go("whole")
    stop_at(last)
    cut = go("cut")
    monkeypatch.undo()
    assert cut.stopped and not (cut.output / "model.safetensors").exists()
    resumed = go("cut", resume=True)
    assert losses(resumed) == losses(whole) and largest_difference(weights(resumed), weights(whole)) == 0


def test_resume_refuses_another_run(go, stop_at, monkeypatch, world, tmp_path):
    stop_at(3)
    go("cut")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"learning_rate 0\.001 -> 0\.002.*--overwrite"):
        go("cut", resume=True, learning_rate=2e-3)
    others = {"store": str(tmp_path / "other_store")}  # which stays empty: nothing is scored before the refusal
    with pytest.raises(UserError, match=r"\(other texts\)"):
        go("cut", resume=True, limit=70, **others)
    with pytest.raises(UserError, match=r"\(other teachers\)"):
        go("cut", resume=True, teachers=[str(world / "news")], **others)
    with pytest.raises(UserError, match=r"\(another order of teachers\)"):
        go("cut", resume=True, teachers=[str(world / "home"), str(world / "news")], **others)
    with pytest.raises(UserError, match=r"\(other student\)"):
        go("cut", resume=True, student=str(world / "plain_student"), **others)
    assert not (tmp_path / "other_store").exists()
    assert go("cut", resume=True).output.joinpath("model.safetensors").exists()


def test_an_output_folder_with_a_run_is_refused_and_a_complete_one_is_left_alone(go, world, tmp_path, product_log):
    shutil.copy(world / "texts.jsonl", tmp_path / "other.jsonl")
    first = go("run", epochs=1, eval=str(world / "texts.jsonl"))
    before = {path.name: path.stat().st_mtime_ns for path in first.output.iterdir()}
    with pytest.raises(UserError, match="already holds a run"):
        go("run", epochs=1)
    assert go("run", epochs=1, resume=True).metrics == first.metrics
    with pytest.raises(UserError, match=r"epochs 1 -> 2.*--overwrite"):
        go("run", epochs=2, resume=True)
    with pytest.raises(UserError, match=r"\(other student\)"):
        go("run", epochs=1, resume=True, student=str(world / "plain_student"))
    with pytest.raises(UserError, match=r"optimizer .* -> "):
        go("run", epochs=1, resume=True, ds=SMOOTH_ADAM)
    assert "was evaluated on" not in product_log.text
    go("run", epochs=1, resume=True, eval=str(tmp_path / "other.jsonl"))
    assert f"was evaluated on {world / 'texts.jsonl'}; for {tmp_path / 'other.jsonl'} use `muka-fast eval`" in product_log.text
    assert {path.name: path.stat().st_mtime_ns for path in first.output.iterdir()} == before


def test_a_complete_run_is_done_only_for_the_files_that_it_read(go, world, tmp_path, caplog):
    """Files that were written since are read again."""
    caplog.set_level("INFO", logger="muka_fast")
    for name in ("texts.jsonl", "news", "student"):
        copy = shutil.copytree if (world / name).is_dir() else shutil.copy
        copy(world / name, tmp_path / name)
    own = {"texts": str(tmp_path / "texts.jsonl"), "teachers": [str(tmp_path / "news"), str(world / "home")], "epochs": 1}
    own |= {"student": str(tmp_path / "student"), "store": None}
    first = go("run", **own)
    record = (first.output / "run.json").read_bytes()

    def change(path, old, new):
        content = path.read_text()
        path.write_text(content.replace(old, new))
        return lambda: path.write_text(content)

    changed = {
        "other texts": (tmp_path / "texts.jsonl", "i", "u"),
        "other teachers": (tmp_path / "news" / "config.json", "sport", "spurt"),
        "other tokenizers of teachers": (tmp_path / "news" / "tokenizer.json", "Whitespace", "WhitespaceSplit"),
        "other tokenizer of the student": (tmp_path / "student" / "tokenizer.json", "Whitespace", "WhitespaceSplit"),
    }
    for told, where in changed.items():
        undo = change(*where)
        with pytest.raises(UserError, match=rf"{told}.*--overwrite"):
            go("run", resume=True, **own)
        undo()  # as it was, but written since
        caplog.clear()
        assert go("run", resume=True, **own).metrics == first.metrics
        assert "is complete: nothing to resume" in caplog.text and "student in" not in caplog.text
    assert (first.output / "run.json").read_bytes() == record


def test_the_files_of_an_adapter_do_not_tell_that_nothing_has_changed(tmp_path):
    """Its base may lie anywhere."""
    for name in ("plain", "teacher"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts.txt").write_text("a\n")
    config = RunConfig(teachers=[str(tmp_path / "plain"), str(tmp_path / "teacher")], texts=str(tmp_path / "texts.txt"))
    earlier = {"config": config.resolved(), "inputs": {}}
    assert identity.untouched(config, earlier, {})
    (tmp_path / "teacher" / "adapter_config.json").write_text("{}")
    assert not identity.untouched(config, earlier, {})


@pytest.mark.parametrize("option", ["teachers", "student", "neutral_encoder", "texts"])
def test_names_on_the_hub_do_not_tell_that_nothing_has_changed(tmp_path, option):
    (tmp_path / "model").mkdir()
    (tmp_path / "texts.txt").write_text("a\n")
    models = dict.fromkeys(("student", "neutral_encoder"), str(tmp_path / "model"))
    local = {"teachers": [str(tmp_path / "model")], "texts": str(tmp_path / "texts.txt"), **models}
    for given, same in ((local, True), (local | {option: ["owner/name"] if option == "teachers" else "owner/name"}, False)):
        config = RunConfig(**given)
        assert identity.untouched(config, {"config": config.resolved(), "inputs": {}}, {}) is same


@pytest.mark.parametrize("way", ["moved", "folder", "link", "above"])
def test_an_older_file_in_the_place_of_one_that_was_read_is_another(go, world, tmp_path, way):
    """Its time of writing says nothing."""
    for name in ("data", "data2"):
        (tmp_path / name).mkdir()
    mine, other = tmp_path / "data" / "mine.jsonl", tmp_path / "data2" / "mine.jsonl"
    rows = (world / "texts.jsonl").read_text().splitlines(keepends=True)
    other.write_text("".join(rows[:40]))
    shutil.copytree(world / "home", tmp_path / "older")
    shutil.copytree(world / "news", tmp_path / "news")
    config = tmp_path / "older" / "config.json"
    config.write_text(config.read_text().replace("bank", "till"))
    shutil.copy(world / "texts.jsonl", tmp_path / "data" / "first.jsonl")
    mine.symlink_to("first.jsonl") if way == "link" else mine.write_text("".join(rows))
    own = {"texts": str(mine), "teachers": [str(tmp_path / "news"), str(world / "home")], "epochs": 1}
    first = go("run", **own)
    assert go("run", resume=True, **own).metrics == first.metrics
    if way == "moved":
        os.replace(other, mine)
    elif way == "link":
        mine.unlink()
        mine.symlink_to(other)
    elif way == "above":
        os.replace(tmp_path / "data", tmp_path / "data1")
        os.replace(tmp_path / "data2", tmp_path / "data")
    else:
        shutil.rmtree(tmp_path / "news")
        os.replace(tmp_path / "older", tmp_path / "news")
    with pytest.raises(UserError, match="other teachers" if way == "folder" else "other texts"):
        go("run", resume=True, **own)


def test_a_file_of_the_same_size_and_time_in_the_place_of_one_that_was_read_is_another(tmp_path):
    mine, other = tmp_path / "mine.txt", tmp_path / "other.txt"
    for path, text in ((mine, "ab"), (other, "cd")):
        path.write_text(text)
        os.utime(path, ns=(10**18, 10**18))
    config = RunConfig(texts=str(mine))
    before = identity.input_files(config)
    assert identity.input_files(config) == before
    os.replace(other, mine)
    assert identity.input_files(config) != before


def test_a_pattern_that_matches_fewer_files_is_another(go, world, tmp_path):
    rows = (world / "texts.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("a", rows[:40]), ("b", rows[40:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    own = {"texts": f"{tmp_path}/[ab].jsonl", "epochs": 1}
    first = go("run", **own)
    os.chmod(tmp_path / "a.jsonl", 0o400)  # changes no content
    assert go("run", resume=True, **own).metrics == first.metrics
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(UserError, match="other texts"):
        go("run", resume=True, **own)


def test_scores_of_another_seed_are_other_input(go, stop_at, monkeypatch, tmp_path, caplog):
    """A store may hold scores of one seed for students of several; those of a student's own seed may come later."""
    store = str(tmp_path / "scores")
    go("first", epochs=1, store=store)
    options = {"epochs": 3, "store": store, "teachers": [], "seed": 5}
    stop_at(4)
    with caplog.at_level("INFO", "muka_fast"):
        assert go("run", **options).stopped
    assert "scores of another --seed than 5: news 0, home 0" in caplog.text
    monkeypatch.undo()
    go("second", epochs=1, store=store, seed=5)
    with pytest.raises(UserError, match=r"scoring_seeds \[0, 0\] -> \[5, 5\]"):
        go("run", resume=True, **options)


def test_a_complete_run_of_a_store_is_done_only_for_the_teachers_that_it_merged(go, world, tmp_path, caplog):
    go("filled", epochs=1)
    chosen = {"teachers": [], "store_teachers": ["news", "home"], "epochs": 1}
    first = go("run", **chosen)
    caplog.set_level("INFO", logger="muka_fast")
    assert go("run", resume=True, **chosen).metrics == first.metrics and "is complete" in caplog.text
    for names, told in ((["home", "news"], "another order of teachers"), (["news"], "other teachers")):
        with pytest.raises(UserError, match=told):
            go("run", resume=True, **chosen | {"store_teachers": names})


@pytest.mark.parametrize("fault", ["gone", "cut", "longer"])
def test_a_complete_run_without_its_weights_is_not_done(go, fault):
    weights = go("run", epochs=1).output / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink() if fault == "gone" else weights.write_bytes(content[:-9] if fault == "cut" else content + b"x")
    with pytest.raises(UserError, match=r"--resume: the run in .* is complete, but the student: .*--overwrite"):
        go("run", epochs=1, resume=True)


def test_a_method_that_these_teachers_do_not_fit_leaves_the_old_run_in_its_place(go, tmp_path):
    output = go("run", epochs=1).output
    before = sorted(path.name for path in output.iterdir())
    for teachers in ({}, {"teachers": []}):
        for given in ({"method": "mean"}, {"label_map": {"news": {"sport": "a"}, "home": {"nothing": "b"}}}):
            with pytest.raises(UserError, match=r"mean needs teachers of one label set|has no label 'nothing'"):
                go("run", epochs=1, overwrite=True, **given, **teachers)
    assert sorted(path.name for path in output.iterdir()) == before and not list(tmp_path.glob(".run*"))


def test_a_resume_without_the_options_names_the_file_that_has_them(go, tmp_path):
    output = go("run", epochs=1).output
    with pytest.raises(UserError, match=rf"--texts is missing: .*, or go on with --config {output}/run\.yaml --resume"):
        train.amalgamate(output=output, resume=True)


def test_what_a_kill_left_of_an_unfinished_run_goes_with_the_next_resume(go, tmp_path):
    output = go("run", epochs=1).output
    (output / "checkpoints" / "step-00000005").mkdir(parents=True)
    (tmp_path / ".run.replaced").mkdir()
    go("run", epochs=1, resume=True)
    assert not (output / "checkpoints").exists() and not (tmp_path / ".run.replaced").exists()


def test_a_complete_run_is_done_under_other_names_of_its_files(go, world, tmp_path, monkeypatch, caplog):
    first = go("run", epochs=1)
    shutil.copytree(world, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", logger="muka_fast")
    moved = {"texts": "copy/texts.jsonl", "student": "copy/student", "teachers": ["copy/news", "copy/home"]}
    assert go("run", epochs=1, resume=True, **moved).metrics == first.metrics
    assert "is complete: nothing to resume" in caplog.text


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=["new", "resume", "overwrite"])
@pytest.mark.parametrize("begun", [False, True])
def test_one_run_at_a_time_writes_a_folder(go, tmp_path, flags, begun):
    folder = go("run", epochs=1).output if begun else tmp_path / "run"
    folder.mkdir(exist_ok=True)
    with held(folder):
        before = sorted(folder.iterdir())
        with pytest.raises(UserError, match=r"--output .*run: another run is writing there; wait for its end"):
            go("run", epochs=1, **flags)
        assert sorted(folder.iterdir()) == before
    assert not (folder / ".lock").exists()
    if flags or not begun:
        assert not (go("run", epochs=1, **flags).output / ".lock").exists()


def test_a_file_system_without_locks_is_one_line(go, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(UserError, match=r"\.lock: its file system has no locks; mount it with flock"):
        go("run", epochs=1, store=str(tmp_path / "store"))
    with pytest.raises(UserError, match=r"\.lock: its file system has no locks"), held(tmp_path):
        pass


def test_a_lock_that_a_kill_left_is_no_hindrance(go, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert not (go("run", epochs=1).output / ".lock").exists()


def test_a_damaged_record_stops_a_resume_but_not_an_overwrite(go, tmp_path):
    (tmp_path / "run").mkdir()
    for damaged in ('{"config": {}, "identity": null}', '{"config": {}, "identity": ["x"]}', '{"config": 3, "identity": {}}', "{"):
        (tmp_path / "run" / "run.json").write_text(damaged)
        with pytest.raises(UserError, match=r"run\.json: (is not the record of a run|cannot be read .*); start anew with --overwrite"):
            go("run", epochs=1, resume=True)
    assert json.loads((go("run", epochs=1, overwrite=True).output / "run.json").read_text())["state"] == "complete"


def test_a_run_of_another_version_is_not_gone_on_with(go, stop_at, monkeypatch, tmp_path):
    """No option names what that one did not know."""
    stop_at(3)
    go("run")
    monkeypatch.undo()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["identity"]["scoring_precision"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="was begun by another version of muka_fast; start anew with --overwrite"):
        go("run", resume=True)


def test_resume_refuses_other_true_labels(go, stop_at, monkeypatch, world, tmp_path):
    """The texts are the same, so their fingerprint is, too."""
    rows = [json.loads(line) for line in (world / "texts.jsonl").read_text().splitlines()]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stop_at(3)
    go("cut", texts=str(texts), method="supervised")
    monkeypatch.undo()
    texts.write_text("".join(json.dumps(row | {"label": "bank"}) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"other true labels"):
        go("cut", texts=str(texts), method="supervised", resume=True)


def test_other_true_labels_are_no_hindrance_where_none_are_learnt_from(go, world, tmp_path):
    rows = [json.loads(line) for line in (world / "texts.jsonl").read_text().splitlines()]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = go("run", texts=str(texts), method="muka-soft", epochs=1)
    texts.write_text("".join(json.dumps(row | {"label": "bank"}) + "\n" for row in rows))
    assert go("run", texts=str(texts), method="muka-soft", epochs=1, resume=True).metrics == first.metrics


def test_resume_refuses_another_tokenizer(go, stop_at, monkeypatch, world, tmp_path):
    """The weights are the same, but no token is."""
    student = tmp_path / "student"
    shutil.copytree(world / "student", student)
    stop_at(3)
    go("cut", student=str(student))
    monkeypatch.undo()
    file = student / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"other tokenizer of the student"):
        go("cut", student=str(student), resume=True)


def test_an_option_that_the_method_does_not_look_at_may_change(go, world):
    go("run", method="muka-hard", epochs=1, score_temperature=0.2)
    go("run", method="muka-hard", epochs=1, score_temperature=0.4, neutral_encoder=str(world / "plain_student"), resume=True)
    with pytest.raises(UserError, match="margin true -> false"):
        go("run", method="muka-hard", epochs=1, margin=False, resume=True)


# ---- faults ----


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_names_the_texts(go, monkeypatch, value):
    from muka_fast.methods import MukaHard

    def poisoned(self, output, rows, _original=MukaHard._loss):
        return torch.where(rows == 5, float(value), _original(self, output, rows))

    monkeypatch.setattr(MukaHard, "_loss", poisoned)
    # Row 5 is example 6: a blank row before it was skipped, and counts.
    with pytest.raises(UserError, match=rf"loss became {value} at step \d+ for the texts with example ids 6 of .*texts\.jsonl"):
        go("run", method="muka-hard")


def test_a_full_disk_keeps_the_last_checkpoints(go, monkeypatch, world, tmp_path):
    import safetensors.torch

    calls = []

    def save_file(*rest, _original=safetensors.torch.save_file, **options):
        calls.append(rest)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return _original(*rest, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(UserError, match=r"step-00000006: the checkpoint cannot be written .*No space left.*--resume"):
        go("run", save_every=2)
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000002", "step-00000004"]
    monkeypatch.undo()
    whole = go("whole")
    assert largest_difference(weights(go("run", resume=True)), weights(whole)) == 0


OTHER = {
    "seed": 1, "max_length": 64, "batch_size": 8, "warmup_ratio": 0.3, "max_grad_norm": 3.0, "weight_decay": 0.3, "mc_samples": 8,
    "mc_scope": "all", "mc_dropout_p": 0.3, "target": "mc_mean", "kd_temperature": 2.0, "margin": False, "normalize_margin": True,
    "uncertainty": "variance", "score_temperature": 0.7, "uncertainty_head": True, "scoring_precision": "bf16", "mc_stop": 0.1,
    "mc": False,
}  # fmt: skip


def test_a_complete_run_is_not_resumed_with_any_other_option(go, tmp_path):
    go("run", method="muka-soft", epochs=1)
    (tmp_path / "map.json").write_text('{"bank": "cash"}')
    for name, value in OTHER.items():
        with pytest.raises(UserError, match=rf"{name} .* -> .*--overwrite"):
            go("run", method="muka-soft", epochs=1, resume=True, **{name: value})
    inputs = {"limit": (70, "other texts"), "text_column": ("label", "other texts")}
    inputs |= {"label_map": (str(tmp_path / "map.json"), "labels ")}
    for name, (value, told) in inputs.items():
        with pytest.raises(UserError, match=rf"{told}.*--overwrite"):
            go("run", method="muka-soft", epochs=1, resume=True, **{name: value})


def test_a_stopped_run_is_not_resumed_with_any_other_option(go, stop_at, monkeypatch, tmp_path):
    stop_at(3)
    go("cut", method="muka-soft", epochs=1)
    monkeypatch.undo()
    for name in ("seed", "max_length", "max_grad_norm", "mc_samples", "mc_dropout_p", "mc_scope"):
        with pytest.raises(UserError, match=rf"[( ]{name} .* -> .*--overwrite"):
            go("cut", method="muka-soft", epochs=1, resume=True, **{name: OTHER[name]})


def test_resume_refuses_teachers_whose_labels_mean_something_else(go, stop_at, monkeypatch, tmp_path):
    stop_at(3)
    go("cut")
    monkeypatch.undo()
    (tmp_path / "map.json").write_text('{"news": {"science": "sport"}}')  # the same union, in the same order
    with pytest.raises(UserError, match=r"teacher_labels .* -> "):
        go("cut", resume=True, label_map=str(tmp_path / "map.json"))


def test_resume_refuses_another_tokenizer_of_a_teacher(go, stop_at, monkeypatch, world, tmp_path):
    shutil.copytree(world / "news", tmp_path / "news")
    own = {"teachers": [str(tmp_path / "news"), str(world / "home")], "store": str(tmp_path / "store")}
    stop_at(3)
    go("cut", **own)
    monkeypatch.undo()
    file = tmp_path / "news" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    words = [word for word in vocabulary if not word.startswith("[")]
    content["model"]["vocab"] = vocabulary | dict(zip(words, reversed([vocabulary[word] for word in words]), strict=True))
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"\(other tokenizers of teachers\)"):
        go("cut", resume=True, **own)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, disk):
    """Else a loss of power may leave the newest one empty, and the one before is gone after the next."""

    def save_checkpoint(folder):
        (folder / "state-00000.safetensors").write_bytes(b"x")
        return {"completed_steps": 3}

    snapshots.save_snapshot(argparse.Namespace(rank=0, completed_steps=3, save_checkpoint=save_checkpoint), tmp_path)
    assert disk[-1] == ("replace", "step-00000003")
    confirmed = {name for what, name in disk[:-1] if what == "fsync"}
    assert confirmed >= {"state-00000.safetensors", "state.json", "step-00000003.partial"}


def test_a_record_is_on_the_disk_before_it_has_its_name(tmp_path, disk):
    """Else a loss of power may leave run.json empty, and the run must be started anew."""
    write_json(tmp_path / "run.json", {})
    write_beside_others(tmp_path / "answers.jsonl", ["{}\n"], replace=False)
    assert [what for what, _ in disk] == ["fsync", "replace"] * 2
    assert [name for what, name in disk if what == "replace"] == ["run.json", "answers.jsonl"]


def test_a_file_too_many_is_damage(tmp_path):
    (tmp_path / "state-00000.safetensors").write_bytes(b"x")
    digest = snapshots.file_digest(tmp_path / "state-00000.safetensors")
    state = {"engine": {"completed_steps": 3}, "sha256": {"state-00000.safetensors": digest}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert snapshots.damage(tmp_path) is None
    (tmp_path / "state-00001.safetensors").write_bytes(b"y")
    assert snapshots.damage(tmp_path) == "state-00001.safetensors does not belong to it"


def test_a_second_overwrite_takes_over_what_the_run_between_had_scored(go, stop_at, tmp_path, monkeypatch):
    go("run", epochs=1, store=None)
    stop_at(1)
    go("run", epochs=1, store=None, mc_samples=3, overwrite=True)
    shards = {path.relative_to(tmp_path / "run"): path.stat().st_ino for path in tmp_path.glob("run/supervision/*/shard-*")}
    monkeypatch.undo()
    again = go("run", epochs=1, store=None, mc_samples=3, overwrite=True)
    assert {path: (again.output / path).stat().st_ino for path in shards} == shards


def test_overwrite_keeps_the_scores_of_the_same_texts(go, stop_at, tmp_path, caplog):
    caplog.set_level("INFO", logger="muka_fast")
    first = go("run", epochs=1, store=None)
    shards = {path.relative_to(first.output): path.stat().st_ino for path in first.output.glob("supervision/*/shard-*")}
    assert shards
    stop_at(1)
    go("run", epochs=1, store=None, method="muka-soft", overwrite=True)
    assert "scores of these texts that the replaced run has made serve this one" in caplog.text
    assert {path: (tmp_path / ".run.replaced" / path).stat().st_ino for path in shards} == shards  # whole until it is replaced
    again = go("run", epochs=1, store=None, method="muka-soft", resume=True)
    assert {path: (again.output / path).stat().st_ino for path in shards} == shards
    assert not (tmp_path / ".run.replaced").exists()


def test_scores_that_stay_are_of_the_new_runs_teachers_to_whoever_opens_them(go, world):
    go("run", epochs=1, store=None)
    output = go("run", epochs=1, store=None, teachers=[str(world / "home")], overwrite=True).output
    third = go("third", epochs=1, store=str(output / "supervision"), teachers=[])
    assert [teacher["name"] for teacher in json.loads((third.output / "run.json").read_text())["teachers"]] == ["home"]


@pytest.mark.parametrize("fault", ["other texts", "damaged", "none"])
def test_overwrite_scores_anew_where_there_is_nothing_to_keep(go, caplog, fault):
    caplog.set_level("INFO", logger="muka_fast")
    output = go("run", epochs=1, store=None, limit=40 if fault == "other texts" else None).output
    if fault == "damaged":
        (output / "supervision" / "manifest.json").write_text("{")
    if fault == "none":
        shutil.rmtree(output / "supervision")
    again = go("run", epochs=1, store=None, overwrite=True)
    assert "serve this one" not in caplog.text
    assert json.loads((again.output / "run.json").read_text())["state"] == "complete"
    assert ("cannot be taken over" in caplog.text) == (fault == "damaged")
