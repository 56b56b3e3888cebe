"""What torch may load once a trained run is to be read: numbers of NumPy's, and still no code."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def trusted() -> Iterator[None]:
    """Nothing is, before each test; afterwards what was before."""
    import torch

    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tmp_path / "step-000000009.ckpt"


def save(path: Path, **content: Any) -> None:
    """As text whose length may change, unlike in torch's own zip files."""
    import torch

    torch.save({"lr": np.float64(0.0099), **content}, path, _use_new_zipfile_serialization=False)


def load(path: Path) -> Any:
    import torch

    return torch.load(path, weights_only=True)


def allow() -> None:
    from f3rm_verify.f3rm.checkpoints import allow_numpy_numbers

    allow_numpy_numbers()


def test_learning_rates_are_loaded(checkpoint: Path) -> None:
    save(checkpoint)
    with pytest.raises(pickle.UnpicklingError, match="multiarray"):
        load(checkpoint)
    allow()
    assert load(checkpoint) == {"lr": 0.0099}


def test_of_the_other_numpy_too(checkpoint: Path) -> None:
    save(checkpoint)
    names = (b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
    old, new = names if np.__version__ >= "2" else names[::-1]
    assert checkpoint.read_bytes().count(old) == 1
    checkpoint.write_bytes(checkpoint.read_bytes().replace(old, new))
    with pytest.raises(pickle.UnpicklingError, match="multiarray"):
        load(checkpoint)
    allow()
    assert load(checkpoint) == {"lr": 0.0099}


@pytest.mark.parametrize("code", [print, np.load, np.array([1.0, 2.0], dtype=object)])
def test_code_and_objects_are_still_refused(checkpoint: Path, code: Any) -> None:
    save(checkpoint, code=code)
    allow()
    with pytest.raises(pickle.UnpicklingError):
        load(checkpoint)


def test_a_torch_that_loads_anything_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1"))
    allow()
    assert not torch.serialization.get_safe_globals()


def test_whoever_asks_for_the_checkpoints_of_our_configuration_can_load_them() -> None:
    import torch
    import torchmetrics.image.lpip as lpips
    from nerfstudio.configs.method_configs import method_configs

    from f3rm_verify.f3rm.wrap import wrap_config

    config = wrap_config(method_configs["nerfacto"])
    config.timestamp = "then"
    assert config.get_checkpoint_dir().parts[-3:] == ("nerfacto", "then", "nerfstudio_models")
    assert np.dtype in torch.serialization.get_safe_globals()
    assert Path in torch.serialization.get_safe_globals()
    assert lpips.LearnedPerceptualImagePatchSimilarity.degrades_offline
