"""Launches `ns-train` once per side as a real process, watches, and leaves nothing behind.

Every training runs in a process group of its own. It ends when the launcher ends it, or when the launcher's end of a
pipe closes (`lifeline`), so that no worker outlives a launcher that was killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from f3rm_verify.errors import TrainingError, UsageError
from f3rm_verify.run_dir import CONFIG, MANIFEST, STATUS
from f3rm_verify.seeding import SeedingPlan, child_environment

#: Options of ns-train that `run` sets itself, with the name of ours (None: it is always set the same).
OWNED_OPTIONS: Mapping[str, str | None] = {
    "--data": "--data",
    "--experiment-name": None,
    "--load-config": "--load-config",
    "--logging.steps-per-log": None,
    "--machine.seed": "--seed",
    "--max-num-iterations": "--iters",
    "--output-dir": "--output-dir",
    "--timestamp": None,
    "--vis": None,
}
EXPERIMENT = "verify"
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0
_LOG_LINES = 15


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What to train. `output` is a fresh directory; `threads` is None where the user did not choose a number."""

    seed: int
    iters: int
    data: Path
    method: str
    output: Path
    ns_train: Path
    ns_train_args: tuple[str, ...] = ()
    stall_timeout: float = 600.0
    render_budget: int = 4 * 2**30
    jobs: int = 2


@dataclass(kw_only=True)
class Training:
    """One training: what it is, where it is, and, once it ended badly, why in one sentence."""

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
    started: float = 0.0
    changed: float = 0.0
    first_step_seen: tuple[float, int] | None = None
    ended: bool = False
    failure: str | None = None

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the speed so far; None before the second step."""
        if self.phase != "training" or self.first_step_seen is None or self.step is None:
            return None
        since, first = self.first_step_seen
        done = self.step - first
        return (time.monotonic() - since) / done * (self.steps - 1 - self.step) if done > 0 else None

    def last_log_lines(self) -> str:
        """The end of the training's log, without terminal escapes."""
        return last_lines(self.log)


class Interrupted(Exception):
    """Somebody asked the launcher to stop (Ctrl-C, or a CI system's SIGTERM)."""


def find_ns_train() -> Path:
    """`ns-train` of this environment. Raises UsageError where there is none."""
    beside = Path(sys.executable).parent / "ns-train"
    found = beside if beside.exists() else shutil.which("ns-train")
    if found is None:
        raise UsageError('There is no ns-train in this environment; install it: pip install "f3rm-verify[train]".')
    return Path(found)


def refuse_owned_options(arguments: Sequence[str]) -> None:
    """Raises UsageError for an argument that `run` sets itself, naming ours."""
    for argument in arguments:
        option = argument.split("=", 1)[0].replace("_", "-")
        if option in OWNED_OPTIONS:
            ours = OWNED_OPTIONS[option]
            instead = f"use f3rm-verify's own {ours} before the --" if ours else "it is always set for a verification"
            raise UsageError(f"{option} cannot be given to ns-train here: {instead}.")


def option_is_off(arguments: Sequence[str], option: str) -> bool:
    """Whether a boolean ns-train option is given as False, the last one counting."""
    value = "True"
    for index, argument in enumerate(arguments):
        name, _, joined = argument.partition("=")
        if name.replace("_", "-") == option:
            value = joined or (arguments[index + 1] if index + 1 < len(arguments) else "")
    return value == "False"


def run_trainings(
    request: TrainingRequest, sides: Mapping[str, int], *, watch: Callable[[Sequence[Training]], None]
) -> list[Training]:
    """Trains once per side (name to seed), `request.jobs` at a time, and returns when all have ended.

    A training that fails ends the others, and so does Ctrl-C or SIGTERM; the reason stands in `failure`. `watch` is
    called a few times a second. Raises TrainingError where a training never began or is not ours. Nothing that was
    started runs on afterwards.
    """
    logs = request.output / "logs"
    logs.mkdir(parents=True)
    trainings = [Training(side=side, seed=seed, log=logs / f"{side}.log") for side, seed in sides.items()]
    with _lifeline() as read_end:
        try:
            with _on_stop_signals(_interrupt):
                _run_all(request, trainings, read_end, watch)
        except Interrupted as interruption:
            for training in trainings:
                if not training.ended:
                    training.failure = f"The {training.side} training was stopped by {interruption} {_where(training)}."
        finally:
            with _on_stop_signals(signal.SIG_IGN):
                for training in trainings:
                    end_training(training)
    return trainings


def _run_all(
    request: TrainingRequest, trainings: list[Training], read_end: int, watch: Callable[[Sequence[Training]], None]
) -> None:
    while any(not training.ended for training in trainings):
        running = [training for training in trainings if training.process is not None and not training.ended]
        waiting = [training for training in trainings if training.process is None]
        for training in waiting[: max(0, request.jobs - len(running))]:
            _start(request, training, read_end)
        for training in running:
            _observe(request, training)
        if any(training.failure for training in trainings):
            return
        watch(trainings)
        time.sleep(_POLL_SECONDS)


def _start(request: TrainingRequest, training: Training, read_end: int) -> None:
    with training.log.open("wb") as log:
        training.process = subprocess.Popen(
            command(request, training),
            env=_environment(request, training, read_end),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(read_end,),
        )
    training.phase = "starting"
    training.started = training.changed = time.monotonic()


def command(request: TrainingRequest, training: Training) -> list[str]:
    """The ns-train command of one training."""
    return [
        str(request.ns_train),
        request.method,
        *("--output-dir", str(request.output)),
        *("--experiment-name", EXPERIMENT),
        *("--timestamp", training.side),
        *("--data", str(request.data)),
        *("--machine.seed", str(training.seed)),
        *("--max-num-iterations", str(request.iters)),
        *("--vis", "tensorboard"),
        *("--logging.steps-per-log", "1"),
        *("--logging.local-writer.enable", "False"),
        *request.ns_train_args,
    ]


def _environment(request: TrainingRequest, training: Training, read_end: int) -> dict[str, str]:
    arguments = request.ns_train_args
    plan = SeedingPlan(
        base_seed=training.seed,
        enabled=not option_is_off(arguments, "--enable-comprehensive-seeding"),
        cublas_workspace=not option_is_off(arguments, "--seed-cublas-workspace"),
    )
    environment = child_environment(plan, os.environ)
    others = environment.get("NERFSTUDIO_METHOD_CONFIGS")
    ours = f"{request.method}=f3rm_verify.f3rm.wrapped_method:wrapped_method"
    environment.update(
        NERFSTUDIO_METHOD_CONFIGS=f"{others},{ours}" if others else ours,
        F3RM_VERIFY_METHOD=request.method,
        F3RM_VERIFY_NONCE=training.nonce,
        F3RM_VERIFY_LIFELINE=str(read_end),
        F3RM_VERIFY_RENDER_BUDGET=str(request.render_budget),
        F3RM_VERIFY_FEATURE_CACHE=str(request.output / "cache" / training.side),
        PYTHONUNBUFFERED="1",
        TERM="dumb",
        COLUMNS="120",
    )
    # Two trainings side by side slow each other down many times over while their waiting threads spin. This changes
    # how threads wait, not how many there are: that number is part of the experiment and stays the user's.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("GOMP_SPINCOUNT", "0")
    return environment


def _observe(request: TrainingRequest, training: Training) -> None:
    """Brings `training` up to date with its process and the files that it wrote."""
    assert training.process is not None
    code = training.process.poll()
    if training.directory is None:
        training.directory = _find_directory(request, training)
    if training.directory is not None:
        _require_our_trainer(training)
        _read_status(training)
    if code is not None:
        training.ended = True
        if training.directory is None or not (training.directory / MANIFEST).exists():
            raise TrainingError(
                f"The {training.side} training ended before it began (exit code {code}). "
                f"The end of its log, {training.log}:\n{training.last_log_lines()}"
            )
        if code != 0:
            training.failure = f"The {training.side} training failed {_where(training)} ({_exit(code)})."
    elif time.monotonic() - training.changed > request.stall_timeout:
        training.failure = (
            f"The {training.side} training made no step for {request.stall_timeout:g} s ({_where(training)}) and was "
            "stopped; --stall-timeout sets how long to wait."
        )


def _where(training: Training) -> str:
    return f"after step {training.step}" if training.step is not None else f"while {training.phase}"


def _exit(code: int) -> str:
    return f"ended by signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _find_directory(request: TrainingRequest, training: Training) -> Path | None:
    """The run directory, which nerfstudio names by the method's own name, not by the one that was typed."""
    folders = (request.output / EXPERIMENT).glob(f"*/{training.side}")
    return next((folder for folder in folders if (folder / CONFIG).exists()), None)


def _require_our_trainer(training: Training) -> None:
    """nerfstudio swallows what goes wrong with a wrapped method and silently trains the stock one."""
    assert training.directory is not None
    manifest = training.directory / MANIFEST
    if manifest.exists():
        nonce = json.loads(manifest.read_text("utf8")).get("nonce")
    elif any(training.directory.glob("events.out.tfevents.*")):
        nonce = None
    else:
        return
    if nonce != training.nonce:
        raise TrainingError(
            f"The {training.side} training does not run under f3rm-verify's trainer: nerfstudio could not load the "
            f"wrapped method and went on with its own. Nothing can be verified, so all trainings were stopped. "
            f"The end of its log, {training.log}:\n{training.last_log_lines()}"
        )


def _read_status(training: Training) -> None:
    assert training.directory is not None
    try:
        status = json.loads((training.directory / STATUS).read_text("utf8"))
    except (OSError, ValueError):
        return  # not written yet
    seen = (status["phase"], status["step"])
    if seen != (training.phase, training.step):
        training.changed = time.monotonic()
    training.phase, training.step = seen
    training.steps, training.loss = status["steps"], status["loss"]
    if training.first_step_seen is None and training.phase == "training":
        training.first_step_seen = (time.monotonic(), status["step"])


def end_training(training: Training) -> None:
    """Ends the training's whole process group: first asked, then killed. Workers of a dead leader are ended too."""
    process = training.process
    if process is None:
        return
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()
    training.ended = True


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left in it


@contextmanager
def _lifeline() -> Iterator[int]:
    """A pipe whose write end only this process holds; yields the read end for the children."""
    read_end, write_end = os.pipe()
    try:
        yield read_end
    finally:
        os.close(write_end)
        os.close(read_end)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted(signal.Signals(number).name)


@contextmanager
def _on_stop_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Lets `handler` answer Ctrl-C, SIGTERM and a closed terminal."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def last_lines(log: Path, *, count: int = _LOG_LINES) -> str:
    """The last lines of a log, without control characters."""
    try:
        with log.open("rb") as file:
            _seek_back(file, 64 * 1024)
            text = file.read().decode("utf8", "replace")
    except OSError as error:
        return f"(the log cannot be read: {error})"
    lines = [line.rstrip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    clean = ["".join(character for character in line if character.isprintable()) for line in lines[-count:]]
    return "\n".join(f"  {line}" for line in clean) or "  (the log is empty)"


def _seek_back(file: IO[bytes], count: int) -> None:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - count))
