"""A pool's token ids: those of the tokenizer, made once for all who ask and all processes, kept, and made again where damaged."""


import numpy as np
import pytest
from group_targets import exit_codes, tokenise_whole
from launch import launcher_variables

from muka_fast import pool_tokens
from muka_fast.data import read_texts, tokenize
from muka_fast.errors import UserError
from muka_fast.pool_tokens import PoolTokens
from muka_fast.shard_queue import ShardQueue
from muka_fast.store import merge_manifest, shard_ranges

RANGES = shard_ranges(11, 4)


@pytest.fixture
def store(tmp_path, pool):
    merge_manifest(tmp_path / "store", pool, 4)
    return tmp_path / "store"


@pytest.fixture
def calls(monkeypatch):
    """The first text of each call of the tokenizer."""
    calls, original = [], pool_tokens.tokenize_quietly
    watched = lambda tokenizer, texts, max_length: calls.append(texts[0]) or original(tokenizer, texts, max_length)
    monkeypatch.setattr(pool_tokens, "tokenize_quietly", watched)
    return calls


def same(tokens, expected):
    np.testing.assert_array_equal(tokens.ids, expected.ids)
    np.testing.assert_array_equal(tokens.offsets, expected.offsets)
    return True


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "llama"])
def test_the_ids_are_those_of_the_tokenizer(make_tokenizer, pool, store, family):
    expected = tokenize(make_tokenizer(family), pool.texts, 16)
    assert same(PoolTokens(pool, make_tokenizer(family), 16, store).whole(ShardQueue()), expected)
    part = PoolTokens(pool, make_tokenizer(family), 16, store).shard(RANGES[2])
    assert same(part, tokenize(make_tokenizer(family), pool.texts[8:], 16))


def test_each_shard_is_tokenised_once_for_every_distinct_tokenizer_and_length(make_tokenizer, pool, store, calls):
    ask = lambda family, max_length: PoolTokens(pool, make_tokenizer(family), max_length, store)
    ask("bert", 8).shard(RANGES[1])
    assert calls == [pool.texts[4]]
    ask("bert", 8).whole(ShardQueue())
    assert sorted(calls) == sorted(pool.texts[::4])
    ask("bert", 8).whole(ShardQueue())
    ask("bert", 8).shard(RANGES[0])
    assert len(calls) == 3
    assert ask("bert", 4).whole(ShardQueue()).lengths.max() == 4
    ask("roberta", 8).whole(ShardQueue())
    assert len(calls) == 9 and len(list(store.glob("tokens-*"))) == 3


@pytest.mark.parametrize("damage", ["cut", "foreign", "short"])
def test_a_damaged_shard_is_named_and_made_again(make_tokenizer, pool, store, calls, product_log, damage):
    tokens = PoolTokens(pool, make_tokenizer("bert"), 8, store)
    expected, path = tokens.whole(ShardQueue()), RANGES[1].path(tokens.folder)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "foreign":
        path.write_bytes(RANGES[0].path(tokens.folder).read_bytes())
    else:
        part = tokens.shard(RANGES[1])
        pool_tokens.write_shard(tokens.folder, RANGES[1], tokens.key, {"ids": part.ids[:-1], "lengths": part.lengths})
    assert same(tokens.whole(ShardQueue()), expected)
    assert f"{path} is damaged" in product_log.text and calls[3:] == [pool.texts[4]]
    assert same(tokens.whole(ShardQueue()), expected) and len(calls) == 4


def test_a_store_that_cannot_be_written_serves_what_it_has(make_tokenizer, pool, store, calls, monkeypatch):
    PoolTokens(pool, make_tokenizer("bert"), 8, store).shard(RANGES[0])
    monkeypatch.setattr(pool_tokens.os, "access", lambda path, mode: path != store)
    tokens = PoolTokens(pool, make_tokenizer("bert"), 8, store).whole(ShardQueue())
    assert same(tokens, tokenize(make_tokenizer("bert"), pool.texts, 8))
    assert len(calls) == 3 and len(list(store.glob("tokens-*/*"))) == 1


def test_texts_without_tokens_are_told_once(make_tokenizer, tmp_path, product_log):
    tokenizer = make_tokenizer("bert")
    tokenizer.backend_tokenizer.post_processor = None
    (tmp_path / "odd.jsonl").write_text('{"text": "\\u0001"}\n' * 9)
    pool = read_texts(tmp_path / "odd.jsonl")
    merge_manifest(tmp_path / "odd", pool, 4)
    tokens = PoolTokens(pool, tokenizer, 8, tmp_path / "odd").whole(ShardQueue())
    assert tokens.ids.tolist() == [tokenizer.unk_token_id] * 9
    assert product_log.text.count("give no token") == 1


@pytest.mark.parametrize("ask", [lambda tokens: tokens.whole(ShardQueue()), lambda tokens: tokens.shard(RANGES[0])])
def test_no_room_beside_the_special_tokens_is_refused(make_tokenizer, pool, store, ask):
    with pytest.raises(UserError, match="--max_length 2"):
        ask(PoolTokens(pool, make_tokenizer("bert"), 2, store))
    assert not list(store.glob("tokens-*/*"))


def test_processes_share_the_work(make_tokenizer, pool, store, tmp_path):
    """Two processes, one group: each shard is tokenised by one of them, and both have all tokens."""
    make_tokenizer("bert").save_pretrained(tmp_path / "tokenizer")
    given = [(tmp_path / "pool.jsonl", tmp_path / "tokenizer", store, tmp_path / f"out{rank}.npz") for rank in range(2)]
    variables = launcher_variables(2)
    assert exit_codes(tokenise_whole, [(variables[rank], *given[rank]) for rank in range(2)]) == [0, 0]
    found = [np.load(tmp_path / f"out{rank}.npz") for rank in range(2)]
    assert sorted([*found[0]["made"], *found[1]["made"]]) == [0, 4, 8]
    for part in found:
        np.testing.assert_array_equal(part["ids"], tokenize(make_tokenizer("bert"), pool.texts, 8).ids)
