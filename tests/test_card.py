"""The model card of whole runs and of made-up ones: what it promises holds, and what it tells of figures and places."""

import json
import os

import pytest
import torch
import transformers
import yaml

from muka_fast import export
from muka_fast.doubt import UncertaintyHead


def card_of(result) -> str:
    return (result.output / "README.md").read_text()


def test_a_head_that_tells_nothing_is_not_promised(go, tmp_path, monkeypatch):
    options = {"texts": str(tmp_path / "few.txt"), "store": str(tmp_path / "store"), "epochs": 1, "uncertainty_head": True}
    (tmp_path / "few.txt").write_text("".join(f"text {i} of a few\n" for i in range(20)))
    with monkeypatch.context() as patch:
        patch.setattr("muka_fast.fit_doubt.predict", lambda model, tokens, **_: torch.zeros(len(tokens), 5 + 32))
        result = go("few", **options)
    assert "every text gets the same doubt" in card_of(result) and "Predictor" not in card_of(result)
    assert json.loads((result.output / "run.json").read_text())["uncertainty_head"] == {"tells": False}
    monkeypatch.setattr(UncertaintyHead, "tells", True)
    result = go("telling", **options)
    assert "Predictor" in card_of(result) and "same doubt" not in card_of(result)


def test_only_a_head_that_tells_is_promised():
    cards = {tells: export.render_card(export.Card("x", head_tells=tells), ["a"], "x") for tells in (None, True, False)}
    assert [tells for tells, text in cards.items() if "Predictor" in text] == [True]
    assert [tells for tells, text in cards.items() if "same doubt" in text] == [False]
    assert not any("\n\n\n" in text for text in cards.values())


def test_figures_say_what_they_were_measured_on(go, world, tmp_path):
    rows = [json.loads(line) for line in (world / "texts.jsonl").read_text().splitlines()]
    rows[-20:] = [row | {"label": "?"} for row in rows[-20:]]
    (tmp_path / "held out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = card_of(go("run", eval=str(tmp_path / "held out.jsonl"), epochs=1))
    figures = text.split("## Figures")[1].split("## Limits")[0]
    model, targets = figures.split("Of the targets")
    assert "on 55 texts of held out.jsonl (20 more have labels that it does not know, and are left out):\n\n| figure" in model
    assert "| macro\\_f1 |" in model and "accuracy |" in model and "target" not in model
    assert "on the 75 training texts with a known label:\n\n| figure" in targets
    assert "| target\\_accuracy |" in targets and "| selection\\_accuracy |" in targets and "num" not in targets
    assert "\n\n\n" not in text
    text = card_of(go("plain", eval=str(world / "texts.jsonl"), epochs=1))
    assert "on 75 texts of texts.jsonl:\n" in text and "left out" not in text
    text = card_of(go("unmeasured", epochs=1))
    assert "no labelled texts to evaluate it" in text and "| target\\_accuracy |" in text and "\n\n\n" not in text


def test_a_card_tells_no_folder_of_the_machine(go, world, tmp_path, monkeypatch):
    text = card_of(go("run", eval=str(world / "texts.jsonl"), epochs=1, uncertainty_head=True))
    assert str(world) not in text and str(tmp_path) not in text and world.name not in text
    assert "started from student," in text and "| source | texts.jsonl |" in text
    monkeypatch.chdir(tmp_path)
    up = os.path.relpath(world, tmp_path)
    text = card_of(go("again", student=f"{up}/student/", texts=f"{up}/tex*.jsonl", store=str(tmp_path / "store"), epochs=1))
    assert world.name not in text and "started from student," in text and "| source | tex\\*.jsonl |" in text
    assert "base_model" not in yaml.safe_load(text.split("---")[1])


@pytest.mark.parametrize("value", ["org/encoder", "bert-base-uncased", "org/texts:train[:10%]", "a\0*", "/", "", 7, None])
def test_what_is_no_local_path_stays_whole(value):
    assert export.place(value) == value


def test_owners_of_classes_are_the_teachers_in_their_order():
    teachers = [{"name": "one", "labels": ["a", "b"]}, {"name": "two", "labels": ["b"]}, {"name": "three", "labels": None}]
    page = export.render_card(export.Card("x", teachers=teachers), ["b", "a", "c"], "out")
    assert "| b | one, two |\n| a | one |\n| c |  |" in page


def test_of_a_path_the_last_part_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models" / "encoder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for value in ("models/encoder", "./models/encoder/", "~/models/encoder", str(tmp_path / "models" / "encoder"), "/gone/encoder"):
        assert export.place(value) == "encoder"


def test_the_hub_learns_the_starting_model_by_either_kind_of_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header = lambda name: yaml.safe_load(export.front_matter(export.Card("x", base_model=name))).get("base_model")
    names = ("bert-base-uncased", "org/encoder")
    assert [header(name) for name in names] == list(names)
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    assert [header(name) for name in (*names, "../up", ".", "two words", "", None)] == [None] * 7


@pytest.mark.parametrize("max_length", [12, 10_000])
def test_the_card_cuts_texts_as_the_student_was_trained(max_length, go, tmp_path, world):
    output = go("run", epochs=1, max_length=max_length, store=str(tmp_path / "store")).output
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    cut = min(max_length, tokenizer.model_max_length)
    assert f'classify("a text", truncation=True, max_length={cut})' in (output / "README.md").read_text() and cut < 10_000
