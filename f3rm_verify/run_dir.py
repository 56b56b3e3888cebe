"""The only module that knows the names of files in a run directory.

A nerfstudio run directory `OUT/EXPERIMENT/METHOD/TIMESTAMP/` holds `config.yml`, `dataparser_transforms.json`,
`events.out.tfevents.*` and `nerfstudio_models/step-%09d.ckpt`. This package adds `verify/` (the evidence). A run
directory is untrusted: nothing in it is executed, and names that lead outside of it are refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f3rm_verify.errors import UnreadableError, UsageError

if TYPE_CHECKING:
    from f3rm_verify.readers.events import Events

EVIDENCE = "verify"
MANIFEST = f"{EVIDENCE}/manifest.json"
SEEDING = f"{EVIDENCE}/seeding.json"
METRICS = f"{EVIDENCE}/metrics.json"
STATUS = f"{EVIDENCE}/status.json"
RENDERS = f"{EVIDENCE}/renders"
CONFIG = "config.yml"
TRANSFORMS = "dataparser_transforms.json"
CHECKPOINTS = "nerfstudio_models"

#: JSON of a run directory larger than this is refused: the largest we write is the manifest, some MiB.
MAX_JSON_BYTES = 256 * 2**20
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
_ARRAY_SUFFIXES = {".npy"}
#: How far below a given directory the run directory may lie: OUT/EXPERIMENT/METHOD/TIMESTAMP is 3 below OUT.
_SEARCH_DEPTH = 3


@dataclass(frozen=True)
class RunDir:
    """One run directory. Properties are empty where there is nothing, and raise UnreadableError where it is broken."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """The run directory at `path`, or the only one up to three levels below it.

        Raises UsageError where there is none, or more than one.
        """
        if not path.is_dir():
            what = "is not a directory" if path.exists() else "does not exist"
            raise UsageError(f"{path} {what}; give the directory of a nerfstudio run (it holds {CONFIG}).")
        found = sorted(_find_runs(path, _SEARCH_DEPTH))
        if not found:
            raise UsageError(
                f"{path} is no nerfstudio run directory: it holds no {CONFIG}, no events.out.tfevents.* file, no "
                f"{CHECKPOINTS}/ and no {EVIDENCE}/. Give the directory that ns-train printed as its output."
            )
        if len(found) > 1:
            listed = ", ".join(str(item) for item in found[:5])
            raise UsageError(f"{path} holds {len(found)} run directories ({listed}); name one of them.")
        return cls(found[0])

    def file(self, relative: str) -> Path | None:
        """The file of that name, None where there is none; UnreadableError where a link leads out of the directory."""
        path = self.path / relative
        if not os.path.lexists(path):
            return None
        root = self.path.resolve()
        try:
            resolved = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise UnreadableError(f"{relative}: a link that leads nowhere ({error}).") from error
        if root not in (resolved, *resolved.parents):
            raise UnreadableError(f"{relative}: a link that leads out of the run directory, to {resolved}.")
        return path

    def json(self, relative: str) -> Any:
        """The plain data in a JSON file, None where there is no such file."""
        path = self.file(relative)
        if path is None:
            return None
        try:
            size = path.stat().st_size
            if size > MAX_JSON_BYTES:
                raise UnreadableError(f"{relative}: {size} bytes are more than a {relative} can have.")
            return json.loads(path.read_text("utf8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UnreadableError(f"{relative}: not readable as JSON ({error}).") from error

    def _json_object(self, relative: str) -> Mapping[str, Any] | None:
        data = self.json(relative)
        if data is not None and not isinstance(data, dict):
            raise UnreadableError(f"{relative}: holds {type(data).__name__}, not an object.")
        return data

    @cached_property
    def manifest(self) -> Mapping[str, Any] | None:
        """What our trainer wrote about the run; None for a plain run."""
        return self._json_object(MANIFEST)

    @cached_property
    def seeding(self) -> Mapping[str, Any] | None:
        """The seeding validation log: `entries` (one per claim) and `lines` (as printed); None for a plain run."""
        return self._json_object(SEEDING)

    @cached_property
    def metrics(self) -> Mapping[str, Any] | None:
        """Metrics of the evaluation images.

        Ours: `{"split": str, "images": {name: {metric: value}}, "mean": {metric: value}, "unavailable": {metric:
        reason}}`. A file that `ns-eval --output-path` wrote into the run directory (any `*.json` with `results`) is
        brought into this form with no `images`.
        """
        ours = self._json_object(METRICS)
        if ours is not None:
            return ours
        for path in sorted(self.path.glob("*.json")):
            data = self.json(path.name)
            if isinstance(data, dict) and isinstance(data.get("results"), dict):
                return {"split": "as ns-eval chose", "images": {}, "mean": data["results"], "unavailable": {}}
        return None

    @cached_property
    def config(self) -> Any:
        """`config.yml` as plain data, Python tags kept as names and never constructed; None where there is none."""
        from f3rm_verify.readers.config import read_config

        path = self.file(CONFIG)
        return None if path is None else read_config(path)

    @cached_property
    def events(self) -> Events:
        """Everything in the TensorBoard event files together; what could not be read is in `Events.problems`."""
        from f3rm_verify.readers.events import read_events

        return read_events(self.event_files)

    @property
    def event_files(self) -> tuple[Path, ...]:
        """TensorBoard event files, in the order in which they were started (their names begin with the time)."""
        return tuple(
            path
            for name in sorted(_names(self.path))
            if name.startswith("events.out.tfevents.") and (path := self.file(name)) is not None
        )

    @property
    def checkpoints(self) -> Mapping[int, Path]:
        """Checkpoint files by step (0-based: the step after which they were written), ascending."""
        steps = {}
        for name in _names(self.path / CHECKPOINTS):
            match = re.fullmatch(r"step-(\d{1,15})\.ckpt", name)
            if match:
                path = self.file(f"{CHECKPOINTS}/{name}")
                assert path is not None
                steps[int(match[1])] = path
        return dict(sorted(steps.items()))

    @property
    def renders(self) -> Mapping[str, Path]:
        """Rendered outputs by name relative to the renders' directory, without links.

        Ours lie in `verify/renders/IMAGE/OUTPUT.npy` (lossless float) beside `OUTPUT.png` (for people); where there
        are none, the images in `renders/` of a plain run, as `ns-eval --render-output-path RUN/renders` writes them.
        """
        for folder in (RENDERS, "renders"):
            root = self.path / folder
            if root.is_dir() and not root.is_symlink():
                files = {str(path.relative_to(root)): path for path in sorted(_walk_files(root))}
                files = {n: p for n, p in files.items() if p.suffix.lower() in _IMAGE_SUFFIXES | _ARRAY_SUFFIXES}
                if files:
                    return files
        return {}


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _walk_files(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root, followlinks=False):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                yield path


def _find_runs(path: Path, depth: int) -> Iterator[Path]:
    names = _names(path)
    is_run = CONFIG in names or CHECKPOINTS in names or any(name.startswith("events.out.tfevents.") for name in names)
    if is_run or (path / MANIFEST).exists():
        yield path
    elif depth > 0:
        for name in names:
            child = path / name
            if child.is_dir() and not child.is_symlink():
                yield from _find_runs(child, depth - 1)
