"""What the flight recorder costs a step: steps with and without it in turn, in one process. Trains nothing.

Of the built-in preset and of nerfacto in its default size, on the built-in scene. Prints seconds of a step without the
recorder, and the median and the middle half of the ratios of neighbouring steps, in wall time and in CPU time.

    python benchmarks/recorder_overhead.py [--pairs 30] [--nerfacto-pairs 8] [--trace steps|tensors]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from f3rm_verify.presets import SMALL
from f3rm_verify.scene import write_scene

WARM_UP = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--nerfacto-pairs", type=int, default=8)
    parser.add_argument("--trace", choices=("steps", "tensors"), default="steps")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("F3RM_VERIFY_TRACE", "off")  # the benchmark hangs its own recorder on the trainer
    with tempfile.TemporaryDirectory() as folder:
        scene = write_scene(Path(folder) / "scene")
        for name, method, words, pairs in (
            ("built-in preset", "f3rm", SMALL, options.pairs),
            ("nerfacto, default size", "nerfacto", (), options.nerfacto_pairs),
        ):
            if pairs:
                trainer = set_up(method, words, scene, Path(folder) / method)
                report(name, *measure(trainer, Path(folder) / "trace", options.trace, pairs))


def set_up(method: str, words: tuple[str, ...], scene: Path, output: Path) -> Any:
    """A trainer of ours, ready for its first step."""
    import tyro
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion

    from f3rm_verify.f3rm.wrap import wrap_config

    arguments = [method, "--data", str(scene), "--output-dir", str(output), "--vis", "tensorboard", *words]
    config = wrap_config(tyro.cli(AnnotatedBaseConfigUnion, args=[*arguments, "--machine.device-type", "cpu"]))
    config.pipeline.datamanager.data = config.data
    config.set_timestamp()
    trainer: Any = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    return trainer


def measure(trainer: Any, folder: Path, mode: str, pairs: int) -> tuple[list[tuple[float, float]], ...]:
    """(wall, CPU) seconds of the steps with the recorder, and of those without it."""
    from f3rm_verify.f3rm.cost import Stepper
    from f3rm_verify.f3rm.flight_recorder import make_recorder

    stepper = Stepper(trainer, after=lambda: None)
    for _ in range(WARM_UP):
        stepper()
    within, without = [], []
    for pair in range(pairs):
        for recorded in (True, False) if pair % 2 else (False, True):
            if not recorded:
                without.append(timed(stepper))
                continue
            recorder = make_recorder(trainer, folder, mode=mode)
            recorder.attach()
            recorder.end_step()  # what is recorded once, before the first step
            recorder.flush()
            within.append(timed(stepper, recorder.end_step, recorder.flush))
            recorder.close(complete=False)
    return within, without


def timed(*calls: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for call in calls:
        call()
    return time.perf_counter() - wall, time.process_time() - cpu


def report(name: str, within: list[tuple[float, float]], without: list[tuple[float, float]]) -> None:
    for number, clock in enumerate(("wall", "CPU")):
        ratios = [a[number] / b[number] for a, b in zip(within, without, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        seconds = statistics.median(step[number] for step in without)
        print(
            f"{name}: {clock} time of a step {seconds:.3f} s, with the recorder {middle:.3f} of it "
            f"(middle half {low:.3f} to {high:.3f}, {len(ratios)} pairs)",
            flush=True,
        )


if __name__ == "__main__":
    main()
