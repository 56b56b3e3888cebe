"""Another package's method f3rm, with a feature cache as upstream's: found, trained, its dataset left as it is."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from end_to_end.trainings import BIN, Finished, environment, verify
from foreign_package import install

from f3rm_verify.recorder import digest_files
from f3rm_verify.run_dir import RunDir
from f3rm_verify.scene import write_scene

pytestmark = pytest.mark.train

CACHE = "f3rm_clip_features.pt"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables with which the package is installed."""
    return install(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in scene as somebody's own dataset, without a cache."""
    return write_scene(tmp_path_factory.mktemp("user") / "scene")


def files(dataset: Path) -> dict[str, tuple[str, int]]:
    digests = digest_files(sorted(path for path in dataset.rglob("*") if path.is_file()))
    return {name: (digest, Path(name).stat().st_ctime_ns) for name, digest in digests.items()}


@pytest.fixture(scope="module")
def before(dataset: Path) -> dict[str, tuple[str, int]]:
    return files(dataset)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, dataset: Path, package: dict[str, str], before: object) -> Finished:
    arguments = ("--data", str(dataset), "--iters", "5")
    return verify(tmp_path_factory.mktemp("warm"), *arguments, env=package)


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory, dataset: Path, package: dict[str, str], before: object) -> Finished:
    arguments = ("--data", str(dataset), "--iters", "5", "--fresh-features")
    return verify(tmp_path_factory.mktemp("cold"), *arguments, env=package)


def log(finished: Finished, side: str) -> str:
    return next(finished.folder.glob(f"*/logs/{side}.log")).read_text("utf8")


def features(finished: Finished, side: str) -> str:
    manifest = RunDir(finished.side(side)).manifest
    assert manifest is not None
    return str(manifest["data"]["features"]["digest"])


class TestWarm:
    def test_it_is_reproducible(self, warm: Finished) -> None:
        assert warm.code == 0, warm.output + warm.errors
        assert warm.result["verdict"] == "reproducible"

    def test_it_is_the_packages_own_and_the_report_says_so(self, warm: Finished) -> None:
        implementation = warm.result["reference"]["implementation"]
        assert implementation["model"] == "own_f3rm.OwnModel"
        assert implementation["datamanager"] == "own_f3rm.OwnDataManager"
        assert "f3rm (own_f3rm.OwnModel)" in warm.output

    def test_its_features_were_made_once_and_found_by_both(self, warm: Finished) -> None:
        assert "own f3rm: extracting" in log(warm, "prepare")
        for side in ("reference", "candidate"):
            assert "own f3rm: cache is used" in log(warm, side)
            assert "extracting" not in log(warm, side)
        assert features(warm, "reference") == features(warm, "candidate")

    def test_nothing_of_ours_was_pushed_on_it(self, warm: Finished) -> None:
        config = RunDir(warm.side("reference")).config
        assert config is not None
        assert config["pipeline"]["datamanager"]["train_num_rays_per_batch"] == 128


class TestCold:
    def test_it_is_reproducible_too(self, cold: Finished) -> None:
        assert cold.code == 0, cold.output + cold.errors
        assert all("own f3rm: extracting" in log(cold, side) for side in ("reference", "candidate"))
        assert not list(cold.folder.glob("*/logs/prepare.log"))


def test_the_dataset_is_as_it_was(
    warm: Finished, cold: Finished, dataset: Path, before: dict[str, tuple[str, int]]
) -> None:
    assert len(before) > 40
    assert files(dataset) == before


def test_cold_and_warm_are_two_trainings(warm: Finished, cold: Finished, tmp_path: Path) -> None:
    """What the preparation is for: with one seed, a run that makes the features diverges from one that finds them."""
    command = [str(BIN / "f3rm-verify"), "diff", str(warm.side("reference")), str(cold.side("reference"))]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "r.json")], capture_output=True, text=True, check=False, env=environment()
    )
    result = json.loads((tmp_path / "r.json").read_text("utf8"))
    assert (done.returncode, result["verdict"]) == (1, "diverged")
    assert result["first_divergence"]["step"] == 0


def test_an_error_of_its_preparation_is_one_sentence(
    dataset: Path, package: dict[str, str], before: object, tmp_path: Path
) -> None:
    done = verify(tmp_path / "out", "--data", str(dataset), "--iters", "5", env={**package, "OWN_F3RM_OFFLINE": "1"})
    assert done.code == 2
    assert "cannot be made, so nothing was trained" in done.errors
    assert done.errors.endswith("/prepare.log: urllib.error.URLError: <urlopen error offline>\n")
    assert "Traceback" not in done.errors
    assert done.errors.count("\n") == 1
