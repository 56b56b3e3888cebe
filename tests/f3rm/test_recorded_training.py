"""The flight recorder on real trainings of the built-in preset, in one process that imports nerfstudio once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from f3rm_verify.compare_trace import compare_trace
from f3rm_verify.difference import Difference, Verdict
from f3rm_verify.presets import SMALL
from f3rm_verify.run_dir import TRACE, TRACE_RECORDS, RunDir
from f3rm_verify.scene import write_scene

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]
STEPS = 6


class Trainings:
    """Trains the preset with one seed, in a directory of its own each time; `weights` are those in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.scene = write_scene(folder / "scene")

    def train(self, *, trace: str, seeded: bool) -> tuple[RunDir, dict[str, bytes]]:
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
            patch.setenv("F3RM_VERIFY_TRACE", trace)
            patch.setattr(writer, "EVENT_WRITERS", [])
            patch.setattr(writer, "EVENT_STORAGE", [])
            trainer = config.setup(local_rank=0, world_size=1)
            trainer.setup()
            trainer.train()
        torch.use_deterministic_algorithms(False)
        weights = {name: value.numpy().tobytes() for name, value in trainer.pipeline.state_dict().items()}
        return RunDir(trainer.base_dir), weights


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="module")
def seeded(trainings: Trainings) -> Iterator[dict[str, tuple[RunDir, dict[str, bytes]]]]:
    yield {trace: trainings.train(trace=trace, seeded=True) for trace in ("off", "steps")}


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
    runs = [trainings.train(trace=trace, seeded=False) for trace in ("off", "steps", "steps")]
    weights = [run[1] for run in runs]
    assert weights[0] != weights[1] != weights[2]
    node: Difference = compare_trace(runs[1][0], runs[2][0])
    assert node.verdict is Verdict.DIFFERENT
    assert (node.measures["stage"], node.measures["first_step"]) == ("grad", 0)
