"""Executes steps of a training again, in its place: the same step many times, or a stretch of steps once.

What is asked for stands in F3RM_VERIFY_REPLAY, as JSON:
- `{"repeat": {"at": STEP, "tries": N, "recorded": N}}`: one process, one step, from one state;
- `{"stretch": {"until": STEP, "record": [FIRST, LAST]}}`: every step up to and with STEP, as the training did them.

Beside them, `"snapshot": FILE` says where to start; without, at the first step.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
from torch import Tensor

from f3rm_verify import launch_variables
from f3rm_verify.f3rm.cost import train_step
from f3rm_verify.f3rm.operators import recorded_operators
from f3rm_verify.f3rm.snapshots import (
    SnapshotRing,
    digests_of,
    load_snapshot,
    put_back,
    read_generators,
    snapshot_folder,
    take_snapshot,
    write_generators,
)
from f3rm_verify.recorder import digest_tensors, write_json
from f3rm_verify.run_dir import EXPLAIN, OPERATORS

SCHEMA_VERSION = 1

Tell = Callable[[int, int], object]
Digests = dict[str, str]


def asked_replay() -> dict[str, Any] | None:
    """What the launcher asked for; None where this process is to train."""
    value = os.environ.get(launch_variables.REPLAY)
    return json.loads(value) if value else None


def starting_snapshot() -> dict[str, Any] | None:
    """The snapshot to start from, None where there is none. Raises TrainingError where it cannot be read."""
    path = (asked_replay() or {}).get("snapshot")
    return load_snapshot(Path(path)) if path else None


def starting_batch() -> int:
    """The number of the first batch that data workers have to make."""
    snapshot = starting_snapshot()
    return (snapshot or {}).get("batches") or 0


def keep_snapshots(trainer: Any) -> None:
    """Has a trainer that is set up keep snapshots of itself, where the launcher asked for them.

    A snapshot is taken before anything else of its step, so after the evaluation of the one before.
    """
    every = os.environ.get(launch_variables.SNAPSHOT_EVERY)
    if every:
        ring = SnapshotRing(folder=snapshot_folder(trainer.base_dir), every=int(every))
        ring.check_budget(trainer)
        _before_each_step(trainer, lambda step: ring(trainer, step))


def _before_each_step(trainer: Any, call: Callable[[int], object]) -> None:
    def first(step: int) -> None:
        call(step)

    where = [TrainingCallbackLocation.BEFORE_TRAIN_ITERATION]
    trainer.callbacks.insert(0, TrainingCallback(where_to_run=where, func=first))


def run_replay(trainer: Any, *, train: Callable[[], object], settings: Mapping[str, Any], tell: Tell) -> None:
    """Executes what was asked for, and writes what came out of it into the run directory.

    `train` is the trainer's own loop; `tell` gets the steps done and how many there are.
    """
    asked = asked_replay() or {}
    snapshot = starting_snapshot()
    if snapshot is not None:
        put_back(trainer, snapshot)
        trainer._start_step = snapshot["step"]
    found = _repeat(trainer, asked["repeat"], tell) if "repeat" in asked else _stretch(trainer, asked, train, tell)
    head = {"schema_version": SCHEMA_VERSION, "settings": dict(settings), "start": trainer._start_step}
    write_json(trainer.base_dir / EXPLAIN, {**head, **found})


def _repeat(trainer: Any, asked: Mapping[str, int], tell: Tell) -> dict[str, Any]:
    """The step `at`, many times from one state; recorded operator by operator where that gave several results."""
    before = max(0, asked["at"] - trainer._start_step)
    most = before + 1 + asked["tries"] + asked["recorded"]
    done = 0

    def step_done() -> None:
        nonlocal done
        done += 1
        tell(done, most)

    tell(0, most)
    for step in range(trainer._start_step, asked["at"]):
        train_step(trainer, step)
        step_done()
    held = _hold_batch(trainer.pipeline.datamanager)
    state = take_snapshot(trainer, asked["at"])
    attempt = _Attempt(trainer, state)
    # One that does not count: what is made at the first use of something, here the gradients' memory, is then there.
    attempt()
    step_done()
    tries = []
    for _ in range(asked["tries"]):
        tries.append(attempt())
        step_done()
    found: dict[str, Any] = {"step": asked["at"], "left_out": state["left_out"], "batch_held": held}
    found |= {"not_restored": sorted(attempt.not_restored), "tries": tries, "recorded": None}
    if any(one["digests"] != tries[0]["digests"] for one in tries):
        found["recorded"] = _record_repeats(trainer, attempt, asked["recorded"], step_done)
    return found


def _record_repeats(trainer: Any, attempt: _Attempt, most: int, step_done: Callable[[], object]) -> dict[str, Any]:
    """Repeats with every operator recorded until one differs from the first; keeps those two, and their digests."""
    folder = trainer.base_dir / OPERATORS
    first = folder / "repeat-0.jsonl"
    with recorded_operators(first, trainer.pipeline):
        reference = attempt()
    step_done()
    for number in range(1, most):
        file = folder / f"repeat-{number}.jsonl"
        with recorded_operators(file, trainer.pipeline):
            found = attempt()
        step_done()
        both = [reference["digests"], found["digests"]]
        if both[0] != both[1]:
            return {"tries": number + 1, "files": [first.name, file.name], "digests": both}
        file.unlink()
    first.unlink()
    return {"tries": most, "files": [], "digests": []}


class _Attempt:
    """Puts the state back, does the step, and says what came out of it."""

    def __init__(self, trainer: Any, state: Mapping[str, Any]) -> None:
        self._trainer, self._state = trainer, state
        self._digests = digests_of(state)
        #: Parts of the state that were not the same after they were put back.
        self.not_restored: set[str] = set()

    def __call__(self) -> dict[str, Any]:
        put_back(self._trainer, self._state)
        step = self._state["step"]
        restored = digests_of(take_snapshot(self._trainer, step))
        self.not_restored |= {
            name for name in restored.keys() | self._digests.keys() if restored.get(name) != self._digests.get(name)
        }
        start = time.perf_counter()
        with observed_step(self._trainer) as seen:
            train_step(self._trainer, step)
        seconds = time.perf_counter() - start
        after = digests_of(take_snapshot(self._trainer, step + 1))
        return {"seconds": seconds, "digests": {**seen, **after}}


@contextmanager
def observed_step(trainer: Any) -> Iterator[Digests]:
    """Inside, the digests of the batches and of the losses that a step has go into the dictionary."""
    seen: Digests = {}
    pipeline, manager = trainer.pipeline, trainer.pipeline.datamanager

    def next_train(step: int) -> Any:
        value = made(step)
        seen["batch"] = digest_tensors(_batch_tensors(value))
        return value

    def get_train_loss_dict(step: int) -> Any:
        value = lost(step=step)
        for name, loss in value[1].items():
            seen[f"losses/{name}"] = digest_tensors([("", loss)])
        return value

    with (
        _replaced(manager, "next_train", next_train) as made,
        _replaced(pipeline, "get_train_loss_dict", get_train_loss_dict) as lost,
    ):
        yield seen


@contextmanager
def _replaced(owner: Any, name: str, new: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Inside, the instance has `new` in the place of a method; yields the method."""
    own = name in vars(owner)
    old = getattr(owner, name)
    object.__setattr__(owner, name, new)
    try:
        yield old
    finally:
        if own:
            object.__setattr__(owner, name, old)
        else:
            object.__delattr__(owner, name)


def _batch_tensors(value: Any, name: str = "", depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a batch: of its mappings, sequences and, as RayBundle and Cameras are, objects with attributes."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth:
        items: Any = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, (list, tuple)):
            items = enumerate(value)
        elif type(value).__module__.startswith("nerfstudio."):
            items = vars(value).items()
        for key, item in items:
            yield from _batch_tensors(item, f"{name}/{key}", depth - 1)


def _hold_batch(datamanager: Any) -> bool:
    """Has a data manager give the first batch it makes again and again, where data workers make it: they go on."""
    if not getattr(datamanager, "data_procs", None):
        return False
    make = datamanager.next_train
    held: list[Any] = []

    # A function: an object would be taken for a part of the data manager, and its batch be put back to none.
    def next_train(step: int) -> Any:
        """A copy; the generators are then as they were after it was made."""
        if held:
            write_generators(held[1])
        else:
            held.extend((make(step), read_generators()))
        return copy.deepcopy(held[0])

    datamanager.next_train = next_train
    return True


def _stretch(trainer: Any, asked: Mapping[str, Any], train: Callable[[], object], tell: Tell) -> dict[str, Any]:
    """Every step up to one, by the trainer's own loop; those asked for with every operator recorded."""
    start, until = trainer._start_step, asked["stretch"]["until"]
    first, last = asked["stretch"]["record"]
    rows: list[dict[str, Any]] = []

    def before(step: int) -> None:
        rows.append({"step": step, "before": digests_of(take_snapshot(trainer, step))})

    def train_iteration(step: int) -> Any:
        file = trainer.base_dir / OPERATORS / f"step-{step:09d}.jsonl"
        recording = recorded_operators(file, trainer.pipeline) if first <= step <= last else nullcontext()
        with recording, observed_step(trainer) as seen:
            result = done(step)
        gradients = {n: one.grad for n, one in trainer.pipeline.named_parameters() if one.grad is not None}
        rows[-1]["during"] = {**seen, **{f"gradients/{n}": digest_tensors([("", g)]) for n, g in gradients.items()}}
        tell(step - start + 1, until - start + 1)
        return result

    _before_each_step(trainer, before)
    trainer.config.max_num_iterations = until - start + 1
    tell(0, until - start + 1)
    with (
        _replaced(trainer, "train_iteration", train_iteration) as done,
        _replaced(trainer, "save_checkpoint", lambda *_, **__: None),
    ):
        train()
    before(until + 1)
    recorded = [step for step in range(start, until + 1) if first <= step <= last]
    return {"rows": rows, "recorded_steps": recorded}


def settings_of(trainer: Any, *, seed: int) -> dict[str, Any]:
    """What was executed again, and with what."""
    return {
        "method": trainer.config.method_name,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "device": torch.device(trainer.device).type,
        "torch": torch.__version__,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }
