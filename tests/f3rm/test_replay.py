"""Steps of real trainings of the built-in preset executed again, in one process that imports nerfstudio once."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from f3rm.small_trainings import STEPS, Trainings

from f3rm_verify.errors import TrainingError
from f3rm_verify.run_dir import EXPLAIN, SNAPSHOTS

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("replayed"))


@pytest.fixture(scope="module", params=["f3rm", "nerfacto"])
def straight(trainings: Trainings, request: pytest.FixtureRequest) -> tuple[str, Any]:
    """A method, and its trainer after a training that kept snapshots."""
    return request.param, trainings.train(method=request.param, SNAPSHOT_EVERY="2")


def replay(trainings: Trainings, method: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What executing again wrote."""
    trainer = trainings.train(method=method, REPLAY=json.dumps(asked))
    found: dict[str, Any] = json.loads((trainer.base_dir / EXPLAIN).read_text("utf8"))
    return found


def end_of(trainer: Any) -> dict[str, str]:
    from f3rm_verify.f3rm.snapshots import digests_of, take_snapshot

    return digests_of(take_snapshot(trainer, STEPS))


def test_replay_from_a_snapshot_is_the_straight_run_bit_by_bit(trainings: Trainings, straight: tuple[str, Any]) -> None:
    method, trainer = straight
    stretch = {"stretch": {"until": STEPS - 1, "record": [STEPS - 1, STEPS - 1]}}
    snapshots = sorted((trainer.base_dir / SNAPSHOTS).iterdir())
    assert [path.name for path in snapshots] == [f"step-{step:09d}.pt" for step in (0, 2, 4)]
    found = replay(trainings, method, {**stretch, "snapshot": str(snapshots[-1])})
    assert [row["step"] for row in found["rows"]] == [4, 5, 6]
    again, last = found["rows"][-1]["before"], end_of(trainer)
    kinds = ("parameters/", "buffers/", "optimizers/", "schedulers/", "generators/", "attributes/_model", "scaler")
    ends = [name for name in again if name.startswith(kinds)]
    assert {name.partition("/")[0] for name in ends} == {kind.partition("/")[0] for kind in kinds}
    assert {name: last[name] for name in ends} == {name: again[name] for name in ends}


@pytest.mark.parametrize(("method", "held"), [("f3rm", False), ("nerfacto", True)])
def test_a_seeded_step_gives_the_same_bits_from_one_state_each_time(
    trainings: Trainings, method: str, held: bool
) -> None:
    found = replay(trainings, method, {"repeat": {"at": 2, "tries": 3, "recorded": 2}})
    assert (found["batch_held"], found["not_restored"], found["recorded"]) == (held, [], None)
    first, *others = [one["digests"] for one in found["tries"]]
    assert others == [first, first]
    assert {name.partition("/")[0] for name in first} >= {"batch", "losses", "gradients", "parameters", "optimizers"}


class Harmful:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("how", ["torch", "pickle", "cut", "empty", "missing", "version"])
def test_a_snapshot_that_is_none_is_told_and_nothing_in_it_is_executed(tmp_path: Path, how: str) -> None:
    import torch

    from f3rm_verify.f3rm.snapshots import load_snapshot

    path, marker = tmp_path / "step-000000004.pt", tmp_path / "executed"
    if how == "torch":
        torch.save({"version": 1, "step": 4, "attributes": Harmful(marker)}, path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Harmful(marker)))
    elif how == "cut":
        torch.save({"version": 1}, path)
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "version":
        torch.save({"version": 999}, path)
    elif how == "empty":
        path.touch()
    with pytest.raises(TrainingError, match=r"step-000000004\.pt is (no|a) snapshot"):
        load_snapshot(path)
    assert not marker.exists()


def test_a_snapshot_of_another_training_is_refused(straight: tuple[str, Any]) -> None:
    from f3rm_verify.f3rm.snapshots import put_back, take_snapshot

    _, trainer = straight
    state = take_snapshot(trainer, STEPS)
    state["parameters"].popitem()
    with pytest.raises(TrainingError, match="not of this training: its parameters are others"):
        put_back(trainer, state)
