"""What must hold before a run begins: options, layout, and every file that it will read. Hours of work come after."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from muka_fast import adapters, checkpoint
from muka_fast.config import RunConfig
from muka_fast.data import TextSet, read_texts
from muka_fast.errors import UserError
from muka_fast.labels import LabelMap, LabelSpace, build_label_space, read_label_map, rename_labels
from muka_fast.methods import METHODS, neutral_encoder, unused_options
from muka_fast.stored import chosen_teachers
from muka_fast.supervision import check_sites, option_values
from muka_fast.teachers import check_teachers, teacher_names

log = logging.getLogger("muka_fast")
FEW_TEXTS = 5  # a class


def check_options(config: RunConfig) -> None:
    """Raises UserError for options that are missing, before anything slow starts."""
    for name, what in (("texts", "the texts to train on"), ("student", "an encoder to start from"), ("output", "the run's folder")):
        if getattr(config, name) is None:
            begun = Path(config.output or "", "run.yaml")
            hint = f", or go on with --config {begun} --resume" if config.resume and config.output and begun.exists() else ""
            raise UserError(f"--{name} is missing: give {what}{hint}")
    if not config.teachers and config.store is None:
        raise UserError("--teachers is missing: name at least one classifier folder or hub model (or a filled --store)")


def tell_unused_options(config: RunConfig) -> None:
    """Say which options were chosen that the method, or a run without passes, does not look at."""
    usual = RunConfig(mc=config.mc, mc_samples=config.mc_samples)
    chosen = [name for name in unused_options(config) if getattr(config, name) != getattr(usual, name)]
    chosen = [f"--no-{name}" if getattr(config, name) is False else f"--{name}" for name in chosen]
    if chosen:
        log.warning("%s: --method %s does not look at it", ", ".join(chosen), config.method)
    idle = [f"--{name}" for name in ("mc_scope", "mc_dropout_p", "mc_stop") if getattr(config, name) != getattr(usual, name)]
    if idle and not config.mc:
        log.warning("%s: --no-mc makes no stochastic passes", ", ".join(idle))


def check_layout(config: RunConfig, ds_config: dict[str, Any]) -> None:
    """Raises UserError where the method compares whole batches and they are split, or has a rate that a scheduler would overrule."""
    micro_batch = ds_config["train_micro_batch_size_per_gpu"]
    if METHODS[config.method].needs_whole_batch and micro_batch != config.batch_size:
        raise UserError(
            f"--method {config.method} compares the features of whole batches: run it in one process, with a micro-batch of "
            f"--batch_size {config.batch_size} (here it is {micro_batch})"
        )
    if METHODS[config.method].own_rates and "scheduler" in ds_config:
        raise UserError(
            f"--method {config.method} trains modules of its own at a rate of their own, and a scheduler in the ds_config has one for "
            "all: remove it, and use --learning_rate and --warmup_ratio"
        )


def output_options(config: RunConfig) -> tuple[str, bool, bool, list[str | None]]:
    """What the guard of the output folder asks for, the files that the run reads included."""
    inputs = [config.texts, config.eval, config.store, config.student, config.neutral_encoder, config.label_map, config.ds_config]
    files = [path for path in (*inputs, *config.teachers) if not isinstance(path, dict)]
    return config.output, config.resume, config.overwrite, files


def check_inputs(config: RunConfig, texts: TextSet) -> None:
    """Refuse broken teachers, student, label map or labelled texts before hours of work, the old run still in its place."""
    encoders = {"student": config.student, "neutral encoder": neutral_encoder(config)}
    for role, source in encoders.items():
        if source is not None:
            folder, what = checkpoint.resolve_folder(source, role), f"{role} {source}"
            if adapters.is_adapter(folder):
                raise UserError(f"{what}: is a LoRA adapter, which may be a teacher; give the encoder that it belongs to")
            checkpoint.read_config(folder, what)
            checkpoint.check_tokenizer_files(folder, what)
            checkpoint.read_tensors(folder, what)
    label_map = read_label_map(config.label_map) if config.label_map else None
    owners = label_owners(config, texts)
    space = build_label_space([(owner["name"], owner["labels"]) for owner in owners], label_map, warn=False)
    METHODS[config.method].check_space(space)
    check_labels(config, owners, space, label_map, texts)
    if config.teachers and config.mc:
        check_sites(teacher_names(config.teachers), check_teachers(config.teachers, warn=False), config)


def label_owners(config: RunConfig, texts: TextSet) -> list[Mapping[str, Any]]:
    """Name and labels of each teacher of a run, before any is loaded; of those in a store what its manifest says."""
    if config.teachers:
        files = check_teachers(config.teachers, warn=False)
        return [{"name": name, "labels": file.labels} for name, file in zip(teacher_names(config.teachers), files, strict=True)]
    manifest, keys = chosen_teachers(Path(config.store), texts, option_values(config), config.store_teachers)
    return [manifest["teachers"][key] for key in keys]


def tell_of_little(config: RunConfig, space: LabelSpace, texts: TextSet) -> None:
    """Warn of a single teacher, and of too few texts to learn from."""
    if len(space.teacher_names) == 1:
        log.warning("only one teacher (%s): this is plain distillation, there is nothing to select between", space.teacher_names[0])
    different = set[str]()
    for text in texts.texts:
        different.add(text)
        if len(different) == FEW_TEXTS * space.num_classes:
            return
    repeated = f", of which {len(different)} are different," if len(different) < len(texts) else ""
    told = texts.source, len(texts), repeated, space.num_classes
    log.warning("%s: %d texts%s are few for %d classes, of which each should have some tens", *told)


def read_eval(config: RunConfig) -> TextSet:
    """The texts of --eval, as `evaluate` reads them."""
    columns = {"text_column": config.text_column, "label_column": config.label_column}
    return read_texts(config.eval, **columns, need_labels=True, split="test")


def check_labels(
    config: RunConfig,
    teachers: Sequence[Mapping[str, Any]],
    space: LabelSpace,
    label_map: LabelMap | None,
    texts: TextSet,
) -> None:
    """Refuse a single class, and --eval, or the texts of a method that needs labels, where no label is a class. teachers: name, labels
    of each."""
    if space.num_classes == 1:
        raise UserError(f"all labels of the teachers are one class, {space.names[0]!r}: there is nothing to learn; see --label_map")
    for option, found in (("eval", read_eval(config) if config.eval is not None else None), ("texts", texts)):
        if found is None or found.labels is None or (option == "texts" and not METHODS[config.method].needs_labels):
            continue
        if not set(rename_labels(found.labels, label_map, teachers)) & set(space.names):
            raise UserError(
                f"--{option} {found.source}: none of its labels ({', '.join(sorted(set(found.labels))[:3])}, ...) is a class of the "
                f"teachers ({', '.join(space.names[:3])}, ...); rename them with --label_map or choose --label_column"
            )
