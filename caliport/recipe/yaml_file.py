"""YAML of strangers: plain values of bounded size and depth, each key once and a name."""

from __future__ import annotations

from typing import Any

import yaml

from caliport.core.errors import InputError, one_line
from caliport.core.untrusted import shown

_VALUES = 20_000  # after references (*name) are followed; the largest recipe of ours has 300
_DEPTH = 32
_MERGE = "tag:yaml.org,2002:merge"
_STRING = "tag:yaml.org,2002:str"


def parse_yaml(text: str, where: object) -> Any:
    """The value of a YAML document: mappings, lists, text, numbers, true, false and null.

    Args:
        text: The document.
        where: What to name in messages: a file, or a flag.

    Raises:
        InputError: Not YAML, tags for anything else, too deep, too many values once references
            are followed, a key twice, or a key that is not a name.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _check(node, where)
        value = None if node is None else loader.construct_document(node)
    except RecursionError:
        raise InputError(f"{where}: nested too deep, expected at most {_DEPTH} levels") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: not YAML: {one_line(error, 300)}") from None
    except (AttributeError, LookupError, TypeError):  # PyYAML's, of !!timestamp x and !!bool x
        raise InputError(
            f"{where}: not YAML: a value does not fit its !!tag; leave it out"
        ) from None
    return _plain(value, where)


def _check(root: yaml.Node, where: object) -> None:
    """Look at every value as often as references name it, level by level."""
    level, count = [root], 0
    for _ in range(_DEPTH):
        below: list[yaml.Node] = []
        for node in level:
            if isinstance(node, yaml.MappingNode):
                _check_keys(node, where)
                below.extend(value for _, value in node.value)
            elif isinstance(node, yaml.SequenceNode):
                below.extend(node.value)
            if count + len(below) > _VALUES:
                raise InputError(f"{where}: more than {_VALUES:,} values; expected a recipe's")
        count += len(below)
        if not below:
            return
        level = below
    raise InputError(f"{where}: nested too deep, expected at most {_DEPTH} levels")


def _check_keys(node: yaml.MappingNode, where: object) -> None:
    seen = set()
    for key, _ in node.value:
        line = f"{where}, line {key.start_mark.line + 1}"
        if key.tag == _MERGE:
            continue
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{line}: a {key.id} as a key, expected a name")
        if key.tag != _STRING:
            kind = key.tag.rpartition(":")[2]
            raise InputError(f"{line}: the key {shown(key.value)} is a {kind}; put it into quotes")
        if key.value in seen:
            raise InputError(f"{line}: {shown(key.value)} is there twice, expected each key once")
        seen.add(key.value)


def _plain(value: Any, where: object) -> Any:
    """A copy in which nothing is shared, so that an override changes one place alone."""
    if isinstance(value, dict):
        return {key: _plain(each, where) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each, where) for each in value]
    if value is None or isinstance(value, str | int | float):
        return value
    kind = type(value).__name__
    raise InputError(
        f"{where}: {shown(str(value))} is a {kind}, expected text, a number, a list or a mapping; "
        "put text into quotes"
    )
