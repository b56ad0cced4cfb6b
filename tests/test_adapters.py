"""LoRA adapter folders as teachers: merged logits equal peft's own, faults are one line."""

import json
import logging
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from teacher_folders import refusal

from muka_fast import adapters, checkpoint, teachers

peft = pytest.importorskip("peft", reason="the optional extra peft is not installed")


@pytest.fixture
def make_adapter(make_teacher, make_tokenizer, tmp_path):
    """make_adapter(family, labels) -> (adapter folder, peft model, base folder); the adapter is trained away from zero."""

    def make(family="bert", labels=("x", "y", "z"), *, config=True, tokenizer=True, base_labels=("a", "b")):
        base = make_teacher(family, base_labels, name="base")
        names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            base, ignore_mismatched_sizes=True, **names
        )
        targets = ["q_proj", "v_proj"] if family == "llama" else ["query", "value"]
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.1, target_modules=targets)
        model = peft.get_peft_model(model, lora)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path / "adapter"
        model.save_pretrained(folder)
        if config:
            model.config.save_pretrained(folder)
            named = json.loads((folder / "config.json").read_text())
            bare = named["architectures"][0].replace("ForSequenceClassification", "Model")  # as where the base is an encoder
            (folder / "config.json").write_text(json.dumps(named | {"architectures": [bare]}))
        if tokenizer:
            make_tokenizer(family).save_pretrained(folder)
        return folder, model.eval(), base

    return make


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_merged_adapter_gives_the_logits_of_peft(family, make_adapter, texts):
    folder, model, _ = make_adapter(family)
    teacher = teachers.load_teacher(folder, run_seed=0)
    assert teacher.labels == ["x", "y", "z"]
    assert not any("lora" in name for name, _ in teacher.model.named_modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    tokens = teacher.tokenizer(texts[:4], padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(**tokens).logits, model(**tokens).logits, rtol=1e-4, atol=1e-5)


def test_without_own_config_the_head_decides_and_the_tokenizer_is_the_bases(make_adapter, texts):
    folder, model, base = make_adapter(config=False, tokenizer=False)
    assert teachers.inspect(folder).labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    teacher = teachers.load_teacher(folder, run_seed=0)
    assert teacher.tokenizer_key == teachers.load_teacher(base, run_seed=0).tokenizer_key
    tokens = teacher.tokenizer(texts[:4], padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(**tokens).logits, model(**tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_base_that_asks_for_more_is_answered_as_usual(make_adapter):
    folder, _, base = make_adapter()
    for file in (folder / "config.json", base / "config.json"):
        wish = {"return_dict": False, "output_attentions": True, "chunk_size_feed_forward": 2}
        file.write_text(json.dumps(json.loads(file.read_text()) | wish))
    out = teachers.load_teacher(folder, run_seed=0).model(input_ids=torch.tensor([[2, 5, 3]]))
    assert out.logits.shape == (1, 3) and out.attentions is None


def test_same_head_size_keeps_the_names_of_the_base(make_adapter):
    folder, *_ = make_adapter(config=False, labels=("c", "d"))
    assert teachers.inspect(folder).labels == ["a", "b"]


def test_base_and_adapter_are_read_once_for_a_fingerprint(make_adapter, monkeypatch):
    folder, *_ = make_adapter()
    reads, original = [], checkpoint.fingerprint
    monkeypatch.setattr(checkpoint, "fingerprint", lambda *given: reads.append(given) or original(*given))
    assert len({teachers.inspect(folder).fingerprint for _ in range(3)}) == 1 and len(reads) == 2


def test_fingerprint_sees_the_adapter_and_the_base(make_adapter):
    folder, _, base = make_adapter()
    first = teachers.inspect(folder).fingerprint
    assert first != teachers.inspect(base).fingerprint
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    second = teachers.inspect(folder).fingerprint
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert len({first, second, teachers.inspect(folder).fingerprint}) == 3


def test_peft_missing_names_the_extra(make_adapter, monkeypatch):
    folder, *_ = make_adapter()
    monkeypatch.setitem(sys.modules, "peft", None)
    refusal(folder, "muka-fast[peft]")


def test_only_a_pickled_adapter(make_adapter):
    folder, *_ = make_adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refusal(folder, "pickle", "adapter_model.bin")


def test_base_missing(make_adapter):
    folder, _, base = make_adapter()
    base.rename(base.with_name("moved"))
    refusal(folder, "base_model_name_or_path of adapter_config.json", str(base))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"task_type": "CAUSAL_LM"}, "CAUSAL_LM"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
        ({"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}, "auto_mapping"),
    ],
)
def test_other_adapters(make_adapter, change, word):
    folder, *_ = make_adapter()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refusal(folder, word)


def test_a_head_of_no_dimensions_is_refused_in_one_line(make_adapter):
    folder, *_ = make_adapter(config=False)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    head = next(name for name in tensors if name.endswith("classifier.weight"))
    save_file(tensors | {head: torch.tensor(1.0)}, file)
    refusal(folder, "adapter")


def test_base_beside_the_adapter(make_adapter):
    folder, _, base = make_adapter()
    base.rename(folder / "base")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "base"}))
    assert adapters.is_adapter(folder)
    assert teachers.load_teacher(folder, run_seed=0).labels == ["x", "y", "z"]


@pytest.mark.parametrize("largest_shard", ["1GB", "10KB"])
def test_a_whole_model_with_an_adapter_beside_it_is_refused(make_teacher, largest_shard):
    """transformers would load both, and the fingerprint would be of one."""
    folder = make_teacher("bert")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=largest_shard)
    (folder / "adapter_config.json").write_text("{}")
    refusal(folder, "holds a whole model and an adapter", "a folder of its own")


@pytest.mark.parametrize("lost", ["classifier", "layer.1.attention.self.query.lora_B"])
def test_an_adapter_with_lost_weights_is_refused(make_adapter, lost):
    folder, *_ = make_adapter()
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if lost not in name}, file)
    refusal(folder, lost)


def test_no_warning_about_the_head_of_the_base(make_adapter, caplog):
    folder, *_ = make_adapter()
    with caplog.at_level(logging.WARNING):
        teachers.load_teacher(folder, run_seed=0)
    assert caplog.text == ""
