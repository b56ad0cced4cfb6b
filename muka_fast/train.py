"""`muka-fast train`: teachers and unlabelled text in, one Hugging Face student out. `run` is the whole walk, stage by stage.

Runs as `muka-fast train ...`, as `muka_fast.amalgamate(...)`, and as a script under a launcher:
`deepspeed muka_fast/train.py --ds_config ds.json ...`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this file's folder first on the path, where our module names would shadow other packages' (`evaluate`, ...).
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from muka_fast.cli import guarded, spin_briefly

    spin_briefly()

import inspect
import logging
import os
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

from muka_fast import export, identity, outputs, runinfo, snapshots
from muka_fast.aligned import student_part
from muka_fast.caller import caller_undisturbed
from muka_fast.config import GROUPS, EvalConfig, RunConfig, given_alike, help_text, load_config
from muka_fast.console import log_file, setup_logging
from muka_fast.coverage import nobody_weights
from muka_fast.data import TextSet, check_source, cut_length, read_texts, tell_cut
from muka_fast.ds_config import ds_config_name, prepare_ds_config, settle_recipe
from muka_fast.engine import Engine, check_ds_config, init_distributed, rehearse, resolve_device
from muka_fast.evaluate import evaluate
from muka_fast.evidence import SAMPLE, sample_rows
from muka_fast.features import Features
from muka_fast.files import held, write_json
from muka_fast.fit_doubt import doubt_targets, fit_head
from muka_fast.group import check_alike, on_first_process, one_job, told_by_one, told_once
from muka_fast.labels import LabelSpace, build_label_space, read_label_map, true_labels
from muka_fast.loop import Plan, train
from muka_fast.memory import check_kernels, tell_precision
from muka_fast.methods import METHODS, build_method, neutral_encoder
from muka_fast.neutral import name_features, neutral_features, neutral_tokens
from muka_fast.pool_tokens import PoolTokens
from muka_fast.preflight import (
    check_inputs,
    check_layout,
    check_options,
    label_owners,
    output_options,
    tell_of_little,
    tell_unused_options,
)
from muka_fast.recipe import default_epochs, default_learning_rate
from muka_fast.report import renew_report
from muka_fast.shard_queue import ShardQueue
from muka_fast.store import take_over
from muka_fast.stored import Supervision, open_store
from muka_fast.student import checkpoint_activations, load_student
from muka_fast.supervision import fill_store, option_values
from muka_fast.tokenizer import token_limit
from muka_fast.training_layers import training_layers
from muka_fast.vocabulary import TextVocabulary
from muka_fast.words import with_words

log = logging.getLogger("muka_fast")
COMPLETE = "%s is complete: nothing to resume"
STOPPED = 143  # exit code after SIGTERM, by custom 128 + 15


@dataclass(frozen=True)
class RunResult:
    """output: folder of the run and the student. metrics: final figures. stopped: SIGTERM ended it early; --resume continues."""

    output: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    stopped: bool = False


def amalgamate(**options: Any) -> RunResult:
    """Merge teachers into one student; the options are those of `muka-fast train` (muka_fast.config.RunConfig), `config` a YAML file.

    Example:
        amalgamate(teachers=["news", "bank"], student="encoder", texts="texts.jsonl", output="merged").metrics

    Raises:
        UserError: bad input, in one line that names it and the way out.
    """
    for name in ("texts", "eval"):
        check_source(name, options.get(name))
    config = load_config(RunConfig, options.pop("config", None), options)
    with caller_undisturbed():
        return run(config)


_FIELDS = sorted(RunConfig.model_fields.items(), key=lambda named: GROUPS.index(named[1].json_schema_extra["group"]))
_KEYWORD = inspect.Parameter.KEYWORD_ONLY  # for help() and editors
_OPTIONS = [inspect.Parameter(name, _KEYWORD, default=field.default, annotation=field.annotation) for name, field in _FIELDS]
amalgamate.__signature__ = inspect.Signature([*_OPTIONS, inspect.Parameter("config", _KEYWORD, default=None)])
amalgamate.__doc__ = f"{amalgamate.__doc__}\n    Options:\n" + "".join(f"        {n}: {help_text(f)}\n" for n, f in _FIELDS)


def run(config: RunConfig) -> RunResult:
    """The walk: texts -> label space -> supervision -> student -> training -> export -> evaluation. Every process runs it."""
    clock = runinfo.Clock()
    with told_once():
        check_options(config)
        device = resolve_device(config.device)
        check_kernels(device)
    rank, world_size = init_distributed(device, config.verbose)
    with told_once():
        ds_config, config = prepare_ds_config(config.ds_config, config, world_size, device)
        check_ds_config(ds_config, ds_config_name(config.ds_config))
        check_layout(config, ds_config)
    check_alike(given_alike(config) | ds_config)
    tell_unused_options(config)
    tell_precision("--precision", identity.ds_identity(ds_config)["precision"], device)
    on_first_process(lambda: outputs.check_output(*output_options(config)))
    earlier = on_first_process(lambda: identity.earlier_run(config, ds_config)) if config.resume else {}
    inputs = on_first_process(lambda: identity.input_files(config))
    done = None
    if earlier.get("state") == "complete":
        on_first_process(lambda: export.check_student(config.output))
        config, done = identity.as_then(config, earlier), RunResult(Path(config.output), earlier.get("metrics", {}))
        if on_first_process(lambda: identity.untouched(config, earlier, inputs)):
            on_first_process(lambda: snapshots.discard_unfinished(Path(config.output)))
            log.info(COMPLETE, config.output)
            return done

    if config.ds_config is not None:
        with told_by_one():
            rehearse(config, ds_config)
    with clock("read texts"), told_once():
        texts = read_data(config)
    with clock("check inputs"):
        on_first_process(lambda: check_inputs(config, texts))
    with ExitStack() as holds:
        output = on_first_process(lambda: open_output(config, texts, holds))
        with log_file(output / "logs", rank, world_size):
            return merge(config, ds_config, texts, inputs, output, clock, done)


def merge(
    config: RunConfig,
    ds_config: dict[str, Any],
    texts: TextSet,
    inputs: dict[str, Any],
    output: Path,
    clock: runinfo.Clock,
    done: RunResult | None,
) -> RunResult:
    """The walk from the texts on, the output folder taken and the options settled. Over 60 lines, to be read in one piece.

    inputs: of `identity.input_files`. done: what the complete run found there gave, where that cannot be told from its files alone: it
    holds if they say the same as then.
    """
    with told_once():
        label_map = read_label_map(config.label_map) if config.label_map else None
        owners = [(teacher["name"], teacher["labels"]) for teacher in label_owners(config, texts)]
        tell_of_little(config, build_label_space(owners, label_map), texts)
    with clock("score teachers"):
        sup, neutral = supervise(config, texts, output)
    with told_once():
        space = build_label_space([(teacher["name"], teacher["labels"]) for teacher in sup.teachers], label_map, warn=False)
        sup = sup.restrict(space)  # once: for ten million texts a copy is gigabytes
        labels = None if texts.labels is None else true_labels(texts.labels, label_map, sup.teachers, space, texts.source)
    with clock("select teachers"):
        weights = on_first_process(lambda: pool_weights(config, sup, space, texts, neutral, output))
        doubt = on_first_process(lambda: doubt_targets(config, sup))
    with told_once():
        method = build_method(config, sup, space, labels, weights)

    with clock("load student"), told_once():
        model, tokenizer = load_student(config.student, space.names, config.seed, ds_config)
        if config.activation_checkpointing:
            checkpoint_activations(model, f"student {config.student}")
        max_length = cut_length(config.max_length, token_limit(model, tokenizer), f"student {config.student}")
    with clock("tokenise"):
        tokens = PoolTokens(texts, tokenizer, max_length, store_folder(config, output)).whole(ShardQueue(group=True))
        tell_cut(tokens.lengths, max_length)
    epochs, rate = default_epochs(len(texts), config.batch_size), default_learning_rate(model.config.get_text_config().hidden_size)
    config = settle_recipe(config, ds_config, epochs, rate)
    plan = Plan(tokens.lengths, config)
    log.info("epochs: %d, of %d steps; peak learning rate: %g", config.epochs, plan.steps_per_epoch, config.learning_rate)
    record = begin_record(config, ds_config, texts, sup, space, labels, tokenizer) | {"inputs": inputs}
    if config.resume:
        on_first_process(lambda: identity.check_identity(output, record["identity"]))
    if done is not None:
        on_first_process(lambda: snapshots.discard_unfinished(output))
        log.info(COMPLETE, output)
        return done
    check_alike(record["identity"], "reads other files")
    trained = method.wrap(model)  # while the model knows all words, with some of which it is probed
    vocabulary = TextVocabulary(model, tokens)
    with closing(Engine.create(trained, config, ds_config, plan.total_steps)) as engine:
        on_first_process(lambda: runinfo.begin_run(output, config, record))
        pad_id = model.config.get_text_config().pad_token_id
        with clock("train"), training_layers(model, config.seed, engine.device, config.batch_size) as next_texts:
            finished = train(engine, method, tokens, texts, plan, config, output, pad_id, next_texts)
        if not finished:
            return RunResult(output, stopped=True)

        record |= runinfo.supervision_record(config, method, sup, space, texts, labels)
        with clock("export"):
            state = engine.state_dict() if trained is model else student_part(engine.state_dict())
            state = None if state is None else vocabulary.complete(state)
            told = card(config, record, max_length)
            on_first_process(lambda: export.save_student(model, tokenizer, output, space.names, told, state))
            state = None  # of a sharded student another copy
    if doubt is not None:
        with clock("uncertainty head"):
            tells = on_first_process(lambda: export.add_head(output, fit_head(config, output, texts, doubt, method)))
            record["uncertainty_head"] = {"tells": tells}
    if config.eval is not None:
        with clock("evaluate"):
            record["metrics"] |= {"student": on_first_process(lambda: evaluate_student(config, output))}
    if doubt is not None or config.eval is not None:
        on_first_process(lambda: export.replace_card(output, space.names, card(config, record, max_length)))
    record |= {"state": "complete", "seconds": clock.seconds}
    on_first_process(lambda: write_json(output / "run.json", record))
    on_first_process(lambda: snapshots.discard_unfinished(output))
    on_first_process(lambda: renew_report(output))
    return RunResult(output, record["metrics"])


# ---- before training ----


def open_output(config: RunConfig, texts: TextSet, holds: ExitStack) -> Path:
    """Take the output folder, for this job alone until `holds` is closed, and complete an export that a kill cut off."""
    output = outputs.output_guard(*output_options(config))
    try:
        holds.enter_context(held(output))
    except BlockingIOError as error:
        raise outputs.busy(config.output) from error
    if config.resume:
        identity.check_identity(output, identity.files_identity(config, texts))
    holds.callback(outputs.tell_of_replaced, output)
    export.finish_export(output)
    replaced = outputs.replaced(output) if config.overwrite and config.store is None else []
    newest_first = reversed(replaced)  # it has taken over what those before it had
    if any(take_over(run / "supervision", store_folder(config, output), texts) for run in newest_first):
        log.info("scores of these texts that the replaced run has made serve this one")
    return output


def read_data(config: RunConfig) -> TextSet:
    """The texts of the run, with labels where the method needs them."""
    columns = {"text_column": config.text_column, "label_column": config.label_column}
    return read_texts(config.texts, **columns, need_labels=METHODS[config.method].needs_labels, limit=config.limit)


def supervise(config: RunConfig, texts: TextSet, output: Path) -> tuple[Supervision, Features | None]:
    """The statistics of all teachers over all texts and, of several, `pool_features`; each process does a share of what is missing."""
    store, mean_probs = store_folder(config, output), config.target == "mc_mean"
    if config.teachers:
        sup = fill_store(store, config.teachers, texts, config, ShardQueue(group=True), mean_probs)
    else:
        sup = open_store(store, texts, option_values(config), config.store_teachers, mean_probs, ShardQueue(group=True))
    return sup, None if len(sup.teachers) == 1 else pool_features(config, texts, output, ShardQueue(group=True))


def store_folder(config: RunConfig, output: Path) -> Path:
    """Where the supervision lies."""
    return Path(config.store) if config.store is not None else output / "supervision"


def pool_features(config: RunConfig, texts: TextSet, output: Path, queue: ShardQueue | None = None) -> Features | None:
    """The texts' neutral features, for a method whose rule looks at them; queue: as of `neutral_features`."""
    encoder = neutral_encoder(config)
    if encoder is None:
        return None
    return neutral_features(store_folder(config, output), encoder, texts, config, queue, output / "supervision")


def pool_weights(
    config: RunConfig, sup: Supervision, space: LabelSpace, texts: TextSet, neutral: Features | None, output: Path
) -> np.ndarray | None:
    """The teachers' weights [n, N] by the method's rule over the pool, less that of "no teacher"; None where it has no rule."""
    if METHODS[config.method].rule is None:
        return None
    sup, encoder = sup.restrict(space), neutral_encoder(config)
    if len(sup.teachers) == 1:
        weights = np.ones((len(sup), 1), np.float32)
    else:
        sample = sample_rows(texts.example_ids, config.seed, SAMPLE)
        view = with_words(neutral, neutral_tokens(store_folder(config, output), encoder, texts, config), sample, config.seed)
        weights = METHODS[config.method].rule(sup, view, config.seed, lambda: name_features(encoder, space.names, config))
    return weights * (1 - nobody_weights(sup, weights, neutral, config.seed)[:, None]) if config.coverage else weights


def begin_record(
    config: RunConfig,
    ds_config: dict[str, Any],
    texts: TextSet,
    sup: Supervision,
    space: LabelSpace,
    labels: list[str] | None,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """run.json as far as it is known before training; tokenizer: the student's."""
    teachers = [
        {"name": teacher["name"], "fingerprint": teacher["fingerprint"], "labels": list(dict.fromkeys(names))}
        | {"own_labels": teacher["labels"], "run_seed": teacher["run_seed"]}
        for teacher, names in zip(sup.teachers, space.teacher_labels, strict=True)
    ]
    labels = labels if METHODS[config.method].needs_labels else None
    return {
        "state": "training",
        "config": config.resolved(),
        "labels": list(space.names),
        "overlaps": list(space.overlaps),
        "teachers": teachers,
        "data": {"source": texts.source, "texts": len(texts), "blank": texts.num_blank, "fingerprint": texts.fingerprint},
        "identity": identity.identity(config, texts, sup, space, tokenizer, ds_config, labels),
        "layout": {
            "processes": torch.distributed.get_world_size(),
            "micro_batch": ds_config["train_micro_batch_size_per_gpu"],
            "accumulation": ds_config["gradient_accumulation_steps"],
            "zero_stage": ds_config["zero_optimization"]["stage"],
        },
        "versions": runinfo.versions(),
    }


# ---- after training ----


def card(config: RunConfig, record: dict[str, Any], max_length: int) -> export.Card:
    """The model card's content. max_length: tokens that the student read of a text."""
    student = record["metrics"].get("student", {})
    holes = {"texts that belong to no teacher, left out": record["coverage"]["texts"]} if "coverage" in record else {}
    return export.Card(
        title=Path(config.output).resolve().name,
        base_model=config.student,
        teachers=record["teachers"],
        options={name: getattr(config, name) for name in identity.identity_options(config)},
        data=record["data"] | holes,
        metrics={name: student[name] for name in ("accuracy", "macro_f1", "nll", "ece") if name in student},
        supervision={name: value for name, value in record["metrics"].items() if name != "student"},
        evaluation=student,
        head_tells=record.get("uncertainty_head", {}).get("tells"),
        max_length=max_length,
    )


def evaluate_student(config: RunConfig, output: Path) -> dict[str, Any]:
    """Figures of the exported folder, loaded as anybody would load it, on --eval."""
    options = ("text_column", "label_column", "max_length", "token_budget", "device", "label_map")
    return evaluate(EvalConfig(model=str(output), data=config.eval, **{name: getattr(config, name) for name in options}))


def main(config: RunConfig) -> int:
    """`muka-fast train`: run, and tell the figures. Returns the exit code."""
    with one_job():
        result = run(config)
    if result.stopped:
        return STOPPED
    student = result.metrics.get("student", {})
    figures = {name: value for name, value in result.metrics.items() if isinstance(value, float)}
    figures |= {name: student[name] for name in ("accuracy", "macro_f1", "nll", "ece") if name in student}
    told = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    log.info("student in %s%s", result.output, f": {told}" if told else "")
    return 0


def script(argv: list[str]) -> int:
    """`deepspeed muka_fast/train.py ...`; without --config, teachers and texts it makes and merges the demo's, and says so."""
    from muka_fast.cli import parse_train_args

    config = parse_train_args(argv)
    setup_logging(config.verbose, int(os.environ.get("RANK", "0")))
    named = any(word.partition("=")[0] == "--config" for word in argv)
    if not (named or config.teachers or config.texts or config.store):
        from muka_fast.material import fill_in

        log.info("neither --teachers nor --config: merging the demo's teachers, which are made now where they are missing")
        with told_once():
            device = resolve_device(config.device)
        init_distributed(device, config.verbose)
        ours = {} if config.output or config.resume else {"overwrite": True}  # repeating the bare command repeats the run
        config = on_first_process(lambda: fill_in(config)).model_copy(update=ours)
    return main(config)


if __name__ == "__main__":
    sys.exit(guarded(lambda: script(sys.argv[1:])))
