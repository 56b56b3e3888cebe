"""The built-in scene: the same pixels everywhere, cameras that fit the pictures, nobody else's files touched."""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from f3rm_verify import scene
from f3rm_verify.errors import UnreadableError, UsageError

#: Changes only together with how the scene looks. Results on the built-in scene before and after do not compare.
EXPECTED_DIGEST = "ada470366fe306089a04df33c6ef07ed"

#: What NumPy may do to a pixel: exactly rounded, element by element, or only moving data.
EXACT_NUMPY = {
    "abs", "arange", "array", "asarray", "ascontiguousarray", "float64", "floor", "full", "int64", "maximum",
    "minimum", "sign", "sqrt", "stack", "uint8", "where", "zeros", "zeros_like",
}  # fmt: skip
INEXACT_METHODS = {"sum", "mean", "dot", "prod", "cumsum", "cumprod", "std", "var", "sin", "cos", "tan", "exp", "pow"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scene.write_scene(tmp_path_factory.mktemp("scene") / "data")


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


@pytest.fixture(scope="module")
def ids() -> list[NDArray[np.int64]]:
    return [scene.id_buffer(view) for view in range(scene.VIEWS)]


def image_path(folder: Path, view: int) -> Path:
    return folder / f"images/frame_{view + 1:05d}.png"


def pixels(folder: Path, view: int) -> NDArray[np.uint8]:
    with Image.open(image_path(folder, view)) as image:
        return np.asarray(image)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def poses(folder: Path) -> NDArray[np.float64]:
    frames = json.loads((folder / "transforms.json").read_text())["frames"]
    return np.array([frame["transform_matrix"] for frame in frames])


def test_same_pixels_on_every_machine(written: Path) -> None:
    assert scene.scene_digest(written) == EXPECTED_DIGEST == scene.DIGEST


def test_twice_the_same_files(written: Path, tmp_path: Path) -> None:
    again = scene.write_scene(tmp_path)
    assert files(again) == files(written)
    assert len(files(again)) == scene.VIEWS + 2


def test_pixels_come_from_exact_operations_only() -> None:
    tree = ast.parse(inspect.getsource(scene))
    of_numpy, methods = set(), set()
    for node in ast.walk(tree):
        assert not isinstance(node, ast.MatMult | ast.Pow)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "np":
            of_numpy.add(node.attr)
        elif isinstance(node, ast.Attribute):
            methods.add(node.attr)
    assert of_numpy <= EXACT_NUMPY
    assert methods.isdisjoint(INEXACT_METHODS)


def test_transforms_are_nerfstudio_format(written: Path) -> None:
    meta = json.loads((written / "transforms.json").read_text())
    assert meta["camera_model"] == "OPENCV"
    assert (meta["w"], meta["h"], meta["cx"], meta["cy"]) == (scene.WIDTH, scene.HEIGHT, 32.0, 32.0)
    assert meta["fl_x"] == meta["fl_y"] == scene.FOCAL
    assert [frame["file_path"] for frame in meta["frames"]] == [f"images/frame_{i:05d}.png" for i in range(1, 41)]
    for view in range(scene.VIEWS):
        assert pixels(written, view).shape == (scene.HEIGHT, scene.WIDTH, 3)


def test_poses_are_rotations_that_look_at_the_objects_from_outside(written: Path) -> None:
    matrices = poses(written)
    rotations, positions = matrices[:, :3, :3], matrices[:, :3, 3]
    assert matrices.shape == (scene.VIEWS, 4, 4)
    assert np.array_equal(matrices[:, 3], np.tile([0.0, 0.0, 0.0, 1.0], (scene.VIEWS, 1)))
    assert np.abs(np.swapaxes(rotations, 1, 2) @ rotations - np.eye(3)).max() <= 1e-12
    assert np.abs(np.linalg.det(rotations) - 1.0).max() <= 1e-12
    distances = np.linalg.norm(positions, axis=1)
    assert distances.min() >= 2.5 and distances.max() <= 3.5
    assert (rotations[:, 2, 1] > 0.5).all(), "the picture's up is the world's up"
    assert (np.einsum("vi,vi->v", rotations[:, :, 2], positions) > 0.98 * distances).all(), "looks along -z"


def test_nerfstudio_centres_the_cameras_above_the_middle(written: Path) -> None:
    matrices = poses(written)
    up = matrices[:, :3, 1].mean(axis=0)
    middle = matrices[:, :3, 3].mean(axis=0)
    assert np.abs(up[:2]).max() <= 1e-12 and np.abs(middle[:2]).max() <= 0.01
    scale = 1.0 / np.abs(matrices[:, :3, 3] - middle).max()
    for thing in scene.OBJECTS:
        assert np.abs((np.array(thing.centre) - middle) * scale).max() <= 0.6, "well inside the contracted unit box"


def test_every_camera_sees_the_objects(ids: list[NDArray[np.int64]]) -> None:
    assert all(0.25 <= (buffer > 0).mean() <= 0.45 for buffer in ids)
    for number in range(1, len(scene.OBJECTS) + 1):
        seen = [int((buffer == number).sum()) for buffer in ids]
        assert sum(count >= 30 for count in seen) >= 25, f"object {number} is in too few views"
    hidden = [number for buffer in ids for number in (2, 3, 4, 5) if (buffer == number).sum() < 5]
    assert hidden, "objects hide each other somewhere, so that one view is not enough"


@pytest.mark.parametrize("view", range(scene.VIEWS))
def test_neighbouring_views_differ(written: Path, view: int) -> None:
    ring, half = divmod(view, scene.VIEWS // 2)[0], scene.VIEWS // 2
    neighbour = ring * half + (view + 1) % half
    one, other = (pixels(written, v).astype(np.float64) for v in (view, neighbour))
    assert (one != other).any(axis=2).mean() > 0.15
    assert np.abs(one - other).mean() > 3.0


IS_COLOUR_OF = {
    2: lambda red, green, blue: red > blue,  # orange, red, cream
    3: lambda red, green, blue: green > red,  # blue to green
    4: lambda red, green, blue: red > min(green, blue) + 20,  # yellow, purple
}


@pytest.mark.parametrize("number", IS_COLOUR_OF)
def test_a_sphere_is_where_the_poses_say(written: Path, ids: list[NDArray[np.int64]], number: int) -> None:
    centre = np.array(scene.OBJECTS[number - 1].centre)
    checked = 0
    for view, pose in enumerate(poses(written)):
        x, y, z = pose[:3, :3].T @ (centre - pose[:3, 3])
        column, row = (int(np.floor(32.0 + scene.FOCAL * c / -z)) for c in (x, -y))
        around = ids[view][row - 1 : row + 2, column - 1 : column + 2]
        if (around == number).all():
            checked += 1
            assert IS_COLOUR_OF[number](*pixels(written, view)[row, column].astype(int))
        else:
            others = [np.array(scene.OBJECTS[i - 1].centre) for i in np.unique(around) if i not in (0, number)]
            distances = [np.linalg.norm(other - pose[:3, 3]) for other in others]
            assert min(distances) < np.linalg.norm(centre - pose[:3, 3]), "hidden, then by something in front of it"
    assert checked >= 20


@pytest.mark.parametrize("number", IS_COLOUR_OF)
def test_outlines_are_exact_to_the_pixel(written: Path, ids: list[NDArray[np.int64]], number: int) -> None:
    thing = scene.OBJECTS[number - 1]
    assert isinstance(thing, scene.Sphere)
    u, v = np.meshgrid(np.arange(scene.WIDTH) + 0.5, np.arange(scene.HEIGHT) + 0.5)
    in_camera = np.stack([(u - 32.0) / scene.FOCAL, (32.0 - v) / scene.FOCAL, -np.ones_like(u)], axis=-1)
    in_camera /= np.linalg.norm(in_camera, axis=-1, keepdims=True)
    for buffer, pose in zip(ids, poses(written), strict=True):
        rays, to_centre = in_camera @ pose[:3, :3].T, np.array(thing.centre) - pose[:3, 3]
        miss = np.linalg.norm(np.cross(rays, to_centre), axis=-1)
        assert (miss[buffer == number] < thing.radius).all()
        assert (buffer[miss < thing.radius] != 0).all(), "the sphere, or what hides it"


def test_existing_empty_folder_is_filled(tmp_path: Path) -> None:
    assert scene.write_scene(tmp_path) == tmp_path
    assert scene.scene_digest(tmp_path) == EXPECTED_DIGEST


def test_complete_scene_stays_untouched(copied: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*.*") if path.suffix in (".png", ".json")}
    scene.write_scene(copied)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_incomplete_scene_is_completed_and_other_files_stay(copied: Path, written: Path) -> None:
    image_path(copied, 3).unlink()
    image_path(copied, 7).write_bytes(image_path(copied, 7).read_bytes()[:90])
    (copied / "f3rm_clip_features.pt").write_bytes(b"cache")
    scene.write_scene(copied)
    assert files(copied) == {**files(written), "f3rm_clip_features.pt": b"cache"}


def test_killed_while_writing_leaves_whole_files_and_the_next_call_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, left = os.replace, iter([True] * 5)

    def killed(source: Path, target: Path) -> None:
        if not next(left, False):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            scene.write_scene(tmp_path)
    assert not (tmp_path / "transforms.json").exists()
    names = sorted(path.name for path in tmp_path.rglob("*.png"))
    assert names == [f"frame_{i:05d}.png" for i in range(1, 5)]
    assert [pixels(tmp_path, view).shape for view in range(4)] == [(scene.HEIGHT, scene.WIDTH, 3)] * 4
    assert scene.scene_digest(scene.write_scene(tmp_path)) == EXPECTED_DIGEST


def _foreign_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def _foreign_data_with_our_names(folder: Path) -> None:
    (folder / "images").mkdir()
    image_path(folder, 0).write_bytes(b"a photograph")


def _scene_of_another_version(folder: Path) -> None:
    (folder / f".{scene.SCENE_NAME}").write_text("0" * 32)
    (folder / "transforms.json").write_text("{}")


def _our_mark_beside_another_data_set(folder: Path) -> None:
    (folder / f".{scene.SCENE_NAME}").write_text(scene.DIGEST)
    (folder / "transforms.json").write_text('{"frames": []}')


@pytest.mark.parametrize(
    "fill",
    [_foreign_file, _foreign_data_with_our_names, _scene_of_another_version, _our_mark_beside_another_data_set],
)
def test_folder_with_other_files_is_refused_and_unchanged(tmp_path: Path, fill: Any) -> None:
    fill(tmp_path)
    before = files(tmp_path)
    with pytest.raises(UsageError, match="holds files that are not this built-in scene; name a new or empty folder"):
        scene.write_scene(tmp_path)
    assert files(tmp_path) == before


def test_a_file_in_place_of_the_folder_is_a_usage_error(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("mine")
    for path in (target, target / "below"):
        with pytest.raises(UsageError, match="cannot hold the built-in scene"):
            scene.write_scene(path)
    assert target.read_text() == "mine"


def test_digest_ignores_how_a_png_is_packed(copied: Path) -> None:
    before = image_path(copied, 0).read_bytes()
    Image.fromarray(pixels(copied, 0)).save(image_path(copied, 0), compress_level=0)
    assert image_path(copied, 0).read_bytes() != before
    assert scene.scene_digest(copied) == EXPECTED_DIGEST


def _one_pixel(folder: Path) -> None:
    changed = pixels(folder, 9).copy()
    changed[5, 6, 1] ^= 1
    Image.fromarray(changed).save(image_path(folder, 9))


def _two_swapped(folder: Path) -> None:
    image_path(folder, 0).rename(folder / "third")
    image_path(folder, 1).rename(image_path(folder, 0))
    (folder / "third").rename(image_path(folder, 1))


def _one_focal_length(folder: Path) -> None:
    path = folder / "transforms.json"
    path.write_text(path.read_text().replace('"fl_x": 60.0', '"fl_x": 60.00000000000001'))


@pytest.mark.parametrize("change", [_one_pixel, _two_swapped, _one_focal_length])
def test_digest_sees_each_change(copied: Path, change: Any) -> None:
    change(copied)
    assert scene.scene_digest(copied) != EXPECTED_DIGEST


@pytest.mark.parametrize("content", [None, b"", b"no image", "truncated", "other size"])
def test_digest_names_the_broken_image(copied: Path, content: Any) -> None:
    path = image_path(copied, 11)
    if content is None:
        path.unlink()
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:-900])
    elif content == "other size":
        Image.new("RGB", (8, 8)).save(path)
    else:
        path.write_bytes(content)
    with pytest.raises(UnreadableError, match=r"frame_00012\.png: "):
        scene.scene_digest(copied)


def test_digest_needs_the_transforms(copied: Path) -> None:
    (copied / "transforms.json").unlink()
    with pytest.raises(UnreadableError, match=r"transforms\.json: "):
        scene.scene_digest(copied)
