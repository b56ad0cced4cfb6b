"""Configuration: precedence, ranges, one-line errors with the nearest name, and a saved file that repeats the run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from muka_fast.cli import COMMANDS, parse
from muka_fast.config import (
    GROUPS,
    METHODS,
    DemoConfig,
    DoctorConfig,
    EvalConfig,
    ReportConfig,
    RunConfig,
    ScoreConfig,
    TeachConfig,
    allowed_values,
    load_config,
)
from muka_fast.ds_config import prepare_ds_config
from muka_fast.errors import UserError
from muka_fast.identity import ds_identity

OUT_OF_RANGE = (1, 0.999999, 0.0, -0.1, 1.5, 1e-9, 1e-6, 2**-17)  # of --mc_dropout_p
MODELS = (RunConfig, ScoreConfig, TeachConfig, EvalConfig, DemoConfig, ReportConfig, DoctorConfig)


def test_defaults_are_the_published_recipe_but_for_the_method_and_the_length_of_training():
    config = load_config(RunConfig, None, {})
    published = {
        "margin": True,
        "mc_samples": 16,
        "score_temperature": 0.2,
        "kd_temperature": 1.0,
        "target": "deterministic",
        "warmup_ratio": 0.1,
        "max_length": 128,
        "batch_size": 16,
    }
    assert {name: config.resolved()[name] for name in published} == published
    assert config.method == "muka-auto"
    assert config.mc_scope == "last:1"
    assert config.mc_dropout_p is None


def test_the_measure_follows_from_the_passes():
    measure = lambda **flags: load_config(RunConfig, None, flags).resolved()["uncertainty"]
    assert measure() == measure(mc_samples=2) == "mutual_information"
    assert measure(mc=False) == measure(mc_samples=1) == "predictive_entropy"
    assert measure(uncertainty="variance") == "variance"


@pytest.mark.parametrize("model", MODELS)
def test_every_option_has_a_description_and_a_known_group(model):
    for field in model.model_fields.values():
        assert field.description
        assert field.json_schema_extra["group"] in GROUPS
        assert allowed_values(field)


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 2e-4\nmc-samples: 8\nepochs: 5\nteachers: [a, b]\n", encoding="utf-8")
    config = load_config(RunConfig, path, {"epochs": "7", "kd-temperature": 2})
    assert (config.learning_rate, config.mc_samples, config.epochs, config.kd_temperature) == (2e-4, 8, 7, 2.0)
    assert config.teachers == ["a", "b"]
    assert config.model_fields_set == {"learning_rate", "mc_samples", "epochs", "teachers", "kd_temperature"}


def test_a_flag_can_take_back_a_value_of_the_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("limit: 5\n", encoding="utf-8")
    assert load_config(RunConfig, path, {"limit": None}).limit is None


def test_paths_are_taken_as_given():
    config = load_config(RunConfig, None, {"teachers": [Path("a/b"), "../c"], "output": Path("out")})
    assert config.teachers == ["a/b", "../c"]
    assert config.output == "out"
    assert load_config(RunConfig, None, {"teachers": Path("one")}).teachers == ["one"]


def test_labels_come_as_text_or_as_a_list():
    required = {"encoder": "e", "train": "t", "output": "o"}
    assert load_config(TeachConfig, None, {**required, "labels": "a, b,c"}).labels == ["a", "b", "c"]
    # A list is taken literally: its names may hold commas.
    assert load_config(TeachConfig, None, {**required, "labels": ["a,b", "c"]}).labels == ["a,b", "c"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"epochs": "0"}, ["--epochs 0", "integer from 1 to 10000"]),
        ({"epochs": "2.5"}, ["--epochs 2.5", "integer"]),
        ({"epochs": 2.5}, ["--epochs 2.5", "integer"]),
        ({"learning_rate": "fast"}, ["--learning_rate fast", "number > 0"]),
        ({"learning_rate": float("nan")}, ["--learning_rate nan", "number > 0"]),
        ({"max_grad_norm": "inf"}, ["--max_grad_norm inf", "1e+06"]),
        ({"score_temperature": 0}, ["--score_temperature 0", "from 1e-06 to"]),
        ({"kd_temperature": 1e-39}, ["--kd_temperature 1e-39", "from 1e-06 to"]),
        *(({"mc_dropout_p": p}, [f"--mc_dropout_p {p}", "> 7.62939e-06 and <= 0.9"]) for p in OUT_OF_RANGE),
        ({"mc_dropout_p": float("nan")}, ["--mc_dropout_p nan", "number"]),
        ({"mc_samples": 0}, ["--mc_samples 0", "from 1 to 4096"]),
        ({"mc_scope": "last:0"}, ["--mc_scope last:0", "all, last:M", "head"]),
        ({"mc_scope": "last"}, ["--mc_scope last", "last:M"]),
        ({"method": "muka-sof"}, ["--method muka-sof", "vkd", "nearest: muka-soft"]),
        ({"uncertainty": "entropy"}, ["--uncertainty entropy", "mutual_information", "predictive_entropy"]),
        ({"target": 3}, ["--target 3", "mc_mean"]),
        ({"margin": "maybe"}, ["--margin maybe", "true or false"]),
        ({"device": "tpu"}, ["--device tpu", "cuda"]),
        ({"text_column": ""}, ["--text_column", "non-empty"]),
        ({"store": ""}, ["--store", "path"]),
        ({"label_map": ""}, ["--label_map", "path"]),
        ({"teachers": ["a", ""]}, ["--teachers", "list of names"]),
        ({"teachers": None}, ["--teachers None", "list"]),
        ({"teachers": [1]}, ["--teachers"]),
        ({"epcohs": 3}, ["unknown option 'epcohs'", "nearest: epochs"]),
        ({"resume": True, "overwrite": True}, ["--resume", "--overwrite"]),
        ({"teachers": ["a"], "store_teachers": ["b"]}, ["--teachers", "--store_teachers", "--store"]),
        ({"texts": ["a", "b"]}, ["--texts", "a path or hub name"]),
        ({"mc": False, "uncertainty": "mutual_information", "method": "muka-soft"}, ["--no-mc", "mutual_information"]),
        ({"mc_samples": 1, "uncertainty": "variance", "method": "muka-hard"}, ["--mc_samples 1", "variance"]),
        ({"mc": False, "uncertainty": "variance", "method": "vkd", "uncertainty_head": True}, ["--no-mc", "variance"]),
        ({"epochs": 0, "seed": -1}, ["--seed -1", "1 more"]),
    ],
)
def test_a_bad_value_is_one_line_with_option_value_and_range(flags, parts):
    with pytest.raises(UserError) as caught:
        load_config(RunConfig, None, flags)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_the_least_dropout_probability_is_the_least_that_drops_a_value():
    from muka_fast.ops.reference import dropout_threshold

    least = math.nextafter(2**-17, 1)
    assert [dropout_threshold(p) for p in (2**-17, least)] == [0, 1]
    assert load_config(RunConfig, None, {"mc_dropout_p": least}).mc_dropout_p == least


@pytest.mark.parametrize("scope", ["all", "head", "last:1", "last:12"])
def test_scopes_that_are_allowed(scope):
    assert load_config(RunConfig, None, {"mc_scope": scope}).mc_scope == scope


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_accepted(method):
    assert load_config(RunConfig, None, {"method": method}).method == method


def test_one_pass_is_allowed_where_the_measure_is_not_used():
    for method in ("vkd", "muka-auto"):  # the latter has its own measures
        assert load_config(RunConfig, None, {"mc": False, "uncertainty": "variance", "method": method}).mc is False
    assert load_config(RunConfig, None, {"mc": False, "uncertainty": "expected_entropy"}).mc is False


def test_a_file_of_train_given_to_another_command_is_named(tmp_path):
    (tmp_path / "run.yaml").write_text("student: encoder\n")
    with pytest.raises(UserError, match=r"run\.yaml: unknown key 'student': an option of train$"):
        load_config(ScoreConfig, tmp_path / "run.yaml", {})
    with pytest.raises(UserError, match="unknown option 'epocs'"):
        load_config(ScoreConfig, None, {"epocs": 1})


def test_a_flag_takes_the_place_of_what_excludes_it_in_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("store: s\nstore_teachers: [a, b]\n")
    found = load_config(RunConfig, tmp_path / "run.yaml", {"teachers": ["c"]})
    assert (found.teachers, found.store_teachers, found.store) == (["c"], [], "s")


def test_labels_are_split_alike_on_the_command_line_and_in_yaml(tmp_path):
    (tmp_path / "teach.yaml").write_text("encoder: e\ntrain: t\noutput: o\nlabels: '\"a, b\", c'\n")
    command = ["--encoder", "e", "--train", "t", "--output", "o", "--labels", '"a, b", c']
    assert load_config(TeachConfig, tmp_path / "teach.yaml", {}).labels == ["a, b", "c"]
    assert parse(COMMANDS["teach"], command, "teach").labels == ["a, b", "c"]


def test_missing_options_are_all_named():
    with pytest.raises(UserError, match=r"--teachers is required.*--texts, --output"):
        load_config(ScoreConfig, None, {})


def test_a_yaml_that_holds_nothing_sets_nothing(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert load_config(RunConfig, tmp_path / "run.yaml", {}) == RunConfig()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epcohs: 3\n", r"run\.yaml: unknown key 'epcohs' \(nearest: epochs\)"),
        (b"epochs: 0\n", r"run\.yaml: epochs: 0: must be an integer from 1 to 10000"),
        (b"epochs: [1\n", r"run\.yaml, line \d: not valid YAML"),
        (b"just text\n", r"run\.yaml: must hold lines of the form"),
        (b"epochs: 3\nmc: true\nepochs: 4\n", r"run\.yaml, line 3: .*the key 'epochs' is there twice"),
        (b"mc-samples: 3\nmc_samples: 4\n", r"run\.yaml: .* with - and with _"),
        (b"output: caf\xe9\n", r"run\.yaml: not UTF-8"),
    ],
)
def test_errors_of_the_yaml_name_the_file(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(RunConfig, path, {})


def test_missing_and_empty_yaml(tmp_path):
    with pytest.raises(UserError, match=r"no\.yaml: No such file"):
        load_config(RunConfig, tmp_path / "no.yaml", {})
    (tmp_path / "empty.yaml").write_text("", encoding="utf-8")
    assert load_config(RunConfig, tmp_path / "empty.yaml", {}) == RunConfig()


def test_the_flag_is_blamed_when_it_overrides_the_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("epochs: 2\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^--epochs 0"):
        load_config(RunConfig, path, {"epochs": 0})


@given(
    epochs=st.integers(1, 100),
    learning_rate=st.floats(1e-9, 1.0),
    method=st.sampled_from(METHODS),
    margin=st.booleans(),
    teachers=st.lists(st.text(min_size=1, max_size=20).filter(lambda name: name.isprintable()), max_size=4),
    limit=st.none() | st.integers(1, 10**9),
)
def test_a_saved_configuration_repeats_the_run(tmp_path_factory, **flags):
    path = tmp_path_factory.mktemp("saved") / "run.yaml"
    config = load_config(RunConfig, None, flags)
    path.write_text(yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    assert load_config(RunConfig, path, {}) == config
    assert json.loads(json.dumps(config.resolved())) == config.resolved() == yaml.safe_load(path.read_text("utf-8"))


def test_what_a_ds_config_says_goes_before_a_file_that_it_is_given_beside(tmp_path):
    """Flags override the file; and run.yaml holds every option, chosen or not."""
    (tmp_path / "run.yaml").write_text("batch_size: 16\nwarmup_ratio: 0.1\nlearning_rate: 1e-4\nds_config: old.json\n")
    ds = {"train_batch_size": 32, "scheduler": {"type": "WarmupLR"}}
    config = load_config(RunConfig, tmp_path / "run.yaml", {"ds_config": ds})
    made, settled = prepare_ds_config(ds, config, 1)
    assert settled.batch_size == made["train_batch_size"] == 32 and made["optimizer"]["params"]["lr"] == 1e-4
    for flags, told in (({"ds_config": ds, "batch_size": 16}, "--batch_size is 16"), ({}, "--batch_size is 16")):
        with pytest.raises(UserError, match=told):
            prepare_ds_config(ds, load_config(RunConfig, tmp_path / "run.yaml", flags), 1)


@pytest.mark.parametrize(
    ("option", "theirs"),
    [
        ("max_grad_norm", {"gradient_clipping": 0.5}),
        ("weight_decay", {"optimizer": {"params": {"weight_decay": 0.5}}}),
        ("learning_rate", {"optimizer": {"params": {"lr": 0.5}}}),
        ("learning_rate", {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.5}}}),
    ],
)
def test_so_it_does_about_each_option_that_it_may_say_as_well(option, theirs, tmp_path):
    (tmp_path / "run.yaml").write_text(f"{option}: 1\n")
    _, settled = prepare_ds_config(theirs, load_config(RunConfig, tmp_path / "run.yaml", {"ds_config": theirs}), 1)
    assert getattr(settled, option) == 0.5


@pytest.mark.parametrize(
    ("ours", "theirs", "trained"),
    [
        ("bf16", {"fp16": {"enabled": True}}, "fp16"),
        ("fp32", {"bf16": {"enabled": True}}, "bf16"),
        ("bf16", {"bf16": {"enabled": False}}, "fp32"),
        ("bf16", {"fp16": {"enabled": False}}, "bf16"),
        ("bf16", {}, "bf16"),
    ],
)
def test_so_it_does_about_the_precision(ours, theirs, trained, tmp_path):
    (tmp_path / "run.yaml").write_text(f"precision: {ours}\n")
    ds, settled = prepare_ds_config(theirs, load_config(RunConfig, tmp_path / "run.yaml", {"ds_config": theirs}), 1, "cuda")
    assert ds_identity(ds)["precision"] == trained and settled.precision in (None, trained)
    prepare_ds_config(theirs, RunConfig(**settled.resolved()), 1, "cuda")  # what run.yaml then says is no contradiction
    if trained != ours:
        asked = load_config(RunConfig, tmp_path / "run.yaml", {"ds_config": theirs, "precision": ours})
        with pytest.raises(UserError, match=f"--precision is {ours}"):
            prepare_ds_config(theirs, asked, 1, "cuda")


def test_json_of_eval_has_its_own_name():
    config = load_config(EvalConfig, None, {"model": "m", "data": "d", "json": True})
    assert config.json_output is True
    assert load_config(EvalConfig, None, config.resolved()) == config


def test_light_modules_import_neither_torch_nor_transformers():
    code = "import sys, muka_fast.cli, muka_fast.config, muka_fast.labels, muka_fast.errors, muka_fast.console\n"
    code += "print([m for m in ('torch', 'transformers', 'datasets', 'deepspeed', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_tilde_is_the_home_folder_in_paths_and_nowhere_else(monkeypatch, tmp_path):
    """A shell leaves it alone in --output=~/run and in YAML."""
    monkeypatch.setenv("HOME", str(tmp_path))
    options = {"teachers": ["~/news", "hub/bank"], "output": "~/run", "text_column": "~/column"}
    found = load_config(RunConfig, None, options)
    assert found.teachers == [f"{tmp_path}/news", "hub/bank"] and found.output == f"{tmp_path}/run"
    assert found.text_column == "~/column"
    assert load_config(RunConfig, None, {"teachers": "~/news"}).teachers == [f"{tmp_path}/news"]


@pytest.mark.parametrize("name", ["epochs", "learning_rate", "limit"])
def test_true_is_no_number(name):
    with pytest.raises(UserError, match=rf"--{name} True: must be"):
        load_config(RunConfig, None, {name: True})


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give such a name another form")
@pytest.mark.parametrize("place", ["option", "working folder"])
def test_a_path_that_is_not_utf8_is_told_at_once(place, tmp_path, monkeypatch):
    """Manifests hold absolute paths, as UTF-8."""
    name = os.fsdecode(b"caf\xe9")
    options = {"teachers": ["a"], "texts": "pool.txt", "output": "store"}
    if place == "option":
        options["texts"] = f"{name}/pool.txt"
    else:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
    with pytest.raises(UserError, match=r"--(texts|teachers) .*not UTF-8: rename it"):
        load_config(ScoreConfig, None, options)
