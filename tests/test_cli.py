"""The command line: what it imports, refuses, prints, and which exit code it ends with."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_training import GOOD, ROOT, program

from f3rm_verify import cli
from f3rm_verify.processes import group_lives
from f3rm_verify.readers.events import read_events

HEAVY = {"numpy", "torch", "nerfstudio", "skimage", "tensorboard", "PIL", "yaml", "scipy", "pydantic"}
FOREVER = "time.sleep(60)"
#: A fake of which the candidate, and only it, logs another loss at step 1.
DIVERGING = (
    "run = begin()\nfor i in range(3): run.step(9.0 if i == 1 and run.side == 'candidate' else None)\nrun.finish()"
)


@dataclass(frozen=True)
class Ended:
    """A command that ended."""

    code: int
    output: str
    errors: str

    @property
    def sentence(self) -> str:
        """The one message of a command that says one thing."""
        message = self.errors.strip()
        assert message.startswith("f3rm-verify: ")
        assert "\n" not in message
        return message.removeprefix("f3rm-verify: ")


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> Ended:
    """The console script, in this process."""
    monkeypatch.setattr(sys, "argv", ["f3rm-verify", *words])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # typer puts in its own
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return Ended(caught.value.code if isinstance(caught.value.code, int) else -1, captured.out, captured.err)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes need milliseconds."""
    monkeypatch.setattr("f3rm_verify.runner._POLL_SECONDS", 0.02)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *words: call(capsys, monkeypatch, *map(str, words))


def process(*words: object, before: str = "", stdout: Any = subprocess.PIPE, **options: Any) -> subprocess.Popen[str]:
    """The console script in a process of its own, after the statements in `before`."""
    script = f"import sys; sys.path.insert(0, {str(ROOT.parent)!r})\n{before}\nfrom f3rm_verify import cli\ncli.main()"
    arguments = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.Popen(arguments, stdout=stdout, stderr=subprocess.PIPE, text=True, **options)


def ended(started: subprocess.Popen[str]) -> Ended:
    with started:
        output, errors = started.communicate(timeout=60)
    return Ended(started.returncode, output or "", errors)


def trainings(folder: Path, body: str, *options: str) -> list[str]:
    """The words of a `run` of a fake ns-train into folder/out."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    words = ["run", "--ns-train", str(program(folder / "bin", body)), "--data", str(folder / "data")]
    return [*words, "--method", "nerfacto", "--iters", "3", "--output-dir", str(folder / "out"), *options]


def groups(folder: Path) -> list[int]:
    return [json.loads(path.read_text())["ids"]["group"] for path in folder.glob("out/*/calls/*.json")]


def result_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("out/*/result.json")
    assert path.with_name("result.assets").is_dir()
    return json.loads(path.read_text())


class TestHelp:
    @pytest.fixture(scope="class")
    @staticmethod
    def seen() -> dict[str, Any]:
        """For each help: exit code, text, and the heavy modules that were imported for it."""
        script = f"""
import contextlib, io, json, sys
sys.path.insert(0, {str(ROOT.parent)!r})
from f3rm_verify import cli
seen = {{}}
for words in ("--help", "run --help", "diff --help", "scene --help", "seeding --help"):
    sys.argv = ["f3rm-verify", *words.split()]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    seen[words] = (code, output.getvalue(), sorted({HEAVY!r} & set(sys.modules)))
print(json.dumps(seen))
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    @pytest.mark.parametrize("words", ["--help", "run --help", "diff --help", "scene --help", "seeding --help"])
    def test_it_imports_nothing_heavy(self, seen: dict[str, Any], words: str) -> None:
        code, text, heavy = seen[words]
        assert code == 0
        assert text.startswith("Usage: f3rm-verify")
        assert heavy == []

    def test_it_names_the_options(self, seen: dict[str, Any]) -> None:
        text = seen["run --help"][1]
        assert "[-- NS_TRAIN_OPTIONS]" in text
        for option in ("--seed", "--iters", "--data", "--method", "--runs", "--control", "--stall-timeout", "--json"):
            assert re.search(rf"^ +{option}\b", text, re.MULTILINE)

    def test_no_command_is_no_success(self, command: Any) -> None:
        done = command()
        assert done.code == 2
        assert done.output.startswith("Usage: f3rm-verify")


class TestUsage:
    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["frobnicate"], "frobnicate"),
            (["run", "--frobnicate"], "--frobnicate"),
            (["run", "/data/scene"], "/data/scene"),
            (["run", "--runs", "1"], "--runs"),
            (["run", "--iters", "0"], "--iters"),
            (["run", "--iters", "many"], "--iters"),
            (["run", "--seed", "-1"], "--seed"),
            (["run", "--seed", str(2**32)], "--seed"),
            (["run", "--jobs", "0"], "--jobs"),
            (["run", "--stall-timeout", "nan"], "--stall-timeout"),
            (["run", "--render-budget", "nan"], "--render-budget"),
            (["run", "--render-budget", "inf"], "--render-budget"),
            (["run", "--data"], "--data"),
            (["run", "--data", "absent"], "absent"),
            (["run", "--method", "a=b:c,d"], "--method"),
            (["run", "--method", "-h"], "--method"),
            (["run", "--method", "nerfacto", "--preset", "small"], "--preset"),
            (["run", "--ns-train", "absent"], "--ns-train"),
            (["run", "--load-config", "absent"], "--load-config"),
            (["run", "--load-config", "file"], "no configuration of a training"),
            (["run", "--json", "file/r.json"], "--json"),
            (["run", "--json", "."], "--json"),
            (["run", "--output-dir", "file/out"], "--output-dir"),
            (["run", "--", "--machine.seed", "1"], "--seed"),
            (["run", "--", "nerfstudio-data", "--max_num_iterations=7"], "--iters"),
            (["run", "--", "--help"], "--help"),
            (["diff"], "reference"),
            (["diff", "one"], "candidate"),
            (["diff", "absent", "also-absent"], "absent"),
            (["diff", "file", "file"], "file"),
            (["diff", ".", "."], "run directory"),
            (["diff", "a", "b", "--only", "everything"], "--only"),
            (["annotations", "absent"], "absent"),
            (["annotations", "file"], "no result file"),
            (["baseline", "record"], "file"),
            (["baseline", "record", "file/b.json"], "file/b.json"),
            (["baseline", "record", "b.json", "--from", "absent"], "absent"),
            (["baseline", "record", "b.json", "--", "--machine.seed", "1"], "--seed"),
            (["baseline", "check", "absent"], "absent"),
            (["baseline", "check", "file"], "no baseline"),
            (["baseline", "frobnicate"], "frobnicate"),
            (["baseline"], "command"),
            (["explain"], "--self"),
            (["explain", "."], "--self"),
            (["explain", "absent", "also-absent"], "absent"),
            (["explain", ".", "."], "run directory"),
            (["explain", "--self", "."], "--self"),
            (["explain", ".", ".", "--seed", "1"], "--self"),
            (["explain", "--self", "--tries", "1"], "--tries"),
            (["explain", "--self", "--step", "-1"], "--step"),
            (["explain", "--self", "--", "--machine.seed", "1"], "--seed"),
            (["run", "--snapshot-every", "0"], "--snapshot-every"),
            (["seeding", "--seed", "-1"], "--seed"),
            (["seeding", "more"], "more"),
        ],
    )
    def test_a_mistake_gives_one_sentence_and_writes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any, words: Sequence[str], reason: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("f3rm_verify.ns_train.shutil.which", lambda _: program(tmp_path.parent, "x = 1"))
        (tmp_path / "file").write_text("x")
        done = command(*words)
        assert done.code == 2
        assert reason.lower() in done.sentence.lower()  # some versions of typer name arguments in capitals
        assert done.sentence.endswith(".")
        assert "Traceback" not in done.errors
        assert done.output == ""
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


class TestRun:
    def test_equal_trainings_are_reproducible(self, tmp_path: Path, command: Any) -> None:
        done = command(*trainings(tmp_path, GOOD, "--runs", "3", "--control"))
        assert done.code == 0, done.output + done.errors
        assert done.errors == ""
        result = result_of(tmp_path)
        assert result["verdict"] == "reproducible"
        assert result["pairs"] == 2
        assert result["steps"] == 3
        assert result["control"]["differs"] is True
        assert result["control"]["seed"] == 43

    def test_a_saved_configuration_gives_what_is_not_given(self, tmp_path: Path, command: Any) -> None:
        old = tmp_path / "old.yml"
        old.write_text(
            f"method_name: nerfacto\nmax_num_iterations: 2\nmachine: {{seed: 7}}\n"
            f"pipeline: {{datamanager: {{data: {tmp_path / 'data'}}}}}\n"
        )
        (tmp_path / "data").mkdir()
        words = ["run", "--ns-train", program(tmp_path / "bin", GOOD), "--output-dir", tmp_path / "out"]
        assert command(*words, "--load-config", old).code == 0
        assert command(*words, "--load-config", old, "--seed", "0", "--iters", "3", "--data", tmp_path).code == 0
        calls = [json.loads(path.read_text()) for path in tmp_path.glob("out/*/calls/reference.json")]
        assert {(call["argv"][1], call["env"]["F3RM_VERIFY_LOAD_CONFIG"]) for call in calls} == {("nerfacto", str(old))}
        given = [dict(zip(call["argv"][2::2], call["argv"][3::2], strict=False)) for call in calls]
        names = ("--machine.seed", "--max-num-iterations", "--data")
        assert {tuple(options[name] for name in names) for options in given} == {
            ("7", "2", str((tmp_path / "data").resolve())),
            ("0", "3", str(tmp_path.resolve())),
        }

    def test_a_saved_configuration_contradicts_nothing(self, tmp_path: Path, command: Any) -> None:
        old = tmp_path / "old.yml"
        old.write_text("method_name: nerfacto\nmax_num_iterations: 2\nmachine: {seed: 7}\ndata: gone\n")
        words = ["run", "--ns-train", program(tmp_path / "bin", GOOD), "--load-config", old]
        assert "--method f3rm is not that of --load-config, nerfacto" in command(*words, "--method", "f3rm").sentence
        assert "gone, which does not exist any more" in command(*words).sentence
        assert "--preset" in command(*words, "--data", tmp_path, "--preset", "full").sentence

    def test_without_one_a_variable_of_the_user_loads_nothing(
        self, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("F3RM_VERIFY_LOAD_CONFIG", "old.yml")
        assert command(*trainings(tmp_path, GOOD)).code == 0
        (call,) = tmp_path.glob("out/*/calls/reference.json")
        assert "F3RM_VERIFY_LOAD_CONFIG" not in json.loads(call.read_text())["env"]

    def test_a_difference_is_found(self, tmp_path: Path, command: Any) -> None:
        done = command(*trainings(tmp_path, DIVERGING))
        assert done.code == 1
        assert result_of(tmp_path)["first_divergence"]["step"] == 1

    def test_a_control_that_does_not_differ_is_inconclusive(self, tmp_path: Path, command: Any) -> None:
        body = "run = begin()\nrun.seed = 1\nrun.steps()\nrun.finish()"
        assert command(*trainings(tmp_path, body, "--control")).code == 3

    def test_the_last_seed_has_a_control_too(self, tmp_path: Path, command: Any) -> None:
        assert command(*trainings(tmp_path, GOOD, "--control", "--seed", str(2**32 - 1))).code == 0
        calls = sorted(path for path in tmp_path.glob("out/*/calls/control.json"))
        assert json.loads(calls[0].read_text())["env"]["PYTHONHASHSEED"] == "0"

    def test_a_crash_keeps_the_evidence_and_shows_the_log(self, tmp_path: Path, command: Any) -> None:
        body = f"""
run = begin(); run.step(); run.step()
if run.side == 'candidate':
    run.wait_for('reference', 1); raise ValueError('boom')
{FOREVER}
"""
        done = command(*trainings(tmp_path, body))
        assert done.code == 3
        assert done.errors.startswith("f3rm-verify: The candidate training failed after step 1 (exit code 1).\n")
        assert done.errors.rstrip().endswith("ValueError: boom")
        assert done.errors.count("f3rm-verify: ") == 1
        assert "The candidate training failed" in done.output
        curves = next(node for node in result_of(tmp_path)["root"]["children"] if node["name"] == "curves")
        assert curves["measures"] or curves["children"]

    def test_a_crash_after_a_difference_has_diverged(self, tmp_path: Path, command: Any) -> None:
        body = """
run = begin(); run.step(float(run.side == 'candidate'))
run.wait_for('candidate' if run.side == 'reference' else 'reference', 0)
raise ValueError('boom')
"""
        assert command(*trainings(tmp_path, body)).code == 1

    def test_an_unfinished_third_run_hides_no_difference(self, tmp_path: Path, command: Any) -> None:
        body = "if 'candidate-2' in sys.argv: os.kill(os.getppid(), 2); time.sleep(60)\n" + DIVERGING
        done = command(*trainings(tmp_path, body, "--runs", "3"))
        assert done.code == 1
        assert "stopped by SIGINT" in done.errors
        assert "the candidate-2 run never began" in " ".join(result_of(tmp_path)["reasons"])

    def test_nothing_to_compare_is_inconclusive(self, tmp_path: Path, command: Any) -> None:
        body = "if 'candidate' in sys.argv: os.kill(os.getppid(), 15); time.sleep(60)\n" + GOOD
        done = command(*trainings(tmp_path, body, "--jobs", "1"))
        assert done.code == 3
        assert "There is nothing to compare: the candidate run left nothing in" in done.errors

    @pytest.mark.parametrize("body", ["stock(); " + FOREVER, "print('Unrecognized options: no-such'); sys.exit(2)"])
    def test_trainings_that_are_not_ours_are_a_failure(self, tmp_path: Path, command: Any, body: str) -> None:
        done = command(*trainings(tmp_path, body))
        assert done.code == 2
        assert "training" in done.errors.splitlines()[0]
        assert "Traceback" not in done.errors
        assert not list(tmp_path.glob("out/*/result.json"))

    def test_two_runs_of_one_second_do_not_mix(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
    ) -> None:
        monkeypatch.setattr("time.strftime", lambda _: "2026-01-01_000000")
        for _ in range(2):
            assert command(*trainings(tmp_path, GOOD)).code == 0
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == ["2026-01-01_000000", "2026-01-01_000000-2"]

    def test_everything_after_the_dashes_reaches_ns_train(self, tmp_path: Path, command: Any) -> None:
        rest = ("--", "--log-gradients", "True", "nerfstudio-data", "--downscale-factor", "2")
        assert command(*trainings(tmp_path, GOOD, *rest)).code == 0
        (call,) = tmp_path.glob("out/*/calls/reference.json")
        assert json.loads(call.read_text())["argv"][-5:] == list(rest[1:])

    @pytest.mark.parametrize(("body", "code"), [(GOOD, 2), (DIVERGING, 1)])
    def test_a_verdict_is_shown_though_its_file_cannot_be_written(
        self, tmp_path: Path, command: Any, body: str, code: int
    ) -> None:
        # The folder becomes a file while the trainings run.
        body += f"\nif run.side == 'candidate': open({str(tmp_path / 'late')!r}, 'w').close()"
        done = command(*trainings(tmp_path, body, "--json", str(tmp_path / "late" / "r.json"), "--jobs", "1"))
        assert done.code == code
        assert ("DIVERGED" if code == 1 else "REPRODUCIBLE") in done.output
        assert "the result file cannot be written" in done.sentence


class TestDiff:
    @pytest.fixture(scope="class")
    @staticmethod
    def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
        """A reference, an equal candidate, a different one."""
        folder = tmp_path_factory.mktemp("diff")
        body = "run = begin()\nfor i in range(3): run.step(0.5 + i * ('other' in run.side))\nrun.finish()"
        path = program(folder, body)
        names = ("reference", "equal", "other")
        for name in names:
            options = {
                "--timestamp": name,
                "--machine.seed": "42",
                "--max-num-iterations": "3",
                "--output-dir": str(folder / "out"),
                "--experiment-name": "e",
            }
            words = [word for item in options.items() for word in item]
            subprocess.run([str(path), "nerfacto", *words], check=True)
        first, second, third = (folder / "out/e/nerfacto" / name for name in names)
        return first, second, third

    def test_the_exit_code_is_the_verdict(self, sides: tuple[Path, Path, Path], command: Any) -> None:
        reference, equal, other = sides
        assert command("diff", reference, equal).code == 0
        assert command("diff", reference, other).code == 1
        assert command("diff", reference, other, "--only", "seeding").code == 0

    def test_curves_are_kept_beside_the_result_for_reports(
        self, tmp_path: Path, sides: tuple[Path, Path, Path], command: Any
    ) -> None:
        reference, equal, other = sides
        result, page = tmp_path / "r.json", tmp_path / "page"
        for candidate, code, verdict in ((equal, 0, "identical"), (other, 1, "different")):
            assert command("diff", reference, candidate, "--json", result, "--html", page).code == code
            kept = {file.name for file in (tmp_path / "r.assets").iterdir()}
            assert kept and all(name in result.read_text() for name in kept)
            made = (page / "index.html").read_bytes()
            assert f'Train Loss</span> <span class="mark {verdict}"'.encode() in made and b"<svg" in made
            assert command("report", result, "--html", tmp_path / "again").code == code
            assert (tmp_path / "again" / "index.html").read_bytes() == made
        shutil.rmtree(tmp_path / "r.assets")
        assert command("report", result, "--html", tmp_path / "without").code == 1
        assert b"not kept" in (tmp_path / "without" / "index.html").read_bytes()

    def test_tensorboard_is_logged_without_another_report_beside_it(
        self, tmp_path: Path, sides: tuple[Path, Path, Path], command: Any
    ) -> None:
        reference, _, other = sides
        log = tmp_path / "log"
        assert command("diff", reference, other, "--tensorboard", log).code == 1
        assert sorted(path.name for path in log.iterdir()) == ["candidate", "difference", "reference"]
        found = read_events(list((log / "difference").iterdir())).scalars["Train Loss"]
        assert found.values.any()

    def test_curves_that_cannot_be_kept_change_nothing_but_are_told(
        self, tmp_path: Path, sides: tuple[Path, Path, Path], command: Any
    ) -> None:
        reference, equal, other = sides
        (tmp_path / "r.assets").write_text("in the way")
        for candidate, code in ((equal, 0), (other, 1)):
            done = command("diff", reference, candidate, "--json", tmp_path / "r.json")
            assert done.code == code
            assert "r.assets: not all curves and pictures" in done.sentence
            assert json.loads((tmp_path / "r.json").read_text())["exit_code"] == code

    @pytest.mark.parametrize("named", [True, False])
    def test_a_policy_decides_and_is_named(
        self, tmp_path: Path, sides: tuple[Path, Path, Path], command: Any, monkeypatch: Any, named: bool
    ) -> None:
        reference, _, other = sides
        folder = tmp_path if named else tmp_path / "work"
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir("/" if named else folder)
        file = folder / "f3rm-verify.toml"
        words = ["diff", reference, other, "--only", "curves", *(["--policy", file] if named else [])]
        for text, code, verdict in (
            ("[limits.curves]\n'*' = {absolute = 10}", 0, "WITHIN TOLERANCE"),
            ("[limits.curves]\n'*' = {absolute = 1e-9}", 1, "DIVERGED"),
            ("[limits.curves]\n'*' = {absolut = 1}", 2, ""),
            ("required = []", 2, ""),
        ):
            file.write_text(text)
            done = command(*words)
            assert (done.code, verdict in done.output) == (code, True)
            if code == 2:
                assert "f3rm-verify.toml: " in done.sentence
            else:
                assert re.search(r"^policy +\S*f3rm-verify.toml$", done.output, re.MULTILINE)

    def test_output_that_nobody_reads_changes_no_verdict(self, sides: tuple[Path, Path, Path]) -> None:
        read_end, write_end = os.pipe()
        os.close(read_end)
        done = ended(process("diff", *sides[:2], stdout=write_end))
        os.close(write_end)
        assert (done.code, done.errors) == (0, "")

    def test_output_that_is_lost_is_no_success(self, sides: tuple[Path, Path, Path]) -> None:
        full = Path("/dev/full")
        if not full.exists():
            pytest.skip("no /dev/full here")
        with full.open("wb") as file:
            done = ended(process("diff", *sides[:2], stdout=file))
        assert done.code == 2
        assert "Standard output cannot be written" in done.sentence

    def test_output_that_is_not_utf8_ends_nothing(self, sides: tuple[Path, Path, Path]) -> None:
        environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
        done = ended(process("diff", sides[0], sides[2], env=environment))
        assert done.code == 1
        assert done.output.isascii()
        assert "DIVERGED" in done.output

    def test_output_that_is_closed_ends_nothing(self) -> None:
        for stream in ("stdout", "stderr"):
            closed = ended(process("version", before=f"sys.{stream} = sys.__{stream}__ = None"))
            assert (closed.code, closed.errors) == (0, "")
        assert ended(process("frobnicate", before="sys.stderr = sys.__stderr__ = None")).code == 2


class TestBugs:
    def test_an_unexpected_exception_is_called_a_bug_and_has_diverged_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
    ) -> None:
        def broken(_: Path) -> None:
            raise KeyError("first line\nsecond line")

        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.setattr("f3rm_verify.scene.write_scene", broken)
        done = command("scene", tmp_path / "scene")
        assert done.code == 2
        assert done.sentence.startswith("This is a bug in f3rm-verify, and there is no verdict (KeyError: ")
        path = Path(done.sentence.rpartition(" is in ")[2])
        assert path.parent == tmp_path
        assert "Traceback (most recent call last)" in path.read_text()
        assert "in broken" in path.read_text()

    @pytest.mark.parametrize("error", [SystemExit(0), SystemExit(1), RecursionError(), MemoryError(), AssertionError()])
    def test_no_way_to_end_looks_like_a_verdict(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any, error: BaseException
    ) -> None:
        def broken(_: Path) -> None:
            raise error

        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.setattr("f3rm_verify.scene.write_scene", broken)
        done = command("scene", tmp_path / "scene")
        assert done.code == 2
        assert type(error).__name__ in done.sentence

    def test_a_full_disk_is_no_bug(self, monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
        def full(_: Path) -> None:
            raise OSError(28, "No space left on device", "/some/file")

        monkeypatch.setattr("f3rm_verify.scene.write_scene", full)
        done = command("scene", "x")
        assert done.code == 2
        assert done.sentence == "[Errno 28] No space left on device: '/some/file'."

    def test_a_traceback_that_cannot_be_kept_is_shown(self, monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("f3rm_verify.scene.write_scene", lambda _: 1 / 0)
        monkeypatch.setattr("tempfile.NamedTemporaryFile", broken)
        done = command("scene", "x")
        assert done.code == 2
        assert "ZeroDivisionError: division by zero" in done.errors.strip().splitlines()[-1]

    def test_ctrl_c_outside_of_trainings_is_no_verdict(self, monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
        def interrupted(_: Path) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("f3rm_verify.scene.write_scene", interrupted)
        done = command("scene", "x")
        assert done.code == 3
        assert done.sentence == "Stopped by Ctrl-C; there is no verdict."


class TestProcess:
    def test_ctrl_c_gives_one_message_and_a_verdict_over_what_there_is(self, tmp_path: Path) -> None:
        body = "run = begin()\nspawn_worker(stubborn=True)\nwhile True: run.step(); time.sleep(0.05)"
        started = process(*trainings(tmp_path, body, "--iters", "100000"))
        deadline = time.monotonic() + 30
        while not _both_stepped(tmp_path):
            if time.monotonic() > deadline:
                started.terminate()
                raise AssertionError(ended(started))
            time.sleep(0.05)
        started.send_signal(signal.SIGINT)
        done = ended(started)
        assert done.code == 3, done.output + done.errors
        assert "stopped by SIGINT (Ctrl-C): the reference after step " in done.sentence
        assert not [group for group in groups(tmp_path) if group_lives(group)]

    def test_a_reader_that_goes_ends_no_training(self, tmp_path: Path) -> None:
        started = process(*trainings(tmp_path, GOOD))
        assert started.stdout is not None
        assert started.stdout.readline().startswith("Training nerfacto 2 times, 3 steps each, in ")
        started.stdout.close()
        with started:
            assert started.stderr is not None
            errors = started.stderr.read()
        assert (started.returncode, errors) == (0, "")
        assert result_of(tmp_path)["verdict"] == "reproducible"

    def test_a_disk_that_fills_up_in_the_launcher_is_one_sentence(self, tmp_path: Path) -> None:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

        done = ended(process("scene", tmp_path / "scene", before="import signal", preexec_fn=limit))
        assert done.code == 2
        assert done.errors.count("\n") == 1
        assert "bug" not in done.errors


def _both_stepped(folder: Path) -> bool:
    statuses = [json.loads(path.read_text()) for path in folder.glob("out/*/verify/nerfacto/*/verify/status.json")]
    return len(statuses) == 2 and all((status["step"] or 0) >= 2 for status in statuses)


class TestSeeding:
    """`f3rm-verify seeding` in interpreters of its own: it sets flags of the process that it audits."""

    @staticmethod
    def audit(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        pytest.importorskip("torch")
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONHASHSEED", "TCNN_SEED")}
        # It must not need nerfstudio. torch's compiler is told of determinism, too: seconds that change nothing here.
        script = (
            "import sys, types; config = types.ModuleType('config'); compiler = types.ModuleType('compiler');"
            "compiler.config = config; sys.modules['nerfstudio'] = None;"
            "sys.modules['torch._inductor'], sys.modules['torch._inductor.config'] = compiler, config;"
            "from f3rm_verify.cli import main; main()"
        )
        command = [sys.executable, "-c", script, "seeding", *arguments]
        return subprocess.run(command, env={**kept, **variables}, capture_output=True, text=True, check=False)

    def test_a_hash_seed_in_the_environment_makes_all_claims_hold(self, tmp_path: Path) -> None:
        done = self.audit("--seed", "7", "--json", str(tmp_path / "log.json"), PYTHONHASHSEED="7")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("HOLDS")
        log = json.loads((tmp_path / "log.json").read_text("utf8"))
        assert (log["verdict"], log["exit_code"], log["plan"]["base_seed"]) == ("holds", 0, 7)
        assert {entry["verdict"] for entry in log["entries"]} == {"holds", "not applicable"}

    def test_without_it_one_fails_with_its_remedy(self, tmp_path: Path) -> None:
        done = self.audit("--json", str(tmp_path / "log.json"))
        assert (done.returncode, done.stderr) == (1, "")
        assert done.stdout.startswith("FAILS")
        assert "Start with PYTHONHASHSEED=42" in done.stdout
        log = json.loads((tmp_path / "log.json").read_text("utf8"))
        assert [entry["claim"] for entry in log["entries"] if entry["verdict"] == "fails"] == ["PYTHONHASHSEED"]

    def test_a_file_that_cannot_be_written_hides_no_verdict(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        done = self.audit("--json", str(tmp_path / "file" / "log.json"), PYTHONHASHSEED="42")
        assert done.returncode == 2
        assert done.stdout.startswith("HOLDS")
        assert done.stderr.count("\n") == 1
        assert f"--json {tmp_path}/file/log.json cannot be written" in done.stderr

    def test_without_torch_there_is_nothing_to_seed(self, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("f3rm_verify.cli.find_spec", lambda _: None)
        done = command("seeding")
        assert done.code == 2
        assert "no torch in this environment" in done.sentence


class TestBaseline:
    @staticmethod
    def words(folder: Path, body: str, *options: object) -> list[str]:
        """The words of a `baseline record` of a fake ns-train."""
        words = [word for word in trainings(folder, body, *map(str, options)) if word != "run"]
        return ["baseline", "record", str(folder / "baseline.json"), *words]

    @pytest.fixture
    def recorded(self, tmp_path: Path, command: Any) -> list[str]:
        """A recorded baseline; the words that check it in the same environment."""
        done = command(*self.words(tmp_path, GOOD))
        assert done.code == 0, done.output + done.errors
        assert "baseline.json holds what both runs put out" in done.output
        words = ["--ns-train", str(tmp_path / "bin" / "ns-train"), "--data", str(tmp_path / "data")]
        return ["baseline", "check", str(tmp_path / "baseline.json"), *words, "--output-dir", str(tmp_path / "check")]

    def test_the_same_again(self, tmp_path: Path, command: Any, recorded: list[str]) -> None:
        done = command(*recorded)
        assert done.code == 0, done.output + done.errors
        assert "Training nerfacto once, 3 steps" in done.output
        (path,) = tmp_path.glob("check/*/result.json")
        assert json.loads(path.read_text())["verdict"] == "reproducible"

    def test_another_result(self, tmp_path: Path, command: Any, recorded: list[str]) -> None:
        program(tmp_path / "bin", "run = begin(); run.steps(); run.finish(value=1.0)")
        done = command(*recorded, "--json", str(tmp_path / "r.json"))
        assert done.code == 1
        result = json.loads((tmp_path / "r.json").read_text())
        assert (result["first_divergence"]["step"], result["first_divergence"]["stage"]) == (0, "init")
        assert result["reference"]["directory"].endswith("baseline.json")

    def test_another_environment(self, tmp_path: Path, command: Any, recorded: list[str]) -> None:
        program(tmp_path / "bin", "CONDITIONS['environment']['packages']['torch'] = '9'\n" + GOOD)
        done = command(*recorded)
        assert done.code == 3
        assert "environment / packages.torch: nothing in the baseline, 9 in the run" in done.output

    def test_a_training_that_stops(self, tmp_path: Path, command: Any, recorded: list[str]) -> None:
        program(tmp_path / "bin", "run = begin(); run.step(); raise ValueError('boom')")
        done = command(*recorded)
        assert done.code == 3
        assert "ValueError: boom" in done.errors

    def test_an_existing_run_needs_no_training(self, tmp_path: Path, command: Any, recorded: list[str]) -> None:
        (run,) = tmp_path.glob("out/*/verify/nerfacto/candidate")
        done = command("baseline", "check", tmp_path / "baseline.json", "--from", run)
        assert done.code == 0, done.output
        assert not (tmp_path / "check").exists()

    def test_data_that_the_file_does_not_name(self, tmp_path: Path, command: Any, recorded: list[str]) -> None:
        at = recorded.index("--data")
        done = command(*recorded[:at], *recorded[at + 2 :])
        assert done.code == 2
        assert "does not say where its data lies; give --data" in done.sentence

    def test_runs_that_differ_write_nothing(self, tmp_path: Path, command: Any) -> None:
        done = command(*self.words(tmp_path, DIVERGING))
        assert done.code == 1
        assert "baseline.json is not written: the runs are diverged" in done.errors
        assert not (tmp_path / "baseline.json").exists()

    def test_from_one_run(self, tmp_path: Path, command: Any) -> None:
        assert command(*trainings(tmp_path, GOOD)).code == 0
        reference, candidate = (
            next(tmp_path.glob(f"out/*/verify/nerfacto/{side}")) for side in ("reference", "candidate")
        )
        done = command("baseline", "record", tmp_path / "b.json", "--from", reference)
        assert done.code == 0
        assert "Nothing shows yet that training it again gives the same" in done.output
        done = command("baseline", "check", tmp_path / "b.json", "--from", candidate)
        assert done.code == 0
        assert "was recorded from one run" in done.errors

    def test_from_a_run_that_did_not_complete(self, tmp_path: Path, command: Any) -> None:
        assert command(*trainings(tmp_path, "run = begin(); run.step(); raise ValueError")).code == 3
        reference = next(tmp_path.glob("out/*/verify/nerfacto/reference"))
        done = command("baseline", "record", tmp_path / "b.json", "--from", reference)
        assert done.code == 3
        assert "is not recorded: it did not complete" in done.sentence
        assert not (tmp_path / "b.json").exists()
