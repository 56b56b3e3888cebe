"""The options that commands share: what typer sees of them, and that no command begins what it could not report."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from fake_runs import FakeRun, compare_fakes
from fake_training import GOOD, program

from f3rm_verify import cli
from f3rm_verify.errors import UsageError
from f3rm_verify.options import Preset, Reports, Setting, Subject, refuse_unwritable, takes_options
from f3rm_verify.reporters.json_report import write_json

COMMANDS = ("run", "diff", "report", "explain", "baseline record", "baseline check")
OPTIONS = [f"--{kind}" for kind in vars(Reports())]


def test_a_command_gets_its_groups_and_typer_their_fields() -> None:
    got: list[Any] = []

    @takes_options
    def command(path: Path, *, subject: Subject, steps: int = 3, setting: Setting) -> None:
        """What it does."""
        got.extend((path, subject, steps, setting))

    app = typer.Typer()
    app.command()(command)
    words = ["a", "--seed", "7", "--preset", "small", "--steps", "4", "--output-dir", "b"]
    assert not typer.main.get_command(app).main(words, standalone_mode=False)
    assert got == [Path("a"), Subject(seed=7, preset=Preset.SMALL), 4, Setting(output_dir=Path("b"))]
    names = [parameter.name for parameter in typer.main.get_command(app).params]
    assert names[:5] == ["path", "seed", "method", "preset", "steps"]


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_with_a_result_can_write_every_report(words: str) -> None:
    command: Any = typer.main.get_command(cli.app)
    for word in words.split():
        command = command.commands[word]
    options = {option for parameter in command.params for option in parameter.opts}
    assert set(OPTIONS) <= options


class TestWhatCannotBeWritten:
    @pytest.fixture
    def commands(self, tmp_path: Path) -> dict[str, list[str]]:
        """Commands that would come to an end, whatever it is."""
        (tmp_path / "data").mkdir()
        runs = [str(FakeRun().write(tmp_path / name).path) for name in ("a", "b")]
        write_json(compare_fakes(tmp_path / "c", FakeRun(), FakeRun()), tmp_path / "r.json")
        train = ["--ns-train", str(program(tmp_path / "bin", GOOD)), "--output-dir", str(tmp_path / "out")]
        data = ["--data", str(tmp_path / "data")]
        return {
            "run": ["run", *train, *data, "--method", "nerfacto", "--iters", "3"],
            "diff": ["diff", *runs],
            "report": ["report", str(tmp_path / "r.json")],
            "explain": ["explain", *runs],
            "baseline record": ["baseline", "record", str(tmp_path / "base.json"), "--from", runs[0]],
            "baseline check": ["baseline", "check", str(tmp_path / "base.json"), "--from", runs[0]],
        }

    @pytest.mark.parametrize("option", OPTIONS)
    @pytest.mark.parametrize("name", COMMANDS)
    def test_it_is_refused_before_anything_is_done(
        self,
        tmp_path: Path,
        commands: dict[str, list[str]],
        name: str,
        option: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "file").write_text("")
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr("sys.argv", ["f3rm-verify", *commands[name], option, str(tmp_path / "file" / "below")])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        printed = capsys.readouterr()
        kind = "directory" if option in ("--html", "--tensorboard") else "file"
        place = re.escape(str(tmp_path / "file"))
        why = rf"{place}/below cannot be written: {place} takes no new files; name another {kind}\."
        assert re.fullmatch(rf"f3rm-verify: {option} {why}\n", printed.err)
        assert printed.out == ""
        assert sorted(tmp_path.rglob("*")) == before

    def test_the_places_that_can_be_written_stay_untouched(self, tmp_path: Path) -> None:
        (tmp_path / "old").write_text("x")
        for place, directory in (("old", False), ("new/r", False), ("new/dir", True), (".", True)):
            refuse_unwritable(tmp_path / place, directory=directory)
        assert [path.name for path in tmp_path.iterdir()] == ["old"]

    def test_a_file_is_no_directory_and_a_pipe_is_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "old").write_text("x")
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UsageError, match="takes no new files; name another directory"):
            refuse_unwritable(tmp_path / "old", "--html", directory=True)
        for place in ("pipe", "."):
            with pytest.raises(UsageError, match="it is no regular file; name another file"):
                refuse_unwritable(tmp_path / place)
