"""What the flight recorder costs a step: one and the same step with and without it, in one process. Trains nothing.

Before each, the state is put back: steps differ in what they do (nerfacto trains its proposal networks in some of them
only), and two of them that follow each other cannot be compared. Of the built-in preset and of nerfacto in its default
size, on the built-in scene. Prints seconds of a step without the recorder, and the median and the middle half of the
ratios of the pairs, in wall time and in CPU time; those of two steps without it are the control.

    python benchmarks/recorder_overhead.py [--pairs 60] [--nerfacto-pairs 12] [--trace steps|tensors]
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from f3rm_verify.presets import SMALL
from f3rm_verify.scene import write_scene

WARM_UP = 6
WITHOUT, WITHIN, CONTROL = "without the recorder", "with it", "without it again"

Seconds = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--nerfacto-pairs", type=int, default=12)
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
                report(name, list(measure(trainer, Path(folder) / "trace", options.trace, pairs)))


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


def measure(trainer: Any, folder: Path, mode: str, pairs: int) -> Iterator[dict[str, Seconds]]:
    """(wall, CPU) seconds of each step: without the recorder, with it, and without it again."""
    from f3rm_verify.f3rm.flight_recorder import make_recorder

    recorder = make_recorder(trainer, folder, mode=mode)

    def recorded(step: Callable[[], None]) -> Seconds:
        recorder.attach()
        recorder.end_step()  # what is recorded once, before the first step
        found = timed(step, recorder.end_step)
        recorder.detach()
        recorder.flush()  # a training does this about once a second
        return found

    yield from same_steps(trainer, {WITHOUT: timed, WITHIN: recorded, CONTROL: timed}, pairs, warm_up=WARM_UP)
    recorder.close(complete=False)


def same_steps(
    trainer: Any, ways: Mapping[str, Callable[[Callable[[], None]], Seconds]], count: int, *, warm_up: int
) -> Iterator[dict[str, Seconds]]:
    """What each way of timing a step finds of one step after the other, each from one state, in turning order."""
    from f3rm_verify.f3rm.cost import train_step
    from f3rm_verify.f3rm.snapshots import put_back, take_snapshot

    for number in range(warm_up + count):
        state = take_snapshot(trainer, number)
        turn = number % len(ways)
        found = {}
        for way in [*ways, *ways][turn : turn + len(ways)]:
            put_back(trainer, state)
            found[way] = ways[way](functools.partial(train_step, trainer, number))
        if number >= warm_up:
            yield {way: found[way] for way in ways}


def timed(*calls: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    for call in calls:
        call()
    return time.perf_counter() - wall, time.process_time() - cpu


def report(name: str, steps: list[dict[str, Seconds]]) -> None:
    """Prints the first way, and the others as shares of it."""
    first, *others = steps[0]
    for number, clock in enumerate(("wall", "CPU")):
        print(
            f"{name}: {clock} time of a step {first} {statistics.median(step[first][number] for step in steps):.3f} s"
        )
        for way in others:
            ratios = [step[way][number] / step[first][number] for step in steps]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            print(f"  {way}: {middle:.3f} of it (middle half {low:.3f} to {high:.3f}, {len(ratios)} steps)", flush=True)


if __name__ == "__main__":
    main()
