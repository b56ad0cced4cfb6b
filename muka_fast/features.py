"""Features of all texts, read shard by shard when a method asks for them: memory holds one shard, or the rows asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from muka_fast.errors import UserError
from muka_fast.store import FEATURES, ShardRange, read_or_refuse

ROWS = 8192  # rows of a chunk where they lie in memory


@dataclass(frozen=True)
class Features:
    """Features [n, D] of n texts, in their order. read: the rows of one range, [stop - start, D] of any float type."""

    ranges: Sequence[ShardRange]
    read: Callable[[ShardRange], np.ndarray]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.array([shard.start for shard in self.ranges])

    @classmethod
    def of(cls, values: np.ndarray) -> Features:
        """Features that lie in memory, [n, D]."""
        ranges = [ShardRange(j, a, min(a + ROWS, len(values))) for j, a in enumerate(range(0, len(values), ROWS))]
        return cls(ranges, lambda shard: values[shard.start : shard.stop])

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """The rows of each shard and its features, fp32."""
        for shard in self.ranges:
            yield slice(shard.start, shard.stop), np.asarray(self.read(shard), np.float32)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """The features of these rows, fp32 [len(rows), D]; each shard that holds one of them is read once."""
        rows, parts = np.asarray(rows), []
        which = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(which, kind="stable")
        used, first = np.unique(which[order], return_index=True)
        for number, place in zip(used, np.split(order, first[1:]), strict=True):
            shard = self.ranges[number]
            parts.append(np.asarray(self.read(shard)[rows[place] - shard.start], np.float32))
        out = np.concatenate(parts)
        return out[np.argsort(order, kind="stable")]


def teacher_features(
    folder: Path, ranges: Sequence[ShardRange], name: str, read: Callable[[ShardRange], dict[str, np.ndarray]]
) -> Features:
    """The features of one teacher of a store. read: verified tensors of one shard.

    Reading raises UserError for a missing or damaged shard, and for a teacher without such features.
    """

    def features(shard: ShardRange) -> np.ndarray:
        tensors = read_or_refuse(folder, shard, read)
        if not tensors[FEATURES].shape[1]:
            way_out = "choose another --method, and no --uncertainty_head"
            raise UserError(f"{shard.path(folder)}: the head of teacher {name!r} has no features to read; {way_out}")
        return tensors[FEATURES]

    return Features(ranges, features)
