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
from typing import Any

from f3rm_verify import launch_variables
from f3rm_verify.errors import UsageError
from f3rm_verify.seeding_plan import SeedingPlan, child_environment

_ALWAYS = "it is set for every verification"
_OWN = "use f3rm-verify's own {} before the --"
#: Options of ns-train that `run` sets itself, with what to do instead of giving them.
OWNED_OPTIONS: Mapping[str, str] = {
    "--data": _OWN.format("--data"),
    "--experiment-name": _ALWAYS,
    "--load-config": _OWN.format("--load-config"),
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
#: What a method can be called.
METHOD_NAME = r"\w[\w.+-]*"
#: Prints the packages that register a method. The working directory's own are not there for ns-train either.
_FIND_PROVIDERS = """
import sys
sys.path[:] = filter(None, sys.path)
from importlib import metadata
for point in metadata.entry_points(group="nerfstudio.method_configs"):
    if point.name == sys.argv[1]:
        print(point.module.partition(".")[0])
"""
_KNOWN_PROVIDERS = ("f3rm_verify", "nerfstudio")


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What to train. `output` is a fresh directory; `stall_timeout` is in seconds, `render_budget` in bytes.

    `load_config` is a saved configuration to train, instead of the method's own. `foreign` says that the method is
    another package's, whose data manager may keep caches in the dataset. A side in `views` gets that view of the data.
    `prepares` is the user's dataset where only the caches in a view of it are to be made. `cost_steps` is how many
    steps to time with and without each measure where costs are to be measured, and nothing trained; `cost_only` names
    the measures, all where it is empty. With `fresh_features` each side extracts its own. `trace` is what the flight
    recorder records: off, steps or tensors. `snapshot_every` keeps a snapshot before every so many steps; `replay` says
    in JSON which steps to execute again, where nothing is to be trained. `variables` go into the environment.
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
    load_config: Path | None = None
    foreign: bool = False
    views: Mapping[str, Path] = field(default_factory=dict)
    prepares: Path | None = None
    cost_steps: int | None = None
    cost_only: tuple[str, ...] = ()
    fresh_features: bool = False
    trace: str = "steps"
    snapshot_every: int | None = None
    replay: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


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
    named = [item.partition("=") for item in os.environ.get(launch_variables.METHODS, "").split(",")]
    providers = [re.split("[.:]", place)[0] for name, _, place in named if name == method]
    if not providers:
        providers = _ask([_interpreter(ns_train), "-c", _FIND_PROVIDERS, method]).split()
    return next((provider for provider in providers if provider not in _KNOWN_PROVIDERS), None)


def _ask(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _interpreter(program: Path) -> str:
    """The Python that a console script runs with: what its first lines name, else what lies beside it."""
    try:
        with program.open("rb") as file:
            head = file.read(1024).decode("utf8", "replace")
    except OSError:
        head = ""
    # Where the path is too long for the first line, it stands in a line that the shell and Python read differently.
    found = re.match(r"#!\s*(/\S*python\S*)|#!/bin/sh\n'{3}exec' \"?([^\"\n]*python[^\"\s]*)", head)
    return (found[1] or found[2]) if found else str(program.resolve().parent / "python")


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


def extra_arguments(argv: Sequence[str]) -> tuple[str, ...]:
    """What the command line of a training holds besides the program, the method and what `command` sets."""
    rest: list[str] = []
    words = iter(argv[2:])
    for word in words:
        if _option_name(word) not in (*OWNED_OPTIONS, "--logging.local-writer.enable"):
            rest.append(word)
        elif "=" not in word:
            next(words, None)
    return tuple(rest)


def request_of(argv: Any, *, output: Path, ns_train: Path, side: str) -> TrainingRequest:
    """The request whose command was `argv`, as a manifest has it; for another output, and by a program of this side.

    Raises UsageError where it is not a command of `command`, or names what is not there.
    """
    if not isinstance(argv, list) or not all(isinstance(word, str) for word in argv):
        raise UsageError(f"The {side} run does not say how it was started: it was not made by f3rm-verify run.")
    _, method, *words = argv if len(argv) > 1 else ("", "")
    blank = TrainingRequest(seed=0, iters=1, data=Path(), method="", output=Path(), ns_train=Path())
    template = command(blank, side="", seed=0)[2:]
    names, given = template[::2], dict(zip(words[: len(template) : 2], words[1 : len(template) : 2], strict=False))
    numbers = (given.get("--machine.seed", ""), given.get("--max-num-iterations", ""))
    ours = words[: len(template) : 2] == names and all(number.isdecimal() for number in numbers)
    if not ours or not re.fullmatch(METHOD_NAME, method):
        raise UsageError(f"The {side} run was not started by this f3rm-verify's run, so how it was is not known.")
    arguments = tuple(words[len(template) :])
    refuse_owned_options(arguments)
    data = Path(given["--data"])
    if not data.exists():
        raise UsageError(f"The data of the {side} run, {data}, are not there any more; put them back.")
    return TrainingRequest(
        seed=int(numbers[0]),
        iters=int(numbers[1]),
        data=data,
        method=method,
        output=output,
        ns_train=ns_train,
        ns_train_args=arguments,
    )


def environment(request: TrainingRequest, *, side: str, seed: int, nonce: str) -> dict[str, str]:
    """The environment of one training, from this process's own."""
    arguments = request.ns_train_args
    plan = SeedingPlan(
        base_seed=seed,
        enabled=not option_is_off(arguments, "--enable-comprehensive-seeding"),
        cublas_workspace=not option_is_off(arguments, "--seed-cublas-workspace"),
    )
    own = {**os.environ, **request.variables}
    child = child_environment(plan, own)
    set_here = [name for name, value in child.items() if own.get(name) != value]
    others = child.get(launch_variables.METHODS)
    ours = f"{request.method}=f3rm_verify.f3rm.wrapped_method:wrapped_method"
    child.update(
        {
            launch_variables.METHODS: f"{others},{ours}" if others else ours,
            launch_variables.METHOD: request.method,
            launch_variables.NONCE: nonce,
            launch_variables.TRACE: request.trace,
            launch_variables.SEEDING_SET: ",".join(set_here),
            launch_variables.FEATURE_CACHE: str(
                request.output / "cache" / (side if request.fresh_features else "shared")
            ),
            "PYTHONUNBUFFERED": "1",
            # The log is a file of ours: whatever the terminal's encoding, no character may end a training.
            "PYTHONIOENCODING": "utf-8:backslashreplace",
            "TERM": "dumb",
            "COLUMNS": "120",
        }
    )
    measures = request.cost_steps is not None or request.replay is not None
    asked = {
        launch_variables.LOAD_CONFIG: request.load_config,
        launch_variables.PREPARE: request.prepares,
        launch_variables.COST: request.cost_steps,
        launch_variables.COST_ONLY: ",".join(request.cost_only) or None,
        launch_variables.SHARED_FEATURES: None if request.fresh_features else 1,
        launch_variables.RENDER_BUDGET: None if measures else request.render_budget,
        launch_variables.SNAPSHOT_EVERY: request.snapshot_every,
        launch_variables.REPLAY: request.replay,
    }
    for name, value in asked.items():
        child.pop(name, None)  # of a training in which this one was started
        if value is not None:
            child[name] = str(value)
    # Two trainings side by side slow each other down many times over while their waiting threads spin. This changes
    # how threads wait, not how many there are: that number is part of the experiment and stays the user's.
    child.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    child.setdefault("GOMP_SPINCOUNT", "0")
    return child
