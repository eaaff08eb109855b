"""Writes a report as one page that opens from disk and asks no network for anything.

The page's template has a mark for each thing that goes into it, and its content security policy. Responses are hostile
text: they stand in the page as JSON, in ASCII, without any character that could end the script around them or begin a
comment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_fipo.report.report_data import Report
from megatron_fipo.system.disk import write_text_whole

PAGE = Path(__file__).parent / "page"
MARKS = ("STYLE", "PLOTTING", "DATA", "TOKENS", "SCRIPTS")
_MARK = re.compile(r"<!--@([A-Z]+)-->")
_POLICY = re.compile(r'(<meta http-equiv="Content-Security-Policy" content=")[^"]*(">)')
_DANGEROUS = re.compile(r"</(?:script|style)|<!--|<script", re.IGNORECASE)
"""What a browser acts on even within a script or a style."""
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


@dataclass(frozen=True)
class Page:
    """The parts of a page that are the same for every report.

    Attributes:
        template: HTML with the marks and a content security policy, each once.
        style: CSS.
        scripts: JavaScript of the page.
        plotting: the plotting library.
    """

    template: str
    style: str
    scripts: str
    plotting: str

    def __post_init__(self) -> None:
        found = _MARK.findall(self.template)
        assert sorted(found) == sorted(MARKS), f"page.html needs the marks {MARKS}, each once; it has {found}"
        policies = len(_POLICY.findall(self.template))
        assert policies == 1, f"page.html needs one content security policy; it has {policies}"
        for name in ("style", "scripts", "plotting"):
            match = _DANGEROUS.search(getattr(self, name))
            assert match is None, f"{match[0]!r} in the page's {name} would end it, or be taken for markup"

    def html(self, report: Report) -> str:
        """The whole page."""
        tokens = [_data_script(key, data) for key, data in report.tokens.items()]
        parts = {
            "STYLE": f"<style>\n{self.style}\n</style>",
            "PLOTTING": f"<script>\n{self.plotting}\n</script>",
            "DATA": _data_script("report-data", report.data),
            "TOKENS": "\n".join(tokens),
            "SCRIPTS": f"<script>\n{self.scripts}\n</script>",
        }
        policy = policy_text(is_live=report.data["is_live"])
        template = _POLICY.sub(lambda match: f"{match[1]}{policy}{match[2]}", self.template)
        # In one pass: what is put in is not searched for marks again.
        return _MARK.sub(lambda match: parts[match[1]], template)


def installed_page() -> Page:
    """The page of this package, with the plotting library that is installed."""
    scripts = sorted(PAGE.glob("*.js"))
    return Page(
        template=(PAGE / "page.html").read_text(encoding="utf-8"),
        style=(PAGE / "page.css").read_text(encoding="utf-8"),
        scripts="\n".join(path.read_text(encoding="utf-8") for path in scripts),
        plotting=plotting_library(),
    )


def plotting_library() -> str:
    """Plotly's JavaScript out of the package plotly, of which nothing is imported: that takes seconds.

    Raises:
        ValueError: if the package is not installed, or has no such file.
    """
    spec = find_spec("plotly")
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    files = [path for place in places if (path := place / "package_data" / "plotly.min.js").is_file()]
    if not files:
        raise ValueError(
            "the report's figures need the package plotly, whose file package_data/plotly.min.js is not found here. "
            "Install it: pip install plotly."
        )
    return files[0].read_text(encoding="utf-8")


def write_page(path: Path, report: Report, page: Page) -> int:
    """Write the page, whole or not at all. Returns its size in bytes.

    Raises:
        DiskError: if it cannot be written.
    """
    html = page.html(report)
    write_text_whole(path, html, what_then="it writes the page")
    return len(html.encode("utf-8"))


def safe_json(value: Any) -> str:
    """JSON in ASCII that is safe within a script element: lone surrogates and all else are escaped as JSON does it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def policy_text(*, is_live: bool) -> str:
    """The page's content security policy: its own scripts and styles, and no network; live, its own server's data."""
    directives = ["default-src 'none'", "script-src 'unsafe-inline'", "style-src 'unsafe-inline'"]
    directives += ["img-src data: blob:", "connect-src 'self'" if is_live else "connect-src 'none'"]
    directives += ["base-uri 'none'", "form-action 'none'"]
    return "; ".join(directives)


def _data_script(key: str, data: Mapping[str, Any]) -> str:
    return f'<script type="application/json" id="{key}">{safe_json(data)}</script>'
