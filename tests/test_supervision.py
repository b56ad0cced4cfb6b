"""The supervision store: every invariant of muka_fast/store.py, kills, damage, full disks, two writers; and real
teachers through it."""

import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from group_targets import exit_codes, open_together
from launch import launcher_variables
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from muka_fast import memory, pool_tokens, scoring, stored, supervision
from muka_fast import store as store_module
from muka_fast.config import RunConfig
from muka_fast.data import TextSet, Tokens
from muka_fast.errors import UserError
from muka_fast.seeds import seed_of
from muka_fast.shard_queue import ShardQueue
from muka_fast.store import MATRICES, VECTORS, read_manifest, read_shard, shard_ranges, teacher_key
from muka_fast.stored import load_supervision, open_store
from muka_fast.supervision import fill_store

LABELS = {"red": ["a", "b"], "blue": ["b", "c", "d"]}
FORK = multiprocessing.get_context("fork")


def text_set(n=10, source="texts.jsonl", tag=""):
    """n texts; their rows in the source have gaps, as after blank lines."""
    ids = np.arange(n, dtype=np.int64) * 2 + 1
    return TextSet([f"{tag}text {i}" for i in ids], None, ids, source, f"fp-{tag}-{n}", 0)


def expected_logits(labels, example_ids):
    ids = torch.as_tensor(example_ids, dtype=torch.float32)[:, None]
    return torch.sin(ids * (torch.arange(len(labels)) + 1 + len(labels)))


def expected_features(labels, example_ids):
    """As many features as classes and one; multiples of 1/8 below 256, which fp16 holds exactly."""
    ids = torch.as_tensor(example_ids, dtype=torch.float32)[:, None]
    return ids / 8 + torch.arange(len(labels) + 1)


class Stage:
    """Stand-ins for teachers and tokenizer that count what they do and fail on demand."""

    def __init__(self):
        self.loaded, self.dtypes, self.scored, self.tokenised = [], [], [], []
        self.before_batch = lambda teacher, ids: None
        self.poison = None  # (teacher, example id) that gets NaN
        self.key = None  # of the tokenizer, as far as files tell

    def load_teacher(self, path, *, run_seed, device, dtype, name, most_gib):
        self.loaded.append(path)
        self.dtypes.append(dtype)
        return SimpleNamespace(
            name=name, path=path, labels=LABELS[path], fingerprint=f"weights of {path}", tokenizer=None,
            tokenizer_key="bpe", seed=run_seed, pad_id=0, max_length=64, model=SimpleNamespace(device="cpu"),
        )  # fmt: skip

    def tokenize(self, tokenizer, texts, max_length):
        self.tokenised.append(max_length)
        return Tokens.of(np.zeros(3 * len(texts), np.int32), np.full(len(texts), 3)), 0

    def make_scorer(self, teacher, **options):
        return SimpleNamespace(
            teacher=teacher, sites=[{"index": 0, "p": 0.1}], launch=lambda *args: self.score(teacher, *args)
        )

    def score(self, teacher, input_ids, attention_mask, example_ids):
        assert input_ids.shape == attention_mask.shape == (len(example_ids), 3)
        self.before_batch(teacher, example_ids)
        self.scored += [(teacher.path, int(i)) for i in example_ids]
        logits = expected_logits(teacher.labels, example_ids)
        probs = torch.softmax(logits, -1)
        entropy = -(probs * probs.log()).sum(-1)
        if self.poison is not None and teacher.path == self.poison[0]:
            entropy[example_ids == self.poison[1]] = float("nan")
        return SimpleNamespace(
            logits=logits,
            mean_probs=probs,
            var_probs=probs / 8,
            predictive_entropy=entropy,
            expected_entropy=entropy / 2,
            features=expected_features(teacher.labels, example_ids),
        )


@pytest.fixture
def stage(monkeypatch):
    stage = Stage()
    files = lambda path: SimpleNamespace(fingerprint=f"weights of {path}", labels=LABELS[path], tokenizer_key=stage.key)
    monkeypatch.setattr(supervision, "check_teachers", lambda paths: list(map(files, paths)))
    monkeypatch.setattr(supervision, "check_sites", lambda names, files, options: None)
    monkeypatch.setattr(supervision, "family_of", lambda files: files.fingerprint)
    monkeypatch.setattr(supervision, "load_teacher", stage.load_teacher)
    monkeypatch.setattr(pool_tokens, "tokenize_quietly", stage.tokenize)
    monkeypatch.setattr(pool_tokens, "tokenizer_key", lambda tokenizer, max_length: str(max_length))
    monkeypatch.setattr(supervision, "StochasticTeacher", stage.make_scorer)
    return stage


def options(**more):
    return RunConfig(**({"shard_size": 4, "token_budget": 16, "device": "cpu"} | more))


def fill(store, paths=("red", "blue"), texts=None, **more):
    return fill_store(store, list(paths), texts or text_set(), options(**more))


def check(sup, paths=("red", "blue"), texts=None):
    """The supervision holds what the stand-ins give, in the order of the texts."""
    texts = texts or text_set()
    assert torch.equal(sup.example_ids, torch.from_numpy(texts.example_ids))
    assert [t["name"] for t in sup.teachers] == list(paths)
    for i, path in enumerate(paths):
        logits = expected_logits(LABELS[path], texts.example_ids)
        probs = torch.softmax(logits, -1)
        columns = slice(sup.offsets[i], sup.offsets[i + 1])
        assert torch.equal(sup.logits[:, columns], logits)
        torch.testing.assert_close(sup.mean_probs[:, columns], probs)
        torch.testing.assert_close(sup.total_variance[:, i], torch.full((len(texts),), 1 / 8))
        torch.testing.assert_close(sup.predictive_entropy[:, i], -(probs * probs.log()).sum(-1))
        torch.testing.assert_close(sup.mutual_information[:, i], sup.expected_entropy[:, i])
        features = expected_features(LABELS[path], texts.example_ids).numpy()
        for rows, found in sup.features[i].chunks():
            assert np.array_equal(found, features[rows])
        some = np.array([9, 0, 5])
        assert np.array_equal(sup.features[i].rows(some), features[some])


def folder_of(store, name):
    return store / next(key for key, entry in read_manifest(store)["teachers"].items() if entry["name"] == name)


def test_beside_a_gpu_the_copies_of_a_shard_are_asked_for_before_the_next_one(tmp_path, stage, monkeypatch):
    """By the thread that launches: those of the thread that writes would stand behind the next shard, and the device would wait."""
    threads, fetch, work = [], scoring.Fetch, ShardQueue.work
    monkeypatch.setattr(scoring, "Fetch", lambda values: threads.append(threading.current_thread()) or fetch(values))
    monkeypatch.setattr(ShardQueue, "work", lambda self, *rest: work(self, *rest[:-1], torch.device("cuda")))
    check(fill(tmp_path))
    assert set(threads) == {threading.main_thread()}


@pytest.mark.parametrize(("device", "fast", "bound"), [("cuda", True, 1.0), ("cuda", None, 0.08), ("cpu", True, 0.08)])
def test_a_gpu_is_given_full_batches_of_packed_texts(tmp_path, stage, monkeypatch, device, fast, bound):
    bounds, batches = [], scoring.token_budget_batches
    monkeypatch.setattr(scoring, "token_budget_batches", lambda *rest: bounds.append(rest[2]) or batches(*rest))
    scorer = lambda *rest, **more: SimpleNamespace(**vars(stage.make_scorer(*rest, **more)), fast=fast)
    monkeypatch.setattr(supervision, "StochasticTeacher", scorer)
    on = lambda store, texts, _, **sizes: scoring.Scoring(store, texts, SimpleNamespace(type=device), **sizes)
    monkeypatch.setattr(supervision, "Scoring", on)
    check(fill(tmp_path))
    assert set(bounds) == {bound}


# ---- format ----


def test_a_filled_store_gives_back_every_number_in_text_order(tmp_path, stage):
    check(fill(tmp_path / "s"))
    check(open_store(tmp_path / "s", text_set()))
    check(fill(tmp_path / "s", ("blue", "red")), ("blue", "red"))  # the order asked for, nothing scored again
    manifest = read_manifest(tmp_path / "s")
    assert load_supervision(tmp_path / "s", manifest, list(manifest["teachers"]), ["x", "y"]).teachers[0]["name"] == "x"
    assert manifest == read_manifest(tmp_path / "s")
    assert len(stage.scored) == 20


def test_files_of_the_store_are_as_documented(tmp_path, stage):
    fill(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["shard_size"] == 4
    assert manifest["texts"] == {"fingerprint": "fp--10", "count": 10, "source": "texts.jsonl", "num_blank": 0}
    (tokens,) = tmp_path.glob("tokens-*")
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", ".lock", tokens.name, *manifest["teachers"]}
    for key, entry in manifest["teachers"].items():
        assert entry["mc_samples"] == 16 and entry["mc_scope"] == "last:1" and entry["sites"]
        assert entry["seed"] == seed_of(0, entry["fingerprint"])
        assert key == teacher_key(entry, "fp--10")
        files = sorted((tmp_path / key).iterdir())
        assert [path.name for path in files] == [f"shard-0000{j}.safetensors" for j in range(3)]
        for path, rows in zip(files, (4, 4, 2), strict=True):
            tensors, C = load_file(path), len(entry["labels"])
            shapes = {name: ((rows, C), np.float32) for name in MATRICES} | {
                name: ((rows,), np.float32) for name in VECTORS
            }
            shapes |= {"example_ids": ((rows,), np.int64), "features": ((rows, C + 1), np.float16)}
            assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == shapes
            with safe_open(path, framework="np") as file:
                note = json.loads(file.metadata()["muka_fast"])
            assert set(note) == {"format", "teacher", "start", "stop", "sha256"}
            assert note["teacher"] == key and note["stop"] - note["start"] == rows


# ---- what runs and what does not ----


def test_adding_a_teacher_or_an_option_set_runs_only_that(tmp_path, stage):
    fill(tmp_path, ["red"])
    stage.scored.clear()
    check(fill(tmp_path))
    assert {path for path, _ in stage.scored} == {"blue"}
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*.safetensors")}
    stage.scored.clear()
    fill(tmp_path, ["red"], mc_samples=8)
    assert len(stage.scored) == 10
    assert all(path.read_bytes() == content for path, content in before.items())
    with pytest.raises(UserError, match=r"'red' under several options \(mc_samples\)"):
        open_store(tmp_path)
    check(open_store(tmp_path, options={"mc_samples": 16, "run_seed": 0}))
    check(
        open_store(tmp_path, options={"mc_samples": 16, "run_seed": 7})
    )  # no choice: students of several seeds share it
    fill(tmp_path, ["red"], seed=7)
    assert {
        t["name"]: t["run_seed"] for t in open_store(tmp_path, options={"mc_samples": 16, "run_seed": 7}).teachers
    } == {
        "red": 7,
        "blue": 0,
    }
    with pytest.raises(UserError, match=r"'red' under several options \(run_seed\)"):
        open_store(tmp_path, options={"mc_samples": 16, "run_seed": 8})
    with pytest.raises(UserError, match=r"mc_scope 'last:1' \(this run: 'all'\)"):
        open_store(tmp_path, options={"mc_scope": "all"})


@pytest.mark.parametrize("names", [[], ["red", "blue"]])
def test_a_teacher_that_changed_is_not_merged_with_what_it_was(tmp_path, stage, names):
    fill(tmp_path)
    manifest = read_manifest(tmp_path)
    key, entry = next((key, entry) for key, entry in manifest["teachers"].items() if entry["name"] == "red")
    changed = entry | {"fingerprint": "0" * 64}
    manifest["teachers"][teacher_key(changed, manifest["texts"]["fingerprint"])] = changed
    shutil.copytree(tmp_path / key, tmp_path / list(manifest["teachers"])[-1])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"several teachers named 'red', or one before and after its files changed: give --teachers"):
        open_store(tmp_path, names=names)
    check(fill(tmp_path))  # which names its teachers by their files
    assert len(open_store(tmp_path, names=["blue"]).teachers) == 1


def test_teachers_are_named_once_and_where_the_store_has_them_with_these_options(tmp_path, stage):
    fill(tmp_path)
    with pytest.raises(UserError, match="--store_teachers: red is given twice; name every teacher once"):
        open_store(tmp_path, names=["red", "red"])
    fill(tmp_path, ["red"], mc_samples=8)
    with pytest.raises(UserError, match=r"--store_teachers blue: .* holds it only with other options"):
        open_store(tmp_path, options={"mc_samples": 8}, names=["red", "blue"])


def test_a_teacher_that_was_scored_with_other_options_is_left_out_and_told(tmp_path, stage, caplog):
    fill(tmp_path, ["red"], mc_samples=8)
    fill(tmp_path, ["blue"])
    assert [teacher["name"] for teacher in open_store(tmp_path, options={"mc_samples": 16}).teachers] == ["blue"]
    assert "red is left out, as it was scored with mc_samples 8 (this run: 16)" in caplog.text
    caplog.clear()
    fill(tmp_path, ["red"])
    check(open_store(tmp_path, options={"mc_samples": 16}, names=["red", "blue"]))
    assert len(open_store(tmp_path, options={"mc_samples": 16}).teachers) == 2 and "left out" not in caplog.text


def test_scores_without_passes_are_of_no_seed(tmp_path, stage, caplog):
    with caplog.at_level("INFO", logger="muka_fast"):
        for mc in (True, False):
            fill(tmp_path / str(mc), mc=mc, seed=7)
            open_store(tmp_path / str(mc), options={"mc": mc, "run_seed": 0})
    assert caplog.text.count("scores of another --seed than 0: red 7, blue 7") == 1


def test_precisions_stand_side_by_side(tmp_path, stage):
    fill(tmp_path)
    assert fill(tmp_path, scoring_precision="bf16").teachers[0]["scoring_precision"] == "bf16"
    assert stage.dtypes == [torch.float32] * 2 + [torch.bfloat16] * 2 and len(stage.scored) == 40
    with pytest.raises(UserError, match=r"'red' under several options \(scoring_precision\)"):
        open_store(tmp_path)
    assert open_store(tmp_path, options=supervision.option_values(options())).teachers[0]["scoring_precision"] == "fp32"
    fill(tmp_path)
    assert len(stage.scored) == 40
    with pytest.raises(UserError, match=r"scoring_precision 'fp32' \(this run: 'fp16'\)"):
        open_store(tmp_path, options=supervision.option_values(options(scoring_precision="fp16")))
    manifest = read_manifest(tmp_path)
    for entry in manifest["teachers"].values():
        entry.pop("scoring_precision")  # as it was before there was a choice
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json: teacher '\w+' is incomplete; restore it or choose another folder"):
        open_store(tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_precision_that_is_slow_here_is_told(precision, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "muka_fast")
    for amx in (False, True):
        able = {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": amx}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        memory.tell_precision("--precision", precision, "cpu")
        assert ("this CPU does not compute in it" in caplog.text) == (precision == "fp16")
        assert ("bf16 is faster on this CPU" in caplog.text) == (precision == "fp32" and amx)
        caplog.clear()
    memory.tell_precision("--precision", precision, "cuda")
    assert ("bf16 is faster" in caplog.text) == (precision == "fp32")


def test_a_store_is_opened_in_the_order_of_the_latest_scoring(tmp_path, stage):
    fill(tmp_path, ["red"])
    fill(tmp_path, ["blue", "red"])  # red was there first
    check(open_store(tmp_path, text_set()), ["blue", "red"])
    written = (tmp_path / "manifest.json").stat().st_mtime_ns
    fill(tmp_path, ["blue", "red"])
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == written


def test_each_distinct_tokenizer_tokenises_once(tmp_path, stage):
    shards = len(fill(tmp_path, max_length=128)) // 4 + 1
    assert stage.tokenised == [64] * shards  # cut at the teachers' own limit
    fill(tmp_path, max_length=128, seed=1)
    assert stage.tokenised == [64] * shards


def test_batch_and_shard_sizes_do_not_matter(tmp_path, stage):
    check(fill(tmp_path / "a", shard_size=1, token_budget=16))
    check(fill(tmp_path / "b", shard_size=100, token_budget=1000))
    check(fill(tmp_path / "b", shard_size=3))  # the store keeps its own
    assert read_manifest(tmp_path / "b")["shard_size"] == 100


def test_a_store_of_other_texts_is_refused_with_the_difference_and_stays(tmp_path, stage):
    fill(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"10 of 'texts.jsonl' .*this run has 9 of 'other.csv'"):
        fill(tmp_path, texts=text_set(9, "other.csv"))
    with pytest.raises(UserError, match="holds the scores of other texts"):
        open_store(tmp_path, text_set(tag="x"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_store_that_is_empty_or_a_file_is_refused(tmp_path, stage):
    with pytest.raises(UserError, match="muka-fast score"):
        open_store(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file: the store cannot be written .*another folder"):
        fill(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


# ---- kills and damage ----


def test_a_killed_run_continues_at_the_next_missing_shard(tmp_path, stage):
    def die(teacher, ids):
        if teacher.path == "blue" and len(stage.scored) >= 10 + 4:
            raise KeyboardInterrupt

    stage.before_batch = die
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path)
    assert [entry["name"] for entry in read_manifest(tmp_path)["teachers"].values()] == ["red"]  # blue is not complete
    stage.before_batch = lambda teacher, ids: None
    done = len(stage.scored)
    check(fill(tmp_path))
    assert sorted(stage.scored[done:]) == [("blue", int(i)) for i in text_set().example_ids[4:]]


def slowly(stage, store, ready):
    stage.before_batch = lambda teacher, ids: time.sleep(0.004)
    ready.set()
    fill(store)
    os._exit(0)


def test_sigkill_at_any_moment_loses_nothing(tmp_path, stage):
    for attempt in range(8):
        store, ready = tmp_path / str(attempt), FORK.Event()
        child = FORK.Process(target=slowly, args=(stage, store, ready))
        child.start()
        ready.wait(20)
        time.sleep(0.006 * attempt)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        check(fill(store))
        assert not list(store.rglob("*.tmp"))


def test_two_processes_fill_one_store(tmp_path, stage):
    children = [FORK.Process(target=slowly, args=(stage, tmp_path, FORK.Event())) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    check(fill(tmp_path))
    assert stage.scored == []  # everything was there, whole
    assert not list(tmp_path.rglob("*.tmp"))


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def damage_empty(path):
    path.write_bytes(b"")


def damage_forge(path):
    """Valid safetensors with right shapes, without a checksum."""
    save_file(load_file(path), path)


def damage_swap(path):
    shutil.copy(path.with_name("shard-00000.safetensors"), path)


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_empty, damage_forge, damage_swap])
def test_a_damaged_shard_is_named_and_computed_again(tmp_path, stage, damage, caplog):
    fill(tmp_path)
    path = folder_of(tmp_path, "blue") / "shard-00001.safetensors"
    whole = path.read_bytes()
    damage(path)
    with pytest.raises(UserError, match=r"shard-00001.safetensors is damaged.*muka-fast score"):
        open_store(tmp_path)
    stage.scored.clear()
    with caplog.at_level(logging.WARNING, "muka_fast"):
        check(fill(tmp_path))
    assert f"{path} is damaged" in caplog.text
    assert sorted(stage.scored) == [("blue", int(i)) for i in text_set().example_ids[4:8]]
    assert path.read_bytes() == whole


def test_a_missing_shard_is_named(tmp_path, stage):
    fill(tmp_path)
    (folder_of(tmp_path, "red") / "shard-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-00002.safetensors is missing"):
        open_store(tmp_path)
    check(fill(tmp_path))


def test_a_shard_of_another_teacher_is_not_believed(tmp_path, stage):
    fill(tmp_path)
    fill(tmp_path, ["red"], seed=1)
    folders = [tmp_path / key for key, entry in read_manifest(tmp_path)["teachers"].items() if entry["name"] == "red"]
    shutil.copy(folders[0] / "shard-00000.safetensors", folders[1])
    with pytest.raises(store_module.DamagedShard, match="another teacher"):
        read_shard(folders[1], shard_ranges(10, 4)[0], folders[1].name, 2)


def test_a_shard_without_features_is_damaged(tmp_path, stage, caplog):
    fill(tmp_path)
    folder, shard = folder_of(tmp_path, "red"), shard_ranges(10, 4)[0]
    whole = shard.path(folder).read_bytes()
    tensors = read_shard(folder, shard, folder.name, 2)
    features = tensors.pop("features")
    for found in ({}, {"features": features[:3]}, {"features": features[:, 0].copy()}, {"features": features.astype(np.float32)}):
        store_module.write_shard(folder, shard, folder.name, tensors | found)
        with pytest.raises(UserError, match=r"0.safetensors is damaged: tensor 'features' is missing.*run `muka-fast score`"):
            open_store(tmp_path)
        caplog.clear()
        check(fill(tmp_path))
        assert "shard-00000.safetensors is damaged" in caplog.text and shard.path(folder).read_bytes() == whole


def test_features_are_read_when_asked_for_and_verified_then(tmp_path, stage):
    fill(tmp_path)
    sup = open_store(tmp_path)
    path = folder_of(tmp_path, "blue") / "shard-00001.safetensors"
    path.unlink()
    assert len(sup.features[1].rows(np.array([0, 9]))) == 2
    with pytest.raises(UserError, match=r"shard-00001.safetensors is missing; run `muka-fast score`"):
        list(sup.features[1].chunks())


def test_features_of_verified_shards_are_not_read_for_the_rest(tmp_path, stage, monkeypatch):
    fill(tmp_path)  # it reads, and so verifies, what it wrote
    read, original = [], store_module.safe_open

    @contextmanager
    def recording(path, framework):
        with original(path, framework=framework) as file:
            record = lambda name: read.append(name) or file.get_tensor(name)
            yield SimpleNamespace(get_tensor=record, keys=file.keys, metadata=file.metadata)

    monkeypatch.setattr(store_module, "safe_open", recording)
    open_store(tmp_path)
    assert set(read) >= {"logits", "mean_probs", "var_probs", "example_ids"} and "features" not in read


def test_a_complete_teacher_is_not_loaded_where_its_files_tell_enough(tmp_path, stage, caplog):
    with caplog.at_level("INFO", logger="muka_fast"):
        for key, loaded in ((None, 2), ("bpe", 2), ("changed", 4), (None, 6)):
            stage.key = key
            check(fill(tmp_path))
            assert len(stage.loaded) == loaded, key
    assert caplog.text.count("teacher red: already scored") == 3
    folder = folder_of(tmp_path, "blue")
    (folder / "shard-00001.safetensors").unlink()
    stage.key = "bpe"
    check(fill(tmp_path))
    assert stage.loaded[6:] == ["blue"]


def test_each_shard_is_verified_by_one_of_the_processes(tmp_path, stage):
    sup = fill(tmp_path / "store", shard_size=1)
    given = [(own, tmp_path / "store", tmp_path / f"out{rank}.npz") for rank, own in enumerate(launcher_variables(2))]
    assert exit_codes(open_together, given) == [0, 0]
    found = [np.load(tmp_path / f"out{rank}.npz") for rank in range(2)]
    assert sum(int(part["made"]) for part in found) == 2 * len(sup)
    assert all(np.array_equal(part["logits"], sup.logits.numpy()) for part in found)


def test_a_stop_while_shards_are_verified_is_heeded_at_once(tmp_path, stage, monkeypatch, python_hears_ctrl_c):
    fill(tmp_path, shard_size=1)
    store_module.VERIFIED.clear()
    read, begun = store_module.read_tensors, []

    def slowly(*rest):
        begun.append(rest)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        return read(*rest)

    monkeypatch.setattr(store_module, "read_tensors", slowly)
    monkeypatch.setattr(stored, "READERS", 2)
    with pytest.raises(KeyboardInterrupt):
        open_store(tmp_path)
    assert len(begun) < 10  # of 20


def test_what_was_verified_is_not_read_again_to_find_what_is_missing(tmp_path, stage, monkeypatch):
    fill(tmp_path)
    tensors, read = [], store_module.read_tensors
    monkeypatch.setattr(store_module, "read_tensors", lambda *rest: tensors.append((found := read(*rest)).keys()) or found)
    monkeypatch.setattr(stored, "verify_shards", None)
    run = scoring.Scoring(tmp_path, text_set(), torch.device("cpu"), 4, 64, None, ShardQueue().__enter__())
    for key, entry in read_manifest(tmp_path)["teachers"].items():
        assert run.missing_shards(key, entry) == []
    assert tensors and all(names == {"example_ids"} for names in tensors)


def test_a_shard_that_changes_after_another_process_has_verified_it_is_verified_anew(tmp_path, stage):
    fill(tmp_path)
    path = folder_of(tmp_path, "blue") / "shard-00001.safetensors"

    class WithAnother(ShardQueue):
        def gather(self, mine):
            path.write_bytes(path.read_bytes()[:-4] + b"wxyz")
            os.utime(path, ns=(1, 1))
            return [mine]

    with pytest.raises(UserError, match=r"shard-00001.safetensors is damaged: checksum does not match"):
        open_store(tmp_path, queue=WithAnother())


def test_a_head_without_features_is_named(tmp_path, stage, monkeypatch):
    monkeypatch.setitem(globals(), "expected_features", lambda labels, ids: torch.empty(len(ids), 0))
    sup = fill(tmp_path)
    with pytest.raises(UserError, match="the head of teacher 'red' has no features"):
        sup.features[0].rows(np.array([0]))


def test_features_beyond_half_precision_are_cut_to_its_range():
    found = store_module.half(np.array([1e6, -1e6, 0.1, np.nan], np.float32))
    assert found.dtype == np.float16 and found[:3].tolist() == [65504.0, -65504.0, float(np.float16(0.1))]
    assert np.isnan(found[3])


# ---- faults of the machine and of teachers ----


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path, stage, monkeypatch, number):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 7:  # manifest, tokens and scores of two shards, tokens of the third, then the disk is full
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(UserError, match=r"shard-00002.*the disk is full.*finished shards are kept"):
        fill(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3 + 2
    done = len(stage.scored)
    check(fill(tmp_path))
    assert len(stage.scored) - done == 20 - 8


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nan_is_refused_with_teacher_and_text_and_not_stored(tmp_path, stage, monkeypatch, device):
    """On a GPU shards are looked at and written in a second thread, here beside the CPU."""
    work = ShardQueue.work
    monkeypatch.setattr(ShardQueue, "work", lambda *given: work(*given[:-1], torch.device(device)))
    stage.poison = ("blue", 13)
    with pytest.raises(UserError, match=r"teacher 'blue': its output for text 13 of 'texts.jsonl' .* is NaN"):
        fill(tmp_path)
    assert [entry["name"] for entry in read_manifest(tmp_path)["teachers"].values()] == ["red"]
    stage.poison = None
    check(fill(tmp_path))


def test_teachers_of_other_texts_are_not_put_side_by_side(tmp_path, stage):
    fill(tmp_path)
    folder, shard = folder_of(tmp_path, "blue"), shard_ranges(10, 4)[1]
    tensors = read_shard(folder, shard, folder.name, 3)
    store_module.write_shard(folder, shard, folder.name, tensors | {"example_ids": tensors["example_ids"][::-1].copy()})
    with pytest.raises(UserError, match=r"shard-00001.safetensors: its example ids differ"):
        open_store(tmp_path)
