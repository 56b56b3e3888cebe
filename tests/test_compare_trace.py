"""Where two trainings parted, and how the difference grew from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import GRAD, INIT, LR, PARAMS, RAYS, RGB, RNG, STEPS, TERM, FakeRun, FakeTrace, bits, compare, leaves

from f3rm_verify.compare_trace import compare_trace
from f3rm_verify.difference import Difference, Outcome, Verdict
from f3rm_verify.errors import UnreadableError
from f3rm_verify.policy import RUN_POLICY
from f3rm_verify.readers.trace import Subject
from f3rm_verify.run_dir import TRACE, TRACE_RECORDS, RunDir

Change = Callable[[FakeTrace], object]
AFTER = Subject("rng", "torch cpu after evaluation")


def written(path: Path, change: Change | None = None) -> RunDir:
    trace = FakeTrace()
    if change is not None:
        change(trace)
    path.mkdir(parents=True)
    trace.write(path)
    return RunDir(path)


def compared(path: Path, *changes: Change | None) -> Difference:
    """The node of two traces, after a check that with the sides swapped it is the same verdict at the same place."""
    first, second = (written(path / str(i), change) for i, change in enumerate(changes))
    node, swapped = compare_trace(first, second), compare_trace(second, first)
    assert swapped.verdict is node.verdict
    for key in ("first_step", "last_equal_step", "stage", "subject"):
        assert swapped.measures.get(key) == node.measures.get(key)
    return node


def place(node: Difference) -> tuple[Any, ...]:
    return tuple(node.measures.get(key) for key in ("first_step", "last_equal_step", "stage", "subject"))


def put(step: int, subject: Subject, value: int) -> Change:
    return lambda trace: trace.steps[step].update({subject: value})


def verdicts(node: Difference) -> dict[str, str]:
    return {"/".join(path[1:]): leaf.verdict.value for path, leaf in node.leaves()}


def test_two_equal_traces_are_identical_subject_by_subject(tmp_path: Path) -> None:
    node = compared(tmp_path, None, None)
    assert node.verdict is Verdict.IDENTICAL
    assert [child.name for child in node.children] == [
        *("init", "rng", "batch", "forward", "loss", "grad", "params", "schedule", "steps")
    ]
    assert set(verdicts(node).values()) == {"identical"}
    assert (node.measures["n_steps"], node.measures["n_records"]) == (STEPS, STEPS * 7 + 1)
    assert "first_step" not in node.measures


@pytest.mark.parametrize("subject", [RNG, RAYS, RGB, TERM, GRAD, PARAMS, LR])
@pytest.mark.parametrize("step", [0, 4, STEPS - 1])
def test_one_record_that_differs_is_one_node_at_its_step(tmp_path: Path, subject: Subject, step: int) -> None:
    node = compared(tmp_path, None, lambda trace: trace.steps[step].update({subject: trace.steps[step][subject] ^ 1}))
    assert place(node) == (step, step - 1 if step else None, subject.stage, subject.name)
    assert [name for name, verdict in verdicts(node).items() if verdict != "identical"] == [
        f"{subject.stage}/{subject.name}"
    ]
    (leaf,) = (leaf for _, leaf in node.leaves() if leaf.verdict is Verdict.DIFFERENT)
    assert (leaf.measures["first_step"], leaf.measures["n_different"]) == (step, 1)
    assert f"differs first at step {step}" in leaf.summary


def test_what_is_different_before_the_first_step_is_initial(tmp_path: Path) -> None:
    node = compared(tmp_path, None, lambda trace: trace.before.update({INIT: 8}))
    assert place(node) == (0, None, "init", "fields")


def test_at_one_step_the_causal_order_decides_not_the_order_of_the_stages(tmp_path: Path) -> None:
    def late(trace: FakeTrace) -> None:
        # A generator that an evaluation left in another state comes after everything else in its step.
        trace.steps[4] |= {PARAMS: 1, Subject("rng", "torch cpu after evaluation"): 2}

    def equal(trace: FakeTrace) -> None:
        trace.steps[4] |= {Subject("rng", "torch cpu after evaluation"): 3}

    assert place(compared(tmp_path / "a", equal, late)) == (4, 3, "params", "fields")

    def early(trace: FakeTrace) -> None:
        trace.steps[4] |= {RNG: 1, PARAMS: 1}

    assert place(compared(tmp_path / "b", None, early)) == (4, 3, "rng", "torch cpu")


def test_what_only_one_side_did_in_a_common_step_is_a_difference_there(tmp_path: Path) -> None:
    node = compared(tmp_path, None, put(6, AFTER, 5))
    assert node.verdict is Verdict.DIFFERENT
    assert place(node) == (6, 5, "rng", "torch cpu after evaluation")
    (leaf,) = (leaf for _, leaf in node.leaves() if leaf.verdict is Verdict.DIFFERENT)
    assert leaf.summary == "differs first at step 6; 1 of 1 records differ, 1 of them only in the candidate"


def test_everything_before_the_first_difference_is_counted(tmp_path: Path) -> None:
    node = compared(tmp_path, None, put(4, RGB, 1))
    assert node.measures["n_equal_before"] == 1 + 4 * 7 + 2
    assert node.summary == (
        "differs first at step 4, stage forward, rgb; 31 records before it are equal, of all steps up to 3"
    )


class TestWhatIsMissing:
    def test_a_side_without_a_trace(self, tmp_path: Path) -> None:
        (tmp_path / "none").mkdir()
        node = compare_trace(written(tmp_path / "a"), RunDir(tmp_path / "none"))
        assert (node.verdict, node.summary) == (Verdict.MISSING, "the candidate has no trace")

    def test_steps_that_only_one_side_did(self, tmp_path: Path) -> None:
        def short(trace: FakeTrace) -> None:
            trace.steps = {step: records for step, records in trace.steps.items() if step < 6}

        node = compared(tmp_path, None, short)
        assert node.verdict is Verdict.MISSING
        assert verdicts(node)["steps"] == "missing"
        assert node.children[-1].summary == "6 steps in both; only the reference has 4 more, 6 to 9"

    def test_a_trace_without_an_end(self, tmp_path: Path) -> None:
        node = compared(tmp_path, None, lambda trace: setattr(trace, "complete", False))
        assert node.verdict is Verdict.MISSING
        assert verdicts(node)["candidate records"] == "missing"

    def test_no_step_at_all(self, tmp_path: Path) -> None:
        node = compared(tmp_path, *[lambda trace: trace.steps.clear()] * 2)
        assert node.verdict is Verdict.UNREADABLE
        assert node.children[-1].summary == "no step was recorded"

    def test_a_stage_that_neither_could_record_is_ignored_with_its_reason(self, tmp_path: Path) -> None:
        def without(trace: FakeTrace) -> None:
            trace.not_recorded = {"batch": "the method has no next_train"}
            for records in trace.steps.values():
                del records[RAYS]

        node = compared(tmp_path / "both", without, without)
        assert (node.verdict, verdicts(node)["batch"]) == (Verdict.IDENTICAL, "ignored")
        node = compared(tmp_path / "one", None, without)
        assert (node.verdict, verdicts(node)["batch"]) == (Verdict.MISSING, "missing")

    def test_a_damaged_trace_is_unreadable_and_its_prefix_compared(self, tmp_path: Path) -> None:
        first, second = written(tmp_path / "a"), written(tmp_path / "b", put(2, GRAD, 1))
        path = second.path / TRACE_RECORDS
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        node = compare_trace(first, second)
        assert place(node) == (2, 1, "grad", "fields")
        assert node.verdict is Verdict.DIFFERENT
        assert verdicts(node)["candidate records"] == "unreadable"

    @pytest.mark.parametrize(("what", "value"), [("algorithm", "xxh3_64 v2"), ("mode", "tensors")])
    def test_traces_made_in_other_ways_are_unreadable_and_never_different(
        self, tmp_path: Path, what: str, value: str
    ) -> None:
        sides = written(tmp_path / "a"), written(tmp_path / "b", lambda trace: setattr(trace, what, value))
        with pytest.raises(UnreadableError, match=f"{what}s .* which cannot be compared; record both"):
            compare_trace(*sides)


class TestGrowth:
    @staticmethod
    def losses(*ulps: int) -> Change:
        """The loss at step i is so many ulps from what it was."""

        def change(trace: FakeTrace) -> None:
            for step, distance in enumerate(ulps):
                trace.steps[step][TERM] += distance

        return change

    def test_noise_that_doubles(self, tmp_path: Path) -> None:
        node = compared(tmp_path, None, self.losses(0, 0, 1, 2, 4, 8, 16, 32, 64, 128))
        growth = node.measures["growth"]
        assert (growth["first_step"], growth["first_ulp"]) == (2, 1)
        assert growth["doubling_steps"] == pytest.approx(1.0)
        assert growth["reads_as"] == "rounding noise that the training amplifies"

    def test_growth_is_fitted_until_it_ends(self, tmp_path: Path) -> None:
        flat = (1, 4, 16, 64, 256, 1024, 1024, 1030, 1000, 1024)
        growth = compared(tmp_path, None, self.losses(*flat)).measures["growth"]
        assert growth["doubling_steps"] == pytest.approx(0.5, rel=0.2)

    def test_another_experiment_is_far_apart_at_once(self, tmp_path: Path) -> None:
        growth = compared(tmp_path, None, self.losses(*[2**20] * STEPS)).measures["growth"]
        assert growth["reads_as"] == "another experiment: far apart at once"
        assert growth["first_relative"] > 0.05

    def test_a_nan_on_one_side_is_no_rounding(self, tmp_path: Path) -> None:
        growth = compared(tmp_path, None, put(3, TERM, bits(np.nan))).measures["growth"]
        assert (growth["first_step"], growth["first_ulp"]) == (3, None)
        assert growth["reads_as"].startswith("another experiment")

    def test_losses_that_never_differ_do_not_grow(self, tmp_path: Path) -> None:
        assert compared(tmp_path, None, put(3, GRAD, 1)).measures["growth"] == {}


class TestTheResult:
    def test_the_first_divergence_is_the_traces(self, tmp_path: Path) -> None:
        other = FakeRun()
        assert other.trace is not None
        other.trace.steps[2][GRAD] = 1
        other.checkpoints[STEPS - 1]["pipeline"]["_model.field.bias"][0] += 1
        other.scalars["Train Loss"][5] += 1
        sides = FakeRun().write(tmp_path / "a"), other.write(tmp_path / "b")
        result = compare(*sides, policy=RUN_POLICY)
        assert result.outcome is Outcome.DIVERGED
        first = result.first_divergence
        assert first is not None
        assert (first.step, first.last_equal_step, first.stage, first.subject) == (2, 1, "grad", "fields")
        assert first.evidence[0].startswith("trace: differs first at step 2, stage grad, fields")
        assert not any("No trace was recorded" in line for line in first.evidence)

    def test_a_trace_alone_makes_runs_diverge(self, tmp_path: Path) -> None:
        other = FakeRun()
        assert other.trace is not None
        other.trace.steps[9][PARAMS] ^= 1
        result = compare(FakeRun().write(tmp_path / "a"), other.write(tmp_path / "b"), policy=RUN_POLICY)
        assert result.outcome is Outcome.DIVERGED
        assert leaves(result, "different") == ["trace/params/fields"]

    def test_run_requires_one(self, tmp_path: Path) -> None:
        sides = [FakeRun(trace=None).write(tmp_path / name) for name in ("a", "b")]
        result = compare(*sides, policy=RUN_POLICY)
        assert result.outcome is Outcome.INCONCLUSIVE
        assert result.reasons == ("trace: unreadable (neither side recorded it)",)
        result = compare(*sides, policy=RUN_POLICY.without("trace"))
        assert (result.outcome, result.not_recorded) == (Outcome.REPRODUCIBLE, ("trace",))

    def test_of_one_side_it_is_missing(self, tmp_path: Path) -> None:
        result = compare(FakeRun().write(tmp_path / "a"), FakeRun(trace=None).write(tmp_path / "b"))
        assert result.outcome is Outcome.INCONCLUSIVE
        assert leaves(result, "missing") == ["trace"]

    def test_records_without_their_names_are_unreadable(self, tmp_path: Path) -> None:
        sides = [FakeRun().write(tmp_path / name) for name in ("a", "b")]
        for side in sides:
            (side.path / TRACE).unlink()
        result = compare(*(RunDir(side.path) for side in sides))
        assert result.outcome is Outcome.INCONCLUSIVE


def test_a_long_trace_is_compared_in_seconds(tmp_path: Path) -> None:
    import time

    from f3rm_verify.trace_format import STEP
    from f3rm_verify.trace_writer import TraceWriter

    names = [("grad", f"group {i}", "digest") for i in range(40)]
    for side in ("a", "b"):
        writer = TraceWriter(tmp_path / side, mode="steps", algorithm="x")
        writer.add(0, 0, [])
        for step in range(30_000):
            values = range(step, step + 40) if (side, step) != ("b", 20_000) else range(40)
            writer.add(STEP, step, [(*name, value) for name, value in zip(names, values, strict=True)])
        writer.close({}, complete=True)
    start = time.process_time()
    node = compare_trace(RunDir(tmp_path / "a"), RunDir(tmp_path / "b"))
    assert time.process_time() - start < 30
    assert place(node)[:2] == (20_000, 19_999)
    size = (tmp_path / "a" / TRACE_RECORDS).stat().st_size
    assert size == 30_001 * 16 + 30_000 * 40 * 10
