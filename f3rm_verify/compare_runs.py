"""The comparators in causal order, and the verdict over all of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from f3rm_verify import __version__
from f3rm_verify.assets import Assets
from f3rm_verify.compare_baseline import DIGESTED, compare_conditions, compare_digests
from f3rm_verify.compare_checkpoints import compare_checkpoints
from f3rm_verify.compare_curves import compare_curves
from f3rm_verify.compare_metrics import compare_metrics
from f3rm_verify.compare_renders import compare_renders
from f3rm_verify.compare_setup import compare_seeding, compare_setup
from f3rm_verify.compare_trace import compare_trace
from f3rm_verify.difference import ARTEFACTS, CONDITIONS, Difference, FirstDivergence, Outcome, Result, Verdict
from f3rm_verify.errors import UnreadableError, UsageError
from f3rm_verify.explain_plan import explain_command
from f3rm_verify.first_divergence import down_to_worst, earliness, find_first_divergence
from f3rm_verify.gather_evidence import Side
from f3rm_verify.policy import LIMITED, TRACE_WITH_LIMITS, Policy, informational, unused_patterns, without_ignored
from f3rm_verify.recorded_run import DigestedRun, RecordedRun
from f3rm_verify.run_dir import RunDir
from f3rm_verify.run_facts import RunFacts, facts_of, is_one_run

#: What a plain `ns-train` run leaves, and so what every comparison requires.
_ALWAYS_REQUIRED = ("curves", "checkpoints")
#: What a rank above 0 leaves; the rest is made by rank 0 for all.
_OF_EVERY_RANK = ("setup", "seeding", "trace", "curves")
#: More ranks than anybody trains with; a manifest can say anything.
_MAX_RANKS = 4096
_GOOD = (Verdict.IDENTICAL, Verdict.WITHIN_TOLERANCE)
#: Best first: difference wins over everything that could not be compared.
_OUTCOMES = (Outcome.REPRODUCIBLE, Outcome.WITHIN_TOLERANCE, Outcome.INCONCLUSIVE, Outcome.DIVERGED)

Compare = Callable[[RunDir, RunDir, Policy, Assets], Difference]
_COMPARATORS: Mapping[str, Compare] = {
    "setup": lambda reference, candidate, *_: compare_setup(reference, candidate),
    "seeding": lambda reference, candidate, *_: compare_seeding(reference, candidate),
    "trace": lambda reference, candidate, *_: compare_trace(reference, candidate),
    "curves": lambda reference, candidate, policy, assets: compare_curves(
        reference, candidate, policy=policy, assets=assets
    ),
    "metrics": lambda reference, candidate, policy, _: compare_metrics(reference, candidate, policy=policy),
    "checkpoints": lambda reference, candidate, policy, _: compare_checkpoints(reference, candidate, policy=policy),
    "renders": lambda reference, candidate, policy, assets: compare_renders(
        reference, candidate, policy=policy, assets=assets
    ),
}


@dataclass(frozen=True, kw_only=True)
class _Pair:
    name: str
    candidate: RunFacts
    nodes: Mapping[str, Difference]
    not_recorded: tuple[str, ...]
    outcome: Outcome
    reasons: tuple[str, ...]
    first_divergence: FirstDivergence | None


def compare_runs(
    reference: RunDir,
    candidates: Mapping[str, RunDir],
    *,
    policy: Policy,
    only: Sequence[str] = (),
    control: RunDir | None = None,
    reproduce: str = "",
    trouble: Sequence[str] = (),
    assets: Assets | None = None,
) -> Result:
    """Compares every candidate (by name) with the reference; the worst pair decides.

    `only` names the artefacts to compare, instead of what `policy` requires. `control` was trained with another seed
    and must differ. `trouble` are sentences of the launcher about trainings that went wrong; they make the outcome
    inconclusive at best. Curves and pictures for the reports are kept in `assets`. Raises UsageError where there is
    nothing to compare, or where nothing could fail.
    """
    unknown = [name for name in only if name not in ARTEFACTS]
    if unknown or not candidates:
        what = f"{', '.join(unknown)} cannot be compared; there are" if unknown else "There is no candidate to compare;"
        raise UsageError(f"{what} {', '.join(ARTEFACTS)}.")
    policy.check()
    facts = facts_of(reference)
    assets = assets or Assets()
    pairs = [
        _compare_pair(name, facts, facts_of(run), policy, only, reproduce, assets) for name, run in candidates.items()
    ]
    control_report = None if control is None else _control(facts, facts_of(control), policy)
    outcome, reasons = _overall(pairs, control_report, trouble)
    worst = max(pairs, key=lambda pair: (_OUTCOMES.index(pair.outcome), *earliness(pair.first_divergence)))
    return Result(
        tool={"name": "f3rm-verify", "version": __version__},
        outcome=outcome,
        reasons=reasons,
        reference=facts.describe(),
        candidate=worst.candidate.describe(),
        candidates=tuple(pair.candidate.describe() for pair in pairs),
        pairs=len(pairs),
        steps=facts.steps,
        not_recorded=tuple(name for name in ARTEFACTS if all(name in pair.not_recorded for pair in pairs)),
        policy={
            **policy.to_dict(),
            "only": list(only),
            "unused": unused_patterns(policy, (node for pair in pairs for node in pair.nodes.values())),
        },
        first_divergence=worst.first_divergence,
        control=control_report,
        seeding={"reference": _seeding_entries(reference), "candidate": _seeding_entries(worst.candidate.run)},
        root=_root(pairs),
    )


def _root(pairs: Sequence[_Pair]) -> Difference:
    if len(pairs) == 1:
        return Difference.group(name="runs", artefact="runs", children=pairs[0].nodes.values())
    groups = [Difference.group(name=pair.name, artefact="runs", children=pair.nodes.values()) for pair in pairs]
    return Difference.group(name="runs", artefact="runs", children=groups)


def _compare_pair(
    name: str,
    reference: RunFacts,
    candidate: RunFacts,
    policy: Policy,
    only: Sequence[str],
    reproduce: str,
    assets: Assets,
) -> _Pair:
    """All ranks of a pair; the first rank's nodes, and one node for each rank above it."""
    own = _compare_rank(name, reference, candidate, policy, only, reproduce, assets)
    ranks = list(_compare_other_ranks(reference, candidate, policy, only, reproduce, assets))
    groups = {
        pair.name: Difference.group(name=pair.name, artefact="runs", children=pair.nodes.values()) for pair in ranks
    }
    reasons = (f"{pair.name}: {reason}" for pair in ranks for reason in pair.reasons)
    firsts = (pair.first_divergence for pair in (own, *ranks))
    return dataclasses.replace(
        own,
        nodes={**own.nodes, **groups},
        outcome=max((pair.outcome for pair in (own, *ranks)), key=_OUTCOMES.index),
        reasons=(*own.reasons, *reasons),
        # Of ranks that diverge at one step and stage, the lowest.
        first_divergence=max(filter(None, firsts), key=earliness, default=None),
    )


def _compare_other_ranks(
    reference: RunFacts, candidate: RunFacts, policy: Policy, only: Sequence[str], reproduce: str, assets: Assets
) -> Iterator[_Pair]:
    """The ranks above the first that either side has, or says that it had."""
    if only and not set(only) & set(_OF_EVERY_RANK):
        return
    try:
        found = reference.run.ranks, candidate.run.ranks
    except UnreadableError as error:
        yield _nothing_compared("ranks", candidate, Verdict.UNREADABLE, str(error))
        return
    count = max(reference.ranks, candidate.ranks, *(rank + 1 for side in found for rank in side))
    required = None if policy.required is None else tuple(n for n in policy.required if n in _OF_EVERY_RANK)
    for rank in range(1, min(count, _MAX_RANKS)):
        missing = [side for side, ranks in zip(("reference", "candidate"), found, strict=True) if rank not in ranks]
        if missing:
            summary = f"it left nothing in the {' and nothing in the '.join(missing)}"
            yield _nothing_compared(f"rank {rank}", candidate, Verdict.MISSING, summary)
            continue
        first, second = (facts_of(ranks[rank]) for ranks in found)
        narrowed = dataclasses.replace(policy, required=required)
        wanted = [name for name in only if name in _OF_EVERY_RANK]
        yield _compare_rank(f"rank {rank}", first, second, narrowed, wanted, reproduce, assets, rank=rank)


def _nothing_compared(name: str, candidate: RunFacts, verdict: Verdict, summary: str) -> _Pair:
    node = Difference(name="evidence", artefact="runs", verdict=verdict, summary=summary)
    return _Pair(
        name=name,
        candidate=candidate,
        nodes={node.name: node},
        not_recorded=(),
        outcome=Outcome.INCONCLUSIVE,
        reasons=(summary,),
        first_divergence=None,
    )


def _compare_rank(
    name: str,
    reference: RunFacts,
    candidate: RunFacts,
    policy: Policy,
    only: Sequence[str],
    reproduce: str,
    assets: Assets,
    *,
    rank: int = 0,
) -> _Pair:
    recorded = reference.run.recorded | candidate.run.recorded
    always = [artefact for artefact in _ALWAYS_REQUIRED if not rank or artefact in _OF_EVERY_RANK]
    asked = set(only or policy.required or always)
    wanted = asked if only else asked | recorded
    found = {
        artefact: _compare(artefact, reference.run, candidate.run, policy, recorded, assets)
        for artefact in ARTEFACTS
        if artefact in wanted or (artefact in CONDITIONS and artefact in recorded)
    }
    nodes = {artefact: node for artefact, node in found.items() if artefact in wanted}
    required = [artefact for artefact in nodes if artefact in asked or (policy.required is None and not only)]
    shown = _with_trace_as_information(nodes) if policy.limits and set(required) & set(LIMITED) else nodes
    outcome, reasons = _judge(reference, candidate, shown, required, rank=rank)
    first = None
    if outcome is Outcome.DIVERGED:
        conditions = [node for artefact, node in found.items() if artefact in CONDITIONS]
        sides = side_of(reference), side_of(candidate)
        first = find_first_divergence(nodes, conditions, sides, rank=rank or reference.rank)
        command = explain_command(reference, candidate, first) or reproduce
        first = dataclasses.replace(first, reproduce=command)
    return _Pair(
        name=name,
        candidate=candidate,
        nodes=shown,
        not_recorded=tuple(artefact for artefact in only or ARTEFACTS if artefact not in recorded),
        outcome=outcome,
        reasons=reasons,
        first_divergence=first,
    )


def _with_trace_as_information(nodes: Mapping[str, Difference]) -> dict[str, Difference]:
    """Limits speak of values, and a trace is of digests: its differences are shown, and no difference by themselves."""
    return {name: informational(node, TRACE_WITH_LIMITS) if name == "trace" else node for name, node in nodes.items()}


def _compare(
    artefact: str, reference: RunDir, candidate: RunDir, policy: Policy, recorded: frozenset[str], assets: Assets
) -> Difference:
    if artefact not in recorded:
        summary = "neither side recorded it"
    elif artefact not in _COMPARATORS:
        summary = "this version of f3rm-verify cannot compare it"
    else:
        try:
            if isinstance(reference, RecordedRun):
                node = _compare_with_recorded(artefact, reference, candidate, policy, assets)
            else:
                node = _COMPARATORS[artefact](reference, candidate, policy, assets)
            return without_ignored(node, policy.ignored.get(artefact, {}))
        except (UnreadableError, OSError) as error:  # a file that goes away or changes while it is read
            summary = str(error)
    return Difference(name=artefact, artefact=artefact, verdict=Verdict.UNREADABLE, summary=summary)


def _compare_with_recorded(
    artefact: str, reference: RecordedRun, candidate: RunDir, policy: Policy, assets: Assets
) -> Difference:
    """The same with a baseline, in which some artefacts are digests."""
    if artefact == "setup":
        return compare_conditions(reference, candidate)
    if artefact in DIGESTED:
        return compare_digests(artefact, reference, candidate, policy=policy)
    return _COMPARATORS[artefact](reference, DigestedRun(candidate.path, policy, reference), policy, assets)


def _judge(
    reference: RunFacts, candidate: RunFacts, nodes: Mapping[str, Difference], required: Sequence[str], *, rank: int
) -> tuple[Outcome, tuple[str, ...]]:
    """The outcome of one pair, and why it is not better.

    Conditions that differ explain what differs besides; on their own they only mean that nothing can be said. They are
    a difference where nothing else was asked for.
    """
    only_conditions = set(required) <= set(CONDITIONS)
    doubts = _doubts(reference, candidate, rank)
    different = [name for name in required if nodes[name].verdict is Verdict.DIFFERENT]
    judged = [name for name in different if only_conditions or name not in CONDITIONS]
    if judged:
        return Outcome.DIVERGED, (f"there are differences in {', '.join(judged)}", *doubts)
    reasons = doubts + [
        f"{name}: {nodes[name].verdict.value} ({_worst_leaf(nodes[name])})"
        for name in required
        if nodes[name].verdict not in (*_GOOD, Verdict.DIFFERENT)
        if (name, nodes[name].verdict) != ("trace", Verdict.IGNORED)  # information, where limits decide
    ]
    conditions = [node for name, node in nodes.items() if name in CONDITIONS and node.verdict is Verdict.DIFFERENT]
    if conditions:
        what = "; ".join(_worst_leaf(node) for node in conditions)
        within = any(nodes[name].verdict is Verdict.WITHIN_TOLERANCE for name in required)
        beyond = " beyond its limits" if within else ""
        reasons.append(f"the runs were made under different conditions, and yet nothing else differs{beyond} ({what})")
    if reasons:
        return Outcome.INCONCLUSIVE, tuple(reasons)
    exact = all(nodes[name].verdict is Verdict.IDENTICAL for name in required)
    return (Outcome.REPRODUCIBLE if exact else Outcome.WITHIN_TOLERANCE), ()


def _doubts(reference: RunFacts, candidate: RunFacts, rank: int) -> list[str]:
    """Why even equal evidence would say nothing."""
    one_run = is_one_run(reference, candidate)
    reasons = [] if one_run is None else [one_run]
    for side, facts in (("reference", reference), ("candidate", candidate)):
        reasons += [f"the {side} {why}" for why in (facts.incomplete, facts.untrained) if why is not None]
        # Evidence of one rank in the place of another would be compared with its like, and always be equal.
        reasons += [f"the {side} is evidence of rank {facts.rank}"] if rank and facts.rank != rank else []
    if reference.steps != candidate.steps and reference.incomplete is None and candidate.incomplete is None:
        reasons.append(f"the reference did {reference.steps} steps, the candidate {candidate.steps}")
    return reasons


def _worst_leaf(node: Difference) -> str:
    """What is wrong with `node`, by its first leaf that is as bad as itself."""
    *above, leaf = down_to_worst(node)
    names = " / ".join(part.name for part in (*above[1:], leaf))
    return f"{names}: {leaf.summary}" if above else leaf.summary


def _overall(
    pairs: Sequence[_Pair], control: Mapping[str, object] | None, trouble: Sequence[str]
) -> tuple[Outcome, tuple[str, ...]]:
    several = len(pairs) > 1
    outcome = max((pair.outcome for pair in pairs), key=_OUTCOMES.index)
    reasons = [f"{pair.name}: {reason}" if several else reason for pair in pairs for reason in pair.reasons]
    doubts = [*trouble, *_one_run_twice(pairs)]
    if control is not None and not control["differs"]:
        doubts.append(f"the control run {control['summary']}")
    if doubts and outcome is not Outcome.DIVERGED:
        outcome = Outcome.INCONCLUSIVE
    return outcome, (*doubts, *reasons)


def _one_run_twice(pairs: Sequence[_Pair]) -> Iterator[str]:
    for first, second in itertools.combinations(pairs, 2):
        why = is_one_run(first.candidate, second.candidate)
        if why is not None:
            yield f"{first.name} and {second.name} are one run: {why}"


def _control(reference: RunFacts, control: RunFacts, policy: Policy) -> dict[str, object]:
    """Whether a run with another seed differs, as it must, in something that the training put out."""
    pair = _compare_pair("control", reference, control, dataclasses.replace(policy, required=None), (), "", Assets())
    differing = [
        name for name, node in pair.nodes.items() if name not in CONDITIONS and node.verdict is Verdict.DIFFERENT
    ]
    if control.seed is None or control.seed == reference.seed:
        differs, summary = False, f"shows nothing: its seed is {control.seed}, as that of the reference"
    elif differing:
        differs, summary = True, f"differs in {', '.join(differing)}"
    else:
        differs = False
        summary = (
            f"with seed {control.seed} does not differ: this training ignores its seed, or this comparison could not "
            "see a difference"
        )
    return {
        "seed": control.seed,
        "directory": str(control.run.path),
        "differs": differs,
        "verdict": "different" if differs else "inconclusive" if differing else pair.outcome.value,
        "summary": summary,
    }


def side_of(facts: RunFacts) -> Side:
    """What a run recorded about itself; what is unreadable the comparison says."""
    try:
        config = facts.run.config or {}
    except UnreadableError:
        config = {}
    return Side(manifest=facts.manifest, config=config, claims=_seeding_entries(facts.run))


def _seeding_entries(run: RunDir) -> list[dict[str, str]]:
    """The claims of the seeding log, and those that fail on another rank."""
    return [*_claims(run), *_failing_on_other_ranks(run)]


def _claims(run: RunDir) -> list[dict[str, str]]:
    """The claims of one rank's seeding log, as far as they are claims."""
    try:
        entries = (run.seeding or {}).get("entries")
    except UnreadableError:
        return []
    claims = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return [{key: value for key, value in claim.items() if isinstance(value, str)} for claim in claims]


def _failing_on_other_ranks(run: RunDir) -> Iterator[dict[str, str]]:
    try:
        ranks = run.ranks
    except UnreadableError:
        return  # the comparison says so
    for rank, directory in ranks.items():
        for entry in _claims(directory):
            if entry.get("verdict") == "fails":
                yield {**entry, "claim": f"rank {rank}: {entry.get('claim')}"}
