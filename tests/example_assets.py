"""Nodes with curves and pictures, and results of them, for the tests of what draws them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from f3rm_verify.assets import KEY, Assets, CurvePair, keep_series
from f3rm_verify.difference import Difference, FirstDivergence, Outcome, Result, Verdict
from f3rm_verify.picture_assets import keep_pictures
from f3rm_verify.picture_measures import picture_difference
from f3rm_verify.readers.images import Picture

SHAPE = (40, 60, 3)


def series(reference: Any, candidate: Any, steps: Any = None, **only: Any) -> CurvePair:
    a, b = (np.array(side, np.float32) for side in (reference, candidate))
    none = {"steps": np.empty(0, np.int64), "values": np.empty(0, np.float32)}
    own = {
        f"{side}_only{end}": only.get(f"{side}_only{end}", none["steps" if end else "values"])
        for side in ("reference", "candidate")
        for end in ("_steps", "")
    }
    return CurvePair(steps=np.arange(a.size) if steps is None else steps, reference=a, candidate=b, **own)


def tag(assets: Assets, name: str, pair: CurvePair, size: float = 0.5, **measures: Any) -> Difference:
    equal = pair.reference.tobytes() == pair.candidate.tobytes()
    return Difference(
        name=name,
        artefact="curves",
        verdict=Verdict.IDENTICAL if equal else Verdict.DIFFERENT,
        summary=f"what was found of {name}",
        measures={"max_rel": size, **measures, **keep_series(assets, pair)},
    )


def picture(assets: Assets, name: str, seed: int = 0, shape: tuple[int, ...] = SHAPE, size: int = 9) -> Difference:
    """A node of two pictures that differ in the `size` x `size` pixels of the upper left corner."""
    a = np.random.default_rng(seed).random(shape).astype(np.float32)
    b = a.copy()
    b[:size, :size] = 1 - b[:size, :size]
    found = picture_difference(a, b)
    measures = {**found.measures, **keep_pictures(assets, (b"", b""), (Picture(a, "npy"), Picture(b, "npy")), found)}
    summary = f"what was found of {name}"
    return Difference(name=name, artefact="renders", verdict=Verdict.DIFFERENT, summary=summary, measures=measures)


def plain_picture(assets: Assets, name: str, colour: int) -> Difference:
    """The same of one colour each, made quickly; `colour` and the three after it."""
    names = {}
    for number, key in enumerate(("reference", "candidate", "heat", "thumbnail")):
        stream = io.BytesIO()
        Image.new("RGB", (48, 32), (colour + number) * 2003).save(stream, "PNG", compress_level=1)
        names[key] = assets.keep(stream.getvalue(), "png")
    return Difference(name=name, artefact="renders", verdict=Verdict.DIFFERENT, summary=name, measures={KEY: names})


def result_of(*nodes: Difference) -> Result:
    groups = [
        Difference.group(name=kind, artefact=kind, children=[node for node in nodes if node.artefact == kind])
        for kind in ("curves", "renders")
        if any(node.artefact == kind for node in nodes)
    ]
    root = Difference.group(name="runs", artefact="runs", children=groups)
    diverged = root.verdict is Verdict.DIFFERENT
    return Result(
        tool={"name": "f3rm-verify"},
        outcome=Outcome.DIVERGED if diverged else Outcome.REPRODUCIBLE,
        reasons=("differences",) if diverged else (),
        reference={"seed": 42},
        candidate={"seed": 42},
        pairs=1,
        steps=10,
        first_divergence=FirstDivergence(step=3, subject="loss") if diverged else None,
        root=root,
    )
