"""The flight recorder on real trainings of the built-in preset, in one process that imports nerfstudio once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from f3rm.small_trainings import STEPS, Trainings, weights

from f3rm_verify.compare_trace import compare_trace
from f3rm_verify.difference import Difference, Verdict
from f3rm_verify.run_dir import TRACE, TRACE_RECORDS, RunDir

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("recorded"))


def recorded(trainings: Trainings, *, trace: str, seeded: bool) -> tuple[RunDir, dict[str, bytes]]:
    """The run directory, and the weights in the end."""
    trainer = trainings.train(seeded=seeded, TRACE=trace)
    return RunDir(trainer.base_dir), weights(trainer)


@pytest.fixture(scope="module")
def seeded(trainings: Trainings) -> Iterator[dict[str, tuple[RunDir, dict[str, bytes]]]]:
    yield {trace: recorded(trainings, trace=trace, seeded=True) for trace in ("off", "steps")}


def test_weights_are_the_same_bits_with_and_without_it(seeded: Any) -> None:
    plain = seeded["off"][1]
    assert len(plain) > 30
    assert seeded["steps"][1] == plain


def test_off_leaves_nothing(seeded: Any) -> None:
    assert not (seeded["off"][0].path / TRACE).exists()
    assert not (seeded["off"][0].path / TRACE_RECORDS).exists()
    assert "trace" not in seeded["off"][0].recorded


def test_every_stage_of_a_real_training_is_recorded(seeded: Any) -> None:
    trace = seeded["steps"][0].trace
    assert (trace.complete, trace.problem, dict(trace.not_recorded)) == (True, None, {})
    assert trace.steps.tolist() == [0, *range(STEPS)]
    stages = [dict.fromkeys(subject.stage for subject, _ in trace.frame_records(step + 1)) for step in (0, 3)]
    assert list(stages[0]) == ["rng", "batch", "forward", "loss", "grad", "params", "schedule"]
    assert list(stages[1]) == [*stages[0], "eval"]
    evaluation = {subject.name for subject, _ in trace.frame_records(4) if subject.stage == "eval"}
    assert evaluation == {"rays", "torch cpu after evaluation"}
    assert {"fields", "feature_field", "proposal_networks"} <= {s.name for s in trace.subjects if s.stage == "grad"}
    rays = {s.name for s in trace.subjects if s.stage == "batch"}
    assert {"rays origins", "rays directions", "image", "indices", "feature"} <= rays


def test_the_losses_are_those_of_the_curves(seeded: Any) -> None:
    run = seeded["steps"][0]
    trace, scalars = run.trace, run.events.scalars
    for step in (0, STEPS - 1):
        bits = {s.name: value for s, value in trace.frame_records(step + 1) if s.stage == "loss"}
        for name, value in bits.items():
            series = scalars.get(f"Train Loss Dict/{name}")
            if series is not None and step in series.steps:
                assert series.values[series.steps == step].view(np.uint32).tolist() == [value]


def test_a_race_shows_with_and_without_it(trainings: Trainings) -> None:
    """The stock hash grids without deterministic algorithms, on two threads."""
    runs = [recorded(trainings, trace=trace, seeded=False) for trace in ("off", "steps", "steps")]
    ends = [run[1] for run in runs]
    assert ends[0] != ends[1] != ends[2]
    node: Difference = compare_trace(runs[1][0], runs[2][0])
    assert node.verdict is Verdict.DIFFERENT
    assert (node.measures["stage"], node.measures["first_step"]) == ("grad", 0)
