"""CLIP's image encoder, asked for each patch instead of the whole image.

As MaskCLIP does it (C. Zhou, C. C. Loy, B. Dai: Extract Free Dense Labels from CLIP, ECCV 2022), and F3RM after it: the
last block's attention is left out, and each patch's value goes through the output projections alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torchvision.transforms import InterpolationMode

from f3rm_verify.f3rm.features.transformer import TransformerExtractor, grid, stretch_positions
from f3rm_verify.f3rm.features.weights import ModelOptions


@dataclass(frozen=True, kw_only=True)
class ClipOptions(ModelOptions):
    """CLIP's options."""

    model: str = "openai/clip-vit-large-patch14-336"
    """Name on the Hugging Face hub, or a folder that holds config.json and weights as transformers saves them."""


@dataclass(frozen=True)
class ClipExtractor(TransformerExtractor):
    """Features in the space that CLIP's texts are in, too."""

    options: ClipOptions

    option: ClassVar[str] = "--pipeline.datamanager.clip"
    model_types: ClassVar[tuple[str, ...]] = ("clip", "clip_vision_model")
    interpolation: ClassVar[InterpolationMode] = InterpolationMode.BICUBIC
    mean: ClassVar[tuple[float, float, float]] = (0.48145466, 0.4578275, 0.40821073)
    std: ClassVar[tuple[float, float, float]] = (0.26862954, 0.26130258, 0.27577711)

    def _load(self) -> Any:
        from transformers import CLIPVisionModelWithProjection

        model = self._from_folder(CLIPVisionModelWithProjection)
        layers = model.vision_model.encoder.layers
        # The last block is not run as such; out of the list, it stays part of the model.
        model.last_block, model.vision_model.encoder.layers = layers[-1], layers[:-1]
        return model

    def _features(self, model: Any, pixels: Tensor) -> Tensor:
        vision, last = model.vision_model, model.last_block
        rows, columns = grid(pixels, vision.embeddings.patch_size, vision.embeddings.patch_size)
        positions = stretch_positions(vision.embeddings.position_embedding.weight, pixels, rows, columns)
        vision.embeddings.interpolate_pos_encoding = lambda *_, **__: positions
        tokens = vision(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
        values = last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(tokens)))
        features: Tensor = model.visual_projection(vision.post_layernorm(values))
        return features.unflatten(1, (rows, columns))
