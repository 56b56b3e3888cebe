"""Loads the config.yml of an earlier training, as `ns-train --load-config` would, so that it can be trained again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from nerfstudio.engine.trainer import TrainerConfig


def load_saved_config(path: Path) -> TrainerConfig:
    """The configuration in `path`, with the fields of the installed versions; raises LookupError where it has none.

    The file is the user's own: the Python objects that it names are constructed, as nerfstudio does.
    """
    try:
        config = yaml.load(path.read_text("utf8"), Loader=yaml.Loader)
    except Exception as error:  # whatever the modules that it names do when they are imported
        reason = getattr(error, "problem", None) or f"{type(error).__name__}: {error}"
        raise LookupError(f"{path} cannot be loaded in this environment: {' '.join(str(reason).split())}.") from error
    if not isinstance(config, TrainerConfig):
        raise LookupError(f"{path} holds {type(config).__name__}, not the configuration of a training.")
    for line in _brought_up_to_date(config, path):
        print(f"f3rm-verify: {line}", flush=True)
    return _without_its_own_ways(config)


def _brought_up_to_date(value: Any, path: Path, where: str = "") -> Iterator[str]:
    """Gives each part the fields that its class has today, and takes those that it no longer has; says each."""
    if isinstance(value, Mapping):
        parts = dict(value)
    elif isinstance(value, (list, tuple)):
        parts = dict(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _fields_of_today(value, path, where)
        parts = dict(vars(value))
    else:
        return
    for name, part in parts.items():
        yield from _brought_up_to_date(part, path, f"{where}{name}.")


def _fields_of_today(part: Any, path: Path, where: str) -> Iterator[str]:
    fields = {item.name: item for item in dataclasses.fields(part)}
    for name in [name for name in vars(part) if name not in fields]:
        yield f"{path.name} has {where}{name}, which {type(part).__name__} no longer has: it is left out."
        delattr(part, name)
    for name, item in fields.items():
        if name in vars(part):
            _require_table(vars(part)[name], item, f"{path} has {where}{name}")
        else:
            setattr(part, name, _default(item, path, where))
            yield f"{path.name} has no {where}{name}: its default, {getattr(part, name)!r:.80}, is taken."


def _require_table(value: Any, item: Any, what: str) -> None:
    """Raises LookupError for a single value where this version has a table, over which reading the options stumbles."""
    has_table = item.default_factory is not dataclasses.MISSING and isinstance(item.default_factory(), Mapping)
    if has_table and not isinstance(value, Mapping):
        raise LookupError(
            f"{what}: {value!r:.80}, where this version has a table; write one ({{}} if empty) in a copy."
        )


def _default(item: Any, path: Path, where: str) -> Any:
    if item.default is not dataclasses.MISSING:
        return item.default
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    raise LookupError(f"{path} has no {where}{item.name}, which this version needs; add it.")


def _without_its_own_ways(config: TrainerConfig) -> TrainerConfig:
    """Without what would lead a verification away: another configuration, a wait for the viewer, folders of its own."""
    fresh = TrainerConfig()
    config.load_config = None
    config.start_paused = False
    config.relative_model_dir = fresh.relative_model_dir
    config.logging.relative_log_dir = fresh.logging.relative_log_dir
    return config
