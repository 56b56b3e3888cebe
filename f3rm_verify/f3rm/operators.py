"""Records every operator that torch dispatches, forward and backward: what went in, what came out, who asked for it.

Kernels of extensions that write into memory on their own are not dispatched; their results are seen as inputs of the
operator that reads them, and the memory is known by the operator that allocated it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from f3rm_verify.readers.operators import ALLOCATES, DRAWS, OUTSIDE, VERSION, VIEW
from f3rm_verify.recorder import digest_tensors

#: Operators of one recording; a line has some 300 bytes. nerfacto's step has about 2,500 on a CPU.
MAX_OPERATORS = 500_000
#: Characters of a Python value among the arguments.
_MAX_VALUE = 200
#: Frames of these say nothing about who asked for an operator.
_NOT_THE_USER = (f"{Path(torch.__file__).parent}{os.sep}", __file__)
_ALLOCATORS = ("empty", "new_empty", "resize")


@contextmanager
def recorded_operators(file: Path, modules: nn.Module, *, limit: int = MAX_OPERATORS) -> Iterator[None]:
    """Inside, operators are recorded into `file`, a line each, up to `limit`; `modules` gives the modules their names.

    Costs a pass over all inputs and outputs for each operator. The racing inside of an operator is not disturbed: what
    is done here comes before and after it. A recording that was cut short lacks its last line, which says how it ended.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    names = {id(module): name for name, module in modules.named_modules()}
    parameters = {id(value): name for name, value in modules.named_parameters()}
    with file.open("w", encoding="utf8") as out, _entered(names) as inside:
        recording = _Recording(out, inside, parameters, limit)
        out.write(json.dumps({"version": VERSION}) + "\n")
        with recording:
            yield
        out.write(json.dumps({"operators": recording.count, "limit": limit}) + "\n")


@contextmanager
def _entered(names: Mapping[int, str]) -> Iterator[list[str]]:
    """Inside, the list has the paths of the modules whose forward runs, the innermost last."""
    inside: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        inside.append(names.get(id(module), type(module).__name__))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if inside:
            inside.pop()

    # always_call: a forward that raises and is caught must leave the list as it found it.
    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield inside
    finally:
        for handle in handles:
            handle.remove()


class _Recording(TorchDispatchMode):
    def __init__(self, out: TextIO, inside: Sequence[str], parameters: Mapping[int, str], limit: int) -> None:
        super().__init__()
        self.count = 0
        self._out, self._inside, self._parameters, self._limit = out, inside, parameters, limit
        #: What an operator is, by its number in the file: name, overload, module path, source, backward node.
        self._places: dict[tuple[str, ...], int] = {}
        #: Module path and source of the operator that made a node of the autograd graph, by its sequence number.
        self._forward: dict[int, tuple[str, str]] = {}
        #: The operator that last wrote a storage, by the storage's address.
        self._writers: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.count >= self._limit:
            self.count = self._limit + 1  # says that there were more
            return func(*args, **kwargs)
        place = self._place(func)
        kind, writes = _kind(func), _written(func, args, kwargs)
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = [] if kind == VIEW else [[*_described(one), self._writer(one)] for one in tensors]
        result = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        outputs = [*writes, *(one for one in results if not any(one is other for other in writes))]
        values = [_value(leaf) for leaf in leaves if not isinstance(leaf, Tensor)]
        # What is in fresh memory is no result, and a view only shows what is there.
        described = [_described(one, digest=kind not in (ALLOCATES, VIEW)) for one in outputs]
        self._write([place, kind, inputs, values, described])
        if kind != VIEW:
            self._writers.update((_address(one), self.count) for one in outputs)
        self.count += 1
        return result

    def _writer(self, tensor: Tensor) -> int:
        return self._writers.get(_address(tensor), OUTSIDE)

    def _place(self, func: Any) -> int:
        """The number of the line that says which operator this is and where it comes from."""
        node = _current_node()
        if node is None:
            where = (self._inside[-1] if self._inside else "", _source(), "")
            if torch.is_grad_enabled() or self._inside:
                # The node is there before its operator runs: it has the last number given. A step of a custom function
                # is several operators; the first of them names it.
                self._forward.setdefault(torch._C._autograd._get_sequence_nr() - 1, where[:2])
        else:
            where = (*self._origin(node), node.name().removeprefix("torch::autograd::"))
        key = (func._schema.name, func._overloadname, *where)
        if key not in self._places:
            self._places[key] = len(self._places)
            self._write({"place": key})
        return self._places[key]

    def _origin(self, node: Any) -> tuple[str, str]:
        variable = getattr(node, "variable", None)
        if variable is not None:
            return self._parameters.get(id(variable), ""), ""
        return self._forward.get(node._sequence_nr(), ("", ""))

    def _write(self, line: Any) -> None:
        self._out.write(json.dumps(line, separators=(",", ":")) + "\n")


def _current_node() -> Any:
    return torch._C._current_autograd_node()


def _source() -> str:
    """`FILE:LINE in FUNCTION` of the innermost frame outside of torch; the file below its package's folder."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USER):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return ""
    return f"{_short(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def _short(file: str) -> str:
    """The path below the folder on Python's path that holds it, so that it reads the same on every machine."""
    above = [folder for folder in sys.path if folder and file.startswith(folder.rstrip(os.sep) + os.sep)]
    return file[len(max(above, key=len).rstrip(os.sep)) + 1 :] if above else file


def _kind(func: Any) -> str:
    name = func._schema.name.partition("::")[2]
    if name.startswith(_ALLOCATORS):
        return ALLOCATES
    aliases = [one.alias_info for one in func._schema.returns]
    if aliases and all(alias is not None and not alias.is_write for alias in aliases):
        return VIEW
    return DRAWS if torch.Tag.nondeterministic_seeded in func.tags else ""


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an operator writes to."""
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return written


def _described(tensor: Tensor, *, digest: bool = True) -> list[Any]:
    """Type, sizes, and the digest of the bits; empty where there is none, or none that can be had."""
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {tensor.device.type}"
    return [kind, list(tensor.shape), _digest(tensor) if digest else ""]


def _digest(tensor: Tensor) -> str:
    try:
        return digest_tensors([("", tensor.resolve_conj().resolve_neg())])
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return ""  # sparse or quantised, or without memory


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _value(value: Any) -> str:
    """A Python value among the arguments, exactly; of an object only its type, whose text could hold an address."""
    plain = value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device))
    return repr(value)[:_MAX_VALUE] if plain else type(value).__name__
