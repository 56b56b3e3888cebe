"""Annotations: one line each, escaped as GitHub's runner reads it, and at the level of the verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
from example_results import RESULTS
from fake_runs import LOSS, FakeRun, compare_fakes
from golden_files import check_golden

from f3rm_verify.difference import Result
from f3rm_verify.reporters.annotations import github_annotations


@pytest.mark.parametrize("name", RESULTS)
def test_golden(name: str) -> None:
    check_golden(f"annotations_{name}.txt", "".join(f"{line}\n" for line in github_annotations(RESULTS[name]())))


def differing(name: str = LOSS) -> tuple[FakeRun, FakeRun]:
    runs = FakeRun(), FakeRun()
    for value, run in enumerate(runs):
        run.scalars[name] = dict.fromkeys(range(10), float(value))
    return runs


def unescaped(text: str) -> str:
    for code, char in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(code, char)
    return text


def test_equal_runs_are_a_notice(tmp_path: Path) -> None:
    (line,) = github_annotations(compare_fakes(tmp_path, FakeRun(), FakeRun()))
    assert line.startswith("::notice title=f3rm-verify%3A REPRODUCIBLE::2 runs x 10 steps")


def test_inconclusive_runs_are_a_warning_with_the_reasons(tmp_path: Path) -> None:
    run = FakeRun()
    run.manifest["completion"] = None
    (line,) = github_annotations(compare_fakes(tmp_path, FakeRun(), run))
    assert line.startswith("::warning title=f3rm-verify%3A INCONCLUSIVE::")
    assert "the candidate did not complete" in line


def test_different_runs_are_an_error_for_each_artefact(tmp_path: Path) -> None:
    runs = differing()
    runs[1].metrics["mean"]["psnr"] = 1.0
    verdict, *artefacts = github_annotations(compare_fakes(tmp_path, *runs))
    assert verdict.startswith("::error title=f3rm-verify%3A DIVERGED::")
    assert "%0Afirst at step 0" in verdict and "%0ACause: " in verdict
    assert [line.split("::")[1] for line in artefacts] == [
        "error title=f3rm-verify%3A curves",
        "error title=f3rm-verify%3A metrics",
    ]


@pytest.mark.parametrize(
    "name", ["100%", "a\n::set-output name=x::y", "a\r\n::error::z", "%0A", "b::c,d=e", "\x1b[31m"]
)
def test_names_stay_in_their_line(tmp_path: Path, name: str) -> None:
    lines = list(github_annotations(compare_fakes(tmp_path, *differing(name))))
    assert all(line.startswith("::error title=f3rm-verify%3A ") and len(line.splitlines()) == 1 for line in lines)
    assert not any(char in unescaped(line).replace("\n", "") for line in lines for char in "\x1b\r")


def test_a_baseline_is_the_file_that_is_annotated(tmp_path: Path) -> None:
    data = compare_fakes(tmp_path, *differing()).to_dict()
    for place, expected in (
        ("a,b/base.json", "::error file=a%2Cb/base.json,title="),
        ("/a/base.json", "::error title="),
    ):
        data["reference"]["directory"] = place
        assert all(line.startswith(expected) for line in github_annotations(Result.from_dict(data)))
