"""`explain` on a pair that really diverged: three processes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from end_to_end.trainings import BIN, Finished, environment

pytestmark = pytest.mark.train


def test_the_operator_of_a_real_divergence_is_named(unseeded: Finished, tmp_path: Path) -> None:
    """Seeding off, two threads: the hash grids' gradients are added in the order of threads."""
    words = ["explain", str(unseeded.side("reference")), str(unseeded.side("candidate"))]
    done = subprocess.run(
        [str(BIN / "f3rm-verify"), *words, "--output-dir", str(tmp_path), "--json", str(tmp_path / "result.json")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    first = json.loads((tmp_path / "result.json").read_text("utf8"))["first_divergence"]
    assert "index_put" in first["operator"]
    assert first["stage"] == "grad"
    assert first["cause"].startswith("thread-order float accumulation on the CPU")
    evidence = " ".join(first["evidence"])
    assert "executed again in two processes, it showed in try" in evidence
    assert "encodings.py:" in evidence and "hash_table" in evidence and "float32 cpu" in evidence
    assert "one process: 6 tries" in evidence and "so it is what the kernels do" in evidence
