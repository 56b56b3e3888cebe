"""nerfstudio's own tools on trained runs: they work, find what the run found, and render one checkpoint one way."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from end_to_end.trainings import BIN, Finished, environment
from PIL import Image

from f3rm_verify.presets import SMALL
from f3rm_verify.run_dir import RunDir

pytestmark = pytest.mark.train
EVALUATED = ("seeded", "nerfacto")
#: ns-render, several times in one process, whose generators have another state than those of a fresh one.
RENDER_OFTEN = """
import json, random, sys
import numpy, torch
from nerfstudio.scripts.render import entrypoint
for words in json.loads(sys.argv[1]):
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(7)
    sys.argv = ["ns-render", *words]
    entrypoint()
"""


def render(run: Path, to: str) -> list[str]:
    outputs = ("raw-feature_pca", "raw-rgb")
    words = ["dataset", "--load-config", str(run / "config.yml"), "--output-path", to]
    return [*words, "--rendered-output-names", *outputs]


def images(folder: Path, output: str) -> list[np.ndarray[Any, Any]]:
    """What ns-render wrote of an output, in the order of the images."""
    packed = [path.read_bytes() for path in sorted(folder.glob(f"test/raw-{output}/*.npy.gz"))]
    found = [np.load(io.BytesIO(gzip.decompress(content))) for content in packed]
    assert len(found) == 2
    return found


def same_bits(one: Sequence[np.ndarray[Any, Any]], other: Sequence[np.ndarray[Any, Any]]) -> bool:
    return [(a.dtype, a.shape, a.tobytes()) for a in one] == [(b.dtype, b.shape, b.tobytes()) for b in other]


@pytest.fixture(scope="module")
def changed(seeded: Finished) -> Path:
    """A copy of the run with one other tensor in the feature field."""
    import torch

    run = seeded.side("reference")
    copy = shutil.copytree(run, run.with_name("changed"))
    config = (run / "config.yml").read_text("utf8")
    assert config.count("timestamp: reference\n") == 1
    (copy / "config.yml").write_text(config.replace("timestamp: reference\n", "timestamp: changed\n"), "utf8")
    path = next((copy / "nerfstudio_models").iterdir())
    state = torch.load(path, weights_only=False)  # made by our own training a moment ago
    state["pipeline"][max(name for name in state["pipeline"] if ".feature_field.head." in name)] += 1e-3
    torch.save(state, path)
    return copy


@pytest.fixture(scope="module")
def folder(seeded: Finished, nerfacto: Finished, changed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each tool left, started all at once, in a folder that no configuration knows of."""
    folder = tmp_path_factory.mktemp("tools")
    run = seeded.side("reference")
    resumed = ["f3rm", "--data", str(next(seeded.folder.glob("*/f3rm-verify-scene"))), "--max-num-iterations", "2"]
    resumed += ["--load-dir", str(run / "nerfstudio_models"), "--output-dir", "resumed", "--vis", "tensorboard"]
    commands = {
        "eval seeded": [str(BIN / "ns-eval"), "--load-config", str(run / "config.yml"), "--output-path", "seeded.json"],
        "eval nerfacto": [str(BIN / "ns-eval"), "--load-config", str(nerfacto.side("reference") / "config.yml")],
        "render": [str(BIN / "ns-render"), *render(run, "plain")],
        "render often": [
            *(sys.executable, "-c", RENDER_OFTEN),
            json.dumps([render(run, "other_seed"), render(changed, "changed")]),
        ],
        "resume": [str(BIN / "ns-train"), *resumed, *SMALL],
    }
    commands["eval seeded"] += ["--render-output-path", "evaluated"]
    commands["eval nerfacto"] += ["--output-path", "nerfacto.json"]
    hash_seeds = {"render often": "7", "resume": "42"}
    started = {
        name: subprocess.Popen(
            command,
            cwd=folder,
            env=environment(OMP_WAIT_POLICY="PASSIVE", PYTHONHASHSEED=hash_seeds.get(name, "1")),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, command in commands.items()
    }
    try:
        said = {name: process.communicate(timeout=300)[0] for name, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
    assert {name: said[name] for name, process in started.items() if process.returncode != 0} == {}
    return folder


def results(folder: Path, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((folder / f"{name}.json").read_text("utf8"))["results"]
    return found


@pytest.mark.parametrize("name", EVALUATED)
@pytest.mark.parametrize("metric", ["psnr", "ssim"])
def test_ns_eval_finds_the_metrics_of_the_run_bit_for_bit(
    folder: Path, name: str, metric: str, request: pytest.FixtureRequest
) -> None:
    import torch

    finished: Finished = request.getfixturevalue(name)
    ours = RunDir(finished.side("reference")).metrics
    assert ours is not None
    values = torch.tensor([image[metric] for image in ours["images"].values()])
    deviation, mean = torch.std_mean(values)  # as ns-eval sums them up, in float32
    found = results(folder, name)
    assert (found[metric], found[f"{metric}_std"]) == (float(mean), float(deviation))
    assert found[metric] == pytest.approx(ours["mean"][metric], rel=1e-6)


@pytest.mark.parametrize("name", EVALUATED)
def test_lpips_that_cannot_be_had_is_no_number(folder: Path, name: str, request: pytest.FixtureRequest) -> None:
    metrics = RunDir(request.getfixturevalue(name).side("reference")).metrics
    assert metrics is not None
    if "lpips" in metrics["mean"]:
        pytest.skip("LPIPS weights are on this machine")
    assert np.isnan(results(folder, name)["lpips"])


def test_ns_render_renders_what_the_run_rendered(folder: Path, seeded: Finished) -> None:
    ours = [seeded.side("reference") / "verify" / "renders" / f"eval_{index:04d}" for index in range(2)]
    for output in ("feature_pca", "rgb"):
        assert same_bits(images(folder / "plain", output), [np.load(image / f"{output}.npy") for image in ours])


def test_another_process_with_another_seed_renders_the_same(folder: Path) -> None:
    for output in ("feature_pca", "rgb"):
        assert same_bits(images(folder / "other_seed", output), images(folder / "plain", output))


def test_another_tensor_in_the_feature_field_renders_other_features_alone(folder: Path) -> None:
    assert same_bits(images(folder / "changed", "rgb"), images(folder / "plain", "rgb"))
    for one, other in zip(
        images(folder / "changed", "feature_pca"), images(folder / "plain", "feature_pca"), strict=True
    ):
        assert not np.array_equal(one, other)


def test_ns_eval_renders_what_ns_render_does(folder: Path) -> None:
    for index, values in enumerate(images(folder / "plain", "feature_pca")):
        with Image.open(folder / "evaluated" / f"eval_feature_pca_{index:04d}.png") as image:
            found = np.asarray(image)
        assert np.array_equal(found, (values * np.float32(255) + np.float32(0.5)).clip(0, 255).astype(np.uint8))
        assert len(np.unique(found)) > 10


def test_a_training_resumes_from_a_checkpoint(folder: Path, seeded: Finished) -> None:
    (run,) = (path.parent for path in folder.glob("resumed/*/f3rm/*/config.yml"))
    before, after = RunDir(seeded.side("reference")).manifest, RunDir(run).manifest
    assert before is not None and after is not None
    assert after["parameters"]["before"] == before["parameters"]["after"] != after["parameters"]["after"]
    assert after["completion"] == {"first_step": 30, "steps": 2}
