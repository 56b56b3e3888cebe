"""A trace is read as far as it is whole, whatever ended its training; nothing in it is believed."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from fake_runs import STEPS, FakeTrace

from f3rm_verify.errors import UnreadableError
from f3rm_verify.readers import trace as module
from f3rm_verify.readers.trace import Subject, read_trace
from f3rm_verify.run_dir import TRACE, TRACE_RECORDS, RunDir
from f3rm_verify.trace_format import BEFORE_TRAINING, STEP, frame


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    FakeTrace().write(tmp_path)
    return RunDir(tmp_path)


def head(run: RunDir, **changes: Any) -> dict[str, Any]:
    return {**json.loads((run.path / TRACE).read_text("utf8")), **changes}


def test_everything_comes_back_in_its_order(run: RunDir) -> None:
    trace = run.trace
    assert trace is not None
    assert (trace.algorithm, trace.mode, trace.complete, trace.problem) == ("xxh3_64 v1", "steps", True, None)
    assert trace.steps.tolist() == [0, *range(STEPS)]
    assert trace.is_step.tolist() == [False, *[True] * STEPS]
    expected = FakeTrace()
    assert trace.frame_records(0) == list(expected.before.items())
    for step, records in expected.steps.items():
        assert trace.frame_records(step + 1) == list(records.items())
    assert trace.consumers["evaluation"] == "an evaluation between steps"


def test_of_a_file_cut_anywhere_the_whole_frames_are_read(run: RunDir) -> None:
    path = run.path / TRACE_RECORDS
    data = path.read_bytes()
    ends = [0]
    for records in [FakeTrace().before, *FakeTrace().steps.values()]:
        ends.append(ends[-1] + 16 + 10 * len(records))
    assert ends[-1] == len(data)
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        trace = read_trace(head(run, complete=False), path)
        assert len(trace.steps) == sum(end <= size for end in ends[1:])
        assert (trace.problem is None) == (size in ends)
        if trace.problem is not None:
            assert "ends in the middle of a frame, as a killed run leaves it" in trace.problem


def test_a_flipped_bit_anywhere_is_noticed(run: RunDir) -> None:
    path = run.path / TRACE_RECORDS
    data = path.read_bytes()[: 16 + 10 + 16 + 70]
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            trace = read_trace(head(run, complete=False), path)
            assert trace.problem is not None
            assert len(trace.steps) == (place >= 26)


def test_frames_that_were_lost_without_a_trace_are_noticed(run: RunDir) -> None:
    path = run.path / TRACE_RECORDS
    path.write_bytes(path.read_bytes()[: -(16 + 70)])
    assert run.trace is not None
    assert run.trace.problem == "trace.bin: has 10 frames, and trace.json speaks of another number."


@pytest.mark.parametrize(
    ("frames", "problem"),
    [
        ([frame(STEP, 0, [], [])], "stands where it cannot"),
        ([frame(BEFORE_TRAINING, 0, [], []), frame(BEFORE_TRAINING, 1, [], [])], "stands where it cannot"),
        ([frame(BEFORE_TRAINING, 0, [], []), *[frame(STEP, 3, [], [])] * 2], "is of step 3 and follows step 3"),
        ([frame(BEFORE_TRAINING, 5, [], []), frame(STEP, 4, [], [])], "is of step 4 and follows step 5"),
        ([frame(BEFORE_TRAINING, -1, [], [])], "stands where it cannot"),
        ([frame(BEFORE_TRAINING, 0, [99], [1])], "names something that trace.json does not know"),
        ([frame(BEFORE_TRAINING, 0, [1, 1], [1, 2])], "has two records of one thing"),
        ([frame(7, 0, [], [])], "stands where it cannot"),
    ],
)
def test_frames_that_no_training_writes(run: RunDir, frames: list[bytes], problem: str) -> None:
    path = run.path / TRACE_RECORDS
    path.write_bytes(b"".join(frames))
    trace = read_trace(head(run), path)
    assert trace.problem is not None
    assert problem in trace.problem


def test_a_frame_that_claims_to_be_huge_takes_no_memory(run: RunDir) -> None:
    body = struct.pack("<HHq", STEP, 2**16 - 1, 0)
    path = run.path / TRACE_RECORDS
    path.write_bytes(struct.pack("<I", zlib.crc32(body)) + body)
    assert "ends in the middle" in str(read_trace(head(run), path).problem)


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": 2},
        {"subjects": None},
        {"subjects": [{"stage": "grad", "name": "a", "kind": "digest"}] * 2},
        {"subjects": [{"stage": "nowhere", "name": "a", "kind": "digest"}]},
        {"subjects": [{"stage": ["grad"], "name": "a", "kind": "digest"}]},
        {"subjects": [{"stage": "grad", "name": "a", "kind": {}}]},
        {"subjects": [{"stage": "grad", "name": "a" * 501, "kind": "digest"}]},
        {"subjects": [3]},
        {"algorithm": 3},
        {"mode": None},
        {"not_recorded": ["batch"]},
        {"not_recorded": {"batch": 3}},
        {"consumers": None},
    ],
)
def test_a_head_that_is_none(run: RunDir, changes: dict[str, Any]) -> None:
    with pytest.raises(UnreadableError, match=r"trace\.json"):
        read_trace(head(run, **changes), run.path / TRACE_RECORDS)


def test_records_that_are_no_file(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnreadableError, match="is missing"):
        read_trace(head(run), None)
    with pytest.raises(UnreadableError, match="not a regular file"):
        read_trace(head(run), tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableError, match="not a regular file"):
        read_trace(head(run), tmp_path / "pipe")
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(UnreadableError, match="bytes are more than the 100"):
        read_trace(head(run), run.path / TRACE_RECORDS)


def test_no_trace_is_none(tmp_path: Path) -> None:
    assert RunDir(tmp_path).trace is None
    assert Subject("grad", "a").kind == "digest"
