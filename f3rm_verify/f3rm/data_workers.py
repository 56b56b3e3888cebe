"""The worker processes of nerfstudio's parallel data manager, seeded batch by batch and read in order.

Left alone, the workers of nerfstudio 1.0 to 1.1.5 set no seed, and all push into one queue: which batch comes next is a
race. Here batch k depends on the seed, the rank and k alone, whatever the number of workers and their speed: worker w
of n makes the batches w, w + n, w + 2n, ... and has a queue of its own; the queues are read in turn.

Out of reach: a data set that draws while its images are loaded (none of nerfstudio's does), and a data manager that
starts its workers in a way of its own; the claim in the seeding log then fails.
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch

from f3rm_verify.seeding_plan import Claim, SeedingPlan

#: Seconds without a batch after which a worker is looked at: is it slow, or dead?
_PATIENCE = 5.0


def batch_seeds(plan: SeedingPlan, batch: int) -> tuple[int, int, int]:
    """The seeds (32 bits) of Python's, NumPy's and torch's generator for a batch, counted from 0 over all workers.

    torch's CPU generator uses no more than 32 bits of its seed, so hashes of `batch` would meet after some 2^16
    batches. Instead the hash of base seed and rank is where a counter starts, and each count is mixed one to one:
    within a rank no seed comes twice in 2^32 batches.
    """
    start = hashlib.blake2b(f"data workers {plan.base_seed} {plan.rank}".encode(), digest_size=12).digest()
    python, numpy, torch_cpu = (int.from_bytes(start[at : at + 4], "little") + batch for at in (0, 4, 8))
    return _mix(python), _mix(numpy), _mix(torch_cpu)


def _mix(count: int) -> int:
    """MurmurHash3's finaliser, after a step as in SplitMix: a permutation of the 32-bit numbers."""
    value = count * 0x9E3779B9 & 0xFFFFFFFF
    value = (value ^ value >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    value = (value ^ value >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return value ^ value >> 16


def seed_batch(plan: SeedingPlan, batch: int) -> None:
    """Seeds every generator of this process for one batch."""
    python, numpy, torch_seed = batch_seeds(plan, batch)
    random.seed(python)
    np.random.seed(numpy)
    # As torch.manual_seed, which spends 0.1 ms a call on the back ends that this machine does not have.
    torch.default_generator.manual_seed(torch_seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(torch_seed)


class SeededSampler:
    """A pixel sampler that seeds its process before each batch; goes to a worker by pickle.

    nerfstudio's worker calls it once a batch, before anything else that could draw.
    """

    def __init__(self, sampler: Any, plan: SeedingPlan, *, worker: int, workers: int) -> None:
        self.sampler = sampler
        self.plan = plan
        self.batch = worker
        self.workers = workers

    def sample(self, images: Any) -> Any:
        """The pixels of this worker's next batch."""
        seed_batch(self.plan, self.batch)
        self.batch += self.workers
        return self.sampler.sample(images)


class InOrderQueue:
    """Stands in for the queue that all workers shared: reads each worker's own in turn."""

    def __init__(self, workers: Sequence[Any], *, first: int = 0) -> None:
        self._turns = itertools.cycle(enumerate(workers))
        #: The number of the next batch.
        self.taken = first

    def get(self) -> Any:
        """The next batch, once it is there. Raises RuntimeError when its worker has died: it would never come."""
        number, worker = next(self._turns)
        while True:
            try:
                batch = worker.out_queue.get(timeout=_PATIENCE)
            except queue.Empty:
                if not worker.is_alive():
                    raise RuntimeError(f"data worker {number} ended with exit code {worker.exitcode}") from None
            else:
                self.taken += 1
                return batch


@contextmanager
def seeded_data_workers(plan: SeedingPlan, *, first: int = 0) -> Iterator[None]:
    """Inside, every parallel data manager that is built gets seeded workers, provided that the plan is enabled.

    They begin with batch `first`.
    """
    parallel = _parallel_datamanager() if plan.enabled else None
    if parallel is None:
        yield
        return
    manager_class, original = parallel.ParallelDataManager, parallel.ParallelDataManager.setup_train

    def setup_train(manager: Any) -> None:
        with _workers_made_by(_WorkerMaker(parallel, plan, manager.config, first), parallel):
            original(manager)
        manager.data_queue = InOrderQueue(manager.data_procs, first=first)

    manager_class.setup_train = setup_train
    try:
        yield
    finally:
        manager_class.setup_train = original


def _parallel_datamanager() -> ModuleType | None:
    """nerfstudio's module; None before nerfstudio 1.0, which has no workers."""
    try:
        from nerfstudio.data.datamanagers import parallel_datamanager
    except ImportError:
        return None
    return parallel_datamanager if hasattr(parallel_datamanager, "DataProcessor") else None


class _WorkerMaker:
    """Called like nerfstudio's worker class, makes workers that have a seeded sampler and a queue of their own."""

    def __init__(self, parallel: ModuleType, plan: SeedingPlan, config: Any, first: int = 0) -> None:
        self._worker_class = parallel.DataProcessor
        self._new_queue = parallel.mp.Queue
        self._plan = plan
        self._workers = config.num_processes
        # One shared bound could fill up with later batches and keep the next one out, so each queue has its part of it,
        # at least one batch. 0 is nerfstudio's word for no bound.
        size = config.queue_size
        self._size = max(1, size // max(1, self._workers)) if size > 0 else 0
        self._turns = itertools.count()
        self._first = first

    def __call__(self, *, out_queue: Any, pixel_sampler: Any, **others: Any) -> Any:
        # Any worker can make any batch, so the first one starts with the first that is wanted.
        number = self._first + next(self._turns)
        sampler = SeededSampler(pixel_sampler, self._plan, worker=number, workers=self._workers)
        return self._worker_class(out_queue=self._new_queue(maxsize=self._size), pixel_sampler=sampler, **others)


@contextmanager
def _workers_made_by(maker: _WorkerMaker, parallel: ModuleType) -> Iterator[None]:
    original = parallel.DataProcessor
    parallel.DataProcessor = maker  # type: ignore[attr-defined]
    try:
        yield
    finally:
        parallel.DataProcessor = original  # type: ignore[attr-defined]


def observe_data_workers(plan: SeedingPlan, datamanager: Any) -> Claim:
    """What the workers of a data manager are seen to be, for the seeding log."""
    workers = getattr(datamanager, "data_procs", None) or []
    fault = _fault(plan, datamanager, workers)
    processes = "1 worker process" if len(workers) == 1 else f"{len(workers)} worker processes"
    observed = f"{processes}, {fault or 'seeded for each batch and read in order'}"
    claimed = plan.enabled and bool(workers)
    return Claim(
        claim="data workers",
        asked="batch k from seed, rank and k alone, in order of k" if plan.enabled else "nothing",
        set="nothing" if fault or not claimed else "a seed per batch, a queue per worker",
        observed=observed if workers else "no worker processes: batches are made in the training process",
        verdict="not applicable" if not claimed else "fails" if fault else "holds",
        remedy="Use a data manager that keeps ParallelDataManager.setup_train." if fault and claimed else "",
    )


def _fault(plan: SeedingPlan, datamanager: Any, workers: Sequence[Any]) -> str:
    """What is wrong with the workers, as words that follow their number; empty where nothing is."""
    samplers = [getattr(worker, "pixel_sampler", None) for worker in workers]
    if not all(isinstance(sampler, SeededSampler) for sampler in samplers):
        return "not seeded"
    if not all(sampler.plan == plan for sampler in samplers if sampler):
        return "not seeded for this rank"
    return "" if isinstance(getattr(datamanager, "data_queue", None), InOrderQueue) else "not read in order"
