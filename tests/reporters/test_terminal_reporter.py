"""The terminal report: golden files at width 100, and what must hold at every width and for every name."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest
from example_results import (
    RESULTS,
    claims,
    diverged,
    good_artefacts,
    group,
    hostile,
    leaf,
    reproducible,
    run_of,
    several_pairs,
)
from golden_files import check_golden
from rich.cells import cell_len
from rich.console import Console

from f3rm_verify import reporters as words
from f3rm_verify.difference import Difference, Outcome, Result, Verdict
from f3rm_verify.reporters.terminal import render_terminal, shorten, shorten_path


def render(result: Result, *, width: int = 100, encoding: str = "utf-8", **options: Any) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    render_terminal(result, Console(file=file, width=width, legacy_windows=False), **options)
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("name", RESULTS)
def test_golden(name: str) -> None:
    check_golden(f"terminal_{name}.txt", render(RESULTS[name](), output=Path("outputs/r.json")))


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("width", [60, 80, 200])
def test_lines_fit_and_only_what_people_copy_is_longer(name: str, width: int) -> None:
    long = [line for line in render(RESULTS[name](), width=width).splitlines() if cell_len(line) > width]
    assert all(re.match(r"  reproduce|reference |candidate|result ", line) for line in long)


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_encoding_can_show_it(name: str, encoding: str) -> None:
    text = render(RESULTS[name](), encoding=encoding)
    assert text.isascii() == (encoding != "utf-8")
    assert len(text.splitlines()) > 5


def test_names_reach_the_terminal_as_text() -> None:
    file = io.StringIO()
    render_terminal(hostile(), Console(file=file, width=100, force_terminal=True, color_system="truecolor"))
    without_colour = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert all(char == "\n" or char.isprintable() for char in without_colour)
    assert "[bold red]" in without_colour
    assert ":fire:" in without_colour
    assert not any(line.startswith("REPRODUCIBLE") for line in without_colour.splitlines())


def test_colour_only_on_a_terminal() -> None:
    file = io.StringIO()
    render_terminal(diverged(), Console(file=file, width=100, force_terminal=True, color_system="standard"))
    assert file.getvalue().startswith("\x1b[1;31mDIVERGED")
    assert "\x1b" not in render(diverged())


def test_reproducible_first_line() -> None:
    first = render(reproducible()).splitlines()[0]
    assert first == "REPRODUCIBLE  2 runs x 1000 steps, seed 42, f3rm, 2 threads, cpu"


def test_diverged_first_line() -> None:
    first = render(diverged()).splitlines()[0]
    assert first == "DIVERGED  first at step 3 (last equal: 2), stage loss, Train Loss Dict/feature_loss"


def test_sides_that_differ_are_both_named() -> None:
    result = dataclasses.replace(reproducible(), candidate=run_of("candidate", seed=43, threads=None))
    assert "seed 42 / 43" in words.conditions_line(result)
    assert "2 / ? threads" in words.conditions_line(result)


def test_nothing_is_claimed_for_what_was_not_recorded() -> None:
    result = dataclasses.replace(
        reproducible(), not_recorded=("trace", "renders"), root=group("run", *good_artefacts()[2:5:2])
    )
    assert words.recorded_line(result) == "reproducible in curves and checkpoints; no trace, no renders were recorded"


def test_several_pairs_claim_only_what_every_pair_has() -> None:
    result = several_pairs()
    some = group("run", *good_artefacts()[:4], name="candidate-1")
    every = group("run", *good_artefacts(), name="candidate-2")
    result = dataclasses.replace(
        result, pairs=2, outcome=Outcome.REPRODUCIBLE, not_recorded=("trace",), root=group("run", some, every)
    )
    assert words.recorded_line(result) == "reproducible in curves and metrics; no trace was recorded"


def test_a_bad_verdict_claims_nothing() -> None:
    assert words.recorded_line(diverged()) == "no trace was recorded"


@pytest.mark.parametrize("details", [-1, 0, 3, 20])
def test_details_are_limited_and_the_rest_is_counted(details: int) -> None:
    text = render(diverged(), details=details)
    shown = text.split("Worst first\n")[1].split("\n\n")[0].splitlines()
    assert len([line for line in shown if line[0] in "≠?∅"]) == max(details, 0)
    assert f"… and {30 - max(details, 0)} more: --json has every one" in shown[-1]


def test_no_details_where_everything_is_identical() -> None:
    assert "Worst first" not in render(reproducible())


def test_worst_verdict_first_then_size() -> None:
    found = words.worst_first(diverged())
    assert [node.verdict.badness for _, node in found] == sorted([5] * 28 + [4, 3], reverse=True)
    assert [path[-1] for path, _ in found[:2]] == [
        f"_model.field.mlp_base.encoder.levels.{n}.hash_table" for n in (25, 24)
    ]
    assert [path for path, _ in found[26:28]] == [("curves", "Train Loss Dict/feature_loss"), ("curves", "Train Loss")]


def test_nan_is_the_largest_difference() -> None:
    nan = leaf("checkpoints", "a", Verdict.DIFFERENT, n=10, n_different=1, max_rel=0.5, n_nan_mismatch=1)
    assert words.size_of(nan) > words.size_of(leaf("checkpoints", "b", Verdict.DIFFERENT, max_rel=2.0))
    assert words.size_of(leaf("checkpoints", "c", max_rel=float("nan"))) == (float("inf"), 0.0)
    assert words.size_of(leaf("checkpoints", "d", max_rel=10**400)) == (float("inf"), 0.0)


def test_share_counts_where_there_is_no_relative_difference() -> None:
    assert words.size_of(leaf("renders", "a", n=4, n_different=1)) == (0.25, 0.25)
    assert words.size_of(leaf("renders", "a", n=0, n_different=0)) == (0.0, 0.0)
    assert words.size_of(leaf("renders", "a", n="four", n_different=True)) == (0.0, 0.0)


def test_a_parent_worse_than_its_children_is_not_lost() -> None:
    parent = Difference(
        name="curves", artefact="curves", verdict=Verdict.DIFFERENT, summary="lengths", children=(leaf("curves", "a"),)
    )
    result = dataclasses.replace(diverged(), root=group("run", parent))
    assert [path for path, _ in words.worst_first(result)] == [("curves",)]


def test_summary_from_measures_where_the_comparator_gave_none() -> None:
    node = leaf("checkpoints", "a", Verdict.DIFFERENT, n=8, n_different=2, max_rel=0.125)
    assert words.summary_of(node) == "different, 2 of 8, relative difference up to 0.125"
    assert words.summary_of(leaf("setup", "a", Verdict.WITHIN_TOLERANCE)) == "within tolerance"


def test_ignored_once_for_all_pairs() -> None:
    result = dataclasses.replace(
        several_pairs(), root=group("run", *(group("run", *good_artefacts(), name=f"candidate-{n}") for n in (1, 2)))
    )
    assert [(item.kind, item.reason) for item in words.ignored_by_reason(result)] == [
        ("3 tags", "a duration"),
        ("1 tag", "memory use"),
    ]


def test_only_claims_that_say_holds_hold() -> None:
    log = [*claims(a="holds", b="not applicable", c="Holds", d="unknown"), {}, "text"]
    (found,) = words.seeding_logs(dataclasses.replace(reproducible(), seeding={"reference": log}))
    assert found.count == "1 of 5 claims hold, 1 not applicable"
    assert len(found.failing) == 4


def test_a_control_that_does_not_differ_is_a_failure() -> None:
    assert words.control_line({"seed": 43, "verdict": "diverged"}) == (
        True,
        "control run with seed 43: differs, as it must",
    )
    for verdict in ("identical", "reproducible", "inconclusive", None, ""):
        assert words.control_line({"seed": 43, "verdict": verdict})[0] is False


@pytest.mark.parametrize("outcome", Outcome)
def test_bare_results_have_a_report(outcome: Outcome) -> None:
    bare = Result(
        tool={}, outcome=outcome, reasons=(), reference={}, candidate={}, pairs=1, steps=None, root=group("run")
    )
    lines = render(bare).splitlines()
    assert lines[0].startswith(words.verdict_word(bare))
    assert "nothing was compared" in lines[-1]


def test_clean_keeps_names_apart_and_prose_keeps_lines_together() -> None:
    assert words.clean("a\nb\u200b\x9b\udcff") == r"a\nb\u200b\x9b\udcff"
    assert words.prose(" a\n\tb  c\x1b ") == r"a b c\x1b"
    assert words.clean("Größe ✓ 深度") == "Größe ✓ 深度"


@pytest.mark.parametrize("width", range(5, 40))
def test_shortened_names_fit(width: int) -> None:
    for name in ("a" * 30, "深度" * 10, "a\u0301" * 50, "x" * 1_000_000):
        assert cell_len(shorten(name, width, "…")) <= width
    for path in (
        ["checkpoints", "step-000000999", "深度" * 9],
        ["a"],
        ["b" * 50, "c"],
        ["a", "b" * 9, "c" * 9, "d" * 9],
    ):
        assert cell_len(shorten_path(path, width, "...")) <= max(width, 5)


def test_shortened_names_keep_both_ends() -> None:
    assert shorten("0123456789", 5, "…") == "01…89"
    assert shorten("0123456789", 10, "…") == "0123456789"
    assert shorten_path(["checkpoints", "step-9", "pipeline", "weight"], 30, "…") == "checkpoints / … / weight"


def test_what_was_not_asked_for_is_not_in_the_verdict() -> None:
    node = Difference(name="curves", artefact="curves", verdict=Verdict.IDENTICAL)
    root = Difference.group(name="runs", artefact="runs", children=[node])
    only = Result(
        tool={},
        outcome=Outcome.REPRODUCIBLE,
        reasons=(),
        reference={},
        candidate={},
        pairs=1,
        steps=3,
        policy={"only": ["curves"]},
        root=root,
    )
    assert words.recorded_line(only) == "reproducible in curves; nothing else was compared"
    assert words.recorded_line(dataclasses.replace(only, policy={})) == ""


def test_what_is_not_identical_and_not_required_is_named_beside_the_verdict() -> None:
    nodes = [
        Difference(name="curves", artefact="curves", verdict=Verdict.IDENTICAL),
        Difference(name="checkpoints", artefact="checkpoints", verdict=Verdict.DIFFERENT),
    ]
    result = Result(
        tool={},
        outcome=Outcome.REPRODUCIBLE,
        reasons=(),
        reference={},
        candidate={},
        pairs=1,
        steps=3,
        policy={"required": ["curves"], "source": "gate.toml"},
        root=Difference.group(name="runs", artefact="runs", children=nodes),
    )
    assert words.recorded_line(result) == (
        "reproducible in curves; checkpoints not identical, and not required by the policy"
    )
    assert words.policy_source(result) == "gate.toml"
    assert words.policy_source(dataclasses.replace(result, policy={"source": "default: identical bit by bit"})) == ""
