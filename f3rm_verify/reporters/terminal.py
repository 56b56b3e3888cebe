"""The report on standard output: for a person, verdict first, then why, then what to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from f3rm_verify import reporters as words
from f3rm_verify.assets import Assets
from f3rm_verify.difference import Difference, FirstDivergence, Outcome, Result, Verdict
from f3rm_verify.reporters.terminal_drawings import curve_lines, drawn_curve, drawn_picture, picture_lines
from f3rm_verify.run_dir import SEEDING

#: Text and its style.
Piece = tuple[str, str]

_STYLES: Mapping[Verdict, str] = {
    Verdict.IGNORED: "dim",
    Verdict.IDENTICAL: "green",
    Verdict.WITHIN_TOLERANCE: "yellow",
    Verdict.MISSING: "magenta",
    Verdict.UNREADABLE: "magenta",
    Verdict.DIFFERENT: "red",
}
_OUTCOME_STYLES: Mapping[Outcome, str] = {
    Outcome.REPRODUCIBLE: "bold green",
    Outcome.WITHIN_TOLERANCE: "bold yellow",
    Outcome.DIVERGED: "bold red",
    Outcome.INCONCLUSIVE: "bold magenta",
}
#: More lines of one kind would hide the rest of the report.
_MAX_LINES = 10
#: Columns that a sentence may take, and a name in a table.
_MAX_SENTENCE = 500
_MAX_NAME = 24


def render_terminal(
    result: Result,
    console: Console,
    *,
    details: int = 20,
    output: Path | None = None,
    assets: Assets | None = None,
) -> None:
    """Prints the report, with at most `details` lines about single tensors, tags and images.

    `output` is where the result file lies. Colour and width are the console's; its encoding chooses the marks. On a
    terminal, what is in `assets` is drawn: a curve, and where it has the colours, the picture that differs most.
    """
    page = _Page(console=console, glyphs=_glyphs(console))
    _verdict(page, result)
    if result.first_divergence is not None:
        _first_divergence(page, result.first_divergence)
    _artefacts(page, result)
    _seeding_and_control(page, result)
    if assets is not None and console.is_terminal and not console.is_dumb_terminal and page.glyphs is _UNICODE:
        _drawings(page, result, assets)
    _details(page, result, limit=max(details, 0), written=output is not None)
    _ignored(page, result)
    _places(page, result, output)


@dataclass(frozen=True, kw_only=True)
class _Glyphs:
    marks: Mapping[Verdict, str]
    ellipsis: str
    failure: str


_UNICODE = _Glyphs(marks=dict(zip(Verdict, "\u2013✓~∅?≠", strict=True)), ellipsis="…", failure="✗")
_ASCII = _Glyphs(marks=dict(zip(Verdict, "-=~x?!", strict=True)), ellipsis="...", failure="!")


def _glyphs(console: Console) -> _Glyphs:
    """The marks that this console can show."""
    try:
        "".join([*_UNICODE.marks.values(), _UNICODE.ellipsis, _UNICODE.failure]).encode(console.options.encoding)
    except (LookupError, UnicodeEncodeError):
        return _ASCII
    return _ASCII if console.options.legacy_windows else _UNICODE


@dataclass(frozen=True, kw_only=True)
class _Page:
    """Lines on a console. The only place that prints, so that nothing gets there that could be misread."""

    console: Console
    glyphs: _Glyphs

    @property
    def width(self) -> int:
        return max(self.console.width, 40)

    @property
    def failure(self) -> Piece:
        return self.glyphs.failure, "red"

    def mark(self, verdict: Verdict) -> Piece:
        return self.glyphs.marks[verdict], _STYLES[verdict]

    def line(self, head: Sequence[Piece], *body: Piece) -> None:
        """One paragraph: the head, then the body, which goes on below itself where it does not fit."""
        first = self._text(head)
        indent = first.cell_len
        parts = self._text(body).wrap(self.console, max(self.width - indent, 20), overflow="fold")
        for number, part in enumerate(parts or [Text()]):
            part.rstrip()
            self._print(first.append_text(part) if number == 0 else Text(" " * indent).append_text(part))

    def row(self, head: Sequence[Piece], items: Sequence[Sequence[Piece]]) -> None:
        """The head, then the items side by side, which go on below each other where they do not fit."""
        text = self._text(head)
        indent = text.cell_len
        for item in map(self._text, items):
            if text.cell_len > indent and text.cell_len + item.cell_len > self.width:
                self._print(text)
                text = Text(" " * indent)
            text.append_text(item).append("  ")
        self._print(text)

    def place(self, *pieces: Piece) -> None:
        """One line that is neither broken nor shortened, because people copy it."""
        self._print(self._text(pieces))

    def heading(self, title: str) -> None:
        self.gap()
        self._print(Text(title, "bold"))

    def drawing(self, lines: Sequence[Text]) -> None:
        """Lines that were drawn, of nothing but blocks and numbers."""
        for line in lines:
            self._print(line)

    def gap(self) -> None:
        self.console.print()

    def name(self, text: str, width: int = _MAX_NAME) -> str:
        """`text` in `width` columns, its middle left out where it is too long."""
        return shorten(self._printable(text), width, self.glyphs.ellipsis)

    def sentence(self, text: str, width: int = _MAX_SENTENCE) -> str:
        """`text` in `width` columns, its end left out where it is too long."""
        return shorten(self._printable(text), width, self.glyphs.ellipsis, tail=0.0)

    def shorten_path(self, path: Sequence[str], width: int) -> str:
        """The names of a path in `width` columns."""
        return shorten_path([self._printable(name) for name in path], width, self.glyphs.ellipsis)

    def _text(self, pieces: Sequence[Piece]) -> Text:
        # Text objects, never strings: rich would read markup, links and emoji codes in a string.
        return Text().join(Text(self._printable(content), style) for content, style in pieces)

    def _printable(self, text: str) -> str:
        encoding = self.console.options.encoding
        try:
            return words.clean(text).encode(encoding, "backslashreplace").decode(encoding)
        except LookupError:
            return words.clean(text).encode("ascii", "backslashreplace").decode("ascii")

    def _print(self, text: Text) -> None:
        text.rstrip()
        self.console.print(text, soft_wrap=True)


def _verdict(page: _Page, result: Result) -> None:
    word = f"{words.verdict_word(result)}  "
    beside, *below = _verdict_lines(result)
    page.line([(word, _OUTCOME_STYLES[result.outcome])], (page.sentence(beside), "bold"))
    for line in below:
        page.line([(" " * len(word), "")], (page.sentence(line), ""))


def _verdict_lines(result: Result) -> list[str]:
    """The sentence beside the verdict, and those below it."""
    below = [words.conditions_line(result), words.recorded_line(result)]
    reasons = _some([words.prose(reason) for reason in result.reasons], "reasons")
    if len(reasons) > 1:
        reasons = [f"- {reason}" for reason in reasons]
    if result.outcome.exit_code == 0:
        beside, below = below[0], [*reasons, below[1]]
    elif result.outcome is Outcome.DIVERGED and result.first_divergence is not None:
        beside, below = words.divergence_line(result.first_divergence), [*reasons, *below]
    elif len(reasons) > 1:
        beside, below = "because", [*reasons, *below]
    else:
        beside = f"because {reasons[0] if reasons else words.summary_of(result.root)}"
    return [beside, *filter(None, below)]


def _first_divergence(page: _Page, first: FirstDivergence) -> None:
    page.heading("First divergence")
    equal = first.last_equal_step
    rows = [
        ("equal", "" if equal is None else f"everything that was recorded, up to and with step {equal}"),
        ("step", "" if first.step is None else words.step_words(first).removeprefix("step ")),
        ("stage", words.prose(first.stage or "")),
        ("subject", words.clean(first.subject)),
        ("operator", words.clean(first.operator or "")),
        ("cause", words.prose(first.cause)),
        ("remedy", words.prose(first.remedy)),
    ]
    evidence = _some([words.prose(line) for line in first.evidence], "lines")
    rows += [("" if number else "evidence", line) for number, line in enumerate(evidence)]
    for label, content in rows:
        if content:
            page.line([(f"  {label:<11}", "dim")], (page.sentence(content), ""))
    if first.reproduce:
        page.place((f"  {'reproduce':<11}", "dim"), (first.reproduce, "bold"))


def _artefacts(page: _Page, result: Result) -> None:
    page.gap()
    for name, node in words.pairs_of(result):
        children = words.in_causal_order(node.children)
        if result.pairs > 1:
            _pair(page, name, node, children)
            children = [child for child in children if child.verdict is not Verdict.IDENTICAL]
        _table(page, children, indent=4 if result.pairs > 1 else 0)
        if not node.children:
            page.line([page.mark(node.verdict), (" ", "")], (words.summary_of(node), ""))


def _pair(page: _Page, name: str, node: Difference, children: Sequence[Difference]) -> None:
    items = [[page.mark(child.verdict), (f" {page.name(child.name)}", "")] for child in children]
    page.row([page.mark(node.verdict), (f" {page.name(name)}  ", "bold")], items)


def _table(page: _Page, nodes: Sequence[Difference], *, indent: int) -> None:
    names = _column([page.name(node.name) for node in nodes])
    for name, node in zip(names, nodes, strict=True):
        style = "dim" if node.verdict in (Verdict.IDENTICAL, Verdict.IGNORED) else ""
        head = [(" " * indent, ""), page.mark(node.verdict), (f" {name}", "")]
        page.line(head, (page.sentence(words.summary_of(node)), style))


def _seeding_and_control(page: _Page, result: Result) -> None:
    logs = words.seeding_logs(result)
    if logs or result.control is not None:
        page.gap()
    for log in logs:
        mark = page.failure if log.failing else page.mark(Verdict.IDENTICAL)
        sentence = f"seeding log of {_sides(log.sides)}: {log.count}"
        page.line([mark, (" ", "")], (sentence, ""), (f" (all in {SEEDING})", "dim"))
        for line in _some(log.failing, "claims"):
            page.line([("  - ", "")], (page.sentence(line), ""))
    if result.control is not None:
        works, line = words.control_line(result.control)
        page.line([page.mark(Verdict.IDENTICAL) if works else page.failure, (" ", "")], (page.sentence(line), ""))


def _sides(sides: Sequence[str]) -> str:
    return sides[0] if len(sides) == 1 else "both runs" if len(sides) == 2 else f"{len(sides)} runs"


def _drawings(page: _Page, result: Result, assets: Assets) -> None:
    curve = drawn_curve(result, assets)
    lines = [] if curve is None else curve_lines(curve, page.width)
    if curve is not None and lines:
        page.heading(page.name(curve.name, page.width))
        page.drawing(lines)
    found = drawn_picture(result) if page.console.color_system in ("256", "truecolor") else None
    lines = [] if found is None or page.console.no_color else picture_lines(found[1], assets, page.width)
    if found is not None and lines:
        page.heading(page.shorten_path([words.clean(name) for name in found[0]], page.width))
        page.drawing(lines)


def _details(page: _Page, result: Result, *, limit: int, written: bool) -> None:
    in_table = 2 if result.pairs > 1 else 1
    found = [(path, node) for path, node in words.worst_first(result) if len(path) > in_table]
    if not found:
        return
    page.heading("Worst first")
    for parent, members in groupby(found[:limit], key=lambda item: item[0][:-1]):
        rows = list(members)
        if len(rows) == 1:
            _detail_rows(page, rows, indent=0)
        else:
            page.line([("  ", "")], (page.shorten_path(parent, page.width - 2), "dim"))
            _detail_rows(page, [(path[-1:], node) for path, node in rows], indent=2)
    if len(found) > limit:
        where = "the result file" if written else "--json"
        more = f"{page.glyphs.ellipsis} and {len(found) - limit} more: {where} has every one"
        page.line([("  ", "")], (more, "dim"))


def _detail_rows(page: _Page, rows: Sequence[tuple[tuple[str, ...], Difference]], *, indent: int) -> None:
    """A line each: the path has at least half of it, and more where the summaries are short."""
    width = page.width - indent - 4
    summaries = [words.summary_of(node) for _, node in rows]
    left = width - min(max(cell_len(summary[:width]) for summary in summaries), width // 2)
    paths = _column([page.shorten_path(path, left) for path, _ in rows])
    for path, summary, (_, node) in zip(paths, summaries, rows, strict=True):
        head = [page.mark(node.verdict), (" " * indent, ""), (f" {path}", "")]
        page.line(head, (page.sentence(summary, width + 2 - cell_len(path)), "dim"))


def _ignored(page: _Page, result: Result) -> None:
    ignored = words.ignored_by_reason(result)
    if ignored:
        page.gap()
    for item in ignored[:_MAX_LINES]:
        sentence = f"ignored: {item.kind} ({page.sentence(item.reason, page.width // 2)}: "
        names = _as_many_as_fit(page, item.names, page.width - 3 - cell_len(sentence))
        page.line([page.mark(Verdict.IGNORED), (" ", "")], (f"{sentence}{names})", "dim"))
    if len(ignored) > _MAX_LINES:
        page.line([("  ", "")], (f"and {len(ignored) - _MAX_LINES} more reasons", "dim"))


def _places(page: _Page, result: Result, output: Path | None) -> None:
    rows = words.run_lines(result)
    if source := words.policy_source(result):
        rows = [*rows, ("policy", source)]
    if output is not None:
        rows = [*rows, ("result", str(output))]
    if rows:
        page.gap()
    for label, (_, place) in zip(_column([label for label, _ in rows]), rows, strict=True):
        page.place((label, "dim"), (place, ""))


def _some(lines: Sequence[str], noun: str) -> list[str]:
    """The first lines, and how many more there are."""
    rest = len(lines) - _MAX_LINES
    return [*lines[:_MAX_LINES], *([f"and {rest} more {noun}"] if rest > 0 else [])]


def _as_many_as_fit(page: _Page, names: Sequence[str], width: int) -> str:
    """The first names, and "..." for the rest."""
    room = max(width, 12)
    kept = [page.name(names[0], room - 4)]
    for name in names[1:]:
        kept.append(page.name(name, room))
        is_last = len(kept) == len(names)
        if cell_len(", ".join(kept if is_last else [*kept, page.glyphs.ellipsis])) > room:
            return ", ".join([*kept[:-1], page.glyphs.ellipsis])
    return ", ".join(kept)


def _column(names: Sequence[str]) -> list[str]:
    """The names, padded to one width and two columns more."""
    width = max(map(cell_len, names), default=0) + 2
    return [name + " " * (width - cell_len(name)) for name in names]


def shorten_path(path: Sequence[str], width: int, ellipsis: str) -> str:
    """The names joined by " / " in `width` columns: names in the middle go first, the last one goes last."""
    for start in range(1, len(path)):
        kept = " / ".join(path if start == 1 else [path[0], ellipsis, *path[start:]])
        if cell_len(kept) <= width:
            return kept
    lead = f"{path[0]} / {ellipsis} / " if len(path) > 2 else "".join(f"{name} / " for name in path[:-1])
    if cell_len(lead) > width // 2:
        return shorten(" / ".join(path), width, ellipsis)
    return lead + shorten(path[-1], width - cell_len(lead), ellipsis)


def shorten(text: str, width: int, ellipsis: str, *, tail: float = 0.5) -> str:
    """`text` in `width` columns of a terminal; where it is too long, `tail` is the share of them that its end gets."""
    # The first test spares counting the columns of a name of many megabytes.
    if len(text) <= 4 * width and cell_len(text) <= width:
        return text
    room = max(width - cell_len(ellipsis), 2)
    at_end = int(room * tail)
    start, end = "".join(_fitting(text, room - at_end)), "".join(_fitting(text[::-1], at_end))
    return f"{start}{ellipsis}{end[::-1]}"


def _fitting(text: str, width: int) -> Iterator[str]:
    """The first characters of `text` that take at most `width` columns."""
    used = 0
    for char in text[: 2 * width]:
        used += cell_len(char)
        if used > width:
            return
        yield char
