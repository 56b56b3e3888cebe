"""Reads config.yml as plain data: its Python tags become names, nothing that they name is imported or constructed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from f3rm_verify.errors import UnreadableError
from f3rm_verify.readers.plain_file import read_plain

#: A config of nerfstudio has some 10 KiB, 500 nodes and 8 levels. PyYAML takes seconds for a MiB.
MAX_BYTES = 2**20
MAX_NODES = 50_000
MAX_DEPTH = 100
#: Characters of a number: the time to convert one grows with their square.
MAX_NUMBER = 1000

#: The key under which a mapping made from a tagged node holds the tag's name.
TAG = "!"
_STANDARD = "tag:yaml.org,2002:"
_PATH_TAGS = tuple(
    f"python/object/apply:{module}.{name}"
    for module in ("pathlib", "pathlib._local")
    for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
)


def read_config(path: Path) -> Any:
    """The file as dicts with string keys, lists, strings, numbers, booleans and None.

    Keys that are no strings (1, null) become "!1", "!null". A tagged mapping gets the key "!" with the tag's name
    (`python/object:nerfstudio.engine.trainer.TrainerConfig`); of other tagged nodes, `python/name:M.N` becomes
    {"!": "python/name:M.N"}, tuples become lists, paths strings, the rest {"!": tag, "args": list} or {"!": tag,
    "value": str}. Aliases are expanded. Raises UnreadableError where the file is no YAML, refers to itself, or is
    larger expanded than any config.
    """
    name = path.name
    content = read_plain(path, limit=MAX_BYTES)
    try:
        node = _compose(content.decode("utf-8"))
        return None if node is None else _Expander().plain(node)
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UnreadableError(f"{name}: not readable as YAML ({' '.join(str(error).split())}).") from error
    except _RefusedError as error:
        raise UnreadableError(f"{name}: {error}.") from error


def flatten(data: Any) -> dict[str, Any]:
    """Every scalar of plain data by its path: `pipeline.model.levels[0]`.

    Different data never give equal results: dots, brackets, braces and backslashes in keys are escaped, and an empty
    list or mapping is None at a path that ends with `[]` or `{}`. Compare the values together with their types
    (1 == True == 1.0 in Python) and NaN as NaN. Raises UnreadableError where there are too many, or too deep.
    """
    flat: dict[str, Any] = {}
    for path, value in _leaves(data, "", 0):
        flat[path] = value
        if len(flat) > MAX_NODES:
            raise UnreadableError(f"the config has more than {MAX_NODES} values.")
    return flat


def _leaves(data: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH:
        raise UnreadableError(f"the config is nested deeper than {MAX_DEPTH} levels, at {path[:100]}.")
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from _leaves(value, f"{path}.{_escaped(key)}" if path else _escaped(key), depth + 1)
    elif isinstance(data, (list, tuple)) and data:
        for index, value in enumerate(data):
            yield from _leaves(value, f"{path}[{index}]", depth + 1)
    elif isinstance(data, (dict, list, tuple)):
        yield path + ("{}" if isinstance(data, dict) else "[]"), None
    else:
        yield path, data


def _escaped(key: Any) -> str:
    escaped = "".join(f"\\{char}" if char in ".[]{}\\" else char for char in str(key))
    return escaped or "\\"  # an empty key would leave the path as it was


class _RefusedError(Exception):
    """What the file holds is YAML, but no config; the message completes the sentence "config.yml: ..."."""


class _Composer(yaml.SafeLoader):
    """Composes nodes and constructs nothing; bounded, because aliases and nesting cost an attacker a few bytes."""

    n_nodes = 0
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.n_nodes += 1
        self.depth += 1
        if self.n_nodes > MAX_NODES:
            raise _RefusedError(f"more than {MAX_NODES} values are no config of nerfstudio")
        if self.depth > MAX_DEPTH:
            raise _RefusedError(f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(text: str) -> Any:
    composer = _Composer(text)
    try:
        return composer.get_single_node()
    finally:
        composer.dispose()


class _Expander:
    """Turns nodes into plain data and counts what it makes, so that aliases of aliases end at a bound."""

    def __init__(self) -> None:
        self.n_values = 0
        self.open: set[int] = set()
        self.scalars = yaml.constructor.SafeConstructor()

    def plain(self, node: Any) -> Any:
        """The data of a node and of everything below it."""
        self.n_values += 1
        if self.n_values > MAX_NODES:
            raise _RefusedError(f"its aliases expand to more than {MAX_NODES} values")
        if id(node) in self.open:
            raise _RefusedError("an alias in it refers to what contains it")
        if len(self.open) > MAX_DEPTH:
            raise _RefusedError(f"nested deeper than {MAX_DEPTH} levels")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node)
            if isinstance(node, yaml.SequenceNode):
                return self._sequence(node)
            return self._scalar(node)
        finally:
            self.open.remove(id(node))

    def _mapping(self, node: Any) -> dict[str, Any]:
        tag = _tag_name(node)
        data: dict[str, Any] = {} if tag == "map" else {TAG: tag}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key in data:
                raise _RefusedError(f"it has the key {key[:100]!r} twice in one mapping")
            data[key] = self.plain(value_node)
        return data

    def _key(self, node: Any) -> str:
        key = self.plain(node)
        if not isinstance(key, str):
            return TAG + json.dumps(key, sort_keys=True)
        if key.startswith(TAG):  # it could pass for a tag
            raise _RefusedError(f"it has a key that begins with {TAG!r}")
        return key

    def _sequence(self, node: Any) -> Any:
        tag = _tag_name(node)
        items = [self.plain(item) for item in node.value]
        if tag in ("seq", "python/tuple", "python/list"):
            return items
        if tag in _PATH_TAGS and all(isinstance(item, str) for item in items):
            return str(PurePosixPath(*items))
        return {TAG: tag, "args": items}

    def _scalar(self, node: Any) -> Any:
        tag = _tag_name(node)
        node.value.encode()  # an escape can name half of a character, which no report could write
        if tag in ("int", "float") and len(node.value) > MAX_NUMBER:
            raise _RefusedError(f"it has a number of {len(node.value)} characters")
        if tag == "null":
            return None
        if tag == "bool":
            return self.scalars.construct_yaml_bool(node)
        if tag == "int":
            return self.scalars.construct_yaml_int(node)
        if tag == "float":
            return self.scalars.construct_yaml_float(node)
        # A date, a merge key or a lone "=" is a string to nerfstudio's configs; so they stay as they are written.
        if tag in ("str", "timestamp", "merge", "value"):
            return node.value
        return {TAG: tag, "value": node.value} if node.value else {TAG: tag}


def _tag_name(node: Any) -> str:
    tag: str = node.tag
    return tag.removeprefix(_STANDARD)
