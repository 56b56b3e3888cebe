"""Does the flight recorder hide a race? Unseeded pairs on two threads, with it and without it, in turn.

The stock hash grids without deterministic algorithms. Prints for each pair whether it diverged.

    python benchmarks/recorder_races.py [--pairs 5] [--iters 30]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = Path(sys.executable).parent / "f3rm-verify"
OFF = ("--enable-comprehensive-seeding", "False", "--encoding", "stock")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--iters", type=int, default=30)
    options = parser.parse_args()
    diverged = {"steps": 0, "off": 0}
    for number in range(options.pairs):
        for trace in diverged:
            verdict, first = pair(trace, options.iters)
            diverged[trace] += verdict == "diverged"
            print(f"pair {number + 1}, --trace {trace}: {verdict}{first}", flush=True)
    for trace, count in diverged.items():
        print(f"--trace {trace}: {count} of {options.pairs} pairs diverged")


def pair(trace: str, iters: int) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        words = [PROGRAM, "run", "--iters", iters, "--trace", trace, "--output-dir", folder, "--", *OFF]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        subprocess.run([str(word) for word in words], env=environment, capture_output=True, check=False)
        result = json.loads(next(Path(folder).glob("*/result.json")).read_text("utf8"))
    first = result["first_divergence"]
    return result["verdict"], f" first at step {first['step']}, {first['stage']}, {first['subject']}" if first else ""


if __name__ == "__main__":
    main()
