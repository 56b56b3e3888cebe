"""The result file: what `--json` writes and what `report` reads back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from f3rm_verify.difference import SCHEMA_VERSION, Result
from f3rm_verify.errors import UsageError
from f3rm_verify.reporters.report_file import write_report

#: A larger file is refused: a tree of a million nodes needs about two thirds of it.
MAX_BYTES = 512 * 2**20
#: Lists and objects inside each other; a level of the tree takes two, ours stay below 20.
MAX_DEPTH = 100

#: What the types of JSON are in Python. `type(...) is`, not isinstance: true is no number here.
_TYPES: Mapping[str, type] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "null": type(None),
}


def schema_text() -> str:
    """The JSON Schema (draft 2020-12) of the result file: the one place that says what it holds."""
    return (resources.files("f3rm_verify.reporters") / "schema" / f"result-{SCHEMA_VERSION}.json").read_text("utf8")


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
    """Refuses what `Result.from_dict` would take although it is none that the schema describes."""
    schema = json.loads(schema_text())
    # The version first: another version may have other keys, and the person should hear about the version.
    if isinstance(data, dict) and (key := "schema_version") in data:
        _check(data[key], schema["properties"][key], key, schema)
    _check(data, schema, "the file", schema)


def _check(value: Any, rule: Mapping[str, Any], where: str, schema: Mapping[str, Any]) -> None:
    """Holds `value` to a rule of our schema, by the words that the schema uses; a test holds it to these words."""
    if "$ref" in rule:
        rule = schema["$defs"][rule["$ref"].rpartition("/")[2]]
    allowed = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    if (kind := _kind(value)) not in allowed:
        raise TypeError(f"{where} is {kind}, expected {' or '.join(allowed)}")
    if value not in rule.get("enum", [value]):
        raise ValueError(f"{where} is {value!r}, expected one of {', '.join(rule['enum'])}")
    if value != rule.get("const", value):
        raise ValueError(f"{where} is {value!r}, this version reads {rule['const']}")
    if isinstance(value, list) and "items" in rule:
        for item in value:
            _check(item, rule["items"], f"an item of {where}", schema)
    if isinstance(value, dict) and "properties" in rule:
        _check_keys(value, rule, where)
        for key, item in value.items():
            _check(item, rule["properties"][key], key, schema)


def _check_keys(value: Mapping[str, Any], rule: Mapping[str, Any], where: str) -> None:
    for key in rule["required"]:
        if key not in value:
            raise KeyError(key)
    for key in value:
        if key not in rule["properties"]:
            raise ValueError(f"{where} has the unknown key {key!r}")


def _kind(value: Any) -> str:
    return next(name for name, kind in _TYPES.items() if type(value) is kind)


def _no_result(path: Path, reason: str) -> UsageError:
    # A reason may quote the file, which may be anything: one short line of it is enough.
    reason = reason if len(reason) <= 200 else f"{reason[:200]}..."
    return UsageError(f"{path} is no result file ({reason}); give the file that --json wrote.")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
