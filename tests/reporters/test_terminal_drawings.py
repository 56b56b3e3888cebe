"""What a terminal shows of curves and pictures, and that nothing of it is shown where it cannot be."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from example_assets import picture, result_of, series, tag
from example_results import HOSTILE
from rich.console import Console

from f3rm_verify.assets import Assets
from f3rm_verify.difference import Result
from f3rm_verify.reporters.terminal import render_terminal
from f3rm_verify.reporters.terminal_drawings import curve_lines, drawn_curve, drawn_picture, picture_lines

STEPS = 50
LOSS = np.linspace(1, 0.1, STEPS).astype(np.float32)
OTHER = np.where(np.arange(STEPS) < 20, LOSS, LOSS + np.float32(0.3)).astype(np.float32)


@pytest.fixture
def assets(tmp_path: Path) -> Assets:
    return Assets(tmp_path / "r.assets")


def braille(text: str) -> bool:
    return any(0x2800 < ord(char) < 0x2900 for char in text)


def shown(result: Result, assets: Assets | None, **options: object) -> str:
    stream = io.StringIO()
    settings: dict[str, object] = {
        "width": 120,
        "force_terminal": True,
        "color_system": "truecolor",
        "legacy_windows": False,
    }
    console = Console(file=stream, _environ={"TERM": "xterm-256color"}, **{**settings, **options})  # type: ignore[arg-type]
    render_terminal(result, console, assets=assets)
    return stream.getvalue()


class TestCurve:
    def test_both_sides_are_told_apart_from_the_step_at_which_they_part(self, assets: Assets) -> None:
        curve = drawn_curve(result_of(tag(assets, "Train Loss", series(LOSS, OTHER))), assets)
        assert curve is not None
        lines = curve_lines(curve, 120)
        assert lines[-1].plain.endswith("^ first at step 20")
        at = lines[-1].plain.index("^")
        coloured = [span.start for line in lines[:6] for span in line.spans if span.style in ("cyan", "yellow")]
        assert coloured and min(coloured) >= at - 2
        assert all(len(line.plain) <= 120 for line in lines)
        assert lines[0].plain.strip().startswith("1 ") and "0.1" in lines[5].plain

    def test_the_distance_is_drawn_from_there_on_a_log_scale(self, assets: Assets) -> None:
        later = OTHER.copy()
        later[-1] += 30
        curve = drawn_curve(result_of(tag(assets, "Train Loss", series(LOSS, later))), assets)
        assert curve is not None
        top, _, bottom = curve_lines(curve, 120)[6:9]
        assert top.plain.split()[0] == "30.3" and bottom.plain.split()[0] == "0.3"
        assert not braille(bottom.plain[11:40]) and braille(bottom.plain[45:])

    def test_equal_curves_have_no_distance(self, assets: Assets) -> None:
        curve = drawn_curve(result_of(tag(assets, "Train Loss", series(LOSS, LOSS))), assets)
        assert curve is not None
        lines = curve_lines(curve, 80)
        assert len(lines) == 7 and not any("first" in line.plain for line in lines)
        assert not any(span.style in ("cyan", "yellow") for line in lines for span in line.spans)

    @pytest.mark.parametrize(
        "values", [[np.nan] * 5, [np.inf, 1, 2, -np.inf, 3], [0, 0, 0, 0, 0], [1e38, -1e38, 0, 1, 2]]
    )
    def test_any_values_can_be_drawn(self, assets: Assets, values: list[float]) -> None:
        curve = drawn_curve(result_of(tag(assets, "a", series(values, [1, 2, 3, 4, 5]))), assets)
        assert curve is not None
        assert len(curve_lines(curve, 70)) >= 8

    def test_that_of_the_first_divergence_comes_first(self, assets: Assets) -> None:
        nodes = [tag(assets, name, series(LOSS, OTHER), size) for name, size in (("worse", 9.0), ("loss", 0.1))]
        found = drawn_curve(result_of(*nodes), assets)
        assert found is not None and found.name == "loss"

    def test_no_room(self, assets: Assets) -> None:
        curve = drawn_curve(result_of(tag(assets, "a", series(LOSS, OTHER))), assets)
        assert curve is not None and curve_lines(curve, 40) == []


class TestPicture:
    def test_one_pixel_is_seen_in_the_map_however_small_it_is(self, assets: Assets) -> None:
        found = drawn_picture(result_of(picture(assets, "rgb", shape=(400, 600, 3), size=1)))
        assert found is not None
        lines = picture_lines(found[1], assets, 120)
        heat = [str(span.style) for line in lines[1:] for span in line.spans if span.start >= 2 * 36 + 4]
        assert len({*heat} - {"#000000 on #000000"}) == 1
        assert [len(line.plain) for line in lines] == [3 * 36 + 4] * len(lines)

    def test_what_is_missing_or_damaged_is_left_out(self, assets: Assets) -> None:
        result = result_of(picture(assets, "rgb"))
        found = drawn_picture(result)
        assert found is not None and assets.folder is not None
        assert picture_lines(found[1], assets, 120)
        (assets.folder / found[1].measures["assets"]["heat"]).unlink()
        assert picture_lines(found[1], assets, 120) == []
        assert picture_lines(found[1], Assets(), 120) == []


class TestReport:
    def test_a_terminal_shows_both(self, assets: Assets) -> None:
        text = shown(result_of(tag(assets, "Train Loss", series(LOSS, OTHER)), picture(assets, "rgb")), assets)
        assert braille(text) and "\u2580" in text

    def test_names_are_cleaned(self, assets: Assets) -> None:
        text = shown(result_of(tag(assets, HOSTILE, series(LOSS, OTHER)), picture(assets, HOSTILE)), assets)
        assert braille(text) and "\x1b[2J" not in text and "\x1b]0" not in text and "\u202e" not in text

    @pytest.mark.parametrize(
        "options",
        [
            {"force_terminal": False},
            {"_environ": {"TERM": "dumb"}},
            {"width": 40},
        ],
    )
    def test_where_nothing_can_be_drawn_the_report_is_the_words(
        self, assets: Assets, options: dict[str, object]
    ) -> None:
        result = result_of(tag(assets, "Train Loss", series(LOSS, OTHER)), picture(assets, "rgb"))
        stream = io.StringIO()
        settings: dict[str, object] = {"_environ": {"TERM": "xterm"}, "width": 120, "force_terminal": True}
        render_terminal(result, Console(file=stream, **{**settings, **options}), assets=assets)  # type: ignore[arg-type]
        assert not braille(stream.getvalue()) and "\u2580" not in stream.getvalue()

    @pytest.mark.parametrize("options", [{"color_system": None}, {"color_system": "standard"}, {"no_color": True}])
    def test_pictures_need_colours_and_curves_do_not(self, assets: Assets, options: dict[str, object]) -> None:
        result = result_of(tag(assets, "Train Loss", series(LOSS, OTHER)), picture(assets, "rgb"))
        text = shown(result, assets, **options)
        assert braille(text) and "\u2580" not in text

    def test_without_assets_there_are_only_words(self, assets: Assets) -> None:
        result = result_of(tag(assets, "Train Loss", series(LOSS, OTHER)))
        assert not braille(shown(result, None)) and not braille(shown(result, Assets()))
