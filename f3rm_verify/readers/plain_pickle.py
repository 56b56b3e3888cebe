"""Interprets a pickle as plain data. Nothing is imported or called but the constructors that the caller hands in.

Only what `torch.save` and the standard pickler (protocols 2 to 5) write for plain data is understood. A
`pickle.Unpickler` with a restricted `find_class` would not do: its BUILD sets attributes of anything, and a memo index
or a nested key chosen with malice makes it take GiB or overflow the C stack.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Constructors = Mapping[str, Callable[..., Any] | None]

#: Longer integers are no counter of a training, and Python refuses to print those above 4300 digits.
_MAX_INTEGER_BITS = 128
#: Values of an empty list take 60 times its byte in the pickle.
_MAX_OPERATIONS = 2**21
#: Longer integers can be chosen so that many have one hash, and a dict of them takes the square of their number.
_MAX_KEY_BITS = 64
_KEYS = (str, int, float, bool, bytes, type(None))


class Refused(Exception):
    """The data are not what a training writes; the message says why, without naming the file."""


class Stateful:
    """Base of constructed objects that a pickle may give a state."""

    def set_state(self, state: Any) -> None:
        """Takes the state; raises Refused where it is not as expected."""
        raise NotImplementedError


@dataclass(frozen=True)
class Global:
    """An allowed name, "module attribute"; `construct` is None where it is only passed on, never called."""

    name: str
    construct: Callable[..., Any] | None = None


def interpret(data: bytes, constructors: Constructors, persistent: Callable[[Any], Any]) -> Any:
    """The value that the pickle `data` describes.

    `constructors` maps "module attribute" to what stands in for it; any other name is refused. `persistent` maps the id
    of something outside of the pickle to its stand-in. Raises Refused, or what constructors and pickletools raise.
    """
    return _Machine(constructors, persistent).run(data)


def checked(value: Any, *types: type) -> Any:
    """`value`, which must be of exactly one of these types."""
    if type(value) not in types:
        raise Refused(f"damaged: {type(value).__name__} where {' or '.join(kind.__name__ for kind in types)} belongs")
    return value


class _Machine:
    """The stack machine of pickle; a method `_op_X` per opcode X that is understood."""

    def __init__(self, constructors: Constructors, persistent: Callable[[Any], Any]) -> None:
        self.globals = {name: Global(name, construct) for name, construct in constructors.items()}
        self.persistent = persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > _MAX_OPERATIONS:
                raise Refused(f"its data.pkl takes more than {_MAX_OPERATIONS:,} operations")
            operate = getattr(self, f"_op_{opcode.name.lower()}", None)
            if operate is None:
                raise Refused(f"its data.pkl uses {opcode.name}, which plain data never need")
            operate(argument)
        return self.stack.pop()  # genops ends at STOP, and raises where there is none

    def _ignore(self, argument: Any) -> None:
        pass

    _op_proto = _op_frame = _op_stop = _ignore

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    _op_binfloat = _op_binint = _op_binint1 = _op_binint2 = _push
    _op_binunicode = _op_short_binunicode = _op_binunicode8 = _push
    _op_binbytes = _op_short_binbytes = _op_binbytes8 = _push

    def _op_bytearray8(self, value: bytearray) -> None:
        self._push(bytes(value))

    def _op_long1(self, value: int) -> None:
        if value.bit_length() > _MAX_INTEGER_BITS:
            raise Refused(f"it holds an integer of {value.bit_length()} bits")
        self._push(value)

    _op_long4 = _op_long1

    def _op_none(self, _: Any) -> None:
        self._push(None)

    def _op_newtrue(self, _: Any) -> None:
        self._push(True)

    def _op_newfalse(self, _: Any) -> None:
        self._push(False)

    def _op_empty_list(self, _: Any) -> None:
        self._push([])

    def _op_empty_dict(self, _: Any) -> None:
        self._push({})

    def _op_empty_set(self, _: Any) -> None:
        self._push(set())

    def _op_empty_tuple(self, _: Any) -> None:
        self._push(())

    def _op_mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _top(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise Refused("damaged: its data.pkl takes what it never gave")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _op_tuple(self, _: Any) -> None:
        self._push(tuple(self._to_mark()))

    def _op_tuple1(self, _: Any) -> None:
        self._push(tuple(self._top(1)))

    def _op_tuple2(self, _: Any) -> None:
        self._push(tuple(self._top(2)))

    def _op_tuple3(self, _: Any) -> None:
        self._push(tuple(self._top(3)))

    def _op_frozenset(self, _: Any) -> None:
        self._push(plain_set(self._to_mark()))

    def _op_append(self, _: Any) -> None:
        items = self._top(1)
        checked(self.stack[-1], list).extend(items)

    def _op_appends(self, _: Any) -> None:
        items = self._to_mark()
        checked(self.stack[-1], list).extend(items)

    def _op_additems(self, _: Any) -> None:
        items = self._to_mark()
        checked(self.stack[-1], set).update(plain_set(items))

    def _op_setitem(self, _: Any) -> None:
        self._set(self._top(2))

    def _op_setitems(self, _: Any) -> None:
        self._set(self._to_mark())

    def _set(self, items: list[Any]) -> None:
        target = checked(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_plain_key(key)] = value

    def _op_binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _op_long_binput = _op_binput

    def _op_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _op_binget(self, index: int) -> None:
        self._push(self.memo[index])

    _op_long_binget = _op_binget

    def _op_global(self, name: str) -> None:
        if name not in self.globals:
            raise Refused(f"it asks for {name.replace(' ', '.')[:100]!a}, which a checkpoint of tensors never needs")
        self._push(self.globals[name])

    def _op_stack_global(self, _: Any) -> None:
        self._op_global(" ".join(checked(part, str) for part in self._top(2)))

    def _op_reduce(self, _: Any) -> None:
        callee, arguments = self._top(2)
        if type(callee) is not Global or callee.construct is None:
            raise Refused(f"it calls {getattr(callee, 'name', type(callee).__name__)!a}, which nothing may")
        self._push(callee.construct(*checked(arguments, tuple)))

    def _op_build(self, _: Any) -> None:
        (state,) = self._top(1)
        target = self.stack[-1]
        if isinstance(target, Stateful):
            target.set_state(state)
        elif type(target) is not dict:  # attributes of an OrderedDict are no values
            raise Refused(f"it sets attributes of {type(target).__name__}, which plain data never need")

    def _op_binpersid(self, _: Any) -> None:
        self._push(self.persistent(*self._top(1)))


def plain_set(items: list[Any]) -> set[Any]:
    """A set of these plain scalars."""
    return {_plain_key(item) for item in items}


def _plain_key(key: Any) -> Any:
    """`key`, which must be a plain scalar."""
    if type(key) is int and key.bit_length() > _MAX_KEY_BITS:
        raise Refused(f"it has a key of {key.bit_length()} bits")
    return checked(key, *_KEYS)
