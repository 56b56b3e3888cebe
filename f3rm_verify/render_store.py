"""Writes what the model rendered for an evaluation image: lossless where it is small, as digests where it is features.

Runs inside the training process, takes NumPy arrays and knows nothing of torch. Files appear under their final name
only when they are complete, so that a killed run leaves no half-written one.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from f3rm_verify.errors import TrainingError
from f3rm_verify.files import replacing

Array = npt.NDArray[Any]

#: Outputs of up to this many channels are stored lossless, others as digests, projection and a reduced copy.
LOSSLESS_CHANNELS = 4
#: Rows under one digest. Another value, or another digest, needs another file ending: equal endings are compared.
BAND_ROWS = 8
#: The reduced copy of features has at most this many rows and columns.
REDUCED_SIZE = 64

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
_OWN_ENDINGS = (".bands", ".projection", ".half")
#: Bytes of a .npy header, and of everything in a PNG that does not grow with it.
_NPY_HEADER_BYTES = 128
_PNG_OVERHEAD_BYTES = 1024


def write_outputs(folder: Path, image: str, outputs: Mapping[str, Array]) -> None:
    """Writes the raw outputs, each (H, W, C) or (H, W), of one evaluation image to `folder`/`image`/.

    Up to 4 channels: `OUTPUT.npy` as given, and `OUTPUT.png` for people. More channels: `OUTPUT.bands.npy` (uint8,
    (n_bands, 16), see `band_digests`), `OUTPUT.projection.npy` and `.png` (see `project`), and `OUTPUT.half.npy`
    (float16, every n-th row and column so that at most 64 of each are left). Raises TrainingError, before anything is
    written, for a name that is not a plain file name and for values that are not pictures of numbers.
    """
    _check_name("image", image)
    for name, values in outputs.items():
        _check_output(name, values)
    target = folder / image
    target.mkdir(parents=True, exist_ok=True)
    for name, values in outputs.items():
        values = np.ascontiguousarray(values)
        if _channels(values.shape) <= LOSSLESS_CHANNELS:
            _save_array(target / f"{name}.npy", values)
            _save_png(target / f"{name}.png", to_png(values))
        else:
            _write_features(target, name, values)


def _write_features(target: Path, name: str, values: Array) -> None:
    stride = _stride(values.shape[0], values.shape[1])
    projection = project(values)
    with np.errstate(over="ignore"):  # what exceeds float16 becomes infinite
        reduced = values[::stride, ::stride].astype(np.float16)
    _save_array(target / f"{name}.bands.npy", band_digests(values))
    _save_array(target / f"{name}.projection.npy", projection)
    _save_png(target / f"{name}.projection.png", normalised(projection))
    _save_array(target / f"{name}.half.npy", reduced)


def band_digests(values: Array) -> npt.NDArray[np.uint8]:
    """xxh3_128 of dtype, shape and bytes of every 8 rows of (H, W, C), as uint8 of shape (ceil(H / 8), 16)."""
    digests = []
    for start in range(0, values.shape[0], BAND_ROWS):
        band = np.ascontiguousarray(values[start : start + BAND_ROWS])
        digest = xxhash.xxh3_128(f"{band.dtype.str} {band.shape}".encode("ascii"))
        digest.update(band.data.cast("B"))
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)


def project(values: Array) -> npt.NDArray[np.float32]:
    """(H, W, C) times a fixed (C, 3) matrix of +-1/sqrt(C) that depends on C alone, for people and for magnitudes.

    The signs are summed in float64 and scaled afterwards: sums of float32 are then exact, in whatever order the matrix
    product takes them, unless their sizes differ by more than about 2**18.
    """
    height, width, channels = values.shape
    signs = _signs(channels)
    projection = np.empty((height, width, 3), np.float32)
    with np.errstate(all="ignore"):  # infinite and NaN features give infinite and NaN projections
        for row in range(height):  # row by row: all of it in float64 would be larger than the features
            projection[row] = (values[row].astype(np.float64) @ signs) / math.sqrt(channels)
    return projection


def _signs(channels: int) -> npt.NDArray[np.float64]:
    """(C, 3) of +-1 from the upper bit of splitmix64, https://prng.di.unimi.it/splitmix64.c."""
    index = np.arange(channels * 3, dtype=np.uint64) + np.uint64(channels << 32)
    mixed = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return np.where(mixed >> np.uint64(63), 1.0, -1.0).reshape(channels, 3)


def to_png(values: Array) -> npt.NDArray[np.uint8]:
    """(H, W, C) or (H, W) of up to 4 channels as uint8 of 1, 3 or 4 channels, for people; non-finite values are black.

    Colours of 3 and 4 channels are clipped to [0, 1]; everything else is stretched between its finite extremes.
    """
    if values.ndim == 3 and values.shape[2] in (3, 4):
        if values.dtype == np.uint8:
            return values
        if values.dtype.kind == "f":
            known = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
            return np.rint(np.clip(known, 0.0, 1.0) * 255).astype(np.uint8)
    if values.ndim == 3 and values.shape[2] == 2:  # as red and green: a PNG with 2 channels would hide one as alpha
        values = np.concatenate([values, np.broadcast_to(values.min(), (*values.shape[:2], 1))], axis=2)
    return normalised(values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values)


def normalised(values: Array) -> npt.NDArray[np.uint8]:
    """Between the smallest and the largest finite value; black where all are equal or a value is not finite."""
    scaled = values.astype(np.float64)
    finite = np.isfinite(scaled)
    if not finite.any():
        return np.zeros(values.shape, np.uint8)
    low, high = (float(extreme) / 2 for extreme in (scaled[finite].min(), scaled[finite].max()))
    if not high > low:
        return np.zeros(values.shape, np.uint8)
    scaled[~finite] = low * 2
    scaled = (scaled / 2 - low) / (high - low)  # halves, so that the span of the largest doubles does not overflow
    return np.rint(np.clip(scaled, 0.0, 1.0) * 255).astype(np.uint8)


def estimate_bytes(shapes: Mapping[str, tuple[int, int, int]], n_images: int) -> int:
    """An upper bound of what `write_outputs` takes on disk for `n_images` of float32 outputs of these (H, W, C)."""
    return n_images * sum(_output_bytes(*shape) for shape in shapes.values())


def _output_bytes(height: int, width: int, channels: int) -> int:
    if channels <= LOSSLESS_CHANNELS:
        array = _NPY_HEADER_BYTES + height * width * channels * 4
        return array + _png_bytes(height, width, {2: 3}.get(channels, channels))
    stride = _stride(height, width)
    reduced = -(-height // stride) * -(-width // stride) * channels * 2
    bands = -(-height // BAND_ROWS) * 16
    return 3 * _NPY_HEADER_BYTES + reduced + bands + height * width * 12 + _png_bytes(height, width, 3)


def _png_bytes(height: int, width: int, channels: int) -> int:
    """Pixels that do not compress at all: one filter byte a row, and less than 1 in 64 for zlib's and PNG's blocks."""
    raw = height * (width * channels + 1)
    return raw + raw // 64 + _PNG_OVERHEAD_BYTES


def check_disk_budget(folder: Path, needed: int, budget: int) -> None:
    """Raises TrainingError where `needed` bytes exceed the budget or what is free where `folder` is or will be."""
    if needed > budget:
        raise TrainingError(
            f"The renders would take {_size(needed)}, more than their budget of {_size(budget)}; evaluate fewer or "
            f"smaller images, or raise the budget."
        )
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise TrainingError(
            f"The renders would take {_size(needed)}, and only {_size(free)} are free at {existing}; free some space, "
            f"or evaluate fewer or smaller images."
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _stride(height: int, width: int) -> int:
    return max(1, -(-max(height, width) // REDUCED_SIZE))


def _channels(shape: tuple[int, ...]) -> int:
    return shape[2] if len(shape) == 3 else 1


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name) or (what == "output" and name.endswith(_OWN_ENDINGS)):
        raise TrainingError(
            f"The {what} {name[:100]!r} cannot be stored: its name must be of A-Z a-z 0-9 _ . - only, begin with no "
            f"dot, be at most 100 long, and end with none of {', '.join(_OWN_ENDINGS)}."
        )


def _check_output(name: str, values: Array) -> None:
    _check_name("output", name)
    if values.ndim not in (2, 3) or values.size == 0:
        raise TrainingError(f"The output {name!r} has shape {values.shape}; only (H, W, C) and (H, W) can be stored.")
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        raise TrainingError(f"The output {name!r} is {values.dtype}; only booleans, integers and floats can be stored.")


def _save_array(path: Path, values: Array) -> None:
    _save(path, lambda file: np.save(file, values, allow_pickle=False))


def _save_png(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    from PIL import Image

    # Level 1 takes a quarter of the time of the usual 6 and some percent more space.
    _save(path, lambda file: Image.fromarray(pixels).save(file, "PNG", compress_level=1))


def _save(path: Path, write: Callable[[BinaryIO], None]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        write(file)
