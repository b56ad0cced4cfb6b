"""Make four text-classification sets from files of Debian 12, for figures on data that no choice was ever made on.

    python bench/fetch_sets.py DIR

DIR/wordnet: the gloss of a noun -> its category in WordNet 3.0 (animal, artifact, feeling, ...). DIR/debian: the one-line
description of a package -> its section (haskell, games, fonts, ...). DIR/gcide: a definition of Webster's dictionary (GCIDE) -> its
field (zoology, heraldry, law, ...). DIR/foldoc: a paragraph of the Free On-line Dictionary of Computing -> its subject (language,
storage, company, ...). All as train.jsonl and test.jsonl with `text` and `label`, at most 500 and 100 texts a class, without the
rare classes. Loads 33 MB from deb.debian.org; needs `ar` (binutils).
"""

import argparse
import gzip
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
GCIDE = "pool/main/d/dict-gcide/dict-gcide_0.48.5+nmu2_all.deb"
FOLDOC = "pool/main/d/dict-foldoc/dict-foldoc_20230119-1_all.deb"
# lexnames(5WN): the number of a noun's lexicographer file less 3; "tops" are the roots of the hierarchy, no category of its own.
CATEGORIES = ["tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food"]
CATEGORIES += ["group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity"]
CATEGORIES += ["relation", "shape", "state", "substance", "time"]
# Sections that say how a package is built or used, not what it is about.
NO_TOPIC = {"tops", "libs", "libdevel", "oldlibs", "doc", "debug", "introspection", "metapackages", "tasks", "misc"}
# Fields of GCIDE by the abbreviation before a definition, less the rare ones.
FIELDS = {"Zool.": "zoology", "Bot.": "botany", "Chem.": "chemistry", "Med.": "medicine", "Anat.": "anatomy", "Law": "law"}
FIELDS |= {"Naut.": "nautical", "Min.": "mineralogy", "Biol.": "biology", "Mus.": "music", "Arch.": "architecture"}
FIELDS |= {"Physiol.": "physiology", "Mil.": "military", "Geol.": "geology", "Her.": "heraldry", "Math.": "mathematics"}
FIELDS |= {"Astron.": "astronomy", "Geom.": "geometry", "Paleon.": "paleontology", "Elec.": "electricity", "Gram.": "grammar"}
FIELDS |= {"Eccl.": "church", "Mach.": "machinery"}
FEWEST_WORDS = 4  # of a definition: "Feudal." and "See Aker." tell nothing
TRAIN, TEST = 500, 100  # texts of a class, at most


def load(path: str) -> bytes:
    with urllib.request.urlopen(MIRROR + path, timeout=60) as answer:
        return answer.read()


def member(package: str, name: str) -> bytes:
    """File `name` of a Debian package."""
    with tempfile.NamedTemporaryFile(suffix=".deb") as file:
        file.write(load(package))
        file.flush()
        data = subprocess.run(["ar", "p", file.name, "data.tar.xz"], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.extractfile(name).read()


def wordnet() -> Iterator[tuple[str, str]]:
    """(gloss, category) of every noun synset; wndb(5WN) has the format."""
    for line in member(WORDNET, "./usr/share/wordnet/data.noun").decode().splitlines():
        if not line.startswith("  "):  # the licence
            fields, _, gloss = line.partition(" | ")
            yield gloss.strip(), CATEGORIES[int(fields.split()[1]) - 3]


def debian() -> Iterator[tuple[str, str]]:
    """(description, section) of every binary package."""
    for entry in lzma.decompress(load(PACKAGES)).decode().split("\n\n"):
        found = dict(re.findall(r"^(Description|Section): (.+)$", entry, re.MULTILINE))
        if len(found) == 2:
            yield found["Description"], found["Section"]


def definitions(package: str, name: str, start: str, end: str) -> Iterator[tuple[str, str]]:
    """(definition, mark before it) of every paragraph of a dictd dictionary that matches `start`, up to what matches `end`."""
    for paragraph in re.split(r"\n\s*\n", gzip.decompress(member(package, name)).decode(errors="replace")):
        if found := re.match(start, paragraph, re.DOTALL):
            words = re.sub(r"[{}]", "", re.split(end, found[2])[0]).split()
            if len(words) >= FEWEST_WORDS:
                yield " ".join(words), found[1]


def gcide() -> Iterator[tuple[str, str]]:
    """(definition, field): "Abaca ... (Bot.) A plant of ...", up to the source in brackets or the next form of the word."""
    start, end = r".{0,200}?\(([A-Z][a-z]+\.|Law)\)\s+([A-Z].+)", r"\[|\s--"
    for text, mark in definitions(GCIDE, "./usr/share/dictd/gcide.dict.dz", start, end):
        if mark in FIELDS:
            yield text, FIELDS[mark]


def foldoc() -> Iterator[tuple[str, str]]:
    """(paragraph, subject): "<storage> A kind of ...", entries of one subject."""
    yield from definitions(FOLDOC, "./usr/share/dictd/foldoc.dict.dz", r"\s+(?:\d+\. )?<([a-z ]+)>\s+(.+)", r"$^")


def split(pairs: Iterator[tuple[str, str]], least: int) -> tuple[Rows, Rows]:
    """Train and test rows: distinct texts in a fixed random order; a text with two labels goes, and a class of fewer than `least`."""
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
        if label not in NO_TOPIC and len(texts) >= least:
            draw.shuffle(texts)
            tests = min(TEST, len(texts) // 4)
            test += [(text, label) for text in texts[:tests]]
            train += [(text, label) for text in texts[tests : tests + TRAIN]]
    return train, test


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for source, least in ((wordnet, 400), (debian, 400), (gcide, 220), (foldoc, 90)):
        name = source.__name__
        train, test = split(source(), least)
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_rows(folder / name / "train.jsonl", train)
        write_rows(folder / name / "test.jsonl", test)
        print(f"{folder / name}: {len(train)} + {len(test)} texts, {len({label for _, label in test})} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
