"""Comparing renders: `diff` on many differing images, and pairs of PNGs against OpenCV + numpy, odiff and scikit-image.

Everything is timed in turn in one sitting; prints medians and ranges of this tool's time over each peer's, and the time
and peak memory of `diff`, with and without the pictures of its reports. odiff is measured where its command is on the
path (npm install -g odiff-bin).

    python benchmarks/compare_renders.py [--images 500] [--size 800] [--repeat 5]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from f3rm_verify import bits
from f3rm_verify.picture_measures import picture_difference
from f3rm_verify.readers.images import decode

#: Of the pair of PNGs.
HEIGHT, WIDTH = 1080, 1920


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--size", type=int, default=800)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{side}.png") for side in ("reference", "candidate")]
        for file, values in zip(files, picture(HEIGHT, WIDTH, seed=0), strict=True):
            Image.fromarray(values).save(file)
        measure_pairs(files, options.repeat)
        measure_diff(Path(folder, "runs"), options.images, options.size)


def picture(height: int, width: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture with texture, and the same with some noise everywhere and one changed part."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack([rows * 200 // height, columns * 200 // width, (rows + columns) % 200], axis=-1)
    a = (smooth + generator.integers(0, 40, smooth.shape)).astype(np.uint8)
    b = (a + generator.integers(0, 3, a.shape)).astype(np.uint8)
    b[height // 3 : height // 3 + 40, width // 2 : width // 2 + 60] ^= 31
    return a, b


def measure_pairs(files: list[Path], repeat: int) -> None:
    """The exact comparison alone, then with every measure that a differing picture gets."""
    exact = {"OpenCV + numpy": lambda: opencv_exact(files)}
    if shutil.which("odiff"):
        exact["odiff"] = lambda: odiff(files)
    against("equal or not", lambda: ours(files, every=False), exact, repeat)
    measured = {
        "scikit-image SSIM": lambda: scikit_image(files, gaussian=False),
        "scikit-image SSIM, Gaussian": lambda: scikit_image(files, gaussian=True),
    }
    against("all measures, SSIM among them", lambda: ours(files, every=True), measured, repeat)


def ours(files: list[Path], *, every: bool) -> object:
    a, b = (decode(file.read_bytes(), file.name).values for file in files)
    return picture_difference(a, b).measures if every else bits.bit_equal(a, b)


def opencv_exact(files: list[Path]) -> object:
    import cv2

    a, b = (cv2.imread(str(file), cv2.IMREAD_UNCHANGED) for file in files)
    return np.count_nonzero((a != b).any(axis=2))


def odiff(files: list[Path]) -> object:
    return subprocess.run(["odiff", "-t", "0", *map(str, files)], capture_output=True).returncode


def scikit_image(files: list[Path], *, gaussian: bool) -> object:
    from skimage.metrics import structural_similarity

    a, b = (np.asarray(Image.open(file)) for file in files)
    return structural_similarity(a, b, channel_axis=2, gaussian_weights=gaussian)


def against(what: str, own: Callable[[], object], peers: dict[str, Callable[[], Any]], repeat: int) -> None:
    own()
    for name, peer in peers.items():
        peer()
        pairs = [(timed(own), timed(peer)) for _ in range(repeat)]
        ratios = [mine / theirs for mine, theirs in pairs]
        times = [f"{statistics.median(side) * 1000:.0f} ms" for side in zip(*pairs, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{what}: {times[0]}, {name} {times[1]}: {statistics.median(ratios):.2f} ({spread})", flush=True)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_diff(folder: Path, images: int, size: int) -> None:
    """Time and peak memory of the whole command, in a process of its own."""
    for side in ("reference", "candidate"):
        (folder / side / "renders").mkdir(parents=True)
        (folder / side / "config.yml").write_text("method_name: benchmark\n")
    pictures = [picture(size, size, seed=seed) for seed in range(min(images, 10))]
    for number in range(images):
        for side, values in zip(("reference", "candidate"), pictures[number % len(pictures)], strict=True):
            file = folder / side / "renders" / f"eval_img_{number:04d}.png"
            Image.fromarray(np.roll(values, number, axis=1)).save(file, compress_level=1)  # no two are the same
    command = [Path(sys.executable).parent / "f3rm-verify", "diff", folder / "reference", folder / "candidate"]
    command += ["--only", "renders"]
    kept = {
        "the verdict alone": [],
        "--json, with its pictures": ["--json", folder / "result.json"],
        "--html alone": ["--html", folder / "page"],
    }
    for what, options in kept.items():
        start = time.perf_counter()
        process = subprocess.Popen([str(word) for word in (*command, *options)], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds, processor = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
        assert os.waitstatus_to_exitcode(status) == 1
        times = f"{seconds:.1f} s ({processor:.1f} s of processors), at most {usage.ru_maxrss / 2**10:.0f} MiB"
        print(f"diff on {images} differing {size}x{size} PNGs, {what}: {times}", flush=True)
    size = sum(file.stat().st_size for file in (folder / "page").rglob("*") if file.is_file())
    print(f"the page's folder: {size / 2**20:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
