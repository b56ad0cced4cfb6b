"""The store's files on disk: keys, ranges, and readers that meet damaged bytes and manifests."""

import fcntl
import json
import multiprocessing
import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_supervision import text_set

from muka_fast import store as store_module
from muka_fast.errors import UserError
from muka_fast.features import Features
from muka_fast.store import (
    MATRICES,
    OPTION_KEYS,
    VECTORS,
    differing_options,
    merge_manifest,
    read_manifest,
    read_shard,
    shard_ranges,
    teacher_key,
)
from muka_fast.stored import open_store


def test_the_teacher_key_depends_on_what_decides_the_numbers_and_on_nothing_else():
    base = {
        "fingerprint": "f",
        "tokenizer_key": "t",
        "name": "n",
        "labels": ["a"],
        "seed": 1,
        "max_length": 128,
        "mc": True,
    }
    base |= {"mc_samples": 16, "mc_scope": "last:1", "mc_dropout_p": None, "run_seed": 0}
    base |= {"mc_stop": None, "scoring_precision": "fp32"}
    changes = {
        "fingerprint": "g",
        "tokenizer_key": "u",
        "max_length": 64,
        "mc": False,
        "mc_samples": 8,
        "mc_scope": "all",
    }
    changes |= {"mc_dropout_p": 0.1, "run_seed": 1}
    keys = [teacher_key(base, "x"), teacher_key(base, "y")]
    keys += [teacher_key(base | {name: value}, "x") for name, value in changes.items()]
    assert len(set(keys)) == len(keys)
    assert teacher_key(base | {"name": "m", "sites": []}, "x") == keys[0]
    assert keys[0] == "dcd59029e6b3b2a0"  # stores of every version
    halves = {teacher_key(base | {"scoring_precision": name, "mc": mc}, "x") for name in ("bf16", "fp16") for mc in (True, False)}
    assert len(halves | set(keys)) == len(keys) + 4
    early = [base | {"mc_stop": level, "company": company} for level in (0.02, 0.05) for company in (["a"], ["a", "b"])]
    assert len({teacher_key(entry, "x") for entry in early} | set(keys)) == len(keys) + 4
    assert len({teacher_key(entry | {"mc": False}, "x") for entry in early}) == 1
    once = base | {"mc": False}
    assert teacher_key(once | {"mc_samples": 8, "run_seed": 5, "mc_scope": "all"}, "x") == teacher_key(once, "x")


@given(st.integers(1, 10_000), st.integers(1, 5000))
def test_shards_cover_every_row_once(count, size):
    ranges = shard_ranges(count, size)
    assert [row for shard in ranges for row in range(shard.start, shard.stop)] == list(range(count))
    assert all(shard.number == j and shard.stop - shard.start <= size for j, shard in enumerate(ranges))


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory):
    folder, shard = tmp_path_factory.mktemp("shard"), shard_ranges(3, 3)[0]
    rng = np.random.default_rng(0)
    tensors = {name: rng.random((3, 2)).astype(np.float32) for name in MATRICES}
    tensors |= {name: rng.random(3).astype(np.float32) for name in VECTORS} | {"example_ids": np.arange(3)}
    tensors["features"] = rng.random((3, 4)).astype(np.float16)
    store_module.write_shard(folder, shard, "key", tensors)
    return folder, shard, tensors, shard.path(folder).read_bytes()


@settings(max_examples=300)
@given(data=st.data())
def test_no_damage_of_bytes_gives_a_wrong_answer(one_shard, data):
    folder, shard, tensors, whole = one_shard
    store_module.VERIFIED.clear()  # these files may be written faster than a file system's clock ticks
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    shard.path(folder).write_bytes(
        content[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else content
    )
    try:
        found = read_shard(folder, shard, "key", 2)
    except store_module.DamagedShard:
        return
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)


def test_a_whole_shard_is_verified_once_and_a_changed_one_anew(tmp_path, one_shard, monkeypatch):
    _, shard, tensors, whole = one_shard
    digests, digest = [], store_module._digest
    monkeypatch.setattr(store_module, "_digest", lambda found: digests.append(1) or digest(found))
    shard.path(tmp_path).write_bytes(whole)
    for _ in range(3):
        found = read_shard(tmp_path, shard, "key", 2, only=("features",))
        assert found.keys() == {"features"} and np.array_equal(found["features"], tensors["features"])
    assert len(digests) == 1
    with pytest.raises(store_module.DamagedShard, match="shape or type"):
        read_shard(tmp_path, shard, "key", 3)
    shard.path(tmp_path).write_bytes(whole[:-4] + b"wxyz")
    os.utime(shard.path(tmp_path), ns=(1, 1))
    with pytest.raises(store_module.DamagedShard, match="checksum"):
        read_shard(tmp_path, shard, "key", 2)


@given(st.lists(st.integers(0, 59), min_size=1, max_size=80), st.integers(1, 70))
def test_rows_of_features_are_found_in_their_shards(rows, size):
    values = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float16)
    read = []
    features = Features(shard_ranges(60, size), lambda part: read.append(part.number) or values[part.start : part.stop])
    assert np.array_equal(features.rows(np.array(rows)), values[rows].astype(np.float32))
    assert read == sorted({row // size for row in rows})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300)
@given(data=st.data())
def test_no_manifest_crashes_the_reader(one_shard, data):
    entry = {"fingerprint": "f", "tokenizer_key": "t", "name": "n", "labels": ["a"], "max_length": 128, "mc": True}
    entry |= {"mc_samples": 16, "mc_scope": "last:1", "mc_dropout_p": None, "run_seed": 0}
    entry |= {"mc_stop": None, "scoring_precision": "fp32"}
    good = {
        "format": 1,
        "texts": {"fingerprint": "x", "count": 3},
        "shard_size": 3,
        "teachers": {teacher_key(entry, "x"): entry},
    }
    place = good
    while isinstance(place, dict) and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or data.draw(st.booleans()):
            place[key] = data.draw(json_values)
            break
        place = place[key]
    store = one_shard[0] / "manifests"
    store.mkdir(exist_ok=True)
    (store / "manifest.json").write_text(json.dumps(good))
    for read in (read_manifest, open_store):
        try:
            read(store)
        except UserError as error:
            message = str(error)
        else:
            message = str(store)
        assert str(store) in message and "\n" not in message


def test_a_manifest_that_counts_too_many_texts_takes_no_memory(tmp_path, one_shard):
    entry = {"fingerprint": "f", "tokenizer_key": "t", "name": "n", "labels": ["a"], "max_length": 128, "mc": False}
    entry |= {"mc_samples": 1, "mc_scope": "head", "mc_dropout_p": None, "run_seed": 0}
    entry |= {"mc_stop": None, "scoring_precision": "fp32"}
    manifest = {"format": 1, "texts": {"fingerprint": "x", "count": 2**62}, "shard_size": 1}
    manifest["teachers"] = {teacher_key(entry, "x"): entry}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"shard-{2**62 - 1}\.safetensors"):
        open_store(tmp_path)


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    host = store_module.socket.gethostname()
    here = store_module._process_space()
    names = {f".shard-00000.safetensors.{host}.{here}.{pid}.abc.tmp": pid == os.getpid() for pid in (child.pid, os.getpid())}
    # Of other containers, whose processes are not seen here.
    names |= {f".shard-00000.safetensors.{host}.1.{child.pid}.{age}.tmp": age == "young" for age in ("young", "old")}
    for name in names:
        (tmp_path / name).touch()
        if "old" in name:
            os.utime(tmp_path / name, (0, 0))
    store_module.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}


@given(count=st.integers(1, 10**7))
def test_default_shards_feed_several_processes_without_many_files(count):
    size = store_module.default_shard_size(count)
    assert 256 <= size <= 4096
    shards = len(store_module.shard_ranges(count, size))
    assert shards >= 15 or size == 256
    assert shards <= 16 or size == 4096


def test_two_writers_of_a_manifest_wait_for_each_other(tmp_path):
    texts, done = text_set(), threading.Event()
    merge_manifest(tmp_path, texts, 4)
    with open(tmp_path / ".lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: merge_manifest(tmp_path, texts, 4) and done.set())
        thread.start()
        assert not done.wait(0.3)
    thread.join(10)
    assert done.is_set()


def test_a_single_pass_differs_by_its_precision_and_not_by_its_samples():
    entry = dict.fromkeys(OPTION_KEYS) | {"mc": False, "mc_samples": 16, "max_length": 128, "scoring_precision": "fp32"}
    assert differing_options(entry, entry | {"mc_samples": 8, "run_seed": 1}) == []
    assert differing_options(entry, entry | {"scoring_precision": "bf16"}) == ["scoring_precision"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *given: done.append("replace") or replace(*given))
    store_module.write_atomically(tmp_path / "file", b"content")
    assert done == ["fsync", "replace"]


def test_scores_of_other_texts_are_not_taken_over(tmp_path):
    merge_manifest(tmp_path / "old", text_set(tag="other "), 4)
    assert not store_module.take_over(tmp_path / "old", tmp_path / "new", text_set()) and not (tmp_path / "new").exists()


def test_a_store_that_is_there_already_takes_nothing_over(tmp_path):
    for name in ("old", "new"):
        merge_manifest(tmp_path / name, text_set(), 4)
    before = {path: path.read_bytes() for path in (tmp_path / "new").rglob("*")}
    assert not store_module.take_over(tmp_path / "old", tmp_path / "new", text_set())
    assert {path: path.read_bytes() for path in (tmp_path / "new").rglob("*")} == before != {}


def test_scores_alone_are_taken_over(tmp_path):
    """A lock that both stores had would be one, and a line of either's log be in both."""
    old, new = tmp_path / "old", tmp_path / "new"
    merge_manifest(old, text_set(), 4)
    for name in ("key/shard-00000.safetensors", "logs/rank0.log"):
        (old / name).parent.mkdir()
        (old / name).write_text("x")
    assert store_module.take_over(old, new, text_set())
    assert {path.relative_to(new).as_posix() for path in new.rglob("*")} == {
        ".lock", "key", "key/shard-00000.safetensors", "manifest.json",
    }  # fmt: skip
    linked = [path.name for path in new.rglob("*") if path.is_file() and path.samefile(old / path.relative_to(new))]
    assert linked == ["shard-00000.safetensors"]


def test_a_teacher_that_is_merged_again_has_its_later_name(tmp_path):
    entry = {"fingerprint": "f", "tokenizer_key": "t", "labels": ["a"], "max_length": 128, "mc": False}
    entry |= {"mc_samples": 1, "mc_scope": "head", "mc_dropout_p": None, "run_seed": 0, "mc_stop": None, "scoring_precision": "fp32"}
    texts = text_set()
    key = teacher_key(entry, texts.fingerprint)
    for name in ("first", "later"):
        merge_manifest(tmp_path, texts, 4, (key, entry | {"name": name}))
    assert {key: entry["name"] for key, entry in read_manifest(tmp_path)["teachers"].items()} == {key: "later"}
