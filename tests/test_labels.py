"""Label spaces against an oracle written from the definition, and every mistake a label map can hold."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muka_fast.config import read_options
from muka_fast.data import read_texts
from muka_fast.errors import UserError
from muka_fast.labels import build_label_space, plain_form, read_label_map, rename_labels, tell_of_unknown, true_labels

LABELS = st.sampled_from(["cat", "dog", "Dog", "fish", "a/b", "", "LABEL_0", "LABEL_1", "LABEL_x", "7"])
LABEL_SETS = st.lists(LABELS, min_size=1, max_size=6, unique=True)


def oracle(teachers, label_map):
    """One (teacher, raw column, class name) per kept class, by the words of the definition: rename, merge, drop."""
    kept, column = [], 0
    for name, labels in teachers:
        for label in labels:
            if label in label_map.get(name, {}):
                new = label_map[name][label]
            elif label in label_map and not isinstance(label_map[label], dict):
                new = label_map[label]
            elif re.fullmatch("LABEL_[0-9]+", label):
                new = name + "/" + label
            else:
                new = label
            if new is not None:
                kept.append((name, column, new))
            column += 1
    return kept


@st.composite
def problems(draw):
    teachers = [(f"t{i}", draw(LABEL_SETS)) for i in range(draw(st.integers(1, 6)))]
    label_map = {}
    for label in {label for _, labels in teachers for label in labels}:
        if draw(st.booleans()):
            label_map[label] = draw(st.none() | st.sampled_from(["cat", "new", "other"]))
    for name, labels in teachers:
        if draw(st.booleans()):
            old = draw(st.lists(st.sampled_from(labels), unique=True))
            label_map[name] = {label: draw(st.none() | st.sampled_from(["cat", "new"])) for label in old}
    return teachers, label_map


@given(problems())
def test_label_space_equals_the_oracle(problem):
    teachers, label_map = problem
    kept = oracle(teachers, label_map)
    if {name for name, _ in teachers} != {name for name, _, _ in kept}:
        with pytest.raises(UserError, match="every label dropped"):
            build_label_space(teachers, label_map)
        return
    space = build_label_space(teachers, label_map)

    assert space.names == tuple(dict.fromkeys(new for _, _, new in kept))
    assert space.num_classes == len(set(space.names))
    assert space.teacher_names == tuple(name for name, _ in teachers)
    assert space.columns.tolist() == [column for _, column, _ in kept]
    assert [space.names[c] for c in space.teacher_to_union] == [new for _, _, new in kept]
    assert space.columns.dtype == space.teacher_to_union.dtype == np.int64
    assert space.offsets[0] == 0 and len(space.offsets) == len(teachers) + 1
    for i, (name, _) in enumerate(teachers):
        own = [new for owner, _, new in kept if owner == name]
        assert list(space.teacher_labels[i]) == own
        assert space.offsets[i + 1] - space.offsets[i] == len(own)
    owners = {new: sorted({int(o[1:]) for o, _, n in kept if n == new}) for new in space.names}
    assert {name: space.owners(name) for name in space.names} == owners
    assert space.overlaps == tuple(name for name in space.names if len(owners[name]) > 1)


def test_a_name_that_a_teacher_repeats_is_one_class_and_told(caplog):
    space = build_label_space([("pets", ["cat", "dog", "cat"])])
    assert space.names == ("cat", "dog") and space.teacher_to_union.tolist() == [0, 1, 0]
    assert "teacher pets names several of its classes 'cat'" in caplog.text


@given(st.lists(LABEL_SETS, min_size=1, max_size=6))
def test_default_names_are_never_merged(label_sets):
    teachers = [(f"t{i}", labels) for i, labels in enumerate(label_sets)]
    space = build_label_space(teachers)
    default = [name for name in space.names if re.search(r"LABEL_\d+$", name)]
    assert len(default) == sum(label in ("LABEL_0", "LABEL_1") for labels in label_sets for label in labels)
    assert all(len(space.owners(name)) == 1 for name in default)


def test_readable_example():
    space = build_label_space([("pets", ["cat", "dog"]), ("farm", ["cow", "dog", "pig"])])
    assert space.names == ("cat", "dog", "cow", "pig")
    assert space.teacher_to_union.tolist() == [0, 1, 2, 1, 3]
    assert space.offsets == [0, 2, 5]
    assert space.overlaps == ("dog",)
    assert space.owners("dog") == [0, 1]
    assert space.owners("unicorn") == []


def test_merging_inside_one_teacher_keeps_both_columns():
    space = build_label_space([("t", ["happy", "glad", "sad"])], {"t": {"glad": "happy"}})
    assert space.names == ("happy", "sad")
    assert space.teacher_labels == (("happy", "happy", "sad"),)
    assert space.columns.tolist() == [0, 1, 2]
    assert space.teacher_to_union.tolist() == [0, 0, 1]
    assert space.overlaps == ()


def test_a_blank_name_is_none(tmp_path):
    (tmp_path / "map.yaml").write_text('a: " "\n')
    with pytest.raises(UserError, match="' ' is not a label name"):
        read_label_map(tmp_path / "map.yaml")


def test_default_names_can_be_named_in_three_ways(product_log):
    teachers = [("a", ["LABEL_0", "LABEL_1"]), ("b", ["LABEL_0"])]
    assert build_label_space(teachers).names == ("a/LABEL_0", "a/LABEL_1", "b/LABEL_0")
    assert "--label_map" in product_log.text and "a/LABEL_0" in product_log.text
    product_log.clear()
    own = {"a": {"LABEL_0": "x", "LABEL_1": "y"}, "b": {"LABEL_0": "z"}}
    assert build_label_space(teachers, own).names == ("x", "y", "z")
    assert build_label_space(teachers, {"a/LABEL_0": "x", "LABEL_1": "y", "LABEL_0": "z"}).names == ("x", "y", "z")
    # Said explicitly, a default name is a name.
    more = [*teachers, ("c", ["cat"])]
    assert build_label_space(more, {"LABEL_0": "LABEL_0", "LABEL_1": None}).names == ("LABEL_0", "cat")
    assert [record.levelname for record in product_log.records] == ["INFO"]
    assert "several teachers know 1 of 2 classes: LABEL_0 (--label_map)" in product_log.text


def test_names_that_look_alike_are_pointed_out(product_log):
    assert build_label_space([("a", ["Sport"]), ("b", ["sport"])]).num_classes == 2
    assert "'Sport' and 'sport'" in product_log.text
    assert build_label_space([("a", ["café"]), ("b", ["cafe\u0301"])]).num_classes == 2
    assert "'café' and 'cafe\u0301'" in product_log.text


@pytest.mark.parametrize(
    ("teachers", "label_map", "message"),
    [
        ([], None, "--teachers"),
        ([("a", [])], None, "'a' has no labels"),
        ([("a", ["x"])], {"x": None}, "'a' has every label dropped"),
        ([("a", ["cat"])], {"cta": "dog"}, r"no teacher has a label 'cta' \(nearest: cat\)"),
        ([("a", ["cat", "cow"])], {"x": "dog"}, r"--label_map: no teacher has a label 'x' \(there are: a/cat, a/cow, cat, cow\)"),
        ([("news", ["cat"])], {"nwes": {"cat": "dog"}}, r"no teacher is called 'nwes' \(nearest: news\)"),
        ([("a", ["cat"]), ("b", ["dog"])], {"a": {"dog": "x"}}, "teacher 'a' has no label 'dog'"),
    ],
)
def test_mistakes_are_named(teachers, label_map, message):
    with pytest.raises(UserError, match=message):
        build_label_space(teachers, label_map)


def test_a_merged_key_may_be_given_again(tmp_path):
    (tmp_path / "map.yaml").write_text("s: &both {a: b}\nt: {<<: *both, a: c}\n")
    assert read_label_map(tmp_path / "map.yaml") == {"s": {"a": "b"}, "t": {"a": "c"}}


def test_maps_are_read_from_json_and_yaml(tmp_path):
    want = {"old": "new", "gone": None, "news": {"0": "world"}}
    (tmp_path / "map.json").write_text('{"old": "new", "gone": null, "news": {"0": "world"}}', encoding="utf-8")
    (tmp_path / "map.yaml").write_text("old: new\ngone: null\nnews:\n  0: world\n", encoding="utf-8")
    assert read_label_map(tmp_path / "map.json") == want
    assert read_label_map(str(tmp_path / "map.yaml")) == want


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("map.json", b"{", r"map\.json, line 1: not valid JSON"),
        ("map.yaml", b"a: [", r"map\.yaml, line \d: not valid YAML"),
        ("map.yaml", b"- a\n", "must hold old names and their new ones"),
        ("map.yaml", b"# nothing yet\n", "must hold old names and their new ones"),
        ("map.yaml", b"a: b\nt: {a: c}\na: d\n", r"map\.yaml, line 3: .*the key 'a' is there twice"),
        ("map.yaml", b"t: {0: c, '0': d}\n", r"map\.yaml, line 1: .*the key '0' is there twice"),
        ("map.json", b'{"a": "b", "t": {"c": "d", "c": null}}', r"map\.json: the key 'c' is there twice"),
        ("map.yaml", b"no: yes\n", "put names in quotes"),
        ("map.yaml", b"a: 1.5\n", "put names in quotes"),
        ("map.json", b'{"a": ""}', "put names in quotes"),
        ("map.json", b'{"a": "\xe9"}', "not UTF-8"),
        ("other.json", None, "No such file"),
    ],
)
def test_faulty_map_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_label_map(tmp_path / name)


@pytest.mark.parametrize(("other", "told"), [(["-1", "+2"], True), (["8", "cat"], False)])
def test_numbers_in_common_are_told(other, told, caplog):
    space = build_label_space([("a", ["0", "-1", "+2", "cat"]), ("b", other)])
    assert space.num_classes == (4 if told else 5)
    assert ("2 classes named by numbers (-1, ...) are taken for the same in several teachers" in caplog.text) is told


def test_a_map_that_leaves_one_class_is_told(caplog):
    build_label_space([("t", ["cat", "dog"])], {"cat": "pet", "dog": "pet"})
    assert "all labels are one class, 'pet'" in caplog.text
    caplog.clear()
    build_label_space([("t", ["cat"])])
    assert not caplog.records


def test_whole_numbers_as_pandas_writes_them_are_told(caplog):
    build_label_space([("a", ["1", "2"]), ("b", ["2.0", "2.5"])])
    assert "labels '2' and '2.0' are two classes: merge them with --label_map if they are one" in caplog.text
    assert len({plain_form(name) for name in ("2", "2.5", "2.0.0", "v2.0", "-2.0")}) == 5


def test_labels_of_which_none_is_a_class_are_told(caplog):
    space = build_label_space([("t", ["cat", "dog"])])
    assert true_labels(["cat", "", "owl"], {"owl": None}, [], space, "texts.csv") == ["cat", "", ""] and not caplog.records
    true_labels(["1", "", "0"], None, [], space, "texts.csv")
    told = r"texts.csv: none of its labels (0, 1, ...) is a class of the teachers (cat, dog, ...)"
    assert told in caplog.text and "--label_map renames, --label_column names another column" in caplog.text


def test_true_labels_follow_the_map():
    label_map = {"old": "new", "gone": None, "t": {"cat": "dog"}}
    assert rename_labels(["old", "gone", "cat"], label_map) == ["new", None, "cat"]
    assert rename_labels(["old"], None) == ["old"]


def test_true_labels_follow_the_entries_of_one_teacher_where_all_owners_agree():
    teachers = [{"name": "s", "labels": ["cat", "cow"]}, {"name": "t", "labels": ["cat", "owl"]}]
    rename = lambda label_map: rename_labels(["cat", "cow", "owl"], label_map, teachers)
    assert rename({"t": {"owl": "bird"}}) == ["cat", "cow", "bird"]
    assert rename({"owl": "wrong", "t": {"owl": "bird"}}) == ["cat", "cow", "bird"]  # as in the label space
    assert rename({"t": {"cat": "pet"}}) == ["cat", "cow", "owl"]  # s keeps its cats
    assert rename({"s": {"cat": "pet"}, "t": {"cat": "pet", "owl": None}}) == ["pet", "cow", None]
    assert rename({"cat": "pet", "t": {"cat": "pet"}}) == ["pet", "cow", "owl"]
    assert rename({"cat": "pet", "t": {"cat": "cat"}}) == ["pet", "cow", "owl"]  # the owners differ: the entry for all
    assert rename({"t/owl": "bird", "s/cat": "pet"}) == ["cat", "cow", "bird"]  # the other way to spell an entry of one teacher
    assert rename({"t/owl": "wrong", "t": {"owl": "bird"}}) == ["cat", "cow", "bird"]


@pytest.mark.parametrize(
    ("label_map", "told"),
    [
        ({"news": {"a": "b"}}, False),  # of one teacher alone, whose name is no label
        ({"news/LABEL_0": "x"}, False),
        ({"LABEL_0": "x", "b": "y"}, False),
        ({"c": "d"}, True),
    ],
)
def test_a_warning_of_unknown_names_is_for_entries_that_nothing_has(product_log, label_map, told):
    tell_of_unknown(label_map, ["a", "b"], [{"name": "news", "labels": ["a", "LABEL_0"]}])
    assert ("neither these texts nor a teacher have a label" in product_log.text) is told


@pytest.mark.parametrize(("name", "content"), [("a.json", "[" * 100_000), ("a.yaml", "a: 2020-99-99\n"), ("a.json", "9" * 5000)])
def test_values_that_no_parser_can_hold_end_in_one_line(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match="cannot be read"):
        read_label_map(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_options(path)
    (tmp_path / "a.jsonl").write_text(f'{{"text": {"9" * 5000}}}\n')
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        read_texts(tmp_path / "a.jsonl")


def test_names_that_differ_in_outer_blanks_are_told(product_log):
    build_label_space([("a", ["sport"]), ("b", ["sport "])])
    assert "'sport' and 'sport '" in product_log.text


def test_the_order_of_a_label_map_changes_nothing():
    teachers = [("t", ["owl", "cat"])]
    for entries in ([("t/owl", "wrong"), ("t", {"owl": "bird"})], [("t", {"owl": "bird"}), ("t/owl", "wrong")]):
        assert build_label_space(teachers, dict(entries)).names == ("bird", "cat")


def test_half_a_surrogate_pair_in_a_map_becomes_the_replacement_character():
    assert read_label_map({"caf\ud83d": "b\ud83d"}) == {"caf\ufffd": "b\ufffd"}
