"""Scoring and training steps never wait for the GPU: proven on fake CUDA tensors (fake_gpu.py), which have no values to read."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_gpu import WAITS, WouldWait, fake_gpu, move

from muka_fast import fused_layers, training_layers
from muka_fast.config import RunConfig
from muka_fast.data import Tokens
from muka_fast.engine import Engine
from muka_fast.intercept import run_without_waiting
from muka_fast.loop import train_step
from muka_fast.memory import send
from muka_fast.methods import METHODS
from muka_fast.neutral import mean_states
from muka_fast.ops import table
from muka_fast.optim import clip_gradients
from muka_fast.scoring import fetched
from muka_fast.shared import score_together, trunk_tree
from muka_fast.sites import sites_of_config
from muka_fast.split import ModelSplit
from muka_fast.teachers import Teacher, settle_forward
from muka_fast.trunk import StochasticTeacher

FAMILIES = ["bert", "mpnet", "modernbert", "llama"]
# Decoders have no dropout site in their head.
CASES = [(family, scope) for family in FAMILIES for scope in ("last:1", "head", "all") if (family, scope) != ("llama", "head")]


@pytest.fixture(autouse=True)
def transformers_sees_real_tensors(monkeypatch):
    """Where it builds masks, transformers does not look into fake tensors, which it takes for those of a compiler; here it shall."""
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: False)


def a_batch():
    mask = (np.arange(9) < np.array([9, 4, 6, 1])[:, None]).astype(np.int64)
    ids = np.where(mask > 0, 7, 0)
    return torch.from_numpy(ids), torch.from_numpy(mask), np.array([3, 2**32 - 1, 0, 8])


@pytest.fixture
def on_fake_gpu(make_model, make_tokenizer):
    """A teacher whose set-up ran on the CPU and whose weights are then gone to the fake device."""

    def make(family, scope, budget=1 << 30, dtype=torch.float32):
        model = make_model(family, ("a", "b", "c")).to(dtype)
        tokenizer = make_tokenizer(family)
        teacher = Teacher("news", "news", model, tokenizer, "key", ["a", "b", "c"], "fingerprint", 7, tokenizer.pad_token_id, 64)
        scorer = StochasticTeacher(teacher, mc_scope=scope, mc_samples=4, mc_dropout_p=0.1)
        scorer._budget = lambda: budget
        return scorer

    return make


@pytest.mark.parametrize(("family", "scope"), CASES)
@pytest.mark.parametrize("budget", [1 << 30, 1 << 12], ids=["at once", "in parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_does_not_wait(family, scope, budget, dtype, on_fake_gpu):
    teacher = on_fake_gpu(family, scope, budget, dtype)
    assert teacher.fast is not None
    batch = a_batch()
    with fake_gpu():
        move(teacher.model)
        scores = teacher.launch(*batch)
        assert all(value.device.type == "cuda" and len(value) == 4 for value in vars(scores).values())
        fetched([scores])
        with pytest.raises(WouldWait):  # but whoever looks at the scores does
            scores.logits.cpu()


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])  # MPNet's own attention asks for the padding
def test_neutral_features_do_not_wait(family, make_model):
    encoder = make_model(family).base_model
    settle_forward(encoder)
    run_without_waiting(encoder)
    with fake_gpu():
        move(encoder)
        states = mean_states(encoder, *a_batch()[:2])
        assert states.device.type == "cuda" and states.shape == (4, encoder.config.hidden_size)


def test_positions_are_rerouted_once(make_model):
    model = make_model("mpnet")
    found = [ModelSplit(model).model.base_model.encoder.compute_position_bias for _ in range(2)]
    assert found[0] is found[1] and "compute_position_bias" in vars(model.base_model.encoder)


def test_teachers_that_share_their_trunk_do_not_wait(on_fake_gpu):
    teachers = [on_fake_gpu("bert", scope) for scope in ("last:1", "head")]
    tree, batch = trunk_tree(teachers), a_batch()
    assert len(tree) == 1
    with fake_gpu():
        for teacher in teachers:
            move(teacher.model)
        assert len(score_together(teachers, *batch, tree)) == 2


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.repeat_interleave(x, x),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: torch.arange(3).to(x.device),
        lambda x: x.copy_(torch.ones(3, dtype=torch.int64)),
        lambda x: torch.empty(3, dtype=torch.int64).copy_(x),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_what_waits_is_seen(wait, inference):
    with fake_gpu(), torch.inference_mode(inference), pytest.raises((*WAITS, WouldWait)):
        wait(torch.empty(3, dtype=torch.int64, device="cuda"))


def test_indexing_gives_the_shapes_of_pytorch():
    rows = torch.tensor([0, 2, 1])
    indices = [0, (slice(None), None), (..., None), (None, 1), (slice(1, 3), -1), (rows,), (rows, rows), (slice(None), rows, None)]
    indices.append((..., 0))
    for index in indices:
        expected = torch.empty(4, 5, 6)[index].shape
        with fake_gpu():
            to_cuda = lambda item: torch.empty(3, dtype=torch.int64, device="cuda") if isinstance(item, torch.Tensor) else item
            fake = tuple(map(to_cuda, index)) if isinstance(index, tuple) else index
            assert torch.empty(4, 5, 6, device="cuda")[fake].shape == expected


class FakeEngine:
    """What `train_step` asks of an engine, on the fake device: PyTorch's backward and DeepSpeed's own part are not looked at (autograd
    asks for the device's streams, which a CPU build lacks)."""

    micro_batches, world_size, rank, completed_steps = 2, 1, 0, 0
    device = torch.device("cuda:0")
    sum_both = Engine.sum_both

    def __init__(self, model):
        self.model = model

    def __call__(self, **batch):
        return self.model(**{name: send(value, self.device) for name, value in batch.items()})

    def backward(self, loss):
        for parameter in self.model.parameters():
            parameter.grad = torch.empty_like(parameter)

    def step(self):
        clip_gradients([{"params": list(self.model.parameters())}], 1.0)


@pytest.mark.parametrize("method", ["muka-soft", "vkd", "uhc"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "llama"])
def test_a_training_step_does_not_wait(family, method, make_model):
    engine = FakeEngine(make_model(family, ("a", "b", "c", "d")).train())
    run_without_waiting(engine.model)
    space = SimpleNamespace(teacher_to_union=[0, 1, 1, 2, 3], num_classes=4)
    logits, pair = torch.randn(6, 5), torch.rand(6, 2)
    measures = dict.fromkeys(("predictive_entropy", "expected_entropy", "mutual_information", "normalized_entropy"), pair)
    sup = SimpleNamespace(logits=logits, offsets=[0, 2, 5], teachers=[0, 1], class_counts=[2, 3], **measures)
    config = RunConfig(method=method, uncertainty="predictive_entropy")
    chosen = METHODS[method](config, sup, space, None)
    tokens = Tokens(np.full(30, 7, np.int32), np.arange(0, 31, 5))
    union = chosen.union_on(torch.device("cpu"))
    chosen.denominator = lambda rows: 6.0  # arithmetic of the host, which has no values inside either
    with fake_gpu(), torch.no_grad():
        move(engine.model)
        chosen._union_on[engine.device] = torch.empty(union.shape, dtype=torch.int64, device="cuda")
        step = train_step(engine, chosen, tokens, np.arange(6), config, lambda: 0.0, 0, lambda rows: None)
    assert step.number == 1 and len(step.seen) == 2 and step.outcome.values.shape == (2,)


@pytest.mark.parametrize("width", [16, 20])
@pytest.mark.parametrize("takes", [True, False])
@pytest.mark.parametrize("family", ["bert", "distilbert", "albert", "electra"])  # MPNet's own attention asks for the padding
def test_drawing_the_masks_of_a_training_step_does_not_wait(family, takes, width, make_model, monkeypatch):
    """Told its texts, and with all that a recording would hold. Layers are fused; no multiple of eight is masked by other means."""
    drawn = []
    monkeypatch.setattr(fused_layers, "takes", lambda *states: takes)
    monkeypatch.setattr(fused_layers, "residual_norm", lambda x, *more, draws, **_: drawn.append(draws) or torch.empty_like(x))
    attention = lambda qkv, heads, *, draws, **_: drawn.append(draws) or qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    monkeypatch.setattr(fused_layers, "self_attention", attention)
    monkeypatch.setitem(table.TABLE["repeat_dropout"], "cuda", "triton")
    model = make_model(family, ("a", "b", "c"), dropout=0.3, layers=3, hidden=width).train()
    run_without_waiting(model)
    sites = sites_of_config(model.config)
    monkeypatch.setattr(training_layers, "sites_of_config", lambda config: sites)
    with fake_gpu(), torch.no_grad():
        move(model)
        with training_layers.training_layers(model, 3, torch.device("cuda:0"), 6) as next_texts:
            for texts in (4, 3):
                next_texts(torch.arange(texts), 2)
                ids = torch.empty(texts, 9, dtype=torch.int64, device="cuda")
                assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.device.type == "cuda"
    norms = 3 if family in ("distilbert", "albert") else 6
    assert len([draws for draws in drawn if draws]) == 2 * (2 * takes + norms * (width % 8 == 0))


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_masks_built_without_waiting_are_those_of_transformers(family, make_model):
    ids, mask, _ = a_batch()
    model = make_model(family, ("a", "b"))
    saved = model.config.to_json_string()
    plain = model(input_ids=ids, attention_mask=mask).logits
    run_without_waiting(model)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, plain)
    assert model.config.to_json_string() == saved  # nothing of it reaches an exported student
