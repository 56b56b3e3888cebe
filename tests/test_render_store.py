from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from f3rm_verify import render_store
from f3rm_verify.errors import TrainingError
from f3rm_verify.render_store import (
    band_digests,
    check_disk_budget,
    estimate_bytes,
    project,
    to_png,
    write_outputs,
)

RNG = np.random.default_rng


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("values", "png_mode"),
    [
        (RNG(0).random((6, 5, 3), np.float32), "RGB"),
        (RNG(0).random((6, 5, 4), np.float32), "RGBA"),
        (RNG(0).random((6, 5, 2)), "RGB"),
        (RNG(0).random((6, 5, 1)).astype(np.float16), "L"),
        (RNG(0).random((6, 5)), "L"),
        (RNG(0).integers(0, 256, (6, 5, 3), np.uint8), "RGB"),
        (RNG(0).integers(-9, 9, (6, 5, 1)), "L"),
        (RNG(0).random((6, 5, 1)) < 0.5, "L"),
    ],
    ids=["rgb", "rgba", "two", "half", "flat", "uint8", "int64", "bool"],
)
def test_small_outputs_are_stored_without_loss(tmp_path: Path, values: np.ndarray, png_mode: str) -> None:
    write_outputs(tmp_path, "img-0001", {"out.x": values})
    assert files(tmp_path) == ["img-0001/out.x.npy", "img-0001/out.x.png"]
    read = np.load(tmp_path / "img-0001/out.x.npy")
    assert (read.dtype, read.shape, read.tobytes()) == (values.dtype, values.shape, values.tobytes())
    with Image.open(tmp_path / "img-0001/out.x.png") as image:
        assert (image.mode, image.size) == (png_mode, (5, 6))


def test_features_are_stored_as_digests_projection_and_reduced_copy(tmp_path: Path) -> None:
    features = RNG(0).standard_normal((130, 33, 64), np.float32)
    write_outputs(tmp_path, "a", {"feature": features})
    names = ["a/feature.bands.npy", "a/feature.half.npy", "a/feature.projection.npy", "a/feature.projection.png"]
    assert files(tmp_path) == names
    bands, half, projection = (np.load(tmp_path / name) for name in names[:3])
    assert (bands.dtype, bands.shape) == (np.uint8, (17, 16))
    assert (projection.dtype, projection.shape) == (np.float32, (130, 33, 3))
    assert np.array_equal(half, features[::3, ::3].astype(np.float16))
    assert half.shape == (44, 11, 64)


def test_writing_twice_gives_the_same_bytes_and_memory_order_does_not_matter(tmp_path: Path) -> None:
    features, depth = RNG(0).random((20, 9, 8), np.float32), RNG(1).random((20, 9, 1), np.float32)
    write_outputs(tmp_path / "1", "a", {"feature": features, "depth": depth})
    write_outputs(tmp_path / "2", "a", {"depth": np.asfortranarray(depth), "feature": np.asfortranarray(features)})
    write_outputs(tmp_path / "1", "a", {"feature": features, "depth": depth})
    assert files(tmp_path / "1") == files(tmp_path / "2")
    for name in files(tmp_path / "1"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize(("row", "band"), [(0, 0), (7, 0), (8, 1), (17, 2)])
def test_one_flipped_bit_changes_the_digest_of_its_band_alone(row: int, band: int) -> None:
    features = RNG(0).standard_normal((18, 5, 6), np.float32)
    changed = features.copy()
    changed.view(np.uint32)[row, 3, 2] ^= 1
    assert np.flatnonzero((band_digests(features) != band_digests(changed)).any(axis=1)).tolist() == [band]


def test_digest_covers_type_and_shape() -> None:
    zeros = np.zeros((8, 4, 6), np.float32)
    variants = [zeros, zeros.view(np.int32), zeros.reshape(8, 6, 4), zeros.reshape(4, 8, 6), -zeros]
    digests = {band_digests(values)[0].tobytes() for values in variants}
    assert len(digests) == len(variants)


def test_digests_and_projection_never_change() -> None:
    """They are compared between runs of different versions: another algorithm needs another file ending."""
    values = (np.arange(9 * 2 * 5) % 7).astype(np.float32).reshape(9, 2, 5)
    assert band_digests(values)[1].tobytes().hex() == "1538f87a3f81d3389f94f1eb2934a362"
    expected = np.array([0, 14, -4])
    assert np.array_equal(np.rint(project(values)[0, 1].astype(np.float64) * np.sqrt(5)), expected)


def test_projection_is_a_sum_with_fixed_signs_in_any_order() -> None:
    features = RNG(0).standard_normal((3, 4, 768), np.float32)
    signs = render_store._signs(768)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.1
    assert len(np.unique(signs, axis=1)[0]) == 3
    expected = sum(features[..., c, None].astype(np.float64) * signs[c] for c in reversed(range(768)))
    assert np.array_equal(project(features), (expected / np.sqrt(768)).astype(np.float32))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite_break_nothing(tmp_path: Path, channels: int, dtype: type) -> None:
    values = RNG(0).random((9, 8, channels)).astype(dtype)
    values[0, 0], values[1, 1], values[2, 2] = np.nan, np.inf, -np.inf
    values[3, 3], values[4, 4] = np.finfo(dtype).max, np.finfo(dtype).min
    write_outputs(tmp_path, "some", {"x": values})
    write_outputs(tmp_path, "all", {"x": np.full_like(values, np.nan)})
    stem = "x" if channels <= 4 else "x.projection"
    for image in ("some", "all"):
        assert np.asarray(Image.open(tmp_path / image / f"{stem}.png")).shape[:2] == (9, 8)
    if channels <= 4:
        assert np.load(tmp_path / "some/x.npy").tobytes() == values.tobytes()


def test_png_shows_what_a_person_expects() -> None:
    colours = np.array([[[-1.0, 0.0, 0.5], [1.0, 2.0, np.nan]]], np.float32)
    assert to_png(colours).tolist() == [[[0, 0, 128], [255, 255, 0]]]
    depth = np.array([[2.0, np.inf, 4.0, 6.0]])
    assert to_png(depth[..., None]).tolist() == to_png(depth).tolist() == [[0, 0, 128, 255]]
    assert to_png(np.full((2, 2), 3.0)).tolist() == [[0, 0], [0, 0]]
    assert to_png(np.array([[False, True]])).tolist() == [[0, 255]]
    assert to_png(np.array([[-1.7e308, 1.7e308]])).tolist() == [[0, 255]]


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "a/b", "a\\b", "a b", "a\n", "a\0", "é", "x" * 101])
def test_names_that_are_no_plain_file_names_are_refused(tmp_path: Path, name: str) -> None:
    values = np.zeros((2, 2, 3), np.float32)
    for image, output in ((name, "rgb"), ("image", name)):
        with pytest.raises(TrainingError, match=r"cannot be stored: its name must"):
            write_outputs(tmp_path, image, {"first": values, output: values})
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["x.bands", "x.half", "x.projection"])
def test_output_names_that_would_meet_those_of_features_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TrainingError, match="end with none of"):
        write_outputs(tmp_path, "image", {name: np.zeros((2, 2, 3))})


@pytest.mark.parametrize(
    "values",
    [np.zeros(3), np.zeros((2, 2, 2, 2)), np.zeros((0, 2, 3)), np.zeros((2, 2), complex), np.full((2, 2), None)],
    ids=["line", "volume", "empty", "complex", "object"],
)
def test_values_that_are_no_picture_are_refused_before_anything_is_written(tmp_path: Path, values: np.ndarray) -> None:
    with pytest.raises(TrainingError, match="'bad'"):
        write_outputs(tmp_path, "image", {"good": np.zeros((2, 2, 3)), "bad": values})
    assert files(tmp_path) == []


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    write_outputs(tmp_path, "image", {"x": np.zeros((2, 2, 3))})
    before = (tmp_path / "image/x.npy").read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_outputs(tmp_path, "image", {"x": np.ones((2, 2, 3))})
    assert files(tmp_path) == ["image/x.npy", "image/x.png"]
    assert (tmp_path / "image/x.npy").read_bytes() == before


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (37, 53, 1), (37, 53, 2), (37, 53, 3), (37, 53, 4), (130, 70, 5), (65, 200, 64), (3, 7, 1536)]
)
def test_estimate_is_an_upper_bound_and_not_far_off(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    noise = RNG(0).integers(0, 2**32, shape, np.uint32).view(np.float32)
    write_outputs(tmp_path, "a", {"x": np.where(np.isfinite(noise), noise, 0)})
    write_outputs(tmp_path, "b", {"x": RNG(0).random(shape, np.float32)})
    used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    estimate = estimate_bytes({"x": shape}, 2)
    assert used <= estimate <= 1.5 * used + 2 * 2048


def test_estimate_adds_outputs_and_images() -> None:
    one, other = {"rgb": (10, 20, 3)}, {"feature": (10, 20, 512)}
    assert estimate_bytes({**one, **other}, 7) == 7 * (estimate_bytes(one, 1) + estimate_bytes(other, 1))
    assert estimate_bytes({}, 7) == estimate_bytes(one, 0) == 0


def test_disk_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = tmp_path / "not" / "yet"
    check_disk_budget(later, 1000, 1000)
    with pytest.raises(TrainingError, match=r"3\.0 MiB, more than their budget of 1\.0 MiB"):
        check_disk_budget(later, 3 * 2**20, 2**20)
    asked: list[Path] = []

    def usage(path: Path) -> object:
        asked.append(path)
        return shutil._ntuple_diskusage(2**40, 2**40, 2**20)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(TrainingError, match=r"2\.0 GiB, and only 1\.0 MiB are free"):
        check_disk_budget(later, 2**31, 2**40)
    assert asked == [tmp_path]


def test_needs_no_torch() -> None:
    code = "import sys, f3rm_verify.render_store; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
