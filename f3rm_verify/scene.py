"""The built-in scene: a small data set in nerfstudio's format, drawn by a ray tracer, pixel-identical on every machine.

NumPy's sin, exp, pow, sums and matrix products differ between processors and versions, so colours come only from
operations that IEEE 754 defines to the last bit, element by element: + - * / sqrt floor, comparisons, integers.
Cameras stand at rational points of a circle instead of at angles. The objects fill a radius of about 1 around the
origin, the world's up is +z. In this module a Vectors is a float64 array (3, ...): x, y, z or red, green, blue.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from f3rm_verify.errors import UnreadableError, UsageError

SCENE_NAME = "f3rm-verify-scene"
VIEWS = 40
WIDTH = 64
HEIGHT = 64
#: In pixels: the board just fits into every view.
FOCAL = 60.0
#: What `scene_digest` gives for the scene as this version draws it.
DIGEST = "ada470366fe306089a04df33c6ef07ed"

Array = NDArray[np.float64]
Vectors = NDArray[np.float64]
Point = tuple[float, float, float]
Texture = Callable[[Vectors], Vectors]

_MARK = f".{SCENE_NAME}"
_SAMPLES = 3  # per pixel and axis
_FAR = 1e9  # stands for "no hit": finite, so that no operation makes a NaN of it
_FLOOR = -0.5
_LIGHT = (0.48, -0.36, 0.80)  # unit vector towards the light
_AMBIENT = 0.48
_HORIZON, _BELOW = (0.90, 0.90, 0.88), (0.62, 0.72, 0.86)  # the background
_TARGET = -0.26  # height of the point on the z axis that all cameras look at
#: tan(angle / 2) of the cameras in a quarter circle, near 0, 18, 36, 54, 72 degrees; the upper ring stands 9 further.
_LOWER = (0.0, 3 / 19, 12 / 37, 27 / 53, 8 / 11)
_UPPER = (3 / 38, 6 / 25, 12 / 29, 11 / 18, 35 / 41)


def _column(point: Point, like: Vectors) -> Vectors:
    return np.array(point).reshape((3,) + (1,) * (like.ndim - 1))


def _dot(a: Vectors, b: Vectors) -> Array:
    return np.asarray(a[0] * b[0] + a[1] * b[1] + a[2] * b[2])


def _mix(a: Point | Vectors, b: Point | Vectors, t: Array) -> Vectors:
    """From colour a to colour b as t goes from 0 to 1."""
    one, two = (_column(c, t[None]) if isinstance(c, tuple) else c for c in (a, b))
    return one + (two - one) * t


def _lattice(x: NDArray[np.int64], y: NDArray[np.int64], z: NDArray[np.int64]) -> Array:
    """A number in [0, 1) for each point of the integer lattice."""
    mixed = ((x * 73856093) ^ (y * 19349663) ^ (z * 83492791)) & 0xFFFFFFFF
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 13)).astype(np.float64) / 4294967296.0


def _noise(point: Vectors) -> Array:
    """Value noise in [0, 1), smooth over a lattice of side 1."""
    floor = np.floor(point)
    x, y, z = floor.astype(np.int64)
    rest = point - floor
    u, v, w = rest * rest * (3.0 - 2.0 * rest)
    planes = []
    for k in (0, 1):
        rows = []
        for j in (0, 1):
            left, right = _lattice(x, y + j, z + k), _lattice(x + 1, y + j, z + k)
            rows.append(left + (right - left) * u)
        planes.append(rows[0] + (rows[1] - rows[0]) * v)
    return np.asarray(planes[0] + (planes[1] - planes[0]) * w)


def _parity(x: Array) -> Array:
    """0 or 1, alternating at the integers."""
    return np.asarray(np.floor(x) - 2.0 * np.floor(x * 0.5))


def _chessboard(local: Vectors) -> Vectors:
    x, y, z = local
    checker = np.where(z > 0.999, np.abs(_parity(x * 2.5 + 0.5) - _parity(y * 2.5 + 0.5)), 0.0)
    tint = _noise(local * 1.2 + 5.3)
    light = _mix((0.98, 0.86, 0.62), (0.80, 0.92, 0.95), tint)
    dark = _mix((0.30, 0.40, 0.60), (0.46, 0.30, 0.42), tint)
    return _mix(dark, light, checker)


def _stripes(normal: Vectors) -> Vectors:
    stripe = _parity(normal[2] * 2.5 + 0.5)
    warm = _mix((0.95, 0.45, 0.10), (0.85, 0.15, 0.20), _noise(normal * 1.6 + 9.7))
    return _mix(warm, (1.0, 0.95, 0.85), stripe)


def _planet(normal: Vectors) -> Vectors:
    land = np.minimum(np.maximum(_noise(normal * 1.8 + 3.1) * 2.4 - 0.7, 0.0), 1.0)
    return _mix((0.05, 0.25, 0.75), (0.55, 0.95, 0.55), land)


def _ball(normal: Vectors) -> Vectors:
    x, y, z = _parity(normal)
    return _mix((0.98, 0.85, 0.15), (0.60, 0.10, 0.65), np.abs(np.abs(x - y) - z))


def _crate(local: Vectors) -> Vectors:
    x, y, z = np.abs(local)
    noise = _noise(local * 1.3 + 2.4)
    on_x = _mix((0.10, 0.60, 0.60), (0.45, 0.95, 0.70), noise)
    on_y = _mix((0.95, 0.45, 0.60), (0.75, 0.65, 0.95), noise)
    on_z = _mix((0.98, 0.90, 0.40), (0.60, 0.85, 0.35), noise)
    face = np.where((x >= y) & (x >= z), on_x, np.where(y >= z, on_y, on_z))
    edges = (x > 0.72).astype(np.int64) + (y > 0.72) + (z > 0.72)
    return _mix(face, (0.20, 0.24, 0.36), np.where(edges >= 2, 1.0, 0.0))


@dataclass(frozen=True)
class Sphere:
    """Its texture takes the unit normal."""

    centre: Point
    radius: float
    texture: Texture

    def hit(self, origin: Vectors, ray: Vectors) -> Array:
        """Distance to the surface in lengths of `ray`, or _FAR."""
        start = origin - _column(self.centre, origin)
        a, b = _dot(ray, ray), _dot(start, ray)
        inside = b * b - a * (_dot(start, start) - self.radius * self.radius)
        t = (-b - np.sqrt(np.maximum(inside, 0.0))) / a
        return np.where((inside > 0.0) & (t > 0.0), t, _FAR)

    def surface(self, point: Vectors) -> tuple[Vectors, Vectors]:
        """Unit normals and colours at points of the surface."""
        normal = (point - _column(self.centre, point)) / self.radius
        return normal, self.texture(normal)


@dataclass(frozen=True)
class Box:
    """Turned about z by the angle whose cosine and sine are `turn`; its texture takes coordinates from -1 to 1."""

    centre: Point
    half: Point
    turn: tuple[float, float]
    texture: Texture

    def _local(self, vector: Vectors, sign: float = 1.0) -> Vectors:
        (x, y, z), (cos, sin) = vector, (self.turn[0], self.turn[1] * sign)
        return np.stack([cos * x + sin * y, cos * y - sin * x, z])

    def hit(self, origin: Vectors, ray: Vectors) -> Array:
        """As for a sphere."""
        start, step = self._local(origin - _column(self.centre, origin)), self._local(ray)
        step = np.where(np.abs(step) < 1e-12, 1e-12, step)
        half = _column(self.half, start)
        one, two = (-half - start) / step, (half - start) / step
        enter, leave = np.minimum(one, two), np.maximum(one, two)
        near = np.maximum(np.maximum(enter[0], enter[1]), enter[2])
        far = np.minimum(np.minimum(leave[0], leave[1]), leave[2])
        return np.where((near < far) & (near > 0.0), near, _FAR)

    def surface(self, point: Vectors) -> tuple[Vectors, Vectors]:
        """As for a sphere."""
        local = self._local(point - _column(self.centre, point)) / _column(self.half, point)
        x, y, z = np.abs(local)
        on_x, on_y = (x >= y) & (x >= z), (y > x) & (y >= z)
        normal = np.where(np.stack([on_x, on_y, ~(on_x | on_y)]), np.sign(local), 0.0)
        return self._local(normal, -1.0), self.texture(local)


#: In the id buffer, object i has the number i + 1; 0 is the background. All are convex.
OBJECTS: tuple[Sphere | Box, ...] = (
    Box((0.0, 0.0, _FLOOR - 0.08), (1.08, 1.08, 0.08), (1.0, 0.0), _chessboard),
    Sphere((0.42, 0.45, _FLOOR + 0.48), 0.48, _stripes),
    Sphere((-0.55, 0.50, _FLOOR + 0.34), 0.34, _planet),
    Sphere((0.55, -0.55, _FLOOR + 0.28), 0.28, _ball),
    Box((-0.40, -0.40, _FLOOR + 0.36), (0.32, 0.32, 0.36), (0.8, 0.6), _crate),
)


def _nearest(origin: Vectors, ray: Vectors) -> tuple[Array, NDArray[np.int64]]:
    """Distance (in lengths of `ray`) and number of what each ray meets first."""
    nearest, ids = np.full(ray.shape[1:], _FAR), np.zeros(ray.shape[1:], np.int64)
    for number, thing in enumerate(OBJECTS, 1):
        distance = thing.hit(origin, ray)
        ids = np.where(distance < nearest, number, ids)
        nearest = np.minimum(nearest, distance)
    return nearest, ids


def _brightness(number: int, point: Vectors, normal: Vectors) -> Array:
    """Diffuse light on points of one object, with the hard shadows of the others."""
    light = np.zeros_like(point) + _column(_LIGHT, point)
    towards = _dot(normal, light)
    lit = towards > 0.0
    for other, thing in enumerate(OBJECTS, 1):
        if other != number:
            lit &= thing.hit(point, light) >= _FAR
    return _AMBIENT + (1.0 - _AMBIENT) * np.where(lit, towards, 0.0)


def _colours(origin: Vectors, ray: Vectors) -> Vectors:
    distance, ids = _nearest(origin, ray)
    colours = _mix(_HORIZON, _BELOW, 0.0 - ray[2] / np.sqrt(_dot(ray, ray)))
    for number, thing in enumerate(OBJECTS, 1):
        seen = ids == number
        point = (origin + distance * ray)[:, seen]
        normal, paint = thing.surface(point)
        colours[:, seen] = paint * _brightness(number, point, normal)
    return colours


def camera_to_world(view: int) -> list[list[float]]:
    """The 4x4 pose of a view, numbered from 0: columns right, up, back, position.

    Neighbouring numbers are neighbours on a ring; the first half is the lower ring.
    """
    ring, place = divmod(view, VIEWS // 2)
    quarter, step = divmod(place, len(_LOWER))
    radius, height, tangents = ((3.0, 0.35, _LOWER), (2.55, 1.75, _UPPER))[ring]
    t = tangents[step]
    cos, sin = (1.0 - t * t) / (1.0 + t * t), 2.0 * t / (1.0 + t * t)
    for _ in range(quarter):
        cos, sin = 0.0 - sin, cos
    length = math.sqrt(radius * radius + (height - _TARGET) * (height - _TARGET))
    flat, rise = radius / length, (height - _TARGET) / length
    return [
        [0.0 - sin, 0.0 - rise * cos, flat * cos, radius * cos],
        [cos, 0.0 - rise * sin, flat * sin, radius * sin],
        [0.0, flat, rise, height],
        [0.0, 0.0, 0.0, 1.0],
    ]


def _rays(view: int, across: float, down: float) -> tuple[Vectors, Vectors]:
    """Origins and directions (not of unit length), (3, HEIGHT, WIDTH), through one place inside each pixel."""
    pose = np.array(camera_to_world(view))[:3, :, None, None]
    right = (np.arange(WIDTH) + across - WIDTH / 2)[None, None, :] / FOCAL
    up = (HEIGHT / 2 - np.arange(HEIGHT) - down)[None, :, None] / FOCAL
    ray = pose[:, 0] * right + pose[:, 1] * up - pose[:, 2]
    return np.zeros_like(ray) + pose[:, 3], ray


def id_buffer(view: int) -> NDArray[np.int64]:
    """What the centre of each pixel of a view shows, (HEIGHT, WIDTH): 0 the background, i + 1 `OBJECTS[i]`."""
    return _nearest(*_rays(view, 0.5, 0.5))[1]


def render(view: int) -> NDArray[np.uint8]:
    """The image of a view, (HEIGHT, WIDTH, 3)."""
    places = [(i + 0.5) / _SAMPLES for i in range(_SAMPLES)]
    total = np.zeros((3, HEIGHT, WIDTH))
    for down in places:
        for across in places:
            total = total + _colours(*_rays(view, across, down))
    mean = np.minimum(total / (_SAMPLES * _SAMPLES), 1.0)
    return np.ascontiguousarray(np.floor(mean * 255.0 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def _image_name(view: int) -> str:
    return f"images/frame_{view + 1:05d}.png"


def _transforms() -> bytes:
    lens = {"fl_x": FOCAL, "fl_y": FOCAL, "cx": WIDTH / 2, "cy": HEIGHT / 2, "w": WIDTH, "h": HEIGHT}
    distortion = dict.fromkeys(("k1", "k2", "p1", "p2"), 0.0)
    frames = [{"file_path": _image_name(view), "transform_matrix": camera_to_world(view)} for view in range(VIEWS)]
    return json.dumps({"camera_model": "OPENCV", **lens, **distortion, "frames": frames}, indent=1).encode()


def write_scene(folder: Path) -> Path:
    """Write the scene into `folder`, which is made where it does not exist, and return `folder`.

    A complete scene there stays untouched, an incomplete one is completed. Raises UsageError where the folder holds
    anything else, or cannot be written.
    """
    try:
        _claim(folder)
        if not _is_complete(folder):
            for view in range(VIEWS):
                _replace(folder / _image_name(view), _png(render(view)))
            _replace(folder / "transforms.json", _transforms())
    except OSError as error:
        raise UsageError(f"{folder} cannot hold the built-in scene ({error}); choose another folder.") from error
    return folder


def _claim(folder: Path) -> None:
    """Make the folder ours: the mark is its first file, so that a killed call leaves a folder that we know again."""
    mark, transforms = folder / _MARK, folder / "transforms.json"
    is_ours = mark.is_file() and mark.read_text("utf8", "replace") == DIGEST
    is_ours = is_ours and (not transforms.exists() or transforms.read_bytes() == _transforms())
    if not is_ours and folder.is_dir() and any(not path.name.startswith(_MARK) for path in folder.iterdir()):
        raise UsageError(f"{folder} holds files that are not this built-in scene; name a new or empty folder.")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    _replace(mark, DIGEST.encode())


def _is_complete(folder: Path) -> bool:
    try:
        return scene_digest(folder) == DIGEST
    except UnreadableError:
        return False


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def scene_digest(folder: Path) -> str:
    """BLAKE2b over transforms.json and each image's name, shape and pixels (PNG bytes depend on the zlib).

    Raises UnreadableError where one of the files is missing or broken.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in (*(_image_name(view) for view in range(VIEWS)), "transforms.json"):
        shape, content = _content(folder / name)
        digest.update(f"{name} {shape} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _content(path: Path) -> tuple[tuple[int, ...], bytes]:
    try:
        if path.suffix != ".png":
            content = path.read_bytes()
            return (len(content),), content
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode != "RGB" or image.size != (WIDTH, HEIGHT):
                raise UnreadableError(f"{path}: {image.mode} {image.size}, not RGB {(WIDTH, HEIGHT)}.")
            return (HEIGHT, WIDTH, 3), image.tobytes()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableError(f"{path}: not readable as a file of the built-in scene ({error}).") from error
