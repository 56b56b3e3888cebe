"""Dense 2D features of the training images: one extractor per kind of features, behind one cache.

A feature type names the kinds that it consists of. Each kind is a map of its own, with its own grid and its own cache.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from f3rm_verify import launch_variables
from f3rm_verify.dataset_view import folder_of
from f3rm_verify.errors import TrainingError
from f3rm_verify.f3rm.features.cache import digest_of, key_of, locked, path_in, read_cache, write_cache

#: What each feature type consists of; a pixel's feature is that of each, one after the other.
FEATURE_TYPES: Mapping[str, tuple[str, ...]] = {
    "DAISY": ("DAISY",),
    "CLIP": ("CLIP",),
    "DINO": ("DINO",),
    "DINOCLIP": ("DINO", "CLIP"),
}

#: Hears what is going on, how many images (or seconds of waiting) are done, and of how many.
Tell = Callable[[str, int, int], object]


class Extractor(Protocol):
    """Computes dense features of one kind."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that decides the features besides the images, as plain data: arguments, weights, libraries, hardware."""
        ...

    @property
    def origin(self) -> Mapping[str, Any]:
        """Where its weights came from, for people; decides nothing."""
        ...

    def batches(self, images: Sequence[Path]) -> Iterator[npt.NDArray[np.float32]]:
        """Features (k, h, w, c) of the images, k after k, in their order; all of one h, w, c."""
        ...


@dataclass(frozen=True)
class FeatureMap:
    """`values` is (n, h, w, c) float32; `digest` that of shape and bytes; `source` is `extracted` or `cache`."""

    kind: str
    values: npt.NDArray[np.float32]
    digest: str
    source: str
    identity: Mapping[str, Any]
    origin: Mapping[str, Any]


def load_or_extract(
    kind: str, extractor: Extractor, images: Sequence[Path], data: Path, *, use_cache: bool, tell: Tell
) -> FeatureMap:
    """The features of `images`, from a cache where there is one for these images and this extractor.

    A launcher says where the caches of its runs are kept, else they are in the dataset's folder; one that is in the
    dataset is used by a launched run, too, where that may share its features. Raises TrainingError for a cache that is
    not what its name says. Whoever else wants the same features meanwhile waits.
    """
    if not use_cache:
        return _extract(kind, extractor, images, tell)
    key = key_of(kind, extractor.identity, images)
    folder = Path(os.environ.get(launch_variables.FEATURE_CACHE) or folder_of(data))
    folders = [folder, folder_of(data)] if os.environ.get(launch_variables.SHARED_FEATURES) else [folder]
    with locked(folder, waiting=lambda seconds: tell("waiting for features", seconds, 0)):
        for path in (path_in(place, kind, key) for place in folders):
            if os.path.lexists(path):
                values, digest = read_cache(path, key, len(images))
                return FeatureMap(kind, values, digest, "cache", extractor.identity, extractor.origin)
        features = _extract(kind, extractor, images, tell)
        write_cache(path_in(folder, kind, key), features.values, key, features.digest)
    return features


def _extract(kind: str, extractor: Extractor, images: Sequence[Path], tell: Tell) -> FeatureMap:
    values, done = np.empty((0, 0, 0, 0), np.float32), 0
    with undisturbed():
        for batch in extractor.batches(images):
            if not done:
                values = np.empty((len(images), *batch.shape[1:]), np.float32)
            if batch.shape[1:] != values.shape[1:]:
                raise TrainingError("f3rm needs images of one size; this dataset has several. Resize or crop them.")
            values[done : done + len(batch)] = batch
            done += len(batch)
            tell("extracting", done, len(images))
    assert done == len(images)
    return FeatureMap(kind, values, digest_of(values), "extracted", extractor.identity, extractor.origin)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, numbers do not depend on the training's flags; its generators and flags are put back afterwards."""
    python, numpy_state = random.getstate(), np.random.get_state()
    precision = torch.get_float32_matmul_precision()
    # Of other devices nothing draws here, and asking for their state would start them.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.random.fork_rng(devices=devices), exact, torch.no_grad():
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            random.setstate(python)
            np.random.set_state(numpy_state)


def versions(*packages: str) -> dict[str, str]:
    """The versions of packages whose numbers may change with them."""
    return {package: metadata.version(package) for package in packages}
