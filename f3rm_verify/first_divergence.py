"""The first thing that broke, by what the comparators found, and what explains it."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence

from f3rm_verify.causes import diagnose
from f3rm_verify.compare_curves import first_divergent_curve
from f3rm_verify.difference import STAGES, Difference, FirstDivergence, Verdict
from f3rm_verify.gather_evidence import Side, gather


def find_first_divergence(
    nodes: Mapping[str, Difference],
    conditions: Sequence[Difference],
    sides: tuple[Side, Side],
    *,
    rank: int,
) -> FirstDivergence:
    """The earliest thing that is known to differ in the artefacts of a pair that diverged, at least one of `nodes`.

    `conditions` are the nodes of their setups and seeding logs, and `sides` what each recorded about itself. Without a
    trace, the cause can be steps before what it shows in.
    """
    earliest = _earliest({name: node for name, node in nodes.items() if node.verdict is Verdict.DIFFERENT})
    evidence = [f"{name}: {node.summary}" for name, node in nodes.items() if node.verdict is Verdict.DIFFERENT]
    if earliest.step is not None and "trace" not in nodes:
        evidence.append(
            "No trace was recorded: this is the first step of which something recorded differs; the cause may be "
            "earlier."
        )
    trace = nodes.get("trace")
    found = diagnose(
        gather(earliest, trace=trace if _is_of(trace, earliest) else None, conditions=conditions, sides=sides)
    )
    evidence += [f"also possible: {other}" for other in found.others]
    return dataclasses.replace(earliest, rank=rank, cause=found.cause, remedy=found.remedy, evidence=tuple(evidence))


def _is_of(trace: Difference | None, earliest: FirstDivergence) -> bool:
    """Whether the place was found in the trace, which sees every stage; elsewhere the stage is only where it shows."""
    measures = {} if trace is None else trace.measures
    return measures.get("first_step") == earliest.step and measures.get("subject") == earliest.subject


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
    "trace": None,
    "curves": None,
    "checkpoints": "params",
    "metrics": "eval",
    "renders": "eval",
    "setup": None,
    "seeding": None,
}


def _earliest(different: Mapping[str, Difference]) -> FirstDivergence:
    trace = [_in_trace(different["trace"])] if "trace" in different else []
    curves = list(_in_curves(different["curves"])) if "curves" in different else []
    checkpoints = list(_in_checkpoints(different["checkpoints"])) if "checkpoints" in different else []
    if not (trace or curves):
        # A checkpoint alone dates nothing: its parameters can have diverged at any step since the last equal one.
        checkpoints = [found for found in checkpoints if found.last_equal_step is not None]
    undated = [
        FirstDivergence(stage=stage, subject="/".join(node.name for node in down_to_worst(different[name])))
        for name, stage in _UNDATED.items()
        if name in different
    ]
    return max([*trace, *curves, *checkpoints, *undated], key=earliness)


def _in_trace(trace: Difference) -> FirstDivergence:
    """Where the trainings parted, as the comparator of the traces found it."""
    measures = trace.measures
    return FirstDivergence(
        step=measures["first_step"],
        last_equal_step=measures["last_equal_step"],
        stage=measures["stage"],
        subject=measures["subject"],
        growth=measures["growth"],
    )


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
