"""What a training ran on: packages, hardware, threads, environment variables, code."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

#: Environment variables that can change numbers, by prefix.
_PREFIXES = (
    "CUBLAS",
    "CUDA_",
    "CUDNN",
    "GOMP_",
    "KMP_",
    "MALLOC_",
    "MKL_",
    "NCCL_",
    "NERFSTUDIO_",
    "NVIDIA_TF32",
    "OMP_",
    "OPENBLAS_",
    "PYTHONHASHSEED",
    "PYTORCH_",
    "TCNN_",
    "TORCH_",
)
_NAMES = ("LD_PRELOAD",)


def describe_environment() -> dict[str, Any]:
    """Plain data about this process; imports torch."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted((dist.metadata["Name"], dist.version) for dist in metadata.distributions())),
        "hardware": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "gpus": _gpus(),
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
            "driver": _driver(),
        },
        "threads": {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()},
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES) or name in _NAMES
        },
        "git": _git(Path.cwd()),
        "executable": sys.executable,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf8", "replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]


def _driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text("utf8", "replace").splitlines()[0]
    except OSError:
        return None


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit and dirtiness of the working tree that the training was started in; None outside of one."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(status.strip())}
