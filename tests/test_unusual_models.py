"""Architectures outside the families of conftest.py: dropout called as a function, layers that cannot be cut, heads that read anew."""

import threading

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

from muka_fast.aligned import AlignedStudent, AmalgamatedFeature
from muka_fast.doubt import with_features
from muka_fast.errors import UserError
from muka_fast.intercept import intercept
from muka_fast.sites import Masks, Site, list_sites
from muka_fast.split import _NoMasks
from muka_fast.teachers import Teacher
from muka_fast.trunk import StochasticTeacher

SIZES = {"vocab_size": 60, "pad_token_id": 0, "num_labels": 3}
COMMON = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, **SIZES}
MODELS = {
    "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 32, **COMMON},
    "Bloom": {"hidden_dropout": 0.1, "attention_dropout": 0.1, "n_head": 4, "n_layer": 2, "hidden_size": 16, **SIZES},
    "Starcoder2": {
        "intermediate_size": 32, "num_key_value_heads": 2, "residual_dropout": 0.1, "embedding_dropout": 0.1,
        "attention_dropout": 0.1, **COMMON,
    },
    "Gemma2": {
        "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 4, "attention_dropout": 0.1, "sliding_window": 4,
        "attn_logit_softcapping": 0.5, **COMMON,
    },
    "XLM": {"emb_dim": 16, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32, "pad_index": 0, **SIZES},
}  # fmt: skip


def build(name, **options):
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(initializer_range=0.2, init_std=0.2, embed_init_std=0.2, **MODELS[name], **options)
    return getattr(transformers, f"{name}ForSequenceClassification")(config).eval()


def scorer(model, **options):
    teacher = Teacher("unusual", "unusual", model, None, "key", ["a", "b", "c"], "fingerprint", 7, 0, 32)
    return StochasticTeacher(teacher, **options)


def a_batch():
    mask = (torch.arange(9) < torch.tensor([9, 4, 6])[:, None]).long()
    ids = torch.randint(1, 60, (3, 9)) * mask
    return ids, mask, np.array([3, 2**32 - 1, 8])


@pytest.fixture(params=MODELS)
def model(request):
    if request.param == "Gemma2" and Version(transformers.__version__) < Version("5.21"):
        pytest.skip("transformers before 5.21 leaves Gemma 2's softcap out of SDPA, so that such a teacher is refused")
    return build(request.param)


def test_nothing_drops_behind_the_handlers_back(model):
    ids, mask, _ = a_batch()
    with intercept(model, _NoMasks()):
        model.train()
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids, attention_mask=mask).logits)
    logits = [model(input_ids=ids, attention_mask=mask).logits for _ in range(2)]
    assert not torch.equal(*logits)  # and outside of the block it does


def test_another_thread_drops_as_ever():
    dropped = []
    with intercept(build("OPT"), _NoMasks()):
        other = threading.Thread(target=lambda: dropped.append(torch.nn.functional.dropout(torch.ones(1000), 0.5)))
        other.start()
        other.join()
    assert 300 < (dropped[0] == 0).sum() < 700


@pytest.mark.parametrize("name", ["OPT", "Bloom", "Starcoder2", "XLM"])
def test_functional_sites_are_listed_with_their_probability(name):
    model = build(name)
    functional = [site for site in list_sites(model) if site.kind != "attention"]
    assert len([site for site in functional if site.p == 0.1]) >= 3
    assert all(site.kind != "shared" for site in functional)


@pytest.mark.parametrize("scope", ["last:1", "all"])
def test_scores_are_those_of_the_model_and_of_the_text(model, scope):
    ids, mask, names = a_batch()
    teacher = scorer(model, mc_scope=scope, mc_samples=4)
    together = teacher.launch(ids, mask, names)
    for row, length in enumerate(mask.sum(1).tolist()):
        plain = model(input_ids=ids[row : row + 1, :length], attention_mask=mask[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(together.logits[row], plain, atol=1e-5, rtol=1e-4)
        alone = teacher.launch(ids[row : row + 1, :length], mask[row : row + 1, :length], names[row : row + 1])
        for name, value in vars(together).items():
            torch.testing.assert_close(getattr(alone, name)[0], value[row], atol=1e-5, rtol=1e-4)
    assert (together.var_probs > 0).all()


def test_passes_vary_as_much_as_in_training_mode(model):
    ids, mask, names = a_batch()
    ours = scorer(model, mc_scope="all", mc_samples=400).launch(ids, mask, names).var_probs.sum()
    model.train()
    passes = torch.stack([model(input_ids=ids, attention_mask=mask).logits.softmax(-1).detach() for _ in range(400)])
    assert 0.7 < float(ours / passes.var(0).sum()) < 1.4


@pytest.mark.parametrize("options", [{"mc": False}, {"mc_scope": "head"}, {"mc_scope": "last:1"}])
def test_a_model_that_cannot_be_cut_is_run_whole(options, caplog):
    """XLM's ModuleLists are parts of layers; its head has a site of its own, after which a cut was tempting."""
    ids, mask, names = a_batch()
    model = build("XLM")
    teacher = scorer(model, mc_samples=4, **options)
    assert teacher.encoder.depth == 0 and ("cannot be split" in caplog.text) == ("mc" not in options)
    torch.testing.assert_close(
        teacher.launch(ids, mask, names).logits, model(input_ids=ids, attention_mask=mask).logits, atol=1e-5, rtol=1e-4
    )


def test_a_configuration_within_a_configuration():
    sizes = {"intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 4, "attention_dropout": 0.1, **COMMON}
    text = {name: value for name, value in sizes.items() if name != "num_labels"}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28}
    torch.manual_seed(1)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, num_labels=3, pad_token_id=0)
    model = transformers.Gemma3ForSequenceClassification(config).eval()
    teacher, (ids, mask, names) = scorer(model, mc_samples=2), a_batch()
    assert teacher.encoder.depth == 2 and list_sites(model)
    logits = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(teacher.launch(ids, mask, names).logits, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["Bart", "T5"])
def test_an_encoder_with_a_decoder_is_read_at_its_end_token(name):
    """T5 besides adds its position bias to the scores, and hands it from the first layer to the others: it runs whole."""
    sizes = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.2, "max_position_embeddings": 32}
    if name == "T5":
        sizes, heads = {"d_ff": 32, "d_kv": 4}, {"num_heads": 4, "num_layers": 2}
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(d_model=16, eos_token_id=2, decoder_start_token_id=0, **sizes, **heads, **SIZES)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    ids, mask, names = a_batch()
    ids[ids == 2] = 5
    ids[torch.arange(3), mask.sum(1) - 1] = 2
    teacher = scorer(model, mc_scope="all", mc_samples=400)
    assert (teacher.encoder.depth == 0) == (name == "T5")
    scores = teacher.launch(ids, mask, names)
    torch.testing.assert_close(scores.logits, model(input_ids=ids, attention_mask=mask).logits, atol=1e-5, rtol=1e-4)
    model.train()
    passes = torch.stack([model(input_ids=ids, attention_mask=mask).logits.softmax(-1).detach() for _ in range(400)])
    assert 0.7 < float(scores.var_probs.sum() / passes.var(0).sum()) < 1.4


SMALL = {"num_key_value_heads": 4, "intermediate_size": 32, **COMMON}
READ_ANEW = {  # heads that run over all tokens, and what of that the logits are
    "EuroBert": (SMALL, "mean"),
    "OpenAIGPT": ({"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, **SIZES}, "last"),  # which cannot be cut into layers
}


@pytest.mark.parametrize("name", READ_ANEW)
def test_features_are_what_makes_the_logits(name):
    options, reads = READ_ANEW[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(initializer_range=0.2, **options)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    ids, mask, names = a_batch()
    teacher = scorer(model, mc=False)
    scores, layer = teacher.launch(ids, mask, names), teacher.output_layer.layer
    assert teacher.output_layer.reads == reads
    plain = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(layer(scores.features), plain, atol=1e-5, rtol=1e-4)
    found = with_features(model)({"input_ids": ids, "attention_mask": mask})  # the same of a student
    torch.testing.assert_close(layer(found[:, 3:]), plain, atol=1e-5, rtol=1e-4)
    aligned = AlignedStudent(model, AmalgamatedFeature, [8], seed=0)
    seen = []
    aligned.alignment.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    aligned(torch.zeros(3, 8), input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(layer(seen[0]), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scope", ["head", "last:1", "last:2", "all"])
def test_one_dropout_before_the_layers_and_behind_them_is_two_sites(scope):
    """UMT5 calls encoder.dropout on the embeddings and on what the head reads; cut behind a layer, it makes the first call as well."""
    torch.manual_seed(1)
    config = transformers.UMT5Config(
        d_model=16, d_ff=32, d_kv=4, num_heads=4, num_layers=2, eos_token_id=2, decoder_start_token_id=0, dropout_rate=0.2,
        classifier_dropout=0.2, initializer_factor=2.0, **SIZES,
    )  # fmt: skip
    model = transformers.UMT5ForSequenceClassification(config).eval()
    ids, mask, names = a_batch()
    ids[ids == 2] = 5
    ids[torch.arange(3), mask.sum(1) - 1] = 2
    teacher = scorer(model, mc_scope=scope, mc_samples=4)
    assert teacher.encoder.depth == 2 and teacher.mc_scope == scope
    passes = []
    for k in range(4):
        masks = Masks(model, teacher.all_sites, teacher.p_of_site, 7, torch.from_numpy(names), 1, k)
        with torch.inference_mode(), intercept(model, masks):
            passes.append(model(input_ids=ids, attention_mask=mask).logits.softmax(-1))
    scores = teacher.launch(ids, mask, names)
    assert (scores.var_probs > 0).any()
    torch.testing.assert_close(scores.mean_probs, torch.stack(passes).mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "rank", "expected"), [("activation", 2, True), ("activation", 3, False), ("tokens", 2, False)])
def test_only_one_row_per_text_may_be_cut_out(kind, rank, expected):
    assert Site(0, "head.dropout", 0, kind, 0.1, "head", rank).per_text is expected


def test_what_cannot_be_taken_apart_is_one_line():
    config = transformers.BertConfig(intermediate_size=32, chunk_size_feed_forward=4, **COMMON)
    with pytest.raises(UserError, match=r"teacher unusual: this version cannot take \w+ apart \(ValueError: .*chunk size 4"):
        scorer(transformers.BertForSequenceClassification(config).eval())


def test_a_probability_of_one_is_refused():
    config = transformers.BertConfig(intermediate_size=32, hidden_dropout_prob=1.0, **COMMON)
    with pytest.raises(UserError, match="drops everything"):
        scorer(transformers.BertForSequenceClassification(config).eval())


def test_a_layer_with_a_dropout_of_its_own_has_no_fast_form():
    """The fast form would leave it out in the stochastic passes, where nothing compares it with the model."""
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(intermediate_size=32, **COMMON)).eval()
    assert scorer(model).fast is not None
    model.bert.encoder.layer[-1].intermediate.intermediate_act_fn = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Dropout(0.1)).eval()
    assert scorer(model).fast is None


def test_a_head_that_drops_on_every_token_gets_every_token():
    """A mask goes by positions, so that the token that is read would get that of the first one."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(intermediate_size=32, attention_dropout=0.1, **COMMON)
    model = transformers.LlamaForSequenceClassification(config).eval()
    assert scorer(model).fast is not None
    model.model.norm = torch.nn.Sequential(model.model.norm, torch.nn.Dropout(0.3)).eval()
    teacher, (ids, mask, names) = scorer(model, mc_scope="head", mc_samples=4), a_batch()
    assert teacher.reads == "last" and teacher.fast is None and len(teacher.p_of_site) == 1
    masks = Masks(model, teacher.all_sites, teacher.p_of_site, 7, torch.from_numpy(names), 4)
    with torch.inference_mode(), intercept(model, masks):
        passes = model(input_ids=ids.repeat(4, 1), attention_mask=mask.repeat(4, 1)).logits.softmax(-1).view(4, 3, 3)
    torch.testing.assert_close(teacher.launch(ids, mask, names).mean_probs, passes.mean(0), atol=1e-5, rtol=1e-4)
