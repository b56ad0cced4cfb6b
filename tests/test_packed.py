"""Packing: every token once, texts sorted by length, and parts that are packings of their own."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from muka_fast.packed import Texts


def mask_of(lengths):
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.booleans(), st.integers(1, 13))
def test_packed(lengths, reads_last, max_texts):
    ids = torch.arange(10, 10 + len(lengths))
    mask = mask_of(lengths)
    texts = Texts.of(torch.zeros_like(mask), mask, ids, torch.device("cpu"), None)
    assert torch.equal(texts.attention_mask, mask)
    packed = texts.packed(reads_last)
    rows = packed.tables
    text, position = torch.meshgrid(torch.arange(len(lengths)), torch.arange(max(lengths)), indexing="ij")
    tokens = packed.pack(torch.stack([text, position], -1))
    assert tokens[:, 0].tolist() == np.repeat(packed.order, packed.lengths).tolist()
    assert tokens[:, 1].tolist() == rows["positions"].tolist()
    assert torch.equal(rows["token_ids"], ids[tokens[:, 0]]) and torch.equal(rows["ids"], ids[packed.order])
    assert all(table.data_ptr() % 128 == rows["starts"].data_ptr() % 128 for table in rows.values())
    assert len(tokens) == sum(lengths) and packed.longest == max(lengths)
    assert packed.lengths.tolist() == sorted(lengths)
    read = tokens[rows["read_rows"]]
    assert packed.unsort(read, 0).tolist() == [[i, n - 1 if reads_last else 0] for i, n in enumerate(lengths)]
    cuts, parts = zip(*packed.parts(max_texts), strict=True)
    assert np.array_equal(np.concatenate([part.order for part in parts]), packed.order)
    assert torch.equal(torch.cat([part.tables["ids"] for part in parts]), rows["ids"])
    assert torch.equal(torch.cat([tokens[cut] for cut in cuts]), tokens)
    for part in parts:
        assert len(part.order) <= max_texts and part.reads_last == reads_last and part.longest == part.lengths[-1]
