"""Teachers as they come: every family loads as transformers loads it, and every fault is one line that names the teacher."""

import itertools
import json
import logging
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import BartConfig, BartForSequenceClassification

from muka_fast import checkpoint, teachers
from muka_fast.data import tokenize, tokenizer_key
from muka_fast.errors import UserError
from muka_fast.evaluate import predict
from muka_fast.student import load_student

HTML = "was <s>dear</s>, now cheap"  # struck out in HTML, the marks of a text's ends in many tokenizers


def edit_config(folder, **changes):
    """Change entries of config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    file.write_text(json.dumps(config))


def edit_weights(folder, change):
    """Apply `change(tensors)` to model.safetensors in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refusal(path, *words):
    """The one-line UserError of loading `path`; every word must be in it, and the teacher's path."""
    with pytest.raises(UserError) as caught:
        teachers.load_teacher(path, run_seed=0)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    for word in words:
        assert word in line, line
    return line


def test_every_family_loads_as_transformers_loads_it(family, make_teacher, texts):
    folder = make_teacher(family, ["a", "b", "c"], seed=5)
    assert teachers.check_teachers([folder])[0].labels == ["a", "b", "c"]
    teacher = teachers.load_teacher(folder, run_seed=7)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokens = teacher.tokenizer(texts[:6], padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        assert torch.equal(teacher.model(**tokens).logits, plain(**tokens).logits)
    assert teacher.labels == ["a", "b", "c"]
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.float32}
    assert teacher.pad_id == teacher.tokenizer.pad_token_id == teacher.model.config.pad_token_id
    assert teacher.tokenizer.padding_side == "right"
    assert 0 <= teacher.seed < 2**64


def test_a_text_of_max_length_fits_and_the_limit_is_the_position_table(family, make_teacher):
    folder = make_teacher(family, max_position_embeddings=40)
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | {"model_max_length": 10**30}))
    teacher = teachers.load_teacher(folder, run_seed=0)
    assert teacher.max_length == {"roberta": 38, "xlm-roberta": 38, "mpnet": 38}.get(family, 40)
    ids = torch.full((1, teacher.max_length), 7)
    with torch.no_grad():
        assert teacher.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()


def test_weights_stored_in_half_precision_are_computed_in_float32(make_model, make_tokenizer, tmp_path):
    make_model("bert").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    make_tokenizer("bert").save_pretrained(tmp_path / "half")
    teacher = teachers.load_teacher(tmp_path / "half", run_seed=0)
    assert teacher.model.dtype == torch.float32
    assert teachers.load_teacher(tmp_path / "half", run_seed=0, dtype=torch.bfloat16).model.dtype == torch.bfloat16


# Names and fingerprints


def test_names_are_the_folders_and_unique():
    assert teachers.teacher_names(["runs/news", "runs/banking/"]) == ["news", "banking"]
    assert teachers.teacher_names(["a/best", "b/best", "c"]) == ["a-best", "b-best", "c"]
    assert teachers.teacher_names(["b/best", "a/best"]) == ["b-best", "a-best"]
    assert len(set(teachers.teacher_names(["x", "x", "y-x", "y/x"]))) == 4
    assert teachers.teacher_names(["org/model"]) == ["model"]


def test_fingerprint_ignores_place_shards_and_volatile_keys(make_model, make_tokenizer, tmp_path):
    model, tokenizer = make_model("bert", seed=1), make_tokenizer("bert")
    for name, size in (("one", "5GB"), ("many", "20KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        tokenizer.save_pretrained(tmp_path / name)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    edit_config(tmp_path / "many", transformers_version="0.0.0")
    one, many = (teachers.load_teacher(tmp_path / name, run_seed=0) for name in ("one", "many"))
    assert one.fingerprint == many.fingerprint
    assert one.seed == many.seed
    assert one.tokenizer_key == many.tokenizer_key


def test_fingerprint_sees_one_bit_of_a_weight_a_label_and_the_architecture(make_teacher):
    prints = [teachers.inspect(make_teacher("bert", seed=1, name="plain")).fingerprint]
    folder = make_teacher("bert", seed=1, name="bit")

    def flip(tensors):
        tensors["classifier.bias"].view(torch.int32)[0] ^= 1

    edit_weights(folder, flip)
    prints.append(teachers.inspect(folder).fingerprint)
    prints.append(teachers.inspect(make_teacher("bert", ["positive", "negative"], seed=1, name="label")).fingerprint)
    folder = make_teacher("bert", seed=1, name="config")
    edit_config(folder, hidden_act="relu")
    prints.append(teachers.inspect(folder).fingerprint)
    assert len(set(prints)) == 4


def test_fingerprint_notices_a_change_of_files_within_one_process(make_teacher):
    folder = make_teacher("bert")
    before = teachers.inspect(folder).fingerprint
    edit_weights(folder, lambda tensors: tensors["classifier.bias"].add_(1))
    assert teachers.inspect(folder).fingerprint != before


def test_seed_depends_on_run_seed_and_fingerprint_only():
    import hashlib

    digest = hashlib.sha256(b"3:abc").digest()
    assert teachers.teacher_seed(3, "abc") == int.from_bytes(digest[:8], "little")
    assert teachers.teacher_seed(4, "abc") != teachers.teacher_seed(3, "abc") != teachers.teacher_seed(3, "abd")


def test_tokenizer_key_is_about_behaviour(make_teacher, make_tokenizer):
    key = teachers.load_teacher(make_teacher("bert", seed=1), run_seed=0).tokenizer_key
    assert teachers.load_teacher(make_teacher("bert", seed=2), run_seed=1).tokenizer_key == key
    assert teachers.load_teacher(make_teacher("roberta"), run_seed=0).tokenizer_key != key
    used = make_tokenizer("bert")
    used(["a b c", "d"], padding=True, truncation=True, max_length=8)
    assert tokenizer_key(used, 256) == tokenizer_key(make_tokenizer("bert"), 256)
    used.add_tokens(["muka"])
    assert tokenizer_key(used, 256) != tokenizer_key(make_tokenizer("bert"), 256)


# The list of teachers


def test_no_teacher_is_refused():
    with pytest.raises(UserError, match=r"--teachers: no teacher"):
        teachers.check_teachers([])


def test_one_teacher_works_with_a_warning(make_teacher, caplog):
    folder = make_teacher("bert")
    with caplog.at_level(logging.WARNING, logger="muka_fast"):
        assert [files.folder for files in teachers.check_teachers([folder])] == [folder]
    assert "only one teacher" in caplog.text
    assert str(folder) in caplog.text


def test_the_same_teacher_twice_is_refused(make_teacher, tmp_path):
    folder = make_teacher("bert")
    with pytest.raises(UserError, match="given twice"):
        teachers.check_teachers([folder, f"{folder}/../{folder.name}"])
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(UserError, match="same model"):
        teachers.check_teachers([folder, tmp_path / "copy"])
    teachers.check_teachers([folder, make_teacher("bert", seed=9)])


def test_every_fault_shows_before_any_teacher_runs(make_teacher, make_tokenizer, caplog):
    sound = make_teacher("bert", seed=9, name="sound")
    headless = make_teacher("bert", name="headless")
    edit_weights(headless, lambda tensors: tensors.pop("classifier.weight"))
    labels = make_teacher("bert", name="labels")
    edit_config(labels, id2label={"0": "a", "1": "b", "2": "c"})
    vocabulary = make_teacher("bert", name="vocabulary")
    make_tokenizer("roberta").save_pretrained(vocabulary)
    for folder, word in ((headless, "classifier.weight"), (labels, "id2label"), (vocabulary, "embeds only")):
        with pytest.raises(UserError, match=word):
            teachers.check_teachers([sound, folder])
    edit_weights(sound, lambda tensors: tensors.update({"unused": torch.ones(2)}))
    with caplog.at_level(logging.WARNING, logger="muka_fast"):
        teachers.check_teachers([sound, make_teacher("bert", name="other")])
        assert caplog.text == ""
        teachers.load_teacher(sound, run_seed=0)
    assert "unused" in caplog.text  # said once, when it is loaded


def test_labels_are_read_without_weights(make_teacher):
    folder = make_teacher("roberta", ["x", "y", "z"])
    (folder / "model.safetensors").unlink()
    assert teachers.read_labels(folder) == ["x", "y", "z"]
    edit_config(folder, id2label=None, label2id=None)
    assert teachers.read_labels(folder) == ["LABEL_0", "LABEL_1"]
    edit_config(folder, num_labels=4)
    assert teachers.read_labels(folder) == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]


# Faults of a folder


@pytest.mark.parametrize("path", ["nowhere", "nobody/nothing", "/no/such/folder", "./here", "a b"])
def test_missing_folder(path):
    refusal(path, "no such folder", "check the path")


def test_a_file_instead_of_a_folder(make_teacher):
    refusal(make_teacher("bert") / "model.safetensors", "give the folder")


def test_no_config(make_teacher):
    folder = make_teacher("bert")
    (folder / "config.json").unlink()
    refusal(folder, "no config.json", "save_pretrained")


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_broken_config(make_teacher, content):
    folder = make_teacher("bert")
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    refusal(folder, "config.json", "save the model again")


def test_no_tokenizer(make_teacher):
    folder = make_teacher("bert")
    (folder / "tokenizer.json").unlink()
    refusal(folder, "no tokenizer", "tokenizer.save_pretrained")


def test_broken_tokenizer(make_teacher):
    folder = make_teacher("bert")
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    refusal(folder, "tokenizer cannot be loaded")


def test_tokenizer_of_another_model(make_teacher, make_tokenizer):
    folder = make_teacher("bert")
    make_tokenizer("roberta").save_pretrained(folder)
    refusal(folder, "embeds only 240 tokens", "copy the tokenizer")


def test_only_a_pickle_is_never_opened(make_teacher):
    folder = make_teacher("bert")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refusal(folder, "pickle", "pytorch_model.bin", "save_pretrained")


def test_no_weights(make_teacher):
    folder = make_teacher("bert")
    (folder / "model.safetensors").unlink()
    refusal(folder, "no model.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_weights(make_teacher, keep):
    file = make_teacher("bert") / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refusal(file.parent, str(file), "truncated or corrupt")


def test_corrupt_header(make_teacher):
    file = make_teacher("bert") / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[20] ^= 0xFF
    file.write_bytes(content)
    refusal(file.parent, str(file), "truncated or corrupt")


def test_a_grown_file(make_teacher):
    file = make_teacher("bert") / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"1234")
    refusal(file.parent, str(file), "truncated or corrupt")


def sharded(make_model, make_tokenizer, folder):
    make_model("bert").save_pretrained(folder, max_shard_size="20KB")
    make_tokenizer("bert").save_pretrained(folder)
    return sorted(folder.glob("model-*.safetensors"))


def test_a_missing_shard(make_model, make_tokenizer, tmp_path):
    shards = sharded(make_model, make_tokenizer, tmp_path)
    shards[0].unlink()
    refusal(tmp_path, str(shards[0]), "missing")


def test_an_index_that_lists_a_lost_tensor_or_leaves_the_folder(make_model, make_tokenizer, tmp_path):
    sharded(make_model, make_tokenizer, tmp_path)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"ghost.weight": shard}}))
    refusal(tmp_path, "ghost.weight")
    shutil.copy(tmp_path / shard, tmp_path.parent / "outside.safetensors")
    file.write_text(
        json.dumps(index | {"weight_map": index["weight_map"] | {"ghost.weight": "../outside.safetensors"}})
    )
    refusal(tmp_path, "missing")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinite_weights(make_teacher, value):
    folder = make_teacher("bert")
    edit_weights(folder, lambda tensors: tensors["bert.pooler.dense.weight"][3, 2].fill_(value))
    refusal(folder, "bert.pooler.dense.weight", "NaN")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_nan_is_found_before_any_model_is_loaded(make_teacher, dtype):
    folder = make_teacher("bert")

    def spoil(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors["classifier.bias"][1] = -torch.tensor(float("nan"), dtype=dtype)

    edit_weights(folder, spoil)
    with pytest.raises(UserError, match=r"classifier\.bias holds NaN"):
        teachers.check_teachers([folder])


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 3e38, -0.0])
def test_only_a_nan_is_a_nan(value):
    for dtype in (torch.float32, torch.bfloat16):
        block = torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes()
        assert not checkpoint.has_nan(block, "F32" if dtype == torch.float32 else "BF16")


def test_overflow_of_a_narrow_dtype_is_found(make_teacher):
    folder = make_teacher("bert")
    edit_weights(folder, lambda tensors: tensors["classifier.bias"].fill_(1e30))
    teachers.load_teacher(folder, run_seed=0)
    with pytest.raises(UserError, match=r"classifier\.bias"):
        teachers.load_teacher(folder, run_seed=0, dtype=torch.float16)


def test_a_head_that_would_be_random(family, make_teacher):
    folder = make_teacher(family)
    head = "score.weight" if "score.weight" in load_file(folder / "model.safetensors") else "classifier"

    def drop(tensors):
        for name in [name for name in tensors if name.startswith(head)]:
            del tensors[name]

    edit_weights(folder, drop)
    refusal(folder, "the weights lack", head, "random")


def test_unused_weights_are_mentioned(make_teacher, caplog):
    folder = make_teacher("bert")
    edit_weights(folder, lambda tensors: tensors.update({"cls.predictions.decoder.weight": torch.ones(2)}))
    with caplog.at_level(logging.WARNING, logger="muka_fast"):
        teachers.load_teacher(folder, run_seed=0)
    assert "cls.predictions.decoder.weight" in caplog.text


def test_more_labels_than_the_head_has(make_teacher):
    folder = make_teacher("bert")
    edit_config(folder, id2label={"0": "a", "1": "b", "2": "c"})
    refusal(folder, "classifier.bias has shape [2]", "asks for [3]", "id2label")


def test_num_labels_that_contradicts_the_names(make_teacher):
    folder = make_teacher("bert")
    edit_config(folder, num_labels=5)
    refusal(folder, "num_labels 5", "2 labels")


@pytest.mark.parametrize(
    "id2label", [{"0": "a", "2": "b"}, {"1": "a", "2": "b"}, {}, {"x": "a"}, ["a", "b"], {"0": "a", "1": " "}]
)
def test_id2label_with_gaps_or_nonsense(make_teacher, id2label):
    folder = make_teacher("bert")
    edit_config(folder, id2label=id2label)
    refusal(folder, "id2label")


def test_regression_heads(make_teacher):
    refusal(make_teacher("bert", ["LABEL_0"]), "regression")
    refusal(make_teacher("bert", problem_type="regression"), "regression")


def test_one_named_class_is_a_teacher(make_teacher):
    assert teachers.load_teacher(make_teacher("bert", ["spam"]), run_seed=0).labels == ["spam"]


def test_multi_label_head(make_teacher):
    refusal(make_teacher("bert", problem_type="multi_label_classification"), "multi-label")


def test_another_kind_of_model(make_teacher):
    folder = make_teacher("bert")
    edit_config(folder, architectures=["BertForMaskedLM"])
    refusal(folder, "BertForMaskedLM", "muka-fast teach")


def test_an_unknown_model_type(make_teacher):
    folder = make_teacher("bert")
    edit_config(folder, model_type="flux_capacitor")
    refusal(folder, "transformers cannot load it")


def test_code_of_the_repository_is_never_run(make_teacher):
    folder = make_teacher("bert")
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    edit_config(folder, auto_map={"AutoModelForSequenceClassification": "modeling_evil.Evil"})
    refusal(folder, "auto_map", "never run")
    edit_config(folder, auto_map=None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["modeling_evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    refusal(folder, "auto_map", "never run")


# Padding


def test_a_decoder_without_padding_token_pads_with_end_of_text(make_teacher, caplog, texts):
    whole = teachers.load_teacher(make_teacher("llama", name="whole"), run_seed=0)
    folder = make_teacher("llama", name="bare", pad_token_id=None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with caplog.at_level(logging.WARNING, logger="muka_fast"):
        teacher = teachers.load_teacher(folder, run_seed=0)
    assert "no padding token" in caplog.text
    assert teacher.pad_id == teacher.tokenizer.eos_token_id == teacher.model.config.pad_token_id != whole.pad_id
    tokens = teacher.tokenizer(texts[:5], padding=True, return_tensors="pt")
    with torch.no_grad():
        batch = teacher.model(**tokens).logits
        for row, text in enumerate(texts[:5]):
            alone = teacher.model(**teacher.tokenizer(text, return_tensors="pt")).logits[0]
            torch.testing.assert_close(batch[row], alone, rtol=1e-4, atol=1e-5)


def test_end_of_text_pads_nothing_where_it_ends_every_text(make_tokenizer, make_model, caplog):
    """A head that reads the last token that is not padding would read the one before it."""
    tokenizer, model = make_tokenizer("llama"), make_model("llama", pad_token_id=None)
    end = tokenizer.eos_token
    tokenizer.pad_token = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    with pytest.raises(UserError, match="no padding token"):
        teachers.settle_tokenizer(model, tokenizer, "teacher x")
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(3)
    teachers.settle_tokenizer(model, tokenizer, "teacher x")
    assert tokenizer.pad_token_id == model.config.pad_token_id == 3 and "no padding token" in caplog.text


def test_a_text_cannot_spell_the_end_token_that_a_head_looks_for(make_tokenizer):
    """BART refuses a batch whose texts hold it in different numbers; elsewhere it is read as plain transformers read it."""
    tokenizer = make_tokenizer("roberta")
    key, plain = tokenizer_key(tokenizer, 32), tokenizer(HTML).input_ids
    assert plain.count(tokenizer.eos_token_id) == 2
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": len(tokenizer)}
    config = BartConfig(d_model=16, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes)
    model = BartForSequenceClassification(config).eval()
    teachers.settle_tokenizer(model, tokenizer, "teacher x")
    tokens = tokenize(tokenizer, [HTML, "plain"], 32)
    rows = [tokens.ids[a:b].tolist() for a, b in itertools.pairwise(tokens.offsets)]
    assert [row.count(tokenizer.eos_token_id) for row in rows] == [1, 1]
    assert predict(model, tokens, pad_id=tokenizer.pad_token_id).shape == (2, 3)
    assert tokenizer_key(tokenizer, 32) != key  # RoBERTa's tokenizer is the same file


def test_a_configuration_that_asks_for_more_is_answered_as_usual(make_teacher):
    folder = make_teacher()
    edit_config(folder, return_dict=False, output_hidden_states=True, output_attentions=True)
    model = teachers.load_teacher(folder, run_seed=0).model
    out = model(input_ids=torch.tensor([[2, 5, 3]]))
    assert out.logits.shape == (1, 2) and out.hidden_states is None and out.attentions is None


def test_chunked_layers_take_texts_of_any_length(make_teacher):
    folder, ids = make_teacher(), torch.tensor([[2, 5, 3]])
    plain = teachers.load_teacher(folder, run_seed=0).model(input_ids=ids).logits
    edit_config(folder, chunk_size_feed_forward=2)
    assert torch.equal(teachers.load_teacher(folder, run_seed=0).model(input_ids=ids).logits, plain)
    student, _ = load_student(folder, ["a", "b", "c"], 0, {"zero_optimization": {"stage": 0}})
    assert student(input_ids=ids).logits.shape == (1, 3) and student.config.chunk_size_feed_forward == 0


class QuantisedTable(torch.nn.Module):
    """As that of I-BERT: no torch.nn.Embedding."""

    def __init__(self, rows):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(rows, 4))


def test_the_vocabulary_is_compared_with_whatever_table_there_is(make_model, make_tokenizer, caplog):
    model, tokenizer = make_model(), make_tokenizer()
    model.set_input_embeddings(QuantisedTable(len(tokenizer)))
    teachers.check_vocabulary(model, tokenizer, "teacher x")
    model.set_input_embeddings(QuantisedTable(9))
    with pytest.raises(UserError, match="the model embeds only 9 tokens"):
        teachers.check_vocabulary(model, tokenizer, "teacher x")
    small = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
    for without in (
        transformers.CanineForSequenceClassification(transformers.CanineConfig(num_hash_buckets=16, **small)),
        transformers.PerceiverForSequenceClassification(
            transformers.PerceiverConfig(
                num_latents=2, d_latents=8, d_model=8, num_blocks=1, num_self_attends_per_block=1, vocab_size=9,
                num_self_attention_heads=1, num_cross_attention_heads=1, max_position_embeddings=16,
            )
        ),
    ):  # fmt: skip
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="muka_fast"):
            teachers.check_vocabulary(without, tokenizer, "teacher x")
        assert caplog.messages == ["teacher x: has no table of tokens that its tokenizer could be compared with"]


def test_no_way_to_pad_is_refused(make_teacher):
    folder = make_teacher("llama", pad_token_id=None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if key not in ("pad_token", "eos_token")})
    )
    refusal(folder, "no padding token")


def test_left_padding_is_turned_right(make_teacher):
    folder = make_teacher("qwen2")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    assert teachers.load_teacher(folder, run_seed=0).tokenizer.padding_side == "right"


# safetensors headers, against the library


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensor_entries_agree_with_safetensors(tmp_path, dtype):
    tensors = {
        "a": torch.arange(6).reshape(2, 3).to(dtype),
        "b": torch.zeros(0, 4, dtype=dtype),
        "c": torch.ones((), dtype=dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    entries = checkpoint.read_tensors(tmp_path, "teacher")
    for name, tensor in tensors.items():
        assert entries[name].shape == tuple(tensor.shape)
        content = b"".join(checkpoint.tensor_blocks(entries[name], "teacher"))
        assert content == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert np.prod(entries["b"].shape) == 0


# Tokenizers in the older layouts


def test_a_bert_vocabulary_in_a_text_file(make_teacher, texts):
    folder = make_teacher("bert")
    whole = teachers.load_teacher(folder, run_seed=0).tokenizer
    vocabulary = sorted(whole.get_vocab(), key=whole.get_vocab().get)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    plain = teachers.load_teacher(folder, run_seed=0).tokenizer
    assert plain(texts)["input_ids"] == whole(texts)["input_ids"]


def test_a_roberta_vocabulary_with_merges(make_teacher, texts):
    folder = make_teacher("roberta")
    whole = teachers.load_teacher(folder, run_seed=0).tokenizer
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    plain = teachers.load_teacher(folder, run_seed=0).tokenizer
    assert plain(texts)["input_ids"] == whole(texts)["input_ids"]


def test_a_vocabulary_without_its_merges(make_teacher):
    folder = make_teacher("roberta")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    refusal(folder, "tokenizer")
