"""Several ranks: where each leaves its evidence, and what they must, and must not, have in common.

Everything here is called by all ranks alike: what is gathered waits for every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from f3rm_verify.errors import TrainingError
from f3rm_verify.recorder import digest_tensors
from f3rm_verify.run_dir import CONFIG, RANKS
from f3rm_verify.seeding_audit import generator_digests
from f3rm_verify.seeding_plan import Claim, SeedingPlan, make_claim, not_asked

#: Values and repetitions of the probe of the all-reduce.
_PROBE_VALUES, _PROBE_REPEATS = 2**16, 5


def rank_directory(run: Path, rank: int) -> Path:
    """Where a rank leaves its evidence: rank 0 in the run directory, rank r in a run directory of its own inside."""
    return run if rank == 0 else run / RANKS / str(rank)


class RankCurves:
    """The scalars of a rank above 0, of which nerfstudio's writers log nothing; the tags are theirs."""

    def __init__(self, directory: Path, config: Any) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG).write_text(yaml.dump(config), "utf8")
        self._writer = SummaryWriter(log_dir=str(directory))

    def log(self, step: int, loss: torch.Tensor, losses: Mapping[str, torch.Tensor]) -> None:
        """One step: the loss, and each of its terms."""
        self._writer.add_scalar("Train Loss", loss.detach(), step)
        for name, value in losses.items():
            self._writer.add_scalar(f"Train Loss Dict/{name}", value.detach(), step)

    def flush(self) -> None:
        """Puts on disk what was logged."""
        self._writer.flush()


def require_shared_gradients(pipeline: Any, world_size: int) -> None:
    """Raises TrainingError where ranks train the model, or a part of it, without averaging their gradients."""
    if world_size == 1:
        return
    parts = [part for part in (pipeline, getattr(pipeline, "_model", None)) if isinstance(part, torch.nn.Module)]
    wrappers = [m for part in parts for m in part.modules() if isinstance(m, torch.nn.parallel.DistributedDataParallel)]
    shared = {id(value) for wrapper in wrappers for value in wrapper.parameters()}
    trained = [(name, value) for name, value in pipeline.model.named_parameters() if value.requires_grad]
    alone = [name for name, value in trained if id(value) not in shared]
    if alone:
        what = "its model" if len(alone) == len(trained) else alone[0]
        raise TrainingError(
            f"{type(pipeline).__name__} does not share gradients between the {world_size} ranks: {what} is not in "
            "torch's DistributedDataParallel. Train with --machine.num-devices 1."
        )


class FirstBatch:
    """A digest of the first batch that a data manager hands out; it draws nothing and changes nothing."""

    def __init__(self, datamanager: Any) -> None:
        self.digest = "none"
        self._datamanager, self._next = datamanager, datamanager.next_train
        self._hidden = vars(datamanager).get("next_train")
        # On the instance, where it hides what was there until the first batch is there.
        datamanager.next_train = self

    def __call__(self, step: int) -> Any:
        """The data manager's `next_train`, once."""
        if self._hidden is None:
            del self._datamanager.next_train
        else:
            self._datamanager.next_train = self._hidden
        rays, batch = self._next(step)
        tensors = sorted((key, value) for key, value in batch.items() if isinstance(value, torch.Tensor))
        self.digest = digest_tensors(tensors)
        return rays, batch


def observe_ranks_at_step_0(plan: SeedingPlan, pipeline: Any, world_size: int) -> list[Claim]:
    """The claims about several ranks that can be seen before the first step; none for one rank."""
    if world_size == 1:
        return []
    facts = _gather(
        {
            "seed": torch.initial_seed(),
            "weights": _weights(pipeline),
            "split": _split(pipeline.datamanager),
            "generators": repr(generator_digests()),
            "sums": _repeated_sums(plan, pipeline.device),
        }
    )
    return [
        _seeds(plan, [rank["seed"] for rank in facts]),
        _equal("initial weights on all ranks", "equal", [rank["weights"] for rank in facts], plan),
        _equal("data split on all ranks", "equal", [rank["split"] for rank in facts], plan),
        _distinct("generators of the ranks", [rank["generators"] for rank in facts], plan),
        _all_reduce([rank["sums"] for rank in facts], plan),
    ]


def observe_ranks_after_training(plan: SeedingPlan, pipeline: Any, first_batch: FirstBatch | None) -> list[Claim]:
    """The claims about several ranks that can be seen after the last step; none for one rank, without `first_batch`."""
    if first_batch is None:
        return []
    facts = _gather({"batch": first_batch.digest, "weights": _weights(pipeline)})
    return [
        _distinct("first batches of the ranks", [rank["batch"] for rank in facts], plan),
        _equal("weights on all ranks, after training", "equal", [rank["weights"] for rank in facts], plan),
    ]


def _gather(value: Any) -> list[Any]:
    """The value of every rank, by rank."""
    # gloo needs no device of its own, where NCCL would want each rank to have chosen one.
    group = dist.new_group(backend="gloo")
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    dist.destroy_process_group(group)
    return values


def _weights(pipeline: Any) -> str:
    model = pipeline.model
    return digest_tensors([*model.named_parameters(), *model.named_buffers()])


def _split(datamanager: Any) -> str:
    """A digest of the images of each split, in their order."""
    state = hashlib.blake2b(digest_size=16)
    for split in ("train", "eval"):
        names = getattr(getattr(datamanager, f"{split}_dataset", None), "image_filenames", None) or []
        state.update(repr([split, *map(str, names)]).encode())
    return state.hexdigest()


def _repeated_sums(plan: SeedingPlan, device: Any) -> list[str]:
    """Digests of sums over all ranks of the same values."""
    values = _probe_values(plan).to(device)
    digests = []
    for _ in range(_PROBE_REPEATS):
        total = values.clone()
        dist.all_reduce(total)
        digests.append(digest_tensors([("sum", total)]))
    return digests


def _probe_values(plan: SeedingPlan) -> torch.Tensor:
    """What a rank adds: values whose magnitudes differ so much that the order of the ranks shows in the sum."""
    generator = torch.Generator().manual_seed(plan.seed % 2**63)
    values = torch.randn(_PROBE_VALUES, generator=generator)
    return values * torch.exp2(torch.randint(-20, 20, (_PROBE_VALUES,), generator=generator))


def _seeds(plan: SeedingPlan, seeds: Sequence[int]) -> Claim:
    wanted = [plan.base_seed + rank for rank in range(len(seeds))]
    return _claim(
        "seeds of the ranks",
        ", ".join(map(str, wanted)),
        ", ".join(map(str, seeds)),
        plan,
        holds=list(seeds) == wanted,
        remedy="Something seeded torch after the trainer did; find and remove it.",
    )


def _equal(name: str, asked: str, values: Sequence[str], plan: SeedingPlan) -> Claim:
    others = [str(rank) for rank, value in enumerate(values) if value != values[0]]
    observed = f"rank {', '.join(others)} differ{'s' if len(others) == 1 else ''} from rank 0" if others else asked
    remedy = "The ranks do not train one model on one data set; look at what depends on the rank."
    return _claim(name, asked, observed, plan, holds=not others, remedy=remedy)


def _distinct(name: str, values: Sequence[str], plan: SeedingPlan) -> Claim:
    fine = len(set(values)) == len(values)
    remedy = "Ranks with one state draw the same rays; seed each with the base seed + its rank."
    observed = "all different" if fine else "some are equal"
    return _claim(name, "all different", observed, plan, holds=fine, remedy=remedy)


def _all_reduce(sums: Sequence[Sequence[str]], plan: SeedingPlan) -> Claim:
    distinct = len({digest for rank in sums for digest in rank})
    asked = f"one result in {_PROBE_REPEATS} sums on {len(sums)} ranks"
    return _claim(
        "all-reduce",
        asked,
        asked if distinct == 1 else f"{distinct} results in {_PROBE_REPEATS} sums on {len(sums)} ranks",
        plan,
        holds=distinct == 1,
        remedy="Fix the algorithm of the back end, for NCCL by NCCL_ALGO=Ring, and keep the number of ranks.",
    )


def _claim(name: str, asked: str, observed: str, plan: SeedingPlan, *, holds: bool, remedy: str) -> Claim:
    """A claim of the guide's; with seeding off nobody makes it, and what is observed is only worth knowing."""
    return make_claim(name, asked, observed, holds=holds, remedy=remedy) if plan.enabled else not_asked(name, observed)
