"""The seeding log of one interpreter as a table."""

from __future__ import annotations

import io
from dataclasses import asdict

import pytest
from rich.console import Console

from f3rm_verify.reporters.seeding_report import render_seeding
from f3rm_verify.seeding_plan import Claim, SeedingLog, SeedingPlan

HOLDS = Claim(claim="numpy random", asked="stream of seed 7", set="it", observed="stream of seed 7", verdict="holds")
FAILS = Claim(claim="CPU threads", asked="2", set="2", observed="1 \x1b[2J[bold]", verdict="fails", remedy="Set it.")
TOLD = Claim(claim="libraries", asked="nothing", set="nothing", observed="torch " * 30, verdict="not applicable")


def shown(*claims: Claim, width: int = 80) -> str:
    output = io.StringIO()
    log = SeedingLog(plan=SeedingPlan(base_seed=7), entries=list(claims)).to_dict()
    render_seeding(log, Console(file=output, width=width, highlight=False))
    return output.getvalue()


def test_the_first_line_counts_what_was_claimed() -> None:
    assert shown(HOLDS, TOLD).splitlines()[0] == "HOLDS  all 1 claims hold for seed 7"
    assert shown(HOLDS, FAILS, TOLD).splitlines()[0] == "FAILS  1 of 2 claims fails for seed 7"
    assert shown(FAILS, FAILS).splitlines()[0] == "FAILS  2 of 2 claims fail for seed 7"


def test_each_claim_has_its_row_and_each_failure_its_remedy_below() -> None:
    page = shown(HOLDS, FAILS, TOLD)
    rows = {line[1:13].strip(): line.split()[-1] for line in page.splitlines() if line.strip()}
    assert rows["numpy random"] == "holds"
    assert rows["CPU threads"] == "fails"
    assert rows["libraries"] == "n/a"
    assert asdict(HOLDS)["observed"] in page
    assert page.rstrip().splitlines()[-1] == "CPU threads: Set it."


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal_and_nothing_in_a_claim_acts_on_it(width: int) -> None:
    page = shown(HOLDS, FAILS, TOLD, width=width)
    assert max(map(len, page.splitlines())) <= width
    assert "\x1b" not in page
    assert "[bold]" in page
