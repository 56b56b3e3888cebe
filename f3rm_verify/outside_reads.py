"""Notes where code of the training, not of its libraries, reads a clock or the system's entropy: no seed reaches these.

Python's profiling hook shows each call of a built-in function with its caller. It is set only while a training is built
and in its first steps, because it costs time; it changes nothing that is computed.
"""

from __future__ import annotations

import os
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

Source = Literal["clock", "entropy"]

_CLOCKS = frozenset(
    ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "now", "utcnow")
)
_ENTROPY = frozenset(("urandom", "getrandom", "seed"))
_NAMES = _CLOCKS | _ENTROPY
#: Whose calls are not the training's: they time and log themselves.
_LIBRARIES = frozenset(
    (
        *("f3rm_verify", "huggingface_hub", "multiprocess", "nerfstudio", "rich", "tensorboard", "torch"),
        *("torchmetrics", "torchvision", "tqdm", "transformers", "tyro", "viser", "wandb"),
    )
)
#: What stands between a training and the entropy that it asks for.
_PLUMBING = frozenset(("numpy", "torch"))
_STANDARD = str(Path(sysconfig.get_paths()["stdlib"]))
_MOST = 20


class OutsideReads:
    """What was read, by "clock, while building" and so on: places in the code, each once."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}
        self._hook: Callable[..., object] | None = None

    @contextmanager
    def watched(self, phase: str) -> Iterator[None]:
        """Inside, reads of this thread are noted, unless somebody else profiles."""
        self.start(phase)
        try:
            yield
        finally:
            self.stop()

    def start(self, phase: str) -> None:
        """Notes reads from now on, as of `phase`."""
        if sys.getprofile() is None:

            def hook(frame: FrameType, event: str, argument: Any) -> None:
                if event == "c_call" and argument.__name__ in _NAMES:
                    self._note(phase, frame, argument)

            self._hook = hook
            sys.setprofile(hook)

    def stop(self) -> None:
        """Notes no more."""
        if self._hook is not None and sys.getprofile() is self._hook:
            sys.setprofile(None)
        self._hook = None

    def _note(self, phase: str, frame: FrameType, function: Any) -> None:
        source = _source(frame, function)
        place = None if source is None else _place(frame, source)
        if place is not None:
            places = self.found.setdefault(f"{source}, while {phase}", [])
            if place not in places and len(places) < _MOST:
                places.append(place)


def _source(frame: FrameType, function: Any) -> Source | None:
    """What a built-in function reads, by its name and by what it belongs to."""
    owner = getattr(function, "__self__", None)
    name, module = function.__name__, getattr(owner, "__name__", "")
    if name in _CLOCKS:
        # Those of module time, and those of the class datetime or of what is made from it.
        is_clock = module == "time" if name not in ("now", "utcnow") else isinstance(owner, type)
        return "clock" if is_clock else None
    if name in ("urandom", "getrandom"):
        return "entropy" if module == os.name else None
    if type(owner).__module__.partition(".")[0] == "torch":
        return "entropy"  # torch's generators: `seed()` takes no seed, `manual_seed` does
    unseeded = isinstance(owner, random.Random) and frame.f_locals.get("a", 0) is None
    return "entropy" if unseeded else None


def _place(frame: FrameType, source: Source) -> str | None:
    """File, line and function of the nearest code that is not plumbing; None where that is a library."""
    at: FrameType | None = frame
    while at is not None:
        path, package = at.f_code.co_filename, str(at.f_globals.get("__name__", "")).partition(".")[0]
        if package == "tempfile":
            return None  # the name of a file
        standard = path.startswith((_STANDARD, "<")) and "site-packages" not in path
        if not standard and not (source == "entropy" and package in _PLUMBING):
            # NumPy's RandomState reads entropy also where it is given a seed, so it says nothing.
            if package in _LIBRARIES or (source == "entropy" and "RandomState" in at.f_code.co_names):
                return None
            return f"{Path(path).name}:{at.f_lineno} ({at.f_code.co_name})"
        at = at.f_back
    return None
