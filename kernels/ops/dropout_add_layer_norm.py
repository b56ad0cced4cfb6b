"""dropout_add_layer_norm: what follows every dense layer of a post-LN encoder, over K replicas, in one pass over memory.

    y[r, i, :] = layer_norm(mask(x[r, i, :]) + residual[(r,) i, :]) * weight + bias
    mask: the contract of philox.py, sample first_sample + r; with plain_first replica 0 is unmasked and r - 1 counts

Bytes: x read and y written once; the residual of the first stochastic layer is one [rows, D] for all replicas.
Operations: ten Philox rounds for eight elements, then about eight per element.
Letters: R replicas (r) · rows (i) · D columns.
"""

import torch
from torch import Tensor

from muka_fast.ops import philox, table
from muka_fast.ops.philox import PHILOX_CALL_OPERATIONS, philox_calls
from muka_fast.ops.reference import dropout_add_layer_norm_ref

SCHEMA = (
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, float p, int seed, int site, Tensor example_ids,"
    " Tensor offsets, int first_sample, bool plain_first) -> Tensor"
)


def bytes_moved(replicas: int, rows: int, width: int, itemsize: int = 4, shared_residual: bool = True) -> int:
    """Bytes the op must read and write."""
    return itemsize * rows * width * (2 * replicas + (1 if shared_residual else replicas)) + 16 * rows + 2 * itemsize * width


def operations(replicas: int, rows: int, width: int) -> int:
    """32-bit operations of the masks (rows that begin at a multiple of eight) and of the normalisation."""
    return replicas * rows * (philox_calls(0, width) * PHILOX_CALL_OPERATIONS + 8 * width)


def _fake(x, residual, weight, bias, eps, p, seed, site, example_ids, offsets, first_sample, plain_first) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _reference(x, residual, weight, bias, eps, p, seed, site, example_ids, offsets, first_sample, plain_first) -> Tensor:
    seed = philox.unsigned_seed(seed)
    return dropout_add_layer_norm_ref(
        x, residual, weight, bias, eps, p, seed, site, example_ids, offsets, first_sample, plain_first
    ).contiguous()


def _cpu(x, residual, weight, bias, eps, p, seed, site, example_ids, offsets, first_sample, plain_first) -> Tensor:
    if x.dtype != torch.float32:
        return _reference(x, residual, weight, bias, eps, p, seed, site, example_ids, offsets, first_sample, plain_first)
    replicas, rows, width = x.shape
    threshold, scale = philox.mask_parameters(p)
    x, residual, weight, bias = (t.float().contiguous() for t in (x, residual, weight, bias))
    out = torch.empty_like(x)
    table._C.dropout_add_layer_norm(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(), example_ids.data_ptr(),
        offsets.data_ptr(), replicas, rows, width, 0 if residual.dim() == 2 else rows * width, eps, philox.unsigned_seed(seed), site,
        first_sample, threshold, scale, int(plain_first), torch.get_num_threads(),
    )  # fmt: skip
    return out


_op = table.register(
    "dropout_add_layer_norm", SCHEMA, reference=_reference, cpu=None if table._C is None else _cpu, triton=None, fake=_fake
)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    seed: int,
    site: int,
    example_ids: Tensor,
    offsets: Tensor,
    first_sample: int = 0,
    plain_first: bool = False,
) -> Tensor:
    """layer_norm(dropout(x) + residual): [R, rows, D], in the dtype of x. For frozen teachers: no gradient.

    x: [R, rows, D]. residual: [rows, D] (the same for all replicas) or [R, rows, D]. weight, bias: [D]. eps > 0.
    p, seed, site, example_ids, offsets, first_sample: as in `repeat_dropout`. plain_first: replica 0 is the deterministic pass.
    Raises ValueError for shapes, p, seed or ids outside their ranges.
    """
    if x.dim() != 3 or residual.shape not in (x.shape, x.shape[1:]):
        raise ValueError(f"x {list(x.shape)} must be [R, rows, D] and residual {list(residual.shape)} the same or [rows, D]")
    ids = philox.check_rows("example_ids", example_ids, x.shape[1], x.device)
    offsets = philox.check_rows("offsets", offsets, x.shape[1], x.device)
    philox.mask_parameters(p)
    return _op(x, residual, weight, bias, eps, p, philox.signed_seed(seed), site, ids, offsets, first_sample, plain_first)
