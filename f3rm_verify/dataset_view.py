"""The user's dataset, which no training may write into.

A method of another package can keep caches beside the images: upstream F3RM writes `f3rm_clip_features.pt` there, and a
training that finds it is not the one that made it. Such a method gets a view of the dataset: folders of our own with
links to the files, without those caches. For every method, the dataset is looked at before and after.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from f3rm_verify.errors import UsageError

#: Caches that upstream F3RM keeps in the dataset's folder.
CACHES = "f3rm_*_features.pt"
#: Files of a dataset beyond this are not looked at.
_MAX_FILES = 200_000


def make_view(data: Path, folder: Path) -> Path:
    """Makes a view of `data` (a folder, or the file that describes one) in `folder`, and returns what to give for it.

    Raises UsageError where it cannot be made.
    """
    source = data if data.is_dir() else data.parent
    try:
        view = folder / source.name
        _link_files(source, view)
        if _reaches_out(source):
            _link_neighbours(source, folder)
    except OSError as error:
        raise UsageError(f"--data {data} cannot be looked at without writing into it ({error}).") from error
    return view if data.is_dir() else view / data.name


def _link_files(source: Path, view: Path) -> None:
    for folder, _, names in os.walk(source, followlinks=True):
        target = view / Path(folder).relative_to(source)
        target.mkdir(parents=True)
        for name in names:
            if not Path(name).match(CACHES):
                (target / name).symlink_to(Path(folder).resolve() / name)


def _reaches_out(source: Path) -> bool:
    """Whether one of the files with poses names files outside of the folder."""
    return any(b'"../' in path.read_bytes() for path in source.glob("*.json") if path.is_file())


def _link_neighbours(source: Path, folder: Path) -> None:
    for neighbour in source.resolve().parent.iterdir():
        if not (folder / neighbour.name).exists():
            (folder / neighbour.name).symlink_to(neighbour)


def seal(view: Path) -> Mapping[str, str]:
    """Makes what was written into a view read-only, and returns its digests by name."""
    from f3rm_verify.recorder import digest_files

    written = [path for path in _files(view) if not path.is_symlink()]
    for path in written:
        path.chmod(0o444)
    return {str(Path(name).relative_to(view)): value for name, value in digest_files(written).items()}


def listing(data: Path) -> Mapping[str, tuple[int, int]]:
    """Size and time of change (ns) of every file of a dataset, by name, up to 200,000 of them."""
    source = data if data.is_dir() else data.parent
    found = {}
    for path in _files(source):
        status = path.lstat()
        found[str(path.relative_to(source))] = (status.st_size, status.st_mtime_ns)
        if len(found) == _MAX_FILES:
            break
    return found


def changes(what: str, before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """A sentence where the two differ, naming some files of `what`; nothing where they are equal."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if not names:
        return []
    some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [f"{what} changed while the trainings ran ({some}): they may not have read the same."]


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in sorted(names))
