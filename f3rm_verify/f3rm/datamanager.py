"""Rays, pixels and, nearest-neighbour-sampled, the dense features that the feature field is distilled from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from f3rm_verify.errors import TrainingError
from f3rm_verify.f3rm.features import FEATURE_TYPES, Extractor, FeatureMap, load_or_extract
from f3rm_verify.f3rm.features.clip import ClipExtractor, ClipOptions
from f3rm_verify.f3rm.features.daisy import DaisyExtractor
from f3rm_verify.f3rm.features.dino import DinoExtractor, DinoOptions
from f3rm_verify.f3rm.pca import fit_colour_projection
from f3rm_verify.f3rm.refusal import refuse


@dataclass
class FeatureDataManagerConfig(VanillaDataManagerConfig):
    """Rays of all training images, with features."""

    _target: type = field(default_factory=lambda: FeatureDataManager)
    feature_type: Literal["DAISY", "CLIP", "DINO", "DINOCLIP"] = "DAISY"
    """Which dense features to distil; DINOCLIP is DINO's and CLIP's, one after the other. DAISY needs no weights."""
    clip: ClipOptions = ClipOptions()
    """CLIP's model and how it is used."""
    dino: DinoOptions = DinoOptions()
    """DINO's or DINOv2's model and how it is used."""
    enable_cache: bool = True
    """Keep extracted features in the dataset's folder, keyed by the images' content and all that computes them."""
    tell: ClassVar[Any] = staticmethod(lambda phase, done, of: None)
    """Hears how far the extraction is; a trainer that wants to sets it."""

    def extractors(self, device: str) -> dict[str, Extractor]:
        """What computes each kind of features of this type."""
        every: dict[str, Extractor] = {
            "DAISY": DaisyExtractor(),
            "CLIP": ClipExtractor(self.clip, device),
            "DINO": DinoExtractor(self.dino, device),
        }
        return {kind: every[kind] for kind in FEATURE_TYPES[self.feature_type]}


class FeatureDataManager(VanillaDataManager):
    """Adds `feature`, (rays, c) float32, to every batch.

    Pixel (y, x) gets the feature at (floor(y * h / H), floor(x * w / W)) of its image's (h, w) feature map. Where there
    are several maps, it gets that of each, one after the other.
    """

    config: FeatureDataManagerConfig
    features: tuple[FeatureMap, ...]

    def __init__(self, config: FeatureDataManagerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        assert self.train_dataset is not None and self.eval_dataset is not None
        try:
            self._size = self._image_size()
            self.features = self._load()
        except TrainingError as error:
            refuse(str(error))
        for one in self.features:
            CONSOLE.print(f"{one.kind} features {one.values.shape}: {one.source}")
        maps = [torch.from_numpy(one.values).tensor_split([len(self.train_dataset)]) for one in self.features]
        self.train_features = [train for train, _ in maps]
        self.eval_features = [held_out for _, held_out in maps]
        self.train_dataset.metadata["feature_dim"] = sum(one.values.shape[-1] for one in self.features)
        self.train_dataset.metadata["feature_projection"] = fit_colour_projection(self.train_features)

    def _load(self) -> tuple[FeatureMap, ...]:
        assert self.train_dataset is not None and self.eval_dataset is not None
        images = [Path(name) for name in (*self.train_dataset.image_filenames, *self.eval_dataset.image_filenames)]
        config = self.config
        return tuple(
            load_or_extract(
                kind, extractor, images, self.get_datapath(), use_cache=config.enable_cache, tell=config.tell
            )
            for kind, extractor in config.extractors(str(self.device)).items()
        )

    def _image_size(self) -> tuple[int, int]:
        """Height and width of every image."""
        assert self.train_dataset is not None
        heights = self.train_dataset.cameras.image_height.unique()
        widths = self.train_dataset.cameras.image_width.unique()
        if len(heights) != 1 or len(widths) != 1:
            raise TrainingError("f3rm needs images of one size; this dataset has several. Resize or crop them.")
        return int(heights.item()), int(widths.item())

    def _sample(self, maps: Sequence[Tensor], indices: Tensor) -> Tensor:
        camera, y, x = indices.unbind(-1)
        height, width = self._size
        sampled = [
            one[camera, (y * (one.shape[1] / height)).long(), (x * (one.shape[2] / width)).long()] for one in maps
        ]
        return torch.cat(sampled, dim=-1).to(self.device)

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
