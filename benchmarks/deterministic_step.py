"""What a deterministic training step costs: one and the same step plain and deterministic, in one process.

Plain: no deterministic algorithms, nerfstudio's hash grids. Deterministic: as a training with comprehensive seeding.
Of F3RM and nerfacto in their default sizes and of the built-in preset, on the built-in scene. Prints seconds of a plain
step, and the median and the middle half of the ratios; those of two plain steps are the control.

    python benchmarks/deterministic_step.py [--pairs 30] [--default-pairs 8] [--only NAME]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recorder_overhead import Seconds, report, same_steps, set_up, timed

from f3rm_verify.presets import SMALL
from f3rm_verify.scene import write_scene

CASES = {
    "built-in preset": ("f3rm", SMALL),
    "nerfacto, default size": ("nerfacto", ()),
    "F3RM, default size": ("f3rm", ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--default-pairs", type=int, default=8)
    parser.add_argument("--only", choices=CASES)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("F3RM_VERIFY_TRACE", "off")
    with tempfile.TemporaryDirectory() as folder:
        scene = write_scene(Path(folder) / "scene")
        for name, (method, words) in CASES.items():
            if options.only in (None, name):
                trainer = set_up(method, words, scene, Path(folder) / name)
                pairs = options.pairs if words else options.default_pairs
                ways = {"plain": plain(trainer), "deterministic": timed, "plain again": plain(trainer)}
                report(name, list(same_steps(trainer, ways, pairs, warm_up=6 if words else 1)))


def plain(trainer: Any) -> Callable[[Callable[[], None]], Seconds]:
    from f3rm_verify.f3rm.cost_measures import nothing_on
    from f3rm_verify.f3rm.encoding import switch_encodings

    def timed_plain(step: Callable[[], None]) -> Seconds:
        switch_encodings(trainer.pipeline.model, deterministic=False)
        with nothing_on():
            found = timed(step)
        switch_encodings(trainer.pipeline.model, deterministic=True)
        return found

    return timed_plain


if __name__ == "__main__":
    main()
