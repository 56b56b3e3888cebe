"""The flight recorder on trainers of nerfstudio's kind, made of torch alone, and what methods do to them."""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from f3rm_verify.compare_trace import compare_trace  # noqa: E402
from f3rm_verify.difference import Difference, Verdict  # noqa: E402
from f3rm_verify.f3rm.digests import Digester  # noqa: E402
from f3rm_verify.f3rm.flight_recorder import make_recorder, wanted_mode  # noqa: E402
from f3rm_verify.readers.trace import Trace  # noqa: E402
from f3rm_verify.run_dir import RunDir  # noqa: E402

pytestmark = pytest.mark.train
STEPS = 6
Location = Enum("Location", "BEFORE_TRAIN_ITERATION AFTER_TRAIN_ITERATION")


class Data:
    """A data manager, whose batches come from torch's generator."""

    def next_train(self, step: int) -> tuple[Any, Any]:
        return torch.randn(8, 3), {"image": torch.randn(8, 1), "indices": torch.randint(9, (8, 3))}

    def next_eval(self, step: int) -> tuple[Any, Any]:
        return torch.randn(2, 3), {"image": torch.randn(2, 1)}


class Pipeline(torch.nn.Module):  # type: ignore[name-defined, misc]
    def __init__(self, data: Any) -> None:
        super().__init__()
        self.datamanager = data
        self._model = torch.nn.ModuleDict({"fields": torch.nn.Linear(3, 4), "head": torch.nn.Linear(4, 1)})
        self.register_buffer("count", torch.zeros(()))
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    def get_train_loss_dict(self, step: int) -> tuple[Any, Any, Any]:
        rays, batch = self.datamanager.next_train(step)
        hidden = torch.relu(self._model["fields"](rays)) + 0.01 * torch.randn(4)
        outputs = {"rgb": self._model["head"](hidden), "samples": [hidden, {"depth": hidden.sum(1)}]}
        loss = ((outputs["rgb"] - batch["image"]) ** 2).mean()
        return outputs, {"rgb_loss": loss, "norm": 1e-3 * hidden.square().mean()}, {}

    def get_eval_loss_dict(self, step: int) -> Any:
        return self.datamanager.next_eval(step)


class Callback:
    def __init__(self, location: Location, call: Callable[[int], object]) -> None:
        self.where_to_run, self.call = [location], call

    def run_callback_at_location(self, step: int, location: Location) -> None:
        if location in self.where_to_run:
            self.call(step)


class Trainer:
    """Nerfstudio's loop. `accumulate` is by group, as from version 1.0 on."""

    device = "cpu"

    def __init__(self, *, accumulate: dict[str, int] | None = None, max_norm: float | None = None) -> None:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        self._start_step = 0
        self.pipeline: Any = Pipeline(Data())
        groups = {name: list(module.parameters()) for name, module in self.pipeline._model.items()}
        optimizers = {name: torch.optim.Adam(parameters, lr=0.01) for name, parameters in groups.items()}
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in optimizers.values()]
        self.optimizers: Any = types.SimpleNamespace(optimizers=optimizers, parameters=groups, schedulers=schedulers)
        self.grad_scaler: Any = torch.amp.GradScaler("cpu", enabled=False)
        self.accumulate, self.max_norm = accumulate or {}, max_norm
        self.callbacks: list[Any] = []
        self.between: Callable[[int], object] = lambda step: None
        self.scale: Callable[[Any, int], Any] = lambda loss, step: loss

    def train_iteration(self, step: int) -> Any:
        for name, optimizer in self.optimizers.optimizers.items():
            if step % self.accumulate.get(name, 1) == 0:
                optimizer.zero_grad()
        _, losses, metrics = self.pipeline.get_train_loss_dict(step=step)
        loss = sum(losses.values())
        self.grad_scaler.scale(self.scale(loss, step)).backward()
        for name, optimizer in self.optimizers.optimizers.items():
            often = self.accumulate.get(name, 1)
            if step % often == often - 1:
                if self.max_norm is not None:
                    self.grad_scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(self.optimizers.parameters[name], self.max_norm)
                self.grad_scaler.step(optimizer)
        self.grad_scaler.update()
        for scheduler in self.optimizers.schedulers:
            scheduler.step()
        return loss, losses, metrics

    def eval_iteration(self, step: int) -> None:
        if step % 3 == 2:
            self.pipeline.get_eval_loss_dict(step=step)

    def save_checkpoint(self, step: int) -> None:
        pass

    def train(self, steps: int = STEPS) -> None:
        for step in range(steps):
            for callback in self.callbacks:
                callback.run_callback_at_location(step, location=Location.BEFORE_TRAIN_ITERATION)
            self.train_iteration(step)
            for callback in self.callbacks:
                callback.run_callback_at_location(step, location=Location.AFTER_TRAIN_ITERATION)
            self.between(step)
            self.eval_iteration(step)
        self.save_checkpoint(steps - 1)


def recorded(path: Path, trainer: Any, *, mode: str = "steps") -> Trace:
    """The trace of a training."""
    recorder = make_recorder(trainer, path, mode=mode)
    recorder.attach()
    whole = False
    try:
        trainer.train()
        whole = True
    finally:
        recorder.close(complete=whole)
    trace = RunDir(path).trace
    assert trace is not None
    assert trace.problem is None
    return trace


def names(trace: Trace, step: int, stage: str) -> list[str]:
    """What was recorded of a stage in a step; -1 for what was before."""
    return [subject.name for subject, _ in trace.frame_records(step + 1) if subject.stage == stage]


def values(trace: Trace, stage: str, name: str) -> list[int]:
    found = []
    for step in range(STEPS):
        found += [v for subject, v in trace.frame_records(step + 1) if (subject.stage, subject.name) == (stage, name)]
    return found


def difference(path: Path, change: Callable[[Trainer], object], **options: Any) -> Difference:
    """The comparison of a training with one that was changed."""
    for name in ("reference", "candidate"):
        trainer = Trainer(**options)
        if name == "candidate":
            change(trainer)
        recorded(path / name, trainer)
    return compare_trace(RunDir(path / "reference"), RunDir(path / "candidate"))


def place(node: Difference) -> tuple[Any, ...]:
    return tuple(node.measures.get(key) for key in ("first_step", "last_equal_step", "stage", "subject"))


def test_a_step_is_recorded_in_causal_order(tmp_path: Path) -> None:
    trace = recorded(tmp_path, Trainer())
    assert trace.steps.tolist() == [0, *range(STEPS)]
    assert trace.complete
    assert trace.not_recorded == {}
    stages = dict.fromkeys(subject.stage for subject, _ in trace.frame_records(1))
    assert list(stages) == ["rng", "batch", "forward", "loss", "grad", "params", "schedule"]
    assert names(trace, 0, "rng") == [
        "python",
        "numpy",
        "torch cpu",
        "torch cpu after batch",
        "torch cpu after forward",
    ]
    assert names(trace, 0, "batch") == ["rays", "image", "indices"]
    assert names(trace, 0, "forward") == ["rgb", "samples"]
    assert names(trace, 0, "loss") == ["rgb_loss", "norm"]
    assert names(trace, 0, "grad") == ["fields", "head"]
    state = [*("fields", "fields (optimizer)", "head", "head (optimizer)"), "other parameters", "buffers"]
    assert names(trace, 0, "params") == names(trace, -1, "init") == state
    assert names(trace, 0, "schedule") == ["learning rate fields", "learning rate head"]
    assert names(trace, 0, "eval") == []
    assert names(trace, 2, "eval") == ["rays", "torch cpu after evaluation"]
    assert len(set(values(trace, "schedule", "learning rate head"))) == STEPS


@pytest.mark.parametrize("mode", ["steps", "tensors"])
def test_it_changes_nothing_and_draws_nothing(tmp_path: Path, mode: str) -> None:
    plain, watched = Trainer(max_norm=0.5), Trainer(max_norm=0.5)
    plain.train()
    expected = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    watched = Trainer(max_norm=0.5)
    recorded(tmp_path, watched, mode=mode)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == expected[1:]  # type: ignore[index]
    for (name, a), (_, b) in zip(
        plain.pipeline.state_dict().items(), watched.pipeline.state_dict().items(), strict=True
    ):
        assert a.numpy().tobytes() == b.numpy().tobytes(), name


def test_afterwards_the_trainer_is_as_it_was(tmp_path: Path) -> None:
    trainer = Trainer()
    trainer.callbacks = [Callback(Location.AFTER_TRAIN_ITERATION, lambda step: None)]
    own = trainer.pipeline.datamanager.next_train = lambda step: Data.next_train(trainer.pipeline.datamanager, step)
    parts = (trainer, trainer.pipeline, trainer.pipeline.datamanager, *trainer.callbacks)
    before = [set(vars(part)) for part in parts]
    recorded(tmp_path, trainer)
    assert [set(vars(part)) for part in parts] == before
    assert trainer.pipeline.datamanager.next_train is own
    assert not any(one._optimizer_step_pre_hooks for one in trainer.optimizers.optimizers.values())


def test_two_trainings_are_equal(tmp_path: Path) -> None:
    assert difference(tmp_path, lambda trainer: None).verdict is Verdict.IDENTICAL


def move(trainer: Trainer, step: int, part: str = "fields") -> Callable[[int], None]:
    """Moves a weight by one ulp after a step."""

    def call(now: int) -> None:
        if now == step:
            weight = trainer.pipeline._model[part].weight.data
            weight.view(torch.int32)[0, 0] ^= 1

    return call


def at(step: int, action: Callable[[], object]) -> Callable[[int], object]:
    return lambda now: action() if now == step else None


class TestPlaces:
    """What is planted is found in its step, stage and subject."""

    def test_a_parameter_after_a_step(self, tmp_path: Path) -> None:
        def plant(trainer: Trainer) -> None:
            trainer.callbacks = [Callback(Location.AFTER_TRAIN_ITERATION, move(trainer, 3))]

        assert place(difference(tmp_path, plant)) == (3, 2, "params", "fields")

    def test_a_buffer(self, tmp_path: Path) -> None:
        def plant(trainer: Trainer) -> None:
            trainer.between = at(1, lambda: trainer.pipeline.count.add_(1))

        assert place(difference(tmp_path, plant)) == (1, 0, "params", "buffers")

    def test_a_gradient(self, tmp_path: Path) -> None:
        def plant(trainer: Trainer) -> None:
            step = {"now": -1}

            def hook(gradient: Any) -> Any:
                step["now"] += 1
                return gradient * (1 + 2**-20) if step["now"] == 2 else gradient

            trainer.pipeline._model["head"].weight.register_hook(hook)

        assert place(difference(tmp_path, plant)) == (2, 1, "grad", "head")

    def test_a_batch(self, tmp_path: Path) -> None:
        def plant(trainer: Trainer) -> None:
            original = trainer.pipeline.datamanager.next_train

            def next_train(step: int) -> Any:
                rays, batch = original(step)
                batch["image"] = batch["image"] + (step == 4) * 1e-3
                return rays, batch

            trainer.pipeline.datamanager.next_train = next_train

        assert place(difference(tmp_path, plant)) == (4, 3, "batch", "image")

    @pytest.mark.parametrize(
        ("draw", "generator"),
        [(random.random, "python"), (np.random.randn, "numpy"), (lambda: torch.rand(1), "torch cpu")],
    )
    def test_who_draws_between_steps(self, tmp_path: Path, draw: Callable[[], object], generator: str) -> None:
        def callback(trainer: Trainer) -> None:
            trainer.callbacks = [Callback(Location.AFTER_TRAIN_ITERATION, at(1, draw))]

        def user_code(trainer: Trainer) -> None:
            trainer.between = at(1, draw)

        found = place(difference(tmp_path / "callback", callback))
        assert found == (1, 0, "rng", f"{generator} after callbacks")
        found = place(difference(tmp_path / "user", user_code))
        assert found == (1, 0, "rng", f"{generator} after between steps")

    def test_an_evaluation_that_draws_more(self, tmp_path: Path) -> None:
        def plant(trainer: Trainer) -> None:
            trainer.eval_iteration = lambda step: (Trainer.eval_iteration(trainer, step), at(2, torch.seed)(step))  # type: ignore[method-assign, assignment, func-returns-value]

        assert place(difference(tmp_path, plant)) == (2, 1, "eval", "torch cpu after evaluation")

    def test_initial_weights(self, tmp_path: Path) -> None:
        assert place(difference(tmp_path, lambda trainer: move(trainer, 0, "head")(0))) == (0, None, "init", "head")

    def test_a_learning_rate(self, tmp_path: Path) -> None:
        def plant(trainer: Trainer) -> None:
            group = trainer.optimizers.optimizers["head"].param_groups[0]
            trainer.between = at(3, lambda: group.update(lr=group["lr"] * (1 + 2**-50)))

        assert place(difference(tmp_path, plant)) == (3, 2, "schedule", "learning rate head")

    def test_the_optimizers_state(self, tmp_path: Path) -> None:
        def plant(trainer: Trainer) -> None:
            optimizer, weight = trainer.optimizers.optimizers["fields"], trainer.pipeline._model["fields"].weight
            trainer.between = at(3, lambda: optimizer.state[weight]["exp_avg"].mul_(1.5))

        assert place(difference(tmp_path, plant)) == (3, 2, "params", "fields (optimizer)")


class TestTrainers:
    @pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # nerfstudio does so
    def test_gradients_that_accumulate_are_recorded_in_every_step(self, tmp_path: Path) -> None:
        trace = recorded(tmp_path, Trainer(accumulate={"fields": 3}))
        assert len(set(values(trace, "grad", "fields"))) == len(set(values(trace, "grad", "head"))) == STEPS
        parameters = values(trace, "params", "fields")
        assert [a == b for a, b in zip(parameters, parameters[1:], strict=False)] == [True, False, True, True, False]

    def test_several_batches_in_a_step_have_numbers(self, tmp_path: Path) -> None:
        """As nerfstudio 0.3.4 accumulates."""
        trainer = Trainer()

        def train_iteration(step: int) -> Any:
            for optimizer in trainer.optimizers.optimizers.values():
                optimizer.zero_grad()
            for _ in range(2):
                _, losses, metrics = trainer.pipeline.get_train_loss_dict(step=step)
                (sum(losses.values()) / 2).backward()
            for optimizer in trainer.optimizers.optimizers.values():
                optimizer.step()
            return 0, losses, metrics

        trainer.train_iteration = train_iteration  # type: ignore[method-assign]
        trace = recorded(tmp_path, trainer)
        assert names(trace, 1, "batch") == [*("rays", "image", "indices"), *("rays #2", "image #2", "indices #2")]
        assert names(trace, 1, "loss") == ["rgb_loss", "norm", "rgb_loss #2", "norm #2"]
        assert names(trace, 1, "grad") == ["fields", "head"]

    def test_a_clipped_gradient_is_recorded_as_the_optimizer_sees_it(self, tmp_path: Path) -> None:
        trainer, seen = Trainer(max_norm=1e-3), []

        def look(optimizer: Any, *_: Any) -> None:
            gradients = [(f"0.{i}", p.grad) for i, p in enumerate(optimizer.param_groups[0]["params"])]
            seen.append(Digester().digest(gradients))

        trainer.optimizers.optimizers["head"].register_step_pre_hook(look)
        assert values(recorded(tmp_path, trainer), "grad", "head") == seen

    def test_a_step_that_the_scaler_skips_keeps_its_gradients(self, tmp_path: Path) -> None:
        def overflowing(step: int) -> Callable[[Trainer], None]:
            def plant(trainer: Trainer) -> None:
                trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
                trainer.scale = lambda loss, now: loss * float("inf") if now == step else loss

            return plant

        trainer = Trainer()
        overflowing(2)(trainer)
        trace = recorded(tmp_path / "one", trainer)
        parameters = values(trace, "params", "fields")
        assert [a == b for a, b in zip(parameters, parameters[1:], strict=False)] == [False, True, False, False, False]
        assert len(values(trace, "grad", "fields")) == STEPS
        scaler = values(trace, "schedule", "grad scaler")
        assert scaler[2] != scaler[1]
        assert all(names(trace, step, "schedule")[-1] == "grad scaler" for step in range(STEPS))
        both = []
        for step in (2, 99):
            trainer = Trainer()
            overflowing(step)(trainer)
            recorded(tmp_path / str(step), trainer)
            both.append(RunDir(tmp_path / str(step)))
        assert place(compare_trace(*both)) == (2, 1, "grad", "fields")

    def test_a_method_that_takes_no_batches_from_its_data_manager(self, tmp_path: Path) -> None:
        def plant(trainer: Trainer) -> None:
            def losses(step: int) -> Any:
                hidden = trainer.pipeline._model["fields"](torch.ones(1, 3))
                return {}, {"loss": trainer.pipeline._model["head"](hidden).sum()}, {}

            trainer.pipeline.get_train_loss_dict = losses

        trainer = Trainer()
        plant(trainer)
        trace = recorded(tmp_path / "one", trainer)
        assert set(trace.not_recorded) == {"batch"}
        assert "next_train" in trace.not_recorded["batch"]
        for name in ("a", "b"):
            trainer = Trainer()
            plant(trainer)
            recorded(tmp_path / name, trainer)
        node = compare_trace(RunDir(tmp_path / "a"), RunDir(tmp_path / "b"))
        assert node.verdict is Verdict.IDENTICAL
        (batch,) = (child for child in node.children if child.name == "batch")
        assert batch.verdict is Verdict.IGNORED

    def test_a_trainer_with_a_step_of_its_own(self, tmp_path: Path) -> None:
        trainer = Trainer()

        def train_iteration(step: int) -> Any:
            trainer.pipeline._model["fields"].weight.data.mul_(0.9)
            return 0, {}, {}

        trainer.train_iteration = train_iteration  # type: ignore[method-assign]
        trainer.optimizers = types.SimpleNamespace()
        trace = recorded(tmp_path, trainer)
        assert set(trace.not_recorded) == {"batch", "forward", "loss", "grad", "schedule"}
        assert names(trace, 0, "params") == ["other parameters", "buffers"]
        assert len(set(values(trace, "params", "other parameters"))) == STEPS

    def test_parameters_that_a_method_replaces_are_followed(self, tmp_path: Path) -> None:
        """As gsplat's strategies do when they add and remove Gaussians."""
        trainer = Trainer()

        def grow(step: int) -> None:
            new = torch.nn.Parameter(torch.full((step + 1, 2), float(step)))
            trainer.optimizers.optimizers["head"].param_groups[0]["params"][0] = new

        trainer.callbacks = [Callback(Location.AFTER_TRAIN_ITERATION, grow)]
        assert len(set(values(recorded(tmp_path, trainer), "params", "head"))) == STEPS

    def test_every_tensor_by_its_name(self, tmp_path: Path) -> None:
        trace = recorded(tmp_path, Trainer(), mode="tensors")
        gradients = ["fields: _model.fields.weight", "fields: _model.fields.bias"]
        assert names(trace, 0, "grad")[:2] == gradients
        assert "fields: _model.fields.weight.exp_avg (optimizer)" in names(trace, 0, "params")
        assert "other parameters: frozen" in names(trace, 0, "params")
        assert "buffers: count" in names(trace, 0, "params")

    def test_it_names_the_tensor(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            trainer = Trainer()
            if name == "b":
                trainer.callbacks = [Callback(Location.AFTER_TRAIN_ITERATION, move(trainer, 3))]
            recorded(tmp_path / name, trainer, mode="tensors")
        node = compare_trace(RunDir(tmp_path / "a"), RunDir(tmp_path / "b"))
        assert place(node) == (3, 2, "params", "fields: _model.fields.weight")


def test_what_other_threads_call_is_not_recorded(tmp_path: Path) -> None:
    trainer = Trainer()

    def save_elsewhere(step: int) -> None:
        thread = threading.Thread(target=lambda: (trainer.save_checkpoint(step), trainer.eval_iteration(2)))
        thread.start()
        thread.join()

    trainer.callbacks = [Callback(Location.BEFORE_TRAIN_ITERATION, save_elsewhere)]
    trace = recorded(tmp_path, trainer)
    assert [names(trace, step, "eval") for step in (0, 1)] == [[], []]


def test_a_training_that_fails_leaves_the_steps_before(tmp_path: Path) -> None:
    trainer = Trainer()

    def fail() -> None:
        raise RuntimeError("mine")

    trainer.callbacks = [Callback(Location.AFTER_TRAIN_ITERATION, at(3, fail))]
    with pytest.raises(RuntimeError, match="mine"):
        recorded(tmp_path, trainer)
    trace = RunDir(tmp_path).trace
    assert trace is not None
    assert (trace.steps.tolist(), trace.complete, trace.problem) == ([0, 0, 1, 2], False, None)


def test_steps_are_on_disk_as_soon_as_they_are_flushed(tmp_path: Path) -> None:
    trainer = Trainer()
    recorder = make_recorder(trainer, tmp_path, mode="steps")
    recorder.attach()
    trainer.between = lambda step: recorder.flush()
    trainer.train()
    trace = RunDir(tmp_path).trace
    assert trace is not None
    assert trace.steps.tolist() == [0, *range(STEPS - 1)]
    assert not trace.complete
    recorder.close(complete=False)


@pytest.fixture(autouse=True)
def generators() -> Iterator[None]:
    states: Any = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.mark.parametrize(("value", "mode"), [("", "steps"), ("steps", "steps"), ("tensors", "tensors"), ("off", "off")])
def test_what_to_record_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch, value: str, mode: str) -> None:
    monkeypatch.setenv("F3RM_VERIFY_TRACE", value)
    assert wanted_mode() == mode


@pytest.mark.parametrize("value", ["step", "Steps", "1", "tensors "])
def test_another_word_ends_the_process_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv("F3RM_VERIFY_TRACE", value)
    with pytest.raises(SystemExit) as ended:
        wanted_mode()
    assert ended.value.code == 2
    assert f"F3RM_VERIFY_TRACE={value} is none of off, steps, tensors; give one of them" in capsys.readouterr().err
