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
from f3rm_verify.readers.operators import VERSION
from f3rm_verify.reporters import conditions_line, run_lines
from f3rm_verify.run_dir import EXPLAIN, OPERATORS
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
        "recorded": {"tries": 4, "files": [], "digests": []},
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


def recording(file: Path, output: str) -> str:
    """A recording of one operator of a module, with an input that is always the same; gives the file's name."""
    lines = [
        {"version": VERSION},
        {"place": ["aten::index_put", "", "second", "grid.py:7 in forward", "IndexBackward0"]},
        [0, "", [["float32 cpu", [4], "in", -1]], [], [["float32 cpu", [4], output]]],
        {"operators": 1, "limit": 9},
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf8")
    return file.name


def test_subject_and_operator_are_of_the_two_tries_that_were_recorded(tmp_path: Path) -> None:
    """Two grids race: in the first tries one of them showed, and in the recorded ones the other."""
    first, second = SAME | {"gradients/first.table": "0"}, SAME | {"gradients/second.table": "0"}
    ended = training(tmp_path, first, first | {"gradients/first.table": "1"})
    assert ended.directory is not None
    files = [recording(ended.directory / OPERATORS / f"repeat-{n}.jsonl", f"out{n}") for n in range(2)]
    digests = [second, second | {"gradients/second.table": "1"}]
    found = json.loads((ended.directory / EXPLAIN).read_text("utf8"))
    found["recorded"] = {"tries": 2, "files": files, "digests": digests}
    (ended.directory / EXPLAIN).write_text(json.dumps(found), "utf8")
    made = self_result(read_repeated(ended), reproduce="again").first_divergence
    assert made is not None
    assert (made.stage, made.subject, made.operator) == ("grad", "second.table", "aten::index_put")
    assert "operators recorded: it showed again in try 2" in made.evidence
    assert made.cause.startswith("thread-order float accumulation on the CPU: aten::index_put in second ")


def test_what_was_done_is_told_in_its_own_words(tmp_path: Path) -> None:
    found = result(tmp_path, SAME, SAME, SAME, recorded=None)
    assert conditions_line(found).startswith("3 tries of step 6 in one process, seed 42, f3rm")
    assert [name for name, _ in run_lines(found)] == ["process"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema_version": 2}'])
def test_what_cannot_be_read_is_told(tmp_path: Path, content: str) -> None:
    ended = training(tmp_path, SAME, SAME)
    assert ended.directory is not None
    (ended.directory / EXPLAIN).write_text(content)
    with pytest.raises(TrainingError, match=r"left nothing in explain\.json that this f3rm-verify .* can read"):
        read_repeated(ended)
