"""DINO and DINOv2: the keys (or another facet) of one block's attention, on a grid that can be finer than the patches.

S. Amir, Y. Gandelsman, S. Bagon, T. Dekel: Deep ViT Features as Dense Visual Descriptors, ECCVW 2022, as F3RM uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from f3rm_verify.errors import TrainingError
from f3rm_verify.f3rm.features.transformer import TransformerExtractor, grid, stretch_positions
from f3rm_verify.f3rm.features.weights import ModelOptions


@dataclass(frozen=True, kw_only=True)
class DinoOptions(ModelOptions):
    """DINO's options."""

    model: str = "facebook/dino-vits8"
    """Name on the Hugging Face hub, or a folder that holds config.json and weights as transformers saves them."""
    load_size: int | None = 224
    """Pixels to which the shorter side of each image is resized; None for the size the model was trained with."""
    stride: int = 4
    """Pixels from one patch to the next; divides the size of a patch, and is the size of a feature."""
    facet: Literal["key", "query", "value", "token"] = "key"
    """What of the block is taken: a part of its attention, or its output."""
    layer: int = -1
    """Which block, counted from 0, or from the end by a negative number."""


@dataclass(frozen=True)
class DinoExtractor(TransformerExtractor):
    """Features of parts: equal parts have similar ones, in other images and other objects, too."""

    options: DinoOptions

    option: ClassVar[str] = "--pipeline.datamanager.dino"
    model_types: ClassVar[tuple[str, ...]] = ("vit", "dinov2")
    interpolation: ClassVar[InterpolationMode] = InterpolationMode.LANCZOS
    mean: ClassVar[tuple[float, float, float]] = (0.485, 0.456, 0.406)
    std: ClassVar[tuple[float, float, float]] = (0.229, 0.224, 0.225)

    def _load(self) -> Any:
        from transformers import Dinov2Model, ViTModel

        if self.weights.model_type == "dinov2":
            model = self._from_folder(Dinov2Model)
            holder, name, norm = model.encoder, "layer", "norm1"
        else:
            model = self._from_folder(ViTModel, add_pooling_layer=False)
            holder, name, norm = model, "layers", "layernorm_before"
        self._make_finer(model.embeddings.patch_embeddings.projection)
        blocks = getattr(holder, name)
        index = self._index(len(blocks))
        # Nothing is run after the block whose facet is taken; of that one, only what the facet needs.
        setattr(holder, name, blocks[: index + (self.options.facet == "token")])
        model.layernorm = nn.Identity()
        model.facet = self._facet(blocks[index], norm)
        return model

    def _make_finer(self, projection: Any) -> None:
        patch, stride = projection.kernel_size[0], self.options.stride
        if stride < 1 or patch % stride:
            fitting = ", ".join(str(one) for one in range(1, patch + 1) if patch % one == 0)
            raise TrainingError(
                f"{self.option}.stride {stride} does not divide {patch}, a patch; give one of {fitting}."
            )
        projection.stride = (stride, stride)

    def _index(self, count: int) -> int:
        layer = self.options.layer
        if not -count <= layer < count:
            raise TrainingError(
                f"{self.option}.layer {layer} is not there: the model has {count} blocks, 0 to {count - 1}."
            )
        return layer % count

    def _facet(self, block: Any, norm: str) -> nn.Module:
        if self.options.facet == "token":
            return nn.Identity()
        attention = block.attention
        projection = {"key": attention.k_proj, "query": attention.q_proj, "value": attention.v_proj}[self.options.facet]
        return nn.Sequential(getattr(block, norm), projection, _HeadsLast(attention.num_attention_heads))

    def _features(self, model: Any, pixels: Tensor) -> Tensor:
        embeddings = model.embeddings
        patches = embeddings.patch_embeddings.projection
        rows, columns = grid(pixels, patches.kernel_size[0], patches.stride[0])
        positions = stretch_positions(embeddings.position_embeddings[0], pixels, rows, columns)
        embeddings.interpolate_pos_encoding = lambda *_, **__: positions
        always = {} if self.weights.model_type == "dinov2" else {"interpolate_pos_encoding": True}
        tokens = model(pixel_values=pixels, **always).last_hidden_state[:, 1:]
        features: Tensor = model.facet(tokens)
        return features.unflatten(1, (rows, columns))


class _HeadsLast(nn.Module):
    """Channels (head, d) become (d, head), the order in which F3RM and its model have them."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self._heads = heads

    def forward(self, channels: Tensor) -> Tensor:
        return channels.unflatten(-1, (self._heads, -1)).transpose(-1, -2).flatten(-2)
