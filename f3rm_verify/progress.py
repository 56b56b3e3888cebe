"""Shows the trainings while they run: one line each on a terminal, a line now and then where the output is piped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from f3rm_verify.runner import COUNTING, STEPPING, Training

#: Seconds between two lines of piped output while no training begins anything new.
_INTERVAL = 15.0


@contextmanager
def progress_display(console: Console) -> Iterator[Callable[[Sequence[Training]], None]]:
    """Yields what to call with the trainings, as often as one likes."""
    if not console.is_terminal:
        yield _lines(console)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        # Cropped, because lines that wrap would pile up on the terminal.
        yield lambda trainings: live.update(
            Text("\n".join(describe(training) for training in trainings), no_wrap=True, overflow="ellipsis")
        )


def _lines(console: Console) -> Callable[[Sequence[Training]], None]:
    shown: list[str] = []
    due = 0.0

    def say(trainings: Sequence[Training]) -> None:
        nonlocal shown, due
        phases = [training.phase for training in trainings]
        if phases != shown or time.monotonic() >= due:
            shown, due = phases, time.monotonic() + _INTERVAL
            line = " | ".join(describe(training) for training in trainings)
            console.print(line, markup=False, soft_wrap=True)

    return say


def describe(training: Training) -> str:
    """One training in one line: side, phase, step, loss, time left."""
    parts = [f"{training.side:<11}", training.phase]
    if training.phase in (*STEPPING, *COUNTING) and training.step is not None:
        parts.append(f"{training.step + 1}/{training.steps}")
    if training.phase == "training" and training.loss is not None:
        parts.append(f"loss {training.loss:.4f}")
    left = training.seconds_left
    if left is not None:
        parts.append(f"{int(left // 60)}:{int(left % 60):02d} left")
    return " ".join(parts)
