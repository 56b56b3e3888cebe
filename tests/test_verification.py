"""From what is asked for to trainings and results: what a request holds, which sides there are, what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_runs import FakeRun
from fake_training import GOOD, program

from f3rm_verify import presets
from f3rm_verify.baseline import Baseline, make_baseline, read_baseline, write_baseline
from f3rm_verify.errors import UsageError
from f3rm_verify.policy import RUN_POLICY
from f3rm_verify.verification import baseline_request, compare_trained, sides_of, train, training_request


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "data").mkdir()
    return {"output_dir": tmp_path / "out", "data": tmp_path / "data", "ns_train": program(tmp_path / "bin", GOOD)}


def test_what_is_not_asked_for_has_a_default(options: dict[str, Any]) -> None:
    request = training_request(**options)
    assert (request.seed, request.iters, request.method, request.foreign) == (42, 1000, "f3rm", False)
    assert request.ns_train_args == ()
    assert request.output.parent == options["output_dir"].resolve()


def test_the_built_in_scene_gets_the_small_preset(options: dict[str, Any]) -> None:
    request = training_request(("--x", "1"), **(options | {"data": None}))
    assert request.ns_train_args == (*presets.SMALL, "--x", "1")
    assert (request.data / "transforms.json").exists()


@pytest.mark.parametrize(
    ("seed", "runs", "control", "expected"),
    [
        (1, 2, False, {"reference": 1, "candidate": 1}),
        (1, 3, True, {"reference": 1, "candidate": 1, "candidate-2": 1, "control": 2}),
        (2**32 - 1, 2, True, {"reference": 2**32 - 1, "candidate": 2**32 - 1, "control": 0}),
    ],
)
def test_sides(seed: int, runs: int, control: bool, expected: dict[str, int]) -> None:
    assert sides_of(seed, runs=runs, control=control) == expected


def test_trainings_become_a_result(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("f3rm_verify.runner._POLL_SECONDS", 0.02)
    request = training_request(method="nerfacto", iters=3, jobs=3, **options)
    trained = train(request, sides_of(request.seed, control=True), watch=lambda _: None)
    assert (trained.missing, trained.trouble, trained.told, trained.interrupted) == ((), (), None, False)
    assert trained.nothing_to_compare is None
    result = compare_trained(trained, policy=RUN_POLICY)
    assert result.outcome.value == "reproducible"
    assert result.control is not None and result.control["differs"]


class TestBaselineRequest:
    @staticmethod
    def recorded(folder: Path, *, given: Path | None = None, **manifest: Any) -> Baseline:
        run = FakeRun()
        run.manifest |= manifest
        file = folder / "base.json"
        write_baseline(file, make_baseline(run.write(folder / "run"), file, policy=RUN_POLICY, runs=2, data=given))
        return read_baseline(file)

    def test_it_is_what_was_recorded(self, tmp_path: Path, options: dict[str, Any]) -> None:
        request = baseline_request(self.recorded(tmp_path), **options)
        assert (request.method, request.seed, request.iters, request.trace) == ("f3rm", 42, 10, "steps")
        assert request.ns_train_args == ("--a", "1")

    def test_the_built_in_scene_needs_no_data(self, tmp_path: Path, options: dict[str, Any]) -> None:
        del options["data"]
        scene = {"folder": "out/f3rm-verify-scene", "files": {"transforms.json": "0"}, "features": None}
        request = baseline_request(self.recorded(tmp_path, data=scene), **options)
        assert (request.data / "transforms.json").exists()
        assert request.ns_train_args == ("--a", "1")  # the preset is among the recorded arguments, or was not used

    def test_other_data_must_be_given_or_lie_beside_it(
        self, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = options.pop("data")
        with pytest.raises(UsageError, match="give --data"):
            baseline_request(self.recorded(tmp_path), **options)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "other").mkdir()
        baseline = self.recorded(tmp_path / "other", given=data)
        assert json.loads(baseline.path.read_text())["request"]["data"] == "../data"
        assert baseline_request(baseline, **options).data == data.resolve()

    def test_a_saved_configuration_must_be_given_where_there_was_one(
        self, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        with pytest.raises(UsageError, match="was recorded without --load-config"):
            baseline_request(self.recorded(tmp_path), load_config=tmp_path / "c.yml", **options)
        (tmp_path / "b").mkdir()
        baseline = self.recorded(tmp_path / "b", load_config={"path": "c.yml", "digest": "1"})
        with pytest.raises(UsageError, match="with a saved configuration; give --load-config"):
            baseline_request(baseline, **options)
