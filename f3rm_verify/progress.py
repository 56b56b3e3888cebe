"""Shows the trainings while they run: one line each on a terminal, a line now and then where the output is piped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from f3rm_verify.runner import Training

#: Seconds between two lines of piped output.
_INTERVAL = 15.0


@contextmanager
def progress_display(console: Console) -> Iterator[Callable[[Sequence[Training]], None]]:
    """Yields what to call with the trainings, as often as one likes."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            yield lambda trainings: live.update(Text("\n".join(describe(training) for training in trainings)))
        return
    due = time.monotonic() + _INTERVAL

    def say(trainings: Sequence[Training]) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + _INTERVAL
            console.print(" | ".join(describe(training) for training in trainings), markup=False, soft_wrap=True)

    yield say


def describe(training: Training) -> str:
    """One training in one line: side, phase, step, loss, time left."""
    parts = [f"{training.side:<11}", training.phase]
    if training.phase in ("training", "evaluating") and training.step is not None:
        parts.append(f"{training.step + 1}/{training.steps}")
    if training.phase == "training" and training.loss is not None:
        parts.append(f"loss {training.loss:.4f}")
    left = training.seconds_left
    if left is not None:
        parts.append(f"{int(left // 60)}:{int(left % 60):02d} left")
    return " ".join(parts)
