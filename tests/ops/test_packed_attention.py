"""packed_attention: grouped and Triton forms against the float64 reference, and the reference against whole padded attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muka_fast.ops import table
from muka_fast.ops.packed_attention import bytes_moved, operations, packed_attention
from muka_fast.ops.reference import ATTENTION_STRIDE, keep_mask_ref, packed_attention_ref

EXAMPLES = 8 if table.BACKEND == "triton" else 60  # the interpreter takes a second for one


def case(lengths, heads, key_heads, head_dim, replicas, own_query, own_key, one_row, seed=0):
    """Arguments up to example_ids, texts sorted by length as in a batch; own_*: every replica has states of its own."""
    generator = torch.Generator().manual_seed(seed)
    lengths = sorted(lengths)
    counts = [1] * len(lengths) if one_row else lengths

    def states(own, rows, width):
        return torch.randn(*([replicas] if own else []), rows, width, generator=generator)

    query = states(own_query, sum(counts), heads * head_dim)
    key, value = (states(own_key, sum(lengths), key_heads * head_dim) for _ in range(2))
    starts, query_starts = (torch.tensor([0, *n], dtype=torch.int64).cumsum(0) for n in (lengths, counts))
    positions = torch.tensor([n - 1 if one_row else 0 for n in lengths], dtype=torch.int64)
    ids = torch.randint(0, 2**32, (len(lengths),), generator=generator)
    return query, key, value, query_starts, positions, starts, max(lengths, default=0), ids


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=4),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]),
    head_dim=st.sampled_from([4, 32, 33]),
    own=st.tuples(st.booleans(), st.booleans()),
    one_row=st.booleans(),
    bias_heads=st.sampled_from([None, 1, "all"]),
    plain=st.booleans(),
    samples=st.integers(1, 3),
    p=st.sampled_from([0.0, 0.1, 0.6]),
    seed=st.integers(0, 2**64 - 1),
)
def test_equals_its_reference(lengths, heads, head_dim, own, one_row, bias_heads, plain, samples, p, seed):
    *states, longest, ids = case(lengths, *heads, head_dim, samples + plain, *own, one_row, seed % 2**31)
    bias = None
    if bias_heads:
        bias = torch.randn(heads[0] if bias_heads == "all" else 1, longest + 3, longest + 3).triu(-5)  # rows need not be contiguous
        bias = bias[:, : longest + 1, : longest + 2]
    masks = (samples, p, seed, 7, ids)
    got = packed_attention(*states, longest, heads[0], head_dim**-0.5, *masks, bias, 2, plain)
    exact = [t.double() if t.is_floating_point() else t for t in states]
    want = packed_attention_ref(*exact, heads[0], head_dim**-0.5, *masks, None if bias is None else bias.double(), 2, plain)
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)


def test_in_the_interpreter(interpreter):
    interpreter(__file__, "reference or long or first_block or strides")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_floats_without_a_kernel_run_the_reference(dtype):
    *states, longest, ids = case([3, 9], 2, 2, 8, 2, True, True, False)
    states = [t.to(dtype) if t.is_floating_point() else t for t in states]
    common = (2, 0.3, 2, 0.4, 12, 3, ids)
    got, want = packed_attention(*states, longest, *common), packed_attention_ref(*states, *common)
    assert got.dtype == dtype and torch.equal(got.double(), want.double())


def test_a_long_text_in_several_blocks():
    """More queries and keys than one block takes, beside a text of one token."""
    *states, longest, ids = case([1, 83], 2, 2, 8, 2, True, True, False)
    common = (2, 0.3, 1, 0.4, 12, 3, ids)
    want = packed_attention_ref(*states, *common, None, 0, True)
    torch.testing.assert_close(packed_attention(*states, longest, *common, None, 0, True), want, atol=2e-6, rtol=1e-5)


def test_a_bias_that_hides_the_first_block_of_keys():
    *states, longest, ids = case([100], 2, 2, 8, 2, False, False, False)
    bias = torch.randn(2, 100, 100)
    bias[..., :64] = -float("inf")
    common = (2, 0.3, 2, 0.4, 12, 3, ids)
    got = packed_attention(*states, longest, *common, bias)
    torch.testing.assert_close(got, packed_attention_ref(*states, *common, bias), atol=2e-6, rtol=1e-5)


def test_strides_of_a_bias_beyond_32_bits():
    """Three heads, 2^30 elements apart: of 8 GB of addresses, a few pages are memory."""
    *states, longest, ids = case([4], 3, 3, 8, 2, False, False, False)
    far = torch.zeros(2 * 2**30 + 16).as_strided((3, 4, 4), (2**30, 4, 1))
    far.copy_(torch.randn(3, 4, 4))
    common = (3, 0.3, 2, 0.4, 12, 3, ids)
    got = packed_attention(*states, longest, *common, far)
    torch.testing.assert_close(got, packed_attention_ref(*states, *common, far.contiguous()), atol=2e-6, rtol=1e-5)


def test_masks_are_those_of_the_whole_layer():
    """What eager attention over one text makes of the contract's masks."""
    *states, longest, ids = case([9], 3, 3, 8, 2, False, False, False)
    query, key, value = (t.view(9, 3, 8).transpose(0, 1) for t in states[:3])
    first = (torch.arange(3)[:, None] * ATTENTION_STRIDE + torch.arange(9)) * ATTENTION_STRIDE
    keep = keep_mask_ref(2, 9, 0.5, 11, 4, ids.expand(27), first.flatten()).view(2, 3, 9, 9)
    want = (keep * 2.0 * torch.softmax(query @ key.transpose(1, 2) * 0.3, -1)) @ value
    got = packed_attention(*states, longest, 3, 0.3, 2, 0.5, 11, 4, ids)
    torch.testing.assert_close(got, want.transpose(1, 2).reshape(2, 9, 24))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": torch.tensor([0, 0, 5])}, "starts must rise"),
        ({"longest": 2}, "at most 2"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_heads": 3}, "do not share"),
        ({"query": torch.zeros(4, 8)}, "neither one for each"),
        ({"key": torch.zeros(3, 5, 8), "value": torch.zeros(3, 5, 8)}, r"or \[2, rows, width\]"),
        ({"position_bias": torch.zeros(1, 2, 2)}, "does not reach"),
        ({"example_ids": torch.zeros(3, dtype=torch.int64)}, "example_ids"),
        ({"longest": 20_000}, "reach 128 heads"),
        ({"num_heads": 0}, "do not share 0 heads"),
        ({"site": 2**32}, "site"),
        ({"first_sample": -1}, "samples"),
        ({"first_sample": 2**32 - 1}, "samples"),
        ({"first_positions": torch.tensor([0, -1])}, "out of reach"),
        ({"first_positions": torch.tensor([0, ATTENTION_STRIDE - 2])}, "out of reach"),
        ({"first_positions": torch.tensor([0, 2]), "position_bias": torch.zeros(1, 4, 4)}, "out of reach"),
        ({"p": 1.0}, "drops everything"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    arguments = {
        "query": torch.randn(5, 8), "key": torch.randn(5, 8), "value": torch.randn(5, 8), "query_starts": torch.tensor([0, 2, 5]),
        "first_positions": torch.zeros(2, dtype=torch.int64), "starts": torch.tensor([0, 2, 5]), "longest": 3, "num_heads": 2,
        "scaling": 0.5, "num_samples": 2, "p": 0.1, "seed": 1, "site": 0, "example_ids": torch.arange(2),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        packed_attention(**arguments)


@pytest.mark.parametrize(("own", "p"), [((False, False), 0.1), ((True, True), 0.0), ((False, False), 0.0)])
def test_registration(own, p):
    query, key, value, query_starts, positions, starts, longest, ids = case([3, 3, 5], 2, 2, 4, 3, *own, False)
    torch.library.opcheck(
        torch.ops.muka_fast.packed_attention,
        (query, key, value, query_starts, positions, starts, longest, 2, 0.5, 2, p, -5, 0, ids, None, 0, True),
    )


def test_costs():
    assert bytes_moved(2, 3, 5, 4) == 4 * 4 * 2 * (3 + 5 + 5 + 3)
    assert operations(2, 64, 8) == 4 * 2 * 64 * 8


def test_a_bias_of_fewer_keys_is_refused():
    q = torch.randn(3, 8)
    starts, first, ids = torch.tensor([0, 3]), torch.tensor([0]), torch.tensor([0])
    with pytest.raises(ValueError, match="position_bias"):
        packed_attention(q, q, q, starts, first, starts, 3, 2, 0.5, 2, 0.1, 0, 0, ids, torch.zeros(2, 3, 2))
