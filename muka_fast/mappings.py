"""JSON and YAML files that a user writes: a mapping, no key twice in it, or one line that says what is wrong and where."""

import copy
import json
from pathlib import Path
from typing import Any

import yaml

from muka_fast.errors import UserError


class UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which would take the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key = str(self.construct_object(key_node))  # 0 and '0' are one label, one option
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is there twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of json.loads."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"the key '{next(name for name in names if names.count(name) > 1)}' is there twice")
    return found


Source = str | Path | dict[Any, Any]  # a file, or what it would hold


def told(option: str, source: Source) -> str:
    """What errors call it."""
    return option if isinstance(source, dict) else f"{option} {source}"


def read_mapping(option: str, source: Source, expected: str, as_json: bool = False, may_be_empty: bool = False) -> dict[Any, Any]:
    """The mapping in a JSON or YAML file, or a copy of a given one.

    option: what names the file on the command line, for the errors; expected: what they ask for. as_json: JSON whatever the file is
    called, else by the suffix .json. may_be_empty: a file that holds nothing is {}, not refused.

    Raises:
        UserError: no such file, not UTF-8, neither JSON nor YAML, a key twice, not a mapping.
    """
    if isinstance(source, dict):
        return copy.deepcopy(source)
    path, what = Path(source), told(option, source)
    as_json = as_json or path.suffix == ".json"
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=unique_keys) if as_json else yaml.load(text, UniqueKeys)
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}") from error
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{what}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{what}{where}: not valid YAML ({getattr(error, 'problem', None) or error})") from error
    except (ValueError, RecursionError) as error:  # an impossible date, thousands of digits, endless brackets
        raise UserError(f"{what}: holds a value that cannot be read ({type(error).__name__})") from error
    if content is None and may_be_empty:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{what}: must hold {expected}, found {type(content).__name__}")
    return content
