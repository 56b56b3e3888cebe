"""Dense 2D features of the training images: one extractor per feature type, behind one cache.

A new feature type is one entry of `EXTRACTORS`: a function from image files to a float32 array, and the arguments that
identify what it computes. Nothing else in the project knows which types exist.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from f3rm_verify import launch_variables
from f3rm_verify.dataset_view import folder_of
from f3rm_verify.errors import TrainingError
from f3rm_verify.f3rm.features.daisy import DaisyExtractor
from f3rm_verify.files import replacing


class Extractor(Protocol):
    """Computes dense features; a frozen dataclass whose fields are the arguments that identify what it computes."""

    def extract(self, images: Sequence[Path]) -> npt.NDArray[np.float32]:
        """Features (n, h, w, c) of n images of one size, in their order. Must not draw from any global generator."""
        ...


EXTRACTORS: Mapping[str, Extractor] = {"DAISY": DaisyExtractor()}


@dataclass(frozen=True)
class Features:
    """`values` is (n, h, w, c) float32; `digest` that of shape and bytes; `source` is `extracted` or `cache`."""

    values: npt.NDArray[np.float32]
    digest: str
    source: str


def load_or_extract(feature_type: str, images: Sequence[Path], data: Path, *, use_cache: bool) -> Features:
    """The features of `images`, from the cache in the dataset's folder (or the launcher's) where it fits.

    The cache is keyed by the images' content and order and by the extractor's arguments, written atomically, and
    verified by its digest on reading. Raises TrainingError for a cache that is broken, naming the file.
    """
    extractor = EXTRACTORS[feature_type]
    key = _key(feature_type, extractor, images)
    folder = Path(os.environ.get(launch_variables.FEATURE_CACHE) or folder_of(data))
    path = folder / f"f3rm_{feature_type.lower()}_features_{key[:16]}.npz"
    if use_cache and path.exists():
        return _read_cache(path, key)
    values = extractor.extract(images)
    features = Features(values, digest(values), "extracted")
    if use_cache:
        _write_cache(path, features, key)
    return features


def digest(values: npt.NDArray[Any]) -> str:
    """A digest of dtype, shape and bytes."""
    head = f"{values.dtype.str}{values.shape}".encode()
    return hashlib.blake2b(head + np.ascontiguousarray(values).tobytes(), digest_size=16).hexdigest()


def _key(feature_type: str, extractor: Extractor, images: Sequence[Path]) -> str:
    arguments = json.dumps([feature_type, asdict(extractor)], sort_keys=True)  # type: ignore[call-overload]
    state = hashlib.blake2b(arguments.encode(), digest_size=16)
    for image in images:
        state.update(hashlib.blake2b(image.read_bytes(), digest_size=16).digest())
    return state.hexdigest()


def _read_cache(path: Path, key: str) -> Features:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as cache:
            values, stored_key, stored_digest = cache["features"], str(cache["key"]), str(cache["digest"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise TrainingError(f"The feature cache {path} cannot be read ({error}); delete it.") from error
    if stored_key != key or stored_digest != digest(values):
        raise TrainingError(f"The feature cache {path} does not hold what its name says; delete it.")
    return Features(np.asarray(values, dtype=np.float32), stored_digest, "cache")


def _write_cache(path: Path, features: Features, key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, features=features.values, key=np.array(key), digest=np.array(features.digest))
