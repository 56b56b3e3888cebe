"""Trains in this process, which imports nerfstudio once: the preset and other small methods on the built-in scene."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from f3rm_verify.presets import SMALL
from f3rm_verify.scene import write_scene

STEPS = 6
#: What makes nerfacto as small.
NERFACTO = (
    *("--pipeline.datamanager.train-num-rays-per-batch", "256"),
    *("--pipeline.datamanager.eval-num-rays-per-batch", "256"),
    *("--pipeline.model.num-levels", "8", "--pipeline.model.max-res", "256"),
    *("--pipeline.model.log2-hashmap-size", "14", "--pipeline.model.num-nerf-samples-per-ray", "16"),
    *("--pipeline.model.num-proposal-samples-per-ray", "64", "32"),
)
METHODS = {"f3rm": SMALL, "nerfacto": NERFACTO}


class Trainings:
    """Trains with one seed, in a directory of its own each time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.scene = write_scene(folder / "scene")

    def train(self, *, method: str = "f3rm", seeded: bool = True, **variables: str) -> Any:
        """The trainer after its training, which started with these variables for it: `TRACE="off"`."""
        import torch
        import tyro
        from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
        from nerfstudio.utils import writer

        from f3rm_verify.f3rm.wrap import wrap_config

        self.count += 1
        words = ["--output-dir", str(self.folder / str(self.count)), "--vis", "tensorboard", *METHODS[method]]
        words += ["--max-num-iterations", str(STEPS), "--steps-per-eval-batch", "3", "--machine.device-type", "cpu"]
        config = wrap_config(tyro.cli(AnnotatedBaseConfigUnion, args=[method, "--data", str(self.scene), *words]))
        config.enable_comprehensive_seeding, config.encoding = seeded, "stock"  # type: ignore[attr-defined]
        config.pipeline.datamanager.data = config.data
        config.viewer.quit_on_train_completion = True
        config.set_timestamp()
        config.save_config()
        torch.manual_seed(42)
        np.random.seed(42)
        random.seed(42)
        torch.set_num_threads(2)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(f"F3RM_VERIFY_{name}", value)
            patch.setattr(writer, "EVENT_WRITERS", [])
            patch.setattr(writer, "EVENT_STORAGE", [])
            trainer = config.setup(local_rank=0, world_size=1)
            try:
                trainer.setup()
                trainer.train()
            finally:
                for worker in getattr(trainer.pipeline.datamanager, "data_procs", None) or ():
                    worker.terminate()
        torch.use_deterministic_algorithms(False)
        return trainer


def weights(trainer: Any) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in trainer.pipeline.state_dict().items()}
