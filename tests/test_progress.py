"""What a person sees while the trainings run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from f3rm_verify.progress import describe, progress_display
from f3rm_verify.runner import Training


def training(**values: object) -> Training:
    return Training(**{"side": "reference", "seed": 42, "log": Path("log"), **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "reference   waiting"),
        ({"phase": "starting"}, "reference   starting"),
        ({"phase": "setting up"}, "reference   setting up"),
        ({"phase": "training", "step": 9, "steps": 20, "loss": 0.5}, "reference   training 10/20 loss 0.5000"),
        ({"phase": "training", "step": 9, "steps": 20}, "reference   training 10/20"),
        ({"phase": "training", "step": 9, "steps": 20, "loss": float("nan")}, "reference   training 10/20 loss nan"),
        ({"phase": "training", "step": None}, "reference   training"),
        ({"phase": "repeating", "step": 3, "steps": 9}, "reference   repeating 4/9"),
        ({"phase": "extracting", "step": 3, "steps": 40}, "reference   extracting 4/40"),
        ({"phase": "evaluating", "step": 1, "steps": 4, "loss": 3.0}, "reference   evaluating 2/4"),
        ({"phase": "done", "step": 19, "steps": 20}, "reference   done"),
    ],
)
def test_one_training_in_one_line(values: dict[str, object], text: str) -> None:
    assert describe(training(**values)) == text


@pytest.mark.parametrize(
    ("step", "elapsed", "left"),
    [(0, 1.0, None), (10, 10.0, "1:29 left"), (99, 100.0, "0:00 left"), (10, 1000.0, "148:20 left")],
)
def test_the_time_left_follows_from_the_speed_so_far(
    monkeypatch: pytest.MonkeyPatch, step: int, elapsed: float, left: str | None
) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 1000.0 + elapsed)
    shown = describe(training(phase="training", step=step, steps=100, first_step_seen=(1000.0, 0)))
    assert shown.partition("/100")[2].strip() == (left or "")


def test_no_time_is_left_for_a_training_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 1010.0)
    values = {"phase": "training", "step": 10, "steps": 100, "first_step_seen": (1000.0, 0)}
    assert training(**values).seconds_left is not None
    assert training(**values, ended=True).seconds_left is None


class TestPiped:
    def lines(self, monkeypatch: pytest.MonkeyPatch, moments: list[tuple[float, Training]]) -> list[str]:
        """What is printed when each training is shown at its time."""
        now = [0.0]
        monkeypatch.setattr("time.monotonic", lambda: now[0])
        console = Console(file=io.StringIO(), width=30, force_terminal=False)
        with progress_display(console) as watch:
            for moment, shown in moments:
                now[0] = moment
                watch([shown, training(side="[bold]x[/bold]")])
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().splitlines()

    def test_a_line_for_each_new_phase_and_now_and_then(self, monkeypatch: pytest.MonkeyPatch) -> None:
        steps = [training(phase="training", step=step, steps=9) for step in range(9)]
        moments = [(1.0, training()), (1.1, steps[0]), (1.2, steps[1]), (10.0, steps[2]), (17.0, steps[3])]
        lines = self.lines(monkeypatch, moments)
        assert [line.partition(" | ")[0].split()[1:3] for line in lines] == [
            ["waiting"],
            ["training", "1/9"],
            ["training", "4/9"],
        ]

    def test_a_line_is_neither_wrapped_nor_styled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (line,) = self.lines(monkeypatch, [(1.0, training())])
        assert line == "reference   waiting | [bold]x[/bold] waiting"


def test_a_terminal_shows_all_trainings_and_is_left_clean() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=40)
    with progress_display(console) as watch:
        watch([training(), training(side="candidate", phase="training", step=0, steps=2)])
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "reference   waiting" in shown
    assert "candidate   training 1/2" in shown
    assert shown.rstrip().endswith("\x1b[2K")  # the lines are erased at the end
