"""Writes a trace: what a training did, step by step, as digests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from f3rm_verify.errors import TrainingError
from f3rm_verify.recorder import write_json
from f3rm_verify.run_dir import TRACE, TRACE_RECORDS
from f3rm_verify.trace_format import CONSUMERS, MAX_SUBJECTS, TRACE_VERSION, frame

#: One record: stage, subject, what its value is (see `trace_format`), the value as 64 bits.
Record = tuple[str, str, str, int]


class TraceWriter:
    """Appends frames to the trace of one training process. Frames wait in memory until `flush`.

    Raises TrainingError where the trace cannot be written: evidence must not be lost in silence.
    """

    def __init__(self, run: Path, *, mode: str, algorithm: str) -> None:
        self._run = run
        self._subjects: dict[tuple[str, str, str], int] = {}
        self._frames: list[bytes] = []
        self._written_subjects = -1
        self._head: dict[str, Any] = {
            "schema_version": TRACE_VERSION,
            "algorithm": algorithm,
            "mode": mode,
            "not_recorded": {},
            "complete": False,
            "frames": None,
            "consumers": CONSUMERS,
        }
        self._count = 0
        with _explained():
            (run / TRACE_RECORDS).parent.mkdir(parents=True, exist_ok=True)
            (run / TRACE_RECORDS).write_bytes(b"")
        self.flush()

    def add(self, kind: int, step: int, records: Sequence[Record]) -> None:
        """Adds a frame; the same stage and subject at most once in it."""
        ids = [self._subject(stage, name, what) for stage, name, what, _ in records]
        self._frames.append(frame(kind, step, ids, [value for *_, value in records]))
        self._count += 1

    def _subject(self, *key: str) -> int:
        number = self._subjects.setdefault(key, len(self._subjects))  # type: ignore[arg-type]
        if number >= MAX_SUBJECTS:
            raise TrainingError(
                f"This training has more than {MAX_SUBJECTS:,} differently named things to record; train with "
                "--trace steps or --trace off."
            )
        return number

    def flush(self) -> None:
        """Puts on disk what was added: first the names, then the frames that use them."""
        frames, self._frames = b"".join(self._frames), []
        with _explained():
            if self._written_subjects != len(self._subjects):
                self._write_head()
            if frames:
                with (self._run / TRACE_RECORDS).open("ab") as file:
                    file.write(frames)

    def close(self, not_recorded: Mapping[str, str], *, complete: bool) -> None:
        """Writes what is left, which stages could not be recorded and why, and whether this is the whole trace."""
        self._head |= {"not_recorded": dict(not_recorded), "complete": complete, "frames": self._count}
        self.flush()
        with _explained():
            self._write_head()

    def _write_head(self) -> None:
        subjects = [{"stage": stage, "name": name, "kind": kind} for stage, name, kind in self._subjects]
        write_json(self._run / TRACE, {**self._head, "subjects": subjects})
        self._written_subjects = len(subjects)


class _explained:
    """Inside, a file that cannot be written ends in a TrainingError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, OSError):
            raise TrainingError(
                f"The trace cannot be written ({error.strerror or error}); free some space, or train with --trace off."
            ) from error
