"""Markdown for a CI summary page: bounded, whatever the run, and nothing in it is markup but our own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from f3rm_verify import reporters as words
from f3rm_verify.difference import Difference, FirstDivergence, Result
from f3rm_verify.reporters.report_file import write_report

#: Rows of a table, and lines of a list.
_MAX_ROWS = 50
_MAX_LINES = 10
_MAX_TEXT = 300
#: GitHub shows no summary of more than 1 MiB, and other steps may add to it.
_MAX_BYTES = 900 * 2**10
_MARKUP = re.compile(r"[\\`*_{}\[\]()<>#+\-.!|~&:@$^=\"']")


def write_markdown(result: Result, path: Path) -> None:
    """Writes the page."""
    write_report(path, markdown(result).encode("utf8"), what="the Markdown report")


def markdown(result: Result) -> str:
    """The page: verdict, reasons, first divergence, a table of artefacts, the worst differences."""
    lines, size = [], 0
    for line in _lines(result):
        size += len(line.encode("utf8")) + 1
        if size > _MAX_BYTES:  # as with hundreds of pairs
            lines += ["", "and more, for which this page has no room: the result file has everything"]
            break
        lines.append(line)
    return "\n".join(lines) + "\n"


def _lines(result: Result) -> Iterator[str]:
    yield f"## f3rm-verify: {words.verdict_word(result)}"
    for line in filter(None, (words.conditions_line(result), words.recorded_line(result), words.policy_source(result))):
        yield from ("", escape(line))
    if result.reasons:
        yield ""
    yield from (f"- {line}" for line in _some(result.reasons))
    if result.first_divergence is not None:
        yield from _first(result.first_divergence)
    for name, node in words.pairs_of(result):
        yield from ("", f"### {escape(name) if result.pairs > 1 else 'Artefacts'}", "")
        rows = [(child.name, child) for child in words.in_causal_order(node.children)] or [(name, node)]
        yield from _table("artefact", rows)
    worst = [(" / ".join(path), node) for path, node in words.worst_first(result) if len(path) > 1]
    if worst:
        yield from ("", "### Worst first", "")
        yield from _table("where", worst)
    for log in words.seeding_logs(result):
        yield from ("", f"Seeding log of {escape(' and '.join(log.sides))}: {escape(log.count)}")
        if log.failing:
            yield ""
        yield from (f"- {line}" for line in _some(log.failing))
    if result.control is not None:
        yield from ("", escape(words.control_line(result.control)[1]))


def _first(first: FirstDivergence) -> Iterator[str]:
    yield from ("", "### First divergence", "", "| | |", "| --- | --- |")
    rows = {
        "where": words.divergence_line(first),
        "operator": first.operator or "",
        "cause": first.cause,
        "remedy": first.remedy,
        "reproduce": first.reproduce,
    }
    yield from (f"| {label} | {escape(text)} |" for label, text in rows.items() if text)
    if first.evidence:
        yield ""
    yield from (f"- {line}" for line in _some(first.evidence))


def _table(label: str, rows: Sequence[tuple[str, Difference]]) -> Iterator[str]:
    yield from (f"| verdict | {label} | |", "| --- | --- | --- |")
    for name, node in rows[:_MAX_ROWS]:
        yield f"| {node.verdict.value.replace('_', ' ')} | {escape(name)} | {escape(words.summary_of(node))} |"
    if len(rows) > _MAX_ROWS:
        yield from ("", f"and {len(rows) - _MAX_ROWS} more: the result file has every one")


def _some(lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    rest = [f"and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
    return [*map(escape, lines[:_MAX_LINES]), *rest]


def escape(text: str) -> str:
    """One line of plain text, shortened; every character that Markdown or HTML could read becomes an entity."""
    shown = words.clean(text[: 4 * _MAX_TEXT])
    if len(shown) > _MAX_TEXT or len(text) > 4 * _MAX_TEXT:
        shown = f"{shown[:_MAX_TEXT]}..."
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", shown)
