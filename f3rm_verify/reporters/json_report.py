"""The result file: what `--json` writes and what `report` reads back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from f3rm_verify.difference import SCHEMA_VERSION, Result, Verdict
from f3rm_verify.errors import UsageError
from f3rm_verify.reporters.report_file import write_report

#: A larger file is refused: a tree of a million nodes needs about two thirds of it.
MAX_BYTES = 512 * 2**20
#: Lists and objects inside each other; a level of the tree takes two, ours stay below 20.
MAX_DEPTH = 100

_NULL = type(None)
_RESULT_TYPES: Mapping[str, tuple[type, ...]] = {
    "tool": (dict,),
    "verdict": (str,),
    "exit_code": (int,),
    "reasons": (list,),
    "reference": (dict,),
    "candidate": (dict,),
    "candidates": (list,),
    "pairs": (int,),
    "steps": (int, _NULL),
    "not_recorded": (list,),
    "policy": (dict,),
    "first_divergence": (dict, _NULL),
    "control": (dict, _NULL),
    "seeding": (dict,),
    "root": (dict,),
}
_FIRST_TYPES: Mapping[str, tuple[type, ...]] = {
    "rank": (int,),
    "step": (int, _NULL),
    "last_equal_step": (int, _NULL),
    "stage": (str, _NULL),
    "subject": (str,),
    "operator": (str, _NULL),
    "cause": (str,),
    "remedy": (str,),
    "evidence": (list,),
    "growth": (dict,),
    "reproduce": (str,),
}
_NODE_TYPES: Mapping[str, tuple[type, ...]] = {
    "name": (str,),
    "artefact": (str,),
    "verdict": (str,),
    "summary": (str,),
    "measures": (dict,),
    "children": (list,),
}


def write_json(result: Result, path: Path) -> None:
    """Writes the result file in one step: a reader sees the whole file or the one before.

    The same result gives the same bytes. Raises UsageError where the file cannot be written.
    """
    # ASCII, because file names that are not UTF-8 arrive here as lone surrogates, which no UTF-8 file can hold.
    text = json.dumps(result.to_dict(), indent=1, allow_nan=False, ensure_ascii=True) + "\n"
    write_report(path, text.encode("ascii"), what="the result file")


def read_json(path: Path) -> Result:
    """The result in a file that `write_json` wrote; raises UsageError for every other file."""
    data = _parse(path)
    try:
        _check_values(data)
        _check_shape(data)
        result = Result.from_dict(data)
        if data["exit_code"] != result.outcome.exit_code:
            raise ValueError(f"exit_code {data['exit_code']} does not belong to {result.outcome.value}")
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise _no_result(path, reason) from error
    return result


def _parse(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():
            raise _no_result(path, "not a regular file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist; give the file that --json wrote.") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise UsageError(f"{path} cannot be read ({_reason(error)}); give the file that --json wrote.") from error
    if len(content) > MAX_BYTES:
        raise _no_result(path, f"larger than {MAX_BYTES} bytes")
    try:
        return json.loads(content, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise _no_result(path, "nested too deeply") from error
    except ValueError as error:
        raise _no_result(path, f"not JSON: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with each key once, so that two readers cannot see two verdicts in one file."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _check_values(data: Any) -> None:
    """Bounds the depth before anything recurses, and refuses numbers that overflow to infinity (1e999)."""
    stack: list[tuple[Any, int]] = [(data, 1)]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a number is out of range")
        if isinstance(value, (dict, list)):
            if depth > MAX_DEPTH:
                raise ValueError("nested too deeply")
            items = value.values() if isinstance(value, dict) else value
            stack.extend((item, depth + 1) for item in items)


def _check_shape(data: Any) -> None:
    """Refuses what `Result.from_dict` would take although it has other types than a result."""
    if not isinstance(data, dict):
        raise TypeError(f"holds {_kind(data)}, not an object")
    # The version first: another version may have other keys, and the person should hear about the version.
    _check_types(data, {"schema_version": (int,)}, "")
    if data["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {data['schema_version']}, this version reads {SCHEMA_VERSION}")
    _check_types(data, _RESULT_TYPES, "")
    for key in ("reasons", "not_recorded"):
        _check_items(key, data[key], str)
    _check_items("candidates", data["candidates"], dict)
    if data["first_divergence"] is not None:
        _check_types(data["first_divergence"], _FIRST_TYPES, "first_divergence.")
        _check_items("first_divergence.evidence", data["first_divergence"]["evidence"], str)
    for node in _nodes(data["root"]):
        _check_types(node, _NODE_TYPES, "root: ")
        Verdict(node["verdict"])
        _check_items("children", node["children"], dict)


def _nodes(root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every node of the tree, each before its children are looked at."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node["children"])


def _check_types(data: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], where: str) -> None:
    for key, allowed in types.items():
        if key not in data:
            raise KeyError(f"{where}{key}")
        _check_type(f"{where}{key}", data[key], allowed)


def _check_items(name: str, items: list[Any], allowed: type) -> None:
    for item in items:
        _check_type(f"an item of {name}", item, (allowed,))


def _check_type(name: str, value: Any, allowed: tuple[type, ...]) -> None:
    # `type(...) in`, not isinstance: true is no number here.
    if type(value) not in allowed:
        expected = " or ".join("null" if item is _NULL else item.__name__ for item in allowed)
        raise TypeError(f"{name} is {_kind(value)}, expected {expected}")


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _no_result(path: Path, reason: str) -> UsageError:
    # A reason may quote the file, which may be anything: one short line of it is enough.
    reason = reason if len(reason) <= 200 else f"{reason[:200]}..."
    return UsageError(f"{path} is no result file ({reason}); give the file that --json wrote.")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
