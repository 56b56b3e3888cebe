"""A fixed projection of features to colours, so that two renders of one checkpoint look the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: The quantiles are those of at most about this many features.
_SAMPLES = 100_000


class ColourProjection(NamedTuple):
    """`axes` (c, 3): the principal axes; `low`, `high` (3,): the 1% and 99% quantiles of the projected features."""

    axes: Tensor
    low: Tensor
    high: Tensor

    def apply(self, features: Tensor) -> Tensor:
        """Colours (..., 3) in [0, 1] of features (..., c)."""
        span = (self.high - self.low).clamp_min(1e-12)
        return ((features @ self.axes - self.low) / span).clamp(0, 1)


def fit_colour_projection(maps: Sequence[Tensor]) -> ColourProjection:
    """Principal axes of the features in all `maps` (n, h, w, c) together, exactly (no random start), with a fixed sign.

    torch.pca_lowrank, which upstream uses, draws from the global generator, and eigenvectors have no sign of their own.
    One image at a time is made float64: all of them would take twice the memory of the features.
    """
    count = sum(len(image) for image in _images(maps))
    mean = sum(image.sum(0) for image in _images(maps)) / count
    covariance = sum((image - mean).T @ (image - mean) for image in _images(maps))
    _, vectors = torch.linalg.eigh(covariance)
    axes = vectors.flip(-1)[:, :3]
    if axes.shape[-1] < 3:
        axes = torch.nn.functional.pad(axes, (0, 3 - axes.shape[-1]))
    sign = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    axes = axes * torch.where(sign == 0, torch.ones_like(sign), sign)
    # torch.quantile refuses more than 2^24 values; a fixed stride keeps the choice deterministic.
    every = max(1, count // _SAMPLES)
    projected = torch.cat([image[::every] @ axes for image in _images(maps)])
    low, high = torch.quantile(projected, projected.new_tensor([0.01, 0.99]), dim=0)
    return ColourProjection(axes.float(), low.float(), high.float())


def _images(maps: Sequence[Tensor]) -> Iterator[Tensor]:
    """The features (h * w, c) of each image in float64, those of all maps at the cells of the finest."""
    rows, columns = max((one.shape[1:3] for one in maps), key=lambda size: size[0] * size[1])
    for images in zip(*maps, strict=True):
        sampled = [
            one[torch.arange(rows) * one.shape[0] // rows][:, torch.arange(columns) * one.shape[1] // columns]
            for one in images
        ]
        yield torch.cat(sampled, dim=-1).flatten(0, 1).double()
