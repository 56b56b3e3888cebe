"""Views of a dataset, and what is seen of writing into it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from f3rm_verify.dataset_view import changes, folder_of, listing, make_view, seal
from f3rm_verify.errors import UsageError

CACHE = "f3rm_clip_features.pt"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Images in a folder, poses, a cache of upstream F3RM and one of somebody else."""
    folder = tmp_path / "user" / "fox"
    (folder / "images").mkdir(parents=True)
    for name, content in {"images/1.png": "one", "images/2.JPG": "two", CACHE: "old", "theirs.npy": "3"}.items():
        (folder / name).write_text(content)
    write_poses(folder, "images/1.png", "images/2.JPG")
    return folder


def write_poses(folder: Path, *names: str) -> None:
    (folder / "transforms.json").write_text(json.dumps({"frames": [{"file_path": name} for name in names]}))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


class TestView:
    def test_it_has_everything_but_the_caches(self, dataset: Path, out: Path) -> None:
        view = make_view(dataset, out, skip=out)
        assert view == out / "fox"
        wanted = contents(dataset)
        del wanted[CACHE]
        assert contents(view) == wanted

    def test_images_are_links_and_folders_are_not(self, dataset: Path, out: Path) -> None:
        view = make_view(dataset, out, skip=out)
        assert {path.name for path in view.rglob("*") if path.is_symlink()} == {"1.png", "2.JPG"}

    def test_writing_over_anything_but_an_image_leaves_the_dataset_alone(self, dataset: Path, out: Path) -> None:
        before = contents(dataset)
        view = make_view(dataset, out, skip=out)
        for name in ("theirs.npy", "transforms.json", CACHE, "images/new.pt"):
            (view / name).write_text("written by a training")
        assert contents(dataset) == before
        # What this relies on: a link would have led there.
        (view / "images" / "1.png").write_text("written by a training")
        assert contents(dataset) != before

    def test_of_a_file_with_poses(self, dataset: Path, out: Path) -> None:
        view = make_view(dataset / "transforms.json", out, skip=out)
        assert view == out / "fox" / "transforms.json"
        assert (folder_of(view) / "images" / "1.png").read_text() == "one"

    def test_output_in_the_dataset_is_no_part_of_it(self, dataset: Path) -> None:
        out = dataset / "f3rm-verify-out"
        (out / "before").mkdir(parents=True)
        (out / "before" / "result.json").write_text("{}")
        view = make_view(dataset, out / "now" / "data", skip=out)
        assert "f3rm-verify-out" not in os.listdir(view)
        assert (view / "images" / "1.png").exists()

    def test_links_to_folders_are_followed_but_in_no_circle(self, dataset: Path, out: Path) -> None:
        (dataset / "images_2").symlink_to(dataset / "images")
        (dataset / "images" / "up").symlink_to(dataset)
        (dataset / "gone").symlink_to(dataset / "nothing")
        view = make_view(dataset, out, skip=out)
        assert {"images_2/1.png", "images/1.png"} <= contents(view).keys()
        assert not any("up" in name for name in contents(view))
        (view / "images_2" / "new").write_text("written by a training")
        assert "new" not in os.listdir(dataset / "images")

    def test_images_of_a_neighbour(self, dataset: Path, out: Path) -> None:
        (dataset.parent / "common").mkdir()
        (dataset.parent / "common" / "9.png").write_text("nine")
        write_poses(dataset, "../common/9.png")
        view = make_view(dataset, out, skip=out)
        assert (view / "../common/9.png").read_text() == "nine"

    def test_neighbours_stay_out_where_nothing_names_them(self, dataset: Path, out: Path) -> None:
        (dataset.parent / "common").mkdir()
        make_view(dataset, out, skip=out)
        assert os.listdir(out) == ["fox"]

    def test_what_holds_the_view_is_no_neighbour(self, dataset: Path) -> None:
        write_poses(dataset, "../common/9.png")
        out = dataset.parent / "out" / "data"
        make_view(dataset, out, skip=dataset.parent / "out")
        assert os.listdir(out) == ["fox"]

    def test_images_further_away_are_refused(self, dataset: Path, out: Path) -> None:
        write_poses(dataset, "../../elsewhere/9.png")
        with pytest.raises(UsageError, match=r"transforms\.json names files more than one folder up"):
            make_view(dataset, out, skip=out)

    def test_whole_paths_are_nobodys_concern(self, dataset: Path, out: Path, tmp_path: Path) -> None:
        write_poses(dataset, str(tmp_path / "elsewhere" / "9.png"))
        assert (make_view(dataset, out, skip=out) / "transforms.json").exists()

    def test_a_place_that_takes_no_files(self, dataset: Path, out: Path) -> None:
        out.write_text("a file")
        with pytest.raises(UsageError, match=r"--data .*fox: a view to train on cannot be made in .*out \("):
            make_view(dataset, out, skip=out)


class TestListing:
    def differences(self, dataset: Path, before: object) -> list[str]:
        return changes("The dataset", before, listing(dataset, skip=Path("/nowhere")))  # type: ignore[arg-type]

    @pytest.fixture
    def before(self, dataset: Path) -> object:
        return listing(dataset, skip=Path("/nowhere"))

    def test_nothing_changed(self, dataset: Path, before: object) -> None:
        (dataset / "images" / "1.png").read_text()
        assert len(before) == 5  # type: ignore[arg-type]
        assert self.differences(dataset, before) == []

    def test_a_new_file(self, dataset: Path, before: object) -> None:
        (dataset / "images" / "new").write_text("")
        assert self.differences(dataset, before) == [
            "The dataset was written into while the trainings ran: images/new is new."
        ]

    def test_a_file_that_is_gone(self, dataset: Path, before: object) -> None:
        (dataset / CACHE).unlink()
        assert "f3rm_clip_features.pt is gone." in self.differences(dataset, before)[0]

    def test_other_content_under_the_same_size_and_time(self, dataset: Path, before: object) -> None:
        path = dataset / CACHE
        status = path.stat()
        path.write_text("new")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size
        assert "f3rm_clip_features.pt changed." in self.differences(dataset, before)[0]

    def test_many_changes_are_counted(self, dataset: Path, before: object) -> None:
        for number in range(9):
            (dataset / f"{number}.pt").write_text("")
        assert self.differences(dataset, before)[0].endswith("0.pt is new, 1.pt is new, 2.pt is new and 6 more.")

    def test_what_is_left_out(self, dataset: Path) -> None:
        out = dataset / "out"
        before = listing(dataset, skip=out)
        out.mkdir()
        (out / "evidence").write_text("")
        assert changes("The dataset", before, listing(dataset, skip=out)) == []

    def test_of_a_file_with_poses_it_is_that_of_its_folder(self, dataset: Path) -> None:
        nowhere = Path("/nowhere")
        assert listing(dataset / "transforms.json", skip=nowhere) == listing(dataset, skip=nowhere)


class TestSeal:
    @pytest.fixture
    def view(self, dataset: Path, out: Path) -> Path:
        view = make_view(dataset, out, skip=out)
        (view / CACHE).write_text("prepared")
        return view

    def test_all_but_the_images_is_read_only(self, dataset: Path, view: Path) -> None:
        before = (dataset / "images" / "1.png").stat().st_mode
        assert set(seal(view)) == {CACHE, "theirs.npy", "transforms.json"}
        assert (view / CACHE).stat().st_mode & 0o777 == 0o444
        assert (dataset / "images" / "1.png").stat().st_mode == before

    def test_nothing_changed(self, view: Path) -> None:
        assert changes("The view", seal(view), seal(view)) == []

    @pytest.mark.parametrize(("name", "what"), [(CACHE, "changed"), ("f3rm_dino_features.pt", "is new")])
    def test_what_a_training_wrote(self, view: Path, name: str, what: str) -> None:
        before = seal(view)
        path = view / name
        path.unlink(missing_ok=True)
        path.write_text("prepares")
        assert changes("The view", before, seal(view)) == [
            f"The view was written into while the trainings ran: {name} {what}."
        ]
