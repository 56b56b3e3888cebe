"""Options, wiring, printing and exit codes. Nothing else knows typer; heavy imports wait until a command needs them."""

from __future__ import annotations

import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from f3rm_verify import __version__
from f3rm_verify.errors import UsageError, VerifyError

if TYPE_CHECKING:
    from rich.console import Console

    from f3rm_verify.difference import Result

app = typer.Typer(
    name="f3rm-verify",
    help="Does the same seed really give the same training, and if not, what broke?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ArtefactName = Enum(  # type: ignore[misc]
    "ArtefactName",
    {name: name for name in ("setup", "seeding", "trace", "curves", "metrics", "checkpoints", "renders")},
    type=str,
)
Preset = Enum("Preset", {"small": "small", "full": "full"}, type=str)  # type: ignore[misc]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.", dir_okay=False)]


@app.command()
def run(
    ns_train_args: Annotated[
        list[str] | None, typer.Argument(help="After --: further options of ns-train.", metavar="[-- NS_TRAIN_ARGS]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every run.", min=0, max=2**32 - 1)] = 42,
    iters: Annotated[int, typer.Option(help="Training steps of every run.", min=1)] = 1000,
    data: Annotated[Path | None, typer.Option(help="Dataset; without it, the built-in scene.")] = None,
    method: Annotated[str, typer.Option(help="Any method that nerfstudio knows.")] = "f3rm",
    preset: Annotated[
        Preset | None, typer.Option(help="Size of f3rm: small is the default for the built-in scene, else full.")
    ] = None,
    runs: Annotated[int, typer.Option(help="How many runs; all are compared with the first.", min=2)] = 2,
    control: Annotated[bool, typer.Option("--control", help="Also train with seed + 1, which must differ.")] = False,
    jobs: Annotated[int, typer.Option(help="How many trainings at a time.", min=1)] = 2,
    stall_timeout: Annotated[float, typer.Option(help="Seconds without a new step after which to stop.", min=1)] = 600,
    output_dir: Annotated[Path, typer.Option(help="Each run makes a fresh directory in here.")] = Path(
        "f3rm-verify-out"
    ),
    render_budget: Annotated[
        float, typer.Option(help="GiB that the renders of one run may take.", min=0.001)
    ] = 4.0,
    json_file: JsonOption = None,
) -> None:
    """Train twice with one seed, compare everything, name the first difference."""
    from f3rm_verify import presets, runner

    arguments = tuple(ns_train_args or ())
    runner.refuse_owned_options(arguments)
    small = (preset or (Preset.small if data is None and method == "f3rm" else Preset.full)) is Preset.small
    if small and method != "f3rm":
        raise UsageError("--preset small is a size of f3rm; shrink another method by options after --.")
    if data is not None and not data.exists():
        raise UsageError(f"--data {data} does not exist; give a dataset in a format that nerfstudio reads.")
    ns_train = runner.find_ns_train()
    output = _fresh_directory(output_dir)
    request = runner.TrainingRequest(
        seed=seed,
        iters=iters,
        data=(data or _built_in_scene(output)).resolve(),
        method=method,
        output=output.resolve(),
        ns_train=ns_train,
        ns_train_args=(*(presets.SMALL if small else ()), *arguments),
        stall_timeout=stall_timeout,
        render_budget=int(render_budget * 2**30),
        jobs=jobs,
    )
    sides = {"reference": seed, "candidate": seed} | {f"candidate-{i}": seed for i in range(2, runs)}
    _verify(request, sides | ({"control": seed + 1} if control else {}), json_file)


def _verify(request: Any, sides: dict[str, int], json_file: Path | None) -> None:
    """Trains, compares what the trainings left, also when they failed, and exits like the verdict."""
    from f3rm_verify import runner
    from f3rm_verify.compare_runs import compare_runs
    from f3rm_verify.policy import RUN_POLICY
    from f3rm_verify.progress import progress_display
    from f3rm_verify.run_dir import RunDir

    console = _console()
    with progress_display(console) as watch:
        trainings = runner.run_trainings(request, sides, watch=watch)
    trouble = [training.failure for training in trainings if training.failure]
    for training in trainings:
        if training.failure:
            _say_trouble(f"{training.failure}\nThe end of its log, {training.log}:\n{training.last_log_lines()}")
    found = {training.side: training.directory for training in trainings}
    missing = [side for side, directory in found.items() if directory is None]
    if missing:
        _say_trouble(f"There is nothing to compare: the {missing[0]} run left no directory in {request.output}.")
        raise typer.Exit(3)
    directories = {side: RunDir(directory) for side, directory in found.items() if directory is not None}
    reference = directories.pop("reference")
    control = directories.pop("control", None)
    result = compare_runs(
        reference,
        directories,
        policy=RUN_POLICY,
        control=control,
        reproduce=_command_line(),
        trouble=trouble,
    )
    _report(result, console, json_file or request.output / "result.json")


@app.command()
def diff(
    reference: Annotated[Path, typer.Argument(help="Run directory of nerfstudio.")],
    candidate: Annotated[Path, typer.Argument(help="Another run directory.")],
    only: Annotated[
        list[ArtefactName] | None, typer.Option(help="Compare this artefact; may be given several times.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Compare two existing run directories, also plain ones of ns-train."""
    from f3rm_verify.compare_runs import compare_runs
    from f3rm_verify.policy import DIFF_POLICY
    from f3rm_verify.run_dir import RunDir

    result = compare_runs(
        RunDir.open(reference),
        {"candidate": RunDir.open(candidate)},
        policy=DIFF_POLICY,
        only=[name.value for name in only or ()],
        reproduce=_command_line(),
    )
    _report(result, _console(), json_file)


@app.command()
def scene(directory: Annotated[Path, typer.Argument(help="Where to write it.")]) -> None:
    """Write the built-in scene."""
    from f3rm_verify.scene import write_scene

    typer.echo(write_scene(directory))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _report(result: Result, console: Console, json_file: Path | None) -> None:
    from f3rm_verify.reporters.json_report import write_json
    from f3rm_verify.reporters.terminal import render_terminal

    if json_file is not None:
        write_json(result, json_file)
    render_terminal(result, console, details=8 if console.is_terminal else 20, output=json_file)
    raise typer.Exit(result.outcome.exit_code)


def _fresh_directory(parent: Path) -> Path:
    """A new directory in `parent`, named by the time; a run never mixes with another's evidence."""
    import time

    stamp = time.strftime("%Y-%m-%d_%H%M%S")
    for name in (stamp, *(f"{stamp}-{i}" for i in range(2, 1000))):
        try:
            (parent / name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"--output-dir {parent} cannot be written to ({error.strerror}).") from error
        return parent / name
    raise UsageError(f"--output-dir {parent} holds a thousand runs of this second; give another one.")


def _built_in_scene(output: Path) -> Path:
    from f3rm_verify.scene import SCENE_NAME, write_scene

    return write_scene(output / SCENE_NAME)


def _console() -> Console:
    """Standard output for a person: colour and width of a terminal, plain and wide where it is piped."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)


def _say_trouble(message: str) -> None:
    typer.echo(f"f3rm-verify: {message}", err=True)


def _command_line() -> str:
    return shlex.join(["f3rm-verify", *sys.argv[1:]])


def main() -> None:
    """The console script: a VerifyError becomes one message and exit code 2."""
    try:
        app()
    except VerifyError as error:
        _say_trouble(str(error))
        sys.exit(2)
