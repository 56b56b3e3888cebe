"""`explain` on real trainings: the operator that races, what processes inherit, and what does not show again."""

from __future__ import annotations

import html
import json
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from end_to_end.trainings import BIN, Finished, environment, user_methods, verify

from f3rm_verify.presets import SMALL
from f3rm_verify.run_dir import SNAPSHOTS

pytestmark = pytest.mark.train

UNSEEDED = ("--", "--enable-comprehensive-seeding", "False")


@dataclass(frozen=True)
class Explained:
    """A command that ended, its result file, and the directory of what it executed."""

    code: int
    output: str
    errors: str
    folder: Path
    result: Mapping[str, Any]

    @property
    def first(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.result["first_divergence"]
        return found

    @property
    def evidence(self) -> str:
        return " ".join(self.first["evidence"])


def start(folder: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(BIN / "f3rm-verify"), "explain", "--output-dir", str(folder), "--json", str(folder / "r.json"), *words],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(folder: Path, process: subprocess.Popen[str]) -> Explained:
    try:
        output, errors = process.communicate(timeout=500)
    finally:
        process.kill()
    file = folder / "r.json"
    result = json.loads(file.read_text("utf8")) if file.exists() else {}
    return Explained(process.returncode, output, errors, folder, result)


def explain(folder: Path, *words: str, **variables: str) -> Explained:
    folder.mkdir()
    return end(folder, start(folder, *words, **variables))


def executed(explained: Explained) -> list[str]:
    """The names of the processes that executed steps."""
    return sorted(log.stem for log in explained.folder.glob("*/logs/*.log"))


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Explained]:
    """A step repeated with seeding off and with seeding on, side by side; that of step 2, to be quick."""
    folders = {"off": tmp_path_factory.mktemp("off"), "on": tmp_path_factory.mktemp("on")}
    words = ("--self", "--step", "2", "--tries", "5")
    off = start(folders["off"], *words, *UNSEEDED, OMP_WAIT_POLICY="PASSIVE")
    on = start(folders["on"], *words, OMP_WAIT_POLICY="PASSIVE")
    return {"off": end(folders["off"], off), "on": end(folders["on"], on)}


class TestOneProcess:
    def test_with_seeding_off_the_racing_operator_is_found_with_its_place_and_its_sizes(
        self, steps: dict[str, Explained]
    ) -> None:
        off = steps["off"]
        assert (off.code, off.result["verdict"]) == (1, "diverged"), off.output + off.errors
        first = off.first
        assert (first["step"], first["stage"], first["operator"]) == (2, "grad", "aten::index_put")
        assert first["cause"].startswith("thread-order float accumulation on the CPU: aten::index_put in _model.")
        assert re.search(r"in the backward \(IndexBackward0\) of _model\.[\w.]+, from \S+\.py:\d+ in \w+", off.evidence)
        assert re.search(
            r"inputs float32 cpu \d+ x \d+, int64 cpu \d+ x \d+, float32 cpu \d+ x \d+ x \d+", off.evidence
        )
        assert "5 tries of step 2 in one process, seed 42, f3rm, 2 threads, cpu" in off.output

    def test_subject_and_operator_are_of_one_module(self, steps: dict[str, Explained]) -> None:
        first = steps["off"].first
        (module,) = re.findall(r"aten::index_put in (\S+) gets equal inputs", first["cause"])
        assert first["subject"].startswith(module)

    def test_with_seeding_on_the_step_is_deterministic(self, steps: dict[str, Explained]) -> None:
        on = steps["on"]
        assert (on.code, on.result["verdict"], on.result["pairs"]) == (0, "reproducible", 4), on.output + on.errors
        assert "step 2 was executed 5 times in one process, from one state" in on.output
        assert on.result["first_divergence"] is None

    def test_nothing_of_a_training_is_left_that_could_be_compared(self, steps: dict[str, Explained]) -> None:
        (run,) = steps["off"].folder.glob("*/verify/f3rm/*")
        assert not [path for path in run.rglob("*") if path.suffix == ".ckpt" or path.name == "trace.bin"]


@pytest.fixture(scope="module")
def raced_again(unseeded: Finished, tmp_path_factory: pytest.TempPathFactory) -> Explained:
    """By the command that the result of the pair names."""
    program, command, *words = shlex.split(unseeded.result["first_divergence"]["reproduce"])
    assert (program, command) == ("f3rm-verify", "explain")
    folder = tmp_path_factory.mktemp("kernels")
    return explain(folder / "out", *words, "--html", str(folder / "page"), "--markdown", str(folder / "m.md"))


class TestKernels:
    """Seeding off on two threads: hash grids add their gradients in the order in which threads arrive."""

    def test_the_operator_its_place_and_its_sizes_are_named(self, raced_again: Explained) -> None:
        assert (raced_again.code, raced_again.result["verdict"]) == (1, "diverged"), (
            raced_again.output + raced_again.errors
        )
        first = raced_again.first
        assert (first["stage"], first["operator"]) == ("grad", "aten::index_put")
        assert first["cause"].startswith("thread-order float accumulation on the CPU: aten::index_put in _model.")
        assert "executed again in two processes, it showed in try" in raced_again.evidence
        assert re.search(r"encodings\.py:\d+ in", raced_again.evidence)
        assert "hash_table" in raced_again.evidence and "float32 cpu" in raced_again.evidence

    def test_the_reports_say_it_too(self, raced_again: Explained) -> None:
        for name in ("page/index.html", "m.md"):
            assert "index_put" in html.unescape((raced_again.folder.parent / name).read_text("utf8"))

    def test_one_process_shows_that_it_is_what_the_kernels_do(self, raced_again: Explained) -> None:
        assert re.search(r"one process: 6 tries of step \d from one state gave [2-6] results", raced_again.evidence)
        assert "so it is what the kernels do" in raced_again.evidence
        assert "repeat" in executed(raced_again)


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    words = ("--method", "ordered", "--iters", "7", "--snapshot-every", "2", "--", *SMALL)
    env = {**user_methods("ordered"), "PYTHONHASHSEED": "random"}
    return verify(tmp_path_factory.mktemp("inherited"), *words, env=env)


@pytest.fixture(scope="module")
def ordered_again(ordered: Finished, tmp_path_factory: pytest.TempPathFactory) -> Explained:
    sides = (str(ordered.side("reference")), str(ordered.side("candidate")))
    return explain(tmp_path_factory.mktemp("ordered") / "out", *sides, **user_methods("ordered"))


class TestInherited:
    """A sum in the order of a set, from step 5 on, in processes that each have a hash seed of their own."""

    def test_the_pair_diverges_there_and_the_hash_seed_is_blamed(self, ordered: Finished) -> None:
        assert ordered.code == 1, ordered.output + ordered.errors
        first = ordered.result["first_divergence"]
        assert (first["step"], first["last_equal_step"], first["stage"]) == (5, 4, "loss")
        assert first["cause"].startswith("likely hash-order dependence: ")
        assert len(list((ordered.side("reference") / SNAPSHOTS).iterdir())) == 4

    def test_it_starts_from_the_last_equal_snapshot_and_says_how_long_it_takes(self, ordered_again: Explained) -> None:
        assert ordered_again.code == 1, ordered_again.output + ordered_again.errors
        said = re.search(r"Executing steps 4 to 6 again, .*: about \d+ \w+, at most \d+ \w+, in ", ordered_again.output)
        assert said, ordered_again.output
        assert (
            "steps 4 to 6 executed again in two processes, it showed in try 1: first at step 5"
            in ordered_again.evidence
        )
        assert executed(ordered_again) == ["candidate-1", "reference-1", "repeat"]

    def test_the_answer_is_that_it_is_inherited_and_what_differs(self, ordered_again: Explained) -> None:
        first = ordered_again.first
        assert (first["step"], first["stage"], first["subject"]) == (5, "loss", "rgb_loss")
        assert "one process: 6 tries of step 5 from one state gave the same bits" in ordered_again.evidence
        assert "what the processes do not share: the hash seed, which nobody fixed" in ordered_again.evidence
        assert first["cause"].startswith("likely hash-order dependence: ")
        assert "PYTHONHASHSEED" in first["remedy"]
        assert "methods.py:" in ordered_again.evidence
        assert "kernel" not in first["cause"]


def test_runs_that_did_not_diverge_need_no_process(seeded: Finished, tmp_path: Path) -> None:
    reports = ("--html", str(tmp_path / "page"), "--junit", str(tmp_path / "j.xml"), "--markdown", str(tmp_path / "m"))
    sides = (str(seeded.side("reference")), str(seeded.side("candidate")))
    found = explain(tmp_path / "out", *sides, *reports)
    assert (found.code, found.result["verdict"]) == (0, "reproducible"), found.output + found.errors
    assert "These runs did not diverge, so there is nothing to execute again." in found.output
    assert executed(found) == []
    for name in ("page/index.html", "j.xml", "m"):
        assert "2 runs x 30 steps, seed 42, f3rm" in (tmp_path / name).read_text("utf8")


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, dict[str, str]]:
    """Two runs with one seed; one process had a fault at step 2 that none has again."""
    folder = tmp_path_factory.mktemp("once")
    env = {**user_methods("once"), "ONCE_MARKER": str(folder / "marker")}
    words = ("--method", "once", "--iters", "4", "--fresh-features", "--", *SMALL)
    return verify(folder / "out", *words, env=env), env


class TestNotAgain:
    def test_what_does_not_show_again_is_told_with_the_number_of_tries_and_not_guessed(
        self, struck: tuple[Finished, dict[str, str]], tmp_path: Path
    ) -> None:
        sides = (str(struck[0].side("reference")), str(struck[0].side("candidate")))
        found = explain(tmp_path / "out", *sides, "--tries", "2", **struck[1])
        assert (found.code, found.result["verdict"]) == (1, "diverged"), found.output + found.errors
        first = found.first
        assert (first["step"], first["stage"], first["operator"]) == (2, "batch", None)
        assert first["evidence"][0].endswith(
            "executed again in two processes, 2 times: it did not show again, so no operator is named"
        )
        assert executed(found) == ["candidate-1", "candidate-2", "reference-1", "reference-2"]
