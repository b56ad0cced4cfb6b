"""The mask contract: known answers, one table of masks, and NumPy, PyTorch and C++ equal bit for bit over the whole counter space."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muka_fast.ops import philox
from muka_fast.ops.reference import dropout_scale, dropout_threshold, keep_mask_ref, philox4x32_ref
from muka_fast.ops.repeat_dropout import repeat_dropout
from muka_fast.ops.table import _C

# Random123, kat_vectors: counter, key, result of philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# (seed, sample, site, example id, offset, threshold) -> keep bits of 64 elements, element 0 lowest. Made once with the NumPy Philox
# of conftest.py; a change here breaks every stored run.
MASKS = [
    ((0x0, 0, 0, 0, 0, 6554), 0xf77ff7ffefed7bff),
    ((0x1, 0, 0, 0, 0, 32768), 0xb1f405e847bd8eea),
    ((0x8000000000000000, 15, 3, 7, 64, 6554), 0x5ffdfbf7fffffbfb),
    ((0xffffffffffffffff, 4294967295, 4294967295, 4294967295, 0, 6554), 0xfeffffffff7b7fbb),
    ((0x9e3779b97f4a7c15, 5, 24, 123456, 8, 24248), 0xbf7bbb96f3cd767e),
    ((0x2a, 0, 1, 3, 13, 6554), 0xffffffffff7fffed),
    ((0x2a, 1, 1, 3, 34359738344, 6554), 0xdfffff77ffeeefff),
    ((0x2a, 1, 1, 4294967299, 0, 1), 0xffffffffffffffff),
    ((0x2a, 1, 1, 3, 0, 65535), 0x0000000000000000),
]

uint32 = st.integers(0, 2**32 - 1)


def as_tensor(value):
    return torch.tensor(value, dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer, numpy_philox):
    assert tuple(int(word) for word in numpy_philox(counter, key)) == answer
    assert tuple(word.item() for word in philox4x32_ref([as_tensor(word) for word in counter], key)) == answer
    if _C is not None:
        assert _C.philox4x32(*counter, key) == answer


@given(st.tuples(uint32, uint32, uint32, uint32), st.integers(0, 2**64 - 1))
def test_philox_is_the_same_everywhere(numpy_philox, counter, key):
    expected = tuple(int(word) for word in numpy_philox(counter, key))
    assert tuple(word.item() for word in philox4x32_ref([as_tensor(word) for word in counter], key)) == expected
    if _C is not None:
        assert _C.philox4x32(*counter, key) == expected


@pytest.mark.parametrize(("stream", "bits"), MASKS)
def test_mask_table(stream, bits, numpy_keep):
    seed, sample, site, example, offset, threshold = stream
    keep = numpy_keep(1, 64, threshold, seed, site, [example], [offset], sample)[0, 0]
    assert sum(1 << i for i in np.flatnonzero(keep).tolist()) == bits
    reference = keep_mask_ref(1, 64, threshold / 65536, seed, site, as_tensor([example]), as_tensor([offset]), sample)
    assert np.array_equal(reference[0, 0].numpy(), keep)


@pytest.mark.parametrize(("stream", "bits"), MASKS)
def test_mask_table_through_the_op(stream, bits, isa):
    seed, sample, site, example, offset, threshold = stream
    ids, offsets = as_tensor([example]), as_tensor([offset])
    y = repeat_dropout(torch.ones(1, 64), 1, threshold / 65536, seed, site, ids, offsets, sample)[0, 0]
    assert sum(1 << i for i in y.nonzero()[:, 0].tolist()) == bits


def test_a_lane_equal_to_the_threshold_is_kept_through_the_op(isa, numpy_philox):
    word = int(numpy_philox((2, 5, 3, 7), 9)[1])  # of elements 18 (low half) and 19
    ids, offsets = as_tensor([7]), as_tensor([16])
    for element, lane in ((18, word & 0xFFFF), (19, word >> 16)):
        for threshold, kept in ((lane, True), (lane + 1, False)):
            y = repeat_dropout(torch.ones(1, 8), 1, threshold / 65536, 9, 3, ids, offsets, 5)
            assert bool(y[0, 0, element - 16]) == kept


def test_keep_bits_of_the_extension(isa, numpy_keep):
    """What mc_head draws from: whole words from element 0."""
    out = np.zeros(20, np.uint64)
    _C.keep_bits(out.ctypes.data, 20, 2**64 - 5, 7, 3, 2**32 - 1, 6554)
    expected = numpy_keep(1, 1280, 6554, 2**64 - 5, 3, [2**32 - 1], [0], 7)[0, 0]
    assert np.array_equal(np.unpackbits(out.view(np.uint8), bitorder="little").astype(bool), expected)


@given(st.floats(0, 1, exclude_max=True))
def test_threshold_rounds_half_to_even(p):
    if p * 65536 >= 65535.5:
        with pytest.raises(ValueError, match="drops everything"):
            dropout_threshold(p)
        return
    t = dropout_threshold(p)
    assert 0 <= t < 65536 and abs(t - p * 65536) <= 0.5
    if (p * 65536) % 1 == 0.5:
        assert t % 2 == 0
    assert np.float32(dropout_scale(p)) == np.float32(65536 / (65536 - t))


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_impossible_probability_is_refused(p):
    with pytest.raises(ValueError, match="dropout probability"):
        philox.mask_parameters(p)


@given(st.integers(0, 2**64 - 1))
def test_signed_seed_round_trip(seed):
    signed = philox.signed_seed(seed)
    assert -(2**63) <= signed < 2**63 and philox.unsigned_seed(signed) == seed


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_outside_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        philox.signed_seed(seed)


@settings(max_examples=20)
@given(st.integers(0, 2**64 - 1), uint32)
def test_share_of_kept_lanes(numpy_keep, seed, example):
    """4,096 lanes at p = 0.1: six standard deviations."""
    kept = numpy_keep(4, 1024, dropout_threshold(0.1), seed, 3, [example], [0]).mean()
    assert abs(kept - 0.9) < 6 * (0.09 / 4096) ** 0.5


def test_philox_calls():
    assert [philox.philox_calls(width) for width in (0, 1, 8, 9)] == [0, 1, 1, 2]


def test_triton_draws_the_masks_of_the_table(interpreter):
    """Its hypothesis test over counters is in test_repeat_dropout.py."""
    interpreter(__file__, "through_the_op")
