"""Evidence that a reader always finds whole, and that never ends a training where it need not."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from f3rm_verify import recorder as module
from f3rm_verify.recorder import Recorder, digest_files, write_json
from f3rm_verify.run_dir import MANIFEST, METRICS, SEEDING, STATUS, RunDir


def read(run: Path, relative: str) -> Any:
    return json.loads((run / relative).read_text("utf8"))


def leftovers(run: Path) -> list[str]:
    return [path.name for path in run.rglob("*.tmp")]


class TestManifest:
    def test_it_repeats_the_nonce_and_identifies_the_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("F3RM_VERIFY_NONCE", "abc")
        for name in ("one", "two"):
            Recorder(tmp_path / name).update_manifest({"method": "f3rm"})
        one, two = read(tmp_path / "one", MANIFEST), read(tmp_path / "two", MANIFEST)
        assert one["nonce"] == two["nonce"] == "abc"
        assert one["run_id"] != two["run_id"]
        assert one["method"] == "f3rm"
        assert one["pid"] == os.getpid()
        assert one["completion"] is None
        assert one["end"] is None

    def test_a_plain_training_has_no_nonce(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("F3RM_VERIFY_NONCE", raising=False)
        Recorder(tmp_path).update_manifest({})
        assert read(tmp_path, MANIFEST)["nonce"] is None

    def test_only_a_completion_completes(self, tmp_path: Path) -> None:
        recorder = Recorder(tmp_path)
        recorder.update_manifest({"a": 1})
        recorder.complete(first_step=5, steps=7)
        manifest = read(tmp_path, MANIFEST)
        assert manifest["completion"] == {"first_step": 5, "steps": 7}
        assert manifest["end"] >= manifest["start"]
        assert manifest["a"] == 1

    def test_nothing_is_written_before_there_is_something_to_say(self, tmp_path: Path) -> None:
        Recorder(tmp_path / "run")
        assert not (tmp_path / "run").exists()


class TestStatus:
    def test_it_is_written_at_once_for_a_new_phase_and_seldom_within_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [100.0]
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
        recorder = Recorder(tmp_path)
        assert recorder.status("setting up") is True
        assert recorder.status("training", step=0, steps=9, loss=0.5) is True
        now[0] += 0.1
        assert recorder.status("training", step=1, steps=9, loss=0.4) is False
        status = read(tmp_path, STATUS)
        assert 10 * 2**20 < status.pop("peak_rss_bytes") < 100 * 2**30
        assert status == {"phase": "training", "step": 0, "steps": 9, "loss": 0.5}
        now[0] += 0.5
        assert recorder.status("training", step=2, steps=9, loss=float("nan")) is True
        assert read(tmp_path, STATUS)["step"] == 2
        assert recorder.status("done", step=2, steps=9) is True

    def test_the_last_of_a_training_that_hangs_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_STATUS_INTERVAL", 0.2)
        recorder = Recorder(tmp_path)
        steps = [recorder.status("training", step=step, steps=9) for step in range(7)]
        assert steps == [True, *[False] * 6]
        deadline = time.monotonic() + 20
        while read(tmp_path, STATUS)["step"] != 6 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert read(tmp_path, STATUS)["step"] == 6

    def test_what_was_held_back_can_be_had_at_once_and_never_replaces_what_came_after(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recorder = Recorder(tmp_path)
        monkeypatch.setattr(module.threading.Timer, "start", lambda _: None)
        recorder.status("training", step=0)
        assert recorder.status("training", step=1) is False
        recorder.flush_status()
        assert read(tmp_path, STATUS)["step"] == 1
        assert recorder.status("training", step=2) is False
        recorder.status("done", step=2)
        recorder.flush_status()
        assert read(tmp_path, STATUS)["phase"] == "done"

    def test_one_that_cannot_be_written_ends_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "verify").write_text("a file where the folder should be")
        assert Recorder(tmp_path).status("training", step=0) is True

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module.os, "replace", full)
        recorder = Recorder(tmp_path / "run")
        assert recorder.status("training", step=0) is True
        assert leftovers(tmp_path) == []
        with pytest.raises(OSError, match="No space left"):
            recorder.update_manifest({})  # what is evidence must not be lost in silence


class TestWriteJson:
    def test_a_file_is_replaced_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "deep" / "x.json"
        write_json(path, {"a": 1})

        def unfinished(self: Path, data: bytes) -> int:
            with self.open("wb") as file:
                file.write(data[:3])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", unfinished)
        with pytest.raises(OSError, match="No space left"):
            write_json(path, {"a": 2})
        assert json.loads(path.read_text()) == {"a": 1}
        assert leftovers(tmp_path) == []

    def test_what_json_cannot_hold_changes_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        write_json(path, {"a": 1})
        with pytest.raises(TypeError):
            write_json(path, {"a": object()})
        assert json.loads(path.read_text()) == {"a": 1}

    @pytest.mark.parametrize("text", ["🌱 Seed", "b\udce9b\udce9.png", "line\nline", "\x00"])
    def test_every_text_comes_back(self, tmp_path: Path, text: str) -> None:
        write_json(tmp_path / "x.json", {text: text})
        assert json.loads((tmp_path / "x.json").read_text("utf8")) == {text: text}

    def test_people_can_read_it(self, tmp_path: Path) -> None:
        write_json(tmp_path / "x.json", ["🌱"])
        assert (tmp_path / "x.json").read_text("utf8") == '[\n "🌱"\n]\n'


def test_seeding_and_metrics_are_found_by_the_reader(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.update_manifest({"seed": 1})
    recorder.write_seeding({"entries": [], "lines": ["🌱"]})
    recorder.write_metrics({"split": "val", "images": {}, "mean": {"psnr": float("inf")}, "unavailable": {}})
    assert (tmp_path / SEEDING).exists()
    assert (tmp_path / METRICS).exists()
    run = RunDir(tmp_path)
    assert run.seeding == {"entries": [], "lines": ["🌱"]}
    assert run.metrics is not None
    assert run.metrics["mean"]["psnr"] == float("inf")
    assert run.manifest is not None
    assert run.manifest["seed"] == 1


def test_a_digest_follows_the_content_of_a_file(tmp_path: Path) -> None:
    names = ["a", "b", "c", "empty"]
    for name, content in zip(
        names, (b"x" * (3 * 2**20), b"x" * (3 * 2**20), b"x" * (3 * 2**20 - 1) + b"y", b""), strict=True
    ):
        (tmp_path / name).write_bytes(content)
    digests = digest_files(tmp_path / name for name in names)
    a, b, c, empty = (digests[str(tmp_path / name)] for name in names)
    assert a == b
    assert len({a, c, empty}) == 3
    assert empty == "99aa06d3014798d86001c324468d497f"  # xxh3_128 of nothing
