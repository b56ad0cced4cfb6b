"""Rows of text files and hub data sets, one at a time, with the place of every fault."""

import csv
import glob
import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from muka_fast.errors import OUT_OF_REACH, UserError, first_line

log = logging.getLogger("muka_fast")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.\[\]:%+-]+))?")
UTF8_BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
# The longer first, whose beginning the shorter is.
BYTE_ORDER_MARKS = {(b"\xff\xfe\0\0", b"\0\0\xfe\xff"): "UTF-32", (b"\xff\xfe", b"\xfe\xff"): "UTF-16"}
# One text may be a whole book; the csv module stops at 128 kB unless told otherwise.
MAX_FIELD_CHARS = 2**31 - 1


class Row(NamedTuple):
    """One row: `number` is the line it starts at, or the record, from 1 on; values are as found, None where there is none."""

    number: int
    text: Any
    label: Any
    unit: str = "line"

    @property
    def place(self) -> str:
        return f"{self.unit} {self.number}"


class Columns(NamedTuple):
    """The columns to read; label None: no labels."""

    text: str
    label: str | None
    need_labels: bool


def read_rows(source: str, columns: Columns, split: str) -> Iterator[tuple[str, Row]]:
    """Each row, and the name of where it is, of a file (.jsonl .json .csv .tsv .parquet .txt, also .gz), of all files of a pattern in
    the order of their names (`pool/*.parquet`), or of a hub data set `owner/name[:split]`.

    Raises:
        UserError: no such file, a folder, an unknown kind of file, an empty or damaged one, a missing column.
    """
    files = find_files(source)
    if not files:
        path, hub = Path(source), HUB_NAME.fullmatch(source)
        if hub and not path.name.lower().removesuffix(".gz").endswith(SUFFIXES) and not path.parent.is_dir():
            return ((source, row) for row in _hub_rows(hub[1], hub[2] or split, columns))
        way_out = "(a hub data set is named owner/name, several files by a pattern: 'pool/*.jsonl')"
        raise UserError(f"{source[:200]}: no such file {way_out}")
    parts = [(name, _file_rows(name, columns)) for name in files]
    return ((name, row) for name, rows in parts for row in rows)


def encodable(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which no tokenizer and no file takes: they become U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def find_files(source: str) -> list[str]:
    """The file of this name, or else those that the pattern matches, sorted; [] where there is none. Raises UserError where the system
    does not let us look."""
    try:
        os.stat(source)
    except PermissionError as error:
        raise UserError(f"{source}: {error.strerror}") from error
    except (OSError, ValueError):  # the latter for what is no name of a file
        return sorted(glob.glob(source, recursive=True))
    return [source]


def _file_rows(source: str, columns: Columns) -> Iterator[Row]:
    path = Path(source)
    gz = path.suffix.lower() == ".gz"
    kind = Path(path.stem).suffix.lower() if gz else path.suffix.lower()
    if path.is_dir():
        raise UserError(f"{source}: is a folder; {_way_out_of_folder(path)}")
    if kind not in SUFFIXES:
        raise UserError(f"{source}: unknown kind of file '{path.suffix}': use one of {' '.join(SUFFIXES)}, also compressed as .gz")
    if gz and kind == ".parquet":
        raise UserError(f"{source}: parquet is compressed in itself and not read as .gz: gunzip {path}")
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows, ".txt": _txt_rows}
    return _guarded(source, path, readers.get(kind, _csv_rows)(path, columns))


def _way_out_of_folder(path: Path) -> str:
    for name, part in (("dataset_dict.json", "['train']"), ("state.json", "")):  # what `save_to_disk` of `datasets` writes
        if (path / name).is_file():
            return f"write a file of it: datasets.load_from_disk({str(path)!r}){part}.to_parquet({f'{path.name}.parquet'!r})"
    kind = next((suffix for suffix in SUFFIXES if any(path.glob(f"*{suffix}"))), SUFFIXES[0])
    return f"name a file, or several by a pattern: '{path}/*{kind}' ({' '.join(SUFFIXES)})"


def _guarded(source: str, path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, with what the operating system or gzip says turned into one line."""
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{source}: the file is empty")
        yield from rows
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{source}: damaged gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines as text, line ends kept. Decoded one by one, so that a wrong byte is reported with its line."""
    with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                if raw.startswith(GZIP):
                    raise UserError(f"{path}: is compressed by gzip: name it {path.name}.gz")
                for marks, encoding in BYTE_ORDER_MARKS.items():
                    if raw.startswith(marks):
                        way_out = f"convert it: iconv -f {encoding} -t UTF-8 {path}"
                        raise UserError(f"{path}: the file is {encoding}, not UTF-8: {way_out}")
                raw = raw.removeprefix(UTF8_BOM)
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                place = f"line {number}: byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not UTF-8"
                way_out = f"convert the file, e.g. iconv -f LATIN1 -t UTF-8 {path}"
                raise UserError(f"{path}, {place}: {way_out}") from error


def _missing_column(place: str, column: str, have: list[str], option: str) -> UserError:
    names = ", ".join(repr(name[:40]) for name in have[:12]) + (", ..." if len(have) > 12 else "")
    return UserError(f"{place}: no column '{column}'; there are: {names or 'none'}; name the right one with --{option}")


def _check_columns(place: str, have: list[str], columns: Columns, single: Sequence[str]) -> None:
    """Refuse a table without the columns that are needed, or with several of a name that must be one alone."""
    if columns.text not in have:
        raise _missing_column(place, columns.text, have, "text_column")
    if columns.need_labels and columns.label not in have:
        raise _missing_column(place, columns.label, have, "label_column")
    if twice := [name for name in single if have.count(name) > 1]:
        raise UserError(f"{place}: several columns are called '{twice[0]}': give them names of their own")


def _pick(record: Any, place: str, columns: Columns) -> tuple[Any, Any]:
    """Text and label of a JSON object."""
    if not isinstance(record, dict):
        raise UserError(f'{place}: an object like {{"{columns.text}": "..."}} is expected, found {_kind(record)}')
    if columns.text not in record:
        raise _missing_column(place, columns.text, list(record), "text_column")
    if columns.need_labels and columns.label not in record:
        raise _missing_column(place, columns.label, list(record), "label_column")
    return record[columns.text], record.get(columns.label)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _jsonl_rows(path: Path, columns: Columns) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            yield Row(number, None, None)
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            parsed = isinstance(error, json.JSONDecodeError)
            reason = f"{error.msg}, column {error.colno}" if parsed else "too deep or too long a number"
            raise UserError(f"{path}, line {number}: not valid JSON ({reason})") from error
        yield Row(number, *_pick(record, f"{path}, line {number}", columns))


def _json_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """A list of objects, read as a whole (.jsonl is the format for large sets)."""
    content = "".join(line for _, line in _lines(path))
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip().startswith("{") and "Extra data" in str(error):
            raise UserError(f"{path}: holds one object per line: rename it to {path.stem}.jsonl") from error
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path}, line {line}: not valid JSON ({getattr(error, 'msg', 'too deep or a number too long')})") from error
    if not isinstance(records, list):
        raise UserError(f"{path}: a list of objects is expected, found {_kind(records)}")
    for number, record in enumerate(records, 1):
        yield Row(number, *_pick(record, f"{path}, record {number}", columns), "record")


def _csv_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Comma- or tab-separated with a header; quotes as in spreadsheets, also around line breaks."""
    csv.field_size_limit(MAX_FIELD_CHARS)
    delimiter = "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    start, spans = 1, False
    try:
        header = [name.strip() for name in next(reader, [])]
        others = [mark for mark in ";\t|," if len(header) == 1 and mark in header[0]]
        if others and columns.text not in header:
            way_out = "save it with commas (.csv) or tabs (.tsv), or as .jsonl"
            raise UserError(f"{path}, line 1: looks separated by {others[0]!r}; {way_out}")
        _check_columns(f"{path}, line 1", header, columns, (columns.text, columns.label))
        text_at = header.index(columns.text)
        label_at = header.index(columns.label) if columns.label in header else None
        start = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                found = f"{len(fields)} fields where the header has {len(header)}"
                raise UserError(f"{path}, line {start}: {found}: quote fields that hold a separator")
            if delimiter == "\t" and not spans and reader.line_num > start:
                spans = True
                told = "a field in quotes spans several lines; where quotes are plain characters, double them or use .jsonl"
                log.warning("%s, line %d: %s", path, start, told)
            label = fields[label_at].strip() if fields and label_at is not None else None  # as the names of the columns
            yield Row(start, fields[text_at] if fields else None, label or None)
            start = reader.line_num + 1
    except csv.Error as error:
        way_out = 'double every quote inside of a quoted field ("") or use .jsonl'
        if "new-line character" in str(error):
            way_out = "its lines end in a carriage return alone: save it with line feeds"
        raise UserError(f"{path}, line {start}: {error}: {way_out}") from error


def _txt_rows(path: Path, columns: Columns) -> Iterator[Row]:
    if columns.need_labels:
        raise UserError(f"{path}: a .txt file has no labels, which are needed here: use .jsonl, .csv, .tsv or .parquet")
    for number, line in _lines(path):
        text = line.rstrip("\r\n")
        if number == 1 and "\r" in text and not line.endswith("\n"):
            way_out = f"save it with line feeds: tr '\\r' '\\n' < {path} > lines.txt"
            raise UserError(f"{path}: its lines end in a carriage return alone: {way_out}")
        yield Row(number, text, None)


def _parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        have = file.schema_arrow.names
        _check_columns(str(path), have, columns, (columns.text, columns.label))
        wanted = [columns.text] + [columns.label] * (columns.label in have and columns.label != columns.text)
        number = 0
        names = _class_names(file.schema_arrow.metadata or {}, columns.label)
        for batch in file.iter_batches(batch_size=4096, columns=wanted):
            texts = batch.column(columns.text).to_pylist()
            labels = batch.column(columns.label).to_pylist() if columns.label in have else [None] * len(texts)
            for text, label in zip(texts, labels, strict=True):
                number += 1
                yield Row(number, text, _named(label, names), "record")
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        # Arrow's own complaints are OSErrors without a number, over several lines.
        raise UserError(f"{path}: damaged parquet file ({first_line(error)})") from error


def _class_names(metadata: dict[bytes, bytes], column: str) -> list[str] | None:
    """What the library `datasets` writes beside numbers that stand for classes."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) else None


def _named(label: Any, names: list[str] | None) -> Any:
    """The name of a class number; None for -1, which is how such sets say "no label"."""
    if names is None or not isinstance(label, int) or label >= len(names):
        return label
    return None if label < 0 else names[label]


def _hub_answers(name: str) -> bool:
    """Whether the hub can be reached, asked once: the library `datasets` asks six times, in half a minute, before it says so."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(name, timeout=10)
    except (HfHubHTTPError, ValueError):  # an answer, or no name to ask for: told by who loads it
        return True
    except Exception as error:  # of the library that asks, which is another one in each version
        if type(error).__name__ == "ReadTimeout":  # there, and slow
            return True
        log.warning("%s: the hub is out of reach (%s): a cached copy is taken, if there is one", name, first_line(error))
        return False
    return True


def _hub_rows(name: str, split: str, columns: Columns) -> Iterator[Row]:
    """Rows of a public data set; labels stored as class numbers come back under their names."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    log.info("%s: no such file, looking for a hub data set of this name", name)
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = offline or not _hub_answers(name)  # then its cache is all that it looks into
        data = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, HfHubHTTPError) as error:
        reason = first_line(error)[:200]
        if isinstance(error, ConnectionError):
            reason = f"{OUT_OF_REACH}; check the path or the name"
        raise UserError(
            f"{name}: no such file, and not to be had as a hub data set, split '{split}': {reason}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    have = data.column_names
    _check_columns(name, have, columns, ())
    feature = data.features.get(columns.label)
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    wanted = [columns.text] + [columns.label] * (columns.label in have and columns.label != columns.text)
    number = 0
    for batch in data.select_columns(wanted).iter(batch_size=4096):
        labels = batch.get(columns.label, [None] * len(batch[columns.text]))
        for text, label in zip(batch[columns.text], labels, strict=True):
            number += 1
            yield Row(number, text, _named(label, names), "record")
