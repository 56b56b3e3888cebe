"""The cache of extracted features: cold and warm are one; what is not what its name says is refused with a reason."""

from __future__ import annotations

import os
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from f3rm_verify.errors import TrainingError

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]


@dataclass
class Counting:
    """An extractor whose features are the images' bytes, which counts how often it is asked."""

    argument: int = 1
    weights: str = "w"
    asked: list[int] = field(default_factory=list)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"arguments": {"argument": self.argument}, "weights": {"digest": self.weights}}

    @property
    def origin(self) -> Mapping[str, Any]:
        return {}

    def batches(self, images: list[Path]) -> Iterator[npt.NDArray[np.float32]]:
        self.asked.append(len(images))
        for image in images:
            yield np.frombuffer(image.read_bytes(), np.uint8).astype(np.float32).reshape(1, 1, 2, -1) + self.argument


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "dataset" / "images"
    folder.mkdir(parents=True)
    for index in range(3):
        (folder / f"{index}.png").write_bytes(bytes([index, 1, 2, 3]))
    return sorted(folder.iterdir())


@pytest.fixture
def dataset(images: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("F3RM_VERIFY_FEATURE_CACHE", "F3RM_VERIFY_SHARED_FEATURES"):
        monkeypatch.delenv(name, raising=False)
    return images[0].parents[1]


def load(images: list[Path], extractor: Counting | None = None, *, use_cache: bool = True) -> Any:
    from f3rm_verify.f3rm.features import load_or_extract

    one = Counting() if extractor is None else extractor
    return load_or_extract("CLIP", one, images, images[0].parents[1], use_cache=use_cache, tell=lambda *_: None)


def the_cache(folder: Path) -> Path:
    (path,) = folder.glob("f3rm_clip_features_*.npz")
    return path


class TestColdAndWarm:
    def test_are_bit_identical(self, dataset: Path, images: list[Path]) -> None:
        cold, warm = load(images), load(images)
        assert (cold.source, warm.source) == ("extracted", "cache")
        assert cold.values.tobytes() == warm.values.tobytes()
        assert cold.values.dtype == warm.values.dtype == np.float32
        assert (cold.digest, cold.values.shape) == (warm.digest, warm.values.shape)

    def test_nothing_else_is_left(self, dataset: Path, images: list[Path]) -> None:
        load(images)
        assert {path.name for path in dataset.iterdir()} == {"images", the_cache(dataset).name}

    def test_without_the_cache_nothing_is_read_or_written(self, dataset: Path, images: list[Path]) -> None:
        load(images)
        the_cache(dataset).write_bytes(b"broken")
        assert load(images, use_cache=False).source == "extracted"
        assert the_cache(dataset).read_bytes() == b"broken"


class TestTheKey:
    """What decides the features is in it; a cache with another key is not ours, and is left alone."""

    def other(self, images: list[Path], extractor: Counting | None = None) -> None:
        dataset = images[0].parents[1]
        before = the_cache(dataset).read_bytes()
        assert load(images, extractor).source == "extracted"
        first, second = sorted(dataset.glob("f3rm_clip_features_*.npz"), key=lambda path: path.stat().st_mtime_ns)
        assert first.read_bytes() == before != second.read_bytes()

    def test_content(self, dataset: Path, images: list[Path]) -> None:
        load(images)
        images[1].write_bytes(b"\x09\x01\x02\x03")
        self.other(images)

    def test_order(self, dataset: Path, images: list[Path]) -> None:
        load(images)
        self.other(images[::-1])

    def test_arguments(self, dataset: Path, images: list[Path]) -> None:
        load(images)
        self.other(images, Counting(argument=2))

    def test_weights(self, dataset: Path, images: list[Path]) -> None:
        load(images)
        self.other(images, Counting(weights="v"))

    def test_but_not_names(self, dataset: Path, images: list[Path]) -> None:
        load(images)
        moved = [path.rename(path.with_name(f"renamed-{path.name}")) for path in images]
        assert load(moved).source == "cache"

    def test_the_files_of_others_are_not_touched(self, dataset: Path, images: list[Path]) -> None:
        others = {dataset / name: name.encode() for name in ("f3rm_clip_features.pt", "f3rm_clip_features_0123.npz")}
        for path, content in others.items():
            path.write_bytes(content)
        load(images)
        assert all(path.read_bytes() == content for path, content in others.items())


def rewritten(path: Path, **changes: Any) -> None:
    """Writes the cache again as somebody would who knows its layout, with other entries; None leaves one out."""
    with np.load(path) as archive:
        entries = {**{name: archive[name] for name in archive.files}, **changes}
    np.savez(path, **{name: value for name, value in entries.items() if value is not None})


def with_digest(path: Path, features: npt.NDArray[Any]) -> None:
    from f3rm_verify.f3rm.features.cache import digest_of

    rewritten(path, features=features, digest=np.array(digest_of(features)))


def flipped(path: Path, place: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(place) + len(place) - 1] ^= 1
    path.write_bytes(content)


def upstreams(path: Path) -> None:
    import torch

    torch.save({"args": {}, "image_fnames": [], "features": torch.zeros(3, 1, 2, 2)}, path)


def unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


def shortened(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def zipped(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


OBJECTS = np.array([{"a": 1}], dtype=object)
REFUSALS: Mapping[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "it is no archive of arrays"),
    "a text": (lambda path: path.write_bytes(b"hello"), "it is no archive of arrays"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps([1, 2])), "it is no archive of arrays"),
    "upstream's .pt": (upstreams, "it holds no version, so it was not written by f3rm-verify"),
    "another archive": (lambda path: zipped(path, a=b"b"), "it holds no version, so it was not written by f3rm-verify"),
    "without its key": (
        lambda path: rewritten(path, key=None),
        "it holds no key, so it was not written by f3rm-verify",
    ),
    "truncated": (
        lambda path: shortened(path, 900),
        r"it is truncated or damaged \(BadZipFile: File is not a zip file\)",
    ),
    "truncated by a byte": (
        lambda path: shortened(path, -1),
        r"it is truncated or damaged \(BadZipFile: File is not a zip file\)",
    ),
    "a flipped bit": (
        lambda path: flipped(path, np.float32([1, 2]).tobytes()),
        r"it is truncated or damaged \(BadZipFile: Bad CRC-32 for file 'features\.npy'\)",
    ),
    "objects": (
        lambda path: rewritten(path, features=OBJECTS),
        r"it is truncated or damaged \(ValueError: Object arrays cannot be loaded when allow_pickle=False\)",
    ),
    "no array": (
        lambda path: zipped(path, version=b"1", key=b"2", digest=b"3", features=b"4"),
        "what it holds is no arrays",
    ),
    "another version": (
        lambda path: rewritten(path, version=np.array(1)),
        "it has layout 1, and this version of f3rm-verify reads 2",
    ),
    "a foreign key": (
        lambda path: rewritten(path, key=np.array("0" * 32)),
        "it was made for other images, arguments, weights or libraries than its name says",
    ),
    "a wrong digest": (
        lambda path: rewritten(path, digest=np.array("0" * 32)),
        "its features are not those that were written: their digest is another",
    ),
    "other features": (
        lambda path: rewritten(path, features=np.zeros((3, 1, 2, 2), np.float32)),
        "its features are not those that were written: their digest is another",
    ),
    "a wrong dtype": (
        lambda path: with_digest(path, np.zeros((3, 1, 2, 2), np.float64)),
        "its features are float64, not float32",
    ),
    "a wrong number of images": (
        lambda path: with_digest(path, np.zeros((2, 1, 2, 2), np.float32)),
        r"its features have the shape \(2, 1, 2, 2\), not \(3, h, w, c\)",
    ),
    "a wrong number of dimensions": (
        lambda path: with_digest(path, np.zeros((3, 4), np.float32)),
        r"its features have the shape \(3, 4\), not \(3, h, w, c\)",
    ),
    "no channels": (
        lambda path: with_digest(path, np.zeros((3, 1, 2, 0), np.float32)),
        r"its features have the shape \(3, 1, 2, 0\), not \(3, h, w, c\)",
    ),
    "a folder": (unreadable, r"it cannot be read \(Is a directory\)"),
    "a link to nowhere": (
        lambda path: (path.unlink(), path.symlink_to("nowhere")),
        r"it cannot be read \(No such file or directory\)",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_hold_what_its_name_says_is_refused(dataset: Path, images: list[Path], name: str) -> None:
    damage, reason = REFUSALS[name]
    load(images)
    path = the_cache(dataset)
    damage(path)
    extractor = Counting()
    with pytest.raises(TrainingError) as refused:
        load(images, extractor)
    assert extractor.asked == []
    whole = rf"The feature cache {path} is refused: {reason}\. Delete it, and it is made again\."
    assert re.fullmatch(whole, str(refused.value)), str(refused.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_one_that_may_not_be_read_is_refused(dataset: Path, images: list[Path]) -> None:
    load(images)
    the_cache(dataset).chmod(0)
    with pytest.raises(TrainingError, match="is refused: it may not be read"):
        load(images)


class TestWriting:
    def test_a_failure_leaves_nothing_and_stops_nothing(
        self, dataset: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def full(file: Any, **_: Any) -> None:
            file.write(b"PK\x03\x04 and then the disk is full")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "savez", full)
        assert load(images).source == "extracted"
        assert [path.name for path in dataset.iterdir()] == ["images"]
        assert "the features are not kept in" in capsys.readouterr().out

    def test_a_dataset_that_cannot_be_written_into_is_trained_on(
        self, dataset: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("F3RM_VERIFY_FEATURE_CACHE", str(images[0] / "below a file"))
        assert load(images).source == "extracted"
        assert "(Not a directory)" in capsys.readouterr().out

    def test_who_comes_second_waits_and_shares(self, dataset: Path, images: list[Path]) -> None:
        from f3rm_verify.f3rm.features import load_or_extract

        extracts, told = threading.Event(), threading.Event()

        class Slow(Counting):
            def batches(self, images: list[Path]) -> Iterator[npt.NDArray[np.float32]]:
                extracts.set()
                assert told.wait(20)
                yield from super().batches(images)

        first: list[Any] = []
        thread = threading.Thread(target=lambda: first.append(load(images, Slow())))
        thread.start()
        assert extracts.wait(20)
        heard: list[str] = []

        def hear(phase: str, seconds: int, of: int) -> None:
            heard.append(phase)
            told.set()

        second = load_or_extract("CLIP", Counting(), images, dataset, use_cache=True, tell=hear)
        thread.join(20)
        assert (first[0].source, second.source) == ("extracted", "cache")
        assert set(heard) == {"waiting for features"}
        assert first[0].values.tobytes() == second.values.tobytes()


class TestLaunched:
    """Where a launcher says where the caches are, nothing is written into the dataset."""

    def test_fresh_sides_extract_each(self, dataset: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        load(images)
        sources = []
        for side in ("reference", "candidate"):
            monkeypatch.setenv("F3RM_VERIFY_FEATURE_CACHE", str(dataset.parent / side))
            sources.append(load(images).source)
        assert sources == ["extracted", "extracted"]

    def test_sharing_sides_take_the_datasets(
        self, dataset: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("F3RM_VERIFY_FEATURE_CACHE", str(dataset.parent / "shared"))
        monkeypatch.setenv("F3RM_VERIFY_SHARED_FEATURES", "1")
        assert [load(images).source for _ in range(2)] == ["extracted", "cache"]
        assert [path.name for path in dataset.iterdir()] == ["images"]
        the_cache(dataset.parent / "shared").rename(dataset / the_cache(dataset.parent / "shared").name)
        assert load(images).source == "cache"


def test_no_image_is_held_twice(tmp_path: Path) -> None:
    """Extracting, digesting, writing and reading take little besides the features."""
    import tracemalloc

    from f3rm_verify.f3rm.features import load_or_extract

    class Large(Counting):
        def batches(self, images: list[Path]) -> Iterator[npt.NDArray[np.float32]]:
            for number in range(len(images)):
                yield np.full((1, 256, 128, 16), number, np.float32)

    for index in range(24):
        (tmp_path / f"{index:02}.png").write_bytes(bytes([index]))
    paths = sorted(tmp_path.glob("*.png"))
    size = 24 * 256 * 128 * 16 * 4
    for source in ("extracted", "cache"):
        tracemalloc.start()
        map_ = load_or_extract("CLIP", Large(), paths, tmp_path, use_cache=True, tell=lambda *_: None)
        assert map_.source == source
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert size < peak < 1.35 * size
