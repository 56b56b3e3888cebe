from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from f3rm_verify.errors import UnreadableError
from f3rm_verify.readers import images
from f3rm_verify.readers.images import decode, read_array

RNG_SEED = 7


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"".join((b"\x89PNG\r\n\x1a\n", header, *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")))


def filtered(raw: np.ndarray, pixel_bytes: int) -> bytes:
    """Rows of bytes with the five PNG filters in turn."""
    out = bytearray()
    above = np.zeros(raw.shape[1], np.int64)
    for index, row in enumerate(raw.astype(np.int64)):
        left = np.concatenate([np.zeros(pixel_bytes, np.int64), row[:-pixel_bytes]])
        corner = np.concatenate([np.zeros(pixel_bytes, np.int64), above[:-pixel_bytes]])
        guess = left + above - corner
        distances = np.stack([abs(guess - left), abs(guess - above), abs(guess - corner)])
        paeth = np.choose(distances.argmin(axis=0), [left, above, corner])
        prediction = [np.zeros_like(row), left, above, (left + above) // 2, paeth][index % 5]
        out += bytes([index % 5]) + ((row - prediction) % 256).astype(np.uint8).tobytes()
        above = row
    return bytes(out)


def packed(values: np.ndarray, depth: int) -> bytes:
    """Rows of grey samples of 1 to 8 bits, unfiltered; nothing for an empty pass of an interlaced PNG."""
    if values.size == 0:
        return b""
    samples = np.unpackbits(values[..., None], axis=2)[..., 8 - depth :].reshape(len(values), -1)
    return b"".join(b"\0" + row.tobytes() for row in np.packbits(samples, axis=1))


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def npy_bytes(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def assert_unreadable(path: Path, *words: str) -> None:
    with pytest.raises(UnreadableError) as caught:
        read_array(path)
    message = str(caught.value)
    assert message.startswith(f"{path.name}: ")
    assert message.endswith(".")
    for word in words:
        assert word in message


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(RNG_SEED).integers(0, 256, (9, 11, 3), np.uint8)


@pytest.mark.parametrize("dtype", ["?", "u1", "i1", "<u2", "<i4", "<i8", "<f2", "<f4", "<f8"])
@pytest.mark.parametrize("shape", [(5,), (4, 3), (4, 3, 2)])
def test_npy_comes_back_bit_by_bit(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    np.save(tmp_path / "x.npy", values)
    read = read_array(tmp_path / "x.npy")
    assert read.dtype == values.dtype
    assert read.shape == shape
    assert read.tobytes() == values.tobytes()


def test_npy_in_fortran_order_and_in_the_other_byte_order(tmp_path: Path) -> None:
    values = np.array([[1.5, np.nan, -0.0], [2.0, np.inf, 3.0]], np.float32)
    np.save(tmp_path / "f.npy", np.asfortranarray(values))
    np.save(tmp_path / "b.npy", values.astype(">f4"))
    for name in ("f.npy", "b.npy"):
        read = read_array(tmp_path / name)
        assert read.dtype == np.dtype("=f4")
        assert np.ascontiguousarray(read).tobytes() == values.tobytes()


@pytest.mark.parametrize(
    "values",
    [
        np.array([1, None], object),
        np.array(["a", "b"]),
        np.array([(1, 2.0)], [("a", "i4"), ("b", "f4")]),
        np.array([1 + 2j]),
        np.array(["2020-01-01"], "M8[D]"),
        np.float32(3),
        np.zeros((0, 4), np.float32),
        np.zeros((1,) * 9, np.uint8),
    ],
    ids=["object", "text", "record", "complex", "date", "scalar", "empty", "dimensions"],
)
def test_npy_of_anything_but_numbers_is_unreadable(tmp_path: Path, values: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", values, allow_pickle=True)
    assert_unreadable(tmp_path / "x.npy")


@pytest.mark.parametrize("shape", ["(9999999999, 9999999999)", "(2, 4)", "(-2, -3)", "(1, 6, 1, 1)x", "(True, 6)"])
def test_npy_whose_header_does_not_fit_its_size_is_unreadable(tmp_path: Path, shape: str) -> None:
    data = npy_bytes(np.zeros((2, 3), np.float32))
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    (tmp_path / "x.npy").write_bytes(data[:8] + len(header).to_bytes(2, "little") + header.encode() + data[128:])
    assert_unreadable(tmp_path / "x.npy")


def test_npy_header_is_never_evaluated(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').abort(),), }\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    assert_unreadable(tmp_path / "x.npy", "header")


@pytest.mark.parametrize("keep", [0, 1, 6, 9, 40, 127, 128, 140, 151])
def test_truncated_npy_is_unreadable(tmp_path: Path, keep: int) -> None:
    (tmp_path / "x.npy").write_bytes(npy_bytes(np.ones((2, 3), np.float32))[:keep])
    assert_unreadable(tmp_path / "x.npy")


def test_npy_with_bytes_after_the_values_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(npy_bytes(np.ones((2, 3), np.float32)) + b"\0")
    assert_unreadable(tmp_path / "x.npy", "25 bytes")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["x.npy", "x.png", "x.jpg"]), st.booleans())
def test_any_bytes_give_an_array_or_one_sentence(data: bytes, name: str, with_magic: bool) -> None:
    magic = {"x.npy": b"\x93NUMPY\x01\x00", "x.png": b"\x89PNG\r\n\x1a\n", "x.jpg": b"\xff\xd8\xff"}[name]
    with pytest.raises(UnreadableError, match=rf"^{name}: .*\.$"):
        decode(magic + data if with_magic else data, name)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA"])
def test_png_modes_keep_their_values(tmp_path: Path, rgb: np.ndarray, mode: str) -> None:
    expected = np.asarray(Image.fromarray(rgb).convert(mode))
    read = read_array(save(tmp_path / "x.png", rgb, mode))
    assert read.dtype == (np.bool_ if mode == "1" else np.uint8)
    assert np.array_equal(read, expected)
    assert mode != "1" or set(read.tobytes()) == {0, 1}


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_png_is_not_reduced(tmp_path: Path, colour: int, channels: int) -> None:
    values = np.random.default_rng(RNG_SEED).integers(0, 65536, (11, 7, channels)).astype(np.uint16)
    raw = values.astype(">u2").reshape(11, -1).view(np.uint8)
    (tmp_path / "x.png").write_bytes(make_png(7, 11, 16, colour, filtered(raw, 2 * channels)))
    read = read_array(tmp_path / "x.png")
    assert read.dtype == np.uint16
    assert np.array_equal(read, values if channels > 1 else values[..., 0])


def test_palette_is_replaced_by_its_colours(tmp_path: Path) -> None:
    palette = chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0]))
    rows = b"\0\0\1\0\1\0"
    opaque, clear = make_png(2, 2, 8, 3, rows, palette), make_png(2, 2, 8, 3, rows, palette, chunk(b"tRNS", b"\x80"))
    expected = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 255, 0], [255, 0, 0]]])
    assert np.array_equal(decode(opaque, "x.png").values, expected)
    read = decode(clear, "x.png").values
    assert np.array_equal(read[..., :3], expected)
    assert read[..., 3].tolist() == [[128, 255], [255, 128]]


def test_a_transparent_colour_is_part_of_the_layout(rgb: np.ndarray) -> None:
    rows = filtered(rgb.reshape(9, -1), 3)
    plain = decode(make_png(11, 9, 8, 2, rows), "x.png")
    transparent = decode(make_png(11, 9, 8, 2, rows, chunk(b"tRNS", b"\0\1\0\2\0\3")), "x.png")
    assert np.array_equal(plain.values, transparent.values)
    assert plain.layout != transparent.layout


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg(tmp_path: Path, rgb: np.ndarray, mode: str) -> None:
    read = read_array(save(tmp_path / "x.jpg", rgb, mode, quality=95))
    with Image.open(tmp_path / "x.jpg") as image:
        assert np.array_equal(read, np.asarray(image))
    assert read.dtype == np.uint8


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_every_truncation_is_unreadable(tmp_path: Path, rgb: np.ndarray, name: str) -> None:
    data = save(tmp_path / name, rgb).read_bytes()
    assert decode(data, name).values.shape == rgb.shape
    for keep in range(len(data)):
        with pytest.raises(UnreadableError):
            decode(data[:keep], name)


def test_every_flipped_byte_of_a_png_is_unreadable(tmp_path: Path, rgb: np.ndarray) -> None:
    data = save(tmp_path / "x.png", rgb).read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(UnreadableError):
            decode(bytes(damaged), "x.png")


@pytest.mark.parametrize("n_rows", [0, 2, 3, 5])
def test_png_with_other_than_the_promised_rows_is_unreadable(tmp_path: Path, n_rows: int) -> None:
    """Pillow by itself shows black where the rows end too early."""
    (tmp_path / "x.png").write_bytes(make_png(4, 4, 8, 0, b"\0abcd" * n_rows))
    assert_unreadable(tmp_path / "x.png", "does not hold the 4x4 pixels")


@pytest.mark.parametrize("colour", [1, 5, 7])
def test_png_with_a_contradictory_header_is_unreadable(tmp_path: Path, colour: int) -> None:
    (tmp_path / "x.png").write_bytes(make_png(4, 4, 8, colour, b"\0abcd" * 4))
    assert_unreadable(tmp_path / "x.png")


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (9, 13)])
def test_small_depths_and_interlacing(size: tuple[int, int], depth: int) -> None:
    width, height = size
    values = np.random.default_rng(RNG_SEED).integers(0, 2**depth, (height, width)).astype(np.uint8)
    scale = {1: 1, 2: 85, 4: 17, 8: 1}[depth]
    plain = make_png(width, height, depth, 0, packed(values, depth))
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = b"".join(packed(values[y::dy, x::dx], depth) for x, y, dx, dy in passes)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 1))
    interlaced = plain[:8] + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    for data in (plain, interlaced):
        assert np.array_equal(decode(data, "x.png").values, values * scale)


def test_animation_is_unreadable(tmp_path: Path, rgb: np.ndarray) -> None:
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    frames[0].save(tmp_path / "x.png", save_all=True, append_images=frames[1:])
    assert_unreadable(tmp_path / "x.png", "animation")


@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (40000, 40000), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_decompression_bomb_is_unreadable(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "x.png").write_bytes(make_png(width, height, 8, 0, bytes(100)))
    assert_unreadable(tmp_path / "x.png")


def test_jpeg_bomb_is_unreadable(tmp_path: Path, rgb: np.ndarray) -> None:
    data = save(tmp_path / "x.jpg", rgb).read_bytes()
    frame = data.index(b"\xff\xc0") + 5
    (tmp_path / "x.jpg").write_bytes(data[:frame] + struct.pack(">HH", 12000, 12000) + data[frame + 4 :])
    assert_unreadable(tmp_path / "x.jpg", "12000x12000 pixels")


def test_file_is_read_as_what_its_ending_says(tmp_path: Path, rgb: np.ndarray) -> None:
    save(tmp_path / "real.png", rgb)
    for name in ("x.jpg", "x.npy", "x.exr"):
        (tmp_path / name).write_bytes((tmp_path / "real.png").read_bytes())
        assert_unreadable(tmp_path / name)


def test_what_is_no_plain_file_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.npy")
    assert_unreadable(tmp_path / "folder.png", "not a regular file")
    assert_unreadable(tmp_path / "pipe.npy", "not a regular file")
    assert_unreadable(tmp_path / "none.png", "No such file")


def test_too_large_file_is_unreadable(tmp_path: Path, rgb: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 100)
    monkeypatch.setattr(images, "MAX_ARRAY_BYTES", 100)
    np.save(tmp_path / "x.npy", rgb)
    assert_unreadable(save(tmp_path / "x.png", rgb), "more than the 100")
    assert_unreadable(tmp_path / "x.npy", "more than the 100")
