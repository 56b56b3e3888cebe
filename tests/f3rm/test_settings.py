"""Each setting of the guide, given as on ns-train's command line, seen in what the training then does.

What the verdict of `f3rm-verify run` is with them is in end_to_end/test_guide.py. Two threads: with one, nothing here
could diverge.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from f3rm_verify.errors import TrainingError
from f3rm_verify.presets import SMALL
from f3rm_verify.scene import write_scene
from f3rm_verify.seeding_plan import CUBLAS_WORKSPACE_VARIABLE

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]

Build = Callable[..., Any]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("settings") / "scene")


@pytest.fixture
def build(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    """Makes a trainer of the small f3rm from ns-train options; the process is afterwards as it was."""
    import torch
    import tyro
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
    from nerfstudio.utils import writer

    for name in ("EVENT_WRITERS", "EVENT_STORAGE"):
        monkeypatch.setattr(writer, name, [])
    monkeypatch.setattr(writer, "GLOBAL_BUFFER", {})
    monkeypatch.setenv("F3RM_VERIFY_FEATURE_CACHE", str(scene.parent / "cache"))
    before, threads = torch.get_deterministic_debug_mode(), torch.get_num_threads()
    torch.set_num_threads(2)

    def make(*options: str) -> Any:
        for name in (CUBLAS_WORKSPACE_VARIABLE, "PYTHONHASHSEED", "TCNN_SEED"):  # back after the module
            os.environ.pop(name, None)
        torch.use_deterministic_algorithms(False)
        places = ["--data", str(scene), "--output-dir", str(tmp_path / "out"), "--vis", "tensorboard"]
        quiet = ["--logging.local-writer.enable", "False", "--machine.device-type", "cpu"]
        words = ["f3rm", *places, *quiet, *SMALL, *options]
        config: Any = tyro.cli(AnnotatedBaseConfigUnion, args=words)
        config.pipeline.datamanager.data = config.data
        config.set_timestamp()
        trainer = config.setup(local_rank=0, world_size=1)
        trainer.setup()
        return trainer

    yield make
    torch.set_deterministic_debug_mode(before)
    torch.set_num_threads(threads)


def start(trainer: Any) -> tuple[bytes, bytes]:
    """What the first step starts from: the weights, and the pixels of its batch."""
    weights = b"".join(value.detach().numpy().tobytes() for value in trainer.pipeline.model.parameters())
    return weights, trainer.pipeline.datamanager.next_train(0)[1]["indices"].numpy().tobytes()


def gradients(trainer: Any, tries: int) -> set[bytes]:
    """The gradients of the hash tables for one and the same batch and loss, computed until there are two, or often."""
    import torch

    rays, batch = trainer.pipeline.datamanager.next_train(0)
    model, seen = trainer.pipeline.model, set()
    for _ in range(tries):
        torch.manual_seed(0)
        model.zero_grad()
        outputs = model(rays)
        sum(model.get_loss_dict(outputs, batch, model.get_metrics_dict(outputs, batch)).values()).backward()
        tables = [value.grad for name, value in model.named_parameters() if "hash_table" in name]
        seen.add(b"".join(value.numpy().tobytes() for value in tables if value is not None))
        if len(seen) > 1:
            break
    return seen


def test_another_seed_is_another_start_and_the_same_one_the_same(build: Build) -> None:
    first, again, other = (start(build("--machine.seed", seed)) for seed in ("123", "123", "42"))
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_by_default_one_batch_has_one_gradient(build: Build) -> None:
    assert len(gradients(build(), 5)) == 1


def test_the_deterministic_grid_does_without_deterministic_algorithms(build: Build) -> None:
    trainer = build("--seed-deterministic-algorithms", "False")
    assert trainer.config.encoding == "deterministic"
    assert len(gradients(trainer, 5)) == 1


@pytest.mark.parametrize(
    "options",
    [
        ("--seed-deterministic-algorithms", "False", "--encoding", "stock"),
        ("--enable-comprehensive-seeding", "False"),
        # The guide's high-performance mode.
        (
            *("--seed-deterministic-algorithms", "False", "--seed-warn-only", "True"),
            *("--seed-cublas-workspace", "False", "--encoding", "stock"),
        ),
    ],
)
def test_without_deterministic_algorithms_one_batch_has_several(build: Build, options: tuple[str, ...]) -> None:
    assert len(gradients(build(*options), 12)) > 1


def test_an_operation_without_an_implementation_stops_unless_it_may_only_warn(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def with_put(trainer: Any) -> Any:
        losses = trainer.pipeline.model.get_loss_dict

        def put(*arguments: Any, **keywords: Any) -> Any:
            torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
            return losses(*arguments, **keywords)

        monkeypatch.setattr(trainer.pipeline.model, "get_loss_dict", put)
        return trainer

    with pytest.raises(TrainingError, match=r"put_ has no deterministic implementation.*--seed-warn-only True"):
        with_put(build("--max-num-iterations", "2")).train()
    warned = with_put(build("--max-num-iterations", "2", "--seed-warn-only", "True"))
    warned.train()
    assert warned._steps_done == 2
    observed = {claim.claim: claim.observed for claim in warned._seeding.entries}
    assert observed["operations without a deterministic implementation"] == "put_ warned 2 times"


def test_a_training_ends_after_max_num_iterations(build: Build) -> None:
    trainer = build("--max-num-iterations", "3")
    trainer.train()
    assert trainer._recorder.manifest["completion"] == {"first_step": 0, "steps": 3}
    assert [path.name for path in trainer.checkpoint_dir.iterdir()] == ["step-000000002.ckpt"]
    assert trainer._recorder.manifest["memory"]["peak_rss_bytes"] > 2**28


def test_a_batch_has_as_many_rays_as_asked_for(build: Build) -> None:
    datamanager = build("--pipeline.datamanager.train-num-rays-per-batch", "500").pipeline.datamanager
    rays, batch = datamanager.next_train(0)
    assert len(rays) == len(batch["indices"]) == len(batch["feature"]) == 500


def test_the_cublas_workspace_is_in_the_environment_only_if_wanted(build: Build) -> None:
    # That numbers depend on it can only be seen with CUDA.
    build()
    assert os.environ[CUBLAS_WORKSPACE_VARIABLE] == ":4096:8"
    build("--seed-cublas-workspace", "False")
    assert CUBLAS_WORKSPACE_VARIABLE not in os.environ


def test_the_log_is_printed_only_if_wanted_and_kept_always(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    line = "🌱 Setting comprehensive random seed: 42"
    assert build()._seeding.lines[0] == line
    assert line in capsys.readouterr().out
    assert build("--print-seed-info", "False")._seeding.lines[0] == line
    assert "Setting comprehensive random seed" not in capsys.readouterr().out
