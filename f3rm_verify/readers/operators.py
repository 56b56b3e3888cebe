"""Reads recordings of operators, and finds the first operator in which two of the same step differ.

A recording is a line of JSON for each operator, `[place, kind, inputs, values, outputs]`, and before it, where its
place is new, `{"place": [name, overload, module, source, backward]}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from f3rm_verify.errors import UnreadableError

VERSION = 1
#: Kinds of operators: what is in its result is whatever was in the memory; its result is a view of its input; it draws
#: from a generator. Others have none.
ALLOCATES, VIEW, DRAWS = "allocates", "view", "draws"
#: In the place of the operator that wrote a tensor: none of this recording did.
OUTSIDE = -1
#: A line longer than this is not one that we wrote.
_MAX_LINE = 2**20


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """A tensor that went in or came out; `writer` is the number of the operator that last wrote it."""

    kind: str
    sizes: tuple[int, ...]
    digest: str
    writer: int = OUTSIDE

    def __str__(self) -> str:
        return f"{self.kind} {' x '.join(map(str, self.sizes)) or 'scalar'}"

    @property
    def content(self) -> tuple[Any, ...]:
        """What has to be equal; which operator wrote it has not."""
        return self.kind, self.sizes, self.digest


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One call of an operator. `backward` is the node of the autograd graph that called it, empty in the forward.

    Of a backward, `module` and `source` are those of the forward operator that made the node.
    """

    number: int
    name: str
    overload: str
    module: str
    source: str
    backward: str
    kind: str
    inputs: tuple[TensorFacts, ...]
    values: tuple[str, ...]
    outputs: tuple[TensorFacts, ...]

    @property
    def call(self) -> tuple[str, ...]:
        """What has to be the same for two to be compared."""
        return self.name, self.overload, self.module, self.source, self.backward

    @property
    def where(self) -> str:
        """In words: the direction, the module path, the source line."""
        direction = f"backward ({self.backward})" if self.backward else "forward"
        module = f" of {self.module}" if self.module else ""
        return f"{direction}{module}{f', from {self.source}' if self.source else ''}"


@dataclass(frozen=True, kw_only=True)
class OperatorDifference:
    """The first operator that differs. `kind` says how:

    `kernel`: its inputs agree, its outputs differ; `draw`: the same of one that draws from a generator; `value`: a
    Python value among its arguments differs; `memory`: it reads memory in which no operator of torch wrote anything,
    which `allocated` made; `unseen`: it reads a tensor that an operator wrote, with equal bits, and that something else
    then changed; `order`: it reads what another operator gave, as where a sum goes through its terms in another order;
    `outside`: it reads a tensor that no operator of the step wrote; `sequence`: from here on, other operators are
    called.
    """

    kind: str
    operator: Operator
    allocated: Operator | None = None
    input: int | None = None
    different_outputs: tuple[int, ...] = ()
    other: Operator | None = None


def first_operator_difference(reference: Path, candidate: Path) -> OperatorDifference | None:
    """The first operator of two recordings of one step whose outputs differ, None where all are equal.

    Raises UnreadableError where a recording is broken, or ended early and has no difference until then.
    """
    allocated: dict[int, Operator] = {}
    made: dict[int, frozenset[str]] = {}
    for one, other in zip_longest(read_operators(reference), read_operators(candidate)):
        if one is None or other is None or one.call != other.call:
            return OperatorDifference(kind="sequence", operator=one or other, other=other)
        if one.kind == ALLOCATES:
            allocated[one.number] = one
        outputs = _differing(one.outputs, other.outputs)
        if outputs:
            return _classified(one, other, outputs, allocated, made)
        made[one.number] = frozenset(output.digest for output in one.outputs)
    return None


def _classified(
    one: Operator,
    other: Operator,
    outputs: tuple[int, ...],
    allocated: Mapping[int, Operator],
    made: Mapping[int, frozenset[str]],
) -> OperatorDifference:
    """How two calls differ; `made` are the digests of what each operator before them gave on both sides."""
    inputs = _differing(one.inputs, other.inputs)
    if inputs:
        place = inputs[0]
        read = [side.inputs[place] for side in (one, other) if place < len(side.inputs)]
        source = allocated.get(read[0].writer)
        results = all(tensor.digest in made.get(tensor.writer, ()) for tensor in read)
        kind = "memory" if source else "outside" if read[0].writer == OUTSIDE else "order" if results else "unseen"
        return OperatorDifference(
            kind=kind, operator=one, allocated=source, input=place, different_outputs=outputs, other=other
        )
    kind = "value" if one.values != other.values else "draw" if one.kind == DRAWS else "kernel"
    return OperatorDifference(kind=kind, operator=one, different_outputs=outputs, other=other)


def _differing(ones: Sequence[TensorFacts], others: Sequence[TensorFacts]) -> tuple[int, ...]:
    pairs = enumerate(zip_longest(ones, others))
    return tuple(i for i, (one, other) in pairs if one is None or other is None or one.content != other.content)


def read_operators(path: Path) -> Iterator[Operator]:
    """The operators of a recording in order, one at a time.

    Raises UnreadableError where it is broken; also, after its last whole line, where it was cut short.
    """
    places: list[tuple[str, str, str, str, str]] = []
    number, ended = 0, False
    try:
        with path.open(encoding="utf8") as file:
            while line := file.readline(_MAX_LINE):
                data = json.loads(line)
                if isinstance(data, list):
                    yield _operator(number, places, data)
                    number += 1
                elif "place" in data:
                    places.append(tuple(map(str, data["place"])))  # type: ignore[arg-type]
                elif "operators" in data:
                    ended = data["operators"] == number
                elif data["version"] != VERSION:
                    raise UnreadableError(f"{path.name}: of version {data['version']!r:.20}; this one reads {VERSION}.")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UnreadableError(f"{path.name}: operator {number} cannot be read ({error}).") from error
    if not ended:
        raise UnreadableError(f"{path.name}: was cut short after {number} operators, of which none differs.")


def _operator(number: int, places: Sequence[tuple[str, str, str, str, str]], data: list[Any]) -> Operator:
    place, kind, inputs, values, outputs = data
    name, overload, module, source, backward = places[place]
    return Operator(
        number=number,
        name=name,
        overload=overload,
        module=module,
        source=source,
        backward=backward,
        kind=kind,
        inputs=tuple(map(_tensor, inputs)),
        values=tuple(values),
        outputs=tuple(map(_tensor, outputs)),
    )


def _tensor(data: list[Any]) -> TensorFacts:
    kind, sizes, digest, *writer = data
    return TensorFacts(
        kind=str(kind), sizes=tuple(map(int, sizes)), digest=str(digest), writer=int(writer[0]) if writer else OUTSIDE
    )
