"""The first thing that broke, by what the comparators found, and what explains it."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence

from f3rm_verify.compare_curves import first_divergent_curve
from f3rm_verify.difference import STAGES, Difference, FirstDivergence, Verdict


def find_first_divergence(
    nodes: Mapping[str, Difference],
    conditions: Sequence[Difference],
    claims: Sequence[Mapping[str, str]],
    *,
    rank: int,
    reproduce: str,
) -> FirstDivergence:
    """The earliest thing that is known to differ in the artefacts of a pair that diverged, at least one of `nodes`.

    `conditions` are their setups and seeding logs, and `claims` those of the candidate's seeding log. Without a trace,
    the cause can be steps before what it shows in.
    """
    earliest = _earliest({name: node for name, node in nodes.items() if node.verdict is Verdict.DIFFERENT})
    evidence = [f"{name}: {node.summary}" for name, node in nodes.items() if node.verdict is Verdict.DIFFERENT]
    if earliest.step is not None and "trace" not in nodes:
        evidence.append(
            "No trace was recorded: this is the first step of which something recorded differs; the cause may be "
            "earlier."
        )
    cause, remedy = _cause(conditions, claims)
    return dataclasses.replace(
        earliest, rank=rank, cause=cause, remedy=remedy, evidence=tuple(evidence), reproduce=reproduce
    )


def earliness(first: FirstDivergence | None) -> tuple[float, int]:
    """Larger for what comes earlier, by step and stage; least where no step is known."""
    if first is None or first.step is None:
        return -math.inf, 0
    return -first.step, -STAGES.index(first.stage) if first.stage else -len(STAGES)


#: The stage of a step that a tag shows (patterns as in fnmatch), the most specific first.
_TAG_STAGES = (
    ("Train Loss*", "loss"),
    ("Train Metrics Dict/Gradients*", "grad"),
    ("*learning_rate*", "schedule"),
    ("Eval*", "eval"),
    ("*", "forward"),
)
#: What differs without a step, in causal order, and the stage that it shows.
_UNDATED = {
    "curves": None,
    "checkpoints": "params",
    "metrics": "eval",
    "renders": "eval",
    "setup": None,
    "seeding": None,
}


def _earliest(different: Mapping[str, Difference]) -> FirstDivergence:
    curves = list(_in_curves(different["curves"])) if "curves" in different else []
    checkpoints = list(_in_checkpoints(different["checkpoints"])) if "checkpoints" in different else []
    if not curves:
        # A checkpoint alone dates nothing: its parameters can have diverged at any step since the last equal one.
        checkpoints = [found for found in checkpoints if found.last_equal_step is not None]
    undated = [
        FirstDivergence(stage=stage, subject="/".join(node.name for node in down_to_worst(different[name])))
        for name, stage in _UNDATED.items()
        if name in different
    ]
    return max([*curves, *checkpoints, *undated], key=earliness)


def _in_curves(curves: Difference) -> Iterator[FirstDivergence]:
    """Where scalars differ first, and where each tag of images or texts does."""
    first = first_divergent_curve(curves)
    for path, leaf in curves.leaves():
        step, last_equal = leaf.measures.get("first_step"), leaf.measures.get("last_equal_step")
        if leaf.verdict is not Verdict.DIFFERENT or step is None:
            continue
        tag = path[1]
        if (step, tag) == first or leaf.measures["kind"] != "scalar":
            stage = next(stage for pattern, stage in _TAG_STAGES if fnmatch.fnmatchcase(tag, pattern))
            yield FirstDivergence(step=step, last_equal_step=last_equal, stage=stage, subject=tag)


def _in_checkpoints(checkpoints: Difference) -> Iterator[FirstDivergence]:
    """The first checkpoint that differs."""
    last_equal = None
    for node in checkpoints.children:
        step = int(node.name.removeprefix("step-"))
        if node.verdict is Verdict.DIFFERENT:
            subject = "/".join(part.name for part in (checkpoints, *down_to_worst(node)))
            yield FirstDivergence(step=step, last_equal_step=last_equal, stage="params", subject=subject)
            return
        last_equal = step if node.verdict is Verdict.IDENTICAL else last_equal


def down_to_worst(node: Difference) -> list[Difference]:
    """The node, its first child with the same verdict, and so on."""
    below = next((child for child in node.children if child.verdict is node.verdict), None)
    return [node] if below is None else [node, *down_to_worst(below)]


def _cause(conditions: Sequence[Difference], claims: Sequence[Mapping[str, str]]) -> tuple[str, str]:
    """What the recorded conditions explain, and what to do; "unknown" where they explain nothing."""
    differing = [
        f"{' / '.join(path[1:])}: {leaf.summary}"
        for node in conditions
        for path, leaf in node.leaves()
        if leaf.verdict is Verdict.DIFFERENT
    ]
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        cause = f"the setups differ: {'; '.join(differing[:3])}{more}"
        return cause, "Give both runs the same setup, then compare again."
    modes = {claim.get("observed") for claim in claims if claim.get("claim") == "deterministic algorithms"}
    if modes == {"off"}:
        return (
            "unknown; torch's deterministic algorithms were off, so operations that add floats in the order in which "
            "threads arrive were allowed",
            "Train with --enable-comprehensive-seeding True and --seed-deterministic-algorithms True.",
        )
    return "unknown", "Look at the evidence below, and at the seeding log."
