"""The options of the commands, each said once: commands that share some take them as one object."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from f3rm_verify.difference import ARTEFACTS
from f3rm_verify.errors import UsageError

ArtefactName = Enum(  # type: ignore[misc]
    "ArtefactName",
    {name: name for name in ARTEFACTS},
    type=str,
)
ItersOption = Annotated[int | None, typer.Option(help="Training steps of every run.", min=1, show_default="1000")]
JobsOption = Annotated[int, typer.Option(help="How many trainings at a time.", min=1)]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.", dir_okay=False)]
PolicyOption = Annotated[
    Path | None,
    typer.Option(help="What is required, limited and ignored.", show_default="f3rm-verify.toml or pyproject.toml"),
]
BaselineFile = Annotated[Path, typer.Argument(help="The baseline, a JSON file for git.", dir_okay=False)]
FromOption = Annotated[
    Path | None, typer.Option("--from", help="Take this run directory, trained by f3rm-verify, and train nothing.")
]


class Preset(str, Enum):
    """A size of our own f3rm."""

    SMALL = "small"
    FULL = "full"


class TraceMode(str, Enum):
    """What a trace holds of every step."""

    OFF = "off"
    STEPS = "steps"
    TENSORS = "tensors"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is trained."""

    seed: Annotated[int | None, typer.Option(help="Seed of every run.", min=0, max=2**32 - 1, show_default="42")] = None
    method: Annotated[str | None, typer.Option(help="Any method that nerfstudio knows.", show_default="f3rm")] = None
    preset: Annotated[
        Preset | None, typer.Option(help="Size of our own f3rm: small by default for the built-in scene, else full.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """With what it is trained, and where."""

    data: Annotated[Path | None, typer.Option(help="Dataset; without it, the built-in scene.")] = None
    load_config: Annotated[
        Path | None,
        typer.Option(help="A saved config.yml to train; gives defaults for method, data, seed and steps."),
    ] = None
    ns_train: Annotated[Path | None, typer.Option(help="The ns-train to call; else this environment's.")] = None
    stall_timeout: Annotated[float, typer.Option(help="Seconds without a new step after which to stop.", min=1)] = 600
    output_dir: Annotated[Path, typer.Option(help="Each run makes a fresh directory in here.")] = Path(
        "f3rm-verify-out"
    )


@dataclass(frozen=True, kw_only=True)
class Reports:
    """Where a result is written, by the format."""

    json: JsonOption = None
    html: Annotated[Path | None, typer.Option(help="Write a page, index.html, into this directory.")] = None
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.", dir_okay=False)] = None
    markdown: Annotated[
        Path | None, typer.Option(help="Write Markdown for a CI summary to this file.", dir_okay=False)
    ] = None
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write logs of both sides and of their difference into this directory.")
    ] = None

    def refuse_unwritable(self) -> None:
        """Raises UsageError, before anything is trained or compared, where a report could not be written."""
        for kind, place in vars(self).items():
            refuse_unwritable(place, f"--{kind}", directory=kind in ("html", "tensorboard"))


def refuse_unwritable(place: Path | None, name: str = "--json", *, directory: bool = False) -> None:
    """Raises UsageError, before anything is written, where a file, or the files in a directory, could not be."""
    if place is None:
        return
    kind = "directory" if directory else "file"
    if not directory and place.exists() and not place.is_file():
        raise UsageError(f"{name} {place} cannot be written: it is no regular file; name another {kind}.")
    folder = place.absolute() if directory else place.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{name} {place} cannot be written: {folder} takes no new files; name another {kind}.")


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Shows the command to typer with the fields of its dataclasses as options, and calls it with the dataclasses."""
    hints: dict[str, Any] = get_type_hints(command)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}

    @functools.wraps(command)
    def called(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        command(**given)

    shown: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = groups.get(parameter.name)
        own = [parameter] if group is None else inspect.signature(group, eval_str=True).parameters.values()
        shown += [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
    called.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in shown}
    return called
