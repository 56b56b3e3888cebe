"""Gathers what is known about a divergence from the nodes of the comparators and from what both sides recorded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from f3rm_verify.cause_evidence import Evidence
from f3rm_verify.difference import STAGES, Difference, FirstDivergence, Verdict

#: A generator and the phase after which it was looked at, as the trace names it; "#2" for the second time in a step.
_AFTER = re.compile(r"(.+?) after (.+?)(?: #\d+)?$")
#: Of each kind of outside reads in a manifest, at most.
_MOST = 20


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one side recorded about itself, empty where it did not; nothing in it is believed to have a type."""

    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    claims: Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """What executing the step again showed: the first operator with equal inputs and other outputs, in which module.

    `repeats` is whether one process that repeats the step from one state gets one result.
    """

    operator: str | None = None
    module: str | None = None
    repeats: bool | None = None


def gather(
    first: FirstDivergence,
    *,
    trace: Difference | None,
    conditions: Sequence[Difference],
    sides: tuple[Side, Side],
    repetition: Repetition | None = None,
) -> Evidence:
    """The evidence for the rules. `trace` is the node of the traces where `first` comes from it, `conditions` those of
    setups and seeding logs.
    """
    repetition = repetition or Repetition()
    reference, candidate = sides
    after = _AFTER.match(first.subject) if first.stage in ("rng", "eval") else None
    reads = [_table(side.manifest.get("outside_reads")) for side in sides]
    return Evidence(
        stage=first.stage,
        subject=first.subject,
        step=first.step,
        last_equal_step=first.last_equal_step,
        also=tuple(_also(first, trace)),
        traced=trace is not None,
        proven=frozenset(_proven(first, trace)),
        conditions=dict(_differing(conditions)),
        claims=(_observed(reference), _observed(candidate)),
        failing=frozenset(
            claim["claim"]
            for side in sides
            for claim in side.claims
            if claim.get("verdict") == "fails" and "claim" in claim
        ),
        device=_text(_table(reference.config.get("machine")).get("device_type")),
        threads=max(filter(None, map(_threads, sides)), default=None),
        encodings=frozenset(_texts([value for s in sides for value in _table(s.manifest.get("encodings")).values()])),
        extensions=frozenset(_texts([name for s in sides for name in _list(s.manifest.get("extensions"))])),
        viewer=any("viewer" in (_text(side.config.get("vis")) or "") for side in sides),
        feature_sources=(_feature_source(reference), _feature_source(candidate)),
        phase=after[2] if after else None,
        also_after=tuple(dict.fromkeys(_after(first, trace))),
        clock=tuple(_places(reads, "clock, while training")),
        outside_of_setup=_outside_of_setup(reads) if all("outside_reads" in s.manifest for s in sides) else None,
        entropy_of_steps=tuple(_places(reads, "entropy, while training")),
        operator=repetition.operator,
        module=repetition.module,
        repeats=repetition.repeats,
    )


def _also(first: FirstDivergence, trace: Difference | None) -> Iterator[str]:
    """What else differs at that step in that stage."""
    for node in () if trace is None else trace.children:
        for leaf in node.children if node.name == first.stage else ():
            here = leaf.verdict is Verdict.DIFFERENT and leaf.measures.get("first_step") == first.step
            # What a phase left follows from what it found, so it is news only where it came first itself.
            if here and leaf.name != first.subject and not _AFTER.match(leaf.name):
                yield leaf.name


def _after(first: FirstDivergence, trace: Difference | None) -> Iterator[str]:
    """The phases that left generators in states that differ first in this step, too."""
    for node in () if trace is None else trace.children:
        for leaf in node.children if node.name == first.stage else ():
            after = _AFTER.match(leaf.name)
            if after and leaf.verdict is Verdict.DIFFERENT and leaf.measures.get("first_step") == first.step:
                yield after[2]


def _proven(first: FirstDivergence, trace: Difference | None) -> Iterator[str]:
    """The stages before this one that were recorded, and are equal up to and in this step."""
    if trace is None or first.stage is None or first.step is None:
        return
    before = STAGES[: STAGES.index(first.stage)]
    for node in trace.children:
        if node.name in before and node.children and all(_equal_at(leaf, first.step) for leaf in node.children):
            yield node.name


def _equal_at(leaf: Difference, step: int) -> bool:
    if leaf.verdict is Verdict.IDENTICAL:
        return True
    since = leaf.measures.get("first_step")
    # What a phase left in the generators can differ later in this step; what the step found cannot.
    late = bool(_AFTER.match(leaf.name)) and since == step
    return leaf.verdict is Verdict.DIFFERENT and isinstance(since, int) and (since > step or late)


def _differing(conditions: Sequence[Difference]) -> Iterator[tuple[str, str]]:
    for node in conditions:
        for path, leaf in node.leaves():
            if leaf.verdict is Verdict.DIFFERENT:
                yield " / ".join(path[1:]), leaf.summary


def _observed(side: Side) -> dict[str, str]:
    return {claim["claim"]: claim["observed"] for claim in side.claims if {"claim", "observed"} <= claim.keys()}


def _threads(side: Side) -> int | None:
    threads = _table(_table(side.manifest.get("environment")).get("threads")).get("intra_op")
    return threads if type(threads) is int else None


def _feature_source(side: Side) -> str | None:
    return _text(_table(_table(side.manifest.get("data")).get("features")).get("source"))


def _places(reads: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    """Places in the code that both sides have, or one; each once."""
    return list(dict.fromkeys(place for side in reads for place in _texts(_list(side.get(kind)))))[:_MOST]


def _outside_of_setup(reads: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return (*_places(reads, "clock, while building"), *_places(reads, "entropy, while building"))


def _texts(values: Sequence[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
