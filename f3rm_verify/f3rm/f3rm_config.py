"""The method `f3rm`: upstream's defaults, trained by F3RMTrainer."""

from __future__ import annotations

import torch
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.configs.base_config import MachineConfig, ViewerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from nerfstudio.plugins.types import MethodSpecification

from f3rm_verify.f3rm.datamanager import FeatureDataManagerConfig
from f3rm_verify.f3rm.model import FeatureFieldModelConfig
from f3rm_verify.f3rm.trainer import F3RMTrainerConfig


def _field_optimizer() -> dict[str, object]:
    return {
        "optimizer": AdamOptimizerConfig(lr=1e-2, eps=1e-15),
        "scheduler": ExponentialDecaySchedulerConfig(lr_final=0.0001, max_steps=200000),
    }


f3rm_method = MethodSpecification(
    config=F3RMTrainerConfig(
        method_name="f3rm",
        machine=MachineConfig(device_type="cuda" if torch.cuda.is_available() else "cpu"),
        steps_per_eval_batch=500,
        steps_per_save=2000,
        max_num_iterations=30000,
        mixed_precision=True,
        pipeline=VanillaPipelineConfig(
            datamanager=FeatureDataManagerConfig(
                dataparser=NerfstudioDataParserConfig(train_split_fraction=0.95),
                train_num_rays_per_batch=4096,
                eval_num_rays_per_batch=4096,
            ),
            model=FeatureFieldModelConfig(
                eval_num_rays_per_chunk=1 << 14,
                camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"),
            ),
        ),
        optimizers={
            "proposal_networks": _field_optimizer(),
            "fields": _field_optimizer(),
            "feature_field": _field_optimizer(),
            "camera_opt": {
                "optimizer": AdamOptimizerConfig(lr=6e-4, eps=1e-8, weight_decay=1e-2),
                "scheduler": ExponentialDecaySchedulerConfig(max_steps=10000),
            },
        },
        viewer=ViewerConfig(num_rays_per_chunk=1 << 15),
        vis="viewer",
    ),
    description="F3RM: a NeRF and, trained in parallel, a feature field distilled from 2D features; seeded.",
)
