"""The seeding log of one interpreter as a table: for `f3rm-verify seeding`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from f3rm_verify.reporters import clean

_STYLES = {"holds": "green", "fails": "bold red", "not applicable": "dim"}


def render_seeding(log: Mapping[str, Any], console: Console) -> None:
    """Prints the verdict, each claim with what was asked and observed, and the remedies of those that do not hold."""
    entries = log["entries"]
    failing = [entry for entry in entries if entry["verdict"] == "fails"]
    held = sum(entry["verdict"] == "holds" for entry in entries)
    word = Text("FAILS" if failing else "HOLDS", "bold red" if failing else "bold green")
    count = f"  {held} of {held + len(failing)} claims about seed {log['plan']['base_seed']}"
    console.print(word.append(count, "default"))
    console.print()
    console.print(_table(entries))
    for entry in failing:
        console.print(Text(f"\n{clean(entry['claim'])}: ", "bold").append(clean(entry["remedy"]), "default"))


def _table(entries: list[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("claim", "asked", "observed", "verdict"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        style = _STYLES[entry["verdict"]]
        cells = [Text(clean(entry[key]), "dim" if style == "dim" else "") for key in ("claim", "asked", "observed")]
        table.add_row(*cells, Text(entry["verdict"], style))
    return table
