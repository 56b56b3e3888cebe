"""What a training consists of, for the manifest: its classes, its encodings, its data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from f3rm_verify.dataset_view import folder_of
from f3rm_verify.f3rm.features import FeatureMap
from f3rm_verify.recorder import digest_files, digest_tensors


def implementation(config: Any) -> dict[str, str]:
    """Which classes make up the training: trainer, pipeline, data manager, model."""
    parts = {"trainer": config, "pipeline": config.pipeline}
    for name in ("datamanager", "model"):
        if hasattr(config.pipeline, name):
            parts[name] = getattr(config.pipeline, name)
    return {name: _class_name(part._target) for name, part in parts.items()}


def _class_name(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def extensions(model: torch.nn.Module) -> list[str]:
    """The packages of CUDA kernels outside of torch that the code of a model's modules names."""
    classes = {part for module in model.modules() for part in type(module).__mro__}
    # nerfstudio's own samplers and renderers name nerfacc for the methods that use it, in every method.
    shared = ("torch.", "nerfstudio.model_components.")
    sources = {part.__module__ for part in classes if not part.__module__.startswith(shared)}
    named = {
        str(getattr(value, "__module__", None) or getattr(value, "__name__", "")).partition(".")[0]
        for source in sources
        for value in vars(sys.modules.get(source, object)).values()
    }
    return sorted(named & {"gsplat", "nerfacc", "tinycudann"})


def data_digests(datamanager: Any) -> dict[str, Any]:
    """A digest of every image and of the file with the poses, the order of the images, and a digest of the features."""
    images: dict[str, list[Path]] = {}
    for split in ("train", "eval"):
        dataset = getattr(datamanager, f"{split}_dataset", None)
        images[split] = [Path(name) for name in getattr(dataset, "image_filenames", None) or []]
    data = Path(datamanager.get_datapath())
    poses = sorted(data.glob("*.json")) if data.is_dir() else [data]
    names = [path for path in dict.fromkeys([*poses, *images["train"], *images["eval"]]) if path.is_file()]
    digests = {os.path.relpath(name, folder_of(data)): value for name, value in digest_files(names).items()}
    return {
        "folder": str(data),
        "files": digests,
        "order": {split: [os.path.relpath(name, folder_of(data)) for name in found] for split, found in images.items()},
        "features": _features(datamanager),
    }


def _features(datamanager: Any) -> dict[str, Any] | None:
    """The digest of all features, and of each kind what computed it."""
    maps = getattr(datamanager, "features", None)
    if not (isinstance(maps, tuple) and maps and all(isinstance(one, FeatureMap) for one in maps)):
        return _foreign_features(datamanager)
    return {
        "digest": "+".join(one.digest for one in maps),
        "source": ", ".join(dict.fromkeys(one.source for one in maps)),
        "kinds": {
            one.kind: {"digest": one.digest, "shape": list(one.values.shape), **one.identity, "origin": one.origin}
            for one in maps
        },
    }


def _foreign_features(datamanager: Any) -> dict[str, str] | None:
    """The features of upstream F3RM's data manager, which holds them as tensors of one split each."""
    tensors = {name: getattr(datamanager, name, None) for name in ("train_features", "eval_features")}
    found = [(name, value) for name, value in tensors.items() if isinstance(value, torch.Tensor)]
    return {"digest": digest_tensors(found), "source": "the data manager's own"} if found else None
