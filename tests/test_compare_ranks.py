"""Several ranks, compared rank by rank."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from fake_runs import LOSS, STEPS, FakeRun, artefacts, claim, compare_fakes, leaves, plain_run, run_of_ranks

from f3rm_verify.compare_runs import compare_runs
from f3rm_verify.difference import Outcome
from f3rm_verify.policy import DIFF_POLICY, RUN_POLICY, Policy
from f3rm_verify.run_dir import RANKS, RunDir


@pytest.mark.parametrize("policy", [RUN_POLICY, DIFF_POLICY])
def test_equal_ranks_are_reproducible(tmp_path: Path, policy: Policy) -> None:
    result = compare_fakes(tmp_path, run_of_ranks(), run_of_ranks(), policy=policy)
    assert result.outcome is Outcome.REPRODUCIBLE, result.reasons
    assert {name: artefacts(result)[name] for name in ("rank 1", "rank 2")} == dict.fromkeys(
        ("rank 1", "rank 2"), "identical"
    )
    assert result.reference["ranks"] == 3
    compared = {"/".join(path[1:3]) for path, _ in result.root.leaves() if path[1] == "rank 2"}
    assert compared == {f"rank 2/{name}" for name in ("setup", "seeding", "trace", "curves")}


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("step", [0, 4, STEPS - 1])
def test_a_fault_in_one_rank_is_found_with_rank_and_step(tmp_path: Path, rank: int, step: int) -> None:
    other = run_of_ranks()
    other.ranks[rank].scalars[LOSS][step] += 2**-20
    result = compare_fakes(tmp_path, run_of_ranks(), other)
    assert result.outcome is Outcome.DIVERGED
    assert result.first_divergence is not None
    assert (result.first_divergence.rank, result.first_divergence.step) == (rank, step)
    assert (result.first_divergence.stage, result.first_divergence.subject) == ("loss", LOSS)
    assert leaves(result, "different") == [f"rank {rank}/curves/{LOSS}"]


def test_after_the_all_reduce_every_rank_differs_and_the_first_is_named(tmp_path: Path) -> None:
    other = run_of_ranks()
    for rank, run in {0: other, **other.ranks}.items():
        for step in range(3 if rank == 2 else 4, STEPS):
            run.scalars[LOSS][step] += 0.5
    first = compare_fakes(tmp_path, run_of_ranks(), other).first_divergence
    assert first is not None
    assert (first.rank, first.step, first.last_equal_step) == (2, 3, 2)


def test_of_ranks_that_diverge_together_the_lowest_is_named(tmp_path: Path) -> None:
    other = run_of_ranks()
    for rank in (1, 2):
        other.ranks[rank].scalars[LOSS][5] += 0.5
    first = compare_fakes(tmp_path, run_of_ranks(), other).first_divergence
    assert first is not None
    assert first.rank == 1


@pytest.mark.parametrize("policy", [RUN_POLICY, DIFF_POLICY])
@pytest.mark.parametrize("both", [True, False])
def test_a_rank_that_left_nothing_is_never_a_pass(tmp_path: Path, policy: Policy, both: bool) -> None:
    sides = run_of_ranks(), run_of_ranks()
    for side in sides if both else sides[1:]:
        del side.ranks[1]
    result = compare_fakes(tmp_path, *sides, policy=policy)
    assert result.outcome is Outcome.INCONCLUSIVE
    assert "rank 1: it left nothing in the" in " ".join(result.reasons)
    assert artefacts(result)["rank 1"] == "missing"


def test_one_side_with_more_ranks_is_no_pass(tmp_path: Path) -> None:
    assert compare_fakes(tmp_path, run_of_ranks(2), run_of_ranks(3)).outcome is Outcome.INCONCLUSIVE


@pytest.mark.parametrize(
    ("change", "outcome", "reason"),
    [
        (lambda run: run.manifest.update(completion=None), Outcome.INCONCLUSIVE, "did not complete"),
        (lambda run: run.manifest.update(parameters={"before": "1", "after": "1"}), Outcome.INCONCLUSIVE, "trained"),
        (lambda run: setattr(run, "scalars", {}), Outcome.INCONCLUSIVE, "curves"),
        (lambda run: setattr(run, "seeding", "{"), Outcome.INCONCLUSIVE, "seeding"),
        (lambda run: run.manifest.update(seed=43), Outcome.INCONCLUSIVE, "different conditions"),
    ],
)
def test_what_makes_a_run_doubtful_does_so_in_every_rank(
    tmp_path: Path, change: Any, outcome: Outcome, reason: str
) -> None:
    other = run_of_ranks(2)
    change(other.ranks[1])
    result = compare_fakes(tmp_path, run_of_ranks(2), other, policy=RUN_POLICY)
    assert result.outcome is outcome
    assert any(text.startswith("rank 1: ") and reason in text for text in result.reasons), result.reasons


def test_a_rank_that_is_a_copy_is_one_run(tmp_path: Path) -> None:
    sides = run_of_ranks(2), run_of_ranks(2)
    for side in sides:
        side.ranks[1].manifest["run_id"] = "one"
    result = compare_fakes(tmp_path, *sides)
    assert result.outcome is Outcome.INCONCLUSIVE
    assert any(reason.startswith("rank 1: both sides have the run id") for reason in result.reasons)


@pytest.mark.parametrize("policy", [RUN_POLICY, DIFF_POLICY])
def test_a_rank_in_the_place_of_another_is_no_pass(tmp_path: Path, policy: Policy) -> None:
    sides = run_of_ranks(), run_of_ranks()
    for side in sides:
        side.ranks[2] = copy.deepcopy(side.ranks[1])
    result = compare_fakes(tmp_path, *sides, policy=policy)
    assert result.outcome is Outcome.INCONCLUSIVE
    assert set(result.reasons) >= {f"rank 2: the {side} is evidence of rank 1" for side in ("reference", "candidate")}


def test_a_rank_that_is_a_file_is_no_pass(tmp_path: Path) -> None:
    sides = [run_of_ranks(1).write(tmp_path / name) for name in ("reference", "candidate")]
    for side in sides:
        (side.path / RANKS).mkdir()
        (side.path / RANKS / "1").write_text("?", "utf8")
    result = compare_runs(sides[0], {"candidate": sides[1]}, policy=DIFF_POLICY)
    assert result.outcome is Outcome.INCONCLUSIVE
    assert any(reason.startswith("rank 1: ") for reason in result.reasons)


def test_failing_claims_of_every_rank_are_in_the_report(tmp_path: Path) -> None:
    sides = run_of_ranks(2), run_of_ranks(2)
    for side in sides:
        side.ranks[1].seeding = copy.deepcopy(side.seeding)
        side.ranks[1].seeding["entries"][0] = claim("PYTHONHASHSEED", "another hash seed", "fails")
    result = compare_fakes(tmp_path, *sides)
    assert [entry["claim"] for entry in result.seeding["reference"] if entry["verdict"] == "fails"] == [
        "rank 1: PYTHONHASHSEED"
    ]


def test_only_what_was_asked_for_is_compared_in_each_rank(tmp_path: Path) -> None:
    curves = compare_fakes(tmp_path / "a", run_of_ranks(2), run_of_ranks(2), only=["curves"])
    assert artefacts(curves) == {"curves": "identical", "rank 1": "identical"}
    renders = compare_fakes(tmp_path / "b", run_of_ranks(2), run_of_ranks(2), only=["renders"])
    assert artefacts(renders) == {"renders": "identical"}


def test_a_plain_run_has_no_ranks(tmp_path: Path) -> None:
    assert "rank 1" not in artefacts(compare_fakes(tmp_path, plain_run(), plain_run()))


@pytest.mark.parametrize("world_size", [10**12, -3, "2", None, [2]])
def test_a_manifest_can_say_any_number(tmp_path: Path, world_size: Any) -> None:
    sides = FakeRun(), FakeRun()
    for side in sides:
        side.manifest["world_size"] = world_size
    result = compare_fakes(tmp_path, *sides)
    assert result.outcome is (Outcome.INCONCLUSIVE if world_size == 10**12 else Outcome.REPRODUCIBLE)


def test_a_rank_outside_of_the_run_is_not_read(tmp_path: Path) -> None:
    elsewhere = FakeRun().write(tmp_path / "elsewhere")
    sides = [run_of_ranks(1).write(tmp_path / name) for name in ("reference", "candidate")]
    for side in sides:
        (side.path / RANKS).mkdir()
        (side.path / RANKS / "1").symlink_to(elsewhere.path)
    result = compare_runs(
        RunDir(sides[0].path), {"candidate": RunDir(sides[1].path)}, policy=DIFF_POLICY, only=["curves"]
    )
    assert result.outcome is Outcome.INCONCLUSIVE
    assert "verify/ranks: holds a link" in " ".join(result.reasons)
