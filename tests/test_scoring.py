"""Real teachers through the scoring run: once, together where they have layers in common, and never again for another method."""

import json
import logging
import shutil

import numpy as np
import torch

from muka_fast import scoring, supervision
from muka_fast.config import METHODS, RunConfig, ScoreConfig
from muka_fast.data import TextSet, read_texts
from muka_fast.labels import build_label_space
from muka_fast.methods import METHODS as METHODS_TABLE
from muka_fast.methods import build_method
from muka_fast.store import read_manifest
from muka_fast.stored import COLUMNS, PER_TEACHER, open_store
from muka_fast.supervision import fill_store, option_values, score


def test_real_teachers_are_scored_once_and_every_method_follows_without_them(tmp_path, make_teacher, texts, caplog):
    folders = [
        make_teacher("bert", ["x", "y", "z"], name="one", seed=1),
        make_teacher("mpnet", ["z", "w"], name="two", seed=2),
    ]
    data = tmp_path / "pool.jsonl"
    rows = [{"text": text} for text in ["", *texts[:20]]]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    config = ScoreConfig(
        teachers=folders, texts=data, output=tmp_path / "s", mc_samples=3, shard_size=8, token_budget=64, device="cpu"
    )
    assert score(config).mean_probs is None  # gigabytes of a large pool, for a few figures
    sup = open_store(config.output)
    assert sup.logits.shape == (20, 5) and sup.example_ids.tolist() == list(range(1, 21))
    score(config.model_copy(update={"output": str(tmp_path / "t"), "token_budget": 8192, "shard_size": 100}))
    other = open_store(tmp_path / "t")
    for name in (*COLUMNS, *PER_TEACHER):
        torch.testing.assert_close(getattr(sup, name), getattr(other, name), atol=1e-5, rtol=1e-5)
    with caplog.at_level(logging.INFO, "muka_fast"):
        assert supervision.main(config) == 0
    assert "already scored" in caplog.text and "one: 3 classes" in caplog.text

    for folder in folders:
        shutil.rmtree(folder)
    again = open_store(config.output, read_texts(data), option_values(RunConfig(mc_samples=3, seed=7)))
    assert torch.equal(again.logits, sup.logits)
    space = build_label_space([(t["name"], t["labels"]) for t in again.teachers])
    labels = [space.names[i % 4] for i in range(20)]
    pooled = [np.concatenate([chunk for _, chunk in part.features[1].chunks()]) for part in (again, other)]
    assert pooled[0].shape[0] == 20 and np.abs(pooled[0] - pooled[1]).max() < 2e-3 * np.abs(pooled[0]).max()  # fp16
    for method in METHODS:
        if method == "mean":  # for teachers of one label set
            continue
        rule = METHODS_TABLE[method].rule
        names = np.eye(4, again.features[0].rows([0]).shape[1], dtype=np.float32)
        weights = None if rule is None else rule(again.restrict(space), again.features[0], 0, lambda names=names: names)
        built = build_method(RunConfig(method=method), again, space, labels, weights)
        assert built.loss(torch.randn(20, 4), torch.arange(20)).isfinite().all()


def test_teachers_with_common_layers_run_together_and_others_do_not(tmp_path, make_teacher, texts, monkeypatch):
    folders = [
        make_teacher("bert", ["a", "b"], name="one", seed=1),
        make_teacher("bert", ["c", "d"], name="stranger", seed=2),
        make_teacher("bert", ["e", "f"], name="two", seed=1),  # the same seed and sizes: the same weights
    ]
    options = RunConfig(mc_samples=3, shard_size=4, token_budget=64, device="cpu")
    pool = TextSet(texts[:9], None, np.arange(9), "pool", "fp", 0)
    groups, real = [], scoring.score_together
    monkeypatch.setattr(
        scoring,
        "score_together",
        lambda teachers, *rest: groups.append([t.name for t in teachers]) or real(teachers, *rest),
    )
    together = fill_store(tmp_path / "s", folders, pool, options)
    assert {tuple(group) for group in groups} == {("one", "two"), ("stranger",)}
    assert [teacher["name"] for teacher in together.teachers] == ["one", "stranger", "two"]
    alone = [fill_store(tmp_path / f"s{i}", [folder], pool, options) for i, folder in enumerate(folders)]
    for name in COLUMNS:
        expected = torch.cat([getattr(sup, name) for sup in alone], -1)
        torch.testing.assert_close(getattr(together, name), expected, atol=1e-5, rtol=0)

    groups.clear()
    entries = read_manifest(tmp_path / "s")["teachers"].items()
    shutil.rmtree(tmp_path / "s" / next(key for key, entry in entries if entry["name"] == "two"))
    again = fill_store(tmp_path / "s", folders, pool, options)
    assert {tuple(group) for group in groups} == {("two",)}  # one of the relatives has work left, the other none
    torch.testing.assert_close(again.logits, together.logits, atol=1e-5, rtol=0)
