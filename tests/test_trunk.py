"""Stochastic teachers: trunk and tail equal the unsplit model, whatever the batch, order, padding or memory budget."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from muka_fast import intercept, packed, preln, probe, trunk
from muka_fast.errors import UserError
from muka_fast.first_token import covered_calls
from muka_fast.ops.reference import mc_statistics_ref
from muka_fast.pooled import head_input, pool
from muka_fast.postln import PostLayerNormEncoder
from muka_fast.sites import Masks
from muka_fast.split import ModelSplit, _Eager
from muka_fast.teachers import Teacher
from muka_fast.trunk import StochasticTeacher

SEED = 0xFEDC_BA98_7654_3210
K = 4
TEXTS = 6
EXAMPLE_IDS = torch.tensor([5, 1000, 2**32 - 1, 0, 8, 9])
SCOPES = ("all", "last:1", "last:2", "last:3", "head")
# What the defaults of `make_model` leave out; each name is the family it varies.
VARIANTS = {
    "deberta-v2": {"conv_kernel_size": 3, "share_att_key": False, "position_biased_input": True, "type_vocab_size": 2},
    "modernbert": {"classifier_pooling": "mean"},
    "modernbert bias": {"classifier_pooling": "cls", "attention_bias": True, "local_attention": 4, "mlp_bias": True},
    "albert": {"num_hidden_groups": 3, "inner_group_num": 2},
    "albert once": {"num_hidden_groups": 1, "inner_group_num": 2},
    "llama": {"attention_bias": True, "num_key_value_heads": 4, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "qwen3": {"head_dim": 8, "num_key_value_heads": 1},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "electra": {"embedding_size": 16},
    "bert": {"hidden_act": "relu", "num_attention_heads": 2},
}
# Those without a fast form: groups of several layers, angles that depend on the longest text, a head that reads every token.
NOT_COVERED = ("deberta-v2", "albert", "albert once", "llama", "modernbert")
DECODERS = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture
def stochastic(make_model, make_tokenizer):
    """stochastic(family, scope, ...) -> StochasticTeacher of a random model of three layers."""

    def make(family, scope, *, seed=SEED, samples=K, mc=True, mc_dropout_p=None, dtype=torch.float32, **config):
        tokenizer = make_tokenizer(family)
        model = make_model(family, "abc", layers=3, tokenizer=tokenizer, **config).to(dtype)
        fields = {"path": "", "tokenizer_key": "", "fingerprint": "", "max_length": 64}
        fields |= {"tokenizer": tokenizer, "pad_id": tokenizer.pad_token_id, "labels": list("abc")}
        teacher = Teacher(name="news", model=model, seed=seed, **fields)
        return StochasticTeacher(teacher, mc_scope=scope, mc_samples=samples, mc=mc, mc_dropout_p=mc_dropout_p)

    return make


@pytest.fixture
def batch(make_tokenizer, texts):
    def make(family):
        chosen = [texts[0], texts[40], texts[12], texts[41], texts[22], texts[5]]  # of very different lengths
        out = make_tokenizer(family)(chosen, return_tensors="pt", padding=True, truncation=True, max_length=20)
        return out["input_ids"], out["attention_mask"]

    return make


def largest_difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def unsplit_scores(teacher, ids, mask, example_ids):
    """The whole model once per sample with only the scope's sites active; statistics of the reference."""
    split = ModelSplit(teacher.model)
    logits = []
    for k in range(teacher.mc_samples):
        masks = Masks(teacher.model, teacher.all_sites, teacher.p_of_site, teacher.teacher.seed, example_ids, 1, k)
        logits.append(split.run(ids, mask, masks=masks))
    mean, var, predictive, expected, *_ = mc_statistics_ref(torch.stack(logits), [0, 3])
    with torch.inference_mode(), head_input(teacher.output_layer.layer) as seen:
        plain = teacher.model(input_ids=ids, attention_mask=mask).logits
        features = pool(seen[0], mask, teacher.output_layer.reads)
        # What the output layer reads, and nothing else.
        tolerance = probe.ROUNDING.get(plain.dtype, 1e-5)
        torch.testing.assert_close(teacher.output_layer.layer(features), plain, atol=tolerance, rtol=tolerance)
    return trunk.TeacherScores(plain, mean, var, predictive[:, 0], expected[:, 0], features)


def test_logits_beyond_the_precision_are_told_as_that(stochastic):
    with pytest.raises(UserError, match=r"teacher news: its logits are not finite; check .* --scoring_precision fp32"):
        stochastic("bert", "head", dtype=torch.float16, initializer_range=1e5)


def check(teacher, ids, mask):
    scores = teacher.launch(ids, mask, EXAMPLE_IDS)
    assert largest_difference(scores, unsplit_scores(teacher, ids, mask, EXAMPLE_IDS)) < 1e-5
    assert scores.var_probs.max() > 0
    assert all(value.dtype == torch.float32 and not value.is_inference() for value in vars(scores).values())
    return scores


@pytest.mark.parametrize("scope", SCOPES)
def test_split_equals_unsplit(family, scope, stochastic, batch):
    if family in DECODERS and scope == "head":
        with pytest.raises(UserError, match=r"teacher news has no dropout site in its head.*last:1"):
            stochastic(family, scope)
        return
    teacher = stochastic(family, scope)
    assert teacher.mc_scope == scope
    assert teacher.layer == {"all": 0, "last:1": 2, "last:2": 1, "last:3": 0, "head": 3}[scope]
    assert teacher.reads == ("last" if family in DECODERS else "first")
    check(teacher, *batch(family))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_split_equals_unsplit_for_other_configurations(variant, scope, stochastic, batch):
    family = variant.split()[0]
    if family in DECODERS and scope == "head":
        scope = "last:1"  # decoders have no site in their head
    teacher = stochastic(family, scope, **VARIANTS[variant])
    assert teacher.mc_scope == scope
    assert (teacher.fast is None) == (variant in NOT_COVERED)  # one that computes something else is not used, and nobody is told
    if variant == "modernbert":
        assert teacher.reads is None  # the head averages all tokens
    check(teacher, *batch(family))


@pytest.mark.parametrize("scope", ["last:1", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_the_same_way_and_errs_no_more_than_the_model(
    family, dtype, scope, stochastic, make_tokenizer, texts
):
    full, half = stochastic(family, scope), stochastic(family, scope, dtype=dtype)
    assert (half.mc_scope, half.layer, half.reads, type(half.fast)) == (full.mc_scope, full.layer, full.reads, type(full.fast))
    inputs = make_tokenizer(family)(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=24)
    batch = inputs["input_ids"], inputs["attention_mask"], torch.arange(len(texts))
    exact, scores, unsplit = full.launch(*batch), half.launch(*batch), unsplit_scores(half, *batch)
    for name in ("logits", "mean_probs", "var_probs", "predictive_entropy", "expected_entropy"):
        mine, theirs = ((getattr(x, name) - getattr(exact, name)).square().mean().sqrt() for x in (scores, unsplit))
        assert mine <= 1.5 * theirs + torch.finfo(dtype).eps / 10, name
    assert all(value.dtype == torch.float32 for value in vars(scores).values())
    assert not torch.equal(scores.mean_probs, exact.mean_probs)


@pytest.mark.parametrize("scope", ["all", "last:2", "head"])
def test_scores_do_not_depend_on_batch_order_or_padding(family, scope, stochastic, batch):
    if family in DECODERS and scope == "head":
        scope = "last:1"
    teacher = stochastic(family, scope)
    ids, mask = batch(family)
    whole = teacher.launch(ids, mask, EXAMPLE_IDS)
    order = [3, 0, 5, 1, 4, 2]
    for rows in (order[:1], order[1:3], order[3:]):
        length = int(mask[rows].sum(1).max())
        extra = torch.full((len(rows), 3), teacher.teacher.pad_id)
        wider = torch.cat([ids[rows, :length], extra], 1), torch.cat([mask[rows, :length], 0 * extra], 1)
        for inputs in ((ids[rows, :length], mask[rows, :length]), wider):
            part = teacher.launch(*inputs, EXAMPLE_IDS[rows])
            expected = trunk.TeacherScores(*(value[rows] for value in vars(whole).values()))
            assert largest_difference(part, expected) < 1e-5


@pytest.mark.parametrize("scope", ["all", "last:1"])
def test_the_memory_budget_changes_nothing(encoder_family, scope, stochastic, batch):
    teacher, scores = stochastic(encoder_family, scope), []
    for budget in (1, 1 << 40):
        teacher._budget = lambda budget=budget: budget
        scores.append(teacher.launch(*batch(encoder_family), EXAMPLE_IDS))
    assert largest_difference(*scores) < 1e-5


@pytest.mark.parametrize("scope", ["all", "last:1", "head"])
def test_seed_example_and_samples_matter(scope, stochastic, batch):
    ids, mask = batch("bert")
    base = stochastic("bert", scope).launch(ids, mask, EXAMPLE_IDS)
    again = stochastic("bert", scope).launch(ids, mask, EXAMPLE_IDS.numpy())
    other_seed = stochastic("bert", scope, seed=SEED + 1).launch(ids, mask, EXAMPLE_IDS)
    other_id = stochastic("bert", scope).launch(ids, mask, EXAMPLE_IDS + 1)
    assert largest_difference(base, again) == 0
    assert torch.equal(base.logits, other_seed.logits)
    for other in (other_seed, other_id):
        assert ((base.mean_probs - other.mean_probs).abs().amax(1) > 0).all()


def test_one_sample(stochastic, batch):
    scores = stochastic("bert", "last:1", samples=1).launch(*batch("bert"), EXAMPLE_IDS)
    assert scores.var_probs.abs().max() < 1e-7
    torch.testing.assert_close(scores.predictive_entropy, scores.expected_entropy, atol=1e-6, rtol=0)


def test_p_zero_is_refused_and_mc_dropout_p_is_the_way_out(family, stochastic, batch):
    with pytest.raises(UserError, match=r"teacher news.*p = 0.*--mc_dropout_p"):
        stochastic(family, "all", dropout=0.0)
    teacher = stochastic(family, "last:1", dropout=0.0, mc_dropout_p=0.2)
    assert {record["active_p"] for record in teacher.sites} == {0.0, 0.2}
    check(teacher, *batch(family))


def test_mc_dropout_p_replaces_the_probability_of_every_site_of_the_scope(stochastic):
    records = stochastic("roberta", "last:1", mc_dropout_p=0.3).sites
    assert [r["active_p"] for r in records if r["layer"] in (2, "head")] == [0.3] * 5
    assert [r["active_p"] for r in records if r["layer"] not in (2, "head")] == [0.0] * 7
    assert {r["p"] for r in records} == {0.1}


def test_trunk_reaches_up_to_the_first_site_that_drops(stochastic, batch):
    off = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    teacher = stochastic("bert", "last:2", classifier_dropout=0.2, **off)
    assert teacher.layer == 3 and teacher.fused_head is not None
    check(teacher, *batch("bert"))


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert", "modernbert"])
def test_heads_that_are_dropout_and_linear_are_fused(family, stochastic):
    assert stochastic(family, "head").fused_head is not None


def test_a_head_with_a_layer_behind_its_dropout_is_not_fused(stochastic, batch):
    """DeBERTa's pooler: dropout, dense, activation, and then the output layer, which is as wide as what the dropout sees."""
    teacher = stochastic("deberta-v2", "head", pooler_dropout=0.3, cls_dropout=0.0)
    assert [site["active_p"] for site in teacher.sites if site["layer"] == "head"] == [0.3, 0.0]
    assert teacher.fused_head is None
    check(teacher, *batch("deberta-v2"))


def test_which_families_have_a_fast_form(family, stochastic):
    assert (stochastic(family, "last:1").fast is None) == (family == "deberta-v2")


def test_where_all_see_all_there_is_no_table_of_who_does(stochastic):
    """Of 8192 tokens it would take a gigabyte."""

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.most = max(self.most, out.numel())
            return out

    teacher = stochastic("modernbert", "last:1", global_attn_every_n_layers=1)
    with Largest() as seen:
        context = teacher.fast.context(SimpleNamespace(longest=500, device=torch.device("cpu")))
    assert list(context) == ["full_attention"] and context["full_attention"][2](0, 500, 500) is None
    assert 500 <= seen.most < 500 * 500


def test_generic_form(family, stochastic, batch, monkeypatch):
    monkeypatch.setattr("muka_fast.trunk.FAST_FORMS", ())
    for scope in ("last:1", "all"):
        check(stochastic(family, scope), *batch(family))


@pytest.mark.parametrize("scope", ["last:0", "last:99", "foo"])
def test_wrong_scopes_are_refused(scope, family, stochastic):
    with pytest.raises(UserError, match="--mc_scope"):
        stochastic(family, scope)


def test_no_mc_is_one_deterministic_pass(family, stochastic, batch):
    teacher = stochastic(family, "last:1", mc=False, dropout=0.0)
    scores = teacher.launch(*batch(family), EXAMPLE_IDS)
    probs = scores.logits.softmax(-1)
    torch.testing.assert_close(scores.mean_probs, probs)
    assert scores.var_probs.abs().max() < 1e-7
    torch.testing.assert_close(scores.predictive_entropy, -(probs * probs.log()).sum(-1), atol=1e-5, rtol=0)
    assert {record["active_p"] for record in teacher.sites} == {0.0}


def test_nan_stays_with_its_text(stochastic, batch):
    """So that the text can be named: in every score of it, and in no score of another."""
    teacher = stochastic("bert", "last:1")
    ids, mask = batch("bert")
    unknown = next(i for i in range(teacher.model.config.vocab_size) if not (ids == i).any())
    with torch.no_grad():
        teacher.model.bert.embeddings.word_embeddings.weight[unknown] = float("nan")
    ids[4, 1] = unknown
    for name, value in vars(teacher.launch(ids, mask, EXAMPLE_IDS)).items():
        assert value.isnan().reshape(TEXTS, -1).any(1).tolist() == [row == 4 for row in range(TEXTS)], name


def test_an_architecture_that_cannot_be_split_falls_back_to_all(stochastic, batch, monkeypatch, caplog):
    monkeypatch.setattr("muka_fast.split.layer_modules", lambda model: None)
    with caplog.at_level(logging.WARNING, "muka_fast"):
        teacher = stochastic("bert", "last:1")
    assert teacher.mc_scope == "all" and "cannot be split" in caplog.text and "last:1" in caplog.text
    check(teacher, *batch("bert"))


def test_a_split_that_computes_something_else_is_not_used(stochastic, monkeypatch, caplog):
    run = ModelSplit.run
    wrong = lambda self, *args, **options: run(self, *args, **options) + (options.get("hidden") is not None)
    monkeypatch.setattr(ModelSplit, "run", wrong)
    with caplog.at_level(logging.WARNING, "muka_fast"):
        assert stochastic("bert", "last:1").mc_scope == "all"


def test_a_fast_form_that_computes_something_else_is_not_used(stochastic, batch, monkeypatch, caplog):
    embeddings = PostLayerNormEncoder.embeddings
    monkeypatch.setattr(PostLayerNormEncoder, "embeddings", lambda self, ids: embeddings(self, ids).flip(-1))
    with caplog.at_level(logging.WARNING, "muka_fast"):
        teacher = stochastic("bert", "last:1")
    assert teacher.fast is None and "teacher news: its fast form differs from the model" in caplog.text
    check(teacher, *batch("bert"))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_one_query_of_a_last_layer_that_sees_all_has_a_kernel_of_its_own(family, stochastic, batch, monkeypatch):
    teacher, alone, asked = stochastic(family, "last:1", mc_dropout_p=0.2), packed.one_query_attention, []
    monkeypatch.setattr(packed, "one_query_attention", lambda query, *rest: asked.append(len(query)) or alone(query, *rest))
    teacher.launch(*batch(family), EXAMPLE_IDS)
    assert asked == [TEXTS]


def test_a_causal_model_of_an_encoders_family_is_not_covered(stochastic, batch, caplog):
    with caplog.at_level(logging.WARNING, "muka_fast"):
        teacher = stochastic("bert", "last:1", is_decoder=True)
    assert teacher.fast is None and "fast form" not in caplog.text and not covered_calls(teacher.model)
    check(teacher, *batch("bert"))


def test_rotation_rounds_once():
    """As in fp32, which transformers' in 16 bits is not."""
    angles = torch.rand(5, 8) * 7
    x, cos, sin = torch.randn(5, 16), angles.cos(), angles.sin()
    halves = preln._rotate(x.bfloat16(), cos, sin)
    torch.testing.assert_close(halves, preln._rotate(x.bfloat16().float(), cos, sin).bfloat16(), atol=0, rtol=0)


def test_attention_of_another_kind_is_refused(stochastic, monkeypatch):
    monkeypatch.setattr(ModelSplit, "run_eagerly", lambda self, ids, mask: torch.zeros(len(ids), 3))
    with pytest.raises(UserError, match="attention of BertForSequenceClassification"):
        stochastic("bert", "all")


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_attention_with_its_probabilities_in_memory_is_pytorchs(kind):
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    seen = torch.rand(2, 1, 3, 5) < 0.7
    seen[..., 0] = True
    mask = seen if kind is torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(kind).min)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    module = torch.nn.Identity()
    for handler in (None, _Eager()):
        found, _ = intercept.attention(module, query, key, value, mask, handler=handler)
        torch.testing.assert_close(found.transpose(1, 2), plain)


def test_what_is_compared_for_that_is_attention_as_masks_need_it(make_model, monkeypatch):
    """With its probabilities in memory."""
    split = ModelSplit(make_model("bert", "abc"))
    ids = torch.tensor([[5, 7, 9], [5, 8, 6]])
    plain = split.run(ids, torch.ones_like(ids))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    torch.testing.assert_close(split.run_eagerly(ids, torch.ones_like(ids)), plain)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_above_the_first_layer_nothing_is_embedded(family, make_model, monkeypatch):
    split = ModelSplit(make_model(family, "abc"))
    ids = torch.tensor([[5, 7, 9], [5, 8, 6]])
    mask = torch.ones_like(ids)
    plain, hidden = split.run(ids, mask), split.run(ids, mask, stop=1)
    monkeypatch.setattr(torch.nn.functional, "embedding", None)
    torch.testing.assert_close(split.run(ids, mask, start=1, hidden=hidden), plain)


def test_trunk_of_another_teacher_is_taken_up(stochastic, batch):
    ids, mask = batch("bert")
    low, high = stochastic("bert", "last:2"), stochastic("bert", "last:1")
    texts = low.texts(ids, mask, EXAMPLE_IDS)
    scores = high.finish(high.trunk(texts, start=low.trunk(texts)))
    assert largest_difference(scores, high.launch(ids, mask, EXAMPLE_IDS)) < 1e-5


def test_example_ids_of_numpy(stochastic, batch):
    scores = stochastic("bert", "head").launch(*batch("bert"), np.arange(TEXTS))
    assert scores.logits.shape == (TEXTS, 3)


@pytest.mark.parametrize("scope", ["all", "last:1", "head"])
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "modernbert"])
def test_samples_may_come_in_waves_and_for_some_of_the_texts(family, scope, stochastic, batch):
    teacher, (ids, mask) = stochastic(family, scope), batch(family)
    at_once = teacher.sample_logits(teacher.trunk(teacher.texts(ids, mask, EXAMPLE_IDS)), 0, K, plain=True)
    assert at_once.shape == (K + 1, TEXTS, 3)
    rows = [4, 1]
    part = teacher.trunk(teacher.texts(ids[rows], mask[rows], EXAMPLE_IDS[rows]))
    waves = [teacher.sample_logits(part, first, 2) for first in (0, 2)]
    torch.testing.assert_close(torch.cat(waves), at_once[1:, rows], atol=1e-5, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(at_once[0], teacher.model(input_ids=ids, attention_mask=mask).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_a_wave_may_be_cut_into_unequal_parts(family, stochastic, batch, monkeypatch):
    teacher = stochastic(family, "all")
    trunk = teacher.trunk(teacher.texts(*batch(family), EXAMPLE_IDS))
    whole, _ = teacher.passes(trunk, 2, 4)
    monkeypatch.setattr(teacher, "_samples_at_once", lambda *shape: 3)
    parts, _ = teacher.passes(trunk, 2, 4)
    assert len(whole) == 4
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_as_many_texts_run_at_a_time_as_have_memory_for_all_their_replicas(stochastic, batch, monkeypatch):
    teacher = stochastic("bert", "all")
    trunk = teacher.trunk(teacher.texts(*batch("bert"), EXAMPLE_IDS))
    memory, tail, sizes = 2 * (K + 1) * teacher._replica_bytes(trunk.packed.longest), teacher.fast.tail, []
    monkeypatch.setattr(teacher, "_budget", lambda: memory)
    monkeypatch.setattr(teacher.fast, "tail", lambda x, layer, part: sizes.append(len(part.packed.lengths)) or tail(x, layer, part))
    teacher.sample_logits(trunk, 0, K, plain=True)
    assert sizes == [2, 2, 2]


@pytest.mark.parametrize("scope", ["all", "last:1"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_text_that_ends_with_the_padding_token(decoder, scope, stochastic, batch):
    """Transformers reads the last token that is not the padding token, be it of the text or of the batch."""
    teacher = stochastic(decoder, scope, mc_dropout_p=0.2)
    ids, mask = batch(decoder)
    pad = teacher.model.config.pad_token_id
    ends = mask.sum(1) - 1
    ids[torch.arange(len(ids)), ends] = pad
    with torch.inference_mode():
        plain = teacher.model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(teacher.launch(ids, mask, EXAMPLE_IDS).logits, plain, atol=1e-5, rtol=1e-5)
