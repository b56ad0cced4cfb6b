"""What a run was begun with: recorded in run.json, and compared where `--resume` is to go on with it, as early as it can be told."""

import copy
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muka_fast import adapters
from muka_fast.data import tokenizer_key
from muka_fast.ds_config import settle_recipe
from muka_fast.errors import UserError
from muka_fast.methods import neutral_encoder, unused_options
from muka_fast.neutral import find_encoder
from muka_fast.readers import find_files
from muka_fast.runinfo import read_run
from muka_fast.student import encoder_fingerprint
from muka_fast.teachers import check_teachers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from muka_fast.config import RunConfig
    from muka_fast.data import TextSet
    from muka_fast.labels import LabelSpace
    from muka_fast.stored import Supervision

log = logging.getLogger("muka_fast")
# Options that decide the student's numbers; all others (layout, logging, paths) may change between a kill and --resume.
IDENTITY_OPTIONS = (
    "method", "margin", "normalize_margin", "uncertainty", "score_temperature", "kd_temperature", "target", "mc",
    "mc_samples", "mc_scope", "mc_dropout_p", "mc_stop", "scoring_precision", "epochs", "learning_rate", "batch_size", "warmup_ratio",
    "weight_decay", "max_grad_norm", "max_length", "seed", "teacher_balance", "coverage", "uncertainty_head",
)
# What a run reads. Under the same names, and of the same files, it is taken for the same: --resume of a complete run is instant.
INPUT_OPTIONS = (
    "texts", "text_column", "label_column", "limit", "student", "neutral_encoder", "label_map", "teachers", "store",
)  # fmt: skip
# Parts of the identity that are hashes, and what a reader knows them as.
HASHED = {
    "texts": "texts",
    "true_labels": "true labels",
    "teachers": "teachers",
    "tokenizers": "tokenizers of teachers",
    "student": "student",
    "student_tokenizer": "tokenizer of the student",
    "neutral_encoder": "neutral encoder",
    "neutral_tokenizer": "tokenizer of the neutral encoder",
}


def identity_options(config: "RunConfig") -> list[str]:
    """Those of IDENTITY_OPTIONS that the method looks at."""
    unused = unused_options(config)
    return [name for name in IDENTITY_OPTIONS if name not in unused]


def identity(
    config: "RunConfig",
    texts: "TextSet",
    sup: "Supervision",
    space: "LabelSpace",
    tokenizer: "PreTrainedTokenizerBase",
    ds_config: dict[str, Any],
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Everything that the final weights depend on, besides rounding.

    tokenizer: the student's. labels: the true label of each text, where the method learns from them.
    """
    encoders = {"student": encoder_fingerprint(config.student), "student_tokenizer": tokenizer_key(tokenizer, config.max_length)}
    encoders |= {"neutral_encoder": None, "neutral_tokenizer": None}  # the student
    if config.neutral_encoder is not None and neutral_encoder(config) is not None:
        encoders["neutral_encoder"] = encoder_fingerprint(config.neutral_encoder, "neutral encoder")
        encoders["neutral_tokenizer"] = tokenizer_key(find_encoder(config.neutral_encoder)[1], config.max_length)
    learnt = {} if labels is None else {"true_labels": hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest()}
    return {
        **{name: getattr(config, name) for name in identity_options(config)},
        **ds_identity(ds_config),
        **learnt,
        "texts": texts.fingerprint,
        "teachers": [teacher["fingerprint"] for teacher in sup.teachers],
        "tokenizers": [teacher["tokenizer_key"] for teacher in sup.teachers],
        "scoring_seeds": [teacher["run_seed"] for teacher in sup.teachers],  # a store may hold others' scores
        "labels": list(space.names),
        "teacher_labels": [list(labels) for labels in space.teacher_labels],
        **encoders,
    }


def ds_identity(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The part of the identity that the ds_config decides."""
    precision = next((key for key in ("bf16", "fp16") if ds_config.get(key, {}).get("enabled")), "fp32")
    return {"scheduler": ds_config.get("scheduler"), "optimizer": ds_config["optimizer"], "precision": precision}


def files_identity(config: "RunConfig", texts: "TextSet") -> dict[str, Any]:
    """The part of the identity that the texts' and the models' files decide, known before a teacher is loaded."""
    found = {"texts": texts.fingerprint, "student": encoder_fingerprint(config.student)}
    if config.teachers:
        found["teachers"] = [files.fingerprint for files in check_teachers(config.teachers, warn=False)]
    return found


def check_identity(output: Path, mine: dict[str, Any]) -> None:
    """Raises UserError, with the differences, where the run in `output` was begun with another identity; mine: all of it or a part."""
    theirs = read_run(output).get("identity")
    if theirs is not None:
        refuse_other(output, theirs, mine)


def refuse_other(output: Path, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raises UserError, with the differences, where `mine` is not what the run in `output` was begun with."""
    mine = json.loads(json.dumps(mine))
    if not mine.keys() <= theirs.keys():
        raise UserError(f"--resume: the run in {output} was begun by another version of muka_fast; start anew with --overwrite")
    differing = [key for key in mine if theirs[key] != mine[key]]
    if {"learning_rate", "weight_decay"} & set(differing):  # said once: both are in the optimizer, too
        differing = [key for key in differing if key != "optimizer"]
    if differing:
        shown = "; ".join(difference(key, theirs[key], mine[key]) for key in differing)
        raise UserError(
            f"--resume: the run in {output} was begun with other input ({shown}); "
            "give the same as then, or start anew with --overwrite"
        )


def difference(key: str, theirs: Any, mine: Any) -> str:
    """One part of the identity, then and now; hashes say nothing to a reader."""
    if key in HASHED:
        moved = isinstance(theirs, list) and sorted(theirs) == sorted(mine)
        return f"another order of {HASHED[key]}" if moved else f"other {HASHED[key]}"
    theirs, mine = (json.dumps(value, ensure_ascii=False)[:80] for value in (theirs, mine))
    return f"{key} {theirs} -> {mine}"


def earlier_run(config: "RunConfig", ds_config: dict[str, Any]) -> dict[str, Any]:
    """run.json of the run that --resume goes on with, {} where there is none. Nothing slow is read.

    Raises UserError, with the differences, where that run had other options.
    """
    output = Path(config.output)
    earlier = read_run(output)
    before = earlier.get("config")
    if isinstance(before, dict):
        config, ds_config = as_then(config, earlier), copy.deepcopy(ds_config)
        now = settle_recipe(config, ds_config, config.epochs, config.learning_rate).resolved()
        names = identity_options(config)
        mine = {name: now[name] for name in names} | ds_identity(ds_config)
        theirs = {name: before[name] for name in names if name in before}
        refuse_other(output, theirs | {key: earlier.get("identity", {}).get(key) for key in ds_identity(ds_config)}, mine)
        if earlier.get("state") == "complete" and now["eval"] is not None and before.get("eval") != now["eval"]:
            then = "not evaluated" if before.get("eval") is None else f"evaluated on {before['eval']}"
            log.warning("%s was %s; for %s use `muka-fast eval`", output, then, now["eval"])
    return earlier


def as_then(config: "RunConfig", earlier: dict[str, Any]) -> "RunConfig":
    """Our options, what follows from the texts (epochs, learning rate) as in an earlier run's run.json where nobody gave others."""
    before = earlier.get("config") or {}
    return config.model_copy(update={name: before.get(name) for name in ("epochs", "learning_rate") if getattr(config, name) is None})


def _models(config: "RunConfig") -> list[str]:
    return [source for source in (config.student, config.neutral_encoder, *config.teachers) if source is not None]


def input_files(config: "RunConfig") -> dict[str, list[Any]]:
    """What tells each local file that a run reads from any other, now or before: its place, number, size and time of writing."""
    folders = [Path(source) for source in _models(config) if os.path.isdir(source)]
    files = [Path(name) for name in (*find_files(config.texts), config.label_map) if isinstance(name, (str, Path))]
    files += [file for folder in folders for file in folder.iterdir()]
    states = {str(file): (os.path.realpath(file), file.stat()) for file in files if file.is_file()}
    return {name: [place, state.st_ino, state.st_size, state.st_mtime_ns] for name, (place, state) in sorted(states.items())}


def untouched(config: "RunConfig", earlier: dict[str, Any], inputs: dict[str, list[Any]]) -> bool:
    """Whether the input of the run in --output, whose run.json `earlier` is, has the same names as then, and its files are those
    that it read; inputs: `input_files`. False where that cannot tell: a store may have got other teachers, an adapter's base lie
    anywhere, and the hub have newer files under the same name."""
    now, before = config.resolved(), earlier.get("config") or {}
    known = config.teachers and find_files(config.texts)
    known = known and all(os.path.isdir(source) and not adapters.is_adapter(Path(source)) for source in _models(config))
    return bool(known) and inputs == earlier.get("inputs") and all(now[name] == before.get(name) for name in INPUT_OPTIONS)
