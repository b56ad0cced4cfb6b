"""Seeds that follow from what they are for, so that nothing needs to be stored and the order of things does not matter."""

import hashlib


def seed_of(*place: object) -> int:
    """64 bits, unsigned, of a run's seed and what names the place where it is used."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, place)).encode()).digest()[:8], "little")
