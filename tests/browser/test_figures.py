"""Every figure is drawn, over every axis, for one run and for groups of runs; nothing is asked of a network."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from tests.browser.conftest import NARROW, WIDE, Opened, OpenPage
from tests.browser.synthetic_report import FLOPS_NOTE, NUM_STEPS, SyntheticReport

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
    assert num_figures == 5 + 1 + 1 + 2  # of metrics, time, evaluation, analysis
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


def test_an_axis_that_is_not_known_is_refused_with_the_reason(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    note = opened.page.locator("#toolbar [role=status]")
    flops = opened.page.get_by_role("button", name="FLOPs", exact=True)
    assert note.inner_text() == ""
    flops.click()
    assert note.inner_text() == f"Not drawn over FLOPs. {FLOPS_NOTE}"
    assert flops.get_attribute("aria-pressed") == "false"
    assert opened.page.get_by_role("button", name="Steps", exact=True).get_attribute("aria-pressed") == "true"
    opened.draw_all()
    assert opened.run("document.querySelector('#figure-reward .plot').layout.xaxis.title.text") == "step"
    opened.page.get_by_role("button", name="Tokens", exact=True).click()
    assert note.inner_text() == ""


def test_an_axis_that_some_runs_lack_names_them(open_page: OpenPage, six: SyntheticReport) -> None:
    runs = copy.deepcopy(six.data["runs"])
    for run in runs[:4]:
        run["axes"] |= {"flops": [1e12 * step for step in run["steps"]], "flops_note": ""}
    opened = open_page(SyntheticReport(six.data | {"runs": runs}, {}))
    opened.page.get_by_role("button", name="FLOPs", exact=True).click()
    told = opened.page.locator("#toolbar [role=status]").inner_text()
    assert told == f"Not drawn over FLOPs. dapo, seed 1; dapo, seed 2: {FLOPS_NOTE}"
    opened.draw_all()
    assert opened.run("document.querySelector('#figure-reward .plot').layout.xaxis.title.text") == "FLOPs"
    opened.page.get_by_role("button", name="Each run").click()
    opened.draw_all()
    assert opened.page.locator("#figure-reward .readout b").count() == 4, "what is not drawn is not told either"


def test_evaluations_are_drawn_once_with_their_intervals(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    opened.draw_all()
    figures = "[...document.querySelectorAll('figure')].filter(({ dataset }) => dataset.metrics?.includes('avg@4'))"
    assert opened.run(f"{figures}.map((figure) => figure.closest('section').id)") == ["evaluation"]
    scores = [one for one in single.data["runs"][0]["metrics"]["evaluation/held_out/avg@4"] if one is not None]
    assert opened.run("document.querySelector('#figure-held-out-score .plot').data.length") == 2
    avg = "document.querySelector('#figure-held-out-score .plot').data[0]"
    values, above, below = opened.run(f"(({{ y, error_y: bar }}) => [y, bar.array, bar.arrayminus])({avg})")
    assert values == scores
    assert above == pytest.approx([0.04] * len(scores))
    assert below == pytest.approx([0.04] * len(scores))


def _evaluation_band(opened: Opened) -> list[float]:
    (band,) = opened.run(
        "document.querySelector('#figure-held-out-score .plot').data.filter(({ fill }) => fill).map(({ y }) => [...y])"
    )
    return band


def test_intervals_of_shares_end_at_0_and_1(open_page: OpenPage, six: SyntheticReport) -> None:
    data = copy.deepcopy(six.data)
    data["runs"] = data["runs"][:3]
    data["comparison"] |= {"groups": data["comparison"]["groups"][:1]}
    for run, scores in zip(data["runs"], [(0.0, 1.0), (0.1, 1.0), (0.0, 0.9)], strict=True):
        metrics = run["metrics"]
        metrics["evaluation/held_out/avg@4"] = [scores[0], *[None] * (NUM_STEPS - 1), scores[1]]
    score = data["comparison"]["scores"][0]
    score["groups"] = [score["groups"][0] | {"mean": 0.967, "low": 0.823, "high": 1.11}]
    score["differences"] = [score["differences"][0] | {"mean": 0.9, "low": 0.7, "high": 1.1}]
    opened = open_page(SyntheticReport(data, {}))
    opened.page.get_by_label("Band").select_option(label="95 % t-interval over the seeds")
    opened.draw_all()
    band = _evaluation_band(opened)
    assert (min(band), max(band)) == (0, 1)
    beyond = opened.run("Math.max(...document.querySelector('#figure-reward .plot').data[0].y)")
    assert beyond > max(run["metrics"]["reward/mean"][-1] for run in data["runs"]), "others are drawn as they are"
    tables = opened.page.locator("#comparison").inner_text()
    assert "0.967 [0.823, 1]" in tables
    assert "+0.9 [+0.7, +1]" in tables


def test_bands_on_a_logarithmic_axis_reach_its_foot(open_page: OpenPage, six: SyntheticReport) -> None:
    data = copy.deepcopy(six.data)
    for run, value in zip(data["runs"], [1e-6, 1e-4, 1e-3] * 2, strict=True):
        run["metrics"]["policy/kl/mean"] = [value] * (NUM_STEPS + 1)
    opened = open_page(SyntheticReport(data, {}))
    opened.page.get_by_label("Band").select_option(label="95 % t-interval over the seeds")
    opened.draw_all()
    drawn = opened.run("document.querySelector('#figure-policy-kl .plot').data.flatMap(({ y }) => [...y])")
    assert min(drawn) > 0


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
    over_seeds = "The shaded range is the 95 % t-interval over the seeds."
    caption = opened.page.locator("#figure-influence-weights .caption")
    assert shaded not in caption.inner_text()
    assert over_seeds in caption.inner_text()
    assert len(traces("influence-weights")) == 2
    opened.page.get_by_role("button", name="dapo 3 seeds").click()
    opened.draw_all()
    assert shaded in caption.inner_text()
    assert over_seeds not in caption.inner_text()
    assert len(traces("influence-weights")) == 2, "one band alone"
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


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_arrows_tell_values_of_a_figure_that_was_never_in_view(
    size: tuple[int, int], open_page: OpenPage, single: SyntheticReport
) -> None:
    opened = open_page(single, size)
    opened.run("document.querySelector('#figure-time .plot').focus({ preventScroll: true })")
    assert opened.run("scrollY") == 0
    opened.page.keyboard.press("ArrowRight")
    opened.page.keyboard.press("ArrowRight")
    opened.page.keyboard.press("ArrowRight")
    opened.page.locator("#figure-time .readout", has_text=re.compile("^step 2")).wait_for()
    told = opened.page.locator("#figure-time .readout b").first.inner_text()
    assert float(told) == pytest.approx(single.data["runs"][0]["time"]["seconds"][0][2], rel=5e-3)


def test_readouts_of_many_runs_stay_within_their_figures(open_page: OpenPage, six: SyntheticReport) -> None:
    for size in (WIDE, NARROW):
        opened = open_page(six, size)
        opened.page.get_by_role("button", name="Each run").click()
        opened.draw_all()
        values = opened.page.locator("#figure-held-out-score .readout .value")
        assert values.count() == 6
        assert opened.run(
            "[...document.querySelectorAll('.readout')].every((node) => node.scrollWidth <= node.clientWidth)"
        )


def test_a_figure_that_comes_into_view_tells_the_cursors_values(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    opened.draw_all()
    opened.run("document.querySelector('#figure-reward .plot').focus({ preventScroll: true })")
    opened.page.keyboard.press("ArrowRight")
    opened.page.keyboard.press("ArrowRight")
    opened.run("document.querySelector('#figure-time').scrollIntoView()")
    opened.page.locator("#figure-time .readout", has_text=re.compile("^step 1")).wait_for()


def test_a_narrow_screen_folds_figures_until_they_are_asked_for(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single, NARROW)
    is_open = "document.querySelector('#section-fipo details.fold').open"
    learning, fipo = (opened.page.locator(f"#section-{name} details.fold > summary") for name in ("learning", "fipo"))
    assert learning.inner_text().split() == ["3", "figures", "Reward;", "Response", "length;", "Entropy"]
    assert opened.page.locator("#figure-reward").is_visible()
    assert not opened.page.locator("#figure-policy-kl").is_visible()
    fipo.focus()
    opened.page.keyboard.press("Enter")
    assert opened.run(is_open)
    opened.page.wait_for_selector("#figure-policy-kl .drawn")
    opened.page.keyboard.press("Enter")
    assert not opened.run(is_open)
    opened.page.get_by_role("button", name="fipo/influence_weight/mean").click()
    assert opened.run("document.activeElement.closest('figure').id") == "figure-influence-weights"
    assert opened.run(is_open), "a finding leads to its figure even where that is folded"
    opened.page.set_viewport_size({"width": WIDE[0], "height": WIDE[1]})
    opened.page.locator("#section-fipo details.fold[open]").wait_for()
    assert not fipo.is_visible()


def test_the_menu_opens_what_it_leads_to(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single, NARROW)
    opened.page.get_by_role("button", name="FLOPs", exact=True).click()  # its note makes the bar higher
    opened.settle()
    opened.page.get_by_role("button", name="Figures").click()
    opened.page.locator("#figure-menu a[href='#section-fipo']").click()
    assert opened.page.locator("#figure-policy-kl").is_visible()
    bar_and_title = (
        "['#toolbar', '#section-fipo-title'].map((name) => document.querySelector(name).getBoundingClientRect())"
    )
    opened.settle()
    assert opened.run(f"(([bar, title]) => bar.bottom <= title.top && title.top < innerHeight / 2)({bar_and_title})")


def test_paper_has_no_folds(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single, NARROW)
    folds = "[...document.querySelectorAll('details.fold')].map(({ open }) => open)"
    before = opened.run(folds)
    assert before == [True, False, False]
    assert all(opened.run(f"(dispatchEvent(new Event('beforeprint')), {folds})"))
    assert opened.run(f"(dispatchEvent(new Event('afterprint')), {folds})") == before


def test_a_figure_that_was_drawn_folded_fits_when_it_is_opened(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single, NARROW)
    opened.draw_all()
    opened.page.locator("#section-fipo details.fold > summary").click()
    plot = "document.querySelector('#figure-policy-kl .plot')"
    opened.wait_until(f"{plot}.querySelector('svg').clientWidth === {plot}.clientWidth")
    assert opened.run("document.documentElement.scrollWidth") == NARROW[0]


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
    assert [row.split("\t")[-2:] for row in rows] == [["128 problems", "yes"], ["3 seeds", "no"]]
    assert "+0.02 [+0.004, +0.036]" in rows[0]
    assert opened.page.locator("#comparison .warning-line").count() == 0


def test_a_comparison_of_runs_of_unlike_length_says_so(open_page: OpenPage, six: SyntheticReport) -> None:
    note = "The runs have trained 40, 40, 40, 40, 40 and 20 steps: their scores are of these."
    opened = open_page(SyntheticReport(six.data | {"comparison": six.data["comparison"] | {"note": note}}, {}))
    assert opened.page.locator("#comparison .warning-line").inner_text().strip() == note


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_scores_and_differences_are_read_without_scrolling(
    size: tuple[int, int], open_page: OpenPage, six: SyntheticReport
) -> None:
    opened = open_page(six, size)
    boxes = "[...document.querySelectorAll('#comparison .table-box:has(.stacked)')]"
    assert opened.run(f"{boxes}.map((box) => box.scrollWidth - box.clientWidth)") == [0, 0]


def test_differences_of_shadow_settings_are_folded(open_page: OpenPage, six: SyntheticReport) -> None:
    comparison = copy.deepcopy(six.data["comparison"])
    shadow = {"key": "objective.shadow.tau_8.half_life_tokens", "values": [8] * 3 + ["(missing)"] * 3}
    comparison["config_differences"].append(shadow)
    opened = open_page(SyntheticReport(six.data | {"comparison": comparison}, {}))
    cell = opened.page.get_by_text(shadow["key"])
    assert opened.page.get_by_text("objective.dual_clip").first.is_visible()
    assert not cell.is_visible()
    opened.page.get_by_text("Shadow settings, which change nothing in training, differ in 1 key").click()
    assert cell.is_visible()


def test_data_of_a_later_format_are_refused(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(SyntheticReport(single.data | {"format": 2}, {}))
    assert "was given format 2" in opened.page.get_by_role("alert").inner_text()
