"""What a comparison found: verdicts, the tree of differences, and the whole result; to and from plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

SCHEMA_VERSION = 1

#: Everything a comparator understands, in causal order.
ARTEFACTS = ("setup", "seeding", "trace", "curves", "metrics", "checkpoints", "renders")
#: Artefacts that say under which conditions a run was made; the others are what came out of it.
CONDITIONS = ("setup", "seeding")

#: Where in a training something can differ first, in causal order; all but the first once per step.
STAGES = ("init", "rng", "batch", "forward", "loss", "grad", "params", "schedule", "eval")


class Verdict(str, Enum):
    """What one node of the tree says, best first."""

    IGNORED = "ignored"
    IDENTICAL = "identical"
    WITHIN_TOLERANCE = "within_tolerance"
    MISSING = "missing"
    UNREADABLE = "unreadable"
    DIFFERENT = "different"

    @property
    def badness(self) -> int:
        """Position in the order best to worst, from 0."""
        return list(Verdict).index(self)


class Outcome(str, Enum):
    """What the whole comparison says."""

    REPRODUCIBLE = "reproducible"
    WITHIN_TOLERANCE = "within_tolerance"
    DIVERGED = "diverged"
    INCONCLUSIVE = "inconclusive"

    @property
    def exit_code(self) -> int:
        """0 for reproducible and within tolerance, 1 for diverged, 3 for inconclusive."""
        return {"diverged": 1, "inconclusive": 3}.get(self.value, 0)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One compared thing, or a group of them.

    `name` is unique among its siblings. `measures` holds numbers and short strings (max_abs, max_ulp, n_different,
    first_step, ...) and is plain JSON data. Build leaves with `Difference(...)` and groups with `Difference.group`.
    """

    name: str
    artefact: str
    verdict: Verdict
    summary: str = ""
    measures: Mapping[str, Any] = field(default_factory=dict)
    children: tuple[Difference, ...] = ()

    @classmethod
    def group(
        cls,
        *,
        name: str,
        artefact: str,
        children: Iterable[Difference],
        summary: str = "",
        measures: Mapping[str, Any] | None = None,
    ) -> Difference:
        """A parent with the verdict of its worst child; `unreadable` where nothing was compared."""
        children = tuple(children)
        verdict = worst(child.verdict for child in children)
        if verdict is Verdict.IGNORED:
            verdict = Verdict.UNREADABLE
            summary = summary or ("everything here is ignored" if children else "nothing was compared")
        return cls(
            name=name,
            artefact=artefact,
            verdict=verdict,
            summary=summary or count_summary(children),
            measures=dict(measures or {}),
            children=children,
        )

    def walk(self, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Difference]]:
        """Yields every node, parents first, with the names from the root down to it."""
        path = (*path, self.name)
        yield path, self
        for child in self.children:
            yield from child.walk(path)

    def leaves(self) -> Iterator[tuple[tuple[str, ...], Difference]]:
        """Yields the nodes without children, with their paths."""
        return ((path, node) for path, node in self.walk() if not node.children)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; non-finite measures become the strings nan, inf and -inf."""
        return {
            "name": self.name,
            "artefact": self.artefact,
            "verdict": self.verdict.value,
            "summary": self.summary,
            "measures": _plain(self.measures),
            "children": [child.to_dict() for child in self.children],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Difference:
        """The reverse of `to_dict`."""
        return cls(
            name=data["name"],
            artefact=data["artefact"],
            verdict=Verdict(data["verdict"]),
            summary=data["summary"],
            measures=data["measures"],
            children=tuple(cls.from_dict(child) for child in data["children"]),
        )


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of the verdicts; `ignored` when there are none."""
    return max(verdicts, key=lambda verdict: verdict.badness, default=Verdict.IGNORED)


def count_summary(children: Iterable[Difference]) -> str:
    """How many things below have which verdict, worst first: "2 different, 5 identical"."""
    counts: dict[Verdict, int] = {}
    for child in children:
        for _, leaf in child.leaves():
            counts[leaf.verdict] = counts.get(leaf.verdict, 0) + 1
    ordered = sorted(counts, key=lambda verdict: -verdict.badness)
    return ", ".join(f"{counts[verdict]} {verdict.value.replace('_', ' ')}" for verdict in ordered)


@dataclass(frozen=True, kw_only=True)
class FirstDivergence:
    """The first thing that broke. `step` is None where no step is known; `subject` then names the artefact."""

    rank: int = 0
    step: int | None = None
    last_equal_step: int | None = None
    stage: str | None = None
    subject: str
    operator: str | None = None
    cause: str = "unknown"
    remedy: str = ""
    evidence: tuple[str, ...] = ()
    growth: Mapping[str, Any] = field(default_factory=dict)
    reproduce: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything a reporter needs. `to_dict` gives the result file of schema version 1.

    `reference`, `candidate` and each of `candidates` describe a run: directory, method, seed, steps, completed, ...
    `seeding` maps each side to its seeding validation log. `reasons` says in sentences why the verdict is not better.
    """

    tool: Mapping[str, Any]
    outcome: Outcome
    reasons: tuple[str, ...]
    reference: Mapping[str, Any]
    candidate: Mapping[str, Any]
    candidates: tuple[Mapping[str, Any], ...] = ()
    pairs: int
    steps: int | None
    not_recorded: tuple[str, ...] = ()
    policy: Mapping[str, Any] = field(default_factory=dict)
    first_divergence: FirstDivergence | None = None
    control: Mapping[str, Any] | None = None
    seeding: Mapping[str, Any] = field(default_factory=dict)
    root: Difference

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data with the keys of schema version 1."""
        first = self.first_divergence
        return {
            "schema_version": SCHEMA_VERSION,
            "tool": _plain(self.tool),
            "verdict": self.outcome.value,
            "exit_code": self.outcome.exit_code,
            "reasons": list(self.reasons),
            "reference": _plain(self.reference),
            "candidate": _plain(self.candidate),
            "candidates": _plain(self.candidates),
            "pairs": self.pairs,
            "steps": self.steps,
            "not_recorded": list(self.not_recorded),
            "policy": _plain(self.policy),
            "first_divergence": None if first is None else _plain(dataclasses.asdict(first)),
            "control": _plain(self.control),
            "seeding": _plain(self.seeding),
            "root": self.root.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """The reverse of `to_dict`; raises KeyError, TypeError or ValueError where `data` is not a result."""
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {data['schema_version']!r}, this version reads {SCHEMA_VERSION}")
        first = data["first_divergence"]
        if first is not None:
            first = FirstDivergence(**{**first, "evidence": tuple(first["evidence"])})
        return cls(
            tool=data["tool"],
            outcome=Outcome(data["verdict"]),
            reasons=tuple(data["reasons"]),
            reference=data["reference"],
            candidate=data["candidate"],
            candidates=tuple(data["candidates"]),
            pairs=data["pairs"],
            steps=data["steps"],
            not_recorded=tuple(data["not_recorded"]),
            policy=data["policy"],
            first_divergence=first,
            control=data["control"],
            seeding=data["seeding"],
            root=Difference.from_dict(data["root"]),
        )


def _plain(value: Any) -> Any:
    """`value` as JSON data: mappings and sequences copied, NumPy scalars unwrapped, non-finite floats as strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value
