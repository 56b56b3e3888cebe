"""Gives tiny-cuda-nn's modules a seed, which neither nerfstudio nor F3RM passes on to them.

Their constructors take one (1337 by default) and never look at torch's: without this, `--machine.seed` does not reach
them. Works with whatever bindings are installed; imports none.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from f3rm_verify.seeding_plan import Claim, SeedingPlan

_CLASSES = ("Encoding", "Network", "NetworkWithInputEncoding")
#: tiny-cuda-nn takes 32 bits of it.
_SEEDS = 2**32


@contextmanager
def seeded_tcnn(plan: SeedingPlan) -> Iterator[None]:
    """Inside, tiny-cuda-nn's modules that are given no seed get the base seed, the same on every rank."""
    # Whoever builds such modules has imported it by now.
    bindings = sys.modules.get("tinycudann") if plan.enabled else None
    with ExitStack() as stack:
        for name in _CLASSES if bindings is not None else ():
            made = getattr(bindings, name, None)
            if isinstance(made, type) and "seed" in inspect.signature(made.__init__).parameters:  # type: ignore[misc]
                stack.enter_context(_seeded(made, plan.base_seed % _SEEDS))
        yield


@contextmanager
def _seeded(made: Any, seed: int) -> Iterator[None]:
    original = made.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def construct(self: Any, *arguments: Any, **keywords: Any) -> None:
        given = signature.bind(self, *arguments, **keywords).arguments
        original(self, *arguments, **keywords, **({} if "seed" in given else {"seed": seed}))

    made.__init__ = construct
    try:
        yield
    finally:
        made.__init__ = original


def observe_tcnn(plan: SeedingPlan, model: Any) -> list[Claim]:
    """The claims about the tiny-cuda-nn modules of a model; none where it has none."""
    modules = {name: module for name, module in model.named_modules() if _is_tcnn(module)}
    if not modules:
        return []
    seeds = {name: getattr(module, "seed", None) for name, module in modules.items()}
    return [_seed_claim(plan, seeds), _backward_claim(plan, modules)]


def _is_tcnn(module: Any) -> bool:
    return any(part.__module__.partition(".")[0] == "tinycudann" for part in type(module).__mro__)


def _seed_claim(plan: SeedingPlan, seeds: dict[str, Any]) -> Claim:
    asked = plan.base_seed % _SEEDS
    others = [f"{name} has {seed}" for name, seed in seeds.items() if seed != asked]
    found = ", ".join(str(seed) for seed in dict.fromkeys(seeds.values()))
    count = "1 module" if len(seeds) == 1 else f"{len(seeds)} modules"
    return Claim(
        claim="seed of the tiny-cuda-nn modules",
        asked=str(asked) if plan.enabled else "nothing",
        set=str(asked) if plan.enabled else "nothing",
        observed=", ".join(others) if plan.enabled and others else f"{found} in {count}",
        verdict="not applicable" if not plan.enabled else "fails" if others else "holds",
        remedy="Build these modules in the model's constructor, and give them no seed of their own."
        if plan.enabled and others
        else "",
    )


def _backward_claim(plan: SeedingPlan, modules: dict[str, Any]) -> Claim:
    """A grid's backward adds with atomics, raises no alert, and no option changes that (tiny-cuda-nn's issue 343)."""
    grids = [name for name, module in modules.items() if _is_grid(module)]
    on_gpu = [name for name in grids if any(parameter.is_cuda for parameter in modules[name].parameters())]
    asked = plan.enabled and plan.deterministic_algorithms
    elsewhere = "on the CPU: not tiny-cuda-nn's own kernels" if grids else "without a grid: no atomics"
    return Claim(
        claim="tiny-cuda-nn's backward",
        asked="deterministic" if asked else "nothing",
        set="nothing: it has no such option",
        observed=f"adds floats with atomics, in any order, in {', '.join(on_gpu)}" if on_gpu else elsewhere,
        verdict="fails" if asked and on_gpu else "not applicable",
        remedy="Train with --pipeline.model.implementation torch where the model has it; a module that is built "
        "straight on tinycudann cannot be made deterministic."
        if asked and on_gpu
        else "",
    )


def _is_grid(module: Any) -> bool:
    """Whether a module encodes by a grid, alone or in a composition; tiny-cuda-nn ignores the case of its names."""
    return "grid" in str(getattr(module, "encoding_config", "")).lower()
