"""Renders the reports of gpu_evidence.py as the tables of benchmarks/RESULTS.md.

    python benchmarks/render_evidence.py DIR [DIR ...] [--into benchmarks/RESULTS.md]

Prints Markdown, or puts it between the markers of a file. Only what a GPU has measured at full size goes into a file; a
report that lacks what it promises goes nowhere.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence import rendering, schema  # noqa: E402
from benchmarks.evidence.report import PARTS, Report  # noqa: E402

BEGIN = "<!-- gpu evidence: what stands from here to the end marker is written by benchmarks/render_evidence.py -->"
END = "<!-- gpu evidence: end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--into", type=Path, metavar="FILE", help="replace what stands between FILE's markers")
    arguments = parser.parse_args()
    try:
        reports = read_reports(arguments.folders)
        text = rendering.render(reports)
        if arguments.into is None:
            print(text, end="")
        else:
            if unfit := [content["name"] for content in reports if not rendering.is_evidence(content)]:
                raise ValueError(f"{', '.join(unfit)}: measured on a CPU or at tiny shapes, no evidence of a GPU.")
            arguments.into.write_text(replaced(arguments.into.read_text(encoding="utf-8"), text), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"render_evidence.py: {error}", file=sys.stderr)
        return 1
    return 0


def read_reports(folders: list[Path]) -> list[dict]:
    """All reports of the folders, by folder and part.

    Raises:
        ValueError: if there is none, or one lacks something.
    """
    found = []
    for folder in folders:
        files = [file for file in folder.glob("*.json") if Report.read(file).content.get("part") in PARTS]
        if not files:
            raise ValueError(f"{folder} holds no report of gpu_evidence.py.")
        contents = {file: Report.read(file).content for file in files}
        for file, content in contents.items():
            if breaches := schema.lacks(content):
                raise ValueError(f"{file} is not whole: {breaches[0]}. Run its part again.")
        found += sorted(contents.values(), key=lambda content: (PARTS.index(content["part"]), content["name"]))
    return found


def replaced(page: str, text: str) -> str:
    """The page with its text between the markers replaced.

    Raises:
        ValueError: if it does not hold each marker once, in order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError("the page must hold the two markers of gpu evidence once, in order.")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    sys.exit(main())
