"""What the student's optimizer does besides AdamW: which parameters decay, the learning-rate schedule, gradient clipping."""

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

    DeepSpeed clips stage 0 by another formula than stages 1 and 2; this is the latter's, in its order of summation, so that the stage
    changes no bit of the result.
    """
    gradients = [[p.grad for p in group["params"] if p.grad is not None] for group in groups]
    norms = [torch.stack([_square(g) for g in group]).sum().float().sqrt() for group in gradients if group]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    scale = 1.0 / torch.clamp((norm + 1e-6) / max_norm, min=1.0)
    for gradient in (g for group in gradients for g in group):
        gradient.mul_(scale)
    return norm


def _square(gradient: Tensor) -> Tensor:
    """Sum of squares in float64. On the CPU piece by piece: a float64 copy of all the gradients would cost more than AdamW does."""
    if gradient.device.type != "cpu":
        return torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
    pieces = (piece.double() for piece in gradient.flatten().split(PIECE))
    return torch.stack([torch.dot(piece, piece) for piece in pieces]).sum()


def linear_schedule(step: int, total_steps: int, warmup_steps: int) -> float:
    """Factor of the learning rate at step 0, 1, ..., total_steps - 1: rises over the warm-up, then falls linearly; never 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (total_steps - step) / max(1, total_steps - warmup_steps)
