"""The published procedure, written plainly: the baseline of bench/amalgamation.py, not part of the product.

MUKA/MUKI (arXiv 2112.07327, 2210.05230) as their authors ran it: every teacher makes K forwards in training mode over texts padded
to one length, then each training step runs every teacher once more for its targets. Plain transformers and torch. `args` are the
options of bench/amalgamation.py.
"""

import argparse
import math
import statistics
import time

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from muka_fast.labels import LabelSpace

Loaded = list[tuple[PreTrainedModel, PreTrainedTokenizerBase]]


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
    return model.eval()(**batch).logits.float()


@torch.no_grad()
def normalized_entropy(model: PreTrainedModel, batch: dict[str, Tensor], mc_samples: int) -> Tensor:
    """H(mean over K of softmax) / ln C of K forwards with the model's own dropout: [B]."""
    model.train()
    mean = torch.stack([torch.softmax(model(**batch).logits.float(), dim=-1) for _ in range(mc_samples)]).mean(0)
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
    student: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    q: Tensor,
    weight: Tensor,
    dtype: torch.dtype = torch.float32,
) -> float:
    """One step on mean(weight * KL(q, softmax(student))), gradients clipped to norm 1; in half precision under autocast."""
    student.train()
    with torch.autocast(q.device.type, dtype, enabled=dtype != torch.float32):
        logits = student(**batch).logits
    log_p = torch.log_softmax(logits.float(), dim=-1)
    loss = (weight * (torch.special.xlogy(q, q) - q * log_p).sum(-1)).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def load_published(paths: list[str], device: str, dtype: torch.dtype = torch.float32) -> Loaded:
    return [(load_plain(path, device, dtype=dtype), AutoTokenizer.from_pretrained(path)) for path in paths]


def published_scores(args: argparse.Namespace, teachers: Loaded, texts: list[str], padding: str = "max_length") -> Tensor:
    """K sequential forwards in training mode per teacher, padded: teacher scores [n, N]."""
    columns = []
    for model, tokenizer in teachers:
        batches = padded_batches(tokenizer, texts, args.max_length, args.batch_size, padding, args.device)
        columns.append(1 - torch.cat([normalized_entropy(model, batch, args.samples) for batch in batches]).cpu())
    return torch.stack(columns, -1)


def published_seconds(args: argparse.Namespace, paths: list[str], texts: list[str], dtype: torch.dtype) -> float:
    """Of the published scoring: loading its teachers, plus --published_texts texts, tokenisation included, scaled to all.

    On a GPU these take half a second: the median of five.
    """
    start = time.perf_counter()
    teachers = load_published(paths, args.device, dtype)
    loading_s = time.perf_counter() - start
    sample = texts[: args.published_texts]
    if args.device == "cuda":
        published_scores(args, teachers, sample)  # untimed, as that of the rows
    spent = []
    for _ in range(5 if args.device == "cuda" else 1):
        start = time.perf_counter()
        published_scores(args, teachers, sample)
        spent.append(time.perf_counter() - start)
    return loading_s + statistics.median(spent) * len(texts) / len(sample)


def published_student(
    args: argparse.Namespace,
    paths: list[str],
    texts: list[str],
    scores: Tensor,
    space: LabelSpace,
    seed: int,
    padding: str = "longest",
    max_steps: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple:
    """Train the student as published, in this precision, as every teacher that is run again in every step: student, tokenizer, seconds
    of a step (median)."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(args.encoder)
    student = load_plain(args.encoder, args.device, num_labels=space.num_classes)
    teachers = [load_plain(path, args.device, dtype=dtype) for path in paths]
    scores = scores.to(args.device)
    to_union = [torch.as_tensor(space.teacher_to_union[a:b]) for a, b in zip(space.offsets, space.offsets[1:], strict=False)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.01)
    steps = args.epochs * -(-len(texts) // args.batch_size)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    top = scores.topk(2, -1).values if scores.shape[1] > 1 else None
    margin = scores.new_ones(len(scores)) if top is None else top[:, 0] - top[:, 1]
    order = [rows for _ in range(args.epochs) for rows in torch.randperm(len(texts)).split(args.batch_size)]
    seconds = []
    for rows in order[:max_steps]:
        start = time.perf_counter()
        batch = padded_batches(tokenizer, [texts[i] for i in rows], args.max_length, len(rows), padding, args.device)[0]
        logits = [deterministic_logits(teacher, batch) for teacher in teachers]
        q = soft_targets(logits, scores[rows], to_union, space.num_classes, tau=0.2)
        train_step(student, optimizer, batch, q, margin[rows] + 1e-6, dtype)
        schedule.step()
        seconds.append(time.perf_counter() - start)
    return student.eval(), tokenizer, statistics.median(seconds)
