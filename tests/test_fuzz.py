"""Damaged files of every kind: refused in one line or read rightly; minutes of the same under coverage guidance: fuzz_targets.py."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

spec = importlib.util.spec_from_file_location("fuzz_targets", Path(__file__).with_name("fuzz_targets.py"))
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)

SPICE = (b"\x00", b"\xff", b"\xef\xbb\xbf", b'"', b"\r", b"\n", b"{", b"}", b"[", b"null", b"NaN", b"1e999", b"-1", b"\xed\xa0\x80")


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """A whole file after a few cuts, flips, insertions and repetitions."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = draw(st.integers(start, min(len(content), start + 40)))
        kind = draw(st.sampled_from(["cut", "flip", "insert", "repeat", "end"]))
        if kind == "cut":
            del content[start:stop]
        elif kind == "flip" and content:
            content[min(start, len(content) - 1)] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            content[start:start] = draw(st.sampled_from(SPICE) | st.binary(max_size=8))
        elif kind == "repeat":
            content[start:start] = content[start:stop] * 2
        elif kind == "end":
            del content[start:]
    return bytes(content)


@pytest.mark.parametrize("target", sorted(fuzz.TARGETS))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_file(target, data):
    fuzz.TARGETS[target](data.draw(damaged(fuzz.example(target))))


@pytest.mark.parametrize("target", sorted(fuzz.TARGETS))
@settings(max_examples=40, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes(target, content):
    fuzz.TARGETS[target](content)


@pytest.mark.parametrize("target", sorted(set(fuzz.TARGETS) - {"state"}))
def test_the_whole_file_is_read(target, monkeypatch):
    """What the damaged ones are made of is sound, so that the tests above reach behind the first check."""
    monkeypatch.setattr(fuzz, "UserError", ZeroDivisionError)  # nothing is forgiven
    fuzz.TARGETS[target](fuzz.example(target))
