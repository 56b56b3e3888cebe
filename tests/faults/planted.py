"""Faults to plant in a real training: each a small patch, with the step, stage, subject and cause that are the truth.

The causes are names of rules, or "unknown" where nothing that a trace records can tell. A fault is planted in the
candidate; `both` and `scene` of a fault make the two sides what they have to be for it.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from f3rm_verify.f3rm.data_workers import SeededSampler

Patch = pytest.MonkeyPatch
#: Counts trainings in this process, for what differs from one to the next.
_RUNS = itertools.count(1)
#: The step in which most faults strike, of `STEPS`.
K, STEPS = 2, 4


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`step` is None where it is chance. `subject` is a pattern as in fnmatch.

    `building` patches before the candidate is built, `built` afterwards; the same with `base_` on both sides. `data`
    changes the candidate's own copy of the scene, `cache` its feature cache. `start_method` is how data workers start:
    those of a server that imported nerfstudio once share the states of their generators until they are seeded.
    """

    name: str
    step: int | None
    stage: str
    subject: str
    cause: str
    both: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    base_building: Callable[[Patch], object] | None = None
    building: Callable[[Patch], object] | None = None
    base_built: Callable[[Any], object] | None = None
    built: Callable[[Any], object] | None = None
    data: Callable[[Path], object] | None = None
    cache: Callable[[Path], object] | None = None
    own_process: bool = False
    method: str = "f3rm"
    start_method: str = "forkserver"


# What faults are made of.


def nudge(tensor: torch.Tensor, place: tuple[int, ...]) -> None:
    """Moves one number by one unit in the last place."""
    with torch.no_grad():
        tensor[place] = torch.nextafter(tensor[place], torch.tensor(1e9, dtype=tensor.dtype))


def after(owner: Any, name: str, change: Callable[..., object], *, step: int | None = K) -> None:
    """Has `change` look at what a method of an instance gave, in one step or in all."""
    original = getattr(owner, name)

    def patched(*arguments: Any, **keywords: Any) -> Any:
        result = original(*arguments, **keywords)
        at = keywords["step"] if "step" in keywords else arguments[0]
        if step in (None, at):
            change(result)
        return result

    setattr(owner, name, patched)


def callback(trainer: Any, act: Callable[[], object], *, at: int = K) -> None:
    """A training callback, as a method or a plug-in can have it."""
    from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation

    def run(step: int) -> None:  # nerfstudio gives the step under this name
        if step == at:
            act()

    where = [TrainingCallbackLocation.AFTER_TRAIN_ITERATION]
    trainer.callbacks.append(TrainingCallback(where, run, update_every_num_iters=1))


def table_of(trainer: Any, group: str = "fields") -> tuple[torch.optim.Optimizer, torch.Tensor]:
    """The largest parameter of a group, its hash table, and its optimizer."""
    optimizer = trainer.optimizers.optimizers[group]
    return optimizer, max(optimizer.param_groups[0]["params"], key=lambda value: value.numel())


def before_optimizers(trainer: Any, change: Callable[[], object]) -> None:
    """Has `change` act in step K after the backward pass and before any optimizer."""
    original = trainer.optimizers.optimizer_scaler_step_some

    def patched(*arguments: Any) -> None:
        if trainer.step == K:
            change()
        original(*arguments)

    trainer.optimizers.optimizer_scaler_step_some = patched


# The faults, by what they strike.


def batch_ulp(trainer: Any) -> None:
    after(trainer.pipeline.datamanager, "next_train", lambda result: nudge(result[1]["image"], (17, 1)))


def feature_ulp(trainer: Any) -> None:
    after(trainer.pipeline.datamanager, "next_train", lambda result: nudge(result[1]["feature"], (17, 1)))


def swapped_pixels(trainer: Any) -> None:
    sampler = trainer.pipeline.datamanager.train_pixel_sampler
    original, calls = sampler.sample, [0]

    def sample(images: Any) -> Any:
        batch = original(images)
        calls[0] += 1
        if calls[0] == K + 1:
            order = torch.arange(len(batch["indices"]))
            order[[3, 9]] = order[[9, 3]]
            for name in ("indices", "image"):
                batch[name] = batch[name][order]
        return batch

    sampler.sample = sample


def torch_draw(trainer: Any) -> None:
    callback(trainer, lambda: torch.rand(1))


def python_draw(trainer: Any) -> None:
    callback(trainer, random.random, at=3)


def numpy_draw_between_steps(trainer: Any) -> None:
    after(trainer, "_update_viewer_state", lambda _: np.random.rand())


def draw_while_loading(trainer: Any) -> None:
    after(trainer.pipeline.datamanager, "next_train", lambda _: np.random.permutation(4))


def unseeded_workers(patch: Patch) -> None:
    """As a data manager with a `setup_train` of its own has them."""
    patch.setattr("f3rm_verify.f3rm.data_workers._parallel_datamanager", lambda: None)


def drawing_worker(patch: Patch) -> None:
    """Goes to the worker by pickle."""
    patch.setattr("f3rm_verify.f3rm.data_workers.SeededSampler", DrawingSampler)


class DrawingSampler(SeededSampler):
    def sample(self, images: Any) -> Any:
        original, batch = self.sampler.sample_method, self.batch

        def sample_method(*arguments: Any, **keywords: Any) -> Any:
            if batch == K:
                torch.rand(1)
            return original(*arguments, **keywords)

        self.sampler.sample_method = sample_method
        try:
            return super().sample(images)
        finally:
            self.sampler.sample_method = original


def draw_in_the_model(trainer: Any) -> None:
    model, calls = trainer.pipeline.model, [0]
    original = model.get_outputs

    def get_outputs(rays: Any) -> Any:
        calls[0] += 1
        if calls[0] == K + 1:
            torch.randn(2)
        return original(rays)

    model.get_outputs = get_outputs


def draw_in_evaluation(trainer: Any) -> None:
    after(trainer.pipeline, "get_eval_loss_dict", lambda _: torch.rand(3), step=3)


def reseeded_by_entropy(patch: Patch) -> None:
    """A module that makes its own generator, as someone does who wants to leave the global one alone."""
    from f3rm_verify.f3rm.feature_field import FeatureField

    original = FeatureField.__init__

    def build(self: Any, **keywords: Any) -> None:
        original(self, **keywords)
        own = torch.Generator()
        own.seed()
        with torch.no_grad():
            self.grid.hash_table.uniform_(-1e-4, 1e-4, generator=own)

    patch.setattr(FeatureField, "__init__", build)


def built_from_numpy_entropy(patch: Patch) -> None:
    _after_populating(patch, lambda model: _fill(model.field, np.random.default_rng().normal(0, 1e-2, 8)))


def built_from_the_clock(patch: Patch) -> None:
    own = torch.Generator()
    _after_populating(patch, lambda model: _fill(model.field, torch.rand(8, generator=own.manual_seed(time.time_ns()))))


def built_after_a_draw(patch: Patch) -> None:
    from f3rm_verify.f3rm.model import FeatureFieldModel

    original = FeatureFieldModel.populate_modules

    def populate(self: Any) -> None:
        torch.rand(1)
        original(self)

    patch.setattr(FeatureFieldModel, "populate_modules", populate)


def unseeded_python(patch: Patch) -> None:
    """A plug-in that makes seeding of Python's generator do nothing."""
    patch.setattr(random, "seed", lambda *_: None)
    random.random()


def _after_populating(patch: Patch, change: Callable[[Any], object]) -> None:
    from f3rm_verify.f3rm.model import FeatureFieldModel

    original = FeatureFieldModel.populate_modules

    def populate(self: Any) -> None:
        original(self)
        change(self)

    patch.setattr(FeatureFieldModel, "populate_modules", populate)


def _fill(module: Any, values: Any) -> None:
    with torch.no_grad():
        next(iter(module.parameters())).view(-1)[:8] = torch.as_tensor(values, dtype=torch.float32)


def uninitialised_bias(patch: Patch) -> None:
    """A parameter that is allocated and never written."""

    def add(model: Any) -> None:
        size = 4096
        # What an earlier owner of this memory left there: other numbers in each run.
        run = next(_RUNS)
        used = [torch.full((size,), float(run)) for _ in range(64)]
        del used
        model.feature_field.offset = torch.nn.Parameter(torch.empty(size))

    _after_populating(patch, add)


def other_order(patch: Patch) -> None:
    """What an unsorted listing of a directory does."""
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import Nerfstudio

    original = Nerfstudio.get_dataparser_outputs

    def unsorted(self: Any, split: str = "train", **keywords: Any) -> Any:
        outputs = original(self, split, **keywords)
        order = list(reversed(range(len(outputs.image_filenames))))
        outputs.image_filenames = [outputs.image_filenames[i] for i in order]
        outputs.cameras = outputs.cameras[torch.tensor(order)]
        return outputs

    patch.setattr(Nerfstudio, "get_dataparser_outputs", unsorted)


def other_pixel(scene: Path) -> None:
    from PIL import Image

    path = sorted((scene / "images").iterdir())[3]
    with Image.open(path) as image:
        pixels = np.array(image)
    pixels[20, 30, 1] ^= 4
    Image.fromarray(pixels).save(path)


def stale_cache(folder: Path) -> None:
    """The cache of the other side, as if it had been made of other images by a tool that does not look at them."""
    from f3rm_verify.f3rm.features import cache

    (path,) = folder.glob("*.npz")
    with np.load(path) as archive:
        key, values = str(archive["key"]), archive["features"]
    values[3, 5:9, 5:9] *= np.float32(1.5)
    cache.write_cache(path, values, key, cache.digest_of(values))


def extraction_that_draws(patch: Patch) -> None:
    """As upstream's does, which builds CLIP where there is no cache."""
    from f3rm_verify.f3rm.datamanager import FeatureDataManager

    original = FeatureDataManager._load

    def load(self: Any) -> Any:
        features = original(self)
        if any(one.source == "extracted" for one in features):
            torch.nn.Linear(4, 4)
        return features

    patch.setattr(FeatureDataManager, "_load", load)


def keep_cache(folder: Path) -> None:
    """The candidate finds the cache that the reference made."""


def output_in_half_precision(trainer: Any) -> None:
    model = trainer.pipeline.model
    original = model.get_outputs

    def get_outputs(rays: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return original(rays)

    model.get_outputs = get_outputs


def swapped_losses(trainer: Any) -> None:
    def swap(result: Any) -> None:
        losses = result[1]
        first, second = "rgb_loss", "feature_loss"
        losses[first], losses[second] = losses[second], losses[first]

    after(trainer.pipeline, "get_train_loss_dict", swap)


def loss_of_the_clock(trainer: Any) -> None:
    def weigh(result: Any) -> None:
        result[1]["rgb_loss"] = result[1]["rgb_loss"] * (1 + 1e-3 * (time.time() % 1))

    after(trainer.pipeline, "get_train_loss_dict", weigh, step=None)


def noise_of_entropy(trainer: Any) -> None:
    def add(result: Any) -> None:
        result[1]["image"] += 1e-3 * np.random.default_rng().random()

    after(trainer.pipeline.datamanager, "next_train", add, step=None)


def gradient_ulp(trainer: Any) -> None:
    def change() -> None:
        gradient = table_of(trainer, "feature_field")[1].grad
        assert gradient is not None
        nudge(gradient, tuple(gradient.nonzero()[0].tolist()))

    before_optimizers(trainer, change)


def unvisited_row(trainer: Any) -> None:
    def change() -> None:
        optimizer, table = table_of(trainer)
        (unvisited,) = (optimizer.state[table]["exp_avg_sq"].sum(dim=-1) == 0).nonzero(as_tuple=True)
        nudge(table, (int(unvisited[0]), 0))

    callback(trainer, change)


def moment_flipped(trainer: Any) -> None:
    def change() -> None:
        optimizer, table = table_of(trainer, "proposal_networks")
        optimizer.state[table]["exp_avg"].view(torch.int32).view(-1)[7] ^= 1

    callback(trainer, change)


def buffer_changed(trainer: Any) -> None:
    callback(trainer, lambda: nudge(trainer.pipeline.model.feature_pca_low, (0,)))


def skipped_step(trainer: Any) -> None:
    original = trainer.optimizers.optimizer_scaler_step_some

    def patched(scaler: Any, groups: list[str]) -> None:
        original(scaler, [name for name in groups if trainer.step != K or name != "fields"])

    trainer.optimizers.optimizer_scaler_step_some = patched


def with_a_nan(trainer: Any) -> None:
    trainer.pipeline.model.register_buffer("mask", torch.full((4,), float("nan")))


def nan_payload(trainer: Any) -> None:
    def change() -> None:
        trainer.pipeline.model.mask.view(torch.int32)[2] ^= 1

    callback(trainer, change)


def other_schedule(trainer: Any) -> None:
    original = trainer.optimizers.scheduler_step_all

    def patched(step: int) -> None:
        original(step)
        if step == K:
            trainer.optimizers.optimizers["fields"].param_groups[0]["lr"] *= 1 + 1e-9

    trainer.optimizers.scheduler_step_all = patched


def with_a_scaler(trainer: Any, interval: int = 2000) -> None:
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=interval)


def other_scaler(trainer: Any) -> None:
    with_a_scaler(trainer, interval=3)


def weight_changed(trainer: Any) -> None:
    nudge(next(trainer.pipeline.model.field.parameters()), (0, 0))


def with_weight_decay(trainer: Any) -> None:
    """A sum over a whole table, which torch splits over its threads."""

    def add(result: Any) -> None:
        result[1]["decay"] = 1e-6 * table_of(trainer)[1].square().sum()

    after(trainer.pipeline, "get_train_loss_dict", add, step=None)


def one_thread(patch: Patch) -> None:
    torch.set_num_threads(1)


def set_ordered(patch: Patch) -> None:
    """Initial values drawn in the order of a set of names."""

    def fill(model: Any) -> None:
        named = dict(model.field.named_parameters())
        with torch.no_grad():
            for name in set(named):
                named[name].view(-1)[:4] = torch.rand(min(4, named[name].numel()))

    _after_populating(patch, fill)


_RACY = ("--seed-deterministic-algorithms", "False", "--encoding", "stock")
_UNFILLED = ("--seed-deterministic-algorithms", "False", "--encoding", "deterministic")
_USER = "user code drew from the training's generators"
_EVALUATION = "an evaluation drew from the training's generators"
_VALUES = "initial values that do not follow the seed"
_BATCH = "different data in the batch"
_WRITTEN = "something besides the gradients changed the model"
_FLAGS = "different TF32, cuDNN or determinism flags"
_THREADS = "thread-order float accumulation on the CPU"


def _fault(name: str, step: int | None, stage: str, subject: str, cause: str, **how: Any) -> Fault:
    return Fault(name=name, step=step, stage=stage, subject=subject, cause=cause, **how)


FAULTS: tuple[Fault, ...] = (
    _fault("another seed", 0, "init", "*", "different seeds", arguments=("--machine.seed", "43")),
    _fault("a module with a generator of its own", 0, "init", "feature_field", _VALUES, building=reseeded_by_entropy),
    _fault("a module built from numpy's entropy", 0, "init", "fields", _VALUES, building=built_from_numpy_entropy),
    _fault("a module built from the clock", 0, "init", "fields", _VALUES, building=built_from_the_clock),
    _fault("a weight changed before the first step", 0, "init", "fields", _VALUES, built=weight_changed),
    _fault(
        "a draw before the model is built",
        *(0, "init", "*", "different generator states before the first step"),
        building=built_after_a_draw,
    ),
    _fault(
        "a parameter that is never written",
        *(0, "init", "feature_field", "uninitialised memory"),
        both=_UNFILLED,
        base_building=uninitialised_bias,
    ),
    _fault("seeding of Python's generator undone", 0, "rng", "python", "unseeded generators", building=unseeded_python),
    _fault("images in another order", 0, "batch", "rays*", "different order of the image files", building=other_order),
    _fault("a pixel of an image file changed", 0, "init", "*", "different image files", data=other_pixel),
    _fault("a stale feature cache", 0, "init", "*", "stale feature cache", cache=stale_cache),
    _fault(
        "a cold and a warm cache, and an extractor that draws",
        *(0, "init", "*", "cold and warm feature cache"),
        base_building=extraction_that_draws,
        cache=keep_cache,
    ),
    _fault("one ulp in a pixel of the batch", K, "batch", "image", _BATCH, built=batch_ulp),
    _fault("one ulp in a feature of the batch", K, "batch", "feature", _BATCH, built=feature_ulp),
    _fault("two pixels of the batch swapped", K, "batch", "rays*", _BATCH, built=swapped_pixels),
    _fault("a callback draws from torch", K, "rng", "torch cpu after callbacks", _USER, built=torch_draw),
    _fault("a callback draws from Python", 3, "rng", "python after callbacks", _USER, built=python_draw),
    _fault(
        "code between the steps draws from numpy",
        *(K, "rng", "numpy after between steps", _USER),
        built=numpy_draw_between_steps,
    ),
    _fault(
        "the loading of data draws once more",
        *(K, "rng", "numpy after batch", "the loading of data drew another number of values"),
        built=draw_while_loading,
    ),
    _fault(
        "data workers without a seed",
        *(0, "batch", "*", "a race between data workers"),
        method="nerfacto",
        start_method="spawn",
        base_building=unseeded_workers,
    ),
    _fault(
        "a data worker draws once more",
        *(K, "batch", "*", "a data worker made another batch"),
        method="nerfacto",
        building=drawing_worker,
    ),
    _fault(
        "the model draws once more",
        *(K, "rng", "torch cpu after forward", "the model drew another number of values"),
        built=draw_in_the_model,
    ),
    _fault(
        "an evaluation draws once more",
        *(3, "eval", "torch cpu after evaluation", _EVALUATION),
        both=("--steps-per-eval-batch", "3"),
        built=draw_in_evaluation,
    ),
    _fault(
        "evaluations at other steps",
        *(3, "eval", "*", _EVALUATION),
        arguments=("--steps-per-eval-batch", "3"),
    ),
    _fault("autocast on one side", 0, "forward", "*", "unknown", built=output_in_half_precision),
    _fault("two loss terms swapped", K, "loss", "rgb_loss", "unknown", built=swapped_losses),
    _fault("a loss weighed by the clock", 0, "loss", "rgb_loss", "wall-clock dependence", built=loss_of_the_clock),
    _fault(
        "noise from the system's entropy",
        *(0, "batch", "image", "randomness that no seed reaches"),
        built=noise_of_entropy,
    ),
    _fault("one ulp in a gradient", K, "grad", "feature_field", "unknown", built=gradient_ulp),
    _fault("unordered additions on two threads", None, "grad", "*", _THREADS, both=_RACY),
    _fault(
        "deterministic algorithms off on one side",
        *(None, "grad", "*", _FLAGS),
        both=("--encoding", "stock"),
        arguments=("--seed-deterministic-algorithms", "False"),
    ),
    _fault(
        "another number of threads",
        *(None, "loss", "decay", "different thread counts"),
        base_built=with_weight_decay,
        building=one_thread,
    ),
    _fault("a row that no ray visits", K, "params", "fields", _WRITTEN, built=unvisited_row),
    _fault("a moment of Adam", K, "params", "proposal_networks (optimizer)", _WRITTEN, built=moment_flipped),
    _fault("a buffer", K, "params", "buffers", _WRITTEN, built=buffer_changed),
    _fault("the payload of a NaN", K, "params", "buffers", _WRITTEN, base_built=with_a_nan, built=nan_payload),
    _fault("a skipped step", K, "params", "fields", _WRITTEN, built=skipped_step),
    _fault(
        "another schedule in the configuration",
        *(0, "schedule", "learning rate fields", "different code or configuration"),
        arguments=("--optimizers.fields.scheduler.max-steps", "100"),
    ),
    _fault(
        "a learning rate set by code",
        *(K, "schedule", "learning rate fields", "another learning-rate schedule"),
        built=other_schedule,
    ),
    _fault(
        "another gradient scaler",
        *(2, "schedule", "grad scaler", "the mixed-precision gradient scaler"),
        base_built=with_a_scaler,
        built=other_scaler,
    ),
    _fault(
        "another option of the model",
        *(0, "*", "*", "different code or configuration"),
        arguments=("--pipeline.model.near-plane", "0.31"),
    ),
    _fault(
        "a set's order and two hash seeds",
        *(0, "init", "fields", "different hash seeds"),
        base_building=set_ordered,
        own_process=True,
    ),
)
