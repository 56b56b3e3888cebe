"""What one process that repeated a step found, as a result: deterministic, not, or nothing that can be said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_runs import FakeRun

from f3rm_verify.difference import Outcome, Result
from f3rm_verify.errors import TrainingError
from f3rm_verify.explain import read_repeated, self_result
from f3rm_verify.run_dir import EXPLAIN
from f3rm_verify.runner import Training

SAME = {"batch": "b", "losses/rgb": "l", "gradients/w": "g", "parameters/w": "p", "generators/torch": "r"}


def training(path: Path, *tries: dict[str, str], **changes: Any) -> Training:
    """A process that left this."""
    found: dict[str, Any] = {
        "schema_version": 1,
        "step": 6,
        "tries": [{"seconds": 0.5, "digests": one} for one in tries],
        "not_restored": [],
        "left_out": [],
        "recorded": {"tries": 4, "files": []},
    }
    run = FakeRun().write(path / "run")
    (run.path / EXPLAIN).write_text(json.dumps(found | changes), "utf8")
    ended: Any = Training.__new__(Training)
    object.__setattr__(ended, "directory", run.path)
    return ended  # type: ignore[no-any-return]


def result(path: Path, *tries: dict[str, str], **changes: Any) -> Result:
    made = self_result(read_repeated(training(path, *tries, **changes)), reproduce="again")
    data = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert Result.from_dict(data).to_dict() == data
    return made


def test_the_same_bits_each_time_are_deterministic(tmp_path: Path) -> None:
    found = result(tmp_path, SAME, SAME, SAME, recorded=None)
    assert (found.outcome, found.pairs, found.first_divergence) == (Outcome.REPRODUCIBLE, 2, None)
    assert "executed 3 times in one process, from one state" in found.reasons[0]


def test_one_digest_of_the_last_try_is_enough(tmp_path: Path) -> None:
    found = result(tmp_path, SAME, SAME, {**SAME, "parameters/w": "q", "gradients/w": "h"})
    first = found.first_divergence
    assert first is not None
    assert found.outcome is Outcome.DIVERGED
    assert (first.step, first.stage, first.subject, first.operator) == (6, "grad", "w", None)
    assert "operators recorded: it did not show again in 4 tries, so none is named" in first.evidence


def test_a_digest_that_is_missing_is_a_difference(tmp_path: Path) -> None:
    found = result(tmp_path, SAME, {name: one for name, one in SAME.items() if name != "generators/torch"})
    assert found.outcome is Outcome.DIVERGED


def test_a_state_that_cannot_be_put_back_shows_nothing(tmp_path: Path) -> None:
    found = result(tmp_path, SAME, SAME, not_restored=["buffers/n"])
    assert found.outcome is Outcome.INCONCLUSIVE
    assert found.reasons == ("the state before the step could not be put back (buffers/n)",)


def test_a_batch_that_differs_came_from_outside(tmp_path: Path) -> None:
    found = result(tmp_path, SAME, {**SAME, "batch": "c"})
    assert found.outcome is Outcome.INCONCLUSIVE
    assert "came into the step from something that no snapshot holds" in found.reasons[0]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema_version": 2}'])
def test_what_cannot_be_read_is_told(tmp_path: Path, content: str) -> None:
    ended = training(tmp_path, SAME, SAME)
    assert ended.directory is not None
    (ended.directory / EXPLAIN).write_text(content)
    with pytest.raises(TrainingError, match=r"left nothing that this f3rm-verify .* can read"):
        read_repeated(ended)
