"""What torch's deterministic algorithms cost in time: training steps of F3RM in three modes, in turn, in one process.

The modes follow each other step by step, so that whatever else the machine does meets all of them alike. Printed for
each mode: the median of its time over the plain step beside it, and the middle half of these ratios.

    python benchmarks/determinism_cost.py [--steps 40] [--rays 384]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion

from f3rm_verify.presets import SMALL
from f3rm_verify.scene import write_scene

WARM_UP = 5
#: Deterministic algorithms, filling of fresh memory.
MODES = {"plain": (False, False), "deterministic, memory not filled": (True, False), "deterministic": (True, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="steps of each mode")
    parser.add_argument("--rays", type=int, default=384, help="rays of a training batch")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(trainer(Path(folder), options.rays), options.steps)
    print(f"F3RM, small preset, {options.rays} rays, {options.steps} steps each, {torch.get_num_threads()} threads")
    for mode, taken in seconds.items():
        ratios = [own / plain for own, plain in zip(taken, seconds["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{mode:<34} {statistics.median(taken) * 1000:7.1f} ms, {middle:.2f} of plain ({low:.2f} to {high:.2f})")


def trainer(folder: Path, rays: int) -> Any:
    """A trainer of the built-in scene, set up, and warm after a few steps."""
    os.chdir(folder)
    scene = write_scene(folder / "scene")
    words = ["f3rm", "--data", str(scene), "--output-dir", "out", "--vis", "tensorboard", *SMALL]
    words += ["--pipeline.datamanager.train-num-rays-per-batch", str(rays), "--machine.device-type", "cpu"]
    config: Any = tyro.cli(AnnotatedBaseConfigUnion, args=words)
    config.pipeline.datamanager.data = config.data
    config.set_timestamp()
    made = config.setup(local_rank=0, world_size=1)
    made.setup()
    for step in range(WARM_UP):
        made.train_iteration(step)
    return made


def measure(made: Any, steps: int) -> dict[str, list[float]]:
    """Seconds of each step, by mode."""
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    step = WARM_UP
    for turn in range(steps):
        first = turn % len(MODES)  # each round in another order: no mode always follows the same other one
        for mode in [*MODES, *MODES][first : first + len(MODES)]:
            deterministic, fills = MODES[mode]
            torch.use_deterministic_algorithms(deterministic)
            torch.utils.deterministic.fill_uninitialized_memory = fills
            start = time.perf_counter()
            made.train_iteration(step)
            seconds[mode].append(time.perf_counter() - start)
            step += 1
    return seconds


if __name__ == "__main__":
    main()
