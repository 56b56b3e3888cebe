"""Two runs that diverged are executed again: what is tried and reported; no process is started."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from fake_pair import compared, diverged_pair, plan

from f3rm_verify import explain_pair as module
from f3rm_verify.difference import FirstDivergence, Outcome, Result
from f3rm_verify.errors import UnreadableError
from f3rm_verify.explain import Repeated
from f3rm_verify.explain_pair import explain_pair
from f3rm_verify.explain_plan import Plan
from f3rm_verify.readers.operators import Operator, OperatorDifference, TensorFacts
from f3rm_verify.run_dir import RunDir

Rows = list[dict[str, Any]]
SAME = ({"gradients/w": "a"},) * 6


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, RunDir]:
    return diverged_pair(tmp_path)


def rows(*values: str, at: int = 0) -> Rows:
    """Steps of which the gradients have these digests; parameters after each follow from all before."""
    found: Rows = []
    for index in range(len(values) + 1):
        before = {"parameters/w": "".join(values[:index]), "generators/torch": str(index)}
        found.append({"step": at + index, "before": before})
        if index < len(values):
            found[-1]["during"] = {"batch": "b", "losses/rgb": "l", "gradients/w": values[index]}
    return found


def one_process(step: int, tries: tuple[dict[str, str], ...], run: RunDir) -> Repeated:
    return Repeated(
        step=step,
        tries=tries,
        seconds=(0.1,) * len(tries),
        not_restored=(),
        left_out=(),
        recorded_tries=0,
        recorded=(),
        difference=None,
        run=run,
    )


def put(module: str, kind: str = "kernel") -> OperatorDifference:
    """An operator that accumulates, in a module."""
    grid = TensorFacts(kind="float32 cpu", sizes=(64, 2), digest="a")
    operator = Operator(
        number=7,
        name="aten::index_put",
        overload="",
        module=module,
        source="encodings.py:443 in forward",
        backward="IndexBackward0",
        kind="",
        inputs=(grid,),
        values=(),
        outputs=(grid,),
    )
    return OperatorDifference(kind=kind, operator=operator, different_outputs=(0,))


def explained(
    runs: dict[str, RunDir],
    patch: pytest.MonkeyPatch,
    *executed: tuple[Rows, Rows],
    start: int = 0,
    operator: OperatorDifference | None = None,
    repeated: tuple[dict[str, str], ...] = SAME,
) -> tuple[Result, list[Plan]]:
    """What comes of tries that gave these rows, an operator, and these tries of one process; and of each its plan."""
    plans: list[Plan] = []
    left = iter(executed)

    def execute(plan: Plan, number: int, watch: Any) -> Any:
        plans.append(plan)
        sides = zip(("reference", "candidate"), next(left), strict=True)
        return {side: ({"rows": data}, runs[side]) for side, data in sides}

    patch.setattr(module, "_execute", execute)
    patch.setattr(module, "first_operator_difference", lambda *_: operator)
    patch.setattr(module, "_repeat", lambda _, step, watch: one_process(step, repeated, runs["reference"]))
    planned = plan(runs, runs["reference"].path.parent)
    planned = dataclasses.replace(planned, start=start, record=(start, planned.until))
    result = explain_pair(runs, compared(runs), planned, tries=len(executed), watch=lambda _: None, reproduce="again")
    return result, plans


class TestTries:
    def test_what_does_not_show_again_is_told_with_the_number_of_tries(
        self, runs: dict[str, RunDir], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        same = rows("a", "b", "c")
        result, plans = explained(runs, monkeypatch, (same, same), (same, same), (same, same))
        first = result.first_divergence
        assert first is not None
        assert len(plans) == 3
        assert result.outcome is Outcome.DIVERGED
        assert first.operator is None
        assert first.evidence[0] == (
            "steps 0 to 5 executed again in two processes, 3 times: it did not show again, so no operator is named"
        )
        assert first.step == 3

    def test_the_first_difference_is_where_it_showed(
        self, runs: dict[str, RunDir], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        same = rows("a", "b", "c")
        result, plans = explained(runs, monkeypatch, (same, same), (same, rows("a", "x", "c")))
        first = result.first_divergence
        assert first is not None
        assert len(plans) == 2
        assert (first.step, first.last_equal_step, first.stage, first.subject) == (1, 0, "grad", "w")
        assert "it showed in try 2: first at step 1, grad of w" in first.evidence[0]

    def test_snapshots_that_are_not_equal_are_not_started_from_again(
        self, runs: dict[str, RunDir], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        unequal = rows("a", "b", at=2), rows("a", "b", at=2)
        unequal[1][0]["before"]["parameters/w"] = "other"
        both = rows("a", "b", "c"), rows("a", "b", "y")
        result, plans = explained(runs, monkeypatch, unequal, both, start=2)
        assert [one.start for one in plans] == [2, 0]
        assert result.first_divergence is not None
        assert result.first_divergence.step == 2

    def test_sides_that_did_other_steps_are_not_compared(
        self, runs: dict[str, RunDir], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(UnreadableError, match="did not do the same steps"):
            explained(runs, monkeypatch, (rows("a"), rows("a", at=1)))


class TestWhatOneProcessShows:
    """Two processes differ at step 1; the same step, repeated in one process, does or does not."""

    def first(self, runs: dict[str, RunDir], patch: pytest.MonkeyPatch, **how: Any) -> FirstDivergence:
        result, _ = explained(runs, patch, (rows("a", "b", "c"), rows("a", "x", "c")), **how)
        assert result.first_divergence is not None
        return result.first_divergence

    def test_several_results_are_what_the_kernels_do(
        self, runs: dict[str, RunDir], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tries = (*SAME, {"gradients/w": "b"})
        first = self.first(runs, monkeypatch, operator=put("w"), repeated=tries)
        assert first.operator == "aten::index_put"
        assert first.cause.startswith("thread-order float accumulation on the CPU: ")
        lines = " ".join(first.evidence)
        assert "one process: 7 tries of step 1 from one state gave 2 results, so it is what the kernels do" in lines
        assert "in the backward (IndexBackward0) of w, from encodings.py:443 in forward" in lines
        assert "float32 cpu 64 x 2" in lines
        assert "do not share" not in lines

    def test_one_result_is_what_the_processes_inherit_and_nothing_is_said_of_kernels(
        self, runs: dict[str, RunDir], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = self.first(runs, monkeypatch, operator=put("w"))
        lines = " ".join(first.evidence)
        assert "one process: 6 tries of step 1 from one state gave the same bits" in lines
        assert "so it is what the processes inherit" in lines
        assert "what the processes do not share: nothing that was recorded" in lines
        assert first.cause.startswith("unknown; one process that repeats the step gets one result")
        assert "PYTHONHASHSEED" in first.remedy

    @pytest.mark.parametrize("kind", ["value", "order", "outside", "sequence", "unseen", "draw"])
    def test_an_operator_that_got_something_else_is_no_cause(
        self, runs: dict[str, RunDir], monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        first = self.first(runs, monkeypatch, operator=put("w", kind))
        assert first.operator == "aten::index_put"
        assert first.cause.startswith("unknown; one process")

    def test_a_recorded_difference_of_the_processes_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs = diverged_pair(tmp_path, lambda run: run.manifest["environment"]["variables"].update(PYTHONHASHSEED="7"))
        first = self.first(runs, monkeypatch, operator=put("w", "value"))
        assert "what the processes do not share: environment.variables / PYTHONHASHSEED: " in " ".join(first.evidence)
        assert first.cause.startswith("different hash seeds: ")

    def test_what_differs_before_the_first_step_is_repeated_in_no_process(
        self, runs: dict[str, RunDir], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pair = rows("a", "b"), rows("a", "b")
        pair[1][0]["before"]["parameters/w"] = "other"
        result, _ = explained(runs, monkeypatch, pair)
        first = result.first_divergence
        assert first is not None
        assert (first.step, first.last_equal_step, first.stage, first.subject) == (0, None, "params", "w")
        assert "it showed in try 1: before the first step, params of w" in first.evidence[0]
        assert not [line for line in first.evidence if "one process:" in line]

    def test_of_several_in_a_stage_the_subject_is_the_operators(
        self, runs: dict[str, RunDir], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pair = rows("a", "b", "c"), rows("a", "x", "c")
        for number, side in enumerate(pair):
            side[1]["during"]["gradients/z.table"] = str(number)
        result, _ = explained(runs, monkeypatch, pair, operator=put("z"))
        assert result.first_divergence is not None
        assert result.first_divergence.subject == "z.table"
