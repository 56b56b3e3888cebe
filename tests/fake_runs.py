"""Builds small run directories without a training: the files that ns-train and our trainer leave, with chosen content.

A `FakeRun` says what a run did; change it, then `write` it. Two that were not changed are two equal runs of one
training: all values are the same, only names and times differ.
"""

from __future__ import annotations

import functools
import io
import json
import math
import pickle
import struct
import uuid
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import yaml
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto.summary_pb2 import Summary

from f3rm_verify.compare_runs import compare_runs
from f3rm_verify.difference import Outcome, Result
from f3rm_verify.policy import DIFF_POLICY
from f3rm_verify.readers.trace import Subject
from f3rm_verify.render_store import write_outputs
from f3rm_verify.run_dir import (
    CHECKPOINTS,
    CONFIG,
    EVIDENCE_VERSION,
    MANIFEST,
    METRICS,
    RANKS,
    RENDERS,
    SEEDING,
    RunDir,
)
from f3rm_verify.trace_format import BEFORE_TRAINING, STEP
from f3rm_verify.trace_writer import TraceWriter

Array = np.ndarray[Any, Any]

STEPS = 10
LOSS, PSNR, EVAL, RATE = "Train Loss", "Train Metrics Dict/psnr", "Eval Loss", "learning_rate/fields"
SPEED = "Train Rays / Sec"
TENSOR = "_model.field.weight"
IMAGES = ("eval_0000", "eval_0001")


def _values(name: str, *shape: int) -> Array:
    """Numbers in [0, 1) that depend on the name."""
    generator = np.random.default_rng(list(name.encode()))
    return generator.random(shape, np.float32)


def _scalars() -> dict[str, dict[int, float]]:
    tags = {tag: {step: float(v) for step, v in enumerate(_values(tag, STEPS))} for tag in (LOSS, PSNR, RATE)}
    return {**tags, EVAL: {0: 0.5, 5: 0.25}}


def _checkpoint() -> dict[str, Any]:
    moments = {"step": STEPS, "exp_avg": _values("exp_avg", 4, 2), "exp_avg_sq": _values("exp_avg_sq", 4, 2)}
    return {
        "step": STEPS - 1,
        "pipeline": {TENSOR: _values("weight", 4, 2), "_model.field.bias": _values("bias", 4)},
        "optimizers": {"fields": {"state": {0: moments}, "param_groups": [{"lr": 0.01, "params": [0]}]}},
        "schedulers": {},
        "scalers": {},
    }


def _renders() -> dict[str, dict[str, Array]]:
    outputs = {IMAGES[0]: {"rgb": (8, 9, 3), "feature": (8, 9, 6)}, IMAGES[1]: {"depth": (8, 9, 1)}}
    return {
        image: {name: _values(image + name, *shape) for name, shape in shapes.items()}
        for image, shapes in outputs.items()
    }


def _metrics() -> dict[str, Any]:
    images = {image: {"psnr": 20.5 + i, "ssim": 0.75 + i / 8} for i, image in enumerate(IMAGES)}
    mean = {"psnr": 21.0, "ssim": 0.8125}
    return {"split": "val", "images": images, "mean": mean, "unavailable": {"lpips": "no weights"}}


def _config() -> dict[str, Any]:
    return {
        "data": "scenes/garden",
        "experiment_name": "verify",
        "load_checkpoint": None,
        "load_dir": None,
        "logging": {"relative_log_dir": ".", "steps_per_log": 1},
        "machine": {"device_type": "cpu", "seed": 42},
        "max_num_iterations": STEPS,
        "method_name": "f3rm",
        "relative_model_dir": CHECKPOINTS,
        "timestamp": "reference",
    }


def _manifest() -> dict[str, Any]:
    return {
        "schema_version": EVIDENCE_VERSION,
        "tool_version": "0.1.0",
        "completion": {"first_step": 0, "steps": STEPS},
        "method": "f3rm",
        "argv": [
            "ns-train",
            "f3rm",
            "--output-dir",
            "out",
            "--data",
            "scenes/garden",
            "--machine.seed",
            "42",
            "--a",
            "1",
        ],
        "implementation": {"trainer": "f3rm_verify.f3rm.trainer.F3RMTrainer", "model": "f3rm_verify.f3rm.model.Model"},
        "seed": 42,
        "rank": 0,
        "world_size": 1,
        "encodings": {"field.position_encoding": "torch (HashEncoding)"},
        "environment": {
            "python": "3.11.7",
            "platform": "Linux",
            "packages": {"torch": "2.15.0", "numpy": "2.4.6"},
            "hardware": {"cpu": "a processor", "cores": 2, "gpus": [], "cuda": None, "driver": None},
            "threads": {"intra_op": 2, "inter_op": 2},
            "variables": {"PYTHONHASHSEED": "42", "OMP_NUM_THREADS": "2"},
            "git": {"commit": "0" * 40, "dirty": False},
        },
        "data": {"files": {"images/frame_1.png": "aa", "transforms.json": "bb"}, "features": {"digest": "cc"}},
        "parameters": {"before": "11", "after": "22"},
    }


def claim(name: str, observed: str, verdict: str = "holds") -> dict[str, str]:
    """One entry of a seeding log."""
    return {"claim": name, "asked": "on", "set": "on", "observed": observed, "verdict": verdict, "remedy": ""}


def _seeding() -> dict[str, Any]:
    entries = [claim("PYTHONHASHSEED", "42"), claim("deterministic algorithms", "on")]
    return {"plan": {"base_seed": 42}, "entries": entries, "lines": []}


#: What a fake run records in each step, in this order; the numbers follow from step and subject.
RNG, RAYS, RGB, TERM, GRAD, PARAMS, LR = (
    Subject("rng", "torch cpu"),
    Subject("batch", "rays origins"),
    Subject("forward", "rgb"),
    Subject("loss", "rgb_loss", "float32"),
    Subject("grad", "fields"),
    Subject("params", "fields"),
    Subject("schedule", "learning rate fields", "float64"),
)
INIT = Subject("init", "fields")


def bits(value: float, kind: str = "float32") -> int:
    """The bits of a number."""
    return int(np.array(value, kind).view("u4" if kind == "float32" else "u8"))


@dataclass(kw_only=True)
class FakeTrace:
    """What a flight recorder wrote: what was before the first step, then the records of each step, in their order."""

    before: dict[Subject, int] = field(default_factory=lambda: {INIT: 7})
    steps: dict[int, dict[Subject, int]] = field(default_factory=lambda: {step: _traced(step) for step in range(STEPS)})
    algorithm: str = "xxh3_64 v1"
    mode: str = "steps"
    not_recorded: dict[str, str] = field(default_factory=dict)
    complete: bool = True

    def write(self, path: Path) -> None:
        """Writes both files into the run directory at `path`."""
        writer = TraceWriter(path, mode=self.mode, algorithm=self.algorithm)
        frames = [(BEFORE_TRAINING, min(self.steps, default=0), self.before)]
        for kind, step, records in [*frames, *((STEP, *item) for item in self.steps.items())]:
            writer.add(kind, step, [(key.stage, key.name, key.kind, value) for key, value in records.items()])
        writer.close(self.not_recorded, complete=self.complete)


def _traced(step: int) -> dict[Subject, int]:
    values = {subject: 1000 * step + place for place, subject in enumerate((RNG, RAYS, RGB, TERM, GRAD, PARAMS, LR))}
    return values | {TERM: bits(1 / (step + 1)), LR: bits(0.01, "float64")}


@dataclass(kw_only=True)
class FakeRun:
    """What a run did; `ours` leaves evidence, a plain one does not. What is None is not written.

    `checkpoints` are trees by step, `scalars` values by tag and step. Attributes whose files are JSON may hold text,
    which is then written as it is.
    """

    ours: bool = True
    scalars: dict[str, dict[int, float]] = field(default_factory=_scalars)
    checkpoints: dict[int, dict[str, Any]] = field(default_factory=lambda: {STEPS - 1: _checkpoint()})
    config: Any = field(default_factory=_config)
    manifest: Any = field(default_factory=_manifest)
    seeding: Any = field(default_factory=_seeding)
    metrics: Any = field(default_factory=_metrics)
    trace: FakeTrace | None = field(default_factory=FakeTrace)
    renders: dict[str, dict[str, Array]] = field(default_factory=_renders)
    ranks: dict[int, FakeRun] = field(default_factory=dict)

    def write(self, path: Path) -> RunDir:
        """Writes the run to `path`, with a run id and times of its own."""
        path.mkdir(parents=True)
        number = uuid.uuid4().int
        start = 1.7e9 + number % 10**6 + number % 997 / 997
        if self.config is not None:
            text = self.config if isinstance(self.config, str) else yaml.safe_dump(self.config)
            (path / CONFIG).write_text(text, "utf8")
        for step, tree in self.checkpoints.items():
            write_checkpoint(path / CHECKPOINTS / f"step-{step:09d}.ckpt", tree)
        if self.scalars:
            write_events(path / f"events.out.tfevents.{int(start)}.host.1.0", self.scalars, start=start)
        for rank, run in self.ranks.items():
            run.write(path / RANKS / str(rank))
        if self.ours:
            self._write_evidence(path, {"run_id": f"{number:032x}", "nonce": f"n{number:x}", "start": start})
        return RunDir(path)

    def _write_evidence(self, path: Path, identity: Mapping[str, Any]) -> None:
        manifest = {**identity, **self.manifest} if isinstance(self.manifest, dict) else self.manifest
        files = {MANIFEST: manifest, SEEDING: self.seeding, METRICS: self.metrics}
        for name, data in files.items():
            if data is not None:
                (path / name).parent.mkdir(exist_ok=True, parents=True)
                (path / name).write_text(data if isinstance(data, str) else json.dumps(data), "utf8")
        if self.trace is not None:
            self.trace.write(path)
        for image, outputs in self.renders.items():
            write_outputs(path / RENDERS, image, outputs)


def rank_run(rank: int, ranks: int) -> FakeRun:
    """What a rank above 0 leaves."""
    return FakeRun(
        manifest=_manifest() | {"rank": rank, "world_size": ranks},
        scalars={LOSS: {step: 1 / (step + 1 + rank) for step in range(STEPS)}},
        checkpoints={},
        metrics=None,
        renders={},
    )


def run_of_ranks(ranks: int = 3) -> FakeRun:
    """What a run with several ranks leaves."""
    return FakeRun(
        manifest=_manifest() | {"world_size": ranks},
        ranks={rank: rank_run(rank, ranks) for rank in range(1, ranks)},
    )


def plain_run() -> FakeRun:
    """What `ns-train` leaves on its own."""
    return FakeRun(ours=False)


def write_events(path: Path, scalars: Mapping[str, Mapping[int, float]], *, start: float) -> None:
    """A TensorBoard event file with the scalars in the order of their steps, and a speed that differs by nature."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted((step, tag, value) for tag, values in scalars.items() for step, value in values.items())
    rows += [(step, SPEED, start % 1000 + step) for step in sorted({step for step, _, _ in rows})]
    events = [event_pb2.Event(file_version="brain.Event:2").SerializeToString(), *(_event(*row) for row in rows)]
    with path.open("wb") as stream:
        for index, event in enumerate(events):
            stream.write(record(struct.pack("<Bd", 9, start + index / 64) + event))


@functools.lru_cache(maxsize=10_000)
def _event(step: int, tag: str, value: float) -> bytes:
    """An event without its time, which is its first field."""
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
    return bytes(event_pb2.Event(step=step, summary=summary).SerializeToString())


def record(data: bytes) -> bytes:
    """What TensorBoard's RecordWriter writes, whose checksums in Python take most of the time of these tests."""
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def write_checkpoint(path: Path, tree: Mapping[str, Any]) -> None:
    """What `torch.save` writes for dicts, lists and scalars with float32 arrays as tensors; without torch."""
    storages: list[bytes] = []
    content = pickle.PROTO + b"\x02" + _pickled(tree, storages) + pickle.STOP
    files = {"data.pkl": content, "byteorder": b"little"}
    files |= {f"data/{key}": data for key, data in enumerate(storages)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, data in {**files, "version": b"3\n"}.items():
            zipped.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def _pickled(value: Any, storages: list[bytes]) -> bytes:
    if isinstance(value, np.ndarray):
        return _pickled_tensor(value, storages)
    if isinstance(value, (dict, list, tuple)):
        items = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
        start, end = {
            dict: (pickle.EMPTY_DICT + pickle.MARK, pickle.SETITEMS),
            list: (pickle.EMPTY_LIST + pickle.MARK, pickle.APPENDS),
            tuple: (pickle.MARK, pickle.TUPLE),
        }[type(value)]
        return start + b"".join(_pickled(item, storages) for item in items) + end
    if value is None or isinstance(value, bool):
        return {None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value]
    if isinstance(value, int):
        return pickle.BININT + struct.pack("<i", value)
    if isinstance(value, float):
        return pickle.BINFLOAT + struct.pack(">d", value)
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def _pickled_tensor(array: Array, storages: list[bytes]) -> bytes:
    assert array.dtype == np.float32
    key = str(len(storages))
    storages.append(np.ascontiguousarray(array).tobytes())
    kind = b"ctorch\nFloatStorage\n"
    parts = [_pickled("storage", []), kind, *(_pickled(part, []) for part in (key, "cpu", array.size))]
    storage = pickle.MARK + b"".join(parts) + pickle.TUPLE + pickle.BINPERSID
    strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    hooks = b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    layout = b"".join(_pickled(part, []) for part in (0, array.shape, strides, False))
    arguments = pickle.MARK + storage + layout + hooks + pickle.TUPLE
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + pickle.REDUCE


def compare(reference: RunDir, candidate: RunDir, **options: Any) -> Result:
    """The result, after a check of what holds for every one: sides swapped alike, and plain data that comes back."""
    options = {"policy": DIFF_POLICY, **options}
    result = compare_runs(reference, {"candidate": candidate}, **options)
    swapped = compare_runs(candidate, {"candidate": reference}, **options)
    assert swapped.outcome is result.outcome
    assert artefacts(swapped) == artefacts(result)
    assert (result.first_divergence is None) == (result.outcome is not Outcome.DIVERGED)
    assert (result.reasons == ()) == (result.outcome in (Outcome.REPRODUCIBLE, Outcome.WITHIN_TOLERANCE))
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert Result.from_dict(data).to_dict() == result.to_dict() == data
    return result


def compare_fakes(path: Path, reference: FakeRun, candidate: FakeRun, **options: Any) -> Result:
    """The same of two runs that are written below `path`."""
    return compare(reference.write(path / "reference"), candidate.write(path / "candidate"), **options)


def artefacts(result: Result) -> dict[str, str]:
    """The verdict of each artefact."""
    return {node.name: node.verdict.value for node in result.root.children}


def leaves(result: Result, *verdicts: str) -> list[str]:
    """The paths of the leaves with one of these verdicts."""
    found = ((path, node.verdict.value) for path, node in result.root.leaves())
    return ["/".join(path[1:]) for path, verdict in found if verdict in verdicts]
