"""What CLIP and DINO have in common: vision transformers of the library transformers, that give a feature per patch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as images_as

from f3rm_verify.environment import cpu_model
from f3rm_verify.errors import TrainingError
from f3rm_verify.f3rm.features import versions
from f3rm_verify.f3rm.features.weights import ModelOptions, Weights, find_weights

#: Parameters that no feature depends on; old checkpoints lack them.
_UNUSED = frozenset({"embeddings.mask_token"})


@dataclass(frozen=True)
class TransformerExtractor:
    """Features (n, rows, columns, c): one per patch of each image, whose shorter side is resized to `load_size`."""

    options: ModelOptions
    device: str

    #: Where the options are in ns-train's, and what of the model is taken.
    option: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    interpolation: ClassVar[InterpolationMode]
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]

    @cached_property
    def weights(self) -> Weights:
        """The model's files, whose digest is computed once."""
        return find_weights(self.options, option=self.option, model_types=self.model_types)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Arguments, weights, libraries, hardware: a matrix product's last bits depend on all of them."""
        arguments = {key: value for key, value in asdict(self.options).items() if key not in _WHENCE}
        on_cpu = {"cpu": cpu_model(), "threads": torch.get_num_threads()}
        return {
            "arguments": arguments,
            "weights": {"digest": self.weights.digest, "architecture": self.weights.architecture},
            "libraries": versions("numpy", "pillow", "torch", "torchvision", "transformers"),
            "device": {"gpu": torch.cuda.get_device_name(self.device)} if self._on_cuda else on_cpu,
        }

    @property
    def origin(self) -> Mapping[str, Any]:
        """What the weights were asked for by, and the hub's commit where they are from there."""
        return {"model": self.options.model, "commit": self.weights.commit}

    @property
    def _on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def batches(self, images: Sequence[Path]) -> Iterator[npt.NDArray[np.float32]]:
        """Features of `batch_size` images at a time. Raises TrainingError where the model or an option is no use."""
        if self.options.half and not self._on_cuda:
            raise TrainingError(f"{self.option}.half True needs CUDA; leave it out to compute in float32.")
        if self.options.batch_size < 1:
            raise TrainingError(f"{self.option}.batch-size must be 1 or more.")
        model = self._load().eval().requires_grad_(False).to(self.device)
        for start in range(0, len(images), self.options.batch_size):
            pixels = self._pixels(model, images[start : start + self.options.batch_size])
            yield self._features(model, pixels).float().cpu().numpy()

    def _load(self) -> Any:
        raise NotImplementedError

    def _features(self, model: Any, pixels: Tensor) -> Tensor:
        """Features (k, rows, columns, c) of pixels (k, 3, H, W)."""
        raise NotImplementedError

    def _from_folder(self, kind: Any, **arguments: Any) -> Any:
        """A model with the weights in its folder, all of them from there. Raises TrainingError where they are not."""
        from transformers.utils import logging

        where = f"The weights {self.weights.file}"
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # the text half of CLIP is not used, of which transformers warns at length
        try:
            model, loaded = kind.from_pretrained(
                self.weights.folder,
                local_files_only=True,
                use_safetensors="safetensors" in self.weights.file.name,
                dtype=torch.float16 if self.options.half else torch.float32,
                attn_implementation="sdpa",
                output_loading_info=True,
                **arguments,
            )
        except Exception as error:  # the file's reader, torch, or transformers: each has errors of its own
            reason = " ".join(str(error).split())
            raise TrainingError(f"{where} cannot be loaded ({reason:.200}); get the model again.") from error
        finally:
            logging.set_verbosity(verbosity)
        missing = sorted(set(loaded["missing_keys"]) - _UNUSED)
        if missing:
            # transformers draws them at random, and goes on.
            raise TrainingError(f"{where} lack {len(missing)} tensors ({missing[0]}, ...); get the whole model.")
        return model

    def _pixels(self, model: Any, images: Sequence[Path]) -> Tensor:
        """Pixels (k, 3, H, W), normalised as in the model's training."""
        size = self.options.load_size or _square(model.config.image_size)
        pixels = []
        for path in images:
            with Image.open(path) as image:
                resized = images_as.resize(image.convert("RGB"), [size], interpolation=self.interpolation)
            pixels.append(images_as.normalize(images_as.to_tensor(resized), list(self.mean), list(self.std)))
        if any(one.shape != pixels[0].shape for one in pixels):
            raise TrainingError("f3rm needs images of one size; this dataset has several. Resize or crop them.")
        patch = _square(model.config.patch_size)
        if min(pixels[0].shape[-2:]) < patch:
            raise TrainingError(f"{self.option}.load-size {size} is less than one patch, {patch} pixels; give more.")
        return torch.stack(pixels).to(self.device, torch.float16 if self.options.half else torch.float32)


#: Options that say where the weights are: their content decides, not their place.
_WHENCE = ("model", "revision", "weights_digest")


def _square(size: Any) -> int:
    """The side of what a model's configuration gives as one number, or as two."""
    return int(size) if isinstance(size, int) else int(size[0])


def grid(pixels: Tensor, patch: int, stride: int) -> tuple[int, int]:
    """How many rows and columns of patches there are."""
    height, width = pixels.shape[-2:]
    return 1 + (height - patch) // stride, 1 + (width - patch) // stride


def stretch_positions(table: Tensor, pixels: Tensor, rows: int, columns: int) -> Tensor:
    """Position embeddings (1, 1 + rows * columns, c) from those learned, (1 + n * n, c), the first the class token's.

    As DINO does it, and F3RM for CLIP as well: bicubic, by a scale that is a tenth of a patch too large so that it
    rounds to the wanted size; the library's own way scales exactly and gives slightly other values.
    """
    side = isqrt(len(table) - 1)
    if rows * columns == side * side and pixels.shape[-2] == pixels.shape[-1]:
        return table[None]
    learned = table[1:].T.reshape(1, -1, side, side)
    scale = ((rows + 0.1) / side, (columns + 0.1) / side)
    stretched = F.interpolate(learned, scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
    return torch.cat([table[:1], stretched.flatten(2)[0].T])[None]
