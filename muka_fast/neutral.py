"""Neutral features: what an encoder that no teacher has touched, by default the student's own, says about every text.

Mean over the text's tokens of the last hidden states, [n, d], computed once per encoder, tokenizer and max_length, and kept
beside the teachers' shards under the same rules (store.py, invariants 2 and 4 to 6).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from torch import Tensor

from muka_fast import checkpoint
from muka_fast.console import progress
from muka_fast.data import TextSet, Tokens, collate, token_budget_batches, tokenize, tokenizer_key
from muka_fast.errors import NOT_FINITE, UserError
from muka_fast.features import Features
from muka_fast.intercept import run_without_waiting
from muka_fast.memory import Fetch, device_of, send, token_budget
from muka_fast.names import readable
from muka_fast.pool_tokens import PoolTokens
from muka_fast.shard_queue import ShardQueue
from muka_fast.store import (
    FEATURE_TYPE,
    FEATURES,
    FORMAT,
    ShardRange,
    half,
    missing_shards,
    read_manifest,
    read_or_refuse,
    read_tensors,
    remove_leftovers,
    shard_ranges,
    write_shard,
)
from muka_fast.student import draw_fresh, encoder_fingerprint
from muka_fast.teachers import DTYPES, settle_forward, some
from muka_fast.tokenizer import fit_tokenizer, forget_token_types, load_tokenizer, token_limit, tokenizer_limit

if TYPE_CHECKING:
    from muka_fast.config import ScoringOptions

log = logging.getLogger("muka_fast")
ROLE = "neutral encoder"  # in error messages: the student, unless --neutral_encoder names one


def neutral_features(
    store: str | Path,
    encoder: str | Path,
    texts: TextSet,
    options: ScoringOptions,
    queue: ShardQueue | None = None,
    aside: str | Path | None = None,
) -> Features:
    """The neutral features of the texts, from the store as far as it holds them; missing and damaged shards are computed.

    store: one that was filled with these texts. encoder: folder or hub name. With the queue of a process group every process
    calls this, and each text goes through the encoder in one of them; by default this process does all. aside: a folder that keeps
    the features of a store that cannot be written.
    Raises UserError where the encoder cannot be loaded or gives NaN.
    """
    queue = queue or ShardQueue()
    with queue:
        folder, tokenizer = find_encoder(encoder)
        max_length = min(options.max_length, tokenizer_limit(tokenizer))
        key = neutral_key(encoder, tokenizer, max_length, texts, options.scoring_precision)
        place = Path(store) / f"neutral-{key}"
        ranges = shard_ranges(len(texts), read_manifest(Path(store))["shard_size"])
        look = lambda place: missing_shards(place, ranges, lambda shard: _read(place, shard, key))
        remove_leftovers(place)
        missing = queue.agree(key, lambda: look(place))
        if missing and aside is not None and not os.access(store, os.W_OK):
            place = Path(aside) / place.name
            remove_leftovers(place)
            missing = queue.agree(f"{key} aside", lambda: look(place))
        if missing:
            todo = [ranges[number] for number in missing]
            _compute(place, Path(store), key, folder, tokenizer, texts, max_length, todo, options, queue)
    read = lambda shard: _read(place, shard, key, (FEATURES,))
    return Features(ranges, lambda shard: read_or_refuse(place, shard, read, "run the same command to compute it again")[FEATURES])


def find_encoder(encoder: str | Path) -> tuple[Path, transformers.PreTrainedTokenizerBase]:
    """The folder of an encoder, from the hub where it is none, and its tokenizer."""
    folder = checkpoint.resolve_folder(encoder, ROLE)
    return folder, load_tokenizer(folder, f"{ROLE} {encoder}")


def neutral_tokens(store: str | Path, encoder: str | Path, texts: TextSet, options: ScoringOptions) -> Tokens:
    """The texts as the neutral encoder's tokenizer cuts them, special tokens included."""
    _, tokenizer = find_encoder(encoder)
    return PoolTokens(texts, tokenizer, min(options.max_length, tokenizer_limit(tokenizer)), Path(store)).whole(ShardQueue())


@torch.inference_mode()
def name_features(encoder: str | Path, names: Sequence[str], options: ScoringOptions) -> np.ndarray:
    """The neutral features of class names, read as words, fp32 [C, d]."""
    folder, tokenizer = find_encoder(encoder)
    model = load_encoder(folder, tokenizer, device_of(options.device), options.scoring_precision)
    limit = min(options.max_length, token_limit(model, tokenizer))
    tokens = tokenize(tokenizer, [readable(name) for name in names], limit)
    features = np.empty((len(names), 0), np.float32)
    for batch in token_budget_batches(tokens.lengths, token_budget(options.token_budget, model, model.device)):
        states = mean_states(model, **collate(tokens, batch, tokenizer.pad_token_id)).cpu().numpy()
        features = features if features.size else np.empty((len(names), states.shape[1]), np.float32)
        features[batch] = states
    return features


def neutral_key(
    encoder: str | Path, tokenizer: transformers.PreTrainedTokenizerBase, max_length: int, texts: TextSet, precision: str
) -> str:
    """16 hex digits over all that decides the numbers: encoder, tokenizer, max_length, texts, precision."""
    parts = [FORMAT, encoder_fingerprint(encoder, ROLE), tokenizer_key(tokenizer, max_length), max_length, texts.fingerprint]
    parts += [precision] if precision != "fp32" else []  # keys are older than the option
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _read(place: Path, shard: ShardRange, key: str, only: Sequence[str] = ()) -> dict[str, np.ndarray]:
    rows = shard.stop - shard.start
    return read_tensors(place, shard, key, {"example_ids": ((rows,), np.int64), FEATURES: ((rows, None), FEATURE_TYPE)}, only)


def _compute(
    place: Path,
    store: Path,
    key: str,
    folder: Path,
    tokenizer: transformers.PreTrainedTokenizerBase,
    texts: TextSet,
    max_length: int,
    todo: list[ShardRange],
    options: ScoringOptions,
    queue: ShardQueue,
) -> None:
    """One pass of the encoder over the texts of the missing shards that this process gets, each written as soon as it is whole."""
    model = load_encoder(folder, tokenizer, device_of(options.device), options.scoring_precision)
    pool = PoolTokens(texts, tokenizer, min(max_length, token_limit(model, tokenizer)), store)
    budget = token_budget(options.token_budget, model, model.device)

    def begin(number: int, tokens: Tokens) -> Callable[[], None]:
        shard, parts = todo[number], []
        batches = token_budget_batches(tokens.lengths, budget)
        for batch in batches:
            parts.append(mean_states(model, **collate(tokens, batch, tokenizer.pad_token_id)))
            bar.advance(queue.advance(key, len(batch)) - bar.done)
            queue.check()
        states = Fetch(torch.cat(parts))  # here: what `write` asked for would stand behind the next shard

        def write() -> None:
            pooled = states.tensor().numpy()[np.argsort(np.concatenate(batches))]
            ids = texts.example_ids[shard.start : shard.stop].astype(np.int64)
            finite = np.isfinite(pooled).all(1)
            if not finite.all():
                raise UserError(f"{ROLE} {folder}: NaN or infinite for text {ids[~finite][0]}; {NOT_FINITE}")
            write_shard(place, shard, key, {FEATURES: half(pooled), "example_ids": ids})

        return write

    with progress(sum(shard.stop - shard.start for shard in todo), "neutral features") as bar:
        queue.work(key, len(todo), lambda number: pool.shard(todo[number]), begin, model.device)


def load_encoder(
    folder: Path, tokenizer: transformers.PreTrainedTokenizerBase, device: str, precision: str
) -> transformers.PreTrainedModel:
    """The encoder of a folder without any head, eval mode, frozen."""
    what = f"{ROLE} {folder}"
    with checkpoint.loading(f"{what}: transformers cannot load it"):
        model, info = transformers.AutoModel.from_pretrained(folder, dtype=DTYPES[precision], **checkpoint.SAFE_LOADING)
    settle_forward(model)
    forget_token_types(model, tokenizer)
    fit_tokenizer(model, tokenizer, what)
    fresh = draw_fresh(model, info, num_labels=0, seed=0)
    drawn = {parameter for name, parameter in model.named_parameters() if name in fresh and "pooler" not in name}  # which is not read
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    if random := [name for name, parameter in model.named_parameters() if parameter in drawn]:
        log.warning(
            "%s: its files hold no weights for %s, which are random: what it says of the texts may be worth little; "
            "--neutral_encoder names another",
            what,
            some(random),
        )
    if device != "cpu":
        run_without_waiting(model)
    return model.eval().requires_grad_(False).to(device)


@torch.inference_mode()
def mean_states(model: transformers.PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over each text's tokens of the last hidden states: [B, L] on the host -> [B, d] fp32 on the device, without waiting."""
    mask = send(attention_mask, model.device)
    hidden = model(input_ids=send(input_ids, model.device), attention_mask=mask).last_hidden_state.float()
    weights = mask[..., None].to(hidden)
    return (hidden * weights).sum(1) / weights.sum(1)
