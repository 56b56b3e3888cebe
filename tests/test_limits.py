"""Limits from the policy to the verdict: what they accept, what they never accept, and what they leave to be seen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import LOSS, STEPS, TENSOR, FakeRun, artefacts, compare, compare_fakes, leaves
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from f3rm_verify import compare_runs as module
from f3rm_verify.difference import Difference, Outcome, Result, Verdict
from f3rm_verify.policy import DIFF_POLICY, RUN_POLICY, Limit, Policy

LAST = STEPS - 1
WEIGHT = f"checkpoints/step-{LAST:09d}/pipeline/{TENSOR}"


def limited(artefact: str, policy: Policy = DIFF_POLICY, pattern: str = "*", **numbers: Any) -> Policy:
    return dataclasses.replace(policy, limits={**policy.limits, artefact: (Limit(pattern=pattern, **numbers),)})


def loss_by(factor: float) -> FakeRun:
    run = FakeRun()
    for step in range(3, STEPS):
        run.scalars[LOSS][step] *= factor
    return run


def weight_by(factor: float) -> FakeRun:
    run = FakeRun()
    run.checkpoints[LAST]["pipeline"][TENSOR] *= np.float32(factor)
    return run


def metric_by(factor: float) -> FakeRun:
    run = FakeRun()
    run.metrics["images"]["eval_0000"]["psnr"] *= factor
    return run


CASES: dict[str, tuple[Callable[[float], FakeRun], str]] = {
    "curves": (loss_by, f"curves/{LOSS}"),
    "checkpoints": (weight_by, WEIGHT),
    "metrics": (metric_by, "metrics/images/eval_0000/psnr"),
}


def leaf(result: Result, path: str) -> Difference:
    return next(node for names, node in result.root.leaves() if "/".join(names[1:]) == path)


@pytest.mark.parametrize("artefact", CASES)
def test_within_limits_beyond_them_and_without(tmp_path: Path, artefact: str) -> None:
    make, path = CASES[artefact]
    runs = FakeRun().write(tmp_path / "a"), make(1.001).write(tmp_path / "b")
    within = compare(*runs, policy=limited(artefact, relative=0.002))
    assert (within.outcome, within.outcome.exit_code) == (Outcome.WITHIN_TOLERANCE, 0)
    assert leaves(within, "within_tolerance") == [path]
    assert leaf(within, path).summary.endswith("; within the limits of *: relative 0.002")
    assert leaf(within, path).measures["n_outside"] == 0
    for policy in (limited(artefact, relative=0.0005), limited(artefact, relative=0.5, pattern="other"), DIFF_POLICY):
        result = compare(*runs, policy=policy)
        assert result.outcome is Outcome.DIVERGED
        assert leaves(result, "different") == [path]
    beyond = leaf(compare(*runs, policy=limited(artefact, relative=0.0005)), path)
    assert "; beyond the limits of *: relative 0.0005" in beyond.summary
    assert beyond.measures["n_outside"] >= 1


def test_a_limit_beside_a_difference_elsewhere_hides_nothing(tmp_path: Path) -> None:
    run = loss_by(1.001)
    run.metrics["mean"]["psnr"] += 1e-9
    result = compare_fakes(tmp_path, FakeRun(), run, policy=limited("curves", relative=0.1))
    assert result.outcome is Outcome.DIVERGED
    assert leaves(result, "different") == ["metrics/mean/psnr"]
    assert result.first_divergence is not None
    assert result.first_divergence.subject == "metrics/mean/psnr"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("artefact", ["curves", "checkpoints", "metrics"])
def test_what_is_not_finite_is_beyond_every_limit(tmp_path: Path, artefact: str, value: float) -> None:
    run = FakeRun()
    run.scalars[LOSS][5] = run.metrics["images"]["eval_0000"]["psnr"] = value
    run.checkpoints[LAST]["pipeline"][TENSOR][0, 0] = value
    policy = limited(artefact, absolute=1e300, relative=0.9, ulps=2**30)
    result = compare_fakes(tmp_path, FakeRun(), run, policy=policy)
    assert artefacts(result)[artefact] == "different"


def test_integers_shapes_and_texts_of_a_checkpoint_have_no_limits(tmp_path: Path) -> None:
    run = FakeRun()
    run.checkpoints[LAST]["optimizers"]["fields"]["param_groups"][0]["params"] = [1]
    run.checkpoints[LAST]["pipeline"][TENSOR] = run.checkpoints[LAST]["pipeline"][TENSOR].reshape(2, 4)
    policy = limited("checkpoints", absolute=1e9, relative=0.9)
    result = compare_fakes(tmp_path, FakeRun(), run, policy=policy)
    assert len(leaves(result, "different")) == 2


def test_steps_of_one_side_stay_missing_within_limits(tmp_path: Path) -> None:
    run = loss_by(1.001)
    del run.scalars[LOSS][LAST]
    result = compare_fakes(tmp_path, FakeRun(), run, policy=limited("curves", relative=0.1))
    node = leaf(result, f"curves/{LOSS}")
    assert node.verdict is Verdict.MISSING
    assert "within the limits of *: relative 0.1, but only the " in node.summary
    assert result.outcome is Outcome.INCONCLUSIVE


def test_the_first_step_beyond_the_limits_is_named_beside_the_first_that_differs(tmp_path: Path) -> None:
    run = FakeRun()
    run.scalars[LOSS][2] *= 1.0001
    run.scalars[LOSS][6] *= 1.5
    result = compare_fakes(tmp_path, FakeRun(), run, policy=limited("curves", relative=0.01))
    node = leaf(result, f"curves/{LOSS}")
    assert (node.measures["first_step"], node.measures["first_step_outside"]) == (2, 6)
    assert node.summary.endswith("beyond the limits of *: relative 0.01 from step 6 on")


def test_a_setup_that_differs_stays_a_doubt_until_it_is_ignored_with_a_reason(tmp_path: Path) -> None:
    run = loss_by(1.001)
    run.manifest["environment"]["hardware"]["cpu"] = "another processor"
    runs = FakeRun().write(tmp_path / "a"), run.write(tmp_path / "b")
    policy = limited("curves", relative=0.1)
    result = compare(*runs, policy=policy)
    assert result.outcome is Outcome.INCONCLUSIVE
    assert "nothing else differs beyond its limits" in result.reasons[0]
    path = leaves(result, "different")[0].removeprefix("setup/")
    ignoring = dataclasses.replace(policy, ignored={**policy.ignored, "setup": {path: "two machines are the point"}})
    result = compare(*runs, policy=ignoring)
    assert result.outcome is Outcome.WITHIN_TOLERANCE
    assert leaf(result, f"setup/{path}").summary.startswith("two machines are the point; ")


def test_ignoring_all_checkpoints_is_no_pass(tmp_path: Path) -> None:
    policy = dataclasses.replace(DIFF_POLICY, ignored={**DIFF_POLICY.ignored, "checkpoints": {"step-*": "no"}})
    assert compare_fakes(tmp_path, FakeRun(), FakeRun(), policy=policy).outcome is Outcome.INCONCLUSIVE


def test_a_control_within_the_limits_shows_that_they_are_too_loose(tmp_path: Path) -> None:
    control = loss_by(1.001)
    control.manifest["seed"] = 43
    control.config["machine"]["seed"] = 43
    runs = [run.write(tmp_path / name) for name, run in (("a", FakeRun()), ("b", loss_by(1.0005)), ("c", control))]
    for relative, outcome in ((0.0006, Outcome.WITHIN_TOLERANCE), (0.01, Outcome.INCONCLUSIVE)):
        policy = limited("curves", relative=relative)
        result = module.compare_runs(runs[0], {"candidate": runs[1]}, policy=policy, control=runs[2])
        assert result.outcome is outcome


class TestTrace:
    """With a comparator of traces in their place: limits turn its differences into information."""

    @pytest.fixture
    def with_trace(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Verdict], None]:
        def set_verdict(verdict: Verdict) -> None:
            def compare_trace(*_: Any) -> Difference:
                step = Difference(name="step 3", artefact="trace", verdict=verdict, summary="grad of field differs")
                same = Difference(name="step 2", artefact="trace", verdict=Verdict.IDENTICAL)
                first = {"first_step": 3, "last_equal_step": 2, "stage": "grad", "subject": "field", "growth": {}}
                return Difference.group(name="trace", artefact="trace", children=(same, step), measures=first)

            monkeypatch.setattr(module, "_COMPARATORS", {**module._COMPARATORS, "trace": compare_trace})

        return set_verdict

    @pytest.mark.parametrize("policy", [DIFF_POLICY, dataclasses.replace(RUN_POLICY, required=("curves", "trace"))])
    @pytest.mark.parametrize(
        ("verdict", "exact", "with_limits"),
        [
            (Verdict.DIFFERENT, Outcome.DIVERGED, Outcome.WITHIN_TOLERANCE),
            (Verdict.MISSING, Outcome.INCONCLUSIVE, Outcome.INCONCLUSIVE),
            (Verdict.UNREADABLE, Outcome.INCONCLUSIVE, Outcome.INCONCLUSIVE),
            (Verdict.IDENTICAL, Outcome.REPRODUCIBLE, Outcome.REPRODUCIBLE),
        ],
    )
    def test_limits_and_a_trace(
        self, tmp_path: Path, with_trace: Any, policy: Policy, verdict: Verdict, exact: Outcome, with_limits: Outcome
    ) -> None:
        with_trace(verdict)
        runs = FakeRun().write(tmp_path / "a"), FakeRun().write(tmp_path / "b")
        assert compare(*runs, policy=policy).outcome is exact
        result = compare(*runs, policy=limited("curves", policy, relative=0.1))
        assert result.outcome is with_limits
        if verdict is Verdict.DIFFERENT:
            assert artefacts(result)["trace"] == "ignored"
            assert leaf(result, "trace/step 3").summary == "grad of field differs"
            assert leaf(result, "trace/step 3").measures["reason"].startswith("digests know only equal")

    def test_beyond_the_limits_the_verdict_is_diverged(self, tmp_path: Path, with_trace: Any) -> None:
        with_trace(Verdict.DIFFERENT)
        result = compare_fakes(tmp_path, FakeRun(), loss_by(1.5), policy=limited("curves", relative=0.1))
        assert result.outcome is Outcome.DIVERGED

    def test_a_trace_that_alone_was_asked_for_decides(self, tmp_path: Path, with_trace: Any) -> None:
        with_trace(Verdict.DIFFERENT)
        runs = FakeRun().write(tmp_path / "a"), FakeRun().write(tmp_path / "b")
        for only in (["trace"], ["trace", "setup"]):
            assert compare(*runs, policy=limited("curves", relative=0.1), only=only).outcome is Outcome.DIVERGED


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    artefact=st.sampled_from(sorted(CASES)),
    size=st.floats(1e-7, 0.5),
    limit=st.floats(1e-8, 0.5),
    looser=st.floats(1, 1.9),
    key=st.sampled_from(["relative", "absolute", "ulps"]),
)
def test_a_looser_limit_never_worsens_the_verdict(
    tmp_path_factory: pytest.TempPathFactory, artefact: str, size: float, limit: float, looser: float, key: str
) -> None:
    path = tmp_path_factory.mktemp("pair")
    runs = FakeRun().write(path / "a"), CASES[artefact][0](1 + size).write(path / "b")
    strict: Any = int(limit * 1e6) if key == "ulps" else limit
    loose: Any = int(strict * looser) if key == "ulps" else strict * looser
    order = [Outcome.REPRODUCIBLE, Outcome.WITHIN_TOLERANCE, Outcome.DIVERGED]
    found = [compare(*runs, policy=limited(artefact, **{key: number})).outcome for number in (strict, loose)]
    assert order.index(found[1]) <= order.index(found[0])


def test_patterns_that_match_nothing_are_named(tmp_path: Path) -> None:
    policy = dataclasses.replace(
        limited("curves", pattern="Train Los", relative=0.1),
        ignored={**DIFF_POLICY.ignored, "renders": {"eval_0000/*": "a reason", "eval_9": "a reason"}},
    )
    runs = FakeRun().write(tmp_path / "a"), FakeRun().write(tmp_path / "b")
    assert compare(*runs, policy=policy).policy["unused"] == ["limits.curves: 'Train Los'", "ignore.renders: 'eval_9'"]
    for pattern in ("*/psnr", "images/eval_0000/psnr", "psnr"):
        assert compare(*runs, policy=limited("metrics", pattern=pattern, absolute=1)).policy["unused"] == []
    assert compare(*runs, policy=policy, only=["checkpoints"]).policy["unused"] == []
