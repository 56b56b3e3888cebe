"""The log of a training, as far as a person should see it when the training fails."""

from __future__ import annotations

import os
import re
from pathlib import Path

_LINES = 15
_BYTES = 64 * 1024
_LINE_LENGTH = 300
#: Escape sequences of terminals: CSI (colours, cursor), OSC (titles, links), and those of two or three characters.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])|\x9b[0-?]*[ -/]*[@-~]")


def last_lines(log: Path, *, until: str | None = None, count: int = _LINES) -> str:
    """The last lines of a log, up to the last one with `until` in it where there is one; without control characters."""
    try:
        text = _tail(log, None if until is None else until.encode())
    except OSError as error:
        return f"  (the log cannot be read: {error.strerror or error})"
    lines = [_clean(line) for line in _ESCAPES.sub("", text).replace("\r", "\n").split("\n")]
    return "\n".join(f"  {line}" for line in [line for line in lines if line][-count:]) or "  (the log is empty)"


def _tail(log: Path, until: bytes | None) -> str:
    with log.open("rb") as file:
        end = _end_of_line_with(log, until) if until is not None else None
        end = file.seek(0, os.SEEK_END) if end is None else end
        file.seek(max(0, end - _BYTES))
        return file.read(min(end, _BYTES)).decode("utf8", "replace")


def _end_of_line_with(log: Path, text: bytes) -> int | None:
    """Where the last line that holds `text` ends; None where there is none."""
    end, position = None, 0
    with log.open("rb") as file:
        for line in file:
            position += len(line)
            if text in line:
                end = position
    return end


def _clean(line: str) -> str:
    shown = "".join(character for character in line.expandtabs(4) if character.isprintable()).rstrip()
    return shown if len(shown) <= _LINE_LENGTH else f"{shown[: _LINE_LENGTH - 3]}..."
