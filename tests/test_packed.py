"""Packing: every token once, texts sorted by length, and parts that are packings of their own."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from muka_fast.packed import Packed


def mask_of(lengths):
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.booleans(), st.integers(1, 13))
def test_packed(lengths, reads_last, max_texts):
    mask = mask_of(lengths)
    packed = Packed.of(mask, reads_last)
    text, position = torch.meshgrid(torch.arange(len(lengths)), torch.arange(max(lengths)), indexing="ij")
    tokens = packed.pack(torch.stack([text, position], -1), mask)
    assert tokens[:, 0].tolist() == packed.order[packed.place_of_row].tolist()
    assert tokens[:, 1].tolist() == packed.position_of_row.tolist()
    assert len(tokens) == sum(lengths) and packed.longest == max(lengths)
    assert packed.lengths.tolist() == sorted(lengths)
    read = tokens[packed.read_rows]
    assert packed.unsort(read, 0).tolist() == [[i, n - 1 if reads_last else 0] for i, n in enumerate(lengths)]
    places, rows, parts = zip(*packed.parts(max_texts), strict=True)
    assert torch.equal(torch.cat([packed.order[p] for p in places]), packed.order)
    assert torch.equal(torch.cat([tokens[r] for r in rows]), tokens)
    for part in parts:
        assert len(part.order) <= max_texts and part.reads_last == reads_last and part.longest == part.lengths[-1]
