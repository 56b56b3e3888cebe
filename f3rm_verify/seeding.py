"""Seeds a process as planned, and says what is then in effect.

Some settings only work if they are in the environment before the interpreter starts (`child_environment`); the others
are set here, after nerfstudio's own import-time settings. What is then really in effect is probed (`seeding_audit`).
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable

from f3rm_verify import launch_variables
from f3rm_verify.seeding_audit import observe_seeding
from f3rm_verify.seeding_plan import (
    CUBLAS_WORKSPACE_VARIABLE,
    Claim,
    SeedingLog,
    SeedingPlan,
    child_environment,
    variables_of,
)


def apply_seeding(plan: SeedingPlan, *, say: Callable[[str], None]) -> SeedingLog:
    """Seeds every generator of this process and sets every flag of the plan, then looks at what is in effect.

    Call it in each training process after `nerfstudio.scripts.train` was imported (which turns cuDNN's benchmark mode
    on) and before the model and its data are built. `say` gets each printed line, without the characters that standard
    output cannot show: printing must not end a training.
    """
    log = SeedingLog(plan=plan)

    def tell(line: str) -> None:
        tell_line(log, line, say=say)

    for name in _take_back(plan):
        tell(f"{name} was set by f3rm-verify, and is not wanted by this configuration: it is taken out again.")
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
    if not log.failing:
        tell("✅ Reproducibility setup looks good!")
    for entry in log.failing:
        tell(warning_line(entry))
    return log


def warning_line(claim: Claim) -> str:
    """What is printed about a claim that does not hold."""
    return f"⚠️ {claim.sentence}"


def tell_line(log: SeedingLog, line: str, *, say: Callable[[str], None]) -> None:
    """Adds a line to the log, and prints it unless the plan is not to."""
    log.lines.append(line)
    if log.plan.print_info:
        say(_showable(line))


def _showable(line: str) -> str:
    """`line` without the characters that standard output's encoding lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "ignore").decode(encoding).strip()


def _take_back(plan: SeedingPlan) -> list[str]:
    """Takes out of the environment what the launcher set for the seeding and the plan does not want; their names.

    The launcher knows the plan only from the command line, not from the configuration. The hash seed stays: taking the
    variable away would only hide that it is fixed.
    """
    set_by_launcher = os.environ.get(launch_variables.SEEDING_SET, "").split(",")
    unwanted = {CUBLAS_WORKSPACE_VARIABLE, "TCNN_SEED"} - variables_of(plan).keys()
    taken = [name for name in set_by_launcher if name in unwanted and name in os.environ]
    for name in taken:
        del os.environ[name]
    return taken


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
