"""Runs the real command, and reads what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
#: A verification run has the user's thread count; the trainings here must have more than one, or nothing diverges.
THREADS = "2"


@dataclass(frozen=True)
class Finished:
    """A command that ended, with the result file that it wrote, if any."""

    code: int
    output: str
    errors: str
    folder: Path
    result: Mapping[str, Any]

    def side(self, name: str) -> Path:
        """The run directory of a side."""
        return next((self.folder).glob(f"*/verify/*/{name}"))

    def artefact(self, name: str) -> Mapping[str, Any]:
        """The node of an artefact in the result."""
        return next(node for node in self.result["root"]["children"] if node["name"] == name)


def environment(**changes: str) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("F3RM_VERIFY", "NERFSTUDIO_"))}
    return {**keep, "OMP_NUM_THREADS": THREADS, **changes}


def user_methods(*names: str) -> dict[str, str]:
    """What the environment needs for nerfstudio to find the methods of methods.py under their names."""
    methods = ",".join(f"{name}=methods:{name}" for name in names)
    return {"NERFSTUDIO_METHOD_CONFIGS": methods, "PYTHONPATH": str(Path(__file__).parent)}


def verify(folder: Path, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 400) -> Finished:
    """Runs `f3rm-verify run` into `folder`, and reads the result file that it left there."""
    done = subprocess.run(
        [str(BIN / "f3rm-verify"), "run", "--output-dir", str(folder), *arguments],
        env=environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    results = list(folder.glob("*/result.json"))
    result = json.loads(results[0].read_text("utf8")) if results else {}
    return Finished(done.returncode, done.stdout, done.stderr, folder, result)
