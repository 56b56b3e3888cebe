"""Data workers, real ones of nerfstudio on the built-in scene, and the seeds that they use."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from f3rm_verify.scene import write_scene
from f3rm_verify.seeding_plan import SeedingPlan

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]

PLAN = SeedingPlan(base_seed=42)
BATCHES = 9
RAYS = 64
GOLDEN = ((3876595993, 1020617202, 104987118), (2730219742, 1551592914, 2354401095))
MakeManager = Callable[..., Any]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("workers") / "scene")


@pytest.fixture(scope="module")
def make_manager(scene: Path) -> Iterator[MakeManager]:
    """Builds a data manager whose workers are started by a server that imported nerfstudio once.

    They get everything by pickle and by import, as spawned ones do.
    """
    from nerfstudio.data.datamanagers.parallel_datamanager import ParallelDataManagerConfig, mp
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

    from f3rm_verify.f3rm.data_workers import seeded_data_workers

    before = mp.get_start_method(allow_none=True)
    mp.set_forkserver_preload(["nerfstudio.data.datamanagers.parallel_datamanager", "f3rm_verify.f3rm.data_workers"])
    managers: list[Any] = []

    def make(workers: int, *, plan: SeedingPlan = PLAN, start: str = "forkserver") -> Any:
        mp.set_start_method(start, force=True)
        config = ParallelDataManagerConfig(
            dataparser=NerfstudioDataParserConfig(data=scene),
            train_num_rays_per_batch=RAYS,
            num_processes=workers,
        )
        with seeded_data_workers(plan):
            managers.append(config.setup(device="cpu"))
        return managers[-1]

    yield make
    for worker in [worker for manager in managers for worker in manager.data_procs]:
        worker.kill()
        worker.join()
    mp.set_start_method(before, force=True)


def take(manager: Any, batches: int = BATCHES) -> list[dict[str, bytes]]:
    """The bytes of rays and pixels of the next batches."""
    return [_bytes(*manager.next_train(step)) for step in range(batches)]


def _bytes(rays: Any, batch: dict[str, Any]) -> dict[str, bytes]:
    values = {"origins": rays.origins, "directions": rays.directions, "camera": rays.camera_indices, **batch}
    return {name: value.numpy().tobytes() for name, value in values.items()}


@pytest.fixture(scope="module")
def expected(make_manager: MakeManager) -> list[dict[str, bytes]]:
    """The first batches, made here from seed, rank and number alone, in reverse."""
    from f3rm_verify.f3rm.data_workers import seed_batch

    manager = make_manager(1)
    images = manager.config.collate_fn([manager.train_dataset[index] for index in range(len(manager.train_dataset))])
    batches = []
    for number in reversed(range(BATCHES)):
        seed_batch(PLAN, number)
        batch = manager.train_pixel_sampler.sample(images)
        batches.append(_bytes(manager.data_procs[0].ray_generator(batch["indices"]), batch))
    return batches[::-1]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_batch_depends_on_seed_rank_and_number_alone(
    make_manager: MakeManager, expected: list[dict[str, bytes]], workers: int
) -> None:
    assert len({batch["indices"] for batch in expected}) == BATCHES
    assert take(make_manager(workers)) == expected


def test_spawned_workers_make_the_same_batches_and_without_the_fix_they_do_not(
    make_manager: MakeManager, expected: list[dict[str, bytes]]
) -> None:
    off = SeedingPlan(enabled=False)
    seeded, *plain = (make_manager(1, plan=plan, start="spawn") for plan in (PLAN, off, off))
    assert take(seeded) == expected
    first, second = (take(manager) for manager in plain)
    pixels = [{batch["indices"] for batch in batches} for batches in (expected, first, second)]
    assert len(set().union(*pixels)) == 3 * BATCHES


@contextmanager
def _stopped_at_random(processes: list[Any]) -> Iterator[None]:
    """Meanwhile each process stands still for up to 50 ms, again and again."""
    ended = threading.Event()

    def hinder() -> None:
        chance = random.Random()  # not the generators that a batch seeds
        while not ended.is_set():
            process = chance.choice(processes)
            os.kill(process.pid, signal.SIGSTOP)
            ended.wait(chance.random() * 0.05)
            os.kill(process.pid, signal.SIGCONT)

    thread = threading.Thread(target=hinder)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_workers_slowed_at_random_change_nothing(make_manager: MakeManager, expected: list[dict[str, bytes]]) -> None:
    manager = make_manager(3)
    with _stopped_at_random(manager.data_procs):
        assert take(manager) == expected


def test_a_batch_waits_for_its_worker_though_others_are_ready(
    make_manager: MakeManager, expected: list[dict[str, bytes]]
) -> None:
    manager = make_manager(2)
    late, ready = manager.data_procs
    os.kill(late.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while ready.out_queue.empty() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not ready.out_queue.empty()
    threading.Timer(0.2, os.kill, (late.pid, signal.SIGCONT)).start()
    assert take(manager, 3) == expected[:3]


def test_another_rank_has_other_batches(make_manager: MakeManager, expected: list[dict[str, bytes]]) -> None:
    taken = take(make_manager(2, plan=SeedingPlan(base_seed=42, rank=1)))
    assert not {batch["indices"] for batch in taken} & {batch["indices"] for batch in expected}


def test_the_workers_end_with_the_data_manager(make_manager: MakeManager) -> None:
    manager = make_manager(2)
    take(manager, 2)
    assert all(worker.daemon and worker.is_alive() for worker in manager.data_procs)
    manager.__del__()
    assert not any(worker.is_alive() for worker in manager.data_procs)


def test_a_dead_worker_ends_the_training_instead_of_letting_it_wait(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    from f3rm_verify.f3rm import data_workers

    monkeypatch.setattr(data_workers, "_PATIENCE", 0.2)
    manager = make_manager(2)
    take(manager, 2)
    manager.data_procs[1].kill()
    with pytest.raises(RuntimeError, match="data worker 1 ended with exit code -9"):
        take(manager, 8)


def test_nerfstudio_is_as_it_was_after_a_failed_setup() -> None:
    from nerfstudio.data.datamanagers import parallel_datamanager as parallel

    from f3rm_verify.f3rm.data_workers import seeded_data_workers

    before = (parallel.DataProcessor, parallel.ParallelDataManager.setup_train)
    # Without a data set the set-up fails inside.
    with pytest.raises(AttributeError, match="train_dataset"), seeded_data_workers(PLAN):
        parallel.ParallelDataManager.setup_train(SimpleNamespace(config=SimpleNamespace(num_processes=1, queue_size=2)))
    assert (parallel.DataProcessor, parallel.ParallelDataManager.setup_train) == before


def test_nerfstudio_is_not_touched_by_a_disabled_plan() -> None:
    from nerfstudio.data.datamanagers import parallel_datamanager as parallel

    from f3rm_verify.f3rm.data_workers import seeded_data_workers

    before = parallel.ParallelDataManager.setup_train
    with seeded_data_workers(SeedingPlan(enabled=False)):
        assert parallel.ParallelDataManager.setup_train is before


@pytest.mark.parametrize(
    ("queue_size", "workers", "each"), [(2, 1, 2), (2, 2, 1), (2, 3, 1), (8, 3, 2), (0, 3, 0), (-1, 2, 0)]
)
def test_as_many_batches_wait_as_before_and_at_least_one_of_each_worker(
    queue_size: int, workers: int, each: int
) -> None:
    from f3rm_verify.f3rm.data_workers import _WorkerMaker

    sizes: list[int] = []
    parallel: Any = SimpleNamespace(DataProcessor=SimpleNamespace, mp=SimpleNamespace(Queue=lambda maxsize: maxsize))
    maker = _WorkerMaker(parallel, PLAN, SimpleNamespace(num_processes=workers, queue_size=queue_size))
    for _ in range(workers):
        sizes.append(maker(out_queue="shared", pixel_sampler="sampler", dataset="data").out_queue)
    assert sizes == [each] * workers


class _Drawing:
    """Draws from every generator, as often as it was asked before."""

    def __init__(self) -> None:
        self.asked = 0

    def sample(self, images: Any) -> tuple[Any, ...]:
        import torch

        self.asked += 1
        return [(random.random(), np.random.rand(), torch.rand(1).item()) for _ in range(self.asked)][0]


def test_every_generator_is_seeded_for_every_batch() -> None:
    from f3rm_verify.f3rm.data_workers import SeededSampler

    alone = SeededSampler(_Drawing(), PLAN, worker=0, workers=1)
    batches = [alone.sample(None) for _ in range(6)]
    pair = [SeededSampler(_Drawing(), PLAN, worker=worker, workers=2) for worker in (0, 1)]
    assert [pair[number % 2].sample(None) for number in range(6)] == batches
    assert [len(set(drawn)) for drawn in zip(*batches, strict=True)] == [6, 6, 6]


def test_seeds_are_what_they_always_were() -> None:
    """Other values would change every training that uses data workers."""
    from f3rm_verify.f3rm.data_workers import batch_seeds

    assert batch_seeds(SeedingPlan(base_seed=42, rank=0), 0) == GOLDEN[0]
    assert batch_seeds(SeedingPlan(base_seed=43, rank=2), 7) == GOLDEN[1]


def test_no_seed_comes_twice_within_a_rank_or_in_another() -> None:
    from f3rm_verify.f3rm.data_workers import batch_seeds

    plans = [SeedingPlan(base_seed=seed, rank=rank) for seed, rank in ((42, 0), (42, 1), (43, 0), (4, 21), (-42, 1))]
    for generator in range(3):
        seeds = [{batch_seeds(plan, batch)[generator] for batch in range(10_000)} for plan in plans]
        assert [len(values) for values in seeds] == [10_000] * len(plans)
        assert len(set().union(*seeds)) == 10_000 * len(plans)


def test_the_log_says_what_the_workers_are() -> None:
    from f3rm_verify.f3rm.data_workers import InOrderQueue, SeededSampler, observe_data_workers

    off = SeedingPlan(enabled=False)
    seeded = [SimpleNamespace(pixel_sampler=SeededSampler(None, PLAN, worker=w, workers=2)) for w in (0, 1)]
    plain = SimpleNamespace(data_procs=[SimpleNamespace(pixel_sampler=None)], data_queue=queue.Queue())
    fixed = SimpleNamespace(data_procs=seeded, data_queue=InOrderQueue(seeded))
    racing = SimpleNamespace(data_procs=seeded, data_queue=queue.Queue())
    other_rank = SeedingPlan(base_seed=42, rank=1)
    for manager, plan, verdict, observed in (
        (fixed, PLAN, "holds", "2 worker processes, seeded for each batch and read in order"),
        (plain, PLAN, "fails", "1 worker process, not seeded"),
        (racing, PLAN, "fails", "2 worker processes, not read in order"),
        (fixed, other_rank, "fails", "2 worker processes, not seeded for this rank"),
        (plain, off, "not applicable", "1 worker process, not seeded"),
        (SimpleNamespace(), PLAN, "not applicable", "no worker processes: batches are made in the training process"),
    ):
        claim = observe_data_workers(plan, manager)
        assert (claim.verdict, claim.observed) == (verdict, observed)
        assert bool(claim.remedy) == (verdict == "fails")


@pytest.fixture
def nerfacto(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Sets a small nerfacto up, through our trainer around nerfstudio's own configuration."""
    import torch
    from nerfstudio.configs.method_configs import method_configs

    from f3rm_verify.f3rm.wrap import wrap_config

    for name in ("PYTHONHASHSEED", "TCNN_SEED", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that it is put back

    def set_up(**changes: Any) -> Any:
        config: Any = wrap_config(copy.deepcopy(method_configs["nerfacto"]))
        config.pipeline.datamanager.data = scene
        config.pipeline.datamanager.train_num_rays_per_batch = RAYS
        config.pipeline.datamanager.num_processes = 2
        config.pipeline.model.log2_hashmap_size = 10
        config.machine = dataclasses.replace(config.machine, seed=42, device_type="cpu")
        config = dataclasses.replace(config, output_dir=tmp_path / "out", vis="tensorboard", **changes)
        config.set_timestamp()
        trainer = config.setup(local_rank=0, world_size=1)
        trainer.setup()
        return trainer

    yield set_up
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_the_workers_of_a_wrapped_method_are_seeded_and_in_its_log(
    nerfacto: Callable[..., Any], make_manager: MakeManager, expected: list[dict[str, bytes]]
) -> None:
    trainer = nerfacto()
    assert take(trainer.pipeline.datamanager, 4) == expected[:4]
    log = json.loads((trainer.base_dir / "verify" / "seeding.json").read_text("utf8"))
    assert [entry["verdict"] for entry in log["entries"] if entry["claim"] == "data workers"] == ["holds"]
