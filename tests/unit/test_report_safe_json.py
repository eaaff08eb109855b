"""What a page holds of data is JSON that ends no script."""

from __future__ import annotations

import json
import math

import pytest

from megatron_fipo.report.page_file import safe_json

HOSTILE = "</script><!--<script>&amp;\u2028\u2029\ud800\x00]]>"


def test_hostile_text_stands_escaped_and_is_the_same_again() -> None:
    text = safe_json({HOSTILE: [HOSTILE]})
    assert text.isascii()
    assert text.isprintable()
    assert not set("<>&") & set(text)
    assert json.loads(text) == {HOSTILE: [HOSTILE]}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    """A browser cannot read it: the page would be empty."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        safe_json({"a": [value]})
