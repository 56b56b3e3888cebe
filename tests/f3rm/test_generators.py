"""Every draw from a generator is noticed, and none is made."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from f3rm_verify.f3rm import generators as module  # noqa: E402
from f3rm_verify.f3rm.generators import Generators  # noqa: E402

pytestmark = pytest.mark.train

DRAWS: dict[str, tuple[str, Callable[[], object]]] = {
    "random": ("python", random.random),
    "gauss": ("python", lambda: random.gauss(0, 1)),
    "shuffle": ("python", lambda: random.shuffle([1, 2, 3])),
    "rand": ("numpy", np.random.rand),
    "randn": ("numpy", np.random.randn),
    "torch": ("torch cpu", lambda: torch.rand(1)),
    "randperm": ("torch cpu", lambda: torch.randperm(3)),
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    states: Any = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.mark.parametrize("draw", DRAWS)
def test_a_draw_is_noticed_once_and_where_it_was(draw: str) -> None:
    name, function = DRAWS[draw]
    watched = Generators()
    assert watched.drawn() == {}
    before = watched.seen[name]
    for _ in range(3):
        function()
        (found,) = watched.drawn(thorough=True).items()
        assert found[0] == name
        assert found[1] != before
        before = found[1]
        assert watched.drawn() == {}


def test_the_second_of_a_pair_of_normal_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Generators()
    np.random.randn()
    assert list(watched.drawn()) == ["numpy"]
    np.random.randn()
    assert list(watched.drawn(thorough=True)) == ["numpy"]
    random.gauss(0, 1)
    assert list(watched.drawn()) == ["python"]
    random.gauss(0, 1)
    assert list(watched.drawn()) == ["python"]


@pytest.mark.parametrize("words", [623, 624, 625, 1248])
def test_as_many_draws_as_there_are_words_are_noticed(words: int) -> None:
    watched = Generators()
    for _ in range(words):
        random.getrandbits(32)
    np.random.randint(0, 2**32, words, dtype=np.uint32)
    assert set(watched.drawn()) == {"python", "numpy"}


def test_equal_states_have_equal_digests_in_another_process_and_without_the_short_cuts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = Generators().seen
    monkeypatch.setattr(module, "_python_mark", lambda: None)
    monkeypatch.setattr(module, "_numpy_mark", lambda: None)
    watched = Generators()
    assert watched.seen == first
    random.random()
    np.random.rand()
    assert set(watched.drawn()) == {"python", "numpy"}


def test_looking_draws_nothing() -> None:
    states: Any = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    watched = Generators()
    watched.drawn(thorough=True)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_python_keeps_its_state_where_it_is_looked_for() -> None:
    assert module._python_mark() is not None
