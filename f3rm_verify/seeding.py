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

    A value that the user set stays; an empty one counts as not set, as it does for Python and for cuBLAS.
    """
    wanted = _variables(plan)
    return {**environment, **{name: environment.get(name) or value for name, value in wanted.items()}}


def _variables(plan: SeedingPlan) -> dict[str, str]:
    """What the plan sets in the environment. PYTHONHASHSEED takes 0 to 4294967295; other seeds are reduced to that."""
    if not plan.enabled:
        return {}
    variables = {"PYTHONHASHSEED": str(plan.base_seed % 2**32), "TCNN_SEED": str(plan.base_seed)}
    return {**variables, "CUBLAS_WORKSPACE_CONFIG": CUBLAS_WORKSPACE} if plan.cublas_workspace else variables


def apply_seeding(plan: SeedingPlan, *, say: Callable[[str], None]) -> SeedingLog:
    """Seeds every generator of this process and sets every flag of the plan, then looks at what is in effect.

    Call it in each training process after `nerfstudio.scripts.train` was imported (which turns cuDNN's benchmark mode
    on) and before the model and its data are built. `say` gets each printed line, without the characters that standard
    output cannot show: printing must not end a training.
    """
    log = SeedingLog(plan=plan)

    def tell(line: str) -> None:
        log.lines.append(line)
        if plan.print_info:
            say(_showable(line))

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


def _showable(line: str) -> str:
    """`line` without the characters that standard output's encoding lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "ignore").decode(encoding).strip()


def _set_environment(plan: SeedingPlan) -> None:
    """For child processes, and for libraries that read these late; this process's own hash seed is fixed already."""
    os.environ.update(child_environment(plan, os.environ))


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


def _not_asked(name: str, observed: object) -> Claim:
    """A claim that nobody made: what is observed is worth knowing, and neither right nor wrong."""
    return Claim(claim=name, asked="nothing", set="nothing", observed=str(observed), verdict="not applicable")


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
    """Hashes a string here and in a fresh interpreter with the hash seed that the environment names by now."""
    name = "PYTHONHASHSEED"
    wanted = os.environ.get(name) or _variables(plan).get(name)
    if wanted is None:
        observed = "random: the order of sets of strings differs from run to run"
        return _not_asked(name, observed)
    if _fresh_hash(wanted) == str(hash(_HASH_PROBE)):
        return _claim(name, wanted, wanted, remedy="")
    value = wanted if wanted.isdigit() else str(plan.base_seed % 2**32)
    return _claim(
        name,
        wanted,
        "another hash seed: setting it inside a running process has no effect on that process",
        holds=False,
        remedy=f"Start with PYTHONHASHSEED={value} in the environment, or through f3rm-verify run.",
    )


def _fresh_hash(hash_seed: str) -> str | None:
    """What a fresh interpreter with this hash seed hashes the probe to; None where none can be started."""
    try:
        done = subprocess.run(
            [sys.executable, "-S", "-c", f"print(hash({_HASH_PROBE!r}))"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


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

    mode = {0: "off", 1: "on, warns only", 2: "on"}[torch.get_deterministic_debug_mode()]
    cudnn = torch.backends.cudnn
    flags = (("cuDNN deterministic", cudnn.deterministic, True), ("cuDNN benchmark", cudnn.benchmark, False))
    if not plan.enabled:
        return [_not_asked("deterministic algorithms", mode), *(_not_asked(name, value) for name, value, _ in flags)]
    changed = "Something changed torch.backends.cudnn after the seeding; find and remove it."
    return [
        _observe_deterministic_algorithms(plan, mode),
        *(_claim(name, asked, value, remedy=changed) for name, value, asked in flags),
    ]


def _observe_deterministic_algorithms(plan: SeedingPlan, mode: str) -> Claim:
    name = "deterministic algorithms"
    if not plan.deterministic_algorithms:
        return _not_asked(name, mode)
    return _claim(
        name,
        "on, warns only" if plan.warn_only else "on",
        mode,
        remedy="Something called torch.use_deterministic_algorithms after the seeding; find and remove it.",
    )


def _observe_cublas_workspace(plan: SeedingPlan) -> Claim:
    import torch

    name = "CUBLAS_WORKSPACE_CONFIG"
    asked = _variables(plan).get(name)
    observed = os.environ.get(name) or "nothing"
    if asked is None:
        return _not_asked(name, observed)
    if not torch.cuda.is_available():
        return Claim(claim=name, asked=asked, set=observed, observed="no CUDA", verdict="not applicable")
    # torch's pull request 161749 took the requirement, and this name, out: it gives each stream a workspace of its own.
    needed = name in (torch.use_deterministic_algorithms.__doc__ or name)
    return _claim(
        name,
        asked,
        observed if needed else f"{observed}; this torch does not need it",
        set=observed,
        holds=not needed or observed in (":4096:8", ":16:8"),
        remedy="Set it to :4096:8 in the environment before the first use of CUDA.",
    )


def _observe_threads() -> Claim:
    import torch

    threads = str(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS") or "all cores"
    return _claim(
        "CPU threads",
        asked,
        f"{threads} in torch: a verdict holds for this number",
        # A list gives the numbers of nested levels; torch uses the first.
        holds=asked == "all cores" or asked.split(",")[0].strip() == threads,
        remedy="Set OMP_NUM_THREADS before the process starts.",
    )
