"""The pure parts of bench/merging.py: label blocks, the drawn texts, and the options that name a folder."""

import importlib
import json
from collections import Counter
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def merging(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("merging")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows), encoding="utf-8"
    )


def test_label_blocks_are_consecutive_parts_of_the_sorted_labels(merging, tmp_path):
    write(tmp_path / "a" / "train.jsonl", [(str(i), label) for i, label in enumerate("gfedcba")])
    write(tmp_path / "b" / "train.jsonl", [("x", "z"), ("y", "a")])
    blocks = merging.label_blocks(merging.Setting("", (("a", 3), ("b", 1))), tmp_path)
    assert blocks == [["a", "b"], ["c", "d", "e"], ["f", "g"], ["a", "z"]]


def test_drawn_texts_keep_label_shares_and_leave_test_texts_out(merging, tmp_path):
    rows = [(f"common {i}", "common") for i in range(900)] + [(f"rare {i}", "rare") for i in range(100)]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.jsonl", [("only", "other"), ("seen", "other")])
    for run in ("one", "two"):
        merging.write_texts(tmp_path / run, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], 50, {"seen", "common 0"})
    drawn = [json.loads(line) for line in (tmp_path / "one").read_text().splitlines()]
    assert Counter(row["label"] for row in drawn) == {"common": 45, "rare": 5, "other": 1}
    assert len({row["text"] for row in drawn}) == 51
    assert not {"seen", "common 0"} & {row["text"] for row in drawn}
    assert [row["text"] for row in drawn[:45]] != [f"common {i}" for i in range(1, 46)]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_other_options_get_another_folder(merging, tmp_path):
    common = ["--setting", "trec6_bert_mpnet", "--data", "d", "--encoders", "e", "--workdir", str(tmp_path)]
    folders = {
        merging.work_folder(merging.parse_arguments([*common, *more]))
        for more in ([], ["--limit", "9"], ["--epochs", "1"])
    }
    assert len(folders) == 3
    # More seeds or rows of the table continue in the same folder.
    again = merging.parse_arguments([*common, "--seeds", "3", "--rows", "vkd"])
    assert merging.work_folder(again) in folders


def test_table_line(merging):
    row = {"method": "uhc", "accuracy": 0.5, "accuracies": [0.4, 0.6], "macro_f1": 0.25}
    row |= {"selection_accuracy": None, "target_accuracy": 1.0}
    assert merging.table_line(row) == "| uhc | - | 100.0 | 50.0 ± 14.1 | 25.0 |"
