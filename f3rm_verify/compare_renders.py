"""Compares what two runs rendered: a node for each image, below it one for each file of its outputs.

Layout, size and type come before values, and bits before magnitudes. For our own renders `OUTPUT.npy` is the evidence
(for features `OUTPUT.bands.npy`, their digests); PNG, projection and reduced copy are compared as well, but where the
evidence is missing on both sides it is named as missing, because those could agree where the model's outputs do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from f3rm_verify import bits
from f3rm_verify.difference import Difference, Verdict
from f3rm_verify.errors import UnreadableError
from f3rm_verify.readers.images import Array, Picture, decode, read_file
from f3rm_verify.run_dir import RENDERS, RunDir

ARTEFACT = "renders"
SIDES = ("reference", "candidate")
#: Rows under one digest of `OUTPUT.bands.npy`.
BAND_ROWS = 8

#: SSIM of more pixels than 4K has takes minutes and several GiB.
_MAX_SSIM_PIXELS = 2**23
_SSIM_WINDOW = 7
_CHUNK_VALUES = 2**18
#: Endings of files that say less than the one beside them with the ending on the right.
_EVIDENCE = {".half.npy": ".bands.npy", ".projection.npy": ".bands.npy", ".png": ".npy"}


def compare_renders(reference: RunDir, candidate: RunDir) -> Difference:
    """The tree of all rendered outputs of either side, sorted by name; `unreadable` where neither side has any."""
    runs = (reference, candidate)
    try:
        files = tuple(run.renders for run in runs)
    except UnreadableError as error:
        return Difference(name=ARTEFACT, artefact=ARTEFACT, verdict=Verdict.UNREADABLE, summary=str(error))
    names = {name for run, found in zip(runs, files, strict=True) for name in (*found, *_evidence(run, found))}
    if not names:
        return Difference.group(name=ARTEFACT, artefact=ARTEFACT, children=(), summary="neither run has renders")
    with ThreadPoolExecutor(max_workers=len(SIDES)) as pool:

        def compare(name: str, relative: str) -> Difference:
            paths = tuple(found.get(relative) for found in files)
            return _compare_file(name, runs, paths, pool)

        children = [
            Difference.group(name=name, artefact=ARTEFACT, children=(compare(*output) for output in outputs))
            if isinstance(outputs, list)
            else compare(name, outputs)
            for name, outputs in _layout(names)
        ]
    return Difference.group(name=ARTEFACT, artefact=ARTEFACT, children=children)


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


def _compare_file(name: str, runs: tuple[RunDir, ...], paths: tuple[Path | None, ...], pool: Executor) -> Difference:
    present = [path for path in paths if path is not None]
    if len(present) < len(SIDES):
        where = [side for side, path in zip(SIDES, paths, strict=True) if path is None]
        summary = f"missing in {' and '.join(where)}"
        if not present:
            summary += "; what lies beside it does not show every difference"
        return _node(name, Verdict.MISSING, summary)
    try:
        data = [_read(side, run, path) for side, run, path in zip(SIDES, runs, present, strict=True)]
        if data[0] == data[1]:
            return _identical(name, _decode("both sides", data[0], present[0].name), "")
        first, second = pool.map(_decode, SIDES, data, (path.name for path in present))
    except UnreadableError as error:
        return _node(name, Verdict.UNREADABLE, str(error))
    return _compare_pictures(name, first, second)


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


def _compare_pictures(name: str, reference: Picture, candidate: Picture) -> Difference:
    a, b = reference.values, candidate.values
    forms = [
        {"layout": side.layout, "dtype": str(side.values.dtype), "shape": list(side.values.shape)}
        for side in (reference, candidate)
    ]
    unequal = [key for key in forms[0] if forms[0][key] != forms[1][key]]
    if unequal:
        words = (f"{key} {forms[0][key]} against {forms[1][key]}" for key in unequal)
        measures = {f"{side}_{key}": form[key] for key in unequal for side, form in zip(SIDES, forms, strict=True)}
        return _node(name, Verdict.DIFFERENT, ", ".join(words), measures)
    if bits.bit_equal(a, b):
        return _identical(name, reference, "the same values in files with other bytes")
    if name.endswith(".bands") and a.ndim == 2 and a.shape[1] == 16:
        return _different_bands(name, a, b)
    return _different_values(name, a, b)


def _identical(name: str, picture: Picture, summary: str) -> Difference:
    measures = {"shape": list(picture.values.shape), "dtype": str(picture.values.dtype)}
    return _node(name, Verdict.IDENTICAL, summary, measures)


def _different_bands(name: str, a: Array, b: Array) -> Difference:
    bands = np.flatnonzero((a != b).any(axis=1))
    measures = {"n": len(a), "n_different": len(bands), "first_row": int(bands[0]) * BAND_ROWS, "bands": bands.tolist()}
    listed = ", ".join(f"{band * BAND_ROWS}-{band * BAND_ROWS + BAND_ROWS - 1}" for band in bands[:5].tolist())
    more = ", ..." if len(bands) > 5 else ""
    return _node(
        name,
        Verdict.DIFFERENT,
        f"{len(bands)} of {len(a)} bands of {BAND_ROWS} rows differ: rows {listed}{more}",
        measures,
    )


def _different_values(name: str, a: Array, b: Array) -> Difference:
    """Measures of `bits.float_difference`, but `n` and `n_different` count pixels, `n_values...` their channels."""
    data_range = _data_range(a, b)
    if a.dtype == np.bool_:  # as bytes, because a damaged file holds others than 0 and 1
        a, b = a.view(np.uint8), b.view(np.uint8)
    values = bits.float_difference(a, b)
    pixels = {"n": math.prod(a.shape[:2]), "n_different": _count_different_pixels(a, b)}
    similarity = _similarity(a, b, data_range) if _is_picture(a) else {}
    summary = f"{bits.difference_summary(values)}, in {pixels['n_different']:,} of {pixels['n']:,} pixels"
    if "psnr" in similarity:
        summary += f", PSNR {similarity['psnr']:.1f} dB"
    counts = {"n_values": values["n"], "n_values_different": values["n_different"]}
    return _node(name, Verdict.DIFFERENT, summary, {**values, **pixels, **counts, **similarity})


def _row_chunks(a: Array, b: Array) -> Iterator[tuple[Array, Array]]:
    """Rows of both, few enough for the cache."""
    rows = max(1, _CHUNK_VALUES // max(1, a[0].size))
    for start in range(0, len(a), rows):
        yield a[start : start + rows], b[start : start + rows]


def _count_different_pixels(a: Array, b: Array) -> int:
    """Positions (row, column) at which any bit of any channel differs."""
    count = 0
    unsigned = f"u{a.dtype.itemsize}"
    for x, y in _row_chunks(a, b):
        unequal = np.ascontiguousarray(x).view(unsigned) != np.ascontiguousarray(y).view(unsigned)
        if unequal.any():
            count += int(np.count_nonzero(unequal.any(axis=tuple(range(2, unequal.ndim)))))
    return count


def _is_picture(values: Array) -> bool:
    return values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (1, 3, 4))


def _similarity(a: Array, b: Array, data_range: float) -> dict[str, Any]:
    """PSNR in dB and SSIM of two differing pictures, or why one of them is not known."""
    if not 0 < data_range < math.inf:
        reason = f"the values span {data_range}" if data_range == data_range else "not every value is finite"
        return dict.fromkeys(("psnr_unavailable", "ssim_unavailable"), reason)
    with np.errstate(all="ignore"):
        return {"data_range": data_range, **_psnr(a, b, data_range), **_ssim(a, b, data_range)}


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


def _psnr(a: Array, b: Array, data_range: float) -> dict[str, Any]:
    """-10 log10 of the mean square error in units of the range."""
    total = sum(float(np.square((x.astype(np.float64) - y) / data_range).sum()) for x, y in _row_chunks(a, b))
    mean = total / a.size
    if not 0 < mean < math.inf:
        return {"psnr_unavailable": f"the mean square error is {mean} in double precision"}
    return {"psnr": -10 * math.log10(mean)}


def _ssim(a: Array, b: Array, data_range: float) -> dict[str, Any]:
    """Structural similarity with scikit-image's uniform window, of 7 pixels or what fits."""
    from skimage import metrics

    structural_similarity: Any = metrics.structural_similarity  # it has no types
    pixels, smallest = math.prod(a.shape[:2]), min(a.shape[:2])
    window = min(_SSIM_WINDOW, smallest - (smallest + 1) % 2)
    if window < 3:
        return {"ssim_unavailable": "it needs at least 3 rows and columns"}
    if pixels > _MAX_SSIM_PIXELS:
        return {"ssim_unavailable": f"not computed for more than {_MAX_SSIM_PIXELS:,} pixels"}
    x, y = (side.astype(np.float64) / data_range for side in (a, b))  # the square of the range may not be a double
    axis = 2 if a.ndim == 3 else None
    ssim = float(structural_similarity(x, y, win_size=window, data_range=1.0, channel_axis=axis))
    return {"ssim": ssim} if math.isfinite(ssim) else {"ssim_unavailable": f"it comes out as {ssim}"}


def _node(name: str, verdict: Verdict, summary: str, measures: Mapping[str, Any] | None = None) -> Difference:
    return Difference(name=name, artefact=ARTEFACT, verdict=verdict, summary=summary, measures=measures or {})
