"""The verdict of `run` for each setting of the guide, as predicted for two threads of a CPU.

What each setting does inside the training is in f3rm/test_settings.py; the defaults, another seed and
--enable-comprehensive-seeding False are in test_run.py, --seed-warn-only True on several ranks in test_ranks.py.
"""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from end_to_end.trainings import BIN, Finished, environment, user_methods, verify
from saved_configs import as_from_before

from f3rm_verify.presets import SMALL
from f3rm_verify.run_dir import RunDir

pytestmark = pytest.mark.train
SIDES = ("reference", "candidate")


def manifest(finished: Finished, side: str) -> Mapping[str, Any]:
    found = RunDir(finished.side(side)).manifest
    assert found is not None
    return found


def claims(finished: Finished, side: str = "reference") -> dict[str, str]:
    log = RunDir(finished.side(side)).seeding
    assert log is not None
    return {entry["claim"]: entry["observed"] for entry in log["entries"]}


def losses(run: Path) -> bytes:
    return bytes(RunDir(run).events.scalars["Train Loss"].values.tobytes())


def test_what_should_change_no_bit_between_two_runs_does_not(tmp_path: Path) -> None:
    """Another seed, other rays, no cuBLAS workspace, nothing printed, warnings only: reproducible."""
    words = ("--pipeline.datamanager.train-num-rays-per-batch", "500", "--seed-cublas-workspace", "False")
    words += ("--print-seed-info", "False", "--seed-warn-only", "True")
    done = verify(tmp_path, "--seed", "12345", "--iters", "4", "--", *words)
    assert done.code == 0, done.output + done.errors
    for side in SIDES:
        found = manifest(done, side)
        assert (found["seed"], found["torch_initial_seed"]) == (12345, 12345)
        assert "CUBLAS_WORKSPACE_CONFIG" not in found["environment"]["variables"]
        assert found["memory"]["peak_rss_bytes"] == done.result[side]["peak_rss_bytes"] > 2**28
        assert "Setting comprehensive random seed" not in next(tmp_path.glob(f"*/logs/{side}.log")).read_text("utf8")
    assert claims(done)["deterministic algorithms"] == "on, warns only"
    assert claims(done)["operations without a deterministic implementation"] == "none"


@pytest.mark.parametrize("more", [(), ("--seed-warn-only", "True", "--seed-cublas-workspace", "False")])
def test_without_deterministic_algorithms_it_diverges(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Alone, and with the rest of the guide's high-performance mode; with nerfstudio's own hash grids."""
    words = ("--seed-deterministic-algorithms", "False", "--encoding", "stock", *more)
    done = verify(tmp_path, "--iters", "12", "--", *words)
    assert done.code == 1, done.output + done.errors
    assert "deterministic algorithms were off" in done.result["first_divergence"]["cause"]
    # Everything else of the seeding is on: both start from the same weights and the same batch.
    assert len({claims(done, side)["generators at step 0"] for side in SIDES}) == 1
    before = {manifest(done, side)["parameters"]["before"] for side in SIDES}
    after = {manifest(done, side)["parameters"]["after"] for side in SIDES}
    assert (len(before), len(after)) == (1, 2)


def test_high_performance_mode_set_in_python_diverges(tmp_path: Path) -> None:
    words = ("--method", "guide", "--iters", "12", "--fresh-features", "--", *SMALL, "--encoding", "stock")
    done = verify(tmp_path, *words, env=user_methods("guide"))
    assert done.code == 1, done.output + done.errors
    assert done.result["first_divergence"]["step"] is not None
    for side in SIDES:  # which the launcher, that knows only the command line, had set
        assert "CUBLAS_WORKSPACE_CONFIG" not in manifest(done, side)["environment"]["variables"]


class TestLoadConfig:
    @pytest.fixture(scope="class")
    @staticmethod
    def old(seeded: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """What nerfstudio's own trainer would have saved for the seeded run, with what leads it elsewhere."""
        path = tmp_path_factory.mktemp("old") / "old.yml"
        path.write_text(as_from_before(seeded.side("reference") / "config.yml", start_paused="true"), "utf8")
        return path

    @pytest.fixture(scope="class")
    @staticmethod
    def loaded(old: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
        words = ("--load-config", str(old), "--iters", "5", "--", "--print-seed-info", "False")
        return verify(tmp_path_factory.mktemp("loaded"), *words)

    def test_it_is_wrapped_seeded_and_reproducible(self, loaded: Finished) -> None:
        assert loaded.code == 0, loaded.output + loaded.errors
        assert claims(loaded)["deterministic algorithms"] == "on"
        assert loaded.result["reference"]["implementation"]["trainer"] == "f3rm_verify.f3rm.trainer.F3RMTrainer"

    def test_it_trains_what_it_trained_before(self, loaded: Finished, seeded: Finished) -> None:
        again, first = losses(loaded.side("reference")), losses(seeded.side("reference"))
        assert len(again) == 5 * 4
        assert first.startswith(again)

    def test_options_after_the_dashes_still_apply(self, loaded: Finished) -> None:
        log = next(loaded.folder.glob("*/logs/reference.log")).read_text("utf8")
        assert "Setting comprehensive random seed" not in log

    def test_manifest_and_report_say_where_it_came_from(self, loaded: Finished, old: Path) -> None:
        found = [manifest(loaded, side)["load_config"] for side in SIDES]
        assert [side["path"] for side in found] == [str(old)] * 2
        assert len(found[0]["digest"]) == 32
        assert loaded.result["candidate"]["load_config"] == str(old)
        assert "configured by" in loaded.output

    def test_classes_that_are_not_installed_are_one_sentence(self, old: Path, tmp_path: Path) -> None:
        path = tmp_path / "gone.yml"
        path.write_text(old.read_text("utf8").replace("f3rm_verify.f3rm.model.", "gone.package."), "utf8")
        done = verify(tmp_path, "--load-config", str(path), "--jobs", "1")
        assert done.code == 2
        assert done.errors.count("\n") == 1
        assert "The reference training cannot begin:" in done.errors
        assert "cannot find module 'gone.package'" in done.errors


def test_out_of_memory_is_one_sentence_with_what_helps(tmp_path: Path) -> None:
    """An address space of 6 GB, as `ulimit -v` sets it, and far too many rays."""
    rays = ("--pipeline.datamanager.train-num-rays-per-batch", "150000")
    done = subprocess.run(
        [str(BIN / "f3rm-verify"), "run", "--output-dir", str(tmp_path), "--iters", "2", "--", *rays],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 * 10**9, 6 * 10**9)),
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert "ran out of memory" in done.stderr
    assert "DefaultCPUAllocator: can't allocate memory" in done.stderr
    assert "GiB in RAM" in done.stderr
    assert "--pipeline.datamanager.train-num-rays-per-batch" in done.stderr
    assert "--jobs 1" in done.stderr
    (found,) = {side for side in SIDES if f"The {side} training failed" in done.stderr}
    run = RunDir(next(tmp_path.glob(f"*/verify/*/{found}")))
    assert run.manifest is not None
    assert run.manifest["memory"]["peak_rss_bytes"] > 2**29
    assert run.manifest["completion"] is None
