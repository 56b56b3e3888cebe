"""The report as a page that opens offline: `index.html` and what it shows, in `assets/` beside it.

The page may load nothing but that. Here are the sort keys and the wording; `templates/report.html` lays them out, and
escapes every value.
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
from f3rm_verify.assets import HEAT_COLOURS, Assets, settle
from f3rm_verify.difference import CONDITIONS, Difference, FirstDivergence, Result, Verdict
from f3rm_verify.reporters.html_curves import curve_rows, plotly_script
from f3rm_verify.reporters.pictures import picture_rows
from f3rm_verify.reporters.report_file import write_report

#: Rows of one table: a browser lays out some thousands at once; the result file has every one.
_MAX_ROWS = 2000
_MAX_TEXT = 2000
#: What the page shows, beside it.
_FOLDER = "assets"
_PLOTLY = f"{_FOLDER}/plotly.min.js"
_MEASURES = ("max_abs", "max_rel", "max_ulp", "n_different", "first_step", "psnr", "ssim")


@dataclass(frozen=True, kw_only=True)
class _Row:
    verdict: str
    badness: int
    path: str
    summary: str
    numbers: tuple[str, ...]


def write_html(result: Result, directory: Path, *, assets: Assets | None = None) -> None:
    """Writes the page into the directory; the same result and assets give the same bytes."""
    kept = settle(result.root, directory / _FOLDER, assets or Assets())
    page = html_page(result, kept)
    what = "the page of --html"
    if _PLOTLY in page:
        write_report(directory / _PLOTLY, plotly_script(), what=what)
    write_report(directory / "index.html", page.encode("utf8"), what=what)


def html_page(result: Result, assets: Assets | None = None) -> str:
    """The page; `assets` are those in its folder."""
    environment = Environment(
        loader=PackageLoader("f3rm_verify.reporters"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    texts = resources.files("f3rm_verify.reporters") / "templates"
    assets = assets or Assets()
    curves, more_curves = curve_rows(result, assets)
    pictures, more_pictures = picture_rows(result, assets, _FOLDER)
    needed = {"report": True, "curves": curves, "pictures": pictures}
    scripts = [(texts / f"{name}.js").read_text("utf8") for name, there in needed.items() if there]
    outputs, conditions = _leaves(result, conditions=False), _leaves(result, conditions=True)
    return environment.get_template("report.html").render(
        scripts=scripts,
        digests=[_digest(script) for script in scripts],
        plotly=_PLOTLY,
        curves=curves,
        more_curves=more_curves,
        pictures=pictures,
        more_pictures=more_pictures,
        heat=", ".join(f"rgb{colour}" for colour in HEAT_COLOURS),
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


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf8")).digest()).decode("ascii")


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
