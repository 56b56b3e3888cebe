"""The deterministic hash grid against nerfstudio's: time of forward and backward, and how exact the gradients are.

The stock grid runs as in a plain training (deterministic algorithms off), the deterministic one with them on, in turn,
in one process. Prints the median ratio of the pairs and its middle half, and the largest gradient error of each grid
against the same sums in float64, as a share of the largest gradient.

    python benchmarks/hash_grid.py [--positions 65536] [--repeat 9]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Mapping

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from nerfstudio.field_components.encodings import HashEncoding

    from f3rm_verify.f3rm.encoding import DeterministicHashEncoding

SIZES: Mapping[str, Mapping[str, int]] = {
    "nerfacto": {"num_levels": 16, "max_res": 2048, "log2_hashmap_size": 19, "features_per_level": 2},
    "F3RM's feature field": {"num_levels": 12, "max_res": 128, "log2_hashmap_size": 19, "features_per_level": 8},
    "nerfacto, small preset": {"num_levels": 8, "max_res": 256, "log2_hashmap_size": 15, "features_per_level": 2},
    "features, small preset": {"num_levels": 4, "max_res": 64, "log2_hashmap_size": 13, "features_per_level": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=65536)
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.rand(options.positions, 3, generator=torch.Generator().manual_seed(1)).to(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads, CPU"
    print(f"{options.positions} positions, {name}, torch {torch.__version__}")
    for size, shape in SIZES.items():
        measure(size, shape, where, options.repeat)


def measure(size: str, shape: Mapping[str, int], where: torch.Tensor, repeat: int) -> None:
    grids = {kind: made(kind, shape, where.device) for kind in (HashEncoding, DeterministicHashEncoding)}
    towards = torch.rand(len(where), shape["num_levels"] * shape["features_per_level"], device=where.device) - 0.5
    seconds: dict[type, list[float]] = {kind: [] for kind in grids}
    gradients = {}
    for turn in range(repeat + 1):
        for kind in list(grids)[:: 1 if turn % 2 else -1]:
            torch.use_deterministic_algorithms(kind is DeterministicHashEncoding)
            taken, gradients[kind] = timed(grids[kind], where, towards)
            seconds[kind] += [taken] if turn else []  # the first one warms up
    ratios = [own / stock for stock, own in zip(*seconds.values(), strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    stock, own = (statistics.median(taken) * 1000 for taken in seconds.values())
    print(f"{size}: {stock:.1f} > {own:.1f} ms, ratio {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")
    exact = timed(in_double(grids[HashEncoding]), where, towards.double())[1]
    errors = [((found - exact).abs().max() / exact.abs().max()).item() for found in gradients.values()]
    print(f"  largest gradient error against float64: stock {errors[0]:.1e}, deterministic {errors[1]:.1e}")


def made(kind: type[HashEncoding], shape: Mapping[str, int], device: torch.device) -> HashEncoding:
    torch.manual_seed(0)
    return kind(hash_init_scale=1.0, implementation="torch", **shape).to(device)


def in_double(grid: HashEncoding) -> HashEncoding:
    """The same grid with sums in float64, of the same weights: positions are scaled in float32 as before."""
    grid.hash_table.data = grid.hash_table.data.double()
    return grid


def timed(grid: HashEncoding, where: torch.Tensor, towards: torch.Tensor) -> tuple[float, torch.Tensor]:
    synchronise(where.device)
    start = time.perf_counter()
    (gradient,) = torch.autograd.grad(grid(where), grid.hash_table, towards)
    synchronise(where.device)
    return time.perf_counter() - start, gradient


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
