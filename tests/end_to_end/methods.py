"""Methods of a user's own, which tests give to nerfstudio through NERFSTUDIO_METHOD_CONFIGS and PYTHONPATH.

`guide` is the guide's high-performance mode, set in Python. `putting` calls an operation that has no deterministic
implementation. `faulty` has a fault on rank 1, at step 2, in the run whose side is named in FAULTY_SIDE; `noisy` has
one in its features. `ordered` has a loss that follows the order of a set, from step 5 on; `once` has a fault at step 2
in one process alone, the first that makes the file ONCE_MARKER.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.plugins.types import MethodSpecification

from f3rm_verify.f3rm.datamanager import FeatureDataManager, FeatureDataManagerConfig
from f3rm_verify.f3rm.f3rm_config import f3rm_method
from f3rm_verify.f3rm.features.daisy import DaisyExtractor
from f3rm_verify.f3rm.model import FeatureFieldModel, FeatureFieldModelConfig


def _method(name: str, **changes: Any) -> MethodSpecification:
    config = dataclasses.replace(copy.deepcopy(f3rm_method.config), method_name=name, **changes)
    return MethodSpecification(config=config, description=name)


ORDERED_FROM = 5


guide = _method("guide", seed_deterministic_algorithms=False, seed_warn_only=True, seed_cublas_workspace=False)


class PuttingModel(FeatureFieldModel):
    def get_loss_dict(self, *arguments: Any, **keywords: Any) -> Any:
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
        return super().get_loss_dict(*arguments, **keywords)


@dataclass
class PuttingModelConfig(FeatureFieldModelConfig):
    _target: type = field(default_factory=lambda: PuttingModel)


class FaultyDataManager(FeatureDataManager):
    def next_train(self, step: int) -> Any:
        rays, batch = super().next_train(step)
        side = os.path.basename(os.environ["F3RM_VERIFY_FEATURE_CACHE"])
        if (self.local_rank, step, side) == (1, 2, os.environ.get("FAULTY_SIDE")):
            batch["image"] = torch.nextafter(batch["image"], torch.tensor(2.0))  # one ulp
        return rays, batch


@dataclass
class FaultyDataManagerConfig(FeatureDataManagerConfig):
    _target: type = field(default_factory=lambda: FaultyDataManager)


class OnceDataManager(FeatureDataManager):
    def next_train(self, step: int) -> Any:
        rays, batch = super().next_train(step)
        if step == 2:
            try:
                open(os.environ["ONCE_MARKER"], "x").close()
                batch["image"] = torch.nextafter(batch["image"], torch.tensor(2.0))  # one ulp
            except FileExistsError:
                pass
        return rays, batch


@dataclass
class OnceDataManagerConfig(FeatureDataManagerConfig):
    _target: type = field(default_factory=lambda: OnceDataManager)


class OrderedModel(FeatureFieldModel):
    steps = 0

    def get_loss_dict(self, *arguments: Any, **keywords: Any) -> Any:
        losses = super().get_loss_dict(*arguments, **keywords)
        if self.training:
            self.steps += 1
            if self.steps > ORDERED_FROM:
                parts = {f"part {number}": losses["rgb_loss"] * number for number in range(12)}
                losses["rgb_loss"] = sum(parts[name] / (place + 1) for place, name in enumerate(set(parts)))
        return losses


@dataclass
class OrderedModelConfig(FeatureFieldModelConfig):
    _target: type = field(default_factory=lambda: OrderedModel)


class NoisyExtractor(DaisyExtractor):
    def batches(self, images: Sequence[Path]) -> Iterator[Any]:
        side = os.path.basename(os.environ["F3RM_VERIFY_FEATURE_CACHE"])
        for batch in super().batches(images):
            if side == os.environ.get("FAULTY_SIDE"):
                batch = np.nextafter(batch, np.float32(2))  # one ulp
            yield batch


class NoisyDataManagerConfig(FeatureDataManagerConfig):
    def extractors(self, device: str) -> dict[str, Any]:
        return {"DAISY": NoisyExtractor()}


def _with(part: str, kind: type) -> Any:
    """The pipeline of f3rm, one part of it with another class."""
    pipeline = copy.deepcopy(f3rm_method.config.pipeline)
    old = getattr(pipeline, part)
    values = {item.name: getattr(old, item.name) for item in dataclasses.fields(old) if item.name != "_target"}
    setattr(pipeline, part, kind(**values))
    return pipeline


putting = _method("putting", pipeline=_with("model", PuttingModelConfig))
noisy = _method("noisy", pipeline=_with("datamanager", NoisyDataManagerConfig))
ordered = _method("ordered", pipeline=_with("model", OrderedModelConfig))
once = _method("once", pipeline=_with("datamanager", OnceDataManagerConfig))
faulty = _method("faulty", pipeline=_with("datamanager", FaultyDataManagerConfig))
