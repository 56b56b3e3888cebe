"""The feature caches of another package's data manager: made once, before both runs, where both find them.

Upstream F3RM keeps them in the dataset's folder, valid for the very image paths under which they were made. Extracting
draws from the generators before the model is built, so a run that extracts and one that does not are two trainings.
"""

from __future__ import annotations

import os
import pathlib
from pathlib import Path
from typing import Any

import torch

from f3rm_verify import launch_variables
from f3rm_verify.dataset_view import CACHES


def allow_paths_in_caches() -> None:
    """Lets torch 2.6 and newer load upstream's caches, which hold paths: without code in them, they are harmless."""
    if hasattr(torch.serialization, "add_safe_globals"):
        kinds = [pathlib.Path, pathlib.PosixPath, pathlib.PurePosixPath, pathlib.WindowsPath, pathlib.PureWindowsPath]
        torch.serialization.add_safe_globals(kinds)


def only_prepares() -> bool:
    """Whether the launcher asked this process for the caches alone."""
    return bool(os.environ.get(launch_variables.PREPARE))


def prepare_data(config: Any, device: Any) -> None:
    """Takes over the caches of the user's dataset, then has the data manager make those that are missing."""
    view = Path(config.pipeline.datamanager.data)
    adopt_caches(Path(os.environ[launch_variables.PREPARE]), view if view.is_dir() else view.parent)
    config.pipeline.datamanager.setup(device=device, test_mode="val", world_size=1, local_rank=0)


def adopt_caches(dataset: Path, view: Path) -> None:
    """Writes each cache of the dataset into its view, as made under the view's paths.

    A cache that cannot be read, or whose images are not those of the dataset, is left out, and so extracted anew.
    """
    for path in sorted(dataset.glob(CACHES)):
        try:
            cache = torch.load(path, map_location="cpu", weights_only=True)
            images = [_in_view(Path(name), dataset, view) for name in cache["image_fnames"]]
        except Exception as error:
            print(f"f3rm-verify: the cache {path} is not used ({type(error).__name__}: {error}).", flush=True)
            continue
        torch.save({**cache, "image_fnames": images}, view / path.name)


def _in_view(image: Path, dataset: Path, view: Path) -> Path:
    """The place in the view of an image of the dataset, however its path began. Raises LookupError for another's."""
    for start in range(len(image.parts)):
        relative = Path(*image.parts[start:])
        if not relative.is_absolute() and (dataset / relative).is_file():
            return view / relative
    raise LookupError(f"{image} is no image of this dataset")
