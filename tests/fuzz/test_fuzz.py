"""Readers may only raise UnreadableError: a short run of the coverage-guided fuzzer, and mutations by hypothesis."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_runs import FakeRun
from hostile.cases import RGB
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from f3rm_verify.errors import UnreadableError
from f3rm_verify.readers.images import read_array
from f3rm_verify.run_dir import CONFIG, MANIFEST, METRICS, SEEDING, TRACE, TRACE_RECORDS, RunDir

SCRIPT = Path(__file__).with_name("fuzz_readers.py")
EVENT_FILES, LAST_CHECKPOINT = "events", "checkpoint"
FILES = (CONFIG, MANIFEST, METRICS, SEEDING, TRACE, TRACE_RECORDS, f"{RGB}.npy", f"{RGB}.png")


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris")
@pytest.mark.parametrize("reader", ["events", "trace"])
def test_the_fuzzer_finds_nothing_in_a_few_seconds(tmp_path: Path, reader: str) -> None:
    command = [sys.executable, str(SCRIPT), reader, "-runs=300", "-max_total_time=5", "-rss_limit_mb=3000"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DONE" in done.stderr
    assert not list(tmp_path.iterdir()), "a finding"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return FakeRun().write(tmp_path_factory.mktemp("good") / "run")


def file_of(run: RunDir, kind: str) -> Path:
    if kind == EVENT_FILES:
        return run.event_files[0]
    return next(iter(run.checkpoints.values())) if kind == LAST_CHECKPOINT else run.path / kind


def read(path: Path) -> None:
    """Everything that a run holds; what is unreadable says so."""
    from f3rm_verify.readers.checkpoint import read_checkpoint

    run = RunDir(path)
    looks: list[Any] = [lambda: run.config, lambda: run.manifest, lambda: run.metrics, lambda: run.seeding]
    looks += [lambda: run.trace, lambda: run.events, lambda: run.recorded]
    looks += [lambda file=file: read_array(path / file) for file in FILES[-2:]]
    for look in looks:
        try:
            look()
        except UnreadableError:
            pass
    try:
        for checkpoint in run.checkpoints.values():
            for leaf in read_checkpoint(checkpoint).leaves().values():
                getattr(leaf, "array", None)
    except UnreadableError:
        pass


@pytest.mark.parametrize("kind", [*FILES, EVENT_FILES, LAST_CHECKPOINT])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_are_read_or_unreadable(
    good: RunDir, tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("mutated") / "run"
    shutil.copytree(good.path, path)
    target = file_of(RunDir(path), kind)
    content = bytearray(target.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        cut = data.draw(st.integers(0, 12))
        content[at : at + cut] = data.draw(st.binary(max_size=12))
    target.write_bytes(content)
    read(path)
    shutil.rmtree(path)
