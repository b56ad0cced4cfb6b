"""Material for a machine without data and weights: installed docstrings as texts, encoders and teachers with random weights.

Speed and memory do not depend on what the weights are; accuracies of such teachers mean nothing and are not reported.
"""

import json
import random
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
)

from muka_fast.data import read_texts
from muka_fast.docstrings import collect
from muka_fast.errors import UserError
from muka_fast.intercept import layer_modules
from muka_fast.material import train_tokenizer
from muka_fast.sites import Site, active_sites

# hidden size, layers, heads: "base" is BERT-base, "toy" proves a script; "1b" has the shape of a decoder of a billion parameters.
SIZES = {"toy": (32, 3, 4), "small": (384, 6, 12), "base": (768, 12, 12)}
DECODERS = {"1b": (2048, 20, 32)}


def make_texts(folder: Path, count: int) -> tuple[str, str]:
    """Paths of `count` labelled texts for pool and evaluation, in random order; beyond the docstrings there are, two joined.

    Made once: files that hold at least as many lines stay.
    """
    paths = [str(folder / f"{name}.jsonl") for name in ("pool", "eval")]
    if all(Path(path).exists() and len(Path(path).read_text().splitlines()) >= count for path in paths):
        return paths[0], paths[1]
    docs, random_numbers = collect(), random.Random(0)
    for path, rows in zip(paths, (docs.train, docs.test), strict=True):
        rows = list(rows)
        random_numbers.shuffle(rows)
        texts = [docs.texts[row] for row in rows]
        texts += [" ".join(random_numbers.sample(texts, 2)) for _ in range(len(texts), count)]
        lines = [json.dumps({"text": text, "label": docs.labels[rows[i % len(rows)]]}) + "\n" for i, text in enumerate(texts[:count])]
        Path(path).write_text("".join(lines), encoding="utf-8")
    return paths[0], paths[1]


def shape_of(size: str, vocab_size: int) -> dict[str, int]:
    """Configuration of a model of this size, as BERT and Llama call it."""
    hidden, layers, heads = (SIZES | DECODERS)[size]
    shape = {"vocab_size": vocab_size, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return shape | {"intermediate_size": 4 * hidden}


def make_encoder(folder: Path, size: str, texts: list[str]) -> str:
    """A BERT encoder folder (or a Llama decoder's) with random weights and a tokenizer trained on the texts."""
    tokenizer = train_tokenizer(texts)
    tokenizer.model_max_length = 512  # of BERT; a demo's texts are shorter
    shape = shape_of(size, len(tokenizer)) | {"pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a CPU draws a billion numbers in a minute
        model = LlamaModel(LlamaConfig(**shape, num_key_value_heads=8)) if size in DECODERS else BertModel(BertConfig(**shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def made_encoder(folder: Path, size: str, count: int) -> Path:
    """A folder in `folder` for what this size and number of texts have: pool.jsonl, the first of the texts in `folder`, and encoder.

    Made once, and again for another size or number.
    """
    own = folder / f"{size}_{count}"
    if not (own / "encoder").is_dir():
        own.mkdir(parents=True, exist_ok=True)
        lines = Path(make_texts(folder, count)[0]).read_text(encoding="utf-8").splitlines(keepends=True)
        (own / "pool.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
        aside = make_encoder(own / "encoder.part", size, read_texts(own / "pool.jsonl").texts)
        Path(aside).rename(own / "encoder")
    return own


def check_scopes(scopes: list[str], size: str) -> None:
    """Before a model of this size is made: raises UserError for a scope that none has."""
    layers = [*range((SIZES | DECODERS)[size][1]), "head"]
    sites = [Site(index, "", 0, "activation", 0.1, layer, 3) for index, layer in enumerate(layers)]
    for scope in scopes:
        try:
            active_sites(sites, scope, f"a teacher of --size {size}")
        except UserError as error:
            raise UserError(str(error).replace("--mc_scope", "--scopes")) from None


def make_teacher(folder: Path, encoder: str, labels: list[str], seed: int, own_layers: int) -> str:
    """A teacher whose head and last `own_layers` layers are random by `seed`, the rest the encoder's."""
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=len(labels), **names)
    for layer in layer_modules(model)[-own_layers:]:
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return str(folder)
