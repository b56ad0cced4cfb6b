"""The demo's texts: docstrings of the installed libraries, each labelled with the library it documents.

Real text that lies on every machine with this package, so the demo needs no download. Sources are parsed, never imported. The
texts are a function of the installed versions and of (per_class, seed): same machine, same texts.

Names of the libraries are masked in every text: with them the task would be a look-up of one word, every teacher would be certain
about its own texts and the choice of the teacher, which is what the demo shows, would be no question at all.
"""

import ast
import hashlib
import importlib.util
import os
import random
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

from muka_fast.errors import UserError

# Label -> import name. All are dependencies of ours or of torch, datasets and scikit-learn, so they are always there.
LIBRARIES = {
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "pandas": "pandas",
    "python": "",  # the standard library
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "sympy": "sympy",
    "torch": "torch",
    "transformers": "transformers",
}
# Tests and copies of other projects; `_vendor` and `externals` hold other libraries' text under the wrong label.
SKIPPED_FOLDERS = {
    "tests", "test", "testing", "_vendor", "vendor", "externals", "extern", "idlelib", "lib2to3", "site-packages",
    "dist-packages", "__pycache__", "array_api_compat", "array_api_extra", "_lib", "benchmarks", "turtledemo", "_inductor",
}  # fmt: skip
MAX_PER_FILE = 8  # so that one large module does not stand for a whole library
MIN_WORDS, MAX_WORDS = 8, 60
SHINGLE = 4  # words
MAX_SEEN_SHINGLES = 0.4  # share of a text's shingles known from kept texts beyond which it is a near-duplicate
TEST_SHARE = 0.2  # of the texts

MASK = "library"
NAMES = (
    r"matplotlib|pyplot|mpl|plt|networkx|nx|numpy|np|ndarrays?|pandas|pd|dataframes?|cpython|python3?|scikit-learn|sklearn|scikit"
    r"|scipy|sympy|pytorch|torch|transformers|hugging ?face|tensorflow"
)
RULES = [
    (re.compile(r":\w+(?::\w+)?:`~?([^`<]*?)(?:\s*<[^`]*>)?`"), r"\1"),  # :class:`~a.b` -> a.b
    (re.compile(r"`+([^`]*)`+_*"), r"\1"),  # ``a``, `a`_ -> a
    (re.compile(r"\[\d+\]_"), ""),  # citations
    (re.compile(r"https?://\S+"), ""),
    (re.compile(r"\*\*?([\w ]+)\*\*?"), r"\1"),
    (re.compile(rf"(?<![A-Za-z0-9])(?:{NAMES})(?![A-Za-z0-9])", re.IGNORECASE), MASK),
    (re.compile(r"\s+"), " "),
]
SIGNATURE = re.compile(r"^([\w.,\[\] ]+=\s*)?[\w.]+\([^)]*\)?\s*(->.*|:)?$")  # `y = f(a, b)`, `f(a) -> b`
HEADINGS = (
    "parameters?|args?|arguments?|keyword arguments|returns?|yields?|raises?|examples?|notes?|references?|attributes|methods?"
    "|see also|shape|usage|warnings?|inputs?|outputs?"
)
SECTION = re.compile(
    rf"^(>>>|\.\. |:param|:return|:rtype|[-=~]{{3,}}|@|({HEADINGS})\s*:?\s*$|(args|returns|example|usage)s?:)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class DocTexts:
    """Texts with the library each one documents; `train` and `test` are row numbers, shuffled and disjoint."""

    texts: list[str]
    labels: list[str]
    train: list[int]
    test: list[int]

    @property
    def names(self) -> list[str]:
        """The labels, sorted."""
        return sorted(set(self.labels))


def clean(docstring: str) -> str | None:
    """The opening prose of a docstring as one line, library names masked; None where too little is left.

    Signature lines, sections (Parameters, Returns, ...), directives and doctests are left out; MIN_WORDS..MAX_WORDS words stay.
    """
    kept: list[str] = []
    for line in docstring.strip().splitlines():
        line = line.strip()
        if SECTION.match(line):
            break
        if line and not SIGNATURE.match(line):
            kept.append(line)
    text = " ".join(kept)
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    words = text.strip().split(" ")[:MAX_WORDS]
    text = " ".join(words)
    letters = sum(char.isalpha() or char == " " for char in text)
    return text if len(words) >= MIN_WORDS and letters >= 0.8 * len(text) and text.isascii() else None


def library_root(label: str) -> Path:
    """Folder of a library's sources, found without importing it.

    Raises:
        UserError: the library is not installed.
    """
    if not LIBRARIES[label]:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(LIBRARIES[label])
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the demo reads the docstrings of {label}, which is not installed: run `pip install {label}`")
    return Path(next(iter(spec.submodule_search_locations)))


def source_files(root: Path, seed: int) -> list[Path]:
    """Python files below `root` in an order that depends on their relative paths and the seed only."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        found += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(("test_", "conftest"))
        ]
    return sorted(found, key=lambda path: _digest(f"{seed}/{path.relative_to(root).as_posix()}"))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def file_docstrings(path: Path) -> list[str]:
    """Docstrings of the public classes and functions of one file, in order; empty where it does not parse."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    found: list[str] = []
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop(0)
        for child in getattr(node, "body", []):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(child, clean=False)
                if docstring and not child.name.startswith("_"):
                    found.append(docstring)
                if isinstance(child, ast.ClassDef):
                    pending.append(child)
    return found


def library_texts(label: str, per_class: int, seed: int, seen: set[bytes]) -> list[str]:
    """Up to `per_class` cleaned texts of one library, none a near-duplicate of a text whose shingles are in `seen` (updated)."""
    root = library_root(label)
    texts: list[str] = []
    for path in source_files(root, seed):
        taken = 0
        for docstring in file_docstrings(path):
            text = clean(docstring)
            if text is None or _known(text, seen):
                continue
            texts.append(text)
            taken += 1
            if taken == MAX_PER_FILE or len(texts) == per_class:
                break
        if len(texts) == per_class:
            break
    return texts


def _known(text: str, seen: set[bytes]) -> bool:
    """Whether most of a text was seen before; if not, its shingles are remembered."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    shingles = {_digest(" ".join(words[i : i + SHINGLE])) for i in range(max(1, len(words) - SHINGLE + 1))}
    if len(shingles & seen) > MAX_SEEN_SHINGLES * len(shingles):
        return True
    seen |= shingles
    return False


def collect(per_class: int = 450, seed: int = 0) -> DocTexts:
    """Texts of all libraries, at most `per_class` each, and their split.

    Raises:
        UserError: a library is not installed.
    """
    seen: set[bytes] = set()
    rows = [(text, label) for label in LIBRARIES for text in library_texts(label, per_class, seed, seen)]
    random.Random(seed).shuffle(rows)
    cut = round(len(rows) * TEST_SHARE)
    return DocTexts(
        texts=[text for text, _ in rows],
        labels=[label for _, label in rows],
        train=list(range(cut, len(rows))),
        test=list(range(cut)),
    )
