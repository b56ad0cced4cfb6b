"""The DeepSpeed configuration we fill and refuse, the schedule, the clipping, and an engine alone."""

import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from group_targets import exit_codes, save_on_full_disk
from hypothesis import given
from hypothesis import strategies as st
from launch import launcher_variables
from pydantic import BaseModel, ValidationError, model_validator

from muka_fast import engine as engine_module
from muka_fast.config import RunConfig
from muka_fast.console import first_of_node_tells
from muka_fast.ds_config import UNSUPPORTED, prepare_ds_config, read_ds_config, refusal
from muka_fast.engine import Engine, check_ds_config, init_distributed, rehearse, resolve_device
from muka_fast.errors import UserError
from muka_fast.memory import device_of
from muka_fast.optim import clip_gradients, dense_gradients, linear_schedule, parameter_groups, sparse_embeddings

ROOT = Path(__file__).resolve().parent.parent


# ---- configuration ----


def test_a_process_that_was_forked_after_a_run_is_told_so(monkeypatch):
    """It has the group of its parent, but not the group's threads: it would wait for ever."""
    init_distributed()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(UserError, match="forked from one that has made a run"):
        init_distributed()


def test_a_partial_configuration_is_filled_from_our_options():
    config = RunConfig(batch_size=24, learning_rate=3e-5, weight_decay=0.02, max_grad_norm=0.5)
    ds, same = prepare_ds_config({"optimizer": {"params": {"lr": "auto"}}, "train_batch_size": "auto"}, config, 2)
    assert ds["train_batch_size"] == 24 and ds["train_micro_batch_size_per_gpu"] == 12 and ds["gradient_accumulation_steps"] == 1
    params = {"lr": 3e-5, "weight_decay": 0.02, "betas": [0.9, 0.999], "eps": 1e-8}
    assert ds["optimizer"] == {"type": "AdamW", "params": params}
    assert ds["gradient_clipping"] == 0.5 and ds["zero_optimization"] == {"stage": 0}
    assert same == config


def test_its_values_win_over_our_defaults_and_are_recorded():
    user = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3, "gradient_clipping": 2}
    ds, config = prepare_ds_config(user, RunConfig(), 2)
    assert ds["train_batch_size"] == config.batch_size == 24 and config.max_grad_norm == 2
    assert prepare_ds_config(None, RunConfig(), 1)[0]["train_micro_batch_size_per_gpu"] == 16


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_batch_is_micro_batch_times_accumulation_times_processes(micro, accumulation, processes):
    batch = micro * accumulation * processes
    for given_part in ({"train_micro_batch_size_per_gpu": micro}, {"gradient_accumulation_steps": accumulation}):
        ds, _ = prepare_ds_config(given_part, RunConfig(batch_size=batch), processes)
        assert ds["train_micro_batch_size_per_gpu"] * ds["gradient_accumulation_steps"] * processes == batch


@pytest.mark.parametrize(
    ("ds", "options", "message"),
    [
        ({"train_batch_size": 32}, {"batch_size": 16}, "train_batch_size to 32, but --batch_size is 16"),
        ({"gradient_clipping": 0.5}, {"max_grad_norm": 1.0}, r"gradient_clipping to 0\.5, but --max_grad_norm is 1\.0"),
        ({"optimizer": {"params": {"lr": 1e-3}}}, {"learning_rate": 2e-5}, r"params\.lr to 0\.001, but --learning_rate is 2e-05"),
        ({"scheduler": {"type": "WarmupLR"}}, {"warmup_ratio": 0.1}, "scheduler and --warmup_ratio"),
        ({"train_micro_batch_size_per_gpu": 5}, {"batch_size": 16}, "--batch_size: 16 texts are not a micro-batch of 5 x 3"),
        ({"train_micro_batch_size_per_gpu": 5, "train_batch_size": 16}, {}, "^ds_config: 16 texts are not a micro-batch of 5 x 3"),
        (
            {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}, {"batch_size": 16},
            'steps 2 x 1 processes are 8, but --batch_size is 16: set gradient_accumulation_steps to "auto"',
        ),
        ({"optimizer": {"params": {"learning_rate": 1e-3}}}, {}, r"params\.learning_rate is not supported \(here it is lr\)"),
        ({"train_micro_batch_size_per_gpu": 0}, {}, "must be an integer >= 1"),
        ({"train_micro_batch_size_per_gpu": "4", "gradient_accumulation_steps": "2"}, {}, "must be an integer >= 1, found '4'"),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": [2]}, {}, "must be an integer >= 1"),
        ({"optimizer": {"type": "Lamb"}}, {}, "'Lamb' is not supported, use one of AdamW, Adam"),
        ({"optimizer": {"params": {"lr": "big"}}}, {}, "must be a number"),
        ({"gradient_clipping": -1}, {}, "gradient_clipping -1: "),
        ({"zero_optimization": {"stage": 4}}, {}, "must be 0, 1, 2 or 3"),
        ({"activation_checkpointing": {}}, {}, "activation_checkpointing, which .* use --activation_checkpointing"),
        ({"fp16": {"enabled": True}}, {}, "fp16 is enabled, but this run is on the CPU"),
        ({}, {"precision": "fp16"}, "--precision: fp16 is enabled, but this run is on the CPU"),
        ({"zero_optimization": {"stage": 2}}, {"precision": "bf16"}, "bf16 on a CPU runs at ZeRO stage 0"),
        ({"bf16": {"enabled": True}}, {"precision": "fp32"}, "enables bf16, but --precision is fp32"),
        ({"bf16": {"enabled": False}}, {"precision": "bf16"}, "bf16.enabled to false, but --precision is bf16"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, {}, "both enabled"),
        ({"fp16": {"enabled": "false"}}, {}, "fp16.enabled must be true or false, found 'false'"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 2e-3}}}, {"learning_rate": 1e-4}, "lr to 0.002, but"),
        ({"steps_per_print": 0}, {}, "steps_per_print must be a number >= 1"),
        ({"scheduler": {"type": "WarmupLR", "params": [1]}}, {}, r"scheduler\.params must be a JSON object, found \[1\]"),
    ],
)
def test_contradictions_name_both_sides(ds, options, message):
    with pytest.raises(UserError, match=message) as caught:
        prepare_ds_config(ds, RunConfig(**options), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("half", "processes", "device", "stage"),
    [("bf16", 1, "cuda", 0), ("bf16", 2, "cuda", 1), ("fp16", 1, "cuda", 1), ("bf16", 1, "cpu", 0), ("bf16", 2, "cpu", 0)],
)
def test_half_precision_keeps_fp32_weights(half, processes, device, stage):
    given = {half: {"enabled": True}}
    ds, _ = prepare_ds_config(given, RunConfig(), processes, device=device)
    assert ds["zero_optimization"]["stage"] == stage
    asked, _ = prepare_ds_config(None, RunConfig(precision=half), processes, device=device)
    assert asked == ds
    if half == "fp16":
        with pytest.raises(UserError, match="master weights"):
            prepare_ds_config(given | {"zero_optimization": {"stage": 0}}, RunConfig(), processes, device="cuda")


def test_bf16_without_partitioning_is_autocast_over_fp32_weights(make_model):
    """On a CPU, and on a GPU where steps are not recorded."""
    options = RunConfig(batch_size=4, learning_rate=1e-2, precision="bf16")
    ds, config = prepare_ds_config({"train_micro_batch_size_per_gpu": 2}, options, 1)
    engine = Engine.create(make_model("bert"), config, ds, 10)
    before = [parameter.detach().clone() for parameter in engine.ds.module.parameters()]
    ids = torch.tensor([[5, 7, 9], [8, 6, 11]])
    for complete in (False, True):
        logits = engine(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert logits.dtype == torch.bfloat16
        engine.backward(logits.float().square().sum())
        assert engine.step() == complete
    moved = [not torch.equal(a, b) for a, b in zip(before, engine.ds.module.parameters(), strict=True)]
    assert any(moved) and all(parameter.dtype == torch.float32 for parameter in engine.ds.module.parameters())
    assert not engine.ds.torch_autocast_lower_precision_safe_modules()


def test_bf16_gradients_are_not_searched_for_overflows_unless_asked():
    bf16 = lambda **more: prepare_ds_config({"bf16": {"enabled": True, **more}}, RunConfig(), 1, device="cuda")[0]["bf16"]
    assert bf16() == {"enabled": True, "check_grad_overflow": False}
    assert bf16(check_grad_overflow=True)["check_grad_overflow"]
    assert "check_grad_overflow" not in prepare_ds_config({"fp16": {"enabled": True}}, RunConfig(), 1, device="cuda")[0]["fp16"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"zero_optimisation": {}}', r"unknown key 'zero_optimisation' \(nearest: zero_optimization\)"),
        ('{"optimizer": 3}', "'optimizer' must be a JSON object"),
        ("[" * 100_000, "cannot be read"),
        ('{"optimizer": {"type": "AdamW", "type": "Adam"}}', r"ds\.json: the key 'type' is there twice"),
    ],
)
def test_bad_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_ds_config(path)


def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of(name) for name in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    assert [resolve_device(name) for name in ("auto", "cpu", "cuda", "cuda:0")] == ["cuda", "cpu", "cuda", "cuda"]
    for find in (device_of, resolve_device):
        with pytest.raises(UserError, match="--device cuda:2: this machine has 2 GPUs"):
            find("cuda:2")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=1"):
        resolve_device("cuda:1")
    with pytest.raises(UserError, match="must be auto, cpu, cuda or cuda:N"):
        device_of("tpu7")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device cuda:0: of several processes each takes a GPU of its own: use --device cuda"):
        resolve_device("cuda:0")
    assert [resolve_device(name) for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    # Of the processes that find no GPU the first one tells it.
    for place, ends, told in (("2", UserError, "LOCAL_RANK=2: 2 GPUs can be seen: start a process"), ("3", SystemExit, "^2$")):
        monkeypatch.setenv("LOCAL_RANK", place)
        with pytest.raises(ends, match=told), first_of_node_tells():
            resolve_device("cuda")
    assert resolve_device("cpu") == "cpu"


def test_an_optimizer_is_what_deepspeed_takes_it_for():
    for name, params, kind in (
        ("AdamW", {}, torch.optim.AdamW),
        ("Adam", {}, torch.optim.AdamW),  # DeepSpeed's decouples the decay, unless
        ("Adam", {"adam_w_mode": False, "torch_adam": True}, torch.optim.Adam),
    ):
        config = RunConfig(device="cpu", learning_rate=1e-3, epochs=1)
        ds, config = prepare_ds_config({"optimizer": {"type": name, "params": params}}, config, 1)
        engine = Engine.create(torch.nn.Linear(2, 2), config, ds, 4)
        assert type(engine.ds.optimizer) is kind, name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 2, "stge": 2}}, r"unknown key 'zero_optimization\.stge' \(nearest: stage\): correct"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"devce": "cpu"}}}, r"key 'zero_optimization\.offload_param\.devce'"),
        ({"fp16": {"enabled": False}, "zero_optimization": {"stage": 2, "enabled": True}}, r"key 'zero_optimization\.enabled'"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}}, r"zero_optimization\.offload_optimizer 'cpu'"),
        ({"fp16": {"enabled": False, "loss_scal": 2}}, r"key 'fp16\.loss_scal' \(nearest: loss_scale\)"),
        ({"comms_logger": {"enabled": True, "verbos": True}}, r"'comms_logger\.verbos' \(nearest: verbose\)"),
        ({"zero_optimization": {"stage": True}}, r"stage must be 0, 1, 2 or 3, found True"),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": "big"}}, r"allgather_bucket_size 'big'"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, r"ds_config: .*device 'disk'"),
        ({"optimizer": {"params": {"betas": [0.9]}}}, r"betas must be two numbers >= 0 and < 1, found \[0\.9\]"),
        ({"optimizer": {"params": {"betas": ["a", "b"]}}}, r"betas must be two numbers"),
        ({"optimizer": {"params": {"eps": "1e-8"}}}, r"eps must be a number >= 0, found '1e-8'"),
        ({"optimizer": {"params": [1]}}, r"optimizer\.params must be a JSON object, found \[1\]"),
        ({"scheduler": {"params": {}}}, r"scheduler\.type None is none of .*WarmupDecayLR"),
        ({"tensorboard": True}, r"tensorboard True: Input should be a valid dictionary"),
        ({"wandb": None}, r"wandb None: Input should be a valid dictionary"),
        ({"scheduler": {"type": "Cosine"}}, r"scheduler\.type 'Cosine' is none of .*WarmupDecayLR"),
    ],
    ids=str,
)
def test_what_deepspeed_would_refuse_after_the_scoring_is_refused_at_once(content, message):
    init_distributed()
    with pytest.raises(UserError, match=message):
        check_ds_config(prepare_ds_config(content, RunConfig(), 1)[0], "ds_config")


def test_what_is_wrong_with_a_whole_section_is_told_without_all_of_its_fields():
    class Section(BaseModel):
        a: int = 1

        @model_validator(mode="after")
        def never(self):
            raise ValueError("a goes with stage 1 alone")

    with pytest.raises(ValidationError) as found:
        Section()
    assert str(refusal("ds.json", found.value)) == "ds.json: Section: a goes with stage 1 alone"


CPU_ADAM = {"zero_optimization": {"stage": 2, "cpu_offload": True}, "zero_force_ds_cpu_optimizer": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_step": 3}}}, "warmup_num_step"),
        ({"zero_optimization": {"stage": 2}, "prescale_gradients": True}, "pre-scale gradients"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype"),
        ({"zero_optimization": {"stage": 1, "legacy_stage1": True}}, "The deprecated version of ZeRO Stage 1"),  # a bare Exception
        (CPU_ADAM, "You are using ZeRO-Offload with a client provided optimizer"),
    ],
    ids=str,
)
def test_what_deepspeed_refuses_as_it_begins_shows_in_a_rehearsal(content, message):
    ds, config = prepare_ds_config(content, RunConfig(device="cpu", ds_config=content), 1)
    check_ds_config(ds, "ds_config")
    with pytest.raises(UserError, match=f"ds_config: DeepSpeed refuses it: .*{message}"):
        rehearse(config, ds)


@pytest.mark.parametrize("stage", range(4))
def test_a_rehearsal_leaves_nothing_behind(stage, caplog, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)  # ZeRO-3's own rounds otherwise
    content = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 2}
    content |= {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 500}}}
    content |= {"csv_monitor": {"enabled": True, "output_path": str(tmp_path)}, "wall_clock_breakdown": True, "dump_state": True}
    content |= {"flops_profiler": {"enabled": True}, "comms_logger": {"enabled": True, "verbose": True}}
    ds, config = prepare_ds_config(content, RunConfig(device="cpu", ds_config=content), 1)
    before, state = json.dumps(ds), torch.get_rng_state()
    capfd.readouterr()
    rehearse(config, ds)
    assert json.dumps(ds) == before and torch.equal(torch.get_rng_state(), state)
    assert torch.nn.functional.linear is torch._C._nn.linear
    assert not caplog.text and not list(tmp_path.iterdir()) and not capfd.readouterr().out


@pytest.mark.parametrize("stage", range(4))
def test_a_rehearsal_takes_the_ways_of_a_gpu(stage, monkeypatch):
    """All of them but the device: the student of two words is no model of transformers."""
    init_distributed()
    monkeypatch.setattr(engine_module, "resolve_device", lambda device: "cuda")
    monkeypatch.setattr(engine_module, "init_distributed", lambda *_: (0, 1))
    content = {"zero_optimization": {"stage": stage}}
    ds, config = prepare_ds_config(content, RunConfig(device="cuda", ds_config=content), 1, device="cuda")
    rehearse(config, ds)


@pytest.mark.parametrize("stage", [2, 3])
def test_many_micro_batches_in_bf16_are_no_change_of_gradients(stage):
    """DeepSpeed sums their gradients in bf16: a hundred hundredths are 1.05. (On a CPU set by hand: a GPU alone trains so.)"""
    content = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 100}
    ds, config = prepare_ds_config(content, RunConfig(device="cpu", batch_size=100, ds_config=content), 1)
    rehearse(config, ds | {"bf16": {"enabled": True}})


def test_a_configuration_that_changes_gradients_is_refused(monkeypatch):
    """As `gradient_allreduce_op` did in several processes."""
    ds, config = prepare_ds_config({}, RunConfig(device="cpu", ds_config={}), 1)
    rehearse(config, ds)
    monkeypatch.setattr(Engine, "backward", lambda self, loss, _right=Engine.backward: _right(self, 3 * loss))
    with pytest.raises(UserError, match="ds_config: under it DeepSpeed multiplies gradients by 3; remove what does so"):
        rehearse(config, ds)


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"])
def test_every_scheduler_of_deepspeed_is_taken(kind):
    init_distributed()
    own = {"OneCycle": {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-3}, "WarmupCosineLR": {"total_num_steps": 10}}
    content = {"scheduler": {"type": kind, "params": own.get(kind, {})}}
    ds, config = prepare_ds_config(content, RunConfig(device="cpu", ds_config=content), 1)
    check_ds_config(ds, "ds_config")
    rehearse(config, ds)


OFFLOADED = {"stage": 3, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("zero", [*({"stage": stage} for stage in range(4)), OFFLOADED], ids=str)
def test_what_a_gpu_may_run_passes_that_check(precision, zero):
    init_distributed()
    if (precision, zero["stage"]) == ("fp16", 0):  # refused by ourselves
        zero = zero | {"stage": 1}
    ds, _ = prepare_ds_config({"zero_optimization": zero}, RunConfig(precision=precision), 1, device="cuda")
    check_ds_config(ds, "ds_config")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer does nothing below stage 1"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param does nothing below stage 3"),
        ({"checkpoint": {"load_universal": True}}, "'checkpoint' does nothing here"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}}, ""),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}}, "memory_breakdown": False}, ""),
    ],
    ids=str,
)
def test_parts_that_do_nothing_are_told(content, told, caplog):
    with caplog.at_level("WARNING", logger="muka_fast"):
        prepare_ds_config(content, RunConfig(), 1)
    assert told in caplog.text if told else not caplog.text


def test_a_null_batch_is_none():
    parts = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}
    assert prepare_ds_config({"train_batch_size": None, **parts}, RunConfig(), 2)[0]["train_batch_size"] == 24


def test_an_optimizer_may_be_written_in_small_letters():
    ds, _ = prepare_ds_config({"optimizer": {"type": "adamw"}}, RunConfig(), 1)
    assert ds["optimizer"]["type"] == "AdamW"


def test_keys_that_nobody_knows_are_told(tmp_path, caplog):
    (tmp_path / "ds.json").write_text('{"stage": 2}')
    with caplog.at_level("WARNING", logger="muka_fast"):
        read_ds_config(tmp_path / "ds.json")
    assert "'stage' is no key that is known here" in caplog.text
    (tmp_path / "ds.json").write_text('{"amp": {"enabled": true}}')
    with pytest.raises(UserError, match="'amp' is not supported; remove it and use --precision"):
        read_ds_config(tmp_path / "ds.json")
    for key in UNSUPPORTED:  # DeepSpeed would train in another way, or not at all
        with pytest.raises(UserError, match=f"'{key}' is not supported; remove it"):
            read_ds_config({key: {"enabled": True}})
    assert read_ds_config({"autotuning": {"enabled": False}}) == {"autotuning": {"enabled": False}}
    with pytest.raises(UserError, match=r"'zero_optimization.zenflow' is not supported; remove it"):
        read_ds_config({"zero_optimization": {"stage": 2, "zenflow": {}}})


def test_offloading_to_nvme_is_refused_before_the_scoring_where_it_cannot_be(monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    offload = {"offload_optimizer": {"device": "nvme", "nvme_path": "/n"}}
    ds, _ = prepare_ds_config({"zero_optimization": {"stage": 2, **offload}}, RunConfig(), 1)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(UserError, match=r"ds\.json: offloading to nvme needs DeepSpeed's async_io, .*: use cpu"):
        check_ds_config(ds, "ds.json")
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    check_ds_config(ds, "ds.json")
    rehearse(RunConfig(device="cpu"), ds)  # without that disk


def test_a_schedulers_highest_rate_is_the_learning_rate():
    scheduler = {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 2e-3}}
    ds, config = prepare_ds_config({"scheduler": scheduler, "optimizer": {"params": {"lr": None}}}, RunConfig(), 1)
    assert config.learning_rate == ds["optimizer"]["params"]["lr"] == 2e-3
    assert prepare_ds_config({"optimizer": {"params": {"lr": None}}}, RunConfig(learning_rate=1e-4), 1)[1].learning_rate == 1e-4


def test_deepspeed_may_be_told_not_to_print():
    assert prepare_ds_config({"steps_per_print": None}, RunConfig(), 1)[0]["steps_per_print"] is None


def test_the_older_spelling_of_offload_is_the_newer_one():
    ds, _ = prepare_ds_config({"zero_optimization": {"stage": 2, "cpu_offload": True}}, RunConfig(), 1)
    new, _ = prepare_ds_config({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, RunConfig(), 1)
    assert ds == new
    off, _ = prepare_ds_config({"zero_optimization": {"stage": 2, "cpu_offload": False}}, RunConfig(), 1)
    assert "offload_optimizer" not in off["zero_optimization"]


def test_a_scheduler_for_another_number_of_steps_is_told(caplog):
    for planned, told in ((5, True), (4, False), ("auto", False)):
        scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": planned}}
        caplog.clear()
        ds, config = prepare_ds_config({"scheduler": scheduler}, RunConfig(device="cpu", learning_rate=1e-3, epochs=1), 1)
        Engine.create(torch.nn.Linear(2, 2), config, ds, 4)
        assert ("total_num_steps is 5, the run has 4 steps" in caplog.text) is told


def test_a_monitor_that_is_not_installed_is_told(monkeypatch):
    ds, _ = prepare_ds_config({"wandb": {"enabled": True}}, RunConfig(), 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(UserError, match=r"ds\.json: wandb is enabled, but wandb is not installed: `pip install wandb`, or remove it"):
        check_ds_config(ds, "ds.json")


@pytest.mark.parametrize(
    "changed", [{"WORLD_SIZE": None}, {"MASTER_PORT": None}, {"RANK": "x"}, {"RANK": "2"}, {"MASTER_ADDR": None}], ids=str
)
def test_a_launch_that_is_none_is_told_at_once(changed):
    """Else DeepSpeed asks for mpi4py, or waits for processes that nobody starts."""
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"} | changed
    environment = {key: value for key, value in os.environ.items() if key not in variables}
    environment |= {key: value for key, value in variables.items() if value is not None}
    code = "from muka_fast.engine import init_distributed\ninit_distributed()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "is no process of a job: start it by torchrun or deepspeed" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("given", "multiple"), [({"train_micro_batch_size_per_gpu": 3}, 6), ({"gradient_accumulation_steps": 5}, 10)])
def test_a_batch_that_does_not_divide_names_one_that_does(given, multiple):
    with pytest.raises(UserError, match=f"choose a multiple of {multiple}, or other processes$"):
        prepare_ds_config(given, RunConfig(batch_size=16), 2)
    prepare_ds_config(given, RunConfig(batch_size=3 * multiple), 2)


def test_optimizer_settings_that_would_do_nothing_are_refused():
    with pytest.raises(UserError, match=r"optimizer\.params\.weight_decy is not supported \(nearest: weight_decay\)"):
        prepare_ds_config({"optimizer": {"params": {"weight_decy": 0.5}}}, RunConfig(), 1)


def test_a_whole_number_with_a_point_is_a_whole_number():
    ds, config = prepare_ds_config({"train_batch_size": 32.0}, RunConfig(), 1)
    assert [type(value) for value in (config.batch_size, ds["train_batch_size"], ds["train_micro_batch_size_per_gpu"])] == [int] * 3
    with pytest.raises(UserError, match=r"batch_size 32\.5"):
        prepare_ds_config({"train_batch_size": 32.5}, RunConfig(), 1)


@pytest.mark.parametrize("path", [ROOT / "ds.json", *sorted((ROOT / "configs").glob("zero*.json"))], ids=lambda path: path.name)
def test_shipped_configurations_fit_our_defaults(path):
    ds, config = prepare_ds_config(path, RunConfig(batch_size=32, learning_rate=1e-4), 2)
    assert ds["train_batch_size"] == 32 and config == RunConfig(batch_size=32, learning_rate=1e-4)
    assert json.loads(path.read_text())["zero_optimization"]["stage"] == ds["zero_optimization"]["stage"]


# ---- arithmetic ----


@given(st.integers(1, 500), st.floats(0, 1))
def test_the_schedule_rises_then_falls_and_never_stops(total, ratio):
    warmup = round(ratio * total)
    factors = [linear_schedule(step, total, warmup) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors) and max(factors) == 1
    peak = factors.index(1)
    assert factors[: peak + 1] == sorted(factors[: peak + 1]) and factors[peak:] == sorted(factors[peak:], reverse=True)


@given(st.floats(0.01, 10), st.integers(0, 5))
def test_clipping_is_that_of_torch(max_norm, seed):
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (300, 301))]  # the last in pieces
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    expected = [parameter.grad.clone() for parameter in parameters]
    norm = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in expected))
    found = clip_gradients([{"params": parameters[:1]}, {"params": parameters[1:]}], max_norm)
    assert float(found) == pytest.approx(norm, rel=1e-6)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * min(1.0, max_norm / (norm + 1e-6)), rtol=1e-5, atol=1e-7)


def test_a_tiny_norm_is_clipped_as_by_torch():
    ours, theirs = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    ours.grad, theirs.grad = torch.full((4,), 1e-6), torch.full((4,), 1e-6)
    clip_gradients([{"params": [ours]}], 1e-6)
    torch.nn.utils.clip_grad_norm_([theirs], 1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_sparse_gradients_of_embeddings_train_as_dense_ones_do(max_norm):
    """Bit for bit, over steps that touch other rows: repeated ids, a padding row, a second table."""

    def steps(sparse: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.ModuleList([torch.nn.Embedding(50, 4, padding_idx=0), torch.nn.Embedding(9, 4)])
        zeros = sparse_embeddings(model) if sparse else {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        norms = []
        for ids in (torch.arange(200) % 9, torch.tensor([2, 0, 2, 2]), torch.tensor([8, 3])):
            factors = torch.randn(len(ids), 1, generator=torch.Generator().manual_seed(1))  # the order of sums shows
            ((model[0](ids) + model[1](ids)) * factors).square().sum().backward()
            assert all(parameter.grad.is_sparse == sparse for parameter in model.parameters())
            norms.append(clip_gradients(optimizer.param_groups, max_norm))
            with dense_gradients(zeros):
                optimizer.step()
                optimizer.zero_grad()
            assert not any(table.any() for table in zeros.values())
        return [*norms, *(parameter.detach() for parameter in model.parameters())]

    for dense, sparse in zip(steps(False), steps(True), strict=True):
        assert torch.equal(dense, sparse)


def test_an_embedding_that_is_also_read_whole_keeps_its_dense_gradient():
    model = torch.nn.Embedding(5, 2)
    zeros = sparse_embeddings(model)
    (model(torch.tensor([1, 1])).sum() + model.weight.sum()).backward()
    clip_gradients([{"params": [model.weight]}], 1e6)
    with dense_gradients(zeros):
        assert torch.equal(model.weight.grad, torch.tensor([[1.0, 1], [3, 3], [1, 1], [1, 1], [1, 1]]))


def test_weight_decay_spares_biases_and_norms():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2, bias=False))
    decayed, spared = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and [p.ndim for p in decayed["params"]] == [2, 2]
    assert spared["weight_decay"] == 0 and [p.ndim for p in spared["params"]] == [1, 1, 1]
    for parameter in model.parameters():  # as ZeRO-3 leaves them
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [2, 3]


# ---- an engine alone ----


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.register_buffer("kept", torch.arange(2.0))

    def forward(self, x):
        return self.linear(x)


def steps(engine: Engine, count: int) -> None:
    for _ in range(count):
        generator = torch.Generator().manual_seed(engine.completed_steps)
        engine.backward(engine(x=torch.randn(4, 3, generator=generator)).square().mean())
        engine.step()


def make(ds: dict, total_steps: int = 10) -> Engine:
    torch.manual_seed(0)
    ds, config = prepare_ds_config(ds, RunConfig(batch_size=4, learning_rate=0.1), 1)
    return Engine.create(Tiny(), config, ds, total_steps)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_clipping_of_0_is_none(stage):
    after = {}
    for clipping in (0, 1e6, 1e-3):
        engine = make({"zero_optimization": {"stage": stage}, "gradient_clipping": clipping, "optimizer": {"params": {"eps": 1.0}}})
        steps(engine, 1)
        assert engine.grad_norm > 0.1
        after[clipping] = {name: value.clone() for name, value in engine.named_states(moments=False)}
        engine.close()
    moved = lambda other: max((value - after[0][name]).abs().max() for name, value in after[other].items())
    assert moved(1e6) == 0 < moved(1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_closed_engine_leaves_nothing_behind(stage):
    """DeepSpeed's hooks keep what they are on: the student, its gradients, master weights and moments."""
    engine = make({"zero_optimization": {"stage": stage}})
    steps(engine, 1)
    kept = [weakref.ref(part) for part in (engine.ds, engine.ds.module, engine.ds.optimizer)]
    engine.close()
    del engine
    gc.collect()
    assert [part() for part in kept] == [None] * 3


def test_deepspeeds_own_timer_is_off_unless_asked_for():
    """It makes the host wait for the device in every step."""
    assert not make({}).ds.tput_timer.config.enabled
    assert make({"timers": {"throughput": {"enabled": True}}}).ds.tput_timer.config.enabled


@pytest.mark.parametrize(
    "ds", [{}, {"zero_optimization": {"stage": 2}}, {"scheduler": {"type": "WarmupDecayLR"}}], ids=["0", "2", "scheduler"]
)
def test_a_checkpoint_continues_bit_for_bit(tmp_path, ds):
    whole = make(ds)
    steps(whole, 4)
    state = whole.save_checkpoint(tmp_path)
    steps(whole, 6)
    resumed = make(ds)
    resumed.load_checkpoint(tmp_path, json.loads(json.dumps(state)))
    assert resumed.completed_steps == 4
    steps(resumed, 6)
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys() == {"linear.weight", "linear.bias", "kept"}
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert whole.last_lr == resumed.last_lr > 0


def test_a_checkpoint_holds_buffers_and_sets_deepspeeds_own_count(tmp_path):
    """Which its logs and its profiler go by."""
    whole, resumed = make({}), make({})
    steps(whole, 3)
    whole.ds.module.kept.add_(5)
    resumed.load_checkpoint(tmp_path, whole.save_checkpoint(tmp_path))
    assert torch.equal(resumed.ds.module.kept, torch.tensor([5.0, 6.0])) and resumed.ds.global_steps == whole.ds.global_steps == 3


def test_a_full_disk_ends_all_processes_and_is_told_once(tmp_path, capfd):
    """After the failed write the others still gather what is left: they must not wait for process 0."""
    codes = exit_codes(save_on_full_disk, [(own, tmp_path) for own in launcher_variables(2)])
    told = capfd.readouterr().err
    assert codes == [2, 2] and told.count("the checkpoint cannot be written") == 1, (codes, told)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_checkpoint_keeps_the_loss_scale(tmp_path):
    """Of fp16, which the CPU does not train in: its scaler is put in place here."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    engines = [make({"zero_optimization": {"stage": 1}}) for _ in range(2)]
    for engine in engines:
        engine.ds.optimizer.loss_scaler = DynamicLossScaler(2**16, 4, 1, 2, False)
    scaler, fresh = (engine.ds.optimizer.loss_scaler for engine in engines)
    for overflow in (True, True, False, True, False):
        scaler.update_scale(overflow)
    state = engines[0].save_checkpoint(tmp_path)
    assert scaler.cur_scale < fresh.cur_scale
    engines[1].load_checkpoint(tmp_path, json.loads(json.dumps(state)))
    assert vars(fresh) == vars(scaler)


def rates(engine):
    """What ten steps of the optimizer use, and what the engine says of each."""
    used, told, optimizer = [], [], engine.ds.optimizer
    step = optimizer.step
    optimizer.step = lambda *rest, **more: used.append(optimizer.param_groups[0]["lr"]) or step(*rest, **more)
    for _ in range(10):
        steps(engine, 1)
        told.append(engine.last_lr)
    return used, told


def test_the_learning_rate_follows_the_schedule():
    engine = make({})
    used, told = rates(engine)
    assert used == told == pytest.approx([0.1 * linear_schedule(step, 10, 1) for step in range(10)])
    assert engine.grad_norm > 0


@pytest.mark.parametrize("kind", ["WarmupDecayLR", "WarmupCosineLR"])
def test_the_rate_that_is_told_is_that_of_the_step_and_not_of_the_next_one(kind):
    used, told = rates(make({"scheduler": {"type": kind, "params": {"warmup_num_steps": 4}}}))
    assert used == told and len(set(used)) > 5


def test_one_process_needs_no_launcher_and_no_compiler(tmp_path):
    """In a fresh interpreter without a launcher's variables; a stale lock of a killed build must not hang it."""
    lock = tmp_path / "extensions" / "deepspeed_shm_comm"
    lock.mkdir(parents=True)
    (lock / "lock").touch()
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "OMP_NUM_THREADS": "1"}
    code = "import os; from muka_fast.engine import init_distributed; print(*init_distributed(), 'RANK' in os.environ)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.split("\n")[-2] == "0 1 False" and done.stderr == ""
    assert sorted(path.name for path in (tmp_path / "extensions").rglob("*")) == ["deepspeed_shm_comm", "lock"]


def test_joining_twice_is_joining_once():
    assert init_distributed() == init_distributed() == (0, 1)
