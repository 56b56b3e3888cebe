"""What a snapshot holds of a model besides parameters, put back into one that was just built."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from f3rm_verify.f3rm.snapshots import (
    VERSION,
    SnapshotRing,
    _attributes,
    _forget_newer,
    _put_attributes,
    load_snapshot,
    save_snapshot,
    snapshots_in,
)


class Pipeline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._model = nn.Linear(2, 2)


def trained() -> Pipeline:
    """A pipeline whose model made things for itself in its first steps."""
    pipeline = Pipeline()
    model = pipeline._model
    model.count, model.annealing = 3, 0.1 + 0.2
    model.samples = torch.arange(4.0)
    model.own = torch.Generator().manual_seed(7)
    torch.rand(3, generator=model.own)
    return pipeline


def test_what_a_model_makes_in_its_first_steps_is_made_in_one_that_did_none() -> None:
    first, second = trained(), Pipeline()
    held, left_out = _attributes(first)
    _put_attributes(second, held)
    model = second._model
    assert left_out == []
    assert (model.count, model.annealing) == (3, 0.1 + 0.2)
    assert isinstance(model.samples, Tensor)
    assert model.samples.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert isinstance(model.own, torch.Generator)
    assert torch.equal(torch.rand(5, generator=model.own), torch.rand(5, generator=first._model.own))


def test_what_is_put_back_is_a_copy_and_what_is_newer_goes() -> None:
    pipeline = trained()
    held, _ = _attributes(pipeline)
    model = pipeline._model
    model.samples += 1
    model.count = 9
    model.newer = 1
    torch.rand(1, generator=model.own)
    for _ in range(2):
        _forget_newer(pipeline, frozenset(held))
        _put_attributes(pipeline, held)
        assert (model.count, model.samples.tolist()) == (3, [0.0, 1.0, 2.0, 3.0])
        assert not hasattr(model, "newer")
        model.samples += 1


def test_generators_that_cannot_be_held_are_named() -> None:
    pipeline = trained()
    pipeline._model.dice = random.Random(3)
    assert _attributes(pipeline)[1] == ["_model.dice, a generator of its own"]


def test_equal_states_are_equal_files_and_come_back(tmp_path: Path) -> None:
    state = {"version": VERSION, "step": 4, "attributes": _attributes(trained())[0]}
    files = [save_snapshot(dict(state), tmp_path / name) for name in ("one", "a longer name")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert snapshots_in(tmp_path / "one") == {4: files[0]}
    assert load_snapshot(files[0])["attributes"].keys() == state["attributes"].keys()  # type: ignore[attr-defined]
    state["attributes"]["_model#count"] = 4  # type: ignore[index]
    assert save_snapshot(dict(state), tmp_path / "other").read_bytes() != files[0].read_bytes()


@pytest.mark.parametrize(("steps", "kept"), [(7, [0, 2, 4, 6]), (8, [0, 2, 4, 6]), (9, [0, 4, 8]), (40, [0, 16, 32])])
def test_a_ring_keeps_a_few_over_the_whole_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, kept: list[int]
) -> None:
    monkeypatch.setattr("f3rm_verify.f3rm.snapshots.take_snapshot", lambda _, step: {"version": VERSION, "step": step})
    ring = SnapshotRing(folder=tmp_path, every=2, kept=4)
    for step in range(steps):
        ring(None, step)
    assert list(snapshots_in(tmp_path)) == kept
