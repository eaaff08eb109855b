"""Hostile texts stay text; light and dark differ and keep their contrast; everything is reached by keys; print."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser.conftest import OpenPage
from tests.browser.synthetic_report import HOSTILE, SyntheticReport

pytestmark = pytest.mark.browser

LEAST_CONTRAST = 4.5

CONTRAST = """() => {
  const parse = (text) => {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 1;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = text;
    context.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = context.getImageData(0, 0, 1, 1).data;
    return [red, green, blue, alpha / 255];
  };
  const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];
  const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (node) => {
    if (!node) return [255, 255, 255, 1];
    const own = parse(getComputedStyle(node).backgroundColor);
    return own[3] === 1 ? own : over(own, ground(node.parentElement));
  };
  const told = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    const isUnseen = ["SCRIPT", "STYLE", "OPTION", "NOSCRIPT"].includes(node.tagName) || !node.checkVisibility();
    if (!text.data.trim() || isUnseen || node.closest("svg, :disabled")) continue;
    const back = ground(node);
    const ink = over(parse(getComputedStyle(node).color), back);
    const [one, other] = [luminance(ink), luminance(back)].sort((a, b) => b - a);
    told.push([(one + 0.05) / (other + 0.05), node.className || node.tagName, text.data.slice(0, 40)]);
  }
  return told.sort((a, b) => a[0] - b[0]);
}"""


@pytest.mark.parametrize("name", ["single", "six"])
def test_light_and_dark_keep_their_contrast(name: str, open_page: OpenPage, request: pytest.FixtureRequest) -> None:
    report: SyntheticReport = request.getfixturevalue(name)
    grounds = {}
    for scheme in ("light", "dark"):
        opened = open_page(report, scheme=scheme)
        opened.draw_all()
        found = opened.run(CONTRAST)
        assert len(found) > 150
        assert found[0][0] >= LEAST_CONTRAST, found[:5]
        grounds[scheme] = opened.run("getComputedStyle(document.body).backgroundColor")
        opened.run("document.documentElement.style.setProperty('--muted', '#8d897f')")
        assert opened.run(CONTRAST)[0][0] < LEAST_CONTRAST or scheme == "dark", "a grey that is too faint is noticed"
    assert grounds["light"] != grounds["dark"]


def test_plots_take_the_new_colours_when_the_scheme_changes(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    opened.draw_all()
    colour = "document.querySelector('#figure-reward .plot').data[0].line.color"
    grid = "document.querySelector('#figure-reward .plot').layout.yaxis.gridcolor"
    light = opened.run(f"[{colour}, {grid}]")
    opened.page.emulate_media(color_scheme="dark")
    opened.settle()
    opened.draw_all()
    dark = opened.run(f"[{colour}, {grid}]")
    assert dark[0] != light[0]
    assert dark[1] != light[1]
    level = "getComputedStyle(document.querySelector('.token[class*=above]')).backgroundColor"
    dark_token = opened.run(level)
    opened.page.emulate_media(color_scheme="light")
    assert opened.run(level) != dark_token


def _with_hostile_words(value: Any) -> Any:
    """The data with the hostile text in every text that a run can choose."""
    keys = {
        "title",
        "label",
        "name",
        "text",
        "caption",
        "unit",
        "prompt",
        "response",
        "reference",
        "answer",
        "finish_reason",
        "state",
    }
    if isinstance(value, dict):
        return {
            key: HOSTILE + one if key in keys and isinstance(one, str) else _with_hostile_words(one)
            for key, one in value.items()
        }
    return [_with_hostile_words(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["single", "six"])
def test_hostile_texts_stay_text(name: str, open_page: OpenPage, request: pytest.FixtureRequest) -> None:
    report: SyntheticReport = request.getfixturevalue(name)
    opened = open_page(SyntheticReport(_with_hostile_words(report.data), report.tokens))
    opened.draw_all()
    for details in opened.page.locator("details").all():
        details.evaluate("(node) => (node.open = true)")
    assert opened.run("document.title").startswith("</script>")
    assert (
        opened.run("document.querySelectorAll('img, body script:not([type])').length") == 2
    )  # the library and the page's own
    text = opened.run("document.body.innerText")
    assert text.count("</script><script>document.title='owned'</script><img src=x") > 10
    assert "‹U+202E›evil‹U+0000›" in text
    assert "\u202e" not in text
    assert "\0" not in text


def test_tokens_show_what_cannot_be_seen_by_name(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    opened.page.locator(".response-choice").first.click()
    tokens = opened.page.locator(".response .token")
    assert tokens.nth(0).text_content() == HOSTILE.replace("\u202e", "‹U+202E›").replace("\0", "‹U+0000›")
    assert tokens.nth(1).text_content() == ""
    assert tokens.nth(3).text_content() == "‹U+D800›"


def test_every_control_is_reached_by_tab(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    opened.draw_all()
    controls = """[...document.querySelectorAll("button, select, input, a[href], summary, canvas, .plot, .response")]
      .filter((node) => node.checkVisibility() && !node.disabled && node.getClientRects().length)"""
    num_controls = opened.run(f"{controls}.length")
    opened.run("document.activeElement.blur()")
    for _ in range(num_controls + 40):
        opened.page.keyboard.press("Tab")
        opened.run("document.activeElement.wasReached = true")
    missed = opened.run(f"{controls}.filter((node) => !node.wasReached).map((node) => node.outerHTML.slice(0, 120))")
    assert missed == []
    named = "node.textContent.trim() || node.getAttribute('aria-label') || node.closest('label')?.textContent"
    unnamed = opened.run(f"{controls}.filter((node) => !({named})).map((node) => node.outerHTML.slice(0, 120))")
    assert unnamed == []


def test_print_shows_everything_that_was_not_yet_in_view(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    opened.page.locator(".response-choice").nth(2).click()
    text = "window.report.credit().text"
    painted = f"[...{text}.painted].join() === [...{text}.levels].join()"
    assert not opened.run(painted)
    assert opened.run(f"(dispatchEvent(new Event('beforeprint')), {painted})")
    opened.page.emulate_media(media="print")
    opened.wait_until("[...document.querySelectorAll('.plot')].every((plot) => plot.classList.contains('drawn'))")
    assert not opened.page.locator("#toolbar").is_visible()
    box = "document.querySelector('.response')"
    assert opened.run(f"{box}.clientHeight === {box}.scrollHeight")
