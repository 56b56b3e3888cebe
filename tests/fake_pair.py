"""Two runs of `f3rm-verify run` that logged another loss at step 3, without a training; and what to do with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fake_runs import LOSS, STEPS, FakeRun

from f3rm_verify.difference import Outcome, Result
from f3rm_verify.explain_pair import compared_pair
from f3rm_verify.explain_plan import Plan, plan_pair
from f3rm_verify.ns_train import TrainingRequest, command
from f3rm_verify.run_dir import RunDir


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


def diverged_pair(folder: Path, change: Callable[[FakeRun], object] = lambda _: None) -> dict[str, RunDir]:
    """The two runs: 10 steps of 2 s, and evaluations besides; no traces. `change` is done to the candidate."""
    fakes = {}
    for side in ("reference", "candidate"):
        run = FakeRun()
        run.manifest["argv"] = command(request(folder), side=side, seed=42)
        run.manifest["start"], run.manifest["end"] = 100.0, 1200.0
        run.scalars["Train Iter (time)"] = dict.fromkeys(range(STEPS), 2.0)
        run.trace = None
        if side == "candidate":
            run.scalars[LOSS][3] += 1
            change(run)
        fakes[side] = run.write(folder / side)
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
