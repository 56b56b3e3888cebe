"""Operations without a deterministic implementation, flags that something changes, and strict mode."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from f3rm_verify.errors import TrainingError  # noqa: E402
from f3rm_verify.f3rm import training_audit as audit  # noqa: E402
from f3rm_verify.seeding_plan import Claim, SeedingLog, SeedingPlan  # noqa: E402

pytestmark = pytest.mark.train
PLAN = SeedingPlan()
WARNS = SeedingPlan(warn_only=True)
PIPELINE: Any = types.SimpleNamespace(datamanager=types.SimpleNamespace(), model=torch.nn.Linear(1, 1))
CLAIM = "operations without a deterministic implementation"


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    yield
    torch.set_deterministic_debug_mode(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]


def put() -> None:
    """On a CPU, put_ writes in any order where an index comes twice."""
    torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))


class PutInBackward(torch.autograd.Function):  # type: ignore[name-defined, misc]
    @staticmethod
    def forward(_: Any, values: Any) -> Any:
        return values * 2

    @staticmethod
    def backward(_: Any, gradient: Any) -> Any:
        put()
        return gradient


def backward() -> None:
    PutInBackward.apply(torch.ones(2, requires_grad=True)).sum().backward()


def claims(operations: Any, plan: SeedingPlan) -> dict[str, Claim]:
    return {claim.claim: claim for claim in operations.claims(plan)}


@pytest.mark.parametrize("operate", [put, backward])
def test_operations_that_warn_are_counted_and_shown_once(operate: Any) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    operations = audit.NondeterministicOperations()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        with operations.watched():
            for _ in range(3):
                operate()
            warnings.warn("something else", UserWarning, stacklevel=1)
    assert [str(warning.message).split()[0] for warning in shown] == ["put_", "something"]
    claim = claims(operations, WARNS)[CLAIM]
    assert (claim.verdict, claim.observed) == ("fails", "put_ warned 3 times")
    assert claim.remedy


@pytest.mark.parametrize("operate", [put, backward])
def test_an_operation_that_stops_the_training_is_named_with_the_way_on(operate: Any) -> None:
    operations = audit.NondeterministicOperations()
    expected = pytest.raises(TrainingError, match=r"put_ has no deterministic .* --seed-warn-only True")
    with expected, operations.watched():
        operate()
    assert claims(operations, PLAN)[CLAIM].observed == "put_ stopped the training"


def test_other_failures_stay_what_they_are() -> None:
    operations = audit.NondeterministicOperations()
    with pytest.raises(RuntimeError, match="mine"), operations.watched():
        raise RuntimeError("mine")
    assert claims(operations, PLAN)[CLAIM].verdict == "holds"


def test_what_cublas_wants_is_said() -> None:
    message = (
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or ..., but this "
        "operation is not deterministic because it uses CuBLAS and you have CUDA >= 10.2."
    )
    expected = pytest.raises(TrainingError, match="--seed-cublas-workspace")
    with expected, audit.NondeterministicOperations().watched():
        raise RuntimeError(message)


def test_where_torch_was_not_asked_nothing_is_claimed() -> None:
    operations = audit.NondeterministicOperations()
    assert operations.claims(SeedingPlan(enabled=False)) == []
    assert operations.claims(SeedingPlan(deterministic_algorithms=False)) == []


def observed(plan: SeedingPlan = PLAN) -> dict[str, Claim]:
    return {claim.claim: claim for claim in audit.observe_at_step_0(plan, PIPELINE)}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda: torch.use_deterministic_algorithms(False), "deterministic algorithms, at step 0"),
        (lambda: setattr(torch.backends.cudnn, "benchmark", True), "cuDNN benchmark, at step 0"),
        (lambda: setattr(torch.backends.cudnn, "deterministic", False), "cuDNN deterministic, at step 0"),
    ],
)
def test_a_flag_that_the_construction_changed_fails_at_step_0(change: Any, name: str) -> None:
    assert {claim.verdict for claim in observed().values()} == {"holds", "not applicable"}
    change()
    assert [claim.claim for claim in observed().values() if claim.verdict == "fails"] == [name]


def test_the_generators_at_step_0_show_who_drew_and_draw_nothing_themselves() -> None:
    import random

    import numpy as np

    torch.manual_seed(1)
    first = observed()["generators at step 0"]
    assert observed()["generators at step 0"] == first
    assert first.verdict == "not applicable"
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        before = observed()["generators at step 0"].observed
        draw()
        assert observed()["generators at step 0"].observed != before


def failing_log(**plan: Any) -> SeedingLog:
    claim = Claim(claim="CPU threads", asked="2", set="2", observed="1", verdict="fails", remedy="Set it.")
    return SeedingLog(plan=SeedingPlan(**plan), entries=[claim])


def test_strict_mode_stops_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        audit.end_if_strict(failing_log(), strict=True)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "before its first step: CPU threads: 1. Set it." in errors


def test_strict_mode_lets_pass_what_holds_and_refuses_what_claims_nothing() -> None:
    audit.end_if_strict(failing_log(), strict=False)
    audit.end_if_strict(SeedingLog(plan=PLAN), strict=True)
    with pytest.raises(SystemExit):
        audit.end_if_strict(SeedingLog(plan=SeedingPlan(enabled=False)), strict=True)
