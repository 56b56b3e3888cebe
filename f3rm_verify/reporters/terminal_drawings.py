"""What the page of --html draws, for a terminal: a curve of both sides and their distance, and a picture that differs.

In Unicode's characters alone, braille dots and half blocks, in as many columns as there are: nothing is asked of the
terminal, so nothing can hang or be left on a remote one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rich.text import Text

from f3rm_verify.assets import Assets, asset_names
from f3rm_verify.difference import Difference, Result
from f3rm_verify.reporters.curves import Curve, curve_nodes, read_curve
from f3rm_verify.reporters.pictures import picture_nodes

Array = npt.NDArray[np.generic]
Dots = npt.NDArray[np.bool_]

#: Rows of characters of both parts of a drawing, and columns of the numbers before them.
_SIDES_ROWS, _DISTANCE_ROWS, _LABEL = 6, 3, 11
#: Narrower, nothing could be seen.
_LEAST_COLUMNS = 30
_MOST_COLUMNS = 100
#: Columns and rows of each of three pictures.
_PICTURE_COLUMNS, _PICTURE_ROWS = 36, 16
_MAX_PIXELS = 2**26
_STRETCHES = 2 * _MOST_COLUMNS
#: Bits of a braille character by row and column of its 4 x 2 dots; https://www.unicode.org/charts/PDF/U2800.pdf
_BRAILLE = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
_STYLES = {"reference": "cyan", "candidate": "yellow"}


def drawn_curve(result: Result, assets: Assets) -> Curve | None:
    """The curve that a person wants to see first: that of the first divergence, else the worst, else the first."""
    first = result.first_divergence
    nodes = curve_nodes(result)
    nodes.sort(key=lambda item: first is None or item[0][-1] != first.subject)  # stable: worst first
    found = (read_curve(path, node, assets) for path, node in nodes[:20])
    return next((curve for curve in found if curve is not None and curve.steps.size > 1), None)


def curve_lines(curve: Curve, width: int) -> list[Text]:
    """Both sides, cyan and yellow where they are apart, and where any value differs, their distance on a log scale."""
    columns = min(width - _LABEL, _MOST_COLUMNS)
    if columns < _LEAST_COLUMNS:
        return []
    curve = curve.thinned(_STRETCHES)
    place = _places(curve.steps, 2 * columns)
    lines = _both(curve, place, columns)
    if curve.differs.any():
        lines += _distance(curve, place, columns)
    ends = f"{curve.steps[0]}", f"{curve.steps[-1]}"
    lines.append(Text(f"{'step':>{_LABEL - 1}} {ends[0]}{ends[1]:>{columns - len(ends[0])}}", "dim"))
    if curve.first_step is not None:
        at = int(place[np.flatnonzero(curve.differs)[0]]) // 2
        lines.append(Text(" " * (_LABEL + at) + f"^ first at step {curve.first_step}", "red"))
    return lines


def _places(steps: Array, dots: int) -> npt.NDArray[np.int64]:
    span = np.asarray(steps - steps[0], np.float64)
    return np.asarray(np.rint(span / max(span.max(), 1) * (dots - 1)), np.int64)


def _both(curve: Curve, place: npt.NDArray[np.int64], columns: int) -> list[Text]:
    values = np.concatenate([curve.reference, curve.candidate])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    sides = [_dots(side, place, low, high, _SIDES_ROWS, columns) for side in (curve.reference, curve.candidate)]
    lines = []
    for row in range(_SIDES_ROWS):
        line = _label(high if row == 0 else low if row == _SIDES_ROWS - 1 else None)
        for column in range(columns):
            a, b = (_character(side, row, column) for side in sides)
            style = "" if a == b else _STYLES["reference"] if not b else _STYLES["candidate"]
            line.append(chr(0x2800 + (a | b)), style)
        lines.append(line)
    return lines


def _distance(curve: Curve, place: npt.NDArray[np.int64], columns: int) -> list[Text]:
    with np.errstate(all="ignore"):
        values = np.log10(curve.distance)
    drawable = values[np.isfinite(values)]
    if not drawable.size:
        return [Text(f"{'distance':>{_LABEL - 1}} none that could be drawn: NaN, infinity or the sign of zero", "dim")]
    low, high = float(drawable.min()), float(drawable.max())
    dots = _dots(values, place, low, high, _DISTANCE_ROWS, columns)
    lines = []
    for row in range(_DISTANCE_ROWS):
        line = _label(10**high if row == 0 else 10**low if row == _DISTANCE_ROWS - 1 else None)
        line.append("".join(chr(0x2800 + _character(dots, row, column)) for column in range(columns)), "red")
        lines.append(line)
    return lines


def _label(value: float | None) -> Text:
    return Text(f"{'' if value is None else f'{value:.4g}':>{_LABEL - 1}} ", "dim")


def _dots(
    values: npt.NDArray[np.float64], place: npt.NDArray[np.int64], low: float, high: float, rows: int, columns: int
) -> Dots:
    """A line through the values, (4 x rows, 2 x columns); a gap where a value is not finite."""
    dots = np.zeros((4 * rows, 2 * columns), np.bool_)
    with np.errstate(all="ignore"):
        scaled = (high - values) / (high - low) if high > low else np.full(values.shape, 0.5)
    scaled[~np.isfinite(values)] = np.nan
    heights = scaled * (4 * rows - 1)
    for i, height in enumerate(heights):
        if not math.isfinite(height):
            continue
        dots[round(height), place[i]] = True
        if i and math.isfinite(heights[i - 1]):
            for x in range(int(place[i - 1]), int(place[i])):
                share = (x - place[i - 1]) / (place[i] - place[i - 1])
                dots[round(heights[i - 1] + share * (height - heights[i - 1])), x] = True
    return dots


def _character(dots: Dots, row: int, column: int) -> int:
    return int((_BRAILLE * dots[4 * row : 4 * row + 4, 2 * column : 2 * column + 2]).sum())


def drawn_picture(result: Result) -> tuple[tuple[str, ...], Difference] | None:
    """The picture that differs most, as the path and the node."""
    return next((item for item in picture_nodes(result) if "heat" in asset_names(item[1])), None)


def picture_lines(node: Difference, assets: Assets, width: int) -> list[Text]:
    """Reference, candidate and heat map side by side in half blocks; none where there is no room or no picture."""
    columns = min((width - 4) // 3, _PICTURE_COLUMNS)
    names = asset_names(node)
    shown = [_pixels(assets.read(names.get(view)), columns, most=view == "heat") for view in _VIEWS]
    if columns < _LEAST_COLUMNS // 3 or any(pixels is None for pixels in shown):
        return []
    pictures = [pixels for pixels in shown if pixels is not None]
    if len({pixels.shape for pixels in pictures}) > 1:
        return []
    lines = [Text("  ".join(f"{view:<{columns}}" for view in _VIEWS), "dim")]
    for row in range(0, len(pictures[0]) - 1, 2):
        line = Text()
        for number, pixels in enumerate(pictures):
            line.append("  " if number else "")
            for upper, lower in zip(pixels[row], pixels[row + 1], strict=True):
                line.append("\u2580", f"{_hex(upper)} on {_hex(lower)}")
        lines.append(line)
    return lines


_VIEWS = ("reference", "candidate", "heat")


def _hex(colour: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _pixels(content: bytes | None, columns: int, *, most: bool) -> npt.NDArray[np.uint8] | None:
    """The picture as (even number of rows, columns, 3); with `most`, a pixel is the hottest of those it stands for."""
    from PIL import Image

    if content is None:
        return None
    try:
        image = Image.open(io.BytesIO(content))
        if math.prod(image.size) > _MAX_PIXELS:
            return None
        rows = round(columns * image.height / image.width / 2) or 1
        rows = min(rows, _PICTURE_ROWS)
        if most and image.mode == "P":
            return _hottest(image, 2 * rows, columns)
        return np.asarray(image.convert("RGB").resize((columns, 2 * rows), Image.Resampling.BOX))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # not one of ours
        return None


def _hottest(image: object, rows: int, columns: int) -> npt.NDArray[np.uint8]:
    """By the index in the palette, which rises with the distance: a single pixel that differs is seen in any size."""
    index = np.asarray(image)
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)  # type: ignore[attr-defined]
    edges = [np.linspace(0, size, count + 1) for size, count in zip(index.shape, (rows, columns), strict=True)]
    spans = [[(int(a), max(int(a) + 1, math.ceil(b))) for a, b in zip(e[:-1], e[1:], strict=True)] for e in edges]
    found = [[index[top:bottom, left:right].max() for left, right in spans[1]] for top, bottom in spans[0]]
    return palette[np.minimum(np.array(found), len(palette) - 1)]
