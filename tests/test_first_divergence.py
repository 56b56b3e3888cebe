from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_runs import EVAL, IMAGES, LOSS, PSNR, RATE, STEPS, TENSOR, FakeRun, claim, compare, compare_fakes

from f3rm_verify.difference import Difference, FirstDivergence, Outcome, Verdict
from f3rm_verify.first_divergence import down_to_worst, earliness

LAST = STEPS - 1
GRADIENTS = "Train Metrics Dict/Gradients/Total"


def first_of(
    path: Path, change: Callable[[FakeRun], object], base: Callable[[FakeRun], object] | None = None
) -> FirstDivergence:
    """The first divergence of a run from one that was changed; both were made with `base`."""
    runs = FakeRun(trace=None), FakeRun(trace=None)
    for run in runs:
        if base is not None:
            base(run)
    change(runs[1])
    result = compare_fakes(path, *runs, reproduce="f3rm-verify diff a b")
    assert result.outcome is Outcome.DIVERGED
    assert result.first_divergence is not None
    assert result.first_divergence.reproduce == "f3rm-verify diff a b"
    return result.first_divergence


def where(first: FirstDivergence) -> tuple[int | None, int | None, str | None, str]:
    return first.step, first.last_equal_step, first.stage, first.subject


def later(run: FakeRun, tag: str, step: int) -> None:
    """Changes the scalar from `step` on."""
    run.scalars[tag] = {s: value + (1.0 if s >= step else 0.0) for s, value in run.scalars[tag].items()}


@pytest.mark.parametrize(
    ("tag", "step", "expected"),
    [
        (LOSS, 7, (7, 6, "loss", LOSS)),
        (LOSS, 0, (0, None, "loss", LOSS)),
        (PSNR, 3, (3, 2, "forward", PSNR)),
        (RATE, 9, (9, 8, "schedule", RATE)),
        (EVAL, 5, (5, 0, "eval", EVAL)),
    ],
)
def test_a_curve(tmp_path: Path, tag: str, step: int, expected: tuple[object, ...]) -> None:
    first = first_of(tmp_path, lambda run: later(run, tag, step))
    assert where(first) == expected
    assert first.evidence[0].startswith("curves: 1 different, ")
    assert first.evidence[-1].startswith("No trace was recorded")
    assert (first.cause, first.operator, first.rank) == ("unknown", None, 0)


def test_the_earliest_curve_wins(tmp_path: Path) -> None:
    def change(run: FakeRun) -> None:
        later(run, LOSS, 5)
        later(run, PSNR, 3)

    assert where(first_of(tmp_path, change)) == (3, 2, "forward", PSNR)


def test_at_one_step_the_loss_comes_before_what_follows_from_it(tmp_path: Path) -> None:
    def change(run: FakeRun) -> None:
        for tag in (EVAL, LOSS, RATE, PSNR):
            later(run, tag, 5)

    assert where(first_of(tmp_path, change)) == (5, 4, "loss", LOSS)


def test_gradients_have_their_stage(tmp_path: Path) -> None:
    def with_gradients(run: FakeRun) -> None:
        run.scalars[GRADIENTS] = dict.fromkeys(range(STEPS), 1.0)

    assert where(first_of(tmp_path, lambda run: later(run, GRADIENTS, 4), with_gradients)) == (4, 3, "grad", GRADIENTS)


def test_the_last_equal_step_is_one_that_was_logged(tmp_path: Path) -> None:
    def sparse(run: FakeRun) -> None:
        run.config["logging"]["steps_per_log"] = 4
        run.scalars = {LOSS: {0: 1.0, 4: 0.5, 8: 0.25}}

    assert where(first_of(tmp_path, lambda run: later(run, LOSS, 8), sparse)) == (8, 4, "loss", LOSS)


def several_checkpoints(run: FakeRun) -> None:
    run.checkpoints = {step: copy.deepcopy(run.checkpoints[LAST]) for step in (2, 5, LAST)}


def flip(run: FakeRun, *steps: int) -> None:
    for step in steps:
        run.checkpoints[step]["pipeline"][TENSOR].view(np.int32)[0, 0] ^= 1


def checkpoint(step: int) -> str:
    return f"checkpoints/step-{step:09d}/pipeline/{TENSOR}"


class TestCheckpoints:
    def test_alone_dates_nothing(self, tmp_path: Path) -> None:
        first = first_of(tmp_path, lambda run: flip(run, LAST))
        assert where(first) == (None, None, "params", checkpoint(LAST))
        assert [line.split(",")[0] for line in first.evidence] == ["checkpoints: 1 different"]

    def test_after_an_equal_one_dates(self, tmp_path: Path) -> None:
        first = first_of(tmp_path, lambda run: flip(run, 5, LAST), several_checkpoints)
        assert where(first) == (5, 2, "params", checkpoint(5))

    def test_before_the_first_curve_that_differs(self, tmp_path: Path) -> None:
        def change(run: FakeRun) -> None:
            flip(run, 2, 5, LAST)
            later(run, LOSS, 4)

        assert where(first_of(tmp_path, change, several_checkpoints)) == (2, None, "params", checkpoint(2))

    def test_after_the_first_curve_that_differs(self, tmp_path: Path) -> None:
        def change(run: FakeRun) -> None:
            flip(run, 5, LAST)
            later(run, LOSS, 4)

        assert where(first_of(tmp_path, change, several_checkpoints)) == (4, 3, "loss", LOSS)

    def test_of_the_same_step_comes_after_the_loss_and_before_the_evaluation(self, tmp_path: Path) -> None:
        def change(run: FakeRun, tag: str) -> None:
            flip(run, 5)
            later(run, tag, 5)

        first = first_of(tmp_path / "loss", lambda run: change(run, LOSS), several_checkpoints)
        assert where(first) == (5, 4, "loss", LOSS)
        first = first_of(tmp_path / "eval", lambda run: change(run, EVAL), several_checkpoints)
        assert where(first) == (5, 2, "params", checkpoint(5))


def test_only_a_render(tmp_path: Path) -> None:
    def change(run: FakeRun) -> None:
        run.renders[IMAGES[1]]["depth"][0, 0] += 1

    assert where(first_of(tmp_path, change)) == (None, None, "eval", f"renders/{IMAGES[1]}/depth")


def test_only_metrics_and_renders(tmp_path: Path) -> None:
    def change(run: FakeRun) -> None:
        run.renders[IMAGES[1]]["depth"][0, 0] += 1
        run.metrics["mean"]["psnr"] += 1

    first = first_of(tmp_path, change)
    assert where(first) == (None, None, "eval", "metrics/mean/psnr")
    assert [line.split(":")[0] for line in first.evidence] == ["metrics", "renders"]


def test_the_rank_of_the_reference(tmp_path: Path) -> None:
    first = first_of(tmp_path, lambda run: later(run, LOSS, 7), lambda run: run.manifest.update(rank=3))
    assert first.rank == 3


class TestCause:
    def test_setups_that_differ(self, tmp_path: Path) -> None:
        def change(run: FakeRun) -> None:
            later(run, LOSS, 0)
            run.config["machine"]["seed"] = run.manifest["seed"] = 43
            run.manifest["environment"]["variables"]["PYTHONHASHSEED"] = "43"
            run.seeding["entries"][0] = claim("PYTHONHASHSEED", "43")

        first = first_of(tmp_path, change)
        assert first.cause == (
            "different seeds: config.yml / machine.seed: 42 in the reference, 43 in the candidate; "
            "seed: 42 in the reference, 43 in the candidate. Initial weights, batches and samples are drawn from it."
        )
        assert first.remedy == "Train both with one --seed."
        assert any(line.startswith("also possible: different hash seeds: ") for line in first.evidence)

    def test_a_setup_that_one_side_did_not_record_explains_nothing(self, tmp_path: Path) -> None:
        assert first_of(tmp_path, lambda run: (later(run, LOSS, 0), setattr(run, "manifest", "{"))).cause == "unknown"

    def test_deterministic_algorithms_off(self, tmp_path: Path) -> None:
        def off(run: FakeRun) -> None:
            run.seeding["entries"][1] = claim("deterministic algorithms", "off")

        first = first_of(tmp_path, lambda run: later(run, LOSS, 7), off)
        assert first.cause.startswith("unknown; torch's deterministic algorithms were off")
        assert "--seed-deterministic-algorithms True" in first.remedy

    def test_a_broken_seeding_log_explains_nothing(self, tmp_path: Path) -> None:
        def broken(run: FakeRun) -> None:
            run.seeding = {"entries": [{"claim": ["deterministic algorithms"], "observed": {"a": 1}}, 3]}

        assert first_of(tmp_path, lambda run: later(run, LOSS, 7), broken).cause == "unknown"


def test_an_image_in_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from f3rm_verify import compare_runs

    measures = {"kind": "image", "first_step": 4, "last_equal_step": 2}
    leaf = Difference(name="Eval Images/img", artefact="curves", verdict=Verdict.DIFFERENT, measures=measures)
    node = Difference.group(name="curves", artefact="curves", children=[leaf])
    monkeypatch.setattr(compare_runs, "compare_curves", lambda *_, **__: node)
    runs = FakeRun().write(tmp_path / "a"), FakeRun().write(tmp_path / "b")
    first = compare(*runs).first_divergence
    assert first is not None
    assert where(first) == (4, 2, "eval", "Eval Images/img")


def test_a_curve_of_another_type_has_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from f3rm_verify import compare_runs

    leaf = Difference(name=LOSS, artefact="curves", verdict=Verdict.DIFFERENT, measures={"kind": "scalar"})
    node = Difference.group(name="curves", artefact="curves", children=[leaf])
    monkeypatch.setattr(compare_runs, "compare_curves", lambda *_, **__: node)
    runs = FakeRun().write(tmp_path / "a"), FakeRun().write(tmp_path / "b")
    first = compare(*runs).first_divergence
    assert first is not None
    assert where(first) == (None, None, None, f"curves/{LOSS}")


def test_earliness_orders_by_step_and_stage() -> None:
    places = [
        FirstDivergence(step=3, stage="loss", subject="a"),
        FirstDivergence(step=3, stage="params", subject="b"),
        FirstDivergence(step=3, subject="c"),
        FirstDivergence(step=4, stage="init", subject="d"),
        FirstDivergence(stage="params", subject="e"),
    ]
    for earlier, other in itertools.pairwise(places):
        assert earliness(earlier) > earliness(other)
    assert earliness(None) == earliness(places[-1])


def test_down_to_worst_takes_the_first_child_as_bad_as_its_parent() -> None:
    def leaf(name: str, verdict: Verdict) -> Difference:
        return Difference(name=name, artefact="curves", verdict=verdict)

    inner = Difference.group(
        name="inner", artefact="curves", children=[leaf("a", Verdict.IDENTICAL), leaf("b", Verdict.DIFFERENT)]
    )
    tree = Difference.group(name="root", artefact="curves", children=[leaf("c", Verdict.MISSING), inner])
    assert [node.name for node in down_to_worst(tree)] == ["root", "inner", "b"]
    empty = Difference.group(name="empty", artefact="curves", children=())
    assert down_to_worst(empty) == [empty]
