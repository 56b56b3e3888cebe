"""Operations without a deterministic implementation, flags that something changes, and strict mode."""

from __future__ import annotations

import dataclasses
import json
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from f3rm_verify import seeding_audit  # noqa: E402
from f3rm_verify.errors import TrainingError  # noqa: E402
from f3rm_verify.f3rm import training_audit as audit  # noqa: E402
from f3rm_verify.seeding_plan import Claim, SeedingLog, SeedingPlan  # noqa: E402

pytestmark = pytest.mark.train
PLAN = SeedingPlan()
WARNS = SeedingPlan(warn_only=True)
PIPELINE: Any = types.SimpleNamespace(datamanager=types.SimpleNamespace(), model=torch.nn.Linear(1, 1))
CLAIM = "operations without a deterministic implementation"
#: The trainer's fields that the seeding has.
FIELDS = (
    "enable_comprehensive_seeding",
    "seed_deterministic_algorithms",
    "seed_warn_only",
    "seed_cublas_workspace",
    "print_seed_info",
    "seed_strict",
)


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    yield
    torch.set_deterministic_debug_mode(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]
    torch.utils.deterministic.fill_uninitialized_memory = fills


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
    claim = claims(operations, PLAN)[CLAIM]
    assert (claim.verdict, claim.observed) == ("fails", "put_ stopped the training")
    assert "--seed-deterministic-algorithms False" in claim.remedy


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("kthvalue CUDA does not have a deterministic implementation, but you set", "kthvalue CUDA"),
        ("Flash Attention defaults to a non-deterministic algorithm. To explicitly", "Flash Attention"),
    ],
)
def test_the_names_of_operations_may_have_several_words(message: str, name: str) -> None:
    operations = audit.NondeterministicOperations()
    with warnings.catch_warnings(record=True), operations.watched():
        warnings.warn(message, UserWarning, stacklevel=1)
    assert claims(operations, WARNS)[CLAIM].observed == f"{name} warned once"


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
        (
            lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", False),
            "uninitialised memory, at step 0",
        ),
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


@dataclasses.dataclass
class Watched:
    """A training of our trainer over a stock one of the test's own, which builds and steps as it is told."""

    folder: Path
    build: Callable[[], Any] = lambda: None
    step: Callable[[], Any] = lambda: None
    seeding: Mapping[str, bool] = dataclasses.field(default_factory=dict)

    @property
    def log(self) -> Any:
        return json.loads((self.folder / "verify" / "seeding.json").read_text("utf8"))

    @property
    def failing(self) -> list[str]:
        return [entry["claim"] for entry in self.log["entries"] if entry["verdict"] == "fails"]

    def train(self) -> None:
        from f3rm_verify.f3rm.trainer import SeededTrainer

        watched = self

        class Stock:
            _start_step = 0

            def __init__(self, config: Any, *_: Any) -> None:
                self.config, self.base_dir = config, watched.folder

            def setup(self) -> None:
                watched.build()
                data = types.SimpleNamespace(get_datapath=lambda: watched.folder, next_train=lambda _: (None, {}))
                self.pipeline = types.SimpleNamespace(model=torch.nn.Linear(1, 1), datamanager=data)

            def train(self) -> None:
                self.train_iteration(0)  # type: ignore[attr-defined]

            def train_iteration(self, _: int) -> Any:
                watched.step()
                return torch.zeros(()), {}, {}

        trainer: Any = type("Trainer", (SeededTrainer, Stock), {})(self.config())
        trainer.setup()
        trainer.train()

    def config(self) -> Any:
        from f3rm_verify.f3rm.trainer import F3RMTrainerConfig

        part = types.SimpleNamespace(_target=Watched)
        return types.SimpleNamespace(
            **{name: self.seeding.get(name, getattr(F3RMTrainerConfig, name)) for name in FIELDS},
            _target=Watched,
            get_base_dir=lambda: self.folder,
            machine=types.SimpleNamespace(seed=42, machine_rank=0, num_devices=1, device_type="cpu"),
            max_num_iterations=1,
            method_name="stock",
            pipeline=part,
            encoding="auto",
        )


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the launcher would have started this process: with the hash seed in effect named in the environment."""
    monkeypatch.setattr(seeding_audit, "_fresh_hash", lambda _: str(hash(seeding_audit._HASH_PROBE)))


@pytest.mark.filterwarnings("ignore")  # nerfstudio's own, when it is imported
@pytest.mark.usefixtures("launched")
class TestTraining:
    def test_a_training_in_which_nothing_goes_wrong_holds_to_the_end(self, tmp_path: Path) -> None:
        training = Watched(tmp_path, seeding={"seed_strict": True})
        training.train()
        assert training.failing == []
        assert training.log["lines"][-1] == "✅ Reproducibility setup looks good!"
        held = {entry["claim"] for entry in training.log["entries"] if entry["verdict"] == "holds"}
        flags = ("deterministic algorithms", "uninitialised memory", "cuDNN deterministic", "cuDNN benchmark")
        assert held >= {f"{flag}{when}" for flag in flags for when in ("", ", at step 0", ", after training")}
        assert CLAIM in held

    def test_a_flag_that_the_construction_changes_is_told_then_and_stops_a_strict_training(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        steps: list[int] = []
        training = Watched(
            tmp_path,
            build=lambda: setattr(torch.backends.cudnn, "benchmark", True),
            step=lambda: steps.append(1),
            seeding={"seed_strict": True},
        )
        with pytest.raises(SystemExit) as stopped:
            training.train()
        assert (stopped.value.code, steps) == (2, [])
        assert training.failing == ["cuDNN benchmark, at step 0"]
        assert "✅ Reproducibility setup looks good!" in training.log["lines"]
        assert training.log["lines"][-1].startswith("⚠️ cuDNN benchmark, at step 0: True. ")
        assert "Strict mode stopped the training before its first step: cuDNN benchmark" in capsys.readouterr().err

    def test_without_strict_mode_it_goes_on_and_the_log_says_so_twice(self, tmp_path: Path) -> None:
        training = Watched(tmp_path, build=lambda: torch.use_deterministic_algorithms(False))
        training.train()
        name = "deterministic algorithms"
        assert training.failing == [f"{name}, at step 0", f"{name}, after training"]

    def test_a_flag_that_a_step_changes_is_seen_after_training(self, tmp_path: Path) -> None:
        training = Watched(tmp_path, step=lambda: setattr(torch.backends.cudnn, "deterministic", False))
        training.train()
        assert training.failing == ["cuDNN deterministic, after training"]

    def test_what_draws_while_building_shows_in_the_generators_at_step_0(self, tmp_path: Path) -> None:
        seen = []
        for name, build in (("cold", lambda: torch.rand(1)), ("warm", lambda: None), ("again", lambda: None)):
            training = Watched(tmp_path / name, build=build)
            training.train()
            seen += [entry["observed"] for entry in training.log["entries"] if entry["claim"] == "generators at step 0"]
        assert seen[0] != seen[1] == seen[2]

    @pytest.mark.parametrize("where", ["build", "step"])
    def test_an_operation_that_only_warns_fails_its_claim(self, tmp_path: Path, where: str) -> None:
        training = Watched(tmp_path, seeding={"seed_warn_only": True, "seed_strict": True})
        setattr(training, where, put)
        with warnings.catch_warnings(record=True):
            training.train()
        assert training.failing == [CLAIM]
        assert training.log["lines"][-1].startswith(f"⚠️ {CLAIM}: put_ warned once. ")

    @pytest.mark.parametrize("where", ["build", "step"])
    def test_an_operation_that_stops_the_training_is_in_the_log(self, tmp_path: Path, where: str) -> None:
        training = Watched(tmp_path)
        setattr(training, where, backward)
        with pytest.raises(TrainingError, match="put_ has no deterministic implementation"):
            training.train()
        assert training.failing == [CLAIM]
        assert "--seed-warn-only True" in training.log["lines"][-1]

    def test_strict_mode_holds_a_training_to_nothing_where_seeding_is_off(self, tmp_path: Path) -> None:
        built: list[int] = []
        off = {"enable_comprehensive_seeding": False, "seed_strict": True}
        training = Watched(tmp_path, build=lambda: built.append(1), seeding=off)
        with pytest.raises(SystemExit):
            training.train()
        assert built == []

    def test_brackets_in_a_line_are_no_markup(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        claim = dataclasses.replace(failing_log().entries[0], observed="[/nonsense]")
        monkeypatch.setattr(seeding_audit, "_observe_threads", lambda: claim)
        training = Watched(tmp_path)
        training.train()
        assert training.log["lines"][-1] == "⚠️ CPU threads: [/nonsense]. Set it."
