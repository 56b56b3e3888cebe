"""Wall time of `f3rm-verify run` against what a person would type: ns-train, ns-train, ns-eval, ns-eval.

The same scene, preset, seed and steps; the two are timed in turn, in one sitting. Prints each pair, then the median
ratio and its range.

    python benchmarks/run_wall_time.py [--iters 300] [--repeat 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from f3rm_verify.presets import SMALL
from f3rm_verify.scene import write_scene

BIN = Path(sys.executable).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iters", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    ratios = []
    for number in range(options.repeat):
        with tempfile.TemporaryDirectory() as folder:
            ours = verification(Path(folder), options.iters)
            plain = plain_sequence(Path(folder), options.iters)
        ratios.append(ours / plain)
        print(
            f"pair {number + 1}: run {ours:.1f} s, plain sequence {plain:.1f} s, ratio {ours / plain:.2f}", flush=True
        )
    print(f"ratio: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


def verification(folder: Path, iters: int) -> float:
    return timed([BIN / "f3rm-verify", "run", "--iters", iters, "--output-dir", folder / "ours"])


def plain_sequence(folder: Path, iters: int) -> float:
    scene = write_scene(folder / "scene")
    train = [BIN / "ns-train", "f3rm", "--data", scene, "--output-dir", folder / "plain", "--experiment-name", "x"]
    train += ["--vis", "tensorboard", "--machine.seed", 42, "--max-num-iterations", iters]
    train += ["--logging.steps-per-log", 1, "--logging.local-writer.enable", "False"]
    seconds = 0.0
    for name in ("a", "b"):
        seconds += timed([*train, "--timestamp", name, *SMALL])
    for name in ("a", "b"):
        run = folder / "plain" / "x" / "f3rm" / name
        evaluate = [BIN / "ns-eval", "--load-config", run / "config.yml", "--output-path", run / "eval.json"]
        seconds += timed([*evaluate, "--render-output-path", run / "renders"])
    return seconds


def timed(command: Sequence[object]) -> float:
    start = time.monotonic()
    # nerfstudio 1.1.5 saves NumPy numbers in its checkpoints, which torch from 2.6 on refuses to load without this.
    environment = {**os.environ, "TERM": "dumb", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    subprocess.run([str(word) for word in command], check=True, capture_output=True, env=environment)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
