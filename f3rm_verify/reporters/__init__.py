"""Reporters: each turns a Result into one kind of output. Here is the wording that they share, as plain strings.

Every name in a result may come from a run directory, which is untrusted: what leaves this module went through `clean`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from f3rm_verify.difference import ARTEFACTS, CONDITIONS, Difference, FirstDivergence, Outcome, Result, Verdict
from f3rm_verify.policy import DEFAULT

#: What one leaf of an artefact is called.
_NOUNS: Mapping[str, str] = {
    "setup": "setting",
    "seeding": "claim",
    "trace": "group",
    "curves": "tag",
    "metrics": "metric",
    "checkpoints": "tensor",
    "renders": "image",
}


def clean(text: object) -> str:
    """`text` with everything that a terminal or a reader could misread (controls, bidi marks, ...) as an escape."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def prose(text: object) -> str:
    """A sentence on one line; for names use `clean`, which keeps every difference between them visible."""
    return clean(" ".join(str(text).split()))


def verdict_word(result: Result) -> str:
    """The verdict as a person reads it: "WITHIN TOLERANCE"."""
    return result.outcome.value.replace("_", " ").upper()


def conditions_line(result: Result) -> str:
    """What was compared: "2 runs x 1000 steps, seed 42, f3rm, 2 threads, cpu"; where sides differ, both values."""
    seed, method, ranks, threads, device = (
        _values(result, key) for key in ("seed", "method", "ranks", "threads", "device")
    )
    foreign = _foreign_model(result)
    if method and foreign:
        method = f"{method} ({foreign})"
    parts = (
        _amount(result),
        seed and f"seed {seed}",
        method,
        ranks not in ("", "1") and f"{ranks} ranks",
        threads and f"{threads} thread{'' if threads == '1' else 's'}",
        device,
    )
    return ", ".join(part for part in parts if part)


def _amount(result: Result) -> str:
    """How much was compared: of one process that repeats a step its tries."""
    tries, step = _word(result.reference.get("tries")), _word(result.reference.get("step"))
    if tries and step:
        return f"{tries} tries of step {step} in one process"
    runs = _count(result.pairs + 1, "run")
    return runs if result.steps is None else f"{runs} x {_count(result.steps, 'step')}"


def _foreign_model(result: Result) -> str:
    """The class of the model, where it is neither nerfstudio's nor ours: which code of that name was it?"""
    tables = [run.get("implementation") for _, run in _sides(result)]
    models = [_word(table.get("model")) for table in tables if isinstance(table, Mapping)]
    foreign = [model for model in models if model and model.partition(".")[0] not in ("nerfstudio", "f3rm_verify")]
    return " / ".join(dict.fromkeys(foreign))


def divergence_line(first: FirstDivergence) -> str:
    """Where it broke: "first at step 3 (last equal: 2), stage loss, feature_loss"."""
    where = [f"stage {prose(first.stage)}"] if first.stage else []
    if first.step is None:
        return ", ".join(["first in " + clean(first.subject), *where])
    return ", ".join([f"first at {step_words(first)}", *where, clean(first.subject)])


def step_words(first: FirstDivergence) -> str:
    """The step, with what makes it the first one: "step 3 (last equal: 2)"."""
    rank = f" on rank {first.rank}" if first.rank else ""
    equal = "" if first.last_equal_step is None else f" (last equal: {first.last_equal_step})"
    return f"step {first.step}{rank}{equal}"


def recorded_line(result: Result) -> str:
    """What the verdict speaks of, and what not: "reproducible in curves and checkpoints; no trace was recorded"."""
    good = _good_artefacts(result)
    left_out = []
    if result.not_recorded:
        plural = len(result.not_recorded) > 1 or result.not_recorded[0].endswith("s")
        names = ", ".join(f"no {prose(name)}" for name in result.not_recorded)
        left_out.append(f"{names} {'were' if plural else 'was'} recorded")
    left_out.extend(_not_required(result))
    if result.policy.get("only"):
        left_out.append("nothing else was compared")
    if left_out and good:
        left_out.insert(0, f"{result.outcome.value.replace('_', ' ')} in {_and(good)}")
    return "; ".join(left_out)


def policy_source(result: Result) -> str:
    """The file that the policy was read from, and what in it matched nothing; "" where the command's own was used."""
    source, unused = result.policy.get("source"), result.policy.get("unused")
    if not isinstance(source, str) or source == DEFAULT:
        return ""
    note = f"  (matches nothing: {', '.join(map(prose, unused[:5]))})" if isinstance(unused, list) and unused else ""
    return clean(source) + note


def _not_required(result: Result) -> list[str]:
    """What is not good and yet did not decide over a good verdict: it was not required."""
    if result.outcome.exit_code != 0:
        return []
    good = (Verdict.IDENTICAL, Verdict.WITHIN_TOLERANCE, Verdict.IGNORED)
    names = [clean(child.name) for _, node in pairs_of(result) for child in node.children if child.verdict not in good]
    return [f"{_and(list(dict.fromkeys(names)))} not identical, and not required by the policy"] if names else []


def pairs_of(result: Result) -> list[tuple[str, Difference]]:
    """One node per pair of runs, with the candidate's name; each has the artefacts as children."""
    if result.pairs > 1:
        return [(clean(node.name), node) for node in result.root.children]
    return [("candidate", result.root)]


def in_causal_order(nodes: Iterable[Difference]) -> list[Difference]:
    """Artefacts in the order in which one influences the next; unknown ones last."""
    return sorted(nodes, key=lambda node: ARTEFACTS.index(node.artefact) if node.artefact in ARTEFACTS else 99)


def summary_of(node: Difference) -> str:
    """What the comparator said about the node, else what its verdict and measures say."""
    if node.summary:
        return prose(node.summary)
    count, total, relative = (_number(node.measures.get(key)) for key in ("n_different", "n", "max_rel"))
    share = "" if count is None or total is None else f", {count:.0f} of {total:.0f}"
    at_most = "" if relative is None else f", relative difference up to {relative:.3g}"
    return f"{node.verdict.value.replace('_', ' ')}{share}{at_most}"


def worst_first(result: Result) -> list[tuple[tuple[str, ...], Difference]]:
    """The nodes that are neither identical nor ignored, with their path below the root: worst verdict, then size.

    Nodes with one parent and one verdict stay together, at the place of their largest. A parent is among them where
    its verdict is worse than those of all its children.
    """
    found = [(path[1:] or path, node) for path, node in result.root.walk() if _speaks_for_itself(node)]
    largest: dict[tuple[Verdict, tuple[str, ...]], tuple[float, float]] = {}
    for path, node in found:
        key = node.verdict, path[:-1]
        largest[key] = max(size_of(node), largest.get(key, (0.0, 0.0)))

    def order(item: tuple[tuple[str, ...], Difference]) -> tuple[Any, ...]:
        path, node = item
        group, own = largest[node.verdict, path[:-1]], size_of(node)
        return -node.verdict.badness, -group[0], -group[1], first_seen[path[:-1]], -own[0], -own[1]

    first_seen = {parent: place for place, parent in enumerate(dict.fromkeys(path[:-1] for path, _ in found))}
    return sorted(found, key=order)


def size_of(node: Difference) -> tuple[float, float]:
    """How large a difference is: severity or relative difference (else the share), then the share; both from 0.

    The only order by size there is: pictures by their `severity`, everything else by `max_rel`; NaN on one side is
    larger than all of it.
    """
    count, total, relative = (_number(node.measures.get(key)) for key in ("n_different", "n", "max_rel"))
    severity = _number(node.measures.get("severity"))
    relative = relative if severity is None else severity
    share = count / total if count and total and total < math.inf else 0.0
    if node.measures.get("n_nan_mismatch"):
        relative = math.inf
    return (share if relative is None else relative), share


@dataclass(frozen=True, kw_only=True)
class Ignored:
    """What was ignored for one reason. `kind` counts it: "4 tags"."""

    kind: str
    reason: str
    names: tuple[str, ...]


def ignored_by_reason(result: Result) -> list[Ignored]:
    """Every ignored leaf once, however many pairs have it."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for _, node in result.root.leaves():
        if node.verdict is Verdict.IGNORED:
            reason = prose(node.measures.get("reason") or node.summary or "no reason given").removeprefix("ignored: ")
            found.setdefault((node.artefact, reason), {})[clean(node.name)] = None
    return [
        Ignored(kind=_count(len(names), _NOUNS.get(artefact, "entry")), reason=reason, names=tuple(names))
        for (artefact, reason), names in found.items()
    ]


@dataclass(frozen=True, kw_only=True)
class SeedingLog:
    """The claims of one seeding log. `sides`: every run with exactly these; `failing`: a line per claim."""

    sides: tuple[str, ...]
    count: str
    failing: tuple[str, ...]


def seeding_logs(result: Result) -> list[SeedingLog]:
    """The seeding log of each run; runs whose logs say the same share one."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for side, log in result.seeding.items():
        entries = _entries(log)
        if entries:
            found.setdefault((_claim_count(entries), tuple(_failing(entries))), []).append(clean(side))
    return [SeedingLog(sides=tuple(sides), count=count, failing=failing) for (count, failing), sides in found.items()]


def control_line(control: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the control run differs, as it must, and the sentence that says so."""
    verdict = prose(control.get("verdict"))
    works = verdict in (Verdict.DIFFERENT.value, Outcome.DIVERGED.value)
    found = "differs, as it must" if works else f"must differ, but is {verdict.replace('_', ' ')}"
    seed, summary = _word(control.get("seed")) or "unknown", prose(control.get("summary") or "")
    return works, f"control run with seed {seed}: {found}{f' ({summary})' if summary else ''}"


def run_lines(result: Result) -> list[tuple[str, str]]:
    """Each run whose directory is known: its side, and its directory with what is special about it."""
    return [
        (side, clean(run["directory"]) + _special(run)) for side, run in _sides(result) if _word(run.get("directory"))
    ]


def _special(run: Mapping[str, Any]) -> str:
    notes = []
    if run.get("completed") is False:
        steps = _word(run.get("steps"))
        notes.append("did not complete" + (f": {steps} steps" if steps else ""))
    if saved := _word(run.get("load_config")):
        notes.append(f"configured by {saved}")
    if started := _word(run.get("started_from")):
        notes.append(f"started from {started}")
    return f"  ({', '.join(notes)})" if notes else ""


def _sides(result: Result) -> list[tuple[str, Mapping[str, Any]]]:
    if "tries" in result.reference:
        return [("process", result.reference)]
    if result.pairs > 1 and result.candidates:
        numbered = [(f"candidate-{number}", run) for number, run in enumerate(result.candidates, 1)]
        return [("reference", result.reference), *numbered]
    return [("reference", result.reference), ("candidate", result.candidate)]


def _values(result: Result, key: str) -> str:
    """The value that all sides share; "42 / 43" where they do not, with "?" for a side that does not know."""
    words = [_word(run.get(key)) for _, run in _sides(result)]
    return " / ".join(dict.fromkeys(word or "?" for word in words)) if any(words) else ""


def _word(value: object) -> str:
    """A number or a string, as text; "" for everything else."""
    return prose(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""


def _good_artefacts(result: Result) -> list[str]:
    """What came out of the runs and is what the verdict says, in every pair; nothing for a bad verdict."""
    if result.outcome.exit_code != 0:
        return []
    good = (Verdict.IDENTICAL, Verdict.WITHIN_TOLERANCE)
    tables = [{child.artefact: child.verdict in good for child in node.children} for _, node in pairs_of(result)]
    outputs = (name for name in ARTEFACTS if name not in CONDITIONS)
    return [name for name in outputs if tables and all(table.get(name, False) for table in tables)]


def _speaks_for_itself(node: Difference) -> bool:
    if node.verdict in (Verdict.IGNORED, Verdict.IDENTICAL):
        return False
    return all(child.verdict.badness < node.verdict.badness for child in node.children)


def _entries(log: Any) -> list[Any]:
    entries = log.get("entries") if isinstance(log, Mapping) else log
    return list(entries) if isinstance(entries, (list, tuple)) else []


def _failing(entries: Sequence[Any]) -> Iterator[str]:
    for entry in entries:
        if _claim_verdict(entry) not in ("holds", "not applicable"):
            yield _claim_line(entry) if isinstance(entry, Mapping) else f"an entry that is no claim: {_shown(entry)}"


def _claim_verdict(entry: Any) -> Any:
    return entry.get("verdict") if isinstance(entry, Mapping) else None


def _claim_count(entries: Sequence[Any]) -> str:
    holds = sum(_claim_verdict(entry) == "holds" for entry in entries)
    other = sum(_claim_verdict(entry) == "not applicable" for entry in entries)
    aside = f", {other} not applicable" if other else ""
    return f"{holds} of {len(entries) - other} claims hold{aside}"


def _claim_line(entry: Mapping[str, Any]) -> str:
    keys = ["asked", "observed"] if entry.get("set") == entry.get("asked") else ["asked", "set", "observed"]
    parts = [f"{key} {_shown(entry[key])}" for key in keys if entry.get(key) is not None]
    line = f"{_shown(entry.get('claim', 'unnamed'))}: {', '.join(parts) or 'nothing was observed'}"
    return f"{line}. {_shown(entry['remedy'])}" if entry.get("remedy") else line


def _shown(value: object) -> str:
    return prose(value if isinstance(value, str) else json.dumps(value, default=str))


def _number(value: object) -> float | None:
    """The size of a measure: a number, or the string that stands for a non-finite one, where NaN is the largest."""
    if value in ("nan", "inf", "-inf"):
        return math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return abs(value) if value == value and abs(value) < 1e308 else math.inf


def _count(number: int, noun: str) -> str:
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number} {noun if number == 1 else plural}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
