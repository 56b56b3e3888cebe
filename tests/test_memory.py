"""Peak memory as the system counts it, and in words."""

from __future__ import annotations

import subprocess
import sys

from f3rm_verify.memory import REMEDY, in_words
from f3rm_verify.seeding_plan import CUBLAS_WORKSPACE

PEAK = "from f3rm_verify.memory import peak_rss_bytes as peak; before = peak()"


def test_the_peak_grows_with_what_is_touched_and_stays() -> None:
    script = f"{PEAK}; big = b'x' * 2**27; during = peak(); del big; print(during - before, peak() - during)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown, after = map(int, done.stdout.split())
    assert 0.9 * 2**27 < grown < 1.5 * 2**27  # whatever the process is large that started it
    assert abs(after) < 2**22  # the kernel counts in batches


def test_in_words() -> None:
    assert in_words(3 * 2**29) == "; its peak so far was 1.50 GiB in RAM"
    assert in_words(None) == ""


def test_the_remedy_names_what_cublas_really_takes() -> None:
    _, kibibytes, buffers = CUBLAS_WORKSPACE.split(":")
    assert f"frees only {int(kibibytes) * int(buffers) // 1024} MiB" in REMEDY
