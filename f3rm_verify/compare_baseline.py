"""Compares a run with a baseline: what they were made under, value by value, and what came out, digest by digest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from f3rm_verify.baseline import conditions_of
from f3rm_verify.difference import Difference, Verdict
from f3rm_verify.policy import Policy
from f3rm_verify.readers.config import flatten
from f3rm_verify.recorded_run import Data, RecordedRun, record_checkpoints, record_renders, table_of
from f3rm_verify.run_dir import RunDir

#: What must be equal for a run to be comparable with a baseline; each is a node of `setup`.
CONDITIONS = ("request", "environment", "data")
#: The artefacts of which a baseline has digests, and how a run gets them.
DIGESTED: Mapping[str, Callable[[RunDir], Mapping[str, Mapping[str, str]]]] = {
    "checkpoints": record_checkpoints,
    "renders": record_renders,
}
#: Part of what is checked, not of what it is checked in: named where it changed, and judged by what comes out.
_UNDER_TEST = "part of what is checked: what came out decides"
_ABSENT: Any = object()


def compare_conditions(baseline: RecordedRun, candidate: RunDir) -> Difference:
    """The `setup` of a run against that of a baseline: request, environment and data, and the settings for information.

    Of a rank above 0 only the environment: the rest is the same for all of them.
    """
    conditions = conditions_of(candidate)
    parts = ("environment",) if baseline.rank else CONDITIONS
    recorded = {part: table_of(baseline.document[part]) for part in parts}
    if "request" in recorded:  # how long to train and where the data lies is no condition: that shows by itself
        recorded["request"] = {key: recorded["request"].get(key, _ABSENT) for key in conditions["request"]}
    children = [_group(part, _leaves(flatten(recorded[part]), flatten(conditions[part]))) for part in parts]
    if not baseline.rank:
        settings = map(_informational, _leaves(table_of(baseline.document["config"]), conditions["config"]))
        children += [group for group in [_group("config.yml", settings)] if group.children]
    return Difference.group(name="setup", artefact="setup", children=children)


def not_comparable(root: Difference) -> list[str]:
    """In what the conditions of a run differ from those of the baseline, by the tree of the comparison."""
    return [
        f"{' / '.join(path[1:]).removeprefix('setup / ')}: {leaf.summary}"
        for path, leaf in root.leaves()
        if leaf.artefact == "setup" and leaf.verdict not in (Verdict.IDENTICAL, Verdict.IGNORED)
    ]


def compare_digests(artefact: str, baseline: RecordedRun, candidate: RunDir, *, policy: Policy) -> Difference:
    """A node for each checkpoint or image of either side, in it one for each tensor or output.

    A digest says only whether something is equal, so what a limit is set for and differs cannot be judged.
    """
    ours, theirs = baseline.digests(artefact), DIGESTED[artefact](candidate)
    children = [
        _missing(artefact, name, "reference" if name not in ours else "candidate")
        if name not in ours or name not in theirs
        else Difference.group(
            name=name, artefact=artefact, children=_digest_nodes(artefact, name, ours[name], theirs[name], policy)
        )
        for name in sorted({*ours, *theirs})
    ]
    return Difference.group(name=artefact, artefact=artefact, children=children)


def _digest_nodes(
    artefact: str, group: str, reference: Mapping[str, str], candidate: Mapping[str, str], policy: Policy
) -> Iterator[Difference]:
    for name in dict.fromkeys([*reference, *candidate]):
        if name not in reference or name not in candidate:
            yield _missing(artefact, name, "candidate" if name in reference else "reference")
            continue
        ours, theirs = reference[name], candidate[name]
        limit = policy.limit(artefact, f"{group}/{name}")
        measures = {"reference_digest": ours, "candidate_digest": theirs}
        if ours == theirs:
            yield _leaf(artefact, name, Verdict.IDENTICAL, _without_digest(ours))
        elif limit is not None:
            summary = f"differs, and a baseline has only its digest, which no limit can be applied to ({limit})"
            yield _leaf(artefact, name, Verdict.UNREADABLE, summary, measures)
        else:
            yield _leaf(artefact, name, Verdict.DIFFERENT, _digests_differ(ours, theirs), measures)


def _digests_differ(reference: str, candidate: str) -> str:
    ours, theirs = _without_digest(reference), _without_digest(candidate)
    return f"{ours} in the baseline, {theirs} in the run" if ours != theirs else f"other values ({ours})"


def _without_digest(text: str) -> str:
    """What a digest is of, in words."""
    kind, _, digest = text.rpartition(" ")
    return kind if len(digest) == 32 and kind else text


def _missing(artefact: str, name: str, side: str) -> Difference:
    where = "baseline" if side == "reference" else "run"
    return _leaf(artefact, name, Verdict.MISSING, f"not in the {where}", {"missing_in": side})


def _leaves(reference: Data, candidate: Data) -> Iterator[Difference]:
    """A node for every entry of two tables; one that only one side has is a difference."""
    for name in dict.fromkeys([*reference, *candidate]):
        ours, theirs = (side.get(name, _ABSENT) for side in (reference, candidate))
        same = ours is not _ABSENT and theirs is not _ABSENT and _canonical(ours) == _canonical(theirs)
        summary = _short(ours) if same else f"{_short(ours)} in the baseline, {_short(theirs)} in the run"
        yield _leaf("setup", name, Verdict.IDENTICAL if same else Verdict.DIFFERENT, summary)


def _informational(leaf: Difference) -> Difference:
    if leaf.verdict is Verdict.IDENTICAL:
        return leaf
    return _leaf("setup", leaf.name, Verdict.IGNORED, f"{_UNDER_TEST}; {leaf.summary}", {"reason": _UNDER_TEST})


def changed_settings(root: Difference) -> list[str]:
    """The settings that are others than in the baseline."""
    return [
        f"{leaf.name}: {leaf.summary.removeprefix(f'{_UNDER_TEST}; ')}"
        for _, leaf in root.leaves()
        if leaf.verdict is Verdict.IGNORED and leaf.measures.get("reason") == _UNDER_TEST
    ]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _group(name: str, children: Any) -> Difference:
    return Difference.group(name=name, artefact="setup", children=children)


def _leaf(
    artefact: str, name: str, verdict: Verdict, summary: str, measures: Mapping[str, Any] | None = None
) -> Difference:
    return Difference(name=name, artefact=artefact, verdict=verdict, summary=summary, measures=measures or {})
