"""Reads rendered images (PNG, JPEG, EXR) and arrays (.npy) at full bit depth, refusing what is broken or too large.

Files are read whole. Nothing in a file is evaluated; the header of an array has to match the one form that NumPy
writes.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from f3rm_verify.errors import UnreadableError
from f3rm_verify.readers.plain_file import read_plain

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

Array = npt.NDArray[Any]

#: As many pixels as 8K has, more than any evaluation image; 32 Mpx of 16-bit RGBA are 256 MiB.
MAX_PIXELS = 32 * 2**20
MAX_IMAGE_BYTES = 256 * 2**20
MAX_ARRAY_BYTES = 2**30

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Channels by colour type: grey, colours, palette, grey with alpha, colours with alpha.
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_SINGLE = (b"IHDR", b"PLTE", b"tRNS")
#: First column and row, and distance of columns and rows, of each pass of an interlaced PNG.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
#: What `numpy.lib.format` writes for booleans, integers and floats of up to 8 bytes in 1 to 8 dimensions.
_NPY_HEADER = re.compile(
    rb"\{'descr': '(\|[biu]1|[<>][iu][248]|[<>]f[248])', 'fortran_order': (False|True), "
    rb"'shape': \((\d{1,10},|\d{1,10}(?:, \d{1,10}){1,7})\), \} *\n"
)


@dataclass(frozen=True)
class Picture:
    """Decoded values, (H, W) or (H, W, C) for images, and the `layout` that says what they mean ("npy", "PNG RGB")."""

    values: Array
    layout: str


def read_array(path: Path) -> Array:
    """The values of a .npy, PNG or JPEG file; UnreadableError where it is none, cut off, damaged or too large.

    Images keep their bit depth (16-bit PNGs are uint16), palettes are replaced by their colours. Metadata (time, text,
    colour profile) is not read. The array is read-only or the caller's own.
    """
    return decode(read_file(path), path.name).values


def read_file(path: Path) -> bytes:
    """The bytes of an image or array file; UnreadableError where it is no plain file or larger than its kind can be."""
    limit = MAX_ARRAY_BYTES if path.suffix.lower() == ".npy" else MAX_IMAGE_BYTES
    return read_plain(path, limit=limit)


def expected_bytes(data: bytes) -> int:
    """About how much memory the values of a file take, by its header or its size."""
    if data.startswith(_PNG_SIGNATURE) and len(data) > 25:
        width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
        return int(width * height * _PNG_CHANNELS.get(colour, 4) * (depth // 8 or 1))
    return len(data) if data.startswith(b"\x93NUMPY") else 16 * len(data)


def decode(data: bytes, name: str) -> Picture:
    """What the bytes of the file called `name` hold; its ending says as what they are read. Safe to call in threads."""
    if not data:
        raise UnreadableError(f"{name}: empty.")
    suffix = Path(name).suffix.lower()
    if suffix == ".npy":
        return Picture(_decode_npy(data, name), "npy")
    if suffix == ".exr":
        from f3rm_verify.readers.exr import decode_exr

        return Picture(*decode_exr(data, name, _check_size))
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise UnreadableError(f"{name}: the ending is none of .npy, .png, .jpg, .jpeg, .exr.")
    try:
        return _decode_png(data, name) if suffix == ".png" else _decode_jpeg(data, name)
    except UnreadableError:
        raise
    except Exception as error:  # damaged files make Pillow raise OSError, SyntaxError, ValueError, struct.error, ...
        kind = "PNG" if suffix == ".png" else "JPEG"
        raise UnreadableError(f"{name}: not readable as {kind} ({error or type(error).__name__}).") from error


def _decode_npy(data: bytes, name: str) -> Array:
    if data[:6] != b"\x93NUMPY" or len(data) < 12 or data[6] not in (1, 2, 3) or data[7] != 0:
        raise UnreadableError(f"{name}: not a .npy file.")
    start = 10 if data[6] == 1 else 12
    end = start + int.from_bytes(data[8:start], "little")
    header = _NPY_HEADER.fullmatch(data, start, end) if end <= len(data) else None
    if header is None:
        raise UnreadableError(f"{name}: its header is cut off, or is none of a plain array of numbers.")
    dtype = np.dtype(header[1].decode("ascii"))
    shape = tuple(int(size) for size in header[3].split(b",") if size)
    expected = math.prod(shape) * dtype.itemsize
    if expected == 0:
        raise UnreadableError(f"{name}: an array of shape {shape} holds no values.")
    if len(data) - end != expected:
        raise UnreadableError(f"{name}: {len(data) - end} bytes of values where {shape} {dtype} takes {expected}.")
    values = np.frombuffer(data, dtype, offset=end).reshape(shape, order="F" if header[2] == b"True" else "C")
    return values if dtype.isnative else values.byteswap().view(dtype.newbyteorder("="))


@dataclass(frozen=True)
class _Png:
    """Checked parts of a PNG; `samples` is inflated, still filtered, and as long as the header says."""

    width: int
    height: int
    depth: int
    colour: int
    interlaced: bool
    colours: tuple[tuple[bytes, bytes], ...]
    samples: bytes

    def image(self, *, depth: int, colour: int) -> ImageFile:
        """Opened by Pillow, with another meaning of the bytes where depth and colour type are not the file's own.

        Stored and not compressed, because Pillow takes a stream that ends too early for a black rest of the picture.
        The plug-in's class, and not Image.open, which guesses the format and warns where we refuse.
        """
        from PIL.PngImagePlugin import PngImageFile

        header = struct.pack(">IIBBBBB", self.width, self.height, depth, colour, 0, 0, self.interlaced)
        chunks = ((b"IHDR", header), *self.colours, (b"IDAT", zlib.compress(self.samples, 0)), (b"IEND", b""))
        return PngImageFile(io.BytesIO(_PNG_SIGNATURE + b"".join(_make_chunk(*chunk) for chunk in chunks)))


def _decode_png(data: bytes, name: str) -> Picture:
    png = _open_png(data, name)
    if png.depth == 16:
        transparent = "".join(f", transparent {colour.hex()}" for kind, colour in png.colours if kind == b"tRNS")
        return Picture(_png_16_bit(png), f"PNG {_PNG_CHANNELS[png.colour]} channels of 16 bit{transparent}")
    image = png.image(depth=png.depth, colour=png.colour)
    image.load()
    transparency = image.info.get("transparency")
    if image.mode == "P":
        return Picture(np.asarray(image.convert("RGB" if transparency is None else "RGBA")), "PNG P")
    transparent = "" if transparency is None else f", transparent {transparency}"
    values = np.asarray(image)
    if image.mode == "1":  # Pillow's true is the byte 255, NumPy's is 1
        values = values.view(np.uint8) != 0
    return Picture(values, f"PNG {image.mode}{transparent}")


def _png_16_bit(png: _Png) -> Array:
    """Samples of 16 bit, which Pillow by itself reduces to their upper bytes where there are several channels."""
    if png.colour == 0:
        return np.asarray(png.image(depth=16, colour=0)).astype(np.uint16)
    if png.colour == 4:  # grey and alpha: 4 bytes a pixel, as in 8-bit RGBA
        return np.asarray(png.image(depth=8, colour=6)).view(">u2").astype(np.uint16)
    # Pillow unpacks one byte of each sample: the first where it is told big endian, the second where little endian.
    mode = "RGB" if png.colour == 2 else "RGBA"
    upper, lower = (_unpacked(png.image(depth=16, colour=png.colour), f"{mode};16{order}") for order in "BL")
    return (upper.astype(np.uint16) << 8) | lower


def _unpacked(image: ImageFile, raw_mode: str) -> Array:
    tiles: Any = [(*tile[:3], raw_mode) for tile in image.tile]  # plain tuples before Pillow 11
    image.tile = tiles
    return np.asarray(image)


def _open_png(data: bytes, name: str) -> _Png:
    """Raises UnreadableError where a PNG is cut off, damaged, animated or too large.

    Pillow checks neither the checksums of the pixels nor the end of the file, and reads only the first frame.
    """
    found: dict[bytes, list[bytes | memoryview]] = {}
    for kind, content in _png_chunks(data, name):
        found.setdefault(kind, []).append(content)
    if b"acTL" in found:
        raise UnreadableError(f"{name}: an animation, and not one picture.")
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", found[b"IHDR"][0])
    _check_size(width, height, name)
    palette_lacks = colour == 3 and b"PLTE" not in found  # Pillow would take shades of grey
    if (
        colour not in _PNG_CHANNELS
        or interlaced > 1
        or palette_lacks
        or any(len(found.get(kind, ())) > 1 for kind in _PNG_SINGLE)
    ):
        raise UnreadableError(f"{name}: the PNG contradicts itself in its header.")
    expected = _png_samples(width, height, depth * _PNG_CHANNELS[colour], bool(interlaced))
    inflate = zlib.decompressobj()
    samples = inflate.decompress(b"".join(found.get(b"IDAT", ())), expected + 1)
    if len(samples) != expected or not inflate.eof:
        raise UnreadableError(f"{name}: the PNG does not hold the {width}x{height} pixels that its header promises.")
    colours = tuple((kind, bytes(found[kind][0])) for kind in (b"PLTE", b"tRNS") if kind in found)
    return _Png(width, height, depth, colour, bool(interlaced), colours, samples)


def _png_chunks(data: bytes, name: str) -> Iterator[tuple[bytes, memoryview]]:
    if not data.startswith(_PNG_SIGNATURE) or data[8:16] != b"\0\0\0\x0dIHDR":
        raise UnreadableError(f"{name}: not a PNG.")
    view, start, kind = memoryview(data), len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        end = start + 12 + int.from_bytes(view[start : start + 4], "big")
        if end > len(data):
            raise UnreadableError(f"{name}: the PNG is cut off after {len(data)} bytes.")
        kind = bytes(view[start + 4 : start + 8])
        if zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise UnreadableError(f"{name}: the PNG is damaged (wrong checksum of the chunk at byte {start}).")
        yield kind, view[start + 8 : end - 4]
        start = end


def _make_chunk(kind: bytes, content: bytes) -> bytes:
    return b"".join(
        (len(content).to_bytes(4, "big"), kind, content, zlib.crc32(content, zlib.crc32(kind)).to_bytes(4, "big"))
    )


def _png_samples(width: int, height: int, pixel_bits: int, interlaced: bool) -> int:
    """Bytes of all rows, each with its filter byte; interlaced there are seven smaller pictures."""
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = ((-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes)
    return sum(rows * (1 + (columns * pixel_bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)


def _decode_jpeg(data: bytes, name: str) -> Picture:
    from PIL.JpegImagePlugin import JpegImageFile

    if not data.startswith(b"\xff\xd8\xff"):
        raise UnreadableError(f"{name}: not a JPEG.")
    if not data.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise UnreadableError(f"{name}: the JPEG is cut off after {len(data)} bytes.")
    image = JpegImageFile(io.BytesIO(data))
    _check_size(*image.size, name)
    if "mp" in image.info:
        raise UnreadableError(f"{name}: several pictures in one JPEG.")
    return Picture(np.asarray(image), f"JPEG {image.mode}")


def _check_size(width: int, height: int, name: str) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise UnreadableError(f"{name}: {width}x{height} pixels, where 1 to {MAX_PIXELS} are read.")
