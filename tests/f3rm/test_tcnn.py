"""tiny-cuda-nn's seeds, with bindings of the test's own that have the signatures of the real ones."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from f3rm_verify.f3rm.tcnn import observe_tcnn, seeded_tcnn  # noqa: E402
from f3rm_verify.seeding_plan import SeedingPlan  # noqa: E402

pytestmark = pytest.mark.train
PLAN = SeedingPlan(base_seed=42)


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    class Module(nn.Module):
        def __init__(self, seed: int = 1337) -> None:
            super().__init__()
            self.seed = seed
            self.params = nn.Parameter(torch.zeros(2))

    class Encoding(Module):
        def __init__(self, n_input_dims: int, encoding_config: Any, seed: int = 1337, dtype: Any = None) -> None:
            super().__init__(seed=seed)
            self.encoding_config = encoding_config

    class Network(Module):
        def __init__(self, n_input_dims: int, n_output_dims: int, network_config: Any, seed: int = 1337) -> None:
            super().__init__(seed=seed)

    class NetworkWithInputEncoding(Module):
        def __init__(
            self,
            n_input_dims: int,
            n_output_dims: int,
            encoding_config: Any,
            network_config: Any,
            seed: int = 1337,
        ) -> None:
            super().__init__(seed=seed)
            self.encoding_config = encoding_config

    made = types.ModuleType("tinycudann")
    for part in (Module, Encoding, Network, NetworkWithInputEncoding):
        part.__module__ = "tinycudann.modules"
        setattr(made, part.__name__, part)
    monkeypatch.setitem(sys.modules, "tinycudann", made)
    yield made


def model(**modules: Any) -> Any:
    return nn.ModuleDict(modules)


def verdicts(plan: SeedingPlan, built: Any) -> dict[str, tuple[str, str]]:
    return {claim.claim: (claim.verdict, claim.observed) for claim in observe_tcnn(plan, built)}


def test_modules_without_a_seed_get_the_base_seed_on_every_rank(bindings: Any) -> None:
    for rank in (0, 1):
        with seeded_tcnn(SeedingPlan(base_seed=42, rank=rank)):
            grid = bindings.Encoding(3, {"otype": "HashGrid"}, dtype=None)
            network = bindings.Network(n_input_dims=3, n_output_dims=1, network_config={})
            both = bindings.NetworkWithInputEncoding(3, 1, {"otype": "HashGrid"}, {})
        assert (grid.seed, network.seed, both.seed) == (42, 42, 42)
    claim = verdicts(PLAN, model(grid=grid, network=network, both=both))["seed of the tiny-cuda-nn modules"]
    assert claim == ("holds", "42 in 3 modules")


def test_a_seed_of_their_own_stays_and_fails_the_claim(bindings: Any) -> None:
    with seeded_tcnn(PLAN):
        grids = model(
            named=bindings.Encoding(3, {}, seed=7), placed=bindings.Encoding(3, {}, 8), ours=bindings.Encoding(3, {})
        )
    assert [module.seed for module in grids.values()] == [7, 8, 42]
    assert verdicts(PLAN, grids)["seed of the tiny-cuda-nn modules"] == ("fails", "named has 7, placed has 8")


def test_outside_and_with_seeding_off_they_are_as_they_were(bindings: Any) -> None:
    with seeded_tcnn(PLAN):
        pass
    off = SeedingPlan(enabled=False)
    with seeded_tcnn(off):
        inside = bindings.Encoding(3, {})
    assert (inside.seed, bindings.Encoding(3, {}).seed) == (1337, 1337)
    assert verdicts(off, model(grid=inside))["seed of the tiny-cuda-nn modules"] == (
        "not applicable",
        "1337 in 1 module",
    )
    assert verdicts(PLAN, model(grid=inside))["seed of the tiny-cuda-nn modules"][0] == "fails"


def test_a_large_seed_is_reduced_to_what_they_take(bindings: Any) -> None:
    with seeded_tcnn(SeedingPlan(base_seed=2**32 + 5)):
        assert bindings.Encoding(3, {}).seed == 5


def test_without_such_modules_nothing_is_claimed() -> None:
    with seeded_tcnn(PLAN):
        assert observe_tcnn(PLAN, model(linear=nn.Linear(2, 2))) == []


GRID = {"otype": "Composite", "nested": [{"otype": "hashgrid"}, {"otype": "Identity"}]}


@pytest.mark.parametrize(
    ("on_gpu", "encoding", "plan", "verdict"),
    [
        (True, GRID, PLAN, "fails"),
        (True, GRID, SeedingPlan(deterministic_algorithms=False), "not applicable"),
        (True, GRID, SeedingPlan(enabled=False), "not applicable"),
        (True, {"otype": "SphericalHarmonics"}, PLAN, "not applicable"),
        (False, GRID, PLAN, "not applicable"),
    ],
)
def test_the_backward_of_a_grid_on_a_gpu_is_not_deterministic(
    bindings: Any, monkeypatch: pytest.MonkeyPatch, on_gpu: bool, encoding: Any, plan: SeedingPlan, verdict: str
) -> None:
    monkeypatch.setattr(bindings.Module, "parameters", lambda self: [types.SimpleNamespace(is_cuda=on_gpu)])
    built = model(network=bindings.Network(3, 1, {}), grid=bindings.Encoding(3, encoding))
    claim = next(claim for claim in observe_tcnn(plan, built) if claim.claim == "tiny-cuda-nn's backward")
    assert claim.verdict == verdict
    assert bool(claim.remedy) == (verdict == "fails")
    assert claim.observed.endswith("in grid") == (on_gpu and encoding is GRID)
