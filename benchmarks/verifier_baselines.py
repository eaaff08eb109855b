r"""Other judges of mathematics, for comparison: each is a function (response, reference) -> right or wrong.

- `math_verify_alone`: math-verify's documented use on the whole response: `verify(parse(reference), parse(response))`
  with its defaults, which look for a \boxed first.
- `dapo_scorer`: what DAPO's recipe judges with (arXiv 2503.14476, and the behaviour of its public recipe), written anew
  from the description: the last 300 characters, the last "Answer:" line, both texts simplified by the same steps, and
  then equal letter by letter.
- `dapo_scorer_restated`: the same scorer where a response without such a line gets one, from its last box, so that the
  comparison of answers is measured apart from the place where it looks for them.
- `last_box_as_text`: the last \boxed equals the reference as text, spaces aside.

Of a reference that is a worked solution ("… #### 5,600"), the text after its sign counts, as in prepared data.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import math_verify

from megatron_fipo.verifiers.answer_markers import last_boxed

# It reports every text that it cannot read, with a traceback.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)

DAPO_TAIL_CHARACTERS = 300

_DAPO_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")

_DAPO_REPLACED = (
    *(("an ", ""), ("a ", ""), (".$", "$"), (r"\$", ""), (r"\ ", ""), (" ", ""), ("mbox", "text")),
    *((r",\text{and}", ","), (r"\text{and}", ","), (r"\text{m}", r"\text{}")),
)
"""Texts that are rewritten first, one after the other."""

_DAPO_REMOVED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples", r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3"),
    *("\\text{\n}", r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
)
"""Units, words and commands that are left out, wherever they stand, also within a longer word."""

_DAPO_PATTERNS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r".*?\$(.*?)\$.*", r"$\1$"),
        (r"\\text\{(.*?)\}", r"\1"),
        (r"\\textbf\{(.*?)\}", r"\1"),
        (r"\\overline\{(.*?)\}", r"\1"),
        (r"\\boxed\{(.*)\}", r"\1"),
        (r"frac([^{])(.)", r"frac{\1}{\2}"),
        (r"sqrt([^{])", r"sqrt{\1}"),
    )
)
"""Rewrites that take off dollar signs and commands around text, and then put braces around fractions and roots."""

Judge = Callable[[str, str], bool]


def math_verify_alone(response: str, reference: str) -> bool:
    """Whether math-verify accepts the response; an exception or a time-out, which it catches itself, is a refusal."""
    gold = math_verify.parse(f"${_final(reference)}$")
    return bool(math_verify.verify(gold, math_verify.parse(response)))


def dapo_scorer(response: str, reference: str) -> bool:
    found = _DAPO_ANSWER.findall(response[-DAPO_TAIL_CHARACTERS:])
    return bool(found) and _dapo_simplified(found[-1]) == _dapo_simplified(_final(reference))


def dapo_scorer_restated(response: str, reference: str) -> bool:
    boxed = last_boxed(response)
    if boxed is not None and not has_answer_line(response):
        response = f"{response}\n\nAnswer: {boxed[1]}"
    return dapo_scorer(response, reference)


def last_box_as_text(response: str, reference: str) -> bool:
    boxed = last_boxed(response)
    return boxed is not None and boxed[1].replace(" ", "") == _final(reference).replace(" ", "")


def has_answer_line(response: str) -> bool:
    """Whether DAPO's scorer finds an answer at all."""
    return _DAPO_ANSWER.search(response[-DAPO_TAIL_CHARACTERS:]) is not None


def _final(reference: str) -> str:
    return reference.rpartition("####")[2].strip()


def _dapo_simplified(text: str) -> str:
    text = text.rpartition("=")[2]
    for old, new in _DAPO_REPLACED:
        text = text.replace(old, new)
    for removed in _DAPO_REMOVED:
        text = text.replace(removed, "")
    for pattern, replacement in _DAPO_PATTERNS:
        text = pattern.sub(replacement, text)
    text = text.replace("$", "")
    digits = text.replace(",", "")
    return digits if digits.isdigit() else text.strip()
