"""A headless Chromium for the tests of the report's page, and the page opened in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest

from tests.browser.synthetic_report import SyntheticReport, one_run, six_runs
from tests.debian import install_packages

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDE, NARROW = (1280, 900), (390, 844)
WAIT_S = 60.0
"""What holds at all, holds long before."""


@dataclass
class Opened:
    """A page, and what it said and asked for since it was opened."""

    page: Any
    path: Path
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a JavaScript expression gives."""
        return self.page.evaluate(script, *arguments)

    def draw_all(self) -> None:
        """Have every figure drawn."""
        self.run("window.report.drawAll()")

    def wait_until(self, condition: str) -> None:
        """Look at a JavaScript condition in each frame until it holds; the page forbids Playwright's own way, eval."""
        look = f"const look = () => ({condition} ? done() : requestAnimationFrame(look));"
        told = json.dumps(f"not within {WAIT_S:.0f} s: {condition}")
        end = f"setTimeout(() => fail(new Error({told})), {WAIT_S * 1000})"
        self.run(f"new Promise((done, fail) => {{ {end}; {look} look(); }})")

    def settle(self) -> None:
        """Wait for two frames: what was asked for in this one is on the screen."""
        self.run("new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))")


OpenPage = Callable[..., Opened]


def _chromium() -> str | None:
    return next((found for name in CHROMIUM if (found := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, started once; it is installed where it is missing."""
    if find_spec("playwright") is None:
        pytest.skip("the package playwright is not installed")
    install_packages("chromium", unless=lambda: _chromium() is not None)
    program = _chromium()
    assert program is not None, f"The package chromium is installed, and has none of {', '.join(CHROMIUM)}."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def plotting() -> str:
    """Plotly's JavaScript."""
    spec = find_spec("plotly")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package plotly is not installed")
    return (Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js").read_text()


@pytest.fixture
def open_file(browser: Any) -> Iterator[OpenPage]:
    """Opens a page from disk; every message of the console and every request is kept, and must be none at the end."""
    opened: list[Opened] = []
    contexts = []

    def opener(path: Path, size: tuple[int, int] = WIDE, scheme: str = "light", **more: Any) -> Opened:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce", **more
        )
        contexts.append(context)
        one = Opened(context.new_page(), path)
        one.page.on("console", lambda message: one.messages.append(f"{message.type}: {message.text}"))
        one.page.on("pageerror", lambda error: one.messages.append(f"error: {error.stack}"))
        one.page.on("request", lambda request: one.requests.append(request.url))
        one.page.goto(path.as_uri())
        opened.append(one)
        return one

    yield opener
    for context in contexts:
        context.close()
    for one in opened:
        assert one.messages == []
        asked = [url for url in one.requests if not url.startswith(("data:", "blob:"))]
        assert asked == [one.path.as_uri()]


@pytest.fixture
def open_page(open_file: OpenPage, plotting: str, tmp_path: Path) -> OpenPage:
    """Writes a report and opens it."""
    numbers = count()

    def opener(report: SyntheticReport, size: tuple[int, int] = WIDE, scheme: str = "light", **more: Any) -> Opened:
        return cast(
            Opened,
            open_file(report.write(tmp_path / f"report_{next(numbers)}.html", plotting), size, scheme, **more),
        )

    return opener


@pytest.fixture(scope="session")
def single() -> SyntheticReport:
    """A report of one run with traces."""
    return one_run()


@pytest.fixture(scope="session")
def six() -> SyntheticReport:
    """A report of two groups of three seeds."""
    return six_runs()
