"""Texts of a batch side by side without padding, sorted by length, and the masks of their K replicas."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from muka_fast.memory import to_device
from muka_fast.ops.dropout_add_layer_norm import dropout_add_layer_norm
from muka_fast.ops.one_query_attention import one_query_attention
from muka_fast.ops.packed_attention import packed_attention
from muka_fast.ops.repeat_dropout import repeat_dropout


def host_values(values: Tensor | np.ndarray) -> np.ndarray:
    """An array of the host; one that lies on a GPU is waited for."""
    if isinstance(values, np.ndarray):
        return values
    return (values if values.device.type == "cpu" else values.cpu()).numpy()


@dataclass(frozen=True)
class Texts:
    """A batch of B texts, padded on the right to L columns, on the device; `lengths` and `example_ids` are the host's, int64 [B].

    What a step must know to lay out its work it takes from the host: a value read back from a GPU would wait for all work before it.
    """

    input_ids: Tensor  # int64 [B, L]
    attention_mask: Tensor  # int64 [B, L]
    ids: Tensor  # int64 [B]: the example ids
    lengths: np.ndarray
    example_ids: np.ndarray

    @classmethod
    def of(
        cls, input_ids: Tensor, attention_mask: Tensor, example_ids: Tensor | np.ndarray, device: torch.device, pad: int | None
    ) -> "Texts":
        """Of tensors on the host. pad: tokens of this id at the end of a text do not count (None: all that the mask shows do)."""
        ids, mask, examples = (host_values(value) for value in (input_ids, attention_mask, example_ids))
        lengths, position = mask.sum(1), np.arange(mask.shape[1])
        if pad is not None:
            lengths = np.minimum(lengths, (position * ((ids != pad) & (mask > 0))).max(1, initial=0) + 1)
        examples = examples.astype(np.int64)
        parts = {"input_ids": ids, "attention_mask": (position < lengths[:, None]).astype(np.int64), "ids": examples}
        return cls(**to_device(parts, device), lengths=lengths, example_ids=examples)

    def packed(self, reads_last: bool = False) -> "Packed":
        """The same texts side by side."""
        order = np.argsort(self.lengths, kind="stable")
        return Packed(order, self.lengths[order], self.example_ids[order], self.input_ids.shape[1], self.input_ids.device, reads_last)


@dataclass(frozen=True)
class Packed:
    """B texts sorted by length: T = sum of their lengths rows, no padding.

    On the host: order, lengths, example_ids int64 [B], of the places (order: which text of the batch); columns: L of the padded
    batch. On `device`: the tensors below, all of one copy. reads_last: the head reads the last token of a text, else the first.
    """

    order: np.ndarray
    lengths: np.ndarray
    example_ids: np.ndarray
    columns: int
    device: torch.device
    reads_last: bool = False

    @property
    def longest(self) -> int:
        return int(self.lengths[-1])

    def parts(self, max_texts: int) -> Iterator[tuple[slice, "Packed"]]:
        """The batch in parts of at most `max_texts` texts: rows, and the part by itself."""
        if max_texts >= len(self.lengths):
            yield slice(None), self
            return
        ends = np.concatenate([[0], self.lengths.cumsum()]).tolist()
        for start in range(0, len(self.lengths), max_texts):
            stop = min(start + max_texts, len(self.lengths))
            arrays = (values[start:stop] for values in (self.order, self.lengths, self.example_ids))
            yield slice(ends[start], ends[stop]), Packed(*arrays, self.columns, self.device, self.reads_last)

    def pack(self, values: Tensor) -> Tensor:
        """[B, L, ...] -> [T, ...]."""
        return values.flatten(0, 1).index_select(0, self.tables["cells"])

    def unsort(self, rows: Tensor, dim: int) -> Tensor:
        """Places back to the order of the batch along `dim`."""
        return rows.index_select(dim, self.tables["places"])

    @cached_property
    def tables(self) -> dict[str, Tensor]:
        """int64, on the device. [B + 1] starts: row of each text's first token, and T. [B] read_positions, read_rows: position and
        row of the token that the head reads; ids; places: where each text of the batch lies; zeros; [B + 1] counts: 0 ... B.
        [T] positions: column in the padded batch; cells: place in the padded batch, flattened; token_ids: example id."""
        texts, lengths = len(self.lengths), self.lengths
        starts = np.concatenate([[0], lengths.cumsum()])
        read = lengths - 1 if self.reads_last else np.zeros_like(lengths)
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        arrays = {"starts": starts, "read_positions": read, "read_rows": starts[:-1] + read, "ids": self.example_ids}
        arrays |= {"places": np.argsort(self.order), "zeros": np.zeros_like(lengths), "counts": np.arange(texts + 1)}
        arrays |= {"positions": positions, "cells": np.repeat(self.order * self.columns, lengths) + positions}
        return to_device(arrays | {"token_ids": np.repeat(self.example_ids, lengths)}, self.device)


@dataclass(frozen=True)
class Replicas:
    """Which replicas a value has once masks have struck it: R = plain + count, replica 0 unmasked where `plain`.

    p_of_site: site index -> p of the active sites.
    """

    packed: Packed
    p_of_site: dict[int, float]
    seed: int
    count: int
    first_sample: int = 0
    plain: bool = False

    def p(self, site: int | None) -> float:
        """0.0 where nothing is to be masked."""
        return self.p_of_site.get(site, 0.0) if self.count and site is not None else 0.0

    def _rows(self, width: int, one_row: bool) -> tuple[Tensor, Tensor]:
        """Example id and first element of each row: of the packed tokens, or of every text's token that is read."""
        tables = self.packed.tables
        if one_row:
            return tables["ids"], tables["read_positions"] * width
        return tables["token_ids"], tables["positions"] * width

    def dropout(self, x: Tensor, site: int | None, one_row: bool = False) -> Tensor:
        """[(R,) rows, D] -> [R, rows, D] at an active site, else x."""
        if (p := self.p(site)) == 0:
            return x
        shared = x.dim() == 2
        ids, offsets = self._rows(x.shape[-1], one_row)
        source = x if shared else x[int(self.plain) :]
        masked = repeat_dropout(source, self.count, p, self.seed, site, ids, offsets, self.first_sample)
        return torch.cat([x[None] if shared else x[:1], masked]) if self.plain else masked

    def add_norm(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm, site: int | None, one_row: bool) -> Tensor:
        """norm(dropout(x) + residual) for [rows, D] or [R, rows, D]; shared values stay shared at a site that is off."""
        p = self.p(site)
        if x.dim() == 2:  # the op masks replicas, and the first mask is what makes them
            x, p = self.dropout(x, site, one_row), 0.0
        if p == 0 and not x.is_cuda:  # one pass less, which on a CPU is no gain, in 16 bits a loss
            return norm(x + residual)
        shared = x.dim() == 2
        # Without masks nobody asks which element a row begins with.
        ids, offsets = self._rows(x.shape[-1], one_row) if p else (self.packed.tables["ids" if one_row else "token_ids"],) * 2
        y = dropout_add_layer_norm(
            x[None] if shared else x, residual, norm.weight, norm.bias, norm.eps, p, self.seed, site or 0, ids, offsets,
            self.first_sample, self.plain,
        )  # fmt: skip
        return y[0] if shared else y


def text_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_dim: int,
    scaling: float,
    bias: Callable[[int, int, int], Tensor | None],
    replicas: Replicas,
    site: int,
    one_row: bool,
) -> Tensor:
    """Attention inside each text, its probabilities masked at an active site.

    query: [(R,) T, H * d], or with one_row [(R,) B, H * d], the read tokens' queries; key, value: [(R,) T, G * d], H a multiple of G;
    bias(first query, queries, length): added to the scores, [H | 1, queries, length] or None.
    Returns the shape of query, with R replicas in front if a mask or an input has them.
    """
    packed, p, num_heads = replicas.packed, replicas.p(site), query.shape[-1] // head_dim
    longest, tables = packed.longest, packed.tables
    starts, positions, masks = tables["starts"], tables["read_positions"], (replicas.seed, site, tables["ids"])
    if one_row and query.dim() == key.dim() == 2:
        added = bias(longest - 1 if packed.reads_last else 0, 1, longest)
        # The bias of the first token's query is the same for every text, up to its length; that of the last token is not.
        if added is None or not packed.reads_last:
            added = None if added is None else added[:, 0].expand(num_heads, -1)
            out = one_query_attention(
                query, key, value, starts, num_heads, scaling, replicas.count if p else 0, p, *masks, positions, added,
                replicas.first_sample, replicas.plain or p == 0,
            )  # fmt: skip
            return out if p else out[0]
    query_starts, positions = (tables["counts"], positions) if one_row else (starts, tables["zeros"])
    return packed_attention(
        query, key, value, query_starts, positions, starts, longest, num_heads, scaling, replicas.count, p, *masks,
        bias(0, longest, longest), replicas.first_sample, replicas.plain,
    )  # fmt: skip
