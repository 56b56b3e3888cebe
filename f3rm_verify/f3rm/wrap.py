"""Gives the trainer of any method seeding and evidence.

The result is a subclass of that method's own configuration with the seeding fields added, whose target is a subclass of
that method's own trainer.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from nerfstudio.engine.trainer import Trainer, TrainerConfig

from f3rm_verify.f3rm.trainer import F3RMTrainer, F3RMTrainerConfig, SeededTrainer


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
