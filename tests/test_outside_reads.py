"""Where code reads a clock or the system's entropy."""

from __future__ import annotations

import datetime
import random
import secrets
import sys
import tempfile
import time
import types
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from f3rm_verify.outside_reads import OutsideReads

HERE = Path(__file__).name

CLOCKS: list[Callable[[], object]] = [
    time.time,
    lambda: time.perf_counter_ns(),
    lambda: time.monotonic(),
    lambda: datetime.datetime.now(),
    lambda: datetime.datetime.now(datetime.timezone.utc),
]
ENTROPY: list[Callable[[], object]] = [
    lambda: secrets.randbits(8),
    lambda: uuid.uuid4(),
    lambda: random.Random(),
    lambda: random.SystemRandom().random(),
    lambda: np.random.default_rng(),
]
SEEDED: list[Callable[[], object]] = [
    lambda: random.Random(3),
    lambda: random.Random(3).random(),
    lambda: np.random.default_rng(3).random(),
    lambda: np.random.RandomState(3).rand(),
    lambda: time.strftime("%Y", time.gmtime(0)),
    lambda: [].copy(),
    lambda: tempfile.TemporaryDirectory().cleanup(),
]


def reads(read: Callable[[], object]) -> dict[str, list[str]]:
    found = OutsideReads()

    def caller() -> None:
        read()

    with found.watched("training"):
        caller()
    return found.found


@pytest.mark.parametrize("read", CLOCKS)
def test_a_clock(read: Callable[[], object]) -> None:
    ((kind, places),) = reads(read).items()
    assert kind == "clock, while training"
    assert len(places) == 1 and places[0].startswith(f"{HERE}:")


@pytest.mark.parametrize("read", ENTROPY)
def test_entropy(read: Callable[[], object]) -> None:
    ((kind, places),) = reads(read).items()
    assert kind == "entropy, while training"
    assert len(places) == 1 and places[0].startswith(f"{HERE}:")


@pytest.mark.parametrize("read", SEEDED)
def test_what_follows_from_a_seed_is_none(read: Callable[[], object]) -> None:
    assert reads(read) == {}


def test_torch_generators() -> None:
    import torch

    assert list(reads(lambda: torch.Generator().seed())) == ["entropy, while training"]
    assert reads(lambda: torch.rand(2, generator=torch.Generator().manual_seed(3))) == {}


@pytest.mark.parametrize("package", ["nerfstudio.engine", "tensorboard", "f3rm_verify.recorder", "multiprocess.queues"])
def test_a_library_that_times_itself_is_none(package: str) -> None:
    module = types.ModuleType(package)
    exec(compile("import time\ndef read():\n    time.time()\n", "/x/site-packages/a.py", "exec"), module.__dict__)
    assert reads(module.read) == {}


def test_each_place_once_and_not_after_the_end() -> None:
    found = OutsideReads()
    found.start("building")
    for _ in range(3):
        time.time()
    found.stop()
    time.time()
    (places,) = found.found.values()
    assert len(places) == 1


def test_the_profiler_of_others_is_left_alone() -> None:
    def other(*_: object) -> None: ...

    found = OutsideReads()
    sys.setprofile(other)
    try:
        with found.watched("training"):
            time.time()
        assert sys.getprofile() is other
    finally:
        sys.setprofile(None)
    assert found.found == {}
