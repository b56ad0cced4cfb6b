"""Every option of every command: default, unit and range, once; help texts and error messages are derived from here.

Over 400 lines: all options stand here and nowhere else, so that each is found, and told apart from the others, in one place.
"""

import csv
import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from muka_fast import recipe
from muka_fast.errors import UserError
from muka_fast.mappings import read_mapping

METHODS = ("muka-soft", "muka-hard", "muka-evidence", "muka-auto", "vkd", "uhc", "dfa", "cfl", "mean", "supervised", "oracle")
RULED_METHODS = ("muka-evidence", "muka-auto")  # whose teachers are chosen over the whole pool
LABELLED_METHODS = ("supervised", "oracle")  # which read the labels of the texts
UNCERTAINTIES = ("predictive_entropy", "mutual_information", "expected_entropy", "variance")
NEEDS_SAMPLES = ("mutual_information", "variance")  # zero for every text unless two passes or more differ
PRECISIONS = ("fp32", "bf16", "fp16")
FILES = "Models and files"
# What a ds_config may say as well.
IN_DS_CONFIG = frozenset(("batch_size", "max_grad_norm", "learning_rate", "weight_decay", "warmup_ratio", "precision"))
GROUPS = (FILES, "Data", "Uncertainty", "Distillation", "Training", "Run")
TEXTS = "file, 'pattern' (.jsonl .json .csv .tsv .txt, also .gz, .parquet) or hub data set"
OR_CONTENT = "file; in --config and Python also its content"
BOUND_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}

ConfigType = TypeVar("ConfigType", bound="Config")


def option(
    default: Any, description: str, group: str, *, allowed: str | None = None, means: str | None = None, **limits: Any
) -> Any:
    """A field with its help text and help group; in words: `allowed` what the type alone does not say, `means` what the default is."""
    extra = {"group": group, "allowed": allowed, "means": means}
    return Field(default, description=description, json_schema_extra=extra, **limits)


# Of several commands.
SEED = option(0, "seed of every random number of the run", "Run", ge=0, lt=2**32)
LABEL_MAP = option(None, "renames, merges or drops (null) labels", FILES, allowed=f"a path of a JSON or YAML {OR_CONTENT}")
NEUTRAL_ENCODER = option(
    None, "encoder that tells muka-evidence and muka-auto which texts are alike: folder or hub name", FILES, means="the student"
)
EPOCHS = option(
    None,
    "passes over the texts",
    "Training",
    means=f"{recipe.FEWEST_EPOCHS}, or as many as make {recipe.MIN_STEPS:,} steps, at most {recipe.MOST_EPOCHS}",
    ge=1,
    le=10_000,
)
LEARNING_RATE = option(
    None,
    "peak learning rate of AdamW",
    "Training",
    means=f"{recipe.BASE_LEARNING_RATE:g} x {recipe.BASE_WIDTH} / hidden size",
    gt=0,
    le=1,
)
BATCH_SIZE = option(16, "texts per optimizer step, over all processes", "Training", ge=1, le=2**20)


class Config(BaseModel):
    """Base of all configurations: unknown names are refused, numbers must be finite."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, validate_assignment=True, validate_by_name=True, validate_by_alias=True
    )

    verbose: bool = option(False, "log details", "Run")

    @field_validator("*", mode="before")
    @classmethod
    def _plain_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Path objects are welcome wherever a path is a string; `~` is the home folder in files and models; true is no number."""
        if isinstance(value, bool) and plain_type(cls.model_fields[info.field_name]) in (int, float):
            raise ValueError("a number is expected")
        is_file = cls.model_fields[info.field_name].json_schema_extra["group"] == FILES
        if is_file and (value == "" or (isinstance(value, (list, tuple)) and "" in value)):
            raise ValueError("a path or hub name is expected, found an empty text")

        def plain(item: Any) -> Any:
            item = os.fspath(item) if isinstance(item, os.PathLike) else item
            if not is_file or not isinstance(item, str):
                return item
            item = os.path.expanduser(item)
            os.path.abspath(item).encode()  # UnicodeEncodeError, which is a ValueError: manifests hold paths, as UTF-8
            return item

        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else plain(value)

    @field_validator("teachers", mode="before", check_fields=False)
    @classmethod
    def _one_teacher(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, os.PathLike)) else value

    @field_validator("labels", mode="before", check_fields=False)
    @classmethod
    def _comma_list(cls, value: Any) -> Any:
        return split_labels([value]) if isinstance(value, str) else value

    def resolved(self) -> dict[str, Any]:
        """All options as plain values (str, int, float, bool, list, None), ready for JSON or YAML."""
        return self.model_dump(mode="json")


class TextOptions(Config):
    """How texts are read and cut."""

    text_column: str = option("text", "column that holds the text", "Data", min_length=1)
    limit: int | None = option(None, "use only the first N texts", "Data", ge=1)
    # 16384 is the row stride of the attention masks (ATTENTION_STRIDE in kernels/ops/reference.py).
    max_length: int = option(128, "tokens kept of each text, special tokens included", "Data", ge=4, le=16384)


class LabelOptions(Config):
    """Of a command that reads labels."""

    label_column: str = option("label", "column that holds the label, where labels are needed", "Data", min_length=1)


class DeviceOptions(Config):
    """Where models run."""

    device: str = option(
        "auto",
        "auto takes a GPU where there is one",
        "Run",
        allowed="auto, cpu, cuda or cuda:N",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
    )


class ForwardOptions(DeviceOptions):
    """Where models run and how much they take at once."""

    token_budget: int | None = option(
        None,
        "padded tokens per forward of teachers and finished models; changes no result of models that padding does not change",
        "Run",
        means="8192, on a GPU by its free memory",
        ge=16,
        le=2**24,
    )


class ScoringOptions(TextOptions, ForwardOptions):
    """How teachers are scored: what a supervision store holds, and where and how fast it is filled."""

    seed: int = SEED
    mc: bool = option(
        True, "Monte-Carlo dropout; --no-mc takes the statistics from one deterministic pass", "Uncertainty"
    )
    mc_samples: int = option(16, "stochastic passes per text (K)", "Uncertainty", ge=1, le=4096)
    mc_scope: str = option(
        "last:1",
        "where dropout stays on: everywhere, in the last M layers and the head, or in the head only",
        "Uncertainty",
        allowed="all, last:M (M >= 1) or head",
        pattern=r"^(all|head|last:[1-9]\d{0,3})$",
    )
    mc_dropout_p: float | None = option(
        None,
        "dropout probability at the sites of the scope",
        "Uncertainty",
        means="the teacher's own",
        gt=2**-17,  # up to there it rounds to 0 in the masks' steps of 2^-16, and every pass would be the same
        le=0.9,
    )
    mc_stop: float | None = option(
        None,
        "stop sampling a text once its choice of teacher by --uncertainty is decided at this error probability; worth it with "
        "--mc_scope all only; teachers are loaded together where they fit, and adding one later scores all of them again",
        "Uncertainty",
        allowed="exact, or a number > 0 and <= 0.5",
        means="exact, no early stop",
        gt=0,
        le=0.5,
    )
    uncertainty: Literal[UNCERTAINTIES] | None = option(
        None,
        "measure of muka-soft, muka-hard, oracle, --mc_stop and --uncertainty_head",
        "Uncertainty",
        means="mutual_information, after a single pass predictive_entropy",
    )
    shard_size: int | None = option(
        None,
        "texts per shard of the store, which is what a killed run repeats at most, and what a process scores at a time",
        "Run",
        means="a 16th of the texts, 256 to 4096",
        ge=1,
        le=2**20,
    )

    scoring_precision: Literal[PRECISIONS] = option(
        "fp32",
        "precision of teachers and neutral encoder; bf16 and fp16 halve the memory, and save time where the device computes in them",
        "Run",
    )
    teacher_gib: float | None = option(
        None,
        "GiB of a teacher's weights that the device may hold; a larger one is split over GPUs, host memory and disk, which is slow",
        "Run",
        means="what is free",
        gt=0,
        le=1e6,
    )

    @field_validator("mc_stop", mode="before")
    @classmethod
    def _exact_is_none(cls, value: Any) -> Any:
        return None if value == "exact" else value

    @property
    def one_pass(self) -> bool:
        """Whether there is nothing to compare: measures of disagreement are zero for every text."""
        return not self.mc or self.mc_samples == 1

    @model_validator(mode="after")
    def _default_measure(self) -> Self:
        if self.uncertainty is None:  # not by assignment, which would validate again
            self.__dict__["uncertainty"] = "predictive_entropy" if self.one_pass else "mutual_information"
        return self


class RunConfig(ScoringOptions, LabelOptions):
    """Options of `muka-fast train` and muka_fast.amalgamate.

    The published methods (arXiv 2112.07327) are `muka-soft` and `muka-hard` with uncertainty predictive_entropy and mc_scope all;
    `muka-auto` chooses the teacher better (docs/selection.md), and last:1 costs a sixteenth of all. Three epochs are the published
    ones; few texts get more, and the learning rate goes by the width of the encoder (muka_fast/recipe.py).
    """

    teachers: list[str] = option([], "teacher folders or hub names; required unless --store is filled", FILES)
    student: str | None = option(None, "encoder to start the student from: folder or hub name; required", FILES)
    neutral_encoder: str | None = NEUTRAL_ENCODER
    texts: str | None = option(None, f"unlabelled texts: {TEXTS}; required", FILES)
    eval: str | None = option(None, "labelled texts to measure the student on", FILES)
    store: str | None = option(None, "supervision store to fill or reuse", FILES, means="OUTPUT/supervision")
    store_teachers: list[str] = option(
        [], "without --teachers: names of the store's teachers to merge, in this order", FILES, means="all, as last scored"
    )
    output: str | None = option(None, "folder of the run and of the exported student; required", FILES)
    ds_config: str | dict[str, Any] | None = option(None, "DeepSpeed configuration", FILES, allowed=f"a path of a JSON {OR_CONTENT}")
    label_map: str | dict[Any, Any] | None = LABEL_MAP

    method: Literal[METHODS] = option(
        "muka-auto",
        "amalgamation method; muka-evidence and muka-auto look at the whole pool; supervised and oracle need labels in the texts",
        "Distillation",
    )
    margin: bool = option(True, "muka-soft and muka-hard: weight each text by the gap of its two best teacher scores", "Distillation")
    normalize_margin: bool = option(False, "divide the margin weights by their batch mean", "Distillation")
    score_temperature: float = option(
        0.2, "muka-soft: temperature tau of the softmax over teacher scores", "Distillation", ge=1e-6, le=1000
    )
    kd_temperature: float = option(
        1.0, "temperature T of teachers and student in the loss", "Distillation", ge=1e-6, le=1000
    )
    target: Literal["deterministic", "mc_mean"] = option(
        "deterministic", "teacher probabilities: of the deterministic forward or averaged over the stochastic passes", "Distillation"
    )

    teacher_balance: float = option(
        0.5,
        "muka-evidence and muka-auto: weight a text by (its teacher's share of the texts)^-X; 0: texts count alike, 1: teachers do",
        "Distillation",
        ge=0,
        le=1,
    )
    coverage: bool = option(
        False, "leave out texts that belong to no teacher (muka-evidence and muka-auto with two teachers or more)", "Distillation"
    )
    uncertainty_head: bool = option(
        False, "the student also learns how much the teachers doubt a text, which predict and Predictor report", "Distillation"
    )

    epochs: int | None = EPOCHS
    learning_rate: float | None = LEARNING_RATE
    batch_size: int = BATCH_SIZE
    warmup_ratio: float = option(0.1, "share of the steps with rising learning rate", "Training", ge=0, le=1)
    weight_decay: float = option(0.01, "decoupled weight decay", "Training", ge=0, le=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not at all", "Training", ge=0, le=1e6)
    precision: Literal[PRECISIONS] | None = option(
        None, "precision of the student's training; a CPU takes fp32 or bf16", "Training", means="what the ds_config says, else fp32"
    )
    cuda_graphs: bool = option(
        True, "on one GPU replay the steps of small batches as CUDA graphs, which saves their launches", "Training"
    )
    activation_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, a third slower", "Training"
    )
    log_every: int = option(10, "steps between two lines of metrics", "Run", ge=1)
    save_every: int | None = option(
        None, "steps between two checkpoints", "Run", means="where an epoch ends, a minute apart or more, and after half an hour", ge=1
    )
    resume: bool = option(False, "continue the run in the output folder; where there is none, begin it", "Run")
    overwrite: bool = option(False, "replace the run in the output folder; without --store its scores of the same texts stay", "Run")

    _yielding: frozenset[str] = frozenset()  # what a file says beside which a ds_config is given

    @property
    def insisted(self) -> set[str]:
        """The options that a ds_config may not contradict."""
        return self.model_fields_set - self._yielding

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other")
        if self.teachers and self.store_teachers:
            raise ValueError("--teachers and --store_teachers exclude each other: the latter names those of a filled --store")
        if self.coverage and self.method not in RULED_METHODS:
            way_out = " or ".join(RULED_METHODS)
            raise ValueError(f"--coverage asks whose text it is, which --method {self.method} does not: take {way_out}")
        looks_at_it = self.method in ("muka-hard", "muka-soft") or self.uncertainty_head
        if self.one_pass and self.uncertainty in NEEDS_SAMPLES and looks_at_it:
            reason = "--mc_samples 1" if self.mc else "--no-mc"
            way_out = "take more passes or predictive_entropy"
            raise ValueError(f"--uncertainty {self.uncertainty} is 0 for all texts with {reason}: {way_out}")
        return self


def given_alike(config: Config) -> dict[str, Any]:
    """What all processes of a job must be given: every option that is no matter of one machine; of files, whether and how many. A
    ds_config is left to who reads it."""
    found = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if field.json_schema_extra["group"] == FILES:
            value = len(value) if isinstance(value, list) else value is not None
        if name not in ("verbose", "device", "token_budget", "teacher_gib", "ds_config"):
            found[f"--{option_name(name, field)}"] = value
    return found


class ScoreConfig(ScoringOptions):
    """Options of `muka-fast score`."""

    teachers: list[str] = option(..., "teacher folders or hub names", FILES)
    texts: str = option(..., f"texts: {TEXTS}", FILES)
    output: str = option(..., "supervision store to fill or complete", FILES)


class TeachConfig(TextOptions, LabelOptions, DeviceOptions):
    """Options of `muka-fast teach`."""

    encoder: str = option(..., "encoder to fine-tune: folder or hub name", FILES)
    train: str = option(..., "labelled texts: file, 'pattern' (.jsonl .json .csv .tsv, also .gz, .parquet) or hub data set", FILES)
    labels: list[str] | None = option(
        None,
        "labels of this teacher, in order, with commas or spaces between them; one that holds a comma in double quotes, "
        "'\"a,b\"'",
        "Data",
        means="all, sorted",
        min_length=1,
    )
    output: str = option(..., "folder of the teacher", FILES)
    eval: str | None = option(None, "labelled texts to measure the teacher on", FILES)
    epochs: int | None = EPOCHS
    learning_rate: float | None = LEARNING_RATE
    batch_size: int = option(16, "texts per optimizer step", "Training", ge=1, le=2**20)
    freeze_layers: int = option(
        0,
        "freeze the embeddings and the first N layers, which lets teachers share that trunk",
        "Training",
        ge=0,
        le=10_000,
    )
    seed: int = SEED
    overwrite: bool = option(False, "replace the teacher in the output folder", "Run")


class FinishedModelOptions(TextOptions, ForwardOptions):
    """Of a command that runs a finished model, which knows how its texts were cut."""

    max_length: int | None = option(
        None, "tokens kept of each text", "Data", means="as the model was trained by muka-fast, else 128", ge=4, le=16384
    )


class EvalConfig(FinishedModelOptions, LabelOptions):
    """Options of `muka-fast eval`."""

    model: str = option(..., "classifier to measure: folder or hub name", FILES)
    data: str = option(..., "labelled texts", FILES)
    label_map: str | dict[Any, Any] | None = LABEL_MAP
    # `json` is a method name of pydantic's models, hence the alias.
    json_output: bool = option(False, "print the figures as JSON", "Run", alias="json")


class PredictConfig(FinishedModelOptions):
    """Options of `muka-fast predict`."""

    model: str = option(..., "classifier: folder or hub name, with or without an uncertainty head", FILES)
    texts: str = option(..., f"texts: {TEXTS}", FILES)
    output: str | None = option(None, "new file for one JSON object per text", FILES, means="stdout")
    overwrite: bool = option(False, "replace the file at --output", "Run")


class DemoConfig(Config):
    """Options of `muka-fast demo`."""

    output: str = option("runs/demo", "folder of the demo", FILES)
    seed: int = SEED
    limit: int | None = option(None, "use about N texts, equally many of each library", "Run", ge=100)
    overwrite: bool = option(False, "replace the demo in the output folder", "Run")


class PlanConfig(ScoringOptions):
    """Options of `muka-fast plan`: those of scoring, so that its command line can be planned as it is, and the training's layout.

    Some change neither memory nor time and are accepted for that reason alone; --mc_stop is planned as all K passes.
    """

    teachers: list[str] = option(..., "teacher folders or hub names; only their configurations are read", FILES)
    student: str = option(..., "encoder of the student: folder or hub name; only its configuration is read", FILES)
    neutral_encoder: str | None = NEUTRAL_ENCODER
    texts: str | None = option(None, "the texts to train on, to count them and their tokens", FILES)
    num_texts: int | None = option(None, "number of texts, instead of --texts", "Data", ge=1)
    tokens_per_text: int | None = option(
        None, "mean number of tokens of a text", "Data", means="counted in --texts, else --max_length", ge=1, le=16384
    )
    epochs: int | None = EPOCHS
    batch_size: int = BATCH_SIZE
    micro_batch: int | None = option(
        None, "texts per forward and backward of one process", "Training", means="--batch_size / --gpus", ge=1, le=2**20
    )
    precision: Literal[PRECISIONS] = option("fp32", "precision of the student's training", "Training")
    gpus: int = option(1, "processes, one for each GPU", "Run", ge=1, le=2**20)
    gpu: Literal["a10", "a100", "h100", "h200", "l4", "l40s"] | None = option(
        None, "plan the hours by this GPU's data sheet, at 40 % of its peak", "Run"
    )
    flops: float | None = option(
        None, "plan the hours by this many FLOP/s that one GPU sustains", "Run", means="measured here", gt=0
    )
    # `json` is a method name of pydantic's models, hence the alias.
    json_output: bool = option(False, "print the plan as JSON", "Run", alias="json")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.texts is None) == (self.num_texts is None):
            raise ValueError("give either --texts or --num_texts")
        if self.gpu is not None and self.flops is not None:
            raise ValueError("--gpu and --flops exclude each other")
        if self.micro_batch is None:  # not by assignment, which would validate again
            if self.batch_size % self.gpus:
                way_out = "change it, or give --micro_batch"
                raise ValueError(f"--batch_size {self.batch_size} does not divide among --gpus {self.gpus}: {way_out}")
            self.__dict__["micro_batch"] = self.batch_size // self.gpus
        return self


class ReportConfig(Config):
    """Options of `muka-fast report`."""

    run: str = option(..., "folder of the run", FILES)


class DoctorConfig(Config):
    """Options of `muka-fast doctor`."""

    teachers: list[str] = option([], "teacher folders or hub names to check", FILES)


def option_name(name: str, field: FieldInfo) -> str:
    """The name users type for a field."""
    return field.alias or name


def plain_type(field: FieldInfo) -> Any:
    """The annotation without `| None`."""
    members = [member for member in get_args(field.annotation) if member is not type(None)]
    return members[0] if type(None) in get_args(field.annotation) else field.annotation


def allowed_values(field: FieldInfo) -> str:
    """What a field takes, in words: "an integer >= 1", "all, last:M (M >= 1) or head"."""
    kind, is_file = plain_type(field), (field.json_schema_extra or {}).get("group") == FILES
    if (field.json_schema_extra or {}).get("allowed"):
        return field.json_schema_extra["allowed"]
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is list:
        return "a list of names"
    words = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a path or hub name" if is_file else "non-empty text" if field.metadata else "text",
    }[kind]
    told = {key: getattr(limit, key) for limit in field.metadata for key in BOUND_SIGNS if getattr(limit, key, None) is not None}
    told = {key: f"{bound:g}" if kind is float else str(bound) for key, bound in told.items()}
    if told.keys() == {"ge", "le"}:
        return f"{words} from {told['ge']} to {told['le']}"
    return f"{words} {' and '.join(f'{BOUND_SIGNS[key]} {bound}' for key, bound in told.items())}".strip()


def help_text(field: FieldInfo) -> str:
    """Description, what is allowed and the default, each where it says something."""
    kind, extra = plain_type(field), field.json_schema_extra
    plain = kind in (bool, str) and not extra["allowed"]
    notes = [] if plain or get_origin(kind) is list else [allowed_values(field)]
    if field.is_required():
        notes.append("required")
    elif extra["means"]:
        notes.append(f"default: {extra['means']}")
    elif field.default is not None and field.default is not False and field.default != []:
        notes.append("default: on" if field.default is True else f"default: {field.default}")
    return f"{field.description} ({'; '.join(notes)})" if notes else str(field.description)


def split_labels(texts: Iterable[str]) -> list[str]:
    """Label names of texts such as `a,b` and `"a, b",c`: quotes protect a comma."""
    return [label.strip() for row in csv.reader(texts, skipinitialspace=True) for label in row if label.strip()]


def nearest(name: str, names: Sequence[str], cutoff: float = 0.6) -> str:
    """ " (nearest: x)" for the most similar of `names`, or nothing where none resembles it by `cutoff` (of 1: the same)."""
    found = difflib.get_close_matches(str(name), names, n=1, cutoff=cutoff)
    return f" (nearest: {found[0]})" if found else ""


def read_options(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file, `-` in their names read as `_`.

    Raises:
        UserError: as `read_mapping`; an option twice.
    """
    content = read_mapping("--config", path, "lines of the form 'option: value'", may_be_empty=True)
    found = {str(key).replace("-", "_"): value for key, value in content.items()}
    if len(found) < len(content):
        raise UserError(f"--config {path}: one option is there with - and with _ in its name")
    return found


def load_config(cls: type[ConfigType], yaml_path: str | Path | None, flags: dict[str, Any]) -> ConfigType:
    """Read a configuration: defaults, then the YAML file, then the flags. Relative paths stay as given.

    Args:
        cls: one of the models above.
        yaml_path: file given with --config, or None.
        flags: option name (`-` or `_`) -> value, strings or typed.

    Raises:
        UserError: an unknown key (names file, key and the nearest key), a bad value (names option, value and what is
            allowed), a required option that is missing.
    """
    from_file = read_options(yaml_path) if yaml_path is not None else {}
    from_flags = {name.replace("-", "_"): value for name, value in flags.items()}
    known = {option_name(name, field): name for name, field in cls.model_fields.items()}
    values = {}
    for given, source in ((from_file, f"{yaml_path}: "), (from_flags, "")):
        for key, value in given.items():
            if key not in known and key not in cls.model_fields:
                label = f"unknown key '{key}'" if source else f"unknown option '{key}'"
                of_train = source and key in RunConfig.model_fields and cls is not RunConfig
                raise UserError(f"{source}{label}{': an option of train' if of_train else nearest(key, list(known))}")
            values[known.get(key, key)] = value
    for name, other in (("teachers", "store_teachers"), ("store_teachers", "teachers")):
        if name in from_flags and other not in from_flags:
            values.pop(other, None)  # a file's: the flag says otherwise
    try:
        config = cls(**values)
    except ValidationError as error:
        raise UserError(_explain(cls, error, from_file, from_flags, yaml_path)) from error
    if "ds_config" in from_flags:
        config._yielding = IN_DS_CONFIG & (config.model_fields_set - from_flags.keys())
    return config


def _explain(
    cls: type[Config], error: ValidationError, from_file: dict, from_flags: dict, yaml_path: str | Path | None
) -> str:
    """The first of pydantic's findings as one line; the number of the others is told."""
    findings = error.errors(include_url=False)
    first = findings[0]
    others = len({finding["loc"][:1] for finding in findings}) - 1  # one option may have several: a file's and a mapping's
    more = f" (and {others} more)" if others else ""
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ") + more
    key = str(first["loc"][0])
    name = next((n for n, field in cls.model_fields.items() if key in (n, field.alias)), key)
    field = cls.model_fields[name]
    key = option_name(name, field)
    if first["type"] == "missing":
        missing = [f"--{finding['loc'][0]}" for finding in findings[1:] if finding["type"] == "missing"]
        return f"--{key} is required: {field.description}" + (f" (also missing: {', '.join(missing)})" if missing else "")
    in_file_only = key in from_file and key not in from_flags
    value = first["input"]
    told = str(value) if len(str(value)) <= 200 else f"{str(value)[:200]} ..."
    where = f"{yaml_path}: {key}: {told}" if in_file_only else f"--{key} {told}"
    if isinstance(first.get("ctx", {}).get("error"), UnicodeEncodeError):
        return f"{where}: the name of a file or of its folders is not UTF-8: rename it{more}"
    hint = nearest(value, list(get_args(plain_type(field)))) if get_origin(plain_type(field)) is Literal else ""
    return f"{where}: must be {allowed_values(field)}{hint}{more}"
