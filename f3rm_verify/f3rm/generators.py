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
_MT19937_WORDS = 625
#: Where to look for a draw: every draw moves the position, and where it comes back to the same one, all words are new.
_LOOKED_AT = (0, 1, 399, 624)


class Generators:
    """Watches every generator of the process; `seen` are the states at the last look, by name.

    The states are digests of 64 bits; those of CUDA devices in use are called `cuda:0` and so on.
    """

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self._marks: tuple[Any, Any, int] = (None, None, 0)
        self._numpy_keeps_one = True
        self.drawn(thorough=True)

    def drawn(self, *, thorough: bool = False) -> dict[str, int]:
        """The new states of the generators that changed since this was asked last.

        Without `thorough`, the second of a pair of normal numbers, which NumPy drew with the first and keeps outside of
        its words, is not noticed until somebody asks with it: reading that takes longer than everything else.
        """
        before, self._marks = self._marks, (_python_mark(), _numpy_mark(), _digest(torch.get_rng_state()))
        python, numpy, torch_cpu = self._marks
        found: dict[str, int] = {}
        if python is None or python != before[0]:
            found[PYTHON] = _python_state()
        if numpy is None or numpy != before[1] or (thorough and self._numpy_keeps_one):
            found[NUMPY], self._numpy_keeps_one = _numpy_state()
        if torch_cpu != before[2]:
            found[TORCH] = torch_cpu
        if torch.cuda.is_initialized():
            for device in range(torch.cuda.device_count()):
                # Seed and offset, kept on the host: asking for them waits for no device.
                found[f"cuda:{device}"] = _digest(torch.cuda.get_rng_state(device))
        changed = {name: state for name, state in found.items() if self.seen.get(name) != state}
        self.seen.update(changed)
        return changed


def _python_mark() -> Any:
    """Some words of the state of Python's generator, as it lies in memory; None where that is not known.

    `getstate` makes 625 numbers of it, which takes a hundred times as long.
    """
    generator = random.random.__self__  # type: ignore[attr-defined]
    words = _words_of_python(id(generator))
    return None if words is None else (*(words[place] for place in _LOOKED_AT), generator.gauss_next)


@functools.lru_cache(maxsize=1)
def _words_of_python(generator: int) -> Any:
    """Position and words of a generator of CPython, behind the head of the object; None if not there."""
    if sys.implementation.name != "cpython" or sys.getsizeof(random.random.__self__) < 4 * _MT19937_WORDS:  # type: ignore[attr-defined]
        return None
    found = (ctypes.c_uint32 * _MT19937_WORDS).from_address(generator + object.__basicsize__)
    *words, position = random.getstate()[1]
    return found if list(found) == [position, *words] else None


def _python_state() -> int:
    _, words, gauss = random.getstate()
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(words)}I", *words) + repr(gauss).encode())


def _numpy_mark() -> Any:
    """Some words of the state of NumPy's generator, but not the second of a pair of normal numbers; None if unknown."""
    if not hasattr(np.random, "get_bit_generator"):  # before NumPy 1.24
        return None
    generator = np.random.get_bit_generator()
    if not isinstance(generator, np.random.MT19937):
        return None
    words = _words_at(generator.ctypes.state_address)
    return tuple(words[place] for place in _LOOKED_AT)


@functools.lru_cache(maxsize=1)
def _words_at(address: int) -> Any:
    return (ctypes.c_uint32 * _MT19937_WORDS).from_address(address)


def _numpy_state() -> tuple[int, bool]:
    """A digest of the state, and whether the second one of a pair of normal numbers may be in it."""
    state: Any = np.random.get_state()
    if isinstance(state, dict):  # somebody put another kind of generator in its place
        return xxhash.xxh3_64_intdigest(repr(state).encode()), True
    name, key, *others = state
    _, keeps_one, _ = others
    return xxhash.xxh3_64_intdigest(key.tobytes() + repr((name, others)).encode()), bool(keeps_one)


def _digest(state: torch.Tensor) -> int:
    return xxhash.xxh3_64_intdigest(state.numpy())
