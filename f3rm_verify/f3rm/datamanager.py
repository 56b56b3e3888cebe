"""Rays, pixels and, nearest-neighbour-sampled, the dense features that the feature field is distilled from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from f3rm_verify.errors import TrainingError
from f3rm_verify.f3rm.features import Features, load_or_extract
from f3rm_verify.f3rm.pca import fit_colour_projection


@dataclass
class FeatureDataManagerConfig(VanillaDataManagerConfig):
    """Rays of all training images, with features."""

    _target: type = field(default_factory=lambda: FeatureDataManager)
    feature_type: Literal["DAISY"] = "DAISY"
    """Which dense features to distil."""
    enable_cache: bool = True
    """Keep extracted features in the dataset's folder, keyed by the images' content and the extractor's arguments."""


class FeatureDataManager(VanillaDataManager):
    """Adds `feature`, (rays, c) float32, to every batch.

    Pixel (y, x) gets the feature at (floor(y * h / H), floor(x * w / W)) of its image's (h, w) feature map.
    """

    config: FeatureDataManagerConfig
    features: Features

    def __init__(self, config: FeatureDataManagerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        assert self.train_dataset is not None and self.eval_dataset is not None
        images = [Path(name) for name in (*self.train_dataset.image_filenames, *self.eval_dataset.image_filenames)]
        self.features = load_or_extract(
            self.config.feature_type, images, self.get_datapath(), use_cache=self.config.enable_cache
        )
        CONSOLE.print(f"{self.config.feature_type} features {self.features.values.shape}: {self.features.source}")
        values = torch.from_numpy(self.features.values)
        self.train_features, self.eval_features = values.tensor_split([len(self.train_dataset)])
        self._scale = self._feature_scale(values)
        self.train_dataset.metadata["feature_dim"] = values.shape[-1]
        self.train_dataset.metadata["feature_projection"] = fit_colour_projection(self.train_features)

    def _feature_scale(self, features: Tensor) -> tuple[float, float]:
        """Feature cells per pixel, vertically and horizontally."""
        assert self.train_dataset is not None
        heights = self.train_dataset.cameras.image_height.unique()
        widths = self.train_dataset.cameras.image_width.unique()
        if len(heights) != 1 or len(widths) != 1:
            raise TrainingError("f3rm needs images of one size; this dataset has several. Resize or crop them.")
        return features.shape[1] / heights.item(), features.shape[2] / widths.item()

    def _sample(self, features: Tensor, indices: Tensor) -> Tensor:
        camera, y, x = indices.unbind(-1)
        scale_h, scale_w = self._scale
        return features[camera, (y * scale_h).long(), (x * scale_w).long()].to(self.device)

    def next_train(self, step: int) -> tuple[RayBundle, dict[str, Any]]:
        """The next training batch, with `feature`."""
        ray_bundle, batch = super().next_train(step)
        batch["feature"] = self._sample(self.train_features, batch["indices"].cpu())
        return ray_bundle, batch

    def next_eval(self, step: int) -> tuple[RayBundle, dict[str, Any]]:
        """The next evaluation batch, with `feature`."""
        ray_bundle, batch = super().next_eval(step)
        batch["feature"] = self._sample(self.eval_features, batch["indices"].cpu())
        return ray_bundle, batch
