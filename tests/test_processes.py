"""Runs and scorings by several real processes: the same numbers as one, and what happens where one of them dies or meets bad input."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import TRAIN, finish, launcher_variables, run_processes, start, wait_for
from runs import LABELS, SMOOTH_ADAM, arguments, largest_difference, losses, uncertainty_head, weights, word_tokenizer
from safetensors.torch import load_file, save_file

from muka_fast import train
from muka_fast.config import RunConfig
from muka_fast.errors import UserError

SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("muka-soft", "dfa")]
SCORE = ("-m", "muka_fast.cli", "score")
# Slow enough that a process which starts late still finds shards.
SLOW_SCORING = {"shard_size": 4, "mc_scope": "all", "mc_samples": 256, "token_budget": 64, "epochs": 1}


@pytest.mark.parametrize("method", ["muka-auto", *SLOW])
def test_two_processes_change_nothing(go, world, tmp_path, method):
    options = {"epochs": 1, "method": method}
    alone = go("alone", ds=SMOOTH_ADAM, **options)
    ds = {**SMOOTH_ADAM, "zero_optimization": {"stage": 2}}
    # The deepspeed launcher adds the rank.
    codes, told = finish(run_processes(arguments(world, tmp_path, "pair", ds, options), 2, ("--local_rank=0",)))
    assert codes == [0, 0], told
    pair = train.RunResult(tmp_path / "pair")
    assert losses(pair) == pytest.approx(losses(alone), rel=1e-6, abs=1e-8)
    assert largest_difference(weights(pair), weights(alone)) < 1e-6


@pytest.mark.slow
def test_two_processes_in_bf16(go, world, tmp_path):
    """On a CPU: fp32 weights and gradients, sums over processes included."""
    options = {"epochs": 1, "method": "supervised", "precision": "bf16"}
    alone = go("alone", ds=SMOOTH_ADAM, **options)
    codes, told = finish(run_processes(arguments(world, tmp_path, "pair", SMOOTH_ADAM, options), 2))
    assert codes == [0, 0], told
    pair = train.RunResult(tmp_path / "pair")
    assert losses(pair) == pytest.approx(losses(alone), rel=1e-3) and largest_difference(weights(pair), weights(alone)) < 1e-3


@pytest.mark.slow
def test_two_processes_train_the_same_uncertainty_head(go, world, tmp_path):
    options = {"epochs": 1}
    alone = go("alone", ds=SMOOTH_ADAM, uncertainty_head=True, **options)
    ds = {**SMOOTH_ADAM, "zero_optimization": {"stage": 3}}
    codes, told = finish(run_processes(arguments(world, tmp_path, "pair", ds, options), 2, ("--uncertainty_head",)))
    assert codes == [0, 0], told
    pair = train.RunResult(tmp_path / "pair")
    torch.testing.assert_close(uncertainty_head(pair)["scale"], uncertainty_head(alone)["scale"], atol=1e-2, rtol=1e-2)
    assert largest_difference(weights(pair), weights(alone)) < 1e-6


@pytest.mark.slow
def test_resume_with_another_number_of_processes(go, stop_at, monkeypatch, world, tmp_path):
    """One process, then two, then one again; losses as of one alone to 1e-5 relative, weights to 1e-5: sums in another order."""
    options = {"epochs": 60}
    whole = go("whole", ds=SMOOTH_ADAM, **options)
    stop_at(20)
    assert go("cut", ds=SMOOTH_ADAM, **options).stopped
    monkeypatch.undo()
    ds = {**SMOOTH_ADAM, "zero_optimization": {"stage": 2}}
    pair = run_processes(arguments(world, tmp_path, "cut", ds, options), 2, ("--resume",))
    metrics = tmp_path / "cut" / "metrics.jsonl"
    wait_for(lambda: len(metrics.read_text().splitlines()) > 40, pair)
    pair[1].terminate()
    codes, told = finish(pair)
    assert codes == [train.STOPPED] * 2, told
    steps = len(losses(train.RunResult(tmp_path / "cut")))
    assert 40 < steps < 300 and f"stopped by a signal to another process after step {steps} of 300" in told
    resumed = go("cut", ds=SMOOTH_ADAM, resume=True, **options)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5, abs=1e-8)
    assert largest_difference(weights(resumed), weights(whole)) < 1e-5


def test_an_output_that_this_node_does_not_see_is_named(world, tmp_path):
    """A process of another node is told that one of them has begun the store, and finds none."""
    from muka_fast.shard_queue import ShardQueue

    class Elsewhere(ShardQueue):
        def agree(self, name, propose):
            return 4096 if name == "shard_size" else propose()

    config = RunConfig(**arguments(world, tmp_path, "run", None, {"store": None}))
    with pytest.raises(UserError, match=r"run.*supervision is not visible here.*file system that all nodes share"):
        train.fill_store(tmp_path / "run" / "supervision", config.teachers, train.read_data(config), config, Elsewhere())


# ---- scoring ----


def store_files(store: Path) -> dict[str, bytes]:
    """Every file of a store by its path in it."""
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"batch_size": 8}, r"\(--batch_size 8 instead of 16"),
        ({"seed": 5}, r"\(--seed 5 instead of 0\)"),
        ({"ds_config": "other.json"}, r"\(zero_optimization\.stage 2 instead of 0"),
        ({"eval": None}, r"\(--eval False instead of True\)"),
    ],
    ids=["batch", "seed", "stage", "eval"],
)
@pytest.mark.slow
def test_processes_with_other_options_are_told_so_instead_of_waiting(world, tmp_path, changed, told):
    options = {"batch_size": 16, "eval": str(world / "texts.jsonl")}
    both = arguments(world, tmp_path, "pair", SMOOTH_ADAM, options), arguments(world, tmp_path, "pair", SMOOTH_ADAM, options)
    if "ds_config" in changed:
        changed = {"ds_config": str(tmp_path / "other.json")}
        (tmp_path / "other.json").write_text(json.dumps({**SMOOTH_ADAM, "zero_optimization": {"stage": 2}}))
    codes, log = finish(start(list(zip((both[0], both[1] | changed), launcher_variables(2), strict=True))))
    assert codes == [2, 2] and re.search(f"error: process 1 was given other options than process 0 {told}", log), log
    assert log.count("error:") == 1


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("teacher", "process [01] reads other files of teacher home than another one: all must read the same"),
        ("texts", "process [01] reads other files of texts than another one: all must read the same"),
        pytest.param("student", r"process 1 reads other files than process 0 \(student ", marks=pytest.mark.slow),
    ],
)
def test_processes_that_read_other_files_are_told_so(world, tmp_path, part, told):
    """Copies on each node, of which one is another: the names and the labels are the same, the weights or texts are not."""
    mine, theirs = (arguments(world, tmp_path, "pair", SMOOTH_ADAM, {"store": str(tmp_path / "store")}) for _ in range(2))
    copies = tmp_path / "node2"
    copies.mkdir()
    if part == "texts":
        (copies / "texts.jsonl").write_text((world / "texts.jsonl").read_text().replace("bank", "bonk"))
        theirs["texts"] = str(copies / "texts.jsonl")
    else:
        name = {"teacher": "home", "student": "student"}[part]
        shutil.copytree(world / name, copies / name)
        file = copies / name / "model.safetensors"
        save_file({key: value + 0.01 for key, value in load_file(file).items()}, file, {"format": "pt"})
        theirs |= {"student": str(copies / name)} if part == "student" else {"teachers": [mine["teachers"][0], str(copies / name)]}
    codes, log = finish(start(list(zip((mine, theirs), launcher_variables(2), strict=True))))
    assert codes == [2, 2] and re.search(told, log), log
    assert log.count("error:") == 1 and not list((tmp_path / "store").glob("*/shard-*"))[: part != "student"]


def test_two_processes_fill_the_store_that_one_fills(go, world, tmp_path):
    """Bit for bit, manifest included; each text is scored once, and both processes did some."""
    alone = go("alone", store=None, **SLOW_SCORING)
    options = arguments(world, tmp_path, "pair", None, {"store": None, **SLOW_SCORING})
    codes, told = finish(run_processes(options, 2))
    assert codes == [0, 0], told
    assert store_files(tmp_path / "pair" / "supervision") == store_files(alone.output / "supervision")
    shares = re.findall(r"process (\d) scored (\d+) of 75 texts with (\w+)", logs(tmp_path / "pair"))
    assert {(rank, teacher) for rank, _, teacher in shares} == {(rank, teacher) for rank in "01" for teacher in LABELS}
    for teacher in LABELS:
        assert sum(int(count) for _, count, name in shares if name == teacher) == 75
    assert {rank for rank, count, _ in shares if int(count)} == {"0", "1"}
    assert "process 0 scored" in told and "process 1 scored" not in told  # on the console only process 0 speaks


def logs(output: Path) -> str:
    return "".join(path.read_text() for path in sorted((output / "logs").glob("*.log")))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_while_scoring_ends_the_job_and_resume_finishes(world, tmp_path, victim):
    options = arguments(world, tmp_path, "run", None, {"store": None, **SLOW_SCORING})
    processes = run_processes(options, 2)
    store = tmp_path / "run" / "supervision"
    wait_for(lambda: len(list(store.glob("*/shard-*"))) >= 4, processes)
    processes[victim].kill()
    assert processes[1 - victim].wait(timeout=20) == 1
    _, told = finish(processes)
    assert "is gone while scoring: stopping" in told
    before = {path: path.stat().st_mtime_ns for path in store.glob("*/shard-*")}
    whole = 4 * 19  # shards of 4 of the 75 texts: two teachers, the neutral features and the token ids that all share
    assert 4 <= len(before) < whole
    codes, told = finish(run_processes(options, 2, ("--resume",)))
    assert codes == [0, 0], told
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was scored again
    assert len(list(store.glob("*/shard-*"))) == whole and (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_score_under_a_launcher_fills_the_store_that_one_process_fills(world, tmp_path):
    options = {"teachers": [str(world / name) for name in LABELS], "texts": str(world / "texts.jsonl"), **SLOW_SCORING}
    del options["epochs"]
    program = ("-m", "muka_fast.cli", "score")
    for name, count in (("alone", 1), ("pair", 2)):
        codes, told = finish(run_processes(options | {"output": tmp_path / name}, count, program=program))
        assert codes == [0] * count, told
        assert told.count("mean normalised entropy") == len(LABELS)  # process 0 tells the figures
    files = store_files(tmp_path / "pair")
    shares = [files.pop(f"logs/rank{rank}.log").decode() for rank in range(2)]
    assert all(re.search(r"scored [1-9]\d* of 75 texts", share) for share in shares)
    assert files == store_files(tmp_path / "alone")


# ---- faults ----


@pytest.mark.slow
def test_bad_input_met_by_one_process_ends_all_with_one_message(world, tmp_path, make_model, texts):
    """NaN in a teacher's logits for one text: whoever scores it tells, the other leaves its work."""
    broken = tmp_path / "broken"
    tokenizer = word_tokenizer(texts)
    model = make_model("bert", LABELS["news"], tokenizer=tokenizer)
    with torch.no_grad():  # finite, but not what a norm makes of it
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("Mongolia")] = 3e38
    model.save_pretrained(broken)
    tokenizer.save_pretrained(broken)
    pool = tmp_path / "pool.txt"
    rows = [line.strip() for line in texts if "Mongolia" not in line] * 2
    rows.insert(len(rows) // 2, "What is the capital of Mongolia?")
    pool.write_text("".join(f"{row}\n" for row in rows))
    options = {"teachers": [str(broken)], "texts": str(pool), "store": None, **SLOW_SCORING}
    codes, told = finish(run_processes(arguments(world, tmp_path, "run", None, options), 2))
    assert codes == [2, 2], told
    assert told.count("muka-fast: error:") == 1 and "teacher 'broken': its output for text 46 of " in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (TRAIN, {"teachers": ["nobody"]}, "teacher nobody: "),
        (TRAIN, {"batch_size": 0}, "--batch_size 0: must be"),  # before the processes are connected
        (TRAIN, {"texts": "nowhere.jsonl"}, "nowhere.jsonl"),
        (TRAIN, {"teachers": None}, "holds no completely scored teacher"),
        (TRAIN, {"method": "mean"}, "--method mean needs teachers of one label set"),
        (SCORE, {"texts": "nowhere.jsonl"}, "nowhere.jsonl"),
        (SCORE, {"teachers": ["nobody"]}, "teacher nobody: "),
    ],
)
def test_bad_input_is_told_once_by_two_processes(world, tmp_path, program, options, message):
    """Process 0 speaks, both end with code 2."""
    options = arguments(world, tmp_path, "run", None, {"store": str(tmp_path / "store"), "mc_scope": "head"} | options)
    if program is SCORE:
        options = {name: options[name] for name in ("teachers", "texts", "mc_scope", "output")}
    codes, told = finish(run_processes(options, 2, program=program))
    assert codes == [2, 2] and told.count("muka-fast: error:") == 1 and message in told, told


@pytest.mark.slow
def test_weights_that_zero_keeps_twice_train_after_the_rehearsal(go, world, tmp_path):
    """Their groups of processes are DeepSpeed's own, once per process; the scores are those of a run without them, bit for bit."""
    ds, options = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, {"store": None, "epochs": 1}
    alone = go("alone", **options)
    codes, told = finish(run_processes(arguments(world, tmp_path, "pair", ds, options), 2))
    assert codes == [0, 0], told
    assert store_files(tmp_path / "pair" / "supervision") == store_files(alone.output / "supervision")


@pytest.mark.slow
def test_what_deepspeed_refuses_is_told_once_before_the_scoring(world, tmp_path):
    ds = {"zero_optimization": {"stage": 2}, "prescale_gradients": True}
    codes, told = finish(run_processes(arguments(world, tmp_path, "run", ds, {"store": str(tmp_path / "store")}), 2))
    assert codes == [2, 2] and told.count("error:") == 1 and "DeepSpeed refuses it: pre-scale gradients" in told, told
    assert not (tmp_path / "store").exists() and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dead_worker_takes_the_job_down_within_seconds(world, tmp_path):
    options = arguments(world, tmp_path, "run", None, {"epochs": 10_000})
    processes = run_processes(options, 2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, processes)
    processes[1].kill()
    assert processes[0].wait(timeout=30) == 1
    _, told = finish(processes)
    assert "is gone: stopping" in told and "Traceback" not in told


LEAVING = """if True:
    import torch
    from muka_fast.group import shut_down

    torch.distributed.init_process_group("gloo")
    held = torch.distributed.group.WORLD  # as DeepSpeed holds it: gloo's threads stay
    torch.distributed.all_gather_object([None, None], "done")
    torch.distributed.all_reduce(torch.ones(200_000))
    shut_down()
"""


@pytest.mark.slow
def test_processes_end_well_right_after_an_exchange():
    """Without a moment's patience one in eight was aborted by gloo's threads."""
    for _ in range(10):
        codes, told = finish(run_processes({}, 2, program=("-c", LEAVING)))
        assert codes == [0, 0], told


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_random_moments_change_nothing(world, tmp_path, processes):
    """SIGKILL at 20 random moments of scoring, training, saving and exporting; --resume ends with the same weights, bit for bit.

    Of two processes one is killed, or both; one that is left ends within seconds.
    """
    slow_scoring = {"shard_size": 4, "mc_scope": "all", "mc_samples": 32}
    options = arguments(world, tmp_path, "kills", None, {"save_every": 1, **slow_scoring})
    (tmp_path / "options.json").write_text(json.dumps(options))
    harness = str(Path(__file__).parent / "kill_harness.py")
    command = [sys.executable, harness, str(tmp_path / "options.json"), "20", "1", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 20 and found["runs"] >= 1 and found["same"], found
    assert len(found["moments"]) >= 4, found  # a kill that aims at a stage may fall into the next one
    assert found["longest"] < 30, found
