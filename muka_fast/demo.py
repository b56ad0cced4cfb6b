"""The demo: three small teachers made on the spot from local docstrings, merged by several methods, compared in one table.

Offline and from scratch, so the models are tiny and far from what pretrained encoders reach; what it shows is the whole path of a
user's run (`train.amalgamate`) and what each method does with teachers that know different labels.
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from muka_fast import __version__
from muka_fast.config import DemoConfig, RunConfig
from muka_fast.console import log
from muka_fast.data import TextSet, read_texts
from muka_fast.docstrings import LIBRARIES, DocTexts, collect
from muka_fast.errors import UserError
from muka_fast.evaluate import load_model
from muka_fast.labels import LabelSpace, build_label_space
from muka_fast.methods import build_method, selection_accuracy, target_accuracy, vote_accuracy
from muka_fast.supervision import Supervision, fill_store
from muka_fast.teach import Recipe, fine_tune, measure, save_classifier

if TYPE_CHECKING:
    from rich.table import Table

MARKER = "demo.json"  # written last: the material is whole
TEXTS_PER_LIBRARY = 450
VOCABULARY = 4000
MAX_LENGTH = 64  # tokens; the texts have 37 on average
SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}

# Teacher -> architecture, its libraries. scipy is known to two of them.
TEACHERS = {
    "arrays": ("modernbert", ("numpy", "pandas", "python", "scipy")),
    "symbols": ("distilbert", ("matplotlib", "networkx", "sympy")),
    "learning": ("modernbert", ("scikit-learn", "scipy", "torch", "transformers")),
}
# From scratch, so the learning rates are far above those for pretrained encoders.
TEACHER_RECIPE = Recipe(epochs=6, learning_rate=1.5e-3, batch_size=32, max_length=MAX_LENGTH)
STUDENT_OPTIONS = {"epochs": 4, "learning_rate": 2e-3, "batch_size": 32, "max_length": MAX_LENGTH}

# Row of the table -> options of `muka-fast train`, and whether it sees the true labels.
RUNS = {
    "vanilla KD": ({"method": "vkd"}, False),
    "muka-hard": ({"method": "muka-hard", "margin": False}, False),
    "muka-soft": ({"method": "muka-soft", "margin": False}, False),
    "muka-soft + margin": ({"method": "muka-soft", "margin": True}, False),
    "oracle": ({"method": "oracle"}, True),
    "supervised": ({"method": "supervised"}, True),
}
SHOWN = "muka-soft + margin"  # the default of `muka-fast train`; its student answers the example sentences


@dataclass(frozen=True)
class Prepared:
    """Paths of the demo's material.

    texts: the pool without labels (the teachers' own training texts, as published); texts_labelled: the same rows with labels, for
    the upper lines; eval: held-out texts with labels.
    """

    teachers: list[str]
    student: str
    texts: str
    texts_labelled: str
    eval: str


# ---- material: texts, tokenizer, encoders, teachers ----


def train_tokenizer(texts: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    """A WordPiece tokenizer of at most VOCABULARY pieces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, min_frequency=2, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in (SPECIAL["cls_token"], SPECIAL["sep_token"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL,
    )


def small_config(family: str, tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.PretrainedConfig:
    """The configuration of a small encoder with dropout 0.1 everywhere.

    Mean pooling (ModernBERT) and a wide initialisation (DistilBERT) let so small a model learn from a thousand texts; with the
    usual ones its first token starts out blind to the others.
    """
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "pad_token_id": tokenizer.pad_token_id}
    if family == "distilbert":
        return transformers.DistilBertConfig(
            dim=96, n_layers=1, n_heads=3, hidden_dim=192, initializer_range=0.08, seq_classif_dropout=0.1, **common
        )
    names = ("embedding_dropout", "mlp_dropout", "attention_dropout", "classifier_dropout")
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    ends |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    return transformers.ModernBertConfig(
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        classifier_pooling="mean",
        **dict.fromkeys(names, 0.1),
        **ends,
        **common,
    )


def random_model(auto: Any, config: transformers.PretrainedConfig, seed: int) -> transformers.PreTrainedModel:
    """A model from its configuration; the caller's random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config)


def write_rows(path: Path, docs: DocTexts, rows: Sequence[int], labelled: bool) -> None:
    """A JSON-lines file of texts, written aside and renamed."""
    fields = lambda row: {"text": docs.texts[row]} | ({"label": docs.labels[row]} if labelled else {})
    aside = path.with_name(path.name + ".partial")
    aside.write_text("".join(json.dumps(fields(row)) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, path)


def make_teacher(
    folder: Path, name: str, docs: DocTexts, tokenizer: transformers.PreTrainedTokenizerFast, seed: int
) -> dict[str, Any]:
    """Train one teacher on the training rows of its libraries and save it; returns its figures on the held-out rows of them."""
    family, labels = TEACHERS[name]
    config = small_config(family, tokenizer)
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    model = random_model(transformers.AutoModelForSequenceClassification, config, seed)
    rows = [row for row in docs.train if docs.labels[row] in labels]
    recipe = Recipe(**asdict(TEACHER_RECIPE) | {"seed": seed})
    fine_tune(
        model,
        tokenizer,
        [docs.texts[row] for row in rows],
        [labels.index(docs.labels[row]) for row in rows],
        recipe,
        f"teacher {name} ({family}: {', '.join(labels)})",
    )
    record = {"version": __version__, "recipe": asdict(recipe), "labels": labels, "texts": {"count": len(rows)}}
    save_classifier(model, tokenizer, labels, folder, record)
    return record


def prepare(workdir: str | Path, config: DemoConfig) -> Prepared:
    """Make texts, tokenizer, three teachers and a random student encoder in `workdir`, or reuse them where they are whole.

    config: seed and limit count (output and overwrite do not).

    Raises:
        UserError: `workdir` holds other files, or a demo made with another seed, limit or version.
    """
    workdir = Path(workdir).expanduser()
    material = workdir / "material"
    prepared = Prepared(
        teachers=[str(material / "teachers" / name) for name in TEACHERS],
        student=str(material / "encoder"),
        texts=str(material / "texts.jsonl"),
        texts_labelled=str(material / "texts_labelled.jsonl"),
        eval=str(material / "held_out.jsonl"),
    )
    identity = {"version": __version__, "seed": config.seed, "limit": config.limit}
    if _is_whole(workdir, material, identity):
        log.info("teachers and texts of %s are used again", material)
        return prepared
    shutil.rmtree(material, ignore_errors=True)  # what a killed demo left
    material.mkdir(parents=True)
    log.info("texts: docstrings of %s", ", ".join(LIBRARIES))
    per_class = TEXTS_PER_LIBRARY if config.limit is None else -(-config.limit // len(LIBRARIES))
    docs = collect(per_class, config.seed)
    log.info("%d texts of %d libraries, %d of them held out", len(docs.texts), len(docs.names), len(docs.test))
    write_rows(Path(prepared.texts), docs, docs.train, labelled=False)
    write_rows(Path(prepared.texts_labelled), docs, docs.train, labelled=True)
    write_rows(Path(prepared.eval), docs, docs.test, labelled=True)
    tokenizer = train_tokenizer([docs.texts[row] for row in docs.train])
    encoder = random_model(transformers.AutoModel, small_config("modernbert", tokenizer), config.seed)
    encoder.save_pretrained(prepared.student)
    tokenizer.save_pretrained(prepared.student)
    for number, (name, folder) in enumerate(zip(TEACHERS, prepared.teachers, strict=True)):
        make_teacher(Path(folder), name, docs, tokenizer, config.seed + number)
    (material / (MARKER + ".partial")).write_text(json.dumps(identity), encoding="utf-8")
    os.replace(material / (MARKER + ".partial"), material / MARKER)
    return prepared


def _is_whole(workdir: Path, material: Path, identity: dict[str, Any]) -> bool:
    """Whether the material is there and made with this identity. Raises UserError where something else is."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--output {workdir}: this is a file; name a folder")
    if workdir.is_dir() and any(workdir.iterdir()) and not material.is_dir():
        raise UserError(f"--output {workdir}: holds files that no demo wrote; name a new or empty folder")
    if not (material / MARKER).is_file():
        return False
    found = json.loads((material / MARKER).read_text(encoding="utf-8"))
    differing = ", ".join(
        f"{key} {found.get(key)} (now {value})" for key, value in identity.items() if found.get(key) != value
    )
    if differing:
        raise UserError(
            f"--output {workdir}: holds a demo with {differing}; replace it with --overwrite or name another folder"
        )
    return True


# ---- runs and figures ----


def held_out_figures(
    name: str, sup: Supervision, space: LabelSpace, labels: list[str]
) -> tuple[float | None, float | None]:
    """Target accuracy and teacher-selection accuracy of one row's method on the held-out texts."""
    options, _ = RUNS[name]
    if options["method"] == "supervised":
        return None, None
    method = build_method(RunConfig(**options), sup, space, labels)
    return target_accuracy(method, labels, space), selection_accuracy(method, labels, space)


def teacher_rows(prepared: Prepared, held_out: TextSet) -> list[tuple[str, float, float]]:
    """Per teacher: name with its labels, accuracy on the held-out texts of its own labels, and on all held-out texts."""
    rows = []
    for path in prepared.teachers:
        model, tokenizer, labels = load_model(path)
        figures = measure(model, tokenizer, held_out, labels, MAX_LENGTH)
        name = Path(path).name
        title = f"teacher {name} ({TEACHERS[name][0]})"
        rows.append((title, figures["accuracy"], figures["accuracy"] * figures["num_texts"] / len(held_out)))
    return rows


def run_all(config: DemoConfig, prepared: Prepared) -> "Table":
    """Amalgamate by every method over one store, and put all figures into a table."""
    from rich.table import Table

    from muka_fast.train import amalgamate

    output = Path(config.output).expanduser()
    common = {"teachers": prepared.teachers, "student": prepared.student, "seed": config.seed, "eval": prepared.eval}
    held_out = read_texts(prepared.eval, need_labels=True)
    rows = teacher_rows(prepared, held_out)
    scoring = RunConfig(teachers=prepared.teachers, seed=config.seed, max_length=MAX_LENGTH)
    sup = fill_store(output / "supervision_held_out", prepared.teachers, held_out, scoring)
    space = build_label_space([(teacher["name"], teacher["labels"]) for teacher in sup.teachers])

    table = Table(
        title=f"accuracy in % on {len(held_out)} held-out texts, {space.num_classes} labels", title_justify="left"
    )
    table.add_column("")
    for title in ("own labels", "all labels", "target", "selection"):
        table.add_column(title, justify="right")
    for title, own, everything in rows:
        table.add_row(title, percent(own), percent(everything), "", "")
    table.add_row(
        "vote (concatenated logits)", "", percent(vote_accuracy(sup, held_out.labels, space)), "", "", end_section=True
    )
    for name, (options, labelled) in RUNS.items():
        log.info("student by %s", name)
        folder = output / "students" / name.replace(" + ", "-").replace(" ", "-")
        result = amalgamate(
            **common,
            **STUDENT_OPTIONS,
            **options,
            texts=prepared.texts_labelled if labelled else prepared.texts,
            store=str(output / "supervision"),
            output=str(folder),
            resume=folder.exists(),
        )
        if result.stopped:
            raise KeyboardInterrupt
        target, selection = held_out_figures(name, sup, space, held_out.labels)
        title = f"{name} (sees labels)" if labelled else name
        table.add_row(title, "", percent(result.metrics["student"]["accuracy"]), percent(target), percent(selection))
        if name == SHOWN:
            table.add_section()
            shown = folder
    show(table, shown, held_out, space)
    return table


def percent(value: float | None) -> str:
    """0.7312 -> 73.1; nothing for None."""
    return "" if value is None else f"{100 * value:.1f}"


def show(table: "Table", folder: Path, held_out: TextSet, space: LabelSpace) -> None:
    """Print the table, what it means, and three held-out sentences through plain transformers."""
    from rich.console import Console

    out = Console(highlight=False)
    out.print(table)
    out.print(
        "own labels: held-out texts whose library the teacher knows. target: the composed teacher answer is right. "
        "selection: the chosen teacher knows the text's library. Students saw the teachers' training texts, without labels "
        "unless marked. All models are tiny and trained from scratch here: compare rows, not levels."
    )
    out.print(f'\ntransformers.pipeline("text-classification", "{folder}"):', soft_wrap=True)
    classify = transformers.pipeline("text-classification", str(folder), device="cpu")
    for teacher in range(len(space.teacher_names)):
        # The first held-out text that only this teacher knows: not chosen for a good answer.
        row = next(i for i, label in enumerate(held_out.labels) if space.owners(label) == [teacher])
        text, answer = held_out.texts[row], classify(held_out.texts[row], truncation=True)[0]
        cut = text if len(text) <= 90 else text[:87] + "..."
        out.print(f"  {cut}", markup=False)
        out.print(f"    -> {answer['label']} ({answer['score']:.2f}), truly {held_out.labels[row]}", markup=False)


# ---- the command ----


def clear(output: Path) -> None:
    """Remove an earlier demo, whole or not; nothing else. Raises UserError for a folder that no demo wrote."""
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / "material").is_dir():
        raise UserError(f"--output {output}: holds files that no demo wrote; name a new or empty folder")
    aside = output.with_name(f".{output.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(output, aside)
    shutil.rmtree(aside)


def main(config: DemoConfig) -> int:
    """`muka-fast demo`: prepare, amalgamate, show. A killed demo continues where it stopped."""
    from muka_fast.engine import quiet_deepspeed, resolve_device, shut_down

    start = time.monotonic()
    quiet_deepspeed(resolve_device("auto"), config.verbose)
    # Such small models gain little from a second thread, lose much to one on a busy machine, and give the same table everywhere.
    torch.set_num_threads(1)
    output = Path(config.output).expanduser()
    if config.overwrite and output.is_dir():
        clear(output)
    prepared = prepare(output, config)
    try:
        run_all(config, prepared)
    finally:
        shut_down()
    log.info("demo in %s: %.0f s", output, time.monotonic() - start)
    return 0
