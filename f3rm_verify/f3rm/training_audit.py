"""The claims of the seeding log that only a training can show: flags at step 0 and after it, data workers, modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from f3rm_verify.f3rm.data_workers import observe_data_workers, seeded_data_workers
from f3rm_verify.seeding import Claim, SeedingPlan, observe_flags


@contextmanager
def seeded_construction(plan: SeedingPlan) -> Iterator[None]:
    """Inside, what nerfstudio builds without a seed gets one: worker processes."""
    with seeded_data_workers(plan):
        yield


def observe_at_step_0(plan: SeedingPlan, pipeline: Any) -> list[Claim]:
    """What holds when everything is built and before the first step."""
    return [observe_data_workers(plan, pipeline.datamanager)]


def observe_after_training(plan: SeedingPlan) -> list[Claim]:
    """What holds after the last step; something may have changed it."""
    return [dataclasses.replace(flag, claim=f"{flag.claim}, after training") for flag in observe_flags(plan)]
