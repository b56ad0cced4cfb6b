"""Common trunks: found by content, run once, and the scores stay those of each teacher alone."""

import pytest
import torch

from muka_fast import shared
from muka_fast.layered import LayeredEncoder
from muka_fast.shared import Prefixes, score_together, tie_shared_weights, trunk_tree
from muka_fast.split import ModelSplit
from muka_fast.teachers import Teacher
from muka_fast.trunk import StochasticTeacher


@pytest.fixture
def relatives(make_model, make_tokenizer):
    """relatives(family, [(layers in common with the first, scope), ...]) -> teachers of four layers."""

    def make(family, plan, *, tokenizer_keys=None, **config):
        tokenizer, teachers, first = make_tokenizer(family), [], None
        for number, (common, scope) in enumerate(plan):
            model = make_model(family, "abc"[: 2 + number % 2], layers=4, seed=0, tokenizer=tokenizer, **config)
            first = first or model
            model.base_model.load_state_dict(first.base_model.state_dict())
            for name, parameter in model.named_parameters():
                layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
                in_layer = layer is not None and layer < common
                if number and not in_layer and (layer is not None or name.startswith(("classifier", "score"))):
                    torch.manual_seed(100 * number + (layer or 0))
                    parameter.data += 0.1 * torch.randn_like(parameter)
            key = "k" if tokenizer_keys is None else tokenizer_keys[number]
            fields = {"path": "", "tokenizer_key": key, "fingerprint": "", "max_length": 64, "labels": list("abc")}
            fields |= {"tokenizer": tokenizer, "pad_id": tokenizer.pad_token_id, "name": f"t{number}", "seed": 7 + number}
            teachers.append(StochasticTeacher(Teacher(model=model, **fields), mc_scope=scope, mc_samples=3))
        return teachers

    return make


@pytest.fixture
def batch(make_tokenizer, texts):
    def make(family):
        out = make_tokenizer(family)(texts[38:43], return_tensors="pt", padding=True, truncation=True, max_length=16)
        return out["input_ids"], out["attention_mask"], torch.arange(5)

    return make


def shared_layers(a, b):
    """How many leading layers (embeddings included) two teachers have in common; 0 where not even these are the same."""
    count = 0
    for left, right in zip(list(Prefixes(a))[1:], list(Prefixes(b))[1:], strict=False):
        if left != right:
            break
        count += 1
    return count if Prefixes(a)[0] == Prefixes(b)[0] else 0


def layers_run(node):
    """Trunk layers that run per batch, this node of a tree and everything below it."""
    return node.stop - node.start + sum(map(layers_run, node.children))


def layer_calls(monkeypatch):
    """Counts the trunk layers that run."""
    calls = []
    fast, slow = LayeredEncoder.trunk, ModelSplit.run

    def count_fast(self, ids, packed, stop, start=0, hidden=None):
        calls.append(stop - start)
        return fast(self, ids, packed, stop, start, hidden)

    def count_slow(self, ids, mask, *, start=0, hidden=None, stop=None, masks=None):
        calls.extend([] if stop is None else [stop - start])
        return slow(self, ids, mask, start=start, hidden=hidden, stop=stop, masks=masks)

    monkeypatch.setattr(LayeredEncoder, "trunk", count_fast)
    monkeypatch.setattr(ModelSplit, "run", count_slow)
    return calls


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert", "deberta-v2"])
def test_common_layers_are_counted(family, relatives):
    teachers = relatives(family, [(4, "last:1"), (4, "last:1"), (2, "last:1"), (0, "last:1")])
    assert [shared_layers(teachers[0], other) for other in teachers] == [4, 4, 2, 0]


def test_another_tokenizer_shares_nothing(relatives):
    a, b = relatives("bert", [(4, "last:1"), (4, "last:1")], tokenizer_keys=["x", "y"])
    assert shared_layers(a, b) == 0


@pytest.mark.parametrize("place", ["embeddings.word_embeddings.weight", "encoder.layer.1.attention.output.LayerNorm.bias"])
def test_one_changed_number_ends_the_common_trunk(place, relatives):
    a, b = relatives("bert", [(4, "last:1"), (4, "last:1")])
    with torch.no_grad():
        b.model.bert.get_parameter(place).flatten()[3] += 1e-6
    assert shared_layers(a, b) == (0 if "embeddings" in place else 1)
    assert len(Prefixes(a)) == 5


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v2"])
def test_scores_together_are_the_scores_alone(family, relatives, batch, monkeypatch):
    plan = [(4, "last:1"), (4, "head"), (2, "last:1"), (2, "last:2"), (0, "last:1"), (4, "all")]
    teachers, inputs = relatives(family, plan), batch(family)
    alone = [teacher.launch(*inputs) for teacher in teachers]
    tree = trunk_tree(teachers)
    calls = layer_calls(monkeypatch)
    together = score_together(teachers, *inputs, tree)
    # 2 layers for teachers 0 to 3, one more for 0 and 1, the last for 1, one for 2, three for 4, none for 5
    assert sum(calls) == sum(map(layers_run, tree)) == 2 + 1 + 1 + 1 + 3
    for a, b in zip(alone, together, strict=True):
        for left, right in zip(vars(a).values(), vars(b).values(), strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=0)
    calls.clear()
    score_together(teachers, *inputs)
    assert sum(calls) == 8


def test_no_weight_above_the_first_difference_is_read(relatives, monkeypatch):
    """From a GPU each is copied to the host first."""
    teachers, read, update = relatives("bert", [(2, "last:1"), (0, "last:1")]), [], shared._update
    monkeypatch.setattr(shared, "_update", lambda digest, name, tensor: read.append(id(tensor)) or update(digest, name, tensor))
    assert [node.teachers for node in trunk_tree(teachers)] == [(0,), (1,)] and not tie_shared_weights(teachers)
    for teacher in teachers:
        layers = teacher.model.bert.encoder.layer
        assert {id(p) for p in layers[0].parameters()} <= set(read)
        assert not {id(p) for layer in layers[1:] for p in layer.parameters()} & set(read)


def test_three_teachers_keep_one_copy(relatives):
    teachers = relatives("bert", [(4, "last:1"), (2, "last:1"), (3, "last:1")])
    size = sum(4 * p.numel() for p in teachers[0].model.bert.encoder.layer[0].parameters())
    assert tie_shared_weights(teachers) == 5 * size and tie_shared_weights(teachers) == 0


def test_shared_weights_are_kept_once(relatives, batch):
    teachers, inputs = relatives("bert", [(4, "last:1"), (3, "last:1")]), batch("bert")
    before = score_together(teachers, *inputs)
    layers = teachers[0].model.bert.encoder.layer
    assert tie_shared_weights(teachers) == sum(4 * p.numel() for layer in layers[:3] for p in layer.parameters())
    assert tie_shared_weights(teachers) == 0
    for a, b in zip(before, score_together(teachers, *inputs), strict=True):
        assert torch.equal(a.mean_probs, b.mean_probs) and torch.equal(a.logits, b.logits)


def test_albert_shares_its_groups(relatives, batch):
    a, b = relatives("albert", [(4, "last:1"), (4, "last:1")], num_hidden_groups=2)
    assert shared_layers(a, b) == 4
    assert tie_shared_weights([a, b]) == 0


def test_what_computes_something_else_shares_nothing(relatives):
    for family, one, other in (
        ("modernbert", {"classifier_pooling": "mean"}, {"classifier_pooling": "cls"}),
        ("bert", {"hidden_act": "relu"}, {"hidden_act": "gelu"}),
        ("bert", {"num_attention_heads": 2}, {"num_attention_heads": 4}),
    ):
        (a,), (b,), (c,) = (relatives(family, [(4, "last:1")], **config) for config in (one, other, one))
        assert shared_layers(a, c) == 4 and shared_layers(a, b) == 0, (family, one)
