"""Several ranks on CPUs: what nerfstudio's launcher and pipelines do for CUDA alone, with gloo.

nerfstudio's `_distributed_worker` asserts CUDA before any trainer exists, and its pipelines give torch's
DistributedDataParallel a CUDA device. Here the worker is replaced in the launching process, and in each rank the
classes of the method's own pipeline find a DistributedDataParallel for CPUs.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch.distributed as dist
from nerfstudio.utils import comms
from torch.nn.parallel import DistributedDataParallel

from f3rm_verify import launch_variables
from f3rm_verify.f3rm.refusal import refuse


class CPUDataParallel(DistributedDataParallel):
    """DistributedDataParallel without devices, whatever devices it is given."""

    def __init__(self, module: Any, device_ids: Any = None, output_device: Any = None, **others: Any) -> None:
        super().__init__(module, **others)


def prepare_launch(config: Any) -> None:
    """Makes several CPU ranks possible, right before nerfstudio launches them; does nothing for anything else.

    Ends the process with one sentence where it was not started by `f3rm-verify run`, or where the method's pipeline
    shares its gradients in no way that is known: each rank would train alone, and nobody would notice.
    """
    machine = config.machine
    if machine.device_type != "cpu" or machine.num_devices * machine.num_machines == 1:
        return
    if not os.environ.get(launch_variables.NONCE):
        refuse(
            f"nerfstudio trains on several devices only with CUDA. On {machine.num_devices} CPU ranks, train with: "
            f"{_run_command(config)}"
        )
    if not list(_data_parallel_names(config.pipeline._target)):
        refuse(
            f"{config.pipeline._target.__name__} cannot be trained on several CPU ranks: neither it nor a class that "
            "it is made from uses torch's DistributedDataParallel, so the ranks would not share their gradients. "
            "Train it with --machine.num-devices 1."
        )
    for name in ("nerfstudio.scripts.train", "__main__"):  # ns-train, and python -m nerfstudio.scripts.train
        launcher: Any = sys.modules.get(name)
        if hasattr(launcher, "_distributed_worker"):
            launcher._distributed_worker = train_rank


def _run_command(config: Any) -> str:
    words = ["f3rm-verify", "run", "--method", config.method_name, "--seed", str(config.machine.seed)]
    words += ["--iters", str(config.max_num_iterations), *(["--data", str(config.data)] if config.data else [])]
    return shlex.join([*words, "--", "--machine.num-devices", str(config.machine.num_devices)])


def _data_parallel_names(pipeline: type) -> Iterator[tuple[ModuleType, str]]:
    """Where the modules of a pipeline's classes hold DistributedDataParallel, and under which name."""
    for module_name in dict.fromkeys(part.__module__ for part in pipeline.__mro__):
        module = sys.modules[module_name]
        for name, value in list(vars(module).items()):
            if isinstance(value, type) and issubclass(value, DistributedDataParallel) and value is not CPUDataParallel:
                yield module, name


def train_rank(
    local_rank: int,
    main_func: Callable[..., Any],
    world_size: int,
    num_devices_per_machine: int,
    machine_rank: int,
    dist_url: str,
    config: Any,
    timeout: timedelta,
    device_type: str = "cpu",
) -> None:
    """One rank, in a process of its own; takes what nerfstudio's `_distributed_worker` takes."""
    rank = machine_rank * num_devices_per_machine + local_rank
    dist.init_process_group("gloo", init_method=dist_url, world_size=world_size, rank=rank, timeout=timeout)
    for machine in range(world_size // num_devices_per_machine):
        first = machine * num_devices_per_machine
        group = dist.new_group(list(range(first, first + num_devices_per_machine)))
        if machine == machine_rank:
            comms.LOCAL_PROCESS_GROUP = group
    for module, name in list(_data_parallel_names(config.pipeline._target)):
        setattr(module, name, CPUDataParallel)
    barrier = dist.barrier
    # gloo knows no devices, and refuses to be told of any.
    dist.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group, async_op)
    main_func(local_rank, world_size, config, rank)
    comms.synchronize()
    dist.destroy_process_group()
