"""Compares the TensorBoard curves of two runs: scalars tag by tag and step by step, and logged images and texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from f3rm_verify.assets import Assets, CurvePair, keep_series
from f3rm_verify.bits import bit_equal, difference_summary, float_difference, outside
from f3rm_verify.difference import Difference, Verdict
from f3rm_verify.errors import UnreadableError
from f3rm_verify.picture_assets import keep_pictures
from f3rm_verify.picture_measures import picture_difference
from f3rm_verify.policy import Limit, Policy, judge
from f3rm_verify.readers.events import Blob, Events, Series
from f3rm_verify.readers.images import decode
from f3rm_verify.run_dir import RunDir

TRAIN_LOSS = "Train Loss"

Steps = NDArray[np.int64]


def compare_curves(reference: RunDir, candidate: RunDir, *, policy: Policy, assets: Assets | None = None) -> Difference:
    """A node for each tag that either side has, for each event file that is broken, for each side without events.

    The values of scalars that differ are kept in `assets`, and those that a person wants to see in any case.
    """
    assets = assets or Assets()
    children: list[Difference] = []
    events: list[Events] = []
    for side, run in (("reference", reference), ("candidate", candidate)):
        try:
            events.append(run.events)
        except UnreadableError as error:
            children.append(_leaf(f"{side} event files", Verdict.UNREADABLE, str(error)))
        else:
            children.extend(_faults(side, run.events))
    if len(events) == 2:
        tags = sorted({tag for side in events for tag in (*side.scalars, *side.blobs)})
        children.extend(_compare_tag(tag, *events, policy=policy, assets=assets) for tag in tags)
    return Difference.group(name="curves", artefact="curves", children=children)


def all_nan_losses(run: RunDir) -> bool | None:
    """Whether every value of the training loss is NaN; None where none was logged."""
    losses = _train_loss(run)
    return None if losses is None else bool(np.isnan(losses.values).all())


def observed_steps(run: RunDir) -> tuple[int, int] | None:
    """First and last step for which a training loss was logged (0-based); None where none was."""
    losses = _train_loss(run)
    return None if losses is None else (int(losses.steps.min()), int(losses.steps.max()))


def first_divergent_curve(node: Difference) -> tuple[int, str] | None:
    """The first step at which a scalar differs and its tag, in the tree that `compare_curves` made.

    At the same step the training loss is named before its parts, these before other losses, and metrics last.
    """
    found = [
        (leaf.measures["first_step"], _rank(path[1]), path[1])
        for path, leaf in node.leaves()
        if len(path) > 1 and leaf.verdict is Verdict.DIFFERENT and leaf.measures.get("kind") == "scalar"
        if leaf.measures.get("first_step") is not None
    ]
    if not found:
        return None
    step, _, tag = min(found)
    return step, tag


def _rank(tag: str) -> int:
    if tag == TRAIN_LOSS:
        return 0
    return 1 if tag.startswith("Train Loss") else 2 if "loss" in tag.lower() else 3


def _train_loss(run: RunDir) -> Series | None:
    try:
        return run.events.scalars.get(TRAIN_LOSS)
    except UnreadableError:
        return None


def _leaf(name: str, verdict: Verdict, summary: str, **measures: Any) -> Difference:
    return Difference(name=name, artefact="curves", verdict=verdict, summary=summary, measures=measures)


def _faults(side: str, events: Events) -> Iterator[Difference]:
    """What is wrong with the event files of one side as such."""
    for name, problem in events.problems.items():
        yield _leaf(f"{side} {name}", Verdict.UNREADABLE, problem)
    if not events.scalars and not events.blobs:
        yield _leaf(f"{side} events", Verdict.MISSING, f"the {side} has no TensorBoard events")


def _shown_in_any_case(tag: str) -> bool:
    return tag == TRAIN_LOSS or "psnr" in tag.lower()


def _compare_tag(tag: str, reference: Events, candidate: Events, *, policy: Policy, assets: Assets) -> Difference:
    sides = (reference, candidate)
    reason = policy.reason_to_ignore("curves", tag)
    if reason is not None:
        having = [tag in events.scalars or tag in events.blobs for events in sides]
        summary = reason if all(having) else f"{reason}; only the {'reference' if having[0] else 'candidate'} has it"
        return _leaf(tag, Verdict.IGNORED, summary)
    scalars = [events.scalars.get(tag) for events in sides]
    records = [_Records(events.blobs[tag]) if tag in events.blobs else None for events in sides]
    limit = policy.limit("curves", tag)
    if scalars == [None, None]:
        return _compare_records(tag, *records, limit=limit, assets=assets)
    name = tag if records == [None, None] else "scalars"
    node = _compare_scalars(name, *scalars, limit=limit)
    if node.verdict is not Verdict.IDENTICAL or _shown_in_any_case(tag):
        node = _with_series(node, *scalars, assets=assets)
    if records == [None, None]:
        return node
    parts = (node, _compare_records("records", *records, limit=limit, assets=assets))
    return Difference.group(name=tag, artefact="curves", children=parts)


@dataclass(frozen=True, eq=False)
class _Alignment:
    """Indices of the records that both sides have, and of those that one has, ascending by step.

    Records belong together by step and by how often that step came before, which a restarted run repeats.
    """

    reference: NDArray[np.intp]
    candidate: NDArray[np.intp]
    steps: Steps
    only_reference: Steps
    only_candidate: Steps

    @property
    def extra(self) -> dict[str, int]:
        """How many records only one side has, where any."""
        counts = {"n_only_reference": self.only_reference.size, "n_only_candidate": self.only_candidate.size}
        return {key: count for key, count in counts.items() if count}

    def last_step_before(self, step: int) -> int | None:
        """The last common step before `step`."""
        earlier = self.steps[self.steps < step]
        return int(earlier[-1]) if earlier.size else None


def _align(reference: Steps, candidate: Steps) -> _Alignment:
    # (step, occurrence) as one integer, so that NumPy can intersect them.
    both = np.concatenate([reference, candidate])
    codes = np.unique(both, return_inverse=True)[1].reshape(both.shape).astype(np.int64)
    a, b = (side * both.size + _occurrences(side) for side in (codes[: reference.size], codes[reference.size :]))
    _, in_reference, in_candidate = np.intersect1d(a, b, assume_unique=True, return_indices=True)
    return _Alignment(
        reference=in_reference,
        candidate=in_candidate,
        steps=reference[in_reference],
        only_reference=np.sort(np.delete(reference, in_reference)),
        only_candidate=np.sort(np.delete(candidate, in_candidate)),
    )


def _occurrences(codes: Steps) -> Steps:
    """For each value how many equal ones precede it."""
    order = np.argsort(codes, kind="stable")
    _, starts, counts = np.unique(codes[order], return_index=True, return_counts=True)
    occurrences = np.empty_like(codes)
    occurrences[order] = np.arange(codes.size) - np.repeat(starts, counts)
    return occurrences


def _only_one_side(name: str, reference: Series | _Records | None, candidate: Series | _Records | None) -> Difference:
    present = candidate if reference is None else reference
    assert present is not None
    side, other = ("candidate", "reference") if reference is None else ("reference", "candidate")
    kind = present.kind if isinstance(present, _Records) else "scalar"
    steps = present.steps
    summary = f"only the {side} has it ({steps.size} records, steps {steps.min()} to {steps.max()})"
    return _leaf(name, Verdict.MISSING, summary, kind=kind, n=0, missing_in=other)


def _compare_scalars(
    name: str, reference: Series | None, candidate: Series | None, *, limit: Limit | None
) -> Difference:
    if reference is None or candidate is None:
        return _only_one_side(name, reference, candidate)
    if reference.values.dtype != candidate.values.dtype:
        kinds = f"{reference.values.dtype.name} in the reference, {candidate.values.dtype.name} in the candidate"
        return _leaf(name, Verdict.DIFFERENT, f"written as {kinds}", kind="scalar")
    aligned = _align(reference.steps, candidate.steps)
    a, b = reference.values[aligned.reference], candidate.values[aligned.candidate]
    differing = np.flatnonzero(_bits(a) != _bits(b))
    if differing.size:
        return _different_scalars(name, aligned, a, b, differing, limit)
    return _equal_so_far(name, "scalar", aligned)


def _with_series(node: Difference, reference: Series | None, candidate: Series | None, *, assets: Assets) -> Difference:
    """The node with the name of its values, where both sides have some and they are kept."""
    if not assets.wanted or reference is None or candidate is None:
        return node
    aligned = _align(reference.steps, candidate.steps)
    only_reference = np.delete(np.arange(reference.steps.size), aligned.reference)
    only_candidate = np.delete(np.arange(candidate.steps.size), aligned.candidate)
    series = CurvePair(
        steps=aligned.steps,
        reference=reference.values[aligned.reference],
        candidate=candidate.values[aligned.candidate],
        reference_only_steps=reference.steps[only_reference],
        reference_only=reference.values[only_reference],
        candidate_only_steps=candidate.steps[only_candidate],
        candidate_only=candidate.values[only_candidate],
    )
    return dataclasses.replace(node, measures={**node.measures, **keep_series(assets, series)})


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    return values.view(np.dtype(f"u{values.dtype.itemsize}"))


def _different_scalars(
    name: str, aligned: _Alignment, a: NDArray[Any], b: NDArray[Any], differing: NDArray[np.intp], limit: Limit | None
) -> Difference:
    """The node of a tag whose common records differ; what only one side has is worse than what is within limits."""
    measures = float_difference(a, b, limits=limit)
    at, first = measures.pop("at"), int(differing[0])
    step = int(aligned.steps[first])
    extent = difference_summary({**measures, "at": None})
    verdict, note = judge(limit, outside=measures.get("n_outside", 0))
    if verdict is Verdict.WITHIN_TOLERANCE and aligned.extra:
        verdict = Verdict.MISSING
        note += f", but {' and '.join(_extras(aligned))}"
    elif limit is not None and verdict is Verdict.DIFFERENT:
        beyond = int(differing[outside(a[differing], b[differing], limit)][0])
        measures["first_step_outside"] = int(aligned.steps[beyond])
        note += f" from step {measures['first_step_outside']} on"
    return _leaf(
        name,
        verdict,
        f"differs first at step {step}: {a[first]!s} against {b[first]!s}; {extent}{note}",
        kind="scalar",
        first_step=step,
        last_equal_step=aligned.last_step_before(step),
        **measures,
        at_step=int(aligned.steps[at[0]]),
        reference_value=str(a[first]),
        candidate_value=str(b[first]),
        reference_bits=_hexadecimal(a[first]),
        candidate_bits=_hexadecimal(b[first]),
        **aligned.extra,
    )


def _hexadecimal(value: np.floating[Any]) -> str:
    return "0x" + value.tobytes()[::-1].hex()  # the reader gives little-endian values


def _equal_so_far(name: str, kind: str, aligned: _Alignment, note: str = "") -> Difference:
    """The node of a tag of which all common records are equal: identical, or missing where a side has more."""
    n = int(aligned.steps.size)
    last = int(aligned.steps[-1]) if n else None
    measures = {"kind": kind, "n": n, "last_equal_step": last, **aligned.extra}
    extras = _extras(aligned)
    if not extras:
        return _leaf(name, Verdict.IDENTICAL, f"{n} equal records{note}", **measures)
    return _leaf(name, Verdict.MISSING, f"equal for {n} common steps{note}, then {' and '.join(extras)}", **measures)


def _extras(aligned: _Alignment) -> list[str]:
    """What only one side has, in words."""
    last = int(aligned.steps[-1]) if aligned.steps.size else None
    sides = (("reference", aligned.only_reference), ("candidate", aligned.only_candidate))
    return [_extra_text(side, steps, aligned.steps, last) for side, steps in sides if steps.size]


def _extra_text(side: str, steps: Steps, common: Steps, last: int | None) -> str:
    if last is not None and steps[0] > last:
        return f"only the {side} goes on to {steps[-1]}"
    again = ", steps that it wrote again after a restart" if np.isin(steps, common).all() else ""
    return f"only the {side} has {steps.size} more, from step {steps[0]} to {steps[-1]}{again}"


@dataclass(frozen=True, eq=False)
class _Records:
    """A tag that holds no scalars."""

    blobs: Sequence[Blob]

    @property
    def steps(self) -> Steps:
        return np.array([step for step, _, _ in self.blobs], np.int64)

    @property
    def kind(self) -> str:
        """What the tag holds, by its first record."""
        return self.blobs[0][1]


def _compare_records(
    name: str, reference: _Records | None, candidate: _Records | None, *, limit: Limit | None, assets: Assets
) -> Difference:
    """Compares bytes, and where the bytes of images differ, pixels, up to the first record beyond its limits."""
    if reference is None or candidate is None:
        return _only_one_side(name, reference, candidate)
    aligned = _align(reference.steps, candidate.steps)
    pairs = zip(aligned.reference, aligned.candidate, strict=True)
    unequal = [(a, b) for i, j in pairs if (a := reference.blobs[i]) != (b := candidate.blobs[j])]
    n_recoded = n_within = 0
    unreadable: dict[int, str] = {}
    for index, pair in enumerate(unequal):
        try:
            verdict, found = _record_difference(*pair, limit, assets)
        except UnreadableError as error:
            unreadable[pair[0][0]] = str(error)
            continue
        if verdict is Verdict.WITHIN_TOLERANCE:
            n_within += 1
        elif found is not None:
            last_equal = aligned.last_step_before(min([pair[0][0], *unreadable]))
            found |= {"last_equal_step": last_equal, "n_different": len(unequal) - index}
            return _different_records(name, aligned, pair[0], found)
        else:
            n_recoded += 1
    if unreadable:
        step, reason = min(unreadable.items())
        summary = f"the images at step {step} differ, and one cannot be decoded: {reason}"
        return _leaf(name, Verdict.UNREADABLE, summary, kind=reference.kind, n=int(aligned.steps.size))
    note = f" ({n_recoded} with the same pixels, only encoded otherwise)" if n_recoded else ""
    if n_within:
        note += f" ({n_within} within the limits of {limit})"
    equal = _equal_so_far(name, reference.kind, aligned, note)
    within = n_within and equal.verdict is Verdict.IDENTICAL
    return dataclasses.replace(equal, verdict=Verdict.WITHIN_TOLERANCE) if within else equal


def _different_records(name: str, aligned: _Alignment, first: Blob, found: dict[str, Any]) -> Difference:
    step, kind, _ = first
    what = found.pop("what")
    n = int(aligned.steps.size)
    summary = f"differs first at step {step}: {what}; {found['n_different']} of {n} records differ"
    measures = {"kind": kind, "first_step": step, "n": n, **found, **aligned.extra}
    return _leaf(name, Verdict.DIFFERENT, summary, **measures)


def _record_difference(
    reference: Blob, candidate: Blob, limit: Limit | None, assets: Assets
) -> tuple[Verdict, dict[str, Any] | None]:
    """Verdict and measures of two records whose bytes differ; no measures for images of the same pixels.

    Raises UnreadableError where an image cannot be decoded, since nobody can tell then whether it differs.
    """
    step, kind, payload = reference
    if kind != candidate[1]:
        return Verdict.DIFFERENT, {"what": f"{kind} against {candidate[1]}"}
    if kind != "image":
        return Verdict.DIFFERENT, {"what": f"{kind} of {len(payload)} bytes against {len(candidate[2])}"}
    a, b = (decode(data, f"step-{step}{_image_suffix(data)}") for data in (payload, candidate[2]))
    if (a.layout, a.values.shape, a.values.dtype) != (b.layout, b.values.shape, b.values.dtype):
        what = f"{a.layout} of shape {a.values.shape} against {b.layout} of shape {b.values.shape}"
        return Verdict.DIFFERENT, {"what": what, **keep_pictures(assets, (payload, candidate[2]), (a, b))}
    if bit_equal(a.values, b.values):
        return Verdict.IDENTICAL, None
    found = picture_difference(a.values, b.values, limits=limit)
    verdict, note = judge(limit, outside=found.outside, psnr=found.psnr)
    measures = dict(found.measures)
    pixels = {"n_pixels": measures.pop("n"), "n_different_pixels": measures.pop("n_different")}
    what = f"{pixels['n_different_pixels']} of {pixels['n_pixels']} pixels{note}"
    if verdict is Verdict.DIFFERENT:
        measures |= keep_pictures(assets, (payload, candidate[2]), (a, b), found)
    return verdict, {"what": what, **pixels, **measures}


def _image_suffix(data: bytes) -> str:
    return ".jpg" if data.startswith(b"\xff\xd8") else ".png"
