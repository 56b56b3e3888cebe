"""What the recorder knows is on disk when it says so, and never half of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from f3rm_verify import trace_writer as module
from f3rm_verify.errors import TrainingError
from f3rm_verify.run_dir import TRACE_RECORDS, RunDir
from f3rm_verify.trace_format import BEFORE_TRAINING, STEP, frame
from f3rm_verify.trace_writer import TraceWriter

RECORD = ("grad", "fields", "digest", 2**64 - 1)


def writer(path: Path) -> TraceWriter:
    return TraceWriter(path, mode="steps", algorithm="x")


def test_frames_wait_for_a_flush_and_what_was_flushed_can_be_read(tmp_path: Path) -> None:
    trace = writer(tmp_path)
    trace.add(BEFORE_TRAINING, 0, [])
    trace.add(STEP, 0, [RECORD])
    assert (tmp_path / TRACE_RECORDS).read_bytes() == b""
    trace.flush()
    trace.add(STEP, 1, [("loss", "rgb", "float32", 1)])
    read = RunDir(tmp_path).trace
    assert read is not None
    assert (read.steps.tolist(), read.complete, read.problem) == ([0, 0], False, None)
    assert read.values.tolist() == [2**64 - 1]
    trace.close({"batch": "none"}, complete=True)
    read = RunDir(tmp_path).trace
    assert read is not None
    assert (read.steps.tolist(), read.complete, read.problem) == ([0, 0, 1], True, None)
    assert read.not_recorded == {"batch": "none"}
    assert [subject.kind for subject in read.subjects] == ["digest", "float32"]


def test_an_older_trace_is_not_appended_to(tmp_path: Path) -> None:
    for _ in range(2):
        trace = writer(tmp_path)
        trace.add(BEFORE_TRAINING, 0, [RECORD])
        trace.close({}, complete=True)
    assert (tmp_path / TRACE_RECORDS).read_bytes() == frame(BEFORE_TRAINING, 0, [0], [2**64 - 1])


def test_a_full_disk_ends_the_training_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = writer(tmp_path)
    trace.add(BEFORE_TRAINING, 0, [RECORD])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(
        TrainingError, match=r"trace cannot be written \(No space left on device\); free some space, or"
    ):
        trace.flush()
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="trace cannot be written"):
        writer(tmp_path / "file")


def test_more_names_than_a_trace_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SUBJECTS", 1)
    trace = writer(tmp_path)
    trace.add(BEFORE_TRAINING, 0, [RECORD])
    with pytest.raises(TrainingError, match="more than 1 differently named"):
        trace.add(STEP, 0, [RECORD, ("grad", "other", "digest", 1)])
    with pytest.raises(ValueError, match="no frame"):
        frame(STEP, 0, [1], [])
