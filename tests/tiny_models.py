"""Models small enough to make and run in a moment, with random weights, saved as transformers saves a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def save_clip(folder: Path) -> Path:
    """CLIP as the hub has it, with its half for texts: 4 x 4 patches of 8 pixels, features of 12 channels."""
    from transformers import CLIPConfig, CLIPModel

    vision = {**_SIZES, "intermediate_size": 64, "image_size": 32, "patch_size": 8, "projection_dim": 12}
    text = {**_SIZES, "intermediate_size": 32, "vocab_size": 11, "projection_dim": 12}
    return _save(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)), folder)


def save_dino(folder: Path) -> Path:
    """DINO: 4 x 4 patches of 8 pixels, 16 channels."""
    from transformers import ViTConfig, ViTModel

    return _save(lambda: ViTModel(ViTConfig(**_SIZES, intermediate_size=32, image_size=32, patch_size=8)), folder)


def save_dinov2(folder: Path) -> Path:
    """DINOv2: 4 x 4 patches of 14 pixels, 16 channels."""
    from transformers import Dinov2Config, Dinov2Model

    return _save(lambda: Dinov2Model(Dinov2Config(**_SIZES, mlp_ratio=2, image_size=56, patch_size=14)), folder)


def _save(make: Callable[[], Any], folder: Path) -> Path:
    """Saves a model whose every parameter is drawn: what is zero or one at the start would hide a mistake."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(folder)
    return folder


def state_of(folder: Path) -> Mapping[str, Any]:
    """The saved tensors by name."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
