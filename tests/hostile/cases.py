"""The table of hostile and broken input: each case damages the copy of a good run, and says what has to come of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fake_runs import IMAGES, LOSS, STEPS, record
from hostile.sandbox import CHANGES
from PIL import Image
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto

from f3rm_verify.run_dir import (
    CHECKPOINTS,
    CONFIG,
    EVIDENCE,
    MANIFEST,
    METRICS,
    RANKS,
    RENDERS,
    SEEDING,
    TRACE,
    TRACE_RECORDS,
    TRANSFORMS,
)

EVENTS = "events.out.tfevents.1.host.1.0"
CHECKPOINT = f"{CHECKPOINTS}/step-{STEPS - 1:09d}.ckpt"
TRACE_NODE = "trace/candidate records"
STEP = f"checkpoints/step-{STEPS - 1:09d}"
RGB = f"{RENDERS}/{IMAGES[0]}/rgb"
EVENT_NODE = f"curves/candidate {EVENTS}"
#: A file that hostile input tries to make; cases run in the folder that would hold it.
CANARY = "canary"
#: A user that owns nothing.
NOBODY = 65534

Damage = Callable[[Path], object]
#: Of a file; what is large or slow to make is made when it is needed.
Content = bytes | str | Callable[[], bytes | str]


@dataclass(frozen=True, kw_only=True)
class Case:
    """`damage` gets the run's directory. `unreadable` are the nodes that say so, all others must be as in a good pair.

    `usage` is part of the sentence that ends the command instead. `harmless` cases leave the verdict what it was,
    `outcome` is the verdict otherwise. `touched` artefacts may change besides: what depends on what is unreadable.
    `change` is what happens to a file when it is opened (see `sandbox.CHANGES`), `late` a file cut off after that.
    """

    name: str
    damage: Damage
    unreadable: tuple[str, ...] = ()
    usage: str | None = None
    outcome: str = "inconclusive"
    says: str = ""
    touched: tuple[str, ...] = ()
    change: tuple[str, str] | None = None
    late: str | None = None
    user: int | None = None
    seconds: float = 30


def _write(name: str, data: Content) -> Damage:
    def damage(run: Path) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(_bytes(data))

    return damage


def _bytes(data: Content) -> bytes:
    content = data() if callable(data) else data
    return content.encode() if isinstance(content, str) else content


def _edit(name: str, edit: Callable[[bytes], bytes]) -> Damage:
    return lambda run: (run / name).write_bytes(edit((run / name).read_bytes()))


def _instead(name: str, make: Callable[[Path], object]) -> Damage:
    """Something else in the place of a file or of a folder with files."""

    def damage(run: Path) -> None:
        path = run / name
        for item in sorted(path.rglob("*"), reverse=True) if path.is_dir() else ():
            item.rmdir() if item.is_dir() else item.unlink()
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)

    return damage


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _nothing(_: Path) -> None:
    pass


def _none(_: Path) -> None:
    pass


# --- event files ---------------------------------------------------------------------------------------------------


def _event(**fields: Any) -> bytes:
    return bytes(event_pb2.Event(wall_time=1.7e9, **fields).SerializeToString())


def _scalar(tag: str, step: int = 0, value: float = 1.0) -> bytes:
    return _event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))


def _append_records(*records: Content) -> Damage:
    return _edit(EVENTS, lambda data: data + b"".join(record(_bytes(content)) for content in records))


def _flip_bit(position: int) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        at = position % len(data)
        return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]

    return flip


def _many_tags(run: Path) -> None:
    with (run / EVENTS).open("ab") as stream:
        for number in range(300_000):
            stream.write(record(_scalar(f"t{number}")))


def _packed_floats() -> bytes:
    """A tensor whose floats take 32 times their size as Python objects."""
    tensor = TensorProto(dtype=1)
    tensor.tensor_shape.dim.add().size = 1
    payload = b"\x2a" + _varint(2**27) + bytes(2**27)  # float_val, packed
    value = b"\x0a\x01t" + b"\x42" + _varint(len(payload)) + payload
    summary = b"\x0a" + _varint(len(value)) + value
    return b"\x09" + struct.pack("<d", 1.7e9) + b"\x2a" + _varint(len(summary)) + summary


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _event_cases() -> Iterator[Case]:
    def broken(name: str, damage: Damage, says: str = "", **more: Any) -> Case:
        return Case(
            name=f"events: {name}", damage=damage, unreadable=(EVENT_NODE,), says=says, touched=("curves",), **more
        )

    yield broken("cut off in the middle of a record", _edit(EVENTS, lambda data: data[:-7]), "ends in the middle")
    yield broken("half of the file", _edit(EVENTS, _half))
    yield broken("a flipped bit in a value", _edit(EVENTS, _flip_bit(-9)), "checksum")
    yield broken("a flipped bit in a length", _edit(EVENTS, _flip_bit(3)), "checksum")
    yield broken("garbage behind the records", _edit(EVENTS, lambda data: data + os.urandom(1000)))
    yield broken("only garbage", _write(EVENTS, bytes(range(256)) * 64))
    length = struct.pack("<Q", 2**60)
    bomb = length + record(length)[20:] + bytes(64)
    yield broken("a record of 2^60 bytes", _edit(EVENTS, lambda data: data + bomb))
    negative = b"\xff" * 8
    yield broken("a record of -1 bytes", _edit(EVENTS, lambda data: data + negative + record(negative)[20:] + bytes(9)))
    yield broken("a record that is no protobuf", _append_records(b"\xff\xff\xff\xff"), "no TensorBoard event")
    yield broken("a nested length that lies", _append_records(b"\x2a\xff\xff\xff\xff\x0fabc"), "no TensorBoard event")
    yield broken("a tag that is not UTF-8", _append_records(b"\x2a\x07\x0a\x05\x0a\x03\xff\xfe\xfd"))
    yield broken("groups nested 100,000 deep", _append_records(b"\x0b" * 100_000))
    yield broken("128 MiB of packed floats", _append_records(_packed_floats), "more than")
    yield broken("300,000 tags", _many_tags, "tags", seconds=90)
    yield Case(
        name="events: 10^5 repetitions of one step",
        damage=_append_records(*[_scalar(LOSS, 3)] * 100_000),
        touched=("curves",),
    )
    yield Case(
        name="events: steps below 0 and up to 2^63 - 1",
        damage=_append_records(*(_scalar("t", step) for step in (-1, -(2**63), 2**63 - 1))),
        touched=("curves",),
    )


# --- checkpoints ---------------------------------------------------------------------------------------------------


def _zip(files: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as zipped:
        for name, data in files.items():
            zipped.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


def _checkpoint(data_pkl: Content, storages: Mapping[str, bytes] | None = None) -> Damage:
    def content() -> bytes:
        files = {"archive/data.pkl": _bytes(data_pkl), "archive/byteorder": b"little"}
        return _zip(files | {f"archive/data/{key}": data for key, data in (storages or {}).items()})

    return _write(CHECKPOINT, content)


def _value(opcodes: bytes) -> bytes:
    """The pickle of {"x": what the opcodes leave on the stack}."""
    return b"\x80\x02}X\x01\x00\x00\x00x" + opcodes + b"s."


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _tensor(shape: tuple[int, ...], strides: tuple[int, ...], count: int, offset: int = 0, key: str = "0") -> bytes:
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(key) + _text("cpu") + _int(count) + b"tQ"
    sizes = b"".join(b"(" + b"".join(map(_int, numbers)) + b"t" for numbers in (shape, strides))
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + _int(offset)
        + sizes
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def _int(number: int) -> bytes:
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _runs_code(call: Callable[..., Any], *arguments: Any) -> bytes:
    class Payload:
        def __reduce__(self) -> Any:
            return call, arguments

    return pickle.dumps({"x": Payload()}, protocol=2)


_TOUCH = f"touch {CANARY}"
_WRITE = f"open({CANARY!r}, 'w').close()"
#: Pickles that run code, by the way in which they get to it.
_CODE: Mapping[str, bytes] = {
    "os.system by REDUCE": _runs_code(os.system, _TOUCH),
    "eval by REDUCE": _runs_code(eval, _WRITE),
    "exec by REDUCE": _runs_code(exec, _WRITE),
    "getattr chain": _value(
        b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n("
        + _text("os")
        + b"tR"
        + _text("system")
        + b"tR("
        + _text(_TOUCH)
        + b"tR"
    ),
    "STACK_GLOBAL": b"\x80\x04}\x8c\x01x\x8c\x02os\x8c\x06system\x93(" + _text(_TOUCH) + b"tRs.",
    "STACK_GLOBAL with a dotted name": b"\x80\x04}\x8c\x01x\x8c\x05torch\x8c\x09os.system\x93("
    + _text(_TOUCH)
    + b"tRs.",
    "INST": _value(b"(" + _text(_TOUCH) + b"ios\nsystem\n"),
    "OBJ": _value(b"(cos\nsystem\n" + _text(_TOUCH) + b"o"),
    "NEWOBJ": _value(b"csubprocess\nPopen\n(" + _text(_TOUCH) + b"t\x81"),
    "NEWOBJ_EX": b"\x80\x04}\x8c\x01xcsubprocess\nPopen\n(" + _text(_TOUCH) + b"t}\x92s.",
    "EXT1": _value(b"\x82\x01"),
    "EXT4": _value(b"\x84\x01\x00\x00\x00"),
    "BUILD with __setstate__": _value(b"ccollections\nOrderedDict\n)R}" + _text("__class__") + b"cos\nsystem\nsb"),
    "BUILD of an allowed name": _value(b"ctorch\nFloatStorage\n}" + _text("construct") + b"cos\nsystem\nsb"),
    "an allowed name that is called": _value(b"ctorch\nFloatStorage\n(" + _text(_TOUCH) + b"tR"),
    "a factory of a defaultdict": _value(b"ccollections\ndefaultdict\n(cos\nsystem\ntR"),
    "a tensor rebuilt by os.system": _value(
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n(" + _text(_TOUCH) + b"tNtR"
    ),
    "BINPERSID of a name": _value(b"cos\nsystem\nQ"),
    "PERSID": _value(b"Pos.system\n"),
    "NEXT_BUFFER": b"\x80\x05}\x8c\x01x\x97s.",
}


def _memo_bomb(depth: int) -> bytes:
    """Lists of ten times the list before: 10^depth leaves."""
    parts = [b"]q\x00K\x01a"]
    for level in range(1, depth):
        parts.append(b"]q" + bytes([level]) + b"(" + (b"h" + bytes([level - 1])) * 10 + b"e")
    return _value(b"".join(parts))


def _colliding_keys(count: int) -> bytes:
    """Integers with one hash: a dict of them takes the square of their number in time."""
    items = b"".join(_int(number * (2**61 - 1)) + b"N" for number in range(1, count))
    return _value(b"}(" + items + b"u")


def _encrypted(run: Path) -> None:
    data = bytearray((run / CHECKPOINT).read_bytes())
    start = data.index(b"PK\1\2")
    data[6] |= 1
    data[start + 8] |= 1
    (run / CHECKPOINT).write_bytes(data)


def _overlapping(run: Path) -> None:
    """All files of the zip begin where the first begins: a small file with much in it."""
    data = bytearray((run / CHECKPOINT).read_bytes())
    at = data.find(b"PK\1\2")
    while at >= 0:
        data[at + 42 : at + 46] = bytes(4)
        at = data.find(b"PK\1\2", at + 4)
    (run / CHECKPOINT).write_bytes(data)


def _directory_that_lies(run: Path) -> None:
    """zip64 with two end records: the one that its locator names is small, the one before it is huge."""
    entries = b"".join(
        b"PK\1\2" + bytes(24) + struct.pack("<HHHHHLL", 8, 0, 0, 0, 0, 0, 0) + b"%08d" % number
        for number in range(400_000)
    )
    small = b"PK\6\6" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, 1, 1, 54, 0)
    huge = b"PK\6\6" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, 400_000, 400_000, len(entries), 4 + len(small))
    locator = b"PK\6\7" + struct.pack("<LQL", 0, 4, 1)
    end = b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (run / CHECKPOINT).write_bytes(b"PK\3\4" + small + entries + huge + locator + end)


def _checkpoint_cases() -> Iterator[Case]:
    def broken(name: str, damage: Damage, says: str = "", **more: Any) -> Case:
        return Case(name=f"checkpoint: {name}", damage=damage, unreadable=(STEP,), says=says, **more)

    yield broken("empty", _write(CHECKPOINT, b""), "empty")
    yield broken("cut off", _edit(CHECKPOINT, _half), "truncated")
    yield broken("one byte short", _edit(CHECKPOINT, lambda data: data[:-1]))
    yield broken("of torch before 1.6", _write(CHECKPOINT, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02."), "1.6")
    yield broken("a flipped bit in its pickle", _edit(CHECKPOINT, _flip_bit(80)))
    for name, content in _CODE.items():
        yield broken(f"runs code: {name}", _checkpoint(content))
    yield broken("memo bomb", _checkpoint(_memo_bomb(40)))
    yield broken("a list in itself", _checkpoint(_value(b"]q\x00h\x00a")), "nested")
    yield broken("100,000 lists in each other", _checkpoint(_value(b"]" * 100_000 + b"a" * 99_999)), "nested")
    yield broken("40 MiB of empty lists", _checkpoint(lambda: _value(b"(" + b"]" * (40 * 2**20) + b"l")))
    yield broken(
        "an integer of a million bits", _checkpoint(_value(b"\x8b" + struct.pack("<i", 2**17) + b"\x7f" * 2**17))
    )
    yield broken("a memo index of 2^31", _checkpoint(_value(b"j\xff\xff\xff\x7f")))
    yield broken("a text of 2^32 bytes", _checkpoint(_value(b"X\xff\xff\xff\xffabc")))
    yield broken("100,000 keys with one hash", _checkpoint(lambda: _colliding_keys(100_000)), seconds=20)
    yield broken("pops what it never pushed", _checkpoint(b"\x80\x02tttt."))
    yield broken("a storage that is shorter than it says", _checkpoint(_value(_tensor((4,), (1,), 4)), {"0": bytes(8)}))
    yield broken("a tensor beyond its storage", _checkpoint(_value(_tensor((4,), (2,), 4)), {"0": bytes(16)}))
    yield broken("a tensor before its storage", _checkpoint(_value(_tensor((2,), (-1,), 4, 1)), {"0": bytes(16)}))
    yield broken("2^62 x 2^62 values", _checkpoint(_value(_tensor((2**62, 2**62), (0, 0), 4)), {"0": bytes(16)}))
    yield broken("2^62 x 0 values", _checkpoint(_value(_tensor((2**62, 2**62, 0), (0, 0, 0), 4)), {"0": bytes(16)}))
    yield broken("200 dimensions", _checkpoint(_value(_tensor((1,) * 200, (1,) * 200, 4)), {"0": bytes(16)}))
    yield broken("one storage as 20 GiB", _checkpoint(_value(_tensor((5 * 2**30,), (0,), 4)), {"0": bytes(16)}))
    yield broken("a storage outside of the zip", _checkpoint(_value(_tensor((4,), (1,), 4, key="../../x")), {}))
    yield broken("names with ..", _write(CHECKPOINT, _zip({"../../data.pkl": b"}.", "/etc/data.pkl": b"}."})))
    yield broken("no data.pkl", _write(CHECKPOINT, _zip({"archive/other": b"}."})), "no data.pkl")
    yield broken("two files of one name", _write(CHECKPOINT, _twice), "one name")
    yield broken(
        "a zip bomb",
        _write(CHECKPOINT, lambda: _zip({"archive/data.pkl": bytes(2**29)}, zipfile.ZIP_DEFLATED)),
        "unpacks",
    )
    yield broken("encrypted", _encrypted, "encrypted")
    yield broken("overlapping files", _overlapping)
    yield broken("a directory that lies about its size", _directory_that_lies)
    yield broken("big-endian", _write(CHECKPOINT, _zip({"a/data.pkl": b"}.", "a/byteorder": b"big"})), "big-endian")
    yield broken("a list, not a dict", _checkpoint(b"\x80\x02]."), "no dict")
    yield broken("is a folder", _instead(CHECKPOINT, Path.mkdir))
    yield broken("is a pipe", _instead(CHECKPOINT, os.mkfifo))
    yield broken("vanishes when it is opened", _nothing, change=(CHECKPOINT, "vanishes"))
    yield broken("is emptied when it is opened", _nothing, change=(CHECKPOINT, "is emptied"))
    yield broken("becomes a pipe when it is opened", _nothing, change=(CHECKPOINT, "becomes a pipe"))
    yield broken("is cut off while its tensors are read", _nothing, late=CHECKPOINT)
    yield broken("may not be read", lambda run: (run / CHECKPOINT).chmod(0), user=NOBODY)
    yield Case(
        name="checkpoint: 1,000,000 zeros in a tensor of stride 0",
        damage=_checkpoint(_value(_tensor((2**28,), (0,), 1)), {"0": bytes(4)}),
        outcome="inconclusive",
        touched=("checkpoints",),
    )
    yield Case(
        name="checkpoint: a key with a lone surrogate, a newline and a terminal escape",
        damage=_checkpoint(b"\x80\x02}X\x0e\x00\x00\x00a\n\x1b[2J\xed\xa0\x80/../bK\x01s."),
        touched=("checkpoints",),
    )


def _twice() -> bytes:
    files = _zip({"archive/data.pkl": b"}.", "archive/dato.pkl": b"}."})
    return files.replace(b"dato.pkl", b"data.pkl")


# --- images --------------------------------------------------------------------------------------------------------


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, samples: bytes, *, depth: int = 8, colour: int = 0, more: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _png_chunk(b"IHDR", header),
            more,
            _png_chunk(b"IDAT", samples),
            _png_chunk(b"IEND", b""),
        )
    )


def _picture(kind: str, size: tuple[int, int] = (9, 8), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (10, 20, 30)).save(buffer, kind, **options)
    return buffer.getvalue()


def _deflated(size: int) -> bytes:
    squeeze = zlib.compressobj(9)
    parts = [squeeze.compress(bytes(2**20)) for _ in range(size // 2**20)]
    return b"".join((*parts, squeeze.compress(bytes(size % 2**20)), squeeze.flush()))


def _animation() -> bytes:
    frames = [Image.new("RGB", (9, 8), (index, 0, 0)) for index in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(_picture("JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _npy(header: str, content: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def _saved(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


class _Executes:
    def __reduce__(self) -> Any:
        return os.system, (_TOUCH,)


def _image_cases() -> Iterator[Case]:
    def png(name: str, content: Content, says: str = "") -> Case:
        damage = _write(f"{RGB}.png", content)
        return Case(name=f"PNG: {name}", damage=damage, unreadable=(f"renders/{IMAGES[0]}/rgb.png",), says=says)

    def npy(name: str, content: Content, says: str = "", **more: Any) -> Case:
        damage = _write(f"{RGB}.npy", content)
        return Case(name=f"npy: {name}", damage=damage, unreadable=(f"renders/{IMAGES[0]}/rgb",), says=says, **more)

    values = _saved(np.zeros((8, 9, 3), np.float32))
    yield png("60,000 x 60,000", _png(60_000, 60_000, zlib.compress(b"")), "pixels")
    yield png("9,000 x 9,000, and all of it there", lambda: _png(9000, 9000, _deflated(9000 * 9001)), "pixels")
    yield png("more pixels than it says", lambda: _png(8, 8, _deflated(2**28)), "promises")
    yield png("fewer pixels than it says", _png(800, 800, zlib.compress(bytes(801 * 10))), "promises")
    yield png("2^31 x 2^31", _png(2**31 - 1, 2**31 - 1, b""))
    yield png("empty", b"", "empty")
    yield png("cut off", _half(_picture("PNG")), "cut off")
    yield png("a wrong checksum", _flip_bit(45)(_picture("PNG")), "checksum")
    yield png("an animation", _animation(), "animation")
    yield png("a JPEG by the name of a PNG", _picture("JPEG"), "not a PNG")
    yield png("a GIF by the name of a PNG", _picture("GIF"), "not a PNG")
    yield png("a chunk of 2^32 bytes", _picture("PNG")[:33] + b"\xff\xff\xff\xffIDAT", "cut off")
    yield png("deflate that is garbage", _png(8, 8, b"\x78\x9cgarbage"))
    yield png("colour type 5", _png(8, 8, zlib.compress(bytes(72)), colour=5), "contradicts")
    yield png("16 bit with a palette", _png(8, 8, zlib.compress(bytes(17 * 8)), depth=16, colour=3))
    yield png(
        "a palette of 3,000 colours",
        _png(8, 8, zlib.compress(bytes(72)), colour=3, more=_png_chunk(b"PLTE", bytes(9000))),
    )
    yield png("a palette without colours", _png(8, 8, zlib.compress(bytes(72)), colour=3))
    yield png("a filter that does not exist", _png(8, 8, zlib.compress(bytes([9] + [0] * 8) * 8)))
    yield Case(
        name="PNG: a text that unpacks to 256 MiB",
        damage=_edit(
            f"{RGB}.png", lambda data: data[:33] + _png_chunk(b"zTXt", b"Comment\0\0" + _deflated(2**28)) + data[33:]
        ),
        outcome="reproducible",
    )
    yield Case(
        name="PNG: 5,700 x 5,700 of 16 bit, four channels",
        damage=_write(f"{RGB}.png", lambda: _png(5700, 5700, _deflated(5700 * (5700 * 8 + 1)), depth=16, colour=6)),
        outcome="diverged",
        touched=("renders",),
    )
    name = f"renders/{IMAGES[0]}/plain.jpg"
    for what, content in {
        "cut off": _half(_picture("JPEG", (64, 64))),
        "65,000 x 65,000": _jpeg_of(65_000, 65_000),
        "0 x 0": _jpeg_of(0, 0),
        "a GIF": _picture("GIF"),
        "without a picture": b"\xff\xd8\xff\xd9",
    }.items():
        yield Case(
            name=f"JPEG: {what}",
            damage=_on_both_sides(f"{RENDERS}/{IMAGES[0]}/plain.jpg", _picture("JPEG", (64, 64)), content),
            unreadable=(name,),
        )
    yield npy("Python objects", _saved(np.array([_Executes()], object), allow_pickle=True), "header")
    yield npy("a header that calls", _npy(f"__import__('os').system('{_TOUCH}')"), "header")
    yield npy(
        "a header that adds", _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2+2,), }", bytes(16)), "header"
    )
    yield npy("a header nested 60,000 deep", _npy("(" * 60_000), "header")
    yield npy("2^60 values", _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1073741824, 1073741824), }"))
    yield npy(
        "a negative shape", _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", bytes(16)), "header"
    )
    yield npy("no values", _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 3), }"), "no values")
    yield npy("records", _saved(np.zeros(3, [("a", "<f4"), ("b", "<i4")])), "header")
    yield npy("texts", _saved(np.array(["a", "b"])), "header")
    yield npy("128-bit floats", _saved(np.zeros(3, np.longdouble)), "header")
    yield npy("cut off", _half(values))
    yield npy("a byte too many", values + b"\0")
    yield npy("version 9", values[:6] + b"\x09" + values[7:], "not a .npy")
    yield npy("a header of 4 GiB", b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "header")
    yield npy("a zip with arrays", _zip({"rgb.npy": _saved(np.zeros(3))}), "not a .npy")
    for how in CHANGES:
        yield npy(f"{how} when it is opened", values, change=(f"{RGB}.npy", how))
    yield Case(
        name="npy: the same values in Fortran order",
        damage=_edit(f"{RGB}.npy", lambda data: _saved(np.asfortranarray(np.load(io.BytesIO(data))))),
        outcome="reproducible",
    )


def _exr_cases() -> Iterator[Case]:
    sound = _exr(64, 64)
    window = np.array([0, 0, 63, 63], "<i4").tobytes()
    assert sound.count(window) == 2, "data window and display window"

    def of_window(*corners: int) -> bytes:
        return sound.replace(window, np.array(corners, "<i4").tobytes())

    for what, content in {
        "cut off": sound[:-10],
        "a header alone": sound[:100],
        "10^9 x 10^9": of_window(0, 0, 10**9, 10**9),
        "as wide as an integer can say": of_window(-(2**31), 0, 2**31 - 1, 3),
        "its corners the wrong way round": of_window(63, 63, 0, 0),
        "a name of a channel without an end": sound.replace(b"Y\0", b"YY"),
        "noise behind the header": sound[:300] + bytes(range(256)) * 4,
        "a PNG": _picture("PNG"),
    }.items():
        yield Case(
            name=f"EXR: {what}",
            damage=_on_both_sides(f"{RENDERS}/{IMAGES[0]}/depth.exr", sound, content),
            unreadable=(f"renders/{IMAGES[0]}/depth.exr",),
        )


def _exr(height: int, width: int) -> bytes:
    import OpenEXR

    values = np.linspace(0, 1, height * width, dtype=np.float32).reshape(height, width)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "sound.exr"))
        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        OpenEXR.File(header, {"Y": values.copy()}).write(path)
        return Path(path).read_bytes()


def _on_both_sides(name: str, good: Content, bad: Content) -> Damage:
    """A file that the good run lacks: the reference gets a sound one."""

    def damage(run: Path) -> None:
        _write(name, good)(run.parent / "reference")
        _write(name, bad)(run)

    return damage


# --- config.yml ----------------------------------------------------------------------------------------------------


def _yaml_bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 12):
        lines.append(f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * 10) + "]")
    return "\n".join(lines)


def _yaml_cases() -> Iterator[Case]:
    def broken(name: str, content: Content, says: str = "", **more: Any) -> Case:
        node = (f"setup/{CONFIG}",)
        return Case(name=f"YAML: {name}", damage=_write(CONFIG, content), unreadable=node, says=says, **more)

    for tag in ("python/object/apply:os.system", "python/object/new:os.system"):
        yield Case(
            name=f"YAML: {tag}",
            damage=_edit(CONFIG, lambda data, tag=tag: data + f"x: !!{tag} [{_TOUCH}]\n".encode()),  # type: ignore[misc]
            touched=("setup",),
        )
    yield Case(
        name="YAML: python/module and python/name",
        damage=_edit(CONFIG, lambda data: data + b"x: !!python/module:antigravity ''\ny: !!python/name:os.system ''\n"),
        touched=("setup",),
    )
    yield broken("billion laughs", _yaml_bomb(), "aliases")
    yield broken("an alias of what contains it", "a: &a [*a]", "refers to")
    yield broken("nested 100,000 deep", "[" * 100_000, "nested")
    yield broken("15 MiB of one text", lambda: "a: " + "x" * (15 * 2**20), "bytes")
    yield broken("a number of 10^5 digits", "a: " + "9" * 100_000, "number")
    yield Case(name="YAML: a number to the base 60", damage=_write(CONFIG, "a: 1" + ":59" * 300), touched=("setup",))
    yield broken("a key twice", "a: 1\na: 2", "twice")
    yield broken("not UTF-8", b"a: \xff\xfe\xff", "UTF-8")
    yield broken("control characters", "a: \x00\x1b[2J")
    yield broken("a lone surrogate", 'a: "\\ud800"')
    yield broken("cut off", "a: [1, 2", "YAML")
    yield broken("two documents", "a: 1\n---\nb: 2")
    yield broken("a list", "- 1", "not the configuration")
    yield broken("empty", "")
    yield Case(
        name="YAML: the logs lie outside",
        damage=_write(CONFIG, "logging: {relative_log_dir: ../../..}"),
        unreadable=("curves/candidate event files",),
        says="leads out",
        touched=("setup", "curves"),
    )
    yield Case(
        name="YAML: the checkpoints lie in /proc",
        damage=_write(CONFIG, "relative_model_dir: /proc/self/fd"),
        unreadable=(f"checkpoints/{CHECKPOINTS} of the candidate",),
        says="leads out",
        touched=("setup", "checkpoints"),
    )


# --- JSON ----------------------------------------------------------------------------------------------------------


def _json_cases() -> Iterator[Case]:
    files = {
        METRICS: "metrics/candidate",
        SEEDING: "seeding",
        MANIFEST: f"setup/{MANIFEST}",
        TRANSFORMS: f"setup/{TRANSFORMS}",
    }
    broken: dict[str, Content] = {
        "nested 10^6 deep": "[" * 10**6,
        "a number of 10^5 digits": '{"a": ' + "9" * 10**5 + "}",
        "a key twice": '{"a": 1, "a": 2}',
        "a lone surrogate": '{"a": "\\ud800"}',
        "a byte order mark": b"\xef\xbb\xbf{}",
        "not UTF-8": b'{"a": "\xff"}',
        "40 MiB of empty lists": lambda: '{"a": [' + "[]," * (40 * 2**20 // 3) + "[]]}",
        "a list": "[]",
        "cut off": '{"a": [1, 2',
        "two values": "{} {}",
    }
    for name, node in files.items():
        for what, content in broken.items():
            yield Case(
                name=f"{Path(name).name}: {what}",
                damage=_on_both_sides(name, "{}", content) if name == TRANSFORMS else _write(name, content),
                unreadable=(node,),
                touched=("metrics",) if name == MANIFEST else (),
            )
    yield Case(
        name="manifest.json: nested 900 deep where a name belongs",
        damage=_json_edit(MANIFEST, "environment", json.loads('{"a":' * 900 + "1" + "}" * 900)),
        unreadable=(f"setup/{MANIFEST}",),
    )
    yield Case(
        name="manifest.json: 10^9 ranks", damage=_json_edit(MANIFEST, "world_size", 10**9), touched=("setup", "*")
    )
    yield Case(
        name="manifest.json: an integer of 4,000 digits",
        damage=_json_edit(MANIFEST, "seed", 10**4000),
        touched=("setup",),
    )
    yield Case(
        name="metrics.json: NaN on one side",
        damage=_edit(METRICS, lambda data: data.replace(b"20.5", b"NaN")),
        outcome="diverged",
        touched=("metrics",),
    )
    yield Case(
        name="metrics.json: 1e999, true and a list for numbers",
        damage=_json_edit(METRICS, "mean", {"psnr": True, "ssim": [1], "lpips": {"a": 1}}),
        unreadable=("metrics/mean/lpips", "metrics/mean/psnr", "metrics/mean/ssim"),
        touched=("metrics",),
        outcome="*",
    )
    yield Case(
        name="metrics.json: names with HTML, escapes and right-to-left marks",
        damage=_json_edit(
            METRICS, "images", {"<script>alert(1)</script>\x1b]0;x\x07\u202e\n\r": {"psnr": 1.0, "\x1b[2J": 2.0}}
        ),
        touched=("metrics",),
        outcome="*",
    )
    yield Case(
        name="seeding.json: claims with terminal escapes",
        damage=_json_edit(
            SEEDING,
            "entries",
            [
                {
                    "claim": "\x1b[31m\u202eevil\n",
                    "observed": "\x9b2J",
                    "verdict": "fails",
                    "remedy": "\x1b]8;;http://x\x07",
                }
            ],
        ),
        touched=("seeding",),
    )


def _json_edit(name: str, key: str, value: Any) -> Damage:
    return _edit(name, lambda data: json.dumps({**json.loads(data), key: value}).encode())


# --- the trace -----------------------------------------------------------------------------------------------------


def _trace_cases() -> Iterator[Case]:
    def broken(name: str, damage: Damage, node: str = TRACE_NODE, **more: Any) -> Case:
        return Case(name=f"trace: {name}", damage=damage, unreadable=(node,), touched=("trace",), **more)

    yield broken("records cut off", _edit(TRACE_RECORDS, _half))
    yield broken("one byte short", _edit(TRACE_RECORDS, lambda data: data[:-1]))
    yield broken("a flipped bit", _edit(TRACE_RECORDS, _flip_bit(-20)), says="damaged")
    yield broken("garbage behind the records", _edit(TRACE_RECORDS, lambda data: data + bytes(range(1, 100))))
    yield broken("a frame of 2^32 records", _edit(TRACE_RECORDS, lambda data: data + b"\xff" * 64))
    yield broken("another version", _json_edit(TRACE, "schema_version", 99), node="trace", says="schema_version")
    yield broken("another algorithm", _json_edit(TRACE, "algorithm", "md5"), node="trace", says="md5")
    yield broken("subjects that are none", _json_edit(TRACE, "subjects", [[]]), node="trace")
    yield broken("a million subjects", _json_edit(TRACE, "subjects", [{}] * 10**6), node="trace")
    yield broken("trace.json nested 10^6 deep", _write(TRACE, "[" * 10**6), node="trace")
    yield broken("records are a pipe", _instead(TRACE_RECORDS, os.mkfifo), node="trace")
    yield broken("records are a link out", _link(TRACE_RECORDS, "/dev/zero"), node="trace")
    yield broken("records vanish when they are opened", _nothing, node="trace", change=(TRACE_RECORDS, "vanishes"))
    yield broken("records shrink when they are opened", _nothing, change=(TRACE_RECORDS, "is truncated"))


# --- names, links, folders -----------------------------------------------------------------------------------------


def _link(name: str, target: str) -> Damage:
    return _instead(name, lambda path: path.symlink_to(target))


def _forbidden(name: str) -> Damage:
    return lambda run: (run / name).chmod(0)


def _socket(path: Path) -> None:
    here = os.getcwd()
    try:
        os.chdir(path.parent)  # the name of a socket has at most 107 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _ranks_that_lead_back(run: Path) -> None:
    (run / RANKS).mkdir(parents=True)
    for rank in range(1, 10):
        (run / RANKS / str(rank)).symlink_to("../..")


def _deep_folders(run: Path) -> None:
    here = os.getcwd()
    try:
        os.chdir(run / RENDERS)
        for _ in range(1900):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)


def _renders(*names: bytes) -> Damage:
    """The same pictures under these names on both sides, and one that differs on ours."""

    def damage(run: Path) -> None:
        for side in (run, run.parent / "reference"):
            for index, name in enumerate(names):
                content = _picture("PNG") if side == run or index else _picture("PNG", (9, 9))
                Path(os.fsdecode(os.fsencode(side / RENDERS / IMAGES[0]) + b"/" + name + b".png")).write_bytes(content)

    return damage


def _ten_thousand(run: Path) -> None:
    content = _picture("PNG", (2, 2))
    for side in (run, run.parent / "reference"):
        for number in range(10_000):
            (side / RENDERS / IMAGES[0] / f"{number:05d}.png").write_bytes(content)
    (run / RENDERS / IMAGES[0] / "04711.png").write_bytes(content[:-1])


def _place_cases() -> Iterator[Case]:
    outside = {
        "out": "../../outside",
        "absolute": "/etc/passwd",
        "to /dev/zero": "/dev/zero",
        "to /proc/self/mem": "/proc/self/mem",
        "to itself": "x",
        "to nothing": "nowhere",
    }
    names = {
        CONFIG: (f"setup/{CONFIG}", ("setup",)),
        SEEDING: ("seeding", ("seeding",)),
        METRICS: ("metrics/candidate", ("metrics",)),
        CHECKPOINT: (f"checkpoints/{CHECKPOINTS} of the candidate", ("checkpoints",)),
        EVENTS: ("curves/candidate event files", ("curves",)),
        f"{RGB}.npy": (f"renders/{IMAGES[0]}/rgb", ()),
    }
    for name, (node, touched) in names.items():
        for what, target in outside.items():
            yield Case(
                name=f"{Path(name).name}: a link {what}",
                damage=_link(name, Path(name).name if target == "x" else target),
                unreadable=(node,),
                touched=touched,
                says="link",
            )
        kinds = {"a pipe": os.mkfifo, "a socket": _socket, "a folder": Path.mkdir}
        if os.getuid() == 0:
            kinds["a device"] = lambda path: os.mknod(path, 0o20600, os.makedev(1, 5))
        for what, make in kinds.items():
            node_of = {CHECKPOINT: STEP, EVENTS: EVENT_NODE}.get(name, node)
            is_gone = (name, what) == (f"{RGB}.npy", "a folder")  # a folder in the place of a picture is no picture
            yield Case(
                name=f"{Path(name).name}: {what}",
                damage=_instead(name, make),
                unreadable=() if is_gone else (node_of,),
                touched=("renders",) if is_gone else touched,
            )
    for name, (node, touched) in names.items():
        node_of = {CHECKPOINT: STEP, EVENTS: EVENT_NODE}.get(name, node)
        damage = _forbidden(name)
        yield Case(
            name=f"{Path(name).name}: may not be read",
            damage=damage,
            unreadable=(node_of,),
            touched=touched,
            user=NOBODY,
        )
        for how in ("vanishes", "becomes a pipe"):
            yield Case(
                name=f"{Path(name).name}: {how} when it is opened",
                damage=_nothing,
                # what is gone when it is looked at again is missing
                unreadable=() if how == "vanishes" and name in (CONFIG, METRICS) else (node_of,),
                touched=touched,
                change=(name, how),
            )
    yield Case(
        name="folder: the evidence may not be entered",
        damage=lambda run: (run / EVIDENCE).chmod(0),
        unreadable=(f"setup/{MANIFEST}", "seeding", "metrics/candidate", "renders", "ranks/evidence", "trace"),
        touched=("setup", "ranks"),
        user=NOBODY,
    )
    yield Case(
        name="folder: the renders are a link out",
        damage=_link(RENDERS, "/etc"),
        unreadable=("renders",),
        touched=("renders",),
    )
    yield Case(
        name="folder: 1,900 folders in each other", damage=_deep_folders, unreadable=("renders",), touched=("renders",)
    )
    yield Case(
        name="folder: ranks that are links to the run",
        damage=_ranks_that_lead_back,
        touched=("*",),
        unreadable=("ranks/evidence",),
    )
    yield Case(
        name="names: HTML, escapes, right-to-left, newlines",
        damage=_renders(b"<img src=x onerror=alert(1)>", b"\x1b[2J\x07", "\u202egnp.x".encode(), b"a\nb\rc", b"&amp;"),
        outcome="diverged",
        touched=("renders",),
    )
    yield Case(name="names: not UTF-8", damage=_renders(b"\xff\xfe", b"\x80"), outcome="diverged", touched=("renders",))
    yield Case(
        name="names: 251 bytes",
        damage=_renders(b"x" * 251, "\u00e9".encode() * 125),
        outcome="diverged",
        touched=("renders",),
    )
    yield Case(
        name="folder: 10,000 pictures, one of them cut off",
        damage=_ten_thousand,
        unreadable=(f"renders/{IMAGES[0]}/04711.png",),
        touched=("renders",),
        seconds=120,
    )
    yield Case(name="folder: empty", damage=_instead(".", Path.mkdir), usage="is no nerfstudio run directory")
    yield Case(name="folder: gone", damage=_instead(".", _none), usage="does not exist")
    yield Case(name="folder: a file", damage=_instead(".", Path.touch), usage="is not a directory")
    yield Case(name="folder: a link to the other run", damage=_instead(".", lambda path: path.symlink_to("reference")))


CASES: tuple[Case, ...] = (
    *_event_cases(),
    *_checkpoint_cases(),
    *_image_cases(),
    *_exr_cases(),
    *_yaml_cases(),
    *_json_cases(),
    *_trace_cases(),
    *_place_cases(),
)
