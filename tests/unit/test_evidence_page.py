"""The page with the results of GPUs, and the reports that it is made from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import render_evidence
from benchmarks.evidence import rendering

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def folders() -> list[Path]:
    found = sorted(folder for folder in (BENCHMARKS / "reports").iterdir() if folder.is_dir())
    assert found
    return found


def test_the_page_shows_what_the_reports_say(folders: list[Path]) -> None:
    page = (BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8")
    text = rendering.render(render_evidence.read_reports(folders))
    assert page == render_evidence.replaced(page, text), "run the command of benchmarks/README.md, 'Into the page'"


def test_the_reports_are_a_gpus_and_name_no_path_of_its_machine(folders: list[Path]) -> None:
    assert all(rendering.is_evidence(content) for content in render_evidence.read_reports(folders))
    for report in (file for folder in folders for file in folder.glob("*.json")):
        assert not re.search(r'["\s=]/\w+/', report.read_text(encoding="utf-8")), report
