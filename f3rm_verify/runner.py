"""Launches `ns-train` once per side as a real process, watches, and leaves nothing behind.

Every training runs in a process group of its own. It ends when the launcher ends it, or when the launcher's end of a
pipe closes (`lifeline`), so that no worker outlives a launcher that was killed.

Of several ranks, each waits at every step until all have brought their gradients. One that hangs, or fails in a way
that nobody notices, so leaves the others waiting in that step, up to half an hour before torch gives up. Hence the
stall time-out, and the last step of each: where they differ, the lowest is at fault; where they are the same, the step
after it is where one of them hangs, and the waiting look no different from it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from f3rm_verify import __version__, launch_variables
from f3rm_verify.errors import TrainingError
from f3rm_verify.f3rm.lifeline import lifeline_value
from f3rm_verify.memory import REMEDY, in_words
from f3rm_verify.ns_train import EXPERIMENT, TrainingRequest, command, environment
from f3rm_verify.processes import ask_groups_to_end, end_group, has_ended, stop_signals
from f3rm_verify.run_dir import CONFIG, MANIFEST, RANKS, STATUS
from f3rm_verify.training_log import broken_rank, last_lines, told_reason

#: What nerfstudio prints when it goes on with the stock method because ours could not be loaded.
_FALLBACK = "Could not load methods from environment variable"
_POLL_SECONDS = 0.1
#: The phases in which steps are done, one as long as another.
STEPPING = ("training", "measuring", "repeating")
#: The phases in which images are done.
COUNTING = ("extracting", "evaluating")


@dataclass(kw_only=True)
class Training:
    """One training: what it is, where it is, and, once it ended badly, why in one sentence.

    `directory` is None until a run directory shows, by its nonce, that our trainer is at work in it. Phase, step and
    loss are those of rank 0; `other_ranks` has phase, step and steps of the ranks above it.
    """

    side: str
    seed: int
    log: Path
    nonce: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen[bytes] | None = None
    directory: Path | None = None
    phase: str = "waiting"
    step: int | None = None
    steps: int = 0
    loss: float | None = None
    other_ranks: Mapping[int, tuple[str, int | None, int]] = field(default_factory=dict)
    changed: float = 0.0
    first_step_seen: tuple[float, int] | None = None
    ended: bool = False
    failure: str | None = None

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the speed so far; None before the second step."""
        if self.ended or self.phase not in STEPPING or self.first_step_seen is None or self.step is None:
            return None
        since, first = self.first_step_seen
        done = self.step - first
        return (time.monotonic() - since) / done * (self.steps - 1 - self.step) if done > 0 else None

    @property
    def where(self) -> str:
        """How far it came, in words: of several ranks, each."""
        first = _where(self.phase, self.step, self.steps)
        others = [f"rank {rank} {_where(*status)}" for rank, status in self.other_ranks.items()]
        return ", ".join([f"rank 0 {first}", *others]) if others else first


def _where(phase: str, step: int | None, steps: int) -> str:
    if phase in STEPPING and step is not None:
        return f"after step {step}"
    if phase in COUNTING and step is not None:
        return f"while {phase}, {step + 1} of {steps} images done"
    return "when it was done" if phase == "done" else f"while {phase}"


@dataclass(frozen=True, kw_only=True)
class Trainings:
    """All trainings after they ended. `interruption` says in one sentence who stopped them, None where nobody did."""

    trainings: tuple[Training, ...]
    interruption: str | None

    @property
    def failed(self) -> Training | None:
        """The training whose failure ended the others, None where none failed."""
        return next((training for training in self.trainings if training.failure is not None), None)


def run_trainings(
    request: TrainingRequest, sides: Mapping[str, int], *, watch: Callable[[Sequence[Training]], None]
) -> Trainings:
    """Trains once per side (name to seed), `request.jobs` at a time, and returns when all have ended.

    A training that fails ends the others, and so does Ctrl-C, SIGTERM or a closed terminal. `watch` is called a few
    times a second. Raises TrainingError where a training never began or is not ours. Nothing that was started runs on
    afterwards.
    """
    logs = request.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    trainings = [Training(side=side, seed=seed, log=logs / f"{side}.log") for side, seed in sides.items()]
    for training in trainings:
        training.log.touch(exist_ok=False)  # nothing is trained over another run
    with stop_signals() as stop, _lifeline() as lifeline:
        try:
            while not stop and _is_going(trainings):
                _start_waiting(request, trainings, lifeline)
                _observe(request, trainings)
                watch(trainings)
                time.sleep(_POLL_SECONDS)
        finally:
            going = _is_going(trainings)
            _end_all(trainings)
        for training in trainings:
            _catch_up(request, training)
    interruption = _interruption(stop[0], trainings) if stop and going else None
    return Trainings(trainings=tuple(trainings), interruption=interruption)


def _is_going(trainings: Sequence[Training]) -> bool:
    return not all(training.ended for training in trainings) and not any(training.failure for training in trainings)


def _interruption(number: signal.Signals, trainings: Sequence[Training]) -> str:
    who = "SIGINT (Ctrl-C)" if number is signal.SIGINT else number.name
    sides = ", ".join(f"the {training.side} {_aside(training)}" for training in trainings)
    return f"The trainings were stopped by {who}: {sides}."


def _start_waiting(request: TrainingRequest, trainings: Sequence[Training], lifeline: int) -> None:
    running = sum(training.process is not None and not training.ended for training in trainings)
    waiting = [training for training in trainings if training.process is None]
    for training in waiting[: max(0, request.jobs - running)]:
        _start(request, training, lifeline)


def _start(request: TrainingRequest, training: Training, lifeline: int) -> None:
    variables = environment(request, side=training.side, seed=training.seed, nonce=training.nonce)
    try:
        with training.log.open("wb") as log:
            training.process = subprocess.Popen(
                command(request, side=training.side, seed=training.seed),
                env={**variables, launch_variables.LIFELINE: lifeline_value(lifeline)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lifeline,),
            )
    except OSError as error:
        raise TrainingError(
            f"The {training.side} training cannot be started: {request.ns_train}: {error.strerror or error}."
        ) from error
    training.phase = "starting"
    training.changed = time.monotonic()


def _observe(request: TrainingRequest, trainings: Sequence[Training]) -> None:
    """Looks at every running training, up to the first that failed."""
    for training in trainings:
        if training.process is not None and not training.ended:
            _observe_one(request, training)
        if training.failure is not None:
            return


def _observe_one(request: TrainingRequest, training: Training) -> None:
    """Brings `training` up to date with its process and the files that it wrote."""
    assert training.process is not None
    # Before its files are looked at, so that those of a training that ended are all seen.
    ended = has_ended(training.process)
    stranger = _catch_up(request, training)
    if stranger is not None:
        raise TrainingError(
            f"The {training.side} training does not run under f3rm-verify's trainer: nerfstudio could not load the "
            f"wrapped method and went on with its own. Nothing can be verified, so all trainings were stopped. "
            f"From its log, {training.log}:\n{last_lines(training.log, until=_FALLBACK)}"
        )
    if ended:
        code = _end(training)
        if training.directory is None:
            told = told_reason(training.log)
            if told is not None:
                raise TrainingError(f"The {training.side} training cannot begin: {told}")
            raise TrainingError(
                f"The {training.side} training ended before it began ({_exit(code)}). "
                f"The end of its log, {training.log}:\n{last_lines(training.log)}"
            )
        if code != 0:
            training.failure = f"The {training.side} training failed {_how(training, code)}.{_why(training, code)}"
        elif not _completed(training.directory):
            training.failure = f"The {training.side} training ended {_aside(training)}, without completing."
    elif not time.monotonic() - training.changed <= request.stall_timeout:
        training.failure = (
            f"The {training.side} training made no step for {request.stall_timeout:g} s ({training.where}) and was "
            "stopped; --stall-timeout sets how long to wait."
        )


def _aside(training: Training) -> str:
    """Where it is, as a part of a sentence."""
    return f"({training.where})" if training.other_ranks else training.where


def _how(training: Training, code: int | None) -> str:
    """Where it failed and with which exit code; of several ranks, also which of them ended first."""
    if not training.other_ranks:
        return f"{training.where} ({_exit(code)})"
    rank = broken_rank(training.log)
    return f"{'' if rank is None else f'in rank {rank} '}({training.where}; {_exit(code)})"


def _why(training: Training, code: int | None) -> str:
    """A space and sentences, where it is known why it failed: it said so itself, or was killed from outside."""
    told = told_reason(training.log)
    if told is None and (code == -signal.SIGKILL or "with signal SIGKILL" in last_lines(training.log)):
        assert training.directory is not None
        peak = _read_object(training.directory / STATUS).get("peak_rss_bytes")
        told = f"The system kills like this where memory runs out{in_words(peak)}. {REMEDY}"
    return "" if told is None else f" {told}"


def _exit(code: int | None) -> str:
    if code is None:
        return "its process cannot be ended"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"ended by signal {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"ended by signal {-code}"


def _catch_up(request: TrainingRequest, training: Training) -> Path | None:
    """Reads what `training` says about itself. Returns its run directory where that is not our trainer's."""
    if training.directory is None:
        # nerfstudio names the directory by the method's own name, not by the one that was typed.
        folders = (request.output / EXPERIMENT).glob(f"*/{training.side}")
        found = next((folder for folder in folders if (folder / CONFIG).exists()), None)
        ours = None if found is None else _is_ours(found, training.nonce)
        if not ours:
            return found if ours is False else None
        training.directory = found
    _read_status(training)
    return None


def _is_ours(run: Path, nonce: str) -> bool | None:
    """Whether our trainer runs there, None where it is too early to say.

    nerfstudio swallows what goes wrong with a wrapped method and silently trains the stock one. Our trainer writes its
    manifest before nerfstudio opens the event file, so the event file is looked for first.
    """
    trains = any(run.glob("events.out.tfevents.*"))
    if not (run / MANIFEST).exists():
        return False if trains else None
    return _read_object(run / MANIFEST).get("nonce") == nonce


def _completed(run: Path) -> bool:
    """Whether a training that ended left its completion record; its exit code is 0 also after Ctrl-C."""
    return isinstance(_read_object(run / MANIFEST).get("completion"), dict)


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is none that can be read."""
    try:
        data = json.loads(path.read_text("utf8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def read_left(training: Training, name: str, *, version: int) -> dict[str, Any]:
    """The JSON object that a process which trained nothing left under a name in its run directory.

    Raises TrainingError where there is none of this version.
    """
    assert training.directory is not None
    left = _read_object(training.directory / name)
    if left.get("schema_version") != version:
        raise TrainingError(
            f"The training left nothing in {Path(name).name} that this f3rm-verify ({__version__}) can read; where "
            "--ns-train is of another environment, install the same version there."
        )
    return left


def _read_status(training: Training) -> None:
    assert training.directory is not None
    status = _read_object(training.directory / STATUS)
    try:
        phase, step, steps, loss = (status[key] for key in ("phase", "step", "steps", "loss"))
    except KeyError:
        return  # not written yet
    # Ranks wait for each other at every step: as long as one gets on, none hangs.
    others = _other_ranks(training.directory)
    if (phase, step, others) != (training.phase, training.step, training.other_ranks):
        training.changed = time.monotonic()
    training.phase, training.step, training.steps, training.loss = phase, step, steps, loss
    training.other_ranks = others
    if training.first_step_seen is None and phase in STEPPING and step is not None:
        training.first_step_seen = (time.monotonic(), step)


def _other_ranks(run: Path) -> dict[int, tuple[str, int | None, int]]:
    """Phase, step and steps of every rank above 0 that said something, by rank."""
    folders = [folder for folder in (run / RANKS).glob("*") if folder.name.isdecimal()]
    statuses = {int(folder.name): _read_object(folder / STATUS) for folder in folders}
    return {
        rank: (status["phase"], status["step"], status["steps"])
        for rank, status in sorted(statuses.items())
        if {"phase", "step", "steps"} <= status.keys()
    }


def _end_all(trainings: Sequence[Training]) -> None:
    """Ends every training that runs, all at once: first asked, then killed with everything that they started."""
    running = [training for training in trainings if training.process is not None and not training.ended]
    ask_groups_to_end([training.process for training in running if training.process is not None])
    for training in running:
        _end(training)


def _end(training: Training) -> int | None:
    assert training.process is not None
    training.ended = True
    return end_group(training.process)


@contextmanager
def _lifeline() -> Iterator[int]:
    """A pipe whose write end only this process holds; yields the read end for the children."""
    read_end, write_end = os.pipe()
    try:
        yield read_end
    finally:
        os.close(write_end)
        os.close(read_end)
