"""Teaching: rows by label, frozen trunks, reproducible fitting, and a folder that is whole or as it was."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_pre_hook

from muka_fast import cli, teach
from muka_fast.config import TeachConfig
from muka_fast.data import TextSet, epoch_batches, read_texts, tokenize
from muka_fast.errors import UserError
from muka_fast.evaluate import predict
from muka_fast.teachers import load_teacher

WORDS = {"sport": "goal match team coach", "bank": "card account fee transfer", "sky": "planet star moon orbit"}


@pytest.fixture
def rows(tmp_path):
    """A labelled file that a tiny model can learn: every label has words of its own."""
    lines = []
    for i in range(20):
        for label, words in WORDS.items():
            parts = words.split()
            lines.append({"text": f"the {parts[i % 4]} and the {parts[(i + 1) % 4]} number {i}", "label": label})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def make_encoder(tmp_path, make_model, make_tokenizer):
    """make_encoder(family) -> a saved encoder without a classification head."""

    def make(family="bert", **options):
        folder = tmp_path / f"encoder-{family}"
        make_model(family, **options).base_model.save_pretrained(folder)
        make_tokenizer(family).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def options(rows, make_encoder, tmp_path):
    return {
        "encoder": str(make_encoder()),
        "train": str(rows),
        "labels": ["sport", "bank"],
        "output": str(tmp_path / "teacher"),
        "epochs": 6,
        "learning_rate": 1e-2,
        "batch_size": 8,
        "max_length": 24,
    }


def test_an_encoder_without_head_becomes_a_teacher(options, rows, tmp_path):
    record = teach.teach(TeachConfig(**options, eval=str(rows)))
    assert record["texts"]["count"] == 40
    assert record["eval"]["num_texts"] == 40  # the rows labelled "sky" are nobody's here
    assert record["eval"]["accuracy"] > 0.9
    teacher = load_teacher(options["output"], run_seed=0)
    assert teacher.labels == ["sport", "bank"]  # the order given, not the alphabet
    model = transformers.AutoModelForSequenceClassification.from_pretrained(options["output"])
    assert model.config.label2id == {"sport": 0, "bank": 1}
    assert not list(tmp_path.glob(".teacher*"))
    assert json.loads((tmp_path / "teacher" / "teach.json").read_text())["labels"] == ["sport", "bank"]


def test_same_seed_same_weights(options, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        teach.teach(TeachConfig(**options | {"output": str(tmp_path / name), "seed": seed, "epochs": 1}))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_fitting_leaves_the_callers_random_state_and_does_not_read_it(make_model, make_tokenizer, texts):
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        recipe = teach.Recipe(epochs=2, learning_rate=5e-5)
        losses.append(teach.fine_tune(make_model(), make_tokenizer(), texts[:8], [0, 1] * 4, recipe))
        assert torch.equal(state, torch.get_rng_state())
    assert losses[0] == losses[1]


def test_labels_default_to_all_of_the_data_sorted(options, tmp_path):
    del options["labels"]
    assert teach.teach(TeachConfig(**options | {"epochs": 1}))["labels"] == ["bank", "sky", "sport"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["sport", "banks"], r"--labels: no row of .*rows\.jsonl has 'banks' \(nearest: bank\)"),
        (["sport", "sport"], "'sport' is named twice"),
        (["sport"], "needs two labels or more"),
    ],
)
def test_bad_labels_are_refused_before_any_work(options, labels, expected, tmp_path):
    with pytest.raises(UserError, match=expected) as caught:
        teach.teach(TeachConfig(**options | {"labels": labels}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "teacher").exists()


def test_a_limit_counts_rows_with_the_labels_and_leaves_none_of_these_out(options):
    labels = read_texts(options["train"], need_labels=True).labels
    wanted = options["labels"]
    assert next(row for row, label in enumerate(labels) if label not in wanted) < 6
    found = teach.teach(TeachConfig(**options | {"limit": 6, "epochs": 1, "batch_size": 3}))
    assert found["texts"]["count"] == 6
    with pytest.raises(UserError, match=r"--limit 1: the first rows of .*rows\.jsonl with these labels have no '\w+'; take more"):
        teach.teach(TeachConfig(**options | {"limit": 1, "overwrite": True}))


def test_a_missing_encoder_is_called_what_the_option_calls_it(options, tmp_path):
    with pytest.raises(UserError, match=r"^encoder .*/none: no such folder"):
        teach.teach(TeachConfig(**options | {"encoder": str(tmp_path / "none")}))


def test_existing_output_is_refused_replaced_only_when_told_and_kept_when_writing_fails(options, tmp_path, monkeypatch):
    output = tmp_path / "teacher"
    teach.teach(TeachConfig(**options | {"epochs": 1}))
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"already holds a model.*--overwrite"):
        teach.teach(TeachConfig(**options))

    def full(_):
        raise OSError(28, "No space left on device")

    again = TeachConfig(**options | {"epochs": 1, "seed": 5, "overwrite": True})
    with monkeypatch.context() as patch:
        patch.setattr(teach, "sync_folder", full)
        with pytest.raises(UserError, match=r"cannot be written.*No space left"):
            teach.teach(again)
    assert (output / "model.safetensors").read_bytes() == before
    teach.teach(again)
    assert (output / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.glob("*teacher*")) == ["teacher"]


def test_a_link_to_the_output_stays_one(options, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "teacher").symlink_to("real")
    for seed in (0, 1, 2):
        teach.teach(TeachConfig(**options | {"epochs": 1, "seed": seed, "overwrite": True}))
    assert (tmp_path / "teacher").is_symlink() and (tmp_path / "real" / "teach.json").exists()
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


@pytest.mark.parametrize("output", [".", "empty"])
def test_an_empty_folder_stays_the_same_and_is_filled(options, tmp_path, monkeypatch, output):
    """It may be where somebody stands, or a mount point: neither can be renamed."""
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / ".empty.0abc.partial").mkdir()  # of a run that was killed
    before = folder.stat().st_ino
    monkeypatch.chdir(folder if output == "." else tmp_path)
    teach.teach(TeachConfig(**options | {"epochs": 1, "output": output}))
    assert folder.stat().st_ino == before and load_teacher(folder, run_seed=0).labels == ["sport", "bank"]
    assert sorted(path.name for path in tmp_path.iterdir() if "empty" in path.name) == ["empty"]
    assert [path.name for path in folder.glob(".*")] == [".empty.0abc.partial"]


def test_an_empty_folder_needs_no_rights_on_the_one_above(options, tmp_path, monkeypatch):
    (tmp_path / "teacher").mkdir()
    monkeypatch.setattr(teach.os, "access", lambda path, mode: Path(path) == tmp_path / "teacher")
    assert teach.check_output(options["output"], False) == tmp_path / "teacher"


def test_a_teacher_that_cannot_be_moved_to_its_place_is_kept(options, tmp_path, monkeypatch):
    teach.teach(TeachConfig(**options | {"epochs": 1}))
    move = os.replace

    def busy(source, target):
        if Path(source) == tmp_path / "teacher":
            raise OSError(errno.EBUSY, "Device or resource busy")
        move(source, target)

    monkeypatch.setattr(teach.os, "replace", busy)
    with pytest.raises(UserError, match=r"busy\. The teacher that was trained meanwhile is ") as caught:
        teach.teach(TeachConfig(**options | {"epochs": 1, "seed": 5, "overwrite": True}))
    seed_of = lambda folder: json.loads((folder / "teach.json").read_text())["options"]["seed"]
    assert [seed_of(tmp_path / "teacher"), seed_of(Path(str(caught.value).rpartition(" is ")[2]))] == [0, 5]


def test_a_mount_point_is_not_to_be_replaced(options, tmp_path, monkeypatch):
    teach.teach(TeachConfig(**options | {"epochs": 1}))
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "teacher")
    with pytest.raises(UserError, match="cannot replace a mount point; name a folder in it"):
        teach.check_output(options["output"], True)


def test_a_folder_of_other_files_is_never_replaced(options, tmp_path):
    output = tmp_path / "teacher"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds files that are no model"):
        teach.teach(TeachConfig(**options, overwrite=True))
    assert (output / "thesis.txt").read_text() == "years of work"
    (output / "config.json").write_text('{"app": "of mine"}')
    with pytest.raises(UserError, match="a model that this command did not write"):
        teach.teach(TeachConfig(**options, overwrite=True))


def test_what_has_appeared_during_the_training_stays(options, tmp_path, monkeypatch):
    output, fit = tmp_path / "teacher", teach.fine_tune

    def meanwhile(*given):
        output.mkdir()
        (output / "notes.txt").write_text("mine")
        return fit(*given)

    monkeypatch.setattr(teach, "fine_tune", meanwhile)
    with pytest.raises(UserError, match=r"files that are no model; .* The teacher that was trained meanwhile is ") as caught:
        teach.teach(TeachConfig(**options))
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    assert load_teacher(str(caught.value).rpartition(" is ")[2], run_seed=0).labels == ["sport", "bank"]
    assert not list(tmp_path.glob(".teacher*"))


def test_two_that_teach_one_folder_lose_nothing(options, tmp_path, monkeypatch):
    fit, inner = teach.fine_tune, []

    def meanwhile(*given):
        if not inner:
            inner.append(True)
            teach.teach(TeachConfig(**options, seed=1))
        return fit(*given)

    monkeypatch.setattr(teach, "fine_tune", meanwhile)
    with pytest.raises(UserError, match=r"already holds a model; .* The teacher that was trained meanwhile is "):
        teach.teach(TeachConfig(**options))
    seeds = {path: json.loads((path / "teach.json").read_text())["options"]["seed"] for path in tmp_path.glob("teacher*")}
    assert seeds.pop(tmp_path / "teacher") == 1 and list(seeds.values()) == [0]


def test_overwrite_removes_nothing_but_a_teacher(options, tmp_path):
    output = tmp_path / "teacher"
    teach.teach(TeachConfig(**options | {"epochs": 1}))
    again = options | {"overwrite": True}
    with pytest.raises(UserError, match=r"would move away .*teacher, which this run reads"):
        teach.teach(TeachConfig(**again | {"encoder": str(output)}))
    (output / "data.jsonl").write_text("the only copy")
    with pytest.raises(UserError, match=r"would remove data\.jsonl"):
        teach.teach(TeachConfig(**again))
    assert (output / "data.jsonl").read_text() == "the only copy" and (output / "model.safetensors").exists()


def test_a_run_that_was_set_aside_under_this_name_stays(options, tmp_path):
    """By `train --overwrite`, which failed, and whose folder the user has removed since."""
    whole = tmp_path / ".teacher.replaced" / "run.json"
    whole.parent.mkdir()
    whole.write_text("{}")
    for overwrite in (False, True):
        teach.teach(TeachConfig(**options | {"epochs": 1, "overwrite": overwrite}))
        assert whole.read_text() == "{}" and len(list(tmp_path.glob(".teacher*"))) == 1


def test_a_folder_that_cannot_be_written_is_refused_before_the_training(options, monkeypatch):
    monkeypatch.setattr(teach.os, "access", lambda path, mode: False)
    monkeypatch.setattr(teach, "fine_tune", None)
    with pytest.raises(UserError, match=r"--output .*cannot be written; name another folder"):
        teach.teach(TeachConfig(**options))


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "deberta-v2", "modernbert", "llama"])
def test_frozen_layers_keep_every_weight_below(family, make_model, make_tokenizer, texts):
    tokenizer = make_tokenizer(family)
    model = make_model(family, layers=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teach.freeze(model, 1)
    recipe = teach.Recipe(epochs=1, learning_rate=1e-2, max_length=32)
    teach.fine_tune(model, tokenizer, texts[:16], [i % 2 for i in range(16)], recipe)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    layer = lambda number: {name for name in before if f".{number}." in name}
    assert changed & layer(1)
    assert not changed & layer(0)
    words = {"embeddings", "embed_tokens", "relative_attention_bias", "rel_embeddings"}
    assert not {name for name in changed if words & set(name.split("."))}
    assert any("classifier" in name or "score" in name for name in changed)


def test_frozen_teachers_of_one_encoder_share_their_trunk(options, tmp_path):
    weights = []
    for name, labels in (("a", ["sport", "bank"]), ("b", ["bank", "sky"])):
        teach.teach(TeachConfig(**options | {"output": str(tmp_path / name), "labels": labels, "freeze_layers": 1}))
        weights.append(transformers.AutoModel.from_pretrained(tmp_path / name).state_dict())
    equal = {name for name in weights[0] if torch.equal(weights[0][name], weights[1][name])}
    assert {name for name in weights[0] if ".layer.0." in name or name.startswith("embeddings")} <= equal
    assert not {name for name in weights[0] if ".layer.1." in name} & equal


@pytest.mark.parametrize(
    ("family", "layers", "expected"), [("bert", 3, "the encoder has 2 layers"), ("albert", 1, "no list of layers")]
)
def test_impossible_freezing_is_refused(family, layers, expected, make_model):
    with pytest.raises(UserError, match=expected):
        teach.freeze(make_model(family), layers)


def test_a_loss_that_is_no_number_stops_the_run(make_model, make_tokenizer, texts):
    model = make_model("bert")
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="the loss is nan in epoch 1"):
        teach.fine_tune(model, make_tokenizer("bert"), texts[:4], [0, 1, 0, 1], teach.Recipe(epochs=3, learning_rate=5e-5))


def test_evaluation_data_without_the_labels_is_refused_before_the_training(options, tmp_path, monkeypatch):
    monkeypatch.setattr(teach, "fine_tune", lambda *_: pytest.fail("trained in vain"))
    other = tmp_path / "other.csv"
    other.write_text("text,label\nhello there,greeting\n")
    with pytest.raises(UserError, match=r"--eval .*other\.csv: no row has any of the teacher's labels"):
        teach.teach(TeachConfig(**options | {"epochs": 1, "eval": str(other)}))


def test_the_command_prints_the_figures(options, rows, capsys):
    words = [f"--{name}={value}" for name, value in options.items() if name != "labels"]
    assert cli.main(["teach", *words, "--labels", "sport,bank", "--eval", str(rows)]) == 0
    assert "accuracy " in capsys.readouterr().out
    assert cli.main(["teach", *words]) == 2
    assert "already holds a model" in capsys.readouterr().err


def test_a_fit_follows_its_recipe(make_model, make_tokenizer, texts, monkeypatch):
    orders, norms = [], []
    monkeypatch.setattr(teach, "epoch_batches", lambda *given: orders.append(given[1:]) or epoch_batches(*given))
    norm = lambda optimizer: torch.stack([p.grad.norm() for group in optimizer.param_groups for p in group["params"]]).norm()
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: norms.append(norm(optimizer).item()))
    recipe = teach.Recipe(epochs=3, learning_rate=1e-3, batch_size=4, seed=7, max_grad_norm=1e-3)
    try:
        teach.fine_tune(make_model(), make_tokenizer(), texts[:8], [0, 1] * 4, recipe)
    finally:
        hook.remove()
    assert orders == [(4, 7, 0), (4, 7, 1), (4, 7, 2)]
    assert len(norms) == 6 and max(norms) < 1.01e-3


def test_the_loss_of_an_epoch_is_the_mean_over_its_texts(make_model, make_tokenizer, texts):
    model, tokenizer, labels = make_model(dropout=0.0), make_tokenizer(), torch.tensor([0, 1] * 5)
    expected = torch.nn.functional.cross_entropy(predict(model, tokenize(tokenizer, texts[:10], 128)), labels).item()
    recipe = teach.Recipe(epochs=1, learning_rate=1e-12, batch_size=4)
    assert teach.fine_tune(model, tokenizer, texts[:10], labels.tolist(), recipe) == pytest.approx(expected, rel=1e-5)


def test_the_dropout_of_pytorch_follows_the_seed(make_model, make_tokenizer, texts):
    """That of models whose layers have no form of ours (training_layers.py)."""
    losses = []
    for seed in (1, 2):
        recipe = teach.Recipe(epochs=1, learning_rate=1e-12, batch_size=8, seed=seed)
        losses.append(teach.fine_tune(make_model("modernbert"), make_tokenizer("modernbert"), texts[:8], [0, 1] * 4, recipe))
    assert abs(losses[0] - losses[1]) > 1e-4


def test_measuring_cuts_to_what_the_model_reads(make_model, make_tokenizer, texts):
    model, tokenizer = make_model("bert", max_position_embeddings=12), make_tokenizer()
    tokenizer.model_max_length = 10**6
    data = TextSet([" ".join(texts[:4])] * 2, ["a", "b"], np.arange(2), "rows", "0", 0)
    assert teach.measure(model, tokenizer, data, ["a", "b"], 10_000)["num_texts"] == 2
