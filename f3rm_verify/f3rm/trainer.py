"""F3RMTrainer: nerfstudio's trainer, seeded as a whole, that leaves evidence of what it did.

The same is offered for the trainer of any other method (`wrap_config`): a subclass of that method's own configuration
with the seeding fields added, whose target is a subclass of that method's own trainer.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils import writer
from nerfstudio.utils.rich_utils import CONSOLE

from f3rm_verify.environment import describe_environment
from f3rm_verify.f3rm.data_workers import observe_data_workers, seeded_data_workers
from f3rm_verify.f3rm.evaluation import EVALUATE_VARIABLE, check_render_budget, evaluate
from f3rm_verify.f3rm.lifeline import watch_launcher
from f3rm_verify.f3rm.lpips import degrade_lpips_offline
from f3rm_verify.recorder import Recorder, digest_files, digest_tensors
from f3rm_verify.seeding import SeedingPlan, apply_seeding, observe_flags


@dataclass
class F3RMTrainerConfig(TrainerConfig):
    """Configuration of a training that is seeded as a whole."""

    _target: type = field(default_factory=lambda: F3RMTrainer)
    enable_comprehensive_seeding: bool = True
    """Seed every generator and set every determinism flag below; off leaves nerfstudio's own seeding alone."""
    seed_deterministic_algorithms: bool = True
    """Use deterministic algorithms in torch."""
    seed_warn_only: bool = False
    """Only warn where an operation has no deterministic implementation, instead of stopping."""
    seed_cublas_workspace: bool = True
    """Configure cuBLAS' workspace for determinism."""
    print_seed_info: bool = True
    """Print the seeding log."""


class SeededTrainer:
    """Seeding and evidence for any trainer; stands before it in the bases."""

    config: Any
    pipeline: Any
    base_dir: Path
    step: int

    def __init__(self, config: Any, local_rank: int = 0, world_size: int = 1) -> None:
        watch_launcher()
        degrade_lpips_offline()
        self._plan = _plan(config, local_rank)
        self._seeding = apply_seeding(self._plan, say=CONSOLE.print)
        self._steps_done = 0
        self._recorder = Recorder(config.get_base_dir())
        self._recorder.status("setting up")
        self._recorder.update_manifest(
            {
                "method": config.method_name,
                "implementation": implementation(config),
                "seed": self._plan.base_seed,
                "rank": self._plan.rank,
                "world_size": world_size,
                "argv": sys.argv,
                "torch_initial_seed": torch.initial_seed(),
                "environment": describe_environment(),
            }
        )
        self._recorder.write_seeding(self._seeding.to_dict())
        super().__init__(config, local_rank, world_size)  # type: ignore[call-arg]

    def setup(self, *arguments: Any, **keywords: Any) -> None:
        """Sets the training up, and records what it starts from."""
        with seeded_data_workers(self._plan):
            super().setup(*arguments, **keywords)  # type: ignore[misc]
        self._seeding.entries.append(observe_data_workers(self._plan, self.pipeline.datamanager))
        self._recorder.write_seeding(self._seeding.to_dict())
        evaluation = os.environ.get(EVALUATE_VARIABLE)
        if evaluation:
            check_render_budget(self.pipeline, self.base_dir, float(evaluation))
        self._recorder.update_manifest(
            {
                "data": _data_digests(self.pipeline.datamanager),
                "encodings": _encodings(self.pipeline.model),
                "parameters": {"before": self._parameter_digest(), "after": None},
                "lpips": getattr(getattr(self.pipeline.model, "lpips", None), "unavailable_because", None),
            }
        )

    def train(self) -> None:
        """Trains; then writes the completion record and, where the launcher asked for it, metrics and renders."""
        first_step = self._start_step  # type: ignore[attr-defined]
        try:
            super().train()  # type: ignore[misc]
        finally:
            flush_event_files()
        flags = observe_flags(self._plan)
        entries = [dataclasses.replace(flag, claim=f"{flag.claim}, after training") for flag in flags]
        self._seeding.entries.extend(entries)
        self._recorder.write_seeding(self._seeding.to_dict())
        self._recorder.manifest["parameters"]["after"] = self._parameter_digest()
        wanted = self.config.max_num_iterations
        if self._steps_done == wanted:
            self._recorder.complete(first_step=first_step, steps=self._steps_done)
        if os.environ.get(EVALUATE_VARIABLE):
            metrics = evaluate(
                self.pipeline,
                self.base_dir,
                progress=lambda done, images: self._recorder.status("evaluating", step=done - 1, steps=images),
            )
            self._recorder.write_metrics(metrics)
        self._recorder.status("done", step=self.step, steps=wanted)

    def train_iteration(self, step: int) -> Any:
        """One step, counted."""
        result = super().train_iteration(step)  # type: ignore[misc]
        self._steps_done += 1
        written = self._recorder.status(
            "training",
            step=step,
            steps=self._start_step + self.config.max_num_iterations,  # type: ignore[attr-defined]
            # On a GPU, reading the loss would wait for the device at every step.
            loss=result[0].item() if self.config.machine.device_type == "cpu" else None,
        )
        if written:
            flush_event_files()
        return result

    def _parameter_digest(self) -> str:
        return digest_tensors(self.pipeline.model.named_parameters())


class F3RMTrainer(SeededTrainer, Trainer):
    """nerfstudio's trainer with seeding and evidence."""


def flush_event_files() -> None:
    """Puts on disk what TensorBoard's writer holds back: up to two minutes, and at the end what nobody closes."""
    for event_writer in writer.EVENT_WRITERS:
        if isinstance(event_writer, writer.TensorboardWriter):
            event_writer.tb_writer.flush()


def _plan(config: Any, local_rank: int) -> SeedingPlan:
    machine = config.machine
    return SeedingPlan(
        base_seed=machine.seed,
        rank=machine.machine_rank * machine.num_devices + local_rank,
        enabled=config.enable_comprehensive_seeding,
        deterministic_algorithms=config.seed_deterministic_algorithms,
        warn_only=config.seed_warn_only,
        cublas_workspace=config.seed_cublas_workspace,
        print_info=config.print_seed_info,
    )


def implementation(config: Any) -> dict[str, str]:
    """Which classes make up the training: trainer, pipeline, data manager, model."""
    parts = {"trainer": config, "pipeline": config.pipeline}
    for name in ("datamanager", "model"):
        if hasattr(config.pipeline, name):
            parts[name] = getattr(config.pipeline, name)
    return {name: _class_name(part._target) for name, part in parts.items()}


def _class_name(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def _encodings(model: torch.nn.Module) -> dict[str, str]:
    """The implementation of every encoding of the model, by module path."""
    return {
        name: "tcnn" if getattr(module, "tcnn_encoding", None) is not None else f"torch ({type(module).__name__})"
        for name, module in model.named_modules()
        if hasattr(module, "tcnn_encoding")
    }


def _data_digests(datamanager: Any) -> dict[str, Any]:
    """A digest of every image and of the file with the poses, and of the features."""
    files: list[Path] = []
    for split in ("train", "eval"):
        dataset = getattr(datamanager, f"{split}_dataset", None)
        files += [Path(name) for name in getattr(dataset, "image_filenames", None) or []]
    data = Path(datamanager.get_datapath())
    poses = sorted(data.glob("*.json")) if data.is_dir() else [data]
    names = [path for path in dict.fromkeys([*poses, *files]) if path.is_file()]
    folder = data if data.is_dir() else data.parent
    digests = {os.path.relpath(name, folder): value for name, value in digest_files(names).items()}
    features = getattr(datamanager, "features", None)
    return {
        "folder": str(data),
        "files": digests,
        "features": None if features is None else {"digest": features.digest, "source": features.source},
    }


def wrap_config(config: TrainerConfig) -> TrainerConfig:
    """`config` with seeding fields and a trainer that seeds and leaves evidence; itself where it already has them."""
    if isinstance(config, F3RMTrainerConfig):
        return config
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config) if item.init}
    values["_target"] = F3RMTrainer if config._target is Trainer else seeded_trainer(config._target)
    return seeded_config(type(config))(**values)  # type: ignore[arg-type]


@functools.cache
def seeded_trainer(trainer: type) -> type:
    """A subclass of `trainer` that seeds and leaves evidence."""
    return _importable(type(trainer.__name__, (SeededTrainer, trainer), {}), trainer, "trainer")


@functools.cache
def seeded_config(config: type) -> type[F3RMTrainerConfig]:
    """A subclass of `config` with the seeding fields."""
    if config is TrainerConfig:
        return F3RMTrainerConfig
    mixed = type(config.__name__, (F3RMTrainerConfig, config), {})
    return _importable(dataclass(mixed), config, "config")


def _importable(made: type, original: type, kind: str) -> type:
    """Gives a class made here a name that config.yml can hold and that `__getattr__` below finds again."""
    made.__module__ = __name__
    made.__qualname__ = made.__name__ = f"seeded_{kind}__{original.__module__.replace('.', '__')}___{original.__name__}"
    return made


def __getattr__(name: str) -> Any:
    import importlib

    for prefix, make in (("seeded_trainer__", seeded_trainer), ("seeded_config__", seeded_config)):
        if name.startswith(prefix):
            module, _, original = name[len(prefix) :].partition("___")
            return make(getattr(importlib.import_module(module.replace("__", ".")), original))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
