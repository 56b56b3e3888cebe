"""What determinism may cost, as things that can be switched on and off in one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch

from f3rm_verify.seeding_plan import CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_VARIABLE, SeedingPlan

#: Switches something on; off again when it is left.
Switch = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Something that determinism may cost. `upon` names a measure that is on in both of its blocks.

    `inapplicable` says why there is nothing to measure here, None where there is.
    """

    name: str
    on: Switch
    upon: str | None = None
    inapplicable: str | None = None


@contextmanager
def switched_on(measures: Sequence[Measure]) -> Iterator[None]:
    """Inside, these measures are on."""
    with ExitStack() as stack:
        for measure in measures:
            stack.enter_context(measure.on())
        yield


def known_measures(plan: SeedingPlan, *, device: str, grids: Measure, recording: Switch) -> list[Measure]:
    """What can be switched on and off in one process. What else the trainer does is the same in every block."""
    off = _switched_off(plan, plan.deterministic_algorithms, "--seed-deterministic-algorithms")
    algorithms = "deterministic algorithms"
    return [
        Measure(name=algorithms, on=lambda: _deterministic(warn_only=plan.warn_only), inapplicable=off),
        Measure(name="memory filling", on=_filling, upon=algorithms, inapplicable=off),
        Measure(
            name="cuBLAS workspace",
            on=lambda: _cublas_workspace(CUBLAS_WORKSPACE),
            inapplicable=_no_cublas(plan, torch.device(device)),
        ),
        grids,
        Measure(name="recorder", on=recording),
    ]


def _switched_off(plan: SeedingPlan, wanted: bool, option: str) -> str | None:
    if not plan.enabled:
        return "off: --enable-comprehensive-seeding False"
    return None if wanted else f"off: {option} False"


@contextmanager
def nothing_on() -> Iterator[None]:
    """Inside, everything is as in a training without seeding; afterwards, as it was."""
    with ExitStack() as stack:
        stack.enter_context(_flags_kept())
        if torch.cuda.is_initialized():
            stack.enter_context(_cublas_workspace(None))
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = False
        # As nerfstudio leaves it.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
        yield


@contextmanager
def _deterministic(*, warn_only: bool) -> Iterator[None]:
    with _flags_kept():
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        yield


@contextmanager
def _filling() -> Iterator[None]:
    with _flags_kept():
        torch.utils.deterministic.fill_uninitialized_memory = True
        yield


@contextmanager
def _flags_kept() -> Iterator[None]:
    """Afterwards, torch's flags are what they were before."""
    mode, filling, cudnn = torch.get_deterministic_debug_mode(), torch.utils.deterministic, torch.backends.cudnn
    before = filling.fill_uninitialized_memory, cudnn.deterministic, cudnn.benchmark
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        filling.fill_uninitialized_memory, cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def _cublas_workspace(config: str | None) -> Iterator[None]:
    before = os.environ.get(CUBLAS_WORKSPACE_VARIABLE)
    _set_cublas_workspace(config)
    try:
        yield
    finally:
        _set_cublas_workspace(before)


def _set_cublas_workspace(config: str | None) -> None:
    """Has torch give cuBLAS a workspace of this configuration as soon as it needs one again."""
    if config is None:
        os.environ.pop(CUBLAS_WORKSPACE_VARIABLE, None)
    else:
        os.environ[CUBLAS_WORKSPACE_VARIABLE] = config
    torch.cuda.synchronize()
    if hasattr(torch._C, "_cuda_resetCublasWorkspaceSize"):
        torch._C._cuda_resetCublasWorkspaceSize()
    torch._C._cuda_clearCublasWorkspaces()


def _no_cublas(plan: SeedingPlan, device: torch.device) -> str | None:
    """Why there is no cuBLAS workspace to switch, None where there is: tried, as torch may read the variable once."""
    if device.type != "cuda":
        return "no CUDA device"
    taken = []
    for config in (":16:8", CUBLAS_WORKSPACE):
        with _cublas_workspace(config):
            before = torch.cuda.memory_allocated()
            result = torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
            taken.append(torch.cuda.memory_allocated() - before - result.nbytes)
    if not taken[0] < taken[1]:
        return "this torch reads CUBLAS_WORKSPACE_CONFIG only once in a process"
    return _switched_off(plan, plan.cublas_workspace, "--seed-cublas-workspace")
