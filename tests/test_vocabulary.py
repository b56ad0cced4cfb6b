"""Word vectors of the texts alone: every family's logits and gradients, the student as with all of them, sharded as well."""

import numpy as np
import pytest
import torch
from launch import finish, run_processes
from runs import SMOOTH_ADAM, arguments, largest_difference, losses, weights
from safetensors.torch import load_file
from torch import nn

from muka_fast import teach, vocabulary
from muka_fast.data import Tokens, collate
from muka_fast.errors import UserError
from muka_fast.train import RunResult
from muka_fast.vocabulary import SomeVectors, TextVocabulary

TOKENS = Tokens.of(np.array([5, 9, 30, 6, 9, 41, 5, 6], np.int32), np.array([4, 1, 3]))


def logits_and_gradients(model, tokens=TOKENS):
    model.zero_grad()
    batch = collate(tokens, np.arange(len(tokens)), model.config.pad_token_id)
    logits = model(**batch).logits
    logits.square().sum().backward()
    return logits.detach(), {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def test_every_family_computes_the_same_from_fewer_rows(family, make_model):
    model = make_model(family, ("a", "b", "c"), dropout=0.0).train()
    table, state = model.get_input_embeddings(), {name: value.clone() for name, value in model.state_dict().items()}
    logits, gradients = logits_and_gradients(model)
    cut = TextVocabulary(model, TOKENS)
    (name,) = cut.names
    rows = cut.rows.tolist()
    assert {5, 6, 9, 30, 41, model.config.pad_token_id} <= set(rows) and len(rows) < 15 and model.training
    assert model.get_input_embeddings().weight.shape == (len(rows), table.weight.shape[1])
    found, ours = logits_and_gradients(model)
    assert torch.equal(found, logits) and ours.keys() == gradients.keys()
    assert torch.equal(ours[name], gradients[name][rows]) and all(torch.equal(ours[n], gradients[n]) for n in ours if n != name)
    whole = cut.complete(model.state_dict())
    assert whole.keys() == state.keys() and all(torch.equal(whole[n], state[n]) for n in state)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    cut.restore(model)
    assert model.get_input_embeddings() is table
    moved = (table.weight - state[name]).any(1).nonzero()[:, 0].tolist()
    assert moved == rows


def test_an_id_that_is_no_text_s_is_refused(make_model):
    model = make_model("bert")
    TextVocabulary(model, TOKENS)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[5, 7]]))


def test_padding_of_the_embedding_alone_has_a_vector(make_model):
    """A tokenizer's padding takes the place of the configuration's, not of the module's."""
    model = make_model("bert")
    model.config.pad_token_id, model.get_input_embeddings().padding_idx = 1, 77
    cut = TextVocabulary(model, TOKENS)
    assert cut.names and {1, 77} <= set(cut.rows.tolist())


def test_places_lie_where_the_vectors_do():
    some = SomeVectors(torch.zeros(2, 4, device="meta"), torch.tensor([1, 5]), 9, None)
    assert some.place.device.type == some.weight.device.type == "meta"


def frozen(model):
    model.get_input_embeddings().weight.requires_grad_(False)


def tied(model):
    model.decoder = nn.Linear(16, 3, bias=False)
    model.decoder.weight = model.get_input_embeddings().weight


def scaled(model):
    model.get_input_embeddings().__class__ = type("ScaledEmbedding", (nn.Embedding,), {})


def read_otherwise(model, most=None):
    """By a lookup that is not the module's call."""
    original = model.forward

    def forward(input_ids, attention_mask):
        weight = model.get_input_embeddings().weight
        return original(inputs_embeds=weight[input_ids.clamp(max=most or len(weight) - 1)], attention_mask=attention_mask)

    model.forward = forward


def read_beyond(model):
    read_otherwise(model, most=99)


def with_another_word(model):
    """In front of every text."""
    original = model.forward
    model.forward = lambda input_ids, attention_mask: original(
        torch.cat([torch.full_like(input_ids[:, :1], 77), input_ids], 1), torch.cat([attention_mask[:, :1], attention_mask], 1)
    )


@pytest.fixture
def in_range(monkeypatch):
    """On a GPU an id that is too large would be an assertion of the device, after which it computes nothing any more."""

    def embedding(ids, weight, *options, _original=nn.functional.embedding):
        assert ids.max() < len(weight)
        return _original(ids, weight, *options)

    monkeypatch.setattr(nn.functional, "embedding", embedding)


@pytest.mark.parametrize("change", [frozen, tied, scaled, read_otherwise, read_beyond, with_another_word])
def test_what_is_not_a_plain_table_of_its_own_stays_whole(change, make_model, caplog, in_range):
    caplog.set_level("INFO", logger="muka_fast")
    model = make_model("bert")
    change(model)
    table = model.get_input_embeddings()
    cut = TextVocabulary(model, TOKENS)
    assert cut.names == [] and model.get_input_embeddings() is table
    assert ("by another way" in caplog.text) == (change in (read_otherwise, read_beyond, with_another_word))
    state = model.state_dict()
    assert all(value is state[name] for name, value in cut.complete(state).items())
    cut.restore(model)
    assert model.get_input_embeddings() is table


def test_a_vocabulary_that_is_used_stays_whole(make_model):
    model = make_model("bert")
    size = model.config.vocab_size
    tokens = Tokens.of(np.arange(int(0.85 * size), dtype=np.int32), np.array([int(0.85 * size)]))
    assert TextVocabulary(model, tokens).names == []


@pytest.fixture
def part(tmp_path):
    """Options of a run on twelve texts, whose words are a part of the vocabulary, with a store of its own."""
    return {"limit": 12, "max_length": 8, "store": str(tmp_path / "store")}


@pytest.fixture
def few(go, part, caplog):
    """few(name, **options): such a run, its vocabulary cut as long as WORTHWHILE allows."""
    caplog.set_level("INFO", logger="muka_fast")

    def run(name, **options):
        caplog.clear()
        result = go(name, **part, **options)
        assert ("those of the texts, are trained" in caplog.text) is (vocabulary.WORTHWHILE > 0)
        return result

    return run


STAGES = [{"ds": {"zero_optimization": {"stage": stage}}} for stage in range(4)]
OTHERS = [{"method": "dfa"}, {"method": "cfl"}, {"activation_checkpointing": True}, {"method": "dfa"} | STAGES[3]]


@pytest.mark.parametrize("options", [*STAGES, *OTHERS], ids=str)
def test_the_student_is_the_one_of_all_words(options, few, monkeypatch):
    """To the last bit, without decay."""
    cut = few("cut", **options, weight_decay=0.0)
    monkeypatch.setattr(vocabulary, "WORTHWHILE", 0.0)
    whole = few("whole", **options, weight_decay=0.0)
    assert losses(cut) == losses(whole) and largest_difference(weights(cut), weights(whole)) == 0


def test_words_of_no_text_keep_their_vectors_whatever_the_layout(few, world, monkeypatch):
    name, options = "distilbert.embeddings.word_embeddings.weight", {"weight_decay": 0.1}
    runs = [few(f"stage{stage}", ds={"zero_optimization": {"stage": stage}} | SMOOTH_ADAM, **options) for stage in (0, 3)]
    monkeypatch.setattr(vocabulary, "WORTHWHILE", 0.0)
    runs.append(few("whole", ds=SMOOTH_ADAM, **options))
    one, three, whole = (weights(run)[name] for run in runs)
    before = load_file(world / "student" / "model.safetensors")
    start = next(value for key, value in before.items() if key.endswith("word_embeddings.weight"))
    unused = (one == start).all(1)
    assert 0.2 * len(unused) < unused.sum() < 0.9 * len(unused) and torch.equal(three[unused], start[unused])
    assert (whole[unused] != start[unused]).any(1).sum() >= unused.sum() - 1  # padding's are zeros
    torch.testing.assert_close(one[~unused], whole[~unused], rtol=0, atol=1e-6)


def test_a_checkpoint_of_all_words_is_no_basis(few, stop_at, monkeypatch):
    monkeypatch.setattr(vocabulary, "WORTHWHILE", 0.0)
    stop_at(1)
    few("run")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"checkpoints/.*of another version of muka-fast; start anew with --overwrite"):
        few("run", resume=True)


@pytest.mark.parametrize(("before", "after"), [(0, 3), (3, 1)])
def test_a_run_that_was_stopped_goes_on_under_another_stage(before, after, few, part, go, stop_at):
    ds = lambda stage: {"zero_optimization": {"stage": stage}} | SMOOTH_ADAM
    whole = few("whole", ds=ds(after), batch_size=4)
    stop_at(4)
    assert go("cut", ds=ds(before), batch_size=4, **part).stopped
    assert largest_difference(weights(few("cut", ds=ds(after), batch_size=4, resume=True)), weights(whole)) < 1e-6


@pytest.mark.slow
def test_two_processes_cut_it_alike(few, part, world, tmp_path):
    alone = few("alone", ds=SMOOTH_ADAM)
    ds = {**SMOOTH_ADAM, "zero_optimization": {"stage": 3}}
    codes, told = finish(run_processes(arguments(world, tmp_path, "pair", ds, part), 2))
    assert codes == [0, 0] and "those of the texts, are trained" in told, told
    assert largest_difference(weights(RunResult(tmp_path / "pair")), weights(alone)) < 1e-6


def test_a_teacher_gets_its_whole_vocabulary_back(make_model, make_tokenizer, texts, monkeypatch, caplog):
    caplog.set_level("INFO", logger="muka_fast")
    tokenizer, recipe = make_tokenizer(), teach.Recipe(epochs=2, learning_rate=1e-3, batch_size=4, max_length=16, weight_decay=0.0)
    found = []
    for share in (0.9, 0.0):
        monkeypatch.setattr(vocabulary, "WORTHWHILE", share)
        model = make_model("bert", tokenizer=tokenizer)
        loss = teach.fine_tune(model, tokenizer, texts[:8], [0, 1] * 4, recipe)
        assert type(model.get_input_embeddings()) is nn.Embedding and not model.training
        found.append((loss, model.state_dict()))
    (loss, cut), (same, whole) = found
    assert caplog.text.count("those of the texts, are trained") == 1
    assert loss == same and cut.keys() == whole.keys() and all(torch.equal(cut[name], whole[name]) for name in cut)


def test_a_teacher_whose_training_ends_early_has_it_too(make_model, make_tokenizer, texts, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    tokenizer, model = make_tokenizer(), make_model("bert", tokenizer=make_tokenizer())
    table = model.get_input_embeddings()
    monkeypatch.setattr(teach, "_step_loss", interrupt)
    with pytest.raises(KeyboardInterrupt):
        teach.fine_tune(model, tokenizer, texts[:8], [0, 1] * 4, teach.Recipe(epochs=1, learning_rate=1e-3))
    assert model.get_input_embeddings() is table


def test_a_model_without_a_table_of_tokens_has_nothing_to_cut(make_model, monkeypatch):
    """CANINE says so by this error."""

    def refuse():
        raise NotImplementedError

    model = make_model("bert")
    monkeypatch.setattr(model, "get_input_embeddings", refuse)
    assert TextVocabulary(model, TOKENS).names == []
