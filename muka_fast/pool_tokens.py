"""Token ids of a pool of texts: each shard is tokenised once for every distinct tokenizer and length, by whichever process needs it
first, and kept in the store (store.py, invariants 2, 5, 6) for the other teachers, the student, the other processes and later runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
import transformers

from muka_fast.console import progress
from muka_fast.data import TextSet, Tokens, tokenize_quietly, tokenizer_key
from muka_fast.shard_queue import ShardQueue
from muka_fast.store import (
    FORMAT,
    DamagedShard,
    ShardRange,
    read_manifest,
    read_tensors,
    remove_leftovers,
    shard_ranges,
    write_shard,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("muka_fast")


def tokens_key(texts: TextSet, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """16 hex digits over all that decides the ids: texts, tokenizer, max_length, and the versions of the code that runs it."""
    versions = [tokenizers.__version__, transformers.__version__]
    parts = [FORMAT, "tokens", texts.fingerprint, tokenizer_key(tokenizer, max_length), *versions]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class PoolTokens:
    """The token ids of `texts` for one tokenizer, cut to `max_length` tokens. store: a folder with a manifest of these texts; one that
    cannot be written is read, and what it lacks is tokenised where it is asked for."""

    def __init__(self, texts: TextSet, tokenizer: PreTrainedTokenizerBase, max_length: int, store: Path) -> None:
        self.texts, self.tokenizer, self.max_length, self.store = texts, tokenizer, max_length, store
        self.key = tokens_key(texts, tokenizer, max_length)
        self.folder = store / f"tokens-{self.key}"
        self._is_kept = os.access(store, os.W_OK)
        self._told = False
        if self._is_kept:
            remove_leftovers(self.folder)

    def shard(self, shard: ShardRange) -> Tokens:
        """The tokens of the texts [start, stop), from the store or made now."""
        return self._read(shard) or self._make(shard)

    def whole(self, queue: ShardQueue) -> Tokens:
        """The tokens of all texts. With the queue of a process group every process calls this, and each does a share of what the store
        lacks. Raises UserError where max_length leaves no room beside the special tokens."""
        ranges = shard_ranges(len(self.texts), read_manifest(self.store)["shard_size"])
        with queue:
            missing = queue.agree(self.key, lambda: [shard.number for shard in ranges if not shard.path(self.folder).exists()])
            if missing and self._is_kept:
                with progress(sum(ranges[number].stop - ranges[number].start for number in missing), "tokenising") as bar:
                    for number in queue.take(self.key, len(missing)):
                        done = ranges[missing[number]]
                        self._make(done)
                        bar.advance(queue.advance(self.key, done.stop - done.start) - bar.done)
        parts = [self.shard(shard) for shard in ranges]
        ids, lengths = (np.concatenate(found) for found in zip(*((part.ids, part.lengths) for part in parts), strict=True))
        return Tokens.of(ids, lengths)

    def _read(self, shard: ShardRange) -> Tokens | None:
        """What the store holds of this shard, if it does and it can be believed."""
        try:
            found = read_tensors(self.folder, shard, self.key, {"lengths": ((shard.stop - shard.start,), np.int64)})
            if "ids" not in found or found["ids"].shape != (found["lengths"].sum(),) or found["ids"].dtype != np.int32:
                raise DamagedShard("its token ids are missing, or not as many as it says")
        except FileNotFoundError:
            return None
        except DamagedShard as error:
            log.warning("%s is damaged (%s): tokenising these texts again", shard.path(self.folder), error)
            return None
        return Tokens.of(found["ids"], found["lengths"])

    def _make(self, shard: ShardRange) -> Tokens:
        tokens, num_empty = tokenize_quietly(self.tokenizer, self.texts.texts[shard.start : shard.stop], self.max_length)
        if num_empty and not self._told:
            self._told = True
            log.warning("some texts give no token (control characters only; %d so far): each is read as one unknown token", num_empty)
        if self._is_kept:
            write_shard(self.folder, shard, self.key, {"ids": tokens.ids, "lengths": tokens.lengths})
        return tokens
