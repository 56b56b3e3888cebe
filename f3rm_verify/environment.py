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
    "ATEN_",
    "BLIS_",
    "CUBLAS",
    "CUDA_",
    "CUDNN",
    "DNNL_",
    "GOMP_",
    "HIP_",
    "KMP_",
    "MALLOC_",
    "MIOPEN_",
    "MKL_",
    "NCCL_",
    "NERFSTUDIO_",
    "NPY_",
    "NVIDIA_TF32",
    "OMP_",
    "ONEDNN_",
    "OPENBLAS_",
    "PYTHONHASHSEED",
    "PYTORCH_",
    "ROCBLAS_",
    "TCNN_",
    "TORCH_",
    "VECLIB_",
)
_NAMES = ("LD_PRELOAD",)
#: How the names of the instruction sets begin that kernels are chosen by, of x86 and of ARM processors.
_KERNEL_FLAGS = ("amx", "asimd", "avx", "bf16", "f16c", "fma", "i8mm", "sse4", "sve")
#: Of these, those that only say where something lies.
_PLACES = ("CUDA_CACHE_PATH", "CUDA_HOME", "CUDA_PATH", "TORCH_HOME")


def describe_environment() -> dict[str, Any]:
    """Plain data about this process; imports torch."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _packages(),
        "hardware": {
            "cpu": cpu_model(),
            "cpu_flags": _cpu_flags(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "gpus": _gpus(),
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
            "driver": _driver(),
        },
        "threads": {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()},
        "variables": _variables(),
        "git": _git(),
        "executable": sys.executable,
    }


def _packages() -> dict[str, str]:
    """Version by name; of two with one name, the first on the path, which is the one that is imported."""
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        # What a broken installation left behind has no metadata: no name, or a KeyError, depending on the Python.
        try:
            name, version = distribution.metadata["Name"], distribution.version
        except (KeyError, TypeError):
            continue
        if name and version:
            versions.setdefault(name, version)
    return dict(sorted(versions.items()))


def _variables() -> dict[str, str]:
    matters = (name for name in sorted(os.environ) if name.startswith(_PREFIXES) or name in _NAMES)
    return {name: os.environ[name] for name in matters if name not in _PLACES}


def cpu_model() -> str:
    """The processor's name, or at least its kind."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> str:
    """The instruction sets by which libraries choose between kernels, whose results differ in the last bits."""
    flags = (_cpu_info("flags") or _cpu_info("Features") or "").split()
    return " ".join(sorted(flag for flag in flags if flag.startswith(_KERNEL_FLAGS)))


def _cpu_info(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf8", "replace").splitlines()
    except OSError:
        return None
    return next((value.strip() for name, _, value in (li.partition(":") for li in lines) if name.strip() == key), None)


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]


def _driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text("utf8", "replace").partition("\n")[0] or None
    except OSError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit and dirtiness of the working tree that the training was started in; None outside of one."""
    try:
        commit = _ask_git("rev-parse", "HEAD")
        status = _ask_git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.decode("ascii", "replace"), "dirty": bool(status)}


def _ask_git(*arguments: str) -> bytes:
    # Reading must not write: git status would refresh the index, under a lock that two trainings at once fight for.
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, capture_output=True, timeout=10, check=True, stdin=subprocess.DEVNULL).stdout.strip()
