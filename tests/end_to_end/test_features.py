"""CLIP and DINO in real trainings, with tiny models: cold and warm are one training, and what differs is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from end_to_end.test_run import diff, different
from end_to_end.trainings import Finished, user_methods, verify

from f3rm_verify.presets import SMALL
from f3rm_verify.run_dir import RunDir
from f3rm_verify.scene import write_scene

pytestmark = pytest.mark.train

OPTION = "--pipeline.datamanager."
#: What a type's features consist of, with their sizes on the built-in scene.
SHAPES = {
    "CLIP": {"CLIP": [40, 4, 4, 12]},
    "DINO": {"DINO": [40, 7, 7, 16]},
    "DINOCLIP": {"DINO": [40, 7, 7, 16], "CLIP": [40, 4, 4, 12]},
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """What makes ns-train take a feature type of tiny models."""
    folder = tmp_path_factory.mktemp("models")
    clip, dino = tiny_models.save_clip(folder / "clip"), tiny_models.save_dino(folder / "dino")
    models = [f"{OPTION}clip.model", str(clip), f"{OPTION}dino.model", str(dino), f"{OPTION}dino.load-size", "32"]
    return lambda kind: [f"{OPTION}feature-type", kind, *models]


@pytest.fixture(scope="module")
def shared(
    request: pytest.FixtureRequest,
    words: Callable[[str], list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    """Two trainings of a feature type, one after the other: the first extracts, the second finds its cache."""
    kind = request.param
    return verify(tmp_path_factory.mktemp(kind), "--iters", "2", "--jobs", "1", "--", *words(kind))


@pytest.fixture(scope="module")
def fresh(words: Callable[[str], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two trainings that both extract."""
    return verify(tmp_path_factory.mktemp("fresh"), "--iters", "2", "--fresh-features", "--", *words("DINOCLIP"))


def features(run: Path) -> dict[str, Any]:
    manifest = RunDir(run).manifest
    assert manifest is not None
    return dict(manifest["data"]["features"])


@pytest.mark.parametrize("shared", SHAPES, indirect=True)
class TestColdAgainstWarm:
    def test_is_reproducible(self, shared: Finished, request: pytest.FixtureRequest) -> None:
        assert (shared.code, shared.result["verdict"]) == (0, "reproducible"), shared.output + shared.errors
        cold, warm = (features(shared.side(side)) for side in ("reference", "candidate"))
        assert (cold["source"], warm["source"]) == ("extracted", "cache")
        kind = request.node.callspec.params["shared"]
        assert {name: one["shape"] for name, one in warm["kinds"].items()} == SHAPES[kind]
        assert {**cold, "source": ""} == {**warm, "source": ""}
        assert all(len(one["weights"]["digest"]) == 64 for one in warm["kinds"].values())
        feature = next((shared.side("candidate") / "verify" / "renders" / "eval_0000").glob("feature.*"))
        assert feature.exists()


@pytest.mark.parametrize("shared", ["DINOCLIP"], indirect=True)
class TestFreshFeatures:
    def test_both_extract_and_are_compared(self, fresh: Finished, shared: Finished) -> None:
        assert (fresh.code, fresh.result["verdict"]) == (0, "reproducible"), fresh.output + fresh.errors
        sides = [features(fresh.side(side)) for side in ("reference", "candidate")]
        assert [side["source"] for side in sides] == ["extracted", "extracted"]
        assert "data.features" in {node["name"] for node in fresh.artefact("setup")["children"]}

    def test_a_cold_run_and_a_warm_one_are_one_training(self, fresh: Finished, shared: Finished) -> None:
        code, result = diff(fresh.side("reference"), shared.side("candidate"))
        assert (code, result["verdict"]) == (0, "reproducible"), result["reasons"]


def test_features_that_differ_by_an_ulp_in_one_run_are_told(tmp_path: Path) -> None:
    """The control of --fresh-features: an extractor that is not deterministic."""
    words = ("--method", "noisy", "--iters", "2", "--fresh-features", "--", *SMALL)
    done = verify(tmp_path, *words, env={**user_methods("noisy"), "FAULTY_SIDE": "candidate"})
    assert (done.code, done.result["verdict"]) == (1, "diverged"), done.output + done.errors
    assert {"setup/data.features/digest", "setup/data.features/kinds.DAISY.digest"} <= set(different(done.result))
    assert "features" in done.result["first_divergence"]["cause"]


def test_a_broken_cache_ends_a_run_in_a_sentence(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene")
    first = verify(tmp_path / "out", "--data", str(scene), "--preset", "small", "--iters", "1")
    assert first.code == 0, first.output + first.errors
    (cache,) = (tmp_path / "out").glob("*/cache/shared/*.npz")
    shutil.copy(cache, scene)
    broken = scene / cache.name
    broken.write_bytes(broken.read_bytes()[:-100])
    done = verify(tmp_path / "again", "--data", str(scene), "--preset", "small", "--iters", "1")
    assert done.code == 3
    sentence = f"The feature cache {broken} is refused: it is truncated or damaged"
    assert sentence in " ".join(done.errors.split()), done.output + done.errors
    assert "Traceback" not in done.output + done.errors
    assert broken.exists()
