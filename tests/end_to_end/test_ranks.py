"""Several ranks on CPUs, each a process: reproducible, different from each other, and a fault found with its rank."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from end_to_end.trainings import BIN, Finished, environment, user_methods, verify

from f3rm_verify.presets import SMALL
from f3rm_verify.readers.trace import Trace
from f3rm_verify.run_dir import RunDir
from f3rm_verify.scene import write_scene

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two ranks with the guide's warn-only mode, and an operation that it lets pass."""
    words = ["--method", "putting", "--seed", "123", "--iters", "4", "--fresh-features", "--"]
    guide = ["--machine.num-devices", "2", "--seed-warn-only", "True"]
    return verify(tmp_path_factory.mktemp("two"), *words, *SMALL, *guide, env=user_methods("putting"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Three ranks, three times; in the last run rank 1 has a fault at step 2."""
    words = ["--method", "faulty", "--runs", "3", "--iters", "4", "--jobs", "3", "--fresh-features"]
    changes = user_methods("faulty") | {"FAULTY_SIDE": "candidate-2"}
    return verify(tmp_path_factory.mktemp("three"), *words, "--", *SMALL, "--machine.num-devices", "3", env=changes)


def claims(run: RunDir) -> dict[str, Mapping[str, Any]]:
    assert run.seeding is not None
    return {entry["claim"]: entry for entry in run.seeding["entries"]}


def every_rank(finished: Finished, side: str) -> list[RunDir]:
    run = RunDir(finished.side(side))
    return [run, *run.ranks.values()]


def losses(run: RunDir) -> bytes:
    return bytes(run.events.scalars["Train Loss"].values.tobytes())


def records(trace: Trace, frame: int) -> dict[tuple[str, str], int]:
    """What a step was recorded as, by stage and subject."""
    return {(subject.stage, subject.name): value for subject, value in trace.frame_records(frame)}


class TestTwoRanks:
    def test_are_reproducible_rank_by_rank(self, two: Finished) -> None:
        assert two.code == 0, two.output + two.errors
        assert "seed 123, putting (methods.PuttingModel), 2 ranks, 2 threads, cpu" in " ".join(two.output.split())
        names = [node["name"] for node in two.result["root"]["children"]]
        assert names[-1] == "rank 1"
        assert {child["name"] for child in two.result["root"]["children"][-1]["children"]} == {
            "setup",
            "seeding",
            "trace",
            "curves",
        }

    def test_have_the_next_seed_and_batches_of_their_own(self, two: Finished) -> None:
        ranks = every_rank(two, "reference")
        assert [run.manifest["torch_initial_seed"] for run in ranks if run.manifest] == [123, 124]
        assert len({losses(run) for run in ranks}) == 2
        assert [losses(run) for run in ranks] == [losses(run) for run in every_rank(two, "candidate")]

    def test_claim_what_they_share(self, two: Finished) -> None:
        for run in every_rank(two, "reference"):
            found = claims(run)
            assert found["seeds of the ranks"]["observed"] == "123, 124"
            shared = ("initial weights on all ranks", "data split on all ranks", "weights on all ranks, after training")
            distinct = ("generators of the ranks", "first batches of the ranks")
            assert {found[name]["verdict"] for name in (*shared, *distinct, "all-reduce")} == {"holds"}

    def test_share_one_model(self, two: Finished) -> None:
        manifests = [run.manifest for run in every_rank(two, "candidate")]
        assert len({manifest["parameters"]["after"] for manifest in manifests if manifest}) == 1
        assert [manifest["rank"] for manifest in manifests if manifest] == [0, 1]
        assert not [run for run in every_rank(two, "candidate")[1:] if run.checkpoints or run.metrics or run.renders]

    def test_leave_traces_that_tell_what_they_share_in_every_step(self, two: Finished) -> None:
        traces = [run.trace for run in every_rank(two, "reference")]
        assert [(trace.complete, trace.steps.tolist()) for trace in traces] == [(True, [0, 0, 1, 2, 3])] * 2
        for frame in range(1, 5):
            first, second = (records(trace, frame) for trace in traces)
            assert {stage for stage, _ in first} == {"rng", "batch", "forward", "loss", "grad", "params", "schedule"}
            same = {key for key in first if first[key] == second[key]}
            assert {key for key in first if key[0] in ("grad", "params", "schedule")} <= same
            assert not same & {("batch", "image"), ("batch", "rays directions"), ("loss", "rgb_loss")}

    def test_warn_only_mode_lets_an_operation_pass_and_says_which(self, two: Finished) -> None:
        for run in every_rank(two, "reference"):
            claim = claims(run)["operations without a deterministic implementation"]
            assert (claim["verdict"], claim["observed"]) == ("fails", "put_ warned 4 times")


class TestThreeRanks:
    def pairs(self, three: Finished) -> Iterator[tuple[str, str]]:
        return ((node["name"], node["verdict"]) for node in three.result["root"]["children"])

    def test_are_reproducible_and_a_fault_in_one_is_found_with_its_rank(self, three: Finished) -> None:
        assert three.code == 1, three.output + three.errors
        assert dict(self.pairs(three)) == {"candidate": "identical", "candidate-2": "different"}
        first = three.result["first_divergence"]
        assert (first["rank"], first["step"], first["last_equal_step"], first["stage"]) == (1, 2, 1, "batch")
        assert "step 2 on rank 1 (last equal: 1)" in three.output

    def test_the_order_of_a_sum_over_three_is_fixed(self, three: Finished) -> None:
        for run in every_rank(three, "reference"):
            assert claims(run)["all-reduce"]["observed"] == "one result in 5 sums on 3 ranks"


def test_plain_ns_train_with_several_cpus_ends_with_the_command_to_use(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene")
    words = ["f3rm", "--data", str(scene), "--output-dir", str(tmp_path), "--vis", "tensorboard"]
    done = subprocess.run(
        [str(BIN / "ns-train"), *words, "--machine.num-devices", "2", "--machine.device-type", "cpu"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("f3rm-verify: nerfstudio trains on several devices only with CUDA.")
    assert f"f3rm-verify run --method f3rm --seed 42 --iters 30000 --data {scene} -- --machine.num-devices 2" in last
