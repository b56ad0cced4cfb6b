"""The doctor: what it tells of a sound machine, of missing parts, and of sound and broken teachers."""

import importlib
import importlib.metadata
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import transformers

from muka_fast import doctor
from muka_fast.config import DoctorConfig


def run(capsys, *teachers):
    """Exit code and text of `muka-fast doctor`."""
    code = doctor.main(DoctorConfig(teachers=[str(path) for path in teachers]))
    captured = capsys.readouterr()
    return code, captured.out


def state(findings, what):
    """The one finding about `what`."""
    (found,) = [finding for finding in findings if finding.what == what]
    return found


def test_a_sound_machine(capsys):
    code, text = run(capsys)
    assert code == 0
    for word in ("torch", importlib.metadata.version("torch"), "transformers", "deepspeed", "threads of torch", "GPU"):
        assert word in text
    assert all(op in text for op in ("mc_statistics", "mc_head", "repeat_dropout", "distill_loss"))


def test_deepspeed_is_not_imported(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # an import would raise
    assert run(capsys)[0] == 0


def test_a_missing_and_an_old_package(monkeypatch, capsys):
    real = importlib.metadata.version

    def version(name):
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return "4.57.0" if name == "transformers" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    findings = list(doctor.package_findings())
    missing, old = state(findings, "deepspeed"), state(findings, "transformers")
    assert missing.state == old.state == "broken"
    assert missing.value == "missing" and "pip install 'deepspeed>=" in missing.way_out
    assert old.value == "4.57.0" and "pip install 'transformers>=5" in old.way_out
    assert run(capsys)[0] == 1


def test_a_missing_optional_package_is_no_fault(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    finding = state(doctor.package_findings(), "peft")
    assert finding.state == "ok" and "muka-fast[peft]" in finding.way_out


def test_what_is_required_is_required_on_this_machine_and_of_any_build(monkeypatch):
    """NVIDIA's images hold builds of torch before its release; Triton is asked for on Linux alone."""
    wanted = ["torch>=2.11", "triton>=99; platform_system == 'Plan9'", "muka-lacks>=1", "numpy>=99", "peft>=99; extra == 'peft'"]
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.14.0a0+nv26.10" if name == "torch" else real(name))
    found = {finding.what: finding for finding in doctor.package_findings()}
    assert [name for name, finding in found.items() if finding.state != "ok"] == ["numpy", "muka-lacks"]
    assert found["torch"].value == "2.14.0a0+nv26.10" and "triton" not in found
    assert found["muka-lacks"].way_out == "pip install 'muka-lacks>=1'"


@pytest.mark.parametrize("threads", [1, 4])
def test_idle_cores_are_noted(threads, monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    finding = state(doctor.machine_findings(), "threads of torch")
    expected = ("note", "OMP_NUM_THREADS=4 uses all cores") if threads == 1 else ("ok", "")
    assert (finding.state, finding.way_out) == expected
    if threads == 1:
        code, text = run(capsys)
        assert code == 0 and " to note." in text and "0 broken" in text


@pytest.mark.parametrize(("cuda", "reason"), [(None, "torch is a CPU build"), ("13.0", "the driver does not answer")])
def test_a_gpu_that_torch_does_not_reach(cuda, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    finding = state(doctor.machine_findings(), "GPU")
    assert finding.state == "note" and finding.value.endswith(f"unusable: {reason}")


def test_a_torch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert state(doctor.machine_findings(), "torch").state == "broken"


@pytest.mark.parametrize("compiler", [None, "clang++"])
def test_kernels_cannot_be_built_without_a_compiler(compiler, monkeypatch):
    monkeypatch.setitem(sys.modules, "muka_fast._C", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if name == compiler else None)
    assert ("install a C++ compiler first" in state(doctor.extension_findings(), "C++ kernels").way_out) == (compiler is None)


@pytest.mark.parametrize(("free", "expected"), [(2**30 - 1, "note"), (2**30, "ok"), (OSError("gone"), "note")])
def test_a_full_disk_and_none_are_noted(free, expected, monkeypatch):
    def usage(_):
        if isinstance(free, OSError):
            raise free
        return SimpleNamespace(free=free)

    monkeypatch.setattr(doctor.shutil, "disk_usage", usage)
    finding = state(doctor.folder_findings(), "free disk here")
    assert finding.state == expected and (finding.way_out != "") == (expected == "note")


@pytest.mark.parametrize("error", [ModuleNotFoundError("no _C"), ImportError("undefined symbol: x")])
def test_kernels_that_are_not_built(monkeypatch, error):
    real = importlib.import_module

    def load(name, *args):
        if name == "muka_fast._C":
            raise error
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", load)
    finding = state(doctor.extension_findings(), "C++ kernels")
    assert finding.state == "note" and "pip install -e ." in finding.way_out
    assert ("not built" in finding.value) == isinstance(error, ModuleNotFoundError)


def test_an_op_table_that_cannot_be_loaded(monkeypatch, capsys):
    real = importlib.import_module

    def load(name, *args):
        if name == "muka_fast.ops":
            raise ImportError("muka_fast._C has ABI 0,\nthis code needs 1")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", load)
    code, text = run(capsys)
    assert code == 1
    assert "ABI 0, this code needs 1" in text


def test_locks_of_killed_builds(tmp_path, monkeypatch):
    old, new = tmp_path / "py311_cpu" / "op" / "lock", tmp_path / "py311_cpu" / "other" / "lock"
    for lock in (old, new):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (time.time() - 10_000,) * 2)
    assert doctor.stale_locks(tmp_path) == [old]
    assert doctor.stale_locks(tmp_path / "none") == []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    finding = state(doctor.folder_findings(), "build lock")
    assert finding.value == str(old) and "delete" in finding.way_out


@pytest.mark.parametrize(
    ("variable", "path"),
    [("TORCH_EXTENSIONS_DIR", "op/lock"), ("XDG_CACHE_HOME", "torch_extensions/py311_cpu/op/lock"), (None, "py311_cpu/op/lock")],
)
def test_builds_lie_where_pytorch_places_them(variable, path, tmp_path, monkeypatch):
    """Right in the folder that is given, else in one of each Python under the user's caches."""
    lock = tmp_path / ".cache" / "torch_extensions" / path if variable is None else tmp_path / "given" / path
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 10_000,) * 2)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, str(tmp_path / "given"))
    assert state(doctor.folder_findings(), "build lock").value == str(lock)


def test_teachers(make_teacher, capsys):
    first = make_teacher("bert", ["a", "b"], seed=1, name="news")
    second = make_teacher("bert", ["b", "c", "d", "e"], seed=2, name="bank")
    third = make_teacher("roberta", ["f", "g"], name="other")
    code, text = run(capsys, first, second, third)
    assert code == 0
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for name in ("news", "bank", "other"):
        assert name in rows
    assert "7 classes, 1 of them shared" in text
    groups = [doctor.teacher_facts(path, "x").tokenizer_key for path in (first, second, third)]
    assert doctor.tokenizer_groups(groups) == ["A", "A", "B"]


def test_facts_of_a_teacher(make_teacher, make_model):
    facts = doctor.teacher_facts(make_teacher("bert", ["a", "b"], layers=3), "x")
    assert facts.architecture == "Bert"
    assert facts.labels == ["a", "b"]
    # Embeddings 1, layers 3 each (attention probabilities and two activations), head 1.
    assert facts.sites == [("head", 1, [0.1]), ("last:1", 4, [0.1]), ("all", 11, [0.1])]
    assert facts.num_parameters == sum(parameter.numel() for parameter in make_model("bert", layers=3).parameters())


@pytest.fixture
def relatives(make_teacher, make_model, make_tokenizer):
    """relatives({name: layers in common with the encoder}) -> folders of teachers of four layers."""

    def make(**common):
        encoder, tokenizer = make_model("bert", layers=4, seed=0), make_tokenizer("bert")
        folders = []
        for number, (name, count) in enumerate(common.items()):
            folder = make_teacher("bert", [f"{name}{i}" for i in range(2)], name=name, layers=4, seed=number + 1)
            model = make_model("bert", [f"{name}{i}" for i in range(2)], layers=4, seed=number + 1, tokenizer=tokenizer)
            model.bert.embeddings.load_state_dict(encoder.bert.embeddings.state_dict())
            for mine, theirs in zip(model.bert.encoder.layer[:count], encoder.bert.encoder.layer, strict=False):
                mine.load_state_dict(theirs.state_dict())
            model.save_pretrained(folder)
            folders.append(folder)
        return folders

    return make


def test_a_teacher_that_cannot_be_split_is_told(make_tokenizer, tmp_path):
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_heads": 4, "num_layers": 2, "vocab_size": 500, "dropout_rate": 0.1}
    config = transformers.T5Config(**sizes, eos_token_id=2, decoder_start_token_id=0, pad_token_id=0)
    transformers.T5ForSequenceClassification(config).save_pretrained(tmp_path / "t5")
    tokenizer = make_tokenizer("roberta")
    tokenizer.save_pretrained(tmp_path / "t5")
    facts, findings = doctor.examine_teachers([str(tmp_path / "t5")])
    assert not facts[0].splits and len({count for _, count, _ in facts[0].sites}) == 1
    assert "any --mc_scope is scored as all" in state(findings, "t5").way_out


def test_a_home_that_is_none_is_no_fault(monkeypatch):
    for name in ("HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # of nobody in the list of users
    assert list(doctor.folder_findings())


def test_the_tree_of_common_layers_and_what_it_saves(relatives, capsys):
    folders = relatives(news=3, bank=3, shop=2, alone=0)
    facts = [doctor.teacher_facts(folder, folder.name) for folder in folders]
    rows, finding = doctor.trunk_rows(facts)
    assert rows == [
        ("embeddings, layers 1 to 2", "news, bank, shop"),
        ("  layer 3", "news, bank"),
        ("  layer 3", "shop"),
        ("embeddings, layers 1 to 3", "alone"),
    ]
    # Layers 1 and 2 run once instead of three times, layer 3 once instead of twice: 5 of 16 layers, of forwards of 4 layers.
    assert "5 of 16 layers" in finding.value and "saves 1.25 of 4 forwards" in finding.value
    code, text = run(capsys, *folders)
    assert code == 0 and "embeddings, layers 1 to 2" in text and "saves 1.25 of 4 forwards" in " ".join(text.split())


def test_what_the_tree_saves_is_what_scoring_together_leaves_out(relatives):
    from test_shared import layers_run

    from muka_fast.shared import trunk_tree
    from muka_fast.teachers import load_teacher
    from muka_fast.trunk import StochasticTeacher

    folders = relatives(news=4, bank=3, shop=1)
    facts = [doctor.teacher_facts(folder, folder.name) for folder in folders]
    scorers = [StochasticTeacher(load_teacher(folder, run_seed=0), mc_scope="last:1") for folder in folders]
    run_layers = sum(map(layers_run, trunk_tree(scorers)))
    skipped = sum(scorer.layer for scorer in scorers) - run_layers
    assert f"{skipped} of 12 layers" in doctor.trunk_rows(facts)[1].value and skipped == 4


def test_teachers_with_nothing_in_common(relatives, capsys):
    folders = relatives(news=0, bank=0)
    assert "none" in doctor.trunk_rows([doctor.teacher_facts(folder, folder.name) for folder in folders])[1].value
    code, text = run(capsys, *folders)
    assert code == 0 and "--freeze_layers" in text


def test_teachers_without_dropout_come_with_the_way_out(make_teacher, capsys):
    code, text = run(capsys, make_teacher("bert", dropout=0.0, name="dry"))
    assert code == 0
    assert "--mc_dropout_p 0.1" in text
    assert "p = 0" in text


def test_broken_and_repeated_teachers(make_teacher, capsys):
    sound = make_teacher("bert", ["[bold]x[/bold]", "b"], name="sound")
    broken = make_teacher("bert", name="broken")
    (broken / "model.safetensors").write_bytes(b"123")
    code, text = run(capsys, sound, broken)
    assert code == 1
    assert "truncated or corrupt" in " ".join(text.split())
    assert "[bold]x[/bold]" in text
    code, text = run(capsys, sound, sound)
    assert code == 1
    assert "given twice" in " ".join(text.split())


def test_twenty_eight_tokenizers():
    keys = [str(i) for i in range(28)]
    groups = doctor.tokenizer_groups(keys)
    assert groups[:2] == ["A", "B"] and len(set(groups)) == 28
