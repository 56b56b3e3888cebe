"""Pictures that two runs have, as a browser can show them: both sides, where and how much they differ, a thumbnail.

Encoding is cheap rather than small: a comparison of hundreds of pictures waits for it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from f3rm_verify.assets import HEAT_COLOURS, KEY, Assets
from f3rm_verify.picture_measures import PictureDifference
from f3rm_verify.readers.images import Array, Picture
from f3rm_verify.render_store import LOSSLESS_CHANNELS, normalised, project, to_png

Pixels = npt.NDArray[np.uint8]

#: Pixels of a picture that has to be encoded; larger ones are shown in every n-th row and column.
_MAX_SHOWN_PIXELS = 4 * 2**20
#: Channels of features that are projected, more than any encoder has.
_MAX_CHANNELS = 2**14
#: Rows and columns of a thumbnail, at most twice as many.
_THUMBNAIL = 160
#: Places in the palette of a heat map: 0 is no difference, then `HEAT_COLOURS`.
_LARGEST, _NOT_FINITE = 254, 255
#: zlib's Z_RLE: quicker than its default, and for such maps smaller.
_RUN_LENGTHS = 3
#: The smallest distance that has a colour of its own, in units of the range: about a float32's ulp at 1.
_SMALLEST = 2.0**-24


def keep_pictures(
    assets: Assets,
    data: Sequence[bytes],
    pictures: Sequence[Picture],
    found: PictureDifference | None = None,
    *,
    stretched: bool = False,
) -> dict[str, dict[str, str]]:
    """The measures that name the pictures of reference and candidate, and what `found` says where they differ.

    `data` are their files. A PNG of up to 8 bit or a JPEG is shown as it is; everything else as an 8-bit PNG, on one
    scale for both sides; `stretched` between their extremes, whatever they mean.
    """
    if not assets.wanted:
        return {}
    shown = _shown(*(picture.values for picture in pictures), stretched=stretched, channels=_order(pictures[0].layout))
    kept = {
        side: _keep_side(assets, content, picture.layout, pixels)
        for side, content, picture, pixels in zip(("reference", "candidate"), data, pictures, shown, strict=True)
    }
    if found is not None:
        kept["heat"] = assets.keep(_palette_png(heat_map(found, pictures[0].values.dtype)), "png")
    if found is not None and found.flip is not None:
        kept["flip"] = assets.keep(_palette_png(np.rint(found.flip.clip(0, 1) * _LARGEST).astype(np.uint8)), "png")
    kept["thumbnail"] = assets.keep(_thumbnail(shown[1]), "jpg")
    names = {key: name for key, name in kept.items() if name is not None}
    return {KEY: names} if names else {}


def heat_map(found: PictureDifference, dtype: npt.DTypeLike) -> Pixels:
    """(H, W): 0 where all bits are equal, else 1 to 254 by the logarithm of the distance, 255 where it is not finite.

    Of 8 and 16 bit, 1 is one step and 254 the whole range; else 1 is 2**-24 of the range, or less.
    """
    dtype = np.dtype(dtype)
    if dtype == np.uint8:  # by a table: a comparison of hundreds of pictures waits for this
        table = _indices(np.arange(256.0), 1.0, 255.0)
        table[0] = 0
        return table[found.distance.astype(np.uint8)]
    distance = found.distance[found.mask].astype(np.float64)
    high = float(np.iinfo(dtype).max) if dtype.kind == "u" else float(found.measures.get("data_range") or 0)
    high = high or float(distance[np.isfinite(distance)].max(initial=0)) or 1.0
    heat = np.zeros(found.mask.shape, np.uint8)
    heat[found.mask] = _indices(distance, 1.0 if dtype.kind == "u" else high * _SMALLEST, high)
    return heat


def _indices(distance: Array, low: float, high: float) -> Pixels:
    with np.errstate(all="ignore"):
        place = np.log(distance / low) / math.log(high / low)
    index = 1 + np.rint(np.nan_to_num(place, nan=0, neginf=0, posinf=1).clip(0, 1) * (_LARGEST - 1))
    index[~np.isfinite(distance)] = _NOT_FINITE
    return np.asarray(index, np.uint8)


def _shown(a: Array, b: Array, *, stretched: bool, channels: list[int] | None) -> list[Array]:
    """Both as uint8 of (H, W), (H, W, 3) or (H, W, 4), on one scale where they have one form."""
    features = [side.ndim > 2 and math.prod(side.shape[2:]) > LOSSLESS_CHANNELS for side in (a, b)]
    sides = [_few(side if channels is None else side[..., channels]) for side in (a, b)]
    draw = normalised if stretched or (channels is None and any(features)) else to_png
    if sides[0].shape == sides[1].shape and sides[0].dtype == sides[1].dtype:
        return np.split(draw(np.concatenate(sides)), 2)
    return [draw(side) for side in sides]


def _few(values: Array) -> Array:
    """As (H, W) or (H, W, C) of bounded size; of more channels than colours have, a projection."""
    values = values[:, None] if values.ndim == 1 else values
    values = values.reshape(*values.shape[:2], -1) if values.ndim > 3 else values
    step = math.ceil(math.sqrt(math.prod(values.shape[:2]) / _MAX_SHOWN_PIXELS))
    values = values[::step, ::step]
    return project(values[..., :_MAX_CHANNELS]) if values.shape[2:] > (LOSSLESS_CHANNELS,) else values


def _order(layout: str) -> list[int] | None:
    """Where red, green, blue (and alpha) are among the channels of an EXR, which come by name."""
    if not layout.startswith("EXR "):
        return None
    names = [word.split()[0] for word in layout.removeprefix("EXR ").split(", ")]
    return [names.index(name) for name in "RGBA" if name in names] if {"R", "G", "B"} <= set(names) else None


def _keep_side(assets: Assets, content: bytes, layout: str, pixels: Array) -> str | None:
    if layout.startswith("JPEG"):
        return assets.keep(content, "jpg")
    if layout.startswith("PNG") and "16 bit" not in layout:
        return assets.keep(content, "png")
    return assets.keep(_png(pixels), "png")


def _png(pixels: Array) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _palette_png(index: Pixels) -> bytes:
    from PIL import Image

    image = Image.frombytes("P", index.shape[::-1], index.tobytes())
    places = np.linspace(0, 1, len(HEAT_COLOURS))
    ramp = [np.interp(np.linspace(0, 1, _LARGEST), places, band) for band in zip(*HEAT_COLOURS, strict=True)]
    colours = np.stack([np.rint(np.array([0, *band, 255])) for band in ramp], axis=-1).astype(np.uint8)
    image.putpalette(colours.tobytes())
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1, compress_type=_RUN_LENGTHS)
    return stream.getvalue()


def _thumbnail(pixels: Array) -> bytes:
    from PIL import Image

    image = Image.fromarray(pixels)
    factor = max(1, max(image.size) // _THUMBNAIL)
    stream = io.BytesIO()
    image.convert("RGB").reduce(factor).save(stream, "JPEG", quality=75)
    return stream.getvalue()
