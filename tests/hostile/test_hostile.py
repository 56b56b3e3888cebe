"""Every case of the table: what comes of hostile input, and what it does not do. `-s` prints time and memory."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fake_runs import FakeRun
from hostile.cases import CANARY, CASES, EVENTS, Case

from f3rm_verify import reporters

#: What a comparison of a small run may take beyond what the imports have.
MAX_PEAK_BYTES = 1600 * 2**20
_SCRIPTS = [path.read_text("utf8") for path in (Path(reporters.__file__).parent / "templates").glob("*.js")]
_JUNIT = ("testsuites", "testsuite", "testcase", "failure", "error", "skipped", "properties", "property", "system-out")
#: What rich writes for colours and nothing else.
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Sandbox:
    """The process that compares, the folder that it works in, and the good pair that cases start from."""

    process: subprocess.Popen[str]
    folder: Path

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def pair(self, case: Case) -> tuple[Path, Path]:
        """Two runs, of which the candidate is damaged."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        place.chmod(0o755)
        for side in ("reference", "candidate"):
            shutil.copytree(self.folder / "good" / side, place / side)
        case.damage(place / "candidate")
        return place / "reference", place / "candidate"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        for side in ("reference", "candidate"):
            run = FakeRun().write(folder / "good" / side)
            run.event_files[0].rename(run.path / EVENTS)
        yield from _started(folder)


def _started(folder: Path) -> Iterator[Sandbox]:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("sandbox.py"))
    command = [sys.executable, "-W", "ignore::DeprecationWarning", script]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment
    ) as process:
        yield Sandbox(process, folder)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def good(sandbox: Sandbox) -> dict[str, Any]:
    pair = {side: str(sandbox.folder / "good" / side) for side in ("reference", "candidate")}
    answer = sandbox.ask(**pair)
    assert answer["outcome"] == "reproducible", answer
    assert not answer["found"]
    return answer


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_hostile(case: Case, sandbox: Sandbox, good: dict[str, Any]) -> None:
    if case.user is not None and os.getuid() != 0:
        pytest.skip("only root can become another user")
    reference, candidate = sandbox.pair(case)
    request: dict[str, Any] = {"reference": str(reference), "candidate": str(candidate), "seconds": case.seconds}
    if case.change is not None:
        request["change"] = {"path": str(candidate / case.change[0]), "how": case.change[1]}
    if case.late is not None:
        request["late"] = str(candidate / case.late)
    answer = sandbox.ask(**request, user=case.user)
    result = answer.get("outcome") or answer.get("usage", "?")[-60:]
    print(f"\n| {case.name} | {result} | {answer['seconds']:.2f} s | {answer['peak_bytes'] / 2**20:.0f} MiB |", end=" ")
    _check(case, answer, good)
    assert not (sandbox.folder / CANARY).exists(), "it was executed"
    subprocess.run(["rm", "-rf", reference.parent], check=False)  # rmtree fails below 1,000 folders


def _check(case: Case, answer: dict[str, Any], good: dict[str, Any]) -> None:
    assert "traceback" not in answer, answer["traceback"]
    assert "died" not in answer, answer["died"]
    assert answer["found"] == []
    assert answer["peak_bytes"] < MAX_PEAK_BYTES
    if case.usage is not None:
        assert case.usage in answer["usage"]
        return
    assert "usage" not in answer, answer["usage"]
    assert fnmatch.fnmatchcase(answer["outcome"], case.outcome), answer["reasons"]
    assert answer["round_trip"]
    assert all(char.isprintable() or char == "\n" for char in answer["plain"])
    assert all(char.isprintable() or char == "\n" for char in _COLOURS.sub("", answer["colour"]))
    _check_reports(answer, good)
    unreadable = {path: summary for path, verdict, summary in answer["leaves"] if verdict == "unreadable"}
    assert sorted(unreadable) == sorted(case.unreadable)
    assert all(summary for summary in unreadable.values())
    assert not case.says or any(case.says in summary for summary in unreadable.values()), unreadable
    changed = {path.partition("/")[0] for path in case.unreadable}
    for artefact, verdict in good["artefacts"].items():
        if not any(fnmatch.fnmatchcase(artefact, pattern) for pattern in (*changed, *case.touched)):
            assert answer["artefacts"][artefact] == verdict, f"{artefact} was not compared as before"


def _check_reports(answer: dict[str, Any], good: dict[str, Any]) -> None:
    """Each report is well-formed, and what is in a run becomes text in it and nothing else."""
    assert answer["assets_problem"] is None
    _Page().feed(answer["html"])
    tree = ElementTree.fromstring(answer["junit"])
    assert {node.tag for node in tree.iter()} <= {*_JUNIT}
    assert len(answer["markdown"].encode()) < 2**20
    assert not re.search(r"<(?!/?(details|summary|br|sub|code|b)\b)[a-z!/]", answer["markdown"], re.IGNORECASE)
    assert all(re.match(r"::(error|warning|notice) title=[^\n]*::[^\n]*$", line) for line in answer["annotations"])
    for report in ("html", "junit", "markdown"):
        assert all(char.isprintable() or char in "\n\t" for char in answer[report])


class _Page(HTMLParser):
    """Refuses what only text from a run could bring into the page."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("iframe", "object", "embed", "form", "base", "link")
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert re.fullmatch(r"(assets/[0-9a-z.]+|#[\w-]*)", value or ""), value

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and data.strip():
            assert data in _SCRIPTS or json.loads(data) is not None


def test_the_table_is_complete() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert len(names) >= 40
