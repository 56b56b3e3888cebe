"""The file of a baseline: what one training put out, what it was asked for, and the environment that this holds for."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f3rm_verify import __version__
from f3rm_verify.errors import UnreadableError, UsageError
from f3rm_verify.files import replacing
from f3rm_verify.ns_train import extra_arguments
from f3rm_verify.policy import Policy
from f3rm_verify.policy_file import read_policy
from f3rm_verify.readers.config import flatten
from f3rm_verify.readers.json_file import JsonFileKind
from f3rm_verify.recorded_run import Data, RecordedRun, digest_bytes, record_run, table_of
from f3rm_verify.run_dir import RunDir
from f3rm_verify.scene import SCENE_NAME

BASELINE_VERSION = 1
#: A baseline of 1000 steps has some 100 KiB.
_KIND = JsonFileKind(what="baseline", remedy="make one with f3rm-verify baseline record", max_bytes=64 * 2**20)
#: The packages whose version can change a number (patterns as in fnmatch); the code under test is not among them.
PACKAGES = (
    "f3rm",
    "f3rm-verify",
    "gsplat",
    "intel-openmp",
    "mkl",
    "nerfacc",
    "nerfstudio",
    "numpy",
    "nvidia-*",
    "open-clip-torch",
    "opencv-python*",
    "pillow",
    "scikit-image",
    "scipy",
    "timm",
    "tinycudann",
    "torch",
    "torchmetrics",
    "torchvision",
    "transformers",
    "triton",
    "xformers",
)
#: Environment variables of a manifest that change no number, or whose effect is recorded elsewhere.
_OTHER_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "GOMP_SPINCOUNT",
    "MALLOC_*",
    "NERFSTUDIO_METHOD_CONFIGS",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "PYTHONHASHSEED",
    "TCNN_SEED",
)
#: Settings that name places and times, or how a training is watched, by dotted path (patterns as in fnmatch).
_PLACES = ("data", "*.data", "experiment_name", "load_*", "output_dir", "timestamp", "viewer.websocket_port*")
#: The claim of the seeding log that names libraries and the kernels that they choose.
_LIBRARIES = "libraries"
#: What a training puts out; a baseline without any of it can be compared with nothing.
_OUTPUTS = ("trace", "curves", "metrics", "checkpoints", "renders")


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A baseline as it was read. `runs` is how many equal runs it was recorded from."""

    path: Path
    document: Data
    policy: Policy

    @property
    def run(self) -> RecordedRun:
        """What it holds of the run, to compare with."""
        return RecordedRun(self.path, self.document, table_of(self.document["artefacts"]))

    @property
    def request(self) -> Data:
        """What to train: method, seed, iters, arguments, load_config (a digest), data (see `data_of`)."""
        return table_of(self.document["request"])

    @property
    def runs(self) -> int:
        """How many equal runs it was recorded from."""
        return int(self.document["run"]["runs"])

    @property
    def trace_mode(self) -> str:
        """What to record of every step, so that it can be compared."""
        trace = self.document["artefacts"]["trace"]
        return "off" if trace is None else str(trace["mode"])

    @property
    def data(self) -> Path | None:
        """The dataset by the path in the file, None where that holds none, as for the built-in scene."""
        relative = self.request["data"]
        return None if relative is None else self.path.parent / str(relative)


def make_baseline(run: RunDir, file: Path, *, policy: Policy, runs: int, data: Path | None = None) -> dict[str, Any]:
    """What `file` is to hold of `run`, one of `runs` equal ones on `data` (None where that is not known).

    Raises UsageError for a run that nothing can be compared with.
    """
    try:
        manifest, artefacts = run.manifest, record_run(run, policy=policy)
    except (UnreadableError, OSError) as error:
        raise UsageError(f"{run.path} cannot be recorded: {error}") from error
    if manifest is None:
        raise UsageError(
            f"{run.path} has no manifest, so nobody knows in which environment it was made; record a run that "
            "f3rm-verify trained."
        )
    if not any(artefacts[name] for name in _OUTPUTS):
        raise UsageError(f"{run.path} holds nothing that a training puts out; there is nothing to record.")
    conditions = conditions_of(run)
    if not conditions["data"]["files"]:
        raise UsageError(f"{run.path} has no digests of its data, so nobody could tell whether another run has others.")
    built_in_scene = Path(str(data or _entry(manifest, "data", "folder"))).name == SCENE_NAME
    document = {
        "schema_version": BASELINE_VERSION,
        "tool": {"name": "f3rm-verify", "version": __version__},
        "request": {
            **conditions.pop("request"),
            "iters": _entry(manifest, "completion", "steps"),
            "built_in_scene": built_in_scene,
            "data": None if data is None or built_in_scene else _relative(data, file),
        },
        "run": {
            "run_id": manifest.get("run_id"),
            "runs": runs,
            "commit": _entry(manifest, "environment", "git", "commit"),
            **{key: manifest.get(key) for key in ("completion", "parameters", "implementation", "encodings")},
        },
        **conditions,
        "policy": policy_table(policy),
        "artefacts": artefacts,
    }
    return {**document, "digest": _digest(document)}


def write_baseline(file: Path, document: Mapping[str, Any]) -> None:
    """Writes the file whole; raises UsageError where it cannot be written."""
    text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
    try:
        if file.exists() and not file.is_file():
            raise UsageError(f"{file} is no plain file, so no baseline can replace it; name another file.")
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(text, "ascii")
    except OSError as error:
        raise UsageError(f"{file} cannot be written ({error.strerror or error}); name another file.") from error


def read_baseline(file: Path) -> Baseline:
    """The baseline in `file`; raises UsageError for every file that `write_baseline` did not write as it is."""
    document = _KIND.read(file)
    if not isinstance(document, dict):
        raise _KIND.refused(file, f"it holds {type(document).__name__}, not an object")
    try:
        if document["schema_version"] != BASELINE_VERSION:
            raise ValueError(f"schema_version is not {BASELINE_VERSION}; record it again with this version")
        written = document.pop("digest")
        if written != _digest(document):
            raise ValueError("it was changed after it was recorded: its digest does not fit; record it again")
        policy = read_policy(document["policy"], default=Policy(), source=str(file))
        _check_request(document["request"])
        baseline = Baseline(path=file, document=document, policy=policy)
        baseline.run.check()
        for part in ("environment", "data", "config"):
            table_of(document[part])
        if not any(baseline.run.artefacts[name] for name in _OUTPUTS) or baseline.runs < 1:
            raise ValueError("it records nothing that a training puts out")
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, AttributeError, MemoryError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise _KIND.refused(file, reason) from error
    return baseline


def conditions_of(run: RunDir) -> dict[str, Any]:
    """What a run was asked for, made on and made from: `request`, `environment`, `data`, `config`; each a table."""
    manifest = run.manifest or {}
    arguments = [word for word in _list(manifest.get("argv")) if isinstance(word, str)]
    return {
        "request": {
            "method": manifest.get("method"),
            "seed": manifest.get("seed"),
            "ranks": manifest.get("world_size"),
            "arguments": list(extra_arguments(arguments)),
            "load_config": _entry(manifest, "load_config", "digest"),
        },
        "environment": _environment(run, manifest),
        "data": {
            "files": _entry(manifest, "data", "files"),
            "features": _entry(manifest, "data", "features", "digest"),
        },
        "config": {name: value for name, value in flatten(run.config or {}).items() if not _matches(name, _PLACES)},
    }


def policy_table(policy: Policy) -> dict[str, Any]:
    """The policy as `read_policy` reads it."""
    plain = policy.to_dict()
    table = {"ignore": plain["ignored"], "limits": plain["limits"]}
    return table if policy.required is None else {**table, "required": list(policy.required)}


def _environment(run: RunDir, manifest: Data) -> dict[str, Any]:
    environment = manifest.get("environment")
    environment = environment if isinstance(environment, Mapping) else {}
    hardware = environment.get("hardware") or {}
    packages = {str(name).lower().replace("_", "-"): version for name, version in _items(environment.get("packages"))}
    variables = {
        name: _without_folders(value)
        for name, value in _items(environment.get("variables"))
        if not _matches(name, _OTHER_VARIABLES)
    }
    return {
        "python": ".".join(str(environment.get("python")).split(".")[:2]),
        "platform": _platform(str(environment.get("platform"))),
        "hardware": {key: value for key, value in _items(hardware) if key != "cores"},
        "threads": environment.get("threads"),
        "packages": {name: version for name, version in packages.items() if _matches(name, PACKAGES)},
        "variables": variables,
        "libraries": _libraries(run),
        "implementation": manifest.get("implementation"),
        "encodings": manifest.get("encodings"),
    }


def _platform(text: str) -> str:
    """System, processor and C library of what platform.platform() says; not the kernel, which computes nothing."""
    processor = re.search(r"x86_64|AMD64|aarch64|arm64", text)
    library = re.search(r"(?:glibc|musl|libc)[\d.]*$", text)
    return " ".join(part for part in (text.split("-")[0], processor and processor[0], library and library[0]) if part)


def _libraries(run: RunDir) -> str | None:
    claims = _list((run.seeding or {}).get("entries"))
    found = (claim for claim in claims if isinstance(claim, Mapping) and claim.get("claim") == _LIBRARIES)
    return next((str(claim.get("observed")) for claim in found), None)


def _without_folders(value: Any) -> str:
    return re.sub(r"/[^:;,\s]*/", "", str(value))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _entry(data: Any, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _relative(data: Path, file: Path) -> str | None:
    """The dataset as seen from the baseline's file, where both are in the working directory; else it must be given."""
    here = Path.cwd()
    inside = all(path.resolve().is_relative_to(here) for path in (data, file))
    return Path(os.path.relpath(data.resolve(), file.resolve().parent)).as_posix() if inside else None


def _digest(document: Mapping[str, Any]) -> str:
    return digest_bytes(json.dumps(document, sort_keys=True, allow_nan=False, separators=(",", ":")).encode())


def _check_request(request: Any) -> None:
    table = table_of(request)
    kinds = {"method": str, "seed": int, "iters": int, "ranks": int, "built_in_scene": bool, "arguments": list}
    for key, kind in kinds.items():
        if type(table[key]) is not kind:
            raise TypeError(f"its request has no {key}")
    if not all(isinstance(word, str) for word in table["arguments"]):
        raise TypeError("an argument of its request is no text")
    if not (0 <= table["seed"] < 2**32 and 0 < table["iters"] < 2**40):
        raise ValueError("its request has a seed or a number of steps that cannot be")
    for key in ("data", "load_config"):
        if not (table[key] is None or isinstance(table[key], str)):
            raise TypeError(f"its request has no {key}")
