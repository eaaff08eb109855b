"""The credit view: the slider's numbers are Python's, filters and keys work, and a long response scrolls."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.browser.conftest import NARROW, OpenPage
from tests.browser.synthetic_report import HALF_LIFE, OBJECTIVE, SyntheticReport, future_kl_of, one_run

pytestmark = pytest.mark.browser

CREDIT = "window.report.credit()"
VIEW = f"{CREDIT}.view"
NUM_LONG = 20_000
TOLERANCE = 1e-6


def decoded(tokens: dict[str, Any], name: str) -> NDArray[Any]:
    kind = {"participates": "u1", "in_suffix_sum": "u1", "policy_version": "<i4"}.get(name, "<f4")
    return np.frombuffer(base64.b64decode(tokens["arrays"][name]), kind)


def expected(tokens: dict[str, Any], advantage: float, half_life: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """(F, f) of a response under a half-life, by Python."""
    arrays = [decoded(tokens, name) for name in ("shift", "participates", "in_suffix_sum")]
    return future_kl_of(*arrays, advantage, half_life)


def shown(opened: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """(F, f) that the page has."""
    opened.settle()
    sums, weights = opened.run(f"[Array.from({VIEW}.futureKl), Array.from({VIEW}.influenceWeights)]")
    return np.array(sums), np.array(weights)


def choose(opened: Any, label: str, option: str) -> None:
    opened.page.locator("#credit").get_by_label(label, exact=True).select_option(label=option)


def open_response(opened: Any, number: int) -> None:
    opened.page.locator(".response-choice").nth(number).click()


def set_half_life(opened: Any, value: float) -> None:
    opened.page.locator(".half-life input[type=number]").fill(str(value))


@pytest.mark.parametrize("half_life", [1, 2.5, 8, 128, 512])
def test_the_slider_gives_pythons_numbers(half_life: float, open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    group = single.data["runs"][0]["groups"][1]
    for number in (1, 2):  # a right response, and a wrong one in which the safety clip acts
        open_response(opened, number)
        response = group["responses"][number]
        tokens = single.tokens[response["tokens"]]
        set_half_life(opened, half_life)
        sums, weights = shown(opened)
        wanted_sums, wanted_weights = expected(tokens, response["advantage"], half_life)
        assert np.abs(sums - wanted_sums).max() <= TOLERANCE
        assert np.abs(weights - wanted_weights).max() <= TOLERANCE
        # What the comparison would notice: a half-life that is a hundredth off, a sum that goes the other way.
        assert np.abs(sums - expected(tokens, response["advantage"], half_life * 1.01)[0]).max() > TOLERANCE
        assert np.abs(sums - sums[::-1]).max() > TOLERANCE


def test_the_safety_clip_and_open_bounds() -> None:
    """By hand: what the next test gives to the page."""
    sums, weights = future_kl_of(
        np.array([0.5, 1.4]), np.ones(2), np.ones(2), -1.0, 1.0, OBJECTIVE | {"influence_max": 5.0}
    )
    assert sums == pytest.approx([1.2, 1.4])
    assert weights == pytest.approx([np.exp(1.2), 1.0])


@pytest.mark.parametrize(
    ("advantage", "changed", "weights"),
    [
        (-1.0, {"influence_max": 5.0}, [np.exp(1.2), 1.0]),  # the second one's ratio exp(1.4) is above 3
        (1.0, {"influence_max": 5.0}, [np.exp(1.2), np.exp(1.4)]),
        (1.0, {"influence_max": None}, [np.exp(1.2), np.exp(1.4)]),  # infinity has no number in JSON
        (1.0, {}, [1.2, 1.2]),
    ],
)
def test_recompute_by_hand(
    advantage: float, changed: dict[str, Any], weights: list[float], open_page: OpenPage, single: SyntheticReport
) -> None:
    opened = open_page(single)
    script = """([advantage, objective]) => {
      const found = window.report.recompute([0.5, 1.4], [1, 1], [1, 1], advantage, 1, objective);
      return [found.futureKl.constructor.name, [...found.futureKl], [...found.influenceWeights]];
    }"""
    kind, sums, found = opened.run(script, [advantage, OBJECTIVE | changed])
    assert kind == "Float64Array"
    assert sums == pytest.approx([0.5 + 0.5 * 1.4, 1.4], rel=1e-15)
    assert found == pytest.approx(weights, rel=1e-15)


def test_tokens_that_take_no_part_count_as_distance_alone(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    arguments = "[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], 1, 1, objective"
    script = f"(objective) => [...window.report.recompute({arguments}).futureKl]"
    assert opened.run(script, OBJECTIVE) == [1.125, 0.25, 0.5, 1.0]


def test_the_slider_and_reset_and_colours_follow_each_other(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    open_response(opened, 2)
    reset = opened.page.get_by_role("button", name="Reset")
    assert reset.is_disabled()
    before = opened.page.locator(".token").nth(60).get_attribute("class")
    slider = opened.page.get_by_label("Half-life in tokens, from 1 to 512")
    slider.focus()
    opened.page.keyboard.press("Home")
    opened.settle()
    assert opened.run(f"{VIEW}.halfLife") == 1
    assert opened.page.locator(".half-life input[type=number]").input_value() == "1"
    levels = opened.run("[...document.querySelectorAll('.block:first-child .token')].map((span) => span.className)")
    weights = shown(opened)[1][: len(levels)]
    signs = [("above" in level) - ("below" in level) for level in levels]
    assert all(sign == 0 or sign == np.sign(weight - 1) for sign, weight in zip(signs, weights, strict=True))
    assert any(signs)
    reset.click()
    opened.settle()
    assert opened.run(f"{VIEW}.halfLife") == HALF_LIFE
    assert opened.page.locator(".token").nth(60).get_attribute("class") == before


def test_the_most_reweighted_response_is_opened_first(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    groups = single.data["runs"][0]["groups"]
    newest = [group for group in groups if group["step"] == groups[-1]["step"]]
    most = max(one["mean_weight_deviation"] or 0 for group in newest for one in group["responses"])
    first = newest[0]["responses"][0]["mean_weight_deviation"]
    assert first < most, "the first one would not do"
    assert opened.run(f"{VIEW}.response.mean_weight_deviation") == most


def test_the_text_is_not_built_again_by_the_slider(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    opened.run("document.querySelectorAll('.token').forEach((span) => (span.wasHere = true))")
    set_half_life(opened, 3)
    opened.settle()
    assert opened.run("[...document.querySelectorAll('.token')].every((span) => span.wasHere)")


@pytest.mark.parametrize("quantity", ["Future-KL F", "log-prob shift s", "token loss", "entropy, nats"])
def test_each_quantity_has_its_scale(quantity: str, open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    choose(opened, "Colour by", quantity)
    assert opened.page.locator(".legend-scale > span").first.inner_text() == quantity
    ticks = opened.page.locator(".ticks span").all_inner_texts()
    assert ticks[0 if quantity.startswith("entropy") else 2] == "0"
    assert opened.run("document.querySelectorAll('.token[class*=above], .token[class*=below]').length") > 20


@pytest.mark.parametrize("future_kl", [True, False])
def test_filters(future_kl: bool, open_page: OpenPage) -> None:
    single = one_run()
    single.data["runs"][0]["objective"] = OBJECTIVE | {"future_kl": future_kl}
    opened = open_page(single)
    responses = single.data["runs"][0]["groups"][1]["responses"]

    def listed() -> list[int]:
        names = opened.page.locator(".response-choice .name").all_inner_texts()
        return [int(name.split("#")[1].split()[0]) for name in names]

    assert listed() == list(range(9))
    choose(opened, "Responses", "wrong")
    assert listed() == [one["sample_index"] for one in responses if not one["is_right"]]
    choose(opened, "Responses", "right")
    assert listed() == [one["sample_index"] for one in responses if one["is_right"]]
    choose(opened, "Responses", "right and wrong")
    choose(opened, "Order", "longest")
    lengths = {one["sample_index"]: one["num_tokens"] for one in responses}
    assert [lengths[index] for index in listed()] == sorted(lengths.values(), reverse=True)
    choose(opened, "Order", "most re-weighted")

    def deviation(tokens: dict[str, Any]) -> float:
        """Over the tokens of the loss; the same with and without Future-KL, whose weights would have been these."""
        left_out = [int(place) for place in tokens["left_out"]]
        return float(np.abs(np.delete(decoded(tokens, "influence_weight"), left_out) - 1).mean())

    told = {
        one["sample_index"]: deviation(single.tokens[one["tokens"]]) if one["tokens"] else -1.0 for one in responses
    }
    assert listed() == sorted(told, key=lambda index: -told[index])
    opened.page.get_by_label("with tokens left out").check()
    left_out = {one["sample_index"] for one in responses if one["left_out"] or single.tokens[one["tokens"]]["left_out"]}
    assert set(listed()) == left_out
    assert len(left_out) < len(responses), "one is whole, and is not listed"
    opened.page.get_by_label("with tokens left out").uncheck()
    choose(opened, "Group", "all groups of this update")
    assert len(listed()) == 18
    choose(opened, "Trace", "step 20, update 4 of 8")
    assert opened.run(f"{CREDIT}.choice.group") == 0


def test_what_is_left_out_is_said(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    responses = single.data["runs"][0]["groups"][1]["responses"]
    open_response(opened, 2)
    left_out = responses[2]["num_left_out"]
    assert left_out == len(single.tokens[responses[2]["tokens"]]["left_out"]) > 0
    assert f"not in the loss {left_out} tokens" in opened.page.locator(".response-head .facts").inner_text()
    whole = next(index for index, one in enumerate(responses) if not one["num_left_out"])
    open_response(opened, whole)
    assert "not in the loss" not in opened.page.locator(".response-head .facts").inner_text()
    told = opened.page.locator("#credit .traced").inner_text()
    assert told.startswith("This page holds 27 of this run's 67 traced responses")
    assert "--max-trace-tokens" in told


def test_a_page_with_all_traces_says_nothing_of_them(open_page: OpenPage) -> None:
    report = one_run()
    report.data["runs"][0]["traces"] = {"num_responses": 27, "num_left_out": 0}
    opened = open_page(report)
    assert opened.page.locator("#credit .traced").inner_text() == ""


def test_a_response_without_tokens_says_so(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    open_response(opened, 8)
    assert "holds no tokens of this response" in opened.page.locator(".notice").inner_text()
    assert not opened.page.locator(".response").is_visible()
    open_response(opened, 1)
    assert opened.page.locator(".response").is_visible()


def test_keys_lead_through_tokens_and_responses(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    open_response(opened, 1)
    texts = single.tokens[single.data["runs"][0]["groups"][1]["responses"][1]["tokens"]]["texts"]
    opened.page.locator(".response").focus()
    for key, index in [
        ("Home", 0),
        ("ArrowRight", 1),
        ("Shift+ArrowRight", 11),
        ("ArrowLeft", 10),
        ("End", len(texts) - 1),
    ]:
        opened.page.keyboard.press(key)
        assert opened.run(f"{CREDIT}.text.current") == index
        assert opened.page.locator(".token-row .number").inner_text() == f"{index + 1} of {len(texts)}"
    current = opened.run("document.querySelector('.token[data-current]').getBoundingClientRect().bottom")
    assert current <= opened.run("document.querySelector('.response').getBoundingClientRect().bottom")

    opened.page.locator(".response-choice").nth(1).focus()
    opened.page.keyboard.press("ArrowDown")
    assert opened.run(f"{VIEW}.response.sample_index") == 2
    opened.page.locator(".strip").focus()
    opened.page.keyboard.press("End")
    assert opened.run(f"{CREDIT}.text.current") == 699


def test_a_token_tells_everything_of_it(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    open_response(opened, 2)

    def row(index: int) -> dict[str, str]:
        opened.run(f"{CREDIT}.text.choose({index}, true)")
        names, values = (opened.page.locator(f".token-row {tag}").all_inner_texts() for tag in ("dt", "dd"))
        return dict(zip(names, values, strict=True))

    tokens = single.tokens[single.data["runs"][0]["groups"][1]["responses"][2]["tokens"]]
    extreme = row(17)
    assert extreme["enters F"] == "no: its ratio is extreme"
    assert extreme["ratio, exp(s)"] == "13.46"
    assert float(extreme["shift s"]) == pytest.approx(decoded(tokens, "shift")[17], rel=1e-3)
    assert float(row(3)["entropy"].split()[0]) == pytest.approx(decoded(tokens, "entropy")[3], rel=5e-3)
    assert row(23)["in the loss"] == "no: the rollout correction left it out"
    assert row(85)["enters F"] == "no: not the policy's"
    assert row(85)["written by"] == "untold weights"
    assert row(4)["written by"] == "version 11"
    assert row(96)["segment"] == "1"
    set_half_life(opened, 4)
    opened.settle()
    assert "(run: " in row(4)["Future-KL F"]


def test_a_run_without_future_kl_shows_what_it_would_have_been(open_page: OpenPage) -> None:
    report = one_run()
    report.data["runs"][0]["objective"] = OBJECTIVE | {"future_kl": False}
    opened = open_page(report)
    assert "what FIPO's would have been" in opened.page.locator(".summary").inner_text()


def test_future_kl_against_the_behaviour_policy_sums_its_own_shift(open_page: OpenPage) -> None:
    report = one_run()
    report.data["runs"][0]["objective"] = OBJECTIVE | {"future_kl_reference": "behaviour"}
    response = report.data["runs"][0]["groups"][1]["responses"][1]
    tokens = report.tokens[response["tokens"]]
    opened = open_page(report)
    open_response(opened, 1)
    difference = decoded(tokens, "log_prob").astype(np.float64) - decoded(tokens, "rollout_log_prob")
    wanted, _ = future_kl_of(
        difference, decoded(tokens, "participates"), decoded(tokens, "in_suffix_sum"), response["advantage"], HALF_LIFE
    )
    assert np.abs(shown(opened)[0] - wanted).max() <= TOLERANCE


def test_colours_of_weights_reach_to_the_range_or_to_the_responses_own_largest(
    open_page: OpenPage, single: SyntheticReport
) -> None:
    opened = open_page(single)
    open_response(opened, 1)
    ticks = opened.page.locator(".ticks span")
    assert ticks.all_inner_texts() == ["0.8", "0.9", "1", "1.1", "1.2"]
    opened.page.get_by_label("stretch colours").check()
    own = np.sort(np.abs(shown(opened)[1] - 1))
    reach = own[int(0.995 * (len(own) - 1))]
    assert float(ticks.last.inner_text()) == pytest.approx(1 + reach, rel=5e-3)
    levels = opened.run(f"[...{CREDIT}.text.levels]")
    assert max(map(abs, levels)) == 20


def test_white_space_is_shown_on_demand(open_page: OpenPage, single: SyntheticReport) -> None:
    opened = open_page(single)
    mark = "getComputedStyle(document.querySelector('.token[data-mark^=\"↵\"]'), '::before').content"
    assert opened.run(mark) == "none"
    opened.page.get_by_label("white space").check()
    assert opened.run(mark).startswith('"↵')


def test_twenty_thousand_tokens_scroll(open_page: OpenPage) -> None:
    """Script's own processor time for each frame, which does not depend on what else the machine does."""
    opened = open_page(one_run(long_tokens=NUM_LONG))
    choose(opened, "Group", "chains 81: 5 of 9 right")
    assert opened.run(f"{VIEW}.numTokens") == NUM_LONG
    protocol = opened.page.context.new_cdp_session(opened.page)
    protocol.send("Performance.enable", {"timeDomain": "threadTicks"})

    def seconds() -> dict[str, float]:
        return {one["name"]: one["value"] for one in protocol.send("Performance.getMetrics")["metrics"]}

    before = seconds()
    frames = opened.run(
        f"""async () => {{
          const {{ box }} = {CREDIT}.text;
          box.scrollIntoView({{ block: "center" }});
          let frames = 0;
          while (box.scrollTop + box.clientHeight < box.scrollHeight - 2) {{
            await new Promise(requestAnimationFrame);
            box.scrollTop += 300;
            frames += 1;
          }}
          return frames;
        }}"""
    )
    after = seconds()
    assert frames > 100
    for name, most_ms in {"ScriptDuration": 16, "LayoutDuration": 16, "RecalcStyleDuration": 16}.items():
        assert 1000 * (after[name] - before[name]) / frames < most_ms, name
    last = opened.run("document.querySelector('.block:last-child .token:last-child').className")
    assert "above" in last or "below" in last or last == "token"
    painted = opened.run(f"{CREDIT}.text.painted.filter((level) => level !== 0).length")
    assert painted > NUM_LONG / 2


def test_only_blocks_in_view_are_coloured(open_page: OpenPage) -> None:
    opened = open_page(one_run(long_tokens=NUM_LONG), NARROW)
    choose(opened, "Group", "chains 81: 5 of 9 right")
    opened.page.locator(".response").scroll_into_view_if_needed()
    opened.wait_until(f"{CREDIT}.text.painted.some((level) => level !== 0)")
    opened.settle()
    assert opened.run(f"{CREDIT}.text.painted.slice(2000).every((level) => level === 0)")
    opened.page.locator(".strip").focus()
    opened.page.keyboard.press("End")
    opened.wait_until(f"{CREDIT}.text.painted.slice(-300).some((level) => level !== 0)")
    assert opened.run(f"{CREDIT}.text.current") == NUM_LONG - 1
