"""docs/ci.md: its recipes parse, name what there is, and their commands run; the tests that it shows do, too."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_runs import FakeRun

from f3rm_verify.baseline import make_baseline, write_baseline
from f3rm_verify.policy import RUN_POLICY

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "ci.md").read_text("utf8")
YAML: list[dict[str, Any]] = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)]
GITHUB, GITLAB = YAML
ACTION = yaml.safe_load((ROOT / "action.yml").read_text("utf8"))


def test_the_workflow_uses_inputs_that_the_action_has() -> None:
    (step,) = (step for step in GITHUB["jobs"]["reproducible"]["steps"] if "f3rm-verify" in step["uses"])
    assert step["with"].keys() <= ACTION["inputs"].keys()
    assert all(isinstance(value, str) for value in step["with"].values())


def test_the_tables_name_every_input_and_output() -> None:
    tables = re.findall(r"^\| (.*?) \|", TEXT, re.MULTILINE)
    named = {name for row in tables for name in re.findall(r"`([a-z-]+)`", row)}
    assert named == {*ACTION["inputs"], *ACTION["outputs"]}


@pytest.mark.parametrize(("job", "code"), [(job, code) for job in GITLAB for code in (0, 1, 2, 3)])
def test_gitlab_jobs_end_like_their_last_command(tmp_path: Path, job: str, code: int) -> None:
    """GitLab joins the lines of a script in one shell that stops at the first that fails."""
    for name in ("pip", "f3rm-verify", "pytest"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        ends = 0 if name == "pip" else code
        record = f"import json, sys; json.dump(sys.argv[1:], open({str(tmp_path / name)!r} + '.json', 'w'))"
        path.write_text(f'#!/bin/sh\n{shlex.quote(sys.executable)} -c {shlex.quote(record)} "$@"\nexit {ends}\n')
        path.chmod(0o755)
    script = "set -eo pipefail\n" + "\n".join(GITLAB[job]["script"])
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, timeout=60)
    assert done.returncode == code
    program = "f3rm-verify" if (tmp_path / "f3rm-verify.json").exists() else "pytest"
    words = json.loads((tmp_path / f"{program}.json").read_text())
    kept = [path for path in GITLAB[job]["artifacts"]["paths"] if any(path in word for word in words)]
    assert kept == GITLAB[job]["artifacts"]["paths"]


def test_gitlab_gets_the_files_that_the_job_writes() -> None:
    job = GITLAB["reproducible"]
    words = shlex.split(job["script"][-1])
    assert job["artifacts"]["reports"]["junit"] == words[words.index("--junit") + 1]
    assert words[words.index("--html") + 1].split("/")[0] in job["artifacts"]["paths"]


def test_only_inconclusive_may_fail() -> None:
    assert GITLAB["reproducible"]["allow_failure"] == {"exit_codes": [3]}
    assert "allow_failure" not in GITLAB["reproducible-tests"]
    words = " ".join(GITLAB["reproducible-tests"]["script"])
    assert f"--junitxml={GITLAB['reproducible-tests']['artifacts']['reports']['junit']}" in words


def test_the_tests_that_it_shows(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the one that trains are run as they stand."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (shown,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    pytester.makepyfile(test_reproducible=shown)
    for name in ("a", "b"):
        FakeRun().write(pytester.path / "outputs" / name)
    (pytester.path / "gate.toml").write_text("")
    file = pytester.path / "tests" / "baseline.json"
    write_baseline(file, make_baseline(FakeRun().write(pytester.path / "c"), file, policy=RUN_POLICY, runs=2))
    options = ("-p", "f3rm_verify.pytest_plugin", "-k", "not test_training", "--junitxml=report.xml", "-rfs")
    result = pytester.runpytest_inprocess(*options)
    # The baseline was not recorded of the built-in scene, so that nothing is trained: a sentence says what is missing.
    result.assert_outcomes(passed=1, failed=1, deselected=1)
    assert "give --data" in (pytester.path / "report.xml").read_text("utf8")
