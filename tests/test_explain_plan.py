"""What to execute again of two runs that diverged: what is planned, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_pair import diverged_pair, plan, request
from fake_runs import LOSS, FakeRun

from f3rm_verify import explain_plan as module
from f3rm_verify.compare_runs import compare_runs
from f3rm_verify.difference import FirstDivergence
from f3rm_verify.errors import UsageError
from f3rm_verify.ns_train import command, find_ns_train, request_of
from f3rm_verify.policy import DIFF_POLICY
from f3rm_verify.run_dir import SNAPSHOTS, RunDir
from f3rm_verify.run_facts import facts_of


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, RunDir]:
    return diverged_pair(tmp_path)


def test_what_is_executed_again_is_what_was_executed(runs: dict[str, RunDir], tmp_path: Path) -> None:
    found = plan(runs, tmp_path / "again")
    assert (found.start, found.until, found.record, found.seconds) == (0, 5, (0, 5), 2.0)
    for one in found.requests.values():
        assert (one.seed, one.method, one.data) == (42, "f3rm", tmp_path)
        assert (one.output, one.ns_train) == (tmp_path / "again", Path("another/ns-train"))
        assert one.ns_train_args == ("--enable-comprehensive-seeding", "False")
        assert one.variables == {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "42"}
    assert "at most" in found.estimate(3)


class TestEstimate:
    def test_evaluations_and_the_start_are_no_steps(self, runs: dict[str, RunDir], tmp_path: Path) -> None:
        assert plan(runs, tmp_path).seconds == 2.0

    def test_more_tries_take_longer(self, runs: dict[str, RunDir], tmp_path: Path) -> None:
        found = plan(runs, tmp_path)
        # Two starts, the six steps twice, each recorded; then one of them seven times plain and six times recorded.
        assert found.estimate(1).startswith("about ")
        numbers = [int(word) for word in found.estimate(3).split() if word.isdecimal()]
        assert numbers[1] > numbers[0]

    def test_a_run_that_logged_no_times_is_taken_to_need_a_second(self, tmp_path: Path) -> None:
        run = FakeRun()
        assert module._seconds_per_step(run.write(tmp_path / "run")) == 1.0


class TestSnapshots:
    def keep(self, run: RunDir, **snapshots: bytes) -> None:
        (run.path / SNAPSHOTS).mkdir()
        for step, content in snapshots.items():
            (run.path / SNAPSHOTS / f"step-{int(step[1:]):09d}.pt").write_bytes(content)

    def test_the_last_equal_one_before_the_step_is_where_it_starts(
        self, runs: dict[str, RunDir], tmp_path: Path
    ) -> None:
        self.keep(runs["reference"], s0=b"0", s1=b"1", s2=b"2", s4=b"4")
        self.keep(runs["candidate"], s0=b"0", s1=b"1", s2=b"2", s4=b"4")
        found = plan(runs, tmp_path)
        assert (found.start, found.record) == (2, (2, 5))
        assert found.snapshot is not None
        assert found.snapshot.name == "step-000000002.pt"

    def test_one_bit_more_or_less_is_not_equal(self, runs: dict[str, RunDir], tmp_path: Path) -> None:
        self.keep(runs["reference"], s1=b"1", s2=b"abc")
        self.keep(runs["candidate"], s1=b"1", s2=b"abb")
        assert plan(runs, tmp_path).start == 1

    def test_links_and_the_snapshots_of_one_side_do_not_count(self, runs: dict[str, RunDir], tmp_path: Path) -> None:
        self.keep(runs["reference"], s1=b"1", s2=b"2", s3=b"3")
        self.keep(runs["candidate"], s2=b"2")
        for name, side in ((1, "candidate"), (2, "reference")):
            path = runs[side].path / SNAPSHOTS / f"step-{name:09d}.pt"
            path.unlink(missing_ok=True)
            path.symlink_to(tmp_path)
        found = plan(runs, tmp_path)
        assert (found.start, found.snapshot) == (0, None)


def test_a_manifest_sets_only_variables_that_execute_nothing() -> None:
    variables = {
        "LD_PRELOAD": "x.so",
        "PYTHONSTARTUP": "x.py",
        "PATH": "x",
        "OMP_NUM_THREADS": "3\0",
        "MKL_CBWR": "AVX",
    }
    assert module._variables({"environment": {"variables": variables, "threads": None}}) == {"MKL_CBWR": "AVX"}
    assert module._variables({"environment": []}) == {}


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (None, "does not say how it was started"),
        (["ns-train", 7], "does not say how it was started"),
        ([], "was not started by this f3rm-verify's run"),
        (["ns-train", "f3rm", "--data", "x"], "was not started by this f3rm-verify's run"),
    ],
)
def test_a_run_that_run_did_not_make_is_refused(tmp_path: Path, argv: Any, reason: str) -> None:
    fakes = [FakeRun(), FakeRun()]
    fakes[1].scalars[LOSS][3] += 1
    for fake in fakes:
        fake.manifest["argv"] = argv
    runs = {name: fake.write(tmp_path / name) for name, fake in zip(("reference", "candidate"), fakes, strict=True)}
    with pytest.raises(UsageError, match=f"The reference run.*{reason}"):
        plan(runs, tmp_path)


def test_a_command_comes_back_as_its_request(tmp_path: Path) -> None:
    asked = request(tmp_path)
    argv = command(asked, side="reference", seed=42)
    found = request_of(argv, output=asked.output, ns_train=asked.ns_train, side="reference")
    assert dataclasses.replace(found, ns_train_args=()) == dataclasses.replace(asked, ns_train_args=())
    assert command(found, side="reference", seed=42) == argv
    for changed in ([*argv, "--machine.seed", "7"], [argv[0], "--help", *argv[2:]]):
        with pytest.raises(UsageError):
            request_of(changed, output=asked.output, ns_train=asked.ns_train, side="reference")


def test_data_that_are_gone_are_told(tmp_path: Path) -> None:
    asked = dataclasses.replace(request(tmp_path), data=tmp_path / "gone")
    argv = command(asked, side="reference", seed=42)
    with pytest.raises(UsageError, match=r"gone, are not there any more; put them back\."):
        request_of(argv, output=tmp_path, ns_train=tmp_path, side="reference")


class TestTheCommandThatAReportNames:
    def command(self, folder: Path, change: Callable[[FakeRun], object] = lambda _: None) -> str:
        """What `diff` of two runs that this environment's ns-train made names; `change` is done to the candidate."""
        fakes = [FakeRun(), FakeRun()]
        for fake in fakes:
            asked = dataclasses.replace(request(folder), ns_train=find_ns_train())
            fake.manifest["argv"] = command(asked, side="reference", seed=42)
        fakes[1].scalars[LOSS][3] += 1
        change(fakes[1])
        runs = [fake.write(folder / name) for name, fake in zip(("a run", "b"), fakes, strict=True)]
        result = compare_runs(runs[0], {"candidate": runs[1]}, policy=DIFF_POLICY, reproduce="f3rm-verify diff a b")
        assert result.first_divergence is not None
        return result.first_divergence.reproduce

    def test_executes_the_pair_again(self, tmp_path: Path) -> None:
        assert self.command(tmp_path) == f"f3rm-verify explain '{tmp_path}/a run' {tmp_path}/b"

    @pytest.mark.parametrize(
        "change",
        {
            "no trace": lambda run: setattr(run, "trace", None),
            "another ns-train": lambda run: run.manifest["argv"].__setitem__(0, "/elsewhere/ns-train"),
            "another program's command": lambda run: run.manifest.update(argv=["ns-train", "f3rm", "--seed", "1"]),
            "no command": lambda run: run.manifest.pop("argv"),
            "a command of something else": lambda run: run.manifest.update(argv=[7]),
            "data that are gone": lambda run: run.manifest["argv"].__setitem__(9, "gone"),
            "several ranks": lambda run: run.manifest.update(world_size=2),
            "a saved configuration on one side": lambda run: run.manifest.update(load_config={"path": "c.yml"}),
        }.items(),
        ids=lambda item: item[0],
    )
    def test_is_the_one_that_was_given_where_that_cannot_be_done(self, tmp_path: Path, change: Any) -> None:
        assert self.command(tmp_path, change[1]) == "f3rm-verify diff a b"

    def test_gives_the_saved_configuration_again(self, tmp_path: Path) -> None:
        saved = {"load_config": {"path": "a b/config.yml", "digest": "x"}}
        runs = {}
        for name in ("a", "b"):
            fake = FakeRun()
            asked = dataclasses.replace(request(tmp_path), ns_train=find_ns_train())
            fake.manifest.update(saved, argv=command(asked, side="reference", seed=42))
            runs[name] = facts_of(fake.write(tmp_path / name))
        first = FirstDivergence(step=3, subject="x")
        assert module.explain_command(*runs.values(), first).endswith(" '--load-config=a b/config.yml'")
        assert module.explain_command(*runs.values(), dataclasses.replace(first, step=None)) is None
