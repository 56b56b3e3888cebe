"""What is recorded of a data manager that is not ours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]


def digests(folder: Path, **parts: Any) -> Any:
    from f3rm_verify.f3rm.training_facts import data_digests

    return data_digests(SimpleNamespace(get_datapath=lambda: folder, **parts))["features"]


def test_upstreams_features_are_digested_by_split_shape_and_value(tmp_path: Path) -> None:
    import torch

    train, evaluation = torch.rand(4, 2, 2, 3), torch.rand(1, 2, 2, 3)
    one = digests(tmp_path, train_features=train, eval_features=evaluation)
    assert one == digests(tmp_path, train_features=train.clone(), eval_features=evaluation.clone())
    other = train.clone()
    other[3, 1, 1, 2] = torch.nextafter(other[3, 1, 1, 2], torch.tensor(9.0))
    both = torch.cat([train, evaluation])
    others = (
        {"train_features": other, "eval_features": evaluation},
        {"train_features": train, "eval_features": evaluation.reshape(1, 4, 1, 3)},
        {"train_features": both[:3], "eval_features": both[3:]},
        {"train_features": train},
    )
    assert len({one["digest"], *(digests(tmp_path, **parts)["digest"] for parts in others)}) == 5


def test_without_features_there_is_no_digest(tmp_path: Path) -> None:
    assert digests(tmp_path) is None
    assert digests(tmp_path, train_features=None, eval_features="?") is None


def test_what_somebody_else_calls_features_is_no_trouble(tmp_path: Path) -> None:
    assert digests(tmp_path, features={"clip": 1}) is None


def test_the_order_of_the_images_is_recorded_by_split(tmp_path: Path) -> None:
    from f3rm_verify.f3rm.training_facts import data_digests

    splits = {"train": ["b.png", "a.png"], "eval": ["c.png"]}
    parts = {
        f"{split}_dataset": SimpleNamespace(image_filenames=[tmp_path / name for name in names])
        for split, names in splits.items()
    }
    assert data_digests(SimpleNamespace(get_datapath=lambda: tmp_path, **parts))["order"] == splits


def test_extensions_that_the_code_of_a_model_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    from torch import nn

    from f3rm_verify.f3rm.training_facts import extensions

    kernel = types.ModuleType("gsplat.rendering")
    source = types.ModuleType("somebodys_splats")
    vars(source).update(kernel=kernel)
    monkeypatch.setitem(sys.modules, "somebodys_splats", source)
    model = nn.Sequential(nn.Linear(1, 1), type("Splats", (nn.Module,), {"__module__": "somebodys_splats"})())
    assert extensions(model) == ["gsplat"]
    assert extensions(model[0]) == []
