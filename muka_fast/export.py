"""The student as one Hugging Face folder: weights, configuration, tokenizer, model card; written aside, then moved in place.

A run's folder is whole or plainly unfinished at every moment: all files are written and synced in `.export.partial`, which
is renamed to `.export.ready` and only then moved file by file, config.json last. `finish_export` completes a move that was
cut off; until the new files are safe on the disk, no old one is touched. What comes later, the uncertainty head and a card with
more figures, goes the same way alone: the weights are written once.
"""

import contextlib
import copy
import glob
import json
import logging
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
import transformers
import yaml

from muka_fast import __version__, checkpoint
from muka_fast.config import LABELLED_METHODS
from muka_fast.console import quiet_transformers
from muka_fast.errors import UserError, first_line
from muka_fast.files import is_write_error, open_weights, sync, sync_folder
from muka_fast.outputs import PARTIAL, READY
from muka_fast.tokenizer import NO_LIMIT, settle_tokenizer, token_limit

if TYPE_CHECKING:
    from muka_fast.doubt import UncertaintyHead

log = logging.getLogger("muka_fast")

FILE_LIST = "files.json"
MOST_CARD_LABELS = 300
MUKA = "Knowledge amalgamation by teacher uncertainty (MUKA, arXiv 2112.07327; MUKI, arXiv 2210.05230)"
METHOD_TEXTS = {
    "muka-soft": f"{MUKA}: all teachers' predictions, weighted by how certain each one is.",
    "muka-hard": f"{MUKA}: the prediction of the most certain teacher.",
    "muka-evidence": "Knowledge amalgamation by evidence of the whole pool: all teachers' predictions, weighted by how well each "
    "text fits a teacher's features and the neighbourhood that it owns.",
    "muka-auto": "Knowledge amalgamation by a pool of three answers to whose text it is: all teachers' predictions, weighted by how "
    "well each text fits a class, a teacher, and the names of the classes.",
    "vkd": "Distillation of the softmax over all teachers' concatenated logits.",
    "uhc": "Each teacher's prediction against the student's, restricted to that teacher's classes.",
    "dfa": "Distillation of all teachers' concatenated logits, the student's features drawn to a code of the teachers' features.",
    "cfl": "Distillation of all teachers' concatenated logits, student and teachers compared in a space of common features.",
    "mean": "Distillation of the mean of the teachers' logits, which know the same classes.",
    "supervised": "Training on the true labels; the teachers only name the classes.",
    "oracle": "Distillation of the teacher that knows the true label of each text.",
}
TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # which would show what follows in another order
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Card:
    """What the model card tells besides the labels. Texts from outside may hold anything: the card escapes them.

    teachers: dicts with name, and where known labels (union names) and fingerprint. options (of them "method" gets a
    sentence), data, metrics (of the student), supervision (how good its targets were, on num_labelled_texts): shown as tables in
    their order. evaluation: what metrics were measured on, data, num_texts and num_unknown. head_tells: `UncertaintyHead.tells`, None
    where there is no head. max_length: tokens of a text that the student read. base_model and sources of texts may be local paths, of
    which the last part is shown.
    """

    title: str
    base_model: str | None = None
    teachers: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    supervision: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    head_tells: bool | None = None
    max_length: int | None = None


def check_student(output: str | Path) -> None:
    """Raises UserError where the weights of a complete run are gone or damaged, as far as their headers and sizes tell."""
    try:
        checkpoint.read_tensors(Path(output), "the student")
    except UserError as error:
        what = str(error).partition(";")[0]  # its own way out is for models from elsewhere
        raise UserError(f"--resume: the run in {output} is complete, but {what}; start anew with --overwrite") from error


def save_student(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    output: str | Path,
    labels: Sequence[str],
    card: Card,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write the student into `output` as a folder that plain transformers loads; returns `output`.

    labels: names of the C classes in the order of the logits. state_dict: the weights where the model itself does not hold
    them whole (ZeRO-3). Sets names, problem type and padding in the model's configuration. Raises UserError where a weight is no
    number and where the disk is full or cannot be written (nothing that was there is touched), and ValueError where labels and
    output layer do not fit.
    """
    output = Path(output).expanduser()
    weights = state_dict or model.state_dict()
    for name, _ in model.named_parameters():
        if name in weights and not torch.isfinite(weights[name]).all():  # the last step's gradient, which no later loss tells of
            raise UserError(f"--output {output}: training has spoilt the student, {name} is not finite: lower --learning_rate")
    set_labels(model, labels)
    with _moved_into(output) as partial:
        with quiet_transformers():
            model.save_pretrained(partial, state_dict=None if state_dict is None else dict(state_dict))
        if state_dict is not None:
            _set_dtype(partial / "config.json", state_dict)
        open_weights(partial)
        clean_tokenizer(model, tokenizer).save_pretrained(partial)
        _write_card(partial, output, labels, card)
    return output


def add_head(output: str | Path, head: "UncertaintyHead") -> bool:
    """Put the uncertainty head beside an exported student, in a file of its own; returns what the card says: whether it tells
    anything. Raises as `save_student`."""
    with _moved_into(Path(output).expanduser()) as partial:
        head.save(partial)
        open_weights(partial)
    return head.tells


def replace_card(output: str | Path, labels: Sequence[str], card: Card) -> None:
    """Give an exported student another model card; labels as for `save_student`, and raises as that."""
    output = Path(output).expanduser()
    with _moved_into(output) as partial:
        _write_card(partial, output, labels, card)


def _write_card(folder: Path, output: Path, labels: Sequence[str], card: Card) -> None:
    (folder / "README.md").write_text(render_card(card, labels, output.resolve().name), encoding="utf-8")


@contextlib.contextmanager
def _moved_into(output: Path) -> Iterator[Path]:
    """A folder to write into; its files replace those of `output` when all of them are safe on the disk."""
    partial = output / PARTIAL
    try:
        output.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        names = sorted(entry.name for entry in partial.iterdir())
        (partial / FILE_LIST).write_text(json.dumps(names), encoding="utf-8")
        sync_folder(partial)
        os.replace(partial, output / READY)
        finish_export(output)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not is_write_error(error):
            raise
        raise UserError(
            f"--output {output}: the student cannot be written ({first_line(error)}); free some space, then repeat with --resume"
        ) from error


def _set_dtype(path: Path, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Have config.json name the precision of the weights: DeepSpeed casts the model itself, but keeps them in fp32."""
    dtypes = {tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        content = json.loads(path.read_text(encoding="utf-8")) | {"dtype": str(dtypes.pop()).removeprefix("torch.")}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def set_labels(model: transformers.PreTrainedModel, labels: Sequence[str]) -> None:
    """Name the classes in the model's configuration; ValueError where the number or a repeated name does not fit."""
    config = model.config
    if len(set(labels)) != len(labels):
        raise ValueError(f"label names repeat: {sorted(name for name in set(labels) if list(labels).count(name) > 1)}")
    if config.num_labels != len(labels):
        raise ValueError(f"{len(labels)} label names for a head of {config.num_labels} classes")
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: index for index, name in enumerate(labels)}
    # transformers refuses this type for one class, and takes an unnamed type as classification where labels are integers.
    config.problem_type = "single_label_classification" if len(labels) > 1 else None


def clean_tokenizer(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
) -> transformers.PreTrainedTokenizerBase:
    """A copy without the truncation and padding of its latest call, and with the model's true length limit."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    settle_tokenizer(model, tokenizer, "student")
    limit = token_limit(model, tokenizer)
    if limit < NO_LIMIT:
        tokenizer.model_max_length = limit
    return tokenizer


def finish_export(output: str | Path) -> bool:
    """Move a completely written export into place; also after a kill in the middle of it. True where there was one.

    While it runs there is no config.json, so nothing loads a mixture of old and new files.
    """
    output = Path(output).expanduser()
    ready = output / READY
    shutil.rmtree(output / PARTIAL, ignore_errors=True)
    if not ready.is_dir():
        return False
    if (ready / FILE_LIST).is_file():
        names = json.loads((ready / FILE_LIST).read_text(encoding="utf-8"))
        if (ready / "config.json").exists():
            (output / "config.json").unlink(missing_ok=True)
            for stale in output.glob("model*.safetensors*"):
                if stale.name not in names:
                    stale.unlink()
        for name in sorted(names, key=lambda name: name == "config.json"):
            if (ready / name).exists():
                if (output / name).is_dir():
                    shutil.rmtree(output / name)
                os.replace(ready / name, output / name)
        (ready / FILE_LIST).unlink()
    ready.rmdir()
    sync(output)
    return True


# ---- the card ----


def markdown_text(value: Any) -> str:
    """Any value as literal text on one line of Markdown, also inside a table cell; HTML is inert, None is a dash."""
    if value is None:
        return "–"
    text = " ".join(str(value).split())
    hidden = lambda char: unicodedata.category(char) in ("Cc", "Cs") or unicodedata.bidirectional(char) in TURNS
    text = "".join("\ufffd" if hidden(char) else char for char in text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+\-!|~$])", r"\\\1", text)


def place(value: Any) -> Any:
    """Of a local path, or a pattern of files, the last part: the folders above it are nobody's business. All else as it is."""
    if not isinstance(value, str):
        return value
    path = os.path.expanduser(value)
    try:
        local = os.path.isabs(path) or os.path.exists(path) or bool(glob.glob(path, recursive=True))
    except ValueError:  # what is no name of a file
        return value
    return os.path.basename(os.path.abspath(path)) or value if local else value


def figure(value: Any) -> str:
    """A number for a table: four significant digits, integers whole."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return markdown_text(value)


@cache
def card_template() -> jinja2.Template:
    """The card's template with its filters."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    # Markdown, not HTML: `md` escapes what comes from outside.
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {"md": markdown_text, "figure": figure, "place": place}
    return environment.get_template("model_card.md.j2")


def render_card(card: Card, labels: Sequence[str], folder: str) -> str:
    """README.md of the exported folder, which is called `folder`."""
    owners: dict[str, list[str]] = {label: [] for label in labels}
    for teacher in card.teachers:
        for label in owners.keys() & set(teacher.get("labels") or ()):
            owners[label].append(str(teacher["name"]))
    return card_template().render(
        card=card,
        labels=labels,
        owners=list(owners.items()),
        most_labels=MOST_CARD_LABELS,
        folder=folder,
        version=__version__,
        front_matter=front_matter(card),
        method=METHOD_TEXTS.get(str(card.options.get("method")), "Merging of classifiers."),
        unlabelled=card.options.get("method") not in LABELLED_METHODS,
    )


def front_matter(card: Card) -> str:
    """The card's YAML header: what the hub reads."""
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["knowledge-amalgamation", "knowledge-distillation", "muka"],
    }
    # The hub wants a hub name here; a local folder means nothing elsewhere.
    if card.base_model and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", card.base_model) and not Path(card.base_model).exists():
        head["base_model"] = card.base_model
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
