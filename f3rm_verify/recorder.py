"""What the trainer calls to leave evidence in `<run>/verify/`. Knows no nerfstudio; never changes the training."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f3rm_verify import __version__, launch_variables
from f3rm_verify.files import replacing
from f3rm_verify.memory import peak_rss_bytes
from f3rm_verify.run_dir import EVIDENCE_VERSION, MANIFEST, METRICS, SEEDING, STATUS

if TYPE_CHECKING:
    import torch

#: The least time between two writes of the status file, in seconds.
_STATUS_INTERVAL = 0.5


class Recorder:
    """Writes the evidence of one training process. Every file is replaced whole, so a reader never sees half of one."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._status_due = 0.0
        self._phase = ""
        self._unwritten: dict[str, Any] | None = None
        self._status_lock = threading.Lock()
        self.manifest: dict[str, Any] = {
            "schema_version": EVIDENCE_VERSION,
            "tool_version": __version__,
            "run_id": uuid.uuid4().hex,
            "nonce": os.environ.get(launch_variables.NONCE),
            "pid": os.getpid(),
            "start": time.time(),
            "end": None,
            "completion": None,
        }

    def update_manifest(self, facts: Mapping[str, Any]) -> None:
        """Adds `facts` to the manifest and writes it."""
        self.manifest.update(facts)
        write_json(self._run / MANIFEST, self.manifest)

    def write_seeding(self, log: Mapping[str, Any]) -> None:
        """Writes the seeding validation log."""
        write_json(self._run / SEEDING, log)

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of the evaluation images."""
        write_json(self._run / METRICS, metrics)

    def status(self, phase: str, *, step: int | None = None, steps: int = 0, loss: float | None = None) -> bool:
        """Says where the training is, for whoever watches: at most a few times a second, and when the phase changes.

        `step` is the number of the last finished step, from 0. Says whether it was time to write. What was held back is
        written a little later where nothing follows it, so that a training that hangs is seen at its last step. A
        status that cannot be written (a full disk) does not end the training; the evidence that follows will.
        """
        now = time.monotonic()
        with self._status_lock:
            waiting = self._unwritten is not None
            self._unwritten = {"phase": phase, "step": step, "steps": steps, "loss": loss}
        if phase == self._phase and now < self._status_due:
            if not waiting:
                late = threading.Timer(2 * _STATUS_INTERVAL, self.flush_status)
                late.daemon = True
                late.start()
            return False
        self._status_due, self._phase = now + _STATUS_INTERVAL, phase
        self.flush_status()
        return True

    def flush_status(self) -> None:
        """Writes the last status, where that was held back."""
        with self._status_lock:
            status, self._unwritten = self._unwritten, None
            if status is not None:
                with suppress(OSError):
                    write_json(self._run / STATUS, {**status, "peak_rss_bytes": peak_rss_bytes()})

    def complete(self, *, first_step: int, steps: int) -> None:
        """Writes the completion record: the training ended by itself after `steps` steps, as counted."""
        completion = {"first_step": first_step, "steps": steps}
        self.update_manifest({"completion": completion, "end": time.time()})


def write_json(path: Path, data: Any) -> None:
    """Writes `data` to a temporary name beside `path` and renames it."""
    try:
        content = json.dumps(data, indent=1, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # A file name or a variable that is not UTF-8 arrives as lone surrogates, which only JSON's escapes can hold.
        content = json.dumps(data, indent=1).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content + b"\n")


def digest_files(files: Iterable[Path]) -> dict[str, str]:
    """xxh3_128 of each file's content, by path."""
    import xxhash

    digests = {}
    for path in files:
        state = xxhash.xxh3_128()
        with path.open("rb") as file:
            while block := file.read(2**20):
                state.update(block)
        digests[str(path)] = state.hexdigest()
    return digests


def digest_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """One xxh3_128 over names, dtypes, shapes and bytes, in the order given."""
    import torch
    import xxhash

    state = xxhash.xxh3_128()
    for name, tensor in tensors:
        state.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return state.hexdigest()
