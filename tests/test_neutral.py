"""Neutral features: means over tokens, whatever the batch; cached under what decides them; whole or computed again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from muka_fast import neutral
from muka_fast.config import RunConfig
from muka_fast.errors import UserError
from muka_fast.intercept import run_without_waiting
from muka_fast.neutral import name_features, neutral_features, neutral_tokens
from muka_fast.shard_queue import ShardQueue
from muka_fast.store import merge_manifest


@pytest.fixture
def encoder(tmp_path, make_model, make_tokenizer):
    """encoder(family, seed) -> folder of an encoder without a head."""

    def make(family="bert", seed=0):
        folder = tmp_path / f"{family}-{seed}"
        make_model(family, seed=seed).base_model.save_pretrained(folder)
        make_tokenizer(family).save_pretrained(folder)
        return folder

    return make


def options(**more):
    return RunConfig(**{"max_length": 32, "token_budget": 64, "device": "cpu", "shard_size": 4} | more)


def compute(store, encoder, pool, **more):
    merge_manifest(store, pool, 4)
    return neutral_features(store, encoder, pool, options(**more))


def values(features):
    return np.concatenate([chunk for _, chunk in features.chunks()])


def test_features_are_the_mean_of_the_last_hidden_states(family, tmp_path, encoder, pool):
    folder = encoder(family)
    found = values(compute(tmp_path / "s", folder, pool))
    model, tokenizer = transformers.AutoModel.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for row, text in enumerate(pool.texts):
        with torch.no_grad():
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=32)["input_ids"]
            expected = model(input_ids=ids).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(found[row], expected, atol=2e-3, rtol=2e-3)  # fp16


def test_a_store_that_cannot_be_written_is_read_and_what_it_lacks_lies_aside(tmp_path, encoder, pool, monkeypatch):
    """Scored by others, and mounted read-only: muka-auto's students are trained from it all the same."""
    first, second = encoder(), encoder("distilbert")
    store, aside = tmp_path / "s", tmp_path / "run" / "supervision"
    there = values(compute(store, first, pool))
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    monkeypatch.setattr(neutral.os, "access", lambda path, mode: Path(path) != store)
    assert np.array_equal(values(neutral_features(store, first, pool, options(), aside=aside)), there) and not aside.exists()
    lacking = [values(neutral_features(store, second, pool, options(), aside=aside)) for _ in range(2)]
    assert np.array_equal(*lacking) and len(list(aside.glob("neutral-*/shard-*"))) == 3
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_half_precision_is_another_entry_of_the_store(tmp_path, encoder, pool):
    folder = encoder()
    found = [values(compute(tmp_path / "s", folder, pool, scoring_precision=name)) for name in ("fp32", "bf16", "fp16", "fp32")]
    assert len(list((tmp_path / "s").glob("neutral-*"))) == 3 and np.array_equal(found[0], found[3])
    for half, tolerance in zip(found[1:3], (0.1, 0.01), strict=True):
        assert 0 < np.abs(half - found[0]).max() < tolerance


def test_class_names_are_read_as_words(encoder):
    folder, names = encoder(), ["card_arrival", "a", "Sci/Tech news"]
    found = name_features(folder, names, options(token_budget=16))
    model, tokenizer = transformers.AutoModel.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for row, words in enumerate(["card arrival", "a", "Sci Tech news"]):
        with torch.no_grad():
            expected = model(**tokenizer(words, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
    assert found.dtype == np.float32 and np.abs(found[0] - found[2]).max() > 1e-3


def test_they_are_computed_once_and_again_where_a_shard_is_damaged(tmp_path, encoder, pool, monkeypatch):
    store, folder = tmp_path / "s", encoder()
    first = values(compute(store, folder, pool))
    (place,) = store.glob("neutral-*")
    shards = sorted(place.iterdir())
    assert [path.name for path in shards] == [f"shard-0000{i}.safetensors" for i in range(3)]
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-3])
    stamps = [path.stat().st_mtime_ns for path in (shards[0], shards[2])]
    assert np.abs(values(compute(store, folder, pool, token_budget=4096)) - first).max() < 2e-3
    assert [path.stat().st_mtime_ns for path in (shards[0], shards[2])] == stamps
    monkeypatch.setattr(neutral, "load_encoder", lambda *args: pytest.fail("everything is there"))
    assert np.abs(values(compute(store, folder, pool)) - first).max() < 2e-3
    shards[2].unlink()
    with pytest.raises(pytest.fail.Exception):
        compute(store, folder, pool)


def test_each_process_computes_the_shards_that_it_gets(tmp_path, encoder, pool):
    class First(ShardQueue):
        def take(self, _name, _count):
            yield from (0, 2)

    store, folder = tmp_path / "s", encoder()
    merge_manifest(store, pool, 4)
    mine = neutral_features(store, folder, pool, options(), First())
    assert [path.name for path in sorted(store.glob("neutral-*/*"))] == ["shard-00000.safetensors", "shard-00002.safetensors"]
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is missing"):
        values(mine)
    both = values(neutral_features(store, folder, pool, options()))
    assert np.array_equal(both, values(compute(tmp_path / "alone", folder, pool)))


def test_another_encoder_tokenizer_or_length_has_features_of_its_own(tmp_path, encoder, pool, texts):
    store = tmp_path / "s"
    for folder, more in ((encoder(), {}), (encoder(seed=1), {}), (encoder("mpnet"), {}), (encoder(), {"max_length": 8})):
        compute(store, folder, pool, **more)
    assert len(list(store.glob("neutral-*"))) == 4
    compute(store, encoder(), pool, token_budget=4096, seed=5)
    assert len(list(store.glob("neutral-*"))) == 4


def test_a_tokenizer_that_knows_no_limit_is_one_without(tmp_path, encoder, pool):
    folder = encoder()
    expected = values(compute(tmp_path / "s", folder, pool))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": -1}))
    assert np.array_equal(values(compute(tmp_path / "other", folder, pool)), expected)
    tokens = neutral_tokens(tmp_path / "other", folder, pool, options())
    assert len(tokens) == len(pool) and tokens.lengths.max() <= 32


def test_a_broken_encoder_is_named(tmp_path, encoder, pool, make_model, make_tokenizer):
    with pytest.raises(UserError, match=r"encoder .*nowhere"):
        compute(tmp_path / "s", tmp_path / "nowhere", pool)
    folder = tmp_path / "broken"
    model = make_model("bert").base_model
    model.encoder.layer[0].output.dense.bias.data[0] = float("nan")
    model.save_pretrained(folder)
    make_tokenizer("bert").save_pretrained(folder)
    with pytest.raises(UserError, match=r"encoder .*broken: NaN or infinite for text \d+"):
        compute(tmp_path / "s", folder, pool)
    assert not list((tmp_path / "s").glob("neutral-*/*.safetensors"))
    make_model("bert", vocab_size=9).base_model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"encoder .*broken: its tokenizer has token .* the model embeds only 9 tokens"):
        compute(tmp_path / "s", folder, pool)


def test_of_an_encoder_with_a_decoder_the_encoder_is_read(tmp_path, make_tokenizer, pool):
    folder, tokenizer = tmp_path / "t5", make_tokenizer("bert")
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    model = transformers.T5Model(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = values(compute(tmp_path / "s", folder, pool))
    ids = tokenizer(pool.texts[1], return_tensors="pt", truncation=True, max_length=32)["input_ids"]
    with torch.no_grad():
        expected = model.encoder(input_ids=ids).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(found[1], expected, atol=2e-3, rtol=2e-3)  # fp16


def test_attention_that_does_not_wait_gives_the_same_features(family, encoder, make_tokenizer, texts):
    """What `load_encoder` changes on a GPU alone."""
    model = neutral.load_encoder(encoder(family), make_tokenizer(family), "cpu", "fp32")
    batch = make_tokenizer(family)(list(texts[:7]), return_tensors="pt", padding=True, truncation=True, max_length=24)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = neutral.mean_states(model, **batch)
    run_without_waiting(model)
    torch.testing.assert_close(neutral.mean_states(model, **batch), expected, atol=1e-5, rtol=1e-5)
