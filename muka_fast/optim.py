"""What the student's optimizer does besides AdamW: which parameters decay, learning-rate schedule, clipping, sparse gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PIECE = 1 << 16  # elements: as float64 they stay in the cache


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on biases and norms (the custom of BERT fine-tuning).

    Parameters with an attribute `base_lr` come last, in groups of their own that carry it.
    """
    split: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a parameter's own shape is that of its empty remainder.
            matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            split.setdefault((getattr(parameter, "base_lr", None), matrix), []).append(parameter)
    groups = []
    for base_lr, matrix in sorted(split, key=lambda kind: (kind[0] is not None, kind[0], not kind[1])):
        group = {"params": split[base_lr, matrix], "weight_decay": weight_decay if matrix else 0.0}
        groups.append(group if base_lr is None else group | {"base_lr": base_lr})
    return groups


def clip_gradients(groups: list[dict[str, Any]], max_norm: float) -> Tensor:
    """Scale whole gradients to a joint norm of at most `max_norm` and return the norm before.

    DeepSpeed clips stage 0 by another formula than stages 1 and 2; this is the latter's, on the CPU in its order of summation, so that
    the stage changes no bit of the result. Of a sparse gradient the rows that it holds are scaled.
    """
    parameters = [p for group in groups for p in group["params"] if p.grad is not None]
    if any(p.device.type != "cpu" for p in parameters):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)  # the same formula, in a few launches
    gradients = [[_values(p) for p in group["params"] if p.grad is not None] for group in groups]
    norms = [torch.stack([_square(g) for g in group]).sum().float().sqrt() for group in gradients if group]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    scale = 1.0 / torch.clamp((norm + 1e-6) / max_norm, min=1.0)
    if not scale >= 1:  # NaN is not
        for gradient in (g for group in gradients for g in group):
            gradient.mul_(scale)
    return norm


def _values(parameter: nn.Parameter) -> Tensor:
    """The part of its gradient that is not zero by construction; changes of it in place change the gradient."""
    gradient = parameter.grad
    if not gradient.is_sparse:
        return gradient
    # Not coalesce(): its sort is free to change the order of the sums, and with it their last bits.
    rows, place = gradient._indices()[0].unique(return_inverse=True)
    values = gradient._values().new_zeros(len(rows), gradient.shape[1]).index_add_(0, place, gradient._values())
    parameter.grad = torch.sparse_coo_tensor(rows[None], values, gradient.shape, is_coalesced=True, check_invariants=False)
    return values


def _square(gradient: Tensor) -> Tensor:
    """Sum of squares in float64, piece by piece: a float64 copy of all the gradients would cost more than AdamW does."""
    pieces = (piece.double() for piece in gradient.flatten().split(PIECE))
    return torch.stack([torch.dot(piece, piece) for piece in pieces]).sum()


def sparse_embeddings(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Let the embeddings give sparse gradients; per weight zeros of its shape, for `dense_gradients`.

    A batch touches a few hundred rows of a vocabulary. Allocating, filling and reading a gradient of all of them takes a tenth of a
    training step of a small model on the CPU.
    """
    tables = {module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight.requires_grad}
    for table in tables:
        table.sparse = True
    return {table.weight: torch.zeros_like(table.weight) for table in tables}


@contextmanager
def dense_gradients(zeros: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Inside it the sparse gradients that `clip_gradients` left are dense: AdamW moves every row, be its gradient 0.

    zeros: of `sparse_embeddings`; they are zeros again afterwards.
    """
    touched = []
    for parameter, dense in zeros.items():
        if parameter.grad is not None and parameter.grad.is_sparse:  # a weight that is also used elsewhere has a dense one
            rows = parameter.grad.indices()[0]
            parameter.grad = dense.index_copy_(0, rows, parameter.grad.values())
            touched.append((dense, rows))
    yield
    for dense, rows in touched:
        dense.index_fill_(0, rows, 0.0)


def linear_schedule(step: int, total_steps: int, warmup_steps: int) -> float:
    """Factor of the learning rate at step 0, 1, ..., total_steps - 1: rises over the warm-up, then falls linearly; never 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (total_steps - step) / max(1, total_steps - warmup_steps)
