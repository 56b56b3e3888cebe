"""What is seen to be in effect of a seeding plan: generators, hash seed, flags, libraries, threads.

Observed means probed: a generator is compared with the stream that the seed must give, a string is hashed here and in a
fresh interpreter, flags are read back. Nothing here draws from a generator or changes a flag.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import sys
from importlib import metadata
from typing import Any

from f3rm_verify.seeding_plan import CUBLAS_WORKSPACE_VARIABLE, Claim, SeedingPlan, make_claim, not_asked, variables_of

#: The name of the string that is hashed to see which hash seed an interpreter runs with.
_HASH_PROBE = "f3rm-verify"
#: As torch.__config__.show() names them.
_CPU_LIBRARIES = (r"Math Kernel Library Version [\d.]+", r"MKL-DNN v[\d.]+", r"CPU capability usage: \w+")


def observe_seeding(plan: SeedingPlan) -> list[Claim]:
    """Every claim of the plan, each with what this process shows. Draws from no generator."""
    return [
        *_observe_generators(plan),
        _observe_hash_seed(plan),
        _observe_tcnn_seed(plan),
        *observe_flags(plan),
        _observe_cublas_workspace(plan),
        _observe_threads(),
        not_asked("float32 precision", _float32_precision()),
        not_asked("libraries", _libraries()),
    ]


def generator_digests() -> dict[str, str]:
    """A digest of the state of each generator of this process, by name; draws from none."""
    import numpy as np
    import torch

    numpy_state: Any = np.random.get_state()
    _, key, *others = numpy_state
    states = {
        "python": repr(random.getstate()).encode(),
        # Among the others is the second one of a pair of normal numbers, where only the first was drawn.
        "numpy": repr((key.tolist(), others)).encode(),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        states[f"cuda:{device}"] = torch.cuda.get_rng_state(device).cpu().numpy().tobytes()
    return {name: hashlib.blake2b(state, digest_size=8).hexdigest() for name, state in states.items()}


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
        # Its state is a seed and an offset, so it says all; drawing would cost every rank memory on every GPU.
        fresh = torch.Generator(f"cuda:{device}").manual_seed(seed)
        streams[f"torch CUDA generator {device}"] = (
            torch.cuda.get_rng_state(device).tolist(),
            fresh.get_state().tolist(),
        )
    claims = []
    for name, (drawn, expected) in streams.items():
        fine = drawn == expected
        claims.append(
            make_claim(
                name,
                f"stream of seed {seed}",
                f"stream of seed {seed}" if fine else "another stream",
                holds=fine,
                remedy="Something drew from this generator after it was seeded; seed later, or find what drew.",
            )
        )
    if not (torch.cuda.is_available() and torch.cuda.device_count()):
        claims.append(
            Claim(
                claim="torch CUDA generators",
                asked=f"stream of seed {seed}",
                set="nothing",
                observed="no CUDA device",
                verdict="not applicable",
            )
        )
    return claims


def _observe_hash_seed(plan: SeedingPlan) -> Claim:
    """Hashes a string here and in a fresh interpreter with the hash seed that the environment names by now."""
    name = "PYTHONHASHSEED"
    given = os.environ.get(name)
    wanted = given or str(plan.base_seed % 2**32)
    in_effect = _fresh_hash(wanted) == str(hash(_HASH_PROBE))
    if not plan.enabled:
        at_random = "random: the order of sets of strings differs from run to run"
        fixed = f"{given}: fixed by the environment, although seeding is off"
        return not_asked(name, fixed if given and in_effect else at_random)
    if in_effect:
        return make_claim(name, wanted, wanted, remedy="")
    value = wanted if wanted.isdigit() else str(plan.base_seed % 2**32)
    return make_claim(
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
        observed="nothing reads this variable"
        + ("; the trainer gives the seed to tiny-cuda-nn's constructors" if plan.enabled else ""),
        verdict="not applicable",
    )


def observe_flags(plan: SeedingPlan) -> list[Claim]:
    """The flags of torch as they are now; something may have changed them since they were set."""
    import torch

    mode = {0: "off", 1: "on, warns only", 2: "on"}[torch.get_deterministic_debug_mode()]
    cudnn = torch.backends.cudnn
    flags = (("cuDNN deterministic", cudnn.deterministic, True), ("cuDNN benchmark", cudnn.benchmark, False))
    fills = torch.utils.deterministic.fill_uninitialized_memory
    if not plan.enabled:
        return [not_asked("deterministic algorithms", mode), *(not_asked(name, value) for name, value, _ in flags)]
    changed = "Something changed torch.backends.cudnn after the seeding; find and remove it."
    return [
        _observe_deterministic_algorithms(plan, mode),
        *([_observe_filling(fills)] if plan.deterministic_algorithms else []),
        *(make_claim(name, asked, value, remedy=changed) for name, value, asked in flags),
    ]


def _observe_deterministic_algorithms(plan: SeedingPlan, mode: str) -> Claim:
    name = "deterministic algorithms"
    if not plan.deterministic_algorithms:
        return not_asked(name, mode)
    return make_claim(
        name,
        "on, warns only" if plan.warn_only else "on",
        mode,
        remedy="Something called torch.use_deterministic_algorithms after the seeding; find and remove it.",
    )


def _observe_filling(fills: bool) -> Claim:
    return make_claim(
        "uninitialised memory",
        "filled",
        "filled" if fills else "as it was: whatever lay there can be read",
        holds=fills,
        remedy="Something switched torch.utils.deterministic.fill_uninitialized_memory off; find and remove it.",
    )


def _observe_cublas_workspace(plan: SeedingPlan) -> Claim:
    import torch

    name = CUBLAS_WORKSPACE_VARIABLE
    asked = variables_of(plan).get(name)
    observed = os.environ.get(name) or "nothing"
    if asked is None:
        return not_asked(name, observed)
    if not torch.cuda.is_available():
        return Claim(claim=name, asked=asked, set=observed, observed="no CUDA", verdict="not applicable")
    # torch's pull request 161749 took the requirement, and this name, out: it gives each stream a workspace of its own.
    needed = name in (torch.use_deterministic_algorithms.__doc__ or name)
    return make_claim(
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
    return make_claim(
        "CPU threads",
        asked,
        f"{threads} in torch, {torch.get_num_interop_threads()} between operations: a verdict holds for these numbers",
        # A list gives the numbers of nested levels; torch uses the first.
        holds=asked == "all cores" or asked.split(",")[0].strip() == threads,
        remedy="Set OMP_NUM_THREADS before the process starts.",
    )


def _float32_precision() -> str:
    """How exact float32 products are: TF32 keeps 10 of 23 bits, on GPUs that have it."""
    from torch import backends

    try:
        modes = {
            "cuBLAS": backends.cuda.matmul.fp32_precision,
            "cuDNN": backends.cudnn.conv.fp32_precision,
            "oneDNN": backends.mkldnn.matmul.fp32_precision,
        }
    except AttributeError:
        # Before torch 2.9. Since then the old names must not be read: they raise where the new ones were set.
        allowed = {"cuBLAS": backends.cuda.matmul.allow_tf32, "cuDNN": backends.cudnn.allow_tf32}
        modes = {name: "tf32" if allows else "none" for name, allows in allowed.items()}
    shown = [f"{name} {'full' if mode == 'none' else mode}" for name, mode in modes.items()]
    return f"{', '.join(shown)}; NVIDIA_TF32_OVERRIDE {os.environ.get('NVIDIA_TF32_OVERRIDE') or 'not set'}"


def _libraries() -> str:
    """The libraries that choose kernels, by version."""
    import torch

    build = torch.__config__.show()
    found = [match[0] for pattern in _CPU_LIBRARIES if (match := re.search(pattern, build))]
    found += [f"{name} {os.environ[name]}" for name in ("MKL_CBWR", "ONEDNN_DEFAULT_FPMATH_MODE") if name in os.environ]
    if not torch.cuda.is_available():
        return ", ".join([f"torch {torch.__version__}", *found, "no CUDA device"])
    versions = {"CUDA": torch.version.cuda, "cuBLAS": _cublas(), "cuDNN": torch.backends.cudnn.version()}
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return ", ".join([f"torch {torch.__version__}", *found, *(f"{name} {value}" for name, value in versions.items())])


def _cublas() -> str:
    """The version of the package that torch takes cuBLAS from; its name ends with CUDA's version in some."""
    versions = (_version(f"nvidia-cublas{cuda}") for cuda in ("", "-cu13", "-cu12", "-cu11"))
    return next(filter(None, versions), "of the system")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
