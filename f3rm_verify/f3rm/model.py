"""F3RM: a nerfacto NeRF and, trained in parallel, a feature field rendered with the NeRF's weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from nerfstudio.cameras.rays import RayBundle, RaySamples
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig
from torch import Tensor
from torch.nn import Parameter

from f3rm_verify.f3rm.feature_field import FeatureField
from f3rm_verify.f3rm.lpips import degrade_lpips_offline
from f3rm_verify.f3rm.pca import ColourProjection


@dataclass
class FeatureFieldModelConfig(NerfactoModelConfig):
    """nerfacto's options, and those of the feature field."""

    _target: type = field(default_factory=lambda: FeatureFieldModel)
    implementation: Literal["tcnn", "torch"] = "torch"
    """Implementation of the encodings and networks: tcnn needs tinycudann and is not deterministic in backward."""
    feat_loss_weight: float = 1e-3
    """Weight of the mean squared error of the rendered features."""
    feat_use_pe: bool = True
    """Add the frequency encoding of the position to the feature field's hash grid."""
    feat_pe_n_freq: int = 6
    """Number of frequencies."""
    feat_num_levels: int = 12
    """Levels of the feature field's hash grid."""
    feat_log2_hashmap_size: int = 19
    """Logarithm to base 2 of the entries of a level."""
    feat_start_res: int = 16
    """Resolution of the coarsest level."""
    feat_max_res: int = 128
    """Resolution of the finest level."""
    feat_features_per_level: int = 8
    """Values of an entry."""
    feat_hidden_dim: int = 64
    """Width of the hidden layers of the MLP head."""
    feat_num_layers: int = 2
    """Number of hidden layers of the MLP head."""


class FeatureFieldModel(NerfactoModel):
    """Adds the outputs `feature` (rays, c) and, for whole images, `feature_pca` (H, W, 3) in [0, 1]."""

    config: FeatureFieldModelConfig
    feature_pca_axes: Tensor
    feature_pca_low: Tensor
    feature_pca_high: Tensor

    def populate_modules(self) -> None:
        """Builds nerfacto, then the feature field; feature size and colour projection come with the data."""
        degrade_lpips_offline()  # here too, for ns-eval and ns-render, which know no trainer
        super().populate_modules()
        metadata = self.kwargs["metadata"]
        self.feature_field = FeatureField(
            feature_dim=metadata["feature_dim"],
            spatial_distortion=self.field.spatial_distortion,
            use_pe=self.config.feat_use_pe,
            pe_n_freq=self.config.feat_pe_n_freq,
            num_levels=self.config.feat_num_levels,
            log2_hashmap_size=self.config.feat_log2_hashmap_size,
            start_res=self.config.feat_start_res,
            max_res=self.config.feat_max_res,
            features_per_level=self.config.feat_features_per_level,
            hidden_dim=self.config.feat_hidden_dim,
            num_layers=self.config.feat_num_layers,
            implementation=self.config.implementation,
        )
        for name, value in metadata["feature_projection"]._asdict().items():
            self.register_buffer(f"feature_pca_{name}", value)
        # nerfacto keeps the samples and weights of a forward pass to itself when it evaluates: listen to the modules
        # that make and take them, so that its own get_outputs serves here unchanged.
        self.proposal_sampler.register_forward_hook(self._keep_samples)
        self.renderer_rgb.register_forward_pre_hook(self._keep_weights, with_kwargs=True)

    def _keep_samples(self, _module: Any, _arguments: Any, result: tuple[RaySamples, Any, Any]) -> None:
        self._ray_samples = result[0]

    def _keep_weights(self, _module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        self._weights: Tensor = keywords["weights"]

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        """nerfacto's groups and `feature_field`."""
        return {**super().get_param_groups(), "feature_field": list(self.feature_field.parameters())}

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:
        """nerfacto's outputs, and the features rendered with the NeRF's weights."""
        outputs = super().get_outputs(ray_bundle)
        features = self.feature_field(self._ray_samples)
        outputs["feature"] = (self._weights * features).sum(dim=-2)
        return outputs

    def get_metrics_dict(self, outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Tensor]:
        """nerfacto's metrics, and the mean squared feature error."""
        metrics: dict[str, Tensor] = super().get_metrics_dict(outputs, batch)
        metrics["feature_error"] = F.mse_loss(outputs["feature"], batch["feature"].to(self.device))
        return metrics

    def get_loss_dict(
        self, outputs: dict[str, Any], batch: dict[str, Any], metrics_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """nerfacto's losses, and the weighted mean squared feature error."""
        losses: dict[str, Tensor] = super().get_loss_dict(outputs, batch, metrics_dict)
        error = F.mse_loss(outputs["feature"], batch["feature"].to(self.device))
        losses["feature_loss"] = self.config.feat_loss_weight * error
        return losses

    @torch.no_grad()
    def get_outputs_for_camera_ray_bundle(self, camera_ray_bundle: RayBundle) -> dict[str, Tensor]:
        """The outputs of a whole image, with the features as colours of a projection that is part of the checkpoint."""
        outputs: dict[str, Tensor] = super().get_outputs_for_camera_ray_bundle(camera_ray_bundle)
        features = outputs["feature"]
        projection = ColourProjection(self.feature_pca_axes, self.feature_pca_low, self.feature_pca_high)
        outputs["feature_pca"] = projection.apply(features.to(self.device)).to(features.device)
        return outputs

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Any]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """nerfacto's metrics and images, and the view of the features."""
        metrics, images = super().get_image_metrics_and_images(outputs, batch)
        images["feature_pca"] = outputs["feature_pca"]
        return metrics, images
