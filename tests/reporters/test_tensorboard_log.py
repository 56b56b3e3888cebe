"""The log that TensorBoard shows holds both sides exactly, and how far they are apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from example_assets import picture, result_of, series, tag
from example_results import HOSTILE

from f3rm_verify.assets import Assets
from f3rm_verify.errors import UsageError
from f3rm_verify.readers.events import Series, read_events
from f3rm_verify.readers.images import decode
from f3rm_verify.reporters.tensorboard_log import FILE, write_tensorboard

RUNS = ("reference", "candidate", "difference")
A = np.array([1, 0.9, np.nan, -0.0, 0.5, np.inf], np.float32)
B = np.array([1, 0.90001, 0.8, 0.0, 0.5, np.inf], np.float32)


@pytest.fixture
def assets(tmp_path: Path) -> Assets:
    return Assets(tmp_path / "r.assets")


def logged(folder: Path, run: str, name: str) -> Series:
    found = read_events([folder / run / FILE])
    assert not found.problems
    return found.scalars[name]


def test_both_sides_come_back_bit_by_bit_and_their_distance(tmp_path: Path, assets: Assets) -> None:
    pair = series(A, B, steps=np.array([0, 1, 2, 3, 4, 10]))
    write_tensorboard(result_of(tag(assets, "Train Loss", pair)), tmp_path / "log", assets=assets)
    for run, values in (("reference", A), ("candidate", B)):
        assert logged(tmp_path / "log", run, "Train Loss").values.tobytes() == values.tobytes()
    found = logged(tmp_path / "log", "difference", "Train Loss")
    assert found.steps.tolist() == [0, 1, 2, 3, 4, 10]
    expected = [0, abs(float(A[1]) - float(B[1])), np.nan, 0, 0, 0]
    assert np.array_equal(found.values, np.array(expected, np.float32), equal_nan=True)


def test_what_one_side_has_is_in_its_run_alone_in_the_order_of_steps(tmp_path: Path, assets: Assets) -> None:
    more = {"candidate_only_steps": np.array([1, 9]), "candidate_only": np.array([7, 8], np.float32)}
    pair = series([1, 2], [1, 3], steps=np.array([0, 2]), **more)
    write_tensorboard(result_of(tag(assets, "a", pair)), tmp_path / "log", assets=assets)
    assert logged(tmp_path / "log", "candidate", "a").steps.tolist() == [0, 1, 2, 9]
    assert logged(tmp_path / "log", "candidate", "a").values.tolist() == [1, 7, 3, 8]
    assert logged(tmp_path / "log", "reference", "a").steps.tolist() == [0, 2]
    assert logged(tmp_path / "log", "difference", "a").values.tolist() == [0, 1]


def test_pictures_of_both_sides_and_their_map(tmp_path: Path, assets: Assets) -> None:
    node = picture(assets, "rgb")
    write_tensorboard(result_of(node), tmp_path / "log", assets=assets)
    shown = {run: read_events([tmp_path / "log" / run / FILE]).blobs["renders/rgb"] for run in RUNS}
    for run, asset in zip(RUNS, ("reference", "candidate", "heat"), strict=True):
        ((step, kind, content),) = shown[run]
        assert (step, kind) == (0, "image")
        assert content == assets.read(node.measures["assets"][asset])
    assert decode(shown["reference"][0][2], "a.png").values.shape == (40, 60, 3)


def test_tensorboard_reads_it(tmp_path: Path, assets: Assets) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = result_of(tag(assets, "Train Loss", series([1, 2], [1, 4])), picture(assets, "rgb"))
    write_tensorboard(result, tmp_path / "log", assets=assets)
    accumulator = EventAccumulator(str(tmp_path / "log" / "difference"))
    accumulator.Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("Train Loss")] == [(0, 0.0), (1, 2.0)]
    assert (accumulator.Images("renders/rgb")[0].width, accumulator.Images("renders/rgb")[0].height) == (60, 40)


def test_the_same_bytes_again_and_nothing_where_assets_are_gone(tmp_path: Path, assets: Assets) -> None:
    result = result_of(tag(assets, HOSTILE, series([1, 2], [1, 4])), picture(assets, HOSTILE))
    for place in ("one", "two"):
        write_tensorboard(result, tmp_path / place, assets=assets)
    write_tensorboard(result, tmp_path / "bare", assets=Assets())
    for run in RUNS:
        assert (tmp_path / "one" / run / FILE).read_bytes() == (tmp_path / "two" / run / FILE).read_bytes()
        bare = read_events([tmp_path / "bare" / run / FILE])
        assert not bare.scalars and not bare.blobs and not bare.problems
    assert all(name.isprintable() for name in read_events([tmp_path / "one" / "candidate" / FILE]).scalars)


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path, assets: Assets) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="the log of --tensorboard"):
        write_tensorboard(result_of(tag(assets, "a", series([1, 2], [1, 4]))), tmp_path / "file", assets=assets)
