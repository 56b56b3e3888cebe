"""Standard output and error that end nothing: whatever becomes of who reads them, a verdict keeps its exit code."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined,unused-ignore]


class Descriptor(io.FileIO):
    """A stream that remembers its first failure (a closed pipe, a full disk) and goes on as if it had none.

    Otherwise the first line after `| head` would end a training, or turn its verdict into another exit code.
    """

    failure: OSError | None = None

    def write(self, data: Buffer, /) -> int:
        """Writes as long as that works."""
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes


def unfailing(name: str) -> Descriptor | None:
    """Puts a Descriptor behind `sys.stdout` or `sys.stderr`, which then also shows every character in some way.

    None where the stream is closed, or somebody has replaced it (a test, a notebook).
    """
    stream: TextIO | None = getattr(sys, name)
    if stream is None or stream is not getattr(sys, f"__{name}__"):
        return None
    stream.flush()
    raw = Descriptor(stream.fileno(), "w", closefd=False)
    buffered = io.BufferedWriter(raw)
    encoding, by_line = stream.encoding, stream.isatty() or name == "stderr"
    text = io.TextIOWrapper(buffered, encoding=encoding, errors="backslashreplace", line_buffering=by_line)
    setattr(sys, name, text)
    return raw
