"""The user's dataset, which no training may write into: what lies in it, and a view of it that may be written into.

A method of another package can keep caches beside the images: upstream F3RM writes `f3rm_clip_features.pt` there, and a
training that finds it is not the one that made it. Such a method gets a view: folders of our own, with links to the
images and copies of the rest, without those caches.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from f3rm_verify.errors import UsageError

#: Caches that upstream F3RM keeps in the dataset's folder.
CACHES = "f3rm_*_features.pt"
#: What nobody writes into by its name. Anything else may be a cache, and who opens a link to write changes its target.
_IMAGES = (".bmp", ".exr", ".hdr", ".heic", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_LINKED = frozenset((*_IMAGES, ".avi", ".mkv", ".mov", ".mp4", ".obj", ".ply"))
#: Image paths in a file with poses that lead out of the dataset: to its neighbours, and further up.
_OUTSIDE, _FAR_OUTSIDE = re.compile(rb'"\.\.[/\\]'), re.compile(rb'"\.\.[/\\]\.\.[/\\]')

#: Of every file by its name: size, times of modification and of change (ns). Who sets back the former moves the latter.
Listing = Mapping[str, tuple[int, int, int] | None]


def folder_of(data: Path) -> Path:
    """The folder of a dataset, which is given as this folder or as the file in it that describes the dataset."""
    return data if data.is_dir() else data.parent


def make_view(data: Path, folder: Path, *, skip: Path) -> Path:
    """Makes a view of `data` in `folder`, without what is in `skip`, and returns what to give for `data`.

    Raises UsageError where it cannot be made.
    """
    source = folder_of(data)
    view = folder / source.name
    reaches_out = _reaches_out(source)
    try:
        _fill(source, view, skip)
        if reaches_out:
            _link_neighbours(source, folder)
    except OSError as error:
        raise UsageError(f"--data {data}: a view to train on cannot be made in {folder} ({error}).") from error
    return view if data.is_dir() else view / data.name


def _fill(source: Path, view: Path, skip: Path) -> None:
    for relative, names in _walk(source, skip):
        target = view / relative
        target.mkdir(parents=True)
        for name in names:
            original = source.resolve() / relative / name
            if Path(name).suffix.lower() in _LINKED:
                (target / name).symlink_to(original)
            elif not Path(name).match(CACHES):
                shutil.copy2(original, target / name)


def _reaches_out(source: Path) -> bool:
    """Whether a file with poses names files outside of the dataset. Raises UsageError for those out of reach."""
    poses = {path: path.read_bytes() for path in sorted(source.glob("*.json")) if path.is_file()}
    for path, content in poses.items():
        if _FAR_OUTSIDE.search(content):
            raise UsageError(
                f'{path} names files more than one folder up ("../../"), which f3rm-verify cannot keep from being '
                "written into; give them by their whole paths."
            )
    return any(_OUTSIDE.search(content) for content in poses.values())


def _link_neighbours(source: Path, folder: Path) -> None:
    here = folder.resolve()
    for neighbour in source.resolve().parent.iterdir():
        if not here.is_relative_to(neighbour) and not (here / neighbour.name).exists():
            (here / neighbour.name).symlink_to(neighbour)


def seal(view: Path) -> Mapping[str, str]:
    """Makes everything in a view that is no link read-only; returns its digests by name."""
    from f3rm_verify.recorder import digest_files

    own = [Path(folder, name) for folder, _, names in os.walk(view) for name in sorted(names)]
    own = [path for path in own if not path.is_symlink()]
    for path in own:
        path.chmod(0o444)
    return {os.path.relpath(name, view): digest for name, digest in digest_files(own).items()}


def listing(data: Path, *, skip: Path) -> Listing:
    """What lies in a dataset, but for what is in `skip`."""
    source = folder_of(data)
    files = (folder / name for folder, names in _walk(source, skip) for name in names)
    return {str(file): _state(source / file) for file in files}


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:  # it went away just now
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def changes(what: str, before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """A sentence about how `after` differs from `before`, naming some files of `what`; none where it does not."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if not names:
        return []
    words = [f"{name} {_change(name in before, name in after)}" for name in sorted(names)[:3]]
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what} was written into while the trainings ran: {', '.join(words)}{rest}."]


def _change(was: bool, is_there: bool) -> str:
    return "changed" if was and is_there else "is gone" if was else "is new"


def _walk(source: Path, skip: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder of a dataset, relative to it, with the names of its files; follows links, but in no circle."""
    for folder, folders, names in os.walk(source, followlinks=True):
        relative = Path(folder).relative_to(source)
        real = os.path.realpath(folder)
        if real in [str(skip), *(os.path.realpath(source / above) for above in relative.parents)]:
            folders.clear()
        else:
            yield relative, sorted(name for name in names if Path(folder, name).is_file())
