"""Taking over the feature caches of upstream F3RM into a view of their dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]

CACHE = "f3rm_clip_features.pt"
NAMES = ("images/1.png", "../common/2.png")


@pytest.fixture(autouse=True)
def trusted() -> Iterator[None]:
    """As a training has it; and as it was, afterwards."""
    import torch

    from f3rm_verify.f3rm.foreign_data import allow_paths_in_caches

    before = torch.serialization.get_safe_globals()
    allow_paths_in_caches()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "user" / "fox"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def view(tmp_path: Path) -> Path:
    folder = tmp_path / "out" / "fox"
    folder.mkdir(parents=True)
    return folder


def write_cache(dataset: Path, prefix: Path | str, name: str = CACHE, **others: Any) -> dict[str, Any]:
    """A cache as upstream's data manager saves it, made for images below `prefix`."""
    import torch

    images = [Path(prefix) / image for image in NAMES]
    cache = {"args": {"model": "ViT-L", "batch": 64}, "image_fnames": images, "features": torch.rand(2, 3, 3, 4)}
    torch.save({**cache, **others}, dataset / name)
    return cache


def adopted(dataset: Path, view: Path) -> dict[str, Any] | None:
    import torch

    from f3rm_verify.f3rm.foreign_data import adopt_caches

    adopt_caches(dataset, view)
    return torch.load(view / CACHE) if (view / CACHE).exists() else None


def test_the_images_are_called_by_the_views_paths_and_nothing_else_changes(dataset: Path, view: Path) -> None:
    cache = write_cache(dataset, dataset)
    found = adopted(dataset, view)
    assert found is not None
    assert found["image_fnames"] == [view / name for name in NAMES]
    assert found["args"] == cache["args"]
    assert found["features"].equal(cache["features"])
    assert (dataset / CACHE).stat().st_mtime_ns <= (view / CACHE).stat().st_mtime_ns


def test_however_the_dataset_was_called(dataset: Path, view: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dataset.parent)
    link = dataset.parent / "link"
    link.symlink_to(dataset)
    for prefix in ("fox", "./fox", "../user/fox", link, dataset / "images" / ".."):
        write_cache(dataset, prefix)
        found = adopted(dataset, view)
        assert found is not None, prefix
        assert found["image_fnames"] == [view / name for name in NAMES]
        (view / CACHE).unlink()


def test_one_made_for_another_folder_is_left_out(
    dataset: Path, view: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its data manager would call it invalid: other images can have the same names.
    other = tmp_path / "other" / "fox"
    (other / "images").mkdir(parents=True)
    for prefix in (other, "fox", tmp_path / "gone"):
        write_cache(dataset, prefix)
        assert adopted(dataset, view) is None
        assert f"the cache {dataset / CACHE} is not used (ValueError: {prefix}" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no cache"])
def test_one_that_cannot_be_read_is_left_out(dataset: Path, view: Path, content: bytes) -> None:
    (dataset / CACHE).write_bytes(content)
    assert adopted(dataset, view) is None


def test_one_that_holds_something_else_is_left_out(dataset: Path, view: Path) -> None:
    import torch

    torch.save([1, 2], dataset / CACHE)
    assert adopted(dataset, view) is None


def test_every_kind_of_features_has_its_own(dataset: Path, view: Path) -> None:
    write_cache(dataset, dataset)
    write_cache(dataset, dataset, "f3rm_dino_features.pt")
    write_cache(dataset, dataset, "others.pt")
    adopted(dataset, view)
    assert {path.name for path in view.iterdir()} == {CACHE, "f3rm_dino_features.pt"}


def test_without_our_leave_torch_loads_no_paths_and_with_it_still_no_code(dataset: Path) -> None:
    import pickle

    import torch

    write_cache(dataset, dataset, code=print)
    with pytest.raises(pickle.UnpicklingError, match="print"):
        torch.load(dataset / CACHE, weights_only=True)
    write_cache(dataset, dataset)
    torch.load(dataset / CACHE, weights_only=True)
    torch.serialization.clear_safe_globals()
    with pytest.raises(pickle.UnpicklingError, match="Path"):
        torch.load(dataset / CACHE, weights_only=True)


class TestPreparation:
    def prepare(self, dataset: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """What the data manager of a configuration was set up with, and the caches that it found."""
        from f3rm_verify.f3rm.foreign_data import only_prepares, prepare_data

        calls: list[dict[str, Any]] = []
        folder = data if data.is_dir() else data.parent
        setup = lambda **options: calls.append({**options, "found": sorted(p.name for p in folder.glob("*.pt"))})  # noqa: E731
        assert not only_prepares()
        monkeypatch.setenv("F3RM_VERIFY_PREPARE", str(dataset))
        assert only_prepares()
        datamanager = SimpleNamespace(data=data, setup=setup)
        prepare_data(SimpleNamespace(pipeline=SimpleNamespace(datamanager=datamanager)), "cpu")
        return calls

    def test_the_data_manager_finds_what_was_taken_over(
        self, dataset: Path, view: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_cache(dataset, dataset)
        (call,) = self.prepare(dataset, view, monkeypatch)
        assert call == {"device": "cpu", "test_mode": "val", "world_size": 1, "local_rank": 0, "found": [CACHE]}

    def test_of_a_file_with_poses(self, dataset: Path, view: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_cache(dataset, dataset)
        for folder in (dataset, view):
            (folder / "transforms.json").write_text("{}")
        (call,) = self.prepare(dataset / "transforms.json", view / "transforms.json", monkeypatch)
        assert call["found"] == [CACHE]

    def test_a_pipeline_without_a_data_manager(self, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from f3rm_verify.f3rm.foreign_data import prepare_data

        monkeypatch.setenv("F3RM_VERIFY_PREPARE", str(dataset))
        prepare_data(SimpleNamespace(pipeline=SimpleNamespace()), "cpu")
