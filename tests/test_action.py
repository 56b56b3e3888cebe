"""action.yml: its steps, run by bash as GitHub does, with the real program on fake runs and with a fake program."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fake_runs import LOSS, RAYS, FakeRun

ROOT = Path(__file__).resolve().parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text("utf8"))
STEPS = {step.get("name", step.get("uses", "")): step for step in ACTION["runs"]["steps"]}
#: What every command is asked for.
REPORTS = [
    f"--{kind}=f3rm-verify-out/{name}"
    for kind, name in {"json": "result.json", "html": "report", "junit": "junit.xml", "markdown": "summary.md"}.items()
]
#: What an input could hold that is code where somebody pastes it into a script.
HOSTILE = (
    '"; touch pwned; "',
    "$(touch pwned)",
    "`touch pwned`",
    "'; touch pwned; '",
    "a\nverdict=reproducible\ntouch pwned",
    "--help",
    "${IFS}touch${IFS}pwned",
    "::set-output name=verdict::reproducible",
    "*",
)


@dataclass
class Runner:
    """What GitHub's runner gives to the steps of an action, and what it makes of what they print."""

    folder: Path
    path: Path
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    log: str = ""

    def step(self, name: str) -> int:
        step = STEPS[name]
        assert step["shell"] == "bash"
        script, output, summary = (self.folder / f"{name}.{kind}" for kind in ("sh", "output", "summary"))
        script.write_text(step["run"], "utf8")
        output.touch()
        environment = {
            "PATH": f"{self.path}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "GITHUB_ACTIONS": "true",
            "GITHUB_OUTPUT": str(output),
            "GITHUB_STEP_SUMMARY": str(summary),
            **{key: self.resolved(value) for key, value in step["env"].items()},
        }
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
        done = subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True, timeout=100)
        self.log = done.stdout + done.stderr
        self.outputs |= parsed_outputs(output.read_text("utf8"))
        return done.returncode

    @property
    def work(self) -> Path:
        work = self.folder / "work"
        work.mkdir(exist_ok=True)
        return work

    @property
    def summary(self) -> str:
        return (self.folder / "Verify.summary").read_text("utf8")

    def resolved(self, value: str) -> str:
        def look_up(match: re.Match[str]) -> str:
            name = match[1].strip()
            if name.startswith("inputs."):
                key = name.removeprefix("inputs.")
                return self.inputs.get(key, ACTION["inputs"][key]["default"])
            return {
                "github.action_path": str(ROOT),
                "steps.verify.outputs.exit-code": self.outputs.get("exit-code", ""),
            }[name]

        return re.sub(r"\$\{\{(.*?)\}\}", look_up, value)

    def verify(self, **inputs: str) -> tuple[str, str, int]:
        """Verdict, exit code as the outputs say, and how the action ends."""
        self.inputs = {key.replace("_", "-"): value for key, value in inputs.items()}
        assert self.step("Verify") == 0, self.log
        verify_log = self.log
        code = self.step("Gate")
        self.log = verify_log
        assert not list(self.folder.rglob("pwned"))
        return self.outputs["verdict"], self.outputs["exit-code"], code

    @property
    def commands(self) -> list[str]:
        """The workflow commands in what the step printed, as the runner sees them."""
        found, resume = [], None
        for line in (line.strip() for line in self.log.splitlines()):
            if resume is not None:
                resume = None if line == f"::{resume}::" else resume
            elif line.startswith("::stop-commands::"):
                resume = line.removeprefix("::stop-commands::")
            elif line.startswith("::"):
                found.append(line)
        assert resume is None
        return found


def parsed_outputs(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    lines = iter(text.splitlines())
    for line in lines:
        name, mark, rest = line.partition("<<")
        if mark:
            found[name] = "\n".join(iter(lines.__next__, rest))
        else:
            name, _, found[name] = line.partition("=")
    return found


def script(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n", "utf8")
    path.chmod(0o755)
    return path


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    """A runner whose f3rm-verify is this one."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from f3rm_verify.cli import main; main()"
    script(tmp_path / "bin", "f3rm-verify", f'exec {shlex.quote(sys.executable)} -c {shlex.quote(start)} "$@"')
    return Runner(tmp_path, tmp_path / "bin")


@pytest.fixture
def faked(tmp_path: Path) -> Runner:
    """A runner whose f3rm-verify writes down its arguments, and ends with what the file `code` says."""
    body = f"import json, sys; json.dump(sys.argv[1:], open({str(tmp_path / 'argv')!r}, 'w'))"
    script(
        tmp_path / "bin",
        "f3rm-verify",
        f'{shlex.quote(sys.executable)} -c {shlex.quote(body)} "$@"; cat {tmp_path}/print 2>/dev/null; '
        f"exit $(cat {tmp_path}/code)",
    )
    (tmp_path / "code").write_text("2")
    return Runner(tmp_path, tmp_path / "bin")


def asked(runner: Runner) -> list[str]:
    words: list[str] = json.loads((runner.folder / "argv").read_text())
    return words


def different() -> FakeRun:
    run = FakeRun()
    run.scalars[LOSS][4] = float(np.nextafter(np.float32(run.scalars[LOSS][4]), np.float32(2)))
    assert run.trace is not None
    run.trace.steps[4][RAYS] ^= 1
    return run


class TestVerdicts:
    def test_equal_runs(self, runner: Runner) -> None:
        FakeRun().write(runner.work / "a")
        FakeRun().write(runner.work / "b")
        assert runner.verify(reference="a", candidate="b") == ("reproducible", "0", 0)
        assert runner.outputs["result"] == "f3rm-verify-out/result.json"
        (command,) = runner.commands
        assert command.startswith("::notice title=f3rm-verify%3A REPRODUCIBLE::")
        assert runner.summary.startswith("## f3rm-verify: REPRODUCIBLE\n")
        out = runner.work / "f3rm-verify-out"
        kept = {"result.json", "report", "junit.xml", "summary.md", "report.txt"}
        assert kept <= {path.name for path in out.iterdir()}
        assert (out / "report" / "index.html").is_file()
        assert runner.summary == (out / "summary.md").read_text("utf8")

    def test_different_runs(self, runner: Runner) -> None:
        FakeRun().write(runner.work / "a")
        different().write(runner.work / "b")
        assert runner.verify(reference="a", candidate="b") == ("diverged", "1", 1)
        assert runner.commands[0].startswith("::error title=f3rm-verify%3A DIVERGED::")
        assert runner.summary.startswith("## f3rm-verify: DIVERGED\n")
        assert "<failure" in (runner.work / "f3rm-verify-out" / "junit.xml").read_text("utf8")
        assert "first at step 4" in runner.commands[0]
        page = (runner.work / "f3rm-verify-out" / "page" / "index.html").read_text("utf8")
        assert "<h1>DIVERGED</h1>" in page and "data-curve" in page
        assert [line.split("::")[1] for line in runner.commands[1:]] == [
            f"error title=f3rm-verify%3A {name}" for name in ("trace", "curves")
        ]

    def test_limits(self, runner: Runner) -> None:
        FakeRun().write(runner.work / "a")
        different().write(runner.work / "b")
        (runner.work / "gate.toml").write_text('[limits.curves]\n"*" = { ulps = 1 }\n')
        verdict = runner.verify(reference="a", candidate="b", policy="gate.toml")
        assert verdict == ("within_tolerance", "0", 0)

    @pytest.mark.parametrize(("fail", "code"), [("true", 3), ("false", 0), ("False", 3), ("", 3)])
    def test_inconclusive_runs(self, runner: Runner, fail: str, code: int) -> None:
        FakeRun().write(runner.work / "a")
        verdict = runner.verify(reference="a", candidate="a", fail_on_inconclusive=fail)
        assert verdict == ("inconclusive", "3", code)
        assert runner.commands[0].startswith("::warning title=f3rm-verify%3A INCONCLUSIVE::")

    def test_wrong_usage(self, runner: Runner) -> None:
        assert runner.verify(reference="absent", candidate="absent") == ("failed", "2", 2)
        assert runner.outputs["result"] == ""
        assert runner.commands == [
            "::error title=f3rm-verify: failed::There is no result; the log of this step says why."
        ]
        assert "absent does not exist" in runner.summary


class TestNothingPassesUnsaid:
    @pytest.mark.parametrize(
        ("code", "result", "expected"),
        [
            (0, None, ("failed", "2", 2)),
            (0, "", ("failed", "2", 2)),
            (0, '{\n "verdict": "diverged",\n}', ("failed", "2", 2)),
            (1, '{\n "verdict": "reproducible",\n}', ("failed", "2", 2)),
            (0, '{\n "x": "\\n \\"verdict\\": \\"reproducible\\",",\n}', ("failed", "2", 2)),
            (0, '{\n "root": {\n  "verdict": "reproducible",\n }\n}', ("failed", "2", 2)),
            (3, None, ("inconclusive", "3", 3)),
            (2, None, ("failed", "2", 2)),
            (127, None, ("failed", "2", 2)),
            (137, None, ("failed", "2", 2)),
        ],
    )
    def test_exit_code_and_result_must_agree(
        self, faked: Runner, code: int, result: str | None, expected: tuple[str, str, int]
    ) -> None:
        (faked.folder / "code").write_text(str(code))
        if result is not None:
            (faked.folder / "r.json").write_text(result)
            (faked.path / "f3rm-verify").write_text(
                f"#!/bin/sh\ncp {faked.folder}/r.json out/result.json\nexit {code}\n"
            )
        assert faked.verify(output_dir="out") == expected

    def test_an_old_result_does_not_count(self, faked: Runner) -> None:
        (faked.folder / "code").write_text("0")
        (faked.work / "out").mkdir()
        (faked.work / "out" / "result.json").write_text('{\n "verdict": "reproducible",\n}')
        (faked.work / "out" / "summary.md").write_text("## f3rm-verify: REPRODUCIBLE")
        assert faked.verify(output_dir="out") == ("failed", "2", 2)
        assert "REPRODUCIBLE" not in faked.summary

    def test_no_program(self, faked: Runner) -> None:
        (faked.path / "f3rm-verify").unlink()
        assert faked.verify() == ("failed", "2", 2)
        assert "command not found" in faked.summary


class TestInputs:
    def test_none_leave_the_defaults_to_the_program(self, faked: Runner) -> None:
        faked.verify()
        assert asked(faked) == ["run", "--output-dir=f3rm-verify-out", *REPORTS]

    def test_all_of_a_run(self, faked: Runner) -> None:
        faked.verify(
            seed="7", iters="9", data="a b", method="nerfacto", policy="p", control="true", args="--x\n1 2\n\n--y"
        )
        assert asked(faked) == [
            *("run", "--seed=7", "--iters=9", "--data=a b", "--method=nerfacto", "--policy=p"),
            *("--output-dir=f3rm-verify-out", "--control", *REPORTS),
            *("--", "--x", "1 2", "--y"),
        ]

    def test_a_baseline_says_itself_what_to_train(self, faked: Runner) -> None:
        faked.verify(baseline="b.json", data="d", seed="7", args="--x")
        assert asked(faked) == [
            *("baseline", "check", "b.json", "--data=d", "--output-dir=f3rm-verify-out", *REPORTS),
        ]

    @pytest.mark.parametrize("text", HOSTILE)
    def test_they_are_no_code(self, faked: Runner, text: str) -> None:
        names = ("seed", "iters", "data", "method", "policy")
        assert faked.verify(**dict.fromkeys(names, text), control=text)[2] == 2
        assert asked(faked)[1:6] == [f"--{name}={text}" for name in names]

    @pytest.mark.parametrize("text", HOSTILE)
    def test_neither_are_paths(self, faked: Runner, text: str) -> None:
        assert faked.verify(output_dir=f"out/{text}", baseline=text, args=text)[0] == "failed"
        assert asked(faked)[:3] == ["baseline", "check", text]
        assert faked.outputs.keys() == {"verdict", "exit-code", "result"}

    @pytest.mark.parametrize("text", ["::error::x", "  ::set-output name=verdict::reproducible", "::stop-commands::y"])
    def test_what_is_printed_is_no_command(self, faked: Runner, text: str) -> None:
        (faked.folder / "print").write_text(f"{text}\n<script>&\nno end of line {text}")
        faked.verify()
        assert len(faked.commands) == 1
        assert "&lt;script&gt;&amp;" in faked.summary and "<script>" not in faked.summary

    def test_names_in_runs_are_no_commands(self, runner: Runner) -> None:
        names = ("::error::100%", "a\n::warning::b", "%0A::notice::c", "<img src=x>")
        runs = [FakeRun(), FakeRun()]
        for value, run in enumerate(runs):
            run.scalars |= {name: dict.fromkeys(range(10), float(value)) for name in names}
            run.write(runner.work / str(value))
        assert runner.verify(reference="0", candidate="1")[0] == "diverged"
        assert {line.split(" ")[0] for line in runner.commands} == {"::error"}
        assert "<img" not in runner.summary


class TestInstalling:
    @pytest.fixture
    def pip(self, faked: Runner) -> Runner:
        body = f"import json, sys; json.dump(sys.argv[1:], open({str(faked.folder / 'argv')!r}, 'w'))"
        script(faked.path, "python", f'{shlex.quote(sys.executable)} -c {shlex.quote(body)} "$@"')
        return faked

    @pytest.mark.parametrize(
        ("inputs", "wanted"),
        [
            ({}, f"{ROOT}[train]"),
            ({"reference": "a"}, str(ROOT)),
            ({"install": "f3rm-verify==1"}, "f3rm-verify==1"),
            *(({"install": text}, text) for text in HOSTILE),
        ],
    )
    def test_what_is_installed(self, pip: Runner, inputs: dict[str, str], wanted: str) -> None:
        pip.inputs = inputs
        assert pip.step("Install f3rm-verify") == 0
        assert asked(pip)[-2:] == ["--", wanted]
        assert not list(pip.folder.rglob("pwned"))


def test_no_script_holds_an_expression() -> None:
    scripts = [step["run"] for step in STEPS.values() if "run" in step]
    assert len(scripts) == 3
    assert not [text for text in scripts if "${{" in text]


def test_everything_that_is_named_exists() -> None:
    named = set(re.findall(r"inputs\.([a-z-]+)", (ROOT / "action.yml").read_text()))
    assert named == set(ACTION["inputs"])
    steps = {step["id"] for step in STEPS.values() if "id" in step}
    for output in ACTION["outputs"].values():
        assert re.fullmatch(r"\$\{\{ steps\.(\w+)\.outputs\.([a-z-]+) \}\}", output["value"])[1] in steps  # type: ignore[index]
    assert all(isinstance(entry["default"], str) for entry in ACTION["inputs"].values())


def test_other_actions_are_pinned_to_a_version() -> None:
    uses: list[Any] = [step["uses"] for step in STEPS.values() if "uses" in step]
    assert uses and all(re.fullmatch(r"actions/[a-z-]+@v\d+", name) for name in uses)
