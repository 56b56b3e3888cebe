"""LPIPS without a network: torchmetrics downloads its weights when it is built, which ends a training offline."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

_NAME = "LearnedPerceptualImagePatchSimilarity"


class UnavailableMetric(nn.Module):
    """Stands where a metric cannot be built; its value is NaN, never a number that looks like a result."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.unavailable_because = reason

    def forward(self, *_: Any) -> torch.Tensor:
        """NaN."""
        return torch.tensor(float("nan"))


def degrade_lpips_offline() -> None:
    """Makes torchmetrics' LPIPS fall back to UnavailableMetric where its weights cannot be had.

    Takes effect for models built later in this process. Building LPIPS draws from torch's generator whether or not the
    weights come; the generator is put back, so that availability does not change the training.
    """
    import torchmetrics.image.lpip as module

    original = getattr(module, _NAME)
    if getattr(original, "degrades_offline", False):
        return

    def build(*arguments: Any, **keywords: Any) -> nn.Module:
        state = torch.get_rng_state()
        try:
            return original(*arguments, **keywords)
        except Exception as error:  # whatever stops the download, the training must go on
            from nerfstudio.utils.rich_utils import CONSOLE

            reason = f"LPIPS weights could not be had ({type(error).__name__})"
            CONSOLE.print(f"LPIPS is not available: {reason}. It is left out of the metrics.")
            return UnavailableMetric(reason)
        finally:
            torch.set_rng_state(state)

    build.degrades_offline = True  # type: ignore[attr-defined]
    # nerfstudio 0.3 imports the class when it starts, so its modules hold it by name already.
    for holder in list(sys.modules.values()):
        if getattr(holder, "__dict__", {}).get(_NAME) is original:
            setattr(holder, _NAME, build)
