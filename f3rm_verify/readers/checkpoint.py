"""Reads torch checkpoints as plain data, without torch and without executing anything.

`torch.save` writes a zip: `PREFIX/data.pkl`, a pickle of the structure, and `PREFIX/data/KEY` per storage, stored
uncompressed. The pickle is interpreted by `plain_pickle`; storages are read when a tensor is looked at.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from f3rm_verify.errors import UnreadableError
from f3rm_verify.readers.plain_pickle import Constructors, Global, Refused, Stateful, checked, interpret, plain_set
from f3rm_verify.readers.torch_zip import Archive, Record

Array = npt.NDArray[Any]

#: Limits, far above what a training writes.
MAX_LEAVES = 1_000_000
MAX_PATH = 1024
MAX_DEPTH = 64
MAX_DIMENSIONS = 32
#: Tensors may share and repeat storage, but all together hold at most 1 GiB and four times the file.
FREE_LOGICAL_BYTES = 2**30
LOGICAL_BYTES_PER_BYTE = 4

#: What damaged input makes zipfile, zlib, pickletools, NumPy and the code here raise.
_DAMAGES = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor or NumPy scalar. Where NumPy lacks the dtype (bfloat16, float8), `array` holds its bits as integers."""

    dtype: str
    shape: tuple[int, ...]
    _read: Callable[[], Array] = field(repr=False)
    _record: Record | None = field(default=None, repr=False)

    @property
    def array(self) -> Array:
        """Read-only, maybe strided or repeated, and read from the file each time; UnreadableError where that fails."""
        array = self._read()
        array.flags.writeable = False
        return array

    @property
    def storage(self) -> int | None:
        """Which of the file's storages it is a view of, as a number that means nothing else; None for a scalar."""
        return None if self._record is None else id(self._record)

    @property
    def crc_ok(self) -> bool:
        """Whether no checksum contradicts the bytes of the storage; reads all of it when first asked."""
        return self._record is None or self._record.crc_ok


@dataclass(frozen=True)
class Named:
    """A value that is only a name here: a dtype, a device, or an empty container."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True)
class Checkpoint:
    """What the checkpoint file `name` holds: dicts, lists, tuples, sets, plain scalars, `Tensor` and `Named`."""

    name: str
    values: dict[Any, Any]

    def leaves(self) -> dict[str, Any]:
        """Everything that is no container, by path: `optimizers/fields/state/0/exp_avg`, `schedulers/x/_last_lr/[0]`.

        Equal paths mean equal places: `0` is an integer key, `"0"` a string, `[0]` an item of a list, `(0)` of a tuple,
        and a string that could be mistaken is quoted as in JSON, with "/" as \\u002f. Sets and empty containers are
        leaves. Raises UnreadableError where the structure is too deep or too large, or holds what is no value.
        """
        leaves: dict[str, Any] = {}
        try:
            for path, value in _walk(self.values, "", 0):
                if len(leaves) >= MAX_LEAVES or path in leaves:
                    raise Refused(f"it holds more than {MAX_LEAVES:,} values, or two at {path[:100]!a}")
                leaves[path] = value
        except Refused as error:
            raise UnreadableError(f"{self.name}: {error}.") from None
        return leaves


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`; raises UnreadableError, naming file and reason, for anything but a sound one.

    The file stays open until the last of its tensors is gone. Attributes of containers
    and tensors (`_metadata` of a state dict, `requires_grad`, hooks) are no values and are left out. A storage that
    does not match its checksum is read all the same, so that it can be compared: see `Tensor.crc_ok`.
    """
    try:
        archive = Archive(path)
        tensors = _Tensors(archive)
        values = interpret(archive.pickle(), tensors.constructors(), tensors.storage)
        if type(values) is not dict or not values:
            raise Refused("it holds no dict with anything in it, so no training wrote it")
        return Checkpoint(path.name, values)
    except Refused as error:
        raise UnreadableError(f"{path.name}: {error}.") from None
    except _DAMAGES as error:
        raise UnreadableError(f"{path.name}: damaged, {type(error).__name__}: {str(error)[:200]!a}.") from error


def _dtypes() -> dict[str, np.dtype[Any]]:
    """NumPy's dtype for the bytes of each of torch's."""
    numbers = ["float64", "float32", "float16", "complex128", "complex64", "bool"]
    numbers += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
    bytes_only = [f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")]
    return {
        **{name: np.dtype(name).newbyteorder("<") for name in numbers},
        **dict.fromkeys(bytes_only, np.dtype("u1")),
        "bfloat16": np.dtype("<u2"),
        "complex32": np.dtype("<u4"),
    }


_DTYPES: Mapping[str, np.dtype[Any]] = _dtypes()
_STORAGES: Mapping[str, str] = {
    "torch DoubleStorage": "float64",
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
    "torch ComplexDoubleStorage": "complex128",
    "torch ComplexFloatStorage": "complex64",
    "torch.storage UntypedStorage": "uint8",
}


@dataclass(frozen=True)
class _Storage:
    record: Record
    dtype: str


class _NumpyDtype(Stateful):
    """NumPy's dtype as pickled: kind and size, and the byte order in a later state."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if code not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"):
            raise Refused(f"it holds a NumPy scalar of dtype {str(code)[:20]!a}")
        self.dtype = np.dtype(code)

    def set_state(self, state: Any) -> None:
        order = checked(state, tuple)[1]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise Refused("it holds a NumPy scalar of a structured dtype")
        self.dtype = self.dtype.newbyteorder(order)


class _Tensors:
    """Stand-ins for torch's and NumPy's constructors."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.bytes_left = FREE_LOGICAL_BYTES + LOGICAL_BYTES_PER_BYTE * archive.file.size

    def constructors(self) -> Constructors:
        """Everything that a checkpoint may name; None where it is never called."""
        builtins = {
            "set": plain_set,
            "frozenset": plain_set,
            "complex": lambda real, imaginary: complex(checked(real, float), checked(imaginary, float)),
            "bytes": lambda: b"",
            "bytearray": lambda data=b"": checked(data, bytes),
            # factories of a defaultdict
            **dict.fromkeys(("list", "dict", "int", "long", "float", "bool", "str", "unicode")),
        }
        return {
            "torch._utils _rebuild_tensor": self.tensor,
            "torch._utils _rebuild_tensor_v2": self.tensor_v2,
            "torch._utils _rebuild_tensor_v3": self.tensor_v3,
            "torch._utils _rebuild_parameter": _parameter,
            "torch._utils _rebuild_parameter_with_state": _parameter,
            "torch._tensor _rebuild_from_type_v2": _tensor_with_attributes,
            "torch Tensor": None,
            "torch.nn.parameter Parameter": None,
            "torch Size": lambda sizes: tuple(_sizes(sizes)),
            "torch device": lambda *parts: Named("device", ":".join(str(checked(part, str, int)) for part in parts)),
            **{f"torch {name}": None for name in _DTYPES},
            **dict.fromkeys(_STORAGES),
            "collections OrderedDict": _dict,
            "collections Counter": _dict,
            "collections defaultdict": lambda factory=None: {},
            "_codecs encode": _encode,
            "numpy dtype": _NumpyDtype,
            "numpy.core.multiarray scalar": _numpy_scalar,
            "numpy._core.multiarray scalar": _numpy_scalar,
            **{f"{module} {name}": kind for module in ("builtins", "__builtin__") for name, kind in builtins.items()},
        }

    def storage(self, reference: Any) -> _Storage:
        """What `("storage", type, key, device, number of values)` refers to."""
        tag, kind, key, _, count = checked(reference, tuple)
        if tag != "storage" or checked(kind, Global).name not in _STORAGES:
            raise Refused("damaged: its data.pkl refers to something that is no storage")
        storage = _Storage(self.archive.read(f"data/{checked(key, str)}"), _STORAGES[kind.name])
        if checked(count, int) * _DTYPES[storage.dtype].itemsize != storage.record.size:
            raise Refused(f"damaged: storage {key[:20]!a} has {storage.record.size:,} bytes, not {count:,} values")
        return storage

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None = None) -> Tensor:
        """A view of the storage; `offset` and `strides` count values. Never reaches outside of the storage."""
        name = dtype or checked(storage, _Storage).dtype
        size = _DTYPES[name].itemsize
        shape, strides, (offset,) = _sizes(shape), _sizes(strides), _sizes((offset,))
        self.bytes_left -= math.prod(shape) * size
        if self.bytes_left < 0:
            raise Refused("its tensors claim to hold far more than the file does")
        end = offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if 0 in shape:
            empty = np.empty(shape, _DTYPES[name])
            return Tensor(name, tuple(shape), lambda: empty, storage.record)
        if end * size > storage.record.size:
            raise Refused("damaged: a tensor reaches outside of its storage")
        steps = [stride * size for stride in strides]

        def read() -> Array:
            data = storage.record.read(offset * size, (end - offset) * size)
            view: Array = np.ndarray(shape, _DTYPES[name], data, 0, steps)
            return view

        return Tensor(name, tuple(shape), read, storage.record)

    def tensor_v2(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
        """The same; `rest` is requires_grad, hooks, and where the values are lazily conjugated or negated, that."""
        _, _, *metadata = rest
        if any(metadata):
            raise Refused("it holds a lazily conjugated or negated tensor, which is not supported")
        return self.tensor(storage, offset, shape, strides)

    def tensor_v3(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
        """The same over an untyped storage, with the dtype as third of `rest`."""
        _, _, dtype, *metadata = rest
        name = checked(dtype, Global).name.removeprefix("torch ")
        if any(metadata) or name not in _DTYPES:
            raise Refused("it holds a tensor of a kind that is not supported")
        return self.tensor(storage, offset, shape, strides, name)


def _sizes(values: Any) -> list[int]:
    if len(checked(values, tuple, list)) > MAX_DIMENSIONS:
        raise Refused(f"it holds a tensor of more than {MAX_DIMENSIONS} dimensions")
    if any(checked(value, int) < 0 for value in values):
        raise Refused("damaged: a tensor has a negative size, stride or offset")
    return list(values)


def _parameter(data: Any, *_: Any) -> Any:
    return checked(data, Tensor)


def _tensor_with_attributes(construct: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor that has Python attributes; they are left out."""
    if checked(kind, Global).name not in ("torch Tensor", "torch.nn.parameter Parameter"):
        raise Refused(f"it holds a tensor of class {kind.name[:100]!a}")
    if checked(construct, Global).construct is None:
        raise Refused(f"it calls {construct.name[:100]!a}, which nothing may")
    return checked(construct.construct(*checked(arguments, tuple)), Tensor)


def _dict(items: Any = ()) -> dict[Any, Any]:
    """A dict of another dict, or of pairs as Python 2 wrote them."""
    if type(items) is dict:
        return dict(items)
    return {checked(key, str, int): value for key, value in checked(items, tuple, list)}


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if encoding != "latin1":
        raise Refused("it holds text in an encoding that a checkpoint never needs")
    return bytes(checked(text, str).encode("latin1"))


def _numpy_scalar(dtype: Any, data: Any) -> Tensor:
    """NumPy's scalars: schedules compute learning rates with them."""
    kind = checked(dtype, _NumpyDtype).dtype
    native = np.frombuffer(checked(data, bytes), kind, count=1).astype(kind.newbyteorder("=")).reshape(())
    if len(data) != kind.itemsize:
        raise Refused("damaged: a NumPy scalar of another size than its dtype")
    return Tensor(f"numpy.{kind.name}", (), lambda: native)


def _walk(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH or len(path) > MAX_PATH:
        raise Refused(f"it is nested more than {MAX_DEPTH} deep, or its names are longer than {MAX_PATH} characters")
    if type(value) not in (dict, list, tuple):
        yield path, _scalar(value)
    elif not value:
        yield path, Named("empty", type(value).__name__)
    else:
        for name, item in _items(value):
            yield from _walk(item, f"{path}/{name}" if path else name, depth + 1)


def _items(container: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a container with their names in a path."""
    if type(container) is dict:
        return ((_key(key), item) for key, item in container.items())
    brackets = "[{}]" if type(container) is list else "({})"
    return ((brackets.format(index), item) for index, item in enumerate(container))


def _key(key: Any) -> str:
    """A key as it stands in a path; no two keys have the same."""
    if type(key) is not str:
        return repr(key).replace("/", "\\x2f")
    plain = re.fullmatch(r"[A-Za-z0-9_][^/\"'\\]*", key) and key.isprintable()
    if plain and key not in ("True", "False", "None") and not _is_number(key):
        return key
    return json.dumps(key).replace("/", "\\u002f")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _scalar(value: Any) -> Any:
    if type(value) is Global and value.name.removeprefix("torch ") in _DTYPES:
        return Named("dtype", value.name.removeprefix("torch "))
    if type(value) in (Tensor, Named, str, bytes, int, float, complex, bool, type(None), set):
        return value
    raise Refused(f"it holds {getattr(value, 'name', type(value).__name__)[:100]!a}, which is no value")
