"""CPU time of `f3rm-verify --help` and `diff --help` against an empty typer app's `--help`, in turn, in one sitting.

python benchmarks/help_time.py [--repeat 10]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

EMPTY = """
import typer
app = typer.Typer()
@app.command()
def first() -> None: pass
@app.command()
def second() -> None: pass
app()
"""
OURS = "from f3rm_verify.cli import main; main()"
#: What is measured, each against the empty app's `--help`.
COMMANDS = (["--help"], ["diff", "--help"], ["run", "--help"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=10)
    repeat = parser.parse_args().repeat
    cpu_seconds(EMPTY, ["--help"])  # warms the page cache and the byte code
    for words in COMMANDS:
        cpu_seconds(OURS, words)
        ratios = [cpu_seconds(OURS, words) / cpu_seconds(EMPTY, ["--help"]) for _ in range(repeat)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{' '.join(words):<12} {statistics.median(ratios):.2f} of an empty typer app ({spread})", flush=True)


def cpu_seconds(code: str, words: list[str]) -> float:
    before = os.times()
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    main()
