"""Curves and pictures of the page: what is drawn in a real browser, by the keyboard, and where assets are missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from colours import luminance
from example_assets import picture, plain_picture, result_of, series, tag
from hypothesis import given, settings
from hypothesis import strategies as st

from f3rm_verify.assets import KEY, Assets, CurvePair, asset_names
from f3rm_verify.difference import Difference, Result, Verdict
from f3rm_verify.reporters.curves import Curve, read_curve
from f3rm_verify.reporters.html import html_page, write_html
from f3rm_verify.reporters.json_report import read_json, write_json

HOSTILE = "<img src=x onerror=alert(1)><b>x</b></script>|\x1b[2J\u202e\udcff"
Opened = tuple[Any, list[str], list[str]]
Open = Callable[..., Opened]


def everything(*results: Result) -> Result:
    return result_of(*(node for one in results for group in one.root.children for node in group.children))


@pytest.fixture
def assets(tmp_path: Path) -> Assets:
    return Assets(tmp_path / "r.assets")


@pytest.fixture
def curves(assets: Assets) -> Result:
    """Worst first: a loss that differs from step 3 on, a tag that is NaN on one side, one that is equal."""
    loss = [1, 0.9, 0.8, 0.7, 0.6, 0.5]
    other = [*loss[:3], 0.70001, 0.6, 0.51]
    return result_of(
        tag(assets, "Train Loss", series(loss, other), 1),
        tag(assets, HOSTILE, series(loss, [*loss[:4], np.nan, 0.5])),
        tag(assets, "psnr", series(loss, loss)),
    )


@pytest.fixture
def pictures(assets: Assets) -> Result:
    """In this order, the worst first."""
    return result_of(
        *(picture(assets, name, number, size=20 - 5 * number) for number, name in enumerate(("one", "two", "three")))
    )


def curve_of(pair: CurvePair, assets: Assets) -> Curve:
    node = tag(assets, "x", pair)
    found = read_curve(("curves", "x"), node, assets)
    assert found is not None
    return found


class TestThinning:
    def test_short_curves_are_whole(self, assets: Assets) -> None:
        pair = series(np.arange(2000), np.arange(2000) + 1)
        assert curve_of(pair, assets).thinned(400).steps.size == 2000

    @settings(max_examples=30, deadline=None)
    @given(st.sets(st.integers(0, 9_999), min_size=1, max_size=5), st.integers(0, 9_999))
    def test_a_step_that_differs_by_an_ulp_is_drawn(
        self, tmp_path_factory: pytest.TempPathFactory, at: set[int], peak: int
    ) -> None:
        a = np.sin(np.arange(10_000, dtype=np.float32)) + 2
        a[peak] = 10
        b = a.copy()
        for place in at:
            b[place] = np.nextafter(b[place], np.float32(100))
        drawn = curve_of(series(a, b), Assets(tmp_path_factory.mktemp("a"))).thinned(100)
        assert drawn.steps.size < 510
        assert drawn.n == 10_000 and drawn.first_step == min(at)
        assert {0, 9_999, peak} <= {*drawn.steps.tolist()}
        for stretch in np.array_split(np.arange(10_000), 100):
            differing = at & {*stretch.tolist()}
            assert bool(differing) == bool(differing & {*drawn.steps[drawn.differs].tolist()})

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_counts_as_the_largest(self, assets: Assets, value: float) -> None:
        a = np.ones(10_000, np.float32)
        b = a + np.float32(0.5)
        b[5_000] = value
        drawn = curve_of(series(a, b), assets).thinned(100)
        assert drawn.steps[drawn.odd].tolist() == [5_000]

    def test_signed_zeros_differ_without_a_distance(self, assets: Assets) -> None:
        found = curve_of(series([0.0, 1.0], [-0.0, 1.0]), assets)
        assert found.odd.tolist() == [True, False] and np.isnan(found.distance).all()


class TestPage:
    def test_the_same_bytes_from_the_result_file_and_its_assets(
        self, tmp_path: Path, assets: Assets, curves: Result, pictures: Result
    ) -> None:
        both = everything(curves, pictures)
        write_json(both, tmp_path / "r.json")
        write_html(both, tmp_path / "a", assets=assets)
        write_html(read_json(tmp_path / "r.json"), tmp_path / "b", assets=Assets(tmp_path / "r.assets"))
        files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
        assert files == sorted(
            path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file()
        )
        assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
        page = (tmp_path / "a" / "index.html").read_text("utf8")
        loaded = re.findall(r"(?:src|href)=\"([^\"#]+)\"", page)
        assert loaded and {*loaded} <= {str(file) for file in files}

    def test_without_curves_there_is_no_plotly(self, tmp_path: Path, assets: Assets, pictures: Result) -> None:
        write_html(pictures, tmp_path / "a", assets=assets)
        assert not (tmp_path / "a" / "assets" / "plotly.min.js").exists()

    def test_an_asset_is_written_where_it_belongs_when_it_already_lies_there(
        self, tmp_path: Path, pictures: Result, assets: Assets
    ) -> None:
        assert assets.folder is not None
        target = tmp_path / "page" / "assets"
        target.parent.mkdir()
        assets.folder.rename(target)
        write_html(pictures, tmp_path / "page", assets=Assets(target))
        assert len(list(target.iterdir())) == 12

    def test_the_picture_for_people_beside_an_array_is_not_shown_twice(self, assets: Assets) -> None:
        nodes = [picture(assets, name) for name in ("rgb", "rgb.png", "alone.png")]
        page = html_page(result_of(*nodes), assets)
        assert re.findall(r"data-picture=\"(\d+)\"", page) == ["0", "1"]

    def test_curves_and_pictures_are_bounded(self, assets: Assets) -> None:
        node, shown = tag(assets, "a", series([1, 2], [1, 3])), picture(assets, "b")
        many = [Difference(**{**vars(node), "name": f"{i}"}) for i in range(130)]
        more = [Difference(**{**vars(shown), "name": f"{i}"}) for i in range(2500)]
        page = html_page(result_of(*many, *more), assets)
        assert page.count("data-curve=") == 100 and "and 30 more" in page
        assert page.count("data-picture=") == 2000 and "and 500 more" in page

    @pytest.mark.parametrize("value", [None, [1, 2], [1, 2, 3, -4], [1, 2, 3, "4"], [2**40, 1, 1, 1], "1234"])
    def test_a_region_that_is_none(self, assets: Assets, value: Any) -> None:
        node = picture(assets, "a")
        node = Difference(**{**vars(node), "measures": {**node.measures, "region": value}})
        assert '"region": null' in html_page(result_of(node), assets)


def until(page: Any, condition: str) -> None:
    """Waits; playwright's own way evaluates strings, which the page forbids."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    pytest.fail(condition)


def chart(page: Any, what: str) -> Any:
    return page.evaluate(f"document.getElementById('chart').{what}")


@pytest.mark.browser
class TestCurves:
    def test_both_sides_their_distance_and_the_first_step_are_drawn(
        self, open_page: Open, curves: Result, assets: Assets, tmp_path: Path
    ) -> None:
        page, errors, requests = open_page(curves, assets)
        page.wait_for_selector("#chart .scatterlayer .trace path")
        assert chart(page, "data.map(each => each.name)") == ["reference", "candidate", "distance"]
        assert page.locator("#chart .scatterlayer .trace").count() == 3
        distance = chart(page, "data[2].y")
        assert [value is not None for value in distance] == [False, False, False, True, False, True]
        assert distance[3] == pytest.approx(1e-5, rel=0.01)
        assert chart(page, "layout.yaxis2.type") == "log"
        assert chart(page, "layout.shapes[0].x0") == 3
        assert page.locator("#chart .annotation", has_text="first at step 3").count() == 1
        assert errors == []
        assert all(url.startswith((tmp_path / "page").as_uri()) for url in requests)

    def test_the_keyboard_chooses_and_names_stay_text(self, open_page: Open, curves: Result, assets: Assets) -> None:
        page, errors, _ = open_page(curves, assets)
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.locator("[data-curve='0']").focus()
        page.keyboard.press("ArrowDown")
        assert page.evaluate("document.activeElement.dataset.curve") == "1"
        assert page.locator("[data-curve][aria-pressed=true]").count() == 1
        assert "<img src=x onerror=alert(1)><b>x</b>" in page.locator("#chart-text").text_content()
        assert page.locator("main b").count() == 0
        assert chart(page, "data.map(each => each.name)")[2:] == ["differs without a distance"]
        assert chart(page, "data[2].x") == [4]
        page.keyboard.press("End")
        assert "psnr" in page.locator("#chart-text").text_content()
        assert chart(page, "data.length") == 2 and chart(page, "layout.shapes.length") == 0
        page.keyboard.press("Home")
        assert page.evaluate("document.activeElement.dataset.curve") == "0"
        assert errors == []

    def test_what_only_one_side_logged_is_shown(self, open_page: Open, assets: Assets) -> None:
        more = {"candidate_only_steps": np.array([7, 9]), "candidate_only": np.array([1, 2], np.float32)}
        page, errors, _ = open_page(result_of(tag(assets, "a", series([1, 2], [1, 3], **more))), assets)
        assert chart(page, "data[2].name") == "candidate alone" and chart(page, "data[2].x") == [7, 9]
        assert errors == []

    @pytest.mark.parametrize("how", ["removed", "changed", "no series"])
    def test_what_is_missing_is_told(self, open_page: Open, curves: Result, assets: Assets, how: str) -> None:
        assert assets.folder is not None
        for file in assets.folder.iterdir():
            if how == "removed":
                file.unlink()
            elif how == "changed":
                file.write_bytes(file.read_bytes()[:-1] + b"?")
        if how == "no series":
            names = {KEY: {"series": assets.keep(b"PK", "npz")}}
            node = Difference(name="a", artefact="curves", verdict=Verdict.DIFFERENT, measures=names)
            curves = result_of(node)
        page, errors, requests = open_page(curves, assets)
        assert page.locator("[data-curve] .placeholder").count() == page.locator("[data-curve]").count() > 0
        assert "not kept" in page.locator("#chart-text").text_content()
        assert errors == [] and len(requests) == 1

    def test_long_curves_say_that_they_are_thinned(self, open_page: Open, assets: Assets) -> None:
        a = np.sin(np.arange(50_000) / 1000)
        page, errors, _ = open_page(result_of(tag(assets, "a", series(a, a + 1e-6))), assets)
        assert re.search(r"Drawn: \d+ of 50000 steps", page.locator("#chart-text").text_content())
        assert page.evaluate("performance.now()") < 20_000
        assert errors == []

    def test_without_scripts_every_curve_has_a_drawing_and_its_summary(
        self, open_page: Open, curves: Result, assets: Assets
    ) -> None:
        page, _, _ = open_page(curves, assets, java_script_enabled=False)
        assert page.locator(".list svg:visible").count() == page.locator(".list .summary:visible").count() == 3
        assert page.locator(".list svg path.distance").first.get_attribute("d").startswith("M")
        odd = [path.get_attribute("d") for path in page.locator(".list svg path.odd").all()]
        assert [bool(path) for path in odd] == [False, True, False]
        assert not page.locator(".chart").is_visible()

    def test_printed_it_is_light(self, open_page: Open, curves: Result, assets: Assets) -> None:
        page, errors, _ = open_page(curves, assets, color_scheme="dark")
        back = chart(page, "layout.paper_bgcolor")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert chart(page, "layout.paper_bgcolor") == "#fff" != back
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert chart(page, "layout.paper_bgcolor") == back
        assert errors == []


def figure(page: Any, view: str, style: str = "display") -> str:
    return str(page.evaluate(f"getComputedStyle(document.querySelector('figure.{view}')).{style}"))


@pytest.mark.browser
class TestPictures:
    def test_the_worst_is_shown_from_both_sides_with_its_map_and_region(
        self, open_page: Open, pictures: Result, assets: Assets
    ) -> None:
        page, errors, _ = open_page(pictures, assets)
        until(page, "document.querySelector('.heat .region').style.width")
        shown = page.evaluate(
            "[...document.querySelectorAll('.stage img')].map(i => [i.naturalWidth, i.naturalHeight])"
        )
        assert shown == [[60, 40]] * 3
        assert page.locator("#picture-name").text_content() == "one"
        measures = dict(pictures.root.leaves())["runs", "renders", "one"].measures
        row, column, height, width = measures["region"]
        places = page.evaluate("""[...document.querySelectorAll('figure')].map(each => {
            const [outer, inner] = ['img', '.region'].map(s => each.querySelector(s).getBoundingClientRect());
            return [(inner.top - outer.top) / outer.height * 40, (inner.left - outer.left) / outer.width * 60,
                    inner.height / outer.height * 40, inner.width / outer.width * 60]})""")
        assert np.allclose(places, [[row, column, height, width]] * 3, atol=1)
        page.locator("#picture-region").uncheck()
        assert page.locator(".region:visible").count() == 0
        assert errors == []

    def test_every_view_by_the_keyboard(self, open_page: Open, pictures: Result, assets: Assets) -> None:
        page, errors, _ = open_page(pictures, assets)
        page.locator(".viewer").focus()
        assert figure(page, "heat") == "block"
        page.keyboard.press("2")
        assert figure(page, "heat") == "none"
        clip = "getComputedStyle(document.querySelector('.reference img')).clipPath"
        before = page.evaluate(clip)
        page.keyboard.press(".")
        assert page.evaluate(clip) != before and page.locator("#picture-split").input_value() == "55"
        page.locator("#picture-split").focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("#picture-split").input_value() == "56"
        assert page.locator("#picture-name").text_content() == "one"
        boxes = page.evaluate(
            "[...document.querySelectorAll('.stage img')].slice(0, 2).map(i => i.getBoundingClientRect())"
        )
        assert boxes[0] == boxes[1]
        page.locator(".viewer").focus()
        page.keyboard.press("3")
        until(page, "getComputedStyle(document.querySelector('figure.reference')).visibility === 'hidden'")
        until(page, "getComputedStyle(document.querySelector('figure.reference')).visibility === 'visible'")
        page.keyboard.press("f")
        shown = page.locator("#picture-shown").text_content()
        page.keyboard.press("f")
        assert {shown, page.locator("#picture-shown").text_content()} == {"reference", "candidate"}
        page.keyboard.press("4")
        assert [figure(page, view) for view in ("reference", "candidate", "heat")] == ["none", "none", "block"]
        page.keyboard.press("1")
        assert [figure(page, view) for view in ("reference", "candidate", "heat")] == ["block"] * 3
        assert errors == []

    def test_another_picture_by_the_keyboard(self, open_page: Open, pictures: Result, assets: Assets) -> None:
        page, errors, _ = open_page(pictures, assets)
        page.locator(".viewer").focus()
        first = page.locator(".reference img").get_attribute("src")
        for key, name, count in (
            ("ArrowRight", "two", "2 of 3"),
            ("End", "three", "3 of 3"),
            ("ArrowRight", "three", "3 of 3"),
        ):
            page.keyboard.press(key)
            assert page.locator("#picture-name").text_content() == name
            assert page.locator("#picture-count").text_content() == count
        assert page.locator(".reference img").get_attribute("src") != first
        page.locator("[data-picture='2']").focus()
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("document.activeElement.dataset.picture") == "1"
        page.keyboard.press("Home")
        assert page.locator(".reference img").get_attribute("src") == first
        page.locator("[data-filter=thumbnails]").fill("two")
        assert page.locator("[data-picture]:visible").count() == 1
        page.locator("[data-picture]:visible").focus()
        page.keyboard.press("Enter")
        assert page.locator("#picture-name").text_content() == "two"
        assert errors == []

    def test_a_picture_that_loads_after_another_was_chosen_does_no_harm(
        self, open_page: Open, pictures: Result, assets: Assets
    ) -> None:
        page, errors, _ = open_page(pictures, assets)
        page.evaluate("""() => {
            const old = document.querySelector('.heat img');
            document.querySelector('[data-go="1"]').click();
            old.dispatchEvent(new Event('load'));
            old.dispatchEvent(new Event('error'));
        }""")
        until(page, "document.querySelector('.heat .region').style.width")
        assert page.locator(".stage .placeholder").count() == 0 and errors == []

    def test_it_does_not_blink_for_who_wants_no_motion(self, open_page: Open, pictures: Result, assets: Assets) -> None:
        page, _, _ = open_page(pictures, assets, reduced_motion="reduce")
        page.locator(".modes [data-mode=blink]").click()
        assert not page.locator("#picture-auto").is_checked()
        page.locator("#picture-flip").click()
        assert figure(page, "reference", "visibility") == "hidden"

    def test_names_stay_text(self, open_page: Open, assets: Assets) -> None:
        page, errors, _ = open_page(result_of(picture(assets, HOSTILE), picture(assets, HOSTILE + "2", 1)), assets)
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.locator(".viewer").focus()
        page.keyboard.press("ArrowRight")
        assert "<img src=x onerror=alert(1)>" in page.locator("#picture-name").text_content()
        assert page.locator("main b").count() == 0 and errors == []

    def test_missing_pictures_have_a_placeholder(self, open_page: Open, pictures: Result, assets: Assets) -> None:
        assert assets.folder is not None
        names = asset_names(dict(pictures.root.leaves())["runs", "renders", "one"])
        for key in ("heat", "candidate", "thumbnail"):
            (assets.folder / names[key]).unlink()
        page, errors, _ = open_page(pictures, assets)
        assert page.locator(".stage .placeholder").count() == 2
        assert page.locator("#thumbnails .placeholder").count() == 1
        page.locator(".viewer").focus()
        page.keyboard.press("ArrowRight")
        assert page.locator(".stage .placeholder").count() == 0
        page.keyboard.press("ArrowLeft")
        assert page.locator(".stage .placeholder").count() == 2
        assert errors == []

    def test_pictures_that_go_away_later_have_a_placeholder(
        self, open_page: Open, pictures: Result, assets: Assets, tmp_path: Path
    ) -> None:
        page, _, _ = open_page(pictures, assets)
        for file in (tmp_path / "page" / "assets").iterdir():
            file.unlink()
        page.reload()
        until(page, "document.querySelectorAll('.stage .placeholder').length === 3")
        page.locator("#thumbnails").scroll_into_view_if_needed()
        until(page, "document.querySelectorAll('#thumbnails .placeholder').length === 3")

    def test_five_hundred_are_usable_at_once(self, open_page: Open, assets: Assets) -> None:
        nodes = [plain_picture(assets, f"eval_{i:03d}", 4 * i) for i in range(500)]
        page, errors, requests = open_page(result_of(*nodes), assets)
        page.locator(".viewer").focus()
        page.keyboard.press("End")
        assert page.locator("#picture-count").text_content() == "500 of 500"
        assert page.evaluate("performance.now()") < 10_000  # a busy machine
        assert len(requests) < 250, "pictures that nobody sees are not loaded"
        page.locator("[data-picture='499']").scroll_into_view_if_needed()
        until(page, "document.querySelector('[data-picture=\"499\"] img').naturalWidth > 0")
        assert errors == []

    @pytest.mark.parametrize(("scheme", "width"), [("dark", 360), ("light", 1200)])
    def test_nothing_sticks_out_whatever_the_view(
        self, open_page: Open, pictures: Result, curves: Result, assets: Assets, scheme: Any, width: int
    ) -> None:
        both = everything(curves, pictures)
        page, errors, _ = open_page(both, assets, color_scheme=scheme, viewport={"width": width, "height": 700})
        for key in "1234":
            page.locator(".viewer").focus()
            page.keyboard.press(key)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert errors == []

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_contrast(self, open_page: Open, pictures: Result, curves: Result, assets: Assets, scheme: Any) -> None:
        page, _, _ = open_page(everything(curves, pictures), assets, color_scheme=scheme)
        back = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for selector in (".hint", ".legend", "figcaption", ".thumbnails .size", "#chart-text", "kbd", ".bar button"):
            colour = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).color")
            low, high = sorted((luminance(colour), back))
            assert (high + 0.05) / (low + 0.05) >= 4.5, selector
        for name in ("reference", "candidate"):
            colour = page.evaluate(f"getComputedStyle(document.querySelector('path.{name}')).stroke")
            low, high = sorted((luminance(colour), back))
            assert (high + 0.05) / (low + 0.05) >= 3, name

    def test_printed_the_worst_is_there_side_by_side(self, open_page: Open, pictures: Result, assets: Assets) -> None:
        page, _, _ = open_page(pictures, assets)
        page.emulate_media(media="print")
        assert page.locator("figure img:visible").count() == 3 and page.locator("#thumbnails img:visible").count() == 3
        assert page.locator(".bar:visible, .tools > *:visible, .in-print:visible").count() == 0

    def test_of_many_the_first_are_printed_and_that_is_told(self, open_page: Open, assets: Assets) -> None:
        page, _, _ = open_page(result_of(*(plain_picture(assets, f"{i}", 4 * i) for i in range(70))), assets)
        page.emulate_media(media="print")
        assert page.locator("#thumbnails li:visible").count() == 60
        assert page.locator(".in-print:visible").text_content() == "Printed: the first 60 of 70 pictures."
