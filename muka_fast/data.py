"""From texts to batches: texts with stable example ids, token ids packed per tokenizer, batches with little padding.

Shapes: n texts; B texts of a batch; L tokens of its longest text.
"""

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from muka_fast.console import progress
from muka_fast.errors import UserError
from muka_fast.readers import Columns, Row, encodable, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("muka_fast")
# Texts per call of the tokenizer: enough to keep its threads busy, few enough for small Python lists.
TOKENIZE_CHUNK = 2048
# A token stands for less than 64 characters nearly everywhere; `_cut` checks it for each text that is cut.
CHARS_PER_TOKEN = 64
HASH_CHUNK = 65536
NO_TOKEN = "%d texts give no token (control characters only): each is read as one unknown token"
PLACES = ("name_or_path", "is_local", "local_files_only", "cache_dir")  # settings of a tokenizer that say where it was found
# A batch ends early where its padding would exceed this share, but not below 1/8 of the budget: tiny batches cost more.
MAX_PADDING = 0.08
SMALLEST_BATCH = 8
MOST_TEXTS = 65_535  # of a batch: programs that CUDA launches in the second dimension of a grid
SORTED_BATCHES = 50  # of an epoch that are cut from one run of shuffled texts, sorted by length


@dataclass(frozen=True)
class TextSet:
    """Texts of one source.

    Attributes:
        texts: the n texts that are not blank, in source order.
        labels: their n labels, "" of a text without one; None where no text has one.
        example_ids: int64 [n], row of each text in its source; blank rows are counted, so skipping shifts no id.
        source: file or data set name as given.
        fingerprint: SHA-256 (hex) over example ids and texts.
        num_blank: rows skipped because their text is empty, white space or null.
    """

    texts: list[str]
    labels: list[str] | None
    example_ids: np.ndarray
    source: str
    fingerprint: str
    num_blank: int

    def __len__(self) -> int:
        return len(self.texts)


def cut_length(max_length: int, limit: int, what: str) -> int:
    """Tokens kept of each text where `what` takes at most `limit` of them; says so where that is less than --max_length."""
    if limit < max_length:
        log.info("%s reads %d tokens of a text, not --max_length %d", what, limit, max_length)
    return min(max_length, limit)


def tell_cut(lengths: np.ndarray, max_length: int) -> None:
    """Say how many texts fill the tokens that are kept: longer ones lose what is beyond. lengths [n], after the cut."""
    if full := int((lengths >= max_length).sum()):
        log.info("%d of %d texts fill %d tokens, to which longer ones are cut (--max_length)", full, len(lengths), max_length)


def check_source(option: str, given: Any) -> None:
    """Raises UserError, which names the way out, for texts in memory where `read_texts` takes their source."""
    if not isinstance(given, (str, os.PathLike, type(None))):
        way_out = "datasets.Dataset.from_dict({'text': texts}).to_json('texts.jsonl')"
        if hasattr(given, "column_names") and hasattr(given, "to_json"):
            way_out = "its to_json('texts.jsonl')"
        elif hasattr(given, "columns") and hasattr(given, "to_json"):
            way_out = "its to_json('texts.jsonl', orient='records', lines=True)"
        raise UserError(
            f"{option}: a file, pattern or hub data set is expected, found {type(given).__name__}; {way_out} makes a file of it"
        )


def read_texts(
    source: str | Path,
    *,
    text_column: str = "text",
    label_column: str | None = "label",
    need_labels: bool = False,
    limit: int | None = None,
    split: str = "train",
) -> TextSet:
    """Read texts from a .jsonl, .json, .csv, .tsv, .parquet or .txt file (also .gz), from all files of a pattern (`pool/*.parquet`,
    in the order of their names), or from a hub data set `owner/name[:split]`.

    Files are UTF-8. A .txt file holds one text per line. Labels are read where there are any; whole numbers become
    text. Memory is linear in the texts kept, nothing else of a row stays.

    Args:
        label_column: None where nothing asks for labels.
        need_labels: refuse a source that lacks a label somewhere.
        limit: stop after this many non-blank texts.
        split: split of a hub data set that names none.

    Raises:
        UserError: one line with file, line, what is wrong and the way out.
    """
    name = str(source)
    rows = read_rows(name, Columns(text_column, label_column, need_labels), split)
    texts: list[str] = []
    labels: list[str] | None = None
    example_ids = array("q")
    distinct: dict[str, str] = {}
    num_blank = num_labelled = 0
    for index, (part, row) in enumerate(rows):
        if row.text is None or (isinstance(row.text, str) and not row.text.strip()):
            num_blank += 1
            continue
        if not isinstance(row.text, str):
            place = f"{part}, {row.place}: column '{text_column}'"
            raise UserError(f"{place} holds {type(row.text).__name__} ({str(row.text)[:40]}), not text")
        label = None if label_column is None else _label_name(row, part, label_column, need_labels)
        num_labelled += label is not None
        if label is not None and labels is None:
            labels = [""] * len(texts)
        if labels is not None:
            labels.append(distinct.setdefault(label, label) if label is not None else "")
        texts.append(encodable(row.text))
        example_ids.append(index)
        if len(texts) == limit:
            break
    if not texts:
        raise UserError(f"{name}: no text in it ({num_blank} blank rows)")
    if num_blank:
        log.warning("%s: %d blank text%s skipped", name, num_blank, "" if num_blank == 1 else "s")
    if 0 < num_labelled < len(texts):
        without = len(texts) - num_labelled
        log.warning("%s: %d of %d texts have no label in '%s'", name, without, len(texts), label_column)
    elif not num_labelled and label_column not in (None, "label"):  # asked for by name
        log.info("%s: no text has a label in '%s'", name, label_column)
    ids = np.array(example_ids, dtype=np.int64)
    return TextSet(texts, labels, ids, name, _fingerprint(ids, texts), num_blank)


def _label_name(row: Row, part: str, column: str, needed: bool) -> str | None:
    """A label as text; None where there is none and none is needed. part: where the row is."""
    label = row.label
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    missing = label is None or (isinstance(label, str) and not label.strip()) or (isinstance(label, float) and label != label)
    if missing:
        if needed:
            raise UserError(f"{part}, {row.place}: column '{column}' holds no label, and labels are needed here")
        return None
    if isinstance(label, str):
        return encodable(label)
    if isinstance(label, int) and not isinstance(label, bool):
        return str(label)
    if needed:
        found = f"{type(label).__name__} ({str(label)[:40]})"
        raise UserError(f"{part}, {row.place}: column '{column}' holds {found}: a label is text or a whole number")
    return None


def _fingerprint(example_ids: np.ndarray, texts: Sequence[str]) -> str:
    """SHA-256 over ids, lengths and texts, chunk by chunk (10 million small updates would take half a minute)."""
    digest = hashlib.sha256()
    for start in range(0, len(texts), HASH_CHUNK):
        chunk = texts[start : start + HASH_CHUNK]
        digest.update(example_ids[start : start + HASH_CHUNK].astype("<i8").tobytes())
        digest.update(np.array([len(text) for text in chunk], dtype="<i8").tobytes())
        digest.update("".join(chunk).encode("utf-8"))
    return digest.hexdigest()


@dataclass(frozen=True)
class Tokens:
    """Token ids of n texts, packed: text i is ids[offsets[i]:offsets[i + 1]] (int32; offsets int64 [n + 1])."""

    ids: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray, lengths: np.ndarray) -> "Tokens":
        """From the tokens of each text, [n]."""
        return cls(ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n], tokens of each text, special tokens included."""
        return np.diff(self.offsets)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest text; 0 without texts."""
        return int(self.lengths.max(initial=0))


def tokenizer_key(tokenizer: "PreTrainedTokenizerBase", max_length: int) -> str:
    """sha256 (hex) of all that decides a text's token ids: vocabulary, rules, special tokens, truncation."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # State left by the latest call, not a property of the tokenizer.
        content |= {"padding": None, "truncation": None}
    else:
        skip = {*PLACES, "split_special_tokens"}  # the latter is told below
        settings = {name: value for name, value in tokenizer.init_kwargs.items() if name not in skip and not name.endswith("_file")}
        content = [type(tokenizer).__name__, tokenizer.get_vocab(), sorted(map(str, settings.items())), _file_hashes(tokenizer)]
    behaviour = [content, tokenizer.truncation_side, max_length, tokenizer.pad_token_id]
    if tokenizer.split_special_tokens:  # else the key is that of stores written before it was looked at
        behaviour.append("split_special_tokens")
        if spells_end(tokenizer):
            behaviour.append("one end")
    return hashlib.sha256(json.dumps(behaviour, sort_keys=True).encode()).hexdigest()


def spells_end(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a text can hold the token that ends every text, once, of a tokenizer that splits special tokens: a Unigram vocabulary
    (T5) has "</s>" as a piece."""
    end = tokenizer.eos_token_id
    ends = [tokenizer(text)["input_ids"].count(end) for text in ("", tokenizer.eos_token or "")]
    return ends[0] == 1 and ends[1] > 1


def _file_hashes(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Of the files that a slow tokenizer was made of (vocabulary, merges, SentencePiece)."""
    named = {name: getattr(tokenizer, name, None) or tokenizer.init_kwargs.get(name) for name in tokenizer.vocab_files_names}
    there = {name: path for name, path in named.items() if path is not None and os.path.isfile(path)}
    return {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in there.items()}


def tokenize(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_length: int) -> Tokens:
    """Token ids of every text, special tokens included, cut to `max_length` tokens as the tokenizer cuts.

    A text that gives no token at all (control characters only) becomes one unknown token, so that every text has a row.

    Raises:
        UserError: max_length leaves no room beside the special tokens.
    """
    with progress(len(texts), "tokenising") as bar:
        tokens, num_empty = tokenize_quietly(tokenizer, texts, max_length, bar.advance)
    if num_empty:
        log.warning(NO_TOKEN, num_empty)
    return tokens


def tokenize_quietly(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_length: int, done: Callable[[int], None] = lambda count: None
) -> tuple[Tokens, int]:
    """`tokenize` without a bar, and the number of texts that give no token; tells `done` how many texts it did, again and again."""
    limit = getattr(tokenizer, "model_max_length", None) or max_length
    if max_length > limit > 0:
        log.warning("--max_length %d exceeds what the tokenizer allows: texts are cut to %d tokens", max_length, limit)
        max_length = limit
    if max_length <= tokenizer.num_special_tokens_to_add():
        raise UserError(f"--max_length {max_length}: leaves no room beside the special tokens of the tokenizer")
    chunks, lengths = [], np.empty(len(texts), dtype=np.int64)
    num_empty = 0
    for start in range(0, len(texts), TOKENIZE_CHUNK):
        chunk = [_cut(tokenizer, text, max_length) for text in texts[start : start + TOKENIZE_CHUNK]]
        rows = _token_ids(tokenizer, chunk, max_length)
        for i, row in enumerate(rows):
            if not row:
                rows[i] = [_stand_in(tokenizer)]
                num_empty += 1
        sizes = [len(row) for row in rows]
        lengths[start : start + len(rows)] = sizes
        chunks.append(np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=sum(sizes)))
        done(len(rows))
    ids = np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int32)
    return Tokens.of(ids, lengths), num_empty


def _token_ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str], max_length: int) -> list[list[int]]:
    options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False}
    rows = tokenizer(texts, truncation=True, max_length=max_length, padding=False, **options)["input_ids"]
    end = tokenizer.eos_token_id
    if tokenizer.split_special_tokens and any(row.count(end) > 1 for row in rows) and spells_end(tokenizer):
        for row in rows:  # the last one alone is the end
            last = len(row) - 1 - row[::-1].index(end)
            row[:last] = [token for token in row[:last] if token != end]
    return rows


def _cut(tokenizer: "PreTrainedTokenizerBase", text: str, max_length: int) -> str:
    """The part of a very long text that decides its first `max_length` tokens, so that the rest is never tokenised.

    The part ends at white space, unless there is none in its half, and must give at least twice `max_length` tokens, else four times
    as much is tried. Tokens depend on text far behind them in no common tokenizer, so the cut changes no token that is kept. A
    tokenizer that truncates on the left keeps the end of the text.
    """
    size = max_length * CHARS_PER_TOKEN
    from_left = tokenizer.truncation_side == "left"
    while len(text) > size:
        part = text[-size:] if from_left else text[:size]
        if not part[0 if from_left else -1].isspace():  # a word that may be cut goes
            word = len(part.split(maxsplit=1)[0] if from_left else part.rsplit(maxsplit=1)[-1])
            if word < size // 2:
                part = part[word:] if from_left else part[:-word]
        if len(_token_ids(tokenizer, [part], 2 * max_length)[0]) >= 2 * max_length:
            return part
        size *= 4
    return text


def _stand_in(tokenizer: "PreTrainedTokenizerBase") -> int:
    for token_id in (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token_id is not None:
            return token_id
    return 0


def token_budget_batches(lengths: np.ndarray, token_budget: int, most_padding: float = MAX_PADDING) -> list[np.ndarray]:
    """Cut all texts, longest first, into batches of at most `token_budget` padded tokens and little padding.

    Args:
        lengths: [n] tokens per text.
        token_budget: bound of B * L; a single text may exceed it. B is at most MOST_TEXTS.
        most_padding: share of the padding beyond which a batch ends early; 1 where nothing is computed of it.

    Returns:
        int64 row indices per batch; each row occurs once. The longest texts come first: where memory does not suffice,
        it shows at once, and the time left is not underestimated.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    batches, start = [], 0
    while start < len(order):
        longest = max(1, int(ordered[start]))
        size = max(1, min(token_budget // longest, MOST_TEXTS))
        tokens = np.cumsum(ordered[start : start + size])
        padding = 1 - tokens / (longest * np.arange(1, len(tokens) + 1))
        tight = int(np.searchsorted(padding, most_padding, side="right"))
        size = min(size, max(tight, size // SMALLEST_BATCH, 1))
        batches.append(order[start : start + size])
        start += size
    return batches


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Batches of one training epoch: random, yet of texts of similar length. A pure function of its arguments.

    All rows are shuffled, each run of SORTED_BATCHES * batch_size rows is sorted by length and cut, then the batches are
    shuffled. Batches hold exactly `batch_size` rows; what remains, a random rest, is the last and smaller one.

    Returns:
        int64 row indices per batch; each row occurs once.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    # Raw bits: numpy keeps the stream of a bit generator across versions, not that of its permutations.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    order = np.argsort(bits.random_raw(len(lengths)), kind="stable")
    num_full = len(order) // batch_size
    batches = []
    run = SORTED_BATCHES * batch_size
    for start in range(0, num_full * batch_size, run):
        rows = order[start : min(start + run, num_full * batch_size)]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    batches = [batches[i] for i in np.argsort(bits.random_raw(num_full), kind="stable")]
    rest = order[num_full * batch_size :]
    return [*batches, rest] if len(rest) else batches


def few_lengths(length: int) -> int:
    """The least L >= length of a few: multiples of 8, beyond 128 of an eighth of the power of two below.

    A GPU meets them again: cuDNN plans an attention and `RecordedSteps` records a step for each shape of a batch.
    """
    step = max(8, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step


def collate(tokens: Tokens, rows: np.ndarray, pad_id: int, few_shapes: bool = False) -> dict[str, torch.Tensor]:
    """Pad the texts `rows` on the right to the longest of them: input_ids and attention_mask, int64 [B, L].

    few_shapes: to the next of `few_lengths`, or the longest text of all.
    """
    rows = np.asarray(rows, dtype=np.int64)
    lengths = tokens.lengths[rows]
    longest = int(lengths.max(initial=0))
    if few_shapes and longest:
        longest = min(few_lengths(longest), tokens.longest)
    mask = np.arange(longest) < lengths[:, None]
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = np.concatenate([tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]] for row in rows])
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
