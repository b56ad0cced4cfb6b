"""What is said before a run begins; what is refused there: test_bad_input.py and test_train.py, through the command."""

import pytest

from muka_fast.config import METHODS, RunConfig
from muka_fast.data import read_texts
from muka_fast.labels import build_label_space
from muka_fast.preflight import tell_of_little, tell_unused_options

CHOSEN = {"margin": False, "normalize_margin": True, "score_temperature": 0.5, "uncertainty": "variance"}
CHOSEN |= {"target": "mc_mean", "kd_temperature": 2.0, "neutral_encoder": "reader", "teacher_balance": 1.0}
TARGET = {"target", "kd_temperature"}
POOL = {"neutral_encoder", "teacher_balance"}
READ = {"muka-soft": set(CHOSEN) - POOL, "muka-hard": set(CHOSEN) - POOL - {"score_temperature"}}
READ |= {"oracle": TARGET | {"uncertainty"}, "muka-evidence": TARGET | POOL, "muka-auto": TARGET | POOL}
READ |= {method: {"kd_temperature"} for method in ("vkd", "uhc", "dfa", "cfl", "mean")}


@pytest.mark.parametrize("method", METHODS)
def test_options_that_the_method_does_not_look_at_are_named(method, caplog):
    tell_unused_options(RunConfig(method=method))
    tell_unused_options(RunConfig(method=method, mc=False))  # whose default measure is another
    assert not caplog.records
    tell_unused_options(RunConfig(method=method, **CHOSEN))
    read = READ.get(method, set()) - {"normalize_margin"}  # of a margin that --no-margin leaves out
    unused = [name for name in CHOSEN if name not in read]
    assert bool(caplog.records) == bool(unused)
    for name in CHOSEN:
        typed = "--no-margin" if name == "margin" else f"--{name}"
        assert (typed in caplog.text) == (name in unused)


def test_options_of_passes_that_are_not_made_are_named(caplog):
    tell_unused_options(RunConfig(mc=False, mc_scope="all", mc_stop=0.05, uncertainty="predictive_entropy"))
    assert "--mc_scope, --mc_stop: --no-mc makes no stochastic passes" in caplog.text
    caplog.clear()
    tell_unused_options(RunConfig(mc_scope="all", mc_stop=0.05))
    assert not caplog.records


@pytest.mark.parametrize("more", [{"uncertainty_head": True}, {"mc_stop": 0.05}])
def test_the_measure_may_be_for_something_else(more, caplog):
    tell_unused_options(RunConfig(uncertainty="variance", **more))
    assert not caplog.records


@pytest.mark.parametrize(
    ("texts", "different", "teachers", "told"),
    [
        (15, 15, 1, "only one teacher (t0)"), (14, 14, 1, "14 texts are few for 3 classes"), (15, 15, 2, ""), (20, 15, 2, ""),
        (20, 14, 2, "20 texts, of which 14 are different, are few for 3 classes"),
    ],
)  # fmt: skip
def test_few_texts_and_a_teacher_alone_are_told(texts, different, teachers, told, tmp_path, caplog):
    (tmp_path / "t.txt").write_text("".join(f"text {i % different}\n" for i in range(texts)))
    space = build_label_space([(f"t{i}", ["a", "b", "c"]) for i in range(teachers)])
    tell_of_little(RunConfig(store="store"), space, read_texts(tmp_path / "t.txt"))
    assert told in caplog.text and bool(caplog.records) == bool(told)
    caplog.clear()
    tell_of_little(RunConfig(teachers=["t0"]), space, read_texts(tmp_path / "t.txt"))
    assert ("only one teacher" in caplog.text) == (teachers == 1)
