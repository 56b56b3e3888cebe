"""Digests of tensors in 64 bits that see every bit, its place, and the dtype, shape and name of each tensor.

On the CPU: XXH3 of 64 bits over a line with name, dtype and shape, then the bytes, tensor after tensor. XXH3 has no
proof. Measured on billions of inputs it collides as often as chance would have it, so two contents that differ are
taken to share a digest with probability 2^-64 (https://github.com/Cyan4973/xxHash/wiki/Collision-ratio-comparison).

On any other device, the bytes are reduced there to 128 bits, and these stand for them in the same XXH3. The reduction
is MULTILINEAR of Lemire and Kaser (Strongly universal string hashing is fast, 2014, https://arxiv.org/abs/1202.4961):
with words w_i of 32 bits and fixed random multipliers m_i of 64 bits, the sum of m_i w_i modulo 2^64. Two contents of
one shape that differ in word i by d, 0 < |d| < 2^32, have equal sums only where m_i d makes up for the other words:
with 2^t the largest power of two in d, for one in 2^(64 - t) multipliers, at most 2^-33, as t <= 31. The sums of the
blocks of 2^16 words are words again, and hashed with other multipliers, up to one block: at most 3 levels for 2^46
words, so at most 3 x 2^-33 for one hash. Two hashes with independent multipliers: at most 9 x 2^-66 < 2^-62. Over the
30,000 steps x 50 subjects of a training, a difference is then overlooked with probability below 10^-12. Sums modulo
2^64 are the same in any order, so the digest is deterministic whatever the device does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

#: A change of what a digest is of needs another number: digests of different versions cannot be compared.
VERSION = 1
_BLOCK = 2**16
_SEEDS = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)
#: How deep in containers tensors are looked for.
_DEPTH = 6
#: Tensors below this many words are put together before they are reduced.
_SMALL = 2**20
_WORDS_AT_ONCE = 2**22

Named = tuple[str, Any]


def algorithm(device: str) -> str:
    """What the digests of a training on this device are, for trace.json."""
    return f"xxh3_64 v{VERSION}" if torch.device(device).type == "cpu" else f"xxh3_64 over multilinear_128 v{VERSION}"


def leaves(value: Any, name: str = "", depth: int = 0) -> Iterator[Named]:
    """The tensors, arrays and plain values in nested containers and dataclasses, each with its path."""
    if isinstance(value, (torch.Tensor, np.ndarray, int, float, str, bool, type(None))):
        yield name, value
    elif depth < _DEPTH:
        for key, item in items(value):
            yield from leaves(item, f"{name}.{key}" if name else str(key), depth + 1)


def items(value: Any) -> Iterator[tuple[Any, Any]]:
    """What is directly in a container or dataclass, with its key; nothing for anything else."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((item.name, getattr(value, item.name, None)) for item in dataclasses.fields(value))


class Digester:
    """Digests what a step does. What lies on another device is reduced there, and fetched in one transfer at the end.

    A digest is known at once (an int) unless a part of it is still on a device: then it is an `Unfinished`, which
    `Fetched.finish` turns into one.
    """

    def __init__(self) -> None:
        self._heads: dict[Any, bytes] = {}
        self._views: dict[int, _View] = {}
        self._views_in_use: dict[int, _View] = {}
        self._waiting: list[torch.Tensor] = []
        self._multipliers: dict[Any, torch.Tensor] = {}

    def digest_lasting(self, named: Iterable[Named]) -> int | Unfinished:
        """The same as `digest` of tensors that are still there in the next step, such as parameters: faster there."""
        return self.digest((name, self._view(name, value) or value) for name, value in named)

    def digest(self, named: Iterable[Named]) -> int | Unfinished:
        """One digest over all of them, in their order."""
        state = xxhash.xxh3_64()
        elsewhere: list[torch.Tensor] = []
        for name, value in named:
            if isinstance(value, _View):
                state.update(value.head)
                state.update(value.array)
            elif isinstance(value, torch.Tensor):
                plain = _in_place(value)
                if plain is not None:
                    state.update(self._head(name, value))
                    state.update(plain)
                    continue
                for path, tensor in _strided(name, value):
                    state.update(self._head(path, tensor))
                    if tensor.device.type == "cpu":
                        state.update(_bytes(tensor))
                    else:
                        elsewhere.append(tensor)
            elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
                state.update(f"{name}\0{value.dtype.str}\0{value.shape}\n".encode())
                state.update(np.ascontiguousarray(value).data)
            else:
                state.update(f"{name}\0{value!r}\n".encode())
        if not elsewhere:
            return int(state.intdigest())
        return Unfinished(state.digest(), tuple(self._reduce_all(elsewhere)))

    def _view(self, name: str, value: Any) -> _View | None:
        """The memory of a tensor as it was found in the step before, if it is still that of this tensor."""
        if not isinstance(value, torch.Tensor):
            return None
        view = self._views.get(id(value))
        if view is None or not view.is_of(name, value):
            array = _in_place(value)
            if array is None or value.numel() == 0 or array.__array_interface__["data"][0] != value.data_ptr():
                return None  # not there, or a copy
            view = _View(name, value, value.data_ptr(), value.dtype, value.shape, array, self._head(name, value))
        self._views_in_use[id(value)] = view
        return view

    def forget_replaced(self) -> None:
        """Lets go of the tensors that were not digested as lasting since this was called last."""
        self._views, self._views_in_use = self._views_in_use, {}

    def _reduce_all(self, tensors: Sequence[torch.Tensor]) -> Iterator[int]:
        """Reduces large tensors one by one, and the small ones of each device put together; yields their places."""
        small: dict[torch.device, list[torch.Tensor]] = {}
        with torch.no_grad():
            for tensor in tensors:
                words = as_words(tensor)
                if words.numel() < _SMALL:
                    small.setdefault(words.device, []).append(words)
                else:
                    yield self._wait(self.reduce(words))
            for several in small.values():
                yield self._wait(self.reduce(torch.cat(several)))

    def _head(self, name: str, tensor: torch.Tensor) -> bytes:
        key = name, tensor.dtype, tensor.shape
        head = self._heads.get(key)
        if head is None:
            if len(self._heads) > 10_000:  # names and shapes that change at every step
                self._heads.clear()
            head = self._heads[key] = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode()
        return head

    def _wait(self, sums: torch.Tensor) -> int:
        self._waiting.append(sums)
        return len(self._waiting) - 1

    def reduce(self, words: torch.Tensor) -> torch.Tensor:
        """Two sums of 64 bits over flat int32 words, as int64 on their device."""
        return torch.stack([self._sum(words, hashed, 0) for hashed in range(len(_SEEDS))])

    def _sum(self, words: torch.Tensor, hashed: int, level: int) -> torch.Tensor:
        multipliers = self._table(words.device, hashed, level)
        sums = torch.cat([(rows * multipliers[: rows.shape[1]]).sum(dim=1) for rows in _rows(words)])
        return sums[0] if sums.numel() == 1 else self._sum(sums.view(torch.int32), hashed, level + 1)

    def _table(self, device: torch.device, hashed: int, level: int) -> torch.Tensor:
        key = device, hashed, level
        if key not in self._multipliers:
            self._multipliers[key] = torch.from_numpy(_random_words(_SEEDS[hashed], level)).to(device)
        return self._multipliers[key]

    def number(self, tensor: torch.Tensor) -> int | Unfinished:
        """The bits of a tensor with one number."""
        size = tensor.element_size()
        bits = tensor.detach().reshape(1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
        if bits.device.type == "cpu":
            return int(bits.item()) & (2 ** (8 * size) - 1)
        return Unfinished(None, (self._wait(bits.to(torch.int64).repeat(2)),), mask=2 ** (8 * size) - 1)

    def fetch(self) -> Fetched | None:
        """Starts to bring everything to the CPU that waits on a device, in one transfer; None where nothing waits."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return None
        return Fetched(torch.stack([sums.to(waiting[0].device) for sums in waiting]))


class _View(NamedTuple):
    """The memory of a tensor on the CPU. Holding the array keeps its address from being given to another one."""

    name: str
    tensor: torch.Tensor
    address: int
    dtype: torch.dtype
    shape: torch.Size
    array: Any
    head: bytes

    def is_of(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether this is what `tensor`, under this name, has for memory now."""
        return (
            self.tensor is tensor
            and self.name == name
            and self.address == tensor.data_ptr()
            and self.dtype == tensor.dtype
            and self.shape == tensor.shape
            and tensor.is_contiguous()
        )


@dataclasses.dataclass(frozen=True)
class Unfinished:
    """A digest of which the parts at `places` are on a device; with `mask`, the bits of a number that is there."""

    head: bytes | None
    places: tuple[int, ...]
    mask: int | None = None


class Fetched:
    """What is on its way from a device. Nobody waits for it before `finish`: waiting could hide a race."""

    def __init__(self, sums: torch.Tensor) -> None:
        self._on_cuda = sums.device.type == "cuda"
        if self._on_cuda:
            self._sums = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            self._sums.copy_(sums, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(sums.device))
        else:
            self._sums = sums.cpu()

    @property
    def here(self) -> bool:
        """Whether it has come."""
        return not self._on_cuda or bool(self._event.query())

    @cached_property
    def _values(self) -> Any:
        if self._on_cuda:
            self._event.synchronize()
        return self._sums.numpy().view(np.uint64)

    def finish(self, value: int | Unfinished) -> int:
        """The digest, once all of it is here; waits for it where it is not."""
        if isinstance(value, int):
            return value
        if value.head is None:
            return int(self._values[value.places[0], 0]) & (value.mask or 0)
        state = xxhash.xxh3_64(value.head)
        for place in value.places:
            state.update(self._values[place].tobytes())
        return int(state.intdigest())


def _in_place(tensor: torch.Tensor) -> Any:
    """The values of a CPU tensor in their order, as `_plain` gives them; None where NumPy cannot have them as they lie.

    An array of NumPy, which takes a tenth of the time that torch needs for a view.
    """
    try:
        array: Any = (tensor.detach() if tensor.requires_grad else tensor).numpy()
    except (TypeError, RuntimeError):  # another device or layout, a dtype that NumPy lacks, a lazy conjugation
        return None
    if array.flags.c_contiguous:
        return array
    if array.size and 0 in array.strides:
        array = array[tuple(slice(None) if stride else slice(1) for stride in array.strides)]
    return np.ascontiguousarray(array)


def _bytes(tensor: torch.Tensor) -> Any:
    """The bytes of a CPU tensor in the order of its indices; without a copy where it is contiguous."""
    plain = _plain(tensor)
    try:
        return plain.numpy()
    except TypeError:  # a dtype that NumPy lacks, such as bfloat16
        return plain.reshape(-1).view(torch.uint8).numpy()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and without what torch only remembers: the graph, a conjugation, repetition by a stride of 0."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = tensor.resolve_conj()
    tensor = tensor.resolve_neg() if tensor.is_neg() else tensor
    if not tensor.is_contiguous() and tensor.numel() and 0 in tensor.stride():
        # An expanded tensor holds each value many times over; its shape is in the digest's head.
        for dimension, stride in enumerate(tensor.stride()):
            if stride == 0:
                tensor = tensor.narrow(dimension, 0, 1)
    return tensor.contiguous()


def _strided(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The tensor itself; of a sparse one its indices and values."""
    if tensor.layout == torch.strided:
        return [(name, tensor)]
    if tensor.layout == torch.sparse_coo:
        return [(f"{name}.indices", tensor._indices()), (f"{name}.values", tensor._values())]
    return [(f"{name}.dense", tensor.to_dense())]


def as_words(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes as a flat int32 tensor, filled up with zeros: the shape is in the digest's head."""
    flat = _plain(tensor).reshape(-1)
    if flat.numel() == 0:
        return torch.zeros(1, dtype=torch.int32, device=flat.device)
    if flat.element_size() % 4:
        flat = flat.view(torch.uint8)
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 4))
    return flat.view(torch.int32)


def _rows(words: torch.Tensor) -> Iterator[torch.Tensor]:
    """Full blocks as the rows of matrices of a bounded size, then what is left as one row."""
    full = words.numel() // _BLOCK * _BLOCK
    for start in range(0, full, _WORDS_AT_ONCE):
        yield words[start : min(start + _WORDS_AT_ONCE, full)].view(-1, _BLOCK)
    if full < words.numel():
        yield words[full:].view(1, -1)


def _random_words(seed: int, level: int) -> Any:
    """Fixed random multipliers, from SplitMix64 (https://prng.di.unimi.it/splitmix64.c), as int64."""
    count = np.arange(1, _BLOCK + 1, dtype=np.uint64) + np.uint64(level * _BLOCK)
    mixed = np.uint64(seed) + count * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))).view(np.int64)
