"""Running out of memory is one sentence that names the way on; other failures stay what they are."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from f3rm_verify.errors import TrainingError  # noqa: E402
from f3rm_verify.f3rm.memory_use import explained_shortage, peak_memory  # noqa: E402

pytestmark = pytest.mark.train
#: 1 EiB, which no machine has.
HUGE = 2**60


def by_torch() -> None:
    torch.empty(HUGE, dtype=torch.uint8)


def by_numpy() -> None:
    import numpy as np

    np.empty(HUGE, dtype=np.uint8)


def by_python() -> None:
    bytearray(HUGE)


def by_the_system() -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def by_cuda() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("run_out", [by_torch, by_numpy, by_python, by_the_system, by_cuda])
def test_a_shortage_is_told_with_its_peak_and_what_helps(run_out: object) -> None:
    assert callable(run_out)
    with pytest.raises(TrainingError, match="ran out of memory") as caught, explained_shortage():
        run_out()
    message = str(caught.value)
    assert "GiB in RAM" in message
    assert "--pipeline.datamanager.train-num-rays-per-batch" in message
    assert "\n" not in message


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "full"), KeyError("x")])
def test_other_failures_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained_shortage():
        raise error
    assert caught.value is error


def test_a_limited_address_space_is_a_shortage_of_torch(tmp_path: Path) -> None:
    script = """
import resource, torch
from f3rm_verify.f3rm.memory_use import explained_shortage
resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
kept = []
with explained_shortage():
    for _ in range(1000): kept.append(torch.empty(2**28, dtype=torch.uint8))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("f3rm_verify.errors.TrainingError: The training ran out of memory")
    assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate 268435456 bytes" in last


def test_the_peak_is_of_this_process() -> None:
    found = peak_memory()
    assert found["peak_rss_bytes"] > 2**26
    assert ("cuda_peak_allocated_bytes" in found) == (torch.cuda.is_available() and torch.cuda.is_initialized())
