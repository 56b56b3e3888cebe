"""A result as annotations of GitHub Actions: what is printed on standard output and shown beside a commit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from f3rm_verify import reporters as words
from f3rm_verify.difference import Outcome, Result, Verdict

_LEVELS = {
    Outcome.REPRODUCIBLE: "notice",
    Outcome.WITHIN_TOLERANCE: "notice",
    Outcome.INCONCLUSIVE: "warning",
    Outcome.DIVERGED: "error",
}
#: GitHub shows ten of each level for a step.
_MOST = 8


def github_annotations(result: Result) -> Iterator[str]:
    """One line for the verdict and why, and where runs diverged one for each artefact that differs."""
    level = _LEVELS[result.outcome]
    place = str(result.reference.get("directory"))
    # A baseline is a file of the repository; a run directory is none.
    file = place if place.endswith(".json") and not PurePath(place).is_absolute() else None
    yield _command(level, words.verdict_word(result), "\n".join(_verdict(result)), file=file)
    if result.outcome is Outcome.DIVERGED:
        differing = [
            (name, node)
            for name, pair in words.pairs_of(result)
            for node in words.in_causal_order(pair.children)
            if node.verdict is Verdict.DIFFERENT
        ]
        for name, node in differing[:_MOST]:
            title = f"{name}: {words.clean(node.name)}" if result.pairs > 1 else words.clean(node.name)
            yield _command(level, title, words.summary_of(node), file=file)


def _verdict(result: Result) -> Iterator[str]:
    yield words.conditions_line(result)
    first = result.first_divergence
    if first is not None:
        yield words.divergence_line(first)
        yield f"Cause: {words.prose(first.cause)}"
        if first.remedy:
            yield f"Remedy: {words.prose(first.remedy)}"
    yield from map(words.prose, result.reasons[:_MOST])


def _command(level: str, title: str, message: str, *, file: str | None) -> str:
    properties = {"file": file, "title": f"f3rm-verify: {title}"}
    given = ",".join(f"{key}={_escaped_property(value)}" for key, value in properties.items() if value is not None)
    return f"::{level} {given}::{_escaped(message)}"


def _escaped(text: str) -> str:
    """What the runner reads back: https://github.com/actions/toolkit/blob/main/packages/core/src/command.ts."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escaped_property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
