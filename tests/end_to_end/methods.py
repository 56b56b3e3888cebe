"""Methods of a user's own, which tests give to nerfstudio through NERFSTUDIO_METHOD_CONFIGS and PYTHONPATH.

`guide` is the guide's high-performance mode, set in Python. `putting` calls an operation that has no deterministic
implementation. `faulty` has a fault on rank 1, at step 2, in the run whose side is named in FAULTY_SIDE.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from nerfstudio.plugins.types import MethodSpecification

from f3rm_verify.f3rm.datamanager import FeatureDataManager, FeatureDataManagerConfig
from f3rm_verify.f3rm.f3rm_config import f3rm_method
from f3rm_verify.f3rm.model import FeatureFieldModel, FeatureFieldModelConfig


def _method(name: str, **changes: Any) -> MethodSpecification:
    config = dataclasses.replace(copy.deepcopy(f3rm_method.config), method_name=name, **changes)
    return MethodSpecification(config=config, description=name)


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


def _with(part: str, kind: type) -> Any:
    """The pipeline of f3rm, one part of it with another class."""
    pipeline = copy.deepcopy(f3rm_method.config.pipeline)
    old = getattr(pipeline, part)
    values = {item.name: getattr(old, item.name) for item in dataclasses.fields(old) if item.name != "_target"}
    setattr(pipeline, part, kind(**values))
    return pipeline


putting = _method("putting", pipeline=_with("model", PuttingModelConfig))
faulty = _method("faulty", pipeline=_with("datamanager", FaultyDataManagerConfig))
