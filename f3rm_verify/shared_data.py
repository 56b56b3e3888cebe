"""Gives all sides of a verification the same data, and sees that none of them changes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from f3rm_verify.dataset_view import changes, listing, make_view, seal
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

    The data manager of a `foreign` method may keep caches in the dataset. Its sides share one view in which they find
    them, made once beforehand; with `fresh`, each has a view of its own without any. Other methods get the dataset
    itself. Raises TrainingError where the caches cannot be made.
    """
    before = listing(request.data)
    folder = request.output / "data"
    sealed: Mapping[str, str] = {}
    if foreign and fresh:
        views = {side: make_view(request.data, folder / side) for side in sides}
    elif foreign:
        views = dict.fromkeys(sides, make_view(request.data, folder))
        sealed = _prepare(request, views, seed=next(iter(sides.values())), watch=watch)
    else:
        views = {}
    trouble: list[str] = []
    yield dataclasses.replace(request, views=views), trouble
    trouble += changes(f"The dataset {request.data}", before, listing(request.data))
    if foreign and not fresh:
        trouble += changes("The feature caches of both runs", sealed, seal(_folder(views)))


def _prepare(request: TrainingRequest, views: Mapping[str, Path], *, seed: int, watch: Watch) -> Mapping[str, str]:
    """Has the caches made in the view that all sides share; their digests by name."""
    preparing = dataclasses.replace(request, views={PREPARE: next(iter(views.values()))}, prepares=request.data)
    ended = run_trainings(preparing, {PREPARE: seed}, watch=watch)
    if ended.interruption is not None:
        raise KeyboardInterrupt
    failed = ended.failed
    if failed is not None:
        raise TrainingError(
            f"The features of {request.data} could not be made: {failed.failure} "
            f"The end of its log, {failed.log}:\n{last_lines(failed.log)}"
        )
    return seal(_folder(views))


def _folder(views: Mapping[str, Path]) -> Path:
    view = next(iter(views.values()))
    return view if view.is_dir() else view.parent
