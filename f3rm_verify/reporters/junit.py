"""JUnit XML, for pages that show tests: one case for each artefact of each pair and rank."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from f3rm_verify import reporters as words
from f3rm_verify.difference import Difference, Outcome, Result, Verdict
from f3rm_verify.reporters.report_file import write_report

#: Leaves that one case lists; the result file has every one.
_MAX_LEAVES = 20
_MAX_TEXT = 1000
#: What XML 1.0 cannot hold, also not as an entity.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(result: Result, path: Path) -> None:
    """Writes the report; a diverged result has a failure, an inconclusive one an error, a good one neither."""
    write_report(path, junit_xml(result), what="the JUnit report")


def junit_xml(result: Result) -> bytes:
    """The report; the same bytes each time, because durations and clock times are left out."""
    suite = TestSuite("f3rm-verify")
    for label, text in (("compared", words.conditions_line(result)), *words.run_lines(result)):
        suite.add_property(label, _text(text))
    suite.add_testcase(_whole(result))
    for pair, node in words.pairs_of(result):
        prefix = f"{pair}." if result.pairs > 1 else ""
        for name, artefact in _artefacts(node, prefix):
            suite.add_testcase(_case(name, artefact, decides=result.outcome.exit_code != 0))
    xml = JUnitXml("f3rm-verify")
    xml.add_testsuite(suite)
    xml.update_statistics()  # type: ignore[no-untyped-call]
    written = io.BytesIO()
    xml.write(written, pretty=True)
    return written.getvalue()


def _whole(result: Result) -> TestCase:
    """The verdict itself: what is not required may differ below without failing it."""
    case = TestCase("verdict", "f3rm-verify")
    reasons = [words.prose(reason) for reason in result.reasons] or [words.summary_of(result.root)]
    message, text = _text(reasons[0]), _text("\n".join(reasons))
    if result.outcome is Outcome.DIVERGED:
        first = result.first_divergence
        failure = Failure(message if first is None else _text(words.divergence_line(first)), "diverged")
        failure.text = text
        case.result = [failure]
    elif result.outcome is Outcome.INCONCLUSIVE:
        error = Error(message, "inconclusive")
        error.text = text
        case.result = [error]
    return case


def _artefacts(node: Difference, prefix: str) -> Iterator[tuple[str, Difference]]:
    """Each artefact with its name; those of the ranks above the first below the name of the rank."""
    for child in words.in_causal_order(node.children):
        if child.artefact == "runs":
            yield from _artefacts(child, f"{prefix}{words.clean(child.name)}.")
        else:
            yield f"{prefix}{words.clean(child.name)}", child


def _case(name: str, node: Difference, *, decides: bool) -> TestCase:
    """A case of one artefact; beside a good verdict, what is not good was not required, and is skipped."""
    case = TestCase(_text(name), "f3rm-verify")
    kinds = {
        Verdict.DIFFERENT: Failure,
        Verdict.UNREADABLE: Error,
        Verdict.MISSING: Error,
        Verdict.IGNORED: Skipped,
    }
    kind = kinds.get(node.verdict)
    kind = kind if kind is None or decides else Skipped
    if kind is not None:
        problem = kind(_text(words.summary_of(node)), node.verdict.value)
        problem.text = "\n".join(_leaves(node))
        case.result = [problem]
    return case


def _leaves(node: Difference) -> list[str]:
    bad = [(path, leaf) for path, leaf in node.leaves() if leaf.verdict is node.verdict]
    lines = [
        _text(f"{' / '.join(map(words.clean, path))}: {words.summary_of(leaf)}") for path, leaf in bad[:_MAX_LEAVES]
    ]
    return [*lines, *([f"and {len(bad) - _MAX_LEAVES} more"] if len(bad) > _MAX_LEAVES else [])]


def _text(text: str) -> str:
    text = _NO_XML.sub("\ufffd", text)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."
