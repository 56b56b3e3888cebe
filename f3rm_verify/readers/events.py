"""Reads TensorBoard event files completely and exactly: scalars with their bits, images, texts, tensors, histograms."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from f3rm_verify.errors import UnreadableError
from f3rm_verify.readers.plain_file import open_plain

#: One record that is not a scalar: its step, its kind (image, text, tensor, histogram or audio), its payload.
Blob = tuple[int, str, bytes]

# https://github.com/tensorflow/tensorflow/blob/v2.15.0/tensorflow/core/lib/io/record_writer.h#L104-L108
_HEADER = struct.Struct("<QI")  # length of the data, masked crc32c of the length's eight bytes
_FOOTER = struct.Struct("<I")  # masked crc32c of the data
_DOUBLE = struct.Struct("<d")
_FLOAT = struct.Struct("<f")

#: Far above what a training logs. protobuf for Python takes 30 bytes for one of a number, and 1000 for a message.
MAX_TAGS = 20_000
MAX_RECORD_BYTES = 32 * 2**20
MAX_FIELDS = 100_000
#: Numbers of the fields that hold the messages of an event, level by level: Event.summary; Summary.value; Value.tensor
#: and metadata; TensorProto.tensor_shape, resource_handle_val and variant_val; and what repeats in these.
_MESSAGES = (frozenset({5}), frozenset({1}), frozenset({8, 9}), frozenset({1, 2, 14, 15}), frozenset({2, 3, 6}))

_DT_FLOAT, _DT_DOUBLE, _DT_STRING = 1, 2, 7


@dataclass(frozen=True, eq=False)
class Series:
    """A scalar tag: every record of it in the order of the files, so a step occurs again after a restart.

    `values` is float32, or float64 where the tag was written as tensors of that type. The bits are those of the file,
    NaN payloads included, for what torch and TensorBoard write; in other layouts (several values in one event, tensors
    with a shape field) protobuf for Python turns every NaN into the same one.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.floating[Any]]
    wall_times: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Events:
    """What several event files of one run hold together.

    `problems` says for each file, by name, why it could not be read to its end; what lies before that is here.
    `identity` are the exact wall times of the first two records of the file that was started first. A copy of a run
    has the same even if its later values were edited or its end cut off; two runs have never. Empty where unknown.
    """

    scalars: Mapping[str, Series]
    blobs: Mapping[str, tuple[Blob, ...]]
    problems: Mapping[str, str]
    identity: tuple[str, ...]


def read_events(paths: Sequence[Path]) -> Events:
    """Reads the files in the order given; never raises for what is in them, see `Events.problems`."""
    collected = _Collected()
    problems: dict[str, str] = {}
    for path in paths:
        try:
            _read_file(path, collected)
        except UnreadableError as error:
            problems[path.name] = str(error)
        except OSError as error:
            problems[path.name] = f"{path.name}: not readable ({error.strerror or error})."
    return Events(
        scalars={tag: _series(*columns) for tag, columns in sorted(collected.scalars.items())},
        blobs={tag: tuple(blobs) for tag, blobs in sorted(collected.blobs.items())},
        problems=problems,
        identity=_identity(collected.first_wall_times),
    )


@dataclass
class _Collected:
    """What was read so far: by scalar tag the columns step, raw value, raw wall time; by other tags their blobs."""

    scalars: dict[str, tuple[list[int], list[bytes], list[bytes]]] = field(default_factory=dict)
    blobs: dict[str, list[Blob]] = field(default_factory=dict)
    first_wall_times: list[list[bytes]] = field(default_factory=list)

    def add_scalar(self, tag: str, step: int, value: bytes, wall_time: bytes) -> None:
        columns = self.scalars.get(tag)
        if columns is None:
            columns = self.scalars[tag] = ([], [], [])
        columns[0].append(step)
        columns[1].append(value)
        columns[2].append(wall_time)


def _read_file(path: Path, into: _Collected) -> None:
    wall_times: list[bytes] = []
    into.first_wall_times.append(wall_times)
    with open_plain(path) as stream:
        for number, data in enumerate(_records(stream, path.name, os.fstat(stream.fileno()).st_size), start=1):
            if len(into.scalars) + len(into.blobs) > MAX_TAGS:
                raise UnreadableError(f"{path.name}: more than {MAX_TAGS} tags; what follows them was not read.")
            scalar = decode_scalar(data)
            if scalar is not None:
                into.add_scalar(*scalar)
                wall_time = scalar[3]
            else:
                wall_time = _add_event(data, into, f"{path.name}: record {number}")
            if len(wall_times) < 2:
                wall_times.append(wall_time)


def _records(stream: BinaryIO, name: str, size: int) -> Iterator[bytes]:
    """Yields the data of each record; raises UnreadableError at the first that is incomplete or fails its checksum."""
    crc32c, read = google_crc32c.value, stream.read
    position = number = 0
    while position < size:
        header = read(12)
        if len(header) == 12:
            length, check = _HEADER.unpack(header)
            if _masked(crc32c(header[:8])) != check:
                raise UnreadableError(_corrupt(name, number, position))
        if len(header) < 12 or length > size - position - 16:
            raise UnreadableError(
                f"{name}: ends in the middle of record {number + 1}, as a killed run leaves it; "
                f"the {number} before it were read."
            )
        if length > MAX_RECORD_BYTES:
            raise UnreadableError(
                f"{name}: record {number + 1} has {length} bytes, more than {MAX_RECORD_BYTES}; "
                f"the {number} before it were read and nothing after it."
            )
        data = read(length)
        footer = read(4)
        if len(footer) < 4 or _masked(crc32c(data)) != _FOOTER.unpack(footer)[0]:
            raise UnreadableError(_corrupt(name, number, position))
        yield data
        position += length + 16
        number += 1


def framed(data: bytes) -> bytes:
    """A record as an event file holds it, with its length and checksums."""
    length = struct.pack("<Q", len(data))
    crc32c = google_crc32c.value
    return _HEADER.pack(len(data), _masked(crc32c(length))) + data + _FOOTER.pack(_masked(crc32c(data)))


def _masked(crc: int) -> int:
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _corrupt(name: str, number: int, position: int) -> str:
    return (
        f"{name}: record {number + 1} at byte {position} is corrupt, its checksum does not match; "
        f"the {number} before it were read and nothing after it."
    )


# An event as torch and TensorBoard write it for one scalar, up to the length of the tag: Event.wall_time (field 1),
# Event.step (2, absent for 0), Event.summary (5), Summary.value (1), Value.tag (1); then the tag, then the value.
# Lengths of three bytes (more than 16,383) and negative steps (ten bytes) are left to protobuf.
_VARINT = rb"([\x80-\xff]?[\x00-\x7f])"
_SCALAR_HEAD = re.compile(
    rb"\x09(.{8})(?:\x10([\x80-\xff]{0,8}[\x00-\x7f]))?\x2a" + _VARINT + rb"\x0a" + _VARINT + rb"\x0a" + _VARINT,
    re.DOTALL,
)
# Value.simple_value (2); or Value.tensor (8) with dtype (1) and float_val (5) or double_val (6), as torch's `new_style`
# scalars are, and Value.metadata (9) with plugin_data.plugin_name = "scalars".
_SCALAR_VALUE = re.compile(
    rb"\x15(.{4})|\x42(?:\x08\x08\x01\x2a\x04(.{4})|\x0c\x08\x02\x32\x08(.{8}))\x4a\x0b\x0a\x09\x0a\x07scalars",
    re.DOTALL,
)


def decode_scalar(data: bytes) -> tuple[str, int, bytes, bytes] | None:
    """Tag, step, raw value and raw wall time of an event with one scalar; None where protobuf has to decode it.

    The value is float32 (4 bytes) or float64 (8 bytes), little-endian; the wall time float64, in seconds.
    """
    head = _SCALAR_HEAD.match(data)
    if head is None:
        return None
    wall_time, step, summary_length, value_length, tag_length = head.groups()
    start = head.end()
    end = start + _varint(tag_length)
    value = _SCALAR_VALUE.fullmatch(data, end)
    if value is None or _varint(summary_length) != len(data) - head.end(3):
        return None
    if _varint(value_length) != len(data) - head.end(4):
        return None
    try:
        tag = data[start:end].decode()
    except UnicodeDecodeError:
        return None
    return tag, 0 if step is None else _varint(step), value[1] or value[2] or value[3], wall_time


def _varint(encoded: bytes) -> int:
    if len(encoded) == 1:
        return encoded[0]
    return sum((byte & 0x7F) << (7 * index) for index, byte in enumerate(encoded))


def _add_event(data: bytes, into: _Collected, where: str) -> bytes:
    """Adds what protobuf reads in an event; returns its raw wall time."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto import event_pb2

    try:
        if _count_fields(data, 0) > MAX_FIELDS:
            raise UnreadableError(f"{where} has more than {MAX_FIELDS} fields; nothing after it was read.")
        event = event_pb2.Event.FromString(data)
    except (DecodeError, ValueError, LookupError, TypeError, RecursionError, struct.error) as error:
        raise UnreadableError(f"{where} is no TensorBoard event ({error}); nothing after it was read.") from error
    wall_time = _DOUBLE.pack(event.wall_time)
    for value in event.summary.value:
        raw = _scalar_bits(value)
        if raw is not None:
            into.add_scalar(value.tag, event.step, raw, wall_time)
        elif value.WhichOneof("value") is not None:
            into.blobs.setdefault(value.tag, []).append((event.step, *_blob(value)))
    return wall_time


def _count_fields(data: bytes, level: int) -> int:
    """Fields of a message and of those in it, as far as they are well-formed, and no further than the limit."""
    at = count = 0
    while at < len(data) and count <= MAX_FIELDS:
        count += 1
        key, at = _read_varint(data, at)
        kind = key & 7
        if kind == 0:
            _, at = _read_varint(data, at)
        elif kind == 2:
            length, at = _read_varint(data, at)
            if level < len(_MESSAGES) and key >> 3 in _MESSAGES[level]:
                count += _count_fields(data[at : at + length], level + 1)
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            break
    return count


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at` and where the next one begins; protobuf refuses what is longer than ten bytes."""
    number = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            break
    return number, at


def _scalar_bits(value: Any) -> bytes | None:
    """The raw bits of a Summary.Value that holds one float, None where it holds something else."""
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return _FLOAT.pack(value.simple_value)
    if kind != "tensor" or value.tensor.tensor_shape.dim or value.tensor.tensor_shape.unknown_rank:
        return None
    tensor = value.tensor
    layouts = {_DT_FLOAT: (tensor.float_val, _FLOAT), _DT_DOUBLE: (tensor.double_val, _DOUBLE)}
    if tensor.dtype not in layouts:
        return None
    numbers, layout = layouts[tensor.dtype]
    if not numbers and len(tensor.tensor_content) == layout.size:
        return bytes(tensor.tensor_content)
    return layout.pack(numbers[0]) if len(numbers) == 1 and not tensor.tensor_content else None


def _blob(value: Any) -> tuple[str, bytes]:
    """Kind and payload of a Summary.Value: encoded images, audio and texts as they are, the rest as protobuf bytes."""
    kind = value.WhichOneof("value")
    if kind == "image":
        return "image", value.image.encoded_image_string
    if kind == "audio":
        return "audio", value.audio.encoded_audio_string
    if kind == "histo":
        return "histogram", value.histo.SerializeToString()
    if kind == "obsolete_old_style_histogram":
        return "histogram", value.obsolete_old_style_histogram
    strings = value.tensor.string_val
    is_string = value.tensor.dtype == _DT_STRING and len(strings) == 1
    if is_string and value.metadata.plugin_data.plugin_name == "text":
        return "text", strings[0]
    return "tensor", value.tensor.SerializeToString()


def _series(steps: list[int], values: list[bytes], wall_times: list[bytes]) -> Series:
    sizes = {len(value) for value in values}
    if len(sizes) == 1:
        numbers = np.frombuffer(b"".join(values), "<f4" if sizes == {4} else "<f8")
    else:  # one tag written both ways: float64 holds both exactly
        numbers = np.array([(_FLOAT if len(value) == 4 else _DOUBLE).unpack(value)[0] for value in values], "<f8")
    return Series(np.array(steps, np.int64), numbers, np.frombuffer(b"".join(wall_times), "<f8"))


def _identity(first_wall_times: list[list[bytes]]) -> tuple[str, ...]:
    candidates = [tuple(_DOUBLE.unpack(raw)[0] for raw in times) for times in first_wall_times if times]
    earliest = min(candidates, default=())
    # A log without a clock (all zeros) would be "the same run" as any other such log.
    return tuple(time.hex() for time in earliest) if any(earliest) else ()
