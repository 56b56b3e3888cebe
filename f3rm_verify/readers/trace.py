"""Reads a trace as arrays; nothing in its two files is believed before it is checked."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from f3rm_verify.difference import STAGES
from f3rm_verify.errors import UnreadableError
from f3rm_verify.readers.plain_file import open_plain
from f3rm_verify.trace_format import (
    BEFORE_TRAINING,
    CHECKSUM,
    DIGEST,
    HEAD,
    MAX_SUBJECTS,
    NUMBERS,
    RECORD_BYTES,
    STEP,
    TRACE_VERSION,
)

#: More than any training leaves: 1,000,000 steps of 400 subjects. Read, it takes as much memory as on disk.
MAX_BYTES = 4 * 2**30
_MAX_NAME = 500
_HEAD_NAME, _RECORDS_NAME = "trace.json", "trace.bin"


@dataclass(frozen=True)
class Subject:
    """One thing that is looked at in every step. `kind` is "digest", or the float type whose bits are the values."""

    stage: str
    name: str
    kind: str = DIGEST


@dataclass(frozen=True, eq=False)
class Trace:
    """A trace as it was read, in the order in which things happened.

    Frame i has the records `ends[i - 1]` to `ends[i]`, subjects (indices into `subjects`) and values; its step is
    `steps[i]` (0-based), and `is_step[i]` says whether it is a step or what was before the first one. `problem` says
    why trace.bin could not be read to its end, None where it could. `consumers` says who stands behind the phases
    that the subjects of generators name.
    """

    algorithm: str
    mode: str
    not_recorded: Mapping[str, str]
    consumers: Mapping[str, str]
    complete: bool
    subjects: tuple[Subject, ...]
    steps: npt.NDArray[np.int64]
    is_step: npt.NDArray[np.bool_]
    ends: npt.NDArray[np.int64]
    record_subjects: npt.NDArray[np.uint16]
    values: npt.NDArray[np.uint64]
    problem: str | None

    def frame_records(self, index: int) -> list[tuple[Subject, int]]:
        """The records of one frame in causal order, each with its 64 bits."""
        start, end = (int(self.ends[index - 1]) if index else 0), int(self.ends[index])
        pairs = zip(self.record_subjects[start:end].tolist(), self.values[start:end].tolist(), strict=True)
        return [(self.subjects[subject], value) for subject, value in pairs]


def read_trace(head: Mapping[str, Any], records: Path | None) -> Trace:
    """Reads the frames to which `head`, trace.json, belongs. Raises UnreadableError where they cannot be a trace."""
    version = head.get("schema_version")
    if version != TRACE_VERSION:
        raise UnreadableError(
            f"{_HEAD_NAME}: has schema_version {str(version)[:20]!r}, and this version of f3rm-verify reads "
            f"{TRACE_VERSION}; compare with the version that wrote it."
        )
    subjects = _subjects(head.get("subjects"))
    if records is None:
        raise UnreadableError(f"{_RECORDS_NAME}: is missing beside {_HEAD_NAME}.")
    frames = _Frames(len(subjects))
    problem = frames.read(records)
    complete = head.get("complete") is True
    if problem is None and complete and head.get("frames") != len(frames.steps):
        problem = f"{_RECORDS_NAME}: has {len(frames.steps)} frames, and {_HEAD_NAME} speaks of another number."
    return Trace(
        algorithm=_text(head, "algorithm"),
        mode=_text(head, "mode"),
        not_recorded=_texts(head, "not_recorded"),
        consumers=_texts(head, "consumers"),
        complete=complete,
        subjects=subjects,
        steps=np.array(frames.steps, np.int64),
        is_step=np.array(frames.kinds, np.int64) == STEP,
        ends=np.cumsum(np.array(frames.counts, np.int64)),
        record_subjects=np.frombuffer(frames.subjects, "<u2").astype(np.uint16, copy=False),
        values=np.frombuffer(frames.values, "<u8").astype(np.uint64, copy=False),
        problem=problem,
    )


class _Frames:
    """The frames as far as they can be read."""

    def __init__(self, n_subjects: int) -> None:
        self._n_subjects = n_subjects
        self._checked = b""
        self.kinds: list[int] = []
        self.steps: list[int] = []
        self.counts: list[int] = []
        self.subjects = bytearray()
        self.values = bytearray()

    def read(self, path: Path) -> str | None:
        """Reads frame by frame; returns why it stopped before the end, None where it did not."""
        try:
            with open_plain(path, limit=MAX_BYTES) as stream:
                return self._read(stream, os.fstat(stream.fileno()).st_size)
        except (OSError, ValueError) as error:
            raise UnreadableError(f"{_RECORDS_NAME}: not readable ({error}).") from error

    def _read(self, stream: BinaryIO, size: int) -> str | None:
        at = 0
        while at < size:
            head = stream.read(CHECKSUM.size + HEAD.size)
            if len(head) < CHECKSUM.size + HEAD.size:
                return self._ends_inside()
            kind, count, step = HEAD.unpack_from(head, CHECKSUM.size)
            end = at + len(head) + count * RECORD_BYTES
            if end > size:
                return self._ends_inside()
            body = head[CHECKSUM.size :] + stream.read(count * RECORD_BYTES)
            if zlib.crc32(body) != CHECKSUM.unpack_from(head)[0]:
                return f"{_RECORDS_NAME}: damaged at byte {at}; {self._so_far} before it were read, nothing after it."
            fault = self._fault(kind, step, body[HEAD.size : HEAD.size + 2 * count])
            if fault is not None:
                return f"{_RECORDS_NAME}: the frame at byte {at} {fault}; {self._so_far} before it were read."
            self.kinds.append(kind)
            self.steps.append(step)
            self.counts.append(count)
            self.subjects += body[HEAD.size : HEAD.size + 2 * count]
            self.values += body[HEAD.size + 2 * count :]
            at = end
        return None

    def _fault(self, kind: int, step: int, subjects: bytes) -> str | None:
        """What is wrong with a frame that is whole: no training wrote it here."""
        if kind != (STEP if self.steps else BEFORE_TRAINING) or step < 0:
            return "stands where it cannot"
        previous = self.steps[-1] if self.steps else 0
        if step < previous + (len(self.steps) > 1):
            return f"is of step {step} and follows step {previous}"
        if subjects != self._checked:  # most frames have the subjects of the one before
            numbers = np.frombuffer(subjects, "<u2")
            if numbers.size and int(numbers.max()) >= self._n_subjects:
                return f"names something that {_HEAD_NAME} does not know"
            if np.unique(numbers).size != numbers.size:
                return "has two records of one thing"
            self._checked = subjects
        return None

    @property
    def _so_far(self) -> str:
        return f"the {len(self.steps)} frames"

    def _ends_inside(self) -> str:
        return (
            f"{_RECORDS_NAME}: ends in the middle of a frame, as a killed run leaves it; {self._so_far} before it "
            "were read."
        )


def _subjects(table: Any) -> tuple[Subject, ...]:
    if not isinstance(table, list) or len(table) > MAX_SUBJECTS:
        raise UnreadableError(f"{_HEAD_NAME}: has no table of subjects, or one that is too long.")
    subjects = tuple(_subject(entry) for entry in table)
    if len({(subject.stage, subject.name) for subject in subjects}) != len(subjects):
        raise UnreadableError(f"{_HEAD_NAME}: names a subject twice.")
    return subjects


def _subject(entry: Any) -> Subject:
    stage, name, kind = (entry.get(key) if isinstance(entry, dict) else None for key in ("stage", "name", "kind"))
    if stage not in STAGES or kind not in (DIGEST, *NUMBERS) or not isinstance(name, str) or len(name) > _MAX_NAME:
        raise UnreadableError(f"{_HEAD_NAME}: a subject is {str(entry)[:100]!r}, which cannot be read.")
    return Subject(stage, name, kind)


def _text(head: Mapping[str, Any], key: str) -> str:
    value = head.get(key)
    if not isinstance(value, str) or len(value) > _MAX_NAME:
        raise UnreadableError(f"{_HEAD_NAME}: has no {key}.")
    return value


def _texts(head: Mapping[str, Any], key: str) -> Mapping[str, str]:
    value = head.get(key)
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise UnreadableError(f"{_HEAD_NAME}: {key} is no table of texts.")
    return value
