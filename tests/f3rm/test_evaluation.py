"""The evaluation with the loaders of old and new versions of nerfstudio."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]


class Pipeline:
    """A pipeline whose model says which of its methods was called, by the value of its depth."""

    def __init__(self, loader: Any) -> None:
        self.datamanager = SimpleNamespace(fixed_indices_eval_dataloader=loader)
        self.model = self
        self.modes: list[str] = []

    def eval(self) -> None:
        self.modes.append("eval")

    def train(self) -> None:
        self.modes.append("train")

    def get_outputs_for_camera(self, camera: Any) -> dict[str, Any]:
        return self.outputs(1.0)

    def get_outputs_for_camera_ray_bundle(self, bundle: Any) -> dict[str, Any]:
        return self.outputs(2.0)

    def outputs(self, value: float) -> dict[str, Any]:
        import torch

        return {"depth": torch.full((4, 4, 1), value)}

    def get_image_metrics_and_images(self, outputs: Any, batch: Any) -> tuple[dict[str, float], dict[str, Any]]:
        return {"psnr": outputs["depth"].mean() + batch}, {}


@pytest.mark.parametrize("rays", [True, False])
def test_loaders_give_rays_or_cameras(tmp_path: Path, rays: bool) -> None:
    import numpy as np
    import torch
    from nerfstudio.cameras.cameras import Cameras
    from nerfstudio.cameras.rays import RayBundle

    from f3rm_verify.f3rm.evaluation import evaluate

    ones = torch.ones(4, 4, 3)
    view: Any = RayBundle(origins=ones, directions=ones, pixel_area=ones[..., :1])
    if not rays:
        view = Cameras(torch.eye(4)[None, :3], fx=1.0, fy=1.0, cx=1.0, cy=1.0)
    pipeline = Pipeline([(view, 10.0), (view, 20.0)])
    metrics = evaluate(pipeline, tmp_path, progress=lambda done, images: None)
    value = 2.0 if rays else 1.0
    assert metrics["images"] == {"eval_0000": {"psnr": value + 10}, "eval_0001": {"psnr": value + 20}}
    assert (np.load(tmp_path / "verify" / "renders" / "eval_0001" / "depth.npy") == value).all()
    assert pipeline.modes == ["eval", "train"]
