"""Every curve of the paper has a figure; figures follow what the runs have measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_fipo.report.figure import HIGH, LINE, LOW, Figure, Line, found_figures
from megatron_fipo.report.figures import FIGURES, SECTIONS
from tests.unit.documented_metrics import documented_names

GLOSSARY = (Path(__file__).parents[2] / "docs/metrics.md").read_text(encoding="utf-8")


def paper_metrics() -> set[str]:
    """The names of docs/metrics.md's table of the paper's curves, as a run would have them."""
    table = GLOSSARY.partition("## What the paper plots")[2].partition("\n## ")[0]
    parts = {"<source>": "aime", "<k>": "32", "<low>": "0", "<high>": "1024"}
    return {re.sub("<[a-z]+>", lambda match: parts[match[0]], name) for name in documented_names(table)}


def drawn(figures: list[Figure]) -> set[str]:
    return {line.metric for figure in figures for line in figure.lines}


def test_every_curve_of_the_paper_has_a_figure() -> None:
    wanted = paper_metrics()
    assert len(wanted) > 40
    assert wanted <= drawn(found_figures(FIGURES, wanted))


def test_a_missing_curve_would_be_noticed() -> None:
    without = [figure for figure in FIGURES if figure.id != "exp-future-kl"]
    missing = paper_metrics() - drawn(found_figures(without, paper_metrics()))
    assert missing == {"fipo/exp_future_kl/mean", "fipo/exp_future_kl/min", "fipo/exp_future_kl/max"}


def test_every_metric_of_the_table_is_documented() -> None:
    """But for shadow/…, whose entries come with the setting."""
    documented = documented_names(GLOSSARY)
    known = {re.sub("<[^>]*>", "<>", name) for name in documented}
    named = {line.metric for figure in FIGURES for line in figure.lines if not line.metric.startswith("shadow/")}
    # The ends of an interval are documented by an ellipsis.
    assert {name for name in named if re.sub("<[^>]*>", "<>", name) not in known} == {
        "evaluation/<source>/avg@<k>_ci95_high"
    }


def test_figures_are_told_apart_and_belong_to_a_section() -> None:
    ids = [figure.id for figure in FIGURES]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[a-z0-9-]+", one) for one in ids)
    sections = [section.id for section in SECTIONS]
    places = [sections.index(figure.section) for figure in FIGURES]
    assert places == sorted(places), "the table goes through the sections in order"
    for figure in FIGURES:
        assert figure.title
        assert figure.caption.endswith(".")
        assert sum(line.role == LOW for line in figure.lines) == sum(line.role == HIGH for line in figure.lines) <= 1


def test_a_figure_without_metrics_is_left_out() -> None:
    found = found_figures(FIGURES, {"reward/mean", "fipo/influence_weight/min", "fipo/influence_weight/max", "x"})
    assert [figure.id for figure in found] == ["reward"], "a band without a line is no figure"
    assert found_figures(FIGURES, set()) == []


def test_a_line_without_a_metric_is_left_out() -> None:
    (found,) = found_figures(FIGURES, {"optim/grad_norm"})
    assert found.lines == (Line("optim/grad_norm", "mean"),)


def test_parts_of_names_become_lines_in_the_order_of_their_numbers() -> None:
    base = "rollout/accuracy_by_length"
    names = [f"{base}/{low}_to_{low + 1024}" for low in (9216, 0, 1024, 10240)]
    (found,) = found_figures(FIGURES, names)
    assert [line.label for line in found.lines] == ["0 to 1024", "1024 to 2048", "9216 to 10240", "10240 to 11264"]
    assert all(line.role == LINE for line in found.lines)


def test_every_source_has_a_figure_of_scores() -> None:
    names = [
        f"evaluation/{source}/{name}"
        for source, k in (("aime24", 32), ("aime25", 4))
        for name in (f"avg@{k}", f"avg@{k}_ci95_low", f"avg@{k}_ci95_high", f"cons@{k}", f"pass@{k}", "pass@1")
    ]
    first, second = found_figures(FIGURES, names)
    assert (first.id, first.title) == ("scores", "Held-out scores: aime24")
    assert (second.id, second.title) == ("scores-2", "Held-out scores: aime25")
    assert [(line.label, line.role) for line in second.lines] == [
        ("avg@4", LINE),
        ("95 % low", LOW),
        ("95 % high", HIGH),
        ("cons@4", LINE),
        ("pass@4", LINE),
    ]


def test_a_sources_figure_has_the_lines_that_were_measured() -> None:
    (found,) = found_figures(FIGURES, ["evaluation/aime/avg@4", "evaluation/aime/pass@2"])
    assert [line.metric for line in found.lines] == ["evaluation/aime/avg@4"]


def test_shadow_settings_have_the_same_places_in_every_figure() -> None:
    """Places give colours. The metrics of a run come in any order, and a setting may lack one."""
    names = [
        "shadow/tau_128/influence_weight/mean",
        "shadow/tau_8/influence_weight/mean",
        "shadow/wide/influence_weight/mean",
        "shadow/wide/noise_floor/share_of_later_std",
        "shadow/tau_8/noise_floor/share_of_later_std",
    ]
    found = found_figures(FIGURES, names)
    assert [figure.id for figure in found] == ["shadow-mean", "shadow-noise"]
    for figure in found:
        assert [line.label for line in figure.lines] == ["tau_8", "tau_128", "wide"]


def test_shares_are_told_by_their_words() -> None:
    """What the captions call a share is cut at 0 and 1; a share of a deviation may be above 1."""
    told = {figure.id for figure in FIGURES if figure.caption.startswith("Share") or "is the share" in figure.caption}
    marked = {figure.id for figure in FIGURES if figure.is_share}
    assert told <= marked
    assert marked - told == {"accuracy-by-length"}


@pytest.mark.parametrize("name", ["tau_128", "wide-range", "a.b"])
def test_shadow_settings_are_lines(name: str) -> None:
    (found,) = found_figures(FIGURES, {f"shadow/{name}/influence_weight/clipped_share"})
    assert found.id == "shadow-clipped"
    assert found.lines == (Line(f"shadow/{name}/influence_weight/clipped_share", name),)
