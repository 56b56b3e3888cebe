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
from f3rm_verify.dataset_view import CACHES, folder_of


def allow_paths_in_caches() -> None:
    """Lets torch 2.6 and newer load upstream's caches, which hold paths: without code in them, they are harmless."""
    if hasattr(torch.serialization, "add_safe_globals"):
        kinds = [pathlib.Path, pathlib.PosixPath, pathlib.PurePosixPath, pathlib.WindowsPath, pathlib.PureWindowsPath]
        torch.serialization.add_safe_globals(kinds)


def only_prepares() -> bool:
    """Whether the launcher asked this process for the caches alone."""
    return bool(os.environ.get(launch_variables.PREPARE))


def prepare_data(config: Any, device: Any) -> None:
    """Takes over the caches of the user's dataset, then has the data manager make those that are missing.

    A pipeline without a data manager of its own keeps no cache that is known here.
    """
    datamanager = getattr(config.pipeline, "datamanager", None)
    if datamanager is None:
        return
    adopt_caches(folder_of(Path(os.environ[launch_variables.PREPARE])), folder_of(Path(datamanager.data)))
    datamanager.setup(device=device, test_mode="val", world_size=1, local_rank=0)


def adopt_caches(dataset: Path, view: Path) -> None:
    """Writes each cache of the dataset into its view, as made under the view's paths.

    A cache that cannot be read, or that was made for images in another folder, is left out: its own data manager would
    not use it either.
    """
    for path in sorted(dataset.glob(CACHES)):
        try:
            # As its own data manager loads it: what is trusted is torch's, or the user's, default.
            cache = torch.load(path, map_location="cpu")
            images = [_in_view(Path(name), dataset, view) for name in cache["image_fnames"]]
        except Exception as error:
            print(f"f3rm-verify: the cache {path} is not used ({type(error).__name__}: {error}).", flush=True)
            continue
        torch.save({**cache, "image_fnames": images}, view / path.name)


def _in_view(image: Path, dataset: Path, view: Path) -> Path:
    """The path in the view of an image of the dataset, whatever that is called. Raises ValueError for another's.

    The part below the dataset stays as it is: the data manager compares it letter by letter.
    """
    for parent in image.parents:
        if parent.exists() and parent.samefile(dataset):
            return view / image.relative_to(parent)
    raise ValueError(f"{image} is not in {dataset}")
