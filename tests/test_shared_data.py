"""One and the same data for all sides, with fake trainings that read and write it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_training import GOOD, program

from f3rm_verify import cli
from f3rm_verify.errors import TrainingError
from f3rm_verify.ns_train import TrainingRequest
from f3rm_verify.runner import run_trainings
from f3rm_verify.shared_data import shared_data

CACHE = "f3rm_clip_features.pt"
SIDES = {"reference": 42, "candidate": 42, "control": 43}
#: What the data manager of a foreign method does: makes its cache where there is none.
MAKES_CACHE = f"""
data = Path(sys.argv[sys.argv.index("--data") + 1])
cache = data / {CACHE!r}
warm = cache.exists()
if not warm:
    cache.write_text("made by " + sys.argv[sys.argv.index("--timestamp") + 1])
"""
PREPARES = f"""{MAKES_CACHE}
run = begin(warm=warm)
if os.environ.get("F3RM_VERIFY_PREPARE"):
    run.manifest.update(completion={{"first_step": 0, "steps": 0}})
    run.write_manifest()
    run.status("done")
    sys.exit()
"""
TRAINS = f"{PREPARES}\nrun.steps(); run.finish()"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes need milliseconds."""
    monkeypatch.setattr("f3rm_verify.runner._POLL_SECONDS", 0.02)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "fox"
    folder.mkdir()
    (folder / "1.png").write_text("one")
    (folder / CACHE).write_text("the user's")
    return folder


def verify(dataset: Path, body: str, *, foreign: bool = True, fresh: bool = False) -> list[str]:
    """Trains all sides on the dataset, and returns what went wrong with the data."""
    output = dataset.parent / "out" / "now"
    ns_train = program(dataset.parent / "bin", body)
    request = TrainingRequest(seed=42, iters=3, data=dataset, method="theirs", output=output, ns_train=ns_train)
    with shared_data(request, SIDES, foreign=foreign, fresh=fresh, watch=lambda _: None) as (shared, trouble):
        ended = run_trainings(shared, SIDES, watch=lambda _: None)
    assert ended.failed is None
    return trouble


def calls(dataset: Path) -> Mapping[str, Any]:
    """What each training saw of the world, by side."""
    paths = (dataset.parent / "out" / "now" / "calls").glob("*.json")
    return {path.stem: json.loads(path.read_text()) for path in paths}


def data_of(dataset: Path) -> dict[str, str]:
    return {side: call["argv"][call["argv"].index("--data") + 1] for side, call in calls(dataset).items()}


def was_warm(dataset: Path) -> dict[str, bool]:
    paths = (dataset.parent / "out" / "now").glob("verify/theirs/*/verify/manifest.json")
    return {path.parts[-3]: json.loads(path.read_text())["warm"] for path in paths}


class TestForeign:
    def test_all_sides_find_in_one_view_what_was_made_once_before(self, dataset: Path) -> None:
        assert verify(dataset, TRAINS) == []
        assert was_warm(dataset) == {"prepare": False, "reference": True, "candidate": True, "control": True}
        (view,) = set(data_of(dataset).values())
        assert Path(view) == dataset.parent / "out" / "now" / "data" / "fox"
        assert (Path(view) / CACHE).read_text() == "made by prepare"

    def test_only_the_first_training_is_told_to_prepare_and_where_the_dataset_is(self, dataset: Path) -> None:
        verify(dataset, TRAINS)
        told = {side: call["env"].get("F3RM_VERIFY_PREPARE") for side, call in calls(dataset).items()}
        assert told == {"prepare": str(dataset), "reference": None, "candidate": None, "control": None}

    def test_the_dataset_stays_as_it_is(self, dataset: Path) -> None:
        before = {path.name: (path.read_text(), path.stat().st_ctime_ns) for path in dataset.iterdir()}
        verify(dataset, TRAINS)
        assert {path.name: (path.read_text(), path.stat().st_ctime_ns) for path in dataset.iterdir()} == before

    def test_a_side_that_changes_the_cache_is_noticed(self, dataset: Path) -> None:
        body = f"{TRAINS}\nif run.side == 'candidate': cache.unlink(); cache.write_text('other')"
        (trouble,) = verify(dataset, body)
        assert trouble.startswith("The prepared view of the dataset, ")
        assert trouble.endswith(f"was written into while the trainings ran: {CACHE} changed.")

    def test_a_side_that_makes_another_cache_is_noticed(self, dataset: Path) -> None:
        (trouble,) = verify(dataset, f"{TRAINS}\n(data / 'second.pt').write_text('')")
        assert "second.pt is new" in trouble

    def test_a_preparation_that_fails_is_one_sentence(self, dataset: Path) -> None:
        body = f"{PREPARES}".replace("run.manifest", "raise OSError('no network')\n    run.manifest", 1)
        with pytest.raises(TrainingError) as caught:
            verify(dataset, body)
        sentence = str(caught.value)
        assert sentence.startswith(f"What theirs needs besides the images of {dataset} cannot be made, so nothing was")
        assert "The prepare training failed while setting up (exit code 1)." in sentence
        assert sentence.endswith("/prepare.log: OSError: no network")
        assert "\n" not in sentence
        assert calls(dataset).keys() == {"prepare"}


class TestFresh:
    def test_each_side_makes_its_own_cache(self, dataset: Path) -> None:
        assert verify(dataset, TRAINS, fresh=True) == []
        assert was_warm(dataset) == dict.fromkeys(SIDES, False)
        places = data_of(dataset)
        assert len(set(places.values())) == len(SIDES)
        assert len(set(map(len, places.values()))) == 1
        assert {(Path(place) / CACHE).read_text() for place in places.values()} == {f"made by {side}" for side in SIDES}

    def test_the_users_cache_is_not_touched(self, dataset: Path) -> None:
        verify(dataset, TRAINS, fresh=True)
        assert (dataset / CACHE).read_text() == "the user's"


class TestOthers:
    """nerfstudio's methods and ours get the dataset itself."""

    def test_the_dataset_itself(self, dataset: Path) -> None:
        assert verify(dataset, GOOD, foreign=False) == []
        assert data_of(dataset) == dict.fromkeys(SIDES, str(dataset))

    def test_one_that_writes_into_it_is_noticed(self, dataset: Path) -> None:
        body = f"{GOOD}\n(Path(run.options['--data']) / 'late.pt').write_text('')"
        assert verify(dataset, body, foreign=False) == [
            f"The dataset {dataset} was written into while the trainings ran: late.pt is new."
        ]

    @pytest.mark.parametrize("place", ["out/now", "now"])
    @pytest.mark.parametrize("writes", [False, True])
    def test_output_in_the_dataset_is_no_writing_into_it(self, dataset: Path, place: str, writes: bool) -> None:
        ns_train = program(dataset.parent / "bin", GOOD)
        request = TrainingRequest(seed=42, iters=3, data=dataset, method="x", output=dataset / place, ns_train=ns_train)
        with shared_data(request, SIDES, foreign=False, fresh=False, watch=lambda _: None) as (shared, trouble):
            run_trainings(shared, SIDES, watch=lambda _: None)
            if writes:
                (dataset / "late.pt").write_text("")
        assert len(trouble) == writes


class TestVerdict:
    """The same by the command line, where a foreign method is one that the user's variable names."""

    def code(self, dataset: Path, monkeypatch: pytest.MonkeyPatch, body: str, *options: str) -> int:
        words = ["run", "--ns-train", str(program(dataset.parent / "bin", body)), "--data", str(dataset)]
        words += ["--method", "theirs", "--iters", "3", "--output-dir", str(dataset.parent / "out"), *options]
        monkeypatch.setattr(sys, "argv", ["f3rm-verify", *words])
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # typer puts in its own
        monkeypatch.setenv("NERFSTUDIO_METHOD_CONFIGS", "theirs=their.package:method")
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        return caught.value.code

    def test_warm_on_both_sides_is_reproducible(self, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.code(dataset, monkeypatch, TRAINS) == 0

    def test_cold_on_both_sides_is_reproducible(self, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.code(dataset, monkeypatch, TRAINS, "--fresh-features") == 0

    def test_cold_against_warm_is_not(self, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # What the preparation is for: without it, the first to come makes the cache, and trains otherwise.
        (dataset / CACHE).unlink()
        body = f"{MAKES_CACHE}\nrun = begin()\nrun.step(0.5 if warm else 0.25); run.steps(); run.finish()"
        monkeypatch.setattr("f3rm_verify.ns_train._KNOWN_PROVIDERS", ("their",))
        assert self.code(dataset, monkeypatch, body, "--jobs", "1") == 1

    def test_a_training_that_writes_into_the_data_is_inconclusive(
        self, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.code(dataset, monkeypatch, f"{TRAINS}\n(data / (run.side + '.pt')).write_text('')") == 3
        assert "candidate.pt is new" in capsys.readouterr().out

    def test_a_preparation_that_fails(
        self, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        body = f"{PREPARES}".replace("run.manifest", "raise OSError('no network')\n    run.manifest", 1)
        assert self.code(dataset, monkeypatch, body) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("f3rm-verify: What theirs needs besides the images")
        assert "Traceback" not in errors

    def test_stopping_the_preparation(
        self, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        body = f"{PREPARES}".replace("run.manifest", "os.kill(os.getppid(), 2); time.sleep(60)\n    run.manifest", 1)
        assert self.code(dataset, monkeypatch, body) == 3
        assert "there is no verdict" in capsys.readouterr().err
        assert not list((dataset.parent / "out").glob("*/verify/theirs/reference"))
