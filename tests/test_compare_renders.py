from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from f3rm_verify import compare_renders as module
from f3rm_verify.compare_renders import compare_renders
from f3rm_verify.difference import Difference, Verdict
from f3rm_verify.policy import DIFF_POLICY, Limit, Policy
from f3rm_verify.render_store import BAND_ROWS, write_outputs
from f3rm_verify.run_dir import RENDERS, RunDir

IMAGES = ("frame_00001", "frame_00002")


def make_outputs(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "rgb": rng.random((20, 24, 3), np.float32),
        "depth": 1 + 9 * rng.random((20, 24, 1), np.float32),
        "feature": rng.standard_normal((20, 24, 16), np.float32),
    }


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal runs with our renders of two images."""
    for side in ("reference", "candidate"):
        for seed, image in enumerate(IMAGES):
            write_outputs(tmp_path / side / RENDERS, image, make_outputs(seed))
    return tmp_path / "reference", tmp_path / "candidate"


def plain_pair(tmp_path: Path, files: dict[str, np.ndarray]) -> tuple[Path, Path]:
    """Two equal runs with images as ns-eval writes them."""
    for side in ("reference", "candidate"):
        (tmp_path / side / "renders").mkdir(parents=True)
        for name, values in files.items():
            Image.fromarray(values).save(tmp_path / side / "renders" / name)
    return tmp_path / "reference", tmp_path / "candidate"


def compare(reference: Path, candidate: Path, policy: Policy = DIFF_POLICY) -> Difference:
    """The comparison, with what must hold for every one: sides swapped alike, and plain data."""
    result = compare_renders(RunDir(reference), RunDir(candidate), policy=policy)
    swapped = compare_renders(RunDir(candidate), RunDir(reference), policy=policy)
    assert [(p, n.verdict) for p, n in swapped.walk()] == [(p, n.verdict) for p, n in result.walk()]
    assert Difference.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))).verdict is result.verdict
    for _, node in result.walk():
        names = [child.name for child in node.children]
        assert names == sorted(set(names))
        assert node.artefact == "renders"
    return result


def faults(result: Difference) -> dict[str, Difference]:
    """Leaves that are not identical, by path below the root."""
    return {"/".join(path[1:]): node for path, node in result.leaves() if node.verdict is not Verdict.IDENTICAL}


def only_fault(result: Difference, path: str, verdict: Verdict = Verdict.DIFFERENT) -> Difference:
    found = faults(result)
    assert {name: node.verdict for name, node in found.items()} == {path: verdict}
    assert result.verdict is verdict
    return found[path]


def change(path: Path, edit: Callable[[np.ndarray], None]) -> None:
    if path.suffix == ".npy":
        values = np.load(path)
        edit(values)
        np.save(path, values)
    else:
        with Image.open(path) as image:
            values = np.array(image)
        edit(values)
        Image.fromarray(values).save(path)


def put(index: tuple[int, ...], value: object) -> Callable[[np.ndarray], None]:
    def edit(values: np.ndarray) -> None:
        values[index] = value

    return edit


def one_ulp(index: tuple[int, ...]) -> Callable[[np.ndarray], None]:
    def edit(values: np.ndarray) -> None:
        values[index] = np.nextafter(values[index], values.dtype.type(np.inf))

    return edit


def test_equal_renders_are_identical_node_by_node(pair: tuple[Path, Path]) -> None:
    result = compare(*pair)
    assert result.verdict is Verdict.IDENTICAL
    assert result.name == "renders"
    names = ["depth", "depth.png", "feature.bands", "feature.half", "feature.projection", "feature.projection.png"]
    assert [(c.name, [o.name for o in c.children]) for c in result.children] == [
        (image, [*names, "rgb", "rgb.png"]) for image in IMAGES
    ]
    assert all(node.verdict is Verdict.IDENTICAL for _, node in result.walk())
    assert result.children[0].children[-2].measures == {"shape": [20, 24, 3], "dtype": "float32"}


def test_a_run_is_identical_to_itself(pair: tuple[Path, Path]) -> None:
    assert compare(pair[0], pair[0]).verdict is Verdict.IDENTICAL


def test_one_changed_float_is_found_at_its_node(pair: tuple[Path, Path]) -> None:
    change(pair[1] / RENDERS / IMAGES[1] / "rgb.npy", one_ulp((17, 3, 2)))
    node = only_fault(compare(*pair), f"{IMAGES[1]}/rgb")
    assert node.measures["at"] == [17, 3, 2]
    assert node.measures["max_ulp"] == 1
    assert 0 < node.measures["max_abs"] < 1e-7
    assert (node.measures["n"], node.measures["n_different"]) == (480, 1)
    assert (node.measures["n_values"], node.measures["n_values_different"]) == (1440, 1)
    assert node.measures["psnr"] > 150
    assert node.measures["ssim"] == pytest.approx(1)
    assert node.measures["data_range"] == 1
    assert node.summary.startswith("1 of 1,440 values differs, largest ")
    assert "in 1 of 480 pixels, PSNR " in node.summary


def test_one_changed_pixel_of_a_png_is_found_at_its_node(pair: tuple[Path, Path]) -> None:
    change(pair[0] / RENDERS / IMAGES[0] / "rgb.png", lambda pixels: put((4, 5), pixels[4, 5] ^ 128)(pixels))
    node = only_fault(compare(*pair), f"{IMAGES[0]}/rgb.png")
    assert node.measures["max_abs"] == 128
    assert node.measures["at"] == [4, 5, 0]
    assert (node.measures["n_different"], node.measures["n_values_different"]) == (1, 3)
    assert node.measures["psnr"] == pytest.approx(20 * np.log10(255 / np.sqrt(3 * 128**2 / 1440)))


def test_flipped_bit_of_a_digest_is_found_at_its_node(pair: tuple[Path, Path]) -> None:
    change(pair[1] / RENDERS / IMAGES[0] / "feature.bands.npy", lambda table: put((2, 9), table[2, 9] ^ 16)(table))
    node = only_fault(compare(*pair), f"{IMAGES[0]}/feature.bands")
    assert node.summary == "1 of 3 bands of 8 rows differ: rows 16-23"
    assert node.measures == {"n": 3, "n_different": 1, "first_row": 16, "bands": [2], "severity": 0.0}
    assert module.BAND_ROWS == BAND_ROWS


def test_changed_features_are_found_though_the_reduced_copy_misses_them(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((130, 5, 16)).astype(np.float32)
    write_outputs(tmp_path / "reference" / RENDERS, "a", {"feature": features})
    one_ulp((64, 1, 5))(features)
    write_outputs(tmp_path / "candidate" / RENDERS, "a", {"feature": features})
    found = faults(compare(tmp_path / "reference", tmp_path / "candidate"))
    assert found["a/feature.bands"].measures["bands"] == [8]
    assert "a/feature.half" not in found


@pytest.mark.parametrize("output", ["feature.half", "feature.projection"])
def test_projection_and_reduced_copy_have_magnitudes(pair: tuple[Path, Path], output: str) -> None:
    change(pair[1] / RENDERS / IMAGES[0] / f"{output}.npy", one_ulp((1, 2, 2)))
    node = only_fault(compare(*pair), f"{IMAGES[0]}/{output}")
    assert node.measures["max_ulp"] == 1
    assert ("ssim" in node.measures) == (output == "feature.projection")


@pytest.mark.parametrize("both", [False, True])
def test_nan(pair: tuple[Path, Path], both: bool) -> None:
    change(pair[0] / RENDERS / IMAGES[0] / "depth.npy", put((3, 4, 0), np.nan))
    if both:
        change(pair[1] / RENDERS / IMAGES[0] / "depth.npy", put((3, 4, 0), np.nan))
        assert compare(*pair).verdict is Verdict.IDENTICAL
        return
    node = only_fault(compare(*pair), f"{IMAGES[0]}/depth")
    assert (node.measures["n_different"], node.measures["n_nan_mismatch"]) == (1, 1)
    assert node.measures["psnr_unavailable"] == node.measures["ssim_unavailable"] == "not every value is finite"


def test_sign_of_zero_is_a_difference_without_psnr(pair: tuple[Path, Path]) -> None:
    for run, zero in zip(pair, (0.0, -0.0), strict=True):
        change(run / RENDERS / IMAGES[0] / "rgb.npy", put((0, 0, 0), zero))
    node = only_fault(compare(*pair), f"{IMAGES[0]}/rgb")
    assert node.measures["n_sign_of_zero"] == 1
    assert node.measures["psnr_unavailable"] == "the mean square error is 0.0 in double precision"


@pytest.mark.parametrize(
    ("value", "other", "missing"),
    [(1e-200, 2e-200, {"psnr"}), (1.7e308, -1.7e308, {"psnr", "ssim"}), (1e200, 0.0, set())],
)
def test_extreme_values_break_nothing(tmp_path: Path, value: float, other: float, missing: set[str]) -> None:
    for side, number in (("reference", value), ("candidate", other)):
        values = np.zeros((8, 8))
        values[1, 1] = number
        write_outputs(tmp_path / side / RENDERS, "a", {"x": values})
    node = faults(compare(tmp_path / "reference", tmp_path / "candidate"))["a/x"]
    assert {key for key in ("psnr", "ssim") if key not in node.measures} == missing
    assert all(node.measures[f"{key}_unavailable"] for key in missing)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((20, 25, 3), np.float32), "shape [20, 24, 3] against [20, 25, 3]"),
        (np.zeros((20, 24, 3), np.float64), "dtype float32 against float64"),
        (np.zeros((20, 24), np.float32), "shape [20, 24, 3] against [20, 24]"),
    ],
)
def test_size_and_type_come_before_values(pair: tuple[Path, Path], values: np.ndarray, words: str) -> None:
    np.save(pair[1] / RENDERS / IMAGES[0] / "rgb.npy", values)
    result = compare_renders(RunDir(pair[0]), RunDir(pair[1]), policy=DIFF_POLICY)
    node = only_fault(result, f"{IMAGES[0]}/rgb")
    assert node.summary == words
    assert set(node.measures) <= {f"{s}_{k}" for s in ("reference", "candidate") for k in ("shape", "dtype")} | {
        "severity"
    }
    only_fault(compare(*pair), f"{IMAGES[0]}/rgb")


def test_equal_bytes_of_another_type_are_different(pair: tuple[Path, Path]) -> None:
    for run, dtype in zip(pair, (np.float32, np.int32), strict=True):
        np.save(run / RENDERS / IMAGES[0] / "rgb.npy", np.zeros((20, 24, 3), dtype))
    only_fault(compare(*pair), f"{IMAGES[0]}/rgb")


@pytest.mark.parametrize("name", ["depth.npy", "depth.png", "feature.bands.npy", "feature.half.npy"])
def test_output_missing_on_one_side(pair: tuple[Path, Path], name: str) -> None:
    (pair[1] / RENDERS / IMAGES[0] / name).unlink()
    node = only_fault(compare(*pair), f"{IMAGES[0]}/{name.removesuffix('.npy')}", Verdict.MISSING)
    assert "missing in " in node.summary
    assert (
        faults(compare_renders(RunDir(pair[0]), RunDir(pair[1]), policy=DIFF_POLICY)).popitem()[1].summary
        == "missing in candidate"
    )
    assert (
        faults(compare_renders(RunDir(pair[1]), RunDir(pair[0]), policy=DIFF_POLICY)).popitem()[1].summary
        == "missing in reference"
    )


def test_image_missing_on_one_side(pair: tuple[Path, Path]) -> None:
    shutil.rmtree(pair[0] / RENDERS / IMAGES[1])
    result = compare(*pair)
    assert {name.split("/")[0] for name in faults(result)} == {IMAGES[1]}
    assert result.verdict is Verdict.MISSING
    assert [child.verdict for child in result.children] == [Verdict.IDENTICAL, Verdict.MISSING]


@pytest.mark.parametrize("evidence", ["rgb", "feature.bands", "feature.projection"])
def test_evidence_missing_on_both_sides_is_never_identical(pair: tuple[Path, Path], evidence: str) -> None:
    """A PNG and a projection can be equal where the outputs are not."""
    for run in pair:
        (run / RENDERS / IMAGES[0] / f"{evidence}.npy").unlink()
    node = only_fault(compare(*pair), f"{IMAGES[0]}/{evidence}", Verdict.MISSING)
    assert node.summary.startswith("missing in reference and candidate; ")


def test_neither_side_has_renders(tmp_path: Path) -> None:
    for side in ("reference", "candidate"):
        (tmp_path / side / RENDERS).mkdir(parents=True)
    result = compare(tmp_path / "reference", tmp_path / "candidate")
    assert (result.verdict, result.children) == (Verdict.UNREADABLE, ())
    assert result.summary == "neither run has renders"


def test_one_side_has_no_renders(pair: tuple[Path, Path]) -> None:
    shutil.rmtree(pair[0] / RENDERS)
    result = compare(*pair)
    assert {node.verdict for _, node in result.walk()} == {Verdict.MISSING}


@pytest.mark.parametrize("name", ["rgb.npy", "rgb.png", "feature.bands.npy"])
@pytest.mark.parametrize("keep", [0, 20, -1])
@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)])
def test_truncated_file_is_unreadable_also_when_both_are(
    pair: tuple[Path, Path], name: str, keep: int, sides: tuple[int, ...]
) -> None:
    for side in sides:
        path = pair[side] / RENDERS / IMAGES[0] / name
        path.write_bytes(path.read_bytes()[:keep])
    node = only_fault(compare(*pair), f"{IMAGES[0]}/{name.removesuffix('.npy')}", Verdict.UNREADABLE)
    assert f"{name}: " in node.summary


def test_unreadable_names_its_side(pair: tuple[Path, Path]) -> None:
    (pair[1] / RENDERS / IMAGES[0] / "rgb.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    result = compare_renders(RunDir(pair[0]), RunDir(pair[1]), policy=DIFF_POLICY)
    assert faults(result)[f"{IMAGES[0]}/rgb.png"].summary == "candidate: rgb.png: not a PNG."


def test_damaged_equal_png_is_never_identical(pair: tuple[Path, Path]) -> None:
    for run in pair:
        path = run / RENDERS / IMAGES[0] / "rgb.png"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    only_fault(compare(*pair), f"{IMAGES[0]}/rgb.png", Verdict.UNREADABLE)


def test_same_pixels_in_another_encoding_are_identical(pair: tuple[Path, Path]) -> None:
    path = pair[1] / RENDERS / IMAGES[0] / "rgb.png"
    before = path.read_bytes()
    with Image.open(path) as image:
        image.load()
    image.save(path, compress_level=9)
    assert path.read_bytes() != before
    result = compare(*pair)
    assert result.verdict is Verdict.IDENTICAL
    assert result.children[0].children[-1].summary == "the same values in files with other bytes"


def test_symlink_is_not_followed(pair: tuple[Path, Path]) -> None:
    path = pair[1] / RENDERS / IMAGES[0] / "rgb.npy"
    path.unlink()
    path.symlink_to(pair[0] / RENDERS / IMAGES[0] / "rgb.npy")
    only_fault(compare(*pair), f"{IMAGES[0]}/rgb", Verdict.UNREADABLE)


def test_folder_that_leads_into_the_other_run_is_unreadable(pair: tuple[Path, Path]) -> None:
    shutil.rmtree(pair[1] / "verify")
    (pair[1] / "verify").symlink_to(pair[0] / "verify")
    result = compare(*pair)
    assert {node.verdict for _, node in result.walk()} == {Verdict.UNREADABLE}


def test_plain_images_are_one_node_each(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = {
        "eval_img_0000.png": rng.integers(0, 256, (16, 12, 3), np.uint8),
        "eval_img_0001.png": rng.integers(0, 65536, (16, 12)).astype(np.uint16),
        "eval_img_0002.jpg": rng.integers(0, 256, (16, 12, 3), np.uint8),
        "eval_img_0003.png": rng.random((16, 12)) < 0.5,
    }
    reference, candidate = plain_pair(tmp_path, files)
    result = compare(reference, candidate)
    assert [(c.name, c.verdict) for c in result.children] == [(name, Verdict.IDENTICAL) for name in sorted(files)]
    for name, data_range in (("eval_img_0000.png", 255), ("eval_img_0001.png", 65535), ("eval_img_0003.png", 1)):
        path = candidate / "renders" / name
        before = path.read_bytes()
        change(path, lambda pixels: put((7, 8), pixels[7, 8] ^ True)(pixels))
        node = only_fault(compare(reference, candidate), name)
        assert node.measures["max_abs"] == 1
        assert node.measures["at"][:2] == [7, 8]
        assert node.measures["data_range"] == data_range
        assert 0 < node.measures["ssim"] <= 1
        path.write_bytes(before)


def test_other_mode_or_palette_is_different(tmp_path: Path) -> None:
    pixels = np.tile(np.arange(4, dtype=np.uint8) * 60, (4, 1))
    reference, candidate = plain_pair(tmp_path, {"a.png": pixels, "b.png": pixels, "c.png": pixels})
    for run, other in ((reference, 9), (candidate, 10)):
        palette = Image.fromarray(pixels // 60).convert("P")
        palette.putpalette([0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, other])
        palette.save(run / "renders/a.png")
    Image.fromarray(pixels).convert("RGB").save(candidate / "renders/b.png")
    Image.fromarray(pixels.astype(np.uint16)).save(candidate / "renders/c.png")
    found = faults(compare(reference, candidate))
    assert {name: node.verdict for name, node in found.items()} == dict.fromkeys(
        ("a.png", "b.png", "c.png"), Verdict.DIFFERENT
    )
    assert found["a.png"].measures["at"] == [0, 3, 2]
    assert (
        "layout PNG L against PNG RGB"
        in faults(compare_renders(RunDir(reference), RunDir(candidate), policy=DIFF_POLICY))["b.png"].summary
    )


@pytest.mark.parametrize(("shape", "has_ssim"), [((2, 9), False), ((3, 9), True), ((6, 4), True), ((1, 1), False)])
def test_ssim_of_small_images(tmp_path: Path, shape: tuple[int, int], has_ssim: bool) -> None:
    reference, candidate = plain_pair(tmp_path, {"a.png": np.zeros(shape, np.uint8)})
    change(candidate / "renders/a.png", put((0, 0), 200))
    node = only_fault(compare(reference, candidate), "a.png")
    assert ("ssim" in node.measures) == has_ssim
    assert ("ssim_unavailable" in node.measures) != has_ssim


def test_ssim_is_that_of_scikit_image(tmp_path: Path) -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (32, 32, 3), np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-20, 20, a.shape), 0, 255).astype(np.uint8)
    reference, candidate = plain_pair(tmp_path, {"a.png": a})
    Image.fromarray(b).save(candidate / "renders/a.png")
    node = only_fault(compare(reference, candidate), "a.png")
    assert node.measures["ssim"] == pytest.approx(structural_similarity(a, b, channel_axis=2))
    assert node.measures["psnr"] == pytest.approx(peak_signal_noise_ratio(a, b))
    assert node.measures["max_abs"] == np.abs(a.astype(int) - b).max()
    assert node.measures["n_different"] == (a != b).any(axis=2).sum()


def test_bomb_is_unreadable_and_the_rest_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("f3rm_verify.readers.images.MAX_PIXELS", 100)
    runs = plain_pair(tmp_path, {"a.png": np.zeros((11, 10), np.uint8), "b.png": np.zeros((10, 10), np.uint8)})
    assert "11" in only_fault(compare(*runs), "a.png", Verdict.UNREADABLE).summary


def test_names_stay_unique_and_printable(tmp_path: Path) -> None:
    values = np.zeros((4, 4, 3), np.uint8)
    for side in ("reference", "candidate"):
        folder = tmp_path / side / "renders"
        (folder / "deep" / "er").mkdir(parents=True)
        for name in ("deep/rgb.npy", "deep/rgb.png.npy", "deep/er/rgb.npy"):
            np.save(folder / name, values)
        Image.fromarray(values).save(folder / "deep/rgb.png")
        shutil.copy(folder / "deep/rgb.png", os.fsencode(folder) + b"/\xff.png")
    shutil.copytree(tmp_path / "candidate/renders/deep", tmp_path / "candidate/renders/both.png")
    shutil.copy(tmp_path / "reference/renders/deep/rgb.png", tmp_path / "reference/renders/both.png")
    result = compare(tmp_path / "reference", tmp_path / "candidate")
    assert [child.name for child in result.children] == ["\\udcff.png", "both.png", "both.png/", "deep"]
    assert [child.name for child in result.children[-1].children] == ["er/rgb", "rgb", "rgb.png", "rgb.png.npy"]
    assert {name.split("/")[0] for name in faults(result)} == {"both.png"}


def test_no_warning_leaks_from_threads(pair: tuple[Path, Path]) -> None:
    change(pair[1] / RENDERS / IMAGES[0] / "rgb.npy", put((0, 0, 0), np.inf))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        only_fault(compare(*pair), f"{IMAGES[0]}/rgb")
    assert caught == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    dtype=st.sampled_from(["?", "u1", "u2", "i4", "i8", "f2", "f4", "f8"]),
    channels=st.sampled_from([1, 2, 3, 4, 6]),
    special=st.sampled_from([0.0, -0.0, np.nan, np.inf, 1.0]),
)
def test_any_flipped_bit_of_an_array_is_found(
    tmp_path: Path, data: st.DataObject, dtype: str, channels: int, special: float
) -> None:
    """Also in the header, where only padding could hide it."""
    values = np.random.default_rng(0).random((4, 5, channels)) * 100
    values[1, 1] = special
    with np.errstate(invalid="ignore"):
        values = values.astype(dtype)
    for side in ("reference", "candidate"):
        shutil.rmtree(tmp_path / side, ignore_errors=True)
        write_outputs(tmp_path / side / RENDERS, "a", {"x": values})
    stem = "x" if channels <= 4 else data.draw(st.sampled_from(["x.bands", "x.half", "x.projection"]))
    path = tmp_path / "candidate" / RENDERS / "a" / f"{stem}.npy"
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    found = faults(compare(tmp_path / "reference", tmp_path / "candidate"))
    assert set(found) == {f"a/{stem}"}
    allowed = {Verdict.DIFFERENT} if position >= 128 else {Verdict.DIFFERENT, Verdict.UNREADABLE}
    assert found[f"a/{stem}"].verdict in allowed


def limited(pattern: str = "*", **numbers: float) -> Policy:
    return Policy(limits={"renders": (Limit(pattern=pattern, **numbers),)})  # type: ignore[arg-type]


def outputs_by(pair: tuple[Path, Path], change_by: float) -> tuple[Path, Path]:
    """Adds to every output of the first image of the candidate."""
    outputs = {name: values + np.float32(change_by) for name, values in make_outputs(0).items()}
    write_outputs(pair[1] / RENDERS, IMAGES[0], outputs)
    return pair


def test_everything_of_an_image_is_reachable_by_limits(pair: tuple[Path, Path]) -> None:
    outputs_by(pair, 1e-3)
    assert compare(*pair).verdict is Verdict.DIFFERENT
    result = compare(*pair, policy=limited(absolute=0.0045))
    assert result.verdict is Verdict.WITHIN_TOLERANCE
    found = faults(result)
    assert {node.verdict for node in found.values()} == {Verdict.WITHIN_TOLERANCE}
    assert found[f"{IMAGES[0]}/rgb"].summary.endswith("; within the limits of *: absolute 0.0045")
    assert "; digests know only equal; the projection" in found[f"{IMAGES[0]}/feature.bands"].summary
    assert found[f"{IMAGES[0]}/rgb.png"].summary.endswith("it is the picture of rgb, which is within its limits")
    assert f"{IMAGES[0]}/feature.projection.png" in found


def test_a_picture_that_is_not_that_of_its_array_follows_nothing(pair: tuple[Path, Path]) -> None:
    outputs_by(pair, 1e-3)
    change(pair[1] / RENDERS / IMAGES[0] / "rgb.png", lambda pixels: put((4, 5), pixels[4, 5] ^ 128)(pixels))
    result = compare(*pair, policy=limited(absolute=0.0045))
    assert [name for name, node in faults(result).items() if node.verdict is Verdict.DIFFERENT] == [
        f"{IMAGES[0]}/rgb.png"
    ]


@pytest.mark.parametrize("output", ["feature.half", "feature.projection"])
def test_digests_follow_only_where_both_copies_are_within(pair: tuple[Path, Path], output: str) -> None:
    outputs_by(pair, 1e-3)
    change(pair[1] / RENDERS / IMAGES[0] / f"{output}.npy", put((1, 2, 2), 9.0))
    found = faults(compare(*pair, policy=limited(absolute=0.0045)))
    assert found[f"{IMAGES[0]}/feature.bands"].verdict is found[f"{IMAGES[0]}/{output}"].verdict is Verdict.DIFFERENT


def test_digests_need_a_limit_of_their_own(pair: tuple[Path, Path]) -> None:
    change(pair[1] / RENDERS / IMAGES[0] / "feature.bands.npy", lambda table: put((2, 9), table[2, 9] ^ 16)(table))
    for policy, verdict in (
        (limited(absolute=0.1), Verdict.WITHIN_TOLERANCE),
        (limited("*/rgb", absolute=0.1), Verdict.DIFFERENT),
    ):
        only_fault(compare(*pair, policy=policy), f"{IMAGES[0]}/feature.bands", verdict)


def test_share_of_pixels_and_psnr_as_limits(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (20, 20, 3), np.uint8)
    runs = plain_pair(tmp_path, {"a.png": pixels})

    def edit(values: np.ndarray) -> None:
        values[0, :4] += 50  # 4 of 400 pixels far away
        values[1:] += 1  # and 380 a little

    change(runs[1] / "renders/a.png", edit)
    for numbers, verdict in (
        ({"absolute": 1, "pixels": 0.01}, Verdict.WITHIN_TOLERANCE),
        ({"absolute": 1, "pixels": 0.0099}, Verdict.DIFFERENT),
        ({"absolute": 1}, Verdict.DIFFERENT),
        ({"absolute": 50}, Verdict.WITHIN_TOLERANCE),
        ({"pixels": 0.96}, Verdict.WITHIN_TOLERANCE),
        ({"pixels": 0.95}, Verdict.DIFFERENT),
        ({"psnr": 30}, Verdict.WITHIN_TOLERANCE),
        ({"psnr": 40}, Verdict.DIFFERENT),
        ({"psnr": 30, "pixels": 0.5}, Verdict.DIFFERENT),
        ({"ulps": 100}, Verdict.DIFFERENT),
    ):
        node = only_fault(compare(*runs, policy=limited(**numbers)), "a.png", verdict)
        assert ("n_outside" in node.measures) and node.measures["n_different"] == 384


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_within_no_limits(pair: tuple[Path, Path], value: float) -> None:
    change(pair[1] / RENDERS / IMAGES[0] / "depth.npy", put((3, 4, 0), value))
    for policy in (limited(absolute=1e30, relative=0.9), limited(psnr=0.1)):
        only_fault(compare(*pair, policy=policy), f"{IMAGES[0]}/depth")


def test_another_size_has_no_limits(pair: tuple[Path, Path]) -> None:
    np.save(pair[1] / RENDERS / IMAGES[0] / "rgb.npy", np.zeros((20, 25, 3), np.float32))
    only_fault(compare(*pair, policy=limited(absolute=1e30, psnr=0.1)), f"{IMAGES[0]}/rgb")


def test_a_vanishing_difference_has_any_psnr(pair: tuple[Path, Path]) -> None:
    for run, zero in zip(pair, (0.0, -0.0), strict=True):
        change(run / RENDERS / IMAGES[0] / "rgb.npy", put((0, 0, 0), zero))
    only_fault(compare(*pair, policy=limited(psnr=200)), f"{IMAGES[0]}/rgb", Verdict.WITHIN_TOLERANCE)


def test_features_are_compared_by_their_cosine_on_the_reduced_copy(pair: tuple[Path, Path]) -> None:
    change(pair[1] / RENDERS / IMAGES[0] / "feature.half.npy", lambda values: put((1, 2), -values[1, 2])(values))
    node = only_fault(compare(*pair), f"{IMAGES[0]}/feature.half")
    assert node.measures["cosine_min"] == pytest.approx(-1)
    assert node.measures["n_cosine"] == 480
    assert node.measures["cosine_mean"] == pytest.approx(478 / 480)
    assert "cosine 0.995833 (least -1.000000)" in node.summary


def test_lists_and_stacks_of_numbers_are_compared(tmp_path: Path) -> None:
    for side, number in (("reference", 0.0), ("candidate", 1.0)):
        (tmp_path / side / "renders").mkdir(parents=True)
        for name, shape in (("list", (7,)), ("stack", (3, 4, 2, 2))):
            values = np.zeros(shape)
            values.flat[5] = number
            np.save(tmp_path / side / "renders" / f"{name}.npy", values)
    found = faults(compare(tmp_path / "reference", tmp_path / "candidate"))
    assert {name: node.measures["n_values_different"] for name, node in found.items()} == {
        "list.npy": 1,
        "stack.npy": 1,
    }


def test_large_pictures_are_compared_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGE", 10)
    files = {f"{i}.png": np.zeros((10, 10), np.uint8) for i in range(9)}
    runs = plain_pair(tmp_path, files)
    change(runs[1] / "renders/3.png", put((0, 0), 200))
    only_fault(compare(*runs), "3.png")


def test_exr_images_are_compared_by_value(tmp_path: Path) -> None:
    import OpenEXR

    values = np.random.default_rng(0).random((12, 14, 3)).astype("f2")
    for side in ("reference", "candidate"):
        (tmp_path / side / "renders").mkdir(parents=True)
        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        OpenEXR.File(header, {"RGB": values.copy()}).write(str(tmp_path / side / "renders" / "a.exr"))
        values = values.copy()
        values[3, 4, 1] = np.nextafter(values[3, 4, 1], np.float16(2))
    node = only_fault(compare(tmp_path / "reference", tmp_path / "candidate"), "a.exr")
    assert (node.measures["max_ulp"], node.measures["at"], node.measures["n_different"]) == (1, [3, 4, 1], 1)
