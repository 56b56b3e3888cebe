"""Opens files of a run directory: plain ones only, without waiting for a pipe, and never memory-mapped.

A mapped file that somebody truncates kills the process that looks at it (SIGBUS); a read merely ends too early.
"""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path
from typing import BinaryIO

from f3rm_verify.errors import UnreadableError

_PIECE = 2**30  # one call of the system reads less than 2 GiB


def open_plain(path: Path, *, limit: int | None = None) -> BinaryIO:
    """The plain file at `path`, open for reading; UnreadableError for anything else, and above `limit` bytes.

    What it is is asked of the open file, so it does not help to put a pipe or a link in its place in between.
    """
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | os.O_NOFOLLOW
        stream = os.fdopen(os.open(path.resolve(), flags), "rb")
    except (OSError, RuntimeError) as error:
        reason = "not a regular file" if path.is_dir() else f"not readable ({getattr(error, 'strerror', '') or error})"
        raise UnreadableError(f"{path.name}: {reason}.") from error
    status = os.fstat(stream.fileno())
    if stat.S_ISREG(status.st_mode) and (limit is None or status.st_size <= limit):
        return stream
    stream.close()
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableError(f"{path.name}: not a regular file.")
    raise UnreadableError(f"{path.name}: {status.st_size} bytes are more than the {limit} that are read.")


def read_plain(path: Path, *, limit: int) -> bytes:
    """All of the plain file at `path`; UnreadableError where it cannot be read or has more than `limit` bytes."""
    with open_plain(path, limit=limit) as stream:
        try:
            data = stream.read(limit + 1)
        except OSError as error:
            raise UnreadableError(f"{path.name}: not readable ({error.strerror or error}).") from error
    if len(data) > limit:
        raise UnreadableError(f"{path.name}: it grew beyond {limit} bytes while it was read.")
    return data


class FileBytes:
    """The bytes of a file, read when they are asked for. Open for as long as anybody has this."""

    def __init__(self, path: Path) -> None:
        with open_plain(path) as stream:
            self._file = os.dup(stream.fileno())
        weakref.finalize(self, os.close, self._file)
        self.name = path.name
        self.size = os.fstat(self._file).st_size

    def read(self, start: int, length: int) -> bytes:
        """The bytes from `start` on; UnreadableError where the file has become shorter since it was opened."""
        parts, left = [], max(0, min(length, self.size - start))
        while left:
            try:
                part = os.pread(self._file, min(left, _PIECE), start)
            except OSError as error:
                raise UnreadableError(f"{self.name}: not readable ({error.strerror or error}).") from error
            if not part:
                raise UnreadableError(f"{self.name}: it was cut off while it was read.")
            parts.append(part)
            start += len(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def stream(self) -> BinaryIO:
        """The same file for who reads it in order; to be closed."""
        return os.fdopen(os.dup(self._file), "rb")
