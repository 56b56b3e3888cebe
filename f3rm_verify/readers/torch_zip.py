"""The zip that `torch.save` writes, mapped into memory: `PREFIX/data.pkl`, `PREFIX/byteorder`, `PREFIX/data/KEY`."""

from __future__ import annotations

import mmap
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from f3rm_verify.readers.plain_pickle import Refused

Array = npt.NDArray[Any]

#: Limits, far above what a training writes: its pickle has some 100 KiB, its directory some 100 bytes per tensor.
MAX_PICKLE_BYTES = 64 * 2**20
MAX_DIRECTORY_BYTES = 64 * 2**20
MAX_INFLATED_BYTES = 256 * 2**20
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


@dataclass(frozen=True, eq=False)
class Record:
    """One file of the zip: its bytes, and the checksum that was written with it."""

    data: Array
    crc: int | None

    @cached_property
    def crc_ok(self) -> bool:
        """Whether no checksum contradicts the bytes; reads all of them."""
        return self.crc is None or zlib.crc32(self.data.data) == self.crc


class Archive:
    """The files of such a zip, by name below the prefix; raises Refused where it is not one."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():  # a pipe would make us wait for ever
            raise Refused("it is no regular file")
        with path.open("rb") as file:
            self.bytes = _mapped(file)
            _check_directory(self.bytes)
            with zipfile.ZipFile(file) as zipped:
                entries = zipped.infolist()
        self.entries = {entry.filename: entry for entry in entries}
        if len(self.entries) != len(entries):
            raise Refused("two files in it have one name")
        self.has_checksums = any(entry.CRC for entry in entries)  # torch can be told to write zeros instead
        self.inflated = 0
        self.records: dict[str, Record] = {}
        pickles = [name for name in self.entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise Refused("it is a zip, but not one of torch.save: there is no data.pkl in it")
        self.prefix = pickles[0].removesuffix("data.pkl")
        if f"{self.prefix}byteorder" in self.entries and self.read("byteorder").data.tobytes() != b"little":
            raise Refused("it was written on a big-endian machine, which is not supported")

    def pickle(self) -> bytes:
        """The pickle of the structure."""
        record = self.read("data.pkl")
        if record.data.size > MAX_PICKLE_BYTES:
            raise Refused(f"its data.pkl has {record.data.size:,} bytes, more than a checkpoint needs")
        if not record.crc_ok:
            raise Refused("damaged: its data.pkl does not match its checksum")
        return record.data.tobytes()

    def read(self, name: str) -> Record:
        """The file of that name below the prefix."""
        if name not in self.records:
            entry = self.entries.get(self.prefix + name)
            if entry is None:
                raise Refused(f"damaged: {name[:100]!a} is missing in it")
            self.records[name] = Record(self._data(entry), entry.CRC if self.has_checksums else None)
        return self.records[name]

    def _data(self, entry: zipfile.ZipInfo) -> Array:
        header = self.bytes[entry.header_offset : entry.header_offset + 30].tobytes()
        if header[:4] != b"PK\3\4" or entry.flag_bits & 1:
            raise Refused("damaged: a file in it is encrypted, or does not begin where the directory says")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        data = self.bytes[start : start + entry.compress_size]
        if data.size != entry.compress_size:
            raise Refused("truncated: a file in it ends after the end")
        if entry.compress_type == zipfile.ZIP_DEFLATED:
            data = self._inflate(data, entry.file_size)
        elif entry.compress_type != zipfile.ZIP_STORED:
            raise Refused("it is compressed in a way that is not supported; torch.save does not compress")
        if data.size != entry.file_size:
            raise Refused("damaged: a file in it has not the size that the directory says")
        return data

    def _inflate(self, data: Array, size: int) -> Array:
        self.inflated += size
        if self.inflated > MAX_INFLATED_BYTES:
            raise Refused(f"it unpacks to more than {MAX_INFLATED_BYTES:,} bytes; torch.save does not compress")
        return np.frombuffer(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data.data, size + 1), np.uint8)


def _mapped(file: IO[bytes]) -> Array:
    head = file.read(len(_LEGACY_MAGIC))
    if not head:
        raise Refused("it is empty")
    if head == _LEGACY_MAGIC:
        raise Refused("it has the format of torch before 1.6; load it with torch and save it again")
    if not head.startswith(b"PK\3\4"):
        raise Refused("it does not begin like a file of torch.save")
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _check_directory(data: Array) -> None:
    """Refuses a zip without a directory at its end, or with one so large that listing it would take GiB."""
    tail = data[-(2**16 + 64) :].tobytes()
    end = tail.rfind(b"PK\5\6")
    if end < 0:
        raise Refused("truncated: the directory at its end is missing")
    sizes = struct.unpack_from("<L", tail, end + 12)
    if tail[max(end - 20, 0) : end].startswith(b"PK\6\7"):  # zip64: the size is in a record of its own
        (offset,) = struct.unpack_from("<Q", tail, end - 12)
        sizes = struct.unpack_from("<Q", data[offset : offset + 56].tobytes(), 40)
    if sizes[0] > MAX_DIRECTORY_BYTES:
        raise Refused(f"its directory has {sizes[0]:,} bytes, more than a checkpoint needs")
