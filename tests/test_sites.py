"""Dropout sites: the list is complete, every site matters, scopes are checked, masks follow the contract."""

import multiprocessing

import pytest
import torch
import transformers

from muka_fast import intercept as intercept_module
from muka_fast.errors import UserError
from muka_fast.ops.reference import dropout_scale, keep_mask_ref
from muka_fast.sites import (
    ATTENTION_STRIDE,
    SHARED_EXAMPLE,
    Masks,
    Site,
    active_probabilities,
    active_sites,
    list_sites,
    sites_of_config,
)
from muka_fast.split import ModelSplit

SEED = 0xFEDC_BA98_7654_3210
LAYERS = 2
# family -> dropouts of one layer, in order (attention, shared or activation), and sites of the head; the embeddings have one
EXPECTED = {
    "bert": ("attention activation activation", 1),
    "roberta": ("attention activation activation", 2),
    "xlm-roberta": ("attention activation activation", 2),
    "distilbert": ("attention activation", 1),
    "electra": ("attention activation activation", 2),
    "albert": ("attention activation", 1),
    "mpnet": ("attention activation activation", 2),
    "deberta-v2": ("shared attention activation activation", 2),
    "modernbert": ("attention activation activation", 1),
    "llama": ("attention", 0),
    "mistral": ("attention", 0),
    "qwen2": ("attention", 0),
    "qwen3": ("attention", 0),
}


def tokens(make_tokenizer, texts, family, count=4):
    batch = make_tokenizer(family)(texts[:count], return_tensors="pt", padding=True, truncation=True, max_length=24)
    return batch["input_ids"], batch["attention_mask"]


def test_every_site_is_listed_in_order(family, make_model):
    sites = list_sites(make_model(family, "abc", layers=LAYERS, dropout=0.25))
    kinds, head = EXPECTED[family]
    embeddings = [] if family in ("llama", "mistral", "qwen2", "qwen3") else [("activation", None)]
    layers = [(kind, layer) for layer in range(LAYERS) for kind in kinds.split()]
    assert [(s.kind, s.layer) for s in sites] == embeddings + layers + [("activation", "head")] * head
    assert [s.index for s in sites] == list(range(len(sites)))
    assert len({(s.path, s.occurrence) for s in sites}) == len(sites)
    assert {s.p for s in sites} == {0.25}


def test_the_configuration_alone_gives_the_same_sites(family, make_model):
    model = make_model(family, ["a", "b", "c"])
    assert sites_of_config(model.config) == list_sites(model.eval())


@pytest.mark.parametrize("name", ["Bart", "T5"])
def test_the_configuration_of_an_encoder_with_a_decoder_gives_the_same_sites(name):
    sizes = {"num_layers": 2, "num_decoder_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32}
    if name == "Bart":
        sizes = {"encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(d_model=16, vocab_size=99, decoder_start_token_id=0, **sizes)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    assert sites_of_config(config) == list_sites(model) != []


def test_sites_of_p_zero_are_listed_too(family, make_model):
    with_p, without = (list_sites(make_model(family, "abc", dropout=p)) for p in (0.1, 0.0))
    assert [(s.path, s.kind, s.layer) for s in with_p] == [(s.path, s.kind, s.layer) for s in without]
    assert {s.p for s in without} == {0.0}


def test_each_probability_comes_from_its_own_place(make_model):
    model = make_model("bert", "ab", attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2, classifier_dropout=0.4)
    by_kind = {(s.kind, s.layer == "head"): s.p for s in list_sites(model)}
    assert by_kind == {("attention", False): 0.3, ("activation", False): 0.2, ("activation", True): 0.4}


def test_every_site_alone_changes_the_logits_and_none_leaves_them(family, make_model, make_tokenizer, texts):
    model = make_model(family, "abc", layers=LAYERS)
    ids, mask = tokens(make_tokenizer, texts, family)
    with torch.inference_mode():
        plain = model(input_ids=ids, attention_mask=mask).logits
    sites, split, example_ids = list_sites(model), ModelSplit(model), torch.arange(len(ids))

    def run(p_of_site):
        return split.run(ids, mask, masks=Masks(model, sites, p_of_site, SEED, example_ids, 1))

    torch.testing.assert_close(run({}), plain, atol=1e-5, rtol=0)
    for site in sites:
        difference = (run({site.index: 0.5}) - plain).abs().amax(1)
        assert (difference > 1e-6).all(), site


def test_tracing_and_masking_leave_no_trace(family, make_model, make_tokenizer, texts):
    model = make_model(family, "abc")
    implementation = model.config._attn_implementation
    ids, mask = tokens(make_tokenizer, texts, family)
    sites = list_sites(model)
    masks = Masks(model, sites, {s.index: 0.5 for s in sites}, SEED, torch.arange(len(ids)), 1)
    ModelSplit(model).run(ids, mask, masks=masks)
    assert not [path for path, module in model.named_modules() if "forward" in vars(module) or module.training]
    assert model.config._attn_implementation == implementation


def test_an_error_inside_leaves_no_trace(make_model):
    model = make_model("bert", "ab")
    with pytest.raises(IndexError):
        ModelSplit(model).run(torch.tensor([[10**6]]), torch.tensor([[1]]))
    assert not [path for path, module in model.named_modules() if "forward" in vars(module)]


def test_a_block_inside_another_gives_everything_back_to_it(make_model):
    """Attention's probabilities as well as the dropout modules."""

    class Seen:
        def __init__(self):
            self.calls = 0

        def wants(self, module):
            return True

        def apply(self, module, x, p):
            self.calls += 1
            return x

    model, inputs, outer, inner = make_model("bert", "ab"), {"input_ids": torch.tensor([[5, 7, 9]])}, Seen(), Seen()
    with intercept_module.intercept(model, outer):
        with intercept_module.intercept(model, inner):
            model(**inputs)
        assert outer.calls == 0
        model(**inputs)
    assert outer.calls == inner.calls == 2 + 3 * LAYERS


def test_a_process_forked_while_another_thread_enters_a_block_enters_its_own(make_model):
    """As a worker that loads data: the thread that would let go is not in it."""
    model = make_model("bert", "ab")

    def enter():
        with intercept_module.intercept(model, object()):
            pass

    with intercept_module._changing:
        child = multiprocessing.get_context("fork").Process(target=enter)
        child.start()
        child.join(20)
    child.kill()
    child.join()
    assert child.exitcode == 0


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("all", [None, 0, 0, 0, 1, 1, 1, 2, 2, 2, "head"]),
        ("last:1", [2, 2, 2, "head"]),
        ("last:3", [0, 0, 0, 1, 1, 1, 2, 2, 2, "head"]),
        ("head", ["head"]),
    ],
)
def test_scopes(scope, expected, make_model):
    sites = list_sites(make_model("bert", "ab", layers=3))
    assert [s.layer for s in active_sites(sites, scope)] == expected


@pytest.mark.parametrize("scope", ["last:0", "last:99", "last:", "last:-1", "foo", "", "heads", "all ", "last:1\n"])
def test_unknown_scopes_are_refused(scope, make_model):
    with pytest.raises(UserError, match="--mc_scope"):
        active_sites(list_sites(make_model("bert", "ab")), scope, "teacher news")


def test_head_scope_of_a_decoder_names_the_way_out(decoder_family, make_model):
    with pytest.raises(UserError, match=r"teacher news has no dropout site in its head.*last:1"):
        active_sites(list_sites(make_model(decoder_family, "ab")), "head", "teacher news")


def test_layers_without_a_site_name_the_way_out(make_model):
    sites = [site for site in list_sites(make_model("bert", "ab")) if not isinstance(site.layer, int)]
    with pytest.raises(UserError, match=r"last:1: teacher news has no dropout site in its layers; use --mc_scope all"):
        active_sites(sites, "last:1", "teacher news")
    with pytest.raises(UserError, match=r"teacher news: no dropout was found in it, .* use --no-mc"):
        active_probabilities([], "last:1", None, "teacher news")


def test_a_site_that_drops_everything_names_the_way_out():
    sites = [Site(0, "drop", 0, "activation", 1.0, "head", 2)]
    with pytest.raises(UserError, match=r"teacher news: its configuration drops everything .* --mc_dropout_p 0\.1"):
        active_probabilities(sites, "head", None, "teacher news")
    assert active_probabilities(sites, "head", 0.1) == {0: 0.1}


def element_kept(seed, p, site, sample, example_id, element):
    """The contract for one element."""
    return keep_mask_ref(1, 1, p, seed, site, torch.tensor([example_id]), torch.tensor([element]), sample).item()


class Owner(torch.nn.Module):
    """A model of one dropout module."""

    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout(0.1)


@pytest.mark.parametrize(
    ("kind", "shape", "element"),
    [
        ("activation", (3, 5, 6), lambda i: i[0] * 6 + 0),
        ("activation", (3, 6), lambda i: 0),
        ("attention", (3, 2, 4, 5), lambda i: (i[0] * ATTENTION_STRIDE + i[1]) * ATTENTION_STRIDE),
    ],
)
def test_masks_follow_the_contract(kind, shape, element):
    owner, p, example_ids = Owner(), 0.4, torch.tensor([7, 2**32 - 1, 0])
    site = Site(11, "drop", 0, kind, 0.1, 0, len(shape))
    samples = 2
    masks = Masks(owner, [site], {11: p}, SEED, example_ids, samples, 3)
    masked = masks.apply(owner.drop, torch.ones(samples * shape[0], *shape[1:]), 0.1).view(samples, *shape)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in masked.shape)).tolist():
        k, b, *rows, column = index
        kept = element_kept(SEED, p, 11, 3 + k, int(example_ids[b]), element(rows) + column)
        assert masked[tuple(index)].item() == pytest.approx(kept * dropout_scale(p), rel=1e-6), index


def test_shared_sites_do_not_depend_on_the_texts():
    owner, site = Owner(), Site(4, "drop", 0, "shared", 0.1, 0, 2)
    table = torch.ones(7, 6)
    masked = [
        Masks(owner, [site], {4: 0.4}, SEED, torch.tensor(ids), 1, sample).apply(owner.drop, table, 0.1)
        for ids, sample in (([1, 2], 5), ([9], 5), ([9], 6))
    ]
    assert torch.equal(masked[0], masked[1]) and not torch.equal(masked[1], masked[2])
    assert (masked[0][3, 2] > 0) == element_kept(SEED, 0.4, 4, 5, SHARED_EXAMPLE, 3 * 6 + 2)


def test_repeated_calls_of_one_module_are_sites_of_their_own():
    owner = Owner()
    sites = [Site(i, "drop", i, "activation", 0.1, i, 2) for i in range(2)]
    masks = Masks(owner, sites, {0: 0.5, 1: 0.5}, SEED, torch.tensor([3]), 1)
    first, second = (masks.apply(owner.drop, torch.ones(1, 64), 0.1) for _ in range(2))
    assert not torch.equal(first, second)
    skipped = Masks(owner, sites, {0: 0.5, 1: 0.5}, SEED, torch.tensor([3]), 1)
    skipped.skip_layer(0)
    assert torch.equal(skipped.apply(owner.drop, torch.ones(1, 64), 0.1), second)


def test_too_many_heads_are_refused():
    owner, site = Owner(), Site(0, "drop", 0, "attention", 0.1, 0, 4)
    masks = Masks(owner, [site], {0: 0.5}, SEED, torch.tensor([3]), 1)
    with pytest.raises(UserError, match="128 heads"):
        masks.apply(owner.drop, torch.ones(1, 129, 2, 2), 0.1)


def test_too_many_tokens_are_refused():
    owner, site = Owner(), Site(0, "drop", 0, "attention", 0.1, 0, 4)
    masks = Masks(owner, [site], {0: 0.5}, SEED, torch.tensor([3]), 1)
    with pytest.raises(UserError, match="16384 tokens"):
        masks.apply(owner.drop, torch.ones(1, 1, 1, 16385), 0.1)


def test_a_forward_that_somebody_put_on_a_dropout_stays(make_model):
    model = make_model("bert", "ab")
    mine = model.dropout.forward = lambda x: x
    list_sites(model)
    assert vars(model.dropout)["forward"] is mine


def test_a_patch_inside_another_gives_back_to_it():
    module = torch.nn.Identity()
    with intercept_module.patched(module, lambda original, x: original(x) + 1):
        with intercept_module.patched(module, lambda original, x: original(x) * 2):
            assert module(3) == 8
        assert module(3) == 4
    assert module(3) == 3 and "forward" not in vars(module)


def test_every_element_of_a_shared_table_has_a_number_of_its_own():
    owner, site = Owner(), Site(4, "drop", 0, "shared", 0.1, 0, 2)
    masked = Masks(owner, [site], {4: 0.4}, SEED, torch.tensor([1]), 1, 5).apply(owner.drop, torch.ones(7, 6), 0.1)
    expected = [element_kept(SEED, 0.4, 4, 5, SHARED_EXAMPLE, element) for element in range(42)]
    assert (masked > 0).flatten().tolist() == expected
