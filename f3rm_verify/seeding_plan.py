"""What is asked of the seeding (the plan), what must be in the environment for it, and the form of its log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

#: 8 buffers of 4096 KiB, 32 MiB, for each cuBLAS handle and stream.
CUBLAS_WORKSPACE = ":4096:8"
CUBLAS_WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"

ClaimVerdict = Literal["holds", "fails", "not applicable"]


@dataclass(frozen=True, kw_only=True)
class SeedingPlan:
    """What is asked for. The seed of a process is `base_seed + rank`, `rank` counted over all machines from 0."""

    base_seed: int = 42
    rank: int = 0
    enabled: bool = True
    deterministic_algorithms: bool = True
    warn_only: bool = False
    cublas_workspace: bool = True
    print_info: bool = True

    @property
    def seed(self) -> int:
        """The seed of this process."""
        return self.base_seed + self.rank


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One entry of the seeding validation log: asked, set, and observed to be in effect."""

    claim: str
    asked: str
    set: str
    observed: str
    verdict: ClaimVerdict
    remedy: str = ""

    @property
    def sentence(self) -> str:
        """What is seen, and what to do about it."""
        return f"{self.claim}: {self.observed}. {self.remedy}"


def make_claim(
    name: str, asked: object, observed: object, *, set: object | None = None, remedy: str, holds: bool | None = None
) -> Claim:
    """A claim that holds when what is observed is what was asked, unless `holds` says so."""
    fine = asked == observed if holds is None else holds
    return Claim(
        claim=name,
        asked=str(asked),
        set=str(asked if set is None else set),
        observed=str(observed),
        verdict="holds" if fine else "fails",
        remedy="" if fine else remedy,
    )


def not_asked(name: str, observed: object) -> Claim:
    """A claim that nobody made: what is observed is worth knowing, and neither right nor wrong."""
    return Claim(claim=name, asked="nothing", set="nothing", observed=str(observed), verdict="not applicable")


@dataclass(kw_only=True)
class SeedingLog:
    """The seeding validation log of one process: its plan, an entry per claim, and the lines that were printed."""

    plan: SeedingPlan
    entries: list[Claim] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    @property
    def failing(self) -> list[Claim]:
        """The claims that do not hold."""
        return [entry for entry in self.entries if entry.verdict == "fails"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `seeding.json`."""
        return {
            "plan": asdict(self.plan),
            "entries": [asdict(entry) for entry in self.entries],
            "lines": list(self.lines),
        }


def child_environment(plan: SeedingPlan, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with what `plan` needs to be in it before a child's interpreter starts.

    A value that the user set stays; an empty one counts as not set, as it does for Python and for cuBLAS.
    """
    wanted = variables_of(plan)
    return {**environment, **{name: environment.get(name) or value for name, value in wanted.items()}}


def variables_of(plan: SeedingPlan) -> dict[str, str]:
    """What the plan sets in the environment. PYTHONHASHSEED takes 0 to 4294967295; other seeds are reduced to that."""
    if not plan.enabled:
        return {}
    variables = {"PYTHONHASHSEED": str(plan.base_seed % 2**32), "TCNN_SEED": str(plan.base_seed)}
    return {**variables, CUBLAS_WORKSPACE_VARIABLE: CUBLAS_WORKSPACE} if plan.cublas_workspace else variables
