"""Metrics and renders of every evaluation image, from the model's raw outputs, inside the training process."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.cameras.rays import RayBundle

from f3rm_verify.render_store import check_disk_budget, estimate_bytes, write_outputs
from f3rm_verify.run_dir import RENDERS

#: A method's outputs are not known before it ran; nerfacto with normals has 12 channels besides its features.
_ASSUMED_CHANNELS = 16


def check_render_budget(pipeline: Any, run: Path, budget: float) -> None:
    """Raises TrainingError where the renders would not fit, before anything is trained."""
    cameras = getattr(getattr(pipeline.datamanager, "eval_dataset", None), "cameras", None)
    if cameras is None or not len(cameras):
        return
    height, width = int(cameras.image_height.max()), int(cameras.image_width.max())
    shapes = {f"output_{i}": (height, width, 1) for i in range(_ASSUMED_CHANNELS)}
    check_disk_budget(run, estimate_bytes(shapes, len(cameras)), int(budget))


def evaluate(pipeline: Any, run: Path, *, progress: Callable[[int, int], object]) -> dict[str, Any]:
    """Renders every evaluation image into the run's evidence and returns the metrics, as RunDir.metrics describes.

    `progress` is told how many images are done, and of how many.
    """
    datamanager, model = pipeline.datamanager, pipeline.model
    split = getattr(datamanager, "test_split", "val")
    loader = getattr(datamanager, "fixed_indices_eval_dataloader", None)
    if loader is None:
        reason = "this data manager has no loader of evaluation images"
        return {"split": split, "images": {}, "mean": {}, "unavailable": {"*": reason}}
    images: dict[str, dict[str, float]] = {}
    pipeline.eval()
    for index, (view, batch) in enumerate(loader):
        name = f"eval_{index:04d}"
        outputs = _outputs(model, view)
        images[name] = {
            key: float(value) for key, value in model.get_image_metrics_and_images(outputs, batch)[0].items()
        }
        write_outputs(run / RENDERS, name, {key: _array(value) for key, value in outputs.items() if _is_image(value)})
        progress(index + 1, len(loader))
    pipeline.train()
    unavailable = {}
    without_lpips = getattr(getattr(model, "lpips", None), "unavailable_because", None)
    if without_lpips is not None:
        unavailable["lpips"] = without_lpips
        for metrics in images.values():
            metrics.pop("lpips", None)
    names = sorted({key for metrics in images.values() for key in metrics})
    mean = {key: math.fsum(metrics[key] for metrics in images.values()) / len(images) for key in names}
    return {"split": split, "images": images, "mean": mean, "unavailable": unavailable}


def _outputs(model: Any, view: Any) -> Any:
    """What the model puts out for an image, of which loaders give the rays before nerfstudio 1.0, then the camera."""
    if isinstance(view, RayBundle):
        return model.get_outputs_for_camera_ray_bundle(view)
    return model.get_outputs_for_camera(camera=view)


def _is_image(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim in (2, 3)


def _array(value: torch.Tensor) -> np.ndarray[Any, Any]:
    value = value.detach().cpu()
    return value.float().numpy() if value.dtype is torch.bfloat16 else value.numpy()
