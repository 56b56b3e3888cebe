"""The files that belong to a result: curves and pictures for its reports, each named by the digest of its content.

Beside `r.json` they lie in `r.assets/`. A comparator is given an `Assets`, hands it bytes, and puts the name that comes
back into `measures["assets"]` of the node:

- a scalar tag: `{"series": NAME}`, both curves exactly as they were logged (`read_series`);
- a picture: `{"reference": NAME, "candidate": NAME}`, and where they differ `"heat"`, a map of where and how much, and
  `"thumbnail"`, the candidate made small. All of them open in a browser.

A reporter asks for them again, of a result file that anybody may have written:

    for path, node in result.root.walk():
        names = asset_names(node)             # {} for a node without assets, whatever the file says
        content = assets.read(names.get("heat"))    # None: show a placeholder
        series = read_series(assets.read(names.get("series")))      # None: the same

`Assets()` keeps nothing and has nothing: what nobody asked for costs nothing. That an asset cannot be kept changes no
verdict; `problem` then says why in a sentence.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from f3rm_verify.difference import Difference
from f3rm_verify.errors import UnreadableError
from f3rm_verify.files import replacing
from f3rm_verify.readers.images import decode
from f3rm_verify.readers.plain_file import read_plain

#: The key of a node's measures below which the names stand.
KEY = "assets"
#: A larger file is neither kept nor read; no picture that is compared is larger.
MAX_ASSET_BYTES = 256 * 2**20
#: All assets of a result, and what they leave free of the disk, so that there is room for the result itself.
MAX_TOTAL_BYTES = 8 * 2**30
_RESERVE_BYTES = 256 * 2**20

#: Colours of heat maps from the smallest to the largest distance; black is no difference, white one without a size.
HEAT_COLOURS = ((120, 80, 255), (200, 60, 220), (236, 80, 120), (252, 150, 60), (252, 240, 120))

_NAME = re.compile(r"([0-9a-f]{64})\.(png|jpg|npz)")
_MEMBERS = (
    "steps",
    "reference",
    "candidate",
    "reference_only_steps",
    "reference_only",
    "candidate_only_steps",
    "candidate_only",
)

Array = npt.NDArray[Any]


def assets_folder(result_file: Path) -> Path:
    """Where the assets of a result file lie: `r.assets` beside `r.json`."""
    return result_file.with_name(f"{result_file.name.removesuffix('.json')}.assets")


def asset_names(node: Difference) -> dict[str, str]:
    """The well-formed names of a node's assets, by what they show; empty where it has none."""
    found = node.measures.get(KEY)
    if not isinstance(found, Mapping):
        return {}
    return {str(key): name for key, name in found.items() if isinstance(name, str) and _NAME.fullmatch(name)}


class Assets:
    """The assets in a folder, which is made when there is something to keep; without a folder, none. Thread-safe."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        #: Why not all could be kept, in a sentence.
        self.problem: str | None = None
        self._kept: set[str] = set()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def wanted(self) -> bool:
        """Whether it is worth making something to keep."""
        return self.folder is not None and self.problem is None

    def keep(self, content: bytes, kind: str) -> str | None:
        """The name under which these bytes, a `png`, `jpg` or `npz`, now lie in the folder; None where they do not."""
        folder = self.folder
        if folder is None or self.problem is not None or len(content) > MAX_ASSET_BYTES:
            return None
        name = f"{hashlib.sha256(content).hexdigest()}.{kind}"
        with self._lock:
            if name in self._kept:  # maybe still being written by another thread
                return name
            if self._bytes + len(content) > MAX_TOTAL_BYTES:
                self.problem = _sentence(folder, f"they take more than {MAX_TOTAL_BYTES // 2**30} GiB")
                return None
            self._kept.add(name)
            self._bytes += len(content)
        try:
            _write(folder / name, content)
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            self.problem = _sentence(folder, getattr(error, "strerror", None) or str(error))
            return None
        return name

    def read(self, name: object) -> bytes | None:
        """The content of an asset; None where there is no such file, or it is not what its name says."""
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if self.folder is None or match is None:
            return None
        path = self.folder / match[0]
        try:
            content = None if path.is_symlink() else read_plain(path, limit=MAX_ASSET_BYTES)
        except (OSError, ValueError, UnreadableError):
            return None
        return content if content is not None and hashlib.sha256(content).hexdigest() == match[1] else None

    def has(self, name: object) -> bool:
        """Whether there is a file of that name, without looking into it: what was kept here was looked at then."""
        if self.folder is None or not isinstance(name, str) or not _NAME.fullmatch(name):
            return False
        path = self.folder / name
        return path.is_file() and not path.is_symlink()

    def take(self, root: Difference, source: Assets) -> None:
        """Keeps what the nodes below `root` name and `source` has."""
        for _, node in root.walk():
            for name in asset_names(node).values():
                if self.folder == source.folder:
                    self._kept.add(name)
                elif self.wanted and name not in self._kept and (content := source.read(name)) is not None:
                    self.keep(content, name.rpartition(".")[2])

    def remove_others(self) -> None:
        """Removes the assets of an earlier result in the same place, and the folder where nothing is left."""
        if self.folder is None or self.folder.is_symlink() or not self.folder.is_dir():
            return
        try:
            for path in list(self.folder.iterdir()):
                if _NAME.fullmatch(path.name) and path.name not in self._kept:
                    path.unlink()
            if not self._kept:
                self.folder.rmdir()
        except OSError:
            return  # what is left over is no harm


def settle(root: Difference, folder: Path, source: Assets) -> Assets:
    """The assets in `folder`, which then holds what `root` names and `source` has, and no others."""
    settled = source if source.folder == folder else Assets(folder)
    settled.take(root, source)
    settled.remove_others()
    return settled


def _write(path: Path, content: bytes) -> None:
    """Writes a file once; one that is there, being named by its content, is left as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        there = path.lstat()
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISREG(there.st_mode) and there.st_size == len(content):
            return
    disk = os.statvfs(path.parent)
    if disk.f_bavail * disk.f_frsize < len(content) + _RESERVE_BYTES:
        raise OSError(None, f"the disk has no {_RESERVE_BYTES // 2**20} MiB left")
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _sentence(folder: Path, reason: str) -> str:
    return (
        f"{folder}: not all curves and pictures of the reports can be kept ({reason}). The verdict is not affected; "
        f"make room, or name another place for the result."
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class CurvePair:
    """A scalar tag of both sides, as it was logged; all arrays are of one dimension.

    `steps` (int64), `reference`, `candidate` (float32 or float64): the records that both sides have, ascending by step,
    which a restarted run repeats. `..._only...`: those that one side has.
    """

    steps: Array
    reference: Array
    candidate: Array
    reference_only_steps: Array
    reference_only: Array
    candidate_only_steps: Array
    candidate_only: Array


def keep_series(assets: Assets, series: CurvePair) -> dict[str, dict[str, str]]:
    """The measures that name the series, kept as an uncompressed .npz; none where it was not kept."""
    name = assets.keep(_series_bytes(series), "npz") if assets.wanted else None
    return {} if name is None else {KEY: {"series": name}}


def _series_bytes(series: CurvePair) -> bytes:
    """An uncompressed .npz without a time in it; members without values are left out."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as zipped:
        for name in _MEMBERS:
            values = getattr(series, name)
            if values.size:
                member = io.BytesIO()
                np.save(member, values, allow_pickle=False)
                zipped.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
    return stream.getvalue()


def read_series(content: bytes | None) -> CurvePair | None:
    """The curves in an asset; None where there is none or it is broken. Nothing in it is executed or inflated."""
    if content is None:
        return None
    try:
        found = _members(content)
        empty = {name: np.empty(0, np.int64 if name.endswith("steps") else np.float32) for name in _MEMBERS}
        return _checked(CurvePair(**{**empty, **found}))
    except Exception:  # damaged zips make zipfile raise BadZipFile, NotImplementedError, ValueError, struct.error, ...
        return None


def _members(content: bytes) -> dict[str, Array]:
    with zipfile.ZipFile(io.BytesIO(content)) as zipped:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in zipped.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise UnreadableError("compressed")
        if sum(entry.file_size for entry in entries.values()) > len(content):
            raise UnreadableError("members overlap")
        return {name: decode(zipped.read(entries[name]), f"{name}.npy").values for name in _MEMBERS if name in entries}


def _checked(series: CurvePair) -> CurvePair | None:
    groups = (
        (series.steps, series.reference, series.candidate),
        (series.reference_only_steps, series.reference_only),
        (series.candidate_only_steps, series.candidate_only),
    )
    for steps, *values in groups:
        if steps.ndim != 1 or steps.dtype != np.int64 or any(each.shape != steps.shape for each in values):
            return None
        if any(each.dtype not in (np.float32, np.float64) for each in values):
            return None
    return series
