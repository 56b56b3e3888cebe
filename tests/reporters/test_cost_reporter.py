"""What determinism costs as tables."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from f3rm_verify.reporters.cost_report import render_cost


def row(name: str, low: float = 0.99, high: float = 1.01, **changes: Any) -> dict[str, Any]:
    peak = {"with": 3 * 2**29, "without": 2**30, "more": 2**29}
    return {
        "measure": name,
        "upon": None,
        "not_applicable": None,
        "time_ratio": {"median": (low + high) / 2, "quartiles": [low, high]},
        "effect": "within noise" if low <= 1 <= high else "slower",
        "seconds_per_step": {"with": 1.2345, "without": 1.1},
        "peak_bytes": dict.fromkeys(("resident", "cuda_allocated", "cuda_reserved"), peak),
        "pairs": 16,
        **changes,
    }


def shown(*rows: dict[str, Any], width: int = 80) -> str:
    settings = {"method": "f3rm", "rays": 384, "threads": 1, "device": "cuda", "device_name": "\x1b[2J[bold]"}
    settings |= {"torch": "2.15.0", "counted_steps_per_block": 4, "resident": "sampled"}
    output = io.StringIO()
    render_cost({"rows": list(rows), "settings": settings}, Console(file=output, width=width, highlight=False))
    return output.getvalue()


def test_each_measure_has_its_time_and_its_memory() -> None:
    page = shown(row("nothing (control)"), row("memory filling", 1.5, 1.7, upon="deterministic algorithms"))
    times, memory = [line.split() for line in page.splitlines() if line.startswith(" memory filling")]
    assert times == ["memory", "filling", "1.600", "1.500", "to", "1.700", "1100", ">", "1234", "slower"]
    assert memory == ["memory", "filling", *["1536", "MiB", "+512.0"] * 3]
    assert "memory filling: upon deterministic algorithms" in " ".join(page.split())
    assert "16 pairs" in page
    assert "too busy" not in page


def test_what_does_not_apply_says_why() -> None:
    page = shown(row("nothing (control)"), row("cuBLAS workspace", not_applicable="no CUDA device", peak_bytes=None))
    (line,) = [line for line in page.splitlines() if "cuBLAS" in line]
    assert line.split() == ["cuBLAS", "workspace", "n/a", "no", "CUDA", "device"]


def test_a_control_that_differs_is_told() -> None:
    assert "too busy to believe the rest" in " ".join(shown(row("nothing (control)", 1.1, 1.2)).split())


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal_and_no_name_acts_on_it(width: int) -> None:
    page = shown(row("nothing (control)"), row("deterministic algorithms", 10.001, 10.002), width=width)
    assert max(map(len, page.splitlines())) <= width
    assert "\x1b" not in page
    assert "[bold]" in page
