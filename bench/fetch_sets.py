"""Make two text-classification sets from files of Debian 12, for figures on data that no choice was ever made on.

    python bench/fetch_sets.py DIR

DIR/wordnet: the gloss of a noun -> its category in WordNet 3.0 (animal, artifact, feeling, ...). DIR/debian: the one-line
description of a package -> its section (haskell, games, fonts, ...). Both as train.jsonl and test.jsonl with `text` and `label`, at
most 500 and 100 texts a class, classes with fewer than 400 texts left out. Loads 15 MB from deb.debian.org; needs `ar` (binutils).
"""

import argparse
import io
import lzma
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from settings import Rows, write_rows

MIRROR = "http://deb.debian.org/debian/"
WORDNET = "pool/main/w/wordnet/wordnet-base_3.0-37_all.deb"
PACKAGES = "dists/bookworm/main/binary-amd64/Packages.xz"
# lexnames(5WN): the number of a noun's lexicographer file less 3; "tops" are the roots of the hierarchy, no category of its own.
CATEGORIES = ["tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food"]
CATEGORIES += ["group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity"]
CATEGORIES += ["relation", "shape", "state", "substance", "time"]
# Sections that say how a package is built or used, not what it is about.
NO_TOPIC = {"tops", "libs", "libdevel", "oldlibs", "doc", "debug", "introspection", "metapackages", "tasks", "misc"}
LEAST, TRAIN, TEST = 400, 500, 100  # texts of a class


def load(path: str) -> bytes:
    with urllib.request.urlopen(MIRROR + path, timeout=60) as answer:
        return answer.read()


def wordnet() -> Iterator[tuple[str, str]]:
    """(gloss, category) of every noun synset; wndb(5WN) has the format."""
    with tempfile.NamedTemporaryFile(suffix=".deb") as package:
        package.write(load(WORDNET))
        package.flush()
        data = subprocess.run(["ar", "p", package.name, "data.tar.xz"], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        lines = archive.extractfile("./usr/share/wordnet/data.noun").read().decode().splitlines()
    for line in lines:
        if not line.startswith("  "):  # the licence
            fields, _, gloss = line.partition(" | ")
            yield gloss.strip(), CATEGORIES[int(fields.split()[1]) - 3]


def debian() -> Iterator[tuple[str, str]]:
    """(description, section) of every binary package."""
    for entry in lzma.decompress(load(PACKAGES)).decode().split("\n\n"):
        found = dict(re.findall(r"^(Description|Section): (.+)$", entry, re.MULTILINE))
        if len(found) == 2:
            yield found["Description"], found["Section"]


def split(pairs: Iterator[tuple[str, str]]) -> tuple[Rows, Rows]:
    """Train and test rows: distinct texts in a fixed random order; a text with two labels goes."""
    labels = defaultdict(set)
    for text, label in pairs:
        labels[text].add(label)
    classes = defaultdict(list)
    for text, found in sorted(labels.items()):
        if len(found) == 1:
            classes[found.pop()].append(text)
    train, test = [], []
    draw = random.Random(0)
    for label, texts in sorted(classes.items()):
        if label not in NO_TOPIC and len(texts) >= LEAST:
            draw.shuffle(texts)
            test += [(text, label) for text in texts[:TEST]]
            train += [(text, label) for text in texts[TEST : TEST + TRAIN]]
    return train, test


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, source in {"wordnet": wordnet, "debian": debian}.items():
        train, test = split(source())
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_rows(folder / name / "train.jsonl", train)
        write_rows(folder / name / "test.jsonl", test)
        print(f"{folder / name}: {len(train)} + {len(test)} texts, {len({label for _, label in test})} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
