"""The conductor end to end on tiny random models: layout, resume, faults, golden losses."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from launch import TRAIN, finish, run_processes, wait_for
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from muka_fast import loop, snapshots, train
from muka_fast.config import RunConfig
from muka_fast.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
LABELS = {"news": ("business", "sport", "science"), "home": ("science", "bank", "smart home")}
# Adam divides by the root of the second moment: where a gradient is zero but for rounding (the key biases of attention), it turns
# rounding into full steps. A large eps leaves rounding what it is, so that layouts can be compared closely.
SMOOTH_ADAM = {"optimizer": {"type": "AdamW", "params": {"eps": 1e-3}}}


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token per known word. Trained tokenizers break ties differently in every process, which golden losses do not forgive."""
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = {word: index for index, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **special)


@pytest.fixture(scope="session")
def world(tmp_path_factory, make_model, texts):
    """Two teachers that share a class, a student without head (dropout 0.1), 75 labelled texts with one blank row among them."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = word_tokenizer(texts)
    for seed, (name, labels) in enumerate(LABELS.items()):
        make_model("bert", labels, seed=seed, tokenizer=tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, dropout in (("student", 0.1), ("plain_student", 0.0)):
        model = make_model("distilbert", ("a", "b"), seed=9, tokenizer=tokenizer, dropout=dropout)
        model.base_model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    choose = random.Random(0)
    names = sorted({label for labels in LABELS.values() for label in labels})
    rows = [{"text": f"{choose.choice(texts)} {choose.choice(texts)}", "label": choose.choice(names)} for _ in range(75)]
    rows.insert(3, {"text": " ", "label": "bank"})
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def go(world, tmp_path):
    """go(name, **options) -> RunResult of a run in tmp_path/name; all runs share one store."""

    def run(name: str, ds: dict | None = None, **options) -> train.RunResult:
        return train.amalgamate(**arguments(world, tmp_path, name, ds, options))

    return run


def arguments(world: Path, tmp_path: Path, name: str, ds: dict | None, options: dict) -> dict:
    common = {"teachers": [str(world / teacher) for teacher in LABELS], "student": str(world / "student")}
    common |= {"texts": str(world / "texts.jsonl"), "store": str(world / "store"), "output": str(tmp_path / name)}
    common |= {"learning_rate": 1e-3, "log_every": 1, "mc_samples": 4}
    if ds is not None:
        (tmp_path / f"{name}.json").write_text(json.dumps(ds))
        common["ds_config"] = str(tmp_path / f"{name}.json")
    return common | options


def weights(result: train.RunResult) -> dict[str, torch.Tensor]:
    return load_file(result.output / "model.safetensors")


def losses(result: train.RunResult) -> list[float]:
    return [json.loads(line)["loss"] for line in (result.output / "metrics.jsonl").read_text().splitlines()]


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


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
    assert {"read texts", "score teachers", "load student", "train", "export", "evaluate"} <= record["seconds"].keys()
    assert 0 <= result.metrics["student"]["accuracy"] <= 1 and 0 <= result.metrics["target_accuracy"] <= 1
    lines = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 16)) and lines[-1]["epoch"] == 3
    assert all(line["loss"] > 0 and line["lr"] > 0 and line["grad_norm"] > 0 and line["texts_per_s"] > 0 for line in lines)
    assert lines[0]["lr"] == pytest.approx(1e-3 / 2) and max(line["lr"] for line in lines) == 1e-3
    assert "teachers" in (result.output / "README.md").read_text()


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


@pytest.mark.parametrize("stage", [0, 3])
def test_activation_checkpointing_changes_nothing(go, stage, monkeypatch):
    """Dropout included; what is inside a layer runs a second time in the backward."""
    from transformers.models.distilbert.modeling_distilbert import FFN

    calls = []
    forward = FFN.forward
    monkeypatch.setattr(FFN, "forward", lambda self, *rest, **more: calls.append(0) or forward(self, *rest, **more))
    ds, counts = {"zero_optimization": {"stage": stage}}, []
    runs = []
    for name, on in (("plain", False), ("recomputed", True)):
        calls.clear()
        runs.append(go(name, ds=ds, method="vkd", epochs=1, activation_checkpointing=on))  # vkd: no other forward of the student
        counts.append(len(calls))
    assert losses(runs[0]) == losses(runs[1]) and largest_difference(weights(runs[0]), weights(runs[1])) == 0
    # The first of two layers, five steps; the last one, cut to the token that is read, keeps its activations.
    assert counts[1] == 2 * counts[0] == 2 * 5


def test_run_yaml_repeats_the_run_bit_for_bit(go, tmp_path):
    first = go("first", ds={"gradient_clipping": 0.3})
    options = yaml.safe_load((first.output / "run.yaml").read_text())
    assert options["max_grad_norm"] == 0.3  # taken over from ds.json, and no contradiction with it now
    again = train.amalgamate(config=str(first.output / "run.yaml"), output=str(tmp_path / "again"))
    assert losses(first) == losses(again) and largest_difference(weights(first), weights(again)) == 0


@pytest.mark.parametrize("normalize_margin", [False, True])
def test_micro_batches_change_nothing(go, world, normalize_margin):
    """75 texts: the last batch of an epoch has 11, which do not divide."""
    options = {"student": str(world / "plain_student"), "normalize_margin": normalize_margin}
    whole = go("whole", ds=SMOOTH_ADAM, **options)
    for micro in (8, 4, 1):
        split = go(f"micro{micro}", ds={**SMOOTH_ADAM, "train_micro_batch_size_per_gpu": micro}, **options)
        assert losses(split) == pytest.approx(losses(whole), rel=1e-5, abs=1e-8)
        assert largest_difference(weights(split), weights(whole)) < 1e-6


def test_zero_stages_change_nothing(go):
    """Stages 1 and 2 to the last bit, stage 3 (another order of summation in the gradient norm) to rounding; dropout included."""
    plain = go("stage0", ds=SMOOTH_ADAM)
    for stage in (1, 2, 3):
        sharded = go(f"stage{stage}", ds={**SMOOTH_ADAM, "zero_optimization": {"stage": stage}})
        files = [path for path in sharded.output.rglob("*") if path.is_file() and path.parent.name != "tensorboard"]
        written = {path.suffix for path in files}
        assert written <= {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".log"}, written  # nothing pickled
        assert largest_difference(weights(sharded), weights(plain)) <= (1e-6 if stage == 3 else 0)
        assert losses(sharded) == pytest.approx(losses(plain), rel=1e-6 if stage == 3 else 0, abs=1e-8 if stage == 3 else 0)


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("muka-evidence", "dfa")]


@pytest.mark.parametrize("method", ["muka-soft", *SLOW])
def test_two_processes_change_nothing(go, world, tmp_path, method):
    options = {"student": str(world / "plain_student"), "epochs": 1, "method": method}
    alone = go("alone", ds=SMOOTH_ADAM, **options)
    ds = {**SMOOTH_ADAM, "zero_optimization": {"stage": 2}}
    # The deepspeed launcher adds the rank.
    codes, told = finish(run_processes(arguments(world, tmp_path, "pair", ds, options), 2, ("--local_rank=0",)))
    assert codes == [0, 0], told
    pair = train.RunResult(tmp_path / "pair")
    assert losses(pair) == pytest.approx(losses(alone), rel=1e-6, abs=1e-8)
    assert largest_difference(weights(pair), weights(alone)) < 1e-6


# ---- resume ----


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step): SIGTERM arrives while this step is under way."""

    def arm(step: int) -> None:
        def train_step(engine, *rest, _original=loop.train_step):
            if engine.completed_steps == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return _original(engine, *rest)

        monkeypatch.setattr(loop, "train_step", train_step)

    yield arm
    monkeypatch.undo()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_sigterm_saves_and_resume_continues_bit_for_bit(go, stop_at, monkeypatch, stage):
    ds = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 8}
    whole = go("whole", ds=ds)
    stop_at(7)
    stopped = go("cut", ds=ds)
    assert stopped.stopped and not (stopped.output / "model.safetensors").exists()
    monkeypatch.undo()
    resumed = go("cut", ds=ds, resume=True)
    assert not resumed.stopped and losses(resumed) == losses(whole)
    assert largest_difference(weights(resumed), weights(whole)) == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_resume_in_another_layout(go, stop_at, monkeypatch, world):
    options = {"student": str(world / "plain_student")}
    whole = go("whole", ds=SMOOTH_ADAM, **options)
    stop_at(7)
    go("cut", ds={**SMOOTH_ADAM, "zero_optimization": {"stage": 3}}, **options)
    monkeypatch.undo()
    resumed = go("cut", ds={**SMOOTH_ADAM, "train_micro_batch_size_per_gpu": 4}, resume=True, **options)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6, abs=1e-8)
    assert largest_difference(weights(resumed), weights(whole)) < 1e-6


@pytest.mark.slow
def test_resume_with_another_number_of_processes(go, stop_at, monkeypatch, world, tmp_path):
    """One process, then two, then one again; losses as of one alone to 1e-5 relative, weights to 1e-5: sums in another order."""
    options = {"student": str(world / "plain_student"), "epochs": 60}
    whole = go("whole", ds=SMOOTH_ADAM, **options)
    stop_at(20)
    assert go("cut", ds=SMOOTH_ADAM, **options).stopped
    monkeypatch.undo()
    ds = {**SMOOTH_ADAM, "zero_optimization": {"stage": 2}}
    pair = run_processes(arguments(world, tmp_path, "cut", ds, options), 2, ("--resume",))
    metrics = tmp_path / "cut" / "metrics.jsonl"
    wait_for(lambda: len(metrics.read_text().splitlines()) > 40, pair)
    pair[1].terminate()
    codes, told = finish(pair)
    assert codes == [train.STOPPED] * 2, told
    steps = len(losses(train.RunResult(tmp_path / "cut")))
    assert 40 < steps < 300 and f"stopped by SIGTERM after step {steps} of 300" in told
    resumed = go("cut", ds=SMOOTH_ADAM, resume=True, **options)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5, abs=1e-8)
    assert largest_difference(weights(resumed), weights(whole)) < 1e-5


def test_the_last_two_checkpoints_stay_and_a_damaged_one_is_passed_over(go, stop_at, monkeypatch, caplog):
    whole = go("whole", save_every=2)
    assert [folder.name for folder in snapshots.snapshots(whole.output)] == ["step-00000014", "step-00000015"]
    stop_at(9)
    cut = go("cut", save_every=3)
    monkeypatch.undo()
    newest = snapshots.snapshots(cut.output)[-1]
    assert newest.name == "step-00000010"
    with open(newest / "state-00000.safetensors", "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x01")
    (cut.output / "checkpoints" / "step-00000012.partial").mkdir()  # as a kill leaves it
    caplog.set_level("WARNING", logger="muka_fast")
    resumed = go("cut", resume=True, save_every=3)
    assert "step-00000010 is damaged (state-00000.safetensors does not match its checksum)" in caplog.text
    assert losses(resumed) == losses(whole) and largest_difference(weights(resumed), weights(whole)) == 0
    assert not list(resumed.output.glob("checkpoints/*.partial"))
    # The damaged one is kept, and takes no whole one's place.
    assert {path.name for path in resumed.output.glob("checkpoints/*.damaged")} == {"step-00000010.damaged"}
    assert [folder.name for folder in snapshots.snapshots(resumed.output)] == ["step-00000012", "step-00000015"]


def test_resume_refuses_another_run(go, stop_at, monkeypatch, world, tmp_path):
    stop_at(3)
    go("cut")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"learning_rate 0\.001 -> 0\.002.*--overwrite"):
        go("cut", resume=True, learning_rate=2e-3)
    with pytest.raises(UserError, match=r"texts [0-9a-f]{12} -> [0-9a-f]{12}"):
        go("cut", resume=True, limit=70, store=str(tmp_path / "other_store"))
    with pytest.raises(UserError, match=r"teachers .* labels"):
        go("cut", resume=True, teachers=[str(world / "news")])
    assert go("cut", resume=True).output.joinpath("model.safetensors").exists()


def test_an_output_folder_with_a_run_is_refused_and_a_complete_one_is_left_alone(go, world):
    first = go("run", epochs=1)
    before = {path.name: path.stat().st_mtime_ns for path in first.output.iterdir()}
    with pytest.raises(UserError, match="already holds a run"):
        go("run", epochs=1)
    assert go("run", epochs=1, resume=True).metrics == first.metrics
    with pytest.raises(UserError, match=r"epochs 1 -> 2.*--overwrite"):
        go("run", epochs=2, resume=True)
    with pytest.raises(UserError, match=r"student .*student.* -> .*plain_student"):
        go("run", epochs=1, resume=True, student=str(world / "plain_student"))
    with pytest.raises(UserError, match=r"optimizer .* -> "):
        go("run", epochs=1, resume=True, ds=SMOOTH_ADAM)
    assert {path.name: path.stat().st_mtime_ns for path in first.output.iterdir()} == before


def test_a_damaged_record_stops_a_resume_but_not_an_overwrite(go, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: cannot be read .*--overwrite"):
        go("run", epochs=1, resume=True)
    assert json.loads((go("run", epochs=1, overwrite=True).output / "run.json").read_text())["state"] == "complete"


def test_resume_refuses_other_true_labels(go, stop_at, monkeypatch, world, tmp_path):
    """The texts are the same, so their fingerprint is, too."""
    rows = [json.loads(line) for line in (world / "texts.jsonl").read_text().splitlines()]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stop_at(3)
    go("cut", texts=str(texts), method="supervised")
    monkeypatch.undo()
    texts.write_text("".join(json.dumps(row | {"label": "bank"}) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"true_labels [0-9a-f]{12} -> [0-9a-f]{12}"):
        go("cut", texts=str(texts), method="supervised", resume=True)


def test_an_output_that_this_node_does_not_see_is_named(world, tmp_path):
    """A process of another node is told that one of them has begun the store, and finds none."""
    from muka_fast.shard_queue import ShardQueue

    class Elsewhere(ShardQueue):
        def agree(self, name, propose):
            return 4096

    config = RunConfig(**arguments(world, tmp_path, "run", None, {"store": None}))
    with pytest.raises(UserError, match=r"run.*supervision is not visible here.*file system that all nodes share"):
        train.fill_store(tmp_path / "run" / "supervision", config.teachers, train.read_data(config), config, Elsewhere())


# ---- scoring by several processes ----

# Slow enough that a process which starts late still finds shards.
SLOW_SCORING = {"shard_size": 4, "mc_scope": "all", "mc_samples": 256, "token_budget": 64, "epochs": 1}


def store_files(store: Path) -> dict[str, bytes]:
    """Every file of a store by its path in it."""
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def test_two_processes_fill_the_store_that_one_fills(go, world, tmp_path):
    """Bit for bit, manifest included; each text is scored once, and both processes did some."""
    alone = go("alone", store=None, **SLOW_SCORING)
    options = arguments(world, tmp_path, "pair", None, {"store": None, **SLOW_SCORING})
    codes, told = finish(run_processes(options, 2))
    assert codes == [0, 0], told
    assert store_files(tmp_path / "pair" / "supervision") == store_files(alone.output / "supervision")
    shares = re.findall(r"process (\d) scored (\d+) of 75 texts with (\w+)", logs(tmp_path / "pair"))
    assert {(rank, teacher) for rank, _, teacher in shares} == {(rank, teacher) for rank in "01" for teacher in LABELS}
    for teacher in LABELS:
        assert sum(int(count) for _, count, name in shares if name == teacher) == 75
    assert {rank for rank, count, _ in shares if int(count)} == {"0", "1"}
    assert "process 0 scored" in told and "process 1 scored" not in told  # on the console only process 0 speaks


def logs(output: Path) -> str:
    return "".join(path.read_text() for path in sorted((output / "logs").glob("*.log")))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_while_scoring_ends_the_job_and_resume_finishes(world, tmp_path, victim):
    options = arguments(world, tmp_path, "run", None, {"store": None, **SLOW_SCORING})
    processes = run_processes(options, 2)
    store = tmp_path / "run" / "supervision"
    wait_for(lambda: len(list(store.glob("*/shard-*"))) >= 4, processes)
    processes[victim].kill()
    assert processes[1 - victim].wait(timeout=20) == 1
    _, told = finish(processes)
    assert "is gone while scoring: stopping" in told
    before = {path: path.stat().st_mtime_ns for path in store.glob("*/shard-*")}
    assert 4 <= len(before) < 38
    codes, told = finish(run_processes(options, 2, ("--resume",)))
    assert codes == [0, 0], told
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was scored again
    assert len(list(store.glob("*/shard-*"))) == 38 and (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_score_under_a_launcher_fills_the_store_that_one_process_fills(world, tmp_path):
    options = {"teachers": [str(world / name) for name in LABELS], "texts": str(world / "texts.jsonl"), **SLOW_SCORING}
    del options["epochs"]
    program = ("-m", "muka_fast.cli", "score")
    for name, count in (("alone", 1), ("pair", 2)):
        codes, told = finish(run_processes(options | {"output": tmp_path / name}, count, program=program))
        assert codes == [0] * count, told
        assert told.count("mean normalised entropy") == len(LABELS)  # process 0 tells the figures
    files = store_files(tmp_path / "pair")
    shares = [files.pop(f"logs/rank{rank}.log").decode() for rank in range(2)]
    assert all(re.search(r"scored [1-9]\d* of 75 texts", share) for share in shares)
    assert files == store_files(tmp_path / "alone")


@pytest.mark.slow
def test_bad_input_met_by_one_process_ends_all_with_one_message(world, tmp_path, make_model, texts):
    """NaN in a teacher's logits for one text: whoever scores it tells, the other leaves its work."""
    broken = tmp_path / "broken"
    tokenizer = word_tokenizer(texts)
    model = make_model("bert", LABELS["news"], tokenizer=tokenizer)
    with torch.no_grad():  # finite, but not what a norm makes of it
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("Mongolia")] = 3e38
    model.save_pretrained(broken)
    tokenizer.save_pretrained(broken)
    pool = tmp_path / "pool.txt"
    rows = [line.strip() for line in texts if "Mongolia" not in line] * 2
    rows.insert(len(rows) // 2, "What is the capital of Mongolia?")
    pool.write_text("".join(f"{row}\n" for row in rows))
    options = {"teachers": [str(broken)], "texts": str(pool), "store": None, **SLOW_SCORING}
    codes, told = finish(run_processes(arguments(world, tmp_path, "run", None, options), 2))
    assert codes == [2, 2], told
    assert told.count("muka-fast: error:") == 1 and "teacher broken: NaN logits for text 46" in told


# ---- faults ----


def test_a_loss_that_is_no_number_names_the_texts(go, monkeypatch):
    from muka_fast.methods import MukaHard

    def poisoned(self, output, rows, _original=MukaHard._loss):
        return torch.where(rows == 5, float("nan"), _original(self, output, rows))

    monkeypatch.setattr(MukaHard, "_loss", poisoned)
    # Row 5 is example 6: a blank row before it was skipped, and counts.
    with pytest.raises(UserError, match=r"loss became nan at step \d+ for the texts with example ids 6 of .*texts\.jsonl"):
        go("run", method="muka-hard")


def test_a_full_disk_keeps_the_last_checkpoints(go, monkeypatch, world, tmp_path):
    import safetensors.torch

    calls = []

    def save_file(*rest, _original=safetensors.torch.save_file, **options):
        calls.append(rest)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return _original(*rest, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(UserError, match=r"step-00000006: the checkpoint cannot be written .*No space left.*--resume"):
        go("run", save_every=2)
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000002", "step-00000004"]
    monkeypatch.undo()
    whole = go("whole")
    assert largest_difference(weights(go("run", resume=True)), weights(whole)) == 0


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
        assert losses(sharded) == pytest.approx(losses(plain), rel=1e-4 if stage == 3 else 0)


def test_dfa_does_not_depend_on_the_micro_batch_and_cfl_refuses_to(go, world):
    options = {"student": str(world / "plain_student"), "epochs": 1}
    small = {**SMOOTH_ADAM, "train_micro_batch_size_per_gpu": 4}
    whole, split = (go(f"dfa{i}", ds=ds, method="dfa", **options) for i, ds in enumerate((SMOOTH_ADAM, small)))
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
    assert largest_difference(weights(split), weights(whole)) < 1e-5
    with pytest.raises(UserError, match=r"--method cfl compares the features of whole batches.*here it is 4"):
        go("cfl", ds=small, method="cfl", **options)


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
    with pytest.raises(UserError, match="neutral_encoder"):
        go("run", **options, resume=True)


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


# ---- the script ----


SCORE = ("-m", "muka_fast.cli", "score")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (TRAIN, {"teachers": ["nobody"]}, "teacher nobody: "),
        (TRAIN, {"batch_size": 0}, "--batch_size 0: must be"),  # before the processes are connected
        (TRAIN, {"texts": "nowhere.jsonl"}, "nowhere.jsonl"),
        (TRAIN, {"method": "mean"}, "--method mean needs teachers of one label set"),
        (SCORE, {"texts": "nowhere.jsonl"}, "nowhere.jsonl"),
        (SCORE, {"teachers": ["nobody"]}, "teacher nobody: "),
    ],
)
def test_bad_input_is_told_once_by_two_processes(world, tmp_path, program, options, message):
    """Process 0 speaks, both end with code 2."""
    options = arguments(world, tmp_path, "run", None, {"store": str(tmp_path / "store"), "mc_scope": "head"} | options)
    if program is SCORE:
        options = {name: options[name] for name in ("teachers", "texts", "mc_scope", "output")}
    codes, told = finish(run_processes(options, 2, program=program))
    assert codes == [2, 2] and told.count("muka-fast: error:") == 1 and message in told, told


@pytest.mark.slow
def test_a_dead_worker_takes_the_job_down_within_seconds(world, tmp_path):
    options = arguments(world, tmp_path, "run", None, {"epochs": 10_000})
    processes = run_processes(options, 2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, processes)
    processes[1].kill()
    assert processes[0].wait(timeout=30) != 0
    finish(processes)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_random_moments_change_nothing(world, tmp_path, processes):
    """SIGKILL at 20 random moments of scoring, training, saving and exporting; --resume ends with the same weights, bit for bit.

    Of two processes one is killed, or both; one that is left ends within seconds.
    """
    slow_scoring = {"shard_size": 4, "mc_scope": "all", "mc_samples": 32}
    options = arguments(world, tmp_path, "kills", None, {"save_every": 1, **slow_scoring})
    (tmp_path / "options.json").write_text(json.dumps(options))
    harness = str(Path(__file__).parent / "kill_harness.py")
    command = [sys.executable, harness, str(tmp_path / "options.json"), "20", "1", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 20 and found["runs"] >= 1 and found["same"], found
    assert len(found["moments"]) >= 4, found  # a kill that aims at a stage may fall into the next one
    assert found["longest"] < 30, found


# ---- what the student learns besides, and what it does not learn from ----


def uncertainty_head(result: train.RunResult) -> dict[str, torch.Tensor]:
    return load_file(result.output / "uncertainty_head.safetensors")


def test_the_uncertainty_head_hangs_on_no_layout_and_the_student_feels_nothing(go, world):
    options = {"student": str(world / "plain_student"), "uncertainty_head": True}
    whole = go("whole", ds=SMOOTH_ADAM, eval=str(world / "texts.jsonl"), **options)
    head = uncertainty_head(whole)
    assert set(whole.metrics["student"]["doubt"]) == {"uncertainty head", "softmax"}
    for number, layout in enumerate([{"train_micro_batch_size_per_gpu": 4}, {"zero_optimization": {"stage": 3}}]):
        other = go(f"layout{number}", ds=SMOOTH_ADAM | layout, **options)
        assert losses(other) == pytest.approx(losses(whole), rel=1e-5, abs=1e-8)
        found = uncertainty_head(other)
        torch.testing.assert_close(found["mean"], head["mean"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found["scale"], head["scale"], atol=1e-2, rtol=1e-2)
    alone = go("alone", ds=SMOOTH_ADAM, **options | {"uncertainty_head": False})
    assert largest_difference(weights(whole), weights(alone)) == 0 and losses(whole) == losses(alone)
    assert not (alone.output / "uncertainty_head.safetensors").exists()


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_with_an_uncertainty_head_resumes_bit_for_bit(go, stop_at, monkeypatch, stage):
    options = {"ds": {"zero_optimization": {"stage": stage}}, "uncertainty_head": True, "method": "dfa"}
    whole = go("whole", **options)
    stop_at(7)
    assert go("cut", **options).stopped
    monkeypatch.undo()
    with pytest.raises(UserError, match="uncertainty_head true -> false"):
        go("cut", resume=True, **options | {"uncertainty_head": False})
    with monkeypatch.context() as patch:  # killed between the student and its head
        patch.setattr(train, "fit_head", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            go("cut", resume=True, **options)
    assert not (whole.output.parent / "cut" / "uncertainty_head.safetensors").exists()
    resumed = go("cut", resume=True, **options)
    assert losses(resumed) == losses(whole) and largest_difference(weights(resumed), weights(whole)) == 0
    assert largest_difference(uncertainty_head(resumed), uncertainty_head(whole)) == 0


def test_a_run_of_an_older_version_resumes_without_the_new_options(go, stop_at, monkeypatch):
    stop_at(3)
    path = go("cut", epochs=1).output / "run.json"
    monkeypatch.undo()
    record = json.loads(path.read_text())
    for name in ("uncertainty_head", "coverage"):
        del record["identity"][name], record["config"][name]
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="uncertainty_head false -> true"):
        go("cut", epochs=1, resume=True, uncertainty_head=True)
    assert not go("cut", epochs=1, resume=True).stopped


@pytest.mark.slow
def test_two_processes_train_the_same_uncertainty_head(go, world, tmp_path):
    options = {"student": str(world / "plain_student"), "epochs": 1}
    alone = go("alone", ds=SMOOTH_ADAM, uncertainty_head=True, **options)
    ds = {**SMOOTH_ADAM, "zero_optimization": {"stage": 3}}
    codes, told = finish(run_processes(arguments(world, tmp_path, "pair", ds, options), 2, ("--uncertainty_head",)))
    assert codes == [0, 0], told
    pair = train.RunResult(tmp_path / "pair")
    torch.testing.assert_close(uncertainty_head(pair)["scale"], uncertainty_head(alone)["scale"], atol=1e-2, rtol=1e-2)
    assert largest_difference(weights(pair), weights(alone)) < 1e-6


def test_texts_that_belong_to_nobody_are_told_and_not_learnt_from(go, monkeypatch, caplog):
    nobody = lambda sup, weights, neutral, seed: (torch.arange(len(sup)) % 5 == 0).float().numpy()
    monkeypatch.setattr(train, "nobody_weights", nobody)
    caplog.set_level("WARNING", logger="muka_fast")
    result = go("holes", method="muka-evidence", coverage=True, uncertainty_head=True, epochs=1)
    assert "muka-evidence: 15 of 75 texts belong to no teacher" in caplog.text
    record = json.loads((result.output / "run.json").read_text())
    assert record["coverage"]["texts"] == 15 and record["coverage"]["share"] == pytest.approx(0.2)
    assert [row["example_id"] % 5 in (0, 1) for row in record["coverage"]["examples"]] == [True] * 6  # a blank row comes fourth
    assert "| texts that belong to no teacher, left out | 15 |" in (result.output / "README.md").read_text()
    monkeypatch.setattr(train, "nobody_weights", lambda sup, *_: torch.zeros(len(sup)).numpy())
    again = go("again", method="muka-evidence", coverage=True, epochs=1)
    assert json.loads((again.output / "run.json").read_text())["coverage"] == {"texts": 0, "share": 0.0, "examples": []}
    plain = go("plain", method="muka-evidence", epochs=1)
    assert largest_difference(weights(again), weights(plain)) == 0 and largest_difference(weights(result), weights(plain)) > 0
