"""Records what a training does, step by step, by standing between its parts; of any trainer of nerfstudio's kind.

It hangs on instances, after `setup()`: the loop of nerfstudio, and where the recorder stands in it (<):

    for step in ...:
        callbacks                                   < who draws
        trainer.train_iteration(step):              < rng: the generators before the step
            pipeline.get_train_loss_dict(step):
                datamanager.next_train(step)        < batch
                the model                           < forward, loss
            backward
            optimizer.step() of each group          < grad, as the optimizer sees it
        callbacks                                   < who draws
        trainer.eval_iteration(step)                < params and schedule first; then eval: what it reads and draws
        trainer.save_checkpoint(step)               < who draws

It changes nothing: it draws from no generator, keeps no tensor beyond the step, and waits for no device.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from f3rm_verify import launch_variables
from f3rm_verify.f3rm.digests import Digester, Fetched, Unfinished, algorithm, items, leaves
from f3rm_verify.f3rm.generators import Generators
from f3rm_verify.f3rm.refusal import refuse
from f3rm_verify.trace_format import AFTER, BEFORE_TRAINING, DIGEST, MODES, NUMBERS, STEP
from f3rm_verify.trace_writer import TraceWriter

BETWEEN = "between steps"
#: Frames that may wait for a device before the recorder waits with them.
_MOST_WAITING = 64
_MAX_NAME = 400
#: Stage, subject, what the value is, the value.
_Pending = tuple[str, str, str, "int | Unfinished"]


class FlightRecorder:
    """Records one training from `attach` to `close`, into a trace of mode "steps" or "tensors"."""

    def __init__(self, trainer: Any, writer: TraceWriter, *, tensors: bool) -> None:
        self._trainer, self._writer, self._tensors = trainer, writer, tensors
        self._digester, self._generators = Digester(), Generators()
        self._undo: list[Callable[[], object]] = []
        self._waiting: deque[tuple[int, int, list[_Pending], Fetched | None]] = deque()
        self._thread = threading.get_ident()
        self._open: _Frame | None = None
        self._phases = [BETWEEN]
        self._recorded_stages: set[str] = set()
        self._stepped = False

    def attach(self) -> None:
        """Hangs on the parts of the trainer, and records the state before the first step."""
        trainer = self._trainer
        self._thread = threading.get_ident()
        self._generators.drawn(thorough=True)
        self._open = _Frame(BEFORE_TRAINING, trainer._start_step)
        self._add_state("init")
        self._replace(trainer, "train_iteration", self._train_iteration)
        self._replace(trainer, "eval_iteration", self._eval_iteration)
        self._replace(trainer, "save_checkpoint", self._in_phase("checkpoint", after_step=True))
        if getattr(trainer, "viewer_state", None) is not None:
            self._replace(trainer, "_update_viewer_state", self._in_phase("viewer", after_step=False))
        pipeline = trainer.pipeline
        self._replace(pipeline, "get_train_loss_dict", self._get_train_loss_dict)
        data = getattr(pipeline, "datamanager", None)
        self._replace(data, "next_train", self._next_train)
        self._replace(data, "next_eval", self._next_eval("rays"))
        self._replace(data, "next_eval_image", self._next_eval("image"))
        for callback in getattr(trainer, "callbacks", ()):
            around = self._callback(getattr(callback, "where_to_run", None))
            self._replace(callback, "run_callback_at_location", around)
        for group, optimizer in self._optimizers():
            if hasattr(optimizer, "register_step_pre_hook"):
                hook = functools.partial(self._before_optimizer, group)
                self._undo.append(optimizer.register_step_pre_hook(hook).remove)

    def detach(self) -> None:
        """Takes itself out of the trainer, which is then as it was."""
        while self._undo:
            self._undo.pop()()

    def flush(self) -> None:
        """Puts on disk what is known by now."""
        self._write(wait=False)
        self._writer.flush()

    def close(self, *, complete: bool) -> None:
        """Ends the trace; `complete` where the training came to its end, so that its last step is one."""
        self.detach()
        if complete:
            self.end_step()
        self._write(wait=True)
        self._writer.close(self._not_recorded() if self._stepped else {}, complete=complete)

    def _replace(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Puts `around(original, ...)` in the place of a method, on the instance alone."""
        original = getattr(owner, name, None)
        if not callable(original):
            return
        mine = vars(owner).get(name)

        @functools.wraps(original)
        def recorded(*arguments: Any, **keywords: Any) -> Any:
            # Another thread (a viewer that saves a checkpoint) would record into the middle of a step.
            if threading.get_ident() != self._thread:
                return original(*arguments, **keywords)
            return around(original, *arguments, **keywords)

        setattr(owner, name, recorded)
        self._undo.append(lambda: delattr(owner, name) if mine is None else setattr(owner, name, mine))

    # What is recorded, in the order in which it happens.

    def _train_iteration(self, original: Callable[..., Any], step: int, *others: Any, **keywords: Any) -> Any:
        if self._open is None or self._open.kind != STEP or self._open.step != step:
            self.end_step()
            self._open = _Frame(STEP, step)
            for name, state in self._generators.seen.items():
                self._open.add("rng", name, DIGEST, state)
        self._open.settled = False
        with self._phase("backward"):
            result = original(step, *others, **keywords)
            for group, optimizer in self._optimizers():
                if group not in self._open.stepped:  # it accumulates, or the gradient scaler skipped it
                    self._add_gradients(group, optimizer)
        self._stepped = True
        return result

    def _get_train_loss_dict(self, original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        with self._phase("forward"):
            result = original(*arguments, **keywords)
        if isinstance(result, tuple) and len(result) > 1 and self._phases[-1] != "evaluation":
            outputs, losses = result[:2]
            self._add_each("forward", outputs, "outputs")
            for name, value in losses.items() if isinstance(losses, Mapping) else [("loss", losses)]:
                self._add_number("loss", str(name), value)
        return result

    def _next_train(self, original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        if self._phases[-1] != "forward":
            return original(*arguments, **keywords)
        with self._phase("batch"):
            result = original(*arguments, **keywords)
        rays, batch = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        self._add_each("batch", rays, "rays", prefix="rays")
        self._add_each("batch", batch, "batch")
        return result

    def _before_optimizer(self, group: str, optimizer: Any, *_: Any) -> None:
        at_work = self._phases[-1] in ("backward", "optimizer") and threading.get_ident() == self._thread
        if at_work and self._open is not None:
            if self._phases[-1] == "backward":
                self._look()
                self._phases[-1] = "optimizer"
            self._open.stepped.add(group)
            self._add_gradients(group, optimizer)

    def _eval_iteration(self, original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        self._settle()
        with self._phase("evaluation"):
            return original(*arguments, **keywords)

    def _next_eval(self, what: str) -> Callable[..., Any]:
        def around(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
            result = original(*arguments, **keywords)
            if self._phases[-1] == "evaluation":
                self._add("eval", what, leaves(result))
            return result

        return around

    def _callback(self, where: Any) -> Callable[..., Any]:
        """Around `run_callback_at_location` of a callback that runs at these locations."""

        def around(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
            location = keywords.get("location", arguments[1] if len(arguments) > 1 else None)
            if getattr(location, "name", "") == "BEFORE_TRAIN_ITERATION":
                self._settle()
            if where is not None and location not in where:
                return original(*arguments, **keywords)
            with self._phase("callbacks"):
                return original(*arguments, **keywords)

        return around

    def _in_phase(self, phase: str, *, after_step: bool) -> Callable[..., Any]:
        def around(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
            if after_step:
                self._settle()
            with self._phase(phase):
                return original(*arguments, **keywords)

        return around

    # Who draws.

    @contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        """Inside, who draws from a generator does it for this phase."""
        self._look()
        self._phases.append(phase)
        try:
            yield
        finally:
            self._look()
            self._phases.pop()

    def _look(self, *, thorough: bool = False) -> None:
        """Records which generators the innermost phase has drawn from since the last look."""
        drawn = self._generators.drawn(thorough=thorough)
        if self._open is not None:
            phase = self._phases[-1]
            stage = "eval" if phase == "evaluation" else "rng"
            for name, state in drawn.items():
                self._open.add(stage, f"{name}{AFTER}{phase}", DIGEST, state)

    # What a frame holds.

    def _settle(self) -> None:
        """Records the parameters, once, after the step and its callbacks."""
        if self._open is not None and self._open.kind == STEP and not self._open.settled:
            self._look()
            self._open.settled = True
            self._add_state("params")
            self._add_schedule()

    def end_step(self) -> None:
        """Ends the step that is open, as the next one would."""
        if self._open is None:
            return
        self._settle()
        self._look(thorough=True)
        done, self._open = self._open, None
        self._recorded_stages |= done.stages
        self._waiting.append((done.kind, done.step, done.records, self._digester.fetch()))
        self._write(wait=len(self._waiting) > _MOST_WAITING)

    def _write(self, *, wait: bool) -> None:
        """Hands the frames that are here to the writer, in their order."""
        while self._waiting:
            kind, step, records, fetched = self._waiting[0]
            if fetched is not None and not (wait or fetched.here):
                return
            self._waiting.popleft()
            finish = (lambda value: value) if fetched is None else fetched.finish
            self._writer.add(kind, step, [(stage, name, what, finish(value)) for stage, name, what, value in records])

    def _add(self, stage: str, subject: str, named: Iterable[tuple[str, Any]]) -> None:
        if self._open is not None:
            self._open.add(stage, subject, DIGEST, self._digester.digest(named))

    def _add_each(self, stage: str, values: Any, name: str, *, prefix: str = "") -> None:
        """A record for each key of `values`, or one for all where it has no keys."""
        keyed = list(items(values)) if isinstance(values, Mapping) or dataclasses.is_dataclass(values) else []
        for key, value in keyed:
            self._add(stage, f"{prefix} {key}".strip(), leaves(value))
        if not keyed:
            self._add(stage, name, leaves(values))

    def _add_number(self, stage: str, subject: str, value: Any) -> None:
        """The exact bits of a number, where it is one."""
        if self._open is None:
            return
        if isinstance(value, float):
            self._open.add(stage, subject, "float64", struct.unpack("<Q", struct.pack("<d", value))[0])
            return
        kind = str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else ""
        if kind in NUMBERS and value.numel() == 1 and value.layout == torch.strided:
            self._open.add(stage, subject, kind, self._digester.number(value))
        else:
            self._add(stage, subject, leaves(value))

    def _add_gradients(self, group: str, optimizer: Any) -> None:
        self._add_tensors("grad", group, "", ((name, value.grad) for name, value in self._parameters(group, optimizer)))

    def _add_state(self, stage: str) -> None:
        """Parameters and optimizer state of each group, then what is in no group, then buffers."""
        grouped: set[int] = set()
        for group, optimizer in self._optimizers():
            parameters = list(self._parameters(group, optimizer))
            grouped |= {id(value) for _, value in parameters}
            self._add_tensors(stage, group, "", parameters)
            self._add_tensors(stage, group, " (optimizer)", self._optimizer_state(optimizer, parameters))
        others, buffers = self._other_state(grouped)
        self._add_tensors(stage, "other parameters", "", others)
        self._add_tensors(stage, "buffers", "", buffers)
        self._digester.forget_replaced()

    def _other_state(self, grouped: set[int]) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
        """The parameters that no optimizer has, and the buffers; looked up anew, as a method may replace them."""
        others: list[tuple[str, Any]] = []
        buffers: list[tuple[str, Any]] = []
        seen, top = set(grouped), self._module()
        modules = [] if top is None else [("", top)]
        while modules:  # torch's own iterators take five times as long, at every step
            prefix, module = modules.pop()
            for found, values in ((others, module._parameters), (buffers, module._buffers)):
                for name, value in values.items():
                    if value is not None and id(value) not in seen:
                        seen.add(id(value))
                        found.append((f"{prefix}{name}", value))
            for name, child in module._modules.items():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    modules.append((f"{prefix}{name}.", child))
        return others, buffers

    def _add_tensors(self, stage: str, group: str, suffix: str, named: Iterable[tuple[str, Any]]) -> None:
        """One record for the group, or with `--trace tensors` one for each tensor."""
        if not self._tensors:
            if self._open is not None:
                digest = self._digester.digest if stage == "grad" else self._digester.digest_lasting
                self._open.add(stage, f"{group}{suffix}", DIGEST, digest(named))
            return
        for name, value in named:
            self._add(stage, f"{group}: {name}{suffix}", leaves(value))

    def _add_schedule(self) -> None:
        for group, optimizer in self._optimizers():
            for number, settings in enumerate(getattr(optimizer, "param_groups", ())):
                subject = f"learning rate {group}" + (f" {number}" if number else "")
                self._add_number("schedule", subject, settings.get("lr"))
        scaler = getattr(self._trainer, "grad_scaler", None)
        if scaler is not None and scaler.is_enabled():
            # Not by get_scale, which would wait for the device.
            state = [(name, getattr(scaler, name, None)) for name in ("_scale", "_growth_tracker")]
            self._add("schedule", "grad scaler", state)

    # Where things are.

    def _optimizers(self) -> Iterator[tuple[str, Any]]:
        yield from getattr(getattr(self._trainer, "optimizers", None), "optimizers", {}).items()

    def _module(self) -> torch.nn.Module | None:
        pipeline = self._trainer.pipeline
        model = pipeline if isinstance(pipeline, torch.nn.Module) else getattr(pipeline, "model", None)
        return model if isinstance(model, torch.nn.Module) else None

    def _parameters(self, group: str, optimizer: Any) -> Iterator[tuple[str, Any]]:
        """The parameters of an optimizer, now: a method may replace them; named only where each has its own record."""
        module = self._module() if self._tensors else None
        names = {} if module is None else {id(value): name for name, value in module.named_parameters()}
        for i, settings in enumerate(getattr(optimizer, "param_groups", ())):
            for j, value in enumerate(settings["params"]):
                yield names.get(id(value), f"{i}.{j}"), value

    @staticmethod
    def _optimizer_state(optimizer: Any, parameters: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        state = getattr(optimizer, "state", {})
        for name, value in parameters:
            # `get`: looking with [] would make an entry where there is none.
            for key, part in state.get(value, {}).items():
                yield from (
                    [(f"{name}.{key}", part)] if isinstance(part, torch.Tensor) else leaves(part, f"{name}.{key}")
                )

    def _not_recorded(self) -> dict[str, str]:
        """The stages of which no step has a record, and why."""
        reasons = {
            "batch": "the method never took a batch from its data manager's next_train",
            "forward": "the method never called its pipeline's get_train_loss_dict, or that returned no outputs",
            "loss": "the method never called its pipeline's get_train_loss_dict, or that returned no losses",
            "grad": "the trainer has no optimizers of nerfstudio's kind",
            "params": "the trainer has no optimizers and no module of nerfstudio's kind",
            "schedule": "the trainer has no optimizers of nerfstudio's kind",
        }
        return {stage: why for stage, why in reasons.items() if stage not in self._recorded_stages}


class _Frame:
    """What was recorded of one step so far."""

    def __init__(self, kind: int, step: int) -> None:
        self.kind, self.step = kind, step
        self.records: list[_Pending] = []
        self.settled = False
        self.stepped: set[str] = set()
        self._times: dict[tuple[str, str], int] = {}

    def add(self, stage: str, subject: str, what: str, value: int | Unfinished) -> None:
        """Adds a record; what comes again in one step gets a number."""
        subject = subject[:_MAX_NAME]
        times = self._times[stage, subject] = self._times.get((stage, subject), 0) + 1
        self.records.append((stage, subject if times == 1 else f"{subject} #{times}", what, value))

    @property
    def stages(self) -> set[str]:
        """Of which there is a record."""
        return {stage for stage, *_ in self.records}


def wanted_mode() -> str:
    """What to record, as whoever started this process says; ends it where that is no mode."""
    mode = os.environ.get(launch_variables.TRACE) or "steps"
    if mode not in MODES:
        refuse(f"{launch_variables.TRACE}={mode} is none of {', '.join(MODES)}; give one of them, or leave it out.")
    return mode


def make_recorder(trainer: Any, run: Any, *, mode: str) -> FlightRecorder:
    """A recorder of `trainer` that writes into the run directory `run`."""
    # A trainer that names no device has its model somewhere all the same.
    model = getattr(trainer.pipeline, "model", trainer.pipeline)
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    device = getattr(trainer, "device", "cpu" if parameter is None else parameter.device)
    writer = TraceWriter(run, mode=mode, algorithm=algorithm(device))
    return FlightRecorder(trainer, writer, tensors=mode == "tensors")
