"""Gives all sides of a verification the same data, and sees that none of them changes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from f3rm_verify.dataset_view import changes, folder_of, listing, make_view, seal
from f3rm_verify.errors import TrainingError
from f3rm_verify.ns_train import TrainingRequest
from f3rm_verify.runner import Training, run_trainings
from f3rm_verify.training_log import last_lines

#: The side that only makes the caches.
PREPARE = "prepare"

Watch = Callable[[Sequence[Training]], None]


@contextmanager
def shared_data(
    request: TrainingRequest, sides: Mapping[str, int], *, foreign: bool, fresh: bool, watch: Watch
) -> Iterator[tuple[TrainingRequest, list[str]]]:
    """Yields the request with a view of the data for each side, and a list that then gets what went wrong with it.

    Of our own methods, with `fresh` each side extracts its features; else the first does, and all have the same.

    The data manager of a `foreign` method may keep caches in the dataset. Its sides share one view in which they find
    them, made once beforehand; with `fresh`, each has a view of its own without any. Other methods get the dataset
    itself. Raises TrainingError where the caches cannot be made.
    """
    request = dataclasses.replace(request, fresh_features=fresh)
    skip = _output_in(request)
    before = listing(request.data, skip=skip)
    folder = request.output / "data"
    trouble: list[str] = []
    if foreign and not fresh:
        view = make_view(request.data, folder, skip=skip)
        sealed = _prepare(request, view, seed=next(iter(sides.values())), watch=watch)
        yield dataclasses.replace(request, views=dict.fromkeys(sides, view)), trouble
        trouble += changes(f"The prepared view of the dataset, {view},", sealed, seal(folder_of(view)))
    else:
        # Numbers, so that all paths are equally long.
        folders = {side: folder / f"{number:03}" for number, side in enumerate(sides)} if foreign else {}
        views = {side: make_view(request.data, own, skip=skip) for side, own in folders.items()}
        yield dataclasses.replace(request, views=views), trouble
    trouble += changes(f"The dataset {request.data}", before, listing(request.data, skip=skip))


def _output_in(request: TrainingRequest) -> Path:
    """What to leave out where this program writes into the dataset's own folder: all that it ever put there."""
    parent = request.output.parent
    return request.output if parent == folder_of(request.data).resolve() else parent


def _prepare(request: TrainingRequest, view: Path, *, seed: int, watch: Watch) -> Mapping[str, str]:
    """Has the caches made in the view that all sides share; the digests of what is then in it."""
    preparing = dataclasses.replace(request, views={PREPARE: view}, prepares=request.data)
    ended = run_trainings(preparing, {PREPARE: seed}, watch=watch)
    if ended.interruption is not None:
        raise KeyboardInterrupt
    failed = ended.failed
    if failed is not None:
        raise TrainingError(
            f"What {request.method} needs besides the images of {request.data} cannot be made, so nothing was trained. "
            f"{failed.failure} The last line of its log, {failed.log}: {last_lines(failed.log, count=1).strip()}"
        )
    return seal(folder_of(view))
