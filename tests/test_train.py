"""The conductor end to end on tiny random models: what a run leaves, layouts, methods, golden losses."""

import gc
import json
import logging
import os
import random
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from runs import SMOOTH_ADAM, largest_difference, losses, weights, word_tokenizer
from safetensors.torch import load_file

from muka_fast import data, loop, pool_tokens, supervision, train
from muka_fast.config import RunConfig
from muka_fast.engine import Engine
from muka_fast.errors import UserError
from muka_fast.evidence import unit
from muka_fast.loop import Plan
from muka_fast.seeds import seed_of

GOLDEN = Path(__file__).parent / "golden"


def test_a_run_leaves_a_student_that_plain_transformers_loads(go, world):
    result = go("run", eval=str(world / "texts.jsonl"))
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(result.output), top_k=None)
    names = {"business", "sport", "science", "bank", "smart home"}
    assert {answer["label"] for answer in classify("Shares fell.")[0]} == names
    record = json.loads((result.output / "run.json").read_text())
    assert record["state"] == "complete" and record["labels"] == ["business", "sport", "science", "bank", "smart home"]
    assert record["overlaps"] == ["science"] and [teacher["name"] for teacher in record["teachers"]] == ["news", "home"]
    assert record["data"]["texts"] == 75 and record["data"]["blank"] == 1
    assert {"read texts", "check inputs", "score teachers", "load student", "train", "export", "evaluate"} <= record["seconds"].keys()
    card = (result.output / "README.md").read_text()
    assert "| coverage |" in card and "| margin |" not in card  # which muka-auto does not look at
    assert 0 <= result.metrics["student"]["accuracy"] <= 1 and 0 <= result.metrics["target_accuracy"] <= 1
    assert result.metrics["num_labelled_texts"] == 75
    lines = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 16)) and lines[-1]["epoch"] == 3
    assert all(line["loss"] > 0 and line["lr"] > 0 and line["grad_norm"] > 0 and line["texts_per_s"] > 0 for line in lines)
    assert lines[0]["lr"] == pytest.approx(1e-3 / 2) and max(line["lr"] for line in lines) == 1e-3
    assert "teachers" in (result.output / "README.md").read_text()


def test_a_verbose_run_leaves_deepspeed_its_voice(go, monkeypatch):
    theirs = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(theirs, "level", logging.INFO)
    go("run", verbose=True)
    assert theirs.level == logging.INFO


def test_a_run_leaves_its_caller_undisturbed(go, monkeypatch):
    for name in ("LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)

    def state():
        """What comes next, from generators that were seeded by the caller."""
        told = [os.environ.get(name) for name in ("LOCAL_RANK", "DS_ACCELERATOR")]
        return torch.rand(3).tolist(), random.random(), np.random.rand(), sys.excepthook, told

    def seed():
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)

    seed()
    expected = state()
    seed()
    go("run", epochs=1)
    assert state() == expected


def test_what_the_caller_has_set_in_torch_changes_nothing(go):
    """And is set again afterwards."""
    expected = weights(go("plain", epochs=1))
    products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = *(product.fp32_precision for product in products), torch.get_default_dtype()
    try:
        products[0].fp32_precision, products[1].fp32_precision = "tf32", "bf16"  # or "medium" by the older name
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found = weights(go("modes", epochs=1))
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        with torch.no_grad():
            again = weights(go("no_grad", epochs=1))
            assert not torch.is_grad_enabled()
        assert [product.fp32_precision for product in products] == ["tf32", "bf16"] and torch.get_default_dtype() == torch.float64
    finally:
        products[0].fp32_precision, products[1].fp32_precision = before[:2]
        torch.set_default_dtype(before[2])
    assert all(torch.equal(value, found[name]) and torch.equal(value, again[name]) for name, value in expected.items())


def test_imports_leave_the_callers_random_numbers():
    code = "import random, muka_fast; random.seed(1); expected = random.Random(1).random(); muka_fast.amalgamate; "
    done = subprocess.run([sys.executable, "-c", f"{code}print(random.random() == expected)"], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_a_run_leaves_no_engine_behind_however_it_ends(go, stop_at, monkeypatch):
    """What DeepSpeed's hooks keep: six runs of a notebook would hold six students with their moments."""
    kept, create = [], Engine.create
    remember = lambda *arguments: kept.append(weakref.ref((engine := create(*arguments)).ds)) or engine
    monkeypatch.setattr(train.Engine, "create", remember)
    ds = {"zero_optimization": {"stage": 2}}
    go("complete", ds=ds, epochs=1)
    monkeypatch.setattr(train.export, "save_student", lambda *_: (_ for _ in ()).throw(UserError("the disk is full")))
    with pytest.raises(UserError, match="the disk is full"):
        go("failed", ds=ds, epochs=1)
    stop_at(2)
    assert go("stopped", ds=ds, epochs=1).stopped
    gc.collect()
    assert [engine() for engine in kept] == [None] * 6  # three of them of rehearsals


def test_mean_probabilities_are_read_for_their_targets_alone(go, monkeypatch):
    read, build = [], train.build_method
    monkeypatch.setattr(train, "build_method", lambda config, sup, *rest: read.append(sup.mean_probs) or build(config, sup, *rest))
    runs = [({}, "deterministic"), ({"teachers": []}, "deterministic"), ({}, "mc_mean"), ({"teachers": []}, "mc_mean")]
    found = [
        losses(go(f"run{i}", epochs=1, method="muka-hard", target=target, **source)) for i, (source, target) in enumerate(runs)
    ]
    assert [mean is None for mean in read] == [True, True, False, False]
    assert found[0] == found[1] != found[2] == found[3]


def test_a_run_tells_what_an_early_end_of_the_passes_saved(go, tmp_path):
    fast = {"epochs": 1, "uncertainty": "predictive_entropy"}
    result = go("early", mc_stop=0.3, mc_samples=12, **fast)
    record = json.loads((result.output / "run.json").read_text())
    assert record["config"]["mc_stop"] == record["identity"]["mc_stop"] == 0.3
    sampling = record["sampling"]
    assert sampling["mc_samples"] == 12 and 0 < sampling["samples_saved"] < 1 and sum(sampling["texts_by_samples"].values()) == 75
    assert yaml.safe_load((result.output / "run.yaml").read_text())["mc_stop"] == 0.3
    again = go("again", mc_stop=0.3, mc_samples=12, **fast, teachers=[])  # from the store alone
    assert json.loads((again.output / "run.json").read_text())["sampling"] == sampling
    assert largest_difference(weights(result), weights(again)) == 0
    exact = go("exact", mc_samples=12, **fast)
    assert "sampling" not in json.loads((exact.output / "run.json").read_text())
    with pytest.raises(UserError, match=r"mc_stop 0\.3 -> 0\.2"):
        go("early", mc_stop=0.2, mc_samples=12, **fast, resume=True)


def test_teachers_and_neutral_encoder_run_in_half_precision(go, tmp_path, monkeypatch):
    seen, build = [], supervision.StochasticTeacher

    def make(teacher, **options):
        seen.append(teacher.model.dtype)
        return build(teacher, **options)

    monkeypatch.setattr(supervision, "StochasticTeacher", make)
    store = {"store": str(tmp_path / "store"), "epochs": 1}
    exact, half = go("exact", **store), go("half", scoring_precision="bf16", **store)
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert len(list((tmp_path / "store").glob("neutral-*"))) == 2
    assert 0 < largest_difference(weights(exact), weights(half)) < 0.01  # five steps of at most 1e-3
    assert {tensor.dtype for tensor in weights(half).values()} == {torch.float32}


@pytest.mark.parametrize("stage", [0, 3])
def test_activation_checkpointing_changes_nothing(go, stage, monkeypatch):
    """Dropout included; what is inside a layer runs a second time in the backward."""
    from transformers.models.distilbert.modeling_distilbert import FFN

    calls = []
    forward = FFN.forward
    monkeypatch.setattr(FFN, "forward", lambda self, *rest, **more: calls.append(self.training) or forward(self, *rest, **more))
    ds, counts = {"zero_optimization": {"stage": stage}}, []
    runs = []
    for name, on in (("plain", False), ("recomputed", True)):
        calls.clear()
        runs.append(go(name, ds=ds, method="vkd", epochs=1, activation_checkpointing=on))  # vkd: no other forward of the student
        counts.append(sum(calls))  # dropout sites are listed by a model that does not train
    assert losses(runs[0]) == losses(runs[1]) and largest_difference(weights(runs[0]), weights(runs[1])) == 0
    # The first of two layers, five steps; the last one, cut to the token that is read, keeps its activations.
    assert counts[1] == 2 * counts[0] == 2 * 5


def test_bf16_on_a_cpu(go, stop_at, monkeypatch):
    """It learns as fp32 does; the same again inside a caller's autocast and from a checkpoint; in micro-batches."""
    options = {"method": "supervised", "epochs": 12, "learning_rate": 5e-3}  # whose losses are far above the rounding
    exact, rounded = go("fp32", **options), go("bf16", precision="bf16", **options)
    record = json.loads((rounded.output / "run.json").read_text())
    assert record["config"]["precision"] == "bf16" and {tensor.dtype for tensor in weights(rounded).values()} == {torch.float32}
    assert losses(rounded)[0] != losses(exact)[0] == pytest.approx(losses(rounded)[0], rel=0.01)
    fallen = [sum(losses(run)[-5:]) / sum(losses(run)[:5]) for run in (exact, rounded)]
    assert fallen[1] == pytest.approx(fallen[0], abs=0.05) and fallen[1] < 0.8
    split = go("micro", ds={"train_micro_batch_size_per_gpu": 4}, precision="bf16", **options)
    assert losses(split)[0] == pytest.approx(losses(rounded)[0], rel=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert losses(go("inside", precision="bf16", **options)) == losses(rounded)
        assert torch.is_autocast_enabled("cpu") and torch.autocast_increment_nesting() == 2
        torch.autocast_decrement_nesting()
    stop_at(4)
    assert go("cut", precision="bf16", **options).stopped
    monkeypatch.undo()
    resumed = go("cut", precision="bf16", resume=True, **options)
    assert losses(resumed) == losses(rounded) and largest_difference(weights(resumed), weights(rounded)) == 0


@pytest.mark.parametrize("scheduler", [{}, {"scheduler": {"type": "WarmupDecayLR"}}])  # which --warmup_ratio may not stand beside
def test_run_yaml_repeats_the_run_bit_for_bit(go, tmp_path, scheduler):
    first = go("first", ds={"gradient_clipping": 0.3, **scheduler})
    options = yaml.safe_load((first.output / "run.yaml").read_text())
    assert options["max_grad_norm"] == 0.3  # taken over from ds.json, and no contradiction with it now
    again = train.amalgamate(config=str(first.output / "run.yaml"), output=str(tmp_path / "again"))
    assert losses(first) == losses(again) and largest_difference(weights(first), weights(again)) == 0


@pytest.mark.parametrize("normalize_margin", [False, True])
def test_micro_batches_change_nothing(go, normalize_margin):
    """75 texts: the last batch of an epoch has 11, which do not divide. Dropout included, whose masks are those of the texts."""
    options = {"method": "muka-soft", "normalize_margin": normalize_margin}
    whole = go("whole", ds=SMOOTH_ADAM, **options)
    for micro in (8, 4, 1):
        split = go(f"micro{micro}", ds={**SMOOTH_ADAM, "train_micro_batch_size_per_gpu": micro}, **options)
        assert losses(split) == pytest.approx(losses(whole), rel=1e-5, abs=1e-8)
        assert largest_difference(weights(split), weights(whole)) < 1e-6


def test_zero_stages_change_nothing(go):
    """Stages 1 and 2 to the last bit, stage 3 (another order of summation in the gradient norm) to rounding; dropout included."""
    plain = go("stage0", ds=SMOOTH_ADAM, method="muka-soft")  # whose texts have weights
    linear = torch.nn.functional.linear
    for stage in (1, 2, 3):
        sharded = go(f"stage{stage}", ds={**SMOOTH_ADAM, "zero_optimization": {"stage": stage}}, method="muka-soft")
        files = [path for path in sharded.output.rglob("*") if path.is_file() and path.parent.name != "tensorboard"]
        written = {path.suffix for path in files}
        assert written <= {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".log"}, written  # nothing pickled
        assert largest_difference(weights(sharded), weights(plain)) <= (1e-6 if stage == 3 else 0)
        assert losses(sharded) == pytest.approx(losses(plain), rel=1e-6 if stage == 3 else 0, abs=1e-8 if stage == 3 else 0)
        assert torch.nn.functional.linear is linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": None}, "--texts is missing"),
        ({"student": None}, "--student is missing"),
        ({"output": None}, "--output is missing"),
        ({"teachers": [], "store": None}, "--teachers is missing"),
        ({"student": "nowhere/at/all"}, "student nowhere/at/all: no such folder"),
        ({"method": "muka-auto", "neutral_encoder": "nowhere/at/all"}, "neutral encoder nowhere/at/all: no such folder"),
        ({"device": "cuda"}, "finds no GPU"),
        ({"batch_size": 16, "ds_config": "no.json"}, "--ds_config no.json: No such file"),
    ],
)
def test_bad_options_are_one_line(go, options, message):
    if options.get("device") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=message) as caught:
        go("run", **options)
    assert "\n" not in str(caught.value)


def test_label_map_and_ds_config_may_be_given_as_they_are(go, tmp_path, product_log):
    """From Python and in run.yaml, which repeats the run; names that need a look are told of once."""
    given = {"label_map": {"bank": "Sport", 7: None}, "ds_config": {"gradient_clipping": 0.5, "train_batch_size": 25}}
    with pytest.raises(UserError, match="--label_map: no teacher has a label '7'"):
        go("run", **given)
    del given["label_map"][7]
    record = json.loads((go("run", **given, epochs=1, batch_size=25).output / "run.json").read_text())
    assert "Sport" in record["labels"] and "bank" not in record["labels"] and record["config"]["max_grad_norm"] == 0.5
    assert product_log.text.count("'Sport' and 'sport' are two classes") + product_log.text.count("'sport' and 'Sport' are two") == 1
    options = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert options["label_map"] == {"bank": "Sport"} and options["ds_config"] == given["ds_config"]
    assert train.amalgamate(config=tmp_path / "run" / "run.yaml", resume=True).output == tmp_path / "run"
    assert product_log.text.count("is complete") == 1
    with pytest.raises(UserError, match=r"--ds_config: unknown key 'zero_optimisation' .nearest: zero_optimization"):
        go("other", ds_config={"zero_optimisation": {"stage": 1}})


def test_the_evaluation_of_a_run_renames_labels_as_the_run_does(go, world):
    measured = go("run", label_map={"bank": "cash"}, eval=str(world / "texts.jsonl"), epochs=1).metrics["student"]
    assert measured["num_texts"] == 75 and measured["num_unknown"] == 0


def test_texts_in_memory_are_told_how_to_come_in():
    import datasets
    import pandas

    ways = {"Dataset.from_dict": ["a text"], "its to_json('texts.jsonl') ": datasets.Dataset.from_dict({"text": ["a text"]})}
    for way, given in (ways | {"orient='records', lines=True": pandas.DataFrame({"text": ["a text"]})}).items():
        with pytest.raises(UserError, match=rf"texts: a file, .* expected, found {type(given).__name__}; .*{re.escape(way)}"):
            train.amalgamate(texts=given)


def test_options_that_the_method_does_not_look_at_are_told_as_they_were_typed(go, product_log):
    go("run", method="vkd", margin=False, score_temperature=0.5, epochs=1)
    assert "--no-margin, --score_temperature: --method vkd does not look at it" in product_log.text


def test_an_adapter_is_no_student(go, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"student .*lora: is a LoRA adapter, which may be a teacher"):
        go("run", student=str(tmp_path / "lora"))


def test_teachers_of_one_class_altogether_are_refused(go, tmp_path):
    names = ("business", "sport", "science", "bank", "smart home")
    (tmp_path / "map.json").write_text(json.dumps(dict.fromkeys(names, "anything")))
    with pytest.raises(UserError, match="one class, 'anything': there is nothing to learn; see --label_map"):
        go("run", label_map=str(tmp_path / "map.json"))


def test_labels_are_needed_for_supervised_only(go, world, tmp_path):
    bare = tmp_path / "bare.txt"
    bare.write_text("one text\nanother text\na third one\n")
    with pytest.raises(UserError, match="label"):
        go("supervised", texts=str(bare), method="supervised", store=str(tmp_path / "store"))
    assert go("soft", texts=str(bare), store=str(tmp_path / "store"), epochs=1).metrics == {}


def test_a_filled_store_needs_no_teacher(go, world):
    with_teachers = go("with", epochs=1)
    without = go("without", epochs=1, teachers=[])
    assert largest_difference(weights(with_teachers), weights(without)) == 0


def test_a_run_from_a_store_is_repeated_whoever_else_is_scored_into_it(go, world, tmp_path, product_log):
    store = str(tmp_path / "store")
    teachers = [str(world / name) for name in ("news", "home")]
    go("first", epochs=1, store=store, teachers=teachers)
    alone = go("alone", epochs=1, store=store, teachers=[])
    go("turned", epochs=1, store=store, teachers=teachers[::-1])
    repeated = train.amalgamate(config=str(alone.output / "run.yaml"), output=str(tmp_path / "repeated"))
    assert largest_difference(weights(alone), weights(repeated)) == 0
    assert "only one teacher" not in product_log.text and "are few for" not in product_log.text
    one = go("one", epochs=1, store=store, teachers=[], store_teachers=["home"])
    assert "only one teacher (home)" in product_log.text
    assert [teacher["name"] for teacher in json.loads((one.output / "run.json").read_text())["teachers"]] == ["home"]
    with pytest.raises(UserError, match=r"--store_teachers cash: .* holds no teacher of this name \(it has home, news\)"):
        go("none", epochs=1, store=store, teachers=[], store_teachers=["cash"])
    with pytest.raises(UserError, match="--store_teachers cash"):  # said first: the options are those of teachers that nobody named
        go("none", epochs=1, store=store, teachers=[], store_teachers=["cash"], mc_samples=64)


def test_the_head_is_fresh_seeded_and_independent_of_the_folders_own(world, make_model, texts, tmp_path):
    """A classifier of the same size as the union gets a new output layer; another seed gives another one."""
    from muka_fast.student import load_student

    classifier = tmp_path / "classifier"
    tokenizer = word_tokenizer(texts)
    make_model("distilbert", "abcde", seed=9, tokenizer=tokenizer).save_pretrained(classifier)
    tokenizer.save_pretrained(classifier)
    ds = {"zero_optimization": {"stage": 0}}
    load = lambda folder, seed: load_student(folder, list("vwxyz"), seed, ds)[0]
    bare, full, other = load(world / "student", 0), load(classifier, 0), load(classifier, 1)
    assert torch.equal(bare.classifier.weight, full.classifier.weight) and not bare.classifier.bias.any()
    assert not torch.equal(full.classifier.weight, other.classifier.weight)
    assert torch.equal(full.pre_classifier.weight, other.pre_classifier.weight)  # kept: it is the folder's
    assert full.config.id2label == dict(enumerate("vwxyz"))


def test_a_layer_as_wide_as_the_labels_keeps_its_weights(make_teacher):
    from muka_fast.student import load_student

    folder = make_teacher("roberta", list("abcdefghijklmnop"), hidden=16)
    model, _ = load_student(folder, list("ABCDEFGHIJKLMNOP"), 0, {"zero_optimization": {"stage": 0}})
    before = load_file(folder / "model.safetensors")
    assert torch.equal(model.classifier.dense.weight, before["classifier.dense.weight"])
    assert not torch.equal(model.classifier.out_proj.weight, before["classifier.out_proj.weight"])


def test_the_norm_of_a_fresh_head_scales_by_one(make_model, make_tokenizer, tmp_path):
    from muka_fast.student import load_student

    make_model("modernbert").base_model.save_pretrained(tmp_path)
    make_tokenizer("modernbert").save_pretrained(tmp_path)
    head = load_student(tmp_path, ["a", "b"], 0, {"zero_optimization": {"stage": 0}})[0].head
    assert (head.norm.weight == 1).all() and head.dense.weight.std() > 0


# ---- methods with features ----


@pytest.mark.parametrize("method", ["muka-evidence", "muka-auto", "dfa", "cfl"])
def test_methods_with_features_resume_bit_for_bit_and_export_the_student_alone(go, world, stop_at, monkeypatch, method):
    whole, plain = go("whole", method=method), go("plain", method="vkd")
    again = go("again", method=method)
    assert losses(whole) == losses(again) and largest_difference(weights(whole), weights(again)) == 0
    assert weights(whole).keys() == weights(plain).keys() and losses(whole) != losses(plain)
    stop_at(7)
    assert go("cut", method=method).stopped
    monkeypatch.undo()
    resumed = go("cut", method=method, resume=True)
    assert losses(resumed) == losses(whole) and largest_difference(weights(resumed), weights(whole)) == 0
    assert resumed.metrics == whole.metrics


@pytest.mark.parametrize("method", ["dfa", "cfl"])
def test_zero_stages_change_nothing_where_modules_are_trained_beside(go, method):
    plain = go("stage0", ds=SMOOTH_ADAM, method=method, epochs=1)
    for stage in (1, 3):
        sharded = go(f"stage{stage}", ds={**SMOOTH_ADAM, "zero_optimization": {"stage": stage}}, method=method, epochs=1)
        assert largest_difference(weights(sharded), weights(plain)) <= (1e-4 if stage == 3 else 0)
        assert losses(sharded) == pytest.approx(losses(plain), rel=1e-5 if stage == 3 else 0)


def test_dfa_does_not_depend_on_the_micro_batch_and_cfl_refuses_to(go, world):
    options = {"student": str(world / "plain_student"), "epochs": 1}
    small = {**SMOOTH_ADAM, "train_micro_batch_size_per_gpu": 4}
    whole, split = (go(f"dfa{i}", ds=ds, method="dfa", **options) for i, ds in enumerate((SMOOTH_ADAM, small)))
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
    assert largest_difference(weights(split), weights(whole)) < 1e-5
    with pytest.raises(UserError, match=r"--method cfl compares the features of whole batches.*here it is 4"):
        go("cfl", ds=small, method="cfl", **options)
    for method in ("dfa", "cfl"):
        with pytest.raises(UserError, match=f"--method {method} trains modules of its own .* scheduler in the ds_config"):
            go(method, ds={"scheduler": {"type": "WarmupDecayLR"}}, method=method, **options)


def test_neutral_features_are_computed_once_and_belong_to_the_student(go, world, tmp_path):
    store = tmp_path / "store"
    options = {"method": "muka-evidence", "store": str(store), "epochs": 1}
    first = go("first", **options)
    (folder,) = store.glob("neutral-*")
    written = {path: path.stat().st_mtime_ns for path in store.rglob("*.safetensors")}
    assert largest_difference(weights(first), weights(go("second", teachers=[], **options))) == 0
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.safetensors")} == written
    content = (folder / "shard-00000.safetensors").read_bytes()
    (folder / "shard-00000.safetensors").write_bytes(content[:-9])
    go("third", **options)
    assert (folder / "shard-00000.safetensors").read_bytes() == content
    go("other", **options | {"student": str(world / "plain_student")})
    assert len(list(store.glob("neutral-*"))) == 2


def test_another_neutral_encoder_changes_who_is_trusted_and_a_resume_with_it_is_refused(go, world, tmp_path):
    options = {"method": "muka-auto", "store": str(tmp_path / "store"), "epochs": 1}
    named = go("own", **options, neutral_encoder=str(world / "student"))
    assert largest_difference(weights(go("run", **options)), weights(named)) == 0  # the student's own is the default
    other = go("run", **options, neutral_encoder=str(world / "news"), overwrite=True)
    assert largest_difference(weights(other), weights(named)) > 0
    with pytest.raises(UserError, match="other neutral encoder; other tokenizer of the neutral encoder"):
        go("run", **options, resume=True)


def test_the_rule_sees_encoder_and_words_and_the_coverage_the_encoder_alone(go, monkeypatch):
    seen = {}
    rule, nobody = train.METHODS["muka-auto"].rule, train.nobody_weights

    def watched_rule(sup, view, seed, names):
        seen["view"], seen["names"] = view, names()
        return rule(sup, view, seed, names)

    def watched_nobody(sup, weights, neutral, seed):
        seen["neutral"] = neutral
        return nobody(sup, weights, neutral, seed)

    monkeypatch.setattr(train.METHODS["muka-auto"], "rule", staticmethod(watched_rule))
    monkeypatch.setattr(train, "nobody_weights", watched_nobody)
    go("run", method="muka-auto", coverage=True, epochs=1)
    rows = np.arange(sum(len(part) for _, part in seen["neutral"].chunks()))
    view, neutral = seen["view"].rows(rows), seen["neutral"].rows(rows)
    width = neutral.shape[1]
    assert view.shape[1] > width == seen["names"].shape[1]
    np.testing.assert_allclose(view[:, :width], unit(neutral), atol=1e-6)
    lengths = np.linalg.norm(view[:, width:], axis=1)
    assert (lengths > 0.99).mean() > 0.9  # a text of rare words alone has none


def test_a_large_pools_words_are_counted_in_a_sample(go, monkeypatch):
    seen, with_words = [], train.with_words
    monkeypatch.setattr(train, "SAMPLE", 20)
    monkeypatch.setattr(train, "with_words", lambda *given: seen.append(given[2]) or with_words(*given))
    go("run", method="muka-auto", epochs=1)
    assert [len(rows) for rows in seen] == [20]


def test_no_text_is_tokenised_twice_alike(go, monkeypatch):
    calls, tokenize = [], pool_tokens.tokenize_quietly

    def watched(tokenizer, texts, max_length):
        calls.append((texts[0], data.tokenizer_key(tokenizer, max_length)))
        return tokenize(tokenizer, texts, max_length)

    monkeypatch.setattr(pool_tokens, "tokenize_quietly", watched)
    go("run", method="muka-auto", epochs=1)
    assert len(calls) == len(set(calls)) < 4  # teachers, neutral features, words and student ask


def test_mean_is_refused_for_teachers_of_different_labels(go):
    with pytest.raises(UserError, match=r"--method mean needs teachers of one label set, but teacher 'news' lacks 'bank'"):
        go("run", method="mean")


# ---- golden losses ----


@pytest.mark.parametrize("method", ["muka-soft", "muka-hard", "vkd", "uhc", "dfa", "oracle", "supervised"])
def test_golden_losses(go, world, method):
    """20 steps of a tiny model without dropout. Same machine: bit for bit; across CPUs the order of sums differs: 1e-5.

    Delete a file to have it written anew; a change of numbers belongs into the commit that makes it.
    """
    # The modules of dfa start at nothing, where plain Adam would make full steps of rounding; cfl amplifies it in any case, and
    # the mutual information of teachers as small as these is rounding.
    options = {"method": method, "epochs": 4, "uncertainty": "predictive_entropy"}
    ds = SMOOTH_ADAM if method == "dfa" else None
    result = go(method, ds, student=str(world / "plain_student"), store=str(world / "golden"), **options)
    found = losses(result)
    assert len(found) == 20
    path = GOLDEN / f"{method}.txt"
    if not path.exists():
        path.write_text("".join(f"{step} {loss!r}\n" for step, loss in enumerate(found, 1)))
        pytest.fail(f"{path} was missing and is written now: look at it and commit it")
    golden = [float(line.split()[1]) for line in path.read_text().splitlines()]
    assert found == pytest.approx(golden, rel=1e-5)


def test_the_texts_of_a_single_teacher_need_no_reader(go, world, monkeypatch):
    monkeypatch.setattr("muka_fast.train.pool_features", None)
    monkeypatch.setattr("muka_fast.train.name_features", None)
    shares = json.loads((go("one", teachers=[str(world / "news")], method="muka-auto", epochs=1).output / "run.json").read_text())
    assert shares["supervision"]["shares"] == {"news": 1.0}


def test_a_line_is_the_mean_of_its_steps(go):
    lines = lambda result: [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    every, few = lines(go("every", epochs=1)), lines(go("few", epochs=1, log_every=2))
    assert [line["step"] for line in few] == [2, 4, 5]
    losses = [line["loss"] for line in every]
    assert [line["loss"] for line in few] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]], rel=1e-6)


def test_seed_and_epoch_decide_which_texts_a_step_sees():
    lengths = np.full(64, 5)
    plans = [Plan(lengths, RunConfig(batch_size=8, epochs=2, seed=seed)) for seed in (0, 1)]
    epochs = [[plan.rows(step).tolist() for step in range(first, first + 8)] for plan in plans for first in (0, 8)]
    assert len({str(sorted(batches)) for batches in epochs}) == 4


def test_a_step_sees_its_texts_shortest_first():
    """Micro-batches are cut from them in this order, and texts of like length are padded least."""
    lengths = np.random.default_rng(0).integers(1, 100, 63)
    plan = Plan(lengths, RunConfig(batch_size=8, epochs=2))
    assert plan.total_steps == 16
    for step in range(16):  # the rest of an epoch, of 7 texts, is a random one
        assert (np.diff(lengths[plan.rows(step)]) >= 0).all()


def test_every_micro_batch_draws_numbers_of_its_own(go, monkeypatch):
    places = []
    monkeypatch.setattr(loop, "seed_of", lambda *place: places.append(place) or seed_of(*place))
    go("run", ds={"train_micro_batch_size_per_gpu": 8}, epochs=2)
    assert len(places) == 20 and len(set(places)) == 20


def test_the_layers_know_the_epoch(go, monkeypatch):
    """Their masks follow from it: the same ones in every epoch would hide the same units of a text from the student for good."""
    epochs = []
    train_loop = loop.train

    def spied(*given):
        tell = lambda ids, epoch: epochs.append(epoch) or given[-1](ids, epoch)
        return train_loop(*given[:-1], tell)

    monkeypatch.setattr(train, "train", spied)
    go("run", epochs=2)
    assert epochs == sorted(epochs) and set(epochs) == {0, 1}


def test_modules_beside_the_student_have_a_learning_rate_of_their_own(go, monkeypatch):
    rates, step = [], Engine.step
    lrs = lambda engine: {group["lr"] for group in engine.ds.optimizer.param_groups}
    monkeypatch.setattr(Engine, "step", lambda engine: rates.append(lrs(engine)) or step(engine))
    go("run", method="dfa", epochs=1, learning_rate=1e-5, warmup_ratio=0.0)
    assert rates[0] == {1e-5, 1e-3}
