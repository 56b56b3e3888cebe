from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_runs import LOSS, STEPS, FakeRun, plain_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from f3rm_verify.run_dir import MANIFEST, RunDir
from f3rm_verify.run_facts import RunFacts, facts_of, is_one_run

LAST = STEPS - 1
NAN = float("nan")
Make = Callable[..., RunFacts]


@pytest.fixture
def facts(tmp_path: Path) -> Make:
    """The facts of a run that was changed by `change` and written."""
    count = 0

    def make(change: Callable[[FakeRun], Any] = lambda run: None, run: FakeRun | None = None) -> RunFacts:
        nonlocal count
        count += 1
        run = run or FakeRun()
        change(run)
        return facts_of(run.write(tmp_path / str(count)))

    return make


def test_a_finished_run(facts: Make) -> None:
    found = facts()
    assert (found.incomplete, found.untrained, found.steps) == (None, None, STEPS)
    assert (found.method, found.seed, found.rank, found.threads, found.device) == ("f3rm", 42, 0, 2, "cpu")
    assert found.implementation == FakeRun().manifest["implementation"]
    assert json.loads(json.dumps(found.describe())) == found.describe()


def test_a_finished_plain_run(facts: Make) -> None:
    found = facts(run=plain_run())
    assert (found.incomplete, found.untrained, found.steps) == (None, None, STEPS)
    assert (found.method, found.seed, found.rank, found.threads, found.device) == ("f3rm", 42, 0, None, "cpu")
    assert (found.implementation, found.describe()["run_id"]) == (None, None)


def test_an_empty_directory(tmp_path: Path) -> None:
    found = facts_of(RunDir(tmp_path))
    assert found.incomplete == "cannot be seen to have completed: its config.yml or its loss curve is missing"
    assert (found.steps, found.method, found.seed, found.untrained) == (None, None, None, None)


def test_the_manifest_comes_before_the_config(facts: Make) -> None:
    def other(run: FakeRun) -> None:
        run.config["machine"]["seed"] = 1
        run.config["method_name"] = "typed"

    found = facts(other)
    assert (found.seed, found.method) == (42, "f3rm")


@pytest.mark.parametrize("value", [True, 1.0, "42", [42], {}, None, 2**64, -(2**64)])
def test_a_seed_that_is_no_integer_is_not_shown(facts: Make, value: object) -> None:
    assert facts(lambda run: run.manifest.update(seed=value)).seed is None
    assert facts(lambda run: run.config["machine"].update(seed=value), plain_run()).seed is None


@pytest.mark.parametrize("value", [3, None, [], {"threads": 3}, {"threads": {"intra_op": "two"}}])
def test_an_environment_of_another_type_is_not_shown(facts: Make, value: object) -> None:
    assert facts(lambda run: run.manifest.update(environment=value)).threads is None


@pytest.mark.parametrize("value", [3, ["a"], {"trainer": 3}, {"trainer": {"deep": {}}}])
def test_an_implementation_of_another_type_is_not_shown(facts: Make, value: object) -> None:
    assert facts(lambda run: run.manifest.update(implementation=value)).implementation is None


class TestCompletion:
    @pytest.mark.parametrize(
        ("record", "reason"),
        [
            (None, "did not complete: it left no completion record (its loss curve ends at step 9)"),
            (3, "cannot be seen to have completed: its completion record is broken"),
            ({}, "cannot be seen to have completed: its completion record is broken"),
            ({"first_step": 0, "steps": "x"}, "cannot be seen to have completed: its completion record is broken"),
            ({"first_step": 0, "steps": -1}, "cannot be seen to have completed: its completion record is broken"),
            ({"first_step": 0, "steps": 9}, "says that it did steps 0 to 8, but its loss curve has 0 to 9"),
            ({"first_step": 0, "steps": 11}, "says that it did steps 0 to 10, but its loss curve has 0 to 9"),
            ({"first_step": 1, "steps": 9}, "says that it did steps 1 to 9, but its loss curve has 0 to 9"),
            ({"first_step": 0, "steps": 0}, "says that it did steps 0 to -1, but its loss curve has 0 to 9"),
        ],
    )
    def test_by_a_record_that_the_curve_bears_out(self, facts: Make, record: object, reason: str) -> None:
        found = facts(lambda run: run.manifest.update(completion=record))
        assert (found.incomplete, found.steps) == (reason, STEPS)
        assert found.describe()["completed"] is False

    @pytest.mark.parametrize(
        ("interval", "logged", "complete"),
        [
            (4, (0, 4, 8), True),
            (4, (0, 4), False),
            (4, (0,), False),
            (4, (4, 8), False),
            (10, (0,), True),
            (1, (0, 4, 8), False),
            (1, (0, 4, 9), True),
        ],
    )
    def test_with_what_is_logged_between(
        self, facts: Make, interval: int, logged: tuple[int, ...], complete: bool
    ) -> None:
        def sparse(run: FakeRun) -> None:
            run.config["logging"]["steps_per_log"] = interval
            run.scalars = {LOSS: dict.fromkeys(logged, 1.0)}

        for run in (FakeRun(), plain_run()):
            assert (facts(sparse, run).incomplete is None) is complete

    def test_not_by_a_record_beside_other_curves(self, facts: Make) -> None:
        found = facts(lambda run: run.scalars.pop(LOSS))
        assert found.incomplete == "cannot be seen to have completed: it has no loss curve"

    def test_by_a_record_alone_where_no_curves_were_kept(self, facts: Make) -> None:
        found = facts(lambda run: run.scalars.clear())
        assert (found.incomplete, found.steps) == (None, STEPS)

    def test_not_with_a_broken_manifest(self, facts: Make) -> None:
        found = facts(lambda run: setattr(run, "manifest", "{"))
        assert found.incomplete is not None
        assert "its manifest or its checkpoints are unreadable" in found.incomplete

    def test_not_without_the_last_checkpoint(self, facts: Make) -> None:
        found = facts(lambda run: run.checkpoints.update({5: run.checkpoints.pop(LAST)}))
        assert found.incomplete == "has no checkpoint of its last step, 9, but one of step 5"
        assert facts(lambda run: run.checkpoints.clear()).incomplete is None, "that is for the comparison to say"

    def test_not_with_an_evaluation_that_stopped(self, facts: Make) -> None:
        found = facts(lambda run: run.metrics["images"].popitem())
        assert found.incomplete == "did not finish its evaluation: it rendered 2 images and has metrics of 1"
        assert facts(lambda run: run.renders.clear()).incomplete is None, "renders can be deleted to save space"

    def test_of_a_plain_run_by_its_last_checkpoint(self, facts: Make) -> None:
        for kept in ({}, {5: {"step": 5}}):
            found = facts(lambda run, kept=kept: setattr(run, "checkpoints", kept), plain_run())
            assert found.incomplete == (
                "did not complete: it has no checkpoint of its last step, 9 (its loss curve ends at step 9)"
            )

    def test_of_a_plain_run_that_went_on_from_a_checkpoint_counts_from_there(self, facts: Make) -> None:
        def late(run: FakeRun, load: str | None) -> None:
            run.config["load_checkpoint"] = load
            run.scalars = {LOSS: {step + 4: 1.0 for step in range(STEPS)}}
            run.checkpoints = {4 + LAST: run.checkpoints[LAST]}

        assert facts(lambda run: late(run, "step-000000003.ckpt"), plain_run()).incomplete is None
        found = facts(lambda run: late(run, None), plain_run())
        assert found.incomplete is not None
        assert "no checkpoint of its last step, 9" in found.incomplete

    @pytest.mark.parametrize("wanted", [None, "10", 10.0, True, -10, 0])
    def test_of_a_plain_run_needs_a_number_of_steps(self, facts: Make, wanted: object) -> None:
        found = facts(lambda run: run.config.update(max_num_iterations=wanted), plain_run())
        assert found.incomplete is not None


class TestUntrained:
    def test_zero_steps(self, facts: Make) -> None:
        def nothing(run: FakeRun) -> None:
            run.scalars, run.checkpoints = {}, {}
            run.manifest["completion"]["steps"] = 0

        found = facts(nothing)
        assert (found.steps, found.untrained) == (0, "did not a single step")

    @pytest.mark.parametrize(
        ("parameters", "reason"),
        [
            ({"before": "1", "after": "1"}, "trained nothing: its parameters never changed"),
            ({"before": "1", "after": None}, "cannot be seen to have trained: its manifest has no digests"),
            ({"before": 1, "after": 2}, "cannot be seen to have trained: its manifest has no digests"),
            ([], "cannot be seen to have trained: its manifest has no digests"),
        ],
    )
    def test_by_the_digests_of_the_parameters(self, facts: Make, parameters: object, reason: str) -> None:
        found = facts(lambda run: run.manifest.update(parameters=parameters))
        assert found.untrained is not None
        assert found.untrained.startswith(reason)

    @pytest.mark.parametrize("make", [FakeRun, plain_run])
    def test_by_moments_that_are_all_zero(self, facts: Make, make: Callable[[], FakeRun]) -> None:
        def no_moments(run: FakeRun) -> None:
            state = run.checkpoints[LAST]["optimizers"]["fields"]["state"][0]
            state["exp_avg"][:] = state["exp_avg_sq"][:] = 0

        assert facts(no_moments, make()).untrained == "trained nothing: its optimizers never saw a gradient"

    @pytest.mark.parametrize("make", [FakeRun, plain_run])
    def test_by_losses_that_are_all_nan(self, facts: Make, make: Callable[[], FakeRun]) -> None:
        all_nan = facts(lambda run: run.scalars.update({LOSS: dict.fromkeys(range(STEPS), NAN)}), make())
        assert all_nan.untrained == "trained nothing: all its losses are NaN"
        assert facts(lambda run: run.scalars[LOSS].update({5: NAN}), make()).untrained is None

    def test_an_optimizer_without_moments_is_no_sign(self, facts: Make) -> None:
        def sgd(run: FakeRun) -> None:
            run.checkpoints[LAST]["optimizers"] = {"fields": {"state": {}}}

        assert facts(sgd, plain_run()).untrained is None


class TestOneRun:
    def test_two_runs_are_two(self, facts: Make) -> None:
        assert is_one_run(facts(), facts()) is None
        assert is_one_run(facts(run=plain_run()), facts(run=plain_run())) is None
        assert is_one_run(facts(), facts(run=plain_run())) is None

    @pytest.mark.parametrize(("key", "name"), [("run_id", "run id"), ("nonce", "nonce"), ("start", "start time")])
    def test_by_what_no_two_runs_share(self, facts: Make, key: str, name: str) -> None:
        sides = [facts(lambda run: run.manifest.update({key: "same"})) for _ in range(2)]
        assert is_one_run(*sides) == f"both sides have the {name} same: one is a copy of the other"

    def test_what_neither_recorded_is_not_shared(self, facts: Make) -> None:
        sides = [facts(lambda run: run.manifest.update(run_id=None, nonce=None, start=None)) for _ in range(2)]
        assert is_one_run(*sides) is None

    def test_runs_without_any_evidence_are_not_taken_for_one(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        assert is_one_run(*(facts_of(RunDir(tmp_path / name)) for name in ("a", "b"))) is None

    def test_one_directory(self, facts: Make) -> None:
        found = facts()
        assert is_one_run(found, found) == "both sides are one directory"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from([*FakeRun().manifest, "run_id", "start"]),
        st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2) | st.just({"a": {}}),
        max_size=4,
    )
)
def test_no_manifest_is_too_strange(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "run"
    if not path.exists():
        FakeRun(renders={}).write(path)
    (path / MANIFEST).write_text(json.dumps({**FakeRun().manifest, **changes}), "utf8")
    found = facts_of(RunDir(path))
    described = found.describe()
    assert json.loads(json.dumps(described)) == described
    assert all(isinstance(described[key], (str, type(None))) for key in ("run_id", "method", "device"))
    assert all(isinstance(described[key], (int, type(None))) for key in ("seed", "rank", "threads", "steps"))
    if {"schema_version", "completion", "parameters"} & changes.keys():
        assert found.incomplete is not None or found.untrained is not None or changes.get("schema_version") == 1


def test_a_saved_configuration_and_the_peak_memory_are_described(facts: Make) -> None:
    def loaded(run: FakeRun) -> None:
        run.manifest.update(load_config={"path": "old.yml", "digest": "0"}, memory={"peak_rss_bytes": 2**31})

    described = facts(loaded).describe()
    assert (described["load_config"], described["peak_rss_bytes"]) == ("old.yml", 2**31)
    strange = facts(lambda run: run.manifest.update(load_config="old.yml", memory={"peak_rss_bytes": -1})).describe()
    assert (strange["load_config"], strange["peak_rss_bytes"]) == (None, None)
