"""Fixtures of the whole suite: tiny random classifiers of every family with real tokenizers, and real-looking texts.

Nothing is imported from here (`--import-mode=importlib`): ask for the fixtures `family`, `encoder_family` and
`decoder_family` (parametrised names), `make_model`, `make_tokenizer`, `make_teacher`, `texts`, `interpreter`.
"""

import copy
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Before torch: one thread per test process, and no test ever reaches a network.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HOME"] = os.path.join(tempfile.gettempdir(), "muka_fast_tests_hf")

import pytest
import torch
import transformers
from hypothesis import settings
from runs import go, python_hears_ctrl_c, stop_at, world  # noqa: F401, fixtures
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from muka_fast.data import read_texts

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# Shared, slow cores: an example's wall time says nothing.
settings.register_profile("muka_fast", deadline=None, print_blob=True)
settings.load_profile("muka_fast")

TEXTS = (
    "The central bank raised interest rates by half a point on Thursday.",
    "Shares of the carmaker fell after it cut its profit forecast for the year.",
    "A startup that sells accounting software has raised forty million dollars.",
    "Oil prices climbed as exporters agreed to limit production until March.",
    "The striker scored twice in the second half to win the cup final.",
    "She broke the national record over 400 metres at the indoor championships.",
    "The coach said his goalkeeper would miss the match with a knee injury.",
    "Rain stopped play on the third day of the test match at Lord's.",
    "Astronomers have found water vapour in the air of a planet 120 light years away.",
    "The vaccine produced antibodies in nine out of ten volunteers, a trial showed.",
    "Researchers trained a neural network to predict how proteins fold.",
    "A fossil found in the desert may be the oldest known relative of birds.",
    "How do I reset the PIN of my debit card?",
    "Why was my transfer declined when there is enough money in the account?",
    "I would like to change the address on my statement, please.",
    "My card arrived damaged; can you send me a new one?",
    "What is the exchange rate if I pay in euros?",
    "Is there a fee for taking out cash abroad?",
    "Set an alarm for half past six tomorrow morning.",
    "Remind me to call the dentist on Monday at 9am.",
    "Play some quiet jazz in the kitchen.",
    "Turn down the heating in the bedroom to 18 degrees.",
    "What's the weather going to be like in Lisbon this weekend?",
    "Book a table for four at an Italian restaurant near the station.",
    "The film is slow, but the last twenty minutes are worth the wait.",
    "A dull plot, wooden acting and jokes that were old ten years ago.",
    "I laughed out loud; easily the best comedy of the summer.",
    "The soundtrack alone is reason enough to see it again.",
    "Who wrote the novel on which the opera is based?",
    "How many moons does Jupiter have?",
    "When did the first railway between the two cities open?",
    "What is the capital of Mongolia?",
    "Parliament voted on Tuesday to lower the voting age to sixteen.",
    "The minister resigned after questions about his expenses.",
    "Thousands marched through the capital to protest against the new law.",
    "Negotiators left the climate talks without an agreement.",
    "Add two eggs, a pinch of salt and 200 g of flour, then stir until smooth.",
    "Bake at 180 °C for forty minutes or until the top is golden brown.",
    "Café owners in Zürich and Málaga say tourists spend less this year.",
    "naïve résumé — “quoted”, ellipsis… and an emoji 🙂",
    "OK",
    "yes!",
    "404",
    "http://example.org/a?b=c&d=%20",
    "for (i = 0; i < n; ++i) total += price[i] * count[i];",
    "The quick brown fox jumps over the lazy dog. " * 4,
    "In the end, what matters is not how often the model is right when it is sure of itself, but how sure of itself it "
    "is when it is right, and whether anybody who reads its scores can tell the one case from the other.",
)

ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert", "mpnet", "deberta-v2", "modernbert")
DECODERS = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = ENCODERS + DECODERS
MAX_LENGTH = 256

# family -> config class, model class
CLASSES = {
    "bert": ("BertConfig", "BertForSequenceClassification"),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification"),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForSequenceClassification"),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification"),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification"),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification"),
    "mpnet": ("MPNetConfig", "MPNetForSequenceClassification"),
    "deberta-v2": ("DebertaV2Config", "DebertaV2ForSequenceClassification"),
    "modernbert": ("ModernBertConfig", "ModernBertForSequenceClassification"),
    "llama": ("LlamaConfig", "LlamaForSequenceClassification"),
    "mistral": ("MistralConfig", "MistralForSequenceClassification"),
    "qwen2": ("Qwen2Config", "Qwen2ForSequenceClassification"),
    "qwen3": ("Qwen3Config", "Qwen3ForSequenceClassification"),
}
DROPOUT_NAMES = {
    "distilbert": ("dropout", "attention_dropout", "seq_classif_dropout"),
    "albert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"),
    "mpnet": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "deberta-v2": ("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout"),
    "modernbert": ("embedding_dropout", "mlp_dropout", "attention_dropout", "classifier_dropout"),
    **dict.fromkeys(DECODERS, ("attention_dropout",)),
}
# names of every dropout probability in the config, where they are not these
BERT_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def model_config(family: str, hidden: int, layers: int, dropout: float) -> dict:
    """The keyword arguments of the family's config class, all but vocabulary, special tokens and labels."""
    # std 1/sqrt(hidden): unlike the usual 0.02, it makes random models tell texts apart.
    common = {"initializer_range": hidden**-0.5, **dict.fromkeys(DROPOUT_NAMES.get(family, BERT_DROPOUT), dropout)}
    if family == "distilbert":
        return {"dim": hidden, "n_layers": layers, "n_heads": 4, "hidden_dim": 2 * hidden, **common}
    common |= {"hidden_size": hidden, "intermediate_size": 2 * hidden}
    common |= {"num_hidden_layers": layers, "num_attention_heads": 4}
    if family in DECODERS:
        return {"num_key_value_heads": 2, "head_dim": hidden // 4, "max_position_embeddings": 2 * MAX_LENGTH, **common}
    extra = {
        "roberta": {"type_vocab_size": 1},
        "xlm-roberta": {"type_vocab_size": 1},
        "electra": {"embedding_size": hidden // 2},
        "albert": {"embedding_size": hidden // 2},
        "deberta-v2": {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "type_vocab_size": 0,
            "pooler_hidden_size": hidden,
        },
        "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 16},
    }
    # RoBERTa and MPNet count positions from pad_id + 1.
    return {"max_position_embeddings": MAX_LENGTH + 8, **common, **extra.get(family, {})}


def word_tokenizer(model_name: str, cls: str, sep: str, special: list[str], unk: str, prefix: str = "##") -> Tokenizer:
    """A WordPiece or Unigram tokenizer trained on TEXTS that wraps a text in `cls` ... `sep`."""
    if model_name == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=unk, continuing_subword_prefix=prefix))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix=prefix)
        trainer = trainers.WordPieceTrainer(vocab_size=240, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=240, special_tokens=special, unk_token=unk, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    pair = [(cls, tokenizer.token_to_id(cls)), (sep, tokenizer.token_to_id(sep))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1", special_tokens=pair
    )
    return tokenizer


def byte_tokenizer(special: list[str], wrap: tuple[str, str] | None, first: str | None = None) -> Tokenizer:
    """A byte-level BPE tokenizer trained on TEXTS; `wrap` = (cls, sep) around the text, `first` = a token before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=320, **options)
    tokenizer.train_from_iterator(TEXTS, trainer)
    names = wrap or ((first,) if first else ())
    if names:
        single = f"{wrap[0]} $A {wrap[1]}" if wrap else f"{first} $A"
        ids = [(name, tokenizer.token_to_id(name)) for name in names]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def build_tokenizer(family: str) -> transformers.PreTrainedTokenizerFast:
    """A real fast tokenizer in the family's manner: model, special tokens, template, padding token."""
    bert = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    fairseq = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    fairseq |= {"unk_token": "<unk>", "mask_token": "<mask>"}
    inputs = ["input_ids", "attention_mask"]
    if family in ("bert", "electra", "distilbert"):
        tokens = bert
        tokenizer = word_tokenizer("wordpiece", "[CLS]", "[SEP]", list(bert.values()), "[UNK]")
        inputs = inputs if family == "distilbert" else ["input_ids", "token_type_ids", "attention_mask"]
    elif family in ("albert", "deberta-v2"):
        tokens = bert
        tokenizer = word_tokenizer("unigram", "[CLS]", "[SEP]", list(bert.values()), "[UNK]")
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
    elif family == "mpnet":
        tokens = fairseq
        tokenizer = word_tokenizer("wordpiece", "<s>", "</s>", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<unk>")
    elif family == "xlm-roberta":
        tokens = fairseq
        tokenizer = word_tokenizer("unigram", "<s>", "</s>", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<unk>")
    elif family == "roberta":
        tokens = fairseq
        tokenizer = byte_tokenizer(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], ("<s>", "</s>"))
    elif family == "modernbert":
        tokens = bert
        tokenizer = byte_tokenizer(list(bert.values()), ("[CLS]", "[SEP]"))
    elif family == "llama":
        tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
        tokenizer = byte_tokenizer(list(tokens.values()), None, first="<|begin_of_text|>")
    else:
        tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        tokenizer = byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None)
    options = {"model_max_length": MAX_LENGTH, "padding_side": "right", "model_input_names": inputs, **tokens}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def build_model(family, labels, tokenizer, *, seed=0, hidden=16, layers=2, dropout=0.1, **overrides):
    """A random classifier of `family` in eval mode; `overrides` go to its config.

    Biases and norms are random too: zeros and ones would hide faults.
    """
    config_class, model_class = (getattr(transformers, name) for name in CLASSES[family])
    special = {"pad_token_id": tokenizer.pad_token_id}
    for token in ("bos", "eos"):
        special[f"{token}_token_id"] = getattr(tokenizer, f"{token}_token_id")
    if family == "modernbert":
        special |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    options = model_config(family, hidden, layers, dropout) | {"vocab_size": len(tokenizer)} | special | overrides
    labels = list(labels)
    config = config_class(
        id2label=dict(enumerate(labels)), label2id={name: index for index, name in enumerate(labels)}, **options
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def pool(tmp_path, texts):
    """Eleven texts, read from a file whose first row is blank."""
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *texts[:11]]))
    return read_texts(path)


@pytest.fixture
def product_log(caplog, monkeypatch):
    """caplog, also after another test has set up the console."""
    monkeypatch.setattr(logging.getLogger("muka_fast"), "propagate", True)
    caplog.set_level(logging.INFO, "muka_fast")
    return caplog


@pytest.fixture
def disk(monkeypatch):
    """What the disk is asked, in order: ("fsync", name) to confirm a file or folder, ("replace", name) to give it this name."""
    asked, fsync, replace = [], os.fsync, os.replace
    name_of = lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))
    monkeypatch.setattr(os, "fsync", lambda handle: asked.append(("fsync", name_of(handle))) or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda old, new: asked.append(("replace", os.path.basename(new))) or replace(old, new))
    return asked


@pytest.fixture(autouse=True)
def seeded():
    """A test that passed passes again."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def restored_linear(monkeypatch):
    """ZeRO-3 replaces it for the rest of the process."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)


@pytest.fixture(autouse=True)
def restored_logging():
    """Commands run in-process rewire the logger of muka_fast; the next test gets it as it was (caplog needs it)."""
    log = logging.getLogger("muka_fast")
    handlers, propagate, level = log.handlers[:], log.propagate, log.level
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Every supported architecture in turn."""
    return request.param


@pytest.fixture(params=ENCODERS)
def encoder_family(request) -> str:
    """Every supported encoder in turn."""
    return request.param


@pytest.fixture(params=DECODERS)
def decoder_family(request) -> str:
    """Every supported decoder in turn."""
    return request.param


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """47 real-looking texts: questions, commands, news, code, an emoji, one word, one long one."""
    return list(TEXTS)


@pytest.fixture(scope="session")
def make_tokenizer():
    """make_tokenizer(family) -> a fresh PreTrainedTokenizerFast with the family's special tokens, padding included."""
    trained = {}

    def make(family: str = "bert"):
        if family not in trained:
            trained[family] = build_tokenizer(family)
        return copy.deepcopy(trained[family])

    return make


@pytest.fixture(scope="session")
def make_model(make_tokenizer):
    """make_model(family, labels, seed=0, hidden=16, layers=2, dropout=0.1, **config) -> a fresh random classifier."""

    def make(family: str = "bert", labels=("negative", "positive"), *, tokenizer=None, **options):
        return build_model(family, labels, tokenizer or make_tokenizer(family), **options)

    return make


@pytest.fixture
def make_teacher(tmp_path, make_model, make_tokenizer):
    """make_teacher(family, labels, name=None, **make_model options) -> Path of a saved folder under tmp_path.

    The folder holds config.json, model.safetensors and the tokenizer, as `save_pretrained` writes them.
    """

    def make(family: str = "bert", labels=("negative", "positive"), *, name: str | None = None, **options):
        folder = tmp_path / (name or f"{family}{len(list(tmp_path.iterdir()))}")
        tokenizer = options.setdefault("tokenizer", make_tokenizer(family))
        make_model(family, labels, **options).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def interpreter():
    """run(file, keyword): the tests of `file` that match `keyword`, every op in Triton's interpreter, in a process of its own.

    TRITON_INTERPRET replaces triton.jit at import and so cannot be set in this process.
    """

    def run(file, keyword):
        pytest.importorskip("triton", reason="Triton is not on this platform")
        env = os.environ | {"TRITON_INTERPRET": "1", "MUKA_FAST_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", str(file), "-k", keyword, "-q", "-x", "-p", "no:cacheprovider"]
        command += ["--confcutdir", str(Path(file).parent)]
        result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
        assert " passed" in result.stdout, result.stdout[-500:]

    return run


def pytest_terminal_summary(terminalreporter):
    """Registers, spills and shared memory of every Triton kernel compiled in this run (tests/ops/test_aot.py)."""
    passed = terminalreporter.getreports("passed")
    lines = [value for report in passed for name, value in report.user_properties if name == "resources"]
    if lines:
        terminalreporter.section("Triton kernels")
        terminalreporter.write_line("\n".join(sorted(set(lines))))
