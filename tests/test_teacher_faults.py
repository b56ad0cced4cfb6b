"""Every fault of a teacher's folder is one line that names it."""

import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from teacher_folders import edit_config, edit_weights, refusal

from muka_fast import checkpoint, teachers
from muka_fast.errors import UserError


@pytest.mark.parametrize("path", ["nowhere", "nobody/nothing", "/no/such/folder", "./here", "a b"])
def test_missing_folder(path):
    refusal(path, "no such folder", "check the path")


def test_a_file_instead_of_a_folder(make_teacher):
    refusal(make_teacher("bert") / "model.safetensors", "give the folder")


def test_no_config(make_teacher):
    folder = make_teacher("bert")
    (folder / "config.json").unlink()
    refusal(folder, "no config.json", "save_pretrained")


def test_a_folder_of_checkpoints_names_the_newest(make_teacher, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    for age, step in enumerate(("checkpoint-500", "checkpoint-1000", "checkpoint-best")):
        make_teacher("bert", name=f"runs/{step}")
        os.utime(runs / step / "config.json", (1e9 - age, 1e9 - age))
    refusal(runs, "no config.json", f"the newest is {runs / 'checkpoint-500'}")


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
    (folder / "training_args.bin").write_bytes(b"what a Trainer leaves, no weights")
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
    for weight_map in ({}, None, ["model.safetensors"]):
        file.write_text(json.dumps(index | {"weight_map": weight_map}))
        refusal(tmp_path, "has no weight_map", "save the model again")


def test_one_whole_file_of_weights_is_read_whatever_an_index_beside_it_lists(make_teacher):
    folder = make_teacher("bert")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"ghost.weight": "gone.safetensors"}}')
    teachers.load_teacher(folder, run_seed=0)


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}},  # of which the product is the bytes that are there
        {"x": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "y": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
        {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "y": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
        {"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"x": {"dtype": "Q32", "shape": [4], "data_offsets": [0, 16]}},
        {"x": ["F32", [4], [0, 16]]},
        [],
    ],
)
def test_a_header_that_does_not_fit_is_damage(header, tmp_path):
    content = json.dumps(header).encode()
    for length in (len(content), 1 << 63, (1 << 64) - 1):
        (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + content + bytes(16))
        with pytest.raises(UserError, match=r"x: .*model\.safetensors is truncated or corrupt \(.*\); copy or download it again$"):
            checkpoint.read_tensors(tmp_path, "teacher x")


def test_weights_that_are_cut_while_they_are_read_are_named(make_teacher):
    file = make_teacher("bert") / "model.safetensors"
    last = max(checkpoint.read_header(file, "teacher x"), key=lambda entry: entry.stop)
    file.write_bytes(file.read_bytes()[: last.start + 2])
    with pytest.raises(UserError, match=r"model\.safetensors became shorter while it was read"):
        list(checkpoint.tensor_blocks(last, "teacher x"))


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


@pytest.mark.parametrize(("values", "sound"), [([3e38, 3e38, 1.0], True), ([float("inf"), -float("inf"), 1.0], False)])
def test_finite_weights_may_have_an_infinite_sum(values, sound):
    model = torch.nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    if sound:
        return teachers.check_finite(model, "teacher x")
    with pytest.raises(UserError, match=r"teacher x: weight holds 2 NaN or infinite of 3 values"):
        teachers.check_finite(model, "teacher x")


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


@pytest.mark.parametrize("count", [0, -1, 2.0, "2", None])
def test_labels_without_names_are_counted_two_where_nobody_says(count):
    assert checkpoint.config_labels({}, "teacher x") == ["LABEL_0", "LABEL_1"]
    assert checkpoint.config_labels({"num_labels": 1}, "teacher x") == ["LABEL_0"]
    with pytest.raises(UserError, match=r"num_labels in config\.json is .*a whole number from 1 up"):
        checkpoint.config_labels({"num_labels": count}, "teacher x")


@pytest.mark.parametrize(
    "id2label", [{"0": "a", "2": "b"}, {"1": "a", "2": "b"}, {}, {"x": "a"}, ["a", "b"], {"0": "a", "1": " "}]
)
def test_id2label_with_gaps_or_nonsense(make_teacher, id2label):
    folder = make_teacher("bert")
    edit_config(folder, id2label=id2label)
    refusal(folder, "id2label")


def test_half_a_surrogate_pair_in_a_name_becomes_the_replacement_character():
    config = json.loads('{"id2label": {"0": "caf\\ud83d", "1": "\\ud83d\\ude42"}}')
    assert checkpoint.config_labels(config, "teacher x") == ["caf\ufffd", "🙂"]


def test_a_look_at_a_teacher_leaves_the_log_as_it_was(make_teacher, monkeypatch):
    log = logging.getLogger("muka_fast")
    for disabled in (True, False):
        monkeypatch.setattr(log, "disabled", disabled)
        teachers.rehearse(make_teacher("bert"), "teacher x", (disabled,))
        assert log.disabled is disabled


def test_regression_heads(make_teacher):
    refusal(make_teacher("bert", ["LABEL_0"]), "regression")
    told = refusal(make_teacher("bert", problem_type="regression"), "regression")
    assert "one output" not in told  # it has several


def test_one_named_class_is_a_teacher(make_teacher):
    assert teachers.load_teacher(make_teacher("bert", ["spam"]), run_seed=0).labels == ["spam"]


def test_multi_label_head(make_teacher):
    refusal(make_teacher("bert", problem_type="multi_label_classification"), "multi-label")


def test_another_problem_type(make_teacher):
    folder = make_teacher("bert")
    edit_config(folder, problem_type="token_classification")
    refusal(folder, "problem_type", "'token_classification'")


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
    edit_config(folder, auto_map={"AutoModelForSequenceClassification": "modeling_evil.Evil"}, model_type="evil")
    refusal(folder, "auto_map", "never run")
    edit_config(folder, auto_map=None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["modeling_evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    refusal(folder, "auto_map", "never run")
