"""The report as a page that opens offline: one file, which loads nothing and may load nothing.

Here are the sort keys and the wording; `templates/report.html` lays them out, and escapes every value.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from f3rm_verify import reporters as words
from f3rm_verify.difference import CONDITIONS, Difference, FirstDivergence, Result, Verdict
from f3rm_verify.reporters.report_file import write_report

#: Rows of one table: a browser lays out some thousands at once; the result file has every one.
_MAX_ROWS = 2000
_MAX_TEXT = 2000
_MEASURES = ("max_abs", "max_rel", "max_ulp", "n_different", "first_step", "psnr", "ssim")


@dataclass(frozen=True, kw_only=True)
class _Row:
    verdict: str
    badness: int
    path: str
    summary: str
    numbers: tuple[str, ...]


def write_html(result: Result, directory: Path) -> None:
    """Writes `index.html` into the directory; the same result gives the same bytes."""
    write_report(directory / "index.html", html_page(result).encode("utf8"), what="the page of --html")


def html_page(result: Result) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("f3rm_verify.reporters"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    texts = resources.files("f3rm_verify.reporters") / "templates"
    script = (texts / "report.js").read_text("utf8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf8")).digest()).decode("ascii")
    outputs, conditions = _leaves(result, conditions=False), _leaves(result, conditions=True)
    return environment.get_template("report.html").render(
        script=script,
        script_digest=digest,
        style=(texts / "report.css").read_text("utf8"),
        verdict=words.verdict_word(result),
        outcome=result.outcome.value,
        lines=[*filter(None, (words.conditions_line(result), words.recorded_line(result)))],
        reasons=[_short(words.prose(reason)) for reason in result.reasons],
        first=None if result.first_divergence is None else _first(result.first_divergence),
        pairs=[(name, _artefacts(node)) for name, node in words.pairs_of(result)],
        measures=_MEASURES,
        outputs=outputs[:_MAX_ROWS],
        more_outputs=max(len(outputs) - _MAX_ROWS, 0),
        conditions=conditions[:_MAX_ROWS],
        more_conditions=max(len(conditions) - _MAX_ROWS, 0),
        sides=[words.clean(side) for side in result.seeding],
        claims=_claims(result.seeding),
        control=None if result.control is None else words.control_line(result.control)[1],
        ignored=words.ignored_by_reason(result),
        runs=words.run_lines(result),
        policy=words.policy_source(result) or "the command's own",
    )


def _first(first: FirstDivergence) -> dict[str, Any]:
    rows = {
        "last equal step": "" if first.last_equal_step is None else str(first.last_equal_step),
        "step": "" if first.step is None else str(first.step),
        "rank": str(first.rank) if first.rank else "",
        "stage": words.prose(first.stage or ""),
        "subject": words.clean(first.subject),
        "operator": words.clean(first.operator or ""),
        "cause": words.prose(first.cause),
        "remedy": words.prose(first.remedy),
    }
    return {
        "rows": [(label, _short(text)) for label, text in rows.items() if text],
        "evidence": [_short(words.prose(line)) for line in first.evidence],
        "reproduce": words.clean(first.reproduce),
    }


def _artefacts(node: Difference) -> list[_Row]:
    nodes = words.in_causal_order(node.children) or [node]
    return [_row((child.name,), child) for child in nodes]


def _leaves(result: Result, *, conditions: bool) -> list[_Row]:
    """All leaves that were compared, worst first; of the conditions only those that are not identical."""
    bad = [(path, node) for path, node in words.worst_first(result) if len(path) > 1 or not node.children]
    fine = [(path[1:] or path, node) for path, node in result.root.leaves() if node.verdict is Verdict.IDENTICAL]
    found = bad if conditions else [*bad, *fine]
    return [_row(path, node) for path, node in found if (node.artefact in CONDITIONS) is conditions]


def _row(path: Sequence[str], node: Difference) -> _Row:
    return _Row(
        verdict=node.verdict.value.replace("_", " "),
        badness=node.verdict.badness,
        path=_short(" / ".join(map(words.clean, path))),
        summary=_short(words.summary_of(node)),
        numbers=tuple(_number(node.measures.get(key)) for key in _MEASURES),
    )


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return words.clean(value) if value in ("nan", "inf", "-inf") else ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _claims(seeding: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each claim with what every side says of it as (verdict, text), in the order in which they were made."""
    logs = [{_text(entry.get("claim")): entry for entry in _entries(log)} for log in seeding.values()]
    names = dict.fromkeys(name for log in logs for name in log)
    return [(name, [_said(log[name]) if name in log else ("missing", "not claimed") for log in logs]) for name in names]


def _entries(log: Any) -> list[Mapping[str, Any]]:
    entries = log.get("entries") if isinstance(log, Mapping) else log
    return [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, (list, tuple)) else []


def _said(entry: Mapping[str, Any]) -> tuple[str, str]:
    keys = ("asked", "set", "observed", "remedy")
    parts = [f"{key}: {_text(entry[key])}" for key in keys if entry.get(key) not in (None, "")]
    return _text(entry.get("verdict")), "; ".join(parts)


def _text(value: object) -> str:
    return _short(words.prose("unnamed" if value is None else value))


def _short(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."
