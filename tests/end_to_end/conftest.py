"""Real trainings, each made once and shared by every test that looks at it."""

from __future__ import annotations

import pytest
from end_to_end.trainings import Finished, verify


@pytest.fixture(scope="session")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two runs with one seed, and a control with another, of the built-in scene."""
    return verify(tmp_path_factory.mktemp("seeded"), "--iters", "30", "--control", "--jobs", "3")


@pytest.fixture(scope="session")
def unseeded(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two runs with one seed and comprehensive seeding off, on two threads."""
    arguments = ("--iters", "30", "--", "--enable-comprehensive-seeding", "False")
    return verify(tmp_path_factory.mktemp("unseeded"), *arguments)
