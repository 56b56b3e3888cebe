"""Compares what two runs rendered: a node for each image, below it one for each file of its outputs.

Layout, size and type come before values, and bits before magnitudes. For our own renders `OUTPUT.npy` is the evidence
(for features `OUTPUT.bands.npy`, their digests); PNG, projection and reduced copy are compared as well, but where the
evidence is missing on both sides it is named as missing, because those could agree where the model's outputs do not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from f3rm_verify import bits
from f3rm_verify.assets import Assets
from f3rm_verify.difference import Difference, Verdict
from f3rm_verify.errors import UnreadableError
from f3rm_verify.picture_assets import keep_pictures
from f3rm_verify.picture_measures import PictureDifference, picture_difference, picture_summary
from f3rm_verify.policy import Limit, Policy, judge
from f3rm_verify.readers.images import Array, Picture, decode, expected_bytes, read_file
from f3rm_verify.render_store import normalised, to_png
from f3rm_verify.run_dir import RENDERS, RunDir

ARTEFACT = "renders"
SIDES = ("reference", "candidate")
#: Rows under one digest of `OUTPUT.bands.npy`.
BAND_ROWS = 8
#: Images that are compared at a time, each of which takes some ten times its decoded size.
_MAX_WORKERS = 4
#: Decoded bytes from which on a picture is compared alone.
_LARGE = 32 * 2**20

#: Endings of what is no picture: digests, and the reduced copy of features, which the projection beside it shows.
_NO_PICTURES = (".bands", ".bands.npy", ".half", ".half.npy")

#: Endings of files that say less than the one beside them with the ending on the right.
_EVIDENCE = {".half.npy": ".bands.npy", ".projection.npy": ".bands.npy", ".png": ".npy"}


def compare_renders(
    reference: RunDir, candidate: RunDir, *, policy: Policy, assets: Assets | None = None
) -> Difference:
    """The tree of all rendered outputs of either side, sorted by name; `unreadable` where neither side has any.

    Pictures that differ are kept in `assets`.
    """
    runs = (reference, candidate)
    try:
        files = tuple(run.renders for run in runs)
    except UnreadableError as error:
        return Difference(name=ARTEFACT, artefact=ARTEFACT, verdict=Verdict.UNREADABLE, summary=str(error))
    names = {name for run, found in zip(runs, files, strict=True) for name in (*found, *_evidence(run, found))}
    if not names:
        return Difference.group(name=ARTEFACT, artefact=ARTEFACT, children=(), summary="neither run has renders")
    workers = min(_MAX_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as images, ThreadPoolExecutor(workers) as decoders:
        pair = _Pair(
            runs=runs,
            files=files,
            policy=policy,
            assets=assets or Assets(),
            decoders=decoders,
            one_at_a_time=threading.RLock(),
        )
        children = list(images.map(lambda node: _compare_node(pair, *node), _layout(names)))
    return Difference.group(name=ARTEFACT, artefact=ARTEFACT, children=children)


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The two runs, their renders by name, and what bounds the memory: large pictures are read one pair at a time."""

    runs: tuple[RunDir, RunDir]
    files: tuple[Mapping[str, Path], ...]
    policy: Policy
    assets: Assets
    decoders: Executor
    one_at_a_time: threading.RLock


def _compare_node(pair: _Pair, name: str, outputs: str | list[tuple[str, str]]) -> Difference:
    """A file on its own, or all outputs of an image."""
    if isinstance(outputs, str):
        return _compare_file(pair, name, name, outputs)
    children = [_compare_file(pair, output, f"{name}/{output}", relative) for output, relative in outputs]
    if pair.policy.limits.get(ARTEFACT):
        children = _with_followers(pair, name, children, dict(outputs))
    return Difference.group(name=name, artefact=ARTEFACT, children=children)


def _with_followers(
    pair: _Pair, image: str, children: Sequence[Difference], files: Mapping[str, str]
) -> list[Difference]:
    """What has no size of its own is within limits where what it was made of is: digests, and pictures for people."""
    verdicts = {child.name: child.verdict for child in children}
    followed = []
    for child in children:
        note = _follows(pair, image, child.name, verdicts, files) if child.verdict is Verdict.DIFFERENT else ""
        if note:
            summary = f"{child.summary.partition('; beyond')[0]}; {note}"
            child = dataclasses.replace(child, verdict=Verdict.WITHIN_TOLERANCE, summary=summary)
        followed.append(child)
    return followed


def _follows(pair: _Pair, image: str, name: str, verdicts: Mapping[str, Verdict], files: Mapping[str, str]) -> str:
    """Why a file that differs is within limits by what lies beside it; nothing where it is not."""
    output, _, ending = name.rpartition(".")
    if ending == "bands" and pair.policy.limit(ARTEFACT, f"{image}/{name}") is not None:
        copies = [verdicts.get(f"{output}{end}") for end in (".half", ".projection")]
        if all(verdict in (Verdict.IDENTICAL, Verdict.WITHIN_TOLERANCE) for verdict in copies):
            return "digests know only equal; the projection of all pixels and the reduced copy are within their limits"
    if ending == "png" and verdicts.get(output) is Verdict.WITHIN_TOLERANCE:
        projection = output.endswith(".projection")
        if _shows_its_array(pair, files[name], files[output], projection=projection):
            return f"it is the picture of {output}, which is within its limits"
    return ""


def _shows_its_array(pair: _Pair, picture: str, array: str, *, projection: bool) -> bool:
    """Whether the pictures of both sides are exactly what our recorder makes of the arrays beside them."""
    draw = normalised if projection else to_png
    for run, files in zip(pair.runs, pair.files, strict=True):
        try:
            shown, values = (decode(_read("", run, files[name]), name).values for name in (picture, array))
        except UnreadableError:
            return False
        if not np.array_equal(shown, draw(values)):
            return False
    return True


def _evidence(run: RunDir, files: Mapping[str, Path]) -> Iterator[str]:
    """Names of the lossless files or digests that our recorder writes beside each of these files."""
    ours = run.path / RENDERS
    for name, path in files.items():
        if path.is_relative_to(ours) and len(PurePath(name).parts) > 1:
            yield from (name.removesuffix(end) + wanted for end, wanted in _EVIDENCE.items() if name.endswith(end))


def _layout(names: Iterable[str]) -> list[tuple[str, str | list[tuple[str, str]]]]:
    """Nodes below the root by name: a file on its own, or for a folder its outputs as (node name, file)."""
    flat: list[tuple[str, str | list[tuple[str, str]]]] = []
    folders: dict[str, list[str]] = {}
    for relative in names:
        first, *rest = PurePath(relative).parts
        if rest:
            folders.setdefault(first, []).append(relative)
        else:
            flat.append((_printable(relative), relative))
    taken = {name for name, _ in flat}
    for folder, files in folders.items():
        name = _printable(folder)
        flat.append((f"{name}/" if name in taken else name, sorted(_outputs(folder, files))))
    return sorted(flat, key=lambda node: node[0])


def _outputs(folder: str, files: list[str]) -> Iterator[tuple[str, str]]:
    """(node name, file): without `.npy`, the evidence's ending, unless that is the name of another file."""
    within = {relative: PurePath(relative).relative_to(folder).as_posix() for relative in files}
    for relative, name in within.items():
        short = name.removesuffix(".npy")
        yield _printable(name if short in within.values() else short), relative


def _printable(name: str) -> str:
    """`name` without what no encoding can write: bytes of a file name that are not UTF-8."""
    return name.encode("utf8", "backslashreplace").decode("utf8")


def _compare_file(pair: _Pair, name: str, place: str, relative: str) -> Difference:
    """One file of both sides; `place` is its name for the policy."""
    paths = [files.get(relative) for files in pair.files]
    present = [path for path in paths if path is not None]
    if len(present) < len(SIDES):
        where = [side for side, path in zip(SIDES, paths, strict=True) if path is None]
        summary = f"missing in {' and '.join(where)}"
        if not present:
            summary += "; what lies beside it does not show every difference"
        return _node(name, Verdict.MISSING, summary)
    try:
        data = [_read(side, run, path) for side, run, path in zip(SIDES, pair.runs, present, strict=True)]
        large = any(expected_bytes(each) > _LARGE for each in data)
        with pair.one_at_a_time if large else contextlib.nullcontext():
            return _compare_data(pair, name, place, data, [path.name for path in present])
    except UnreadableError as error:
        return _node(name, Verdict.UNREADABLE, str(error))


def _compare_data(pair: _Pair, name: str, place: str, data: Sequence[bytes], files: Sequence[str]) -> Difference:
    if data[0] == data[1]:
        return _identical(name, _decode("both sides", data[0], files[0]), "")
    pictures = list(pair.decoders.map(_decode, SIDES, data, files))
    limit = pair.policy.limit(ARTEFACT, place)
    node, found = _compare_pictures(name, pictures[0], pictures[1], limit, flip=pair.policy.flip)
    if node.verdict is Verdict.IDENTICAL or name.endswith(_NO_PICTURES):
        return node
    kept = keep_pictures(pair.assets, data, pictures, found, stretched=".projection" in name)
    return dataclasses.replace(node, measures={**node.measures, **kept})


def _read(side: str, run: RunDir, path: Path) -> bytes:
    try:
        run.file(str(path.relative_to(run.path)))  # refuses what a link on the way leads out of the run
        return read_file(path)
    except UnreadableError as error:
        raise UnreadableError(f"{side}: {error}") from error


def _decode(side: str, data: bytes, name: str) -> Picture:
    try:
        return decode(data, name)
    except UnreadableError as error:
        raise UnreadableError(f"{side}: {error}") from error


def _compare_pictures(
    name: str, reference: Picture, candidate: Picture, limit: Limit | None, *, flip: bool
) -> tuple[Difference, PictureDifference | None]:
    """The node, and how the two differ where they have one form."""
    a, b = reference.values, candidate.values
    forms = [
        {"layout": side.layout, "dtype": str(side.values.dtype), "shape": list(side.values.shape)}
        for side in (reference, candidate)
    ]
    unequal = [key for key in forms[0] if forms[0][key] != forms[1][key]]
    if unequal:
        words = (f"{key} {forms[0][key]} against {forms[1][key]}" for key in unequal)
        measures = {f"{side}_{key}": form[key] for key in unequal for side, form in zip(SIDES, forms, strict=True)}
        return _node(name, Verdict.DIFFERENT, ", ".join(words), {**measures, "severity": 1.0}), None
    if bits.bit_equal(a, b):
        return _identical(name, reference, "the same values in files with other bytes"), None
    if name.endswith(".bands") and a.ndim == 2 and a.shape[1] == 16:
        return _different_bands(name, a, b), None
    if a.ndim == 1:  # a list of numbers is no picture
        a, b = a[:, None], b[:, None]
    found = picture_difference(a, b, limits=limit, flip=flip)
    verdict, note = judge(limit, outside=found.outside, psnr=found.psnr)
    return _node(name, verdict, f"{picture_summary(found.measures)}{note}", found.measures), found


def _identical(name: str, picture: Picture, summary: str) -> Difference:
    measures = {"shape": list(picture.values.shape), "dtype": str(picture.values.dtype)}
    return _node(name, Verdict.IDENTICAL, summary, measures)


def _different_bands(name: str, a: Array, b: Array) -> Difference:
    """Digests show where features differ; how much, the projection and the reduced copy beside them."""
    bands = np.flatnonzero((a != b).any(axis=1))
    measures = {"n": len(a), "n_different": len(bands), "first_row": int(bands[0]) * BAND_ROWS, "bands": bands.tolist()}
    listed = ", ".join(f"{band * BAND_ROWS}-{band * BAND_ROWS + BAND_ROWS - 1}" for band in bands[:5].tolist())
    more = ", ..." if len(bands) > 5 else ""
    summary = f"{len(bands)} of {len(a)} bands of {BAND_ROWS} rows differ: rows {listed}{more}"
    return _node(name, Verdict.DIFFERENT, summary, {**measures, "severity": 0.0})


def _node(name: str, verdict: Verdict, summary: str, measures: Mapping[str, Any] | None = None) -> Difference:
    return Difference(name=name, artefact=ARTEFACT, verdict=verdict, summary=summary, measures=measures or {})
