"""The plan against what really happens: bytes counted in a training step, shards of a real store, FLOPs by formula."""

import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from muka_fast import footprint as cost
from muka_fast import plan
from muka_fast.cli import COMMANDS, main, parse
from muka_fast.config import PlanConfig, RunConfig
from muka_fast.data import read_texts
from muka_fast.errors import UserError
from muka_fast.supervision import fill_store

BATCH, LENGTH = 8, 32


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Only a configuration: 265,349 parameters, half of them in the embeddings."""
    folder = tmp_path_factory.mktemp("student")
    options = {"vocab_size": 2000, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 256, "num_labels": 5}
    transformers.DistilBertConfig(**options).save_pretrained(folder)
    return folder


def count_bytes(student: Path, processes: int) -> dict[str, dict[str, int]]:
    """What tests/memory_harness.py finds on process 0, by stage."""
    while True:
        port = random.SystemRandom().randrange(15000, 30000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                break
    harness = Path(__file__).parent / "memory_harness.py"
    command = [sys.executable, str(harness), str(student), str(BATCH), str(LENGTH), "0", "1", "2", "3"]
    common = os.environ | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [
        subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes) for rank in range(processes)
    ]
    told = [run.communicate(timeout=250) for run in runs]
    assert all(run.returncode == 0 for run in runs), told
    return json.loads(told[0][0].splitlines()[-1])


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_memory_is_what_a_training_step_holds(student, processes):
    """Weights, gradients and optimizer to 6 % (alignment, and parts that a tensor straddles), activations to 2 %."""
    found = count_bytes(student, processes)
    # In an interpreter of its own, as the command runs: what tests of training leave behind in this one is not its business.
    code = f"""if True:
        import json, dataclasses, transformers
        from muka_fast.footprint import footprint
        config = transformers.AutoConfig.from_pretrained({str(student)!r})
        print(json.dumps(dataclasses.asdict(footprint(config, {BATCH}, {LENGTH}, "fp32", "student"))))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    planned = cost.Footprint(**json.loads(done.stdout.splitlines()[-1]))
    assert planned.num_parameters == 265_349
    for stage, counted in found.items():
        row = cost.stage_memory(stage, planned, processes, "fp32")
        assert row.weights + row.gradients + row.optimizer == pytest.approx(counted["state"], rel=0.06), stage
        assert row.activations == pytest.approx(counted["activations"], rel=0.02), stage


def test_stages_partition_one_thing_more_each():
    model = cost.Footprint(num_parameters=1000, small_parameters=10, forward_flops=1, activation_bytes=7, tokens=3)
    rows = {stage: cost.stage_memory(stage, model, 4, "bf16") for stage in cost.STAGES[1:]}
    state = {stage: (row.weights, row.gradients, row.optimizer, row.host) for stage, row in rows.items()}
    assert state["1"] == (2000, 2000, 3000, 0) and state["2"] == (2000, 500, 3000, 0)
    assert state["3"] == (520, 500, 3000, 0) and state["3 offload"] == (20, 0, 0, 4500)
    uneven = cost.Footprint(num_parameters=1001, small_parameters=10, forward_flops=1, activation_bytes=7, tokens=3)
    assert cost.stage_memory("1", uneven, 4, "bf16").optimizer == 12 * 251  # the largest part
    alone = cost.stage_memory("0", model, 1, "fp32")
    assert alone.device == 16_000 + 7 and alone.buffers == 0
    casts = cost.stage_memory("0", model, 1, "bf16")
    assert casts.device == 18_000 + 7
    assert cost.stage_memory("3", model, 1, "bf16").weights == 2000  # nothing is kept whole beside the only part


def test_buffers_are_of_the_sizes_that_deepspeed_is_given_and_of_no_more_than_the_model():
    bucket, small, large = 2 * 500_000_000, cost.Footprint(1000, 10, 1, 7, 3), cost.Footprint(10**12, 10, 1, 7, 3)
    buffers = lambda model, processes=4: [cost.stage_memory(stage, model, processes, "bf16").buffers for stage in cost.STAGES]
    fetched = bucket + 2 * 1_050_000_000
    assert buffers(small) == [4000, bucket, 2 * bucket, bucket + 2000, bucket + 2000]
    assert buffers(large) == [2 * bucket, bucket, 2 * bucket, fetched, fetched]  # gradients in fp32 at stage 0


def test_a_tensor_of_the_threshold_is_small():
    """BERT's words: 1,000 x 100 elements, and one row more."""
    sizes = {"hidden_size": 100, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 100}
    found = [cost.footprint(transformers.BertConfig(vocab_size=rows, **sizes), 1, 4, "fp32", "x") for rows in (1000, 1001)]
    assert [model.num_parameters - model.small_parameters for model in found] == [0, 100_100]


def test_flops_are_those_of_the_formula():
    """A BERT: 2 FLOPs per weight and token, attention 4 L h per token and layer; pooler and classifier once per text."""
    h, inner, layers, texts, tokens = 32, 64, 3, 2, 10
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=h, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4, num_labels=3
    )
    expected = texts * (tokens * layers * (2 * (4 * h * h + 2 * h * inner) + 4 * tokens * h) + 2 * h * h + 2 * h * 3)
    assert cost.footprint(config, texts, tokens, "fp32", "x").forward_flops == expected


def with_decoder(name, decoder_layers=3):
    """An encoder with a decoder of other sizes."""
    common = {"vocab_size": 2000, "d_model": 16, "num_labels": 3, "eos_token_id": 1, "decoder_start_token_id": 1500}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 24}
    heads |= {"encoder_layers": 2, "decoder_layers": decoder_layers, "max_position_embeddings": 64}
    if name == "T5":
        heads = {"d_kv": 4, "d_ff": 32, "num_layers": 2, "num_decoder_layers": decoder_layers, "num_heads": 4}
    return getattr(transformers, f"{name}Config")(**common, **heads)


@pytest.mark.parametrize("name", ["Bart", "T5"])
def test_an_encoder_with_a_decoder_costs_what_the_real_one_does(name):
    """Of the real one attention is eager, which the counter sees on a CPU as well."""
    texts, tokens, config = 3, 11, with_decoder(name)
    planned = cost.footprint(config, texts, tokens, "fp32", "x")
    config._attn_implementation = "eager"
    real = cost.unloaded(config, "fp32").train()
    ids = torch.full((texts, tokens), 5)
    ids[:, -1] = 1
    with FlopCounterMode(display=False) as counted:
        real(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert planned.num_parameters == sum(weight.numel() for weight in real.parameters())
    assert planned.forward_flops == counted.get_total_flops() > 0


@pytest.mark.parametrize("name", ["Bart", "T5"])
def test_an_encoder_with_a_decoder_is_measured_with_two_layers_of_each(name):
    small = cost.reduced(with_decoder(name, 6))
    assert cost.unloaded(small, "fp32").num_parameters() == cost.unloaded(cost.reduced(with_decoder(name, 2)), "fp32").num_parameters()
    assert all(cost.measured_flops(with_decoder(name), 1, 7, "fp32", "cpu", train, "x") > 0 for train in (False, True))


@pytest.mark.parametrize("name", ["Bart", "T5"])
def test_a_decoder_is_part_of_what_every_sample_runs(name):
    """Two layers and three of the decoder, which counts as the head."""
    config = with_decoder(name)
    found = [plan.scoring_forwards(config, scope, 10) for scope in ("head", "last:1", "last:2", "all")]
    assert found == [1 + 10 * 3 / 5, 1 + 10 * 4 / 5, 11, 11] and plan.scoring_forwards(config, "last:1", 0) == 1


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("XLNet", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}),
        ("Longformer", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "attention_window": [4, 4]}),
    ],
)
def test_a_model_that_needs_values_is_told_in_our_words(name, sizes):
    config = getattr(transformers, f"{name}Config")(vocab_size=99, **sizes)
    with pytest.raises(UserError) as caught:
        cost.footprint(config, 2, 8, "fp32", "teacher x")
    way = f"a model of type {name.lower()} does not run without weights and texts"
    assert str(caught.value) == f"teacher x: cannot be planned from its configuration: {way}"


def test_a_configuration_that_asks_for_more_costs_the_same():
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    wish = {"chunk_size_feed_forward": 4, "output_attentions": True, "return_dict": False}
    plain, asking = (transformers.BertConfig(**small, **more) for more in ({}, wish))
    assert cost.footprint(asking, 2, 7, "fp32", "x") == cost.footprint(plain, 2, 7, "fp32", "x")
    assert cost.measured_flops(asking, 1, 7, "fp32", "cpu", False, "x") > 0


@pytest.mark.parametrize(
    ("scope", "samples", "forwards"), [("head", 16, 1), ("last:1", 16, 1), ("last:2", 8, 3), ("all", 16, 17), ("last:99", 2, 3)]
)
def test_scoring_costs_the_layers_under_dropout_once_per_sample(scope, samples, forwards):
    assert plan.scoring_forwards(transformers.BertConfig(num_hidden_layers=8), scope, samples) == forwards
    pooled = transformers.ModernBertConfig(num_hidden_layers=8, classifier_pooling="mean")
    assert plan.scoring_forwards(pooled, scope, samples) == (1 + samples / 8 if scope == "last:1" else forwards)


def test_store_bytes_are_those_of_a_store(make_teacher, texts, tmp_path):
    folders = [str(make_teacher("bert", labels, name=labels)) for labels in ("abc", "defgh")]
    pool = tmp_path / "pool.txt"
    pool.write_text("\n".join(text.strip() for text in texts))
    found = read_texts(pool)
    fill_store(tmp_path / "store", folders, found, RunConfig(mc_samples=2, shard_size=20))
    real = sum(path.stat().st_size for path in (tmp_path / "store").glob("[!t]*/shard-*"))
    width = plan.read_model(folders[0], "teacher")[0].hidden_size
    assert plan.store_bytes([(3, width), (5, width)], len(found), 20) == pytest.approx(real, rel=0.01)


def teacher_without_weights(make_teacher, labels, name):
    folder = make_teacher("bert", labels, name=name)
    (folder / "model.safetensors").unlink()
    return str(folder)


def test_plan_reads_configurations_alone_and_prints_json(make_teacher, student, capsys):
    teachers = [teacher_without_weights(make_teacher, labels, labels) for labels in ("abc", "cde")]
    words = ["plan", "--teachers", *teachers, "--student", str(student), "--num_texts", "1000", "--json"]
    capsys.readouterr()  # what DeepSpeed says when it is first imported, and not through main
    assert main([*words, "--flops", "1e9", "--gpus", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["student"]["classes"] == 5
    assert [(teacher["name"], teacher["classes"]) for teacher in found["teachers"]] == [("abc", 3), ("cde", 3)]
    assert [row["stage"] for row in found["memory"]] == ["0", "1", "2", "3", "3 offload"]
    assert found["disk"]["student"] == 4 * found["student"]["parameters"]
    step = cost.footprint(transformers.AutoConfig.from_pretrained(student, num_labels=5), 1, 128, "bf16", "x").forward_flops
    assert found["student"]["epochs"] == 16  # of 63 steps: a thousand
    assert found["student"]["hours"] == pytest.approx(3 * 16 * 1000 * step / 1e9 / 2 / 3600)
    encoder = cost.footprint(transformers.AutoConfig.from_pretrained(student), 1, 128, "fp32", "x").forward_flops
    for gpus, rounds in ((3, 2), (4, 1), (64, 1)):  # of four shards
        assert main([*words, "--flops", "1e9", "--gpus", str(gpus), "--batch_size", "192"]) == 0
        assert json.loads(capsys.readouterr().out)["neutral"]["hours"] == pytest.approx(1000 * encoder / 1e9 * rounds / 4 / 3600)
    assert found["neutral"]["hours"] == pytest.approx(1000 * encoder / 1e9 / 2 / 3600)
    assert found["disk"]["neutral"] == 1000 * 64 * 2
    assert found["tokens_per_text"] == 128 and found["disk"]["tokens"] == 1000 * (4 * 128 + 8)
    assert main([*words, "--flops", "1e9", "--gpus", "2", "--tokens_per_text", "16000"]) == 0
    assert json.loads(capsys.readouterr().out) == found  # cut at --max_length
    assert main([*words, "--flops", "1e9", "--neutral_encoder", teachers[0]]) == 0
    other = json.loads(capsys.readouterr().out)["neutral"]
    assert other["name"] == teachers[0] and other["parameters"] != found["neutral"]["parameters"]
    assert main([*words, "--flops", "1e9"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["teachers"][0]["hours"] == pytest.approx(2 * found["teachers"][0]["hours"])
    hours = []
    for precision in ("fp32", "bf16"):
        assert main([*words, "--gpu", "h200", "--scoring_precision", precision]) == 0
        planned = json.loads(capsys.readouterr().out)
        assert planned["neutral"]["weights_bytes"] == (4 if precision == "fp32" else 2) * planned["neutral"]["parameters"]
        hours.append([planned["teachers"][0]["hours"], planned["neutral"]["hours"], planned["student"]["hours"]])
    assert [full / half for full, half in zip(*hours, strict=True)] == pytest.approx([989 / 67, 989 / 67, 1])


def test_an_adapter_is_planned_by_its_base(make_teacher, tmp_path):
    base = Path(teacher_without_weights(make_teacher, "abc", "base"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"base_model.model.classifier.weight": torch.zeros(4, 16)}, adapter / "adapter_model.safetensors")
    config, labels = plan.read_model(str(adapter), "teacher")
    assert config.hidden_size == 16 and len(labels) == 4  # the adapter's own head decides
    transformers.BertConfig(hidden_size=32, num_labels=3).save_pretrained(adapter)
    config, labels = plan.read_model(str(adapter), "teacher")
    assert config.hidden_size == 32 and len(labels) == 3  # and the configuration beside it, where there is one
    assert plan.read_model(str(base), "student", classifier=False)[1] == []


def test_plan_measures_this_machine_and_prints_tables(make_teacher, student, texts, tmp_path, capsys, make_tokenizer):
    make_tokenizer("bert").save_pretrained(student)
    pool = tmp_path / "pool.txt"
    pool.write_text("\n".join(text.strip() for text in texts))
    teacher = teacher_without_weights(make_teacher, "ab", "news")
    words = ["plan", "--teachers", teacher, "--student", str(student), "--texts", str(pool), "--precision", "fp32", "--gpu", "h100"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "3 offload" in told and "fits h100" in told and f"Time for {len(texts)} texts of" in told and "store" in told
    config = transformers.AutoConfig.from_pretrained(student)
    speed = {train: cost.measured_flops(config, 4, 64, "fp32", "cpu", train, "x") for train in (False, True)}
    assert all(1e6 < value < 1e14 for value in speed.values())


def test_a_model_reads_as_many_tokens_as_it_has_positions(student, make_teacher, capsys):
    config = transformers.AutoConfig.from_pretrained(student)
    limit = config.max_position_embeddings
    assert cost.footprint(config, 2, 8 * limit, "fp32", "x") == cost.footprint(config, 2, limit, "fp32", "x")
    assert cost.footprint(config, 2, limit, "fp32", "x").tokens == limit
    teacher = teacher_without_weights(make_teacher, "ab", "news")
    words = ["plan", "--teachers", teacher, "--student", str(student), "--num_texts", "9", "--flops", "1e9", "--json"]
    capsys.readouterr()  # what DeepSpeed says when it is first imported, and not through main
    assert main([*words, "--max_length", str(8 * limit)]) == 0
    assert json.loads(capsys.readouterr().out)["student"]["max_length"] == limit


def test_a_model_is_measured_with_two_layers_of_every_kind_it_has():
    config = transformers.Qwen3Config(num_hidden_layers=6, hidden_size=64, pad_token_id=151_000)
    small = cost.reduced(config)
    assert (small.num_hidden_layers, len(small.layer_types), small.hidden_size, small.pad_token_id) == (2, 2, 64, 0)
    assert small.vocab_size == 1000  # the gradient of a table of words would take longer than two layers
    assert config.num_hidden_layers == 6 and cost.footprint(small, 1, 8, "fp32", "x").num_parameters > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_texts", "5", "--flops", "1e9"], "student nowhere/at/all: no such folder"),
        (["--num_texts", "5", "--texts", "a.txt"], "give either --texts or --num_texts"),
        ([], "give either --texts or --num_texts"),
        (["--num_texts", "5", "--gpu", "l4", "--flops", "1e12"], "--gpu and --flops exclude each other"),
        (["--num_texts", "5", "--gpu", "h300"], "h300"),
    ],
)
def test_bad_input_is_one_line(make_teacher, words, message):
    teacher = teacher_without_weights(make_teacher, "ab", "news")
    with pytest.raises(UserError, match=message) as caught:
        plan.plan(parse(COMMANDS["plan"], ["--teachers", teacher, "--student", "nowhere/at/all", *words], "muka-fast plan"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["./here", "a b", "/no/such/folder"])
def test_what_is_neither_a_folder_nor_a_hub_name(source):
    with pytest.raises(UserError, match=f"^student {re.escape(source)}: no such folder; check the path$"):
        plan.read_model(source, "student")


def test_a_configuration_that_transformers_does_not_know(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "flux_capacitor"}))
    with pytest.raises(UserError, match=rf"student {tmp_path}: its configuration cannot be read: .*flux_capacitor"):
        plan.read_model(str(tmp_path), "student", classifier=False)


def of_two_classes(kind, folder, **sizes):
    """A folder with the configuration of a classifier alone."""
    names = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}, "architectures": [f"{kind}ForSequenceClassification"]}
    getattr(transformers, f"{kind}Config")(**names, **sizes).save_pretrained(folder)
    return str(folder)


def test_configurations_of_another_make(tmp_path, student):
    """Sizes under other names, layers that no number cuts, letters instead of a vocabulary."""
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    teachers = {
        "Perceiver": of_two_classes("Perceiver", tmp_path / "Perceiver", num_blocks=1, d_model=8, d_latents=8, num_latents=2),
        "Funnel": of_two_classes("Funnel", tmp_path / "Funnel", block_sizes=[1, 1], d_model=16, n_head=2, d_head=8, d_inner=32),
        "Canine": of_two_classes("Canine", tmp_path / "Canine", num_hidden_layers=3, **small),
    }
    planned = lambda name, **more: plan.plan(
        PlanConfig(teachers=[teachers[name]], student=str(student), num_texts=9, tokens_per_text=8, device="cpu", **more)
    )
    with pytest.raises(UserError, match="cannot be planned, as the configuration of a perceiver has no hidden_size"):
        planned("Perceiver", flops=1e9)
    with pytest.raises(UserError, match=r"its speed cannot be measured here .* give --flops or --gpu"):
        planned("Funnel")
    assert planned("Funnel", flops=1e9)["teachers"][0]["hours"] > 0
    assert cost.reduced(transformers.AutoConfig.from_pretrained(teachers["Canine"])).num_hidden_layers == 2


def test_units_for_people():
    assert [plan.size(count) for count in (512, 1536, 3 * 2**20, 5 * 2**29)] == ["512 B", "1.5 KiB", "3 MiB", "2.5 GiB"]
    near = [plan.size(count) for count in (999, 1000, 999 * 2**10, 1000 * 2**10, 1023 * 2**20)]
    assert near == ["999 B", "0.977 KiB", "999 KiB", "0.977 MiB", "1.0 GiB"]
    assert [plan.duration(hours) for hours in (0.005, 0.5, 30)] == ["18 s", "30 min", "30.0 h"]


def test_hours_disk_and_fit_of_a_plan(make_teacher, student, capsys, tmp_path, make_tokenizer):
    teacher = teacher_without_weights(make_teacher, "abc", "news")
    words = ["plan", "--teachers", teacher, "--student", str(student), "--num_texts", "1000", "--json"]

    def told(*more):
        capsys.readouterr()
        assert main([*words, *more]) == 0
        return json.loads(capsys.readouterr().out)
    found = told("--flops", "1e9", "--mc_scope", "all", "--mc_samples", "8")
    forward = cost.footprint(transformers.AutoConfig.from_pretrained(teacher), 1, 128, "fp32", "x").forward_flops
    assert found["teachers"][0]["hours"] == pytest.approx(1000 * forward * 9 / 1e9 / 3600)
    assert found["disk"]["checkpoints"] == 3 * 12 * found["student"]["parameters"]  # fp32 weights and two moments
    assert all(row["fits"] for row in told("--gpu", "a10")["memory"])
    monster = plan.memory(cost.Footprint(10**12, 10, 1, 7, 3), PlanConfig(teachers=["t"], student="s", num_texts=1, gpu="a10"))
    assert not monster[0]["fits"]
    assert told("--gpu", "h200")["student"]["flops_per_s"] == pytest.approx(0.4 * 67e12)  # fp32, as train where nobody says
    assert told("--gpu", "h200", "--precision", "bf16")["student"]["flops_per_s"] == pytest.approx(0.4 * 989e12)


def test_what_nobody_says_is_planned_as_train_does_it():
    given = {"teachers": ["t"], "student": "s"}
    for gpus in (1, 4, 16):
        planned, run = PlanConfig(**given, num_texts=100, gpus=gpus), RunConfig(**given, texts="x", output="o")
        assert planned.batch_size == run.batch_size
        assert planned.micro_batch == run.batch_size // gpus
    with pytest.raises(ValueError, match="does not divide among --gpus 32"):
        PlanConfig(**given, num_texts=100, gpus=32)
    assert PlanConfig(**given, num_texts=100, batch_size=64, micro_batch=3, gpus=8).micro_batch == 3
    assert PlanConfig(**given, num_texts=100).precision == "fp32"


def test_tokens_are_counted_as_the_student_cuts_them(student, make_tokenizer, tmp_path):
    texts, tokenizer = ["a text", "one two three four five six seven"], make_tokenizer("bert")
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps({"text": "x", "body": text}) + "\n" for text in texts))
    given = {"teachers": ["t"], "texts": str(tmp_path / "pool.jsonl"), "text_column": "body", "max_length": 8}
    make_tokenizer("bert").save_pretrained(tmp_path / "student")
    lengths = [min(len(tokenizer(text).input_ids), 8) for text in texts]
    assert lengths[0] < lengths[1] == 8
    assert plan.count_texts(PlanConfig(student=str(tmp_path / "student"), **given)) == (2, sum(lengths) / 2)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no tokenizer in .*, or give --tokens_per_text"):
        plan.count_texts(PlanConfig(student=str(tmp_path / "none"), **given))


def test_plan_looks_for_a_hub_students_tokenizer_as_train_does(monkeypatch, tmp_path, make_tokenizer):
    """One question to the hub, in train's way, and no weights."""
    (tmp_path / "pool.txt").write_text("a text\n")
    make_tokenizer("bert").save_pretrained(tmp_path / "cached")
    asked = []
    monkeypatch.setattr(plan.checkpoint, "_hub_folder", lambda name, files: asked.append((name, files)) or tmp_path / "cached")
    options = PlanConfig(teachers=["t"], student="owner/name", texts=str(tmp_path / "pool.txt"))
    assert plan.count_texts(options)[0] == 1
    [(name, files)] = asked
    assert name == "owner/name" and "*.json" in files and not any("safetensors" in pattern for pattern in files)


def test_a_plan_counts_up_to_the_limit(make_teacher, student, tmp_path, capsys):
    (tmp_path / "pool.txt").write_text("".join(f"text {i}\n" for i in range(50)))
    options = PlanConfig(teachers=["t"], student="s", texts=str(tmp_path / "pool.txt"), limit=20, tokens_per_text=9)
    assert plan.count_texts(options) == (20, 9.0)


def test_a_backward_counts_for_two_forwards(student, monkeypatch):
    config, ticks = transformers.AutoConfig.from_pretrained(student), itertools.count()
    monkeypatch.setattr(cost.time, "perf_counter", lambda: float(next(ticks)))  # every round takes as long
    speed = {train: cost.measured_flops(config, 4, 64, "fp32", "cpu", train, "x") for train in (False, True)}
    assert speed[True] == pytest.approx(3 * speed[False])
    forward = cost.footprint(cost.reduced(config), 1, 64, "fp32", "x").forward_flops
    assert speed[False] == pytest.approx(4 * forward)  # of four texts, one tick for each round
    monkeypatch.setattr(cost, "MEASURED_FLOPS", 2.5 * forward)
    assert cost.measured_flops(config, 4, 64, "fp32", "cpu", False, "x") == pytest.approx(2 * forward)


def test_a_cpu_trains_fp32_weights_under_autocast_and_scores_with_bf16_weights(student, monkeypatch):
    config, built, unloaded = transformers.AutoConfig.from_pretrained(student), [], cost.unloaded
    monkeypatch.setattr(cost, "unloaded", lambda config, precision: built.append(precision) or unloaded(config, precision))
    for train, expected in ((True, "fp32"), (False, "bf16")):
        cost.measured_flops(config, 1, 8, "bf16", "cpu", train, "x")
        assert built[-1] == expected


@pytest.fixture
def planned(make_teacher, student):
    """planned(option=...) -> the plan of one teacher, of width 16, for a student of width 64 and 1,000 texts; neutral: the teacher is
    the neutral encoder too."""
    teachers = [teacher_without_weights(make_teacher, "abc", "news")]
    common = {"teachers": teachers, "student": str(student), "num_texts": 1000, "tokens_per_text": 16, "flops": 1e9, "device": "cpu"}
    return lambda neutral=False, **more: plan.plan(PlanConfig(**(common | more), neutral_encoder=teachers[0] if neutral else None))


def test_every_option_of_a_plan_counts(planned):
    plain, longer = planned(), planned(tokens_per_text=None)
    assert plain["memory"] == longer["memory"]  # a batch of the longest texts has to fit
    assert plain["student"]["hours"] < longer["student"]["hours"] / 4
    assert planned(epochs=2)["student"]["epochs"] == 2
    assert planned(mc_scope="all", mc=False)["teachers"][0]["forwards"] == 1
    assert planned(neutral=True)["disk"]["neutral"] == 1000 * 16 * 2
    assert [row["stage"] for row in planned(precision="fp16")["memory"]] == ["1", "2", "3", "3 offload"]
    assert planned(shard_size=1)["disk"]["store"] > 2 * plain["disk"]["store"]
    assert planned(shard_size=1000, gpus=4)["neutral"]["hours"] == pytest.approx(plain["neutral"]["hours"])  # one GPU has them all


def test_speed_is_measured_in_the_precisions_that_are_told(planned, monkeypatch):
    """A CPU scores in fp16 and trains in fp32 instead."""
    told, measured = [], []
    monkeypatch.setattr(plan, "tell_precision", lambda option, precision, device: told.append((option, precision)))
    speed = lambda config, texts, tokens, precision, device, train, what: measured.append((precision, train)) or 1e9
    monkeypatch.setattr(plan, "measured_flops", speed)
    planned(flops=None, scoring_precision="bf16", precision="fp16")
    assert told == [("--scoring_precision", "bf16"), ("--precision", "fp16")]
    assert measured == [("bf16", False), ("bf16", False), ("fp32", True)]  # teacher, neutral encoder, student


def test_memory_of_a_gpu_is_in_gib():
    options = PlanConfig(teachers=["t"], student="s", num_texts=1, gpu="a10")
    fits = [plan.memory(cost.Footprint(gb * 10**9 // 16, 10, 1, 7, 3), options)[0]["fits"] for gb in (25, 26)]
    assert fits == [True, False]  # 24 GiB


def test_every_gpu_is_faster_in_half_precision_than_in_fp32():
    assert all(full < half for _, half, full in plan.GPUS.values())
    assert plan.GPUS["h100"][1:] == plan.GPUS["h200"][1:]  # the same chip


def test_tables_show_each_figure_in_its_column(planned, capsys):
    parts = ("weights", "gradients", "optimizer", "activations", "buffers", "device", "host")
    found = planned(flops=None, gpu="a10", precision="bf16", epochs=7)
    row = dict(zip(parts, range(1, 8), strict=True))
    found["memory"] = [{"stage": "1", "fits": False} | row, {"stage": "2", "fits": True} | row]
    plan.print_tables(found, PlanConfig(teachers=["t"], student="s", num_texts=1, gpu="a10"))
    told = capsys.readouterr().out
    lines = [re.findall(r"\d B|yes|no", line) for line in told.splitlines() if "1 B" in line and "7 B" in line]
    assert lines == [[*(f"{i} B" for i in range(1, 8)), answer] for answer in ("no", "yes")]
    (training,) = [line.split() for line in told.splitlines() if "training" in line]
    (scoring,) = [line.split() for line in told.splitlines() if "scoring news" in line]
    assert "21" in training and "50" in training  # a backward costs two forwards; 0.4 of 125 TFLOP/s
    assert "12.5" in scoring  # in fp32
    assert "speed of one GPU 40% of its data sheet" in " ".join(told.split())


def test_tokens_are_counted_in_texts_of_all_the_pool(student, make_tokenizer, tmp_path, monkeypatch):
    """Which may be sorted."""
    monkeypatch.setattr(plan, "SAMPLED_TEXTS", 2)
    make_tokenizer("bert").save_pretrained(tmp_path / "student")
    texts = ["short", "short one", "a longer text of more words", "another longer text of more words"]
    (tmp_path / "pool.txt").write_text("\n".join(texts))
    options = PlanConfig(teachers=["t"], student=str(tmp_path / "student"), texts=str(tmp_path / "pool.txt"))
    lengths = [len(make_tokenizer("bert")(text).input_ids) for text in texts[::2]]
    assert plan.count_texts(options) == (4, sum(lengths) / 2)
