"""What determinism costs, measured by a real ns-train."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from end_to_end.trainings import BIN, Finished, environment

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The folder, the result file and the output of a `cost` of the built-in scene with few rays."""
    folder = tmp_path_factory.mktemp("cost")
    words = ["cost", "--steps", "1", "--output-dir", str(folder), "--json", str(folder / "r.json")]
    words += ["--", "--pipeline.datamanager.train-num-rays-per-batch", "32"]
    done = subprocess.run([str(BIN / "f3rm-verify"), *words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads((folder / "r.json").read_text("utf8")), done.stdout


def test_every_measure_is_measured_or_says_why_not(measured: tuple[Path, dict[str, Any], str]) -> None:
    _, result, output = measured
    rows = {row["measure"]: row for row in result["rows"]}
    assert list(rows)[0] == "nothing (control)"
    assert list(rows)[-1] == "everything"
    assert {"deterministic algorithms", "memory filling", "cuBLAS workspace", "recorder"} < rows.keys()
    for name, row in rows.items():
        assert name in output
        if row["not_applicable"] is None:
            assert row["pairs"] == 2
            assert row["peak_bytes"]["resident"]["with"] > 2**28
            assert row["seconds_per_step"]["with"] > 0
    assert result["settings"]["rays"] == 32
    assert result["settings"]["method"] == "f3rm"


def test_nothing_was_trained(measured: tuple[Path, dict[str, Any], str], seeded: Finished) -> None:
    folder, _, output = measured
    assert "nothing was trained" in output
    (run,) = folder.glob("*/verify/f3rm/cost")
    assert not list(run.rglob("*.ckpt"))
    done = subprocess.run(
        [str(BIN / "f3rm-verify"), "diff", str(seeded.side("reference")), str(run)], capture_output=True, text=True
    )
    assert done.returncode == 3, done.stdout
