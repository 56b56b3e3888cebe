"""The whole state of a training between two steps: taken, put back, kept on disk.

What is outside of parameters counts too: buffers, optimizers, schedulers, scaler, all generators, where the data
manager is, and the numbers that callbacks change (nerfacto's annealing). What cannot be held is named in `left_out`.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from f3rm_verify.errors import TrainingError
from f3rm_verify.f3rm.refusal import refuse
from f3rm_verify.files import replacing
from f3rm_verify.recorder import digest_tensors
from f3rm_verify.run_dir import SNAPSHOTS

VERSION = 1
#: Snapshots that are kept, spread over the whole training, so that the way from one to any step stays short.
KEPT = 8
#: Bytes on disk that all snapshots of a training may take together.
BUDGET = 8 * 2**30
#: Bytes that stay free on the disk.
_SPARE = 2**30
#: What torch keeps in a module besides its own attributes.
_TORCH_OWN = frozenset(vars(nn.Module()))
#: Before the state of a generator that a module has of its own.
_GENERATOR = "torch.Generator"
_PLAIN = (bool, int, float, str, type(None))

State = dict[str, Any]


def take_snapshot(trainer: Any, step: int) -> State:
    """The state before `step`, as tensors of its own and plain data; draws nothing and changes nothing."""
    pipeline = trainer.pipeline
    attributes, left_out = _attributes(pipeline)
    return {
        "version": VERSION,
        "step": step,
        "parameters": _cloned(dict(pipeline.named_parameters())),
        "gradients": _cloned({n: one.grad for n, one in pipeline.named_parameters() if one.grad is not None}),
        "buffers": _cloned(dict(pipeline.named_buffers())),
        "optimizers": {name: _plain(one.state_dict()) for name, one in trainer.optimizers.optimizers.items()},
        "schedulers": {name: _plain(one.state_dict()) for name, one in trainer.optimizers.schedulers.items()},
        "scaler": _plain(trainer.grad_scaler.state_dict()),
        "generators": read_generators(),
        "attributes": attributes,
        "names": [f"{path}#{name}" for path, _, name, _ in _model_attributes(pipeline)],
        "batches": batches_taken(pipeline.datamanager),
        "left_out": left_out,
    }


def put_back(trainer: Any, state: Mapping[str, Any]) -> None:
    """Makes a trainer that is set up what it was when `state` was taken, which stays untouched.

    Not the position of data workers, which is given to them when they start. Raises TrainingError where the training
    does not have the same parts.
    """
    pipeline = trainer.pipeline
    with torch.no_grad():
        _put_tensors("parameters", dict(pipeline.named_parameters()), state["parameters"])
        _put_tensors("buffers", dict(pipeline.named_buffers()), state["buffers"])
    for name, parameter in pipeline.named_parameters():
        gradient = state["gradients"].get(name)
        parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
    for kind, parts in (("optimizers", trainer.optimizers.optimizers), ("schedulers", trainer.optimizers.schedulers)):
        _same_names(kind, parts, state[kind])
        for name, part in parts.items():
            part.load_state_dict(_plain(state[kind][name]))  # a copy: what is loaded is then changed in place
    trainer.grad_scaler.load_state_dict(_plain(state["scaler"]))
    _forget_newer(pipeline, frozenset(state["names"]))
    _put_attributes(pipeline, state["attributes"])
    trainer.step = state["step"]
    write_generators(state["generators"])


def digests_of(state: Mapping[str, Any]) -> dict[str, str]:
    """A digest for each part of a state, by its name: `parameters/NAME`, `optimizers/GROUP`, `generators/torch`..."""
    found = {}
    for kind in ("parameters", "gradients", "buffers", "optimizers", "schedulers", "generators", "attributes"):
        for name, value in state[kind].items():
            found[f"{kind}/{name}"] = _digest(value)
    return found | {"scaler": _digest(state["scaler"])}


def _digest(value: Any) -> str:
    tensors = list(_tensors(value))
    # Floats by repr, which tells all of them apart.
    return digest_tensors([*tensors, (f"{_without_tensors(value)!r}", torch.empty(0))])


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name}/{index}")


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_tensors(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(item) for item in value]
    return None if isinstance(value, Tensor) else value


def _same_names(kind: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    if here.keys() != there.keys():
        names = ", ".join(sorted(here.keys() ^ there.keys())[:3])
        raise TrainingError(f"The snapshot is not of this training: its {kind} are others ({names}).")


def _put_tensors(kind: str, here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> None:
    _same_names(kind, here, there)
    for name, tensor in here.items():
        value = there[name].to(tensor.device)
        if tensor.shape == value.shape and tensor.dtype == value.dtype:
            tensor.copy_(value)
        else:
            tensor.data = value.clone()  # a method that splits Gaussians, say, has more of them later


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _plain(value: Any) -> Any:
    """A copy of a state dict of tensors, containers and numbers; NumPy's numbers as Python's, which have the same bits.

    Raises TrainingError for anything else.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    if isinstance(value, _PLAIN):
        return value
    raise TrainingError(f"A snapshot cannot hold a {type(value).__name__} of an optimizer or of a scheduler.")


def read_generators() -> dict[str, Any]:
    """The states of the generators of Python, NumPy, torch and every CUDA device."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (
            str(kind),
            torch.from_numpy(np.array(keys, dtype=np.int64)),
            int(place),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
        **{f"cuda {i}": one for i, one in enumerate(torch.cuda.get_rng_state_all() if _uses_cuda() else [])},
    }


def write_generators(states: Mapping[str, Any]) -> None:
    """Puts the states of all generators back."""
    random.setstate(states["python"])
    kind, keys, *others = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *others))
    torch.set_rng_state(states["torch"].clone())
    for name, state in states.items():
        if name.startswith("cuda "):
            torch.cuda.set_rng_state(state.clone(), int(name.removeprefix("cuda ")))


def _uses_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def batches_taken(datamanager: Any) -> int | None:
    """How many batches were taken from seeded data workers; None where batches are made in this process."""
    return getattr(getattr(datamanager, "data_queue", None), "taken", None)


def _attributes(pipeline: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """The plain attributes of all modules and of what they hold, by path, and the paths that could not be held.

    Of the model also tensors that are no buffers; a data manager's are its data, which do not change.
    """
    held: dict[str, Any] = {}
    left_out: list[str] = []
    for path, _, name, value in _owned(pipeline):
        if isinstance(value, torch.Generator):
            held[f"{path}#{name}"] = (_GENERATOR, value.get_state())
        elif isinstance(value, Tensor):
            if path.startswith("_model") and value.grad_fn is None:
                held[f"{path}#{name}"] = value.detach().clone()
        elif isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
            left_out.append(f"{path}.{name}, a generator of its own")
        elif _is_plain(value):
            held[f"{path}#{name}"] = _plain(value)
    return held, left_out


def _put_attributes(pipeline: nn.Module, held: Mapping[str, Any]) -> None:
    """Puts attributes back, also those that a module here has not yet, as what it counts from its first step on."""
    modules = dict(pipeline.named_modules())
    here = {f"{path}#{name}": (owner, value) for path, owner, name, value in _owned(pipeline)}
    for key, saved in held.items():
        path, _, name = key.rpartition("#")
        owner, value = here.get(key, (modules.get(path), None))
        if owner is None:
            continue
        if isinstance(saved, tuple) and saved[:1] == (_GENERATOR,):
            own = value if isinstance(value, torch.Generator) else torch.Generator()
            vars(owner)[name] = own.set_state(saved[1].clone())
        elif isinstance(saved, Tensor):
            device = value.device if isinstance(value, Tensor) else next(pipeline.parameters()).device
            vars(owner)[name] = saved.to(device, copy=True)
        else:
            vars(owner)[name] = _plain(saved)


def _model_attributes(pipeline: nn.Module) -> list[tuple[str, nn.Module, str, Any]]:
    """Every attribute of the model's own modules, functions aside: path, module, name, value."""
    modules = [(path, module) for path, module in pipeline.named_modules() if path.startswith("_model")]
    return [
        (path, module, name, value)
        for path, module in modules
        for name, value in vars(module).items()
        if name not in _TORCH_OWN and not callable(value)
    ]


def _forget_newer(pipeline: nn.Module, known: frozenset[str]) -> None:
    """Removes what a model made for itself since then, as the samples that it keeps from its first step on."""
    for path, module, name, _ in _model_attributes(pipeline):
        if f"{path}#{name}" not in known:
            del vars(module)[name]


def _owned(pipeline: nn.Module) -> Iterator[tuple[str, Any, str, Any]]:
    """Every attribute of every module, and of the objects that modules hold directly: path, owner, name, value."""
    seen: set[int] = set()
    for path, module in pipeline.named_modules():
        for name, value in list(vars(module).items()):
            if name in _TORCH_OWN:
                continue
            yield path, module, name, value
            if _is_part(value) and id(value) not in seen:
                seen.add(id(value))
                for inner, item in list(vars(value).items()):
                    yield f"{path}.{name}", value, inner, item


def _is_part(value: Any) -> bool:
    """Whether it is an object with state of its own: no module, no class, no configuration, no function."""
    kind = type(value)
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (nn.Module, Tensor, type))
        and not callable(getattr(value, "start", None))  # a process or a thread
        and kind.__module__.partition(".")[0] not in ("builtins", "torch", "multiprocessing", "functools", "pathlib")
        and not kind.__name__.endswith("Config")
    )


def _is_plain(value: Any, depth: int = 3) -> bool:
    if isinstance(value, (*_PLAIN, np.generic)):
        return True
    if depth and isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_plain(item, depth - 1) for key, item in value.items())
    return bool(depth) and type(value) in (list, tuple) and all(_is_plain(item, depth - 1) for item in value)


@dataclass(kw_only=True)
class SnapshotRing:
    """Keeps snapshots of a training on disk: at most `KEPT`, spread evenly over the steps done so far.

    Where there would be more, every other one goes and twice as many steps lie between two.
    """

    folder: Path
    every: int
    kept: int = KEPT

    def __call__(self, trainer: Any, step: int) -> None:
        """Keeps the state before `step` where it is its turn."""
        if step % self.every:
            return
        save_snapshot(take_snapshot(trainer, step), self.folder)
        while len(found := snapshots_in(self.folder)) > self.kept:
            self.every *= 2
            for number, path in found.items():
                if number % self.every:
                    path.unlink()

    def check_budget(self, trainer: Any) -> None:
        """Lowers how many are kept to what disk and budget hold; ends the process where that is not even two."""
        size = _size(take_snapshot(trainer, 0))
        room = min(BUDGET, shutil.disk_usage(trainer.base_dir).free - _SPARE)
        # One more is being written while all others are still there.
        self.kept = min(self.kept, room // max(size, 1) - 1)
        if self.kept < 2:
            refuse(
                f"--snapshot-every needs {3 * size / 2**30:.3g} GiB for three snapshots, and there is room for "
                f"{max(room, 0) / 2**30:.3g} GiB: leave it out, or free disk space."
            )


def _size(state: Mapping[str, Any]) -> int:
    """Bytes; an optimizer's averages, which come with the first step, included."""
    parameters = sum(tensor.nbytes for tensor in state["parameters"].values())
    return max(sum(tensor.nbytes for _, tensor in _tensors(state)), 4 * parameters)


def save_snapshot(state: State, folder: Path) -> Path:
    """Writes a snapshot under the name of its step; whole or not at all. Equal states are equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state['step']:09d}.pt"
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)  # given a path, it would write the temporary name into the file
    return path


def load_snapshot(path: Path) -> State:
    """A snapshot from a file. Nothing in it is executed. Raises TrainingError where it cannot be read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
    except Exception as error:  # whatever torch says about a broken file
        raise TrainingError(f"{path} is no snapshot that can be read ({type(error).__name__}).") from error
    if version != VERSION:
        raise TrainingError(f"{path} is a snapshot of version {version}; this f3rm-verify reads {VERSION}.")
    return dict(state)


def snapshots_in(folder: Path) -> dict[int, Path]:
    """The snapshots in a folder by step, ascending."""
    found = ((re.fullmatch(r"step-(\d{9,15})\.pt", path.name), path) for path in folder.glob("step-*.pt"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def snapshot_folder(base_dir: Path) -> Path:
    """Where the snapshots of a run are."""
    return base_dir / SNAPSHOTS
