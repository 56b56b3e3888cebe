"""The comparators in causal order, and the verdict over all of them."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from f3rm_verify import __version__
from f3rm_verify.compare_checkpoints import compare_checkpoints
from f3rm_verify.compare_curves import compare_curves, first_divergent_curve
from f3rm_verify.compare_metrics import compare_metrics
from f3rm_verify.compare_renders import compare_renders
from f3rm_verify.compare_setup import compare_seeding, compare_setup
from f3rm_verify.difference import ARTEFACTS, CONDITIONS, Difference, FirstDivergence, Outcome, Result, Verdict
from f3rm_verify.errors import UnreadableError, UsageError
from f3rm_verify.policy import Policy
from f3rm_verify.run_dir import RunDir
from f3rm_verify.run_facts import RunFacts, facts_of, is_one_run

#: What a plain `ns-train` run leaves, and so what every comparison requires.
_ALWAYS_REQUIRED = ("curves", "checkpoints")


@dataclass(frozen=True, kw_only=True)
class _Pair:
    name: str
    candidate: RunFacts
    nodes: Mapping[str, Difference]
    not_recorded: tuple[str, ...]
    outcome: Outcome
    reasons: tuple[str, ...]


def compare_runs(
    reference: RunDir,
    candidates: Mapping[str, RunDir],
    *,
    policy: Policy,
    only: Sequence[str] = (),
    control: RunDir | None = None,
    reproduce: str = "",
    trouble: Sequence[str] = (),
) -> Result:
    """Compares every candidate (by name) with the reference; the worst pair decides.

    `control` was trained with another seed and must differ. `trouble` are sentences of the launcher about trainings
    that went wrong; they make the outcome inconclusive at best. Raises UsageError for one directory on two sides.
    """
    for run in candidates.values():
        if run.path.resolve() == reference.path.resolve():
            raise UsageError(f"{run.path} is given as both sides; a run says nothing about another run.")
    facts = facts_of(reference)
    pairs = [_compare_pair(name, facts, facts_of(run), policy, only) for name, run in candidates.items()]
    control_report = None if control is None else _control(facts, facts_of(control), policy)
    outcome, reasons = _overall(pairs, control_report, trouble)
    worst = max(pairs, key=lambda pair: _badness(pair.outcome))
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
        policy={**policy.to_dict(), "only": list(only)},
        first_divergence=_first_divergence(facts, worst, reproduce) if outcome is Outcome.DIVERGED else None,
        control=control_report,
        seeding={"reference": _seeding_entries(reference), "candidate": _seeding_entries(worst.candidate.run)},
        root=_root(pairs),
    )


def _badness(outcome: Outcome) -> int:
    return [Outcome.REPRODUCIBLE, Outcome.WITHIN_TOLERANCE, Outcome.INCONCLUSIVE, Outcome.DIVERGED].index(outcome)


def _root(pairs: Sequence[_Pair]) -> Difference:
    if len(pairs) == 1:
        return Difference.group(name="runs", artefact="runs", children=pairs[0].nodes.values())
    groups = [Difference.group(name=pair.name, artefact="runs", children=pair.nodes.values()) for pair in pairs]
    return Difference.group(name="runs", artefact="runs", children=groups)


def _compare_pair(
    name: str, reference: RunFacts, candidate: RunFacts, policy: Policy, only: Sequence[str]
) -> _Pair:
    first, second = reference.run, candidate.run
    comparators: dict[str, Callable[[], Difference]] = {
        "setup": lambda: compare_setup(first, second),
        "seeding": lambda: compare_seeding(first, second),
        "curves": lambda: compare_curves(first, second, policy=policy),
        "metrics": lambda: compare_metrics(first, second, policy=policy),
        "checkpoints": lambda: compare_checkpoints(first, second),
        "renders": lambda: compare_renders(first, second),
    }
    nodes: dict[str, Difference] = {}
    not_recorded = []
    for artefact in ARTEFACTS:
        node = comparators[artefact]() if artefact in comparators else None
        if node is None or (not node.children and node.verdict is Verdict.UNREADABLE and not _is_broken(node)):
            not_recorded.append(artefact)
        if node is not None and (artefact in only if only else artefact not in not_recorded):
            nodes[artefact] = node
    required = tuple(only) or policy.required or (*_ALWAYS_REQUIRED, *nodes)
    for artefact in required:
        if artefact not in nodes:
            summary = "neither side recorded it"
            nodes[artefact] = Difference(
                name=artefact, artefact=artefact, verdict=Verdict.UNREADABLE, summary=summary
            )
    nodes = {artefact: nodes[artefact] for artefact in ARTEFACTS if artefact in nodes}
    outcome, reasons = _judge(reference, candidate, nodes, required, only)
    return _Pair(
        name=name,
        candidate=candidate,
        nodes=nodes,
        not_recorded=tuple(not_recorded),
        outcome=outcome,
        reasons=reasons,
    )


def _is_broken(node: Difference) -> bool:
    """Whether a node without children names a broken file, rather than that there was nothing to compare."""
    return node.summary != "nothing was compared"


def _judge(
    reference: RunFacts,
    candidate: RunFacts,
    nodes: Mapping[str, Difference],
    required: Sequence[str],
    only: Sequence[str],
) -> tuple[Outcome, tuple[str, ...]]:
    """The outcome of one pair. Difference wins over everything that could not be compared."""
    asked_conditions = bool(only) and set(only) <= set(CONDITIONS)
    outcomes = [name for name in nodes if asked_conditions or name not in CONDITIONS]
    different = [name for name in outcomes if name in required and nodes[name].verdict is Verdict.DIFFERENT]
    if different:
        return Outcome.DIVERGED, (f"{', '.join(different)} differ",)
    reasons = _doubts(reference, candidate, asked_conditions)
    for name in required:
        if nodes[name].verdict in (Verdict.MISSING, Verdict.UNREADABLE):
            reasons.append(f"{name}: {nodes[name].verdict.value} ({_worst_leaf(nodes[name])})")
    conditions = [name for name in CONDITIONS if name in nodes and nodes[name].verdict is Verdict.DIFFERENT]
    if conditions and not asked_conditions:
        what = "; ".join(_worst_leaf(nodes[name]) for name in conditions)
        reasons.append(f"the runs were made under different conditions, and yet nothing else differs ({what})")
    if reasons:
        return Outcome.INCONCLUSIVE, tuple(dict.fromkeys(reasons))
    if any(nodes[name].verdict is Verdict.WITHIN_TOLERANCE for name in required):
        return Outcome.WITHIN_TOLERANCE, ()
    return Outcome.REPRODUCIBLE, ()


def _doubts(reference: RunFacts, candidate: RunFacts, asked_conditions: bool) -> list[str]:
    """Why even equal evidence would say nothing."""
    reasons = []
    one_run = is_one_run(reference, candidate)
    if one_run is not None:
        reasons.append(one_run)
    if asked_conditions:
        return reasons
    for side, facts in (("reference", reference), ("candidate", candidate)):
        reasons += [f"the {side} {why}" for why in (facts.incomplete, facts.untrained) if why is not None]
    if reference.steps != candidate.steps and not reasons:
        reasons.append(f"the reference did {reference.steps} steps, the candidate {candidate.steps}")
    return reasons


def _worst_leaf(node: Difference) -> str:
    path, leaf = max(node.leaves(), key=lambda item: item[1].verdict.badness)
    name = " / ".join(path[1:])
    return f"{name}: {leaf.summary}" if name else leaf.summary


def _overall(
    pairs: Sequence[_Pair], control: Mapping[str, object] | None, trouble: Sequence[str]
) -> tuple[Outcome, tuple[str, ...]]:
    outcome = max((pair.outcome for pair in pairs), key=_badness)
    several = len(pairs) > 1
    reasons = [f"{pair.name}: {reason}" if several else reason for pair in pairs for reason in pair.reasons]
    reasons = [*trouble, *reasons]
    if control is not None and not control["differs"]:
        reasons.append(
            f"the control run with seed {control['seed']} does not differ: this training ignores its seed, or this "
            "comparison could not see a difference"
        )
    if outcome is not Outcome.DIVERGED and (trouble or (control is not None and not control["differs"])):
        outcome = Outcome.INCONCLUSIVE
    return outcome, tuple(reasons)


def _control(reference: RunFacts, control: RunFacts, policy: Policy) -> dict[str, object]:
    """Whether a run with another seed differs, as it must, in something that the training put out."""
    pair = _compare_pair("control", reference, control, dataclasses.replace(policy, required=None), ())
    differing = [
        name for name, node in pair.nodes.items() if name not in CONDITIONS and node.verdict is Verdict.DIFFERENT
    ]
    return {
        "seed": control.seed,
        "directory": str(control.run.path),
        "differs": bool(differing),
        "verdict": "different" if differing else "identical",
        "summary": f"differs in {', '.join(differing)}, as it must" if differing else "does not differ",
    }


def _seeding_entries(run: RunDir) -> list[object]:
    try:
        return list((run.seeding or {}).get("entries", []))
    except (UnreadableError, TypeError):
        return []


#: The stage of a step that a tag shows (patterns as in fnmatch), the most specific first.
_STAGES = (
    ("Train Loss*", "loss"),
    ("Train Metrics Dict/Gradients*", "grad"),
    ("*learning_rate*", "schedule"),
    ("Eval*", "eval"),
    ("*", "forward"),
)


def _first_divergence(reference: RunFacts, pair: _Pair, reproduce: str) -> FirstDivergence:
    """The earliest thing that is known to differ. Without a trace, the cause can be steps before what it shows in."""
    step, stage, subject = _earliest(pair.nodes)
    evidence = [
        f"{name}: {node.summary}" for name, node in pair.nodes.items() if node.verdict is Verdict.DIFFERENT
    ]
    if step is not None:
        evidence.append(
            "No trace was recorded: this is the first step whose logged values differ; the cause may be earlier."
        )
    cause, remedy = _cause(pair)
    return FirstDivergence(
        rank=reference.rank,
        step=step,
        last_equal_step=step - 1 if step else None,
        stage=stage,
        subject=subject,
        cause=cause,
        remedy=remedy,
        evidence=tuple(evidence),
        reproduce=reproduce,
    )


def _earliest(nodes: Mapping[str, Difference]) -> tuple[int | None, str | None, str]:
    curve = first_divergent_curve(nodes["curves"]) if "curves" in nodes else None
    if curve is not None:
        step, tag = curve
        return step, next(stage for pattern, stage in _STAGES if fnmatch.fnmatchcase(tag, pattern)), tag
    for artefact in ("checkpoints", "metrics", "renders", *CONDITIONS):
        if artefact in nodes and nodes[artefact].verdict is Verdict.DIFFERENT:
            path = next(path for path, leaf in nodes[artefact].leaves() if leaf.verdict is Verdict.DIFFERENT)
            return None, {"checkpoints": "params", "metrics": "eval", "renders": "eval"}.get(artefact), "/".join(path)
    return None, None, "curves"


def _cause(pair: _Pair) -> tuple[str, str]:
    """What the recorded conditions explain; "unknown" where they explain nothing."""
    differing = [name for name in CONDITIONS if name in pair.nodes and pair.nodes[name].verdict is Verdict.DIFFERENT]
    if differing:
        leaves = [
            f"{' / '.join(path[1:])}: {leaf.summary}"
            for name in differing
            for path, leaf in pair.nodes[name].leaves()
            if leaf.verdict is Verdict.DIFFERENT
        ]
        more = f"; and {len(leaves) - 3} more" if len(leaves) > 3 else ""
        return f"the setups differ: {'; '.join(leaves[:3])}{more}", "Give both runs the same setup, then compare again."
    modes = {
        entry["observed"]
        for entry in _seeding_entries(pair.candidate.run)
        if isinstance(entry, dict) and entry.get("claim") == "deterministic algorithms"
    }
    if modes == {"off"}:
        return (
            "unknown; torch's deterministic algorithms were off, so operations that add floats in the order in which "
            "threads arrive were allowed",
            "Train with --enable-comprehensive-seeding True and --seed-deterministic-algorithms True.",
        )
    return "unknown", "Look at the evidence below, and at the seeding log."
