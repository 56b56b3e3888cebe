"""Plants every fault of the suite in a real training, and prints what was found of each beside the truth.

python benchmarks/fault_scores.py [--only NAME]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from faults.laboratory import Score, run_laboratory, score_table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[])
    only = [word for name in parser.parse_args().only for word in ("--only", name)]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answer = run_laboratory(Path(folder), *only, timeout=3600)
    print(score_table([Score(**score) for score in answer["scores"]]))
    print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
