"""DAISY: a dense descriptor that needs no weights, so that a feature field can be trained without a network.

E. Tola, V. Lepetit, P. Fua: DAISY: An Efficient Dense Descriptor Applied to Wide-Baseline Stereo, TPAMI 2010, as
implemented by scikit-image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from f3rm_verify.f3rm.features import versions


@dataclass(frozen=True)
class DaisyExtractor:
    """Descriptors of (rings * histograms + 1) * orientations values, one per `step` x `step` pixels."""

    step: int = 2
    radius: int = 6
    rings: int = 2
    histograms: int = 6
    orientations: int = 4

    @property
    def identity(self) -> Mapping[str, Any]:
        """The arguments, and the libraries that compute."""
        return {"arguments": asdict(self), "libraries": versions("numpy", "pillow", "scikit-image", "scipy")}

    @property
    def origin(self) -> Mapping[str, Any]:
        """Nothing: it has no weights."""
        return {}

    def batches(self, images: Sequence[Path]) -> Iterator[npt.NDArray[np.float32]]:
        """Features (1, ceil(H / step), ceil(W / step), c) in [0, 1]: smoothed gradients per direction and place.

        The border is mirrored by `radius`, so that the first descriptor is that of the first pixel. They are not
        normalised: that would blow up the noise of flat areas to the size of real edges.
        """
        for image in images:
            yield self._extract_one(image)[None]

    def _extract_one(self, path: Path) -> npt.NDArray[np.float32]:
        from PIL import Image
        from skimage.feature import daisy

        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"), dtype=np.float64) / 255.0
        padded = np.pad(grey, self.radius, mode="reflect")
        descriptors = daisy(  # type: ignore[no-untyped-call]
            padded,
            step=self.step,
            radius=self.radius,
            rings=self.rings,
            histograms=self.histograms,
            orientations=self.orientations,
            normalization="off",
        )
        return descriptors.astype(np.float32)
