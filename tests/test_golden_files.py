"""The golden files' own rules: what is missing is written and fails, what differs fails with both at hand."""

from __future__ import annotations

from pathlib import Path

import golden_files
import pytest


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(golden_files, "GOLDEN", tmp_path / "golden")
    return tmp_path / "golden"


def test_a_missing_one_is_written_and_fails_once(folder: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="r.xml was missing and is written now"):
        golden_files.check_golden("r.xml", "a\r\n")
    golden_files.check_golden("r.xml", "a\r\n")
    assert [path.name for path in folder.iterdir()] == ["r.xml"]


def test_another_one_fails_and_lies_beside(folder: Path) -> None:
    folder.mkdir()
    (folder / "r.xml").write_text("a\n")
    with pytest.raises(AssertionError):
        golden_files.check_golden("r.xml", "a\r\n")
    assert (folder / "r.obtained.xml").read_bytes() == b"a\r\n"
    assert (folder / "r.xml").read_bytes() == b"a\n"
