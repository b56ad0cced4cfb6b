"""The demo's material: real texts, a tokenizer, three small teachers of two architectures and a student encoder, made on the spot.

All models start from random weights, so they are tiny and far from what pretrained encoders reach.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from muka_fast import __version__
from muka_fast.config import LABELLED_METHODS, DemoConfig, RunConfig, load_config
from muka_fast.docstrings import LIBRARIES, DocTexts, collect
from muka_fast.errors import UserError
from muka_fast.files import write_json, write_text
from muka_fast.teach import Recipe, fine_tune, save_classifier

log = logging.getLogger("muka_fast")
BEGUN = ".begun-by-muka-fast-demo"  # written first: this folder is the demo's, and may be made anew
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


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside PyTorch: such small models gain little from a second one and lose much to it on a busy machine, and the
    table is the same whatever the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_tokenizer(texts: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE tokenizer of at most VOCABULARY pieces.

    Not WordPiece: its trainer numbers the pieces that continue a word in the order of a randomly seeded hash table, so that two
    trainings on the same texts differ.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
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
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
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
    """A JSON-lines file of texts."""
    fields = lambda row: {"text": docs.texts[row]} | ({"label": docs.labels[row]} if labelled else {})
    write_text(path, "".join(json.dumps(fields(row)) + "\n" for row in rows))


def make_teacher(
    folder: Path, name: str, docs: DocTexts, tokenizer: transformers.PreTrainedTokenizerFast, seed: int
) -> None:
    """Train one teacher on the training rows of its libraries and save it."""
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
    (material / BEGUN).touch()
    log.info("texts: docstrings of %s", ", ".join(LIBRARIES))
    per_class = TEXTS_PER_LIBRARY if config.limit is None else -(-config.limit // len(LIBRARIES))
    docs = collect(per_class, config.seed)
    log.info("%d texts of %d libraries, %d of them held out", len(docs.texts), len(docs.names), len(docs.test))
    write_rows(Path(prepared.texts), docs, docs.train, labelled=False)
    write_rows(Path(prepared.texts_labelled), docs, docs.train, labelled=True)
    write_rows(Path(prepared.eval), docs, docs.test, labelled=True)
    with one_thread():
        make_models(prepared, docs, config.seed)
    write_json(material / MARKER, identity)
    return prepared


def make_models(prepared: Prepared, docs: DocTexts, seed: int) -> None:
    """The student's random encoder and the teachers, all with one tokenizer."""
    tokenizer = train_tokenizer([docs.texts[row] for row in docs.train])
    encoder = random_model(transformers.AutoModel, small_config("modernbert", tokenizer), seed)
    encoder.save_pretrained(prepared.student)
    tokenizer.save_pretrained(prepared.student)
    for number, (name, folder) in enumerate(zip(TEACHERS, prepared.teachers, strict=True)):
        make_teacher(Path(folder), name, docs, tokenizer, seed + number)


def is_ours(workdir: Path) -> bool:
    """Whether a demo made this folder: only then may anything in it be replaced."""
    return (workdir / "material" / BEGUN).is_file()


def _is_whole(workdir: Path, material: Path, identity: dict[str, Any]) -> bool:
    """Whether the material is there and made with this identity. Raises UserError where something else is."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--output {workdir}: this is a file; name a folder")
    if workdir.is_dir() and any(workdir.iterdir()) and not is_ours(workdir):
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


def fill_in(config: RunConfig) -> RunConfig:
    """What `train.py` runs when neither teachers nor texts are named: a run over the demo's material, which is made where missing.

    Options that were given stay; the others take the demo's values where it has its own. Without --output: runs/demo/student.

    Raises:
        UserError: as `prepare`; a --limit that is too small for a demo.
    """
    output = config.output or "runs/demo/student"
    workdir = f"{config.output}-material" if config.output else "runs/demo"
    prepared = prepare(workdir, load_config(DemoConfig, None, {"seed": config.seed, "limit": config.limit}))
    values = {
        "teachers": prepared.teachers,
        "texts": prepared.texts_labelled if config.method in LABELLED_METHODS else prepared.texts,
        "student": config.student or prepared.student,
        "output": output,
        "limit": None,
    }
    wished = {"eval": prepared.eval, **STUDENT_OPTIONS}
    values |= {name: value for name, value in wished.items() if name not in config.model_fields_set}
    return config.model_copy(update=values)
