"""Two runs that diverged are executed again: what is planned, refused, tried and reported; no process is started."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_runs import LOSS, FakeRun

from f3rm_verify import explain_pair as module
from f3rm_verify.difference import Outcome, Result
from f3rm_verify.errors import UnreadableError, UsageError
from f3rm_verify.explain_pair import Plan, compared_pair, explain_pair, plan_pair
from f3rm_verify.ns_train import TrainingRequest, command, request_of
from f3rm_verify.run_dir import SNAPSHOTS, RunDir

Rows = list[dict[str, Any]]


def request(folder: Path) -> TrainingRequest:
    return TrainingRequest(
        seed=42,
        iters=10,
        data=folder,
        method="f3rm",
        output=folder / "out",
        ns_train=Path("ns-train"),
        ns_train_args=("--enable-comprehensive-seeding", "False"),
    )


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, RunDir]:
    """Two runs of `run` that logged another loss at step 3."""
    fakes = {}
    for side in ("reference", "candidate"):
        run = FakeRun()
        run.manifest["argv"] = command(request(tmp_path), side=side, seed=42)
        run.manifest["start"], run.manifest["end"] = 100.0, 120.0
        run.trace = None
        if side == "candidate":
            run.scalars[LOSS][3] += 1
        fakes[side] = run.write(tmp_path / side)
    return fakes


def compared(runs: Mapping[str, RunDir]) -> Result:
    result = compared_pair(runs["reference"], runs["candidate"], reproduce="again")
    assert result.outcome is Outcome.DIVERGED
    return result


def plan(runs: Mapping[str, RunDir], output: Path) -> Plan:
    return plan_pair(
        runs,
        compared(runs),
        output=output,
        ns_train=Path("another/ns-train"),
        load_config=None,
        stall_timeout=9,
        foreign=lambda _: False,
    )


def rows(*values: str, at: int = 0) -> Rows:
    """Steps of which the gradients have these digests; parameters after each follow from all before."""
    found: Rows = []
    for index in range(len(values) + 1):
        before = {"parameters/w": "".join(values[:index]), "generators/torch": str(index)}
        found.append({"step": at + index, "before": before})
        if index < len(values):
            found[-1]["during"] = {"batch": "b", "losses/rgb": "l", "gradients/w": values[index]}
    return found


def test_what_is_executed_again_is_what_was_executed(runs: dict[str, RunDir], tmp_path: Path) -> None:
    found = plan(runs, tmp_path / "again")
    assert (found.start, found.until, found.record, found.seconds) == (0, 5, (0, 5), 2.0)
    for one in found.requests.values():
        assert (one.seed, one.method, one.data) == (42, "f3rm", tmp_path)
        assert (one.output, one.ns_train) == (tmp_path / "again", Path("another/ns-train"))
        assert one.ns_train_args == ("--enable-comprehensive-seeding", "False")
        assert one.variables == {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "42"}
    assert "at most" in found.estimate(3)


def test_the_last_common_snapshot_before_the_step_is_where_it_starts(runs: dict[str, RunDir], tmp_path: Path) -> None:
    for side, steps in (("reference", (0, 1, 2, 4)), ("candidate", (0, 2, 3, 4))):
        (runs[side].path / SNAPSHOTS).mkdir()
        for step in steps:
            (runs[side].path / SNAPSHOTS / f"step-{step:09d}.pt").touch()
    (runs["reference"].path / SNAPSHOTS / "step-000000003.pt").symlink_to(tmp_path)
    found = plan(runs, tmp_path)
    assert found.start == 2
    assert {path.name for path in found.snapshots.values()} == {"step-000000002.pt"}


def test_a_manifest_sets_only_variables_that_execute_nothing() -> None:
    variables = {
        "LD_PRELOAD": "x.so",
        "PYTHONSTARTUP": "x.py",
        "PATH": "x",
        "OMP_NUM_THREADS": "3\0",
        "MKL_CBWR": "AVX",
    }
    assert module._variables({"environment": {"variables": variables, "threads": None}}) == {"MKL_CBWR": "AVX"}
    assert module._variables({"environment": []}) == {}


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (None, "does not say how it was started"),
        (["ns-train", 7], "does not say how it was started"),
        ([], "was not started by this f3rm-verify's run"),
        (["ns-train", "f3rm", "--data", "x"], "was not started by this f3rm-verify's run"),
    ],
)
def test_a_run_that_run_did_not_make_is_refused(tmp_path: Path, argv: Any, reason: str) -> None:
    fakes = [FakeRun(), FakeRun()]
    fakes[1].scalars[LOSS][3] += 1
    for fake in fakes:
        fake.manifest["argv"] = argv
    runs = {name: fake.write(tmp_path / name) for name, fake in zip(("reference", "candidate"), fakes, strict=True)}
    with pytest.raises(UsageError, match=f"The reference run.*{reason}"):
        plan(runs, tmp_path)


def test_a_command_comes_back_as_its_request(tmp_path: Path) -> None:
    asked = request(tmp_path)
    argv = command(asked, side="reference", seed=42)
    found = request_of(argv, output=asked.output, ns_train=asked.ns_train, side="reference")
    assert dataclasses.replace(found, ns_train_args=()) == dataclasses.replace(asked, ns_train_args=())
    assert command(found, side="reference", seed=42) == argv
    for changed in ([*argv, "--machine.seed", "7"], [argv[0], "--help", *argv[2:]]):
        with pytest.raises(UsageError):
            request_of(changed, output=asked.output, ns_train=asked.ns_train, side="reference")


def test_data_that_are_gone_are_told(tmp_path: Path) -> None:
    asked = dataclasses.replace(request(tmp_path), data=tmp_path / "gone")
    argv = command(asked, side="reference", seed=42)
    with pytest.raises(UsageError, match=r"gone, are not there any more; put them back\."):
        request_of(argv, output=tmp_path, ns_train=tmp_path, side="reference")


class TestTries:
    def explained(
        self,
        runs: dict[str, RunDir],
        monkeypatch: pytest.MonkeyPatch,
        *executed: tuple[Rows, Rows],
        start: int = 0,
    ) -> tuple[Result, list[Plan]]:
        """What comes of tries that gave these rows; and what was planned for each."""
        plans: list[Plan] = []
        left = iter(executed)

        def execute(plan: Plan, number: int, watch: Any) -> Any:
            plans.append(plan)
            sides = zip(("reference", "candidate"), next(left), strict=True)
            return {side: ({"rows": data}, runs[side]) for side, data in sides}

        monkeypatch.setattr(module, "_execute", execute)
        monkeypatch.setattr(module, "first_operator_difference", lambda *_: None)
        planned = plan(runs, runs["reference"].path.parent)
        planned = dataclasses.replace(planned, start=start, record=(start, planned.until))
        result = explain_pair(
            runs, compared(runs), planned, tries=len(executed), watch=lambda _: None, reproduce="again"
        )
        return result, plans

    def test_what_does_not_show_again_is_told_with_the_number_of_tries(
        self, runs: dict[str, RunDir], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        same = rows("a", "b", "c")
        result, plans = self.explained(runs, monkeypatch, (same, same), (same, same), (same, same))
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
        result, plans = self.explained(runs, monkeypatch, (same, same), (same, rows("a", "x", "c")))
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
        result, plans = self.explained(runs, monkeypatch, unequal, both, start=2)
        assert [one.start for one in plans] == [2, 0]
        assert result.first_divergence is not None
        assert result.first_divergence.step == 2

    def test_sides_that_did_other_steps_are_not_compared(
        self, runs: dict[str, RunDir], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(UnreadableError, match="did not do the same steps"):
            self.explained(runs, monkeypatch, (rows("a"), rows("a", at=1)))
