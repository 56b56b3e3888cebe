"""Real trainings, each made once and shared by every test that looks at it."""

from __future__ import annotations

import pytest
from end_to_end.trainings import Finished, verify

#: nerfacto's annealing, which no checkpoint holds, is over after a step: what is loaded then renders what was trained.
ANNEALED = ("--pipeline.model.proposal-weights-anneal-max-num-iters", "1")


@pytest.fixture(scope="session")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two runs with one seed, and a control with another, of the built-in scene."""
    words = ("--iters", "30", "--control", "--jobs", "3", "--", *ANNEALED)
    return verify(tmp_path_factory.mktemp("seeded"), *words)


@pytest.fixture(scope="session")
def unseeded(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two runs with one seed and comprehensive seeding off, on two threads."""
    arguments = ("--iters", "30", "--", "--enable-comprehensive-seeding", "False")
    return verify(tmp_path_factory.mktemp("unseeded"), *arguments)


@pytest.fixture(scope="session")
def nerfacto(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two runs of nerfstudio's own nerfacto with one seed, shrunk."""
    model = "--pipeline.model."
    small = (
        *ANNEALED,
        *("--pipeline.datamanager.train-num-rays-per-batch", "256"),
        *("--pipeline.datamanager.eval-num-rays-per-batch", "256"),
        *(f"{model}num-levels", "8", f"{model}max-res", "256", f"{model}log2-hashmap-size", "14"),
        *(f"{model}num-proposal-samples-per-ray", "64", "32", f"{model}num-nerf-samples-per-ray", "16"),
        *(f"{model}proposal-net-args-list.0.log2-hashmap-size", "12"),
        *(f"{model}proposal-net-args-list.1.log2-hashmap-size", "12"),
    )
    return verify(tmp_path_factory.mktemp("nerfacto"), "--method", "nerfacto", "--iters", "15", "--", *small)
