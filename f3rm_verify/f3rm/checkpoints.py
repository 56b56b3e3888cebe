"""What loading a trained run needs: by ns-eval, ns-render and ns-viewer, and by a training that resumes."""

from __future__ import annotations

import numpy as np
import torch

from f3rm_verify.f3rm.foreign_data import allow_paths_in_caches
from f3rm_verify.f3rm.lpips import degrade_lpips_offline


def prepare_loading() -> None:
    """Readies this process for a model that is built and a checkpoint that is loaded later."""
    degrade_lpips_offline()
    allow_paths_in_caches()
    allow_numpy_numbers()


def allow_numpy_numbers() -> None:
    """Lets torch 2.6 and newer load nerfstudio's checkpoints, whose learning rates are NumPy's float64.

    They are numbers without code in them. Older versions of torch load anything unless told otherwise.
    """
    if torch.__version__ < "2.6":
        return
    rebuild, (kind, _) = np.float64(0).__reduce__()
    # NumPy 2 renamed the module, and reads by its new name what was saved by the old one.
    names = [(rebuild, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    torch.serialization.add_safe_globals([np.dtype, type(kind), *names])
