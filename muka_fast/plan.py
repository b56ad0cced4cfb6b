"""`muka-fast plan`: memory per GPU by ZeRO stage, hours and bytes on the disk of a merge, on paper; no weights are loaded."""

import json
import logging
from dataclasses import asdict
from typing import Any

import numpy as np
from safetensors.numpy import save
from transformers import AutoConfig, PreTrainedConfig

from muka_fast import adapters, checkpoint
from muka_fast.config import PlanConfig
from muka_fast.console import fill, new_table, stdout_console
from muka_fast.data import read_texts, tokenize
from muka_fast.errors import UserError
from muka_fast.footprint import DECODER_LAYERS, STAGES, Footprint, footprint, measured_flops, stage_memory
from muka_fast.labels import build_label_space
from muka_fast.memory import device_of, tell_precision
from muka_fast.recipe import default_epochs
from muka_fast.scoring import empty_shard
from muka_fast.store import FEATURE_TYPE, FEATURES, METADATA, default_shard_size, shard_ranges
from muka_fast.teachers import DTYPES, teacher_names
from muka_fast.tokenizer import load_tokenizer

log = logging.getLogger("muka_fast")
# Data sheets: GiB of memory, dense FLOP/s in half precision and in fp32 without TF32.
GPUS = {
    "a10": (24, 125e12, 31.2e12),
    "a100": (80, 312e12, 19.5e12),
    "h100": (80, 989e12, 67e12),
    "h200": (141, 989e12, 67e12),
    "l4": (24, 121e12, 30.3e12),
    "l40s": (48, 362e12, 91.6e12),
}
UTILISATION = 0.4  # of the peak, which large dense models reach
SAMPLED_TEXTS = 1000
CONFIG_FILES = ("config.json", "adapter_config.json", "adapter_model.safetensors")  # an adapter's weights are few and tell its classes
CHECKPOINTS = 3  # two are kept, a third is written beside them


def read_model(source: str, role: str, classifier: bool = True) -> tuple[PreTrainedConfig, list[str]]:
    """Configuration of a folder or hub name (of an adapter, its base's) and, for a classifier, its labels."""
    path, what, labels = checkpoint.resolve_folder(source, role, CONFIG_FILES), f"{role} {source}", None
    if adapters.is_adapter(path) and not (path / "config.json").is_file():
        labels, path = adapters.adapter_labels(path, what, CONFIG_FILES), adapters.base_folder(path, what, CONFIG_FILES)
    written = checkpoint.read_config(path, what)
    with checkpoint.loading(f"{what}: its configuration cannot be read"):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    lacking = [name for name in ("hidden_size", "num_hidden_layers") if not hasattr(config.get_text_config(), name)]
    if lacking:
        raise UserError(f"{what}: cannot be planned, as the configuration of a {config.model_type} has no {' and no '.join(lacking)}")
    if labels is None:
        labels = checkpoint.check_classifier(written, what) if classifier else []
    return config, labels


def store_bytes(teachers: list[tuple[int, int]], num_texts: int, shard_size: int) -> int:
    """Bytes of the teachers' shards. teachers: classes and feature width of each."""
    total, num_shards = 0, len(shard_ranges(num_texts, shard_size))
    for num_classes, width in teachers:
        # One row as the store writes it, with a note about as long as its own (store.write_shard); more lengthen the tensors alone.
        tensors = empty_shard(np.zeros(1, np.int64), num_classes) | {FEATURES: np.empty((1, width), FEATURE_TYPE)}
        row = sum(tensor.nbytes for tensor in tensors.values())
        header = len(save(tensors, {METADATA: "-" * 170})) - row
        total += num_shards * header + num_texts * row
    return total


def scoring_forwards(config: PreTrainedConfig, mc_scope: str, mc_samples: float) -> float:
    """Cost of scoring a text in plain forwards: trunk once, tail once without and mc_samples times with dropout (0: none).

    A head behind the last layer costs next to nothing, and so does a last layer of which the head reads one token. The head of an
    encoder with a decoder is all of the decoder as well, a layer of which is taken to cost as much as one of the encoder.
    """
    layers, decoder = config.num_hidden_layers, 0
    if config.is_encoder_decoder:
        decoder = next((getattr(config, name) for name in DECODER_LAYERS if hasattr(config, name)), layers)
    if mc_scope == "head":
        return 1.0 + mc_samples * decoder / (layers + decoder)
    active = layers if mc_scope == "all" else min(layers, int(mc_scope.partition(":")[2]))
    if active == 1 and not decoder and getattr(config, "classifier_pooling", "cls") != "mean":
        return 1.0
    return 1.0 + mc_samples * (active + decoder) / (layers + decoder)


def count_texts(options: PlanConfig) -> tuple[int, float]:
    """Number of texts and mean tokens of each, which --max_length cuts."""
    given = float(min(options.tokens_per_text or options.max_length, options.max_length))
    if options.texts is None:
        return options.num_texts, given
    texts = read_texts(options.texts, text_column=options.text_column, label_column=None, limit=options.limit).texts
    if options.tokens_per_text is not None:
        return len(texts), given
    step = max(1, len(texts) // SAMPLED_TEXTS)
    try:
        folder = checkpoint.resolve_folder(options.student, "student", checkpoint.SMALL_FILES)
        tokenizer = load_tokenizer(folder, f"student {options.student}")
    except UserError as error:
        raise UserError(f"{error}, or give --tokens_per_text") from error
    return len(texts), float(tokenize(tokenizer, texts[::step], options.max_length).lengths.mean())


def rate(options: PlanConfig, config: PreTrainedConfig, tokens: int, precision: str, train: bool, what: str) -> float:
    """FLOP/s of one GPU: given, by the data sheet, or measured on this machine."""
    if options.flops is not None:
        return options.flops
    if options.gpu is not None:
        _, half, full = GPUS[options.gpu]
        return UTILISATION * (full if precision == "fp32" else half)
    device = device_of(options.device)
    log.info("measuring %s, cut to two layers, on this machine's %s", what, device)
    precision = "fp32" if train and device == "cpu" and precision == "fp16" else precision  # in which a CPU does not train
    return measured_flops(config, options.micro_batch, tokens, precision, device, train, what)


def largest_share(num_texts: int, shard_size: int, processes: int) -> float:
    """Of the texts, the part that one process scores at the most, as each shard is one process's."""
    shards = -(-num_texts // shard_size)
    return -(-shards // processes) / shards


def plan(options: PlanConfig) -> dict[str, Any]:
    """All figures: bytes, hours, FLOP/s. Raises UserError for models that cannot be read or run without weights."""
    if options.flops is None and options.gpu is None:  # measured here
        for option, precision in (("--scoring_precision", options.scoring_precision), ("--precision", options.precision)):
            tell_precision(option, precision, device_of(options.device))
    names = teacher_names(options.teachers)
    config, _ = read_model(options.student, "student", classifier=False)
    num_texts, tokens = count_texts(options)
    length = max(1, round(tokens))
    shard_size = options.shard_size or default_shard_size(num_texts)

    def reading(config: PreTrainedConfig, forwards: float, what: str) -> dict[str, Any]:
        """That many forwards of a model over all texts."""
        precision = options.scoring_precision
        cost, reached = footprint(config, 1, length, precision, what), rate(options, config, length, precision, False, what)
        hours = num_texts * cost.forward_flops * forwards / reached * largest_share(num_texts, shard_size, options.gpus) / 3600
        found = {"parameters": cost.num_parameters, "weights_bytes": DTYPES[precision].itemsize * cost.num_parameters}
        return found | {"forwards": forwards, "flops_per_s": reached, "hours": hours}

    teachers, owners, widths = [], [], []
    for path, name in zip(options.teachers, names, strict=True):
        teacher, labels = read_model(path, "teacher")
        owners.append((name, labels))
        widths.append((len(labels), teacher.get_text_config().hidden_size))
        passes = options.mc_samples if options.mc else 0
        read = reading(teacher, scoring_forwards(teacher, options.mc_scope, passes), f"teacher {path}")
        teachers.append({"name": name, "classes": len(labels)} | read)
    encoder = options.neutral_encoder or options.student
    neutral_config, _ = read_model(encoder, "neutral encoder", classifier=False)
    neutral = {"name": encoder} | reading(neutral_config, 1.0, f"neutral encoder {encoder}")
    config.num_labels = build_label_space(owners).num_classes
    cost = footprint(config, options.micro_batch, options.max_length, options.precision, f"student {options.student}")
    step = footprint(config, 1, length, options.precision, f"student {options.student}")
    reached = rate(options, config, length, options.precision, True, "the student")
    epochs = options.epochs or default_epochs(num_texts, options.batch_size)
    flops = 3 * epochs * num_texts * step.forward_flops  # the backward costs two forwards
    return {
        "texts": num_texts,
        "tokens_per_text": tokens,
        "gpus": options.gpus,
        "teachers": teachers,
        "neutral": neutral,
        "student": {
            "name": options.student,
            "parameters": cost.num_parameters,
            "classes": config.num_labels,
            "max_length": cost.tokens,
            "epochs": epochs,
            "flops_per_s": reached,
            "hours": flops / reached / options.gpus / 3600,
        },
        "memory": memory(cost, options),
        "disk": {
            "store": store_bytes(widths, num_texts, shard_size),
            "neutral": num_texts * neutral_config.get_text_config().hidden_size * np.dtype(FEATURE_TYPE).itemsize,
            "tokens": round(num_texts * (4 * tokens + 8)),  # int32 ids and an int64 length (pool_tokens.py)
            "checkpoints": CHECKPOINTS * 12 * cost.num_parameters,
            "student": 4 * cost.num_parameters,
        },
    }


def memory(cost: Footprint, options: PlanConfig) -> list[dict[str, Any]]:
    """One row per ZeRO stage that trains in this precision: fp16 keeps its master weights from stage 1 on."""
    stages = [stage for stage in STAGES if stage != "0" or options.precision != "fp16"]
    rows = [stage_memory(stage, cost, options.gpus, options.precision) for stage in stages]
    fits = lambda row: None if options.gpu is None else row.device <= GPUS[options.gpu][0] * 2**30
    return [asdict(row) | {"device": row.device, "fits": fits(row)} for row in rows]


# ---- tables ----


def size(count: int) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 999.5:  # more would be four figures, which :.3g writes as a power of ten
            return f"{count:.3g} {unit}" if unit != "B" else f"{count} B"
        count /= 1024
    return f"{count:,.1f} GiB"


def duration(hours: float) -> str:
    """Hours for people: 40 s, 12 min, 3.5 h."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 1 else f"{hours:,.1f} h"


def print_tables(found: dict[str, Any], options: PlanConfig) -> None:
    """The plan as text tables on stdout."""
    console = stdout_console()
    student = found["student"]
    title = (
        f"Training {student['name']}: {student['parameters']:,} parameters, {student['classes']} classes, {options.precision}; memory "
        f"of each of {options.gpus} GPU{'s' if options.gpus > 1 else ''}, micro-batch {options.micro_batch} x {student['max_length']}"
    )
    parts = ("weights", "gradients", "optimizer", "activations", "buffers", "device", "host")
    columns = ("ZeRO", "weights", "gradients", "optimizer", "activations", "buffers (at most)", "sum", "host memory")
    rows = [[row["stage"], *(size(row[part]) if row[part] else "–" for part in parts)] for row in found["memory"]]
    if options.gpu is not None:
        columns = (*columns, f"fits {options.gpu}")
        rows = [[*row, "yes" if figures["fits"] else "no"] for row, figures in zip(rows, found["memory"], strict=True)]
    console.print(fill(new_table(title, *columns), rows))
    source = "as given" if options.flops else f"{UTILISATION:.0%} of its data sheet" if options.gpu else "measured here"
    readers = {f"scoring {teacher['name']}": teacher for teacher in found["teachers"]}
    rows = [
        [
            what, f"{read['parameters']:,}", size(read["weights_bytes"]), f"{read['forwards']:.1f}",
            f"{read['flops_per_s'] / 1e12:.3g}", duration(read["hours"]),
        ]
        for what, read in (readers | {"neutral features": found["neutral"]}).items()
    ]  # fmt: skip
    rows.append(["training", f"{student['parameters']:,}", "", f"{3 * student['epochs']}", f"{student['flops_per_s'] / 1e12:.3g}"])
    rows[-1].append(duration(student["hours"]))
    title = f"Time for {found['texts']:,} texts of {found['tokens_per_text']:.0f} tokens; speed of one GPU {source}"
    console.print(fill(new_table(title, "", "parameters", "weights", "forwards a text", "TFLOP/s", "time"), rows))
    disk = found["disk"]
    checkpoints = f"checkpoints, {CHECKPOINTS} at a time"
    names = {"store": "supervision store", "neutral": "neutral features", "tokens": "token ids, of each tokenizer"}
    names |= {"checkpoints": checkpoints, "student": "student"}
    rows = [[name, size(disk[what])] for what, name in names.items()]
    console.print(fill(new_table("Disk", "", "size"), rows))


def main(config: PlanConfig) -> int:
    """`muka-fast plan`: print the plan, as tables or (--json) as one JSON object on stdout."""
    found = plan(config)
    if config.json_output:
        print(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        print_tables(found, config)
    return 0
