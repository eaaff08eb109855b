"""A hook of mkdocs: long keys in tables may break after a dot, an underscore, a slash or an equals sign only."""

from __future__ import annotations

import re
from typing import Any

_CELL = re.compile(r"<td[^>]*>.*?</td>", re.DOTALL)
_CODE = re.compile(r"<code>[^<]*</code>")


def on_page_content(html: str, **_: Any) -> str:
    """The page's HTML with places to break at."""

    def in_code(match: re.Match[str]) -> str:
        return re.sub(r"([._/=])(?=\w)", r"\1<wbr>", match[0].removesuffix("</code>")) + "</code>"

    return _CELL.sub(lambda cell: _CODE.sub(in_code, cell[0]), html)
