"""nerfstudio's hash grid with gradients that are the same bits every time, and which grid a training uses.

The backward of the stock grid, `table[index]`, adds in the order in which threads arrive unless torch's deterministic
algorithms are on. Here every entry of the table belongs to one thread, which adds in a fixed order, in both modes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from nerfstudio.field_components.encodings import HashEncoding
from nerfstudio.utils.external import TCNN_EXISTS
from torch import Tensor, nn

from f3rm_verify.errors import TrainingError
from f3rm_verify.seeding_plan import Claim, SeedingPlan, make_claim, not_asked

Encoding = Literal["auto", "stock", "deterministic", "tcnn"]

#: The factors of Instant-NGP's spatial hash (Müller et al. 2022, equation 4), as in nerfstudio.
_HASH_FACTORS = (1, 2654435761, 805459861)
#: The corners of a cell in the order in which nerfstudio interpolates them: 1 is the upper end of x, y, z.
_CORNERS = ((1, 1, 1), (1, 0, 1), (0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0), (0, 1, 0))
_PROBES = 3
#: Enough for torch's parallel backward at the coarsest setting, one level of one feature: it is serial below 32,768.
_PROBED_POSITIONS = 1 << 15


class DeterministicHashEncoding(HashEncoding):
    """nerfstudio's torch hash grid: the same parameters, the same outputs bit for bit, deterministic gradients.

    One lookup of all corners instead of eight, level by level instead of position by position: one gradient of the
    table's size instead of eight that are added up, which makes it faster too.
    """

    def pytorch_fwd(self, in_tensor: Tensor) -> Tensor:
        """Encodes positions (..., 3) in [0, 1]; gives (..., num_levels * features_per_level), differentiable twice."""
        positions = in_tensor.reshape(-1, 3)
        scalings = self.scalings.to(positions.device).view(-1, 1)
        scaled = [axis * scalings for axis in positions.unbind(-1)]  # (levels, n) each
        # As integers of 32 bits on the way, so that a position far outside is treated as nerfstudio treats it.
        lower = [torch.floor(axis).int() for axis in scaled]
        upper = [torch.ceil(axis).int() for axis in scaled]
        entries = lookup(self.hash_table, self._hashed(lower, upper))
        encoded = _interpolated(entries, [axis - low for axis, low in zip(scaled, lower, strict=True)])
        return encoded.transpose(0, 1).reshape(*in_tensor.shape[:-1], -1)

    def _hashed(self, lower: list[Tensor], upper: list[Tensor]) -> Tensor:
        """The places in their level's table of the eight corners, (levels, 8, n) int64."""
        ends = [
            (low.long() * factor, up.long() * factor)
            for low, up, factor in zip(lower, upper, _HASH_FACTORS, strict=True)
        ]
        corners = [ends[0][x] ^ ends[1][y] ^ ends[2][z] for x, y, z in _CORNERS]
        return torch.stack(corners, dim=1).bitwise_and_(self.hash_table_size - 1)  # a power of two, so: modulo it


def _interpolated(entries: Tensor, offsets: list[Tensor]) -> Tensor:
    """Trilinear interpolation of the corners' entries (levels, 8, n, features), in nerfstudio's order of operations."""
    x, y, z = (offset[..., None] for offset in offsets)
    c0, c1, c2, c3, c4, c5, c6, c7 = entries.unbind(1)
    c03 = c0 * x + c3 * (1 - x)
    c12 = c1 * x + c2 * (1 - x)
    c56 = c5 * x + c6 * (1 - x)
    c47 = c4 * x + c7 * (1 - x)
    upper = c03 * y + c12 * (1 - y)
    lower = c47 * y + c56 * (1 - y)
    return upper * z + lower * (1 - z)


def lookup(table: Tensor, places: Tensor) -> Tensor:
    """Entries (levels, k, n, features) of a table (levels * size, features) at `places` (levels, k, n) of each level.

    On a CPU, `F.embedding`, which other devices take, is deterministic as well, but has every thread read all places.
    """
    if table.device.type == "cpu":
        return _Lookup.apply(table, places)
    return F.embedding(_in_table(places, len(table)), table)


def _in_table(places: Tensor, entries: int) -> Tensor:
    levels = len(places)
    firsts = torch.arange(levels, device=places.device) * (entries // levels)
    return places + firsts.view(-1, 1, 1)


class _Lookup(torch.autograd.Function):
    """Reads entries; its gradient is `_Accumulate`, whose gradient is this again."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.entries = len(table)
        return F.embedding(_in_table(places, len(table)), table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return _Accumulate.apply(gradient, places, ctx.entries), None


class _Accumulate(torch.autograd.Function):
    """Adds values (levels, k, n, features) up in a table (entries, features), at places (levels, k, n) of each level.

    Along the dimension that it scatters, torch's CPU kernel goes in order; its threads share the other ones, the levels
    and the features. So no entry is shared between threads, and the sum does not depend on their number either.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, entries: int) -> Tensor:
        ctx.save_for_backward(places)
        levels, features = len(places), values.shape[-1]
        table = values.new_zeros(levels, entries // levels, features)
        index = places.reshape(levels, -1, 1).expand(-1, -1, features)
        return table.scatter_add_(1, index, values.reshape(levels, -1, features)).view(entries, features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _Lookup.apply(gradient, places), None, None


def choose_encoding(config: Any) -> None:
    """Puts in place of `auto` what it stands for, and has the model built with it; before the configuration is saved.

    Raises TrainingError where tcnn is asked for and cannot be had.
    """
    model: Any = getattr(config.pipeline, "model", None)
    takes_tcnn = getattr(model, "implementation", None) == "tcnn" and TCNN_EXISTS
    if config.encoding == "auto":
        seeded = "deterministic" if config.enable_comprehensive_seeding else "stock"
        config.encoding = "tcnn" if takes_tcnn else seeded
    elif config.encoding == "tcnn" and not takes_tcnn:
        _require_tcnn(config.method_name, model)
        model.implementation = "tcnn"
    elif config.encoding == "deterministic" and takes_tcnn:
        model.implementation = "torch"


def _require_tcnn(method: str, model: Any) -> None:
    if not TCNN_EXISTS:
        raise TrainingError(
            "--encoding tcnn needs the package tinycudann, which is not installed here: install it, or train with "
            "--encoding deterministic or stock."
        )
    if not hasattr(model, "implementation"):
        raise TrainingError(
            f"The model of {method} has no option `implementation`, so --encoding tcnn cannot be asked of it: train "
            "with --encoding auto."
        )


def switch_encodings(model: nn.Module, *, deterministic: bool) -> None:
    """Makes all torch hash grids of a model deterministic, or stock again, in place: they differ in code alone."""
    old, new = (HashEncoding, DeterministicHashEncoding)[:: 1 if deterministic else -1]
    for module in model.modules():
        if type(module) is old and module.tcnn_encoding is None:
            module.__class__ = new


@contextmanager
def deterministic_grids(model: nn.Module) -> Iterator[None]:
    """Inside, the torch hash grids of a model are deterministic, afterwards stock."""
    switch_encodings(model, deterministic=True)
    try:
        yield
    finally:
        switch_encodings(model, deterministic=False)


def describe_encodings(model: nn.Module) -> dict[str, str]:
    """Which hash grid stands where in the model, by module path: `stock`, `deterministic`, `tcnn`, or the class."""
    return {
        name: "tcnn" if module.tcnn_encoding is not None else _NAMES.get(type(module), type(module).__qualname__)
        for name, module in model.named_modules()
        if hasattr(module, "hash_table") and hasattr(module, "tcnn_encoding")
    }


_NAMES = {HashEncoding: "stock", DeterministicHashEncoding: "deterministic"}


def observe_encodings(plan: SeedingPlan, model: nn.Module) -> list[Claim]:
    """The claim about the gradients of a model's torch hash grids, each probed three times; none where it has none."""
    grids = {name: module for name, module in model.named_modules() if _is_torch_grid(module)}
    if not grids:
        return []
    name = "gradients of the hash grids"
    if not (plan.enabled and plan.deterministic_algorithms):
        return [not_asked(name, ", ".join(f"{grid} {kind}" for grid, kind in describe_encodings(model).items()))]
    differing = [grid for grid, module in grids.items() if not _repeats(module)]
    same = f"the same bits in each of {_PROBES} backward passes"
    return [
        make_claim(
            name,
            same,
            f"not the same bits in {_PROBES} backward passes of {', '.join(differing)}" if differing else same,
            set=", ".join(dict.fromkeys(describe_encodings(model).values())),
            remedy="Train with --encoding deterministic.",
        )
    ]


def _is_torch_grid(module: Any) -> bool:
    return isinstance(module, HashEncoding) and module.tcnn_encoding is None


def _repeats(grid: HashEncoding) -> bool:
    """Whether the gradient of the table is the same in several backward passes; draws nothing, and leaves nothing."""
    device = grid.hash_table.device
    # A sequence that fills the cube evenly: the fractional parts of the multiples of three irrational numbers.
    steps = torch.tensor([0.8191725134, 0.6710436067, 0.5497004779], device=device)
    positions = torch.arange(_PROBED_POSITIONS, device=device)[:, None] * steps % 1
    with torch.enable_grad():
        encoded = grid(positions)
        first, *others = (
            torch.autograd.grad(encoded.sin().sum(), grid.hash_table, retain_graph=True)[0] for _ in range(_PROBES)
        )
    return all(torch.equal(first, other) for other in others)
