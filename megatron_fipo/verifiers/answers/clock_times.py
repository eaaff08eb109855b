"""Times of day: "6:30 p.m." is "18:30"; "6:30" may be in either half of the day."""

from __future__ import annotations

import re

from megatron_fipo.verifiers.answers.readings import ClockTime

_TIME = re.compile(
    r"(?P<hour>\d{1,2})(?::(?P<minute>[0-5]\d))?(?::(?P<second>[0-5]\d))?"
    r"\s*(?P<half>[aApP]\s*\.?\s*[mM]\b\.?|noon|midnight)?(?P<full>\s*o'clock)?"
)
_HOURS_OF_DAY = 24


def read_clock_time(text: str) -> ClockTime | None:
    r"""Read a cleaned text that is a time, with words possibly in \text{…}; None if it is anything else."""
    if not text[:1].isdigit():
        return None
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1", text).strip()
    match = _TIME.fullmatch(plain)
    if match is None or not (match["minute"] or match["half"] or match["full"]):
        return None
    hour, half = int(match["hour"]), (match["half"] or "").lower()
    if half and hour > 12:
        if half[0] != "p" or hour >= _HOURS_OF_DAY:
            return None
        half = ""  # "18:30 p.m."
    meridiem = {"n": "pm", "m": "am"}.get(half[:1], half[:1] + "m") if half else ""
    return ClockTime(
        hour, int(match["minute"] or 0), int(match["second"] or 0), meridiem, match["minute"] is None, plain
    )


def same_time(first: ClockTime, second: ClockTime) -> bool:
    """Whether two times may be the same; one without a.m. or p.m. may be in either half of the day."""
    if (first.minute, first.second) != (second.minute, second.second):
        return False
    if first.meridiem or second.meridiem:
        return bool(_hours(first) & _hours(second))
    return first.hour == second.hour or {first.hour, second.hour} == {0, _HOURS_OF_DAY}


def _hours(time: ClockTime) -> set[int]:
    """The hours of the 24-hour clock that a time may mean."""
    if time.meridiem:
        return {time.hour % 12 + (12 if time.meridiem == "pm" else 0)}
    if 1 <= time.hour <= 12:
        return {time.hour % 12, time.hour % 12 + 12}
    return {time.hour % _HOURS_OF_DAY}
