"""The fixture `assert_reproducible`: all verdicts, from directories, trainings and baselines; and what it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import LOSS, RAYS, FakeRun, plain_run
from fake_training import GOOD, program

from f3rm_verify.baseline import make_baseline, write_baseline
from f3rm_verify.policy import RUN_POLICY

pytest_plugins = ["pytester"]

DIVERGING = (
    "run = begin()\nfor i in range(3): run.step(9.0 if i == 1 and run.side == 'candidate' else None)\nrun.finish()"
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this plug-in, whatever is installed; fakes need milliseconds."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr("f3rm_verify.runner._POLL_SECONDS", 0.02)


def ended(pytester: pytest.Pytester, call: str, *options: str) -> pytest.RunResult:
    """One test that makes this call, run by a pytest of its own."""
    pytester.makepyfile(f"def test_it(assert_reproducible):\n    assert_reproducible({call})")
    return pytester.runpytest_inprocess("-p", "f3rm_verify.pytest_plugin", "-q", *options)


def text_of(result: pytest.RunResult) -> str:
    return "\n".join(result.outlines)


def different() -> FakeRun:
    run = FakeRun()
    run.scalars[LOSS][4] = float(np.nextafter(np.float32(run.scalars[LOSS][4]), np.float32(2)))
    assert run.trace is not None
    run.trace.steps[4][RAYS] ^= 1
    return run


def write(folder: Path, **runs: FakeRun) -> None:
    for name, run in runs.items():
        run.write(folder / name)


class TestDirectories:
    def test_equal_runs_pass(self, pytester: pytest.Pytester) -> None:
        write(pytester.path, a=FakeRun(), b=FakeRun())
        ended(pytester, "'a', 'b'").assert_outcomes(passed=1)

    def test_different_runs_fail_with_the_report(self, pytester: pytest.Pytester) -> None:
        write(pytester.path, a=FakeRun(), b=different())
        result = ended(pytester, "'a', 'b'", f"--f3rm-verify-output={pytester.path / 'kept'}")
        result.assert_outcomes(failed=1)
        text = text_of(result)
        assert "DIVERGED" in text and "first at step 4" in text and "Traceback" not in text
        (file,) = pytester.path.glob("kept/*/result.json")
        assert json.loads(file.read_text())["verdict"] == "diverged"
        assert "result.json" in text and "test_it" in file.parent.name

    def test_the_default_place_is_the_test_s_own(self, pytester: pytest.Pytester) -> None:
        write(pytester.path, a=FakeRun(), b=different())
        text = text_of(ended(pytester, "'a', 'b'", f"--basetemp={pytester.path / 'temporary'}"))
        assert (pytester.path / "temporary").rglob("result.json")
        assert "result.json" in text

    def test_inconclusive_runs_fail(self, pytester: pytest.Pytester) -> None:
        write(pytester.path, a=FakeRun())
        result = ended(pytester, "'a', 'a'")
        result.assert_outcomes(failed=1)
        assert "INCONCLUSIVE" in text_of(result)

    @pytest.mark.parametrize("way", ["option", "argument"])
    def test_or_are_skipped_where_asked_for(self, pytester: pytest.Pytester, way: str) -> None:
        write(pytester.path, a=FakeRun())
        if way == "option":
            result = ended(pytester, "'a', 'a'", "--f3rm-verify-inconclusive=skip", "-rs")
        else:
            result = ended(pytester, "'a', 'a', inconclusive='skip'", "-rs")
        result.assert_outcomes(skipped=1)
        assert "both sides are one directory" in text_of(result)

    def test_a_difference_is_never_skipped(self, pytester: pytest.Pytester) -> None:
        write(pytester.path, a=FakeRun(), b=different())
        ended(pytester, "'a', 'b', inconclusive='skip'").assert_outcomes(failed=1)

    def test_a_policy_and_a_choice_of_artefacts(self, pytester: pytest.Pytester) -> None:
        write(pytester.path, a=FakeRun(), b=different())
        (pytester.path / "gate.toml").write_text('[limits.curves]\n"Train Loss" = { ulps = 1 }\n')
        ended(pytester, "'a', 'b', policy='gate.toml'").assert_outcomes(passed=1)
        ended(pytester, "'a', 'b', only=['checkpoints']").assert_outcomes(passed=1)
        ended(pytester, "'a', 'b', only=['curves']").assert_outcomes(failed=1)

    def test_it_returns_the_result(self, pytester: pytest.Pytester) -> None:
        write(pytester.path, a=plain_run(), b=plain_run())
        pytester.makepyfile(
            """
            def test_it(assert_reproducible):
                for _ in range(2):
                    result = assert_reproducible("a", "b")
                assert result.outcome.value == "reproducible"
            """
        )
        pytester.runpytest_inprocess("-p", "f3rm_verify.pytest_plugin").assert_outcomes(passed=1)


class TestTrainings:
    @pytest.fixture
    def call(self, pytester: pytest.Pytester) -> str:
        (pytester.path / "data").mkdir()
        return "seed=7, iters=3, data='data', method='nerfacto', args=['--x', 'y'], ns_train='bin/ns-train'"

    @pytest.mark.parametrize(
        ("body", "more", "outcome", "word"),
        [
            (GOOD, "", "passed", ""),
            (GOOD, ", control=True, repeat=3", "passed", ""),
            (DIVERGING, "", "failed", "DIVERGED"),
            ("run = begin(); run.step(); raise ValueError('boom')", "", "failed", "ValueError: boom"),
            ("run = begin(); run.seed = 1; run.steps(); run.finish()", ", control=True", "failed", "control run"),
            ("sys.exit(3)", "", "failed", "ended before it began"),
        ],
    )
    def test_every_verdict(
        self, pytester: pytest.Pytester, call: str, body: str, more: str, outcome: str, word: str
    ) -> None:
        program(pytester.path / "bin", body)
        result = ended(pytester, call + more, f"--f3rm-verify-output={pytester.path / 'kept'}")
        result.assert_outcomes(**{outcome: 1})
        assert word in text_of(result)
        assert "During handling" not in text_of(result)
        for asked in pytester.path.glob("kept/*/*/calls/reference.json"):
            words = json.loads(asked.read_text())["argv"]
            assert words[-2:] == ["--x", "y"] and words[words.index("--machine.seed") + 1] == "7"

    def test_a_stop_ends_the_session(self, pytester: pytest.Pytester, call: str) -> None:
        program(pytester.path / "bin", "os.kill(os.getppid(), 2); time.sleep(60)")
        pytester.makepyfile(f"def test_it(assert_reproducible):\n    assert_reproducible({call})")
        result = pytester.runpytest_subprocess("-p", "f3rm_verify.pytest_plugin", timeout=60)
        assert result.ret == pytest.ExitCode.INTERRUPTED


class TestBaseline:
    @pytest.fixture(autouse=True)
    def recorded(self, pytester: pytest.Pytester) -> None:
        file = pytester.path / "b.json"
        write_baseline(file, make_baseline(FakeRun().write(pytester.path / "a"), file, policy=RUN_POLICY, runs=2))

    @pytest.mark.parametrize(("run", "outcome"), [(FakeRun(), "passed"), (different(), "failed")])
    def test_a_run(self, pytester: pytest.Pytester, run: FakeRun, outcome: str) -> None:
        write(pytester.path, b=run)
        ended(pytester, "'b', baseline='b.json'").assert_outcomes(**{outcome: 1})

    def test_a_run_elsewhere_is_inconclusive(self, pytester: pytest.Pytester) -> None:
        run = FakeRun()
        run.manifest["environment"]["packages"]["torch"] = "1"
        write(pytester.path, b=run)
        ended(pytester, "'b', baseline='b.json', inconclusive='skip'").assert_outcomes(skipped=1)

    def test_a_training(self, pytester: pytest.Pytester) -> None:
        program(pytester.path / "bin", GOOD)
        call = f"baseline='b.json', data={str(pytester.path)!r}, ns_train='bin/ns-train'"
        result = ended(pytester, call)
        result.assert_outcomes(failed=1)
        assert "not comparable with the baseline" in " ".join(text_of(result).split())


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ("'a'", "give two, or one and a baseline"),
        ("'a', 'b', 'c'", "give two"),
        ("'absent', 'absent'", "absent does not exist"),
        ("'.', '.', iters=3", "do not belong"),
        ("'.', '.', inconclusive='pass'", "fail, skip"),
        ("sede=3", "no option sede"),
        ("repeat=1", "cannot differ"),
        ("only=['curves']", "two run directories"),
        ("baseline='absent'", "does not exist"),
        ("'a', 'b', baseline='absent'", "absent does not exist"),
        ("baseline='absent', policy='p'", "its own policy"),
        ("data='absent'", "--data absent does not exist"),
        ("ns_train='absent'", "--ns-train"),
    ],
)
def test_a_mistake_fails_with_one_sentence(pytester: pytest.Pytester, call: str, word: str) -> None:
    result = ended(pytester, call)
    result.assert_outcomes(failed=1)
    assert word in text_of(result)
    assert "Traceback" not in text_of(result)


def test_a_plain_pytest_loads_nothing_heavy(pytester: pytest.Pytester) -> None:
    script = """
import sys, pytest
before = set(sys.modules)
import f3rm_verify.pytest_plugin
print(sorted(name for name in set(sys.modules) - before if "." not in name or name.startswith("f3rm")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['f3rm_verify', 'f3rm_verify.pytest_plugin']"


def test_it_is_registered() -> None:
    (point,) = metadata.entry_points(group="pytest11", name="f3rm_verify")
    module: Any = point.load()
    assert module.assert_reproducible


def test_tests_that_do_not_use_it_are_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import sys\ndef test_it(): assert 'f3rm_verify.verification' not in sys.modules")
    result = pytester.runpytest_subprocess("-p", "f3rm_verify.pytest_plugin", "-W", "error")
    result.assert_outcomes(passed=1)
