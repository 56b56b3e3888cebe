"""Conditions of the two runs: configuration, environment, hardware, code, data; and what their seeding logs say."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from f3rm_verify.difference import Difference, Verdict
from f3rm_verify.errors import UnreadableError
from f3rm_verify.readers.config import flatten
from f3rm_verify.run_dir import CONFIG, TRANSFORMS, RunDir

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
    "data.features",
)
#: Environment variables whose effect is compared elsewhere, or that have none on numbers.
_IGNORED_VARIABLES: Mapping[str, str] = {
    "GOMP_SPINCOUNT": "how threads wait, not how many there are",
    "NERFSTUDIO_METHOD_CONFIGS": "names the wrapper that records the evidence; the implementation is compared",
    "OMP_NUM_THREADS": "the number of threads is compared as torch shows it",
    "OMP_WAIT_POLICY": "how threads wait, not how many there are",
}


def compare_setup(reference: RunDir, candidate: RunDir) -> Difference:
    """Compares everything that was the same by intention. A difference here explains others; it is not one itself."""
    children = [
        *_compare_plain(CONFIG, lambda run: run.config, reference, candidate, _IGNORED_CONFIG),
        *_compare_plain(TRANSFORMS, lambda run: run.json(TRANSFORMS), reference, candidate, {}),
        *_compare_manifests(reference, candidate),
    ]
    return Difference.group(name="setup", artefact="setup", children=children)


def compare_seeding(reference: RunDir, candidate: RunDir) -> Difference:
    """Compares the seeding validation logs claim by claim; a claim that fails on both sides alike is no difference."""
    sides = []
    try:
        for run in (reference, candidate):
            log = run.seeding
            sides.append(None if log is None else _claims(log))
    except UnreadableError as error:
        return Difference(name="seeding", artefact="seeding", verdict=Verdict.UNREADABLE, summary=str(error))
    if sides[0] is None and sides[1] is None:
        return Difference.group(name="seeding", artefact="seeding", children=())
    children = [
        _leaf("seeding", name, *((side or {}).get(name, _ABSENT) for side in sides))
        for name in dict.fromkeys([*(sides[0] or {}), *(sides[1] or {})])
    ]
    failing = sorted({name for side in sides for name, claim in (side or {}).items() if claim["verdict"] == "fails"})
    summary = f"does not hold: {', '.join(failing)}" if failing else ""
    node = Difference.group(name="seeding", artefact="seeding", children=children)
    text = f"{node.summary}; {summary}" if summary else node.summary
    return Difference.group(name="seeding", artefact="seeding", children=children, summary=text)


_ABSENT: Any = object()


def _claims(log: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    entries = log.get("entries")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "claim" in entry for entry in entries):
        raise UnreadableError("verify/seeding.json: holds no list of claims.")
    # What was asked and set can be worded differently and come to the same; what was observed is what counts.
    return {
        str(entry["claim"]): {"observed": entry.get("observed"), "verdict": entry.get("verdict")} for entry in entries
    }


def _leaf(artefact: str, name: str, reference: Any, candidate: Any) -> Difference:
    if reference is _ABSENT or candidate is _ABSENT:
        side = "reference" if reference is _ABSENT else "candidate"
        return Difference(name=name, artefact=artefact, verdict=Verdict.MISSING, summary=f"not in the {side}")
    if _same(reference, candidate):
        return Difference(name=name, artefact=artefact, verdict=Verdict.IDENTICAL, summary=_short(reference))
    return Difference(
        name=name,
        artefact=artefact,
        verdict=Verdict.DIFFERENT,
        summary=f"{_short(reference)} in the reference, {_short(candidate)} in the candidate",
    )


def _same(reference: Any, candidate: Any) -> bool:
    """Equal in type and value, so that True is not 1; NaN equals NaN, as both are what was written."""
    return type(reference) is type(candidate) and (reference == candidate or repr(reference) == repr(candidate))


def _short(value: Any, limit: int = 80) -> str:
    if isinstance(value, Mapping) and "observed" in value:
        value = f"{value['observed']} ({value['verdict']})"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _compare_plain(
    name: str, read: Any, reference: RunDir, candidate: RunDir, ignored: Mapping[str, str]
) -> list[Difference]:
    """One node for a file, below it a node for every value in it; no node where neither side has the file."""
    try:
        sides = [read(run) for run in (reference, candidate)]
    except UnreadableError as error:
        return [Difference(name=name, artefact="setup", verdict=Verdict.UNREADABLE, summary=str(error))]
    if sides[0] is None and sides[1] is None:
        return []
    if sides[0] is None or sides[1] is None:
        side = "reference" if sides[0] is None else "candidate"
        return [Difference(name=name, artefact="setup", verdict=Verdict.MISSING, summary=f"not in the {side}")]
    return [_compare_values(name, flatten(sides[0]), flatten(sides[1]), ignored)]


def _compare_values(
    name: str, reference: Mapping[str, Any], candidate: Mapping[str, Any], ignored: Mapping[str, str]
) -> Difference:
    children = []
    for key in dict.fromkeys([*reference, *candidate]):
        leaf = _leaf("setup", key, reference.get(key, _ABSENT), candidate.get(key, _ABSENT))
        reason = next((why for pattern, why in ignored.items() if fnmatch.fnmatchcase(key, pattern)), None)
        if reason is not None and leaf.verdict is not Verdict.IDENTICAL:
            leaf = Difference(name=key, artefact="setup", verdict=Verdict.IGNORED, summary=reason)
        elif leaf.verdict is Verdict.MISSING:
            # A value on one side only is a difference between two files that are both there.
            leaf = Difference(name=key, artefact="setup", verdict=Verdict.DIFFERENT, summary=leaf.summary)
        children.append(leaf)
    return Difference.group(name=name, artefact="setup", children=children)


def _compare_manifests(reference: RunDir, candidate: RunDir) -> list[Difference]:
    try:
        sides = [reference.manifest, candidate.manifest]
    except UnreadableError as error:
        return [Difference(name="manifest", artefact="setup", verdict=Verdict.UNREADABLE, summary=str(error))]
    if sides[0] is None and sides[1] is None:
        return []
    if sides[0] is None or sides[1] is None:
        side = "reference" if sides[0] is None else "candidate"
        return [Difference(name="manifest", artefact="setup", verdict=Verdict.MISSING, summary=f"not in the {side}")]
    nodes = []
    for part in _MANIFEST_PARTS:
        values = [_part(side, part) for side in sides if side is not None]
        if values == [_ABSENT, _ABSENT]:
            continue
        if all(isinstance(value, Mapping) for value in values):
            ignored = _IGNORED_VARIABLES if part == "environment.variables" else {}
            if part == "data.features":
                ignored = {"source": "whether the features came from a cache; their digest decides"}
            if values[0] or values[1]:
                nodes.append(_compare_values(part, flatten(values[0]), flatten(values[1]), ignored))
        else:
            nodes.append(_leaf("setup", part, *values))
    return nodes


def _part(manifest: Mapping[str, Any], path: str) -> Any:
    value: Any = manifest
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return _ABSENT
        value = value[key]
    return value
