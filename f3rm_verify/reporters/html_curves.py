"""Curves in the page: their data for plotly; a small drawing of each for the list, print and pages without script."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from f3rm_verify import reporters as words
from f3rm_verify.assets import Assets
from f3rm_verify.difference import Difference, Result
from f3rm_verify.reporters.curves import Curve, curve_name, curve_nodes, read_curve

Array = npt.NDArray[Any]

#: Tags in the page; the result file has every one.
_MAX_CURVES = 100
#: Stretches of a long curve of each of which up to five records are drawn: in the chart, and in the small drawing.
_CHART_STRETCHES, _SKETCH_STRETCHES = 400, 40
#: Size of the small drawing, and top and bottom of its two parts: both sides, and the logarithm of their distance.
_WIDTH, _SIDES, _DISTANCE = 200.0, (4.0, 56.0), (66.0, 96.0)


def curve_rows(result: Result, assets: Assets) -> tuple[list[dict[str, Any]], int]:
    """What the template shows of each curve, worst first, and how many more there are.

    `chart` is what the script draws; None where the values are missing.
    """
    nodes = curve_nodes(result)
    return [_row(path, node, assets) for path, node in nodes[:_MAX_CURVES]], max(len(nodes) - _MAX_CURVES, 0)


def plotly_script() -> bytes:
    """Plotly for a browser, as plotly's Python package brings it."""
    return (resources.files("plotly") / "package_data" / "plotly.min.js").read_bytes()


def _row(path: tuple[str, ...], node: Difference, assets: Assets) -> dict[str, Any]:
    curve = read_curve(path, node, assets)
    return {
        "verdict": node.verdict.value.replace("_", " "),
        "name": curve_name(path),
        "summary": words.summary_of(node),
        "chart": None if curve is None else _chart(curve),
        "sketch": None if curve is None else _sketch(curve.thinned(_SKETCH_STRETCHES)),
    }


def _chart(curve: Curve) -> dict[str, Any]:
    drawn = curve.thinned(_CHART_STRETCHES)
    return {
        "name": curve.name,
        "summary": curve.summary,
        "first": curve.first_step,
        "thinned": None if drawn.steps.size == curve.n else [drawn.steps.size, curve.n],
        "steps": drawn.steps.tolist(),
        "reference": _numbers(drawn.reference),
        "candidate": _numbers(drawn.candidate),
        "distance": _numbers(drawn.distance),
        "odd": drawn.steps[drawn.odd].tolist(),
        "only": {side: [steps.tolist(), _numbers(values)] for side, (steps, values) in drawn.only.items()},
    }


def _numbers(values: Array) -> list[float | None]:
    """As JSON: null for what is not finite; 9 digits, which tell any two float32 apart."""
    return [float(f"{value:.9g}") if math.isfinite(value) else None for value in values.tolist()]


def _sketch(curve: Curve) -> dict[str, Any]:
    """Paths of an SVG of 200 x 100, and where the first step that differs is."""
    parts = [(curve.steps, curve.reference), (curve.steps, curve.candidate), *curve.only.values()]
    steps = np.concatenate([each.astype(np.float64) for each, _ in parts])
    values = np.concatenate([each for _, each in parts])
    x, y = _scale(steps, (2.0, _WIDTH - 2.0)), _scale(values, _SIDES[::-1])
    with np.errstate(all="ignore"):
        distance = np.log(curve.distance)
    below = _scale(distance, _DISTANCE[::-1])
    sides = {"reference": curve.reference, "candidate": curve.candidate}
    paths = {side: [_path(x(curve.steps), y(each))] for side, each in sides.items()}
    for side, (own, each) in curve.only.items():
        paths[side].append(_path(x(own), y(each)))
    first = curve.first_step
    return {
        **{side: " ".join(filter(None, each)) for side, each in paths.items()},
        "distance": _path(x(curve.steps), below(distance)),
        "odd": _path(x(curve.steps), np.where(curve.odd, _DISTANCE[0], np.nan)),
        "first": None if first is None else f"{float(x(np.array([first]))[0]):.1f}",
    }


def _scale(values: Array, to: tuple[float, float]) -> Any:
    """A function from the span of the finite values to `to`; to its middle where they are all equal."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)

    def scaled(each: Array) -> Array:
        with np.errstate(all="ignore"):
            share = (each / 2 - low / 2) / (high / 2 - low / 2) if high > low else each * 0 + 0.5
        return np.asarray(to[0] + share * (to[1] - to[0]))

    return scaled


def _path(x: Array, y: Array) -> str:
    """A line through the finite points, broken at the others; a lone point is a line of no length, drawn as a dot."""
    return "".join(_segments(x.tolist(), y.tolist()))


def _segments(x: list[float], y: list[float]) -> Iterator[str]:
    drawing = False
    for i, (across, down) in enumerate(zip(x, y, strict=True)):
        if not math.isfinite(down):
            drawing = False
            continue
        alone = not drawing and not (i + 1 < len(y) and math.isfinite(y[i + 1]))
        yield f"{'L' if drawing else 'M'}{across:.1f} {down:.1f}{'h0' if alone else ''}"
        drawing = True
