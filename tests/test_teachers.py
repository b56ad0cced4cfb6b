"""Teachers as they come: every family loads as transformers loads it, whatever its tokenizer and padding."""

import itertools
import json
import logging
import os
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from teacher_folders import edit_config, edit_weights, refusal
from tokenizers.processors import TemplateProcessing
from transformers import BartConfig, BartForSequenceClassification

from muka_fast import checkpoint, teachers
from muka_fast.data import tokenize, tokenizer_key
from muka_fast.errors import UserError
from muka_fast.evaluate import predict
from muka_fast.student import load_student
from muka_fast.tokenizer import check_tokenizer, settle_tokenizer

HTML = "was <s>dear</s>, now cheap"  # struck out in HTML, the marks of a text's ends in many tokenizers


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
    prints = [teachers.inspect(folder).fingerprint]
    edit_weights(folder, lambda tensors: tensors["classifier.bias"].add_(1))
    prints.append(teachers.inspect(folder).fingerprint)
    file = folder / "model.safetensors"
    content, written = bytearray(file.read_bytes()), file.stat().st_mtime_ns
    content[-4] ^= 1
    file.write_bytes(content)  # in place, of the same size
    os.utime(file, ns=(written, written + 1000))
    prints.append(teachers.inspect(folder).fingerprint)
    content[-4] ^= 2
    (folder / "copy").write_bytes(content)
    os.utime(folder / "copy", ns=(written, written + 1000))
    os.replace(folder / "copy", file)  # another file of the same size and time
    prints.append(teachers.inspect(folder).fingerprint)
    edit_config(folder, hidden_act="relu")
    prints.append(teachers.inspect(folder).fingerprint)
    assert len(set(prints)) == 5


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


def test_one_teacher_works_without_a_word(make_teacher, caplog):
    """It may be one more of a store; a run that has no other says so (test_preflight.py, test_bad_input.py)."""
    folder = make_teacher("bert")
    with caplog.at_level(logging.WARNING, logger="muka_fast"):
        assert [files.folder for files in teachers.check_teachers([folder])] == [folder]
    assert not caplog.text


def test_the_same_teacher_twice_is_refused(make_teacher, tmp_path):
    folder = make_teacher("bert")
    with pytest.raises(UserError, match="given twice"):
        teachers.check_teachers([folder, f"{folder}/../{folder.name}"])
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(UserError, match="same model"):
        teachers.check_teachers([folder, tmp_path / "copy"])
    teachers.check_teachers([folder, make_teacher("bert", seed=9)])


def test_another_vocabulary_is_noticed_in_the_same_process(make_teacher, tmp_path):
    """Scores of the old one would count as complete for the new one."""
    folder = make_teacher("bert", name="slow")
    for file in (*folder.glob("tokenizer*"), *folder.glob("special_tokens_map.json")):
        file.unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog"]
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    keys = []
    for order in (words, [*words[:5], "dog", "cat"]):
        (folder / "vocab.txt").write_text("\n".join(order) + "\n")
        keys.append(teachers.check_teachers([folder])[0].tokenizer_key)
        assert keys[-1] == teachers.load_teacher(folder, run_seed=0).tokenizer_key
    assert keys[0] != keys[1]


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
    labels = lambda: checkpoint.check_classifier(checkpoint.read_config(folder, "x"), "x")
    assert labels() == ["x", "y", "z"]
    edit_config(folder, id2label=None, label2id=None)
    assert labels() == ["LABEL_0", "LABEL_1"]
    edit_config(folder, num_labels=4)
    assert labels() == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]


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
        settle_tokenizer(model, tokenizer, "teacher x")
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(3)
    settle_tokenizer(model, tokenizer, "teacher x")
    assert tokenizer.pad_token_id == model.config.pad_token_id == 3 and "no padding token" in caplog.text


def test_a_text_cannot_spell_the_end_token_that_a_head_looks_for(make_tokenizer):
    """BART refuses a batch whose texts hold it in different numbers; elsewhere it is read as plain transformers read it."""
    tokenizer = make_tokenizer("roberta")
    key, plain = tokenizer_key(tokenizer, 32), tokenizer(HTML).input_ids
    assert plain.count(tokenizer.eos_token_id) == 2
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": len(tokenizer)}
    config = BartConfig(d_model=16, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes)
    model = BartForSequenceClassification(config).eval()
    settle_tokenizer(model, tokenizer, "teacher x")
    tokens = tokenize(tokenizer, [HTML, "plain"], 32)
    rows = [tokens.ids[a:b].tolist() for a, b in itertools.pairwise(tokens.offsets)]
    assert [row.count(tokenizer.eos_token_id) for row in rows] == [1, 1]
    assert predict(model, tokens).shape == (2, 3)
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
    check_tokenizer(model, tokenizer, "teacher x")
    model.set_input_embeddings(QuantisedTable(9))
    with pytest.raises(UserError, match="the model embeds only 9 tokens"):
        check_tokenizer(model, tokenizer, "teacher x")
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
            check_tokenizer(without, tokenizer, "teacher x")
        assert caplog.messages == ["teacher x: has no table of tokens that its tokenizer could be compared with"]


def test_special_tokens_alone_may_have_no_row_and_padding_may_not(make_model, make_tokenizer, product_log):
    model, tokenizer = make_model(), make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<extra>"})
    check_tokenizer(model, tokenizer, "teacher x")
    assert "no row for the special token '<extra>'; texts must not hold it" in product_log.text
    tokenizer.add_tokens("muka")
    with pytest.raises(UserError, match="token '<extra>' with id 240, but the model embeds only 240 tokens"):
        check_tokenizer(model, tokenizer, "teacher x")
    padding = make_tokenizer()
    padding.add_special_tokens({"pad_token": "<extra>"})
    with pytest.raises(UserError, match="token '<extra>' with id 240"):
        check_tokenizer(model, padding, "teacher x")


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


@pytest.mark.parametrize("wished", [True, False])
def test_loading_shows_no_bar_and_leaves_the_users_setting(make_teacher, monkeypatch, wished):
    (transformers.logging.enable_progress_bar if wished else transformers.logging.disable_progress_bar)()
    shown, load = [], transformers.AutoModelForSequenceClassification.from_pretrained

    def watched(*args, **options):
        shown.append(transformers.logging.is_progress_bar_enabled())
        return load(*args, **options)

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", watched)
    try:
        teachers.load_teacher(make_teacher("bert", "ab"), run_seed=0)
        assert shown and not any(shown) and transformers.logging.is_progress_bar_enabled() == wished
    finally:
        transformers.logging.disable_progress_bar()


def test_fingerprint_sees_names_and_shapes(tmp_path):
    weight, prints = torch.arange(6.0), set()
    for number, tensors in enumerate([{"w": weight}, {"v": weight}, {"w": weight.view(2, 3)}, {"w": weight.view(3, 2)}]):
        (tmp_path / str(number)).mkdir()
        save_file(tensors, tmp_path / str(number) / "model.safetensors")
        prints.add(checkpoint.fingerprint({}, ["a"], checkpoint.read_tensors(tmp_path / str(number), "it"), "it"))
    assert len(prints) == 4
