"""What determinism costs in time and memory: has one `ns-train` measure it, and summarises what that measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from f3rm_verify import __version__
from f3rm_verify.ns_train import TrainingRequest
from f3rm_verify.run_dir import COST
from f3rm_verify.runner import Training, Trainings, read_left, run_trainings

SCHEMA_VERSION = 1
#: Of what the measuring process writes.
_MEASURED_VERSION = 1
#: With fewer pairs, the middle half of pure noise misses 1 too often to say anything.
ENOUGH_PAIRS = 8
#: The name of the one process.
SIDE = "cost"

#: One block with and one without a measure, next to each other in time.
Pair = Mapping[str, Mapping[str, Any]]


def measure_cost(request: TrainingRequest, *, watch: Callable[[Sequence[Training]], None]) -> Trainings:
    """Has one process take steps of the training with and without each measure; nothing is trained.

    Raises TrainingError where it never began.
    """
    return run_trainings(request, {SIDE: request.seed}, watch=watch)


def read_cost(training: Training) -> dict[str, Any]:
    """The result, as plain data, of a process that ended well. Raises TrainingError where it left none."""
    return summarise(read_left(training, COST, version=_MEASURED_VERSION))


def summarise(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The result of blocks as they were measured: settings, and one row for each measure."""
    counted = measured["settings"]["counted_steps_per_block"]
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "f3rm-verify", "version": __version__},
        "trained": False,
        "settings": dict(measured["settings"]),
        "rows": [
            {name: row[name] for name in ("measure", "upon", "not_applicable")}
            | _numbers(row["pairs"] if row["not_applicable"] is None else (), counted)
            for row in measured["comparisons"]
        ],
    }


def _numbers(pairs: Sequence[Pair], counted: int) -> dict[str, Any]:
    """Null where there are no pairs. The sides' seconds of a step are medians of their own; the ratio is the pairs'."""
    if not pairs:
        return dict.fromkeys(("time_ratio", "effect", "seconds_per_step", "peak_bytes")) | {"pairs": 0}
    ratios = [pair["with"]["seconds"] / pair["without"]["seconds"] for pair in pairs]
    low, middle, high = quartiles(ratios)
    return {
        "time_ratio": {"median": middle, "quartiles": [low, high]},
        "effect": effect(low, high, len(pairs)),
        "seconds_per_step": {
            side: statistics.median(pair[side]["seconds"] for pair in pairs) / counted for side in ("with", "without")
        },
        "peak_bytes": {kind: _memory(pairs, kind) for kind in pairs[0]["with"]["peak_bytes"]},
        "pairs": len(pairs),
    }


def _memory(pairs: Sequence[Pair], kind: str) -> dict[str, int]:
    """The peak of each side over all its blocks, and how much more a block with it needs than the one beside it."""
    peaks = {side: [pair[side]["peak_bytes"][kind] for pair in pairs] for side in ("with", "without")}
    more = [own - other for own, other in zip(peaks["with"], peaks["without"], strict=True)]
    return {side: max(values) for side, values in peaks.items()} | {"more": round(statistics.median(more))}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The middle half of the values and the median between; of a single value, that."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def effect(low: float, high: float, pairs: int) -> str:
    """What the middle half of so many time ratios says."""
    if pairs < ENOUGH_PAIRS:
        return "too few pairs"
    if low <= 1.0 <= high:
        return "within noise"
    return "slower" if low > 1.0 else "faster"
