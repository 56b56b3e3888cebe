"""Compares checkpoints tensor by tensor, by bits first."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from f3rm_verify.bits import bit_equal, difference_summary, float_difference
from f3rm_verify.difference import Difference, Verdict
from f3rm_verify.errors import UnreadableError
from f3rm_verify.policy import Limit, Policy, judge
from f3rm_verify.readers.checkpoint import Named, Tensor, read_checkpoint
from f3rm_verify.run_dir import CHECKPOINTS, RunDir

_ARTEFACT = "checkpoints"
#: Longest text of a scalar in a summary or measure.
_SHOWN = 80
#: Values up to which tensors of other types are compared in double precision.
_MAX_CONVERTED = 2**24
#: How the names of the dtypes begin that limits are for; float8 has no distances.
_FLOATS = ("float16", "float32", "float64", "bfloat16", "complex")

Leaves = Mapping[str, Any]


def compare_checkpoints(reference: RunDir, candidate: RunDir, *, policy: Policy) -> Difference:
    """A node per step, in it one per part (`pipeline`, `optimizers`, ...), in it one per tensor and scalar.

    Limits are for floats; integers, booleans, texts, shapes and types must be equal.
    """
    steps: list[Mapping[int, Path]] = []
    broken: list[Difference] = []
    for side, run in (("reference", reference), ("candidate", candidate)):
        try:
            steps.append(run.checkpoints)
        except UnreadableError as error:
            steps.append({})
            broken.append(_leaf(f"{CHECKPOINTS} of the {side}", Verdict.UNREADABLE, str(error)))
    if broken:
        return _group(_ARTEFACT, broken)
    ours, theirs = steps
    children = [_step(step, ours.get(step), theirs.get(step), policy) for step in sorted({*ours, *theirs})]
    return _group(_ARTEFACT, children, "" if children else f"neither run has checkpoints in {CHECKPOINTS}/")


def nothing_trained(run: RunDir) -> bool | None:
    """Whether no parameter was ever updated: the last checkpoint has Adam's moments, and all of them are zero.

    None where that cannot be known: no readable checkpoint, or no Adam moments in it.
    """
    try:
        leaves = read_checkpoint(list(run.checkpoints.values())[-1]).leaves()
    except (UnreadableError, IndexError):
        return None
    moments = [
        leaf
        for path, leaf in leaves.items()
        if path.startswith("optimizers/") and path.endswith(("/exp_avg", "/exp_avg_sq")) and isinstance(leaf, Tensor)
    ]
    try:
        return not any(moment.array.any() for moment in moments) if moments else None
    except UnreadableError:
        return None


def _step(step: int, reference: Path | None, candidate: Path | None, policy: Policy) -> Difference:
    name = f"step-{step:09d}"
    if reference is None or candidate is None:
        return _missing(name, "reference" if reference is None else "candidate")
    sides: list[dict[str, Any]] = []
    reasons: list[str] = []
    for side, path in (("reference", reference), ("candidate", candidate)):
        try:
            sides.append(read_checkpoint(path).leaves())
        except UnreadableError as error:
            reasons.append(f"{side}: {error}")
    if reasons:
        return _leaf(name, Verdict.UNREADABLE, " ".join(reasons))

    def limit(*path: str) -> Limit | None:
        return policy.limit(_ARTEFACT, "/".join((name, *path)))

    try:
        parts = [_part(part, *leaves, limit) for part, leaves in _parts(*sides).items()]
    except UnreadableError as error:  # a file that changes while it is read
        return _leaf(name, Verdict.UNREADABLE, str(error))
    return _group(name, _with_shared(parts, [_shared(side) for side in sides]))


def _shared(leaves: Leaves) -> dict[str, list[str]]:
    """By path the other tensors that are views of the same storage, as tied weights are."""
    storages: dict[int, list[str]] = {}
    for path, leaf in leaves.items():
        if isinstance(leaf, Tensor) and leaf.storage is not None:
            storages.setdefault(leaf.storage, []).append(path)
    few = [paths[:1000] for paths in storages.values()]  # each names all others: a square of their number
    return {path: [other for other in paths if other != path] for paths in few for path in paths}


def _with_shared(parts: list[Difference], shared: list[dict[str, list[str]]]) -> list[Difference]:
    """Says of a tensor that differs which others must differ with it."""

    def note(part: Difference, leaf: Difference) -> Difference:
        path = f"{part.name}/{leaf.name}"
        others = sorted({other for side in shared for other in side.get(path, ())})
        if leaf.verdict not in (Verdict.DIFFERENT, Verdict.WITHIN_TOLERANCE) or not others:
            return leaf
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        summary = f"{leaf.summary}; shares its storage with {others[0]}{more}"
        return dataclasses.replace(leaf, summary=summary, measures={**leaf.measures, "shares_storage": others[:5]})

    return [
        dataclasses.replace(part, children=tuple(note(part, leaf) for leaf in part.children)) if part.children else part
        for part in parts
    ]


def _parts(
    reference: Mapping[str, Any], candidate: Mapping[str, Any]
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The leaves of both sides by first component of their path, named by the rest of it."""
    parts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for side, leaves in enumerate((reference, candidate)):
        for path, leaf in leaves.items():
            part, _, rest = path.partition("/")
            parts.setdefault(part, ({}, {}))[side][rest] = leaf
    return parts


def _part(name: str, reference: Leaves, candidate: Leaves, limit: Callable[..., Limit | None]) -> Difference:
    if not any({*reference, *candidate}):  # a scalar such as `step`, not a container
        return _compare(name, reference, candidate, "", limit(name))
    names = dict.fromkeys((*reference, *candidate))
    return _group(name, [_compare(rest or "(itself)", reference, candidate, rest, limit(name, rest)) for rest in names])


def _compare(name: str, reference: Leaves, candidate: Leaves, key: str, limit: Limit | None) -> Difference:
    if key not in reference or key not in candidate:
        return _missing(name, "candidate" if key in reference else "reference")
    ours, theirs = reference[key], candidate[key]
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return _compare_tensors(name, ours, theirs, limit)
    return _compare_scalars(name, ours, theirs, limit)


def _compare_tensors(name: str, reference: Tensor, candidate: Tensor, limit: Limit | None) -> Difference:
    kinds = [_kind(side) for side in (reference, candidate)]
    if kinds[0] != kinds[1]:
        node = _different(name, *kinds)
        return dataclasses.replace(node, summary=f"{node.summary}{_same_values(reference, candidate)}")
    ours, theirs = reference.array, candidate.array
    if bit_equal(ours, theirs):
        return _leaf(name, Verdict.IDENTICAL, kinds[0], n=ours.size, n_different=0)
    dtype = reference.dtype.removeprefix("numpy.")
    if not dtype.startswith(_FLOATS):
        limit = None
    measures = float_difference(ours, theirs, dtype_name=dtype, limits=limit)
    verdict, note = judge(limit, outside=measures.get("n_outside", 0))
    summary = f"{difference_summary(measures)}{note}"
    stale = [side for side, tensor in (("reference", reference), ("candidate", candidate)) if not tensor.crc_ok]
    if stale:
        measures["crc_mismatch"] = " and ".join(stale)
        summary += f"; the file was changed after it was written: checksum mismatch in {measures['crc_mismatch']}"
    return _leaf(name, Verdict.DIFFERENT if stale else verdict, summary, **measures)


def _same_values(reference: Tensor, candidate: Tensor) -> str:
    """What is said of tensors of other shapes or types that hold the same values in the same order."""
    a, b = reference.array, candidate.array
    if a.size != b.size or a.size == 0:
        return ""
    if reference.dtype == candidate.dtype:
        return "; the same values in the same order" if bit_equal(a.reshape(-1), b.reshape(-1)) else ""
    if a.size > _MAX_CONVERTED or not {reference.dtype, candidate.dtype} <= {"float16", "float32", "float64"}:
        return ""
    equal = np.array_equal(a.reshape(-1).astype(np.float64), b.reshape(-1).astype(np.float64))
    return "; the same values in another precision" if equal else ""


def _compare_scalars(name: str, reference: Any, candidate: Any, limit: Limit | None) -> Difference:
    """Exactly: type and bits, so that 1 is not 1.0, +0 is not -0, and NaN is NaN."""
    if _bits(reference) == _bits(candidate):
        return _leaf(name, Verdict.IDENTICAL, _kind(reference))
    if type(reference) is float and type(candidate) is float:
        measures = float_difference(np.array(reference), np.array(candidate), limits=limit)
        measures.update(reference=repr(reference), candidate=repr(candidate))
        verdict, note = judge(limit, outside=measures.get("n_outside", 0))
        return _leaf(name, verdict, f"{reference!r} against {candidate!r}{note}", **measures)
    return _different(name, _kind(reference), _kind(candidate))


def _bits(value: Any) -> tuple[str, Any]:
    """What makes a scalar what it is, comparable with ==."""
    if isinstance(value, Tensor):
        return "Tensor", _kind(value)
    if isinstance(value, float):
        return "float", struct.pack("<d", value)
    if isinstance(value, complex):
        return "complex", struct.pack("<2d", value.real, value.imag)
    if isinstance(value, set):
        return "set", sorted(_bits(item) for item in value)
    return type(value).__name__, repr(value)


def _kind(value: Any) -> str:
    """What a leaf is, for people."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    text = str(value) if value is None or isinstance(value, Named) else f"{type(value).__name__} {value!r}"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _different(name: str, reference: str, candidate: str) -> Difference:
    return _leaf(name, Verdict.DIFFERENT, f"{reference} against {candidate}", reference=reference, candidate=candidate)


def _missing(name: str, side: str) -> Difference:
    return _leaf(name, Verdict.MISSING, f"missing in the {side}", missing_in=side)


def _leaf(name: str, verdict: Verdict, summary: str, **measures: Any) -> Difference:
    return Difference(name=name, artefact=_ARTEFACT, verdict=verdict, summary=summary, measures=measures)


def _group(name: str, children: list[Difference], summary: str = "") -> Difference:
    return Difference.group(name=name, artefact=_ARTEFACT, children=children, summary=summary)
