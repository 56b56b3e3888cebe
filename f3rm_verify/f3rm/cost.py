"""Measures, in place of a training, what each measure for determinism costs in time and memory.

Short blocks of steps with and without a measure follow each other, so that whatever else the machine does meets both
alike. What the steps do to the model is worth nothing afterwards.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nerfstudio.engine.callbacks import TrainingCallbackLocation

from f3rm_verify import launch_variables
from f3rm_verify.environment import describe_environment
from f3rm_verify.f3rm.cost_measures import Measure, Switch, known_measures, nothing_on, switched_on
from f3rm_verify.f3rm.encoding import describe_encodings, deterministic_grids, switch_encodings
from f3rm_verify.f3rm.memory_use import PeakMemory
from f3rm_verify.f3rm.refusal import refuse
from f3rm_verify.recorder import write_json
from f3rm_verify.run_dir import COST
from f3rm_verify.seeding_plan import SeedingPlan

#: Steps of a block that count. An even number: nerfacto's proposal networks are trained at every second step.
COUNTED = 4
#: Steps before them, in which allocators and caches get used to what was switched.
SETTLING = 1
#: Steps with everything on, and as many with everything off, before the first block.
WARM_UP = 5
#: The comparison of two blocks that are alike. What it shows is noise.
CONTROL = "nothing (control)"
EVERYTHING = "everything"
#: Of the file with the measured times.
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is on in the blocks without and in the blocks with a measure."""

    name: str
    without: tuple[Measure, ...]
    within: tuple[Measure, ...]


@dataclass(frozen=True, kw_only=True)
class Block:
    """The seconds that the counted steps of one block took together, and the peaks of memory while they ran."""

    seconds: float
    peak_bytes: dict[str, int]


@dataclass(frozen=True)
class Timing:
    """Runs steps and says what they took. `step` runs the next step; `begin` and `peaks` stand around those counted."""

    step: Callable[[], None]
    clock: Callable[[], float] = time.perf_counter
    begin: Callable[[], None] = lambda: None
    peaks: Callable[[], dict[str, int]] = dict
    release: Callable[[], None] = lambda: None
    wait: Callable[[], None] = lambda: None

    def block(self, measures: Sequence[Measure]) -> Block:
        """Some steps with these measures on."""
        self.release()
        with switched_on(measures):
            for _ in range(SETTLING):
                self.step()
            self.wait()
            self.begin()
            start = self.clock()
            for _ in range(COUNTED):
                self.step()
            self.wait()
            return Block(seconds=self.clock() - start, peak_bytes=self.peaks())


def comparisons(measures: Sequence[Measure]) -> list[Comparison]:
    """Nothing with nothing, each measure that applies here with its absence, and all of them with none."""
    usable = {measure.name: measure for measure in measures if measure.inapplicable is None}
    found = [Comparison(name=CONTROL, without=(), within=())]
    for measure in usable.values():
        below = () if measure.upon is None else (usable[measure.upon],)
        found.append(Comparison(name=measure.name, without=below, within=(*below, measure)))
    return [*found, Comparison(name=EVERYTHING, without=(), within=tuple(usable.values()))]


def order(count: int, rounds: int) -> Iterator[tuple[int, bool]]:
    """Which of `count` comparisons is next, and whether its block with the measure comes first.

    Each round has all of them. Over `count` rounds, twice as many where that is odd, each follows every other equally
    often (a Latin square of Williams): what one leaves behind meets all alike.
    """
    zigzag = [(i + 1) // 2 if i % 2 else -i // 2 for i in range(count)]
    for turn in range(rounds):
        row = [(place + turn) % count for place in zigzag]
        if count % 2 and turn // count % 2:
            row.reverse()
        for comparison in row:
            yield comparison, turn % 2 == 0


def compare(
    timing: Timing, compared: Sequence[Comparison], rounds: int, *, progress: Callable[[], object] = lambda: None
) -> dict[str, list[dict[str, Block]]]:
    """For each comparison, its pairs of blocks: `without` and `with`."""
    pairs: dict[str, list[dict[str, Block]]] = {comparison.name: [] for comparison in compared}
    for number, within_first in order(len(compared), rounds):
        comparison = compared[number]
        pair = {}
        for side in ("with", "without") if within_first else ("without", "with"):
            progress()
            pair[side] = timing.block(comparison.within if side == "with" else comparison.without)
        pairs[comparison.name].append(pair)
    return pairs


def wanted_steps() -> int | None:
    """How many counted steps of each side the launcher asked for; None where this process is to train."""
    value = os.environ.get(launch_variables.COST)
    return int(value) if value else None


def refuse_several_ranks(machine: Any) -> None:
    """Ends the process with a sentence where costs are to be measured on several ranks."""
    if wanted_steps() and machine.num_devices * machine.num_machines > 1:
        refuse("What determinism costs is measured on one device; leave --machine.num-devices at 1.")


def measure_cost(trainer: Any, plan: SeedingPlan, *, recording: Switch, tell: Callable[[int, int], object]) -> None:
    """Takes steps of a trainer that is set up, and writes what they took into its run directory.

    `recording` switches on what the trainer does besides training. `tell` gets the steps done and how many there are.
    """
    measures = known_measures(plan, device=trainer.device, grids=_grids(trainer), recording=recording)
    possible = comparisons(measures)
    compared = _wanted(possible)
    rounds = 2 * -(-(wanted_steps() or 1) // (2 * COUNTED))
    memory = PeakMemory(cuda=torch.device(trainer.device).type == "cuda")
    stepper = Stepper(trainer, after=memory.sample)
    total = 2 * WARM_UP + 2 * (SETTLING + COUNTED) * rounds * len(compared)
    timing = Timing(stepper, begin=memory.begin, peaks=memory.peaks, release=memory.release, wait=memory.wait)
    tell(0, total)
    switch_encodings(trainer.pipeline.model, deterministic=False)
    with nothing_on():
        for measures_on in (possible[-1].within, ()):
            with switched_on(measures_on):
                for _ in range(WARM_UP):
                    stepper()
        pairs = compare(timing, compared, rounds, progress=lambda: tell(stepper.done, total))
    rows = [_row(CONTROL, pairs), *(_row(one.name, pairs, one) for one in measures), _row(EVERYTHING, pairs)]
    rows = [row for row in rows if row["pairs"] or row["not_applicable"]]
    head = {"schema_version": SCHEMA_VERSION, "settings": {**_settings(trainer, plan), "resident": memory.how}}
    write_json(trainer.base_dir / COST, {**head, "comparisons": rows})


def _grids(trainer: Any) -> Measure:
    """The deterministic hash grids against nerfstudio's, which train in every other block."""
    encoding, model = trainer.config.encoding, trainer.pipeline.model
    found = "deterministic" in describe_encodings(model).values()
    why = None if found else f"off: --encoding {encoding}" if encoding != "deterministic" else "no torch hash grids"
    return Measure(name="deterministic hash grids", on=lambda: deterministic_grids(model), inapplicable=why)


def _wanted(compared: list[Comparison]) -> list[Comparison]:
    """Of the comparisons, the control and those that the launcher asked for; ends the process where one is unknown."""
    only = list(filter(None, os.environ.get(launch_variables.COST_ONLY, "").split(",")))
    names = [comparison.name for comparison in compared]
    unknown = [name for name in only if name not in names]
    if unknown:
        refuse(f"Nothing called {', '.join(map(repr, unknown))} can be measured here; there are {', '.join(names)}.")
    return [comparison for comparison in compared if not only or comparison.name in (CONTROL, *only)]


def _row(name: str, pairs: dict[str, list[dict[str, Block]]], measure: Measure | None = None) -> dict[str, Any]:
    blocks = [{side: dataclasses.asdict(block) for side, block in pair.items()} for pair in pairs.get(name, [])]
    upon, inapplicable = (None, None) if measure is None else (measure.upon, measure.inapplicable)
    return {"measure": name, "upon": upon, "not_applicable": inapplicable, "pairs": blocks}


def _settings(trainer: Any, plan: SeedingPlan) -> dict[str, Any]:
    device = torch.device(trainer.device)
    hardware = describe_environment()["hardware"]
    return {
        "method": trainer.config.method_name,
        "seed": plan.base_seed,
        "rays": trainer.pipeline.datamanager.get_train_rays_per_batch(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware["cpu"],
        "torch": torch.__version__,
        "counted_steps_per_block": COUNTED,
    }


def train_step(trainer: Any, step: int) -> None:
    """Does a step as nerfstudio's loop does, but for logging, evaluating and saving."""
    trainer.step = step
    trainer.pipeline.train()
    for callback in trainer.callbacks:
        callback.run_callback_at_location(step, location=TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
    trainer.train_iteration(step)
    for callback in trainer.callbacks:
        callback.run_callback_at_location(step, location=TrainingCallbackLocation.AFTER_TRAIN_ITERATION)


class Stepper:
    """Does the next step at each call."""

    def __init__(self, trainer: Any, *, after: Callable[[], None]) -> None:
        self._trainer, self._after = trainer, after
        self.done = 0

    def __call__(self) -> None:
        """Does the next step."""
        train_step(self._trainer, self._trainer._start_step + self.done)
        self.done += 1
        self._after()
