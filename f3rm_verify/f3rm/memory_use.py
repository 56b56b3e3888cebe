"""Peak memory of this training process, and a sentence instead of a stack of frames where it runs out."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from f3rm_verify.errors import TrainingError
from f3rm_verify.memory import REMEDY, in_words, peak_rss_bytes, reset_peak_rss, rss_bytes


def peak_memory() -> dict[str, int]:
    """For the manifest, in bytes: of this process in RAM without its workers, and of torch on its CUDA device."""
    peak = {"peak_rss_bytes": peak_rss_bytes()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["cuda_peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        peak["cuda_peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    return peak


class PeakMemory:
    """The most memory in a span of steps; `how` says which of two ways there is to know the resident part."""

    def __init__(self, *, cuda: bool) -> None:
        self._cuda = cuda
        self._resets = reset_peak_rss()
        self._seen = 0
        self.how = (
            "the kernel's peak, reset before each block"
            if self._resets
            else "the most after any step: this kernel's peak cannot be reset"
        )

    def begin(self) -> None:
        """Forgets what was before."""
        reset_peak_rss()
        self._seen = rss_bytes()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def sample(self) -> None:
        """Looks, where the system does not do so by itself."""
        if not self._resets:
            self._seen = max(self._seen, rss_bytes())

    def peaks(self) -> dict[str, int]:
        """Since `begin`, in bytes."""
        peaks = {"resident": peak_rss_bytes() if self._resets else self._seen}
        if self._cuda:
            peaks["cuda_allocated"] = torch.cuda.max_memory_allocated()
            peaks["cuda_reserved"] = torch.cuda.max_memory_reserved()
        return peaks

    def release(self) -> None:
        """Gives back what the allocators keep for later: it would count as the next block's."""
        with suppress(OSError, AttributeError):  # only the GNU C library has it
            ctypes.CDLL(None).malloc_trim(0)
        if self._cuda:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Returns when the device has done what it was told."""
        if self._cuda:
            torch.cuda.synchronize()


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
