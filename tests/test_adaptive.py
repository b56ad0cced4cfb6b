"""--mc_stop: the stated error, the same masks as without it, and scores that no layout of the run can change."""

import itertools
import logging
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from muka_fast import adaptive, scoring, supervision
from muka_fast.adaptive import Crew, decided, run_waves, sampling_summary, token_batches, uncertainty_per_pass, waves
from muka_fast.config import RunConfig, ScoreConfig
from muka_fast.data import TextSet, Tokens, tokenize
from muka_fast.errors import UserError
from muka_fast.ops.reference import mc_statistics_ref
from muka_fast.selection import UNCERTAINTY
from muka_fast.store import read_manifest
from muka_fast.stored import COLUMNS, PER_TEACHER, Supervision, open_store
from muka_fast.supervision import fill_store, option_values

K = 16
LEVEL = 0.3  # random teachers disagree little: at a strict level no text of the tests would stop early


def selected_after(uncertainty):
    return uncertainty.mean(1).argmin(0)


def stop(uncertainty, error):
    """Selections when every text stops at the first look that decides it, and its passes. uncertainty [N, K, n]."""
    num_texts = uncertainty.shape[-1]
    selected, num_samples = selected_after(uncertainty), torch.full((num_texts,), K)
    for _, k in reversed(waves(K)):
        done = decided(uncertainty[:, :k], K, error)
        num_samples[done] = k
        selected[done] = selected_after(uncertainty[:, :k])[done]
    return selected, num_samples


# ---- the test ----


def test_waves_cover_every_pass_once():
    for samples in (1, 3, 4, 5, 16, 17):
        assert [k for first, last in waves(samples) for k in range(first, last)] == list(range(samples))


@pytest.mark.parametrize("measure", UNCERTAINTY)
def test_the_mean_of_the_passes_is_the_measure(measure):
    logits = 3 * torch.randn(5, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, var, predictive, expected = mc_statistics_ref(logits, [0, 4])[:4]
    total = var.sum(-1, keepdim=True)
    sup = Supervision(mean.log(), mean, predictive, expected, total, torch.arange(7), [{"labels": list("abcd")}], [0, 4])
    torch.testing.assert_close(uncertainty_per_pass(logits, measure).mean(0), UNCERTAINTY[measure](sup)[:, 0])
    certain = torch.tensor([[[1e4, -1e4]], [[1e4, -1e4]]])
    assert uncertainty_per_pass(certain, measure).tolist() == [[0.0], [0.0]]
    assert uncertainty_per_pass(torch.randn(3, 2, 1), measure).abs().max() == 0


@pytest.mark.parametrize("measure", UNCERTAINTY)
def test_the_spread_of_the_passes_is_the_error_of_the_measure(measure):
    """Over many draws of 64 passes, the measure of their mean varies as the spread of one draw says."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.tensor([2.0, 0.5, 0.0])[None, None] + 0.5 * torch.randn(64, 4000, 3, generator=generator)
    passes = uncertainty_per_pass(logits, measure)
    said = (passes.std(0) / 8).mean()
    assert abs(passes.mean(0).std() / said - 1) < 0.05


@pytest.mark.parametrize("error", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("num_teachers", [2, 3, 5])
def test_wrong_stops_stay_below_the_stated_error(num_teachers, error):
    """Normal noise; true gaps from none, the worst case, to plain ones; correlated and unequal noise of the teachers."""
    n, generator = 10_000, torch.Generator().manual_seed(2)
    for gap in (0.0, 0.1, 0.3, 1.0):
        for spread in (1.0, 4.0):
            noise = torch.randn(num_teachers, K, n, dtype=torch.float64, generator=generator)
            noise[0] *= spread
            noise += torch.randn(K, n, dtype=torch.float64, generator=generator)
            noise[0] -= gap
            selected, num_samples = stop(noise, error)
            wrong = (selected != selected_after(noise)).double().mean().item()
            assert wrong <= error + 3 * (error * (1 - error) / n) ** 0.5
            if num_teachers == 2 and gap == 0 and spread == 1:
                assert wrong > error / 8, "a test that never errs is not at its level"
            if gap == 1 and spread == 1:
                assert num_samples.double().mean() < K


@pytest.mark.parametrize("error", [0.05, 0.2])
@pytest.mark.parametrize("measure", ["predictive_entropy", "mutual_information"])
def test_wrong_stops_of_logits_stay_below_the_stated_error(measure, error):
    """Passes are noisy logits: entropies are bent and skewed, as dropout makes them."""
    n, generator = 4000, torch.Generator().manual_seed(3)
    for scale, noise, gap in ((1.0, 0.5, 0.0), (3.0, 1.0, 0.0), (3.0, 1.0, 0.5)):
        teachers = []
        for i in range(2):
            centre = (scale + gap * i) * torch.randn(n, 4, generator=generator)
            teachers.append(uncertainty_per_pass(centre + noise * torch.randn(K, n, 4, generator=generator), measure))
        uncertainty = torch.stack(teachers)
        selected, num_samples = stop(uncertainty, error)
        assert (selected != selected_after(uncertainty)).double().mean() <= error
        assert num_samples.min() >= 4 and num_samples.double().mean() < K


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, K), st.integers(0, 2**31), st.sampled_from([0.001, 0.05, 0.5]))
def test_neither_the_order_of_the_teachers_nor_the_other_texts_matter(num_teachers, k, seed, error):
    generator = torch.Generator().manual_seed(seed)
    uncertainty = torch.rand(num_teachers, k, 9, dtype=torch.float64, generator=generator)
    uncertainty += 2 * torch.rand(num_teachers, 1, 9, dtype=torch.float64, generator=generator)
    found = decided(uncertainty, K, error)
    order = torch.randperm(num_teachers, generator=generator)
    assert torch.equal(decided(uncertainty[order], K, error), found)
    assert torch.equal(torch.cat([decided(uncertainty[..., b : b + 1], K, error) for b in range(9)]), found)
    assert (decided(uncertainty, K, 0.5) | ~found).all()  # a looser level decides no fewer


def test_ties_and_nan_are_never_decided_and_one_teacher_always_is():
    tie = torch.rand(1, 4, 3, dtype=torch.float64).expand(2, 4, 3)
    assert not decided(tie, K, 0.5).any()
    broken = torch.rand(2, 4, 3, dtype=torch.float64)
    broken[1] += 100
    assert decided(broken, K, 0.02).all()
    broken[0, 2, 1] = float("nan")
    assert decided(broken, K, 0.02).tolist() == [True, False, True]
    assert decided(tie[:1], K, 0.02).all()
    assert decided(tie, 4, 0.02).all()  # that was the last pass
    assert not decided(broken[:, :1], K, 0.5).any()  # one pass has no spread


# ---- the scoring run ----


@pytest.fixture
def folders(make_teacher):
    return [
        make_teacher("bert", ["a", "b"], name="one", seed=1),
        make_teacher("roberta", ["c", "d", "e"], name="two", seed=2),
        make_teacher("bert", ["f", "g"], name="three", seed=3),
    ]


@pytest.fixture
def pool(texts):
    return TextSet(texts[:24], None, np.arange(24) * 3 + 1, "pool", "fp", 0)


def options(**more):
    defaults = {"mc_samples": 12, "mc_scope": "all", "mc_dropout_p": 0.3, "mc_stop": LEVEL, "device": "cpu"}
    return RunConfig(**(defaults | {"shard_size": 10, "token_budget": 128} | more))


def same(a, b, order=(0, 1, 2)):
    """Equal supervision, b's teachers being those of a in `order`."""
    assert torch.equal(a.num_samples, b.num_samples)
    for name in (*COLUMNS, *PER_TEACHER):
        left, right = getattr(a, name), getattr(b, name)
        offsets = a.offsets if name in COLUMNS else [0, 1, 2, 3]
        left = torch.cat([left[:, offsets[i] : offsets[i + 1]] for i in order], -1)
        torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


def test_where_every_pass_comes_before_the_first_look_that_is_said(tmp_path, folders, pool, caplog):
    sup = fill_store(tmp_path / "s", folders[:2], pool, options(mc_samples=4))
    assert sup.num_samples.unique().tolist() == [4]
    assert f"--mc_stop {LEVEL:g} saves nothing: every text gets 4 passes" in caplog.text


def test_scores_are_those_of_the_first_passes_of_an_exact_run(tmp_path, folders, pool, caplog):
    with caplog.at_level(logging.INFO, "muka_fast"):
        sup = fill_store(tmp_path / "s", folders, pool, options())
    counts = sup.num_samples.unique().tolist()
    assert set(counts) <= {4, 8, 12} and len(counts) > 1, "the test needs texts that stop early and others that do not"
    assert f"--mc_stop {LEVEL:g}: " in caplog.text and "of 12 passes a text" in caplog.text
    for count in counts:
        exact = fill_store(tmp_path / f"exact{count}", folders, pool, options(mc_stop=None, mc_samples=count))
        assert exact.num_samples is None
        rows = sup.num_samples == count
        for name in (*COLUMNS, *PER_TEACHER):
            torch.testing.assert_close(getattr(sup, name)[rows], getattr(exact, name)[rows], atol=1e-5, rtol=0)
    sites = [[entry["sites"] for entry in read_manifest(tmp_path / name)["teachers"].values()] for name in ("s", "exact4")]
    assert sites[0] == sites[1] and all(sites[0])
    assert "saves nothing" not in caplog.text
    summary = sampling_summary(sup.num_samples, 12)
    assert summary["mean_samples"] == pytest.approx(sup.num_samples.double().mean().item())
    assert sum(summary["texts_by_samples"].values()) == len(pool)
    assert summary["samples_saved"] == pytest.approx(1 - summary["mean_samples"] / 12)


def test_no_layout_of_the_run_changes_the_scores(tmp_path, folders, pool, monkeypatch):
    base = fill_store(tmp_path / "base", folders, pool, options())
    same(base, fill_store(tmp_path / "batches", folders, pool, options(token_budget=32, shard_size=7)))
    order = [2, 0, 1]
    same(base, fill_store(tmp_path / "order", [folders[i] for i in order], pool, options()), order)
    assert read_manifest(tmp_path / "order")["teachers"].keys() == read_manifest(tmp_path / "base")["teachers"].keys()

    loads, load = [], supervision.load_teacher
    monkeypatch.setattr(supervision, "load_teacher", lambda path, **more: loads.append(path) or load(path, **more))
    monkeypatch.setattr(supervision, "teacher_budget_bytes", lambda device: 0)  # one teacher in memory at a time
    monkeypatch.setattr(scoring, "replica_budget_bytes", lambda device: 5 * 4 * 12 * 7)  # five texts at a time
    same(base, fill_store(tmp_path / "alone", folders, pool, options()))
    assert len(loads) > 3


@pytest.mark.parametrize(("lacking", "often"), [(0, False), (1, True)])
def test_teachers_stay_loaded_where_all_of_them_fit(lacking, often, tmp_path, folders, pool, monkeypatch):
    loads, load, together = [], supervision.load_teacher, sum(supervision.weight_bytes(path, torch.float32) for path in folders)
    monkeypatch.setattr(supervision, "load_teacher", lambda path, **more: loads.append(path) or load(path, **more))
    monkeypatch.setattr(supervision, "teacher_budget_bytes", lambda device: together - lacking)
    fill_store(tmp_path / "s", folders, pool, options(mc_samples=4, shard_size=24))
    assert (len(loads) > 3) is often


def test_a_killed_run_continues_and_a_damaged_shard_is_computed_again(tmp_path, folders, pool, monkeypatch, caplog):
    base = fill_store(tmp_path / "base", folders, pool, options())
    real, calls = scoring.run_waves, []

    def die(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(scoring, "run_waves", die)
    with pytest.raises(KeyboardInterrupt):
        fill_store(tmp_path / "s", folders, pool, options())
    assert read_manifest(tmp_path / "s")["teachers"] == {}
    same(base, fill_store(tmp_path / "s", folders, pool, options()))
    assert len(calls) == 2 + 2  # three shards, the first of which was kept
    files = {path.relative_to(tmp_path / "s"): path.read_bytes() for path in (tmp_path / "s").glob("*/*.safetensors")}
    victim = sorted(files)[4]
    (tmp_path / "s" / victim).write_bytes(b"no")
    others = {path: (tmp_path / "s" / path).stat().st_ino for path in files if path != victim}
    same(base, fill_store(tmp_path / "s", folders, pool, options()))
    assert len(calls) == 5
    assert {path: (tmp_path / "s" / path).stat().st_ino for path in others} == others  # not written again
    assert {path: (tmp_path / "s" / path).read_bytes() for path in files} == files
    loads, load = [], supervision.load_teacher
    monkeypatch.setattr(supervision, "load_teacher", lambda path, **more: loads.append(path) or load(path, **more))
    with caplog.at_level("INFO", logger="muka_fast"):
        same(base, fill_store(tmp_path / "s", folders, pool, options()))
    assert len(calls) == 5 and not loads  # all there
    assert [f"teacher {name}: already scored" in caplog.text for name in ("one", "two", "three")] == [True] * 3


def test_an_early_stop_is_kept_apart_from_exact_scores_and_from_other_companies(tmp_path, folders, pool):
    exact = fill_store(tmp_path, folders[:2], pool, options(mc_stop=None))
    fill_store(tmp_path, folders[:2], pool, options())
    entries = read_manifest(tmp_path)["teachers"]
    assert len(entries) == 4 and sum(entry["mc_stop"] is None for entry in entries.values()) == 2
    again = open_store(tmp_path, pool, option_values(options(mc_stop=None)))
    assert again.num_samples is None and torch.equal(again.mean_probs, exact.mean_probs)
    assert open_store(tmp_path, pool, option_values(options())).num_samples is not None
    with pytest.raises(UserError, match=r"under several options .*mc_stop"):
        open_store(tmp_path, pool)
    with pytest.raises(UserError, match=r"mc_stop .* \(this run: '0.01 of mutual_information'\)"):
        open_store(tmp_path, pool, option_values(options(mc_stop=0.01)))
    fill_store(tmp_path, folders, pool, options())
    with pytest.raises(UserError, match=r"under several options .*teachers scored with it"):
        open_store(tmp_path, pool, option_values(options()))


def test_teachers_that_were_not_scored_together_are_not_compared(tmp_path, folders, pool):
    fill_store(tmp_path, folders[:1], pool, options())
    fill_store(tmp_path, folders[1:], pool, options())
    with pytest.raises(UserError, match=r"one, two, three.*not scored together under --mc_stop"):
        open_store(tmp_path, pool, option_values(options()))


def test_a_store_filled_without_mc_stop_is_exact(tmp_path, folders, pool):
    fill_store(tmp_path, folders[:2], pool, options(mc_stop=None))
    assert open_store(tmp_path, pool, option_values(options(mc_stop=None))).num_samples is None
    with pytest.raises(UserError, match=r"mc_stop None \(this run: '0.3 of mutual_information'\)"):
        open_store(tmp_path, pool, option_values(options()))


def test_a_manifest_without_its_company_is_refused(tmp_path, folders, pool):
    fill_store(tmp_path, folders[:2], pool, options())
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"company"', '"friends"'))
    with pytest.raises(UserError, match="no list of the teachers scored with it"):
        read_manifest(tmp_path)


def test_nan_is_refused_with_teacher_and_text(tmp_path, folders, pool, monkeypatch):
    real = scoring.run_waves

    def poisoned(*args):
        results, num_samples = real(*args)
        results[1].mean_probs[2, 0] = float("nan")
        return results, num_samples

    monkeypatch.setattr(scoring, "run_waves", poisoned)
    with pytest.raises(UserError, match=r"'two'.*text 7 of 'pool'"):
        fill_store(tmp_path, folders, pool, options())


@pytest.mark.parametrize("scope", ["last:1", "head", "all"])
def test_all_passes_give_the_scores_of_a_teacher_alone(scope, folders, pool):
    """At a level that decides nothing, for scopes with a trunk and with a fused head too."""
    config = options(mc_scope=scope, mc_stop=None)
    scorers = [supervision._scorer(supervision.load_teacher(path, run_seed=0), config) for path in folders[:2]]
    tokens = [tokenize(scorer.teacher.tokenizer, pool.texts, 64) for scorer in scorers]
    ids, rows = torch.from_numpy(pool.example_ids), np.arange(len(pool))
    sources = [
        token_batches(found, scorer.teacher.pad_id, 256, rows)
        for found, scorer in zip(tokens, scorers, strict=True)
    ]
    results, num_samples = run_waves(Crew(scorers.__getitem__, keep=True), sources, ids, 12, 1e-9, "mutual_information")
    assert (num_samples == 12).all()
    for scorer, source, result in zip(scorers, sources, results, strict=True):
        for places, *inputs in source(torch.arange(len(pool))):
            alone = scorer.launch(*inputs, ids[places])
            for name, value in vars(alone).items():
                torch.testing.assert_close(getattr(result, name)[places], value, atol=1e-5, rtol=0)


# ---- options ----


def test_the_option():
    base = {"teachers": ["a"], "texts": "t.jsonl", "output": "s"}
    assert ScoreConfig(**base).mc_stop is None and ScoreConfig(**base, mc_stop="exact").mc_stop is None
    assert ScoreConfig(**base, mc_stop="0.02").mc_stop == 0.02
    for wrong in ("0", "0.6", "never", "nan"):
        with pytest.raises(ValueError, match="mc_stop"):
            ScoreConfig(**base, mc_stop=wrong)
    assert option_values(ScoreConfig(**base, mc_stop=0.02))["mc_stop"] == "0.02 of mutual_information"
    assert option_values(ScoreConfig(**base, mc_stop=0.02, uncertainty="variance"))["mc_stop"] == "0.02 of variance"


@pytest.mark.parametrize("N", [2, 3])
@pytest.mark.parametrize("k", [4, 8])
def test_decided_is_students_t_test(N, k):
    u = torch.rand(N, k, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u += torch.rand(N, 1, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    c = stats.t.ppf(1 - 0.1 / (3 * (N - 1)), k - 1)  # 16 passes: three looks before the last
    expected = []
    for text in range(400):
        i = int(u[:, :, text].mean(1).argmin())
        gaps = [(u[j, :, text] - u[i, :, text]).numpy() for j in range(N) if j != i]
        expected.append(all(d.mean() / (d.std(ddof=1) * np.sqrt(1 / k - 1 / 16)) > c for d in gaps))
    assert decided(u, 16, 0.1).tolist() == expected and 0.05 < np.mean(expected) < 0.95


def test_part_of_a_company_is_no_company(tmp_path, folders, pool):
    fill_store(tmp_path, folders[:2], pool, options())
    with pytest.raises(UserError, match=r"\(one\) were not scored together under --mc_stop"):
        open_store(tmp_path, pool, option_values(options()), names=["one"])


@pytest.mark.parametrize(
    ("field", "value"),  # infinite features are cut to the range of fp16
    [*itertools.product(["logits", "mean_probs", "expected_entropy"], [math.nan, math.inf]), ("features", math.nan)],
)
def test_no_number_that_is_none_gets_into_a_store(tmp_path, folders, pool, monkeypatch, field, value):
    real = scoring.run_waves

    def poisoned(*args):
        results, num_samples = real(*args)
        getattr(results[1], field)[2:3].fill_(value)
        return results, num_samples
    monkeypatch.setattr(scoring, "run_waves", poisoned)
    with pytest.raises(UserError, match=r"'two'.*text 7 of 'pool'"):
        fill_store(tmp_path, folders[:2], pool, options())


def test_memory_for_less_than_one_text_is_enough(tmp_path, folders, pool, monkeypatch):
    base = fill_store(tmp_path / "base", folders[:2], pool, options())
    monkeypatch.setattr(scoring, "replica_budget_bytes", lambda device: 1)
    assert torch.equal(fill_store(tmp_path / "s", folders[:2], pool, options()).num_samples, base.num_samples)


@pytest.mark.parametrize(("answer", "expected"), [(False, [4, 8, 12, 16]), (True, [4])])
def test_a_look_weighs_all_passes_so_far_and_the_last_one_ends_the_waves(answer, expected, monkeypatch):
    """Where one teacher fits at a time, a wave without texts would load them all."""
    looks, loads = [], []
    decided = lambda uncertainty, *_: looks.append(uncertainty.shape[1]) or torch.full(uncertainty.shape[-1:], answer)
    monkeypatch.setattr(adaptive, "decided", decided)
    passes = lambda ids, first, count, plain: (torch.randn(count + plain, len(ids), 3), torch.zeros(len(ids), 2))
    teacher = SimpleNamespace(texts=lambda ids, mask, example_ids: example_ids, trunk=lambda texts: texts, passes=passes)
    batches = lambda places: [(places, torch.zeros(len(places), 1), torch.ones(len(places), 1))]
    crew = Crew(lambda index: loads.append(index) or teacher, keep=False)
    run_waves(crew, [batches] * 2, torch.arange(5), K, LEVEL, "predictive_entropy")
    assert looks == expected and loads == [0, 1] * len(expected)


def test_where_one_teacher_fits_it_is_gone_before_the_next_one_is_loaded():
    """In every wave; else the memory for one would have to hold two."""
    alive, loads = weakref.WeakSet(), []

    class Small:
        def texts(self, ids, mask, example_ids):
            return example_ids

        def trunk(self, texts):
            return texts

        def passes(self, ids, first, count, plain):
            return torch.randn(count + plain, len(ids), 3), torch.zeros(len(ids), 2)

    def load(index):
        assert not alive
        loads.append(index)
        alive.add(teacher := Small())
        return teacher

    batches = lambda places: [(places, torch.zeros(len(places), 1), torch.ones(len(places), 1))]
    run_waves(Crew(load, keep=False), [batches] * 2, torch.arange(5), K, 1e-9, "predictive_entropy")
    assert loads == [0, 1] * 4


def test_batches_of_some_texts_are_theirs_and_keep_to_the_budget_of_tokens():
    """Of a shard's texts in another order, and of these the undecided ones."""
    lengths = np.array([30, 1, 1, 1, 1, 1, 20, 20, 20, 2])
    tokens = Tokens.of(np.repeat(np.arange(10, 20, dtype=np.int32), lengths), lengths)  # text i is of token 10 + i
    rows, undecided = np.array([9, 8, 7, 6, 5, 4, 3, 2, 1]), torch.tensor([0, 1, 2, 3, 6, 8])
    found = list(token_batches(tokens, 0, 20, rows)(undecided))
    assert sorted(torch.cat([places for places, *_ in found]).tolist()) == undecided.tolist()
    for places, ids, mask in found:
        assert ids.numel() <= 20
        assert ids[:, 0].tolist() == (10 + rows[places.numpy()]).tolist()
        assert mask.sum(1).tolist() == lengths[rows[places.numpy()]].tolist()
