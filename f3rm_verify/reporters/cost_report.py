"""What determinism costs as tables: for `f3rm-verify cost`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from f3rm_verify.reporters import clean

_STYLES = {"within noise": "dim", "too few pairs": "dim", "slower": "yellow", "faster": "green"}
#: The kinds of memory, as the tables' headings.
_MEMORY = {"resident": "RAM", "cuda_allocated": "GPU allocated", "cuda_reserved": "GPU reserved"}


def render_cost(result: Mapping[str, Any], console: Console, *, output: Path | None = None) -> None:
    """Prints the conditions, what each measure costs in time and in memory, and how to read it."""
    rows, settings = result["rows"], result["settings"]
    measured = [row for row in rows if row["not_applicable"] is None]
    console.print(_head(settings))
    console.print(_times(rows))
    console.print(_peaks(measured))
    for line in _legend(measured, settings):
        console.print(Text(line))
    if output is not None:
        console.print(Text(f"all of it: {output}"), soft_wrap=True)


def _head(settings: Mapping[str, Any]) -> Text:
    threads = f"{settings['threads']} thread{'' if settings['threads'] == 1 else 's'}"
    facts = (settings["method"], f"{settings['rays']} rays a step", threads, settings["device"])
    line = Text("COST", "bold").append(f"  {', '.join(map(clean, facts))}; nothing was trained\n", "default")
    return line.append(f"      {clean(settings['device_name'])}, torch {clean(settings['torch'])}", "dim")


def _times(rows: list[Mapping[str, Any]]) -> Table:
    table = _table("measure", "time", "middle half", "ms a step", "")
    for row in rows:
        name, reason = clean(row["measure"]), row["not_applicable"]
        if reason is not None:
            table.add_row(Text(name, "dim"), Text("n/a", "dim"), "", "", Text(clean(reason), "dim"))
            continue
        low, high = row["time_ratio"]["quartiles"]
        seconds = row["seconds_per_step"]
        table.add_row(
            name,
            f"{row['time_ratio']['median']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{_milliseconds(seconds['without'])} > {_milliseconds(seconds['with'])}",
            Text(row["effect"], _STYLES[row["effect"]]),
        )
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.{1 if seconds < 0.1 else 0}f}"


def _peaks(rows: list[Mapping[str, Any]]) -> Table:
    kinds = [kind for kind in _MEMORY if kind in rows[0]["peak_bytes"]]
    table = _table("measure", *(heading for kind in kinds for heading in (f"peak {_MEMORY[kind]}", "more")))
    for row in rows:
        peaks = [row["peak_bytes"][kind] for kind in kinds]
        cells = [cell for peak in peaks for cell in (f"{_mib(peak['with']):.0f} MiB", f"{_mib(peak['more']):+.1f}")]
        table.add_row(clean(row["measure"]), *cells)
    return table


def _mib(count: int) -> float:
    return count / 2**20


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    return table


def _legend(rows: list[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[str]:
    upon = "".join(f"; {clean(row['measure'])}: upon {clean(row['upon'])}" for row in rows if row["upon"])
    control = rows[0]
    lines = [
        f"time: {settings['counted_steps_per_block']} steps with it over as many without it beside them; median and "
        f"middle half of {control['pairs']} pairs{upon}.",
        f"more: MiB that a block with it needs beyond the one beside it, median. RAM: {clean(settings['resident'])}.",
    ]
    if control["effect"] in ("slower", "faster"):
        lines.append("The control differs, so this machine was too busy to believe the rest: use more --steps.")
    return lines
