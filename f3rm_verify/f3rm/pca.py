"""A fixed projection of features to colours, so that two renders of one checkpoint look the same."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ColourProjection(NamedTuple):
    """`axes` (c, 3): the principal axes; `low`, `high` (3,): the 1% and 99% quantiles of the projected features."""

    axes: Tensor
    low: Tensor
    high: Tensor

    def apply(self, features: Tensor) -> Tensor:
        """Colours (..., 3) in [0, 1] of features (..., c)."""
        span = (self.high - self.low).clamp_min(1e-12)
        return ((features @ self.axes - self.low) / span).clamp(0, 1)


def fit_colour_projection(features: Tensor) -> ColourProjection:
    """Principal axes of features (..., c), exactly (no random start) and with a fixed sign.

    torch.pca_lowrank, which upstream uses, draws from the global generator, and eigenvectors have no sign of their own.
    """
    flat = features.reshape(-1, features.shape[-1]).double()
    centred = flat - flat.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors.flip(-1)[:, :3]
    if axes.shape[-1] < 3:
        axes = torch.nn.functional.pad(axes, (0, 3 - axes.shape[-1]))
    sign = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    axes = axes * torch.where(sign == 0, torch.ones_like(sign), sign)
    projected = flat @ axes
    # torch.quantile refuses more than 2^24 values; a fixed stride keeps the choice deterministic.
    sample = projected[:: max(1, len(projected) // 100_000)]
    low, high = torch.quantile(sample, torch.tensor([0.01, 0.99], dtype=sample.dtype, device=sample.device), dim=0)
    return ColourProjection(axes.float(), low.float(), high.float())
