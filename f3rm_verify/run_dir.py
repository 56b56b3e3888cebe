"""The only module that knows the names of files in a run directory.

A nerfstudio run directory `OUT/EXPERIMENT/METHOD/TIMESTAMP/` holds `config.yml`, `dataparser_transforms.json`,
`events.out.tfevents.*` and `nerfstudio_models/step-%09d.ckpt`. This package adds `verify/` (the evidence). A run
directory is untrusted: nothing in it is executed, and names that lead outside of it are refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from f3rm_verify.errors import UnreadableError, UsageError
from f3rm_verify.readers.json_file import parse_json
from f3rm_verify.readers.plain_file import read_plain

if TYPE_CHECKING:
    from f3rm_verify.readers.events import Events
    from f3rm_verify.readers.trace import Trace

EVIDENCE = "verify"
MANIFEST = f"{EVIDENCE}/manifest.json"
SEEDING = f"{EVIDENCE}/seeding.json"
TRACE = f"{EVIDENCE}/trace.json"
TRACE_RECORDS = f"{EVIDENCE}/trace.bin"
METRICS = f"{EVIDENCE}/metrics.json"
STATUS = f"{EVIDENCE}/status.json"
#: What steps took with and without each measure, where costs were measured instead of training.
COST = f"{EVIDENCE}/cost.json"
#: What steps that were executed again gave, and the operators that they called.
EXPLAIN = f"{EVIDENCE}/explain.json"
OPERATORS = f"{EVIDENCE}/operators"
#: The whole state of the training before some of its steps.
SNAPSHOTS = f"{EVIDENCE}/snapshots"
RENDERS = f"{EVIDENCE}/renders"
#: Run directories of the ranks above 0, by rank; rank 0's is the run directory itself.
RANKS = f"{EVIDENCE}/ranks"
CONFIG = "config.yml"
TRANSFORMS = "dataparser_transforms.json"
CHECKPOINTS = "nerfstudio_models"

#: Of the manifest. What another version wrote can mean something else, so it is not read.
EVIDENCE_VERSION = 1
#: JSON of a run directory larger than this is refused: the largest we write is the manifest, some MiB. Python takes
#: 25 times as much for it.
MAX_JSON_BYTES = 32 * 2**20
#: How deep the folders of renders may lie in each other; ours are one deep.
_MAX_FOLDERS = 16
_EVENT_FILE = "events.out.tfevents."
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".exr"}
_ARRAY_SUFFIXES = {".npy"}
#: How far below a given directory the run directory may lie: OUT/EXPERIMENT/METHOD/TIMESTAMP is 3 below OUT.
_SEARCH_DEPTH = 3


@dataclass(frozen=True)
class RunDir:
    """One run directory, as it is when it is first looked at.

    Properties are empty where there is nothing, and raise UnreadableError where it is broken.
    """

    path: Path

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """The run directory at `path`, or the only one up to three levels below it.

        Raises UsageError where there is none, or more than one.
        """
        if not path.is_dir():
            what = "is not a directory" if path.exists() else "does not exist"
            raise UsageError(f"{path} {what}; give the directory of a nerfstudio run (it holds {CONFIG}).")
        try:
            found = sorted(_find_runs(path, _SEARCH_DEPTH))
        except UnreadableError as error:
            raise UsageError(f"{path} cannot be searched for a run: {error}") from error
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
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:  # that it cannot be seen does not mean that it is not there
            raise UnreadableError(f"{relative}: not readable ({error.strerror or error}).") from error
        root = self.path.resolve()
        try:
            resolved = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise UnreadableError(f"{relative}: a link that leads nowhere ({error}).") from error
        if root not in (resolved, *resolved.parents):
            raise UnreadableError(f"{relative}: a link that leads out of the run directory, to {resolved}.")
        return path

    def _json(self, relative: str) -> Any:
        """The plain data in a JSON file; `_ABSENT` where there is no such file."""
        path = self.file(relative)
        if path is None:
            return _ABSENT
        try:
            text = read_plain(path, limit=MAX_JSON_BYTES).decode("utf8")
            data = parse_json(text, finite=False)
            if "\\u" in text:  # an escape can name half of a character, which no report could write
                json.dumps(data, ensure_ascii=False).encode("utf8")
            return data
        except ValueError as error:
            raise UnreadableError(f"{relative}: not readable as JSON ({error}).") from error

    def _json_object(self, relative: str) -> Mapping[str, Any] | None:
        data = self._json(relative)
        if data is _ABSENT:
            return None
        if not isinstance(data, dict):
            raise UnreadableError(f"{relative}: holds {type(data).__name__}, not an object.")
        return data

    @cached_property
    def manifest(self) -> Mapping[str, Any] | None:
        """What our trainer wrote about the run; None for a plain run."""
        manifest = self._json_object(MANIFEST)
        if manifest is not None and manifest.get("schema_version") != EVIDENCE_VERSION:
            raise UnreadableError(
                f"{MANIFEST}: has schema_version {str(manifest.get('schema_version'))[:20]!r}, and this version of "
                f"f3rm-verify reads {EVIDENCE_VERSION}; compare with the version that wrote it."
            )
        return manifest

    @cached_property
    def seeding(self) -> Mapping[str, Any] | None:
        """The seeding validation log: `entries` (one per claim) and `lines` (as printed); None for a plain run."""
        return self._json_object(SEEDING)

    @cached_property
    def trace(self) -> Trace | None:
        """What the training did, step by step, as digests; None where no trace was recorded."""
        from f3rm_verify.readers.trace import read_trace

        head = self._json_object(TRACE)
        return None if head is None else read_trace(head, self.file(TRACE_RECORDS))

    @cached_property
    def metrics(self) -> Mapping[str, Any] | None:
        """Metrics of the evaluation images.

        Ours: `{"split": str, "images": {name: {metric: value}}, "mean": {metric: value}, "unavailable": {metric:
        reason}}`. The file that `ns-eval --output-path` wrote into the run directory (the `*.json` with `results`) is
        brought into this form with no `images`.
        """
        ours = self._json_object(METRICS)
        if ours is not None:
            return ours
        names = sorted(name for name in _names(self.path) if name.endswith(".json") and name != TRANSFORMS)
        found = {name: data for name in names if isinstance(data := self._json(name), dict) and "results" in data}
        if len(found) > 1:
            raise UnreadableError(f"{', '.join(found)}: several results of ns-eval; leave the one that is meant.")
        for data in found.values():
            return {"split": "as ns-eval chose", "images": {}, "mean": data["results"], "unavailable": {}}
        return None

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """`config.yml` as plain data, Python tags kept as names and never constructed; None where there is none."""
        from f3rm_verify.readers.config import read_config

        path = self.file(CONFIG)
        if path is None:
            return None
        config = read_config(path)
        if not isinstance(config, dict):
            raise UnreadableError(f"{CONFIG}: holds {type(config).__name__}, not the configuration of a training.")
        return config

    @cached_property
    def transforms(self) -> Mapping[str, Any] | None:
        """`dataparser_transforms.json`; None where there is none."""
        return self._json_object(TRANSFORMS)

    @cached_property
    def events(self) -> Events:
        """Everything in the TensorBoard event files together; what could not be read is in `Events.problems`."""
        from f3rm_verify.readers.events import read_events

        return read_events(self.event_files)

    @cached_property
    def event_files(self) -> tuple[Path, ...]:
        """TensorBoard event files, in the order in which they were started (their names begin with the time)."""
        folder = self._configured_folder("logging", "relative_log_dir", ".")
        names = sorted(name for name in _names(self.path / folder) if name.startswith(_EVENT_FILE))
        return tuple(path for name in names if (path := self.file(f"{folder}/{name}")) is not None)

    @cached_property
    def checkpoints(self) -> Mapping[int, Path]:
        """Checkpoint files by step (0-based: the step after which they were written), ascending."""
        folder = self._configured_folder(None, "relative_model_dir", CHECKPOINTS)
        steps: dict[int, Path] = {}
        for name in _names(self.path / folder):
            match = re.fullmatch(r"step-(\d{1,15})\.ckpt", name)
            path = self.file(f"{folder}/{name}") if match else None
            if match and path is not None and steps.setdefault(int(match[1]), path) is not path:
                raise UnreadableError(f"{folder}: holds two checkpoints of step {int(match[1])}.")
        return dict(sorted(steps.items()))

    @cached_property
    def renders(self) -> Mapping[str, Path]:
        """Rendered outputs by name relative to the renders' directory.

        Ours lie in `verify/renders/IMAGE/OUTPUT.npy` (lossless float) beside `OUTPUT.png` (for people); where there
        are none, the images in `renders/` of a plain run, as `ns-eval --render-output-path RUN/renders` writes them.
        Raises UnreadableError for a folder that is a link or cannot be listed: left out, it would not be compared.
        """
        for folder in (RENDERS, "renders"):
            root = self.file(folder)
            if root is not None:
                files = {str(path.relative_to(root)): path for path in sorted(_walk_files(root, folder))}
                files = {n: p for n, p in files.items() if p.suffix.lower() in _IMAGE_SUFFIXES | _ARRAY_SUFFIXES}
                if files:
                    return files
        return {}

    @cached_property
    def ranks(self) -> Mapping[int, RunDir]:
        """The run directories of the ranks above 0, by rank; UnreadableError for links, which could lead back."""
        root = self.file(RANKS)
        if root is None:
            return {}
        if any((root / name).is_symlink() for name in (".", *_names(root))):
            raise UnreadableError(f"{RANKS}: holds a link.")
        names = [name for name in _names(root) if re.fullmatch(r"[1-9]\d{0,5}", name)]
        return {int(name): RunDir(path) for name in sorted(names, key=int) if (path := self.file(f"{RANKS}/{name}"))}

    @cached_property
    def recorded(self) -> frozenset[str]:
        """The artefacts of which there is anything here, also where it is broken."""
        evidence: Mapping[str, Callable[[], object]] = {
            "setup": lambda: self.file(CONFIG) or self.file(MANIFEST),
            "seeding": lambda: self.file(SEEDING),
            "trace": lambda: self.file(TRACE) or self.file(TRACE_RECORDS),
            "curves": lambda: self.event_files,
            "metrics": lambda: self.metrics is not None,
            "checkpoints": lambda: self.checkpoints,
            "renders": lambda: self.renders,
        }
        return frozenset(artefact for artefact, look in evidence.items() if _is_there(look))

    def _configured_folder(self, section: str | None, key: str, default: str) -> str:
        """A folder that config.yml names relative to the run directory; `default` where it does not."""
        try:
            config: Any = self.config or {}
        except UnreadableError:
            config = {}
        values = config if section is None else config.get(section)
        folder = values.get(key) if isinstance(values, dict) else None
        if not isinstance(folder, str):
            return default
        path = PurePosixPath(folder)
        if path.is_absolute() or ".." in path.parts or not folder.isprintable():
            raise UnreadableError(f"{CONFIG}: {key} leads out of the run directory, to {folder[:100]!r}.")
        return str(path)


_ABSENT: Any = object()


def _is_there(look: Callable[[], object]) -> bool:
    try:
        return bool(look())
    except UnreadableError:
        return True


def _names(folder: Path) -> list[str]:
    """What is in a folder; nothing where there is none."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableError(f"{folder.name}: its files cannot be listed ({error.strerror or error}).") from error


def _walk_files(root: Path, name: str) -> Iterator[Path]:
    """Every file below `root`, which is called `name`; UnreadableError for a folder that is a link or cannot be listed.

    Links to files are among them: whoever reads one has `RunDir.file` refuse it where it leads out of the run.
    """

    def stop(error: OSError) -> NoReturn:
        raise UnreadableError(f"{name}: its files cannot be listed ({error.strerror or error}).") from error

    if root.is_symlink() or not root.is_dir():
        raise UnreadableError(f"{name}: not a folder, or a link.")
    for folder, folders, files in os.walk(root, onerror=stop):
        if len(Path(folder).parts) - len(root.parts) > _MAX_FOLDERS:
            raise UnreadableError(f"{name}: folders lie more than {_MAX_FOLDERS} deep in each other.")
        for path in (Path(folder, item) for item in folders):
            if path.is_symlink():
                raise UnreadableError(f"{name}/{path.relative_to(root)}: a link to a folder.")
        yield from (Path(folder, item) for item in files)


def _find_runs(path: Path, depth: int) -> Iterator[Path]:
    names = _names(path)
    is_run = CONFIG in names or CHECKPOINTS in names or any(name.startswith(_EVENT_FILE) for name in names)
    if is_run or (path / MANIFEST).exists():
        yield path
    elif depth > 0:
        for name in names:
            child = path / name
            if child.is_dir() and not child.is_symlink():
                yield from _find_runs(child, depth - 1)
