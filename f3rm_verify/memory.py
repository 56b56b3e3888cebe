"""Peak memory of a training, and what helps where there is not enough."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

#: What to do about it. Of the usual advice, the determinism settings free next to nothing: :4096:8 is 8 x 4096 KiB.
REMEDY = (
    "Take fewer rays a step (--pipeline.datamanager.train-num-rays-per-batch; while evaluating, "
    "--pipeline.model.eval-num-rays-per-chunk), or train one run at a time (f3rm-verify's --jobs 1). "
    "--seed-cublas-workspace False frees only 32 MiB for each cuBLAS handle and stream, --seed-warn-only True nothing."
)


def peak_rss_bytes() -> int:
    """The most memory that this process ever had in RAM at once, in bytes; without its workers, and without a GPU's."""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text("ascii", "replace"), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    # On Linux, this would count what the process was before exec: a copy of the one that started it.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> bool:
    """Has `peak_rss_bytes` count from now on. Says whether that can be had: it takes Linux, and its permission."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        return False
    return True


def rss_bytes() -> int:
    """The memory that this process has in RAM now, in bytes; 0 where there is no /proc to tell."""
    try:
        found = re.search(r"^VmRSS:\s*(\d+) kB$", Path("/proc/self/status").read_text("ascii", "replace"), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found is not None else 0


def in_words(peak: object) -> str:
    """A part of a sentence with the peak in bytes, empty where it is unknown."""
    return "" if not isinstance(peak, int) else f"; its peak so far was {peak / 2**30:.2f} GiB in RAM"
