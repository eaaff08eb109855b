"""Every figure is drawn, over every axis, for one run and for groups of runs; nothing is asked of a network."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser.conftest import NARROW, WIDE, OpenPage
from tests.browser.synthetic_report import NUM_STEPS, SyntheticReport

pytestmark = pytest.mark.browser

FIGURES_WITHOUT_MARKS = """() => [...document.querySelectorAll("figure")]
  .filter((figure) => !figure.querySelector("svg .trace path, svg .scatterlayer path.js-line, svg .barlayer path"))
  .map((figure) => figure.id)"""


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", ["single", "six"])
def test_every_figure_is_drawn_and_the_page_does_not_scroll_sideways(
    name: str, size: tuple[int, int], open_page: OpenPage, request: pytest.FixtureRequest
) -> None:
    opened = open_page(request.getfixturevalue(name), size)
    opened.draw_all()
    num_figures = opened.run("document.querySelectorAll('figure').length")
    assert num_figures == 6 + 1 + 1 + 2  # of metrics, time, evaluation, analysis
    assert "Nothing at any step: Tokens of code." in opened.page.locator("#analysis").inner_text()
    assert opened.run(FIGURES_WITHOUT_MARKS) == []
    for axis in ("Tokens", "Steps"):
        opened.page.get_by_role("button", name=axis, exact=True).click()
        opened.draw_all()
        assert opened.run(FIGURES_WITHOUT_MARKS) == []
    assert opened.run("[document.documentElement.scrollWidth, innerWidth]") == [size[0], size[0]]


def test_a_figure_that_has_no_values_is_noticed(open_page: OpenPage, single: SyntheticReport) -> None:
    run = single.data["runs"][0] | {
        "metrics": {**single.data["runs"][0]["metrics"], "reward/mean": [None] * (NUM_STEPS + 1)}
    }
    opened = open_page(SyntheticReport(single.data | {"runs": [run]}, single.tokens))
    opened.draw_all()
    assert opened.run(FIGURES_WITHOUT_MARKS) == ["figure-reward"]


def test_figures_are_drawn_when_they_come_into_view(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    opened.page.locator("#figure-reward").scroll_into_view_if_needed()
    opened.page.wait_for_selector("#figure-reward .drawn")
    assert opened.run("document.querySelector('#figure-time .drawn')") is None
    opened.page.locator("#figure-time").scroll_into_view_if_needed()
    opened.page.wait_for_selector("#figure-time .drawn")


def test_the_axis_of_tokens_is_the_runs_own(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    opened.draw_all()
    opened.page.get_by_role("button", name="Tokens", exact=True).click()
    opened.draw_all()
    drawn = opened.run("Array.from(document.querySelector('#figure-reward .plot').data[0].x)")
    assert drawn == single.data["runs"][0]["axes"]["tokens"]
    assert opened.page.get_by_role("button", name="FLOPs", exact=True).is_disabled()


def _reward(report: SyntheticReport, step: int) -> list[float]:
    return [run["metrics"]["reward/mean"][step] for run in report.data["runs"][:3]]


def test_groups_are_means_with_a_band_and_a_legend_that_hides_them_everywhere(
    open_page: OpenPage, six: SyntheticReport
) -> None:
    opened = open_page(six)
    opened.draw_all()
    step = 9

    def traces(figure: str) -> list[dict[str, Any]]:
        return opened.run(
            f"document.querySelector('#figure-{figure} .plot').data.map(({{ x, y }}) => ({{ x: [...x], y: [...y] }}))"
        )

    band, _, line, _ = traces("reward")
    first, second, third = values = _reward(six, step)
    assert line["y"][line["x"].index(step)] == pytest.approx((first + second + third) / 3, rel=1e-12)
    at_step = [y for x, y in zip(band["x"], band["y"], strict=True) if x == step]
    assert at_step == [max(values), min(values)]

    opened.page.get_by_label("Band").select_option(label="95 % t-interval over the seeds")
    opened.draw_all()
    band = traces("reward")[0]
    high, low = (y for x, y in zip(band["x"], band["y"], strict=True) if x == step)
    mean = sum(values) / 3
    half = 4.303 * (sum((value - mean) ** 2 for value in values) / 2) ** 0.5 / 3**0.5
    assert (low, high) == pytest.approx((mean - half, mean + half), rel=1e-9)

    shaded = "The shaded range is from min to max."
    caption = opened.page.locator("#figure-response-length .caption")
    assert shaded not in caption.inner_text()
    opened.page.get_by_role("button", name="dapo 3 seeds").click()
    opened.draw_all()
    assert shaded in caption.inner_text()
    assert [len(traces(figure)) for figure in ("reward", "entropy", "policy-kl")] == [2, 2, 2]
    opened.page.get_by_role("button", name="Each run").click()
    opened.draw_all()
    assert len(traces("reward")) == 6


def test_a_cursor_tells_the_values_of_all_figures_in_view(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    opened.draw_all()
    opened.page.locator("#section-learning").evaluate("(section) => section.scrollIntoView()")
    opened.settle()
    opened.page.locator("#figure-reward .plot").focus()
    for _ in range(3):
        opened.page.keyboard.press("ArrowRight")
    assert opened.page.locator("#figure-reward .readout").inner_text().split()[:2] == ["step", "2"]
    told = opened.page.locator("#figure-entropy .readout b").inner_text()
    assert float(told) == pytest.approx(single.data["runs"][0]["metrics"]["policy/entropy/mean"][2], rel=5e-3)
    opened.page.locator("#figure-held-out-score").scroll_into_view_if_needed()
    opened.page.locator("#figure-held-out-score .plot").focus()
    opened.page.keyboard.press("ArrowRight")
    opened.page.keyboard.press("ArrowRight")
    assert opened.page.locator("#figure-held-out-score .readout").inner_text().split()[:2] == ["step", "10"]


def test_numbers_are_there_as_a_table(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    opened.draw_all()
    opened.page.locator("#figure-reward summary").click()
    rows = opened.page.locator("#figure-reward tbody tr")
    assert rows.count() == NUM_STEPS + 1
    assert rows.nth(0).inner_text().split() == ["0", "–"]


def test_a_finding_leads_to_its_figure(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    opened.draw_all()
    opened.page.get_by_role("button", name="policy/entropy/mean").click()
    assert opened.run("document.activeElement.closest('figure').id") == "figure-entropy"
    top = opened.run("document.querySelector('#figure-entropy').getBoundingClientRect().top")
    assert 0 <= top < WIDE[1]
    levels = opened.page.locator(".card .level").all_inner_texts()
    assert levels == ["Warning", "Note", "Good", "Good"]


def test_a_comparison_says_which_differences_are_clear(open_page: OpenPage, six: SyntheticReport) -> None:
    opened = open_page(six)
    rows = opened.page.get_by_role("table", name="Paired differences").locator("tbody tr").all_inner_texts()
    assert [row.split("\t")[-1] for row in rows] == ["clear", "not clear: it may be 0"]
    assert "+0.02 [+0.004, +0.036]" in rows[0]


def test_data_of_a_later_format_are_refused(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(SyntheticReport(single.data | {"format": 2}, {}))
    assert "was given format 2" in opened.page.get_by_role("alert").inner_text()
