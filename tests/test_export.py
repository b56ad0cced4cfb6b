"""Exports: plain transformers loads them, and no moment or fault leaves a folder that is half old and half new."""

import dataclasses
import errno
import json
import os
import re
import resource

import pytest
import torch
import transformers
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from muka_fast import export
from muka_fast.errors import UserError
from muka_fast.files import is_write_error
from muka_fast.outputs import PARTIAL, READY

CARD = export.Card(
    title="merged",
    base_model="org/encoder",
    teachers=[
        {"name": "news", "labels": ["a", "b"], "fingerprint": "0123456789abcdef0123"},
        {"name": "bank", "labels": ["b", "c"]},
    ],
    options={"method": "muka-soft", "mc_samples": 16},
    data={"texts": "pool.jsonl", "fingerprint": "ff", "number of texts": 1200},
    metrics={"accuracy": 0.87654321, "texts": 100},
)
LABELS = ["a", "b", "c"]


def save(make_model, make_tokenizer, output, family="bert", labels=LABELS, seed=0, **options):
    model, tokenizer = make_model(family, labels, seed=seed), make_tokenizer(family)
    export.save_student(model, tokenizer, output, labels, options.pop("card", CARD), **options)
    return model, tokenizer


def test_plain_transformers_loads_every_family(family, make_model, make_tokenizer, tmp_path, texts):
    model, tokenizer = save(make_model, make_tokenizer, tmp_path / "out", family)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = again(texts[:4], padding=True, return_tensors="pt", return_token_type_ids=False)
    assert torch.equal(tokens["input_ids"], tokenizer(texts[:4], padding=True, return_tensors="pt")["input_ids"])
    with torch.no_grad():
        expected = model(**tokens).logits
        assert torch.equal(loaded(**tokens).logits, expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert config["label2id"] == {"a": 0, "b": 1, "c": 2}
    assert config["problem_type"] == "single_label_classification"
    assert config["architectures"] == [type(model).__name__]
    classify = transformers.pipeline("text-classification", model=str(tmp_path / "out"))
    best = expected.argmax(-1)
    for row, answer in enumerate(classify(texts[:4], truncation=True)):
        assert answer["label"] == LABELS[best[row]]
        assert answer["score"] == pytest.approx(expected.softmax(-1)[row].max().item(), abs=1e-4)


def test_files_of_the_folder(make_model, make_tokenizer, tmp_path):
    save(make_model, make_tokenizer, tmp_path / "deep" / "out")
    names = {entry.name for entry in (tmp_path / "deep" / "out").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_what_a_kill_left_of_an_export_does_not_get_into_the_next_one(make_model, make_tokenizer, tmp_path):
    (tmp_path / "out" / PARTIAL).mkdir(parents=True)
    (tmp_path / "out" / PARTIAL / "vocab.txt").write_text("another student's")
    save(make_model, make_tokenizer, tmp_path / "out")
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir() if entry.name != "README.md") == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_text_beyond_the_position_table_is_cut_by_the_pipeline(make_model, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("bert")
    tokenizer.model_max_length = 10**30
    export.save_student(make_model("bert", LABELS), tokenizer, tmp_path / "out", LABELS, CARD)
    classify = transformers.pipeline("text-classification", model=str(tmp_path / "out"))
    assert classify("word " * 3000, truncation=True)[0]["label"] in LABELS


def test_state_of_the_latest_call_is_not_saved(make_model, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("bert")
    tokenizer(["one text", "two"], padding=True, truncation=True, max_length=3)
    export.save_student(make_model("bert", LABELS), tokenizer, tmp_path / "out", LABELS, CARD)
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert content["truncation"] is None
    assert content["padding"] is None


def test_gathered_weights_win_over_the_models_own(make_model, make_tokenizer, tmp_path):
    gathered = {name: tensor.clone() for name, tensor in make_model("bert", LABELS, seed=8).state_dict().items()}
    save(make_model, make_tokenizer, tmp_path / "out", seed=1, state_dict=gathered)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, gathered[name])


def test_config_and_rights_are_those_of_the_written_weights(make_model, make_tokenizer, tmp_path):
    """DeepSpeed casts the model to bf16 and hands out fp32 weights; safetensors writes for the owner alone."""
    model, tokenizer = make_model("bert", LABELS), make_tokenizer("bert")
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole["num_batches_tracked"] = torch.tensor(3)  # a whole number has no precision
    before = os.umask(0o027)
    try:
        export.save_student(model.to(torch.bfloat16), tokenizer, tmp_path / "out", LABELS, CARD, whole)
    finally:
        os.umask(before)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o640
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32 and torch.equal(loaded.classifier.weight, whole["classifier.weight"])


def test_classes_stand_in_the_order_of_the_logits(make_model, make_tokenizer, tmp_path):
    """Many read list(id2label.values())."""
    labels = [f"class {c}" for c in range(12)]
    model = make_model("bert", labels)
    export.save_student(model, make_tokenizer("bert"), tmp_path / "out", labels, CARD, model.state_dict())
    assert list(transformers.AutoConfig.from_pretrained(tmp_path / "out").id2label.values()) == labels


def test_weights_of_several_precisions_leave_the_models_own_word(make_model, make_tokenizer, tmp_path):
    model = make_model("bert", LABELS).to(torch.bfloat16)
    mixed = {name: tensor.to(torch.float16 if "bias" in name else torch.float32) for name, tensor in model.state_dict().items()}
    export.save_student(model, make_tokenizer("bert"), tmp_path / "out", LABELS, CARD, mixed)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_weights_that_are_no_numbers_are_not_written(make_model, make_tokenizer, tmp_path):
    model = make_model("bert", LABELS)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole["classifier.bias"][1] = float("nan")
    for weights, spoilt in ((whole, "classifier.bias"), (None, "classifier.weight")):
        if weights is None:
            model.classifier.weight.data[0, 0] = float("inf")
        with pytest.raises(UserError, match=f"{spoilt} is not finite: lower --learning_rate"):
            export.save_student(model, make_tokenizer("bert"), tmp_path / "out", LABELS, CARD, weights)
    assert not (tmp_path / "out").exists()


def test_one_class(make_model, make_tokenizer, tmp_path):
    save(make_model, make_tokenizer, tmp_path / "out", labels=["spam"])
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "spam"}


def test_wrong_labels_are_a_fault_of_the_program(make_model, make_tokenizer, tmp_path):
    model, tokenizer = make_model("bert", LABELS), make_tokenizer("bert")
    with pytest.raises(ValueError, match="2 label names for a head of 3"):
        export.save_student(model, tokenizer, tmp_path / "out", ["a", "b"], CARD)
    with pytest.raises(ValueError, match="repeat"):
        export.save_student(model, tokenizer, tmp_path / "out", ["a", "b", "a"], CARD)
    assert not (tmp_path / "out").exists()


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("step", ["model", "tokenizer", "card", "sync", "rename"])
@pytest.mark.parametrize("before", [True, False])
def test_a_full_disk_loses_nothing(step, before, make_model, make_tokenizer, tmp_path, monkeypatch):
    output = tmp_path / "out"
    if before:
        save(make_model, make_tokenizer, output, seed=1)
    old = snapshot(output) if before else {}

    def full(*args, **kwargs):
        if step == "tokenizer":  # what the Rust writer of `tokenizers` raises
            raise Exception("No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {
        "model": (transformers.PreTrainedModel, "save_pretrained"),
        "tokenizer": (transformers.PreTrainedTokenizerBase, "save_pretrained"),
        "card": (export, "render_card"),
        "sync": (export, "sync_folder"),
        "rename": (os, "replace"),
    }[step]
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        with pytest.raises(UserError) as caught:
            save(make_model, make_tokenizer, output, seed=2)
    line = str(caught.value)
    assert "--output" in line and str(output) in line and "No space left" in line and "\n" not in line
    assert snapshot(output) == old
    save(make_model, make_tokenizer, output, seed=2)
    transformers.AutoModelForSequenceClassification.from_pretrained(output)


def test_a_file_size_limit_stops_the_real_writers(make_model, make_tokenizer, tmp_path):
    # RLIMIT_FSIZE makes write(2) fail in the middle of the weights, as a full disk does.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written.*too large"):
            save(make_model, make_tokenizer, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "out").iterdir()) == []
    save(make_model, make_tokenizer, tmp_path / "out")


@pytest.mark.parametrize(
    ("told", "disk"),
    [
        ("File too large (os error 27)", True),
        ('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })', True),
        ("I/O error: disk quota exceeded", True),
        ("'NoneType' object is not iterable", False),
    ],
)
def test_the_disk_is_at_fault_where_the_writers_in_rust_say_so(told, disk):
    assert is_write_error(Exception(told)) is disk


def test_another_fault_is_not_called_a_full_disk(make_model, make_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "render_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(make_model, make_tokenizer, tmp_path / "out")
    assert snapshot(tmp_path / "out") == {}


def test_every_kill_point_leaves_old_none_or_new_and_can_be_finished(make_model, make_tokenizer, tmp_path, monkeypatch):
    """Cut the run off at the i-th rename or removal, for every i."""

    class Killed(BaseException):
        pass

    tokenizer = make_tokenizer("bert")
    old_bias = make_model("bert", LABELS, seed=1).classifier.bias.detach()
    new_bias = make_model("bert", LABELS, seed=2).classifier.bias.detach()
    seen = set()
    for stop in range(100):
        output = tmp_path / f"out{stop}"
        export.save_student(make_model("bert", LABELS, seed=1), tokenizer, output, LABELS, CARD)
        left = [stop]

        def dying(real, left=left):
            def call(*args, **kwargs):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying(os.replace))
            patch.setattr(os, "unlink", dying(os.unlink))
            patch.setattr(os, "rmdir", dying(os.rmdir))
            try:
                export.save_student(make_model("bert", LABELS, seed=2), tokenizer, output, LABELS, CARD)
                killed = False
            except Killed:
                killed = True
        if (output / "config.json").exists():
            bias = transformers.AutoModelForSequenceClassification.from_pretrained(output).classifier.bias
            assert torch.equal(bias, old_bias) or torch.equal(bias, new_bias)
            seen.add("old" if torch.equal(bias, old_bias) else "new")
        else:
            seen.add("none")
        ready = (output / READY).exists()
        assert export.finish_export(output) == ready
        bias = transformers.AutoModelForSequenceClassification.from_pretrained(output).classifier.bias
        assert torch.equal(bias, new_bias if ready or not killed else old_bias)
        assert not list(output.glob(".export*"))
        if not killed:
            break
    assert not killed
    assert seen == {"old", "none", "new"}


def test_a_card_written_anew_leaves_all_other_files(make_model, make_tokenizer, tmp_path, monkeypatch):
    output, card = tmp_path / "out", dataclasses.replace(CARD, metrics={"accuracy": 0.5})
    save(make_model, make_tokenizer, output)
    old = snapshot(output)
    with monkeypatch.context() as patch:  # killed with the card safe on the disk, but not in its place
        patch.setattr(export, "finish_export", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export.replace_card(output, LABELS, card)
    assert {name: content for name, content in snapshot(output).items() if READY not in name} == old
    assert export.finish_export(output)
    new = snapshot(output)
    assert new.keys() == old.keys() and [name for name in old if new[name] != old[name]] == ["README.md"]
    assert "| accuracy | 0.5 |" in (output / "README.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(export, "render_card", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(UserError, match=r"cannot be written.*No space left.*--resume"):
            export.replace_card(output, LABELS, card)
    assert snapshot(output) == new


def test_old_shards_do_not_survive(make_model, make_tokenizer, tmp_path):
    make_model("bert", LABELS).save_pretrained(tmp_path / "out", max_shard_size="20KB")
    save(make_model, make_tokenizer, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


def test_a_folder_of_chat_templates_is_replaced(make_model, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("bert")
    for text in ("old", "new"):
        tokenizer.chat_template = {"default": "x", "tools": text}
        export.save_student(make_model("bert", LABELS), tokenizer, tmp_path, LABELS, CARD)
        assert (tmp_path / "additional_chat_templates" / "tools.jinja").read_text() == text


# The card


def test_card_tells_teachers_method_data_and_figures():
    text = export.render_card(CARD, LABELS, "merged-folder")
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-classification"
    assert head["base_model"] == "org/encoder"
    assert "| news | 2 | `0123456789abcdef` |" in text
    assert "| bank | 2 | `` |" in text
    assert "weighted by how certain" in text and "without labels" in text
    assert "| b | news, bank |" in text
    assert "| mc\\_samples | 16 |" in text
    assert "| accuracy | 0.8765 |" in text
    assert "| number of texts | 1200 |" in text
    assert 'pipeline("text-classification", model="merged-folder")' in text
    assert "\n\n\n" not in text


def test_card_without_anything_but_a_title():
    text = export.render_card(export.Card("x"), ["a"], "x")
    assert "1 class," in text
    assert "no labelled texts" in text


def test_card_of_a_run_with_labels():
    text = export.render_card(export.Card("x", options={"method": "oracle", "limit": None}), ["a"], "x")
    assert "without labels" not in text
    assert "knows the true label" in text
    assert "| limit | – |" in text


def test_every_method_has_its_sentence():
    from muka_fast.config import METHODS

    assert set(export.METHOD_TEXTS) == set(METHODS)


def test_many_labels_are_cut():
    text = export.render_card(CARD, [f"label {i}" for i in range(1000)], "x")
    assert "and 700 more" in text


def test_local_paths_are_no_hub_names(tmp_path):
    assert "base_model" not in export.front_matter(export.Card("x", base_model=str(tmp_path)))
    assert "base_model" not in export.front_matter(export.Card("x", base_model="../up"))


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=5, unique=True), st.text(max_size=20))
@example(["0"], "0/0")
def test_strange_names_cannot_break_out_of_the_card(names, other):
    card = export.Card(
        title=other,
        base_model=other,
        teachers=[{"name": name, "labels": names} for name in names],
        options={other: other},
        data={other: other},
        metrics={other: 1.0},
    )
    hub = "base_model" in export.front_matter(card)  # what looks like a hub name gets a line of its own
    plain = export.Card(
        title="x",
        base_model="x/x" if hub else other and "x y",
        teachers=[{"name": "x", "labels": names} for _ in names],
        options={"x": "x"},
        data={"x": "x"},
        metrics={"x": 1.0},
    )
    text, expected = export.render_card(card, names, "x"), export.render_card(plain, names, "x")
    # As many lines and table cells as with harmless names: nothing opens a row, a cell, a tag or a block.
    assert text.count("\n") == expected.count("\n") == len(text.splitlines())
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()]
    assert cells == [len(re.findall(r"(?<!\\)\|", line)) for line in expected.splitlines()]
    body = text.split("```")[2]
    assert "<" not in body and ">" not in body


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a|b", "a\\|b"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert\\(1\\)&lt;/script&gt;"),
        ("[x](javascript:y)", "\\[x\\]\\(javascript:y\\)"),
        ("two\nlines\r\n|", "two lines \\|"),
        ("`code`", "\\`code\\`"),
        ("{{ 7 * 7 }}", "\\{\\{ 7 \\* 7 \\}\\}"),
        ("\u202eabc\x00", "\ufffdabc\ufffd"),
        ("日本語 🙂", "日本語 🙂"),
        ("می\u200cخواهم 🏳️\u200d🌈 a\u00a0b", "می\u200cخواهم 🏳️\u200d🌈 a b"),
    ],
)
def test_markdown_text(value, shown):
    assert export.markdown_text(value) == shown


def test_config_is_moved_last(make_model, make_tokenizer, tmp_path, monkeypatch):
    moved, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: moved.append(os.path.basename(target)) or real(source, target))
    save(make_model, make_tokenizer, tmp_path / "out")
    assert moved[-1] == "config.json" and "model.safetensors" in moved


def test_the_disk_confirms_all_before_the_first_move_and_the_folder_after_the_last(tmp_path, disk):
    export.replace_card(tmp_path / "out", LABELS, CARD)
    assert sorted(disk[:3]) == [("fsync", name) for name in sorted(["README.md", export.FILE_LIST, PARTIAL])]
    assert disk[3:] == [("replace", READY), ("replace", "README.md"), ("fsync", "out")]


def test_names_are_set_in_both_directions(make_model):
    model = make_model("bert", ["x", "y"])
    export.set_labels(model, ["b", "a"])
    assert model.config.id2label == {0: "b", 1: "a"} and model.config.label2id == {"b": 0, "a": 1}
