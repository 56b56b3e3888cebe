"""Fake ns-train programs: what a training does to the world, in milliseconds and with nothing but the standard library.

A test writes the body of a program with `program`; the body runs as a process of its own, with everything in here at
hand, and ends after a minute even where the test that started it is broken. What a whole training leaves can be
compared to an honest verdict.
"""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import types
import zipfile
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
#: What a whole, successful training does.
GOOD = "run = begin(); run.steps(); run.finish()"


#: What a manifest says about the conditions of a training, beside method and seed.
CONDITIONS: dict[str, Any] = {
    "tool_version": "0",
    "implementation": {"trainer": "fake"},
    "rank": 0,
    "world_size": 1,
    "encodings": {"field": "fake"},
    "environment": {
        "python": "3",
        "platform": "fake",
        "packages": {"fake": "1"},
        "hardware": {"cpu": "fake"},
        "threads": {"intra_op": 2, "inter_op": 1},
        "variables": {"PYTHONHASHSEED": "42"},
        "git": None,
    },
    "data": {"files": {"a.png": "0"}, "features": None},
}


def program(folder: Path, body: str, *, name: str = "ns-train") -> Path:
    """An executable program that runs `body` with everything of this module at hand."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / f"{name}.py"
    paths = [str(ROOT), str(ROOT.parent)]
    script.write_text(
        f"import sys\nsys.path[:0] = {paths!r}\nfrom fake_training import *\nsignal.alarm(60)\n{body}\n", "utf8"
    )
    path = folder / name
    path.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S '{script}' \"$@\"\n", "utf8")
    path.chmod(0o755)
    return path


def begin(**changes: Any) -> FakeRun:
    """Starts as our trainer does: config.yml, then the evidence. `changes` go into the manifest."""
    run = FakeRun()
    run.write("config.yml", run.config())
    run.manifest.update(changes)
    run.write_manifest()
    run.write_json("verify/seeding.json", {"entries": [], "lines": []} | run.seeding())
    run.status("setting up")
    return run


def stock() -> FakeRun:
    """Trains as nerfstudio's own trainer does, without any evidence, after saying why in the log."""
    print("Error: Could not load methods from environment variable NERFSTUDIO_METHOD_CONFIGS", flush=True)
    print("Config of the stock method\n" * 100, flush=True)
    run = FakeRun()
    run.write("config.yml", run.config())
    run.write_events()
    return run


class FakeRun:
    """One fake training, as its command line and its environment want it."""

    def __init__(self) -> None:
        self.method, words = sys.argv[1], sys.argv[2:]
        self.options = dict(zip(words[::2], words[1::2], strict=False))
        self.side = self.options["--timestamp"]
        self.seed = int(self.options["--machine.seed"])
        self.iters = int(self.options["--max-num-iterations"])
        self.output = Path(self.options["--output-dir"])
        self.directory = self.output / self.options["--experiment-name"] / self.method / self.side
        self.directory.mkdir(parents=True)
        self.losses: list[float] = []
        self.wall_time = time.time()
        self.manifest: dict[str, Any] = {
            "schema_version": 1,
            "run_id": f"{os.getpid()}-{self.side}",
            "nonce": os.environ.get("F3RM_VERIFY_NONCE"),
            "completion": None,
            "method": self.method,
            "argv": sys.argv,
            "seed": self.seed,
            "parameters": {"before": "0", "after": None},
            **CONDITIONS,
        }
        self.write_json(f"../../../calls/{self.side}.json", {"argv": sys.argv, "env": dict(os.environ), "ids": ids()})

    def config(self) -> str:
        return f"method_name: {self.method}\nmachine:\n  seed: {self.seed}\nmax_num_iterations: {self.iters}\n"

    def seeding(self) -> dict[str, Any]:
        names = ("claim", "asked", "set", "observed", "verdict", "remedy")
        return {"entries": [dict(zip(names, ("python random", "42", "42", "42", "holds", ""), strict=True))]}

    def write(self, relative: str, content: str | bytes) -> None:
        path = self.directory / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
        temporary.replace(path)

    def write_json(self, relative: str, data: Any) -> None:
        self.write(relative, json.dumps(data))

    def write_manifest(self) -> None:
        self.write_json("verify/manifest.json", self.manifest)

    def status(self, phase: str, step: int | None = None, steps: int = 0, loss: float | None = None) -> None:
        self.write_json("verify/status.json", {"phase": phase, "step": step, "steps": steps, "loss": loss})

    def step(self, loss: float | None = None) -> None:
        """One more step; by default with a loss that follows from seed and step."""
        number = len(self.losses)
        self.losses.append(1 / (self.seed + number + 1) if loss is None else loss)
        self.write_events()
        self.status("training", number, self.iters, self.losses[-1])

    def steps(self) -> None:
        while len(self.losses) < self.iters:
            self.step()

    def wait_for(self, side: str, step: int) -> None:
        """Returns when another side has finished that step."""
        status = self.directory.parent / side / "verify" / "status.json"
        while not status.exists() or json.loads(status.read_text())["step"] not in range(step, self.iters):
            time.sleep(0.01)

    def write_events(self) -> None:
        records = [_field(3, b"brain.Event:2")]
        for step, loss in enumerate(self.losses):
            value = _field(1, b"Train Loss") + b"\x15" + struct.pack("<f", loss)
            records.append(b"\x10" + _varint(step) + _field(5, _field(1, value)))
        stamped = [b"\x09" + struct.pack("<d", self.wall_time + i) + record for i, record in enumerate(records)]
        self.write("events.out.tfevents.1700000000.host.1.0", b"".join(_framed(record) for record in stamped))

    def finish(self, *, completion: bool = True, value: float = 0.0) -> None:
        """Ends as a whole training does: checkpoint, completion record, metrics, renders."""
        last = len(self.losses) - 1
        parameters = [value + self.seed, *self.losses]
        self.write(f"nerfstudio_models/step-{last:09d}.ckpt", checkpoint(last, parameters))
        if completion:
            self.manifest.update(completion={"first_step": 0, "steps": len(self.losses)})
            self.manifest["parameters"]["after"] = "1"
            self.write_manifest()
        metrics = {"psnr": 20 + value}
        self.write_json(
            "verify/metrics.json",
            {"split": "val", "images": {"eval_0000": metrics}, "mean": metrics, "unavailable": {}},
        )
        self.write("verify/renders/eval_0000/depth.npy", npy([value + self.seed] * 16))
        self.write_trace(value)
        self.status("done", last, self.iters)

    def write_trace(self, value: float = 0.0) -> None:
        """What the flight recorder leaves: the parameters before the first step, then the loss of each."""
        mode = os.environ.get("F3RM_VERIFY_TRACE", "steps")
        if mode == "off":
            return
        numbers = [struct.unpack("<I", struct.pack("<f", number))[0] for number in (value + self.seed, *self.losses)]
        subjects = [
            {"stage": "init", "name": "fields", "kind": "digest"},
            {"stage": "loss", "name": "loss", "kind": "float32"},
        ]
        head = {"schema_version": 1, "algorithm": "fake", "mode": mode, "not_recorded": {}, "consumers": {}}
        head |= {"complete": True, "frames": len(numbers), "subjects": subjects}
        bodies = [
            struct.pack("<HHqHQ", int(place > 0), 1, max(0, place - 1), int(place > 0), number)
            for place, number in enumerate(numbers)
        ]
        self.write("verify/trace.bin", b"".join(struct.pack("<I", zlib.crc32(body)) + body for body in bodies))
        self.write_json("verify/trace.json", head)


def ids() -> dict[str, int]:
    return {"pid": os.getpid(), "group": os.getpgrp(), "session": os.getsid(0)}


def spawn_worker(*, stubborn: bool = False) -> int:
    """A process further down in this training's group that sleeps for a minute, and maybe ignores SIGTERM."""
    ignore = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN); "
    )
    script = f"{ignore if stubborn else ''}print('ready', flush=True); import time; time.sleep(60)"
    worker = subprocess.Popen([sys.executable, "-I", "-S", "-c", script], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    worker.stdout.readline()
    return worker.pid


def ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def checkpoint(step: int, parameters: list[float]) -> bytes:
    """What torch.save writes for a training of one parameter tensor."""

    class FloatStorage:
        pass

    def _rebuild_tensor_v2(*_: Any) -> None:
        raise AssertionError

    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for thing, module in ((FloatStorage, torch), (_rebuild_tensor_v2, utils)):
        thing.__module__, thing.__qualname__ = module.__name__, thing.__name__
        setattr(module, thing.__name__, thing)

    class Tensor:
        def __reduce__(self) -> Any:
            shape = (len(parameters),)
            return _rebuild_tensor_v2, (FloatStorage(), 0, shape, (1,), False, collections.OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> Any:
            return ("storage", FloatStorage, "0", "cpu", len(parameters)) if isinstance(thing, FloatStorage) else None

    data = io.BytesIO()
    saved = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules.update({"torch": torch, "torch._utils": utils})
    try:
        content = {"step": step, "pipeline": {"weight": Tensor()}, "optimizers": {}, "schedulers": {}, "scalers": {}}
        Pickler(data, protocol=2).dump(content)
    finally:
        for name, module in saved.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data.getvalue())
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", struct.pack(f"<{len(parameters)}f", *parameters))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def npy(values: list[float]) -> bytes:
    side = int(len(values) ** 0.5)
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({side}, {side}, 1), }}"
    header += " " * (63 - (len(header) + 10) % 64) + "\n"
    return (
        b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + struct.pack(f"<{side**2}f", *values)
    )


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _framed(record: bytes) -> bytes:
    length = struct.pack("<Q", len(record))
    return length + _masked_crc(length) + record + _masked_crc(record)


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


__all__ = [name for name in globals() if not name.startswith("_") and name != "annotations"]
