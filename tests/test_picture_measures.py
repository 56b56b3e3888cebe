from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from f3rm_verify.bits import ValueLimits
from f3rm_verify.picture_measures import PictureDifference, picture_difference, picture_summary

Array = np.ndarray[Any, Any]


def base(shape: tuple[int, ...] = (60, 80, 3), dtype: str = "u1", seed: int = 0) -> Array:
    generator = np.random.default_rng(seed)
    if dtype.startswith("u"):
        return generator.integers(0, np.iinfo(dtype).max // 2, shape).astype(dtype)
    return generator.random(shape).astype(dtype)


def differing(edit: Any, **options: Any) -> tuple[Array, Array]:
    a = base(**options)
    b = a.copy()
    edit(b)
    return a, b


def noise(values: Array) -> None:
    where = np.random.default_rng(1).random(values.shape[:2]) < 0.05
    values[where] += values.dtype.type(1)


def everywhere(values: Array) -> None:
    generator = np.random.default_rng(1)
    values += generator.integers(0, 9, values.shape).astype(values.dtype)


def jitter(values: Array) -> None:
    """Up or down, everywhere."""
    if values.dtype.kind == "f":
        values += np.random.default_rng(1).standard_normal(values.shape).astype(values.dtype)
    else:
        values ^= values.dtype.type(1)


def block(values: Array) -> None:
    values[20:30, 40:55] += values.dtype.type(1)


def offset(values: Array) -> None:
    values += values.dtype.type(1)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4", "f8"])
@pytest.mark.parametrize("shape", [(60, 80), (60, 80, 1), (60, 80, 3), (60, 80, 4), (9, 300, 3), (3, 3), (5, 4, 3)])
@pytest.mark.parametrize("edit", [noise, everywhere, offset])
def test_ssim_and_psnr_are_those_of_scikit_image(shape: tuple[int, ...], dtype: str, edit: Any) -> None:
    a, b = differing(edit, shape=shape, dtype=dtype)
    if np.array_equal(a, b):
        b.flat[3] += 1
    measures = picture_difference(a, b).measures
    scale, window = measures["data_range"], min(7, min(shape[:2]) - (min(shape[:2]) + 1) % 2)
    x, y = a.astype(np.float64) / scale, b.astype(np.float64) / scale
    axis = 2 if len(shape) == 3 else None
    expected = structural_similarity(x, y, win_size=window, data_range=1, channel_axis=axis)
    assert measures["ssim"] == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert measures["psnr"] == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1))
    assert measures["severity"] == pytest.approx(10 ** (-measures["psnr"] / 20))


def test_ssim_of_a_small_spot_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the windows around it are computed, in strips of any height."""
    a, b = differing(lambda values: values[30:32, 70:].__iadd__(40))
    expected = structural_similarity(a, b, channel_axis=2)
    for strip in (1, 200, 2**16):
        monkeypatch.setattr("f3rm_verify.picture_measures._STRIP_VALUES", strip)
        assert picture_difference(a, b).measures["ssim"] == pytest.approx(expected, rel=1e-12)


def test_mask_and_distance_are_where_pixels_differ() -> None:
    a, b = differing(lambda values: values.__setitem__((4, 5, 1), values[4, 5, 1] + 7))
    found = picture_difference(a, b)
    assert np.argwhere(found.mask).tolist() == [[4, 5]]
    assert found.distance.dtype == np.float32
    assert np.argwhere(found.distance).tolist() == [[4, 5]]
    assert found.distance[4, 5] == 7
    assert found.measures["share"] == found.outside == 1 / 4800


def test_distances_of_what_is_not_finite() -> None:
    a, b = base((6, 8), "f4"), base((6, 8), "f4")
    a[0, 0], a[1, 1], b[1, 1], a[2, 2], b[2, 2] = np.nan, np.inf, np.inf, -np.inf, np.inf
    found = picture_difference(a, b)
    assert np.argwhere(found.distance).tolist() == [[0, 0], [2, 2]]
    assert np.isinf(found.distance[0, 0])
    assert found.measures["severity"] == 1
    assert found.measures["correlation"] is None
    assert found.psnr is None
    json.dumps({key: str(value) for key, value in found.measures.items()})


def test_the_region_is_the_densest_window() -> None:
    a, b = differing(block)
    row, column, height, width = picture_difference(a, b).measures["region"]
    assert (height, width) == (32, 32)
    assert row <= 20 and row + 32 >= 30 and column <= 40 and column + 32 >= 55
    assert picture_difference(a, b).measures["region_share"] == 150 / 1024


def test_the_region_of_equal_densities_has_the_largest_distances() -> None:
    def edit(values: Array) -> None:
        values += 1
        values[50, 70] += 90

    row, column, *_ = picture_difference(*differing(edit)).measures["region"]
    assert 19 <= row <= 28 and 39 <= column <= 48


@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40))))
@settings(max_examples=40, deadline=None)
def test_the_densest_window_is_that_of_a_plain_loop(mask: Array) -> None:
    if not mask.any():
        return
    a, b = np.zeros(mask.shape, np.uint8), mask.astype(np.uint8)
    row, column, height, width = picture_difference(a, b).measures["region"]
    counts = [
        int(mask[i : i + height, j : j + width].sum())
        for i in range(mask.shape[0] - height + 1)
        for j in range(mask.shape[1] - width + 1)
    ]
    assert mask[row : row + height, column : column + width].sum() == max(counts)


@pytest.mark.parametrize(
    ("edit", "words", "low", "high"),
    [
        (noise, "as speckle", 0.8, 1.0),
        (jitter, "as speckle", 0.8, 1.0),
        (block, "as structure", 0.0, 0.3),
        (offset, "as structure", 0.0, 1e-6),
    ],
)
@pytest.mark.parametrize("dtype", ["u1", "f4"])
def test_speckle_against_structure(edit: Any, words: str, low: float, high: float, dtype: str) -> None:
    found = picture_difference(*differing(edit, dtype=dtype))
    assert low <= found.measures["speckle"] <= high
    assert picture_summary(found.measures).endswith(words)


def test_patches_are_connected_pixels() -> None:
    def edit(values: Array) -> None:
        block(values)
        values[0, 0] += 1
        values[1, 1] += 1  # touches it at a corner
        values[50, 3] += 1

    measures = picture_difference(*differing(edit)).measures
    assert (measures["n_patches"], measures["largest_patch"], measures["n_different"]) == (3, 150, 153)


def test_severity_orders_pictures() -> None:
    sizes = [picture_difference(*differing(lambda values, n=n: values[:n].__iadd__(n))).measures for n in (1, 5, 50)]
    assert [m["severity"] for m in sizes] == sorted(m["severity"] for m in sizes)
    assert all(0 < m["severity"] <= 1 for m in sizes)


@given(st.data(), st.sampled_from(["u1", "u2", "i4", "f2", "f4", "f8", "?"]))
@settings(max_examples=60, deadline=None)
def test_swapped_sides_measure_the_same(data: st.DataObject, dtype: str) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=3, max_side=6))
    a, b = (data.draw(hnp.arrays(dtype, shape)) for _ in range(2))
    if a.tobytes() == b.tobytes():
        return
    limits = ValueLimits(absolute=data.draw(st.floats(0, 100)))
    found = [picture_difference(*sides, limits=limits) for sides in ((a, b), (b, a))]
    assert found[0].measures.keys() == found[1].measures.keys()
    for key, value in found[0].measures.items():
        other = found[1].measures[key]
        assert value == other or value == pytest.approx(other, nan_ok=True), key
    assert 0 <= found[0].measures["n_outside"] <= found[0].measures["n_different"]
    assert found[0].mask.sum() == found[0].measures["n_different"] > 0
    assert 0 <= found[0].measures["severity"] <= 1
    assert 0 <= found[0].measures["speckle"] <= 1


def test_infinite_psnr_where_only_zeros_have_other_signs() -> None:
    a, b = np.zeros((8, 8), "f4"), np.zeros((8, 8), "f4")
    a[0, 0] = a[1, 1] = b[1, 1] = 1.0
    a[0, 0], b[0, 0] = 0.0, -0.0
    found = picture_difference(a, b)
    assert isinstance(found, PictureDifference)
    assert found.psnr == math.inf
    assert found.measures["severity"] == 0


def test_flip_is_that_of_its_reference_package_on_request() -> None:
    import flip_evaluator

    a, b = differing(block, dtype="u1")
    found = picture_difference(a, b, flip=True)
    sides = [(side / 255).astype(np.float32) for side in (a, b)]
    expected, mean, _ = flip_evaluator.evaluate(*sides, "LDR", applyMagma=False)
    assert found.flip is not None
    assert np.array_equal(found.flip, expected[..., 0])
    assert found.measures["flip_mean"] == pytest.approx(mean)
    assert f"FLIP {mean:.4f}" in picture_summary(found.measures)
    swapped = picture_difference(b, a, flip=True)
    assert swapped.measures["flip_mean"] == pytest.approx(mean)
    assert picture_difference(a, b).flip is None
    assert "flip_mean" not in picture_difference(a, b).measures


@pytest.mark.parametrize("scale", [2.0, -1.0, np.nan])
def test_flip_of_what_is_no_colour_is_not_available(scale: float) -> None:
    a, b = differing(block, dtype="f4")
    for sides in ((a[..., 0], b[..., 0]), (a * np.float32(scale), b)):
        found = picture_difference(*sides, flip=True)
        assert found.flip is None
        assert found.measures["flip_unavailable"].startswith("it is defined for")
