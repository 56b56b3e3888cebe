"""The generators of random numbers of this process: their states, and who drew from them. Draws from none."""

from __future__ import annotations

import ctypes
import random
import struct
from typing import Any

import numpy as np
import torch
import xxhash

PYTHON, NUMPY, TORCH = "python", "numpy", "torch cpu"
#: The size of MT19937's state in memory: 624 words and a position.
_MT19937_BYTES = 625 * 4


class Generators:
    """Watches every generator of the process."""

    def __init__(self) -> None:
        self._python: tuple[Any, int] = (None, 0)
        self._numpy: tuple[bytes | None, int] = (None, 0)
        self._seen = self.states()

    def states(self) -> dict[str, int]:
        """A digest of 64 bits of the state of each generator, by name; as `cuda:0` those of CUDA devices in use."""
        return self._look(numpy=_numpy_state())

    def drawn(self, *, all_of_numpy: bool = False) -> dict[str, int]:
        """The new states of the generators that changed since this was asked last.

        Reading all of NumPy's state takes longer than everything else. Without `all_of_numpy`, the second of a pair of
        normal numbers, which NumPy drew with the first, is not noticed until somebody asks with it.
        """
        states = self._look(numpy=_numpy_state() if all_of_numpy else self._numpy_state())
        changed = {name: state for name, state in states.items() if self._seen.get(name) != state}
        self._seen = states
        return changed

    def _look(self, *, numpy: int) -> dict[str, int]:
        self._numpy = _raw_numpy_state(), numpy
        found = {PYTHON: self._python_state(), NUMPY: numpy, TORCH: _digest(torch.get_rng_state())}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            for device in range(torch.cuda.device_count()):
                # Seed and offset, kept on the host: asking for them waits for no device.
                found[f"cuda:{device}"] = _digest(torch.cuda.get_rng_state(device))
        return found

    def _python_state(self) -> int:
        state = random.getstate()
        if state != self._python[0]:
            _, words, gauss = state
            content = struct.pack(f"<{len(words)}I", *words) + repr(gauss).encode()
            self._python = state, xxhash.xxh3_64_intdigest(content)
        return self._python[1]

    def _numpy_state(self) -> int:
        raw = _raw_numpy_state()
        return _numpy_state() if raw is None or raw != self._numpy[0] else self._numpy[1]


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
