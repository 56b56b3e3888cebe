"""Extracted features on disk: found by what decides them, written whole, believed only after they were verified."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from f3rm_verify.errors import TrainingError
from f3rm_verify.files import replacing

#: The layout of the file; one with another is not read.
VERSION = 2
_ENTRIES = ("version", "key", "digest", "features")


def key_of(kind: str, identity: Mapping[str, Any], images: Sequence[Path]) -> str:
    """What decides the features: how they are computed, and the images' content in its order, whatever their names."""
    arguments = json.dumps([VERSION, kind, identity], sort_keys=True)
    state = hashlib.blake2b(arguments.encode(), digest_size=16)
    for image in images:
        state.update(hashlib.blake2b(image.read_bytes(), digest_size=16).digest())
    return state.hexdigest()


def path_in(folder: Path, kind: str, key: str) -> Path:
    """Where the features of a key are. What has another name is not looked at."""
    return folder / f"f3rm_{kind.lower()}_features_{key[:16]}.npz"


def digest_of(values: npt.NDArray[Any]) -> str:
    """A digest of dtype, shape and bytes."""
    state = hashlib.blake2b(f"{values.dtype.str}{values.shape}".encode(), digest_size=16)
    state.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def read_cache(path: Path, key: str, images: int) -> tuple[npt.NDArray[np.float32], str]:
    """The features in a file and their digest. Raises TrainingError for one that does not hold what its name says."""
    entries = _entries(path)
    version, stored_key, stored_digest = (str(entries[name]) for name in _ENTRIES[:3])
    values = entries["features"]
    if version != str(VERSION):
        _refuse(path, f"it has layout {version:.20}, and this version of f3rm-verify reads {VERSION}")
    if stored_key != key:
        _refuse(path, "it was made for other images, arguments, weights or libraries than its name says")
    if values.dtype != np.float32:
        _refuse(path, f"its features are {values.dtype}, not float32")
    if values.ndim != 4 or len(values) != images or 0 in values.shape:
        _refuse(path, f"its features have the shape {values.shape}, not ({images}, h, w, c)")
    if stored_digest != digest_of(values):
        _refuse(path, "its features are not those that were written: their digest is another")
    return values, stored_digest


def _entries(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                _refuse(path, "it is no archive of arrays")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                missing = [name for name in _ENTRIES if name not in archive.files]
                if missing:
                    _refuse(path, f"it holds no {missing[0]}, so it was not written by f3rm-verify")
                entries = {name: archive[name] for name in _ENTRIES}
                if not all(isinstance(value, np.ndarray) for value in entries.values()):
                    _refuse(path, "what it holds is no arrays")
                return entries
    except TrainingError:
        raise
    except PermissionError:
        _refuse(path, "it may not be read")
    except OSError as error:
        _refuse(path, f"it cannot be read ({error.strerror or error})")
    except Exception as error:  # whatever zipfile, zlib and NumPy say of a damaged archive
        _refuse(path, f"it is truncated or damaged ({type(error).__name__}: {' '.join(str(error).split()):.100})")


def _refuse(path: Path, reason: str) -> NoReturn:
    raise TrainingError(f"The feature cache {path} is refused: {reason}. Delete it, and it is made again.")


def write_cache(path: Path, features: npt.NDArray[np.float32], key: str, features_digest: str) -> None:
    """Writes a cache whole or not at all. Where there is no room or no permission, says so: nothing depends on it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file, version=np.array(VERSION), key=np.array(key), digest=np.array(features_digest), features=features
            )
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        print(f"f3rm-verify: the features are not kept in {path} ({error.strerror or error}).", flush=True)


@contextmanager
def locked(folder: Path, *, waiting: Callable[[int], object]) -> Iterator[None]:
    """Inside, no other process is here for the same folder; where it cannot be locked, one may be.

    While another is, `waiting` hears every second how many have passed.
    """
    with ExitStack() as stack:
        with suppress(OSError):  # a dataset that may not be written into, a file system without locks
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            for seconds in itertools.count(1):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    waiting(seconds)
                    time.sleep(1)
        yield
