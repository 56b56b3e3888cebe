"""A trace small enough for a baseline: of each step, or of some steps together, one digest for each stage."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from f3rm_verify.difference import STAGES
from f3rm_verify.readers.trace import Subject, Trace

#: Of more steps than this, some are taken together.
MAX_FRAMES = 1500
#: What stands for everything that was recorded of a stage.
ALL = "all records"

Steps = npt.NDArray[np.int64]


def steps_together(trace: Trace) -> int:
    """How many steps to take together, so that no more than `MAX_FRAMES` are left."""
    return max(1, math.ceil(len(trace.steps) / MAX_FRAMES))


def condensed(trace: Trace, *, together: int) -> Trace:
    """The trace with one record for each stage of so many steps, known by the first of them."""
    groups: dict[tuple[bool, int], dict[str, Any]] = {}
    start = int(trace.steps[0]) if trace.steps.size else 0
    for index, (step, is_step) in enumerate(zip(trace.steps.tolist(), trace.is_step.tolist(), strict=True)):
        key = (is_step, step - (step - start) % together if is_step else step)
        states = groups.setdefault(key, {})
        for subject, value in trace.frame_records(index):
            state = states.setdefault(subject.stage, xxhash.xxh3_64())
            state.update(f"{subject.name}\0{subject.kind}\0{value}\0".encode("utf8", "surrogatepass"))
    digests = {key: {stage: state.intdigest() for stage, state in states.items()} for key, states in groups.items()}
    return dataclasses.replace(trace, **_frames(digests))


def encoded(trace: Trace, *, together: int) -> dict[str, Any]:
    """A condensed trace as plain data: for each stage the steps that have it, and their digests."""
    stages: dict[str, tuple[list[int], list[int]]] = {}
    before: dict[str, str] = {}
    first = None
    for index, (step, is_step) in enumerate(zip(trace.steps.tolist(), trace.is_step.tolist(), strict=True)):
        for subject, value in trace.frame_records(index):
            if is_step:
                steps, values = stages.setdefault(subject.stage, ([], []))
                steps.append(step)
                values.append(value)
            else:
                first, before[subject.stage] = step, f"{value:016x}"
    return {
        "algorithm": trace.algorithm,
        "mode": trace.mode,
        "not_recorded": dict(trace.not_recorded),
        "together": together,
        "before": {"step": first, "digests": before},
        "stages": {
            stage: {
                "steps": encoded_steps(steps),
                "digests": base64.b64encode(np.array(values, "<u8").tobytes()).decode("ascii"),
            }
            for stage, (steps, values) in stages.items()
        },
    }


def decoded(data: Mapping[str, Any]) -> Trace:
    """The reverse of `encoded`; raises KeyError, TypeError or ValueError for what is none."""
    frames: dict[tuple[bool, int], dict[str, int]] = {}
    before = data["before"]
    if before["step"] is not None:
        frames[False, int(before["step"])] = {stage: int(text, 16) for stage, text in before["digests"].items()}
    for stage, entry in data["stages"].items():
        values = np.frombuffer(base64.b64decode(entry["digests"], validate=True), "<u8")
        for step, value in zip(decoded_steps(entry["steps"], values.size).tolist(), values.tolist(), strict=True):
            frames.setdefault((True, step), {})[stage] = value
    if not all(stage in STAGES for stages in frames.values() for stage in stages) or int(data["together"]) < 1:
        raise ValueError("the trace has a stage that no training has")
    texts = {key: str(data[key]) for key in ("algorithm", "mode")}
    not_recorded = {str(stage): str(reason) for stage, reason in data["not_recorded"].items()}
    rest = {"not_recorded": not_recorded, "consumers": {}, "complete": True, "problem": None}
    return Trace(**texts, **rest, **_frames(frames))  # type: ignore[arg-type]


def _frames(digests: Mapping[tuple[bool, int], Mapping[str, int]]) -> dict[str, Any]:
    """The arrays of a trace: what was before the first step, then the steps, in each the stages in causal order."""
    keys = sorted(digests)
    stages = [stage for stage in STAGES if any(stage in found for found in digests.values())]
    rows = [[(stages.index(stage), value) for stage, value in digests[key].items()] for key in keys]
    records = [record for row in rows for record in sorted(row)]
    return {
        "subjects": tuple(Subject(stage, ALL) for stage in stages),
        "steps": np.array([step for _, step in keys], np.int64),
        "is_step": np.array([is_step for is_step, _ in keys], np.bool_),
        "ends": np.cumsum(np.array([len(row) for row in rows], np.int64)),
        "record_subjects": np.array([stage for stage, _ in records], np.uint16),
        "values": np.array([value for _, value in records], np.uint64),
    }


def encoded_steps(steps: Iterable[int]) -> Any:
    """A range by its first step, number and distance; else the steps themselves."""
    listed = [int(step) for step in steps]
    distance = listed[1] - listed[0] if len(listed) > 1 else 1
    if distance and listed == list(range(listed[0], listed[0] + distance * len(listed), distance)):
        return {"first": listed[0], "count": len(listed), "every": distance}
    return listed


def decoded_steps(data: Any, count: int) -> Steps:
    """The reverse; raises TypeError or ValueError where these are not `count` steps."""
    if isinstance(data, Mapping):
        first, number, every = (int(data[key]) for key in ("first", "count", "every"))
        if number != count:  # before as many steps are made
            raise ValueError("there are other steps than values")
        data = range(first, first + every * number, every)
    steps = np.array(data, np.int64)
    if steps.shape != (count,) or not count:
        raise ValueError("there are other steps than values")
    return steps
