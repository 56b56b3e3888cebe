"""Compares what two trainings did, step by step: where they parted first, and how the difference grew from there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from f3rm_verify.bits import distances
from f3rm_verify.difference import STAGES, Difference, Verdict
from f3rm_verify.errors import UnreadableError
from f3rm_verify.readers.trace import Subject, Trace
from f3rm_verify.run_dir import RunDir
from f3rm_verify.trace_format import DIGEST

#: The first difference of a loss, in ulps, up to which it can be what rounding in another order makes.
ROUNDING_ULPS = 2**12
#: The least relative difference of a loss at once that rounding in another order does not make.
ANOTHER_EXPERIMENT = 1e-3

Indices = NDArray[np.int64]


def compare_trace(reference: RunDir, candidate: RunDir) -> Difference:
    """A node for each stage in causal order, below it one for each subject; and one for the steps.

    Where something differs, the measures of the root are its first place (`first_step`, `last_equal_step`, `stage`,
    `subject`, in causal order) and `growth`, see `_growth`. Raises UnreadableError where a side cannot be read, or
    where the two were recorded in ways that cannot be compared.
    """
    sides = []
    for side, run in (("reference", reference), ("candidate", candidate)):
        trace = run.trace
        if trace is None:
            summary = f"the {side} has no trace"
            return Difference(name="trace", artefact="trace", verdict=Verdict.MISSING, summary=summary)
        sides.append(trace)
    _require_comparable(*sides)
    joined = _Joined(*sides)
    first = joined.first()
    measures: dict[str, Any] = {"n_steps": joined.n_steps, "n_records": int(joined.pairs[0].size)}
    if first is not None:
        measures |= {**first, "growth": _growth(joined)}
    return Difference.group(
        name="trace",
        artefact="trace",
        children=[*_stage_nodes(joined, *sides), *_step_nodes(joined, *sides)],
        summary="" if first is None else _first_summary(first),
        measures=measures,
    )


def _first_summary(first: Mapping[str, Any]) -> str:
    last = first["last_equal_step"]
    before = f"{first['n_equal_before']} records before it are equal"
    before += "" if last is None else f", of all steps up to {last}"
    return f"differs first at step {first['first_step']}, stage {first['stage']}, {first['subject']}; {before}"


def _require_comparable(reference: Trace, candidate: Trace) -> None:
    for what in ("algorithm", "mode"):
        values = [getattr(side, what) for side in (reference, candidate)]
        if values[0] != values[1]:
            remedy = (
                "record both with the same version on the same kind of device"
                if what == "algorithm"
                else ("record both with the same --trace")
            )
            raise UnreadableError(
                f"The traces have the {what}s {values[0][:80]!r} and {values[1][:80]!r}, which cannot be compared; "
                f"{remedy}."
            )


@dataclass(frozen=True, eq=False)
class _Side:
    """The records of one side: frame (an index into the frames that both sides have), subject, value, position."""

    trace: Trace
    #: Of each frame of the trace, its number among those that both sides have; -1 where the other lacks it.
    common: Indices
    subjects: Indices

    @cached_property
    def frames(self) -> Indices:
        counts = np.diff(self.trace.ends, prepend=0)
        return np.repeat(self.common, counts)

    @cached_property
    def positions(self) -> Indices:
        """The place of each record in its frame."""
        counts = np.diff(self.trace.ends, prepend=0)
        starts = np.repeat(self.trace.ends - counts, counts)
        return np.arange(starts.size, dtype=np.int64) - starts


class _Joined:
    """Both traces, record by record, in the frames that both have."""

    def __init__(self, reference: Trace, candidate: Trace) -> None:
        self.subjects = list(dict.fromkeys([*reference.subjects, *candidate.subjects]))
        numbers = {subject: number for number, subject in enumerate(self.subjects)}
        # A frame is known by its step; the one before the first step by -1.
        a, b = (np.where(side.is_step, side.steps, -1) for side in (reference, candidate))
        self.keys, in_reference, in_candidate = np.intersect1d(a, b, assume_unique=True, return_indices=True)
        starts = [int(side.steps[0]) for side in (reference, candidate) if side.steps.size]
        self.first_step = min(starts, default=0)
        self.sides = []
        for trace, common in ((reference, in_reference), (candidate, in_candidate)):
            places = np.full(trace.steps.size, -1, np.int64)
            places[common] = np.arange(common.size)
            table = np.array([numbers[subject] for subject in trace.subjects], np.int64)
            self.sides.append(_Side(trace, places, table[trace.record_subjects.astype(np.int64)]))

    @property
    def n_steps(self) -> int:
        """How many steps both sides have."""
        return int(np.count_nonzero(self.keys >= 0))

    def step_of(self, frame: int) -> int:
        """The step of a common frame; of what was before the first step, that step."""
        key = int(self.keys[frame])
        return self.first_step if key < 0 else key

    @cached_property
    def _codes(self) -> list[tuple[Indices, Indices]]:
        """Of each side: (frame, subject) as one number for the records in common frames, and where they lie."""
        found = []
        for side in self.sides:
            where = np.flatnonzero(side.frames >= 0)
            found.append((side.frames[where] * len(self.subjects) + side.subjects[where], where))
        return found

    @cached_property
    def pairs(self) -> tuple[Indices, Indices]:
        """Indices of the records that both sides have, in each."""
        (a, where_a), (b, where_b) = self._codes
        _, in_a, in_b = np.intersect1d(a, b, assume_unique=True, return_indices=True)
        return where_a[in_a], where_b[in_b]

    @cached_property
    def unequal(self) -> NDArray[np.bool_]:
        """Which pairs have other values."""
        a, b = (side.trace.values[where] for side, where in zip(self.sides, self.pairs, strict=True))
        return np.asarray(a != b)

    @cached_property
    def alone(self) -> tuple[Indices, Indices]:
        """Indices of the records in common frames that only one side has."""
        return tuple(  # type: ignore[return-value]
            np.setdiff1d(where, paired, assume_unique=True)
            for (_, where), paired in zip(self._codes, self.pairs, strict=True)
        )

    @cached_property
    def differing(self) -> NDArray[np.int64]:
        """(n, 3): frame, position and subject of every record that differs, or that only one side has."""
        rows = []
        for number, side in enumerate(self.sides):
            # In a step that both did, whatever only one did is a difference, and comes before what it pushed back.
            parts = [self.alone[number]] if number else [self.alone[number], self.pairs[0][self.unequal]]
            for is_pair, where in enumerate(parts):
                position = side.positions[where] * 2 + is_pair
                rows.append(np.stack([side.frames[where], position, side.subjects[where]], axis=1))
        return np.concatenate(rows)

    @cached_property
    def _by_subject(self) -> tuple[Indices, Indices]:
        """Indices into `pairs` in the order of their subjects, and where each subject begins in them."""
        of = self.sides[0].subjects[self.pairs[0]]
        order = np.argsort(of, kind="stable")
        return order, np.searchsorted(of[order], np.arange(len(self.subjects) + 1))

    def pairs_of(self, subject: int) -> Indices:
        """Indices into `pairs` of one subject, by frame."""
        order, starts = self._by_subject
        return order[starts[subject] : starts[subject + 1]]

    def numbers_of(self, subject: int) -> tuple[Indices, NDArray[Any], NDArray[Any]]:
        """The common frames that have a subject, and its numbers in the reference and the candidate."""
        which = self.pairs_of(subject)
        where = [side[which] for side in self.pairs]
        kind = self.subjects[subject].kind
        a, b = (_numbers(side.trace.values[at], kind) for side, at in zip(self.sides, where, strict=True))
        return self.sides[0].frames[where[0]], a, b

    @cached_property
    def alone_counts(self) -> list[Indices]:
        """Of each side, how many records of each subject it has alone."""
        return [
            np.bincount(side.subjects[where], minlength=len(self.subjects))
            for side, where in zip(self.sides, self.alone, strict=True)
        ]

    def first(self) -> dict[str, Any] | None:
        """Step, stage and subject of the first thing that differs; None where nothing does."""
        rows = self.differing[np.isin(self.differing[:, 2], self.both_recorded)]
        if not rows.size:
            return None
        frame, position, subject = rows[np.lexsort((rows[:, 1], rows[:, 0]))[0]].tolist()
        found = self.subjects[subject]
        paired = self.pairs[0]
        places = self.sides[0].frames[paired], self.sides[0].positions[paired] * 2
        before = (places[0] < frame) | ((places[0] == frame) & (places[1] < position - 1))
        return {
            "first_step": self.step_of(frame),
            "last_equal_step": self.last_step_before(frame),
            "stage": found.stage,
            "subject": found.name,
            "n_equal_before": int(np.count_nonzero(before & ~self.unequal)),
        }

    @cached_property
    def both_recorded(self) -> Indices:
        """The subjects of stages that both sides could record."""
        lacking = {stage for side in self.sides for stage in side.trace.not_recorded}
        return np.array([i for i, subject in enumerate(self.subjects) if subject.stage not in lacking], np.int64)

    def last_step_before(self, frame: int) -> int | None:
        """The last common step before a frame."""
        earlier = self.keys[:frame]
        return int(earlier[-1]) if earlier.size and earlier[-1] >= 0 else None


def _stage_nodes(joined: _Joined, reference: Trace, candidate: Trace) -> Iterator[Difference]:
    for stage in STAGES:
        reasons = [side.not_recorded.get(stage) for side in (reference, candidate)]
        if reasons != [None, None]:
            yield _unrecorded_stage(stage, *reasons)
            continue
        children = [_subject_node(joined, i) for i, subject in enumerate(joined.subjects) if subject.stage == stage]
        if children:
            yield Difference.group(name=stage, artefact="trace", children=[node for node in children if node])


def _unrecorded_stage(stage: str, reference: str | None, candidate: str | None) -> Difference:
    if reference == candidate:
        verdict, summary = Verdict.IGNORED, f"not recorded: {reference}"
    else:
        verdict = Verdict.MISSING
        sides = (("reference", reference), ("candidate", candidate))
        summary = "; ".join(f"not recorded in the {side}: {why}" for side, why in sides if why)
    return Difference(name=stage, artefact="trace", verdict=verdict, summary=summary[:500])


def _subject_node(joined: _Joined, number: int) -> Difference | None:
    """The node of a subject; None where no frame that both sides have tells of it."""
    frames = joined.sides[0].frames[joined.pairs[0][joined.pairs_of(number)]]
    rows = joined.differing[joined.differing[:, 2] == number]
    if not frames.size and not rows.size:
        return None
    subject = joined.subjects[number]
    alone = [int(counts[number]) for counts in joined.alone_counts]
    measures: dict[str, Any] = {"n_steps": int(frames.size) + sum(alone), "n_different": int(rows.shape[0])}
    measures |= {
        key: count for key, count in zip(("n_only_reference", "n_only_candidate"), alone, strict=True) if count
    }
    if not rows.size:
        last = int(joined.keys[frames.max()])
        measures["last_equal_step"] = last if last >= 0 else None
        summary = "equal before the first step" if last < 0 else f"{frames.size} equal records"
        return _leaf(subject, Verdict.IDENTICAL, summary, measures)
    first = int(rows[:, 0].min())
    earlier = frames[frames < first]
    last = int(joined.keys[earlier.max()]) if earlier.size else -1
    measures |= {"first_step": joined.step_of(first), "last_equal_step": last if last >= 0 else None}
    if subject.kind != DIGEST:
        measures |= _values_at(joined, number, first)
    return _leaf(subject, Verdict.DIFFERENT, _difference_summary(joined, measures, alone), measures)


def _difference_summary(joined: _Joined, measures: Mapping[str, Any], alone: list[int]) -> str:
    text = f"differs first at step {measures['first_step']}"
    if "reference_value" in measures:
        text += f": {measures['reference_value']} against {measures['candidate_value']}"
    text += f"; {measures['n_different']} of {measures['n_steps']} records differ"
    for side, count in zip(("reference", "candidate"), alone, strict=True):
        text += f", {count} of them only in the {side}" if count else ""
    return text


def _leaf(subject: Subject, verdict: Verdict, summary: str, measures: Mapping[str, Any]) -> Difference:
    return Difference(name=subject.name, artefact="trace", verdict=verdict, summary=summary, measures=measures)


def _values_at(joined: _Joined, number: int, frame: int) -> dict[str, Any]:
    """The two numbers in a frame, where both sides have one."""
    frames, *columns = joined.numbers_of(number)
    values = [column[frames == frame] for column in columns]
    if values[0].size != 1:
        return {}
    kind = joined.subjects[number].kind
    shown = [_as_float(value, kind)[0] for value in values]
    ulps = float(distances(*values, dtype_name=kind)[0][0])
    return {
        "reference_value": str(shown[0]),
        "candidate_value": str(shown[1]),
        "first_ulp": int(ulps) if np.isfinite(ulps) else None,
    }


def _numbers(values: NDArray[np.uint64], kind: str) -> NDArray[Any]:
    """The numbers whose bits these are; of bfloat16, which NumPy lacks, the bits as uint16."""
    if kind == "bfloat16":
        return values.astype(np.uint16)
    dtype = np.dtype(kind)
    return values.astype(f"u{dtype.itemsize}").view(dtype)


def _as_float(numbers: NDArray[Any], kind: str) -> NDArray[Any]:
    return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32) if kind == "bfloat16" else numbers


def _step_nodes(joined: _Joined, reference: Trace, candidate: Trace) -> Iterator[Difference]:
    """Whether both traces are whole, and of the same steps."""
    for side, trace in (("reference", reference), ("candidate", candidate)):
        if trace.problem is not None:
            yield Difference(
                name=f"{side} records", artefact="trace", verdict=Verdict.UNREADABLE, summary=trace.problem
            )
        elif not trace.complete:
            summary = f"the {side}'s trace has no end: its training was stopped, or still runs"
            yield Difference(name=f"{side} records", artefact="trace", verdict=Verdict.MISSING, summary=summary)
    a, b = (side.steps[side.is_step] for side in (reference, candidate))
    measures: dict[str, Any] = {"n_steps": joined.n_steps}
    extra = []
    for side, own, other in (("reference", a, b), ("candidate", b, a)):
        more = np.setdiff1d(own, other)
        if more.size:
            measures[f"n_only_{side}"] = int(more.size)
            extra.append(f"only the {side} has {more.size} more, {more[0]} to {more[-1]}")
    if extra:
        verdict, summary = Verdict.MISSING, f"{joined.n_steps} steps in both; {' and '.join(extra)}"
    elif not joined.n_steps:
        verdict, summary = Verdict.UNREADABLE, "no step was recorded"
    else:
        verdict, summary = Verdict.IDENTICAL, f"{joined.n_steps} steps in both"
    yield Difference(name="steps", artefact="trace", verdict=verdict, summary=summary, measures=measures)


def _growth(joined: _Joined) -> dict[str, Any]:
    """How far apart the losses are from their first difference on; empty where no loss differs.

    `first_step`, `first_ulp`, `first_relative`: of the term that is farthest apart in the first step in which one is.
    `doubling_steps`: in how many steps the distance in ulps doubles, fitted until it has stopped growing; None where it
    does not grow or is too short. `largest_relative`: of the whole training. `reads_as`: what that looks like.
    """
    steps, ulps, relative = _distances(joined)
    apart = np.flatnonzero(ulps > 0)
    if not apart.size:
        return {}
    first = int(apart[0])
    growth = {
        "first_step": int(steps[first]),
        "first_ulp": int(ulps[first]) if np.isfinite(ulps[first]) else None,
        "first_relative": float(relative[first]),
        "doubling_steps": _doubling(steps[first:], ulps[first:]),
        "largest_relative": float(relative.max()),
        "n_steps": int(steps.size - first),
    }
    return {**growth, "reads_as": _reads_as(growth)}


def _reads_as(growth: Mapping[str, Any]) -> str:
    if growth["first_relative"] >= ANOTHER_EXPERIMENT:
        return "another experiment: far apart at once"
    if growth["first_ulp"] is None or growth["first_ulp"] > ROUNDING_ULPS:
        return "unclear: more than rounding, less than another experiment"
    if growth["doubling_steps"] is not None:
        return "rounding noise that the training amplifies"
    return "rounding noise, not seen to grow"


def _distances(joined: _Joined) -> tuple[Indices, NDArray[np.float64], NDArray[np.float64]]:
    """Per common step the largest distance of a loss term: step, in ulps of its type, and relative to the larger."""
    ulps, relative = np.zeros(joined.keys.size), np.zeros(joined.keys.size)
    for number, subject in enumerate(joined.subjects):
        if subject.stage == "loss" and subject.kind != DIGEST:
            frames, *values = joined.numbers_of(number)
            for largest, found in zip((ulps, relative), distances(*values, dtype_name=subject.kind), strict=True):
                np.maximum.at(largest, frames, found)
    steps = joined.keys >= 0
    return joined.keys[steps], ulps[steps], relative[steps]


def _doubling(steps: Indices, ulps: NDArray[np.float64]) -> float | None:
    """Steps in which the distance doubles, by a straight line through its logarithm up to where it stops growing."""
    finite = np.isfinite(ulps) & (ulps > 0)
    steps, logs = steps[finite], np.log2(ulps[finite])
    if steps.size < 4:
        return None
    # Growth ends where the distance first comes near to the most that it ever reaches.
    end = int(np.argmax(logs >= logs[0] + 0.9 * (logs.max() - logs[0]))) + 1
    steps, logs = steps[:end], logs[:end]
    if steps.size < 4:
        return None
    slope = float(np.polyfit(steps - steps[0], logs, 1)[0])
    return 1 / slope if slope > 0 else None
