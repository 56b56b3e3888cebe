"""HTML, JUnit and Markdown: what they say for each verdict, that names stay text, and that their size is bounded."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from colours import luminance
from example_results import RESULTS
from golden_files import check_golden
from lxml import etree

from f3rm_verify.difference import Difference, FirstDivergence, Outcome, Result, Verdict
from f3rm_verify.errors import UsageError
from f3rm_verify.reporters.html import html_page, write_html
from f3rm_verify.reporters.json_report import read_json, write_json
from f3rm_verify.reporters.junit import junit_xml, write_junit
from f3rm_verify.reporters.markdown import escape, markdown, write_markdown

HOSTILE = "<script>alert(1)</script>|x|`y`\x1b[2J\u202e\udcff![a](http://a.b)\n# z"
OUTCOMES = {
    Outcome.REPRODUCIBLE: Verdict.IDENTICAL,
    Outcome.WITHIN_TOLERANCE: Verdict.WITHIN_TOLERANCE,
    Outcome.DIVERGED: Verdict.DIFFERENT,
    Outcome.INCONCLUSIVE: Verdict.UNREADABLE,
}
JUNIT_SCHEMA = Path(__file__).parent.parent / "junit.xsd"
WRITERS = {"html": write_html, "junit": write_junit, "markdown": write_markdown}


def result_of(outcome: Outcome, *, name: str = "Train Loss", count: int = 1, pairs: int = 1) -> Result:
    leaves = [
        Difference(
            name=f"{name}{number or ''}",
            artefact="curves",
            verdict=OUTCOMES[outcome],
            summary=f"{name}: what was found",
            measures={"max_abs": float(number), "first_step": 3},
        )
        for number in range(count)
    ]
    curves = Difference.group(name="curves", artefact="curves", children=leaves)
    nodes = [Difference.group(name=f"candidate-{i}", artefact="runs", children=[curves]) for i in range(pairs)]
    diverged = outcome is Outcome.DIVERGED
    return Result(
        tool={"name": "f3rm-verify"},
        outcome=outcome,
        reasons=() if outcome.exit_code == 0 else (f"{name} is why",),
        reference={"directory": name, "seed": 42},
        candidate={"directory": "b", "seed": 42},
        pairs=pairs,
        steps=7,
        first_divergence=first_of(name) if diverged else None,
        seeding={"reference": [{"claim": name, "verdict": "holds", "asked": "42"}], "candidate": []},
        root=Difference.group(name="runs", artefact="runs", children=nodes if pairs > 1 else [curves]),
    )


def first_of(name: str) -> FirstDivergence:
    return FirstDivergence(step=3, last_equal_step=2, stage="loss", subject=name, evidence=(name,), reproduce=name)


def assert_junit(content: bytes) -> None:
    etree.XMLSchema(etree.parse(JUNIT_SCHEMA)).assertValid(etree.fromstring(content))


@pytest.mark.parametrize("outcome", Outcome)
@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_bytes_again_from_the_result_file(tmp_path: Path, outcome: Outcome, kind: str) -> None:
    result = result_of(outcome, name=HOSTILE)
    write_json(result, tmp_path / "r.json")
    for number, each in enumerate((result, read_json(tmp_path / "r.json"))):
        WRITERS[kind](each, tmp_path / f"{number}")
    first, second = (tmp_path / "0", tmp_path / "1")
    files = [place / "index.html" if place.is_dir() else place for place in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes() != b""


@pytest.mark.parametrize("kind", WRITERS)
def test_what_cannot_be_written_is_a_sentence(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written .*name another file"):
        WRITERS[kind](result_of(Outcome.REPRODUCIBLE), tmp_path / "file" / "below")


class TestJunit:
    @pytest.mark.parametrize(
        ("outcome", "failures", "errors"),
        [
            (Outcome.REPRODUCIBLE, 0, 0),
            (Outcome.WITHIN_TOLERANCE, 0, 0),
            (Outcome.DIVERGED, 2, 0),
            (Outcome.INCONCLUSIVE, 0, 2),
        ],
    )
    def test_the_verdict_and_each_artefact_are_cases(self, outcome: Outcome, failures: int, errors: int) -> None:
        suites = ElementTree.fromstring(junit_xml(result_of(outcome)))
        suite = suites[0]
        assert (suites.tag, suite.tag) == ("testsuites", "testsuite")
        assert [case.get("name") for case in suite.iter("testcase")] == ["verdict", "curves"]
        assert {part.tag for case in suite.iter("testcase") for part in case} <= {"failure", "error"}
        assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", str(failures), str(errors))

    def test_each_pair_has_its_cases(self) -> None:
        suite = ElementTree.fromstring(junit_xml(result_of(Outcome.DIVERGED, pairs=2)))[0]
        assert [case.get("name") for case in suite.iter("testcase")] == [
            "verdict",
            "candidate-0.curves",
            "candidate-1.curves",
        ]

    def test_what_was_not_required_fails_no_good_verdict(self) -> None:
        other = result_of(Outcome.DIVERGED).root
        good = Result(**{**vars(result_of(Outcome.REPRODUCIBLE)), "root": other})
        suite = ElementTree.fromstring(junit_xml(good))[0]
        assert (suite.get("failures"), suite.get("errors"), suite.get("skipped")) == ("0", "0", "1")

    def test_names_are_text(self) -> None:
        suite = ElementTree.fromstring(junit_xml(result_of(Outcome.DIVERGED, name=HOSTILE)))[0]
        assert "<script>alert(1)</script>" in "".join(suite.itertext())
        assert {node.tag for node in suite.iter()} == {*("testsuite", "testcase", "failure", "properties", "property")}

    @pytest.mark.parametrize("name", RESULTS)
    def test_it_is_what_ci_services_read(self, name: str) -> None:
        assert_junit(junit_xml(RESULTS[name]()))

    @pytest.mark.parametrize("outcome", Outcome)
    def test_so_it_is_whatever_the_names_are(self, outcome: Outcome) -> None:
        assert_junit(junit_xml(result_of(outcome, name=HOSTILE, count=40, pairs=3)))

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('tests="', 'tests="-'),
            ('<testcase name="verdict"', "<testcase"),
            ("<failure ", "<failure><error/></failure><failure "),
            ("testsuites", "suites"),
            ('name="curves"', 'name="verdict"'),
            ('time="0"', 'time="soon"'),
        ],
    )
    def test_the_schema_can_fail(self, old: str, new: str) -> None:
        text = junit_xml(result_of(Outcome.DIVERGED)).decode()
        assert old in text
        with pytest.raises((etree.DocumentInvalid, etree.XMLSyntaxError)):
            assert_junit(text.replace(old, new).encode())

    @pytest.mark.parametrize("name", RESULTS)
    def test_golden(self, name: str) -> None:
        check_golden(f"junit_{name}.xml", junit_xml(RESULTS[name]()).decode("utf8"))


class TestMarkdown:
    @pytest.mark.parametrize("name", RESULTS)
    def test_golden(self, name: str) -> None:
        check_golden(f"markdown_{name}.md", markdown(RESULTS[name]()))

    @pytest.mark.parametrize("outcome", Outcome)
    def test_verdict_first(self, outcome: Outcome) -> None:
        text = markdown(result_of(outcome))
        assert text.startswith(f"## f3rm-verify: {outcome.value.replace('_', ' ').upper()}\n")
        assert ("### First divergence" in text) == (outcome is Outcome.DIVERGED)

    def test_names_are_text(self) -> None:
        shown = escape(HOSTILE)
        assert not re.search(r"[<>|`\[\]\n#!*_]", re.sub(r"&#\d+;", "", shown))
        text = markdown(result_of(Outcome.DIVERGED, name=HOSTILE))
        assert "<script" not in text and "http:" not in text
        assert text.isascii() or "\x1b" not in text

    @pytest.mark.parametrize(("count", "pairs"), [(20_000, 1), (60, 400)])
    def test_it_fits_a_summary_page_whatever_the_run(self, count: int, pairs: int) -> None:
        text = markdown(result_of(Outcome.DIVERGED, name="|" * 5000, count=count, pairs=pairs))
        assert len(text.encode("utf8")) < 2**20
        assert "the result file has every" in text


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


class TestHtml:
    @pytest.mark.parametrize("outcome", Outcome)
    def test_verdict_and_first_divergence_are_at_the_top(self, outcome: Outcome) -> None:
        page = html_page(result_of(outcome))
        headings = re.findall(r"<h[12][^>]*>([^<]*)<", page)
        assert headings[0] == outcome.value.replace("_", " ").upper()
        assert (headings[1] == "First divergence") == (outcome is Outcome.DIVERGED)

    def test_names_are_text_and_nothing_is_loaded(self) -> None:
        page = _Page(html_page(result_of(Outcome.DIVERGED, name=HOSTILE)))
        assert sum(tag == "script" for tag, _ in page.tags) == 1
        assert not [tag for tag, attributes in page.tags if {"src", "onclick", "onload"} & attributes.keys()]
        assert [attributes["href"] for _, attributes in page.tags if "href" in attributes] == ["#main"]
        policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
        assert policy is not None and policy.startswith("default-src 'none'")
        assert "\x1b" not in "".join(page.text) and "<script>alert(1)" in "".join(page.text)

    def test_a_huge_tree_gives_a_bounded_page(self) -> None:
        page = html_page(result_of(Outcome.DIVERGED, count=20_000))
        assert page.count("<tr>") < 2100
        assert "and 18000 more: the result file has every one" in page


Opened = tuple[Any, list[str], list[str]]


@pytest.mark.browser
class TestInABrowser:
    @pytest.mark.parametrize("outcome", Outcome)
    def test_it_opens_offline_without_a_complaint(self, open_page: Callable[..., Opened], outcome: Outcome) -> None:
        page, errors, requests = open_page(result_of(outcome, name=HOSTILE))
        assert errors == []
        assert len(requests) == 1 and requests[0].startswith("file://")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    def test_it_sorts_and_filters_by_the_keyboard(self, open_page: Callable[..., Opened]) -> None:
        page, errors, _ = open_page(result_of(Outcome.DIVERGED, count=12))
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        first = "document.querySelector('#outputs tbody th').textContent"
        head = page.locator("#outputs thead button", has_text="max_abs")
        head.focus()
        page.keyboard.press("Enter")
        assert page.evaluate(first).endswith("Loss11")
        page.keyboard.press("Enter")
        assert page.evaluate(first).endswith("Loss")
        page.locator("[data-filter=outputs]").focus()
        page.keyboard.type("loss7")
        assert page.locator("#outputs tbody tr:visible").count() == 1
        assert errors == []

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("outcome", Outcome)
    def test_contrast(self, open_page: Callable[..., Opened], scheme: str, outcome: Outcome) -> None:
        page, _, _ = open_page(result_of(outcome), color_scheme=scheme)
        colours = page.evaluate(
            "['h1', 'dt', '.mark', 'td'].map(s => getComputedStyle(document.querySelector(s)).color)"
        )
        back = luminance(page.evaluate("getComputedStyle(document.querySelector('header')).backgroundColor"))
        for colour in colours:
            low, high = sorted((luminance(colour), back))
            assert (high + 0.05) / (low + 0.05) >= 4.5, colour

    def test_narrow(self, open_page: Callable[..., Opened]) -> None:
        page, _, _ = open_page(result_of(Outcome.DIVERGED, name=HOSTILE), viewport={"width": 360, "height": 640})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    def test_a_huge_tree_is_usable_at_once(self, open_page: Callable[..., Opened]) -> None:
        page, errors, _ = open_page(result_of(Outcome.DIVERGED, count=20_000))
        page.locator("#outputs thead button", has_text="max_abs").click()
        assert page.evaluate("performance.now()") < 20_000  # a busy machine
        assert errors == []


def run_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    from f3rm_verify import cli

    monkeypatch.setattr("sys.argv", ["f3rm-verify", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


class TestCommand:
    @pytest.mark.parametrize("outcome", Outcome)
    def test_report_makes_every_report_and_exits_like_the_verdict(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome
    ) -> None:
        write_json(result_of(outcome), tmp_path / "r.json")
        options = {"--html": "h", "--junit": "j.xml", "--markdown": "m.md", "--json": "again.json"}
        words = [word for option, name in options.items() for word in (option, tmp_path / name)]
        assert run_command(monkeypatch, "report", tmp_path / "r.json", *words) == outcome.exit_code
        assert (tmp_path / "h" / "index.html").is_file() and (tmp_path / "m.md").is_file()
        assert ElementTree.parse(tmp_path / "j.xml").getroot().tag == "testsuites"
        assert (tmp_path / "again.json").read_bytes() == (tmp_path / "r.json").read_bytes()

    @pytest.mark.parametrize("option", ["--html", "--junit", "--markdown"])
    @pytest.mark.parametrize(("outcome", "code"), [(Outcome.REPRODUCIBLE, 2), (Outcome.DIVERGED, 1)])
    def test_a_report_that_cannot_be_written_hides_no_verdict(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        option: str,
        outcome: Outcome,
        code: int,
    ) -> None:
        # As if that had come about after the check.
        monkeypatch.setattr("f3rm_verify.options.refuse_unwritable", lambda *_, **__: None)
        write_json(result_of(outcome), tmp_path / "r.json")
        (tmp_path / "file").write_text("")
        assert run_command(monkeypatch, "report", tmp_path / "r.json", option, tmp_path / "file" / "below") == code
        printed = capsys.readouterr()
        assert outcome.value.upper() in printed.out and "cannot be written" in printed.err
