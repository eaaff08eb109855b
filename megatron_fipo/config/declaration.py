"""How a key of the configuration is declared: once, with all that is true of its value by itself.

    num_steps: int = key(100, least=1)
    \"\"\"Steps to run; one step is one batch of rollouts.\"\"\"

The dataclass field holds the type, the default and, in its metadata, a `Declaration`. Validation, resuming, the
reference of all keys and the tests of bounds read it there. What keys demand of each other is in `cross_rules`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from megatron_fipo.config.errors import Problem, choice_problem
from megatron_fipo.config.text_rules import text_problem

T = TypeVar("T")

TextKind = Literal["path", "name", "prompt", "other"]
"""Kinds of text: a path or a file's name; another name, which messages show as it is even where it comes from an
environment variable; a text for the model, line breaks and all; anything else."""

LARGEST_NUMBER = 2**53
"""Beyond it a float, and so JSON, does not hold every whole number."""
LONGEST_WAIT_S = 2_000_000
"""Longest waiting time in seconds: poll() counts milliseconds in 32 bits."""

_METADATA = "megatron_fipo.key"


@dataclass(frozen=True)
class Declaration:
    """Rules for a key's value by itself, whatever the other keys are; in a list they hold for each item.

    Attributes:
        least: smallest number allowed; -inf for any.
        above: the number must be above this one.
        most: largest number allowed.
        below: the number must be below this one.
        finite: whether a number without an upper bound must be finite. NaN is never allowed.
        choices: texts allowed.
        forms: kinds of text allowed besides the choices: the name that messages give each, and its test.
        check: returns the rule that a value breaks, or an empty text; called before the other rules.
        null_means: what null does; messages put it after "or null".
        because: why the bounds are what they are; messages put it after them.
        remedy: what to do, besides what follows from the bounds.
        text: what kind of text it is.
        changes_results: whether another value gives other numbers, apart from the rounding of sums taken in another
            order. A checkpoint's run may continue with another value in any case; recorded rollouts may be used only
            where no key that changes results was changed.
        fixed_because: why a run that continues from a checkpoint must keep the value; empty where it need not.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    finite: bool = True
    choices: tuple[str, ...] = ()
    forms: Mapping[str, Callable[[str], bool]] = field(default_factory=dict)
    check: Callable[[Any], str] | None = None
    null_means: str = ""
    because: str = ""
    remedy: str = ""
    text: TextKind = "other"
    changes_results: bool = True
    fixed_because: str = ""

    @property
    def is_bounded(self) -> bool:
        """Whether a number has a lower bound; -inf counts as one."""
        return self.least is not None or self.above is not None

    def bounds(self, annotation: Any) -> str:
        """The bounds in words, such as "at least 0 and below 1"; empty where there are none."""
        low = f"above {_number(self.above)}" if self.above is not None else ""
        if self.least is not None and math.isfinite(self.least):
            low = f"at least {_number(self.least)}"
        high = f"below {_number(self.below)}" if self.below is not None else ""
        if self.most is not None:
            high = f"at most {_number(self.most)}"
        if self.least is not None and self.most is not None:
            return f"between {_number(self.least)} and {_number(self.most)}"
        if float in _alternatives(annotation) and self.is_bounded and not high and self.finite:
            high = "finite"
        return " and ".join(filter(None, (low, high)))

    def allows(self, number: float) -> bool:
        """Whether a number lies within the bounds."""
        return not (
            math.isnan(number)
            or (self.finite and math.isinf(number))
            or (self.least is not None and number < self.least)
            or (self.above is not None and number <= self.above)
            or (self.most is not None and number > self.most)
            or (self.below is not None and number >= self.below)
        )


def key(default: T, **declared: Any) -> T:
    """A field of a section.

    Args:
        default: its value where nobody sets one; a list or dict is copied for each section.
        declared: attributes of `Declaration`.
    """
    metadata = {_METADATA: Declaration(**declared)}
    if isinstance(default, (list, dict)):
        # Left out of its section's hash, because it has none; `==` compares it.
        made: T = field(default_factory=partial(copy.copy, default), hash=False, metadata=metadata)
    else:
        made = field(default=default, metadata=metadata)
    return made


def seconds(default: T) -> T:
    """A field that holds a waiting time."""
    because = "the system's calls wait 23 days at the longest"
    return key(default, above=0, most=LONGEST_WAIT_S, because=because)


def section(kind: type[T], **declared: Any) -> T:
    """A field that holds a section, with what is true of all its keys."""
    made: T = field(default_factory=kind, metadata={_METADATA: Declaration(**declared)})
    return made


def declaration_of(item: Field[Any]) -> Declaration:
    """The declaration of a field; one without rules where it has none."""
    declared: Declaration = item.metadata.get(_METADATA, _NOTHING_DECLARED)
    return declared


_NOTHING_DECLARED = Declaration()


def problems_of(name: str, value: Any, annotation: Any, declared: Declaration) -> Iterator[Problem]:
    """Rules of its declaration that a key's value breaks.

    Args:
        name: the dotted key, for the problem.
        annotation: type of the key.
    """
    if value is None:
        return
    if declared.check is not None and (rule := declared.check(value)):
        yield Problem(name, value, rule, declared.remedy)
        return
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and declared.choices:
            if item not in declared.choices and not any(is_one(item) for is_one in declared.forms.values()):
                yield choice_problem(name, item, (*declared.choices, *declared.forms))
        elif isinstance(item, (int, float)) and declared.is_bounded and not declared.allows(item):
            yield Problem(name, value, _bounds_rule(annotation, declared), declared.remedy)
            return
        elif isinstance(item, int) and abs(item) > LARGEST_NUMBER:
            yield Problem(name, value, f"is beyond {LARGEST_NUMBER:,}, more than any run counts", "Lower it")
    if isinstance(value, str) and not declared.choices and (found := text_problem(value, declared.text)):
        yield Problem(name, value, *found)


def _bounds_rule(annotation: Any, declared: Declaration) -> str:
    each = "each number must be" if get_origin(annotation) is list else "must be"
    or_null = f", or null {declared.null_means}".rstrip() if type(None) in get_args(annotation) else ""
    because = f": {declared.because}" if declared.because else ""
    return f"{each} {declared.bounds(annotation)}{or_null}{because}"


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation names, those of a list's items included."""
    if get_origin(annotation) in (Union, list):
        return get_args(annotation)
    return (annotation,)


def _number(number: float | None) -> str:
    assert number is not None, "the caller looked"
    return (
        f"{number:,}"
        if isinstance(number, int) and number >= 100_000
        else f"{number:g}"
        if isinstance(number, float)
        else str(number)
    )
