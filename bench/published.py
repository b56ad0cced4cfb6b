"""The published procedure, written plainly: the baseline of bench/amalgamation.py, not part of the product.

MUKA/MUKI (arXiv 2112.07327, 2210.05230) as their authors ran it: every teacher makes K forwards in training mode over texts padded
to one length, then each training step runs every teacher once more for its targets. Plain transformers and torch.
"""

import math

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase


def load_plain(path: str, device: str, **options: object) -> PreTrainedModel:
    """A classifier as transformers loads it."""
    return AutoModelForSequenceClassification.from_pretrained(path, **options).to(device)


def padded_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_length: int,
    batch_size: int,
    padding: str = "max_length",
    device: str = "cpu",
) -> list[dict[str, Tensor]]:
    """Batches in the order of `texts`, every text padded to `max_length`: input_ids and attention_mask [B, max_length].

    padding "longest" pads to the longest text of the batch instead: the same logits (masks apart), cheaper, not as published.
    """
    batches = []
    for start in range(0, len(texts), batch_size):
        encoded = tokenizer(
            texts[start : start + batch_size], padding=padding, truncation=True, max_length=max_length, return_tensors="pt"
        )
        batches.append({key: encoded[key].to(device) for key in ("input_ids", "attention_mask")})
    return batches


@torch.no_grad()
def deterministic_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(**batch).logits


@torch.no_grad()
def normalized_entropy(model: PreTrainedModel, batch: dict[str, Tensor], mc_samples: int) -> Tensor:
    """H(mean over K of softmax) / ln C of K forwards with the model's own dropout: [B]."""
    model.train()
    mean = torch.stack([torch.softmax(model(**batch).logits, dim=-1) for _ in range(mc_samples)]).mean(0)
    model.eval()
    entropy = -torch.special.xlogy(mean, mean).sum(-1)
    return entropy / math.log(mean.shape[-1]) if mean.shape[-1] > 1 else entropy


def soft_targets(logits: list[Tensor], scores: Tensor, to_union: list[Tensor], num_classes: int, tau: float) -> Tensor:
    """sum_i softmax(s / tau)_i pad(softmax(z_i)): logits per teacher [B, C_i], scores [B, N] -> [B, C]."""
    weights = torch.softmax(scores / tau, dim=-1)
    q = weights.new_zeros(len(scores), num_classes)
    for i, z in enumerate(logits):
        q.index_add_(1, to_union[i].to(q.device), weights[:, i : i + 1] * torch.softmax(z, dim=-1))
    return q


def train_step(
    student: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], q: Tensor, weight: Tensor
) -> float:
    """One step on mean(weight * KL(q, softmax(student))), gradients clipped to norm 1."""
    student.train()
    log_p = torch.log_softmax(student(**batch).logits, dim=-1)
    loss = (weight * (torch.special.xlogy(q, q) - q * log_p).sum(-1)).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
