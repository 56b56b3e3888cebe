"""Exact comparison of arrays: by bits first, then how far apart the differing values are.

Arrays are read in pieces, so that two memory-mapped arrays of several GiB need some MiB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: Values in one piece: 128 KiB of float64, so that the temporaries of a piece stay in the cache (three times faster).
_PIECE = 2**14
_INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, kw_only=True)
class ValueLimits:
    """How far two values may be apart; a pair is within them where any of those that are given holds.

    `absolute` bounds |a - b|, `relative` |a - b| / max(|a|, |b|), `ulps` the distance on the line of all floats of the
    type (see `float_difference`). Where a side is infinite or NaN nothing holds, unless both have the same bits.
    """

    absolute: float | None = None
    relative: float | None = None
    ulps: int | None = None


#: Only values of the same bits are within these.
EXACT = ValueLimits()


def bit_equal(a: Array, b: Array) -> bool:
    """Whether dtype, shape and every byte are the same: +0 is not -0, and a NaN is equal to a NaN of the same bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    _check_comparable(a, b)
    return all(np.array_equal(_raw(x), _raw(y)) for x, y in _pieces(a, b))


def float_difference(
    a: Array, b: Array, *, dtype_name: str | None = None, limits: ValueLimits | None = None
) -> dict[str, Any]:
    """Measures of how two arrays of one dtype and shape differ, as plain JSON data; the same with sides swapped.

    - `n`, `n_different`: values, and those whose bits differ; with `limits` also `n_outside`, those that break them.
    - `max_abs`, `mean_abs`: of |a - b|, in float64 (largest of integers: exact); the mean is over all pairs that have
      a distance.
    - `at`: index of the first `max_abs`, or of the first differing value where that is 0; None where nothing differs.
    - For floats also `max_rel` (|a - b| / max(|a|, |b|), infinite where one side is), `max_ulp` (distance on the
      ordered line of all values of the dtype), `n_nan_mismatch` (NaN on one side only: no distance), `n_nan_payload`
      (NaN on both sides, with other bits), `n_infinite` (an infinity against another value), `n_sign_of_zero` (+0
      against -0), and of more than one value `ulp_histogram`: how many differ by 0, 1, 2 to 3, 4 to 7, ... ulps, by the
      first number of each.

    Real and imaginary parts of complex arrays are values of their own, and `at` ends with 0 or 1 for the part.
    `dtype_name` names what the bits mean where NumPy has no such dtype: "bfloat16" over uint16 is measured as floats;
    of any other (float8, ...) only `n`, `n_different` and `at` are known. Raises ValueError where dtypes or shapes
    differ.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        raise ValueError(f"cannot measure {a.dtype} {a.shape} against {b.dtype} {b.shape}")
    _check_comparable(a, b)
    if a.dtype.kind == "c":
        a, b = _parts(a), _parts(b)
    counts = _Counts(_meaning(a.dtype, dtype_name), limits)
    start = 0
    for x, y in _pieces(a, b):
        where = np.flatnonzero(_differing(x, y))
        if where.size:
            counts.add(x[where], y[where], start + where)
        start += x.size
    return counts.measures(a.shape)


def distances(a: Array, b: Array, *, dtype_name: str | None = None) -> tuple[Array, Array]:
    """Of each pair of two flat arrays of floats, the distance in ulps and relative to the larger, both as float64.

    Both are infinite where one of the two is NaN, and 0 where both are. `dtype_name` as in `float_difference`.
    """
    meaning = _meaning(a.dtype, dtype_name)
    u, v = (_float64(side, meaning) for side in (a, b))
    ulps = _integer_distance(_ordered(a), _ordered(b)).astype(np.float64)
    with np.errstate(all="ignore"):
        relative = np.abs(u - v) / np.maximum(np.abs(u), np.abs(v))
    relative[u == v] = 0.0
    relative[np.isinf(u) ^ np.isinf(v)] = np.inf
    nan = np.isnan(u).astype(np.int8) + np.isnan(v)
    for values in (ulps, relative):
        values[nan == 1], values[nan == 2] = np.inf, 0.0
    return ulps, relative


def difference_summary(measures: Mapping[str, Any]) -> str:
    """Measures of `float_difference` in words: "12 of 4,096 values differ, largest 3.1e-05 at [17, 1] (412 ulp)"."""
    verb = "differs" if measures["n_different"] == 1 else "differ"
    text = f"{measures['n_different']:,} of {measures['n']:,} values {verb}"
    place = f" at {measures['at']}" if measures["at"] else ""  # a single value has no index
    if measures.get("max_abs"):
        text += f", largest {measures['max_abs']:.3g}{place}"
        text += f" ({measures['max_ulp']:,} ulp)" if "max_ulp" in measures else ""
    elif place:
        text += f", first{place}"
    notes = {
        "n_nan_mismatch": "NaN on one side only",
        "n_nan_payload": "NaN with other bits",
        "n_infinite": "infinite on one side",
        "n_sign_of_zero": "zero of the other sign",
    }
    return text + "".join(f", {measures[key]:,} {note}" for key, note in notes.items() if measures.get(key))


class _Counts:
    """What has been found so far; `meaning` is "float", "bfloat16", "integer" or "opaque"."""

    def __init__(self, meaning: str, limits: ValueLimits | None) -> None:
        self.meaning, self.limits = meaning, limits
        self.n_different = self.n_nan_mismatch = self.n_nan_payload = self.n_infinite = self.n_sign_of_zero = 0
        self.n_outside = 0
        self.max_abs: int | float = 0
        self.max_rel = 0.0
        self.max_ulp = 0
        self.ulps = np.zeros(65, np.int64)
        self.sum_abs = 0.0
        self.at: int | None = None

    def add(self, x: Array, y: Array, positions: Array) -> None:
        """Counts differing values `x` and `y`, which lie at flat `positions`."""
        self.n_different += x.size
        if self.at is None:
            self.at = int(positions[0])
        distances = _distances(x, y, self.meaning)
        if self.limits is not None:
            self.n_outside += int(np.count_nonzero(~distances.within(self.limits)))
        if isinstance(distances, _Floats):
            self._add_floats(distances, positions)
        elif self.meaning == "integer":
            self._add_distances(distances.absolute, positions, float(distances.absolute.sum(dtype=np.float64)))

    def _add_floats(self, found: _Floats, positions: Array) -> None:
        self.n_nan_mismatch += int(np.count_nonzero(found.nans == 1))
        self.n_nan_payload += int(np.count_nonzero(found.nans == 2))
        self.n_infinite += int(np.count_nonzero(found.infinite))
        self.n_sign_of_zero += int(np.count_nonzero(found.zeros))
        keep = found.nans == 0
        if not keep.any():
            return
        distances, ulps = found.absolute[keep], found.ulps[keep]
        self.max_rel = max(self.max_rel, float(found.relative[keep].max()))
        self.max_ulp = max(self.max_ulp, int(ulps.max()))
        self.ulps += np.bincount(_bit_lengths(ulps), minlength=65)
        with np.errstate(over="ignore"):
            total = float(distances.sum())
        self._add_distances(distances, positions[keep], total)

    def _add_distances(self, distances: Array, positions: Array, total: float) -> None:
        self.sum_abs += total
        best = int(np.argmax(distances))
        if distances[best] > self.max_abs:
            self.max_abs = distances[best].item()
            self.at = int(positions[best])

    def measures(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Everything counted, for arrays of `shape`."""
        n = int(np.prod(shape, dtype=object))
        at = None if self.at is None else [int(index) for index in np.unravel_index(self.at, shape)]
        measures: dict[str, Any] = {"n": n, "n_different": self.n_different}
        if self.limits is not None:
            measures["n_outside"] = self.n_outside
        if self.meaning == "opaque":
            return {**measures, "at": at}
        with_distance = n - self.n_nan_mismatch - self.n_nan_payload
        measures |= {
            "max_abs": self.max_abs,
            "mean_abs": self.sum_abs / with_distance if with_distance else 0.0,
            "at": at,
        }
        if self.meaning == "integer":
            return measures
        measures |= {
            "max_rel": self.max_rel,
            "max_ulp": self.max_ulp,
            "n_nan_mismatch": self.n_nan_mismatch,
            "n_nan_payload": self.n_nan_payload,
            "n_infinite": self.n_infinite,
            "n_sign_of_zero": self.n_sign_of_zero,
        }
        if n > 1:
            counts = enumerate(self.ulps.tolist())
            measures["ulp_histogram"] = {str(2**bits // 2): count for bits, count in counts if count}
        return measures


class _Distances:
    """Distances of values without an order of floats: of integers, or (`absolute` is empty) of unknown meaning."""

    def __init__(self, x: Array, y: Array, absolute: Array) -> None:
        self.x, self.y, self.absolute = x, y, absolute

    def within(self, limits: ValueLimits) -> Array:
        """Which pairs are within the limits."""
        found = np.zeros(self.x.size, np.bool_)
        if not self.absolute.size:
            return found
        if limits.absolute is not None:
            found |= self.absolute <= np.uint64(min(math.floor(limits.absolute), 2**64 - 1))
        if limits.relative is not None:
            x, y = (np.abs(side.astype(np.float64)) for side in (self.x, self.y))
            found |= self.absolute.astype(np.float64) / np.maximum(x, y) <= limits.relative
        return found


class _Floats(_Distances):
    """Distances of differing floats; `nans` counts the sides that are NaN, and where it is not 0 nothing else holds."""

    def __init__(self, x: Array, y: Array, meaning: str) -> None:
        u, v = (_float64(side, meaning) for side in (x, y))
        self.nans = np.isnan(u).astype(np.int8) + np.isnan(v)
        self.infinite = (np.isinf(u) | np.isinf(v)) & (self.nans == 0)
        self.zeros = (u == 0) & (v == 0)
        with np.errstate(all="ignore"):
            super().__init__(x, y, np.abs(u - v))
            self.relative = self.absolute / np.maximum(np.abs(u), np.abs(v))
        self.relative[self.zeros] = 0.0
        self.relative[self.infinite] = np.inf
        self.ulps = _integer_distance(_ordered(x), _ordered(y))

    def within(self, limits: ValueLimits) -> Array:
        """Which pairs are within the limits; never one with a side that is infinite or NaN."""
        found = np.zeros(self.x.size, np.bool_)
        if limits.absolute is not None:
            found |= self.absolute <= limits.absolute
        if limits.relative is not None:
            found |= self.relative <= limits.relative
        if limits.ulps is not None:
            found |= self.ulps <= np.uint64(limits.ulps)
        return np.asarray(found & ~self.infinite & (self.nans == 0))


def _distances(x: Array, y: Array, meaning: str) -> _Distances:
    if meaning in ("float", "bfloat16"):
        return _Floats(x, y, meaning)
    return _Distances(x, y, _integer_distance(x, y) if meaning == "integer" else np.empty(0, np.uint64))


def outside(a: Array, b: Array, limits: ValueLimits) -> Array:
    """Which real values of two arrays of one dtype and shape differ by more than the limits, as booleans."""
    x, y = (np.ascontiguousarray(side).reshape(-1) for side in (a, b))
    found = _differing(x, y)
    where = np.flatnonzero(found)
    found[where] = ~_distances(x[where], y[where], _meaning(a.dtype, None)).within(limits)
    shaped: Array = found.reshape(a.shape)
    return shaped


def _bit_lengths(values: Array) -> Array:
    """Of each uint64 the number of its binary digits: 0 for 0, 1 for 1, 2 for 2 and 3, ..."""
    digits = np.frexp(values.astype(np.float64))[1].astype(np.int64)
    # As a float64 the largest below a power of two can round up to it.
    too_many = (digits > 0) & (values >> np.maximum(digits - 1, 0).clip(max=63).astype(np.uint64) == 0)
    lengths: Array = np.minimum(digits - too_many, 64)
    return lengths


def _check_comparable(a: Array, b: Array) -> None:
    for side in (a, b):
        if side.dtype.hasobject:
            raise TypeError("arrays of Python objects have no bits to compare")


def _meaning(dtype: np.dtype[Any], dtype_name: str | None) -> str:
    if dtype_name == "bfloat16" and dtype.kind == "u" and dtype.itemsize == 2:
        return "bfloat16"
    if dtype_name not in (None, dtype.name) and dtype.kind not in "fc":
        return "opaque"
    if dtype.kind == "f" and dtype.itemsize in _INTEGERS:
        return "float"
    return "integer" if dtype.kind in "iub" else "opaque"


def _pieces(a: Array, b: Array) -> Iterator[tuple[Array, Array]]:
    """Both arrays in C order as flat, contiguous pieces in the byte order of this machine."""
    if a.size == 0:
        return
    native = a.dtype.newbyteorder("=")
    side: Any = ["readonly", "contig"]  # NumPy's type stubs lack "contig"
    iterator = np.nditer(
        [a, b],
        flags=["external_loop", "buffered"],
        op_flags=[side, side],
        op_dtypes=[native, native],
        order="C",
        casting="equiv",
        buffersize=_PIECE,
    )
    with iterator:
        yield from iterator


def _raw(piece: Array) -> Array:
    """The bytes of a flat, contiguous piece, in the widest integers that fit."""
    return piece.view(_UNSIGNED.get(piece.dtype.itemsize, np.uint8))


def _differing(x: Array, y: Array) -> Array:
    """Which values have other bits."""
    unequal: Array = np.asarray(_raw(x) != _raw(y))
    if unequal.size != x.size:  # values wider than any integer
        unequal = np.asarray(unequal.reshape(x.size, -1).any(axis=1))
    return unequal


def _parts(array: Array) -> Array:
    """Complex values as real and imaginary parts along a new last axis, without a copy."""
    real: Array = array.real
    strides = (*array.strides, real.dtype.itemsize)
    return np.lib.stride_tricks.as_strided(real, (*array.shape, 2), strides, writeable=False)


def _float64(values: Array, meaning: str) -> Array:
    if meaning == "bfloat16":
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):
        return values.astype(np.float64)


def _ordered(values: Array) -> Array:
    """Floats (or the bits of bfloat16) as integers in the order of their values, neighbours 1 apart, zeros at 0."""
    signed = values.view(_INTEGERS[values.dtype.itemsize])
    lowest = np.iinfo(signed.dtype).min
    return np.where(signed < 0, lowest - signed, signed).astype(np.int64)


def _integer_distance(x: Array, y: Array) -> Array:
    """|x - y| of integers or booleans as uint64, which holds the distance of any two int64."""
    high, low = np.maximum(x, y), np.minimum(x, y)
    return high.astype(np.uint64) - low.astype(np.uint64)
