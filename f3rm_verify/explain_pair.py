"""Executes both sides of a pair that diverged again, around its first divergence, until an operator can be named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f3rm_verify.assets import Assets
from f3rm_verify.cause_evidence import Evidence, free_hash_seed
from f3rm_verify.causes import diagnose
from f3rm_verify.compare_runs import compare_runs, side_of
from f3rm_verify.difference import CONDITIONS, Difference, FirstDivergence, Outcome, Result
from f3rm_verify.errors import UnreadableError
from f3rm_verify.explain import (
    Repeated,
    Watch,
    differing_names,
    first_name,
    named,
    operator_lines,
    read_found,
    read_repeated,
    repeat_request,
    repetition_of,
    require_ended_well,
    stage_of,
    subject_of,
)
from f3rm_verify.explain_plan import RECORDED, REPEATS, Plan, recorded_steps
from f3rm_verify.gather_evidence import gather
from f3rm_verify.policy import DIFF_POLICY
from f3rm_verify.readers.operators import OperatorDifference, first_operator_difference
from f3rm_verify.run_dir import OPERATORS, RunDir
from f3rm_verify.run_facts import facts_of
from f3rm_verify.runner import run_trainings

SIDES = ("reference", "candidate")
#: Of what differs between two processes, at most.
_MOST = 5


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What executing both sides again showed in one try; `step` is None where they were unequal before their first.

    `names` are the digests that differ first, in causal order; `operator` is there where one was found.
    """

    step: int | None
    last_equal_step: int | None
    names: tuple[str, ...]
    operator: OperatorDifference | None = None

    @property
    def name(self) -> str:
        """The first of them, as far as the operator tells."""
        return first_name(self.names, self.operator)


def compared_pair(reference: RunDir, candidate: RunDir, *, reproduce: str, assets: Assets | None = None) -> Result:
    """What the two runs left, compared as `diff` does it."""
    return compare_runs(reference, {"candidate": candidate}, policy=DIFF_POLICY, reproduce=reproduce, assets=assets)


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
    repeated = None if shown is None or shown.step is None else _repeat(plan, shown.step, watch)
    return _merged(runs, compared, shown, repeated, plan, tries=done, reproduce=reproduce)


def _try(plan: Plan, number: int, watch: Watch) -> tuple[Shown | None, Plan]:
    """One try of both sides; the plan for the next one where this one showed that another stretch is needed."""
    found = _execute(plan, number, watch)
    shown = _first_difference(*(data["rows"] for data, _ in found.values()))
    if shown is None:
        return None, plan
    if shown.step is None:
        # Unequal from one snapshot on: what no snapshot holds differs, and can do so from the start.
        return (shown, plan) if plan.start == 0 else (None, _narrowed(plan, 0, plan.until))
    if plan.record[0] <= shown.step <= plan.record[1]:
        files = [run.path / OPERATORS / f"step-{shown.step:09d}.jsonl" for _, run in found.values()]
        return dataclasses.replace(shown, operator=first_operator_difference(*files)), plan
    return None, _narrowed(plan, plan.start, min(plan.until, shown.step + RECORDED // 2))


def _narrowed(plan: Plan, start: int, until: int) -> Plan:
    snapshot = plan.snapshot if start == plan.start else None
    return dataclasses.replace(plan, start=start, until=until, record=recorded_steps(start, until), snapshot=snapshot)


def _execute(plan: Plan, number: int, watch: Watch) -> dict[str, tuple[dict[str, Any], RunDir]]:
    """Both sides, side by side where they were started alike; what each found, and where it is."""
    asked: dict[str, Any] = {"stretch": {"until": plan.until, "record": list(plan.record)}}
    asked |= {"snapshot": str(plan.snapshot)} if plan.snapshot else {}
    requests = {side: dataclasses.replace(request, replay=json.dumps(asked)) for side, request in plan.requests.items()}
    names = {side: f"{side}-{number}" for side in requests}
    # Each has a view of the data of its own where the method is another package's and extracts its features.
    views = {names[side]: request.data for side, request in requests.items()}
    alike = len({repr(dataclasses.replace(one, seed=0, data=Path())) for one in requests.values()}) == 1
    groups = [SIDES] if alike else [(side,) for side in SIDES]
    found = {}
    for group in groups:
        request = dataclasses.replace(requests[group[0]], views=views)
        ended = run_trainings(request, {names[side]: requests[side].seed for side in group}, watch=watch)
        require_ended_well(ended)
        for side, training in zip(group, ended.trainings, strict=True):
            found[side] = read_found(training)
    return found


def _first_difference(ones: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> Shown | None:
    """Where two sides differ first, None where they do not.

    What is before a step is what came out of the one before it. Raises UnreadableError where the sides do not have the
    same steps.
    """
    before: int | None = None  # the step before this one, and the last one that is proven equal
    equal: int | None = None
    for one, other in zip(ones, others, strict=True):
        if one["step"] != other["step"]:
            raise UnreadableError("The sides that were executed again did not do the same steps.")
        for step, sides in ((before, (one["before"], other["before"])), (one["step"], _during(one, other))):
            names = differing_names(sides)
            if names:
                return Shown(step=step, last_equal_step=equal, names=names)
            equal = before
        before = one["step"]
    return None


def _during(*rows: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
    return tuple(row.get("during", {}) for row in rows)


def _repeat(plan: Plan, step: int, watch: Watch) -> Repeated:
    """The same step repeated in one process: does it differ there, too?"""
    request = repeat_request(plan.requests["reference"], step=step, tries=REPEATS, snapshot=plan.snapshot)
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
    at = "before the first step" if shown.step is None else f"first at step {shown.step}"
    lines = [f"{where}, it showed in try {tries}: {at}, {stage_of(shown.name)} of {subject_of(shown.name)}"]
    step = shown.step or 0
    if first.step is None or step < first.step or not _traced(compared):
        first = dataclasses.replace(
            first,
            step=step,
            last_equal_step=shown.last_equal_step,
            stage=stage_of(shown.name),
            subject=subject_of(shown.name),
        )
    evidence = _evidence(runs, compared, first, shown, repeated)
    found = diagnose(evidence)
    lines += [*_operator_lines(shown), *_repeat_lines(repeated), *_inherited_lines(evidence, shown)]
    first = dataclasses.replace(
        first,
        operator=named(shown.operator) if shown.operator else None,
        cause=found.cause,
        remedy=found.remedy,
        evidence=(*lines, *first.evidence),
        reproduce=reproduce,
    )
    return _with(compared, first)


def _operator_lines(shown: Shown) -> Iterator[str]:
    if shown.operator is not None:
        yield from operator_lines(shown.operator)
    elif shown.step is not None:
        yield "no operator of that step has equal inputs and different outputs: it came in between the operators"


def _repeat_lines(repeated: Repeated | None) -> Iterator[str]:
    if repeated is None:
        return
    tries = f"one process: {len(repeated.tries)} tries of step {repeated.step} from one state"
    if repeated.not_restored:
        yield "one process could not put its own state back, so the step was not repeated in it"
    elif repeated.differing:
        yield f"{tries} gave {repeated.results} results, so it is what the kernels do"
    else:
        yield f"{tries} gave the same bits, so it is what the processes inherit, or too rare to show"


def _inherited_lines(evidence: Evidence, shown: Shown) -> Iterator[str]:
    """What is known to differ between the processes, where one process alone shows no difference."""
    if evidence.repeats is not True and shown.step is not None:
        return
    known = [f"{name}: {words}" for name, words in evidence.conditions.items()]
    known += ["the hash seed, which nobody fixed"] if free_hash_seed(evidence) else []
    yield f"what the processes do not share: {'; '.join(known[:_MOST]) or 'nothing that was recorded'}"


def _traced(compared: Result) -> bool:
    return any(node.name == "trace" for node in compared.root.children)


def _evidence(
    runs: Mapping[str, RunDir], compared: Result, first: FirstDivergence, shown: Shown, repeated: Repeated | None
) -> Evidence:
    nodes: Mapping[str, Difference] = {node.name: node for node in compared.root.children}
    repeats = None if repeated is None or repeated.not_restored else not repeated.differing
    repetition = repetition_of(shown.operator, repeats=repeats)
    sides = side_of(facts_of(runs["reference"])), side_of(facts_of(runs["candidate"]))
    conditions = [nodes[name] for name in CONDITIONS if name in nodes]
    return gather(first, trace=nodes.get("trace"), conditions=conditions, sides=sides, repetition=repetition)


def _with(compared: Result, first: FirstDivergence) -> Result:
    return dataclasses.replace(compared, outcome=Outcome.DIVERGED, first_divergence=first)
