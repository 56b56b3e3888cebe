"""Trains with and without planted faults in one process, compares, and says what was found.

    python laboratory.py FOLDER [--only NAME] [--no-faults] [--clean-pairs N] > scores.json

One process imports nerfstudio once, for all faults but those that need an environment of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import fnmatch
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from f3rm.small_trainings import METHODS
from faults.planted import FAULTS, STEPS, Fault

from f3rm_verify import launch_variables
from f3rm_verify.causes import RULES
from f3rm_verify.compare_runs import compare_runs
from f3rm_verify.difference import FirstDivergence, Outcome
from f3rm_verify.policy import Policy
from f3rm_verify.run_dir import RunDir
from f3rm_verify.scene import write_scene

#: What these trainings leave: no evaluation of images, which would take most of the time.
POLICY = Policy(required=("setup", "seeding", "trace", "curves", "checkpoints"))
ROOT = Path(__file__).resolve().parents[1]
_DETERMINISTIC = Fault(name="clean", step=None, stage="", subject="", cause="")


@dataclass(frozen=True, kw_only=True)
class Score:
    """What was found of a fault, beside the truth; `outcome` is the verdict."""

    name: str
    truth: dict[str, Any]
    found: dict[str, Any] | None
    outcome: str
    seconds: float

    @property
    def detected(self) -> bool:
        """Whether the first divergence was found where it is."""
        if self.found is None or self.outcome != "diverged":
            return False
        same_step = self.truth["step"] in (None, self.found["step"])
        return same_step and all(
            fnmatch.fnmatchcase(str(self.found[key]), self.truth[key]) for key in ("stage", "subject")
        )

    @property
    def diagnosis(self) -> str:
        """Right, wrong, or unknown where there is a cause to be known."""
        rule = None if self.found is None else self.found["rule"]
        return "right" if rule == self.truth["cause"] else "unknown" if rule == "unknown" else "wrong"


class Laboratory:
    """A folder with the scene, the feature caches and every training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scene = folder / "scene"
        if not self.scene.exists():
            write_scene(self.scene)
        # As ns-train does; nerfstudio's modules can be imported in this order alone.
        import nerfstudio.scripts.train  # noqa: F401
        import torch

        _spare_what_is_the_same()
        # A trainer says so at some time, and torch then names it another way: the first would differ from the others.
        torch.set_float32_matmul_precision("highest")
        self._references: dict[Any, Path] = {}
        self._fresh: dict[Path, Any] = {}
        self._count = 0
        if not (folder / "cache").exists():
            self.train(_DETERMINISTIC)  # which makes the features for all

    def score(self, fault: Fault) -> Score:
        """Plants a fault, and compares with a training without it."""
        start = time.monotonic()
        truth = {key: getattr(fault, key) for key in ("step", "stage", "subject", "cause")}
        try:
            outcome, first = self._compare(fault)
        except Exception as error:  # the other faults are still looked at
            outcome, first = f"{type(error).__name__}: {error}"[:500], None
        found = None if first is None else {**dataclasses.asdict(first), "rule": _rule(first.cause)}
        return Score(name=fault.name, truth=truth, found=found, outcome=outcome, seconds=time.monotonic() - start)

    def _compare(self, fault: Fault) -> tuple[str, FirstDivergence | None]:
        base = dataclasses.replace(_DETERMINISTIC, **{key: getattr(fault, key) for key in _BASE})
        reference = self._reference(base, fresh=fault.cache is not None)
        candidate = self._in_another_process(fault) if fault.own_process else self.train(fault, beside=reference)
        result = compare_runs(RunDir(reference), {"candidate": RunDir(candidate)}, policy=POLICY)
        return result.outcome.value, result.first_divergence

    def clean_pair(self, fault: Fault = _DETERMINISTIC) -> tuple[Outcome, tuple[str, ...]]:
        """The verdict over two trainings without a fault, and why it is not better."""
        sides = [self.train(fault) for _ in range(2)]
        result = compare_runs(RunDir(sides[0]), {"candidate": RunDir(sides[1])}, policy=POLICY)
        return result.outcome, result.reasons

    def _reference(self, base: Fault, *, fresh: bool) -> Path:
        """The training without the fault; one serves all faults that have the same one."""
        key = base, fresh
        if key not in self._references:
            cache = self.folder / "fresh" / str(len(self._references)) if fresh else None
            self._references[key] = self.train(base, cache=cache)
            self._fresh[self._references[key]] = cache
        return self._references[key]

    def train(self, fault: Fault, *, beside: Path | None = None, cache: Path | None = None) -> Path:
        """One training; `beside` is the reference where this is the candidate. Returns the run directory."""
        self._count += 1
        name = f"{self._count:03}-{os.getpid()}"
        scene = self.scene
        if fault.data is not None:
            scene = self.folder / "scenes" / name / "scene"
            shutil.copytree(self.scene, scene)
            fault.data(scene)
        if fault.cache is not None and beside is not None:
            cache = self.folder / "caches" / name
            shutil.copytree(self._fresh[beside], cache)
            fault.cache(cache)
        with pytest.MonkeyPatch.context() as patch, _as_it_was():
            patch.setenv(launch_variables.FEATURE_CACHE, str(cache or self.folder / "cache"))
            for change in (fault.base_building, fault.building):
                if change is not None:
                    change(patch)
            config = self._config(fault.method, name, scene, (*fault.both, *fault.arguments))
            config.save_config()
            trainer = config.setup(local_rank=0, world_size=1)
            with _data_workers(fault.start_method, trainer):
                trainer.setup()
                for act in (fault.base_built, fault.built):
                    if act is not None:
                        act(trainer)
                trainer.train()
        return Path(trainer.base_dir)

    def _config(self, method: str, name: str, scene: Path, arguments: tuple[str, ...]) -> Any:
        import tyro
        from nerfstudio.configs.method_configs import all_methods

        from f3rm_verify.f3rm.wrap import wrap_config

        config = wrap_config(copy.deepcopy(all_methods[method]))
        given = (
            *("--output-dir", str(self.folder / "out"), "--experiment-name", "faults", "--timestamp", name),
            *("--data", str(scene), "--machine.seed", "42", "--machine.device-type", "cpu"),
            *("--max-num-iterations", str(STEPS), "--vis", "tensorboard", "--logging.steps-per-log", "1"),
            *("--logging.local-writer.enable", "False", "--print-seed-info", "False"),
        )
        parsed = tyro.cli(
            tyro.conf.FlagConversionOff[type(config)], default=config, args=[*given, *METHODS[method], *arguments]
        )
        parsed.pipeline.datamanager.data = parsed.data
        return parsed

    def _in_another_process(self, fault: Fault) -> Path:
        """The candidate in a process with another hash seed."""
        command = [sys.executable, str(Path(__file__)), str(self.folder), "--train", fault.name]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True, timeout=300
        )
        return Path(done.stdout.strip().splitlines()[-1])


_BASE = ("both", "base_building", "base_built", "method", "start_method")


def _spare_what_is_the_same() -> None:
    """Has this process look up its packages once, and not build the network of LPIPS, which nothing here evaluates."""
    import torchvision

    from f3rm_verify import environment

    def no_network(**_: Any) -> Any:
        raise OSError("not here")

    torchvision.models.alexnet = no_network
    environment._packages = functools.cache(environment._packages)


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Takes back what a trainer leaves in its process, and what nerfstudio's writers keep in their module."""
    import torch
    from nerfstudio.utils import writer

    environment, threads = dict(os.environ), torch.get_num_threads()
    try:
        yield
    finally:
        for event_writer in writer.EVENT_WRITERS:
            if isinstance(event_writer, writer.TensorboardWriter):
                event_writer.tb_writer.close()
        for kept in (writer.EVENT_WRITERS, writer.EVENT_STORAGE, writer.GLOBAL_BUFFER):
            kept.clear()
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _data_workers(start_method: str, trainer: Any) -> Iterator[None]:
    """Inside, data workers are started in this way; they end with it."""
    from nerfstudio.data.datamanagers.parallel_datamanager import mp

    mp.set_forkserver_preload(["nerfstudio.data.datamanagers.parallel_datamanager", "f3rm_verify.f3rm.data_workers"])
    mp.set_start_method(start_method, force=True)
    try:
        yield
    finally:
        for worker in getattr(trainer.pipeline.datamanager, "data_procs", None) or ():
            worker.kill()
            worker.join()


def _rule(cause: str) -> str:
    """The name of the rule that a cause begins with."""
    text = cause.removeprefix("likely ")
    return next((rule.name for rule in RULES if text.startswith(f"{rule.name}: ")), "unknown")


def environment() -> dict[str, str]:
    """What the process of a laboratory needs before its interpreter starts."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("F3RM_VERIFY", "NERFSTUDIO_"))}
    # Waiting threads that spin make a training many times slower where other processes want their cores.
    waiting = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    own = {"PYTHONHASHSEED": "42", "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return {**keep, **waiting, **own}


def run_laboratory(folder: Path, *arguments: str, timeout: float = 900) -> Any:
    """Runs this file as a process, and reads what it prints."""
    command = [sys.executable, str(Path(__file__)), str(folder), *arguments]
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command,
        env=environment(),
        cwd=folder,  # not in a working tree that somebody may be changing
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def score_table(scores: list[Score]) -> str:
    """Fault, truth, found and diagnosis, as text."""
    rows = [("fault", "truth: step, stage, subject", "found", "cause found", "place", "cause")]
    for score in scores:
        found = score.found or dict.fromkeys(("step", "stage", "subject"), "-")
        places = (" ".join(str(side[key]) for key in ("step", "stage", "subject")) for side in (score.truth, found))
        truth, seen = (place.replace("None ", "any ") for place in places)
        rule = score.found["rule"] if score.found else score.outcome
        place = "right" if score.detected else "WRONG"
        known = "right, nothing can tell" if score.truth["cause"] == "unknown" else "right"
        diagnosis = known if score.diagnosis == "right" else score.diagnosis.upper()
        rows.append((score.name, truth, seen, rule, place, diagnosis))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    count = {word: sum(score.diagnosis == word for score in scores) for word in ("right", "wrong", "unknown")}
    detected = sum(score.detected for score in scores)
    lines.append(
        f"{len(scores)} faults: {detected} found at their step, stage and subject; causes: {count['right']} right, "
        f"{count['wrong']} wrong, {count['unknown']} unknown that could be known"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--no-faults", action="store_true")
    parser.add_argument("--train")
    parser.add_argument("--clean-pairs", type=int, default=0)
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        laboratory = Laboratory(arguments.folder)
        if arguments.train:
            answer = str(laboratory.train(next(fault for fault in FAULTS if fault.name == arguments.train)))
        else:
            wanted = [] if arguments.no_faults else FAULTS
            wanted = [fault for fault in wanted if not arguments.only or fault.name in arguments.only]
            pairs = [_say_pair(*laboratory.clean_pair()) for _ in range(arguments.clean_pairs)]
            scores = [dataclasses.asdict(_told(laboratory.score(fault))) for fault in wanted]
            answer = json.dumps({"scores": scores, "clean": pairs})
    print(answer)


def _say_pair(outcome: Outcome, reasons: tuple[str, ...]) -> dict[str, Any]:
    print(f"clean pair: {outcome.value} {reasons}", file=sys.stderr, flush=True)
    return {"outcome": outcome.value, "reasons": reasons}


def _told(score: Score) -> Score:
    place = score.found and (score.found["step"], score.found["stage"], score.found["subject"], score.found["cause"])
    print(f"{score.seconds:5.1f} s  {score.name}: {score.outcome} {place}", file=sys.stderr, flush=True)
    return score


if __name__ == "__main__":
    main()
