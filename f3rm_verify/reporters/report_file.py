"""Writing the file of a report in one step: a reader sees the whole file or the one before."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

from f3rm_verify.errors import UsageError


def write_report(path: Path, content: bytes, *, what: str) -> None:
    """Writes `what` ("the result file"); raises UsageError where it cannot be written."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: {what} cannot replace what is no regular file; name another file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, content)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path}: {what} cannot be written ({reason}); name another file.") from error


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
