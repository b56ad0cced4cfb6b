"""Fills a partial DeepSpeed configuration from our options, and refuses one that contradicts them."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from muka_fast.config import RunConfig, nearest
from muka_fast.errors import UserError
from muka_fast.mappings import Source, read_mapping, told

log = logging.getLogger("muka_fast")
# Where a DeepSpeed key and an option of ours say the same thing.
SHARED = (
    (("train_batch_size",), "batch_size"),
    (("gradient_clipping",), "max_grad_norm"),
    (("optimizer", "params", "lr"), "learning_rate"),
    (("optimizer", "params", "weight_decay"), "weight_decay"),
)
PARTS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")  # of a process's share of the batch
OPTIMIZERS = ("AdamW", "Adam")
# DeepSpeed ignores keys it does not know, so a misspelt one would silently do nothing: near misses of these are refused.
KNOWN_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler",
    "fp16", "bf16", "gradient_clipping", "zero_optimization",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown",
    "activation_checkpointing", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "sparse_gradients", "comms_logger", "tensorboard", "wandb", "csv_monitor", "flops_profiler",
    "data_types", "aio", "checkpoint", "dump_state", "timers", "memory_breakdown",
)
# Each wants what a run here does not have, or takes the run over; the way out where there is one.
UNSUPPORTED = {"amp": " and use --precision", "torch_autocast": " and use --precision"} | dict.fromkeys(
    (
        "autotuning", "elasticity", "compression_training", "curriculum_learning", "data_efficiency", "progressive_layer_drop",
        "compile", "graph_harvesting", "hybrid_engine", "nebula", "pipeline", "sequence_parallel_size", "tensor_parallel", "zenflow",
        "expert_parallel", "gradient_allreduce_op", "managed_gradient_accumulation", "weight_quantization",
    ), ""
)  # fmt: skip
# What a configuration calls the parts that DeepSpeed checks by models of their own.
SECTIONS = {
    "DeepSpeedZeroConfig": "zero_optimization", "DeepSpeedFP16Config": "fp16", "DeepSpeedBF16Config": "bf16",
    "CommsLoggerConfig": "comms_logger", "DeepSpeedThroughputTimerConfig": "timers.throughput",
}  # fmt: skip
PEAKS = ("warmup_max_lr", "cycle_max_lr")  # what DeepSpeed's schedulers call the highest learning rate
AUTOCAST = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}  # whose gradients it would average in bf16
ADAM_DEFAULTS = {"betas": [0.9, 0.999], "eps": 1e-8}
OPTIMIZER_KEYS = ("lr", "weight_decay", "adam_w_mode", "torch_adam", *ADAM_DEFAULTS)


def read_ds_config(source: Source | None) -> dict[str, Any]:
    """The JSON object in a file, or a given one, with its "auto" values taken out; {} for None. Raises UserError for anything else."""
    if source is None:
        return {}
    content, name = read_mapping("--ds_config", source, "a JSON object", as_json=True), told("--ds_config", source)
    for key in content:
        near = nearest(key, KNOWN_KEYS, cutoff=0.85)
        if key not in KNOWN_KEYS and near:
            raise UserError(f"{name}: unknown key '{key}'{near}")
        off = isinstance(content[key], dict) and content[key].get("enabled") is False
        if key in UNSUPPORTED and not off:
            raise UserError(f"{name}: '{key}' is not supported; remove it{UNSUPPORTED[key]}")
        if key not in KNOWN_KEYS and not off:
            log.warning("%s: '%s' is no key that is known here, and may do nothing", name, key)
    for key in ("optimizer", "scheduler", "zero_optimization", "fp16", "bf16"):
        if not isinstance(content.get(key, {}), dict) and content[key] != "auto":
            raise UserError(f"{name}: '{key}' must be a JSON object")
    zero = content.get("zero_optimization", {})
    if isinstance(zero, dict) and zero.get("zenflow") is not None:
        raise UserError(f"{name}: 'zero_optimization.zenflow' is not supported; remove it")
    return without_auto(content)


def ds_config_name(source: Source | None) -> str:
    """What errors call it: the file."""
    return "ds_config" if isinstance(source, dict) or source is None else str(source)


def without_auto(content: dict[str, Any]) -> dict[str, Any]:
    """A deep copy without the entries that are "auto": those are ours to fill."""
    return {
        key: without_auto(value) if isinstance(value, dict) else value for key, value in content.items() if value != "auto"
    }


def prepare_ds_config(
    user: Source | None, config: RunConfig, world_size: int, device: str = "cpu"
) -> tuple[dict[str, Any], RunConfig]:
    """A complete DeepSpeed configuration and our options brought in line with it.

    Args:
        user: the partial configuration, a path to it, or None. Entries that are absent or "auto" are filled.
        config: our options. One that was set explicitly and differs from `user` is an error; otherwise `user` wins.
        world_size: number of processes.
        device: "cpu" or "cuda".

    Raises:
        UserError: a contradiction (names both sides), a batch that does not divide, half precision where it cannot run.
    """
    ds, name = read_ds_config(user), ds_config_name(user)
    optimizer = ds.setdefault("optimizer", {})
    kind = optimizer.get("type", "AdamW")
    optimizer["type"] = next((known for known in OPTIMIZERS if str(kind).lower() == known.lower()), None)  # as DeepSpeed reads it
    if optimizer["type"] is None:
        raise UserError(f"{name}: optimizer type {kind!r} is not supported, use one of {', '.join(OPTIMIZERS)}")
    optimizer["params"] = optimizer_params(optimizer.get("params", {}), name)
    parts = [ds.get(key) for key in PARTS]
    for key, value in zip(PARTS, parts, strict=True):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{name}: {key} must be an integer >= 1, found {value!r}")
    if ds.get("train_batch_size") is None and None not in parts:
        ds["train_batch_size"] = parts[0] * parts[1] * world_size
        if "batch_size" in config.insisted and config.batch_size != ds["train_batch_size"]:
            made = f"{PARTS[0]} {parts[0]} x {PARTS[1]} {parts[1]} x {world_size} processes are {ds['train_batch_size']}"
            way_out = f'set {PARTS[1]} to "auto", or take other processes'
            raise UserError(f"{name}: {made}, but --batch_size is {config.batch_size}: {way_out}")
    given_batch = ds.get("train_batch_size")
    every = ds.setdefault("steps_per_print", 2**31)  # we print the metrics
    if every is not None and (isinstance(every, bool) or not isinstance(every, (int, float)) or every < 1):
        raise UserError(f"{name}: steps_per_print must be a number >= 1, found {every!r}")
    take_peak(ds, config, name)
    config = merge_shared(ds, config, name)
    fill_batch(ds, world_size, name if isinstance(given_batch, (int, float)) else "--batch_size")
    if "scheduler" in ds and "warmup_ratio" in config.insisted:
        raise UserError(f"{name} sets a scheduler and --warmup_ratio is given as well: remove one of them")
    if "activation_checkpointing" in ds:
        raise UserError(
            f"{name} sets activation_checkpointing, which DeepSpeed applies to models written for it only: remove it and use "
            "--activation_checkpointing"
        )
    if config.precision is not None and "precision" not in config.insisted and says_other(ds, config.precision):
        config = config.model_copy(update={"precision": None})
    fill_precision(ds, name, config.precision, world_size, device)
    zero = ds["zero_optimization"]
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_params", "offload_param")):
        if zero.pop(old, False) is True:
            zero.setdefault(new, {"device": "cpu"})
    drop_idle(ds, name)
    if "offload_optimizer" in zero or "offload_param" in zero:
        # We hand over torch's fused AdamW; DeepSpeed's own CPU Adam would be compiled at the first run.
        ds.setdefault("zero_force_ds_cpu_optimizer", False)
    ds.setdefault("timers", {"throughput": {"enabled": False}})  # its own would make every step wait for the device
    return ds, config


def drop_idle(ds: dict[str, Any], name: str) -> None:
    """Tell of parts that do nothing; `checkpoint`, which DeepSpeed would obey in checkpoints of its own, goes."""
    zero = ds["zero_optimization"]
    for part, least in (("offload_optimizer", 1), ("offload_param", 3)):
        given = zero.get(part)  # what is no object DeepSpeed refuses
        if isinstance(given, dict) and given.get("device") not in (None, "none") and zero["stage"] < least:
            log.warning("%s: zero_optimization.%s does nothing below stage %d", name, part, least)
    if ds.pop("checkpoint", None) is not None:
        log.warning("%s: 'checkpoint' does nothing here: checkpoints are ours (--save_every)", name)


def optimizer_params(given: Any, name: str) -> dict[str, Any]:
    """The parameters of an optimizer, those that are not given by default. Raises UserError where one is unknown or no number."""
    if not isinstance(given, dict):
        raise UserError(f"{name}: optimizer.params must be a JSON object, found {given!r}")
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        if key not in OPTIMIZER_KEYS:
            hint = " (here it is lr)" if key == "learning_rate" else nearest(key, list(OPTIMIZER_KEYS))
            raise UserError(f"{name}: optimizer.params.{key} is not supported{hint}; remove it")
    params = {**ADAM_DEFAULTS, **given}
    in_range = lambda value, end: isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < end
    if not (isinstance(params["betas"], list) and len(params["betas"]) == 2 and all(in_range(beta, 1) for beta in params["betas"])):
        raise UserError(f"{name}: optimizer.params.betas must be two numbers >= 0 and < 1, found {params['betas']!r}")
    if not in_range(params["eps"], math.inf):
        raise UserError(f"{name}: optimizer.params.eps must be a number >= 0, found {params['eps']!r}")
    return params


def take_peak(ds: dict[str, Any], config: RunConfig, name: str) -> None:
    """Let a scheduler's highest rate, which is the one that DeepSpeed trains with, be the optimizer's too. Raises UserError where
    --learning_rate is another."""
    given = ds.get("scheduler", {}).get("params")
    if not isinstance(given, (dict, type(None))):
        raise UserError(f"{name}: scheduler.params must be a JSON object, found {given!r}")
    for key in PEAKS:
        peak = (given or {}).get(key)
        if isinstance(peak, (int, float)):
            if "learning_rate" in config.insisted and config.learning_rate not in (None, peak):
                told = f"but --learning_rate is {config.learning_rate}: remove one of them"
                raise UserError(f"{name} sets scheduler.params.{key} to {peak}, {told}")
            ds["optimizer"]["params"]["lr"] = peak


def merge_shared(ds: dict[str, Any], config: RunConfig, name: str) -> RunConfig:
    """Settle every value that both sides can set: theirs unless ours is explicit; two different explicit ones are an error."""
    settled = {}
    for path, option in SHARED:
        section = section_of(ds, path)
        theirs, ours = section.get(path[-1]), getattr(config, option)
        if theirs is None:
            if ours is not None:
                section[path[-1]] = ours
        elif isinstance(theirs, bool) or not isinstance(theirs, (int, float)):
            raise UserError(f"{name}: {'.'.join(path)} must be a number, found {theirs!r}")
        elif ours is not None and option in config.insisted and theirs != ours:
            raise UserError(f"{name} sets {'.'.join(path)} to {theirs}, but --{option} is {ours}: remove one of them")
        else:
            settled[option] = theirs
    try:
        valid = type(config).model_validate(config.model_dump() | settled)  # the options' own ranges and types
    except ValidationError as error:
        raise refusal(name, error, {option: ".".join(path) for path, option in SHARED}) from error
    settled = {option: getattr(valid, option) for option in settled}
    for path, option in SHARED:
        if option in settled:
            section_of(ds, path)[path[-1]] = settled[option]  # 32.0 is 32
    return config.model_copy(update=settled)


def refusal(name: str, error: ValidationError, theirs: Mapping[str, str] | None = None, fields: Collection[str] = ()) -> UserError:
    """The first of pydantic's findings about a configuration. theirs: what the file calls an option; fields: those of the model."""
    found = error.errors(include_url=False)[0]
    what, section = ".".join(map(str, found["loc"])), SECTIONS.get(error.title)
    if not what:  # of a whole section, all of which is the input
        return UserError(f"{name}: {section or error.title}: {found['msg'].removeprefix('Value error, ')}")
    where = (theirs or {}).get(what) or (f"{section}.{what}" if section else what)
    if found["type"] == "extra_forbidden":
        return UserError(f"{name}: unknown key '{where}'{nearest(what, fields)}: correct or remove it")
    return UserError(f"{name}: {where} {found['input']!r}: {found['msg']}")


def section_of(ds: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The object that holds the last key of a path, made where it is absent."""
    for key in path[:-1]:
        ds = ds.setdefault(key, {})
    return ds


def settle_recipe(config: RunConfig, ds_config: dict[str, Any], epochs: int, learning_rate: float) -> RunConfig:
    """Our options with these epochs and this rate where nobody gave others; ds_config (of `prepare_ds_config`) takes the rate too."""
    settled = {"epochs": config.epochs or epochs, "learning_rate": config.learning_rate or learning_rate}
    ds_config["optimizer"]["params"].setdefault("lr", settled["learning_rate"])
    return config.model_copy(update=settled)


def fill_batch(ds: dict[str, Any], world_size: int, source: str) -> None:
    """Complete batch = micro-batch x accumulation x processes; default: no accumulation. source: who set the batch."""
    batch, micro, accumulation = (ds.get(key) for key in ("train_batch_size", *PARTS))
    step = (micro or 1) * (accumulation or 1) * world_size
    if accumulation is None:
        accumulation = 1 if micro is None else max(1, batch // (micro * world_size))
    micro = micro or max(1, batch // (accumulation * world_size))
    if micro * accumulation * world_size != batch:
        raise UserError(
            f"{source}: {batch} texts are not a micro-batch of {micro} x {accumulation} accumulation steps x {world_size} processes: "
            f"choose a multiple of {step}, or other processes"
        )
    ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"] = micro, accumulation


def fill_scheduler(scheduler: dict[str, Any], total_steps: int, warmup_steps: int, lr: float) -> dict[str, Any]:
    """DeepSpeed's scheduler with what it needs to know of the run where it does not say so itself."""
    fill = {"total_num_steps": total_steps, "warmup_num_steps": max(2, warmup_steps), "warmup_max_lr": lr}
    wanted = {
        "WarmupLR": ("warmup_num_steps", "warmup_max_lr"),
        "WarmupDecayLR": tuple(fill),
        "WarmupCosineLR": ("total_num_steps", "warmup_num_steps"),
    }
    names = wanted.get(scheduler.get("type"), ())
    return scheduler | {"params": {name: fill[name] for name in names} | (scheduler.get("params") or {})}


def says_other(ds: Mapping[str, Any], precision: str) -> bool:
    """Whether a configuration has another precision switched on, or this one off."""
    switches = {key: ds.get(key, {}).get("enabled") for key in ("bf16", "fp16")}
    return switches.pop(precision, None) is False or True in switches.values()


def fill_precision(ds: dict[str, Any], name: str, asked: str | None, world_size: int, device: str) -> None:
    """fp32 by default. Half precision keeps fp32 master weights, which DeepSpeed shards from ZeRO stage 1 on. In bf16 at stage 0, the
    default of a single process and on a CPU, the weights themselves are fp32 and the forward runs under autocast."""
    enabled = {key: ds.get(key, {}).get("enabled", False) for key in ("bf16", "fp16")}
    for key, value in enabled.items():
        if not isinstance(value, bool):
            raise UserError(f"{name}: {key}.enabled must be true or false, found {value!r}")
    half = [key for key in enabled if enabled[key]]
    if len(half) == 2:
        raise UserError(f"{name}: bf16 and fp16 are both enabled, choose one")
    if half and asked not in (None, *half):
        raise UserError(f"{name} enables {half[0]}, but --precision is {asked}: remove one of them")
    if not half and asked in ("bf16", "fp16"):
        if "enabled" in ds.get(asked, {}):
            raise UserError(f"{name} sets {asked}.enabled to false, but --precision is {asked}: remove one of them")
        half, ds[asked] = [asked], {**ds.get(asked, {}), "enabled": True}
    if half == ["fp16"] and device == "cpu":
        where, way_out = ("--precision", "leave it out") if asked else (name, "set it to false")
        raise UserError(f"{where}: fp16 is enabled, but this run is on the CPU, which trains in fp32 or bf16: {way_out}")
    zero = ds.setdefault("zero_optimization", {})
    autocast = half == ["bf16"] and (world_size == 1 or device == "cpu")
    stage = zero.setdefault("stage", 1 if half and not autocast else 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"{name}: zero_optimization.stage must be 0, 1, 2 or 3, found {zero['stage']!r}")
    if half and device == "cpu" and stage > 0:
        raise UserError(f"{name}: bf16 on a CPU runs at ZeRO stage 0: set zero_optimization.stage to 0, or train in fp32")
    if half == ["fp16"] and zero["stage"] == 0:
        raise UserError(f"{name}: fp16 with ZeRO stage 0 keeps no fp32 master weights here: set zero_optimization.stage to 1")
    if half == ["bf16"]:
        # bf16 has the range of fp32: a gradient that is no number ends the run as it does there (`Step.settle`, `save_student`),
        # and is not looked for tensor by tensor, which took six kernels each.
        ds["bf16"].setdefault("check_grad_overflow", False)
