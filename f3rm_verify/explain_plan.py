"""Which steps of a pair that diverged to execute again: from where, how far, which of them with every operator."""

from __future__ import annotations

import dataclasses
import filecmp
import shlex
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f3rm_verify.difference import FirstDivergence, Result
from f3rm_verify.errors import UnreadableError, UsageError
from f3rm_verify.ns_train import TrainingRequest, find_ns_train, request_of
from f3rm_verify.run_dir import SNAPSHOTS, RunDir
from f3rm_verify.run_facts import RunFacts, facts_of

#: Steps to execute beyond the one that diverged: what races does not always show at the same step.
_BEYOND = 2
#: Steps that are recorded operator by operator, at most; the ones around the divergence.
RECORDED = 8
#: How many tries one process that repeats the step gets.
REPEATS = 6
#: For the estimate: seconds in which a process starts, and how much longer a recorded step takes.
_START_SECONDS, _RECORDED_FACTOR = 20.0, 4.0
#: What nerfstudio logs of every step: the seconds of the step alone, without evaluations.
_STEP_SECONDS = "Train Iter (time)"
#: Environment variables that a run's manifest may set again: they change numbers, and execute nothing.
_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "GOMP_SPINCOUNT",
    "MKL_CBWR",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_DYNAMIC",
    "OMP_NUM_THREADS",
    "OMP_PLACES",
    "OMP_PROC_BIND",
    "OMP_SCHEDULE",
    "OMP_WAIT_POLICY",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_NUM_THREADS",
    "PYTHONHASHSEED",
    "TCNN_SEED",
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which steps to execute again: from `start` (of `snapshot`, which both sides left, else 0) to `until`.

    `record` are the first and the last step with operators. `seconds` is an estimate of a step's time.
    """

    requests: Mapping[str, TrainingRequest]
    snapshot: Path | None
    start: int
    until: int
    record: tuple[int, int]
    seconds: float

    def estimate(self, tries: int) -> str:
        """How long `tries` will take, in words."""
        recorded = self.record[1] - self.record[0] + 1
        steps = self.until - self.start + 1 + recorded * _RECORDED_FACTOR
        least = _START_SECONDS + self.seconds * steps
        repeats = _START_SECONDS + self.seconds * (self.until - self.start + REPEATS * _RECORDED_FACTOR)
        return f"about {_minutes(least + repeats)}, at most {_minutes(tries * least + repeats)}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def plan_pair(
    runs: Mapping[str, RunDir],
    compared: Result,
    *,
    output: Path,
    ns_train: Path,
    load_config: Path | None,
    stall_timeout: float,
    foreign: Callable[[str], bool],
) -> Plan:
    """What to execute again for a pair that diverged. Raises UsageError where that cannot be known or done."""
    first = compared.first_divergence
    assert first is not None
    facts = {side: facts_of(run) for side, run in runs.items()}
    requests = {}
    for side in runs:
        manifest = facts[side].manifest
        request = request_of(manifest.get("argv"), output=output, ns_train=ns_train, side=side)
        if facts[side].ranks > 1:
            raise UsageError(f"The {side} run has several ranks; what is executed again is one device's training.")
        if _saved_config(manifest) is not None and load_config is None:
            raise UsageError(f"The {side} run was trained from a saved config.yml; give it again with --load-config.")
        requests[side] = dataclasses.replace(
            request,
            load_config=load_config,
            stall_timeout=stall_timeout,
            variables=_variables(manifest),
            foreign=foreign(request.method),
        )
    done = min(fact.steps or 0 for fact in facts.values())
    if done == 0:
        raise UsageError("One of the runs shows no step that was done, so there is nothing to execute again.")
    step = min(first.step, done - 1) if first.step is not None else done - 1
    start, snapshot = _start(runs, step)
    until = min(step + _BEYOND, done - 1)
    return Plan(
        requests=requests,
        snapshot=snapshot,
        start=start,
        until=until,
        record=recorded_steps(start, until),
        seconds=max(map(_seconds_per_step, runs.values())),
    )


def explain_command(reference: RunFacts, candidate: RunFacts, first: FirstDivergence) -> str | None:
    """The command that executes a pair again where it diverged; None where that cannot be done here.

    It can be done of one device's trainings that left traces, whose program and data are where they were.
    """
    sides = {"reference": reference, "candidate": candidate}
    traced = all("trace" in facts.run.recorded and facts.ranks == 1 for facts in sides.values())
    saved = {_saved_config(facts.manifest) for facts in sides.values()}
    if first.step is None or not traced or len(saved) > 1:
        return None
    try:
        program = find_ns_train()
        for side, facts in sides.items():
            argv: Any = facts.manifest.get("argv")
            request_of(argv, output=Path(), ns_train=program, side=side)
            if Path(argv[0]) != program:
                return None
    except UsageError:
        return None
    config = [f"--load-config={path}" for path in saved if path is not None]
    return shlex.join(["f3rm-verify", "explain", *(str(facts.run.path) for facts in sides.values()), *config])


def _saved_config(manifest: Mapping[str, Any]) -> str | None:
    """The saved configuration that was trained, where one was."""
    saved = manifest.get("load_config")
    path = saved.get("path") if isinstance(saved, dict) else None
    return path if isinstance(path, str) else None


def _variables(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What to set in the environment: from an untrusted manifest, so only what is known to be harmless."""
    environment = manifest.get("environment")
    environment = environment if isinstance(environment, dict) else {}
    recorded, threads = environment.get("variables"), environment.get("threads")
    recorded = recorded if isinstance(recorded, dict) else {}
    intra_op = threads.get("intra_op") if isinstance(threads, dict) else None
    known = {n: v for n, v in recorded.items() if n in _VARIABLES and isinstance(v, str) and "\0" not in v}
    return ({"OMP_NUM_THREADS": str(intra_op)} if type(intra_op) is int and intra_op > 0 else {}) | known


def recorded_steps(start: int, until: int) -> tuple[int, int]:
    """The first and the last step to record with operators, of those to execute."""
    return max(start, until - RECORDED + 1), until


def _seconds_per_step(run: RunDir) -> float:
    """What a step took as it was logged, evaluations and start left out. 1 s where it is not known."""
    try:
        series = run.events.scalars.get(_STEP_SECONDS)
    except UnreadableError:
        series = None
    seconds = [] if series is None else [value for value in map(float, series.values) if 0 < value < 1e6]
    return statistics.median(seconds) if seconds else 1.0


def _start(runs: Mapping[str, RunDir], step: int) -> tuple[int, Path | None]:
    """The last step not after `step` of which both sides have the same snapshot, bit by bit; 0 where there is none."""
    ones, others = (_snapshots(run) for run in runs.values())
    for number in sorted(ones.keys() & others.keys(), reverse=True):
        if 0 < number <= step and filecmp.cmp(ones[number], others[number], shallow=False):
            return number, ones[number]
    return 0, None


def _snapshots(run: RunDir) -> dict[int, Path]:
    folder = run.path / SNAPSHOTS
    if folder.is_symlink() or not folder.is_dir():
        return {}
    names = {path.name.removeprefix("step-").removesuffix(".pt"): path for path in folder.glob("step-*.pt")}
    return {int(name): path for name, path in names.items() if name.isdecimal() and not path.is_symlink()}
