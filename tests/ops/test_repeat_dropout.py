"""repeat_dropout: masks bit for bit those of the contract, values those of float32, gradient, registration, odd shapes."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muka_fast.ops import table
from muka_fast.ops.reference import repeat_dropout_ref
from muka_fast.ops.repeat_dropout import bytes_moved, repeat_dropout

fixtures_are_constant = settings(
    max_examples=25 if table.BACKEND == "triton" else 100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
IDS = torch.tensor([0, 1, 2**32 - 1, 2**33 + 5, 7])
OFFSETS = torch.tensor([0, 8, 3, 2**35 - 5, 1234567])
CASES = [(384, 0.1), (130, 0.37), (63, 0.5), (8, 0.1), (1, 0.3), (1271, 0.9), (64, 0.0), (15, 65535 / 65536)]


def implementation():
    return table.TABLE["repeat_dropout"]["cpu"]


def test_the_extension_is_built():
    assert table._C is not None


@pytest.mark.parametrize("seed", [7, 2**63, 2**64 - 3])
@pytest.mark.parametrize(("width", "p"), CASES)
def test_bits_table_of_shapes(width, p, seed, isa, numpy_keep):
    """Odd widths, offsets inside a call, the wraps of ids and offsets, seeds above 2^63."""
    x = torch.randn(5, width)
    y = repeat_dropout(x, 3, p, seed, 9, IDS, OFFSETS, 2)
    assert torch.equal(y, repeat_dropout_ref(x, 3, p, seed, 9, IDS, OFFSETS, 2))
    keep = numpy_keep(3, width, round(p * 65536), seed, 9, IDS.tolist(), OFFSETS.tolist(), 2)
    assert np.array_equal((y != 0).numpy(), keep & (x != 0).numpy())


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("offsets", [[0, 8, 768, 2**35 - 8, 16], [0, 8, 768, 2**35 - 8, 17], [*range(1, 6)], [7, 6, 5, 4, 2**34 + 7]])
def test_rows_that_begin_with_a_call_and_others(offsets, repeated):
    """All at multiples of eight, which the Triton kernel makes with half the calls; one that is not; none that is."""
    x, offsets = torch.randn(*(() if repeated else (3,)), 5, 96), torch.tensor(offsets)
    y = repeat_dropout(x, 3, 0.3, 2**63 + 5, 9, IDS, offsets, 2)
    assert torch.equal(y, repeat_dropout_ref(x, 3, 0.3, 2**63 + 5, 9, IDS, offsets, 2))


@fixtures_are_constant
@given(
    seed=st.integers(0, 2**64 - 1),
    site=st.integers(0, 2**32 - 1),
    sample=st.integers(0, 2**32 - 2),
    example=st.integers(0, 2**34),
    offset=st.integers(0, 2**35),
    width=st.integers(1, 150),
    threshold=st.integers(0, 65535),
)
def test_bits_over_the_whole_counter_space(isa, numpy_keep, seed, site, sample, example, offset, width, threshold):
    args = (2, threshold / 65536, seed, site, torch.tensor([example]), torch.tensor([offset]), sample)
    y = repeat_dropout(torch.ones(1, width), *args)
    keep = numpy_keep(2, width, threshold, seed, site, [example], [offset], sample)
    assert np.array_equal((y != 0).numpy(), keep)
    assert torch.equal(y, repeat_dropout_ref(torch.ones(1, width), *args))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("repeated", [True, False])
def test_other_dtypes(dtype, repeated):
    x = torch.randn(*(() if repeated else (3,)), 5, 77).to(dtype)
    y = repeat_dropout(x, 3, 0.2, 11, 4, IDS, OFFSETS)
    expected = repeat_dropout_ref(x, 3, 0.2, 11, 4, IDS, OFFSETS)
    assert y.dtype == dtype
    if implementation() == "triton" and dtype == torch.bfloat16:  # its interpreter truncates where the compiler rounds
        assert torch.equal(y == 0, expected == 0)
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(y, expected)


def test_samples_can_be_made_in_parts():
    x, args = torch.randn(5, 40), (0.1, 3, 1, IDS, OFFSETS)
    whole = repeat_dropout(x, 6, *args)
    assert torch.equal(whole, torch.cat([repeat_dropout(x, 2, *args, 0), repeat_dropout(x, 4, *args, 2)]))
    assert torch.equal(whole, repeat_dropout(x.expand(6, -1, -1), 6, *args))


def test_rows_do_not_depend_on_their_neighbours():
    x = torch.randn(5, 40)
    whole = repeat_dropout(x, 2, 0.1, 3, 1, IDS, OFFSETS)
    order = torch.tensor([3, 0, 4])
    assert torch.equal(whole[:, order], repeat_dropout(x[order], 2, 0.1, 3, 1, IDS[order], OFFSETS[order]))


@pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
def test_nothing_to_do(shape):
    ids = torch.zeros(shape[0], dtype=torch.int64)
    assert repeat_dropout(torch.ones(shape), 2, 0.1, 0, 0, ids, ids).shape == (2, *shape)


def test_strided_rows_and_int32_ids():
    x = torch.randn(5, 100)[:, ::2]
    y = repeat_dropout(x, 2, 0.1, 3, 1, torch.arange(10, dtype=torch.int32)[::2], OFFSETS)
    assert torch.equal(y, repeat_dropout_ref(x, 2, 0.1, 3, 1, torch.arange(0, 10, 2), OFFSETS))


def test_dropped_nan_and_infinity_become_zero(isa):
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0] * 20])
    y = repeat_dropout(x, 4, 0.5, 3, 1, torch.tensor([4]), torch.tensor([5]))
    keep = repeat_dropout_ref(torch.ones(1, 80), 4, 0.5, 3, 1, torch.tensor([4]), torch.tensor([5])) != 0
    assert torch.equal(y.isnan(), keep & x.isnan())
    assert torch.equal(y.isinf(), keep & x.isinf())
    assert (y[~keep] == 0).all()


def test_threads_do_not_matter():
    x, ids = torch.randn(600, 1024), torch.arange(600)
    one = repeat_dropout(x, 4, 0.1, 3, 1, ids, ids * 1024)
    try:
        torch.set_num_threads(2)
        assert torch.equal(one, repeat_dropout(x, 4, 0.1, 3, 1, ids, ids * 1024))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("repeated", [True, False])
def test_gradient_of_the_registered_op(repeated):
    x = torch.randn(*(() if repeated else (3,)), 5, 21, requires_grad=True)
    weights = torch.randn(3, 5, 21)
    args = (3, 0.3, 2**64 - 9, 4, IDS, OFFSETS)
    (ours,) = torch.autograd.grad((repeat_dropout(x, *args) * weights).sum(), x)
    (expected,) = torch.autograd.grad((repeat_dropout_ref(x, *args) * weights).sum(), x)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("seed", "first_sample"), [(7, 5), (2**64 - 9, 2**32 - 3)])
def test_seed_and_first_sample_may_lie_on_the_device(seed, first_sample):
    x, weights = torch.randn(5, 21, requires_grad=True), torch.randn(3, 5, 21)
    key = torch.tensor([seed - (2**64 if seed >> 63 else 0), first_sample])
    (expected,) = torch.autograd.grad(((told := repeat_dropout(x, 3, 0.3, seed, 4, IDS, OFFSETS, first_sample)) * weights).sum(), x)
    y = repeat_dropout(x, 3, 0.3, 0, 4, IDS, OFFSETS, key=key)
    assert torch.equal(y, told)
    assert torch.equal(torch.autograd.grad((y * weights).sum(), x)[0], expected)


def test_gradcheck_in_float64():
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    for op in (repeat_dropout_ref, repeat_dropout):
        assert torch.autograd.gradcheck(lambda x, op=op: op(x, 2, 0.4, 5, 1, IDS, OFFSETS), x)
        assert torch.autograd.gradgradcheck(lambda x, op=op: op(x, 2, 0.4, 5, 1, IDS, OFFSETS), x)


@pytest.mark.parametrize("shape", [(5, 12), (3, 5, 12)])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(shape, grad):
    x = torch.randn(shape, requires_grad=grad)
    for key in (None, torch.tensor([-3, 2])):
        torch.library.opcheck(torch.ops.muka_fast.repeat_dropout, (x, 3, 0.1, -3, 1, IDS, OFFSETS, 0, key))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4)}, "x must be"),
        ({"x": torch.ones(3, 5, 4)}, "x must be"),
        ({"x": torch.ones(5, 4, dtype=torch.int64)}, "floating-point"),
        ({"num_samples": 0}, "num_samples"),
        ({"p": 1.0}, "dropout probability"),
        ({"seed": -1}, "seed"),
        ({"site": 2**32}, "site"),
        ({"first_sample": 2**32 - 1}, "samples"),
        ({"example_ids": IDS[:4]}, "example_ids"),
        ({"offsets": OFFSETS.float()}, "offsets"),
        ({"key": torch.tensor([1])}, "key"),
        ({"key": torch.ones(2)}, "key"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    good = {"x": torch.ones(5, 4), "num_samples": 2, "p": 0.1, "seed": 0, "site": 0, "example_ids": IDS}
    good["offsets"] = OFFSETS
    with pytest.raises(ValueError, match=message):
        repeat_dropout(**good | change)


def test_counts_of_bytes():
    assert bytes_moved(16, 10, 768) == 4 * 10 * 768 * 17 + 160
    assert bytes_moved(16, 10, 768, itemsize=2, repeated=False) == 2 * 10 * 768 * 32 + 160


def test_triton_in_the_interpreter(interpreter):
    interpreter(__file__, "bits_table and 63 or rows_that_begin or counter_space or nothing or gradient_of or on_the_device")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_triton_in_the_interpreter_with_all_inputs(interpreter):
    interpreter(__file__, "bits_table or other_dtypes or in_parts or neighbours or strided or refused")


def test_the_gradient_draws_the_masks_of_its_samples():
    x = torch.ones(3, 64, requires_grad=True)
    y = repeat_dropout(x, 2, 0.5, 7, 1, torch.arange(3), torch.zeros(3, dtype=torch.int64), 5)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach().sum(0))


def test_truth_values_are_no_ids():
    with pytest.raises(ValueError, match="example_ids must hold integers"):
        repeat_dropout(torch.ones(3, 8), 2, 0.5, 7, 1, torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64))
