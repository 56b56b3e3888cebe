"""Gives nerfstudio any registered method with seeding and evidence, through NERFSTUDIO_METHOD_CONFIGS.

That variable is read last and always wins, whichever packages are installed. nerfstudio swallows what goes wrong here
and then trains the stock method; the launcher notices, by the nonce that is missing in the manifest.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from nerfstudio.plugins.types import MethodSpecification

from f3rm_verify import launch_variables
from f3rm_verify.f3rm.entry_point import GROUP, METHOD, discover
from f3rm_verify.f3rm.lifeline import watch_launcher
from f3rm_verify.f3rm.refusal import refuse
from f3rm_verify.f3rm.wrap import wrap_config


def wrapped_method() -> MethodSpecification:
    """The method that the launcher named, with our trainer around it.

    Ends the process where that cannot be had: an exception would be swallowed, and the stock method trained.
    """
    watch_launcher()
    name = os.environ[launch_variables.METHOD]
    try:
        return _wrapped(name)
    except LookupError as error:
        refuse(error.args[0])
    except Exception:
        traceback.print_exc()
        refuse(f"the method {name!r} cannot be trained under f3rm-verify's trainer.")


def _wrapped(name: str) -> MethodSpecification:
    saved = os.environ.get(launch_variables.LOAD_CONFIG)
    specification = _find_saved(Path(saved)) if saved else _find(name)
    config = wrap_config(specification.config)
    if not torch.cuda.is_available():
        config.machine = dataclasses.replace(config.machine, device_type="cpu")
    return MethodSpecification(config=config, description=specification.description)


def _find_saved(path: Path) -> MethodSpecification:
    from f3rm_verify.f3rm.saved_config import load_saved_config

    return MethodSpecification(config=load_saved_config(path), description=f"as saved in {path}")


def _find(name: str) -> MethodSpecification:
    """The method that nerfstudio would train under this name, looked for in the order in which its sources win."""
    specification = _find_in_variable(name) or (discover() if name == METHOD else None) or _find_entry_point(name)
    if specification is not None:
        return specification
    # nerfstudio is importing this very module, and has filled its dictionary of stock methods by now.
    known = sys.modules["nerfstudio.configs.method_configs"]
    stock: dict[str, Any] = known.method_configs
    if name not in stock:
        raise LookupError(f"nerfstudio knows no method {name!r}")
    descriptions: dict[str, str] = known.descriptions
    return MethodSpecification(config=stock[name], description=descriptions.get(name, ""))


def _find_in_variable(name: str) -> MethodSpecification | None:
    """A method that the user named in NERFSTUDIO_METHOD_CONFIGS, before ours was appended."""
    found = None
    for definition in filter(None, os.environ.get(launch_variables.METHODS, "").split(",")):
        key, _, place = definition.partition("=")
        if key != name or place == f"{__name__}:{wrapped_method.__name__}":
            continue
        module, _, attribute = place.partition(":")
        value = getattr(importlib.import_module(module), attribute)
        found = value() if callable(value) else value
    return _require_specification(name, found)


def _find_entry_point(name: str) -> MethodSpecification | None:
    """A method of an installed package. nerfstudio goes by the name in its configuration, not by the entry point's."""
    for point in metadata.entry_points(group=GROUP):
        specification = point.load()
        if isinstance(specification, MethodSpecification) and specification.config.method_name == name:
            return specification
    return None


def _require_specification(name: str, found: Any) -> MethodSpecification | None:
    if found is not None and not isinstance(found, MethodSpecification):
        raise TypeError(f"{launch_variables.METHODS} gives {found!r:.80} for {name}, which is no MethodSpecification")
    return found
