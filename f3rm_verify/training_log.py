"""The log of a training, as far as a person should see it when the training fails."""

from __future__ import annotations

import os
import re
from pathlib import Path

_LINES = 15
_BYTES = 64 * 1024
_LINE_LENGTH = 300
#: What torch.multiprocessing says of the process that failed, with or without an exception; it then ends the others.
_RANK_ENDED = re.compile(r"^(?:torch\S+: process|-- Process) (\d{1,6}) terminated with ", re.MULTILINE)
#: How our own code says why it ends a training: itself, or in the last line of a stack of frames.
_TOLD = re.compile(r"(?:f3rm-verify|f3rm_verify\.errors\.\w+): (.+)")
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


def told_reason(log: Path) -> str | None:
    """The sentence with which our own code ended the training, None where something else did: it is the last line."""
    try:
        lines = [line for line in _ESCAPES.sub("", _tail(log, None)).splitlines() if line.strip()]
    except OSError:
        return None
    told = _TOLD.fullmatch(lines[-1].strip()) if lines else None
    return None if told is None else told[1]


def broken_rank(log: Path) -> int | None:
    """The rank whose process ended first, by what torch's launcher says of it; None where it says nothing."""
    try:
        said = _RANK_ENDED.findall(_tail(log, None))
    except OSError:
        return None
    return int(said[-1]) if said else None


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
