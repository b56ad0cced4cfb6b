"""bench/amalgamation.py without a measurement: its rows, the keys of its figures, its tables."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
KEYS = {
    "scope", "scoring_s", "plain_forward_s", "published_s", "cost_in_plain_forwards", "speedup_vs_published", "agreement_with_all",
    "agreement_all_vs_all", "end_to_end_speedup", "student_accuracy", "peak_bytes", "mc_tokens_per_s", "share_of_gemm",
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("amalgamation")


def arguments(bench, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["amalgamation.py", "--synthetic", "toy", *words])
    return bench.parse_arguments()


def test_rows(bench, monkeypatch):
    names = lambda *words: [row.name for row in arguments(bench, monkeypatch, *words).rows]
    assert names() == ["last:1", "head", "all", "all, mc_stop 0.05"]
    assert names("--scopes", "last:1") == ["last:1"]
    assert names("--scopes", "all", "--mc_stop", "0") == ["all"]
    both = names("--scopes", "head", "all", "--precisions", "fp32", "bf16")
    assert both == ["head", "all", "all, mc_stop 0.05", "head, bf16", "all, bf16", "all, mc_stop 0.05, bf16"]


BAD = {"--scopes lst:1": "--mc_scope lst:1: must be all", "--json nowhere/rows.json": "there is no folder"}


@pytest.mark.parametrize(("words", "told"), BAD.items())
def test_bad_options_end_before_the_work(bench, monkeypatch, capsys, words, told):
    try:
        code = bench.command(lambda: arguments(bench, monkeypatch, *words.split()) and 0)
    except SystemExit as ended:  # argparse's own
        code = ended.code
    assert code == 2 and told in capsys.readouterr().err


def test_figures_of_a_row(bench, monkeypatch):
    args = arguments(bench, monkeypatch, "--scopes", "all", "--samples", "16")
    names = [row.name for row in args.rows]
    scoring = {
        "texts": 100,
        "times": {"plain, fp32": [2.0, 1.0, 4.0], names[0]: [20.0, 10.0, 60.0], names[1]: [8.0, 4.0, 16.0]},
        "published_s": {"fp32": 120.0},
        "agreement": {names[0]: 1.0, names[1]: 0.99},
        "mean_samples": {names[0]: 16, names[1]: 5.0},
        "agreement_all_vs_all": 0.96,
        "work": {"fp32": importlib.import_module("work").Work(tokens=1000, plain_flops=4e9, gemm_flops_per_s=1e10)},
        "forwards": {names[0]: 17.0, names[1]: 6.0},
        "peaks": {names[0]: None, names[1]: 1 << 30},
    }
    accuracies = {names[0]: [0.7, 0.72], names[1]: [0.71, 0.7], "published": [0.7, 0.7]}
    spent = {names[0]: 10.0, names[1]: 12.0, "published, fp32": 80.0}
    full, early = bench.rows_of(args, scoring, (accuracies, spent))
    assert full.keys() >= KEYS and early.keys() >= KEYS
    assert (early["speedup_vs_published"], early["cost_in_plain_forwards"], early["texts_per_s"]) == (15.0, 4.0, 12.5)
    assert (early["mc_tokens_per_s"], early["share_of_gemm"], early["plain_share_of_gemm"]) == (625.0, 0.3, 0.2)
    assert (full["peak_bytes"], early["peak_bytes"]) == (None, 1 << 30)  # a GPU's is known by then
    assert early["end_to_end_speedup"] == 200 / 20 and full["student_accuracy"] == pytest.approx(0.71)
    without = bench.rows_of(args, scoring, None)[0]
    assert without.keys() >= KEYS and without["student_accuracy"] is None
    page = bench.table([full, without])
    assert "| all | 20.00 | 5.0 |" in page and page.count("–") == 5  # the peaks come last
    texts = SimpleNamespace(texts=["x"] * 100)
    told = bench.note(args, texts, ["a", "b"], (accuracies, spent))
    assert "timed on 32 texts and scaled, plus loading its teachers once" in told and "On a GPU" not in told
    assert "timed on 6 steps and scaled" in told and "70.0%, 72.0%" in told


def test_what_is_timed_is_written_before_the_end(bench, monkeypatch, tmp_path):
    args = arguments(bench, monkeypatch, "--scopes", "head", "all", "--mc_stop", "0")
    rows = bench.timed_so_far(args, {"plain, fp32": [2.0, 4.0], "head": [6.0], "all": []}, {"fp32": 30.0})
    figures = {"scoring_s": 6.0, "plain_forward_s": 3.0, "published_s": 30.0, "cost_in_plain_forwards": 2.0}
    assert rows == [{"scope": "head"} | figures]
    file = tmp_path / "rows.json"
    bench.write_unfinished(arguments(bench, monkeypatch, "--json", str(file)), rows, "")
    assert json.loads(file.read_text()) == rows
    kept = []
    monkeypatch.setattr(bench, "keep", lambda *given: kept.append(given))
    args = arguments(bench, monkeypatch)
    args.device = "cuda"
    bench.write_unfinished(args, rows, "100 texts.")
    ((stem, same, page, device),) = kept
    assert (stem, same, device) == ("amalgamation", rows, "cuda")
    assert "Unfinished. 100 texts." in page and "| head | 6.00 |" in page


def test_a_stopped_training_is_no_figure(bench, monkeypatch, tmp_path):
    """As by a time limit, which the product answers with a checkpoint and a result."""
    args = arguments(bench, monkeypatch, "--scopes", "head", "--seeds", "1", "--device", "cpu")
    monkeypatch.setattr(bench, "published_student", lambda *given: (None, None, 0.1))
    monkeypatch.setattr(bench.muka_fast, "amalgamate", lambda **options: SimpleNamespace(stopped=True, output=tmp_path), raising=False)
    args.encoder, args.train = "encoder", "pool"
    with pytest.raises(SystemExit, match="head: stopped while its student was trained"):
        list(bench.measure_students(args, ["a", "b"], SimpleNamespace(texts=["x"] * 4), None, None, tmp_path))


def test_other_options_have_other_material(bench, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(bench, "make_texts", lambda folder, count: ("pool", "eval"))
    monkeypatch.setattr(bench, "read_texts", lambda path, **options: SimpleNamespace(texts=["x"], labels=["a", "b", "c"]))
    for name in ("make_encoder", "make_teacher"):
        monkeypatch.setattr(bench, name, lambda path, *given, **options: (made.append(path), path.mkdir()))
    same = ["--workdir", str(tmp_path)]
    for words in (same, same, [*same, "--num_teachers", "3"], [*same, "--synthetic", "small"]):
        bench.prepare(arguments(bench, monkeypatch, *words))
    assert len(made) == len(set(made)) == 3 + 4 + 3


def test_published_seconds_count_loading_once(bench, monkeypatch):
    published = importlib.import_module("published")
    now = iter([0.0, 5.0, 10.0, 12.0])  # loading takes 5 s, the part of the texts 2 s
    monkeypatch.setattr(published.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(published, "load_published", lambda *given: [])
    monkeypatch.setattr(published, "published_scores", lambda *given: None)
    args = arguments(bench, monkeypatch, "--published_texts", "8", "--device", "cpu")
    assert published.published_seconds(args, ["a"], ["x"] * 40, torch.float32) == 5 + 2 * 5


def test_published_batches_to_the_longest_text_give_the_same_logits(bench, make_model, make_tokenizer, texts):
    published = importlib.import_module("published")
    model, tokenizer = make_model("bert"), make_tokenizer("bert")
    both = [published.padded_batches(tokenizer, texts[:5], 64, 5, padding)[0] for padding in ("max_length", "longest")]
    assert both[0]["input_ids"].shape[1] == 64 > both[1]["input_ids"].shape[1]
    torch.testing.assert_close(*(published.deterministic_logits(model, batch) for batch in both), atol=1e-5, rtol=0)


def test_the_peak_of_a_process_is_its_own(bench):
    """A small process that a large one starts."""
    import subprocess

    ballast = bytearray(400 << 20)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])
    code = f"import sys; sys.path[:0] = {sys.path!r}; import timing; print(timing.largest_resident_bytes())"
    small = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 << 20 < int(small.stdout) < bench.largest_resident_bytes() - (200 << 20)
    del ballast
