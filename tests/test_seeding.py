"""The seeding system: what must be in the environment, what is set in the process, and what the log says of both.

torch takes seconds to import and its flags belong to a process, so everything that needs it happens in one process,
started as the launcher starts a training.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from f3rm_verify.seeding_plan import SeedingLog, SeedingPlan, child_environment

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
VARIABLES = ("PYTHONHASHSEED", "TCNN_SEED", "CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS")
ROOT = str(Path(__file__).resolve().parents[1])
GUIDE_LINES = [
    "🌱 Setting comprehensive random seed: 42",
    "✅ Comprehensive seeding completed with seed: 42",
    "🔒 Deterministic algorithms enabled",
    "✅ Reproducibility setup looks good!",
]
GENERATORS = ("python random", "numpy random", "torch CPU generator")


class TestChildEnvironment:
    def test_everything_that_must_be_there_before_the_interpreter_starts(self) -> None:
        assert child_environment(SeedingPlan(base_seed=7), {"HOME": "/home"}) == {
            "HOME": "/home",
            "PYTHONHASHSEED": "7",
            "TCNN_SEED": "7",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }

    def test_what_the_user_set_stays_and_what_is_empty_counts_as_not_set(self) -> None:
        given = {"PYTHONHASHSEED": "random", "TCNN_SEED": "", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
        child = child_environment(SeedingPlan(base_seed=7), given)
        assert child == {"PYTHONHASHSEED": "random", "TCNN_SEED": "7", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
        assert given["TCNN_SEED"] == ""

    @pytest.mark.parametrize("seed", [2**32 + 5, 2**64, -1])
    def test_a_large_seed_still_starts_an_interpreter(self, seed: int) -> None:
        child = child_environment(SeedingPlan(base_seed=seed), {})
        assert 0 <= int(child["PYTHONHASHSEED"]) < 2**32
        assert child["TCNN_SEED"] == str(seed)

    def test_ranks_share_the_hash_seed(self) -> None:
        plan = SeedingPlan(base_seed=7, rank=3)
        assert plan.seed == 10
        assert child_environment(plan, {})["PYTHONHASHSEED"] == "7"

    def test_seeding_that_is_off_and_a_workspace_that_is_not_wanted(self) -> None:
        assert child_environment(SeedingPlan(enabled=False), {"A": "b"}) == {"A": "b"}
        assert "CUBLAS_WORKSPACE_CONFIG" not in child_environment(SeedingPlan(cublas_workspace=False), {})


def test_a_log_is_plain_data() -> None:
    log = SeedingLog(plan=SeedingPlan(), lines=["🌱"]).to_dict()
    assert json.loads(json.dumps(log)) == log
    assert log["plan"]["base_seed"] == 42


SCRIPT = """
import dataclasses, io, json, os, random, sys, types
sys.path.insert(0, {root!r})
# Turning determinism on loads torch's compiler, to tell it too: seconds that change nothing here.
for name in ("torch._inductor", "torch._inductor.config"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torch._inductor"].config = sys.modules["torch._inductor.config"]
import numpy as np, torch
from f3rm_verify import seeding, seeding_audit, seeding_plan
from f3rm_verify.recorder import digest_tensors
from f3rm_verify.seeding import apply_seeding
from f3rm_verify.seeding_audit import observe_flags, observe_seeding
from f3rm_verify.seeding_plan import SeedingPlan

found = {{}}
started_with = dict(os.environ)

def states():
    return [repr(random.getstate()), repr(np.random.get_state()), torch.get_rng_state().tolist()]

def scenario(name, then=lambda: None, **plan):
    os.environ.clear(); os.environ.update(started_with)
    torch.use_deterministic_algorithms(False)
    # As nerfstudio.scripts.train leaves it.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
    random.seed(1); np.random.seed(1); torch.manual_seed(1)
    plan, said = SeedingPlan(**plan), []
    log = apply_seeding(plan, say=said.append)
    then()
    before = states()
    claims = observe_seeding(plan)
    found[name] = dict(
        said=said, lines=log.lines, untouched=states() == before,
        log={{entry.claim: vars(entry) for entry in log.entries}},
        claims={{entry.claim: vars(entry) for entry in claims}},
        later=[entry.claim for entry in observe_flags(plan) if entry.verdict == "fails"],
        deterministic=torch.are_deterministic_algorithms_enabled(),
        warns=torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn=[torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark],
        drawn=[random.random(), np.random.rand(), torch.rand(1).item()],
        environment={{key: os.environ.get(key) for key in {variables!r}}},
    )

scenario("default")
scenario("again")
scenario("another seed", base_seed=43)
scenario("rank", rank=1)
scenario("large", base_seed=2**32 + 42)
scenario("warn only", warn_only=True)
scenario("not deterministic", deterministic_algorithms=False)
scenario("no workspace", cublas_workspace=False)
started_with["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
scenario("workspace of the user", cublas_workspace=False)
started_with["F3RM_VERIFY_SEEDING_SET"] = "TCNN_SEED,CUBLAS_WORKSPACE_CONFIG"
scenario("workspace of the launcher", cublas_workspace=False)
scenario("off in the configuration", enabled=False)
del started_with["F3RM_VERIFY_SEEDING_SET"]
scenario("silent", print_info=False)
scenario("off", enabled=False)
scenario("python drew", random.random)
scenario("numpy drew", np.random.rand)
scenario("torch drew", lambda: torch.rand(1))
scenario("switched off", lambda: torch.use_deterministic_algorithms(False))
scenario("benchmark", lambda: setattr(torch.backends.cudnn, "benchmark", True))
scenario("not filled", lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", False))
torch.utils.deterministic.fill_uninitialized_memory = True
# The old names of these settings must not be read any more then.
torch.backends.cuda.matmul.allow_tf32 = True
scenario("TF32")
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
started_with["NVIDIA_TF32_OVERRIDE"] = "0"
scenario("TF32 by the new names")
del started_with["NVIDIA_TF32_OVERRIDE"]

# One normal number of a pair, then the other: only what is kept of the pair changes.
pairs = []
np.random.seed(1)
for _ in range(3):
    pairs.append(seeding_audit.generator_digests())
    np.random.randn()
found["pairs"] = pairs
scenario("set too late", lambda: os.environ.update(PYTHONHASHSEED="5"))
executable, sys.executable = sys.executable, "/nowhere/python"
scenario("no interpreter")
sys.executable = executable
del started_with["PYTHONHASHSEED"]
scenario("too late", base_seed=99)
started_with["PYTHONHASHSEED"] = "42"
scenario("one thread", lambda: torch.set_num_threads(1))
scenario("list of threads", lambda: (torch.set_num_threads(2), os.environ.update(OMP_NUM_THREADS="2,1")))

real, sys.stdout = sys.stdout, io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="strict")
apply_seeding(SeedingPlan(), say=print)
sys.stdout.flush()
found["latin-1"], sys.stdout = sys.stdout.buffer.getvalue().decode("latin-1").splitlines(), real

torch.cuda.is_available, workspaces = lambda: True, {{}}
for documented in (True, False):
    torch.use_deterministic_algorithms.__doc__ = "CUBLAS_WORKSPACE_CONFIG" if documented else "nothing"
    for value in ("", ":4096:8", ":16:8", ":0:0"):
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = value
        claim = seeding_audit._observe_cublas_workspace(SeedingPlan())
        workspaces[f"{{value}} {{documented}}"] = (claim.verdict, claim.observed, claim.remedy)
found["workspaces"] = workspaces

one = torch.arange(4.0)
found["digests"] = [digest_tensors(tensors) for tensors in (
    [("a", one)], [("a", one.clone())], [("a", one.half())], [("a", one.reshape(2, 2))], [("b", one)],
    [("a", one.flip(0))], [("a", one[:2]), ("b", one[2:])], [("a", torch.tensor([0.0, 1, 2, 3.0000002]))],
    [("a", -one.new_zeros(4))], [("a", one.new_zeros(4))], [], [("a", one[:0])],
)]
strided = torch.arange(8.0)[::2]
same = digest_tensors([("a", strided)]) == digest_tensors([("a", strided.contiguous())])
kinds = [torch.tensor(True), torch.ones(2).bfloat16(), torch.nn.Parameter(torch.ones(2)), torch.tensor(1)]
found["digest of strides"] = same and all(digest_tensors([("a", kind)]) for kind in kinds)
json.dump(found, sys.stdout)
"""


def python(script: str, **variables: str) -> Any:
    """What `script` prints as JSON in an interpreter of which only `variables` are known to be set."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**environment, **variables}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def launched() -> Any:
    """What was observed in a process that was started as the launcher starts one."""
    script = SCRIPT.format(root=ROOT, variables=VARIABLES)
    return python(script, **child_environment(SeedingPlan(), {}), OMP_NUM_THREADS="2")


def failing(claims: dict[str, Any]) -> list[str]:
    return [name for name, claim in claims.items() if claim["verdict"] == "fails"]


@needs_torch
class TestLaunched:
    def test_the_lines_are_those_of_the_guide(self, launched: dict[str, Any]) -> None:
        assert launched["default"]["said"] == launched["default"]["lines"] == GUIDE_LINES

    def test_every_claim_holds_or_does_not_apply(self, launched: dict[str, Any]) -> None:
        claims = launched["default"]["log"]
        assert failing(claims) == []
        assert {name for name, claim in claims.items() if claim["verdict"] == "holds"} >= {
            *GENERATORS,
            "PYTHONHASHSEED",
            "deterministic algorithms",
            "uninitialised memory",
            "cuDNN deterministic",
            "cuDNN benchmark",
            "CPU threads",
        }
        assert claims["TCNN_SEED"]["verdict"] == "not applicable"
        assert not any(claim["remedy"] for claim in claims.values())
        assert launched["default"]["later"] == []

    def test_one_seed_gives_one_stream_and_another_seed_another(self, launched: dict[str, Any]) -> None:
        assert launched["default"]["drawn"] == launched["again"]["drawn"]
        assert all(a != b for a, b in zip(launched["default"]["drawn"], launched["another seed"]["drawn"], strict=True))

    def test_looking_draws_nothing(self, launched: dict[str, Any]) -> None:
        scenarios = [value for value in launched.values() if isinstance(value, dict) and "untouched" in value]
        assert len(scenarios) > 15
        assert all(value["untouched"] for value in scenarios)

    def test_a_rank_has_the_next_seed(self, launched: dict[str, Any]) -> None:
        assert launched["rank"]["lines"][0] == "🌱 Setting comprehensive random seed: 43"
        assert launched["rank"]["drawn"] == launched["another seed"]["drawn"]
        assert failing(launched["rank"]["log"]) == []

    def test_a_seed_of_more_than_32_bits_reaches_every_generator(self, launched: dict[str, Any]) -> None:
        large, small = launched["large"], launched["default"]
        assert failing(large["log"]) == []
        assert large["drawn"][0] != small["drawn"][0]
        # NumPy takes 32 bits; torch takes more, and its generator on the CPU uses 32 of them.
        assert large["drawn"][1:] == small["drawn"][1:]

    @pytest.mark.parametrize(
        ("name", "deterministic", "warns", "cudnn"),
        [
            ("default", True, False, [True, False]),
            ("warn only", True, True, [True, False]),
            ("not deterministic", False, False, [True, False]),
            ("no workspace", True, False, [True, False]),
            ("silent", True, False, [True, False]),
            ("off", False, False, [False, True]),
        ],
    )
    def test_each_flag_has_its_effect_and_no_other(
        self, launched: dict[str, Any], name: str, deterministic: bool, warns: bool, cudnn: list[bool]
    ) -> None:
        seen = launched[name]
        assert (seen["deterministic"], seen["warns"], seen["cudnn"]) == (deterministic, warns, cudnn)
        assert failing(seen["log"]) == ([] if name != "off" else [*GENERATORS])

    def test_the_lines_say_what_was_enabled(self, launched: dict[str, Any]) -> None:
        assert "🔒 Deterministic algorithms enabled (warn only)" in launched["warn only"]["lines"]
        assert not any("Deterministic" in line for line in launched["not deterministic"]["lines"])
        assert launched["silent"]["said"] == []
        assert launched["silent"]["lines"] == GUIDE_LINES
        assert launched["off"]["lines"] == ["Comprehensive seeding is off: only nerfstudio's own seeds are set."]

    def test_what_nobody_asked_for_neither_holds_nor_fails(self, launched: dict[str, Any]) -> None:
        claims = launched["off"]["log"]
        assert claims["deterministic algorithms"] == {
            "claim": "deterministic algorithms",
            "asked": "nothing",
            "set": "nothing",
            "observed": "off",
            "verdict": "not applicable",
            "remedy": "",
        }
        assert claims["cuDNN benchmark"]["observed"] == "True"
        assert launched["not deterministic"]["log"]["deterministic algorithms"]["verdict"] == "not applicable"
        assert launched["no workspace"]["log"]["CUBLAS_WORKSPACE_CONFIG"]["asked"] == "nothing"

    @pytest.mark.parametrize(
        ("name", "claims"),
        [
            ("python drew", ["python random"]),
            ("numpy drew", ["numpy random"]),
            ("torch drew", ["torch CPU generator"]),
            ("switched off", ["deterministic algorithms"]),
            ("benchmark", ["cuDNN benchmark"]),
            ("set too late", ["PYTHONHASHSEED"]),
            ("not filled", ["uninitialised memory"]),
            ("one thread", ["CPU threads"]),
        ],
    )
    def test_what_changes_after_the_seeding_fails_with_a_remedy(
        self, launched: dict[str, Any], name: str, claims: list[str]
    ) -> None:
        assert failing(launched[name]["claims"]) == claims
        assert launched[name]["claims"][claims[0]]["remedy"]

    def test_flags_are_seen_again_after_training(self, launched: dict[str, Any]) -> None:
        assert launched["switched off"]["later"] == ["deterministic algorithms"]
        assert launched["benchmark"]["later"] == ["cuDNN benchmark"]

    def test_a_workspace_that_the_configuration_does_not_want_goes_but_not_the_users_own(
        self, launched: dict[str, Any]
    ) -> None:
        name = "CUBLAS_WORKSPACE_CONFIG"
        assert launched["workspace of the user"]["environment"][name] == ":4096:8"
        assert launched["workspace of the launcher"]["environment"][name] is None
        assert launched["workspace of the launcher"]["environment"]["TCNN_SEED"] == "42"
        assert launched["workspace of the launcher"]["lines"][0].startswith(f"{name} was set by f3rm-verify")
        assert launched["workspace of the user"]["lines"] == GUIDE_LINES

    def test_seeding_that_only_the_configuration_switches_off_leaves_the_hash_seed_and_says_so(
        self, launched: dict[str, Any]
    ) -> None:
        seen = launched["off in the configuration"]
        left = {name: value for name, value in seen["environment"].items() if value is not None}
        assert left == {"PYTHONHASHSEED": "42", "OMP_NUM_THREADS": "2"}
        assert [line.split()[0] for line in seen["lines"]] == ["TCNN_SEED", "CUBLAS_WORKSPACE_CONFIG", "Comprehensive"]
        claim = seen["log"]["PYTHONHASHSEED"]
        assert (claim["asked"], claim["verdict"]) == ("nothing", "not applicable")
        assert claim["observed"] == "42: fixed by the environment, although seeding is off"

    def test_the_state_of_a_generator_is_all_of_it(self, launched: dict[str, Any]) -> None:
        numpy = [digests.pop("numpy") for digests in launched["pairs"]]
        assert len(set(numpy)) == 3
        assert launched["pairs"][0] == launched["pairs"][2]

    def test_precision_and_libraries_are_told_and_not_judged(self, launched: dict[str, Any]) -> None:
        claims = launched["default"]["log"]
        assert {claims[name]["verdict"] for name in ("float32 precision", "libraries")} == {"not applicable"}
        assert claims["float32 precision"]["observed"].startswith("cuBLAS full, cuDNN tf32")
        assert claims["float32 precision"]["observed"].endswith("NVIDIA_TF32_OVERRIDE not set")
        told = launched["TF32"]["log"]["float32 precision"]["observed"]
        assert told.startswith("cuBLAS tf32, ")
        told = launched["TF32 by the new names"]["log"]["float32 precision"]["observed"]
        assert told.startswith("cuBLAS tf32, ") and told.endswith("NVIDIA_TF32_OVERRIDE 0")
        assert claims["libraries"]["observed"].startswith("torch ")

    def test_the_first_level_of_threads_counts(self, launched: dict[str, Any]) -> None:
        assert failing(launched["list of threads"]["claims"]) == []

    def test_a_probe_that_cannot_run_fails_the_claim_and_nothing_else(self, launched: dict[str, Any]) -> None:
        assert failing(launched["no interpreter"]["claims"]) == ["PYTHONHASHSEED"]

    def test_an_output_without_emojis_ends_nothing(self, launched: dict[str, Any]) -> None:
        assert launched["latin-1"] == [line[2:] for line in GUIDE_LINES]

    def test_the_workspace_is_needed_where_torch_says_so(self, launched: dict[str, Any]) -> None:
        seen = launched["workspaces"]
        verdicts = {name: verdict for name, (verdict, _, _) in seen.items()}
        assert [name for name, verdict in verdicts.items() if verdict == "fails"] == [" True", ":0:0 True"]
        assert "does not need it" in seen[" False"][1]
        assert "before the first use of CUDA" in seen[":0:0 True"][2]

    def test_a_digest_of_tensors_sees_every_bit_name_type_and_shape(self, launched: dict[str, Any]) -> None:
        one, copy, *others = launched["digests"]
        assert one == copy
        assert len({one, *others}) == len(others) + 1
        assert launched["digest of strides"] is True

    def test_a_hash_seed_that_comes_too_late_is_told(self, launched: dict[str, Any]) -> None:
        seen = launched["too late"]
        assert failing(seen["log"]) == ["PYTHONHASHSEED"]
        assert seen["lines"][1] == "✅ Comprehensive seeding completed with seed: 99"
        assert seen["lines"][3].startswith("⚠️ PYTHONHASHSEED: ")
        assert len(seen["lines"]) == 4

    def test_lines_hold_no_markup(self, launched: dict[str, Any]) -> None:
        # nerfstudio's console would take brackets for styles.
        lines = [*launched["default"]["lines"], *launched["too late"]["lines"], *launched["off"]["lines"]]
        assert not any("[" in line for line in lines)


class TestHashSeed:
    """Needs no torch, so that each is a process of its own."""

    SCRIPT = f"""
import json, os, sys
sys.path.insert(0, {ROOT!r})
from f3rm_verify import seeding, seeding_audit, seeding_plan
plan = seeding_plan.SeedingPlan(enabled=ENABLED)
seeding._set_environment(plan)
heavy = sorted({{"numpy", "torch"}} & set(sys.modules))
print(json.dumps([vars(seeding_audit._observe_hash_seed(plan)), dict(os.environ), heavy]))
"""

    def claim(self, *, enabled: bool = True, **variables: str) -> tuple[dict[str, str], dict[str, str]]:
        claim, environment, heavy = python(self.SCRIPT.replace("ENABLED", str(enabled)), **variables)
        assert heavy == []
        return claim, environment

    def test_by_hand_it_comes_too_late_and_the_log_says_how_to_start(self) -> None:
        claim, environment = self.claim()
        assert claim["verdict"] == "fails"
        assert claim["asked"] == claim["set"] == "42"
        assert "no effect on that process" in claim["observed"]
        assert "PYTHONHASHSEED=42" in claim["remedy"]
        # For what this process starts, it is not too late.
        assert {name: environment.get(name) for name in VARIABLES if name != "OMP_NUM_THREADS"} == {
            "PYTHONHASHSEED": "42",
            "TCNN_SEED": "42",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }

    def test_the_users_own_holds(self) -> None:
        claim, environment = self.claim(PYTHONHASHSEED="7")
        assert (claim["verdict"], claim["asked"], claim["observed"]) == ("holds", "7", "7")
        assert environment["PYTHONHASHSEED"] == "7"

    def test_random_on_purpose_fails(self) -> None:
        claim, _ = self.claim(PYTHONHASHSEED="random")
        assert claim["verdict"] == "fails"
        assert "PYTHONHASHSEED=42" in claim["remedy"]

    def test_without_comprehensive_seeding_it_is_only_observed(self) -> None:
        claim, environment = self.claim(enabled=False)
        assert (claim["verdict"], claim["asked"]) == ("not applicable", "nothing")
        assert claim["observed"].startswith("random")
        assert "PYTHONHASHSEED" not in environment
        claim, _ = self.claim(enabled=False, PYTHONHASHSEED="0")
        assert (claim["verdict"], claim["observed"][:8]) == ("not applicable", "0: fixed")
        assert self.claim(enabled=False, PYTHONHASHSEED="random")[0]["observed"].startswith("random")
