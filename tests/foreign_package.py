"""A package that registers a method `f3rm` of its own, whose data manager keeps a cache as upstream F3RM's does."""

from __future__ import annotations

import os
from pathlib import Path

#: The module `own_f3rm`. Making the features draws from torch's generator before the model is built, and the cache is
#: valid for the image paths under which it was made.
MODULE = """
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Type
from urllib.error import URLError

import torch
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from nerfstudio.plugins.types import MethodSpecification


@dataclass
class OwnDataManagerConfig(VanillaDataManagerConfig):
    _target: Type = field(default_factory=lambda: OwnDataManager)


class OwnDataManager(VanillaDataManager):
    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        names = self.train_dataset.image_filenames + self.eval_dataset.image_filenames
        features = self.features_of(names, Path(self.config.dataparser.data) / "f3rm_clip_features.pt")
        self.train_features, self.eval_features = features.tensor_split([len(self.train_dataset)])

    def features_of(self, names, path):
        if path.exists():
            cache = torch.load(path)
            if cache["image_fnames"] == names:
                print("own f3rm: cache is used", flush=True)
                return cache["features"]
        if os.environ.get("OWN_F3RM_OFFLINE"):
            raise URLError("offline")
        print("own f3rm: extracting", flush=True)
        features = torch.rand(len(names), 4)
        torch.save({"args": {}, "image_fnames": names, "features": features}, path)
        return features


@dataclass
class OwnModelConfig(NerfactoModelConfig):
    _target: Type = field(default_factory=lambda: OwnModel)


class OwnModel(NerfactoModel):
    pass


def _optimizer():
    return {"optimizer": AdamOptimizerConfig(lr=1e-2, eps=1e-15), "scheduler": None}


method = MethodSpecification(
    config=TrainerConfig(
        method_name="f3rm",
        max_num_iterations=100,
        steps_per_save=1000,
        pipeline=VanillaPipelineConfig(
            datamanager=OwnDataManagerConfig(
                dataparser=NerfstudioDataParserConfig(),
                train_num_rays_per_batch=128,
                eval_num_rays_per_batch=128,
            ),
            model=OwnModelConfig(
                num_levels=8,
                max_res=256,
                log2_hashmap_size=14,
                num_proposal_iterations=1,
                num_proposal_samples_per_ray=(32,),
                num_nerf_samples_per_ray=16,
                proposal_net_args_list=[
                    {"hidden_dim": 16, "log2_hashmap_size": 12, "num_levels": 5, "max_res": 64, "use_linear": False}
                ],
                average_init_density=0.01,
            ),
        ),
        optimizers={name: _optimizer() for name in ("proposal_networks", "fields", "camera_opt")},
    ),
    description="somebody's own f3rm",
)
"""
_FILES = {
    "own_f3rm.py": MODULE,
    "own_f3rm-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: own-f3rm\nVersion: 1.0\n",
    "own_f3rm-1.0.dist-info/entry_points.txt": "[nerfstudio.method_configs]\nf3rm = own_f3rm:method\n",
}


def install(folder: Path) -> dict[str, str]:
    """Puts the package into `folder`; returns the environment variables by which interpreters find it."""
    for name, content in _FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, "utf8")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
