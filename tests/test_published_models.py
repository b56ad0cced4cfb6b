"""Models as they are published: padding ids that differ, code of their own beside transformers', vocabularies of other names, the
hub's cache; what is made of them is what transformers reads back."""

import json
import threading
import time

import datasets
import pytest
import sentencepiece
import torch
import transformers
from conftest import TEXTS
from huggingface_hub import HfApi, errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from teacher_folders import edit_config, refusal
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from muka_fast import checkpoint, neutral, plan, teachers
from muka_fast.caller import caller_undisturbed
from muka_fast.config import PlanConfig
from muka_fast.data import read_texts, tokenize
from muka_fast.errors import UserError
from muka_fast.evaluate import predict
from muka_fast.export import Card, clean_tokenizer, save_student
from muka_fast.student import load_student
from muka_fast.teachers import teacher_names
from muka_fast.tokenizer import position_limit, settle_tokenizer, token_limit

ZERO_0 = {"zero_optimization": {"stage": 0}}
OWN_CODE = {"AutoConfig": "theirs.Config", "AutoModelForSequenceClassification": "theirs.Model"}


def edit_tokenizer(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "mpnet", "bert", "llama"])
@pytest.mark.parametrize("pad_id", [0, 1, 5])
def test_a_student_is_read_back_as_it_was_trained(make_teacher, tmp_path, texts, family, pad_id):
    """RoBERTa's kin count positions from the padding id that they were built with, which need not be their tokenizer's."""
    folder = make_teacher(family, hidden=32)
    edit_config(folder, pad_token_id=pad_id)
    model, tokenizer = load_student(folder, ["a", "b", "c"], 0, ZERO_0)
    model.eval()
    tokens = tokenizer(texts[:6], padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        trained = model(**tokens).logits
        save_student(model, tokenizer, tmp_path / "out", ["a", "b", "c"], Card("x"))
        back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(back(**tokens).logits, trained)
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"))
    assert len(classify(["word " * 2000], truncation=True)) == 1  # the length limit that is written is the model's


@pytest.mark.parametrize(("family", "pad_id"), [("mpnet", None), ("mpnet", -1), ("roberta", -1)])
def test_a_padding_id_that_is_none_gives_way_to_the_tokenizers(make_teacher, family, pad_id):
    folder = make_teacher(family)
    edit_config(folder, pad_token_id=pad_id)
    model, tokenizer = load_student(folder, ["a", "b"], 0, ZERO_0)
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_a_negative_padding_id_is_none(make_teacher, caplog):
    folder = make_teacher("llama", pad_token_id=None)
    edit_config(folder, pad_token_id=-1)
    edit_tokenizer(folder, pad_token=None)
    teacher = teachers.load_teacher(folder, run_seed=0)
    assert teacher.pad_id == teacher.tokenizer.eos_token_id and "no padding token" in caplog.text


def test_the_padding_token_that_the_configuration_names_is_taken(make_tokenizer, make_model, product_log):
    tokenizer, model = make_tokenizer("llama"), make_model("llama", pad_token_id=2)
    tokenizer.pad_token = None
    settle_tokenizer(model, tokenizer, "teacher x")
    assert tokenizer.pad_token_id == model.config.pad_token_id == 2 and product_log.text == ""


def test_a_tokenizer_that_reads_no_special_tokens_in_texts_stays_so(make_tokenizer, make_model):
    tokenizer = make_tokenizer("roberta")
    tokenizer.split_special_tokens = True
    settle_tokenizer(make_model("roberta"), tokenizer, "teacher x")
    assert tokenizer.split_special_tokens and tokenizer.init_kwargs["split_special_tokens"]


def test_code_of_their_own_beside_transformers_is_left_alone(make_teacher, tmp_path, texts, caplog):
    folder = make_teacher()
    plain = teachers.load_teacher(folder, run_seed=0)
    (folder / "theirs.py").write_text("raise SystemExit('ran')")
    edit_config(folder, auto_map=OWN_CODE)
    edit_tokenizer(folder, auto_map={"AutoTokenizer": ["theirs.Tokenizer", None]})
    teachers.check_teachers([folder])
    assert "its own code (auto_map) is not run" in caplog.text
    teacher = teachers.load_teacher(folder, run_seed=0)
    tokens = teacher.tokenizer(texts[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(teacher.model(**tokens).logits, plain.model(**tokens).logits)
    model, tokenizer = load_student(folder, ["a", "b", "c"], 0, ZERO_0)
    save_student(model, tokenizer, tmp_path / "out", ["a", "b", "c"], Card("x"))
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "out" / name).read_text())
    assert teachers.load_teacher(tmp_path / "out", run_seed=0).labels == ["a", "b", "c"]


def test_a_vocabulary_by_the_name_of_deberta(make_teacher, tmp_path):
    folder = make_teacher("deberta-v2", vocab_size=300)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refusal(folder, "no tokenizer")
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(folder / "spm"), vocab_size=230, hard_vocab_limit=False, minloglevel=2,
        unk_id=1, bos_id=-1, eos_id=-1, pad_id=0, unk_piece="[UNK]", pad_piece="[PAD]", user_defined_symbols=["[CLS]", "[SEP]"],
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    assert len(teachers.load_teacher(folder, run_seed=0).tokenizer("card bank").input_ids) > 3


def test_a_tokenizer_of_characters_has_no_vocabulary(make_teacher):
    folder = make_teacher()
    (folder / "tokenizer.json").unlink()
    refusal(folder, "no tokenizer")
    edit_tokenizer(folder, tokenizer_class="CanineTokenizer")
    checkpoint.check_tokenizer_files(folder, "teacher x")


def test_what_only_a_pickle_of_the_hub_has(make_teacher, tmp_path):
    folder = make_teacher()
    cached = tmp_path / "models--org--news" / "snapshots" / ("0" * 40)
    cached.parent.mkdir(parents=True)
    folder.rename(cached)
    (cached / "model.safetensors").unlink()
    refusal(cached, "no safetensors weights in the hub's cache", "convert it once")


def test_names_in_the_hubs_cache(tmp_path):
    cached = [tmp_path / f"models--org--{name}" / "snapshots" / ("a" * 40) for name in ("news", "bank")]
    assert teacher_names(cached) == ["news", "bank"]
    other = tmp_path / "models--their--news" / "snapshots" / ("b" * 40)
    assert teacher_names([cached[0], other]) == ["org-news", "their-news"]
    revision = cached[0].with_name("c" * 40)
    assert teacher_names([cached[0], revision]) == [f"{'a' * 40}-org-news", f"{'c' * 40}-org-news"]
    assert teacher_names([tmp_path / "news" / "snapshots" / "x"]) == ["x"]


def test_of_a_hub_model_safetensors_and_texts_of_the_top_folder_are_fetched_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.append(options) or str(tmp_path))
    assert [checkpoint.resolve_folder("muka/fetched") for _ in range(2)] == [tmp_path] * 2
    (options,) = asked
    kept = ["config.json", "model.safetensors", "spiece.model", "vocab.txt", "chat_template.jinja"]
    there = [*kept, "onnx/config.json", "onnx/model.safetensors", "pytorch_model.bin", "modeling.py"]
    patterns = {name: options[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(there, **patterns)) == kept


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (errors.RepositoryNotFoundError, "the hub has no public model of this name"),
        (errors.LocalEntryNotFoundError, "the hub is out of reach"),
        (errors.HFValidationError, "the hub refused"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(kind, told, monkeypatch):
    def refuse(*_, **__):
        raise kind.__new__(kind)  # some want a response

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    refusal("muka/refused", "no such folder", told, "check the path")


def test_a_link_to_nowhere_that_nobody_needs(make_teacher):
    folder = make_teacher()
    (folder / "generation_config.json").symlink_to("../../blobs/gone")
    teachers.load_teacher(folder, run_seed=0)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/gone")
    refusal(folder, "no model.safetensors")


def test_a_label_without_a_name_is_refused(make_teacher):
    folder = make_teacher()
    edit_config(folder, id2label={"0": None, "1": "b"})
    refusal(folder, "label 0 has a blank name")


def unigram_t5(folder):
    """T5 whose vocabulary has "</s>" as a piece."""
    (folder / "corpus.txt").write_text("\n".join(TEXTS * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spiece"), vocab_size=230, hard_vocab_limit=False, minloglevel=2,
        unk_id=2, bos_id=-1, eos_id=1, pad_id=0,
    )  # fmt: skip
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_heads": 4, "num_layers": 2, "vocab_size": 400, "decoder_start_token_id": 0}
    model = transformers.T5ForSequenceClassification(transformers.T5Config(num_labels=3, id2label=dict(enumerate("abc")), **sizes))
    model.save_pretrained(folder)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def test_a_text_of_t5_with_its_end_token(tmp_path):
    model, tokenizer = unigram_t5(tmp_path)
    settle_tokenizer(model, tokenizer, "teacher x")
    assert tokenizer("was </s> dear").input_ids.count(1) == 2  # else there is nothing to test
    tokens = tokenize(tokenizer, ["was </s> dear </s> now", "plain"], 32)
    rows = [tokens.ids[start:stop].tolist() for start, stop in zip(tokens.offsets, tokens.offsets[1:], strict=False)]
    assert [row.count(1) for row in rows] == [1, 1] and rows[0][-1] == 1
    assert predict(model, tokens).shape == (2, 3)


def test_a_model_without_a_length_limit_names_none(tmp_path):
    model, tokenizer = unigram_t5(tmp_path)
    before = tokenizer.model_max_length
    assert clean_tokenizer(model, tokenizer).model_max_length == before > 10**9


def test_marks_of_the_text_are_read_by_the_pipeline_as_by_us(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("roberta")
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": len(tokenizer)}
    config = transformers.BartConfig(d_model=16, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes)
    model = transformers.BartForSequenceClassification(config)
    save_student(model, clean_tokenizer(model, tokenizer), tmp_path / "out", ["a", "b", "c"], Card("x"))
    text = "was <s>dear</s>, now cheap"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == clean_tokenizer(model, tokenizer)(text).input_ids


def test_big_birds_sparse_attention_is_the_full_one_of_its_short_texts(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes["vocab_size"] = len(tokenizer)
    config = transformers.BigBirdConfig(pad_token_id=tokenizer.pad_token_id, id2label=dict(enumerate("abc")), num_labels=3, **sizes)
    assert config.attention_type == "block_sparse"
    transformers.BigBirdForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    model = teachers.load_teacher(tmp_path, run_seed=0).model
    tokens = tokenizer(TEXTS[:4], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**tokens).logits, plain(**tokens).logits, rtol=1e-5, atol=1e-6)
    assert model.config.attention_type == "original_full"


def test_weights_that_an_encoder_lacks_are_told_and_the_same_every_time(tmp_path, make_model, make_tokenizer, caplog):
    """As of a model whose own code places its tokens without the table that transformers' class of this type has."""
    make_model("bert").base_model.save_pretrained(tmp_path)
    make_tokenizer("bert").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("embeddings.position_embeddings.weight", "pooler.dense.weight", "pooler.dense.bias"):
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = [neutral.load_encoder(tmp_path, make_tokenizer("bert"), "cpu", "fp32") for _ in range(2)]
    tables = [model.embeddings.position_embeddings.weight for model in loaded]
    assert torch.equal(*tables) and tables[0].std() > 0
    told = [record.message for record in caplog.records if "no weights" in record.message]
    assert len(told) == 2 and "embeddings.position_embeddings.weight" in told[0] and "pooler" not in told[0]
    caplog.clear()
    load_student(tmp_path, ["a", "b"], seed=0, ds_config=ZERO_0)
    [told] = [record for record in caplog.records if "starts with random weights" in record.message]
    assert told.levelname == "WARNING" and "embeddings.position_embeddings.weight" in told.message


def test_a_slice_of_a_hub_data_set_is_its_name():
    with pytest.raises(UserError, match=r"hub data set, split 'train\[:10\]'"):
        read_texts("no-such-org/no-such-set:train[:10]")


def test_a_name_that_no_hub_is_there_to_look_up(make_teacher):
    """In the words of every other command, and before texts are read."""
    teacher = str(make_teacher())
    known = {"num_texts": 5, "gpu": "h200"}
    told = "no such folder, and the hub is out of reach (offline?) with no cached copy here; check the path or the name"
    for given in ({"teachers": [teacher], "student": "muka/none"}, {"teachers": ["muka/none"], "student": teacher}):
        with pytest.raises(UserError) as caught:
            plan.plan(PlanConfig(**given, **known))
        assert str(caught.value) == f"{'student' if given['student'] == 'muka/none' else 'teacher'} muka/none: {told}"
    with pytest.raises(UserError, match=r"student muka/none: no such folder"):
        plan.plan(PlanConfig(teachers=[teacher], student="muka/none", texts="nowhere.txt", gpu="h200"))


def test_a_plan_fetches_the_configuration_alone(make_teacher, monkeypatch):
    asked, teacher = [], str(make_teacher())
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.append(options) or teacher)
    assert plan.read_model("muka/planned", "teacher")[1] == plan.read_model(teacher, "teacher")[1]
    [options] = asked
    there = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "onnx/config.json"]
    patterns = {name: options[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(there, **patterns)) == ["config.json"]


def test_a_plan_of_an_adapter_fetches_no_weights_of_its_base(make_teacher, monkeypatch, tmp_path):
    base, adapter, asked = make_teacher(), tmp_path / "adapter", {}
    adapter.mkdir()
    settings = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "muka/itsbase"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"base_model.model.classifier.weight": torch.zeros(3, 16)}, adapter / "adapter_model.safetensors")
    place = {"muka/adapter": str(adapter), "muka/itsbase": str(base)}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.update({name: options}) or place[name])
    config, _ = plan.read_model("muka/adapter", "teacher")
    assert config.hidden_size == 16 and asked.keys() == place.keys()
    assert list(filter_repo_objects(["config.json", "model.safetensors"], **{
        name: asked["muka/itsbase"][name] for name in ("allow_patterns", "ignore_patterns")
    })) == ["config.json"]  # fmt: skip


def no_network(*_, **__):
    raise LookupError("name or service not known")  # of whatever library asks


@pytest.fixture
def online(monkeypatch):
    """Settings of a machine that does not know whether it has a network; what is asked of the library `datasets`, offline or not."""
    asked = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    theirs = datasets.load_dataset
    note = lambda name, **options: asked.append(datasets.config.HF_HUB_OFFLINE) or theirs(name, **options)
    monkeypatch.setattr(datasets, "load_dataset", note)
    return asked


def test_a_data_set_of_a_hub_out_of_reach_is_asked_for_once(online, monkeypatch, caplog):
    monkeypatch.setattr(HfApi, "dataset_info", no_network)
    told = r"hub data set, split 'train': the hub is out of reach \(offline\?\) with no cached copy here; check the path or the name$"
    with pytest.raises(UserError, match=told):
        read_texts("owner/nothing")
    assert online == [True] and datasets.config.HF_HUB_OFFLINE is False
    assert "the hub is out of reach (name or service not known): a cached copy is taken, if there is one" in caplog.text


class ReadTimeout(Exception):
    """The name that libraries give it."""


@pytest.mark.parametrize("kind", [errors.RepositoryNotFoundError, errors.HFValidationError, ReadTimeout, None])
def test_a_hub_that_answers_is_asked_on(kind, online, monkeypatch):
    def answer(self, name, timeout):
        assert name == "owner/nothing" and timeout <= 10
        if kind:
            raise kind.__new__(kind)

    monkeypatch.setattr(HfApi, "dataset_info", answer)
    monkeypatch.setattr(HfApi, "hf_hub_download", lambda *_, **__: 1 / 0)
    with pytest.raises((UserError, ZeroDivisionError)):
        read_texts("owner/nothing")
    assert online == [False]


def test_a_cached_data_set_is_read_where_the_hub_is_out_of_reach(online, monkeypatch, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    datasets.load_dataset("json", data_files={"train": str(tmp_path / "train.jsonl")}, cache_dir=str(tmp_path / "made"))
    [made] = [file.parent for file in (tmp_path / "made").glob("*/*/*/*/dataset_info.json")]
    cached = tmp_path / "cache" / "owner___kept" / "default" / "0.0.0" / made.name
    cached.parent.mkdir(parents=True)
    made.rename(cached)
    (cached / "json-train.arrow").rename(cached / "kept-train.arrow")
    info = json.loads((cached / "dataset_info.json").read_text()) | {"config_name": "default"}
    (cached / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(HfApi, "dataset_info", no_network)
    assert read_texts("owner/kept").texts == ["one", "two"] and online[-1] is True
    with pytest.raises(UserError, match=r"split 'valid': .*valid"):
        read_texts("owner/kept:valid")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: pytest.fail("asked although it is switched off"))
    assert read_texts("owner/kept").texts == ["one", "two"]


def test_parquet_in_gzip_is_refused_by_its_name(tmp_path):
    (tmp_path / "x.parquet.gz").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="gunzip"):
        read_texts(tmp_path / "x.parquet.gz")


def test_runs_in_threads_take_turns():
    inside, most = [], []

    def run():
        with caller_undisturbed():
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    with caller_undisturbed(), caller_undisturbed():  # a run inside of a run: its own concern
        pass
    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def test_a_tokenizers_length_limit_counts_where_it_is_one(make_model, make_tokenizer):
    model, tokenizer = make_model(), make_tokenizer()
    for told, limit in ((7, 7), (0, position_limit(model)), (-1, position_limit(model)), (10**30, position_limit(model))):
        tokenizer.model_max_length = told
        assert token_limit(model, tokenizer) == limit


@pytest.mark.parametrize(("kind", "rows"), [("IBert", 66), ("Nystromformer", 64), ("Bert", 64)])
def test_positions_that_a_table_has_for_texts(kind, rows):
    """Of 66 rows RoBERTa's kin, I-BERT's table of its own class too, leave two out; Nystromformer has two more than it names."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = getattr(transformers, f"{kind}Config")(max_position_embeddings=rows, pad_token_id=1, **sizes)
    assert position_limit(getattr(transformers, f"{kind}ForSequenceClassification")(config)) == 64
