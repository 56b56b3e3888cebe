"""How two pictures or maps of one size differ: how many pixels and where, how much, in what pattern; docs/report.md.

Works in strips of rows, so that pictures of many megapixels need no copies of themselves in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from f3rm_verify import bits

Array = npt.NDArray[Any]

#: Rows and columns of the window in which the density of differing pixels is taken.
REGION = 32
#: SSIM of more pixels than 4K has takes seconds.
_MAX_SSIM_PIXELS = 2**23
_SSIM_WINDOW = 7
#: K1 and K2 of Wang et al. 2004, as everywhere.
_SSIM_CONSTANTS = (0.01, 0.03)
_STRIP_VALUES = 2**16
#: From about this share on, pixels that are strewn at random (8 neighbours) are connected by chance.
_PERCOLATES = 0.4
#: More channels than colours, depth and masks have: features.
_MOST_CHANNELS = 4


@dataclass(frozen=True, eq=False)
class PictureDifference:
    """`measures` are plain JSON data; `mask` (H, W) is true where any bit of a pixel differs.

    `flip` (H, W), float32 in [0, 1], is the FLIP map, where it was asked for and could be made.
    `distance` (H, W), float32, is the largest |a - b| of a pixel's channels; NaN and infinite distances are infinite.
    """

    measures: Mapping[str, Any]
    mask: Array
    distance: Array
    flip: Array | None = None

    @property
    def outside(self) -> float:
        """The share of pixels that break the limits; all that differ, where none were given."""
        count = self.measures.get("n_outside", self.measures["n_different"])
        return float(count / self.measures["n"])

    @property
    def psnr(self) -> float | None:
        """In dB; infinite where the differences vanish in double precision, None where it is not known."""
        psnr = self.measures.get("psnr")
        return math.inf if self.measures.get("severity") == 0 else psnr


def picture_difference(
    a: Array, b: Array, *, limits: bits.ValueLimits | None = None, flip: bool = False
) -> PictureDifference:
    """Compares two arrays of one dtype and shape, (H, W) or (H, W, C), that differ in at least one bit.

    The measures are those of `bits.float_difference`, but `n`, `n_different` and `n_outside` count pixels, and
    `n_values...` their channels; and besides

    - `share`: of differing pixels. `region`: [row, column, height, width] of the 32 x 32 window (or what fits) with the
      most of them, the one with the largest sum of distances where several have; `region_share`: of it.
    - `n_patches`, `largest_patch`: connected differing pixels (8 neighbours), and the pixels of the largest.
    - `correlation`: of a - b (summed over channels) between neighbouring pixels, -1 to 1; None where it is not known.
    - `speckle`, 0 to 1: 1 less the larger of the correlation and, where less than 0.4 of all pixels differ, the share
      of them in the largest patch. Near 1 for noise, near 0 for shapes, shifts and offsets.
    - `psnr` in dB, `ssim` (uniform window of 7) between the two sides, or `..._unavailable`; `data_range` is 255,
      65535, 1 for values in [0, 1], else what both sides span.
    - with `flip`: `flip_mean` of the FLIP map of colours in [0, 1] or of 8 or 16 bit, or `flip_unavailable`.
    - of more than 4 channels: `cosine_min`, `cosine_mean` of the pixels' vectors.
    - `severity`, 0 to 1: the root mean square error in units of the range; 1 where it is not finite.
    """
    data_range = _data_range(a, b)
    if a.dtype == np.bool_:  # as bytes, because a damaged file holds others than 0 and 1
        a, b = a.view(np.uint8), b.view(np.uint8)
    values = bits.float_difference(a, b, limits=limits)
    mask, distance = _mask(a, b), _distance(a, b)
    n, n_different = mask.size, int(np.count_nonzero(mask))
    counts: dict[str, Any] = {"n": n, "n_different": n_different, "share": n_different / n}
    counts |= {"n_values": values["n"], "n_values_different": values["n_different"]}
    if limits is not None:
        counts["n_outside"] = _outside_pixels(a, b, limits)
    measures = {**values, **counts, **_region(mask, distance), **_pattern(a, b, mask)}
    measures |= _similarity(a, b, data_range, mask)
    if a.ndim == 3 and a.shape[2] > _MOST_CHANNELS:
        measures |= _cosine(a, b)
    flip_map, flip_measures = _flip(a, b) if flip else (None, {})
    return PictureDifference(measures | flip_measures, mask, distance, flip_map)


def picture_summary(measures: Mapping[str, Any]) -> str:
    """The measures in words, for people."""
    values = {**measures, "n": measures["n_values"], "n_different": measures["n_values_different"]}
    text = f"{bits.difference_summary(values)}, in {measures['n_different']:,} of {measures['n']:,} pixels"
    if "psnr" in measures:
        text += f", PSNR {measures['psnr']:.1f} dB"
    if "flip_mean" in measures:
        text += f", FLIP {measures['flip_mean']:.4f}"
    if "cosine_min" in measures:
        text += f", cosine {measures['cosine_mean']:.6f} (least {measures['cosine_min']:.6f})"
    row, column, height, width = measures["region"]
    place = f"most in rows {row} to {row + height - 1}, columns {column} to {column + width - 1}"
    return f"{text}, {place}{_pattern_words(measures)}"


def _pattern_words(measures: Mapping[str, Any]) -> str:
    if measures["n_different"] == 1:
        return ""
    speckle = measures["speckle"]
    return ", as speckle" if speckle > 0.8 else ", as structure" if speckle < 0.5 else ", partly as speckle"


def _strips(a: Array, b: Array) -> Iterator[tuple[Array, Array]]:
    """Rows of both, few enough for the cache."""
    rows = max(1, _STRIP_VALUES // max(1, a[0].size))
    for start in range(0, len(a), rows):
        yield a[start : start + rows], b[start : start + rows]


def _channels(array: Array) -> list[Array]:
    """Views (H, W) of each channel."""
    return [array] if array.ndim == 2 else list(np.moveaxis(array.reshape(*array.shape[:2], -1), 2, 0))


def _mask(a: Array, b: Array) -> Array:
    """Where any bit of any channel differs."""
    unsigned = f"u{a.dtype.itemsize}"
    mask = np.zeros(a.shape[:2], np.bool_)
    for x, y in zip(_channels(a.view(unsigned)), _channels(b.view(unsigned)), strict=True):
        mask |= x != y
    return mask


def _distance(a: Array, b: Array) -> Array:
    largest = np.zeros(a.shape[:2], np.float32)
    for x, y in zip(_channels(a), _channels(b), strict=True):
        with np.errstate(all="ignore"):
            if a.dtype.kind == "f":
                found = np.abs(x - y).astype(np.float32)
                found[(x == y) | (np.isnan(x) & np.isnan(y))] = 0  # infinities on both sides, too
            else:
                found = (np.maximum(x, y) - np.minimum(x, y)).view(f"u{a.dtype.itemsize}").astype(np.float32)
        np.maximum(largest, np.nan_to_num(found, copy=False, nan=np.inf, posinf=np.inf), out=largest)
    return largest


def _outside_pixels(a: Array, b: Array, limits: bits.ValueLimits) -> int:
    count = 0
    for x, y in _strips(a, b):
        found = bits.outside(x, y, limits)
        count += int(np.count_nonzero(found.reshape(*found.shape[:2], -1).any(axis=2)))
    return count


def _window_counts(values: Array, height: int, width: int, dtype: npt.DTypeLike) -> Array:
    """Sums over all windows of that size, by the integral image."""
    integral = np.zeros((values.shape[0] + 1, values.shape[1] + 1), dtype)
    np.cumsum(values, axis=0, dtype=dtype, out=integral[1:, 1:])
    np.cumsum(integral[1:, 1:], axis=1, out=integral[1:, 1:])
    return np.asarray(
        integral[height:, width:]
        - integral[:-height, width:]
        - integral[height:, :-width]
        + integral[:-height, :-width]
    )


def _region(mask: Array, distance: Array) -> dict[str, Any]:
    """The window with the largest density of differing pixels."""
    height, width = (min(REGION, size) for size in mask.shape)
    counts = _window_counts(mask, height, width, np.int32)
    densest = counts == counts.max()
    if np.count_nonzero(densest) > 1:
        largest = distance[np.isfinite(distance)].max(initial=0) or 1
        finite = np.nan_to_num(distance, nan=largest, posinf=largest) / largest
        sums = _window_counts(finite, height, width, np.float64)
        sums[~densest] = -1
        place = int(np.argmax(sums))
    else:
        place = int(np.argmax(densest))
    row, column = (int(index) for index in np.unravel_index(place, counts.shape))
    share = int(counts[row, column]) / (height * width)
    return {"region": [row, column, height, width], "region_share": share}


def _pattern(a: Array, b: Array, mask: Array) -> dict[str, Any]:
    """Speckle or structure: patches of connected pixels, and the correlation of neighbours."""
    from scipy import ndimage

    labels, count = ndimage.label(mask, np.ones((3, 3), np.bool_))
    sizes = np.bincount(labels.ravel())[1:]
    largest, n_different = int(sizes.max()), int(sizes.sum())
    compact = largest / n_different if n_different < _PERCOLATES * mask.size else 0.0
    correlation = _neighbour_correlation(a, b)
    return {
        "n_patches": int(count),
        "largest_patch": largest,
        "correlation": correlation,
        "speckle": 1 - max(correlation or 0.0, compact, 0.0),
    }


def _neighbour_correlation(a: Array, b: Array) -> float | None:
    """Sum of products of neighbours in a row and in a column, over the mean of their squares; None where undefined."""
    total = np.zeros(a.shape[:2], np.float32)
    with np.errstate(all="ignore"):
        for x, y in zip(_channels(a), _channels(b), strict=True):
            total += (x - y) if a.dtype.kind == "f" else x.astype(np.float32) - y.astype(np.float32)
    largest = float(np.abs(total).max())
    if not 0 < largest < math.inf:
        return None
    total /= np.float32(largest)
    pairs = ((total[:, 1:], total[:, :-1]), (total[1:], total[:-1]))
    products = sum(float((x * y).sum(dtype=np.float64)) for x, y in pairs)
    squares = sum(float(np.square(side).sum(dtype=np.float64)) for pair in pairs for side in pair) / 2
    return round(products / squares, 9) if squares > 0 else 0.0


def _similarity(a: Array, b: Array, data_range: float, mask: Array) -> dict[str, Any]:
    """PSNR in dB and SSIM, or why one of them is not known; and the severity."""
    if not 0 < data_range < math.inf:
        reason = f"the values span {data_range}" if data_range == data_range else "not every value is finite"
        return {**dict.fromkeys(("psnr_unavailable", "ssim_unavailable"), reason), "severity": 1.0}
    with np.errstate(all="ignore"):
        mean = _mean_square(a, b, data_range)
        found: dict[str, Any] = {"data_range": data_range, "severity": min(1.0, math.sqrt(mean)) if mean >= 0 else 1.0}
        if 0 < mean < math.inf:
            found["psnr"] = -10 * math.log10(mean)
        else:
            found["psnr_unavailable"] = f"the mean square error is {mean} in double precision"
        return found | (_ssim(a, b, data_range, mask) if is_picture(a) else {})


def is_picture(values: Array) -> bool:
    """Whether an array is of grey, colours or one map, and not of features."""
    return values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (1, 3, 4))


def _data_range(a: Array, b: Array) -> float:
    """Greatest distance two pixels can have: 255 or 65535, 1 for colours in [0, 1], else what both sides span.

    NaN where a value is not finite.
    """
    if a.dtype in (np.uint8, np.uint16):
        return float(np.iinfo(a.dtype).max)
    extremes = [float(extreme) for side in (a, b) for extreme in (side.min(), side.max())]  # NaN if there is one
    if not all(map(math.isfinite, extremes)):
        return math.nan
    low, high = min(extremes), max(extremes)
    return 1.0 if a.dtype.kind in "bf" and low >= 0 and high <= 1 else high - low


def _mean_square(a: Array, b: Array, data_range: float) -> float:
    """Of the error in units of the range; of 8-bit pictures exact."""
    if a.dtype == np.uint8:
        squares = sum(int(np.square(x.astype(np.int32) - y).sum(dtype=np.int64)) for x, y in _strips(a, b))
        return squares / data_range**2 / a.size
    total = sum(float(np.square((x.astype(np.float64) - y) / data_range).sum()) for x, y in _strips(a, b))
    return total / a.size


def _ssim(a: Array, b: Array, data_range: float, mask: Array) -> dict[str, Any]:
    """Structural similarity as in scikit-image, with a uniform window of 7 pixels or what fits.

    Windows without a differing pixel have exactly 1, so only the others are computed.
    """
    pixels, smallest = mask.size, min(mask.shape)
    window = min(_SSIM_WINDOW, smallest - (smallest + 1) % 2)
    if window < 3:
        return {"ssim_unavailable": "it needs at least 3 rows and columns"}
    if pixels > _MAX_SSIM_PIXELS:
        return {"ssim_unavailable": f"not computed for more than {_MAX_SSIM_PIXELS:,} pixels"}
    columns = np.flatnonzero(mask.any(axis=0))
    first, last = max(0, columns[0] - window + 1), min(mask.shape[1], columns[-1] + window)
    exact = a.dtype == np.uint8
    scale = 1.0 if exact else data_range  # the square of the range may not be a double
    missing = 0.0  # what the windows lack to 1
    rows = max(1, _STRIP_VALUES // (last - first))
    windows = (mask.shape[0] - window + 1, mask.shape[1] - window + 1)
    for start in range(0, windows[0], rows):
        stop = min(start + rows, windows[0]) + window - 1
        if not mask[start:stop].any():
            continue
        for x, y in zip(_channels(a[start:stop, first:last]), _channels(b[start:stop, first:last]), strict=True):
            u, v = (side.astype(np.int32) if exact else side.astype(np.float64) / scale for side in (x, y))
            missing += float((1 - _ssim_map(u, v, window, data_range / scale)).sum())
    ssim = 1 - missing / (math.prod(windows) * len(_channels(a)))
    return {"ssim": ssim} if math.isfinite(ssim) else {"ssim_unavailable": f"it comes out as {ssim}"}


def _ssim_map(x: Array, y: Array, window: int, data_range: float) -> Array:
    """One value for each place of the window in two channels of integers up to 255, or of doubles."""
    n = window**2
    c1, c2 = ((k * data_range) ** 2 for k in _SSIM_CONSTANTS)
    sums = (_window_sums(values, window) for values in (x, y, x * x + y * y, x * y))
    sx, sy, squares, products = (values.astype(np.float64) for values in sums)
    mean_product = sx * sy / n**2
    mean_squares = (sx * sx + sy * sy) / n**2
    unbiased = 1 / (n - 1)  # as scikit-image's default
    covariance = (products - n * mean_product) * unbiased
    variances = (squares - n * mean_squares) * unbiased
    similar: Array = (2 * mean_product + c1) * (2 * covariance + c2)
    similar /= (mean_squares + c1) * (variances + c2)
    return similar


def _window_sums(values: Array, window: int) -> Array:
    """Sums over every `window` x `window`."""
    rows, columns = (size - window + 1 for size in values.shape)
    down: Array = values[:rows].copy()
    for offset in range(1, window):
        down += values[offset : offset + rows]
    across: Array = down[:, :columns].copy()
    for offset in range(1, window):
        across += down[:, offset : offset + columns]
    return across


def _flip(a: Array, b: Array) -> tuple[Array | None, dict[str, Any]]:
    """The FLIP map by its reference package, and its mean: what is seen when flipping between the two."""
    import flip_evaluator

    sides = [_colours(side) for side in (a, b)]
    if sides[0] is None or sides[1] is None:
        return None, {"flip_unavailable": "it is defined for red, green and blue in [0, 1]"}
    found, mean, _ = flip_evaluator.evaluate(*sides, "LDR", applyMagma=False)
    return np.asarray(found)[..., 0], {"flip_mean": float(mean)}


def _colours(array: Array) -> Array | None:
    """Red, green and blue as float32 in [0, 1]; None where the array holds something else."""
    if array.ndim != 3 or array.shape[2] not in (3, 4) or array.dtype.kind not in "uf":
        return None
    colours = array[..., :3]
    if array.dtype.kind == "u":
        return np.asarray(colours / np.float32(np.iinfo(array.dtype).max), np.float32)
    if not (colours.min() >= 0 and colours.max() <= 1):  # also where there is a NaN
        return None
    floats: Array = colours.astype(np.float32)
    return floats


def _cosine(a: Array, b: Array) -> dict[str, Any]:
    """Of the pixels' vectors, where both have a direction."""
    least, total, count = 1.0, 0.0, 0
    for x, y in _strips(a, b):
        u, v = (side.astype(np.float64) for side in (x, y))
        with np.errstate(all="ignore"):
            cosine = (u * v).sum(axis=2) / np.sqrt((u * u).sum(axis=2) * (v * v).sum(axis=2))
        cosine = cosine[np.isfinite(cosine)].clip(-1, 1)
        if cosine.size:
            least = min(least, float(cosine.min()))
            total, count = total + float(cosine.sum()), count + cosine.size
    return {"cosine_min": least, "cosine_mean": total / count, "n_cosine": count} if count else {"n_cosine": 0}
