"""What ranks must, and must not, have in common; how they are launched on CPUs. In one process, with a group of one."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402

from f3rm_verify.errors import TrainingError  # noqa: E402
from f3rm_verify.f3rm import ranks  # noqa: E402
from f3rm_verify.run_dir import RunDir  # noqa: E402
from f3rm_verify.seeding_audit import generator_digests  # noqa: E402
from f3rm_verify.seeding_plan import Claim, SeedingPlan  # noqa: E402

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]
PLAN = SeedingPlan(base_seed=42)
OFF = SeedingPlan(base_seed=42, enabled=False)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Data:
    """A data manager that hands out a batch like nerfstudio's."""

    def __init__(self) -> None:
        names = [Path("a.png"), Path("b.png")]
        self.train_dataset = types.SimpleNamespace(image_filenames=names)
        self.eval_dataset = types.SimpleNamespace(image_filenames=[Path("c.png")])
        self.batch: dict[str, Any] = {"image": torch.arange(6.0), "indices": torch.arange(3), "camera": "not a tensor"}
        self.asked: list[int] = []

    def next_train(self, step: int) -> tuple[str, dict[str, Any]]:
        self.asked.append(step)
        return "rays", self.batch


def pipeline_of(model: Any, *, wrapped: Any = None) -> Any:
    return types.SimpleNamespace(model=model, _model=wrapped, datamanager=Data(), device="cpu")


def facts(rank: int) -> dict[str, Any]:
    """What a healthy rank says of itself."""
    return {
        "seed": 42 + rank,
        "weights": "w",
        "split": "s",
        "generators": f"g{rank}",
        "sums": ["sum"] * 5,
        "batch": f"b{rank}",
    }


def observe(monkeypatch: pytest.MonkeyPatch, said: list[dict[str, Any]], plan: SeedingPlan = PLAN) -> dict[str, Claim]:
    """All claims about ranks that say this of themselves."""
    monkeypatch.setattr(ranks, "_gather", lambda _: said)
    monkeypatch.setattr(ranks, "_repeated_sums", lambda *_: [])
    pipeline = pipeline_of(torch.nn.Linear(1, 1))
    first_batch = ranks.FirstBatch(pipeline.datamanager)
    before = ranks.observe_ranks_at_step_0(plan, pipeline, len(said))
    after = ranks.observe_ranks_after_training(plan, pipeline, first_batch)
    return {claim.claim: claim for claim in (*before, *after)}


class TestClaims:
    def test_hold_for_ranks_of_one_training(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = observe(monkeypatch, [facts(rank) for rank in range(3)])
        assert {claim.verdict for claim in found.values()} == {"holds"}
        assert {name: claim.observed for name, claim in found.items()} == {
            "seeds of the ranks": "42, 43, 44",
            "initial weights on all ranks": "equal",
            "data split on all ranks": "equal",
            "generators of the ranks": "all different",
            "all-reduce": "one result in 5 sums on 3 ranks",
            "first batches of the ranks": "all different",
            "weights on all ranks, after training": "equal",
        }

    @pytest.mark.parametrize(
        ("change", "failing", "observed"),
        [
            ({"seed": 42}, ["seeds of the ranks"], "42, 43, 42"),
            (
                {"weights": "x"},
                ["initial weights on all ranks", "weights on all ranks, after training"],
                "rank 2 differs from rank 0",
            ),
            ({"split": "x"}, ["data split on all ranks"], "rank 2 differs from rank 0"),
            ({"generators": "g1"}, ["generators of the ranks"], "some are equal"),
            ({"batch": "b0"}, ["first batches of the ranks"], "some are equal"),
            ({"sums": ["sum"] * 4 + ["other"]}, ["all-reduce"], "2 results in 5 sums on 3 ranks"),
            ({"sums": ["other"] * 5}, ["all-reduce"], "2 results in 5 sums on 3 ranks"),
        ],
    )
    def test_fail_where_one_rank_is_not_as_it_must_be(
        self, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], failing: list[str], observed: str
    ) -> None:
        found = observe(monkeypatch, [facts(0), facts(1), facts(2) | change])
        assert [claim.claim for claim in found.values() if claim.verdict == "fails"] == failing
        assert {found[name].observed for name in failing} == {observed}
        assert all(found[name].remedy for name in failing)

    def test_ranks_that_drew_no_batch_show_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        said = [facts(rank) | {"batch": ranks.FirstBatch(Data()).digest} for rank in range(2)]
        assert observe(monkeypatch, said)["first batches of the ranks"].verdict == "fails"

    def test_with_seeding_off_nobody_claims_anything(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = observe(monkeypatch, [facts(0), facts(1) | {"weights": "x"}], OFF)
        assert {(claim.verdict, claim.asked, claim.remedy) for claim in found.values()} == {
            ("not applicable", "nothing", "")
        }
        assert found["initial weights on all ranks"].observed == "rank 1 differs from rank 0"

    def test_of_one_rank_nothing_is_claimed(self) -> None:
        pipeline = pipeline_of(torch.nn.Linear(1, 1))
        assert ranks.observe_ranks_at_step_0(PLAN, pipeline, 1) == []
        assert ranks.observe_ranks_after_training(PLAN, pipeline, None) == []


@pytest.mark.usefixtures("group")
class TestWhatARankSays:
    def test_draws_nothing_and_is_the_same_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gathered: list[Any] = []
        gather = ranks._gather
        monkeypatch.setattr(ranks, "_gather", lambda value: gathered.append(gather(value)) or gathered[-1])
        pipeline = pipeline_of(torch.nn.BatchNorm1d(3))
        before = generator_digests()
        claims = [ranks.observe_ranks_at_step_0(PLAN, pipeline, 2) for _ in range(2)]
        assert generator_digests() == before
        assert claims[0] == claims[1]
        assert gathered[0] == gathered[1] and len(gathered[0]) == 1

    def test_shows_every_weight_and_buffer_to_the_bit(self) -> None:
        model = torch.nn.BatchNorm1d(3)
        before = ranks._weights(pipeline_of(model))
        for tensor in (model.weight.data, model.running_var):
            kept = tensor.clone()
            tensor[1] = torch.nextafter(tensor[1], torch.tensor(9.0))
            assert ranks._weights(pipeline_of(model)) != before
            tensor.copy_(kept)
        assert ranks._weights(pipeline_of(model)) == before

    def test_shows_which_images_are_in_which_split(self) -> None:
        data, other = Data(), Data()
        assert ranks._split(data) == ranks._split(other)
        other.eval_dataset.image_filenames.insert(0, other.train_dataset.image_filenames.pop())
        assert ranks._split(data) != ranks._split(other)

    def test_sums_are_one_where_their_order_is(self) -> None:
        assert len(set(ranks._repeated_sums(PLAN, "cpu"))) == 1

    def test_sums_show_an_order_that_changes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Three ranks' values, added in another order at every call, as a back end that reduces as they arrive."""
        others = [ranks._probe_values(SeedingPlan(base_seed=42, rank=rank)) for rank in (1, 2)]

        def arriving(total: Any) -> None:
            others.reverse()
            total.copy_(sum(others, start=total.clone()) if len(orders) % 2 else total + (others[0] + others[1]))
            orders.append(len(orders))

        orders: list[int] = []
        monkeypatch.setattr(dist, "all_reduce", arriving)
        sums = ranks._repeated_sums(PLAN, "cpu")
        assert len(set(sums)) > 1
        assert ranks._all_reduce([sums] * 3, PLAN).verdict == "fails"


class TestSharedGradients:
    @pytest.fixture
    def parts(self, group: None) -> tuple[Any, Any]:
        """A model of two parts, and the first part as torch shares it."""
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        return model, torch.nn.parallel.DistributedDataParallel(model[0])

    def test_a_model_as_nerfstudio_wraps_it_passes(self, parts: tuple[Any, Any]) -> None:
        model = parts[0]
        ranks.require_shared_gradients(
            pipeline_of(model, wrapped=torch.nn.parallel.DistributedDataParallel(model)), world_size=2
        )

    def test_a_model_that_each_rank_trains_alone_is_refused(self, parts: tuple[Any, Any]) -> None:
        with pytest.raises(TrainingError, match=r"between the 2 ranks: its model is not in .* --machine.num-devices 1"):
            ranks.require_shared_gradients(pipeline_of(parts[0], wrapped=parts[0]), world_size=2)
        ranks.require_shared_gradients(pipeline_of(parts[0], wrapped=parts[0]), world_size=1)

    def test_a_part_that_each_rank_trains_alone_is_refused_by_name(self, parts: tuple[Any, Any]) -> None:
        model, wrapped = parts
        with pytest.raises(TrainingError, match=r"1\.weight is not in"):
            ranks.require_shared_gradients(pipeline_of(model, wrapped=wrapped), world_size=2)
        model[1].requires_grad_(False)
        ranks.require_shared_gradients(pipeline_of(model, wrapped=wrapped), world_size=2)


class TestFirstBatch:
    def test_hands_on_what_it_saw_once(self) -> None:
        data = Data()
        first = ranks.FirstBatch(data)
        assert first.digest == "none"
        assert data.next_train(7) == ("rays", data.batch)
        digest = first.digest
        data.batch["image"] = data.batch["image"] + 1
        data.next_train(8)
        assert data.asked == [7, 8]
        assert first.digest == digest != "none"
        assert "next_train" not in vars(data)

    @pytest.mark.parametrize("key", ["image", "indices"])
    def test_tells_one_bit(self, key: str) -> None:
        digests = []
        for change in (0, 0, 1):
            data = Data()
            data.batch[key].view(torch.int32)[2] ^= change
            first = ranks.FirstBatch(data)
            data.next_train(0)
            digests.append(first.digest)
        assert digests[0] == digests[1] != digests[2]


def test_the_curves_of_a_rank_are_those_of_any_run_to_the_bit(tmp_path: Path) -> None:
    import numpy as np

    directory = ranks.rank_directory(tmp_path, 2)
    assert ranks.rank_directory(tmp_path, 0) == tmp_path
    values = torch.tensor([0.1, float("nan"), 1e-40], dtype=torch.float32)
    curves = ranks.RankCurves(directory, {"max_num_iterations": 3})
    for step, value in enumerate(values):
        curves.log(step, value, {"rgb_loss": value * 2})
    curves.flush()
    found = RunDir(tmp_path).ranks
    assert list(found) == [2]
    scalars = found[2].events.scalars
    assert set(scalars) == {"Train Loss", "Train Loss Dict/rgb_loss"}
    assert scalars["Train Loss"].steps.tolist() == [0, 1, 2]
    assert scalars["Train Loss"].values.astype(np.float32).tobytes() == values.numpy().tobytes()
    assert found[2].config == {"max_num_iterations": 3}


class TestLaunch:
    @pytest.fixture
    def launcher(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        import nerfstudio.scripts.train as launcher

        monkeypatch.setattr(launcher, "_distributed_worker", "nerfstudio's own")
        monkeypatch.setenv("F3RM_VERIFY_NONCE", "started by run")
        return launcher

    def config(self, tmp_path: Path, **machine: Any) -> Any:
        from nerfstudio.configs.base_config import MachineConfig

        from f3rm_verify.f3rm.trainer import F3RMTrainerConfig

        config = F3RMTrainerConfig(method_name="f3rm", output_dir=tmp_path / "out", max_num_iterations=7)
        config.machine = MachineConfig(**{"device_type": "cpu", "num_devices": 2, "seed": 5} | machine)
        config.data = tmp_path / "my scene"
        config.set_timestamp()
        return config

    def test_on_cpus_ranks_are_ours(self, launcher: Any, tmp_path: Path) -> None:
        from f3rm_verify.f3rm.cpu_ranks import train_rank

        self.config(tmp_path).save_config()
        assert launcher._distributed_worker is train_rank
        assert pickle.loads(pickle.dumps(train_rank)) is train_rank

    def test_also_where_the_launcher_is_the_main_module(
        self, launcher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from f3rm_verify.f3rm.cpu_ranks import train_rank

        main = types.SimpleNamespace(_distributed_worker="nerfstudio's own")
        monkeypatch.setitem(sys.modules, "__main__", main)  # type: ignore[arg-type]
        self.config(tmp_path).save_config()
        assert main._distributed_worker is train_rank  # type: ignore[comparison-overlap]

    @pytest.mark.parametrize("machine", [{"num_devices": 1}, {"device_type": "cuda"}])
    def test_all_else_is_left_to_nerfstudio(self, launcher: Any, tmp_path: Path, machine: dict[str, Any]) -> None:
        self.config(tmp_path, **machine).save_config()
        assert launcher._distributed_worker == "nerfstudio's own"

    def test_without_run_one_sentence_names_the_command(
        self, launcher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delenv("F3RM_VERIFY_NONCE")
        with pytest.raises(SystemExit) as ended:
            self.config(tmp_path).save_config()
        assert ended.value.code == 2
        assert capsys.readouterr().err == (
            "f3rm-verify: nerfstudio trains on several devices only with CUDA. On 2 CPU ranks, train with: "
            f"f3rm-verify run --method f3rm --seed 5 --iters 7 --data '{tmp_path}/my scene' "
            "-- --machine.num-devices 2\n"
        )
        assert launcher._distributed_worker == "nerfstudio's own"
        assert not (tmp_path / "out").exists()

    def test_a_pipeline_that_shares_no_gradients_is_refused(
        self, launcher: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = self.config(tmp_path)
        config.pipeline._target = type("LonelyPipeline", (Data,), {})
        with pytest.raises(SystemExit) as ended:
            config.save_config()
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("f3rm-verify: LonelyPipeline cannot be trained on several CPU ranks: neither it")
        assert error.count("\n") == 1
        assert launcher._distributed_worker == "nerfstudio's own"

    @pytest.mark.parametrize("name", ["DDP", "Parallel"])
    def test_a_pipeline_that_shares_them_itself_is_found_whatever_the_name(
        self, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        from f3rm_verify.f3rm.cpu_ranks import _data_parallel_names

        module = types.ModuleType("a_users_pipeline")
        setattr(module, name, torch.nn.parallel.DistributedDataParallel)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        pipeline = type("Pipeline", (), {"__module__": module.__name__})
        assert list(_data_parallel_names(pipeline)) == [(module, name)]


def test_a_rank_shares_gradients_and_waits_without_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nerfstudio.pipelines.base_pipeline as pipelines
    from nerfstudio.utils import comms

    from f3rm_verify.f3rm.cpu_ranks import CPUDataParallel, train_rank

    for module, name in ((pipelines, "DDP"), (dist, "barrier"), (comms, "LOCAL_PROCESS_GROUP")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    config = types.SimpleNamespace(pipeline=types.SimpleNamespace(_target=pipelines.VanillaPipeline))
    calls: list[Any] = []

    def main(*arguments: Any) -> None:
        # As VanillaPipeline does.
        model: Any = pipelines.DDP(torch.nn.Linear(2, 1), device_ids=[0], find_unused_parameters=True)
        pipelines.dist.barrier(device_ids=[0])
        model(torch.ones(3, 2)).sum().backward()
        assert comms.get_local_rank() == 0
        calls.append((arguments, type(model), pipelines.module_wrapper(model), model.module.weight.grad.tolist()))

    train_rank(0, main, 1, 1, 0, f"file://{tmp_path}/store", config, timedelta(seconds=30))
    ((arguments, kind, unwrapped, gradient),) = calls
    assert arguments == (0, 1, config, 0)
    assert kind is CPUDataParallel
    assert isinstance(unwrapped, torch.nn.Linear)
    assert gradient == [[3.0, 3.0]]
    assert not dist.is_initialized()
