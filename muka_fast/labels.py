"""The union label space of several teachers: overlaps, meaningless default names, and the map that renames labels."""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from muka_fast.config import nearest
from muka_fast.errors import UserError
from muka_fast.mappings import Source, read_mapping, told
from muka_fast.readers import encodable

log = logging.getLogger("muka_fast")

DEFAULT_NAME = re.compile(r"LABEL_\d+")
WHOLE = re.compile(r"^(-?\d+)\.0+$")

LabelMap = Mapping[str, "str | Mapping[str, str | None] | None"]


@dataclass(frozen=True)
class LabelSpace:
    """The student's classes and where each teacher's classes lie among them (README, "Labels").

    Attributes:
        names: union label names in first-seen order, length C.
        teacher_names: length N.
        teacher_labels: per teacher the union names of its kept columns, in its own order; a name occurs twice where
            the map merges two classes of one teacher.
        columns: int64 [S'], kept columns in the raw concatenation of all teachers' logits.
        offsets: N + 1 ints; teacher i owns kept columns offsets[i]:offsets[i + 1].
        teacher_to_union: int64 [S'], class of each kept column, in [0, C).
    """

    names: tuple[str, ...]
    teacher_names: tuple[str, ...]
    teacher_labels: tuple[tuple[str, ...], ...]
    columns: np.ndarray
    offsets: list[int]
    teacher_to_union: np.ndarray

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.names)

    @cached_property
    def owned(self) -> np.ndarray:
        """bool [N, C]: teacher i has class c."""
        table = np.zeros((len(self.teacher_names), self.num_classes), bool)
        table[np.repeat(np.arange(len(table)), np.diff(self.offsets)), self.teacher_to_union] = True
        return table

    @property
    def overlaps(self) -> tuple[str, ...]:
        """Names that two or more teachers own, in union order."""
        return tuple(name for name, count in zip(self.names, self.owned.sum(0), strict=True) if count >= 2)

    def owners(self, name: str) -> list[int]:
        """Teachers that own a class, ascending; empty for a name outside of the union."""
        return np.flatnonzero(self.owned[:, self.names.index(name)]).tolist() if name in self.names else []


def build_label_space(
    teachers: Sequence[tuple[str, Sequence[str]]], label_map: LabelMap | None = None, warn: bool = True
) -> LabelSpace:
    """Join the label sets of all teachers: the same name is the same class, in first-seen order.

    Default names (LABEL_0, ...) mean nothing: unless the map names them they become `<teacher>/LABEL_0`.

    Args:
        teachers: (name, ordered label names) of each teacher; the names differ.
        label_map: {"old": "new" | None} for all teachers and/or {"<teacher>": {"old": "new" | None}}, the latter wins;
            None drops a class. `<teacher>/LABEL_0` is also understood as an old name.
        warn: tell which names may not mean what they seem to.

    Raises:
        UserError: no teacher, a teacher without labels or with all of them dropped, unknown names in the map.
    """
    if not teachers:
        raise UserError("no teacher given: name at least one with --teachers")
    for name, labels in teachers:
        if not labels:
            raise UserError(f"teacher '{name}' has no labels: its config.json needs id2label")
    _check_map(teachers, label_map or {})
    shared, own = _split_map(teachers, label_map or {})

    union: dict[str, int] = {}
    kept_labels, columns, to_union, offsets, unnamed = [], [], [], [0], []
    first_column = 0
    for teacher, labels in teachers:
        kept = []
        for column, label in enumerate(labels, first_column):
            name = _union_name(teacher, label, shared, own.get(teacher, {}))
            if name is None:
                continue
            if DEFAULT_NAME.fullmatch(label) and name == f"{teacher}/{label}":
                unnamed.append(name)
            kept.append(name)
            columns.append(column)
            to_union.append(union.setdefault(name, len(union)))
        if not kept:
            raise UserError(
                f"--label_map: teacher '{teacher}' has every label dropped: keep one or leave the teacher out"
            )
        kept_labels.append(tuple(kept))
        offsets.append(len(columns))
        first_column += len(labels)
    space = LabelSpace(
        names=tuple(union),
        teacher_names=tuple(name for name, _ in teachers),
        teacher_labels=tuple(kept_labels),
        columns=np.array(columns, dtype=np.int64),
        offsets=offsets,
        teacher_to_union=np.array(to_union, dtype=np.int64),
    )
    if warn:
        _warn_of_names(teachers, space, unnamed)
    return space


def _warn_of_names(teachers: Sequence[tuple[str, Sequence[str]]], space: LabelSpace, unnamed: Sequence[str]) -> None:
    for name, labels in teachers:
        if repeated := [label for label, count in Counter(labels).items() if count > 1]:
            log.warning("teacher %s names several of its classes %r: they become one", name, repeated[0])
    if unnamed:
        example = f"{len(unnamed)} default label names mean nothing and stay apart ({unnamed[0]}, ...)"
        log.warning("%s: name them with --label_map", example)
    warn_of_lookalikes(space.names, "merge them with --label_map")
    if len(space.names) == 1 and sum(len(labels) for _, labels in teachers) > 1:
        log.warning("all labels are one class, %r: there is nothing to learn", space.names[0])
    if numbers := [name for name in space.overlaps if re.fullmatch(r"[-+]?\d+", name)]:
        same = f"{len(numbers)} classes named by numbers ({numbers[0]}, ...) are taken for the same in several teachers"
        log.warning("%s: where they are not, name them with --label_map", same)
    elif space.overlaps:
        names = ", ".join(space.overlaps[:5]) + ", ..." * (len(space.overlaps) > 5)
        log.info("several teachers know %d of %d classes: %s (--label_map)", len(space.overlaps), len(space.names), names)


def _union_name(teacher: str, label: str, shared: Mapping, own: Mapping) -> str | None:
    """Name of a raw label in the union; None drops it. The entry for this teacher wins."""
    for table in (own, shared):
        if label in table:
            return table[label]
    return f"{teacher}/{label}" if DEFAULT_NAME.fullmatch(label) else label


def read_label_map(source: Source) -> dict[str, str | dict[str, str | None] | None]:
    """A label map, of JSON or YAML or as given. Whether its names exist is another's to check: `build_label_space` refuses those that
    no teacher has, `tell_of_unknown` warns of them.

    Raises:
        UserError: as `read_mapping`; a name that is not text.
    """
    content, what = read_mapping("--label_map", source, "old names and their new ones (or null)"), told("--label_map", source)
    return {
        _name(key, what): {_name(k, what): _new_name(v, what) for k, v in value.items()}
        if isinstance(value, dict)
        else _new_name(value, what)
        for key, value in content.items()
    }


def rename_labels(
    labels: Sequence[str], label_map: LabelMap | None, teachers: Sequence[Mapping[str, object]] = ()
) -> list[str | None]:
    """True labels under the names of the union.

    The entries of the map that hold for all teachers are applied, and those for single teachers where every teacher that
    owns the old name has it renamed alike. teachers: dicts with name and labels (those of the teacher itself, in any order).
    """
    shared, own = _split_map([(teacher["name"], teacher["labels"]) for teacher in teachers], label_map or {})
    renamed = dict(shared)
    for old in {old for table in own.values() for old in table}:
        found = [own.get(teacher["name"], {}).get(old, shared.get(old, old)) for teacher in teachers if old in teacher["labels"]]
        if found and all(new == found[0] for new in found):
            renamed[old] = found[0]
    return [renamed.get(label, label) for label in labels]


def true_labels(
    labels: Sequence[str], label_map: LabelMap | None, teachers: Sequence[Mapping[str, object]], space: LabelSpace, source: str
) -> list[str]:
    """`rename_labels`, with "" for a text without label and one whose label the map drops; warns where no label is a class of `space`.
    source: of the texts."""
    renamed = [name or "" for name in rename_labels(labels, label_map, teachers)]
    if not set(renamed) & set(space.names):
        some = ", ".join(sorted(set(labels) - {""})[:3])
        told = "%s: none of its labels (%s, ...) is a class of the teachers (%s, ...), so that they tell nothing of the targets (%s)"
        log.warning(told, source, some, ", ".join(space.names[:3]), "--label_map renames, --label_column names another column")
    return renamed


def _name(key: object, what: str) -> str:
    # YAML reads a bare `no` or `1.5` as something else than text; an integer is taken as it was written.
    if isinstance(key, str) and key.strip():
        return encodable(key)
    if isinstance(key, int) and not isinstance(key, bool):
        return str(key)
    raise UserError(f"{what}: {key!r} is not a label name: put names in quotes")


def _new_name(value: object, what: str) -> str | None:
    return None if value is None else _name(value, what)


def _split_map(
    teachers: Sequence[tuple[str, Sequence[str]]], label_map: LabelMap
) -> tuple[dict[str, str | None], dict[str, dict[str, str | None]]]:
    """The entries for all teachers, and those for one, spelled either way."""
    spelled = {f"{name}/{label}": (name, label) for name, labels in teachers for label in labels}
    shared: dict[str, str | None] = {}
    own: dict[str, dict[str, str | None]] = {}
    for key, value in label_map.items():
        if isinstance(value, Mapping):
            own[key] = own.get(key, {}) | dict(value)
            continue
        shared[key] = value
        if key in spelled:
            teacher, label = spelled[key]
            own[teacher] = {label: value} | own.get(teacher, {})
    return shared, own


def _check_map(teachers: Sequence[tuple[str, Sequence[str]]], label_map: LabelMap) -> None:
    """Raises UserError where an old name or a teacher of the map does not exist."""
    own_labels = {name: set(labels) for name, labels in teachers}
    all_labels = set().union(*own_labels.values()) | {f"{name}/{x}" for name, labels in teachers for x in labels}
    for key, value in label_map.items():
        if not isinstance(value, Mapping):
            if key not in all_labels:
                raise UserError(f"--label_map: no teacher has a label '{key}'{_nearest(key, all_labels)}")
            continue
        if key not in own_labels:
            raise UserError(f"--label_map: no teacher is called '{key}'{_nearest(key, own_labels)}")
        for old in value:
            if old not in own_labels[key]:
                hint = _nearest(old, own_labels[key])
                raise UserError(f"--label_map: teacher '{key}' has no label '{old}'{hint}")


def tell_of_unknown(label_map: LabelMap, labels: Sequence[str], teachers: Sequence[Mapping[str, object]]) -> None:
    """Warn of entries for all teachers whose old name nothing has. labels: of the data; teachers: as of `rename_labels`."""
    known = {*labels, *(name for teacher in teachers for label in teacher["labels"] for name in (label, f"{teacher['name']}/{label}"))}
    for name, new in label_map.items():
        if name not in known and not isinstance(new, Mapping):
            log.warning("--label_map: neither these texts nor a teacher have a label '%s'%s", name, _nearest(name, known))


def _nearest(name: str, names: Sequence[str] | set[str] | Mapping[str, object]) -> str:
    there = sorted(names)
    return nearest(name, there, cutoff=0.3) or f" (there are: {', '.join(there[:5])}{', ...' if len(there) > 5 else ''})"


def plain_form(name: str) -> str:
    """What a name is but for case, outer blanks, Unicode form and, of a whole number, zeros behind a point (as pandas writes one)."""
    name = unicodedata.normalize("NFC", name).strip().casefold()
    return WHOLE.sub(r"\1", name)


def warn_of_lookalikes(names: Iterable[str], way_out: str) -> None:
    """Names of one `plain_form` are different classes, which is rarely meant."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(plain_form(name), name)
        if other != name:
            log.warning("labels '%s' and '%s' are two classes: %s if they are one", other, name, way_out)
