"""Real trainings that end badly: one clear message, nothing left behind, the evidence so far kept and readable."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from end_to_end.trainings import BIN, environment, verify

pytestmark = pytest.mark.train


def training_processes(folder: Path) -> list[int]:
    """Processes whose command line names `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode("utf8", "replace")
            except OSError:
                continue
            if str(folder) in words and "ns-train" in words:
                found.append(int(entry.name))
    return found


@contextmanager
def training(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A verification whose trainings have both made a few of far too many steps."""
    command = [str(BIN / "f3rm-verify"), "run", "--output-dir", str(folder), "--iters", "100000"]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        _wait_for_steps(folder, process)
        yield process


def test_an_unknown_method_is_named(tmp_path: Path) -> None:
    done = verify(tmp_path, "--method", "no-such-method", "--iters", "3")
    assert done.code == 2
    assert "Traceback" not in done.errors.splitlines()[0]
    assert "nerfstudio knows no method 'no-such-method'" in done.errors
    assert not training_processes(tmp_path)


def test_strict_mode_ends_both_before_their_first_step_and_names_the_claim(tmp_path: Path) -> None:
    done = verify(tmp_path, "--strict", "--iters", "3", env={"PYTHONHASHSEED": "random"})
    assert done.code == 3, done.output + done.errors
    assert "Strict mode stopped the training before its first step: PYTHONHASHSEED: " in done.errors
    assert "INCONCLUSIVE" in done.output
    assert not list(tmp_path.glob("*/verify/*/*/events.out.tfevents.*"))
    assert not training_processes(tmp_path)


def test_both_trainings_interrupted_at_one_step_are_inconclusive(tmp_path: Path) -> None:
    with training(tmp_path) as process:
        for pid in training_processes(tmp_path):
            os.kill(pid, signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 3, output + errors
    assert "INCONCLUSIVE" in output
    assert "completion record" in output
    assert not training_processes(tmp_path)


def test_ctrl_c_keeps_what_was_recorded(tmp_path: Path) -> None:
    with training(tmp_path) as process:
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 3, output + errors
    assert "stopped by SIGINT" in errors
    assert "Traceback" not in errors.splitlines()[0]
    assert not training_processes(tmp_path)
    result = json.loads(next(tmp_path.glob("*/result.json")).read_text("utf8"))
    curves = next(node for node in result["root"]["children"] if node["name"] == "curves")
    assert curves["children"]
    assert not any(node["verdict"] == "different" for node in curves["children"])


def test_a_full_disk_ends_both_and_says_so(tmp_path: Path) -> None:
    limit = 2 * 2**20  # the checkpoint is larger, everything before it smaller
    done = subprocess.run(
        [str(BIN / "f3rm-verify"), "run", "--output-dir", str(tmp_path), "--iters", "3"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "training failed" in done.stderr
    assert "The end of its log" in done.stderr
    assert "INCONCLUSIVE" in done.stdout
    assert not training_processes(tmp_path)


def _wait_for_steps(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until both trainings have made a few steps."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        statuses = [json.loads(path.read_text("utf8")) for path in folder.glob("*/verify/*/*/verify/status.json")]
        if len(statuses) == 2 and all((status["step"] or 0) >= 5 for status in statuses):
            time.sleep(1.5)  # until TensorBoard's writer was flushed again
            return
        time.sleep(0.2)
    raise AssertionError("the trainings made no steps")
