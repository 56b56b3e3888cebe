"""The zip that `torch.save` writes: `PREFIX/data.pkl`, `PREFIX/byteorder`, `PREFIX/data/KEY`, read as asked for."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from f3rm_verify.readers.plain_file import FileBytes
from f3rm_verify.readers.plain_pickle import Refused

#: Limits, far above what a training writes: its pickle has some 100 KiB, its directory some 100 bytes per tensor.
MAX_PICKLE_BYTES = 16 * 2**20
MAX_DIRECTORY_BYTES = 8 * 2**20
MAX_INFLATED_BYTES = 256 * 2**20
_PIECE = 2**24
#: The longest comment of a zip, and the records before it.
_TAIL = 2**16 + 128
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


@dataclass(frozen=True, eq=False)
class Record:
    """One file of the zip: where its bytes are, and the checksum that was written with it.

    They lie in `file` from `start` on, or, where they were compressed, in `inflated`.
    """

    file: FileBytes
    start: int
    size: int
    crc: int | None
    inflated: bytes | None = None

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """These bytes, or all from `offset` on."""
        left = self.size - offset
        length = left if length is None else min(length, left)
        if self.inflated is not None:
            return self.inflated[offset : offset + length]
        return self.file.read(self.start + offset, length)

    @cached_property
    def crc_ok(self) -> bool:
        """Whether no checksum contradicts the bytes; reads all of them."""
        crc = 0
        for offset in range(0, self.size, _PIECE):
            crc = zlib.crc32(self.read(offset, min(_PIECE, self.size - offset)), crc)
        return self.crc is None or crc == self.crc


class Archive:
    """The files of such a zip, by name below the prefix; raises Refused where it is not one."""

    def __init__(self, path: Path) -> None:
        self.file = FileBytes(path)
        _check_head(self.file)
        _check_directory(self.file)
        with self.file.stream() as stream, zipfile.ZipFile(stream) as zipped:
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
        if f"{self.prefix}byteorder" in self.entries and self.read("byteorder").read(0, 16) != b"little":
            raise Refused("it was written on a big-endian machine, which is not supported")

    def pickle(self) -> bytes:
        """The pickle of the structure."""
        record = self.read("data.pkl")
        if record.size > MAX_PICKLE_BYTES:
            raise Refused(f"its data.pkl has {record.size:,} bytes, more than a checkpoint needs")
        if not record.crc_ok:
            raise Refused("damaged: its data.pkl does not match its checksum")
        return record.read()

    def read(self, name: str) -> Record:
        """The file of that name below the prefix."""
        if name not in self.records:
            entry = self.entries.get(self.prefix + name)
            if entry is None:
                raise Refused(f"damaged: {name[:100]!a} is missing in it")
            self.records[name] = self._record(entry)
        return self.records[name]

    def _record(self, entry: zipfile.ZipInfo) -> Record:
        header = self.file.read(entry.header_offset, 30)
        if header[:4] != b"PK\3\4" or entry.flag_bits & 1:
            raise Refused("damaged: a file in it is encrypted, or does not begin where the directory says")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + entry.compress_size > self.file.size:
            raise Refused("truncated: a file in it ends after the end")
        size, inflated = entry.compress_size, None
        if entry.compress_type == zipfile.ZIP_DEFLATED:
            inflated = self._inflate(self.file.read(start, size), entry.file_size)
            size = len(inflated)
        elif entry.compress_type != zipfile.ZIP_STORED:
            raise Refused("it is compressed in a way that is not supported; torch.save does not compress")
        if size != entry.file_size:
            raise Refused("damaged: a file in it has not the size that the directory says")
        return Record(self.file, start, size, entry.CRC if self.has_checksums else None, inflated)

    def _inflate(self, data: bytes, size: int) -> bytes:
        self.inflated += size
        if self.inflated > MAX_INFLATED_BYTES:
            raise Refused(f"it unpacks to more than {MAX_INFLATED_BYTES:,} bytes; torch.save does not compress")
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)


def _check_head(file: FileBytes) -> None:
    head = file.read(0, len(_LEGACY_MAGIC))
    if not head:
        raise Refused("it is empty")
    if head == _LEGACY_MAGIC:
        raise Refused("it has the format of torch before 1.6; load it with torch and save it again")
    if not head.startswith(b"PK\3\4"):
        raise Refused("it does not begin like a file of torch.save")


def _check_directory(file: FileBytes) -> None:
    """Refuses a zip without a directory at its end, or with one so large that listing it would take GiB."""
    begin = max(0, file.size - _TAIL)
    tail = file.read(begin, _TAIL)
    end = tail.rfind(b"PK\5\6")
    if end < 0:
        raise Refused("truncated: the directory at its end is missing")
    sizes = struct.unpack_from("<L", tail, end + 12)
    if tail[max(end - 20, 0) : end].startswith(b"PK\6\7"):  # zip64: the size is in a record of its own
        (offset,) = struct.unpack_from("<Q", tail, end - 12)
        if offset != begin + end - 76:  # where Python's zipfile looks, whatever the file says
            raise Refused("damaged: the directory at its end is not where it says")
        sizes = struct.unpack_from("<Q", tail, end - 76 + 40)
    if sizes[0] > MAX_DIRECTORY_BYTES:
        raise Refused(f"its directory has {sizes[0]:,} bytes, more than a checkpoint needs")
