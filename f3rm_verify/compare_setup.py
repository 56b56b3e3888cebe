"""Conditions of the two runs: configuration, environment, hardware, code, data; and what their seeding logs say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from f3rm_verify.difference import Difference, Verdict
from f3rm_verify.errors import UnreadableError
from f3rm_verify.policy import reason_to_ignore
from f3rm_verify.readers.config import flatten
from f3rm_verify.run_dir import CONFIG, MANIFEST, SEEDING, TRANSFORMS, RunDir

T = TypeVar("T")

#: Parts of config.yml that name places and times, or how the run is watched, by dotted path (patterns as in fnmatch).
_IGNORED_CONFIG: Mapping[str, str] = {
    "output_dir": "a path",
    "experiment_name": "a name in the output path",
    "timestamp": "a time in the output path",
    "data": "a path; the files' digests are compared where they were recorded",
    "*.data": "a path; the files' digests are compared where they were recorded",
    "viewer.websocket_port*": "a port of the viewer",
}
#: Parts of the manifest that are compared, by dotted path of their group.
_MANIFEST_PARTS = (
    "method",
    "implementation",
    "seed",
    "rank",
    "world_size",
    "tool_version",
    "encodings",
    "environment.python",
    "environment.platform",
    "environment.packages",
    "environment.hardware",
    "environment.threads",
    "environment.variables",
    "environment.git",
    "data.files",
    "data.order",
    "data.features",
)
#: Of these, what runs lack that were recorded before it was.
_NEWER_PARTS = ("data.order",)
_ABSENT: Any = object()
_NOTHING_IGNORED: Mapping[str, str] = {}
#: Environment variables whose effect is compared elsewhere, or that have none on numbers.
_IGNORED_VARIABLES: Mapping[str, str] = {
    "GOMP_SPINCOUNT": "how threads wait, not how many there are",
    "NERFSTUDIO_METHOD_CONFIGS": "names the wrapper that records the evidence; the implementation is compared",
    "OMP_NUM_THREADS": "the number of threads is compared as torch shows it",
    "OMP_WAIT_POLICY": "how threads wait, not how many there are",
}
_IGNORED_PARTS: Mapping[str, Mapping[str, str]] = {
    "environment.variables": _IGNORED_VARIABLES,
    "data.features": {
        "source": "whether the features came from a cache; their digest decides",
        "kinds.*.origin*": "where the weights came from; their digest decides",
    },
}


def compare_setup(reference: RunDir, candidate: RunDir) -> Difference:
    """Compares everything that was the same by intention. A difference here explains others; it is not one itself."""
    sides = (reference, candidate)
    children = [
        *_compare_files(CONFIG, lambda run: run.config, sides, lambda a, b: [_values(CONFIG, a, b, _IGNORED_CONFIG)]),
        *_compare_files(TRANSFORMS, lambda run: run.transforms, sides, lambda a, b: [_values(TRANSFORMS, a, b)]),
        *_compare_files(MANIFEST, lambda run: run.manifest, sides, _compare_manifests),
    ]
    return Difference.group(name="setup", artefact="setup", children=children)


def compare_seeding(reference: RunDir, candidate: RunDir) -> Difference:
    """Compares the seeding validation logs claim by claim; a claim that fails on both sides alike is no difference."""
    try:
        sides = _read(lambda run: claims_of(run.seeding), (reference, candidate))
    except UnreadableError as error:
        return Difference(name="seeding", artefact="seeding", verdict=Verdict.UNREADABLE, summary=str(error))
    names = dict.fromkeys(name for side in sides for name in side)
    children = [_leaf("seeding", name, *(side.get(name, _ABSENT) for side in sides)) for name in names]
    node = Difference.group(name="seeding", artefact="seeding", children=children)
    failing = sorted({name for side in sides for name, claim in side.items() if claim["verdict"] == "fails"})
    if not failing:
        return node
    return dataclasses.replace(node, summary=f"{node.summary}; does not hold: {', '.join(failing)}")


def claims_of(log: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """What counts of a seeding log, by claim: what was observed. How it was asked and set can be worded differently."""
    entries = [] if log is None else log.get("entries")
    if not isinstance(entries, list) or not all(map(_is_claim, entries)):
        raise UnreadableError(f"{SEEDING}: holds no list of claims.")
    claims = {entry["claim"]: {key: entry.get(key) for key in ("observed", "verdict")} for entry in entries}
    if len(claims) < len(entries):
        raise UnreadableError(f"{SEEDING}: has one claim twice.")
    return claims


def _is_claim(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("claim", "observed", "verdict"))


def _read(read: Callable[[RunDir], T], sides: tuple[RunDir, RunDir]) -> list[T]:
    """What both sides have; UnreadableError that names the side."""
    values = []
    for side, run in zip(("reference", "candidate"), sides, strict=True):
        try:
            values.append(read(run))
        except UnreadableError as error:
            raise UnreadableError(f"{side}: {error}") from error
    return values


def _compare_files(
    name: str,
    read: Callable[[RunDir], Any],
    sides: tuple[RunDir, RunDir],
    compare: Callable[[Any, Any], list[Difference]],
) -> list[Difference]:
    """The nodes of one file: those that `compare` makes, or one that says why there is nothing to compare."""
    try:
        values = _read(read, sides)
        if None not in values:
            return compare(*values)
    except UnreadableError as error:
        return [Difference(name=name, artefact="setup", verdict=Verdict.UNREADABLE, summary=str(error))]
    if values == [None, None] and name != CONFIG:  # only config.yml is written by every training
        return []
    return [_leaf("setup", name, *(_ABSENT if value is None else value for value in values))]


def _compare_manifests(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> list[Difference]:
    nodes = []
    for part in _MANIFEST_PARTS:
        a, b = _part(reference, part), _part(candidate, part)
        if part in _NEWER_PARTS and a is b is _ABSENT:
            continue
        if isinstance(a, dict) and isinstance(b, dict) and (a or b):
            nodes += _raise_ignored(_values(part, a, b, _IGNORED_PARTS.get(part, _NOTHING_IGNORED)))
        else:
            nodes.append(_leaf("setup", part, a, b))
    return nodes


def _raise_ignored(group: Difference) -> list[Difference]:
    """The group; or, where all of it is ignored and so nothing in it can be judged, its leaves."""
    if any(child.verdict is not Verdict.IGNORED for child in group.children):
        return [group]
    return [dataclasses.replace(child, name=f"{group.name}.{child.name}") for child in group.children]


def _part(manifest: Mapping[str, Any], path: str) -> Any:
    value: Any = manifest
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return _ABSENT
        value = value[key]
    return value


def _values(name: str, reference: Any, candidate: Any, ignored: Mapping[str, str] = _NOTHING_IGNORED) -> Difference:
    """A node for a table, below it one for every value in it; a value on one side only is a difference."""
    children = []
    sides = [flatten(side) if side else {} for side in (reference, candidate)]
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        leaf = _leaf("setup", key, *(side.get(key, _ABSENT) for side in sides))
        reason = reason_to_ignore(key, ignored)
        if reason is not None and leaf.verdict is not Verdict.IDENTICAL:
            leaf = dataclasses.replace(leaf, verdict=Verdict.IGNORED, summary=reason)
        elif leaf.verdict is Verdict.MISSING:
            leaf = dataclasses.replace(leaf, verdict=Verdict.DIFFERENT)
        children.append(leaf)
    return Difference.group(name=name, artefact="setup", children=children)


def _leaf(artefact: str, name: str, reference: Any, candidate: Any) -> Difference:
    absent = [side for side, value in (("reference", reference), ("candidate", candidate)) if value is _ABSENT]
    if absent:
        verdict, summary = Verdict.MISSING, f"not in the {' and not in the '.join(absent)}"
    elif _canonical(reference) == _canonical(candidate):
        verdict, summary = Verdict.IDENTICAL, _short(reference)
    else:
        verdict = Verdict.DIFFERENT
        summary = f"{_short(reference)} in the reference, {_short(candidate)} in the candidate"
    return Difference(name=name, artefact=artefact, verdict=verdict, summary=summary)


def _canonical(value: Any) -> str:
    """A text that two values share if they are equal in type and value: True is not 1, nor +0 -0, but NaN is NaN."""
    return json.dumps(flatten(value), sort_keys=True)


def _short(value: Any, limit: int = 80) -> str:
    if isinstance(value, Mapping) and "observed" in value:
        value = f"{value['observed']} ({value['verdict']})"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
