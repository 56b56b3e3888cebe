"""Pictures for reports: what a browser opens is kept as it is, the rest is drawn; no difference is invisible."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from f3rm_verify.assets import Assets
from f3rm_verify.picture_assets import heat_map, keep_pictures
from f3rm_verify.picture_measures import picture_difference
from f3rm_verify.readers.images import Picture, decode

Array = np.ndarray[Any, Any]


def pair(dtype: str, shape: tuple[int, ...] = (20, 30, 3)) -> tuple[Array, Array]:
    """Two that differ in one pixel, by one step or ulp."""
    generator = np.random.default_rng(0)
    if dtype == "bool":
        a = generator.random(shape) < 0.5
    elif dtype.startswith("u"):
        a = generator.integers(0, 200, shape).astype(dtype)
    else:
        a = generator.random(shape).astype(dtype)
    b = a.copy()
    b[7, 9] = (
        ~a[7, 9] if dtype == "bool" else a[7, 9] + 1 if dtype[0] == "u" else np.nextafter(a[7, 9], a.dtype.type(2))
    )
    return a, b


def encoded(values: Array, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, kind)
    return stream.getvalue()


def kept(folder: Path, a: Array, b: Array, layout: str = "npy", **options: Any) -> dict[str, Array]:
    """What is kept, decoded; the heat map as indices of its palette."""
    assets = Assets(folder)
    found = picture_difference(a, b, flip=options.pop("flip", False)) if a.shape == b.shape else None
    measures = keep_pictures(assets, (b"", b""), (Picture(a, layout), Picture(b, layout)), found, **options)
    pictures = {}
    for key, name in measures["assets"].items():
        content = assets.read(name)
        assert content is not None
        pictures[key] = np.asarray(Image.open(io.BytesIO(content)))
    return pictures


@pytest.mark.parametrize("dtype", ["u1", "u2", "f2", "f4", "f8", "bool"])
@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 1), (20, 30, 2), (20, 30, 3), (20, 30, 4), (20, 30, 9)])
def test_one_pixel_of_one_step_is_seen_in_the_heat_map_of_every_kind(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    found = kept(tmp_path, *pair(dtype, shape))
    assert set(found) == {"reference", "candidate", "heat", "thumbnail"}
    assert np.argwhere(found["heat"]).tolist() == [[7, 9]]
    assert found["reference"].shape[:2] == found["candidate"].shape[:2] == (20, 30)
    assert found["reference"].dtype == np.uint8


@pytest.mark.parametrize("shape", [(5,), (3, 1), (1, 3), (4, 5, 2, 2), (2, 2, 2, 2, 2)])
def test_arrays_of_any_form_are_shown(tmp_path: Path, shape: tuple[int, ...]) -> None:
    a = np.random.default_rng(0).random(shape)
    assert {"reference", "candidate", "thumbnail"} <= set(kept(tmp_path, a, a[..., :1] + np.zeros((1, *shape))))


def test_distances_are_on_a_logarithmic_scale() -> None:
    a = np.zeros((1, 6), np.uint8)
    b = np.array([[0, 1, 2, 16, 254, 255]], np.uint8)
    index = heat_map(picture_difference(a, b), a.dtype)[0].tolist()
    assert index[0] == 0 and index[1] == 1 and index[-1] == 254
    assert index == sorted(index) and abs(index[3] - 127) < 3  # half of the way to 255 = 16 * 16


def test_signed_zeros_and_nan_payloads_are_seen_and_infinite_distances_stand_out() -> None:
    a = np.array([[0.0, 1.0, 1.0, np.nan]], np.float32)
    b = np.array([[-0.0, np.nan, 1.0, 0]], np.float32)
    b.view(np.uint32)[0, 3] = 0x7FC00001
    assert heat_map(picture_difference(a, b), a.dtype)[0].tolist() == [1, 255, 0, 1]


def test_the_palette_is_black_only_where_nothing_differs(tmp_path: Path) -> None:
    assets = Assets(tmp_path)
    a, b = pair("f4")
    pictures = Picture(a, "npy"), Picture(b, "npy")
    name = keep_pictures(assets, (b"", b""), pictures, picture_difference(a, b))["assets"]["heat"]
    with Image.open(tmp_path / name) as image:
        palette = np.array(image.getpalette()).reshape(-1, 3)
    assert len(palette) == 256 and palette[0].tolist() == [0, 0, 0] and palette[255].tolist() == [255] * 3
    assert (palette[1:].max(axis=1) > 190).all()


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", "png"), ("JPEG", "jpg")])
def test_what_a_browser_opens_is_kept_as_it_is(tmp_path: Path, kind: str, suffix: str) -> None:
    data = [encoded(values, kind) for values in pair("u1")]
    pictures = [decode(content, f"a.{suffix}") for content in data]
    assets = Assets(tmp_path)
    names = keep_pictures(assets, data, pictures)["assets"]
    assert [assets.read(names[side]) for side in ("reference", "candidate")] == data
    assert names["reference"].endswith(suffix) and "heat" not in names


def test_16_bit_is_drawn_in_8(tmp_path: Path) -> None:
    data = [encoded(values) for values in pair("u2", (20, 30))]
    pictures = [decode(content, "a.png") for content in data]
    assets = Assets(tmp_path)
    name = keep_pictures(assets, data, pictures)["assets"]["reference"]
    with Image.open(tmp_path / name) as image:
        assert image.mode == "L"


def test_both_sides_have_one_scale(tmp_path: Path) -> None:
    a = np.linspace(0, 10, 600, dtype=np.float32).reshape(20, 30)
    found = kept(tmp_path, a, a / 2)
    assert found["reference"].max() == 255 and abs(int(found["candidate"].max()) - 128) <= 1


def test_channels_of_an_exr_come_by_name_and_are_shown_as_colours(tmp_path: Path) -> None:
    a = np.zeros((4, 5, 3), np.float32)
    a[..., 2] = 1  # red, behind blue and green
    found = kept(tmp_path, a, a * 0.5, "EXR B float32, G float32, R float32")
    assert found["reference"][0, 0].tolist() == [255, 0, 0]


def test_large_ones_are_reduced_but_not_the_heat_map(tmp_path: Path) -> None:
    a = np.zeros((3000, 3000), np.float32)
    b = a.copy()
    b[1, 1] = 1
    found = kept(tmp_path, a, b)
    assert found["heat"].shape == (3000, 3000) and found["reference"].shape == (1500, 1500)
    assert max(found["thumbnail"].shape) <= 320


def test_the_flip_map_is_kept_where_it_was_made(tmp_path: Path) -> None:
    a, b = pair("f4", (32, 32, 3))
    b[:8] = 1 - b[:8]
    assert kept(tmp_path, a, b, flip=True)["flip"].shape == (32, 32)


def test_nobody_asked(tmp_path: Path) -> None:
    a, b = pair("f4")
    assert keep_pictures(Assets(), (b"", b""), (Picture(a, "npy"), Picture(b, "npy"))) == {}
