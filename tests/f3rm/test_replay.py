"""Steps of real trainings of the built-in preset executed again, in one process that imports nerfstudio once."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from f3rm_verify.errors import TrainingError
from f3rm_verify.presets import SMALL
from f3rm_verify.run_dir import EXPLAIN, SNAPSHOTS
from f3rm_verify.scene import write_scene

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]
STEPS = 6


class Trainings:
    """Trains the preset, or executes steps of it again, in a directory of its own each time; gives the trainer."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.scene = write_scene(folder / "scene")

    def train(self, *, seeded: bool = True, **variables: str) -> Any:
        import torch
        import tyro
        from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
        from nerfstudio.utils import writer

        self.count += 1
        words = ["--output-dir", str(self.folder / str(self.count)), "--vis", "tensorboard", *SMALL]
        words += ["--max-num-iterations", str(STEPS), "--enable-comprehensive-seeding", str(seeded)]
        words += ["--steps-per-eval-batch", "3", "--encoding", "stock", "--machine.device-type", "cpu"]
        config = tyro.cli(AnnotatedBaseConfigUnion, args=["f3rm", "--data", str(self.scene), *words])
        config.pipeline.datamanager.data = config.data
        config.viewer.quit_on_train_completion = True
        config.set_timestamp()
        config.save_config()
        torch.manual_seed(42)
        np.random.seed(42)
        random.seed(42)
        torch.set_num_threads(2)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(f"F3RM_VERIFY_{name}", value)
            patch.setattr(writer, "EVENT_WRITERS", [])
            patch.setattr(writer, "EVENT_STORAGE", [])
            trainer = config.setup(local_rank=0, world_size=1)
            trainer.setup()
            trainer.train()
        torch.use_deterministic_algorithms(False)
        return trainer

    def replay(self, asked: dict[str, Any], *, seeded: bool = True) -> tuple[dict[str, Any], Any]:
        """What executing again wrote, and the trainer."""
        trainer = self.train(seeded=seeded, REPLAY=json.dumps(asked))
        return json.loads((trainer.base_dir / EXPLAIN).read_text("utf8")), trainer


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("replayed"))


@pytest.fixture(scope="module")
def straight(trainings: Trainings) -> Any:
    return trainings.train(SNAPSHOT_EVERY="2")


def end_of(trainer: Any) -> dict[str, str]:
    from f3rm_verify.f3rm.snapshots import digests_of, take_snapshot

    return digests_of(take_snapshot(trainer, STEPS))


def test_replay_from_a_snapshot_is_the_straight_run_bit_by_bit(trainings: Trainings, straight: Any) -> None:
    stretch = {"stretch": {"until": STEPS - 1, "record": [STEPS - 1, STEPS - 1]}}
    snapshots = sorted((straight.base_dir / SNAPSHOTS).iterdir())
    assert [path.name for path in snapshots] == [f"step-{step:09d}.pt" for step in (0, 2, 4)]
    found, _ = trainings.replay({**stretch, "snapshot": str(snapshots[-1])})
    assert [row["step"] for row in found["rows"]] == [4, 5, 6]
    ends = {name for name in found["rows"][-1]["before"] if name.startswith(("parameters/", "optimizers/"))}
    assert len(ends) > 20
    last = end_of(straight)
    assert {name: last[name] for name in ends} == {name: found["rows"][-1]["before"][name] for name in ends}


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


def test_a_snapshot_of_another_training_is_refused(straight: Any) -> None:
    from f3rm_verify.f3rm.snapshots import put_back, take_snapshot

    state = take_snapshot(straight, STEPS)
    state["parameters"].popitem()
    with pytest.raises(TrainingError, match="not of this training: its parameters are others"):
        put_back(straight, state)
