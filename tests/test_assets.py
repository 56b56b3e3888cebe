"""Assets: kept once and whole or not at all, read only where they are what their name says."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import LOSS, PSNR, FakeRun

from f3rm_verify import assets as module
from f3rm_verify.assets import Assets, CurvePair, asset_names, assets_folder, keep_series, read_series, settle
from f3rm_verify.compare_runs import compare_runs
from f3rm_verify.difference import Difference, Outcome, Verdict
from f3rm_verify.policy import DIFF_POLICY

CONTENT = b"a picture"
NAME = f"{hashlib.sha256(CONTENT).hexdigest()}.png"


def node(**names: object) -> Difference:
    return Difference(name="a", artefact="renders", verdict=Verdict.DIFFERENT, measures={"assets": names})


def curves() -> CurvePair:
    nan = np.array([0x7FC00001, 0x80000000, 0x3F800000], np.uint32).view(np.float32)
    return CurvePair(
        steps=np.array([1, 1, 2**60]),
        reference=nan,
        candidate=nan[::-1].copy(),
        reference_only_steps=np.array([7]),
        reference_only=np.array([1.5], np.float32),
        candidate_only_steps=np.empty(0, np.int64),
        candidate_only=np.empty(0, np.float32),
    )


class TestKeeping:
    def test_the_name_is_the_digest_and_the_content_comes_back(self, tmp_path: Path) -> None:
        assets = Assets(tmp_path / "r.assets")
        assert assets.wanted
        assert assets.keep(CONTENT, "png") == assets.keep(CONTENT, "png") == NAME
        assert os.listdir(tmp_path / "r.assets") == [NAME]
        assert Assets(tmp_path / "r.assets").read(NAME) == CONTENT

    def test_without_a_folder_nothing_is_kept(self) -> None:
        assets = Assets()
        assert not assets.wanted
        assert assets.keep(CONTENT, "png") is assets.read(NAME) is assets.problem is None

    def test_nothing_to_keep_leaves_no_folder(self, tmp_path: Path) -> None:
        settle(node(), tmp_path / "r.assets", Assets())
        assert os.listdir(tmp_path) == []

    def test_many_threads_with_one_content(self, tmp_path: Path) -> None:
        assets = Assets(tmp_path)
        with ThreadPoolExecutor(8) as threads:
            names = set(threads.map(lambda i: assets.keep(CONTENT * (i % 2 + 1), "png"), range(200)))
        assert assets.problem is None
        assert set(os.listdir(tmp_path)) == names and len(names) == 2

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
    def test_a_disk_that_takes_no_more_is_one_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        def fails(*_: object) -> int:
            raise OSError(code, os.strerror(code))

        assets = Assets(tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_bytes", fails)
            assert assets.keep(CONTENT, "png") is None
        assert assets.problem is not None and os.strerror(code) in assets.problem and str(tmp_path) in assets.problem
        assert not assets.wanted and assets.keep(CONTENT, "png") is None
        assert os.listdir(tmp_path) == []

    def test_it_leaves_room_for_the_result(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_RESERVE_BYTES", 2**62)
        assets = Assets(tmp_path)
        assert assets.keep(CONTENT, "png") is None
        assert assets.problem is not None and "left" in assets.problem

    def test_all_together_are_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_TOTAL_BYTES", len(CONTENT))
        assets = Assets(tmp_path)
        assert assets.keep(CONTENT, "png") == NAME
        assert assets.keep(b"another", "png") is None and assets.problem is not None

    def test_what_is_too_large_is_left_out_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_ASSET_BYTES", len(CONTENT))
        assets = Assets(tmp_path)
        assert assets.keep(CONTENT + b".", "png") is None
        assert assets.keep(CONTENT, "png") == NAME

    @pytest.mark.parametrize("there", ["link", "cut off"])
    def test_what_lies_in_its_place_is_replaced(self, tmp_path: Path, there: str) -> None:
        other = tmp_path / "other"
        other.write_bytes(b"x" * len(CONTENT))
        folder = tmp_path / "r.assets"
        folder.mkdir()
        if there == "link":
            (folder / NAME).symlink_to(other)
        else:
            (folder / NAME).write_bytes(CONTENT[:-1])
        assert Assets(folder).keep(CONTENT, "png") == NAME
        assert Assets(folder).read(NAME) == CONTENT and other.read_bytes() == b"x" * len(CONTENT)

    def test_a_new_result_takes_what_it_names_and_removes_what_was_there(self, tmp_path: Path) -> None:
        source, target = Assets(tmp_path / "a"), tmp_path / "b"
        name = source.keep(CONTENT, "png")
        old = Assets(target).keep(b"of an earlier result", "jpg")
        (target / "mine.txt").write_text("not an asset")
        assert settle(node(heat=name, other="../../x"), target, source).problem is None
        assert old != name and sorted(os.listdir(target)) == sorted([NAME, "mine.txt"])
        settle(node(heat=name), target, Assets(target))
        assert sorted(os.listdir(target)) == sorted([NAME, "mine.txt"])
        settle(node(), target, Assets())
        assert os.listdir(target) == ["mine.txt"]

    def test_nothing_is_removed_behind_a_link(self, tmp_path: Path) -> None:
        Assets(tmp_path / "other").keep(CONTENT, "png")
        (tmp_path / "r.assets").symlink_to(tmp_path / "other")
        settle(node(), tmp_path / "r.assets", Assets())
        assert os.listdir(tmp_path / "other") == [NAME]


class TestReading:
    @pytest.mark.parametrize(
        "name",
        [
            None,
            3,
            ["a.png"],
            "",
            "../r.json",
            f"../x/{NAME}",
            f"./{NAME}",
            NAME.upper(),
            f"{NAME}\n",
            NAME.replace(".png", ".html"),
            NAME.replace(".png", ""),
        ],
    )
    def test_only_names_of_assets(self, tmp_path: Path, name: Any) -> None:
        assets = Assets(tmp_path / "r.assets")
        assets.keep(CONTENT, "png")
        assert assets.read(name) is None
        assert asset_names(node(heat=name)) == {}

    @pytest.mark.parametrize("measures", [{}, {"assets": None}, {"assets": "x"}, {"assets": [NAME]}])
    def test_a_node_without_assets(self, measures: dict[str, Any]) -> None:
        assert asset_names(Difference(name="", artefact="", verdict=Verdict.IDENTICAL, measures=measures)) == {}

    def test_missing_links_pipes_folders_and_other_content(self, tmp_path: Path) -> None:
        assets = Assets(tmp_path / "r.assets")
        assert assets.read(NAME) is None
        assets.keep(CONTENT, "png")
        place = tmp_path / "r.assets" / NAME
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
        assert assets.read(NAME) is None
        place.unlink()
        os.mkfifo(place)
        assert assets.read(NAME) is None
        place.unlink()
        place.mkdir()
        assert assets.read(NAME) is None
        place.rmdir()
        place.write_bytes(CONTENT[:-1] + b"!")
        assert assets.read(NAME) is None

    def test_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Assets(tmp_path).keep(CONTENT, "png")
        monkeypatch.setattr(module, "MAX_ASSET_BYTES", len(CONTENT) - 1)
        assert Assets(tmp_path).read(NAME) is None


class TestSeries:
    def test_every_bit_comes_back_and_the_bytes_are_the_same_again(self, tmp_path: Path) -> None:
        assets = Assets(tmp_path)
        names = keep_series(assets, curves())["assets"]
        assert keep_series(assets, curves())["assets"] == names
        found = read_series(assets.read(names["series"]))
        assert found is not None
        for key, values in vars(curves()).items():
            assert getattr(found, key).tobytes() == values.tobytes() and getattr(found, key).dtype == values.dtype, key
        assert np.load(tmp_path / names["series"])["steps"].tolist() == [1, 1, 2**60]

    def test_nothing_where_nothing_is_kept(self) -> None:
        assert keep_series(Assets(), curves()) == {} and read_series(None) is None

    def test_damaged_at_any_place_is_none_or_a_series(self, tmp_path: Path) -> None:
        content = Assets(tmp_path).read(keep_series(Assets(tmp_path), curves())["assets"]["series"])
        assert content is not None
        for place in range(len(content)):
            read_series(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
            assert read_series(content[:place]) is None

    @pytest.mark.parametrize(
        "members",
        [
            {"steps": np.arange(3), "reference": np.zeros(3, "f4"), "candidate": np.zeros(2, "f4")},
            {"steps": np.arange(4).reshape(2, 2), "reference": np.zeros((2, 2)), "candidate": np.zeros((2, 2))},
            {"steps": np.arange(3.0), "reference": np.zeros(3), "candidate": np.zeros(3)},
            {"steps": np.arange(3), "reference": np.arange(3), "candidate": np.zeros(3)},
            {"steps": np.arange(3), "reference": np.array([None] * 3), "candidate": np.zeros(3)},
        ],
    )
    def test_what_is_no_series(self, members: dict[str, Any]) -> None:
        stream = io.BytesIO()
        np.savez(stream, **members)
        assert read_series(stream.getvalue()) is None

    def test_a_bomb_is_not_inflated(self) -> None:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as zipped:
            zipped.writestr("steps.npy", b"\0" * 10**7)
        assert read_series(stream.getvalue()) is None


class TestOfTwoRuns:
    @pytest.fixture
    def kept(self, tmp_path: Path) -> tuple[Difference, Assets]:
        changed = FakeRun()
        changed.scalars[LOSS][3] *= 2
        image = next(iter(changed.renders))
        changed.renders[image]["rgb"][0, 0, 0] = 0.123
        runs = [run.write(tmp_path / name) for name, run in (("a", FakeRun()), ("b", changed))]
        assets = Assets(assets_folder(tmp_path / "r.json"))
        result = compare_runs(runs[0], {"candidate": runs[1]}, policy=DIFF_POLICY, assets=assets)
        plain = compare_runs(runs[0], {"candidate": runs[1]}, policy=DIFF_POLICY)
        assert result.outcome is plain.outcome is Outcome.DIVERGED
        assert not [one for _, one in plain.root.walk() if "assets" in one.measures]
        assert [one.summary for _, one in plain.root.walk()] == [one.summary for _, one in result.root.walk()]
        return result.root, assets

    def test_every_name_is_there(self, kept: tuple[Difference, Assets]) -> None:
        root, assets = kept
        names = {name for _, one in root.walk() for name in asset_names(one).values()}
        assert names and assets.folder is not None and names == set(os.listdir(assets.folder))
        assert all(assets.read(name) for name in names)

    def test_the_series_that_differ_and_those_that_one_wants_to_see(self, kept: tuple[Difference, Assets]) -> None:
        root, assets = kept
        found = {path[-1]: asset_names(one)["series"] for path, one in root.walk() if "series" in asset_names(one)}
        assert set(found) == {LOSS, PSNR}
        loss = read_series(assets.read(found[LOSS]))
        assert loss is not None
        assert (loss.steps[loss.reference != loss.candidate]).tolist() == [3]

    def test_the_pictures_that_differ(self, kept: tuple[Difference, Assets]) -> None:
        root, _ = kept
        found = {one.name: set(asset_names(one)) for _, one in root.walk() if one.artefact == "renders"}
        assert found["rgb"] == {"reference", "candidate", "heat", "thumbnail"}
        assert found["depth"] == set()
