"""Settings of bench/paper.py: which data sets, how their labels and texts are dealt to teachers, and the methods that are compared.

A setting is drawn anew for every seed: the teachers' texts, the pool and (through the seed) teachers and students.
"""

import hashlib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muka_fast.data import read_texts
from muka_fast.errors import UserError

# Rules and their numbers may be chosen on settings of these sets; settings without any of them are for reporting.
DEVELOPMENT = ("google_snippets", "clinc150", "trec6", "wordnet", "debian")
CONFIRMATION = ("ag_news_8k", "5abstracts", "banking77")  # looked at now and then; on all other sets nothing was ever chosen or tried
BERT, MPNET = "bert", "mpnet"  # which encoder stands behind these words is an option of the script

Rows = list[tuple[str, str]]  # (text, label)


@dataclass(frozen=True)
class Setting:
    """blocks: (data set, number of teachers), its sorted labels cut into consecutive parts; encoders: of the teachers in turn.

    overlap: labels that each teacher has in common with the next one of its set. share: of the first half of the teachers in the
    pool. unseen: the pool holds texts that the teachers were not trained on, else their training texts, as in the papers.
    same: all teachers of a set have all its labels, and texts of their own.
    """

    what: str
    blocks: tuple[tuple[str, int], ...]
    encoders: tuple[str, ...] = (BERT,)
    overlap: int = 0
    share: float | None = None
    unseen: bool = False
    same: bool = False

    @property
    def group(self) -> str:
        names = _sets(self)
        if names & set(DEVELOPMENT):
            return "development"
        return "confirmation" if names & set(CONFIRMATION) else "kept-aside"


def _two(name: str, **more) -> Setting:
    what = ", ".join(f"{key} {value}" if value is not True else key for key, value in more.items() if key != "encoders")
    return Setting(f"{name}, two teachers" + (f", {what}" if what else ""), ((name, 2),), **more)


SETTINGS = {
    **{f"{name}_2": _two(name) for name in ("google_snippets", "clinc150", "trec6", "ag_news_8k", "5abstracts", "banking77")},
    "google_snippets_4": Setting("google_snippets, four teachers", (("google_snippets", 4),)),
    "clinc150_5": Setting("clinc150, five teachers", (("clinc150", 5),)),
    "banking77_3": Setting("banking77, three teachers", (("banking77", 3),)),
    "trec6_bert_mpnet": Setting("trec6, a BERT and an MPNet teacher", (("trec6", 2),), (BERT, MPNET)),
    "5abstracts_bert_mpnet": Setting("5abstracts, a BERT and an MPNet teacher", (("5abstracts", 2),), (BERT, MPNET)),
    "google_snippets_clinc150": Setting("google_snippets and clinc150", (("google_snippets", 1), ("clinc150", 1))),
    "ag_news_banking77": Setting("ag_news and banking77", (("ag_news_8k", 1), ("banking77", 1))),
    "ag_news_5abstracts_banking77": Setting(
        "ag_news, 5abstracts and banking77", (("ag_news_8k", 1), ("5abstracts", 1), ("banking77", 1))
    ),
    "google_snippets_overlap": _two("google_snippets", overlap=2),
    "banking77_overlap": _two("banking77", overlap=15),
    "google_snippets_15": _two("google_snippets", share=0.15),
    "trec6_85": _two("trec6", share=0.85),
    "ag_news_15": _two("ag_news_8k", share=0.15),
    "banking77_85": _two("banking77", share=0.85),
    "clinc150_unseen": _two("clinc150", unseen=True),
    "5abstracts_unseen": _two("5abstracts", unseen=True),
    "trec6_same": _two("trec6", same=True),
    "ag_news_same": _two("ag_news_8k", same=True),
    "wordnet_2": _two("wordnet"),
    "wordnet_15": _two("wordnet", share=0.15),
    "debian_3": Setting("debian, three teachers", (("debian", 3),)),
    "debian_overlap": _two("debian", overlap=6),
    "wordnet_debian": Setting("wordnet and debian", (("wordnet", 1), ("debian", 1))),
    "gcide_2": _two("gcide"),
    "gcide_unseen": _two("gcide", unseen=True),
    "foldoc_3": Setting("foldoc, three teachers", (("foldoc", 3),)),
    "gcide_foldoc": Setting("gcide and foldoc", (("gcide", 1), ("foldoc", 1))),
    "reuters_2": _two("reuters"),
    "newsgroups_4": Setting("newsgroups, four teachers", (("newsgroups", 4),)),
    "newsgroups_overlap": _two("newsgroups", overlap=4),
    "jeopardy_3": Setting("jeopardy, three teachers", (("jeopardy", 3),)),
}

OF_ANY_SET = "SET_2 to SET_9 (teachers), SET_15 (percent of the first), SET_overlap2, SET_unseen, SET_same, SET_bert_mpnet, ONE+OTHER"
PARTS = r"((?P<teachers>[2-9])|(?P<share>[1-9]\d)|overlap(?P<overlap>\d+)|(?P<unseen>unseen)|(?P<same>same)|(?P<mixed>bert_mpnet))"


def find_settings(names: Sequence[str] | None, data: Path) -> dict[str, Setting]:
    """The named ones, of SETTINGS or (OF_ANY_SET) of the sets in `data`; none named: those of SETTINGS whose sets are there, and
    SET_2 of all other sets. Raises UserError for a name that is neither, or whose sets are not there."""
    there = sorted(file.parent.name for file in data.glob("*/train.jsonl"))
    if names is None:
        known = {name: setting for name, setting in SETTINGS.items() if _sets(setting) <= set(there)}
        return known | {f"{name}_2": _two(name) for name in there if not any(name in _sets(setting) for setting in known.values())}
    found = {name: SETTINGS.get(name) or _of_any_set(name, there) for name in names}
    for name, setting in found.items():
        if setting is None or not _sets(setting) <= set(there):
            raise UserError(
                f"--settings {name}: {data} holds {', '.join(there) or 'no set'}; of any set there are {OF_ANY_SET}, of those that "
                f"this project uses {', '.join(SETTINGS)}"
            )
    return found


def _sets(setting: Setting) -> set[str]:
    return {name for name, _ in setting.blocks}


def _of_any_set(name: str, there: Sequence[str]) -> Setting | None:
    parts = name.split("+")
    if len(parts) > 1:
        return Setting(" and ".join(parts), tuple((part, 1) for part in parts))
    for part in there:
        if found := re.fullmatch(re.escape(part) + "_" + PARTS, name):
            given = {key: int(value) if value.isdigit() else True for key, value in found.groupdict().items() if value}
            if "teachers" in given:
                return Setting(f"{part}, {given['teachers']} teachers", ((part, given["teachers"]),))
            if "mixed" in given:
                return Setting(f"{part}, a BERT and an MPNet teacher", ((part, 2),), (BERT, MPNET))
            return _two(part, **given | ({"share": given["share"] / 100} if "share" in given else {}))
    return None


PUBLISHED = {"uncertainty": "predictive_entropy"}
# Row of the tables -> options of `muka-fast train`. "dawid-skene" is no method of ours: it is trained on the labels of the vote.
METHODS = {
    "muka-hard": {"method": "muka-hard", "margin": False, **PUBLISHED},
    "muka-hard, margin": {"method": "muka-hard", **PUBLISHED},
    "muka-hard, no MC": {"method": "muka-hard", "margin": False, "mc": False},
    "muka-soft": {"method": "muka-soft", "margin": False, **PUBLISHED},
    "muka-soft, margin": {"method": "muka-soft", **PUBLISHED},
    "muka-soft, no MC": {"method": "muka-soft", "margin": False, "mc": False},
    "muka-hard, mutual information": {"method": "muka-hard", "margin": False, "uncertainty": "mutual_information"},
    "muka-soft, mutual information": {"method": "muka-soft", "margin": False, "uncertainty": "mutual_information"},
    "muka-evidence": {"method": "muka-evidence"},
    "muka-evidence, no MC": {"method": "muka-evidence", "mc": False},
    "muka-auto": {"method": "muka-auto"},
    "muka-auto, texts alike": {"method": "muka-auto", "teacher_balance": 0.0},
    "vkd": {"method": "vkd"},
    "uhc": {"method": "uhc"},
    "dfa": {"method": "dfa"},
    "cfl": {"method": "cfl"},
    "mean": {"method": "mean"},
    "dawid-skene": {"method": "supervised"},
    "oracle": {"method": "oracle", **PUBLISHED},
    "supervised": {"method": "supervised"},
}
# The published ones, among which the best is what every other method is compared with.
BASELINES = ("muka-hard", "muka-hard, margin", "muka-soft", "muka-soft, margin", "vkd", "uhc", "dfa", "cfl")
UPPER_LINES = ("oracle", "supervised")


def methods_of(setting: Setting, names: Sequence[str]) -> list[str]:
    """The rows that make sense in a setting: `mean` only for teachers of one label set."""
    return [name for name in names if name != "mean" or setting.same]


def label_blocks(setting: Setting, data: Path) -> list[tuple[str, list[str]]]:
    """(data set, labels) of each teacher."""
    blocks = []
    for name, count in setting.blocks:
        labels = sorted(set(read_texts(data / name / "train.jsonl", need_labels=True).labels))
        if len(labels) < count:
            raise UserError(f"{data / name / 'train.jsonl'}: {len(labels)} labels are too few for {count} teachers")
        edges = [0, len(labels)] * count if setting.same else [round(i * len(labels) / count) for i in range(count + 1)]
        parts = [(edges[2 * i], edges[2 * i + 1]) for i in range(count)] if setting.same else itertools.pairwise(edges)
        blocks += [(name, labels[a : b + (setting.overlap if b < len(labels) else 0)]) for a, b in parts]
    return blocks


def draw(rows: Rows, limit: int | None, seed: int) -> Rows:
    """A random part of `limit` rows with the label shares of the whole, in random order."""
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    sizes, seen, places = Counter(label for _, label in rows), Counter(), []
    for row, (_, label) in enumerate(rows):
        # The k-th row of a class of m stands at (k + 1/2) / m: the lowest places hold every class in its share.
        places.append(((seen[label] + 0.5) / sizes[label], row))
        seen[label] += 1
    return [rows[row] for row in sorted(row for _, row in sorted(places)[:limit])]


def deal(
    setting: Setting, blocks: list[tuple[str, list[str]]], rows: dict[str, Rows], seed: int
) -> tuple[list[Rows], Rows]:
    """The training texts of each teacher, and the pool. rows: the texts of each data set that may be used."""
    taught: list[Rows] = []
    pool: Rows = []
    for name, count in setting.blocks:
        shuffled = list(rows[name])
        random.Random(seed).shuffle(shuffled)
        half = len(shuffled) // 2
        known, free = (shuffled[:half], shuffled[half:]) if setting.unseen else (shuffled, shuffled)
        for i in range(count):
            _, labels = blocks[len(taught)]
            mine = known[i::count] if setting.same else known
            taught.append([row for row in mine if row[1] in labels])
        pool += free
    if setting.share is not None:
        pool = skew(pool, {label for _, labels in blocks[: (len(blocks) + 1) // 2] for label in labels}, setting.share)
    return taught, pool


def skew(rows: Rows, first: set[str], share: float) -> Rows:
    """As many rows as can be such that `share` of them have a label of `first`; rows in random order before and after."""
    parts = [row for row in rows if row[1] in first], [row for row in rows if row[1] not in first]
    total = min(len(parts[0]) / share, len(parts[1]) / (1 - share))
    left = Counter({True: round(total * share), False: round(total * (1 - share))})
    kept = []
    for row in rows:
        if left[row[1] in first] > 0:
            left[row[1] in first] -= 1
            kept.append(row)
    return kept


def digest(values: Any) -> str:
    """Of options that change what a folder holds, for its name."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def slug(name: str) -> str:
    """The name as part of a folder's."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def write_rows(path: Path, rows: Rows) -> None:
    """JSON lines of text and label."""
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in rows]
    path.write_text("".join(lines), encoding="utf-8")


def read_rows(path: Path) -> Rows:
    found = read_texts(path, need_labels=True)
    return list(zip(found.texts, found.labels, strict=True))
