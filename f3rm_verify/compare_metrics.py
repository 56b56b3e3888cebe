"""Compares the evaluation metrics of two runs (PSNR, SSIM, LPIPS) exactly, image by image."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from f3rm_verify.bits import difference_summary, float_difference
from f3rm_verify.difference import Difference, Verdict, count_summary
from f3rm_verify.errors import UnreadableError
from f3rm_verify.policy import Limit, Policy, judge
from f3rm_verify.run_dir import RunDir

#: Integers up to here are exact as float64, so comparing float64 compares them.
_EXACT = 2**53
SIDES = ("reference", "candidate")
Reasons = Mapping[str, str]


def compare_metrics(reference: RunDir, candidate: RunDir, *, policy: Policy) -> Difference:
    """Groups `images` (one for each image) and `mean` with a node for each metric, and `split`.

    A metric that is unavailable to both sides for one reason is an ignored node of `mean`. Where neither side has
    metrics the group is empty.
    """
    children: list[Difference] = []
    sides: list[Mapping[str, Any] | None] = []
    for side, run in zip(SIDES, (reference, candidate), strict=True):
        try:
            sides.append(run.metrics)
        except UnreadableError as error:
            children.append(_leaf(side, Verdict.UNREADABLE, str(error)))
    if not children and sides != [None, None]:
        children.extend(_compare_sides(*sides, policy=policy))
    means = _means(children)
    summary = f"{count_summary(children)}; {means}" if means else ""
    return Difference.group(name="metrics", artefact="metrics", children=children, summary=summary)


def _means(children: Iterable[Difference]) -> str:
    """The means that are equal on both sides, for people: "psnr 27.4, ssim 0.9599"."""
    mean = next((child for child in children if child.name == "mean"), None)
    leaves = mean.children if mean is not None else ()
    equal = (leaf for leaf in leaves if leaf.verdict is Verdict.IDENTICAL)
    return ", ".join(f"{leaf.name} {leaf.measures['value']:.4g}" for leaf in equal)


def _leaf(name: str, verdict: Verdict, summary: str, **measures: Any) -> Difference:
    return Difference(name=name, artefact="metrics", verdict=verdict, summary=summary, measures=measures)


def _group(name: str, children: Iterable[Difference]) -> Difference:
    return Difference.group(name=name, artefact="metrics", children=children)


def _compare_sides(
    reference: Mapping[str, Any] | None, candidate: Mapping[str, Any] | None, *, policy: Policy
) -> list[Difference]:
    if reference is None or candidate is None:
        side = "reference" if reference is None else "candidate"
        return [_leaf(side, Verdict.MISSING, f"the {side} has no metrics")]
    children = [_compare_split(reference.get("split"), candidate.get("split"))]
    reasons = _reasons(reference), _reasons(candidate)
    if reasons[0] is None or reasons[1] is None:
        children.append(_leaf("unavailable", Verdict.UNREADABLE, "not an object of reasons by metric"))
    why = reasons[0] or {}, reasons[1] or {}
    images = reference.get("images", {}), candidate.get("images", {})
    if images != ({}, {}):
        children.append(_compare_images(*images, why=why, policy=policy))
    means = reference.get("mean", {}), candidate.get("mean", {})
    children.append(_compare_values("mean", *means, names={*why[0], *why[1]}, why=why, policy=policy))
    return children


def _reasons(metrics: Mapping[str, Any]) -> Reasons | None:
    """Why metrics are unavailable, by metric; None where the file holds something else there."""
    data = metrics.get("unavailable", {})
    if not isinstance(data, dict) or not all(isinstance(reason, str) for reason in data.values()):
        return None
    return data


def _compare_split(reference: Any, candidate: Any) -> Difference:
    for side, split in zip(SIDES, (reference, candidate), strict=True):
        if not isinstance(split, str):
            return _leaf("split", Verdict.UNREADABLE, f"the {side} does not say which images it was evaluated on")
    if reference != candidate:
        return _leaf("split", Verdict.DIFFERENT, f"evaluated on {reference!r} against {candidate!r}")
    return _leaf("split", Verdict.IDENTICAL, f"both evaluated on {reference!r}")


def _compare_images(reference: Any, candidate: Any, *, why: tuple[Reasons, Reasons], policy: Policy) -> Difference:
    broken = _not_an_object("images", reference, candidate)
    if broken is not None:
        return broken
    children = []
    for name in sorted({*reference, *candidate}):
        if name not in reference or name not in candidate:
            side = "reference" if name in reference else "candidate"
            children.append(_leaf(name, Verdict.MISSING, f"only the {side} has metrics of this image"))
        else:
            sides = reference[name], candidate[name]
            children.append(_compare_values(name, *sides, why=why, policy=policy, path="images/"))
    return _group("images", children)


def _not_an_object(name: str, reference: Any, candidate: Any) -> Difference | None:
    for side, data in zip(SIDES, (reference, candidate), strict=True):
        if not isinstance(data, dict):
            return _leaf(name, Verdict.UNREADABLE, f"{name} of the {side} is {type(data).__name__}, not an object")
    return None


def _compare_values(
    name: str,
    reference: Any,
    candidate: Any,
    *,
    names: Collection[str] = (),
    why: tuple[Reasons, Reasons],
    policy: Policy,
    path: str = "",
) -> Difference:
    """The metrics of one image, or their means; `names` are metrics that get a node even where no side has them."""
    broken = _not_an_object(name, reference, candidate)
    if broken is not None:
        return broken
    children = []
    for metric in sorted({*reference, *candidate, *names}):
        values = reference.get(metric), candidate.get(metric)
        reasons = why[0].get(metric), why[1].get(metric)
        ignored = policy.reason_to_ignore("metrics", metric)
        limit = policy.limit("metrics", metric, f"{path}{name}/{metric}")
        children.append(_compare_metric(metric, values, reasons, ignored, limit))
    return _group(name, children)


def _compare_metric(
    name: str,
    values: tuple[Any, Any],
    why: tuple[str | None, str | None],
    ignored: str | None,
    limit: Limit | None,
) -> Difference:
    """One metric; a value is None where the side has none or a null, and `why` then may say why."""
    if ignored is not None:
        lacking = [side for side, value in zip(SIDES, values, strict=True) if value is None]
        return _leaf(name, Verdict.IGNORED, ignored + (f"; the {lacking[0]} has none" if len(lacking) == 1 else ""))
    for side, value in zip(SIDES, values, strict=True):
        problem = None if value is None else _problem(value)
        if problem is not None:
            return _leaf(name, Verdict.UNREADABLE, f"the value of the {side} {problem}")
    if None in values:
        return _without_value(name, values, why)
    return _compare_numbers(name, float(values[0]), float(values[1]), limit)


def _problem(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"is {type(value).__name__}, not a number"
    if isinstance(value, int) and abs(value) > _EXACT:
        return "is an integer too large for a metric"
    return None


def _without_value(name: str, values: tuple[Any, Any], why: tuple[str | None, str | None]) -> Difference:
    if values == (None, None):
        if why[0] is not None and why[0] == why[1]:
            return _leaf(name, Verdict.IGNORED, why[0])
        summary = f"no value: {why[0] or 'no reason given'} (reference), {why[1] or 'no reason given'} (candidate)"
        return _leaf(name, Verdict.MISSING, summary)
    side, reason = ("reference", why[0]) if values[0] is None else ("candidate", why[1])
    return _leaf(name, Verdict.MISSING, f"the {side} has no value" + (f": {reason}" if reason else ""))


def _compare_numbers(name: str, reference: float, candidate: float, limit: Limit | None) -> Difference:
    a, b = np.array([reference], np.float64), np.array([candidate], np.float64)
    if a.tobytes() == b.tobytes():
        return _leaf(name, Verdict.IDENTICAL, repr(reference), value=reference)
    measures = float_difference(a, b, limits=limit)
    del measures["at"]
    verdict, note = judge(limit, outside=measures.get("n_outside", 0))
    summary = f"{reference!r} against {candidate!r}; {difference_summary({**measures, 'at': None})}{note}"
    measures |= {"reference_value": repr(reference), "candidate_value": repr(candidate)}
    return _leaf(name, verdict, summary, **measures)
