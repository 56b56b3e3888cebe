"""The feature field of F3RM: hash grid and frequency encoding of contracted positions, then an MLP head."""

from __future__ import annotations

import math
from typing import Literal

import torch
from nerfstudio.cameras.rays import RaySamples
from nerfstudio.field_components.encodings import HashEncoding
from nerfstudio.field_components.mlp import MLP
from nerfstudio.field_components.spatial_distortions import SpatialDistortion
from torch import Tensor, nn


class FrequencyEncoding(nn.Module):
    """sin and cos of 2^k pi x for k below `num_frequencies`, as tiny-cuda-nn's `Frequency`.

    Takes (n, 3) in [0, 1], gives (n, 6 * num_frequencies).
    """

    def __init__(self, num_frequencies: int) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies

    def forward(self, positions: Tensor) -> Tensor:
        """Encodes positions (n, 3)."""
        powers = torch.arange(self.num_frequencies, device=positions.device, dtype=positions.dtype)
        angles = positions[..., None] * (math.pi * 2.0**powers)
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


class FeatureField(nn.Module):
    """Features of points in space, distilled from 2D features beside the NeRF.

    The positions are detached: the feature loss moves neither the NeRF nor its cameras.
    """

    def __init__(
        self,
        *,
        feature_dim: int,
        spatial_distortion: SpatialDistortion,
        use_pe: bool = True,
        pe_n_freq: int = 6,
        num_levels: int = 12,
        log2_hashmap_size: int = 19,
        start_res: int = 16,
        max_res: int = 128,
        features_per_level: int = 8,
        hidden_dim: int = 64,
        num_layers: int = 2,
        implementation: Literal["torch", "tcnn"] = "torch",
    ) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.spatial_distortion = spatial_distortion
        self.grid = HashEncoding(
            num_levels=num_levels,
            min_res=start_res,
            max_res=max_res,
            log2_hashmap_size=log2_hashmap_size,
            features_per_level=features_per_level,
            implementation=implementation,
        )
        self.frequencies = FrequencyEncoding(pe_n_freq) if use_pe else None
        encoded_dim = self.grid.get_out_dim() + (6 * pe_n_freq if use_pe else 0)
        self.head = MLP(
            in_dim=encoded_dim,
            num_layers=num_layers + 1,  # nerfstudio counts the output layer
            layer_width=hidden_dim,
            out_dim=feature_dim,
            activation=nn.ReLU(),
            out_activation=None,
            implementation=implementation,
        )

    def forward(self, ray_samples: RaySamples) -> Tensor:
        """Features (rays, samples, feature_dim) of the samples' centres."""
        positions = ray_samples.frustums.get_positions().detach()
        unit = ((self.spatial_distortion(positions) + 2.0) / 4.0).view(-1, 3)
        encoded = self.grid(unit)
        if self.frequencies is not None:
            encoded = torch.cat([encoded, self.frequencies(unit).to(encoded.dtype)], dim=-1)
        return self.head(encoded).float().view(*positions.shape[:-1], self.feature_dim)
