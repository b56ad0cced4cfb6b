"""dropout_add_layer_norm and one_query_attention: the C++ forms against their float64 references and against plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muka_fast.ops import table, tuning
from muka_fast.ops.dropout_add_layer_norm import dropout_add_layer_norm
from muka_fast.ops.one_query_attention import one_query_attention
from muka_fast.ops.reference import (
    ATTENTION_STRIDE,
    dropout_add_layer_norm_ref,
    keep_mask_ref,
    one_query_attention_ref,
    repeat_dropout_ref,
)


def test_the_extension_is_built():
    assert table.TABLE["dropout_add_layer_norm"]["cpu"] == table.TABLE["one_query_attention"]["cpu"]
    if table.BACKEND == "auto":
        assert table.TABLE["one_query_attention"]["cpu"] == "cpu"


def layer_norm_case(replicas, rows, width, shared, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(replicas, rows, width, generator=generator)
    residual = torch.randn(*(() if shared else (replicas,)), rows, width, generator=generator)
    weight, bias = torch.randn(width, generator=generator), torch.randn(width, generator=generator)
    ids = torch.randint(0, 2**32, (rows,), generator=generator)
    offsets = torch.randint(0, 2**34, (rows,), generator=generator)
    return x, residual, weight, bias, ids, offsets


@settings(max_examples=60, deadline=None)
@given(
    replicas=st.integers(1, 5),
    rows=st.integers(0, 7),
    width=st.sampled_from([1, 7, 8, 63, 64, 130, 384, 1271]),
    shared=st.booleans(),
    plain=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**20),
)
def test_layer_norm_equals_its_reference(replicas, rows, width, shared, plain, p, seed, first):
    x, residual, weight, bias, ids, offsets = layer_norm_case(replicas, rows, width, shared, seed % 2**31)
    got = dropout_add_layer_norm(x, residual, weight, bias, 1e-12, p, seed, 3, ids, offsets, first, plain)
    want = dropout_add_layer_norm_ref(
        x.double(), residual.double(), weight.double(), bias.double(), 1e-12, p, seed, 3, ids, offsets, first, plain
    )
    eager = dropout_add_layer_norm_ref(x, residual, weight, bias, 1e-12, p, seed, 3, ids, offsets, first, plain)
    assert got.shape == x.shape
    if width > 1 and rows:  # of one value nothing but rounding is left after the mean
        error, allowed = (got - want).abs().max(), 2 * (eager - want).abs().max() + 1e-5 * want.abs().max().clamp_min(1)
        assert error <= allowed


def test_layer_norm_is_what_pytorch_makes_of_the_same_masks():
    x, residual, weight, bias, ids, offsets = layer_norm_case(3, 4, 96, True, 0)
    masked = repeat_dropout_ref(x, 3, 0.25, 9, 2, ids, offsets, 5)
    want = torch.nn.functional.layer_norm(masked + residual, (96,), weight, bias, 1e-5)
    torch.testing.assert_close(dropout_add_layer_norm(x, residual, weight, bias, 1e-5, 0.25, 9, 2, ids, offsets, 5), want)


@pytest.mark.parametrize("shift", [0, 1, 7])
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_layer_norm_of_rows_that_begin_with_a_call_and_others(shift, at_once, monkeypatch):
    """At a multiple of eight the Triton kernel makes half the calls. at_once: replicas of a program, the last may have fewer."""
    x, residual, weight, bias, ids, offsets = layer_norm_case(3, 4, 40, at_once == 2, 4)
    common = (1e-5, 0.4, 2**64 - 9, 2, ids, offsets // 8 * 8 + shift, 5, True)
    want = dropout_add_layer_norm_ref(x, residual, weight, bias, *common)
    monkeypatch.setitem(dropout_add_layer_norm.__globals__, "FULL", 1)
    with tuning.trying("dropout_add_layer_norm", "1024", (at_once, 1)):
        torch.testing.assert_close(dropout_add_layer_norm(x, residual, weight, bias, *common), want)


def test_layer_norm_in_the_interpreter(interpreter):
    interpreter(__file__, "layer_norm_equals or layer_norm_of_rows or first_block")


def attention_case(lengths, heads, key_heads, head_dim, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    query = torch.randn(len(lengths), heads * head_dim, generator=generator)
    key, value = (torch.randn(tokens, key_heads * head_dim, generator=generator) for _ in range(2))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(0, 2**32, (len(lengths),), generator=generator)
    positions = torch.tensor([n - 1 for n in lengths], dtype=torch.int64)
    bias = torch.randn(heads, max(lengths, default=0) + 3, generator=generator)
    return query, key, value, starts, ids, positions, bias


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), max_size=4),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    head_dim=st.sampled_from([4, 32, 33]),
    with_bias=st.booleans(),
    plain=st.booleans(),
    samples=st.integers(0, 4),
    p=st.sampled_from([0.0, 0.1, 0.6]),
    seed=st.integers(0, 2**64 - 1),
)
def test_attention_equals_its_reference(lengths, heads, head_dim, with_bias, plain, samples, p, seed):
    samples = samples or int(not plain)
    query, key, value, starts, ids, positions, bias = attention_case(lengths, *heads, head_dim, seed % 2**31)
    bias = bias if with_bias else None
    common = (starts, heads[0], head_dim**-0.5, samples, p, seed, 7, ids, positions)
    got = one_query_attention(query, key, value, *common, bias, 2, plain)
    want = one_query_attention_ref(
        query.double(), key.double(), value.double(), *common, None if bias is None else bias.double(), 2, plain
    )
    assert got.shape == (samples + plain, *query.shape)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)


def test_a_bias_that_hides_the_first_block_of_keys():
    query, key, value, starts, ids, positions, bias = attention_case([100], 2, 2, 8, 5)
    bias[:, :64] = -float("inf")
    common = (query, key, value, starts, 2, 0.35, 2, 0.3, 12, 3, ids, positions, bias)
    torch.testing.assert_close(one_query_attention(*common), one_query_attention_ref(*common), atol=2e-6, rtol=1e-5)


def test_more_replicas_than_one_program_takes():
    query, key, value, starts, ids, positions, _ = attention_case([3, 9], 2, 2, 8, 5)
    common = (query, key, value, starts, 2, 0.35, 40, 0.3, 12, 3, ids, positions, None, 0, True)
    torch.testing.assert_close(one_query_attention(*common), one_query_attention_ref(*common), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    """Inside they compute in float32: the result is that of the same values there, cast."""
    x, residual, weight, bias, ids, offsets = layer_norm_case(3, 5, 96, True, 0)
    halves = [t.to(dtype) for t in (x, residual, weight, bias)]
    common = (1e-5, 0.25, 9, 2, ids, offsets, 5)
    got, want = dropout_add_layer_norm(*halves, *common), dropout_add_layer_norm(*(t.float() for t in halves), *common)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=0, rtol=torch.finfo(dtype).eps)
    query, key, value, starts, ids, positions, _ = attention_case([3, 9, 1], 2, 2, 8, 5)
    halves = [t.to(dtype) for t in (query, key, value)]
    common = (starts, 2, 0.35, 4, 0.3, 12, 3, ids, positions, None, 0, True)
    got, want = one_query_attention(*halves, *common), one_query_attention(*(t.float() for t in halves), *common)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=0, rtol=torch.finfo(dtype).eps)


def test_float64_is_the_reference():
    x, residual, weight, bias, ids, offsets = layer_norm_case(3, 5, 96, True, 0)
    doubles = [t.double() for t in (x, residual, weight, bias)]
    common = (1e-5, 0.25, 9, 2, ids, offsets, 5)
    assert torch.equal(dropout_add_layer_norm(*doubles, *common), dropout_add_layer_norm_ref(*doubles, *common))
    query, key, value, starts, ids, positions, _ = attention_case([3, 9, 1], 2, 2, 8, 5)
    doubles = [t.double() for t in (query, key, value)]
    common = (starts, 2, 0.35, 4, 0.3, 12, 3, ids, positions, None, 0, True)
    assert torch.equal(one_query_attention(*doubles, *common), one_query_attention_ref(*doubles, *common))


def test_attention_is_the_row_of_the_whole_layer():
    """The masks are those of the full [H, L, L] probabilities at the row of the query, and so is the result."""
    length, heads, head_dim, samples = 9, 3, 8, 2
    query, key, value, starts, ids, positions, _ = attention_case([length], heads, heads, head_dim, 1)
    scores = torch.einsum("hd,lhd->hl", query.view(heads, head_dim), key.view(length, heads, head_dim)) * 0.3
    first = (torch.arange(heads) * ATTENTION_STRIDE + positions[0]) * ATTENTION_STRIDE
    keep = keep_mask_ref(samples, length, 0.5, 11, 4, ids.expand(heads), first)
    want = torch.einsum("khl,lhd->khd", keep * 2.0 * scores.softmax(-1), value.view(length, heads, head_dim))
    got = one_query_attention(query, key, value, starts, heads, 0.3, samples, 0.5, 11, 4, ids, positions)
    torch.testing.assert_close(got[:, 0], want.reshape(samples, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": torch.tensor([0, 0, 5])}, "rise strictly"),
        ({"starts": torch.tensor([0, 5])}, "rise strictly"),
        ({"starts": torch.tensor([0, 2, 6])}, "rise strictly"),
        ({"starts": torch.tensor([0.0, 2.0, 5.0])}, "starts must hold integers"),
        ({"num_heads": 3}, "do not share"),
        ({"num_heads": 0}, "do not share"),
        ({"num_heads": -2}, "do not share"),
        ({"query": torch.randn(8)}, "must be"),
        ({"query": torch.randn(2, 1, 8)}, "must be"),
        ({"key": torch.randn(5, 2, 4), "value": torch.randn(5, 2, 4)}, "must be"),
        ({"value": torch.randn(4, 8)}, "must be"),
        ({"key": torch.randn(5, 0), "value": torch.randn(5, 0)}, "do not share"),
        ({"position_bias": torch.zeros(2, 2)}, "shorter than the longest"),
        ({"position_bias": torch.zeros(1, 9)}, "position_bias must be"),
        ({"position_bias": torch.zeros(9)}, "position_bias must be"),
        ({"example_ids": torch.zeros(3, dtype=torch.int64)}, "example_ids"),
        ({"example_ids": torch.zeros(1, dtype=torch.int64)}, "example_ids"),
        ({"query_positions": torch.zeros(1, dtype=torch.int64)}, "query_positions"),
        ({"query_positions": torch.tensor([0, 16384])}, "query_positions"),
        ({"query_positions": torch.tensor([-1, 0])}, "query_positions"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": -1, "plain_first": True}, "num_samples"),
        ({"site": 2**32}, "site"),
        ({"site": -1}, "site"),
        ({"first_sample": 2**32 - 1}, "samples"),
        ({"first_sample": -1}, "samples"),
        ({"seed": 2**64}, "seed"),
        ({"p": 1.0}, "drops everything"),
    ],
)
def test_attention_refuses_what_does_not_fit(change, message):
    arguments = {
        "query": torch.randn(2, 8), "key": torch.randn(5, 8), "value": torch.randn(5, 8), "starts": torch.tensor([0, 2, 5]),
        "num_heads": 2, "scaling": 0.5, "num_samples": 2, "p": 0.1, "seed": 1, "site": 0, "example_ids": torch.arange(2),
        "query_positions": torch.zeros(2, dtype=torch.int64),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        one_query_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8)}, "must be"),
        ({"residual": torch.zeros(4, 8)}, "residual"),
        ({"residual": torch.zeros(1, 3, 8)}, "residual"),
        ({"weight": torch.ones(7)}, "weight"),
        ({"weight": torch.ones(1)}, "weight"),
        ({"bias": torch.ones(9)}, "bias"),
        ({"bias": torch.ones(1, 8)}, "bias"),
        ({"eps": 0.0}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"example_ids": torch.zeros(2, dtype=torch.int64)}, "example_ids"),
        ({"example_ids": torch.zeros(3)}, "example_ids"),
        ({"offsets": torch.zeros(4, dtype=torch.int64)}, "offsets"),
        ({"site": 2**32}, "site"),
        ({"site": -1}, "site"),
        ({"first_sample": 2**32 - 1}, "samples"),
        ({"first_sample": -1}, "samples"),
        ({"seed": -1}, "seed"),
        ({"p": 1.0}, "drops everything"),
        ({"x": torch.ones(2, 3, 8, dtype=torch.int64)}, "floating-point"),
    ],
)
def test_layer_norm_refuses_what_does_not_fit(change, message):
    x, residual, weight, bias, ids, offsets = layer_norm_case(2, 3, 8, True, 0)
    good = {"x": x, "residual": residual, "weight": weight, "bias": bias, "eps": 1e-5, "p": 0.1, "seed": 1, "site": 0}
    good |= {"example_ids": ids, "offsets": offsets}
    dropout_add_layer_norm(**good)
    with pytest.raises(ValueError, match=message):
        dropout_add_layer_norm(**good | change)


def test_the_last_sample_of_all_is_allowed():
    x, residual, weight, bias, ids, offsets = layer_norm_case(2, 3, 8, True, 0)
    common = (x, residual, weight, bias, 1e-5, 0.1, 1, 2**32 - 1, ids, offsets, 2**32 - 1, True)
    torch.testing.assert_close(dropout_add_layer_norm(*common), dropout_add_layer_norm_ref(*common))


@pytest.mark.parametrize("plain", [False, True])
def test_registration(plain):
    x, residual, weight, bias, ids, offsets = layer_norm_case(2, 3, 16, True, 0)
    torch.library.opcheck(
        torch.ops.muka_fast.dropout_add_layer_norm, (x, residual, weight, bias, 1e-5, 0.1, -5, 0, ids, offsets, 0, plain)
    )
    query, key, value, starts, ids, positions, bias = attention_case([3, 5], 2, 2, 4, 0)
    torch.library.opcheck(
        torch.ops.muka_fast.one_query_attention,
        (query, key, value, starts, 2, 0.5, 2, 0.1, -5, 0, ids, positions, bias, 0, plain),
    )
