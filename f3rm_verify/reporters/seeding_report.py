"""The seeding log of one interpreter as a table: for `f3rm-verify seeding`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from f3rm_verify.reporters import clean

#: The word and the style of each verdict. The longest one is shortened: what was observed needs the width.
_SHOWN = {"holds": ("holds", "green"), "fails": ("fails", "bold red"), "not applicable": ("n/a", "dim")}


def render_seeding(log: Mapping[str, Any], console: Console) -> None:
    """Prints the verdict, each claim with what was asked and observed, and the remedies of those that do not hold."""
    entries = log["entries"]
    failing = [entry for entry in entries if entry["verdict"] == "fails"]
    claims = len(failing) + sum(entry["verdict"] == "holds" for entry in entries)
    count = f"{len(failing)} of {claims} claims {'fails' if len(failing) == 1 else 'fail'}"
    word = Text("FAILS", "bold red") if failing else Text("HOLDS", "bold green")
    said = count if failing else f"all {claims} claims hold"
    console.print(word.append(f"  {said} for seed {log['plan']['base_seed']}", "default"))
    console.print(_table(entries))
    for entry in failing:
        console.print(Text(f"{clean(entry['claim'])}: ", "bold").append(clean(entry["remedy"]), "default"))


def _table(entries: list[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("claim", "asked", "observed", "verdict"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "claim")
    for entry in entries:
        word, style = _SHOWN[entry["verdict"]]
        cells = [Text(clean(entry[key]), "dim" if style == "dim" else "") for key in ("claim", "asked", "observed")]
        table.add_row(*cells, Text(word, style))
    return table
