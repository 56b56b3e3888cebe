"""The deterministic hash grid against nerfstudio's own: same outputs, same gradients, the same bits every time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("nerfstudio")

import torch  # noqa: E402
from torch import nn  # noqa: E402

with warnings.catch_warnings():  # what nerfstudio imports warns of what it is made of
    warnings.simplefilter("ignore")
    from nerfstudio.field_components.encodings import HashEncoding

    from f3rm_verify.errors import TrainingError
    from f3rm_verify.f3rm.encoding import (
        DeterministicHashEncoding,
        choose_encoding,
        describe_encodings,
        observe_encodings,
        switch_encodings,
    )
    from f3rm_verify.seeding_plan import SeedingPlan

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]
POSITIONS = 1 << 14
SIZES = {"levels": {"num_levels": 4, "max_res": 64}, "features": {"num_levels": 3, "features_per_level": 8}}


@pytest.fixture(autouse=True)
def mode_as_it_was() -> Iterator[None]:
    mode, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(mode)
    torch.set_num_threads(threads)


def made(kind: type[HashEncoding], **sizes: Any) -> HashEncoding:
    torch.manual_seed(0)
    return kind(log2_hashmap_size=12, hash_init_scale=1.0, implementation="torch", **sizes)


def positions(count: int = POSITIONS, **options: Any) -> torch.Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(1), **options)


def gradient(grid: HashEncoding) -> torch.Tensor:
    encoded = grid(positions())
    towards = torch.rand(encoded.shape, generator=torch.Generator().manual_seed(2)) - 0.5
    return torch.autograd.grad(encoded, grid.hash_table, towards)[0]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
class TestAgainstTheStockGrid:
    def test_parameters_and_outputs_are_the_same_bits(self, sizes: Any) -> None:
        stock, own = made(HashEncoding, **sizes), made(DeterministicHashEncoding, **sizes)
        assert list(own.state_dict()) == list(stock.state_dict()) == ["hash_table"]
        assert torch.equal(own.hash_table, stock.hash_table)
        for where in (positions(), positions() * 3 - 1, torch.linspace(0, 1, 30).view(2, 5, 3)):
            assert torch.equal(own(where), stock(where))

    def test_a_checkpoint_of_one_loads_in_the_other(self, sizes: Any) -> None:
        stock, own = made(HashEncoding, **sizes), made(DeterministicHashEncoding, **sizes)
        nn.init.uniform_(stock.hash_table)
        own.load_state_dict(stock.state_dict())
        assert torch.equal(own(positions()), stock(positions()))

    def test_gradients_are_equal_within_float32_rounding(self, sizes: Any) -> None:
        """Against float64, as a share of what an entry's addends sum up to: n additions are off by n/2 ulps at most."""
        torch.use_deterministic_algorithms(True)
        found = {kind: gradient(made(kind, **sizes)) for kind in (HashEncoding, DeterministicHashEncoding)}
        scale = found[HashEncoding].abs().max()
        assert 0 < (found[DeterministicHashEncoding] - found[HashEncoding]).abs().max() <= 2e-5 * scale
        exact = made(HashEncoding, **sizes).double()
        exact.scalings = exact.scalings.float()
        assert torch.allclose(found[DeterministicHashEncoding], gradient(exact).float(), rtol=1e-4, atol=2e-5)

    def test_gradients_of_positions_are_the_same_within_rounding(self, sizes: Any) -> None:
        found = []
        for kind in (HashEncoding, DeterministicHashEncoding):
            where = positions(100, requires_grad=True)
            found.append(torch.autograd.grad(made(kind, **sizes)(where).sin().sum(), where)[0])
        assert torch.allclose(*found, rtol=1e-4, atol=1e-3)
        assert found[0].abs().max() > 1

    def test_second_derivatives_are_the_same_within_rounding(self, sizes: Any) -> None:
        found = []
        for kind in (HashEncoding, DeterministicHashEncoding):
            grid, where = made(kind, **sizes), positions(50, requires_grad=True)
            slope = torch.autograd.grad(grid(where).sin().sum(), where, create_graph=True)[0]
            found.append(torch.autograd.grad(slope.square().sum(), grid.hash_table)[0])
        assert torch.allclose(*found, rtol=1e-3, atol=1e-3 * found[0].abs().max().item())
        assert found[0].abs().max() > 0


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gradients_are_the_same_bits_every_time_at_any_number_of_threads(threads: int, deterministic: bool) -> None:
    torch.set_num_threads(2)
    first = gradient(made(DeterministicHashEncoding, **SIZES["features"]))
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    for _ in range(3):
        assert torch.equal(gradient(made(DeterministicHashEncoding, **SIZES["features"])), first)


def test_the_stock_grid_does_differ_on_two_threads() -> None:
    """The negative control: what is mended here is broken there."""
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(2)
    grid = made(HashEncoding, **SIZES["features"])
    first = gradient(grid)
    assert any(not torch.equal(gradient(grid), first) for _ in range(20))


class TestSwitching:
    def test_it_goes_there_and_back_and_keeps_the_parameters(self) -> None:
        model = nn.ModuleDict({"grid": made(HashEncoding, num_levels=2), "other": nn.Linear(1, 1)})
        table = model["grid"].hash_table
        for deterministic, name in ((True, "deterministic"), (False, "stock")):
            switch_encodings(model, deterministic=deterministic)
            assert describe_encodings(model) == {"grid": name}
        assert model["grid"].hash_table is table


@dataclass
class Model:
    implementation: str = "torch"


@dataclass
class Pipeline:
    model: Any = field(default_factory=Model)


@dataclass
class Config:
    encoding: str = "auto"
    enable_comprehensive_seeding: bool = True
    method_name: str = "f3rm"
    pipeline: Pipeline = field(default_factory=Pipeline)


class TestChoice:
    @pytest.mark.parametrize(("seeded", "chosen"), [(True, "deterministic"), (False, "stock")])
    def test_auto_is_deterministic_where_the_training_is_seeded(self, seeded: bool, chosen: str) -> None:
        config = Config(enable_comprehensive_seeding=seeded)
        choose_encoding(config)
        assert config.encoding == chosen

    def test_tcnn_stays_where_the_model_asks_for_it_and_it_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("f3rm_verify.f3rm.encoding.TCNN_EXISTS", True)
        config = Config(pipeline=Pipeline(Model("tcnn")))
        choose_encoding(config)
        assert (config.encoding, config.pipeline.model.implementation) == ("tcnn", "tcnn")
        config.encoding = "deterministic"
        choose_encoding(config)
        assert config.pipeline.model.implementation == "torch"

    def test_tcnn_that_is_not_installed_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("f3rm_verify.f3rm.encoding.TCNN_EXISTS", False)
        with pytest.raises(TrainingError, match="needs the package tinycudann"):
            choose_encoding(Config(encoding="tcnn"))


class TestClaim:
    def test_it_holds_for_the_deterministic_grid_and_draws_nothing(self) -> None:
        torch.use_deterministic_algorithms(False)
        model = nn.ModuleDict({"grid": made(DeterministicHashEncoding, num_levels=4)})
        before = torch.get_rng_state()
        (claim,) = observe_encodings(SeedingPlan(), model)
        assert (claim.verdict, claim.set) == ("holds", "deterministic")
        assert torch.equal(before, torch.get_rng_state())
        assert model["grid"].hash_table.grad is None

    def test_it_fails_for_the_stock_grid_without_deterministic_algorithms(self) -> None:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(2)
        (claim,) = observe_encodings(SeedingPlan(), nn.ModuleDict({"grid": made(HashEncoding, num_levels=16)}))
        assert claim.verdict == "fails"
        assert claim.remedy == "Train with --encoding deterministic."

    def test_nothing_is_claimed_where_nothing_was_asked(self) -> None:
        (claim,) = observe_encodings(SeedingPlan(enabled=False), nn.ModuleDict({"grid": made(HashEncoding)}))
        assert (claim.verdict, claim.observed) == ("not applicable", "grid stock")
        assert observe_encodings(SeedingPlan(), nn.Linear(1, 1)) == []
