"""Golden files: what a report looked like when a person looked at it.

A golden file that is missing is written and fails its test; look at it, then run the test again. After a wanted change,
delete the file, run, and read the difference in git.
"""

from __future__ import annotations

from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def check_golden(name: str, obtained: str) -> None:
    """Compares with the golden file; leaves what it got beside it where they differ."""
    golden = GOLDEN / name
    if not golden.exists():
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_bytes(obtained.encode("utf8"))
        pytest.fail(f"{name} was missing and is written now: look at it and run again")
    expected = golden.read_bytes().decode("utf8")
    if expected != obtained:
        golden.with_name(f"{golden.stem}.obtained{golden.suffix}").write_bytes(obtained.encode("utf8"))
    assert obtained == expected
