"""Builds the documentation's site into build/site: the repository's Markdown where it is, and the API reference.

python tools/docs/site.py                    # strict: a broken link, anchor or reference fails
python tools/docs/site.py --output DIR

The pages are copied as they lie, so that links and figures work as they do in the repository. A file that a page links
to and that is no page (a module, a configuration) becomes a page with its text. Needs tools/docs/requirements.txt, and
no torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "*.md",
    "docs/**/*.md",
    "examples/*/README.md",
    "tools/*/README.md",
    "benchmarks/*.md",
    "megatron_fipo/conformance/recorded/README.md",
)
"""Which Markdown files become pages."""
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".toml": "toml", ".json": "json"}


def lay_out(root: Path, target: Path) -> None:
    """Copy the pages, their figures and the files that they link to into `target`."""
    shutil.rmtree(target, ignore_errors=True)
    for pattern in PAGES:
        for page in sorted(root.glob(pattern)):
            place = target / page.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(_with_pages_for_files(page, root, target), encoding="utf-8")
    shutil.copytree(root / "docs/figures", target / "docs/figures")
    shutil.copy(root / "tools/docs/site.css", target / "site.css")


def _with_pages_for_files(page: Path, root: Path, target: Path) -> str:
    """A page's text, its links to files that are no pages changed to links to pages that are made here."""

    def changed(match: re.Match[str]) -> str:
        file = (page.parent / match[2]).resolve()
        if file.suffix in (".md", ".svg", ".png") or not file.is_relative_to(root) or not file.is_file():
            return match[0]
        source = target / "source" / f"{file.relative_to(root)}.md"
        source.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text(encoding="utf-8")
        language = LANGUAGES.get(file.suffix, "text")
        head = f"---\nsearch: {{exclude: true}}\n---\n\n# {file.relative_to(root)}"
        source.write_text(f"{head}\n\n````{language}\n{text}\n````\n", encoding="utf-8")
        place = target / page.relative_to(root)
        return f"{match[1]}{os.path.relpath(source, place.parent)})"

    text = page.read_text(encoding="utf-8")
    parts, end = [], 0
    for fence in FENCE.finditer(text):  # code stays as it is
        parts += [LINK.sub(changed, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(changed, text[end:])])


def main() -> int:
    """Lay out and build. Returns mkdocs' exit status."""
    parser = argparse.ArgumentParser(description="Build the documentation's site.")
    parser.add_argument("--output", type=Path, metavar="DIR", help="(default: build/site)")
    arguments = parser.parse_args()
    lay_out(ROOT, ROOT / "build/site-pages")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--clean",
        "--config-file",
        str(ROOT / "mkdocs.yml"),
    ]
    if arguments.output:
        command += ["--site-dir", str(arguments.output.resolve())]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
