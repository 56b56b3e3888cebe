"""The result as a log directory of TensorBoard: runs for both sides and for their difference, side by side there.

Scalars are `simple_value`s: float32 exactly, float64 rounded to it. The time of every record is 0 and the files have
fixed names, so the same result gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from f3rm_verify import reporters as words
from f3rm_verify.assets import Assets, CurvePair, asset_names, read_series
from f3rm_verify.difference import Difference, Result
from f3rm_verify.readers.events import framed
from f3rm_verify.reporters.pictures import picture_nodes
from f3rm_verify.reporters.report_file import write_report

#: TensorBoard takes a file for a log by this part of its name.
FILE = "events.out.tfevents.0.f3rm-verify"
#: Pictures of each run, worst first; the page of --html has all.
MAX_PICTURES = 50
#: Which asset of a picture each run shows.
_SHOWN = {"reference": "reference", "candidate": "candidate", "difference": "heat"}

Array = npt.NDArray[np.generic]


def write_tensorboard(result: Result, directory: Path, *, assets: Assets) -> None:
    """Writes `reference/`, `candidate/` and `difference/`, each with the curves and pictures that are in the assets."""
    for run in _SHOWN:
        content = b"".join(framed(event) for event in _events(result, assets, run))
        write_report(directory / run / FILE, content, what="the log of --tensorboard")


def _events(result: Result, assets: Assets, run: str) -> Iterator[bytes]:
    from tensorboard.compat.proto.event_pb2 import Event

    yield bytes(Event(wall_time=0, file_version="brain.Event:2").SerializeToString())
    for path, node in result.root.walk():
        series = read_series(assets.read(asset_names(node).get("series")))
        if series is not None:
            yield from _scalars(_tag(path), *_values(series, run))
    for path, node in picture_nodes(result)[:MAX_PICTURES]:
        yield from _picture(_tag(("", *path)), node, assets, run)


def _tag(path: Sequence[str]) -> str:
    """The names below the root, without that of the curves, which have the tags that they had."""
    return "/".join(words.clean(name) for name in path[1:] if name != "curves")


def _values(series: CurvePair, run: str) -> tuple[Array, Array]:
    """Steps and values of one run, ascending by step; of the difference |reference - candidate|, 0 for equal bits."""
    if run == "difference":
        with np.errstate(all="ignore"):
            distance = np.abs(series.reference.astype(np.float64) - series.candidate)
        equal = series.reference.view(f"u{series.reference.itemsize}") == series.candidate.view(
            f"u{series.candidate.itemsize}"
        )
        return series.steps, np.where(equal, 0.0, distance)
    both, only = getattr(series, run), getattr(series, f"{run}_only")
    steps = np.concatenate([series.steps, getattr(series, f"{run}_only_steps")])
    order = np.argsort(steps, kind="stable")
    return steps[order], np.concatenate([both, only])[order]


def _scalars(tag: str, steps: Array, values: Array) -> Iterator[bytes]:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    for step, value in zip(steps.tolist(), narrow.tolist(), strict=True):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        yield bytes(Event(wall_time=0, step=step, summary=summary).SerializeToString())


def _picture(tag: str, node: Difference, assets: Assets, run: str) -> Iterator[bytes]:
    from PIL import Image
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    content = assets.read(asset_names(node).get(_SHOWN[run]))
    if content is None:
        return
    try:
        width, height = Image.open(io.BytesIO(content)).size
    except (OSError, ValueError, Image.DecompressionBombError):  # not one of ours
        return
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=content)
    summary = Summary(value=[Summary.Value(tag=tag, image=image)])
    yield bytes(Event(wall_time=0, step=0, summary=summary).SerializeToString())
