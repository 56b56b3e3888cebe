"""The claims of the seeding log that only a training can show, and strict mode, which holds a training to them."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from f3rm_verify.errors import TrainingError
from f3rm_verify.f3rm.data_workers import observe_data_workers, seeded_data_workers
from f3rm_verify.f3rm.refusal import refuse
from f3rm_verify.f3rm.tcnn import observe_tcnn, seeded_tcnn
from f3rm_verify.seeding_audit import generator_digests, observe_flags
from f3rm_verify.seeding_plan import Claim, SeedingLog, SeedingPlan

#: What torch says, as a warning or as an error, of an operation that is not deterministic; the name comes first.
_ALERT = r"(.+?) (?:does not have a deterministic implementation|defaults to a non-deterministic algorithm)"
_WAY_ON = (
    "To go on, give up the guarantee for it: --seed-warn-only True, or --seed-deterministic-algorithms False for all "
    "operations. The runs may then diverge."
)
#: What older versions of torch say where cuBLAS needs its workspace configured.
_CUBLAS_ALERT = r"Deterministic behavior was enabled with .* CuBLAS"


@contextmanager
def seeded_construction(plan: SeedingPlan, *, first_batch: int = 0) -> Iterator[None]:
    """Inside, what nerfstudio builds without a seed gets one: worker processes, tiny-cuda-nn's modules."""
    with seeded_data_workers(plan, first=first_batch), seeded_tcnn(plan):
        yield


def observe_at_step_0(plan: SeedingPlan, pipeline: Any) -> list[Claim]:
    """What holds when everything is built and before the first step."""
    digests = ", ".join(f"{name} {digest}" for name, digest in generator_digests().items())
    return [
        *_flags(plan, "at step 0"),
        # Nothing is asked of these states, but two runs must have the same: else something drew while building.
        Claim(claim="generators at step 0", asked="nothing", set="nothing", observed=digests, verdict="not applicable"),
        observe_data_workers(plan, pipeline.datamanager),
        *observe_tcnn(plan, pipeline.model),
    ]


def observe_after_training(plan: SeedingPlan, operations: NondeterministicOperations) -> list[Claim]:
    """What holds after the last step; something may have changed it."""
    return [*_flags(plan, "after training"), *operations.claims(plan)]


def _flags(plan: SeedingPlan, when: str) -> list[Claim]:
    return [dataclasses.replace(flag, claim=f"{flag.claim}, {when}") for flag in observe_flags(plan)]


class NondeterministicOperations:
    """Notes the operations without a deterministic implementation that a training met."""

    def __init__(self) -> None:
        self.warned: Counter[str] = Counter()
        self.stopped: str | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, torch's warnings are counted, each operation's first one shown, and its errors explained."""
        with warnings.catch_warnings():
            warnings.filterwarnings("always", message=_ALERT)
            show = warnings.showwarning

            def note(message: Any, *others: Any, **keywords: Any) -> None:
                found = re.match(_ALERT, str(message))
                if found is not None:
                    self.warned[found[1]] += 1
                if found is None or self.warned[found[1]] == 1:
                    show(message, *others, **keywords)

            warnings.showwarning = note
            with self.explained():
                yield

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Inside, an operation at which torch stops ends in a TrainingError with its name and the ways on."""
        try:
            yield
        except RuntimeError as error:
            self._explain(error)
            raise

    def _explain(self, error: RuntimeError) -> None:
        """Raises TrainingError where torch ended the training because of an operation that is not deterministic."""
        found = re.match(_ALERT, str(error))
        if found is not None:
            self.stopped = found[1]
            why = f"{found[1]} has no deterministic implementation, so torch stopped the training."
            raise TrainingError(f"{why} {_WAY_ON}") from error
        if re.match(_CUBLAS_ALERT, str(error)):
            raise TrainingError(
                "This torch needs cuBLAS' workspace configured for determinism: train with --seed-cublas-workspace "
                "True, or with CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment."
            ) from error

    def claims(self, plan: SeedingPlan) -> list[Claim]:
        """One entry for all operations that were met; where none could be noticed, none."""
        if not (plan.enabled and plan.deterministic_algorithms):
            return []
        met = [f"{name} warned {_times(count)}" for name, count in sorted(self.warned.items())]
        met += [f"{self.stopped} stopped the training"] if self.stopped else []
        remedy = _WAY_ON if self.stopped else "Replace them in the model; until then the runs may diverge."
        return [
            Claim(
                claim="operations without a deterministic implementation",
                asked="none",
                set="torch warns of them" if plan.warn_only else "torch stops at them",
                observed=", ".join(met) or "none",
                verdict="fails" if met else "holds",
                remedy=remedy if met else "",
            )
        ]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def end_if_strict(log: SeedingLog, *, strict: bool) -> None:
    """Ends the process with one sentence where strict mode is on and a claim does not hold.

    Where comprehensive seeding is off there are no claims, and so nothing that strict mode could hold a training to. An
    operation that only warns is noticed while training: it fails its claim in the log, too late for strict mode.
    """
    if not strict or (log.plan.enabled and not log.failing):
        return
    failing = "; ".join(claim.sentence for claim in log.failing)
    why = failing if log.plan.enabled else "comprehensive seeding is off, so nothing is claimed that could hold."
    refuse(f"Strict mode stopped the training before its first step: {why}")
