"""The generators of random numbers of this process: their states, and who drew from them. Draws from none."""

from __future__ import annotations

import ctypes
import functools
import random
import struct
import sys
from typing import Any

import numpy as np
import torch
import xxhash

PYTHON, NUMPY, TORCH = "python", "numpy", "torch cpu"
#: The size of MT19937's state in memory: a position and 624 words.
_MT19937_BYTES = 625 * 4


class Generators:
    """Watches every generator of the process; `seen` are the states at the last look, by name.

    The states are digests of 64 bits; those of CUDA devices in use are called `cuda:0` and so on.
    """

    def __init__(self) -> None:
        self._python: tuple[Any, int] = (None, 0)
        self._numpy: tuple[Any, int] = (None, 0)
        self.seen = self._look(all_of_numpy=True)

    def drawn(self, *, all_of_numpy: bool = False) -> dict[str, int]:
        """The new states of the generators that changed since this was asked last.

        Reading all of NumPy's state takes longer than everything else. Without `all_of_numpy`, the second of a pair of
        normal numbers, which NumPy drew with the first, is not noticed until somebody asks with it.
        """
        before, self.seen = self.seen, self._look(all_of_numpy=all_of_numpy)
        return {name: state for name, state in self.seen.items() if before.get(name) != state}

    def _look(self, *, all_of_numpy: bool) -> dict[str, int]:
        raw = _raw_python_state()
        if raw is None or raw != self._python[0]:
            self._python = raw, _python_state()
        raw = _raw_numpy_state()
        if all_of_numpy or raw is None or raw != self._numpy[0]:
            self._numpy = raw, _numpy_state()
        found = {PYTHON: self._python[1], NUMPY: self._numpy[1], TORCH: _digest(torch.get_rng_state())}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            for device in range(torch.cuda.device_count()):
                # Seed and offset, kept on the host: asking for them waits for no device.
                found[f"cuda:{device}"] = _digest(torch.cuda.get_rng_state(device))
        return found


def _raw_python_state() -> Any:
    """All of the state of Python's generator, as it lies in memory; None where that is not known.

    `getstate` makes 625 numbers of it, which takes ten times as long.
    """
    generator = random.random.__self__  # type: ignore[attr-defined]
    place = _place_of_python_state(id(generator))
    if place is None:
        return None
    return ctypes.string_at(place, _MT19937_BYTES), generator.gauss_next


@functools.lru_cache(maxsize=1)
def _place_of_python_state(generator: int) -> int | None:
    """Where CPython keeps position and words of a generator: behind the head of the object. None if not there."""
    words = random.getstate()[1]
    place = generator + object.__basicsize__
    expected = struct.pack("=625I", words[-1], *words[:-1])
    if sys.implementation.name != "cpython" or sys.getsizeof(random.random.__self__) < _MT19937_BYTES:  # type: ignore[attr-defined]
        return None
    return place if ctypes.string_at(place, _MT19937_BYTES) == expected else None


def _python_state() -> int:
    _, words, gauss = random.getstate()
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(words)}I", *words) + repr(gauss).encode())


def _raw_numpy_state() -> bytes | None:
    """What NumPy's generator has in memory, but for the second of a pair of normal numbers; None where unknown."""
    if not hasattr(np.random, "get_bit_generator"):  # before NumPy 1.24
        return None
    generator = np.random.get_bit_generator()
    if not isinstance(generator, np.random.MT19937):
        return None
    return ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)


def _numpy_state() -> int:
    state: Any = np.random.get_state()
    if isinstance(state, dict):  # somebody put another kind of generator in its place
        return xxhash.xxh3_64_intdigest(repr(state).encode())
    name, key, *others = state
    # Among the others is the second one of a pair of normal numbers, where only the first was drawn.
    return xxhash.xxh3_64_intdigest(key.tobytes() + repr((name, others)).encode())


def _digest(state: torch.Tensor) -> int:
    return xxhash.xxh3_64_intdigest(state.cpu().numpy().tobytes())
