"""Gives nerfstudio any registered method with seeding and evidence, through NERFSTUDIO_METHOD_CONFIGS.

That variable is read last and always wins, whichever packages are installed. nerfstudio swallows what goes wrong here
and then trains the stock method; the launcher notices, by the nonce that is missing in the manifest.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from importlib import metadata
from typing import Any

import torch
from nerfstudio.plugins.types import MethodSpecification

from f3rm_verify.f3rm.entry_point import GROUP, METHOD, discover
from f3rm_verify.f3rm.lifeline import watch_launcher
from f3rm_verify.f3rm.trainer import wrap_config

#: Set by the launcher: the name of the method to wrap.
METHOD_VARIABLE = "F3RM_VERIFY_METHOD"


def wrapped_method() -> MethodSpecification:
    """The method that the launcher named, with our trainer around it. Raises LookupError where there is none."""
    watch_launcher()
    name = os.environ[METHOD_VARIABLE]
    specification = _find(name)
    config = wrap_config(specification.config)
    if not torch.cuda.is_available():
        config.machine = dataclasses.replace(config.machine, device_type="cpu")
    return MethodSpecification(config=config, description=specification.description)


def _find(name: str) -> MethodSpecification:
    if name == METHOD:
        specification = discover()
        if specification is not None:
            return specification
    for point in metadata.entry_points(group=GROUP):
        specification = point.load() if point.name == name else None
        if isinstance(specification, MethodSpecification):
            return specification
    # nerfstudio is importing this very module, and has filled its dictionary of stock methods by now.
    stock: dict[str, Any] = getattr(sys.modules["nerfstudio.configs.method_configs"], "method_configs")
    if name not in stock:
        raise LookupError(f"nerfstudio knows no method {name!r}")
    descriptions: dict[str, str] = getattr(sys.modules["nerfstudio.configs.method_configs"], "descriptions")
    return MethodSpecification(config=stock[name], description=descriptions.get(name, ""))
