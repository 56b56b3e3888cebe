"""Curves of a result as they are drawn: both sides and their distance, and how few points show every difference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from f3rm_verify import reporters as words
from f3rm_verify.assets import Assets, CurvePair, asset_names, read_series
from f3rm_verify.difference import Difference, Result, Verdict

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Curve:
    """A scalar tag that both sides logged; `name` and `summary` are words for people.

    `steps` (int64), `reference`, `candidate` (float64): the records that both sides have, `n` of them. `differs`: where
    any bit does. `distance` (float64): |reference - candidate| where that is positive and finite, else NaN. `only`:
    steps and values of the records that one side has, by side.
    """

    name: str
    verdict: Verdict
    summary: str
    n: int
    steps: Array
    reference: Array
    candidate: Array
    differs: Array
    distance: Array
    only: Mapping[str, tuple[Array, Array]]

    @property
    def first_step(self) -> int | None:
        """The first step that differs."""
        at = np.flatnonzero(self.differs)
        return int(self.steps[at[0]]) if at.size else None

    @property
    def odd(self) -> Array:
        """Where the sides differ without a distance that could be drawn: NaN, infinities, the sign of zero."""
        return np.asarray(self.differs & np.isnan(self.distance))

    def thinned(self, stretches: int) -> Curve:
        """Few enough records to draw; all of them where there are at most five times as many as `stretches`.

        Of each stretch the smallest and the largest value of both sides stay, and, where any record of it differs, the
        one that differs most. Besides, the first record, the last, and the first that differs.
        """
        at = self._drawn(stretches)
        fields = ("steps", "reference", "candidate", "differs", "distance")
        spread = {side: _spread(own[0].size, 2 * stretches) for side, own in self.only.items()}
        only = {side: (steps[spread[side]], values[spread[side]]) for side, (steps, values) in self.only.items()}
        return dataclasses.replace(self, **{field: getattr(self, field)[at] for field in fields}, only=only)

    def _drawn(self, stretches: int) -> Array:
        if self.steps.size <= 5 * stretches:
            return np.arange(self.steps.size)
        weight = np.where(self.odd, math.inf, np.nan_to_num(self.distance, nan=-1))
        chosen = [0, self.steps.size - 1, *np.flatnonzero(self.differs)[:1].tolist()]
        for part in np.array_split(np.arange(self.steps.size), stretches):
            for side in (self.reference[part], self.candidate[part]):
                chosen += [part[np.argmin(np.nan_to_num(side, nan=math.inf))]]
                chosen += [part[np.argmax(np.nan_to_num(side, nan=-math.inf))]]
            if self.differs[part].any():
                chosen.append(part[np.argmax(weight[part])])
        return np.unique(np.array(chosen, np.int64))


def _spread(size: int, most: int) -> Array:
    return np.unique(np.linspace(0, size - 1, min(size, most)).astype(np.int64))


def curve_nodes(result: Result) -> list[tuple[tuple[str, ...], Difference]]:
    """The nodes that name a series, with their paths below the root: worst first, then those that are identical."""
    fine = [(path[1:] or path, node) for path, node in result.root.leaves() if node.verdict is Verdict.IDENTICAL]
    return [(path, node) for path, node in (*words.worst_first(result), *fine) if "series" in asset_names(node)]


def curve_name(path: tuple[str, ...]) -> str:
    """The tag, and before it, where there are several, the pair or the rank."""
    return " / ".join(words.clean(part) for part in path if part not in ("curves", "scalars")) or "curve"


def read_curve(path: tuple[str, ...], node: Difference, assets: Assets) -> Curve | None:
    """The curve of a node; None where its values are missing or broken."""
    series = read_series(assets.read(asset_names(node).get("series")))
    if series is None:
        return None
    a, b, differs = series.reference.astype(np.float64), series.candidate.astype(np.float64), _differs(series)
    with np.errstate(all="ignore"):
        distance = np.abs(a - b)
    drawable = differs & np.isfinite(distance) & (distance > 0)
    own = {
        "reference": (series.reference_only_steps, series.reference_only.astype(np.float64)),
        "candidate": (series.candidate_only_steps, series.candidate_only.astype(np.float64)),
    }
    return Curve(
        name=curve_name(path),
        verdict=node.verdict,
        summary=words.summary_of(node),
        n=series.steps.size,
        steps=series.steps,
        reference=a,
        candidate=b,
        differs=differs,
        distance=np.where(drawable, distance, np.nan),
        only={side: records for side, records in own.items() if records[0].size},
    )


def _differs(series: CurvePair) -> Array:
    a, b = series.reference, series.candidate
    if a.dtype != b.dtype:
        return np.ones(a.shape, np.bool_)
    unsigned = f"u{a.dtype.itemsize}"
    return np.asarray(a.view(unsigned) != b.view(unsigned))
