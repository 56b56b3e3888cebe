from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import IMAGES, LOSS, STEPS, FakeRun, plain_run, write_checkpoint, write_events

from f3rm_verify import run_dir as module
from f3rm_verify.difference import ARTEFACTS
from f3rm_verify.errors import UnreadableError, UsageError
from f3rm_verify.run_dir import CHECKPOINTS, CONFIG, MANIFEST, METRICS, RENDERS, SEEDING, TRACE, TRANSFORMS, RunDir

LAST = STEPS - 1
CHECKPOINT = f"{CHECKPOINTS}/step-{LAST:09d}.ckpt"


def refuse_to_list(monkeypatch: pytest.MonkeyPatch, *refused: Path) -> None:
    """Lets these folders be ones that this user may not list; root may list every folder."""
    for name in ("listdir", "scandir"):
        listing: Callable[[Any], Any] = getattr(os, name)

        def refusing(path: Any = ".", *, listing: Callable[[Any], Any] = listing) -> Any:
            if Path(path) in refused:
                raise PermissionError(13, "Permission denied", str(path))
            return listing(path)

        monkeypatch.setattr(os, name, refusing)


class TestOpen:
    def test_a_run_directory(self, tmp_path: Path) -> None:
        run = plain_run().write(tmp_path / "run")
        assert RunDir.open(run.path) == RunDir.open(Path(f"{run.path}/")) == run

    @pytest.mark.parametrize("name", [CONFIG, MANIFEST, "events.out.tfevents.1.host.1.0", f"{CHECKPOINTS}/x"])
    def test_by_any_of_its_files(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        assert RunDir.open(tmp_path) == RunDir(tmp_path)

    def test_the_only_one_below(self, tmp_path: Path) -> None:
        run = plain_run().write(tmp_path / "experiment" / "f3rm" / "time")
        assert RunDir.open(tmp_path) == run

    def test_one_too_far_below(self, tmp_path: Path) -> None:
        plain_run().write(tmp_path / "a" / "b" / "c" / "d")
        with pytest.raises(UsageError, match="no nerfstudio run directory"):
            RunDir.open(tmp_path)

    def test_several_below_are_named(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            plain_run().write(tmp_path / name)
        with pytest.raises(UsageError, match=r"holds 2 run directories \(.*a, .*b\); name one"):
            RunDir.open(tmp_path)

    def test_links_below_are_not_followed(self, tmp_path: Path) -> None:
        run = plain_run().write(tmp_path / "outside" / "run")
        (tmp_path / "inside").mkdir()
        (tmp_path / "inside" / "link").symlink_to(run.path)
        with pytest.raises(UsageError, match="no nerfstudio run directory"):
            RunDir.open(tmp_path / "inside")

    def test_what_is_no_directory(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match="file is not a directory"):
            RunDir.open(tmp_path / "file")
        with pytest.raises(UsageError, match="nothing does not exist"):
            RunDir.open(tmp_path / "nothing")

    @pytest.mark.parametrize("name", ["photo.png", "verify/notes.txt", "config.yaml"])
    def test_an_empty_or_foreign_directory(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UsageError, match="holds no config.yml"):
            RunDir.open(tmp_path)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        with pytest.raises(UsageError, match="holds no config.yml"):
            RunDir.open(tmp_path)

    def test_a_folder_that_cannot_be_listed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "closed").mkdir()
        refuse_to_list(monkeypatch, tmp_path / "closed")
        with pytest.raises(UsageError, match="closed: its files cannot be listed"):
            RunDir.open(tmp_path)


class TestFile:
    def test_inside(self, tmp_path: Path) -> None:
        run = FakeRun().write(tmp_path / "run")
        assert run.file(CONFIG) == run.path / CONFIG
        assert run.file("nothing") is None
        (run.path / "link").symlink_to(CONFIG)
        assert run.file("link") == run.path / "link"

    @pytest.mark.parametrize("target", ["../secret", "/", "nowhere", "loop"])
    def test_a_link_that_leads_elsewhere(self, tmp_path: Path, target: str) -> None:
        run = FakeRun().write(tmp_path / "run")
        (tmp_path / "secret").touch()
        (run.path / "loop").symlink_to(target)
        with pytest.raises(UnreadableError, match=r"loop: a link that leads (out of the run directory|nowhere)"):
            run.file("loop")

    def test_a_run_directory_that_is_itself_a_link(self, tmp_path: Path) -> None:
        run = FakeRun().write(tmp_path / "run")
        (tmp_path / "link").symlink_to(run.path)
        linked = RunDir(tmp_path / "link")
        assert linked.manifest == run.manifest
        assert list(linked.checkpoints) == [LAST]


#: A way to read each file, and its name.
READERS: Mapping[str, Callable[[RunDir], object]] = {
    MANIFEST: lambda run: run.manifest,
    SEEDING: lambda run: run.seeding,
    METRICS: lambda run: run.metrics,
    CONFIG: lambda run: run.config,
    TRANSFORMS: lambda run: run.transforms,
}


class TestFiles:
    @pytest.mark.parametrize("name", READERS)
    def test_nothing_where_there_is_none(self, tmp_path: Path, name: str) -> None:
        assert READERS[name](RunDir(tmp_path)) is None

    @pytest.mark.parametrize("content", [b"", b"null", b"[]", b'"text"', b"3", b"\xff", b"{", b"[" * 5000])
    @pytest.mark.parametrize("name", READERS)
    def test_anything_but_an_object_is_unreadable(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableError, match=Path(name).name):
            READERS[name](RunDir(tmp_path))

    @pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
    @pytest.mark.parametrize("name", READERS)
    def test_what_is_no_plain_file_is_unreadable(self, tmp_path: Path, name: str, kind: str) -> None:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True)
        (tmp_path / "outside").write_text("{}", "utf8")
        {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("/dev/zero")}[kind]()
        with pytest.raises(UnreadableError, match=Path(name).name):
            READERS[name](RunDir(tmp_path / "run"))

    def test_too_large_a_file_is_unreadable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = FakeRun().write(tmp_path / "run")
        monkeypatch.setattr(module, "MAX_JSON_BYTES", 100)
        with pytest.raises(UnreadableError, match="bytes are more than the 100"):
            _ = run.manifest

    @pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
    def test_a_manifest_of_another_version_is_unreadable(self, tmp_path: Path, version: object) -> None:
        run = FakeRun()
        run.manifest["schema_version"] = version
        with pytest.raises(UnreadableError, match="compare with the version that wrote it"):
            _ = run.write(tmp_path / "run").manifest


class TestMetricsOfNsEval:
    @pytest.fixture
    def run(self, tmp_path: Path) -> RunDir:
        return plain_run().write(tmp_path / "run")

    def test_are_brought_into_our_form(self, run: RunDir) -> None:
        (run.path / "eval.json").write_text(json.dumps({"results": {"psnr": 20.0}, "checkpoint": "x"}), "utf8")
        (run.path / "notes.json").write_text("{}", "utf8")
        assert run.metrics == {"split": "as ns-eval chose", "images": {}, "mean": {"psnr": 20.0}, "unavailable": {}}

    def test_ours_come_first(self, tmp_path: Path) -> None:
        run = FakeRun().write(tmp_path / "ours")
        (run.path / "eval.json").write_text('{"results": {"psnr": 20.0}}', "utf8")
        assert run.metrics == FakeRun().metrics

    def test_several_are_unreadable(self, run: RunDir) -> None:
        for name in ("a.json", "b.json"):
            (run.path / name).write_text('{"results": {}}', "utf8")
        with pytest.raises(UnreadableError, match="a.json, b.json: several results of ns-eval"):
            _ = run.metrics

    def test_a_broken_transforms_file_is_none_of_them(self, run: RunDir) -> None:
        (run.path / TRANSFORMS).write_text("{", "utf8")
        assert run.metrics is None


class TestEventFiles:
    def test_in_the_order_of_their_names(self, tmp_path: Path) -> None:
        names = ["events.out.tfevents.17.a", "events.out.tfevents.9.b"]
        for name in (*names, "events.out", "notes"):
            (tmp_path / name).touch()
        assert [path.name for path in RunDir(tmp_path).event_files] == names

    def with_folder(self, path: Path, folder: object) -> RunDir:
        run = plain_run()
        run.config["logging"]["relative_log_dir"] = folder
        write_events(path / "run" / "logs" / "events.out.tfevents.1.host", {LOSS: {0: 1.0, 1: 2.0}}, start=9.0)
        (path / "run").rename(path / "other")
        made = run.write(path / "run")
        (path / "other" / "logs").rename(path / "run" / "logs")
        return made

    @pytest.mark.parametrize("folder", ["logs", "logs/", "./logs"])
    def test_in_the_folder_that_the_config_names(self, tmp_path: Path, folder: str) -> None:
        run = self.with_folder(tmp_path, folder)
        assert [path.name for path in run.event_files] == ["events.out.tfevents.1.host"]
        assert run.events.scalars[LOSS].steps.tolist() == [0, 1]

    @pytest.mark.parametrize("folder", [".", "", None, 3, ["logs"]])
    def test_else_in_the_run_directory(self, tmp_path: Path, folder: object) -> None:
        run = self.with_folder(tmp_path, folder)
        assert [path.parent for path in run.event_files] == [run.path]

    @pytest.mark.parametrize("folder", ["/var/log", "..", "logs/../../other", "a\0b", "a\nb"])
    def test_but_not_outside(self, tmp_path: Path, folder: str) -> None:
        with pytest.raises(UnreadableError, match=r"config.yml: relative_log_dir leads out of the run directory"):
            _ = self.with_folder(tmp_path, folder).event_files

    def test_nor_through_a_link(self, tmp_path: Path) -> None:
        run = self.with_folder(tmp_path, "link")
        (run.path / "link").symlink_to(tmp_path)
        (tmp_path / "events.out.tfevents.1.host").touch()
        with pytest.raises(UnreadableError, match="leads out of the run directory"):
            _ = run.event_files

    def test_a_broken_config_names_none(self, tmp_path: Path) -> None:
        run = plain_run()
        run.config = "a: [1"
        assert len(run.write(tmp_path / "run").event_files) == 1


class TestCheckpoints:
    def test_ascending_by_step(self, tmp_path: Path) -> None:
        (tmp_path / CHECKPOINTS).mkdir()
        for name in ("step-000000010.ckpt", "step-9.ckpt", "step-x.ckpt", "step-1.ckpt.tmp", "last.ckpt"):
            (tmp_path / CHECKPOINTS / name).touch()
        assert {step: path.name for step, path in RunDir(tmp_path).checkpoints.items()} == {
            9: "step-9.ckpt",
            10: "step-000000010.ckpt",
        }
        assert list(RunDir(tmp_path).checkpoints) == [9, 10]

    def test_two_of_one_step_are_unreadable(self, tmp_path: Path) -> None:
        for name in ("step-9.ckpt", "step-000000009.ckpt"):
            write_checkpoint(tmp_path / CHECKPOINTS / name, {"step": 9})
        with pytest.raises(UnreadableError, match="two checkpoints of step 9"):
            _ = RunDir(tmp_path).checkpoints

    def test_in_the_folder_that_the_config_names(self, tmp_path: Path) -> None:
        run = plain_run()
        run.config["relative_model_dir"] = "models"
        made = run.write(tmp_path / "run")
        (made.path / CHECKPOINTS).rename(made.path / "models")
        assert list(RunDir(made.path).checkpoints) == [LAST]

    def test_a_link_out_of_the_run_is_unreadable(self, tmp_path: Path) -> None:
        run = plain_run().write(tmp_path / "run")
        (run.path / CHECKPOINT).rename(tmp_path / "outside.ckpt")
        (run.path / CHECKPOINT).symlink_to(tmp_path / "outside.ckpt")
        with pytest.raises(UnreadableError, match="leads out of the run directory"):
            _ = run.checkpoints

    def test_a_file_in_place_of_the_folder_is_unreadable(self, tmp_path: Path) -> None:
        (tmp_path / CHECKPOINTS).touch()
        with pytest.raises(UnreadableError, match="its files cannot be listed"):
            _ = RunDir(tmp_path).checkpoints

    def test_a_folder_that_cannot_be_listed_is_unreadable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = plain_run().write(tmp_path / "run")
        refuse_to_list(monkeypatch, run.path / CHECKPOINTS)
        with pytest.raises(UnreadableError, match="its files cannot be listed"):
            _ = run.checkpoints


class TestRenders:
    @pytest.fixture
    def run(self, tmp_path: Path) -> RunDir:
        return FakeRun().write(tmp_path / "run")

    def test_by_name(self, run: RunDir) -> None:
        (run.path / RENDERS / "notes.txt").touch()
        (run.path / RENDERS / IMAGES[1] / ".depth.npy.1.tmp").touch()
        outputs = ("feature.bands.npy", "feature.half.npy", "feature.projection.npy", "feature.projection.png")
        expected = [f"{IMAGES[0]}/{name}" for name in (*outputs, "rgb.npy", "rgb.png")]
        assert list(run.renders) == [*expected, f"{IMAGES[1]}/depth.npy", f"{IMAGES[1]}/depth.png"]

    def test_of_a_plain_run(self, tmp_path: Path) -> None:
        (tmp_path / "renders").mkdir()
        for name in ("b.JPG", "a.png", "c.mp4"):
            (tmp_path / "renders" / name).touch()
        assert list(RunDir(tmp_path).renders) == ["a.png", "b.JPG"]

    @pytest.mark.parametrize("folder", [RENDERS, "renders", f"{RENDERS}/{IMAGES[0]}/more"])
    def test_a_link_to_a_folder_is_unreadable(self, tmp_path: Path, folder: str) -> None:
        run = FakeRun(renders={}).write(tmp_path / "run")
        (run.path / "elsewhere").mkdir()
        (run.path / folder).parent.mkdir(parents=True, exist_ok=True)
        (run.path / folder).symlink_to(run.path / "elsewhere")
        with pytest.raises(UnreadableError, match="a link"):
            _ = run.renders

    def test_a_link_to_a_file_is_not_left_out(self, run: RunDir, tmp_path: Path) -> None:
        np.save(tmp_path / "outside.npy", np.zeros(3))
        (run.path / RENDERS / IMAGES[0] / "new.npy").symlink_to(tmp_path / "outside.npy")
        assert f"{IMAGES[0]}/new.npy" in run.renders

    def test_a_file_in_place_of_the_folder_is_unreadable(self, tmp_path: Path) -> None:
        (tmp_path / "renders").touch()
        with pytest.raises(UnreadableError, match="renders: not a folder"):
            _ = RunDir(tmp_path).renders

    def test_a_folder_that_cannot_be_listed_is_unreadable(self, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
        refuse_to_list(monkeypatch, run.path / RENDERS / IMAGES[1])
        with pytest.raises(UnreadableError, match="its files cannot be listed"):
            _ = run.renders


class TestRecorded:
    def test_by_what_there_is(self, tmp_path: Path) -> None:
        assert RunDir(tmp_path).recorded == frozenset()
        assert plain_run().write(tmp_path / "plain").recorded == {"setup", "curves", "checkpoints"}
        run = FakeRun().write(tmp_path / "ours")
        (run.path / TRACE).touch()
        assert run.recorded == set(ARTEFACTS)

    def test_also_what_is_broken(self, tmp_path: Path) -> None:
        for name in (MANIFEST, SEEDING, METRICS, TRACE):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).symlink_to("/nowhere")
        for name in (CHECKPOINTS, "renders"):
            (tmp_path / name).touch()
        (tmp_path / "events.out.tfevents.1").symlink_to("/nowhere")
        assert RunDir(tmp_path).recorded == set(ARTEFACTS)
