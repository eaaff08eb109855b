"""The documentation's site builds without a warning, and what is broken on purpose keeps it from building."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("MEGATRON_FIPO_DOCS_PYTHON", "")
pytestmark = pytest.mark.docs


def build(root: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a copy of the repository into its build/site."""
    assert PYTHON, "MEGATRON_FIPO_DOCS_PYTHON names no Python; run make test-docs"
    command = [str(ROOT / PYTHON), str(root / "tools/docs/site.py")]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the site is made of, where it may be changed."""
    root = tmp_path_factory.mktemp("repository")
    unneeded = shutil.ignore_patterns("__pycache__", "outputs", "build", ".*", "*.safetensors")
    for name in ("docs", "megatron_fipo", "tools", "examples", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=unneeded)
    for file in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml", ROOT / "LICENSE"):
        shutil.copy(file, root)
    return root


def test_the_site_builds_and_has_what_the_repository_has(copy: Path) -> None:
    run = build(copy)
    assert run.returncode == 0, run.stdout + run.stderr
    site = copy / "build/site"
    pages = [*copy.glob("*.md"), *copy.glob("docs/**/*.md"), *copy.glob("examples/*/README.md")]
    missing = [
        page.relative_to(copy)
        for page in pages
        if not (site / page.relative_to(copy))
        .with_name(page.name.replace("README.md", "index.md"))
        .with_suffix(".html")
        .is_file()
    ]
    assert missing == []
    reference = (site / "docs/reference/objective.html").read_text(encoding="utf-8")
    for name in ("megatron_fipo.rl.objective.policy_loss", "megatron_fipo.rl.padded.padded_policy_loss"):
        assert f'id="{name}"' in reference
    assert "Divide by <code>normalizer</code> summed over all microbatches" in reference  # a field's docstring
    assert (site / "docs/figures/fipo.svg").is_file()
    assert (site / "source/megatron_fipo/rl/objective.py.html").is_file()
    html = [path.read_text(encoding="utf-8") for path in site.rglob("*.html")]
    fetched = {
        url for text in html for url in re.findall(r'<(?:script|link)[^>]*?(?:src|href)="(https?://[^"]*)', text)
    }
    assert fetched == set(), "pages ask other hosts for scripts or styles"


def test_a_broken_link_anchor_reference_and_a_forgotten_page_each_fail(copy: Path) -> None:
    with (copy / "docs/checkpoints.md").open("a", encoding="utf-8") as page:
        page.write("\n[gone](nowhere.md) [anchor](metrics.md#no-such-heading) [code](../megatron_fipo/nowhere.py)\n")
    with (copy / "docs/reference/evaluation.md").open("a", encoding="utf-8") as page:
        page.write("\n::: megatron_fipo.evaluation.scores.no_such_function\n")
    (copy / "docs/forgotten.md").write_text("# A page that no list names\n", encoding="utf-8")
    run = build(copy)
    output = run.stdout + run.stderr
    assert run.returncode != 0
    # An unknown reference ends the build at once, before links are looked at; so each is asked for by itself.
    assert "megatron_fipo.evaluation.scores.no_such_function" in output
    (copy / "docs/reference/evaluation.md").write_text("# Evaluation\n", encoding="utf-8")
    run = build(copy)
    output = run.stdout + run.stderr
    assert run.returncode != 0
    for broken in ("nowhere.md", "no-such-heading", "megatron_fipo/nowhere.py", "forgotten.md"):
        assert broken in output
