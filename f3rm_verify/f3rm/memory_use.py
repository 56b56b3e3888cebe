"""Peak memory of this training process, and a sentence instead of a stack of frames where it runs out."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from f3rm_verify.errors import TrainingError
from f3rm_verify.memory import REMEDY, in_words, peak_rss_bytes


def peak_memory() -> dict[str, int]:
    """For the manifest, in bytes: of this process in RAM without its workers, and of torch on its CUDA device."""
    peak = {"peak_rss_bytes": peak_rss_bytes()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["cuda_peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        peak["cuda_peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    return peak


@contextmanager
def explained_shortage() -> Iterator[None]:
    """Inside, running out of memory ends in a TrainingError that says how much there was and what helps."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not _is_shortage(error):
            raise
        what = " ".join(str(error).split()) or type(error).__name__
        peak = in_words(peak_memory()["peak_rss_bytes"])
        raise TrainingError(f"The training ran out of memory ({what:.300}{peak}). {REMEDY}") from error


def _is_shortage(error: Exception) -> bool:
    """Whether it is Python's, NumPy's, the system's, or torch's, on a CPU or on a GPU."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return "DefaultCPUAllocator" in str(error)
