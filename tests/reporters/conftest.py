"""Opens pages in a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from f3rm_verify.assets import Assets
from f3rm_verify.difference import Result
from f3rm_verify.reporters.html import write_html


def _chromium() -> str:
    found = shutil.which("chromium")
    if found is None and os.environ.get("CI") != "true":
        pytest.skip("no chromium here")
    assert found is not None, "CI needs chromium"
    return found


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=_chromium(), args=flags)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[..., tuple[Any, list[str], list[str]]]]:
    """Opens the page of a result: the page, what it complained about, what it asked for."""
    contexts = []

    def opened(result: Result, assets: Assets | None = None, **options: Any) -> tuple[Any, list[str], list[str]]:
        write_html(result, tmp_path / "page", assets=assets)
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        errors: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((tmp_path / "page" / "index.html").as_uri())
        return page, errors, requests

    yield opened
    for context in contexts:
        context.close()
