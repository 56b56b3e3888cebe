"""F3RMTrainer: nerfstudio's trainer, seeded as a whole, that leaves evidence of what it did."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils import writer
from nerfstudio.utils.rich_utils import CONSOLE

from f3rm_verify import launch_variables
from f3rm_verify.environment import describe_environment
from f3rm_verify.errors import TrainingError
from f3rm_verify.f3rm.checkpoints import prepare_loading
from f3rm_verify.f3rm.cost import measure_cost, refuse_several_ranks, wanted_steps
from f3rm_verify.f3rm.cpu_ranks import prepare_launch
from f3rm_verify.f3rm.encoding import Encoding, choose_encoding, describe_encodings, observe_encodings, switch_encodings
from f3rm_verify.f3rm.evaluation import check_render_budget, evaluate
from f3rm_verify.f3rm.flight_recorder import FlightRecorder, make_recorder, wanted_mode
from f3rm_verify.f3rm.foreign_data import only_prepares, prepare_data
from f3rm_verify.f3rm.lifeline import watch_launcher
from f3rm_verify.f3rm.memory_use import explained_shortage, peak_memory
from f3rm_verify.f3rm.ranks import (
    FirstBatch,
    RankCurves,
    observe_ranks_after_training,
    observe_ranks_at_step_0,
    rank_directory,
    require_shared_gradients,
)
from f3rm_verify.f3rm.refusal import refuse
from f3rm_verify.f3rm.replay import asked_replay, keep_snapshots, run_replay, settings_of, starting_batch
from f3rm_verify.f3rm.training_audit import (
    NondeterministicOperations,
    end_if_strict,
    observe_after_training,
    observe_at_step_0,
    seeded_construction,
)
from f3rm_verify.f3rm.training_facts import data_digests, extensions, implementation
from f3rm_verify.outside_reads import OutsideReads
from f3rm_verify.recorder import Recorder, digest_files, digest_tensors
from f3rm_verify.seeding import apply_seeding, tell_line, warning_line
from f3rm_verify.seeding_plan import Claim, SeedingPlan

#: In how many first steps, with all that is between them, reads of clocks and entropy are noted: it costs time.
_STEPS_WITH_READS = 3


@dataclass
class F3RMTrainerConfig(TrainerConfig):
    """Configuration of a training that is seeded as a whole."""

    _target: type = field(default_factory=lambda: F3RMTrainer)
    enable_comprehensive_seeding: bool = True
    """Seed every generator and set every determinism flag below; off leaves nerfstudio's own seeding alone."""
    seed_deterministic_algorithms: bool = True
    """Use deterministic algorithms in torch."""
    seed_warn_only: bool = False
    """Only warn where an operation has no deterministic implementation, instead of stopping."""
    seed_cublas_workspace: bool = True
    """Configure cuBLAS' workspace for determinism."""
    print_seed_info: bool = True
    """Print the seeding log."""
    seed_strict: bool = False
    """Stop before the first step where a claim of the seeding log does not hold."""
    encoding: Encoding = "auto"
    """Which hash grids the model gets: nerfstudio's stock ones, deterministic ones, or tiny-cuda-nn's; auto is
    deterministic where the training is seeded and the model does not take tiny-cuda-nn's."""

    def get_checkpoint_dir(self) -> Path:
        """Where the checkpoints are; nerfstudio's trainer and tools ask before they build a model and load one."""
        prepare_loading()
        return super().get_checkpoint_dir()

    def save_config(self) -> None:
        """Saves config.yml; nerfstudio does this last before it launches the ranks."""
        refuse_several_ranks(self.machine)
        try:
            choose_encoding(self)
        except TrainingError as error:
            refuse(str(error))
        prepare_launch(self)
        super().save_config()


class SeededTrainer:
    """Seeding and evidence for any trainer; stands before it in the bases."""

    config: Any
    pipeline: Any
    base_dir: Path
    _flight: FlightRecorder | None

    def __init__(self, config: Any, local_rank: int = 0, world_size: int = 1) -> None:
        watch_launcher()
        wanted_mode()  # refused before anything is built
        choose_encoding(config)
        self._plan = _plan(config, local_rank)
        self._seeding = apply_seeding(self._plan, say=_say)
        self._operations = NondeterministicOperations()
        self._outside_reads = OutsideReads()
        self._steps_done = 0
        self._records = True
        self._steps_measured: int | None = None
        self._world_size = world_size
        directory = rank_directory(config.get_base_dir(), self._plan.rank)
        self._curves = RankCurves(directory, config) if self._plan.rank else None
        self._recorder = Recorder(directory)
        self._directory, self._flight = directory, None
        self._recorder.status("setting up")
        self._recorder.update_manifest(
            {
                "method": config.method_name,
                "implementation": implementation(config),
                "seed": self._plan.base_seed,
                "rank": self._plan.rank,
                "world_size": world_size,
                "argv": sys.argv,
                "load_config": _saved_config(),
                "torch_initial_seed": torch.initial_seed(),
                "environment": describe_environment(),
            }
        )
        self._recorder.write_seeding(self._seeding.to_dict())
        end_if_strict(self._seeding, strict=config.seed_strict)
        super().__init__(config, local_rank, world_size)  # type: ignore[call-arg]

    def setup(self, *arguments: Any, **keywords: Any) -> None:
        """Sets the training up, and records what it starts from."""
        if only_prepares():
            self._prepare()
        self._hear_of_features()
        building = self._outside_reads.watched("building")
        with self._measured_memory(), self._explained_failures(), self._construction(), building:
            super().setup(*arguments, **keywords)  # type: ignore[misc]
        switch_encodings(self.pipeline.model, deterministic=self.config.encoding == "deterministic")
        require_shared_gradients(self.pipeline, self._world_size)
        ranks = observe_ranks_at_step_0(self._plan, self.pipeline, self._world_size)
        grids = observe_encodings(self._plan, self.pipeline.model)
        self._add_claims([*observe_at_step_0(self._plan, self.pipeline), *grids, *ranks])
        end_if_strict(self._seeding, strict=self.config.seed_strict)
        if self._evaluates:
            check_render_budget(self.pipeline, self.base_dir, float(os.environ[launch_variables.RENDER_BUDGET]))
        self._recorder.update_manifest(
            {
                "data": data_digests(self.pipeline.datamanager),
                "encodings": describe_encodings(self.pipeline.model),
                "extensions": extensions(self.pipeline.model),
                "outside_reads": self._outside_reads.found,
                "parameters": {"before": self._parameter_digest(), "after": None},
                "lpips": getattr(getattr(self.pipeline.model, "lpips", None), "unavailable_because", None),
            }
        )

    def _construction(self) -> AbstractContextManager[None]:
        return seeded_construction(self._plan, first_batch=starting_batch())

    def _hear_of_features(self) -> None:
        """Has our own data manager tell how far it is: extracting takes minutes without a step."""
        datamanager: Any = getattr(self.config.pipeline, "datamanager", None)
        if hasattr(datamanager, "tell"):
            datamanager.tell = lambda phase, done, of: self._recorder.status(phase, step=done - 1, steps=of)

    def _prepare(self) -> None:
        """Makes the data manager's caches, and ends the process."""
        self._hear_of_features()
        with self._measured_memory():
            prepare_data(self.config, self.device)  # type: ignore[attr-defined]
        self._recorder.complete(first_step=0, steps=0)
        self._recorder.status("done")
        raise SystemExit(0)

    def train(self) -> None:
        """Trains; then writes the completion record and, where the launcher asked for it, metrics and renders."""
        if wanted_steps():
            self._measure_cost()
            return
        if asked_replay():
            self._replay()
            return
        keep_snapshots(self)
        first_step = self._start_step  # type: ignore[attr-defined]
        self._outside_reads.start("training")
        try:
            with self._measured_memory(), self._explained_failures(), self._traced():
                first_batch = FirstBatch(self.pipeline.datamanager) if self._world_size > 1 else None
                super().train()  # type: ignore[misc]
        finally:
            self._outside_reads.stop()
            self._flush()
        ranks = observe_ranks_after_training(self._plan, self.pipeline, first_batch)
        self._add_claims([*observe_after_training(self._plan, self._operations), *ranks])
        self._recorder.manifest["parameters"]["after"] = self._parameter_digest()
        wanted = self.config.max_num_iterations
        if self._steps_done == wanted:
            self._recorder.complete(first_step=first_step, steps=self._steps_done)
        if self._evaluates:
            with self._measured_memory():
                metrics = evaluate(
                    self.pipeline,
                    self.base_dir,
                    progress=lambda done, images: self._recorder.status("evaluating", step=done - 1, steps=images),
                )
            self._recorder.write_metrics(metrics)
        self._recorder.status("done", step=first_step + self._steps_done - 1, steps=wanted)

    def train_iteration(self, step: int) -> Any:
        """One step, counted."""
        if self._steps_done == _STEPS_WITH_READS:
            self._outside_reads.stop()
        result = super().train_iteration(step)  # type: ignore[misc]
        self._steps_done += 1
        if self._records:
            self._record(step, result)
        return result

    def _record(self, step: int, result: Any) -> None:
        """What a step costs besides training."""
        if self._curves is not None:
            self._curves.log(step, *result[:2])
        written = self._recorder.status(
            "training" if self._steps_measured is None else "measuring",
            step=step,
            steps=self._start_step + (self._steps_measured or self.config.max_num_iterations),  # type: ignore[attr-defined]
            # On a GPU, reading the loss would wait for the device at every step.
            loss=result[0].item() if self.config.machine.device_type == "cpu" else None,
        )
        if written:
            self._flush()

    @contextmanager
    def _traced(self, run: Path | None = None) -> Iterator[None]:
        """Inside, the flight recorder records every step, in `run`, unless the launcher wants none of it."""
        mode = wanted_mode()
        if mode == "off":
            yield
            return
        whole = False
        self._flight = make_recorder(self, run or self._directory, mode=mode)
        try:
            self._flight.attach()
            yield
            whole = self._steps_done == self.config.max_num_iterations
        finally:
            flight, self._flight = self._flight, None
            flight.close(complete=whole)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Inside, steps are recorded and operations watched, where that is off."""
        self._records = True
        try:
            # Steps that train nothing leave no trace: nobody may compare it.
            with (
                tempfile.TemporaryDirectory(dir=self._directory) as run,
                self._operations.watched(),
                self._traced(Path(run)),
            ):
                yield
        finally:
            self._records = False

    def _measure_cost(self) -> None:
        """Times steps instead of training; no step of a training is recorded as done, and no checkpoint kept."""
        self._records = False
        with explained_shortage(), self._operations.explained():
            measure_cost(self, self._plan, recording=self._recording, tell=partial(self._tell, "measuring"))
        self._recorder.complete(first_step=0, steps=0)
        self._recorder.status("done")

    def _replay(self) -> None:
        """Executes steps again instead of training; no step of a training is recorded as done."""
        self._records = False
        with explained_shortage(), self._operations.explained():
            settings = settings_of(self, seed=self._plan.base_seed)
            run_replay(self, train=super().train, settings=settings, tell=partial(self._tell, "repeating"))  # type: ignore[misc]
        self._recorder.complete(first_step=0, steps=0)
        self._recorder.status("done")

    def _tell(self, phase: str, done: int, steps: int) -> None:
        self._steps_measured = steps
        first = self._start_step  # type: ignore[attr-defined]
        self._recorder.status(phase, step=first + done - 1 if done else None, steps=first + steps)

    def _flush(self) -> None:
        self._recorder.flush_status()
        flush_event_files()
        if self._curves is not None:
            self._curves.flush()
        if self._flight is not None:
            self._flight.flush()

    @property
    def _evaluates(self) -> bool:
        """Whether this process evaluates afterwards: the launcher asks for it, of rank 0."""
        return self._plan.rank == 0 and bool(os.environ.get(launch_variables.RENDER_BUDGET))

    @contextmanager
    def _measured_memory(self) -> Iterator[None]:
        """Inside, running out of memory is told in a sentence; the peak so far is in the manifest however it ends."""
        try:
            with explained_shortage():
                yield
        finally:
            self._recorder.update_manifest({"memory": peak_memory()})

    @contextmanager
    def _explained_failures(self) -> Iterator[None]:
        """Inside, an operation that torch refuses to do is noted in the seeding log before the training ends."""
        try:
            with self._operations.watched():
                yield
        except TrainingError:
            self._add_claims(self._operations.claims(self._plan))
            raise

    def _add_claims(self, claims: list[Claim]) -> None:
        for claim in claims:
            if claim.verdict == "fails":
                tell_line(self._seeding, warning_line(claim), say=_say)
        self._seeding.entries.extend(claims)
        self._recorder.write_seeding(self._seeding.to_dict())

    def _parameter_digest(self) -> str:
        return digest_tensors(self.pipeline.model.named_parameters())


class F3RMTrainer(SeededTrainer, Trainer):
    """nerfstudio's trainer with seeding and evidence."""


def flush_event_files() -> None:
    """Puts on disk what TensorBoard's writer holds back: up to two minutes, and at the end what nobody closes."""
    for event_writer in writer.EVENT_WRITERS:
        if isinstance(event_writer, writer.TensorboardWriter):
            event_writer.tb_writer.flush()


def _saved_config() -> dict[str, str] | None:
    """Which saved configuration the launcher had loaded, None where none was."""
    path = os.environ.get(launch_variables.LOAD_CONFIG)
    return None if path is None else {"path": path, "digest": digest_files([Path(path)])[path]}


def _say(line: str) -> None:
    """Shows a line as it is: brackets and colons in it, of a variable's value say, are no styles and no emojis."""
    CONSOLE.print(line, markup=False, emoji=False)


def _plan(config: Any, local_rank: int) -> SeedingPlan:
    machine = config.machine
    return SeedingPlan(
        base_seed=machine.seed,
        rank=machine.machine_rank * machine.num_devices + local_rank,
        enabled=config.enable_comprehensive_seeding,
        deterministic_algorithms=config.seed_deterministic_algorithms,
        warn_only=config.seed_warn_only,
        cublas_workspace=config.seed_cublas_workspace,
        print_info=config.print_seed_info,
    )
