"""How `ns-train` is called for a verification: which program, with which options, in which environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from f3rm_verify import launch_variables
from f3rm_verify.errors import UsageError
from f3rm_verify.seeding_plan import SeedingPlan, child_environment

_ALWAYS = "it is set for every verification"
_OWN = "use f3rm-verify's own {} before the --"
#: Options of ns-train that `run` sets itself, with what to do instead of giving them.
OWNED_OPTIONS: Mapping[str, str] = {
    "--data": _OWN.format("--data"),
    "--experiment-name": _ALWAYS,
    "--load-config": "it replaces the whole configuration, the trainer that records the evidence included",
    "--logging.relative-log-dir": _ALWAYS,
    "--logging.steps-per-log": _ALWAYS,
    "--machine.seed": _OWN.format("--seed"),
    "--max-num-iterations": _OWN.format("--iters"),
    "--output-dir": _OWN.format("--output-dir"),
    "--pipeline.datamanager.data": _OWN.format("--data"),
    "--pipeline.datamanager.dataparser.data": _OWN.format("--data"),
    "--relative-model-dir": _ALWAYS,
    "--timestamp": _ALWAYS,
    "--vis": _ALWAYS,
}
EXPERIMENT = "verify"
_FIND_PROVIDER = """
import sys
from importlib import metadata
for distribution in metadata.distributions():
    name = distribution.metadata["Name"]
    for point in distribution.entry_points:
        if point.group == "nerfstudio.method_configs" and point.name == sys.argv[1]:
            if name not in ("nerfstudio", "f3rm-verify"):
                print(name)
                sys.exit()
"""


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What to train. `output` is a fresh directory; `stall_timeout` is in seconds, `render_budget` in bytes.

    A side in `views` gets that view of the data. `prepares` is the user's dataset where only the caches in a view of it
    are to be made.
    """

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
    views: Mapping[str, Path] = field(default_factory=dict)
    prepares: Path | None = None


def find_ns_train(given: Path | None = None) -> Path:
    """The `ns-train` that was asked for, else that of this environment. Raises UsageError where there is none."""
    if given is not None:
        if not given.is_file() or not os.access(given, os.X_OK):
            raise UsageError(f"--ns-train {given} is not a program that can be run; give the path of an ns-train.")
        return given.absolute()
    beside = Path(sys.executable).parent / "ns-train"
    found = beside if beside.exists() else shutil.which("ns-train")
    if found is None:
        raise UsageError('There is no ns-train in this environment; install it: pip install "f3rm-verify[train]".')
    return Path(found).absolute()


def method_provider(ns_train: Path, method: str) -> str | None:
    """The package that provides a method in the environment of `ns_train`, None for nerfstudio's methods and ours.

    Asked of that environment's Python without importing anything of it; the names of entry points are believed.
    """
    own = [item.partition("=") for item in os.environ.get(launch_variables.METHODS, "").split(",")]
    named = next((place for name, _, place in own if name == method), None)
    if named is not None:
        return named.partition(":")[0].partition(".")[0]
    interpreter = _interpreter(ns_train)
    if interpreter is None:
        return None
    try:
        done = subprocess.run(
            [interpreter, "-c", _FIND_PROVIDER, method], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _interpreter(program: Path) -> str | None:
    """The Python that a console script names in its first lines."""
    try:
        with program.open("rb") as file:
            head = file.read(1024).decode("utf8", "replace")
    except OSError:
        return None
    # Where the path is too long for the first line, it stands in a line that the shell and Python read differently.
    found = re.match(r"#!\s*(\S*python\S*)|#!/bin/sh\n'{3}exec' \"?([^\"\s]+)", head)
    return found and (found[1] or found[2])


def refuse_owned_options(arguments: Sequence[str]) -> None:
    """Raises UsageError for an argument that `run` sets itself, saying what to do instead.

    ns-train takes `_` for `-` and `=` between name and value; it takes no abbreviations.
    """
    for argument in arguments:
        option = _option_name(argument)
        if option in OWNED_OPTIONS:
            raise UsageError(f"{option} cannot be given to ns-train here: {OWNED_OPTIONS[option]}.")
        if option in ("--help", "-h"):
            raise UsageError(f"{option} after the -- trains nothing; ask ns-train itself: ns-train METHOD {option}.")


def _option_name(argument: str) -> str:
    return argument.partition("=")[0].replace("_", "-")


def option_is_off(arguments: Sequence[str], option: str) -> bool:
    """Whether a boolean ns-train option is given as False (the only spelling it takes), the last one counting."""
    value = "True"
    for index, argument in enumerate(arguments):
        if _option_name(argument) == option:
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            value = argument.partition("=")[2] if "=" in argument else following
    return value == "False"


def command(request: TrainingRequest, *, side: str, seed: int) -> list[str]:
    """The ns-train command of one training."""
    return [
        str(request.ns_train),
        request.method,
        *("--output-dir", str(request.output)),
        *("--experiment-name", EXPERIMENT),
        *("--timestamp", side),
        *("--data", str(request.views.get(side, request.data))),
        *("--machine.seed", str(seed)),
        *("--max-num-iterations", str(request.iters)),
        *("--vis", "tensorboard"),
        *("--logging.steps-per-log", "1"),
        *("--logging.local-writer.enable", "False"),
        *request.ns_train_args,
        *(("--machine.num-devices", "1") if request.prepares else ()),
    ]


def environment(request: TrainingRequest, *, side: str, seed: int, nonce: str) -> dict[str, str]:
    """The environment of one training, from this process's own."""
    arguments = request.ns_train_args
    plan = SeedingPlan(
        base_seed=seed,
        enabled=not option_is_off(arguments, "--enable-comprehensive-seeding"),
        cublas_workspace=not option_is_off(arguments, "--seed-cublas-workspace"),
    )
    child = child_environment(plan, os.environ)
    set_here = [name for name, value in child.items() if os.environ.get(name) != value]
    others = child.get(launch_variables.METHODS)
    ours = f"{request.method}=f3rm_verify.f3rm.wrapped_method:wrapped_method"
    child.update(
        {
            launch_variables.METHODS: f"{others},{ours}" if others else ours,
            launch_variables.METHOD: request.method,
            launch_variables.NONCE: nonce,
            launch_variables.SEEDING_SET: ",".join(set_here),
            launch_variables.RENDER_BUDGET: str(request.render_budget),
            launch_variables.FEATURE_CACHE: str(request.output / "cache" / side),
            "PYTHONUNBUFFERED": "1",
            # The log is a file of ours: whatever the terminal's encoding, no character may end a training.
            "PYTHONIOENCODING": "utf-8:backslashreplace",
            "TERM": "dumb",
            "COLUMNS": "120",
        }
    )
    if request.prepares is not None:
        child[launch_variables.PREPARE] = str(request.prepares)
    # Two trainings side by side slow each other down many times over while their waiting threads spin. This changes
    # how threads wait, not how many there are: that number is part of the experiment and stays the user's.
    child.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    child.setdefault("GOMP_SPINCOUNT", "0")
    return child
