"""Reads JSON that anybody may have written: each key once, bounded size and depth."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f3rm_verify.errors import UsageError

#: Lists and objects inside each other; a level of a result's tree takes two, ours stay below 20.
MAX_DEPTH = 100
_MAX_REASON = 200


def parse_json(text: str | bytes, *, finite: bool) -> Any:
    """The plain data; with `finite`, of numbers that JSON knows and a float holds. Raises ValueError with a reason."""
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    stack: list[tuple[Any, int]] = [(data, 1)]
    while stack:
        value, depth = stack.pop()
        if finite and isinstance(value, float) and not math.isfinite(value):  # NaN, Infinity, 1e999
            raise ValueError("a number is out of range")
        if isinstance(value, (dict, list)):
            if depth > MAX_DEPTH:
                raise ValueError("nested too deeply")
            items = value.values() if isinstance(value, dict) else value
            stack.extend((item, depth + 1) for item in items)
    return data


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with each key once, so that two readers cannot see two verdicts in one file."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


@dataclass(frozen=True, kw_only=True)
class JsonFileKind:
    """A kind of JSON file that a person names, as `what` ("result file"), and in words how to come by one."""

    what: str
    remedy: str
    max_bytes: int

    def read(self, path: Path) -> Any:
        """The plain data in such a file; raises UsageError where it cannot be had."""
        try:
            if path.exists() and not path.is_file():
                raise self.refused(path, "not a regular file")
            with path.open("rb") as file:
                content = file.read(self.max_bytes + 1)
        except FileNotFoundError as error:
            raise UsageError(f"{path} does not exist; {self.remedy}.") from error
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(f"{path} cannot be read ({reason}); {self.remedy}.") from error
        if len(content) > self.max_bytes:
            raise self.refused(path, f"larger than {self.max_bytes} bytes")
        try:
            return parse_json(content, finite=True)
        except ValueError as error:
            raise self.refused(path, f"not JSON: {error}") from error

    def refused(self, path: Path, reason: str) -> UsageError:
        """That this file is none; a reason may quote the file, which may be anything, so it is cut to a short line."""
        reason = " ".join(reason.split())
        reason = reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}..."
        return UsageError(f"{path} is no {self.what} ({reason}); {self.remedy}.")
