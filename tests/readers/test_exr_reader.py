from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import OpenEXR
import pytest

from f3rm_verify.errors import UnreadableError
from f3rm_verify.readers.images import MAX_PIXELS, decode

HEADER = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}


def exr(tmp_path: Path, channels: dict[str, np.ndarray], **header: object) -> bytes:
    path = tmp_path / "written.exr"
    # Copies, because the writer of OpenEXR 3.5 lets go of what it is given.
    OpenEXR.File({**HEADER, **header}, {name: plane.copy() for name, plane in channels.items()}).write(str(path))
    return path.read_bytes()


@pytest.mark.parametrize("dtype", ["f2", "f4", "u4"])
def test_values_come_back_bit_by_bit(tmp_path: Path, dtype: str) -> None:
    planes = {name: np.arange(35).reshape(5, 7).astype(dtype) + i for i, name in enumerate("BGR")}
    if dtype != "u4":
        planes["G"][0, :3] = np.nan, -0.0, np.inf
    picture = decode(exr(tmp_path, planes), "a.exr")
    assert picture.values.shape == (5, 7, 3)
    assert picture.values.tobytes() == np.stack([planes[name] for name in "BGR"], -1).tobytes()
    name = np.dtype(dtype).name
    assert picture.layout == f"EXR B {name}, G {name}, R {name}"


def test_mixed_types_are_widened_exactly_and_named(tmp_path: Path) -> None:
    planes = {"Y": np.full((2, 3), 0.1, "f2"), "Z": np.full((2, 3), 0.1, "f4")}
    picture = decode(exr(tmp_path, planes), "a.exr")
    assert picture.values.dtype == np.float32
    assert (picture.values[..., 0] == np.float16(0.1)).all()
    assert picture.layout == "EXR Y float16, Z float32"


def test_damage_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = exr(tmp_path, {"Y": np.zeros((64, 64), "f4")})
    for broken in (data[:4], data[:100], data[:-10], b"no exr at all", data[:60] + b"\xff" * 40 + data[100:]):
        with pytest.raises(UnreadableError, match=r"^a\.exr: ") as caught:
            decode(broken, "a.exr")
        assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == "", "the library speaks where only the report belongs"


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    data = exr(tmp_path, {"Y": np.zeros((4, 4), "f4")})
    window = np.array([0, 0, 3, 3], "<i4").tobytes()
    assert data.count(window) == 2
    side = int(MAX_PIXELS**0.5)
    with pytest.raises(UnreadableError, match="pixels, where 1 to"):
        decode(data.replace(window, np.array([0, 0, side, side], "<i4").tobytes()), "a.exr")


def test_without_the_library_the_file_is_unreadable_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(UnreadableError, match=r'not installed; .* pip install "f3rm-verify\[exr\]"'):
        decode(b"v/1\x01", "a.exr")
