"""Every planted fault is found where it is, and its cause is right; trainings without one are never called diverged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from faults.laboratory import Score, run_laboratory, score_table
from faults.planted import FAULTS

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]

PAIRS = 2
#: Of the whole laboratory, in seconds; it takes a tenth of that on a quiet machine.
TIMEOUT = 3000.0


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("laboratory")
    return dict(run_laboratory(folder, "--clean-pairs", str(PAIRS), timeout=TIMEOUT))


@pytest.fixture(scope="module")
def scores(answers: Mapping[str, Any]) -> Mapping[str, Score]:
    found = [Score(**score) for score in answers["scores"]]
    print(score_table(found))
    return {score.name: score for score in found}


def test_there_are_faults_of_every_stage() -> None:
    assert len(FAULTS) >= 16
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    stages = {fault.stage for fault in FAULTS}
    assert {"init", "rng", "batch", "forward", "loss", "grad", "params", "schedule", "eval"} <= stages


@pytest.mark.parametrize("name", [fault.name for fault in FAULTS])
def test_a_fault_is_found_where_it_is(scores: Mapping[str, Score], name: str) -> None:
    score = scores[name]
    assert score.detected, (score.outcome, score.truth, score.found)


@pytest.mark.parametrize("name", [fault.name for fault in FAULTS])
def test_its_cause_is_right(scores: Mapping[str, Score], name: str) -> None:
    score = scores[name]
    assert score.diagnosis == "right", (score.truth["cause"], score.found)


def test_steps_before_it_are_proven_equal(scores: Mapping[str, Score]) -> None:
    for fault in FAULTS:
        found = scores[fault.name].found
        if fault.step:
            assert found is not None and found["last_equal_step"] == fault.step - 1, fault.name


def test_clean_pairs_stay_clean(answers: Mapping[str, Any]) -> None:
    assert [pair["outcome"] for pair in answers["clean"]] == ["reproducible"] * PAIRS, answers["clean"]


class TestScore:
    """What is counted as found, and as right."""

    TRUTH = {"step": 3, "stage": "grad", "subject": "fields*", "cause": "a"}

    def score(self, outcome: str = "diverged", **changes: Any) -> Score:
        found = {"step": 3, "stage": "grad", "subject": "fields: 1", "rule": "a", **changes}
        return Score(name="x", truth=self.TRUTH, found=found, outcome=outcome, seconds=0.0)

    def test_right(self) -> None:
        score = self.score()
        assert (score.detected, score.diagnosis) == (True, "right")
        assert "1 faults: 1 found at their step, stage and subject; causes: 1 right, 0 wrong" in score_table([score])

    @pytest.mark.parametrize("change", [{"step": 4}, {"stage": "params"}, {"subject": "feature_field"}])
    def test_another_place(self, change: dict[str, Any]) -> None:
        assert not self.score(**change).detected
        assert "WRONG" in score_table([self.score(**change)])

    def test_another_cause(self) -> None:
        assert self.score(rule="b").diagnosis == "wrong"
        assert self.score(rule="unknown").diagnosis == "unknown"

    def test_no_divergence(self) -> None:
        missed = Score(name="x", truth=self.TRUTH, found=None, outcome="reproducible", seconds=0.0)
        assert (missed.detected, missed.diagnosis) == (False, "wrong")
        assert not self.score(outcome="inconclusive").detected
