"""What the documents show works: commands parse, targets and links exist, option tables are complete."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from f3rm_verify.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def code_lines() -> Iterator[tuple[str, str]]:
    for document in DOCUMENTS:
        for block in re.findall(r"```(?:bash|yaml)\n(.*?)```", document.read_text("utf8"), re.DOTALL):
            for line in block.splitlines():
                yield document.name, line.split("  #")[0].strip()


def commands() -> list[tuple[str, str]]:
    found = [(name, line.removeprefix("- run: ")) for name, line in code_lines()]
    found += [
        (document.name, command)
        for document in DOCUMENTS
        for command in re.findall(
            r"`(f3rm-verify (?:run|diff|scene|seeding|cost|baseline)[^`]*)`", document.read_text("utf8")
        )
    ]
    return sorted({(name, line) for name, line in found if line.startswith("f3rm-verify ")})


@pytest.mark.parametrize(("document", "line"), commands())
def test_commands_parse(document: str, line: str) -> None:
    words = [word.replace("NAME", "f3rm") for word in shlex.split(line, comments=True)[1:]]
    group = typer.main.get_command(app)
    command = group.commands[words.pop(0)]  # type: ignore[attr-defined]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context(command.name, words)
    assert context.params


def test_the_documents_show_commands() -> None:
    assert len(commands()) >= 10


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf8")
    shown = {match for _, line in code_lines() for match in re.findall(r"^make (\w+)", line)}
    assert shown >= {"demo", "test"}
    assert shown <= set(re.findall(r"^(\w+):", makefile, re.MULTILINE))


def test_links_resolve() -> None:
    count = 0
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text("utf8")):
            if "://" not in target:
                count += 1
                assert (document.parent / target).exists(), f"{document.name}: {target}"
    assert count >= 5


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text("utf8")
    assert "make test" in (ROOT / "README.md").read_text("utf8")


def test_requirements_are_pinned_with_hashes_and_name_no_index() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        text = path.read_text("utf8")
        pins = re.findall(r"^[A-Za-z0-9_.-]+==", text, re.MULTILINE)
        assert pins and text.count("--hash=sha256:") >= len(pins)
        assert "://" not in text


def test_every_module_stands_in_the_picture() -> None:
    picture = (ROOT / "docs" / "design.md").read_text("utf8")
    for path in (ROOT / "f3rm_verify").glob("*.py"):
        known = path.name in picture or (path.name.startswith("compare_") and "compare_*.py" in picture)
        assert known or path.name == "__init__.py", path.name
