"""Seeds: the same for ever, and another for every place."""

import hashlib

from muka_fast.seeds import seed_of


def test_what_a_seed_is():
    assert seed_of(3, "abc") == int.from_bytes(hashlib.sha256(b"3:abc").digest()[:8], "little")
    assert seed_of(3, "abc") == 10368327140272354730


def test_every_place_has_its_own():
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 11, 1, 1), (11, 1, 1, 1), (1, 1, 11, 1)]
    seeds = {seed_of(*place) for place in [*places, (3, "abc"), (3, "abd"), (4, "abc")]}
    assert len(seeds) == len(places) + 3 and all(0 <= seed < 2**64 for seed in seeds)
