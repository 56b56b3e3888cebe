"""Condensed traces: every record counts, steps can be taken together, and plain data brings them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import GRAD, INIT, RNG, TERM, FakeTrace

from f3rm_verify.condensed_trace import (
    ALL,
    condensed,
    decoded,
    decoded_steps,
    encoded,
    encoded_steps,
    steps_together,
)
from f3rm_verify.readers.trace import Subject, Trace
from f3rm_verify.run_dir import RunDir


def trace(folder: Path, fake: FakeTrace) -> Trace:
    folder.mkdir(parents=True)
    fake.write(folder)
    found = RunDir(folder).trace
    assert found is not None
    return found


def records(found: Trace) -> dict[tuple[bool, int, str], int]:
    return {
        (bool(found.is_step[i]), int(found.steps[i]), subject.stage): value
        for i in range(len(found.steps))
        for subject, value in found.frame_records(i)
    }


def test_there_is_one_record_for_each_stage_of_a_step(tmp_path: Path) -> None:
    small = condensed(trace(tmp_path / "a", FakeTrace()), together=1)
    assert {subject.name for subject in small.subjects} == {ALL}
    stages = [stage for is_step, step, stage in records(small) if is_step and step == 3]
    assert stages == ["rng", "batch", "forward", "loss", "grad", "params", "schedule"]
    assert [stage for is_step, _, stage in records(small) if not is_step] == ["init"]


@pytest.mark.parametrize(
    ("step", "change", "stage"),
    [
        (3, lambda found: found.update({GRAD: found[GRAD] ^ 1}), "grad"),
        (3, lambda found: found.update({TERM: found[TERM] ^ 1}), "loss"),
        (3, lambda found: found.update({Subject("grad", "more"): 0}), "grad"),
        (3, lambda found: found.pop(RNG), "rng"),
        (None, lambda found: found.update({INIT: 8}), "init"),
    ],
)
@pytest.mark.parametrize("together", [1, 4])
def test_one_changed_record_changes_one(
    tmp_path: Path, step: int | None, change: Any, stage: str, together: int
) -> None:
    other = FakeTrace()
    change(other.before if step is None else other.steps[step])
    a, b = (
        records(condensed(trace(tmp_path / name, fake), together=together))
        for name, fake in (("a", FakeTrace()), ("b", other))
    )
    differing = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    assert differing == [(step is not None, 0 if step is None else step - step % together, stage)]


def test_names_and_values_are_not_mixed_up(tmp_path: Path) -> None:
    first, second = Subject("grad", "a"), Subject("grad", "b")
    sides = [{first: 1, second: 2}, {first: 2, second: 1}, {second: 2, first: 1}, {Subject("grad", "ab"): 12}]
    digests = {
        tuple(records(condensed(trace(tmp_path / str(i), FakeTrace(steps={0: side})), together=1)).values())
        for i, side in enumerate(sides)
    }
    assert len(digests) == len(sides)


@pytest.mark.parametrize("together", [1, 3])
def test_plain_data_brings_it_back(tmp_path: Path, together: int) -> None:
    fake = FakeTrace(not_recorded={"eval": "none"})
    fake.steps[4][Subject("eval", "psnr")] = 2**64 - 1
    small = condensed(trace(tmp_path / "a", fake), together=together)
    again = decoded(json.loads(json.dumps(encoded(small, together=together))))
    assert records(again) == records(small)
    for name in ("algorithm", "mode", "not_recorded", "complete", "problem", "subjects"):
        assert getattr(again, name) == getattr(small, name)
    for name in ("steps", "is_step", "ends", "record_subjects", "values"):
        assert np.array_equal(getattr(again, name), getattr(small, name))


def test_a_cut_off_trace_stays_one(tmp_path: Path) -> None:
    found = trace(tmp_path / "a", FakeTrace(complete=False))
    assert not condensed(found, together=1).complete


def test_so_many_steps_are_taken_together(tmp_path: Path) -> None:
    few, many = (
        trace(tmp_path / str(n), FakeTrace(steps={step: {GRAD: step} for step in range(n)})) for n in (10, 3100)
    )
    assert (steps_together(few), steps_together(many)) == (1, 3)


@pytest.mark.parametrize("steps", [[0], [5], [0, 1, 2], [10, 20, 30], [0, 1, 3], [3, 2, 1], [0, 1, 0, 1], [4, 4]])
def test_steps_come_back(steps: list[int]) -> None:
    data = json.loads(json.dumps(encoded_steps(steps)))
    assert decoded_steps(data, len(steps)).tolist() == steps


@pytest.mark.parametrize("data", [[], {"first": 0, "count": 10**15, "every": 1}, ["a"], [[1]], {}, None, [0, 1, 2]])
def test_steps_that_do_not_fit_are_refused(data: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        decoded_steps(data, 2)
