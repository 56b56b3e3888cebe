"""Executes both sides of a pair that diverged again, around its first divergence, until an operator can be named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f3rm_verify.causes import diagnose
from f3rm_verify.compare_runs import compare_runs, side_of
from f3rm_verify.difference import CONDITIONS, Difference, FirstDivergence, Outcome, Result
from f3rm_verify.errors import UnreadableError, UsageError
from f3rm_verify.explain import (
    Repeated,
    Watch,
    causal_order,
    operator_lines,
    read_found,
    read_repeated,
    repeat_request,
    repetition_of,
    require_ended_well,
    stage_of,
    subject_of,
)
from f3rm_verify.gather_evidence import gather
from f3rm_verify.ns_train import TrainingRequest, request_of
from f3rm_verify.policy import DIFF_POLICY
from f3rm_verify.readers.operators import OperatorDifference, first_operator_difference
from f3rm_verify.run_dir import OPERATORS, SNAPSHOTS, RunDir
from f3rm_verify.run_facts import facts_of
from f3rm_verify.runner import run_trainings

SIDES = ("reference", "candidate")
#: Steps to execute beyond the one that diverged: what races does not always show at the same step.
_BEYOND = 2
#: Steps that are recorded operator by operator, at most; the ones around the divergence.
_RECORDED = 8
#: How many tries one process that repeats the step gets.
_REPEATS = 6
#: For the estimate: seconds in which a process starts, and how much longer a recorded step takes.
_START_SECONDS, _RECORDED_FACTOR = 30.0, 8.0
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
    """Which steps to execute again: from `start` (of a snapshot for each side, else 0) to `until`.

    `record` are the first and the last step with operators. `seconds` is an estimate of a step's time.
    """

    requests: Mapping[str, TrainingRequest]
    snapshots: Mapping[str, Path]
    start: int
    until: int
    record: tuple[int, int]
    seconds: float

    def estimate(self, tries: int) -> str:
        """How long `tries` will take, in words."""
        recorded = self.record[1] - self.record[0] + 1
        steps = self.until - self.start + 1 + recorded * _RECORDED_FACTOR
        least = _START_SECONDS + self.seconds * steps
        repeats = _START_SECONDS + self.seconds * (self.until - self.start + _REPEATS * _RECORDED_FACTOR)
        return f"about {_minutes(least + repeats)}, at most {_minutes(tries * least + repeats)}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What executing both sides again showed in one try; `operator` where one was found."""

    step: int
    last_equal_step: int | None
    name: str
    operator: OperatorDifference | None


def compared_pair(reference: RunDir, candidate: RunDir, *, reproduce: str) -> Result:
    """What the two runs left, compared as `diff` does it."""
    return compare_runs(reference, {"candidate": candidate}, policy=DIFF_POLICY, reproduce=reproduce)


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
        request = request_of(_argv(manifest, side), output=output, ns_train=ns_train, side=side)
        if facts[side].ranks > 1:
            raise UsageError(f"The {side} run has several ranks; what is executed again is one device's training.")
        if isinstance(manifest.get("load_config"), dict) and load_config is None:
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
    start, snapshots = _start(runs, step)
    until = min(step + _BEYOND, done - 1)
    return Plan(
        requests=requests,
        snapshots=snapshots,
        start=start,
        until=until,
        record=(max(start, until - _RECORDED + 1), until),
        seconds=max(_seconds_per_step(fact.manifest, done) for fact in facts.values()),
    )


def _argv(manifest: Mapping[str, Any], side: str) -> list[str]:
    argv = manifest.get("argv")
    if not isinstance(argv, list) or not all(isinstance(word, str) for word in argv):
        raise UsageError(f"The {side} run does not say how it was started: it was not made by f3rm-verify run.")
    return argv


def _variables(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What to set in the environment: from an untrusted manifest, so only what is known to be harmless."""
    environment = manifest.get("environment")
    environment = environment if isinstance(environment, dict) else {}
    recorded, threads = environment.get("variables"), environment.get("threads")
    recorded = recorded if isinstance(recorded, dict) else {}
    intra_op = threads.get("intra_op") if isinstance(threads, dict) else None
    known = {n: v for n, v in recorded.items() if n in _VARIABLES and isinstance(v, str) and "\0" not in v}
    return ({"OMP_NUM_THREADS": str(intra_op)} if type(intra_op) is int and intra_op > 0 else {}) | known


def _seconds_per_step(manifest: Mapping[str, Any], steps: int) -> float:
    """From start to end, so with everything around the steps: an upper bound. 1 s where it is not known."""
    start, end = manifest.get("start"), manifest.get("end")
    known = isinstance(start, (int, float)) and isinstance(end, (int, float)) and 0 < end - start < 1e9
    return (end - start) / steps if known else 1.0  # type: ignore[operator]


def _start(runs: Mapping[str, RunDir], step: int) -> tuple[int, dict[str, Path]]:
    """The last step not after `step` of which both sides have a snapshot; 0 without snapshots."""
    found = {side: _snapshots(run) for side, run in runs.items()}
    common = set.intersection(*(set(steps) for steps in found.values()))
    start = max((number for number in common if number <= step), default=0)
    return (start, {side: steps[start] for side, steps in found.items()}) if start else (0, {})


def _snapshots(run: RunDir) -> dict[int, Path]:
    folder = run.path / SNAPSHOTS
    if folder.is_symlink() or not folder.is_dir():
        return {}
    names = {path.name.removeprefix("step-").removesuffix(".pt"): path for path in folder.glob("step-*.pt")}
    return {int(name): path for name, path in names.items() if name.isdecimal() and not path.is_symlink()}


def explain_pair(
    runs: Mapping[str, RunDir], compared: Result, plan: Plan, *, tries: int, watch: Watch, reproduce: str
) -> Result:
    """The result of the comparison with what executing again showed: operator, place, sizes, and the cause by that.

    Raises TrainingError where a process fails.
    """
    shown, done = None, 0
    while shown is None and done < tries:
        done += 1
        shown, plan = _try(plan, done, watch)
    repeated = None if shown is None or shown.operator is None else _repeat(plan, shown, watch)
    return _merged(runs, compared, shown, repeated, plan, tries=done, reproduce=reproduce)


def _try(plan: Plan, number: int, watch: Watch) -> tuple[Shown | None, Plan]:
    """One try of both sides; the plan for the next one where this one showed that another stretch is needed."""
    found = _execute(plan, number, watch)
    rows = {side: data["rows"] for side, (data, _) in found.items()}
    step, name, last_equal = _first_difference(rows["reference"], rows["candidate"])
    if name is None:
        return None, plan
    if step is None:
        if plan.start == 0:
            return Shown(step=0, last_equal_step=None, name=name, operator=None), plan
        return None, _narrowed(plan, 0, plan.until)  # the snapshots were not equal
    if plan.record[0] <= step <= plan.record[1]:
        files = [run.path / OPERATORS / f"step-{step:09d}.jsonl" for _, run in found.values()]
        operator = first_operator_difference(*files)
        return Shown(step=step, last_equal_step=last_equal, name=name, operator=operator), plan
    return None, _narrowed(plan, plan.start, min(plan.until, step + _RECORDED // 2))


def _narrowed(plan: Plan, start: int, until: int) -> Plan:
    record = (max(start, until - _RECORDED + 1), until)
    snapshots = plan.snapshots if start == plan.start else {}
    return dataclasses.replace(plan, start=start, until=until, record=record, snapshots=snapshots)


def _execute(plan: Plan, number: int, watch: Watch) -> dict[str, tuple[dict[str, Any], RunDir]]:
    """Both sides, side by side where they were started alike; what each found, and where it is."""
    asked = {"stretch": {"until": plan.until, "record": list(plan.record)}}
    requests = {
        side: dataclasses.replace(
            request,
            replay=json.dumps(asked | ({"snapshot": str(plan.snapshots[side])} if plan.snapshots else {})),
        )
        for side, request in plan.requests.items()
    }
    names = {side: f"{side}-{number}" for side in requests}
    alike = len({repr(dataclasses.replace(one, seed=0)) for one in requests.values()}) == 1
    groups = [SIDES] if alike else [(side,) for side in SIDES]
    found = {}
    for group in groups:
        ended = run_trainings(requests[group[0]], {names[side]: requests[side].seed for side in group}, watch=watch)
        require_ended_well(ended)
        for side, training in zip(group, ended.trainings, strict=True):
            found[side] = read_found(training)
    return found


def _first_difference(
    ones: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> tuple[int | None, str | None, int | None]:
    """The step, the digest's name and the last equal step of the first difference; no step where they began unequal.

    What is before a step is what came out of the one before it. Raises UnreadableError where the sides do not have the
    same steps.
    """
    last: int | None = None
    for index, (one, other) in enumerate(zip(ones, others, strict=True)):
        if one["step"] != other["step"]:
            raise UnreadableError("The sides that were executed again did not do the same steps.")
        name = _differing(one["before"], other["before"])
        if name is not None:
            if index == 0:
                return None, name, None
            return ones[index - 1]["step"], name, last
        if index:
            last = ones[index - 1]["step"]
        name = _differing(one.get("during", {}), other.get("during", {}))
        if name is not None:
            return one["step"], name, last
    return None, None, last


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    names = (name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return min(names, key=causal_order, default=None)


def _repeat(plan: Plan, shown: Shown, watch: Watch) -> Repeated | None:
    """The same step repeated in one process: does the operator differ there, too?"""
    request = repeat_request(
        plan.requests["reference"], step=shown.step, tries=_REPEATS, snapshot=plan.snapshots.get("reference")
    )
    ended = run_trainings(request, {"repeat": request.seed}, watch=watch)
    require_ended_well(ended)
    return read_repeated(ended.trainings[0])


def _merged(
    runs: Mapping[str, RunDir],
    compared: Result,
    shown: Shown | None,
    repeated: Repeated | None,
    plan: Plan,
    *,
    tries: int,
    reproduce: str,
) -> Result:
    first = compared.first_divergence
    assert first is not None
    where = f"steps {plan.start} to {plan.until} executed again in two processes"
    if shown is None:
        line = f"{where}, {tries} times: it did not show again, so no operator is named"
        return _with(compared, dataclasses.replace(first, evidence=(line, *first.evidence), reproduce=reproduce))
    lines = [
        f"{where}, it showed in try {tries}: first at step {shown.step}, {stage_of(shown.name)} of "
        f"{subject_of(shown.name)}"
    ]
    if first.step is None or shown.step < first.step or not _traced(compared):
        first = dataclasses.replace(
            first,
            step=shown.step,
            last_equal_step=shown.last_equal_step,
            stage=stage_of(shown.name),
            subject=subject_of(shown.name),
        )
    lines += _operator_evidence(shown, repeated)
    repeats = None if repeated is None or repeated.not_restored else not repeated.differing
    first = _diagnosed(runs, compared, first, shown, repeats)
    return _with(compared, dataclasses.replace(first, evidence=(*lines, *first.evidence), reproduce=reproduce))


def _operator_evidence(shown: Shown, repeated: Repeated | None) -> Iterator[str]:
    if shown.operator is None:
        yield "no operator of that step has equal inputs and different outputs: it came in before the step's operators"
        return
    yield from operator_lines(shown.operator)
    if repeated is None:
        return
    count = len(repeated.tries)
    if repeated.not_restored:
        yield "one process could not put its own state back, so the step was not repeated in it"
    elif repeated.differing:
        yield (
            f"one process: {count} tries of step {repeated.step} from one state gave {repeated.results} results, so it "
            "is what the kernels do"
        )
    else:
        yield (
            f"one process: {count} tries of step {repeated.step} from one state gave the same bits, so it is what the "
            "processes inherit, or too rare to show"
        )


def _traced(compared: Result) -> bool:
    return any(node.name == "trace" for node in compared.root.children)


def _diagnosed(
    runs: Mapping[str, RunDir], compared: Result, first: FirstDivergence, shown: Shown, repeats: bool | None
) -> FirstDivergence:
    nodes: Mapping[str, Difference] = {node.name: node for node in compared.root.children}
    repetition = repetition_of(shown.operator, repeats=repeats)
    sides = side_of(facts_of(runs["reference"])), side_of(facts_of(runs["candidate"]))
    conditions = [nodes[name] for name in CONDITIONS if name in nodes]
    found = diagnose(gather(first, trace=nodes.get("trace"), conditions=conditions, sides=sides, repetition=repetition))
    return dataclasses.replace(first, operator=repetition.operator, cause=found.cause, remedy=found.remedy)


def _with(compared: Result, first: FirstDivergence) -> Result:
    return dataclasses.replace(compared, outcome=Outcome.DIVERGED, first_divergence=first)
