"""What is seen on a GPU that is not there, and what a difference between two audits means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_runs import FakeRun, claim, compare_fakes

from f3rm_verify import seeding_audit as audit
from f3rm_verify.difference import Outcome
from f3rm_verify.seeding_plan import SeedingPlan

PLAN = SeedingPlan(base_seed=42)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One CUDA device; the state of its generator is what a test puts into `gpu.state`."""
    torch = pytest.importorskip("torch")

    class Generator:
        state = (7, 0)

        def manual_seed(self, seed: int) -> Generator:
            self.state = (seed, 0)
            return self

        def get_state(self) -> Any:
            return torch.tensor(self.state)

    default, of_the_cpu = Generator(), torch.Generator
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: default.get_state())
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": of_the_cpu() if device == "cpu" else Generator())
    return default


def on_gpu() -> Any:
    claims = {entry.claim: entry for entry in audit._observe_generators(PLAN)}
    return claims["torch CUDA generator 0"]


@pytest.mark.parametrize(
    ("state", "verdict"), [((42, 0), "holds"), ((42, 4), "fails"), ((43, 0), "fails")], ids=["seeded", "drew", "other"]
)
def test_a_generator_on_a_gpu_is_seen_by_its_seed_and_offset(gpu: Any, state: Any, verdict: str) -> None:
    gpu.state = state
    assert on_gpu().verdict == verdict
    assert bool(on_gpu().remedy) == (verdict == "fails")


def test_its_digest_is_among_the_others(gpu: Any) -> None:
    before = audit.generator_digests()
    gpu.state = (7, 4)
    after = audit.generator_digests()
    assert [name for name in before if before[name] != after[name]] == ["cuda:0"]


@pytest.mark.usefixtures("gpu")
def test_libraries_of_a_gpu_are_told_by_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(audit.metadata, "version", {"nvidia-cublas": "13.2.1"}.__getitem__)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 1))
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    told = audit._libraries()
    assert told.startswith(f"torch {torch.__version__}, ")
    assert told.endswith("MKL_CBWR COMPATIBLE, CUDA 13.2, cuBLAS 13.2.1, cuDNN 91000, NCCL 2.27.1")


def test_cublas_without_a_package_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: str) -> str:
        raise audit.metadata.PackageNotFoundError

    monkeypatch.setattr(audit.metadata, "version", none)
    assert audit._cublas() == "of the system"
    packages = {"nvidia-cublas-cu12": "12.4"}
    monkeypatch.setattr(audit.metadata, "version", lambda name: packages[name] if name in packages else none(name))
    assert audit._cublas() == "12.4"


class TestTwoAudits:
    """The states of the generators at step 0: a cold cache draws where a warm one does not."""

    @staticmethod
    def run(state: str) -> FakeRun:
        run = FakeRun()
        run.seeding["entries"].append(claim("generators at step 0", state, "not applicable"))
        return run

    def test_equal_states_are_no_difference(self, tmp_path: Path) -> None:
        assert compare_fakes(tmp_path, self.run("a"), self.run("a")).outcome is Outcome.REPRODUCIBLE

    def test_states_that_differ_alone_say_nothing(self, tmp_path: Path) -> None:
        assert compare_fakes(tmp_path, self.run("a"), self.run("b")).outcome is Outcome.INCONCLUSIVE

    def test_states_that_differ_explain_a_divergence(self, tmp_path: Path) -> None:
        candidate = self.run("b")
        candidate.scalars["Train Loss"][3] += 1.0
        result = compare_fakes(tmp_path, self.run("a"), candidate)
        assert result.outcome is Outcome.DIVERGED
        assert result.first_divergence is not None
        assert "generators at step 0: a (not applicable) in the reference, b" in result.first_divergence.cause
