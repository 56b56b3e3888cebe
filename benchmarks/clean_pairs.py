"""Compares pairs of trainings without any fault: each that is not reproducible is a false alarm.

python benchmarks/clean_pairs.py [--pairs 20]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from faults.laboratory import run_laboratory  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as folder:
        arguments = ("--no-faults", "--clean-pairs", str(pairs))
        found = run_laboratory(Path(folder), *arguments, timeout=3600)["clean"]
    alarms = [pair for pair in found if pair["outcome"] != "reproducible"]
    for pair in alarms:
        print(f"false alarm: {pair['outcome']}: {'; '.join(pair['reasons'])}")
    print(f"{len(alarms)} false alarms over {len(found)} clean pairs")
    sys.exit(1 if alarms else 0)


if __name__ == "__main__":
    main()
