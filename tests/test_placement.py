"""Teachers split over devices: the same scores as whole ones, in every scope; what decides it, and what cannot be split.

There is no GPU here: host memory and disk are the devices. accelerate's hooks on the modules are those of GPUs.
"""

import importlib.util

import pytest
import torch

from muka_fast import placement, supervision
from muka_fast.config import RunConfig, ScoreConfig
from muka_fast.errors import UserError
from muka_fast.placement import GIB, is_split, memory_limits, weight_bytes
from muka_fast.shared import Prefixes
from muka_fast.sites import list_sites, num_site_layers
from muka_fast.store import MATRICES, VECTORS
from muka_fast.stored import COLUMNS, PER_TEACHER
from muka_fast.supervision import score
from muka_fast.teachers import load_teacher
from muka_fast.trunk import StochasticTeacher

FIELDS = (*MATRICES, *VECTORS, "features")


def batch(teacher, texts):
    """Eight texts as input_ids, attention_mask, example_ids."""
    encoded = teacher.tokenizer(texts[:8], padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"], torch.arange(8) * 5


def load_both(folder):
    """A teacher whole, and one of which host memory may hold three quarters; the rest lies on the disk."""
    most = 0.75 * weight_bytes(folder) / GIB
    return load_teacher(folder, run_seed=0), load_teacher(folder, run_seed=0, most_gib=most)


def on_disk(model):
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


def test_a_split_teacher_scores_as_a_whole_one(family, make_teacher, texts):
    folder = make_teacher(family, list("abc"), layers=3)
    if family == "deberta-v2":  # it reads its table of positions without calling it
        with pytest.raises(UserError, match=r"DebertaV2ForSequenceClassification cannot be split .*--teacher_gib") as caught:
            load_both(folder)
        assert "\n" not in str(caught.value)
        return
    whole, split = load_both(folder)
    assert is_split(split.model) and on_disk(split.model) and not is_split(whole.model)
    assert split.fingerprint == whole.fingerprint and split.tokenizer_key == whole.tokenizer_key
    scopes = {"head" if site.layer == "head" else "last:1" for site in list_sites(whole.model)} | {"all"}  # decoders drop in no head
    assert len(scopes) >= 2
    for scope in scopes:
        expected, found = (StochasticTeacher(teacher, mc_scope=scope, mc_samples=3) for teacher in (whole, split))
        assert found.mc_scope == scope and found.sites == expected.sites and num_site_layers(found.all_sites) == 3
        for name, value in vars(expected.launch(*batch(whole, texts))).items():
            torch.testing.assert_close(getattr(found.launch(*batch(split, texts)), name), value, atol=1e-5, rtol=1e-5)
    assert on_disk(split.model)  # brought for a call only


def test_a_split_teacher_shares_no_layers(make_teacher):
    whole, split = (StochasticTeacher(teacher) for teacher in load_both(make_teacher("bert")))
    assert len(Prefixes(whole)) == len(Prefixes(split)) == 3 and set(Prefixes(whole)).isdisjoint(Prefixes(split))


def test_a_split_adapter_is_merged_and_scores_as_a_whole_one(tmp_path, make_teacher, texts, monkeypatch):
    peft = pytest.importorskip("peft")
    base = make_teacher("bert", list("abc"), name="base")
    model = peft.get_peft_model(
        load_teacher(base, run_seed=0).model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    whole = load_teacher(tmp_path / "adapter", run_seed=0)
    monkeypatch.setattr(placement, "memory_limits", lambda *rest: {"cpu": GIB})  # hooks on all modules, weights in memory
    split = load_teacher(tmp_path / "adapter", run_seed=0)
    assert is_split(split.model)
    found, expected = (StochasticTeacher(teacher).launch(*batch(teacher, texts)) for teacher in (split, whole))
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(placement, "memory_limits", lambda *rest: {"cpu": 1000})
    with pytest.raises(UserError, match=r"do not hold it; merge the adapter into its base"):
        load_teacher(tmp_path / "adapter", run_seed=0)


@pytest.mark.parametrize("mc_stop", [None, 0.3])
def test_scoring_with_teacher_gib_fills_the_same_store(tmp_path, make_teacher, texts, mc_stop, caplog):
    folders = [make_teacher("bert", ["a", "b"], name="one", seed=1), make_teacher("bert", ["c", "d"], name="two", seed=2)]
    (tmp_path / "pool.txt").write_text("\n".join(text for text in texts[:12] if text.strip()))
    config = ScoreConfig(
        teachers=folders, texts=tmp_path / "pool.txt", output=tmp_path / "whole", mc_samples=8, mc_stop=mc_stop, device="cpu"
    )
    whole = score(config)
    most = 0.75 * weight_bytes(folders[0]) / GIB
    caplog.set_level("INFO", logger="muka_fast")
    split = score(config.model_copy(update={"output": str(tmp_path / "split"), "teacher_gib": most}))
    assert caplog.text.count("GiB of weights, placed on: disk") >= len(folders)
    for name in (*COLUMNS, *PER_TEACHER):
        torch.testing.assert_close(getattr(split, name), getattr(whole, name), atol=1e-5, rtol=1e-5)


def test_teachers_of_one_family_run_apart_where_they_do_not_fit_together(tmp_path, make_teacher, texts, monkeypatch):
    folders = [make_teacher("bert", ["a", "b"], name="one", seed=1), make_teacher("bert", ["c", "d"], name="two", seed=1)]
    (tmp_path / "pool.txt").write_text("\n".join(texts[:4]))
    groups = []

    def score_together(self, group, _original=supervision.Scoring.score_together):
        groups.append([job.entry["name"] for job in group])
        _original(self, group)

    monkeypatch.setattr(supervision.Scoring, "score_together", score_together)
    options = {"teachers": folders, "texts": tmp_path / "pool.txt", "mc_samples": 2, "device": "cpu"}
    score(ScoreConfig(output=tmp_path / "together", **options))
    monkeypatch.setattr(supervision, "memory_limits", lambda *rest: {"cpu": 1})
    score(ScoreConfig(output=tmp_path / "apart", **options))
    assert groups == [["one", "two"], ["one"], ["two"]]


def test_what_decides_about_a_split(monkeypatch):
    free = {"cuda": 100, "cpu": 1000}
    monkeypatch.setattr(placement, "free_bytes", lambda device: free[device.type])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    cpu, gpu, second = torch.device("cpu"), torch.device("cuda"), torch.device("cuda:1")
    assert memory_limits(80, gpu, None) is None and memory_limits(800, cpu, None) is None
    assert memory_limits(81, gpu, None) == {0: 80, 1: 80, "cpu": 800}
    assert memory_limits(81, second, None) == {1: 80, "cpu": 800}  # the user named it
    assert memory_limits(801, cpu, None) == {"cpu": 800}
    assert memory_limits(99, gpu, 99 / GIB) is None  # the user knows better
    assert memory_limits(71, gpu, 70 / GIB) == {0: 70, 1: 70, "cpu": 800}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert memory_limits(81, gpu, None) == {1: 80, "cpu": 200}  # the other GPU is another process's
    assert memory_limits(201, cpu, None) == {"cpu": 200}


def test_without_accelerate_the_way_out_is_named(make_teacher, monkeypatch):
    folder = make_teacher("bert")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"GiB of weights do not fit on cpu.*pip install 'muka-fast\[accelerate\]'"):
        load_teacher(folder, run_seed=0, most_gib=1e-6)


def test_the_option_has_a_range():
    assert RunConfig().teacher_gib is None
    with pytest.raises(ValueError, match="greater than 0"):
        RunConfig(teacher_gib=0)


def test_half_precision_takes_half_the_bytes(make_teacher):
    folder = make_teacher("bert")
    assert weight_bytes(folder, torch.bfloat16) * 2 == weight_bytes(folder)
