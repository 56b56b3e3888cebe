"""Reads OpenEXR images with the library of that name, which is an optional dependency (extra `exr`)."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from f3rm_verify.errors import UnreadableError

#: The library says on standard output what is wrong with a file, where only the report belongs. Turning that away turns
#: it away for the whole process, so one thread at a time.
_ONE_AT_A_TIME = threading.Lock()
#: Decoded channels together, as of an array file.
_MAX_BYTES = 2**30
_FLAT = ("scanlineimage", "tiledimage")


def decode_exr(
    data: bytes, name: str, check_size: Callable[[int, int, str], None]
) -> tuple[npt.NDArray[np.number[Any]], str]:
    """Values (H, W, C) with the channels by name, and the layout with names and types of the channels.

    Halves stay float16 and floats float32 where all channels are alike, else the type that holds all of them exactly.
    An EXR has no checksum over its pixels: what is damaged and can be decoded is read as it is.
    """
    try:
        import OpenEXR
    except ImportError as error:
        hint = 'install it to have EXR images compared: pip install "f3rm-verify[exr]"'
        raise UnreadableError(f"{name}: OpenEXR is not installed; {hint}.") from error
    try:
        with _ONE_AT_A_TIME, contextlib.redirect_stdout(io.StringIO()):
            _check_header(OpenEXR.File(io.BytesIO(data), header_only=True), name, check_size)
            file = OpenEXR.File(io.BytesIO(data), separate_channels=True, num_threads=0)
            # Copies, because the library's arrays do not outlive it.
            planes = {channel: np.array(pixels.pixels) for channel, pixels in sorted(file.channels().items())}
    except UnreadableError:
        raise
    except Exception as error:  # RuntimeError, ValueError, TypeError, by what is wrong
        raise UnreadableError(f"{name}: not readable as EXR ({' '.join(str(error).split())[:200]}).") from error
    if not planes or len({plane.shape for plane in planes.values()}) != 1:
        raise UnreadableError(f"{name}: its channels have different sizes, which is not supported.")
    dtype = np.result_type(*(plane.dtype for plane in planes.values()))
    layout = ", ".join(f"{channel} {plane.dtype.name}" for channel, plane in planes.items())
    return np.stack([plane.astype(dtype) for plane in planes.values()], axis=-1), f"EXR {layout}"


def _check_header(file: Any, name: str, check_size: Callable[[int, int, str], None]) -> None:
    if len(file.parts) != 1:
        raise UnreadableError(f"{name}: {len(file.parts)} pictures in one EXR.")
    header = file.header()
    if getattr(header["type"], "name", header["type"]) not in _FLAT:
        raise UnreadableError(f"{name}: a deep EXR, which is not supported.")
    (left, top), (right, bottom) = (corner.tolist() for corner in header["dataWindow"])
    width, height = right - left + 1, bottom - top + 1
    check_size(width, height, name)
    if width * height * len(header["channels"]) * 4 > _MAX_BYTES:
        raise UnreadableError(f"{name}: {width}x{height} pixels of {len(header['channels'])} channels are too many.")
