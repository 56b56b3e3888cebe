"""The result file: what `--json` writes and what `report` reads back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from f3rm_verify.difference import SCHEMA_VERSION, Result
from f3rm_verify.readers.json_file import JsonFileKind
from f3rm_verify.reporters.report_file import write_report

#: A larger file is refused: a tree of a million nodes needs about two thirds of it.
_KIND = JsonFileKind(what="result file", remedy="give the file that --json wrote", max_bytes=512 * 2**20)

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
    data = _KIND.read(path)
    try:
        _check_shape(data)
        result = Result.from_dict(data)
        if data["exit_code"] != result.outcome.exit_code:
            raise ValueError(f"exit_code {data['exit_code']} does not belong to {result.outcome.value}")
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise _KIND.refused(path, reason) from error
    return result


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
