"""Texts of a batch side by side without padding, sorted by length, and the masks of their K replicas."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from muka_fast.ops.dropout_add_layer_norm import dropout_add_layer_norm
from muka_fast.ops.one_query_attention import one_query_attention
from muka_fast.ops.packed_attention import packed_attention
from muka_fast.ops.repeat_dropout import repeat_dropout


@dataclass(frozen=True)
class Packed:
    """B texts sorted by length: T = sum of their lengths rows, no padding.

    order int64 [B]: text of each place. lengths int64 [B], of the places; longest: the last of them.
    reads_last: the head reads the last token of a text, else the first.
    """

    order: Tensor
    lengths: Tensor
    longest: int
    reads_last: bool = False

    @classmethod
    def of(cls, attention_mask: Tensor, reads_last: bool = False) -> "Packed":
        """attention_mask [B, L] of texts padded on the right."""
        lengths, order = attention_mask.sum(1).sort(stable=True)
        return cls(order, lengths, int(lengths[-1]), reads_last)

    def parts(self, max_texts: int) -> Iterator[tuple[slice, slice, "Packed"]]:
        """The batch in parts of at most `max_texts` texts: places, rows, and the part by itself."""
        if max_texts >= len(self.lengths):
            yield slice(None), slice(None), self
            return
        ends, lengths = self.starts.tolist(), self.lengths.tolist()
        for start in range(0, len(lengths), max_texts):
            stop = min(start + max_texts, len(lengths))
            part = Packed(self.order[start:stop], self.lengths[start:stop], lengths[stop - 1], self.reads_last)
            yield slice(start, stop), slice(ends[start], ends[stop]), part

    def pack(self, values: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L, ...] -> [T, ...]."""
        return values[self.order][attention_mask[self.order].bool()]

    def unsort(self, rows: Tensor, dim: int) -> Tensor:
        """Places back to the order of the batch along `dim`."""
        return rows.index_select(dim, self.order.argsort())

    @cached_property
    def first_rows(self) -> Tensor:
        """int64 [B]: row of each text's first token."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def read_positions(self) -> Tensor:
        """int64 [B]: position of each text's token that the head reads."""
        return self.lengths - 1 if self.reads_last else torch.zeros_like(self.lengths)

    @cached_property
    def read_rows(self) -> Tensor:
        """int64 [B]: row of that token."""
        return self.first_rows + self.read_positions

    @cached_property
    def starts(self) -> Tensor:
        """int64 [B + 1]: row of each text's first token, and T."""
        return torch.cat([self.first_rows, self.lengths.sum()[None]])

    @cached_property
    def place_of_row(self) -> Tensor:
        """int64 [T]."""
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.lengths.device), self.lengths)

    @cached_property
    def position_of_row(self) -> Tensor:
        """int64 [T]: column in the padded batch."""
        return torch.arange(len(self.place_of_row), device=self.lengths.device) - self.first_rows[self.place_of_row]


@dataclass(frozen=True)
class Replicas:
    """Which replicas a value has once masks have struck it: R = plain + count, replica 0 unmasked where `plain`.

    p_of_site: site index -> p of the active sites. example_ids int64 [B], in the order of the places.
    """

    packed: Packed
    p_of_site: dict[int, float]
    seed: int
    example_ids: Tensor
    count: int
    first_sample: int = 0
    plain: bool = False

    def p(self, site: int | None) -> float:
        """0.0 where nothing is to be masked."""
        return self.p_of_site.get(site, 0.0) if self.count and site is not None else 0.0

    @cached_property
    def _token_ids(self) -> Tensor:
        return self.example_ids[self.packed.place_of_row]

    def _rows(self, width: int, one_row: bool) -> tuple[Tensor, Tensor]:
        """Example id and first element of each row: of the packed tokens, or of every text's token that is read."""
        if one_row:
            return self.example_ids, self.packed.read_positions * width
        return self._token_ids, self.packed.position_of_row * width

    def dropout(self, x: Tensor, site: int | None, one_row: bool = False) -> Tensor:
        """[(R,) rows, D] -> [R, rows, D] at an active site, else x."""
        if (p := self.p(site)) == 0:
            return x
        shared = x.dim() == 2
        ids, offsets = self._rows(x.shape[-1], one_row)
        source = x if shared else x[int(self.plain) :]
        masked = repeat_dropout(source, self.count, p, self.seed, site, ids, offsets, self.first_sample)
        return self._with_plain(x, masked, shared)

    def _with_plain(self, x: Tensor, masked: Tensor, shared: bool = True) -> Tensor:
        return torch.cat([x[None] if shared else x[:1], masked]) if self.plain else masked

    def add_norm(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm, site: int | None, one_row: bool) -> Tensor:
        """norm(dropout(x) + residual) for [rows, D] or [R, rows, D]; shared values stay shared at a site that is off."""
        p = self.p(site)
        if p == 0 or x.dim() == 2:
            return norm(self.dropout(x, site, one_row) + residual)
        ids, offsets = self._rows(x.shape[-1], one_row)
        return dropout_add_layer_norm(
            x, residual, norm.weight, norm.bias, norm.eps, p, self.seed, site, ids, offsets, self.first_sample, self.plain
        )


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
    longest, positions, masks = packed.longest, packed.read_positions, (replicas.seed, site, replicas.example_ids)
    if one_row and query.dim() == key.dim() == 2:
        added = bias(longest - 1 if packed.reads_last else 0, 1, longest)
        # The bias of the first token's query is the same for every text, up to its length; that of the last token is not.
        if added is None or not packed.reads_last:
            added = None if added is None else added[:, 0].expand(num_heads, -1)
            out = one_query_attention(
                query, key, value, packed.starts, num_heads, scaling, replicas.count if p else 0, p, *masks, positions, added,
                replicas.first_sample, replicas.plain or p == 0,
            )  # fmt: skip
            return out if p else out[0]
    if one_row:
        query_starts = torch.arange(len(positions) + 1, device=positions.device)
    else:
        query_starts, positions = packed.starts, torch.zeros_like(positions)
    return packed_attention(
        query, key, value, query_starts, positions, packed.starts, longest, num_heads, scaling, replicas.count, p, *masks,
        bias(0, longest, longest), replicas.first_sample, replicas.plain,
    )  # fmt: skip
