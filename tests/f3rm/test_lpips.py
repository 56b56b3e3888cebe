"""LPIPS whose weights cannot be had, wherever nerfstudio holds its class."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]


def held_by(name: str, value: type, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that imported the class by name when it was loaded, as nerfstudio 0.3's do."""
    module = types.ModuleType(name)
    module.LearnedPerceptualImagePatchSimilarity = value  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("offline", [True, False])
def test_it_degrades_for_those_who_imported_it_before_too(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    import torch
    import torchmetrics.image.lpip as module

    from f3rm_verify.f3rm.lpips import UnavailableMetric, degrade_lpips_offline

    class LearnedPerceptualImagePatchSimilarity(torch.nn.Module):
        def __init__(self, **_: Any) -> None:
            torch.rand(3)
            if offline:
                raise OSError("no network")
            super().__init__()

    class Other:
        pass

    original = LearnedPerceptualImagePatchSimilarity
    monkeypatch.setattr(module, original.__name__, original)
    holder, stranger = held_by("held", original, monkeypatch), held_by("strange", Other, monkeypatch)
    monkeypatch.setitem(sys.modules, "blocked", None)  # as Python itself leaves it where an import is forbidden
    degrade_lpips_offline()
    degrade_lpips_offline()
    state = torch.get_rng_state()
    for place in (module, holder):
        made = place.LearnedPerceptualImagePatchSimilarity(normalize=True)
        assert isinstance(made, UnavailableMetric if offline else original)
        assert getattr(made, "unavailable_because", None) == (
            "LPIPS weights could not be had (OSError)" if offline else None
        )
    assert torch.get_rng_state().equal(state)
    assert stranger.LearnedPerceptualImagePatchSimilarity is Other
