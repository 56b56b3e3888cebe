"""Executes steps of a training again until the first operator that differs is known; the launching side.

One process that repeats one step from one state shows what the kernels do. Two processes that execute the same stretch
show what a run inherits besides: environment, workers, hash order, caches.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f3rm_verify import __version__
from f3rm_verify.causes import diagnose
from f3rm_verify.compare_runs import side_of
from f3rm_verify.difference import Difference, FirstDivergence, Outcome, Result, Verdict
from f3rm_verify.errors import TrainingError, UnreadableError
from f3rm_verify.gather_evidence import Repetition, gather
from f3rm_verify.ns_train import TrainingRequest
from f3rm_verify.readers.operators import OperatorDifference, first_operator_difference
from f3rm_verify.run_dir import EXPLAIN, OPERATORS, RunDir
from f3rm_verify.run_facts import facts_of
from f3rm_verify.runner import Training, Trainings, read_left, run_trainings

SCHEMA_VERSION = 1
#: The name of a process that repeats a step.
SIDE = "explain"
#: The step that `--self` repeats: after some, so that optimizers have their averages and proposal networks train.
SELF_STEP = 6
#: Packages whose kernels torch does not dispatch, by what stands in the path of their Python files.
_EXTENSIONS = ("tinycudann", "gsplat", "nerfacc")
#: Where the names of digests belong: their stage, in causal order.
_STAGES = {
    "batch": "batch",
    "losses": "loss",
    "gradients": "grad",
    "parameters": "params",
    "buffers": "params",
    "attributes": "params",
    "optimizers": "params",
    "generators": "rng",
    "schedulers": "schedule",
    "scaler": "schedule",
}

Watch = Callable[[Sequence[Training]], None]
Digests = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """What repeating one step in one process showed. `difference` is None where no operator was seen to differ.

    `recorded` are the digests of the two tries between which it was seen, else empty.
    """

    step: int
    tries: tuple[Digests, ...]
    seconds: tuple[float, ...]
    not_restored: tuple[str, ...]
    left_out: tuple[str, ...]
    recorded_tries: int
    recorded: tuple[Digests, ...]
    difference: OperatorDifference | None
    run: RunDir

    @property
    def differing(self) -> tuple[str, ...]:
        """What did not come out the same in every try, in causal order."""
        return differing_names(self.tries)

    @property
    def first(self) -> str:
        """The name of what differs first, in the two tries that show the operator where there are any."""
        return first_name(differing_names(self.recorded) or self.differing, self.difference)

    @property
    def results(self) -> int:
        """How many different results there were."""
        return len({json.dumps(one, sort_keys=True) for one in self.tries})


def differing_names(sides: Sequence[Digests]) -> tuple[str, ...]:
    """What is not the same on all sides, in causal order."""
    names = {name for one in sides for name in one}
    return tuple(sorted((n for n in names if len({one.get(n) for one in sides}) > 1), key=causal_order))


def first_name(names: Sequence[str], difference: OperatorDifference | None) -> str:
    """Of what differs, in causal order, the first: of several in its stage that of the operator's module, if any."""
    module = difference.operator.module if difference else ""
    stage = [name for name in names if stage_of(name) == stage_of(names[0])]
    return next((name for name in stage if module and subject_of(name).startswith(module)), names[0])


def causal_order(name: str) -> tuple[int, str]:
    """The place of a digest's name in a step."""
    return list(_STAGES).index(name.partition("/")[0]), name


def stage_of(name: str) -> str:
    """The stage that a digest is of."""
    return _STAGES[name.partition("/")[0]]


def subject_of(name: str) -> str:
    """What a digest is of, within its stage."""
    return name.partition("/")[2] or name


def repeat_request(request: TrainingRequest, *, step: int, tries: int, snapshot: Path | None = None) -> TrainingRequest:
    """The request that has one process repeat a step, `tries` times, and as often with every operator recorded."""
    asked: dict[str, Any] = {"repeat": {"at": step, "tries": tries, "recorded": tries}}
    asked |= {"snapshot": str(snapshot)} if snapshot else {}
    return dataclasses.replace(request, replay=json.dumps(asked))


def repeat(request: TrainingRequest, *, side: str = SIDE, watch: Watch) -> Trainings:
    """Has one process do what a `repeat_request` asks for. Raises TrainingError where it never began."""
    return run_trainings(request, {side: request.seed}, watch=watch)


def read_repeated(training: Training) -> Repeated:
    """What a process that repeated a step found. Raises TrainingError where it left nothing that can be read."""
    found, run = read_found(training)
    recorded = found["recorded"] or {"tries": 0, "files": [], "digests": []}
    files = [run.path / OPERATORS / name for name in recorded["files"]]
    return Repeated(
        step=found["step"],
        tries=tuple(one["digests"] for one in found["tries"]),
        seconds=tuple(one["seconds"] for one in found["tries"]),
        not_restored=tuple(found["not_restored"]),
        left_out=tuple(found["left_out"]),
        recorded_tries=recorded["tries"],
        recorded=tuple(recorded["digests"]),
        difference=first_operator_difference(files[0], files[1]) if files else None,
        run=run,
    )


def read_found(training: Training) -> tuple[dict[str, Any], RunDir]:
    """What a process that executed steps again wrote, and where. Raises TrainingError where it is nothing."""
    found = read_left(training, EXPLAIN, version=SCHEMA_VERSION)
    assert training.directory is not None
    return found, RunDir(training.directory)


def self_result(repeated: Repeated, *, reproduce: str) -> Result:
    """Whether the step is deterministic, as a result like that of runs: each try is compared with the first."""
    outcome, reasons = _judge(repeated)
    facts = facts_of(repeated.run)
    side = {**facts.describe(), "steps": 1, "step": repeated.step, "tries": len(repeated.tries)}
    pairs = [_try_node(f"try {number}", repeated.tries[0], one) for number, one in enumerate(repeated.tries[1:], 2)]
    first = _first_of(repeated, reproduce) if outcome is Outcome.DIVERGED else None
    return Result(
        tool={"name": "f3rm-verify", "version": __version__},
        outcome=outcome,
        reasons=reasons,
        reference=side,
        candidate=side,
        pairs=len(pairs),
        steps=1,
        first_divergence=first,
        seeding={},
        root=Difference.group(name="tries", artefact="trace", children=pairs),
    )


def _judge(repeated: Repeated) -> tuple[Outcome, tuple[str, ...]]:
    count, times = len(repeated.tries), f"{max(repeated.seconds):.2g} s each"
    what = f"step {repeated.step} was executed {count} times in one process, from one state ({times})"
    if repeated.not_restored:
        names = ", ".join(repeated.not_restored[:3])
        return Outcome.INCONCLUSIVE, (f"the state before the step could not be put back ({names})",)
    if not repeated.differing:
        held = [f"not put back: {', '.join(repeated.left_out)}"] if repeated.left_out else []
        return Outcome.REPRODUCIBLE, (f"{what}, with the same bits each time", *held)
    told = f"{what}, with {repeated.results} different results"
    difference = repeated.difference
    if repeated.differing[0] == "batch" or (difference is not None and difference.kind == "outside"):
        return Outcome.INCONCLUSIVE, (f"{told}, but {_from_outside(difference)}",)
    return Outcome.DIVERGED, (told,)


def _from_outside(difference: OperatorDifference | None) -> str:
    where = f": {difference.operator.name}, {difference.operator.where}" if difference else ""
    return f"the first thing that differs came into the step from something that no snapshot holds{where}"


def _try_node(name: str, first: Digests, other: Digests) -> Difference:
    """One try against the first, a node for each stage and in it one for each digest."""
    stages: dict[str, list[Difference]] = {}
    for digest in sorted(first.keys() | other.keys(), key=causal_order):
        same = first.get(digest) == other.get(digest)
        there = digest in first and digest in other
        verdict = Verdict.IDENTICAL if same else Verdict.DIFFERENT
        summary = "" if same else "other bits" if there else "in one of the two only"
        leaf = Difference(name=subject_of(digest), artefact="trace", verdict=verdict, summary=summary)
        stages.setdefault(digest.partition("/")[0], []).append(leaf)
    groups = [Difference.group(name=stage, artefact="trace", children=leaves) for stage, leaves in stages.items()]
    return Difference.group(name=name, artefact="trace", children=groups)


def _first_of(repeated: Repeated, reproduce: str) -> FirstDivergence:
    name = repeated.first
    first = FirstDivergence(step=repeated.step, stage=stage_of(name), subject=subject_of(name), reproduce=reproduce)
    side = side_of(facts_of(repeated.run))
    repetition = repetition_of(repeated.difference, repeats=False)
    found = diagnose(gather(first, trace=None, conditions=(), sides=(side, side), repetition=repetition))
    lines = [*_repeat_lines(repeated), *(f"also possible: {other}" for other in found.others)]
    operator = named(repeated.difference) if repeated.difference else None
    return dataclasses.replace(first, operator=operator, cause=found.cause, remedy=found.remedy, evidence=tuple(lines))


def _repeat_lines(repeated: Repeated) -> Iterator[str]:
    count = len(repeated.tries)
    yield f"one process: {count} tries of step {repeated.step} from one state gave {repeated.results} results"
    yield f"of {len(repeated.tries[0])} digests of a try, {len(repeated.differing)} are not always the same"
    if repeated.difference is not None:
        yield f"operators recorded: it showed again in try {repeated.recorded_tries}"
        yield from operator_lines(repeated.difference)
    else:
        yield f"operators recorded: it did not show again in {repeated.recorded_tries} tries, so none is named"


def repetition_of(difference: OperatorDifference | None, *, repeats: bool | None) -> Repetition:
    """What the rules for causes take of an operator that differs: one that got something else is not the cause."""
    if difference is None or difference.kind not in ("kernel", "memory"):
        return Repetition(repeats=repeats)
    return Repetition(operator=named(difference), module=difference.operator.module or None, repeats=repeats)


def named(difference: OperatorDifference) -> str:
    """What to call the operator: for memory that no operator of torch wrote, the one that made the memory."""
    source = difference.allocated
    if source is None:
        return difference.operator.name
    extension = next((name for name in _EXTENSIONS if name in source.source), None)
    return source.name if extension is None else f"a kernel of {extension} ({source.source})"


_KINDS: Mapping[str, str] = {
    "kernel": "its inputs agree, its outputs differ",
    "draw": "it draws from a generator, whose state differs",
    "value": "a number that Python gave it differs",
    "memory": "it reads memory that torch made and no operator of torch wrote",
    "unseen": "it reads a tensor that something past torch's operators changed",
    "order": "it reads the result of another operator",
    "outside": "it reads a tensor that no operator of this step made",
    "sequence": "from here on, other operators are called",
}


def operator_lines(difference: OperatorDifference) -> Iterator[str]:
    """The operator in words: what it is, how it differs, where it is called, the sizes."""
    operator = difference.operator
    yield f"operator {operator.number} of the step, {operator.name}: {_KINDS[difference.kind]}"
    yield f"in the {operator.where}"
    inputs = ", ".join(map(str, operator.inputs)) or "no tensors"
    outputs = ", ".join(str(operator.outputs[i]) for i in difference.different_outputs if i < len(operator.outputs))
    yield f"inputs {inputs}; what differs: {outputs or 'which operators are called'}"
    if difference.allocated is not None:
        yield f"the memory was made by {difference.allocated.name}, in the {difference.allocated.where}"


def require_ended_well(ended: Trainings) -> None:
    """Raises TrainingError with the reason where a process failed, KeyboardInterrupt where somebody stopped it."""
    if ended.interruption is not None:
        raise KeyboardInterrupt
    failed = ended.failed
    if failed is not None:
        raise TrainingError(f"{failed.failure} Its log is {failed.log}.")


def explain_self(request: TrainingRequest, *, step: int, tries: int, watch: Watch, reproduce: str) -> Result:
    """Repeats one step of a training in one process. Raises TrainingError where that fails."""
    ended = repeat(repeat_request(request, step=step, tries=tries), watch=watch)
    require_ended_well(ended)
    try:
        return self_result(read_repeated(ended.trainings[0]), reproduce=reproduce)
    except UnreadableError as error:
        raise TrainingError(str(error)) from error
