"""The seeding system: a plan, the environment that a process must start with, what is set inside it, and the log.

Some settings only work if they are in the environment before the interpreter starts (`child_environment`); the others
are set in the process, after nerfstudio's own import-time settings (`apply_seeding`). What is then really in effect is
read back or probed, never assumed (`SeedingLog`).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

CUBLAS_WORKSPACE = ":4096:8"
#: The name of the string that is hashed to see which hash seed an interpreter runs with.
_HASH_PROBE = "f3rm-verify"

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


@dataclass(kw_only=True)
class SeedingLog:
    """The seeding validation log of one process: its plan, an entry per claim, and the lines that were printed."""

    plan: SeedingPlan
    entries: list[Claim] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `seeding.json`."""
        return {
            "plan": asdict(self.plan),
            "entries": [asdict(entry) for entry in self.entries],
            "lines": list(self.lines),
        }


def child_environment(plan: SeedingPlan, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with what `plan` needs to be in it before a child's interpreter starts.

    PYTHONHASHSEED takes 0 to 4294967295; a larger seed is reduced modulo 2^32. A value that the user set stays.
    """
    child = dict(environment)
    if not plan.enabled:
        return child
    child.setdefault("PYTHONHASHSEED", str(plan.base_seed % 2**32))
    child.setdefault("TCNN_SEED", str(plan.base_seed))
    if plan.cublas_workspace:
        child.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    return child


def apply_seeding(plan: SeedingPlan, *, say: Callable[[str], None]) -> SeedingLog:
    """Seeds every generator of this process and sets every flag of the plan, then looks at what is in effect.

    Call it in each training process after `nerfstudio.scripts.train` was imported (which turns cuDNN's benchmark mode
    on) and before the model and its data are built. `say` gets each printed line.
    """
    log = SeedingLog(plan=plan)

    def tell(line: str) -> None:
        log.lines.append(line)
        if plan.print_info:
            say(line)

    if not plan.enabled:
        tell("Comprehensive seeding is off: only nerfstudio's own seeds are set.")
        log.entries = observe_seeding(plan)
        return log
    tell(f"🌱 Setting comprehensive random seed: {plan.seed}")
    _set_environment(plan)
    _seed_generators(plan.seed)
    _set_flags(plan)
    tell(f"✅ Comprehensive seeding completed with seed: {plan.seed}")
    if plan.deterministic_algorithms:
        tell("🔒 Deterministic algorithms enabled" + (" (warn only)" if plan.warn_only else ""))
    log.entries = observe_seeding(plan)
    failing = [entry for entry in log.entries if entry.verdict == "fails"]
    if not failing:
        tell("✅ Reproducibility setup looks good!")
    for entry in failing:
        tell(f"⚠️ {entry.claim}: {entry.observed}. {entry.remedy}")
    return log


def _set_environment(plan: SeedingPlan) -> None:
    """For child processes, and for libraries that read these late; this process's own hash seed is fixed already."""
    for name, value in child_environment(plan, {}).items():
        os.environ.setdefault(name, value)


def _seed_generators(seed: int) -> None:
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def _set_flags(plan: SeedingPlan) -> None:
    import torch

    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if plan.deterministic_algorithms:
        torch.use_deterministic_algorithms(True, warn_only=plan.warn_only)


def observe_seeding(plan: SeedingPlan) -> list[Claim]:
    """Every claim of the plan, each with what this process shows. Draws from no generator."""
    return [
        *_observe_generators(plan),
        _observe_hash_seed(plan),
        _observe_tcnn_seed(plan),
        *observe_flags(plan),
        _observe_cublas_workspace(plan),
        _observe_threads(),
    ]


def _claim(
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


def _observe_generators(plan: SeedingPlan) -> list[Claim]:
    """Draws from a copy of each generator, and compares with the stream that the seed must give."""
    import numpy as np
    import torch

    python_copy = random.Random()
    python_copy.setstate(random.getstate())
    numpy_copy = np.random.RandomState()
    numpy_copy.set_state(np.random.get_state())
    torch_copy = torch.Generator()
    torch_copy.set_state(torch.get_rng_state())
    seed = plan.seed
    streams = {
        "python random": (python_copy.random(), random.Random(seed).random()),
        "numpy random": (
            numpy_copy.randint(2**31, size=4).tolist(),
            np.random.RandomState(seed % 2**32).randint(2**31, size=4).tolist(),
        ),
        "torch CPU generator": (
            torch.rand(4, generator=torch_copy).tolist(),
            torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist(),
        ),
    }
    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        cuda_copy = torch.Generator(f"cuda:{device}")
        cuda_copy.set_state(torch.cuda.get_rng_state(device))
        fresh = torch.Generator(f"cuda:{device}").manual_seed(seed)
        streams[f"torch CUDA generator {device}"] = (
            torch.rand(4, generator=cuda_copy, device=f"cuda:{device}").tolist(),
            torch.rand(4, generator=fresh, device=f"cuda:{device}").tolist(),
        )
    claims = []
    for name, (drawn, expected) in streams.items():
        fine = drawn == expected
        claims.append(
            _claim(
                name,
                f"the stream of seed {seed}",
                f"the stream of seed {seed}" if fine else "another stream",
                holds=fine,
                remedy="Something drew from this generator after it was seeded; seed later, or find what drew.",
            )
        )
    if not (torch.cuda.is_available() and torch.cuda.device_count()):
        claims.append(
            Claim(
                claim="torch CUDA generators",
                asked=f"the stream of seed {seed}",
                set="nothing",
                observed="no CUDA device",
                verdict="not applicable",
            )
        )
    return claims


def _observe_hash_seed(plan: SeedingPlan) -> Claim:
    """Hashes a string here and in a fresh interpreter with the hash seed that is asked for."""
    wanted = str(plan.base_seed % 2**32) if plan.enabled else os.environ.get("PYTHONHASHSEED", "random")
    if wanted == "random":
        fixed = not sys.flags.hash_randomization
        return _claim(
            "PYTHONHASHSEED",
            "nothing",
            "fixed" if fixed else "random: the order of sets of strings differs from run to run",
            holds=fixed,
            remedy="Start with PYTHONHASHSEED in the environment.",
        )
    environment = {**os.environ, "PYTHONHASHSEED": wanted}
    script = f"print(hash({_HASH_PROBE!r}))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    fine = done.stdout.strip() == str(hash(_HASH_PROBE))
    return _claim(
        "PYTHONHASHSEED",
        wanted,
        wanted if fine else "another hash seed: setting it inside a running process has no effect on that process",
        holds=fine,
        remedy=f"Start with PYTHONHASHSEED={wanted} in the environment, or through f3rm-verify run.",
    )


def _observe_tcnn_seed(plan: SeedingPlan) -> Claim:
    return Claim(
        claim="TCNN_SEED",
        asked=str(plan.base_seed) if plan.enabled else "nothing",
        set=os.environ.get("TCNN_SEED", "nothing"),
        observed="nothing reads this variable; tiny-cuda-nn's seed is a constructor argument (1337 by default)",
        verdict="not applicable",
    )


def observe_flags(plan: SeedingPlan) -> list[Claim]:
    """The flags of torch as they are now; something may have changed them since they were set."""
    import torch

    deterministic = plan.enabled and plan.deterministic_algorithms
    mode = torch.get_deterministic_debug_mode()
    wanted = (1 if plan.warn_only else 2) if deterministic else 0
    names = {0: "off", 1: "on, warns only", 2: "on"}
    flags = [
        _claim(
            "deterministic algorithms",
            names[wanted],
            names[mode],
            holds=mode == wanted,
            remedy="Something called torch.use_deterministic_algorithms after the seeding; find and remove it.",
        )
    ]
    if plan.enabled:
        for name, value, asked in (
            ("cuDNN deterministic", torch.backends.cudnn.deterministic, True),
            ("cuDNN benchmark", torch.backends.cudnn.benchmark, False),
        ):
            flags.append(
                _claim(name, asked, value, remedy="Something changed torch.backends.cudnn after the seeding.")
            )
    return flags


def _observe_cublas_workspace(plan: SeedingPlan) -> Claim:
    import torch

    asked = CUBLAS_WORKSPACE if plan.enabled and plan.cublas_workspace else "nothing"
    observed = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "nothing")
    if not torch.cuda.is_available():
        return Claim(
            claim="CUBLAS_WORKSPACE_CONFIG", asked=asked, set=observed, observed="no CUDA", verdict="not applicable"
        )
    return _claim(
        "CUBLAS_WORKSPACE_CONFIG",
        asked,
        observed,
        holds=asked == "nothing" or observed in (":4096:8", ":16:8"),
        remedy="Set it in the environment before the first use of CUDA.",
    )


def _observe_threads() -> Claim:
    import torch

    asked = os.environ.get("OMP_NUM_THREADS", "all cores")
    return Claim(
        claim="CPU threads",
        asked=asked,
        set=asked,
        observed=f"{torch.get_num_threads()} in torch: a verdict holds for this number",
        verdict="holds" if asked in ("all cores", str(torch.get_num_threads())) else "fails",
        remedy="Set OMP_NUM_THREADS before the process starts.",
    )
