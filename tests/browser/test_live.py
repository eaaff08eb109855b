"""A live report takes new data without losing the reader's place: scroll, zoom and the open response stay."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Opened
from tests.browser.synthetic_report import NUM_STEPS, SyntheticReport, one_run, run

pytestmark = pytest.mark.browser


class LiveServer:
    """Serves a page and its data, which a test may change."""

    def __init__(self, page: str, data: dict[str, Any]) -> None:
        self.page = page
        self.data = data
        self.status = 200
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                is_data = self.path == "/data.json"
                body = (json.dumps(server.data) if is_data else server.page).encode()
                self.send_response(server.status if is_data else 200)
                self.send_header("Content-Type", "application/json" if is_data else "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def live(browser: Any, plotting: str, tmp_path: Path) -> Iterator[tuple[LiveServer, Opened]]:
    """A live page of a run at half of its steps, in Chromium."""
    report = one_run()
    data = report.data | {"is_live": True, "runs": [until(report.data["runs"][0], NUM_STEPS // 2)]}
    path = SyntheticReport(data, report.tokens).write(tmp_path / "page.html", plotting)
    server = LiveServer(path.read_text().replace("connect-src 'none'", "connect-src 'self'"), data)
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = Opened(context.new_page(), path)
    opened.page.on("console", lambda message: opened.messages.append(f"{message.type}: {message.text}"))
    opened.page.on("pageerror", lambda error: opened.messages.append(f"error: {error.stack}"))
    opened.page.goto(server.url)
    opened.draw_all()
    yield server, opened
    context.close()
    server.close()


def until(whole: dict[str, Any], step: int) -> dict[str, Any]:
    """The run as it was after that step."""
    num = step + 1
    return copy.deepcopy(whole) | {
        "state": "unfinished",
        "steps": whole["steps"][:num],
        "metrics": {name: values[:num] for name, values in whole["metrics"].items()},
        "axes": {"tokens": whole["axes"]["tokens"][:num], "flops": None, "flops_note": ""},
        "time": whole["time"] | {"seconds": [values[:num] for values in whole["time"]["seconds"]]},
    }


def take(server: LiveServer, opened: Opened, data: dict[str, Any]) -> None:
    """Have the page take new data now."""
    server.data = data
    opened.run("window.report.poll()")
    opened.draw_all()


def last_x(opened: Opened, figure: str) -> float:
    return opened.run(f"document.querySelector('#figure-{figure} .plot').data.at(-1).x.at(-1)")


def test_new_steps_come_in_and_the_readers_place_stays(live: tuple[LiveServer, Opened]) -> None:
    server, opened = live
    page = opened.page
    page.locator(".response-choice").nth(2).click()
    page.locator(".half-life input[type=number]").fill("8")
    page.locator(".response").evaluate("(box) => (box.scrollTop = 300)")
    opened.run("Plotly.relayout(document.querySelector('#figure-reward .plot'), {'xaxis.range': [3, 9]})")
    opened.settle()
    token = "document.querySelector('.response .token')"
    opened.run(f"{token}.wasHere = true")
    place = "[scrollY, document.querySelector('.response').scrollTop, window.report.credit().view.halfLife]"
    before = opened.run(place)
    assert before[1:] == [300, 8]
    assert last_x(opened, "reward") == NUM_STEPS // 2

    fresh = server.data | {"runs": [until(one_run().data["runs"][0], NUM_STEPS)], "written_at": "2026-11-27 08:09"}
    take(server, opened, fresh)
    assert last_x(opened, "reward") == NUM_STEPS
    assert last_x(opened, "time") == NUM_STEPS
    assert opened.run("document.querySelector('#figure-reward .plot').layout.xaxis.range") == [3, 9]
    assert opened.run(place) == before
    assert opened.run(f"{token}.wasHere")
    assert "written 2026-11-27 08:09" in page.locator("#masthead").inner_text()
    assert opened.messages == []


def test_new_figures_and_runs_and_verdicts_come_in(live: tuple[LiveServer, Opened]) -> None:
    server, opened = live
    fresh = copy.deepcopy(server.data)
    line = {"metric": "optim/grad_norm", "label": "norm", "role": "line"}
    fresh["figures"].append(fresh["figures"][0] | {"id": "gradient", "title": "Gradient norm", "lines": [line]})
    fresh["runs"][0]["metrics"]["optim/grad_norm"] = [0.5] * (NUM_STEPS // 2 + 1)
    fresh["runs"][0]["verdict"][0]["title"] = "It has stopped learning"
    fresh["runs"].append(run(1, "dapo", 1, 0.9))
    take(server, opened, fresh)
    assert opened.run("document.querySelectorAll('#figure-gradient .js-line').length") == 1
    assert "It has stopped learning" in opened.page.locator("#overview").inner_text()
    assert opened.page.locator("#toolbar .chip").count() == 2
    order = opened.run("[...document.querySelectorAll('main > section')].map(({ id }) => id)")
    told = [
        "overview",
        "evaluation",
        "credit",
        "section-learning",
        "section-fipo",
        "time",
        "samples",
        "analysis",
        "configuration",
    ]
    assert order == told
    assert opened.messages == []


def test_it_asks_by_itself_and_says_when_nobody_answers(live: tuple[LiveServer, Opened]) -> None:
    server, opened = live
    server.data = server.data | {"written_at": "2026-11-27 09:30"}
    opened.page.get_by_text("written 2026-11-27 09:30").wait_for()
    server.status = 503
    opened.page.get_by_text("not live: the server answered 503").wait_for()
    server.status = 200
    opened.wait_until("document.getElementById('live').textContent === 'live'")
    assert set(server.asked) == {"/", "/data.json"}
    assert all("503" in message for message in opened.messages)


def test_new_traces_need_the_page_loaded_again(live: tuple[LiveServer, Opened]) -> None:
    server, opened = live
    fresh = copy.deepcopy(server.data)
    fresh["runs"][0]["groups"].append(fresh["runs"][0]["groups"][0] | {"step": 99})
    take(server, opened, fresh)
    assert "there are new traces" in opened.page.locator("#live").inner_text()
    opened.run("window.report.poll()")  # the same data once more
    assert "there are new traces" in opened.page.locator("#live").inner_text()
    assert "step 99" not in opened.page.locator("#credit .controls").inner_text()
