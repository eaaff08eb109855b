"""Mathematics: a table of tricky answers checked by hand, the conventions, and answers made to do harm."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.rl.verifiers import mathematics
from megatron_fipo.rl.verifiers.answer_markers import MAX_SEARCHED_CHARACTERS, last_answer_tag, last_boxed, last_line
from megatron_fipo.rl.verifiers.answers import algebra, units
from megatron_fipo.rl.verifiers.cpu_limit import CpuLimitError, cpu_limit
from megatron_fipo.rl.verifiers.math_text import cleaned, is_computable
from megatron_fipo.rl.verifiers.plain_numbers import read_plain_number
from megatron_fipo.rl.verifiers.pool import VerifierPool
from megatron_fipo.rl.verifiers.registry import load_verifier
from megatron_fipo.rl.verifiers.verdict import JobVerifier, Verdict, VerifierFunction, VerifierJob

TABLE = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "tricky_answers.jsonl").read_text(encoding="utf-8").splitlines()
]
TEN_MEGABYTES = 10**7


def function(name: str) -> VerifierFunction:
    verifier = load_verifier(name)
    assert not isinstance(verifier, JobVerifier)
    return verifier


# ------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("row", TABLE, ids=[f"{number}-{row['topic']}" for number, row in enumerate(TABLE, start=1)])
def test_tricky_answers(row: dict[str, Any]) -> None:
    verdict = function(row["verifier"])(row["response"], row["reference"], "stop")
    assert verdict.correct is row["correct"], row
    assert not verdict.error


def test_the_table_can_tell_judges_apart() -> None:
    """The control: neither equal texts, nor the last number, nor a judge that always says one thing, would pass it."""

    def as_text(response: str, reference: str) -> bool:
        return response.rpartition("Answer: ")[2] == reference or f"boxed{{{reference}}}" in response

    def last_number(response: str, reference: str) -> bool:
        return re.findall(r"-?[\d.]+", response)[-1:] == re.findall(r"-?[\d.]+", reference)[-1:]

    assert len(TABLE) >= 100
    for judge in (as_text, last_number, lambda response, reference: True, lambda response, reference: False):
        wrong = sum(judge(row["response"], row["reference"]) is not row["correct"] for row in TABLE)
        assert wrong > 25, judge


# --------------------------------------------------------------------------------------------------- conventions


@pytest.mark.parametrize(
    ("response", "any_marker", "answer_line", "boxed"),
    [
        (r"Answer: 1 and \boxed{2}", "2", "{1, 2}", "2"),
        (r"\boxed{2}" + "\nAnswer: 1", "1", "1", "2"),
        ("Answer: 1" + "\n" + " so" * 100, "1", "", ""),
        ("Answer: 1" + "\n" + " so" * 90, "1", "1", ""),
        ("It is 1", "", "", ""),
    ],
)
def test_conventions_look_where_they_say(response: str, any_marker: str, answer_line: str, boxed: str) -> None:
    found = [function(name)(response, "0", "stop").answer for name in ("math", "math_answer", "math_boxed")]
    assert found == [any_marker, answer_line, boxed]


def test_scores_are_one_and_zero_and_truncated_responses_are_judged() -> None:
    assert mathematics.verify("Answer: 4", "4", "length") == Verdict(1.0, "4")
    assert mathematics.verify("Answer: 5", "4", "stop") == Verdict(0.0, "5")


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("1,234.5", Fraction(2469, 2), ""),
        (".5", Fraction(1, 2), ""),
        ("-3/4", Fraction(-3, 4), ""),
        (r"2\frac{1}{4}", Fraction(9, 4), ""),
        (r"-1.5 \times 10^{-2}", Fraction(-3, 200), ""),
        ("5 apples", Fraction(5), "apple"),
        (r"5\text{ cm}^2", Fraction(5), "cm^2"),
        ("3 thousand", Fraction(3000), ""),
        (r"90^\circ", Fraction(90), "degree"),
    ],
)
def test_plain_numbers(text: str, value: Fraction, unit: str) -> None:
    number = read_plain_number(cleaned(text))
    assert number is not None
    assert (number.value, str(number.unit)) == (value, unit)


@pytest.mark.parametrize(
    "text", ["", "-", "1/0", "12,34", "2 3", "1 3/2", "2 pi", "x", "1e9999", "1" * 201, "5 x", "1.2.3"]
)
def test_what_is_no_plain_number(text: str) -> None:
    assert read_plain_number(cleaned(text)) is None


# --------------------------------------------------------------------------------------- the rules of docs/verifiers.md

RULES: dict[str, list[tuple[str, str, str]]] = {
    # kind: (reference, answers that equal it, answers that do not), answers separated by " | "
    "exact values": [
        ("1/2", r"0.5 | \frac12 | \frac{1}{2} | .5 | 0.50 | 2/4 | 2^{-1} | \frac{\sqrt{4}}{4}", "0.4999999 | 0.50000001 | 2"),
        (r"\pi", "π | pi | \\frac{2\\pi}{2}", r"3.14 | 3.1415927 | 3.14159265358979323846 | \frac{22}{7} | 180"),
        (r"\sqrt{2}", r"√2 | 2^{1/2} | \frac{2}{\sqrt2} | sqrt(2)", r"1.414214 | 1.41421356237309505 | \sqrt{2}-10^{-20}"),
        (r"\ln 2", r"\frac{\ln 4}{2} | ln(2) | -\ln\frac12", r"0.693147 | \log_{10} 2"),
        (r"\frac{1}{2^{99}}", "2^{-99} | (1/2)^{99}", r"\frac{1}{2^{98}} | -\frac{1}{2^{99}} | 0"),
        (r"\frac{1}{21!}", r"\frac{1}{21 \cdot 20!}", r"\frac{1}{20!} | 0"),
        (r"\left(\frac{5}{6}\right)^{199}", r"\frac{5^{199}}{6^{199}}", r"\left(\frac{5}{6}\right)^{200}"),
        (r"\frac{7}{10^{20}}", r"7 \times 10^{-20} | 7e-20", r"\frac{3}{10^{20}} | -\frac{7}{10^{20}}"),
        (r"2-\frac{1}{2^{2022}}", r"\frac{2^{2023}-1}{2^{2022}}", r"2-\frac{1}{2^{2023}} | 2"),
        (r"\pi-\frac{1}{2^{3000}}", r"-2^{-3000}+\pi", r"\pi-\frac{1}{2^{3001}} | \pi"),
        (r"\frac{1}{2004!}", r"\frac{2005}{2005!}", r"\frac{1}{2006!}"),
        (r"\frac{2^{2005}+1}{3\cdot 2^{2006}}", r"\frac16+\frac{1}{3\cdot 2^{2006}}", r"\frac{1}{3\cdot 2^{2006}}"),
        (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2 | \sqrt2+1", r"\sqrt2-1 | 2.414214"),
    ],
    "repeating decimals": [
        ("1/3", r"0.\overline{3} | 0.\bar{3} | 0.\overline3 | 0.(3) | 0.\dot{3} | 0.3̅ | .\overline{3} | 0.\overline{33}", "0.333 | 0.333333333333"),
        (r"\frac16", r"0.1\overline{6} | 0.1(6) | 0.1\bar 6 | 0.16̅", r"0.\overline{16} | 0.1666667 | 0.1\overline{7}"),
        (r"\frac17", r"0.\overline{142857} | 0.\dot{1}4285\dot{7}", r"0.142857 | 0.\overline{14285}"),
        (r"-\frac73", r"-2.\overline{3} | -2.(3)", r"2.\overline{3} | -2.3"),
        ("1", r"0.\overline{9}", "0.99999999"),
    ],
    "units": [
        ("5", "5 km/h | 35/7 m/s | 5 m^2 | 5 m² | 5 g/cm^3 | 5°C | 5 km per hour | $5/hour | 5 miles/hour | 5 apples | 5\\text{ cm} | 5 s", "6 m | 5 million | 5 squared"),
        ("5 km", r"5\text{ kilometers} | 5 kilometres | 5\,\mathrm{km} | 5", "5 m | 5000 m | 5 miles | 5 km^2 | \\$5 | 5 km/h"),
        ("7 g", "7 grams | 7 gram | 7\\text{ g}", "7 kg | 7 m | 0.007 kg"),
        ("3 h", "3 hours | 3 hr", "3 s | 180 min | 3 m"),
        ("5 cm^2", r"5 square centimeters | 5 sq cm | 5\text{ cm}^2 | 5 cm² | 5 centimeters squared", "5 cm | 5 cm^3 | 5 m^2"),
        ("35 km/h", "35 kilometers per hour | 35 kph | 35 km / hr", "35 m/s | 35 mph | 35 km"),
        (r"9.8\text{ m/s}^2", r"9.8 m/s^2 | 9.8 meters per second squared | 9.8\,\mathrm{m\,s^{-2}}", "9.8 m/s | 9.8 s"),
        (r"\sqrt{2}\text{ m}", r"\sqrt2 m | \sqrt2 \text{ meters} | \sqrt2", r"\sqrt2\text{ km} | \sqrt{2} km | \sqrt3\text{ m}"),
        (r"12\pi\text{ cm}^2", r"12\pi | 12\pi cm^2 | 12 \pi square centimeters", r"12\pi\text{ m}^2 | 12\pi cm | 12"),
        (r"\$5", "5 dollars | $5 | 5 USD | \\$5.00 | 5 | $5 dollars", "€5 | £5 | 5 cm | 5 cents"),
        (r"\$12.50", "12.5 | $12.50 | \\text{\\$}12.50", "12 | €12.50"),
        ("30^\\circ", r"30 | 30° | 30 degrees | 30^{\circ} | 30\text{ degrees} | 30\degree", "31 | 30 cm | 30 radians"),
        ("35°C", "35 | 35°C | 35 degrees Celsius | 35℃ | 35^\\circ\\text{C}", "35°F | 35 K"),
        ("12 apples", "12 red apples | 12 apple | 12\\text{ apples}", "12 oranges | 13 apples | 12 cm"),
        ("21", "21st | 21^{\\text{st}}", "22nd | 12th"),
    ],
    "percent": [
        (r"50\%", r"50% | 50 percent | 50 | 0.5 | \frac12 | 50\text{ percent} | 50.0\% | 50％", r"0.5\% | 5000\% | 5000 | 0.05 | 50 cm"),
        (r"\frac13", r"33\frac13\% | \frac{100}{3}\%", r"33\% | 33.3\%"),
        (r"100(1-\frac1e)\%", r"100(1-\frac1e) | 1-\frac1e", r"(1-\frac1e)\%"),
    ],
    "words that change": [
        ("2", "exactly 2 | = 2", r"\neq 2 | \approx 2 | < 2 | \geq 2 | \le 2 | > 2 | at least 2 | at most 2 | about 2 | approximately 2 | ~2 | not 2 | 2 or more | less than 2 | more than 2 | 2, not 3 | ≠ 2 | \text{about } 2 | \sim 2"),
        (r"\geq 2", r"at least 2 | x \ge 2 | 2 or more | ≥ 2 | \text{at least } 2", r"> 2 | 2 | \le 2 | at most 2"),
        ("-3", r"-3\text{ (local max)}", "3"),
        (r"-3\text{ (local min)}", "-3", r"-3\text{ (local max)} | -3 (not a local min)"),
        (r"n\text{ odd}", "n", r"n\text{ even} | n even | n\text{ not odd}"),
        (r"\pi", r"\pi \approx 3.14 | \pi\approx 3.1416 | x = \pi \approx 3.14159", r"\pi \approx 3.15 | x \approx 3.14 | \approx\pi"),
    ],
    "bases": [
        ("1010_2", r"1010_{2} | 1010_{\text{two}} | 1010 | 1010 (base 2) | 1010_{\text{base }2} | 1010\text{ base two} | 01010_2 | 1010_{(2)}", "1010_3 | 1011_2 | 10 | 10_{10} | 12_8"),
        ("413_6", r"413_{6} | 413 | 413_{\text{six}}", "413_5 | 431_6"),
        (r"2A_{16}", r"2a_{16} | \text{2A}_{16}", "2A_{12} | 42"),
        ("10_2", "10", "10_{10} | 2"),
    ],
    "clock times": [
        ("1:15", "01:15 | 1:15 p.m. | 1:15:00", "2:30 | 3:45 | 1:16 | 13:15"),
        ("6:30 p.m.", r"18:30 | 6:30 | 6:30 PM | 6:30pm | 6:30\text{ p.m.} | 6:30 P.M.", r"6:30 a.m. | 7:30 p.m. | 6:35 p.m. | 5:30"),
        (r"9:45 \text{ am}", "9:45 a.m. | 9:45", r"8:40 \text{ am} | 9:45 pm | 21:45"),
        ("12:00", "12:00 noon | 12:00 midnight", "1:00 | 24:00"),
        ("8 a.m.", "8:00 am | 8 | 8 AM", "8 p.m. | 20:00 | 9"),
    ],
    "ratios": [
        ("2:3", r"4:6 | 10:15 | 2 : 3 | \frac12:\frac34 | 2/3 | 6{:}9", "3:2 | 2:4 | 2:3:4"),
        ("1:2:3", "2:4:6 | 1 : 2 : 3", "1:2:4 | 3:2:1 | 1:2"),
        (r"1:\sqrt{2}", r"\sqrt2:2", r"1:2"),
    ],
    "collections": [
        ("(1,2)", r"(1, 2) | \left(1,2\right) | 1, 2 | (\frac22, \sqrt4) | a=1, b=2 | (x,y)=(1,2) | （1，2）", r"\{1,2\} | (2,1) | [1,2] | (1,2,3) | 1 | a=2, b=1"),
        (r"\{1,2\}", r"\{2,1\} | 1,2 | 2 and 1 | x=1 or x=2 | 1\text{ or }2 | {1, 2} | \{1,2,2\} | x \in \{1,2\} | 1;2", r"(1,2) | \{1\} | 1 | \{1,3\} | \{1,2,3\}"),
        ("1, 2", r"2, 1 | 1 and 2 | 1 \text{ and } 2 | 1 \lor 2 | $1$ and $2$ | 1,2,", "1 | 2 | 1, 1, 2 | 1, 3 | 12"),
        ("1, 1, 2", "1, 2, 1", "1, 2 | 1, 2, 2"),
        (r"1, 2, \ldots, n", r"1,2,...,n | 1, 2, \dots, n | 1,2,…,n", r"1, 3, 5, \ldots, 2n-1 | 1, \ldots, 2, n | 1, 2, n | 2, 1, \ldots, n | n"),
        ("7", r"(7) | \{7\} | 7,", r"2 \lor 3 \lor 7 | 2 \& 3 \& 7 | 2 \to 7 | 2=3=7 | 2 \to 3 \to 7 | 5, 7 | 7 or 8 | (7,7) | 7 \land 8"),
        ("1,234, 5,678", "1234, 5678 | 5678, 1234", "1, 234, 5, 678"),
        ("1234", r"1,234 | 1{,}234 | 1\,234 | 1 234", "(1,234) | 1, 234 | 12 34"),
        (r"\pm 3", r"3, -3 | \{-3,3\} | 3\text{ or }-3 | x=\pm 3 | +/-3", "3 | -3"),
        (r"2\pm\sqrt3", r"2-\sqrt3, 2+\sqrt3", r"2+\sqrt3 | 2\pm\sqrt2"),
        (r"\emptyset", r"\varnothing | \{\} | ∅", r"0 | \{0\}"),
        (r"(1,2), (3,4)", r"(3,4), (1,2) | \{(1,2),(3,4)\}", r"(2,1), (4,3) | (1,2), (4,3) | (1,2) | (1,2),(3,4),(5,6)"),
    ],
    "intervals": [
        ("(0,12.5)", r"0<x<12.5 | \left(0, \frac{25}{2}\right) | x \in (0,12.5) | 12.5>x>0 | ]0;12.5[", r"[0,12.5) | 0\le x<12.5 | \{0,12.5\} | 0<x<12"),
        (r"(-\infty,3)", r"x<3 | 3 > x | x \in (-\infty, 3)", r"x\le 3 | x>3 | (-\infty,3] | (3,\infty)"),
        (r"[\sqrt2,\infty)", r"m\ge\sqrt2 | x \geq \sqrt{2}", r"m>\sqrt2 | x \ge 1.414214"),
        (r"(-\infty,1)\cup(2,\infty)", r"x<1 or x>2 | (2,\infty)\cup(-\infty,1) | x < 1 \lor x > 2", r"(-\infty,1]\cup(2,\infty) | x<1 and x>2 | (1,2)"),
        ("[1,2]", r"x \in [1,2] | 1\le x\le 2 | x ∈ [1, 2]", "(1,2) | [1,2)"),
        ("x>3", r"3<x | 2x>6 | -x<-3", r"x\ge 3 | x<3 | x=3 | 3"),
    ],
    "choices": [
        ("C", r"(C) | C) | C. | Option C | \textbf{(C)} | (C) 42 | C: some text | \text{C} | **C** | (c) | choice C | C) 42", "B | (B) 42 | D | AC | 42"),
        (r"\textbf{(C)}\ 42", r"C | 42 | (C) 42 | C) 42 | \text{C} | (C) | 42.0 | \textbf{(C) }42", "(C) 43 | (B) 42 | 43 | B"),
        ("42", r"(C) 42 | \textbf{(B)}\ 42 | (A) 42", "(C) 43 | C"),
        ("A, C", r"(A), (C) | A and C | C, A", "A | A, B | AC, B"),
        ("E", "E: A polygenic score | E. A score | Option E: a score", "D: A polygenic score"),
    ],
    "equations": [
        ("5", r"x = 5 | x=5 \text{ cm} | f(x)=5 | f(2) = 5 | AB = 5 | \text{Area} = 5 | \theta = 5 | P(A) = 5 | 2+3=5 | x = 2+3 = 5 | a_1 = 5 | \angle A = 5 | n=5.", "-x=5 | 2x=5 | x^2=5 | x^2+y^2=5 | x=6 | 2+4=5 | 2=3=5 | x = 4 = 5 | x+y=5 | x(x+1)=5 | |x|=5"),
        ("x=5", "5 | 5=x | 2x=10 | x=5.0", "y=5 | x=6 | 2x=5"),
        ("0", "x=0", "x^2+y^2=0 | x=x"),
        ("y=2x+1", r"y=1+2x | 2x-y+1=0 | 2y=4x+2 | 2x+1", "y=2x | 2x-y-1=0 | y=2x+2"),
        ("2x+4y-3=0", r"y=-\frac{x}{2}+\frac34 | -2x-4y+3=0 | x+2y=1.5", r"2x+4y+3=0 | 2x+4y=0"),
        (r"\frac{x^2}{4}+y^2=1", "x^2+4y^2=4", r"x^2+4y^2=5 | \frac{x^2}{9}+y^2=1"),
    ],
    "words": [
        ("no", r"No | \text{no} | **no** | no.", "on | yes | n"),
        ("BA", "BA", "AB"),
        ("listen", "Listen | \\text{listen}", "silent | listens"),
        ("Tuesday", r"\text{Tuesday} | tuesday | day = Tuesday | “Tuesday”", "Wednesday"),
        ("ab", "ba | a b | a\\cdot b", "ac"),
        ("true", "True", "false"),
    ],
    "spelling": [
        ("42", r"\boldsymbol{42} | \bm{42} | \color{red}{42} | \textcolor{blue}{42} | {\color{red} 42} | \underline{42} | \mathbf{42} | \ensuremath{42} | \displaystyle 42 | {\large 42} | \underline{\textbf{42}} | $42$ | \(42\) | **42** | `42` | “42” | 42。 | ４２ | 42\u200b | \text{42} | \boxed{42}", "43 | 4 2"),
        ("-5", "‑5 | ‐5 | －5 | −5 | –5 | - 5", "5"),
        ("x^2+1", "x²+1 | x^{2}+1 | 1 + x²", "x2+1 | x^3+1"),
        ("10^{-5}", "10⁻⁵ | 0.00001 | 10^-5", "10⁵"),
        ("3/2", r"1½ | 1 1/2 | 1\frac12 | ³⁄₂ | 3⁄2 | 1.5", "11/2 | ½"),
        (r"\sqrt{x+1}", "√(x+1) | sqrt(x+1) | (x+1)^{1/2}", "√x+1"),
        ("2", "∛8 | √4 | √(2+2)", "∛4"),
        ("10000", r"10,000 | 10 000 | 10\,000 | 10{,}000 | 10\!,\!000 | 10\u2009000", "10, 000 | 10 00 | 1 0000"),
        ("12", "3×4 | 3·4 | 24÷2 | 3 \\times 4 | 3*4", "3+4"),
    ],
    "algebra": [
        ("(x+1)^2", "x^2+2x+1 | (1+x)^2 | (x+1)(x+1)", "x^2+2x+2 | x^2+1"),
        ("3+4i", "4i+3 | 3 + 4i", "3-4i | 3+4j | 7i"),
        ("2i", "(1+i)^2", "-2i"),
        (r"\frac{1}{\sqrt3}", r"\dfrac{\sqrt{3}}{3} | 1/\sqrt3 | \sqrt{\frac13}", r"\sqrt3 | 0.57735"),
        ("120", r"5! | \binom{10}{3} | \frac{6!}{6}", "5 | 4!"),
        (r"\pi r^2 h", r"h r^2 \pi", r"\pi r^2 | \pi R^2 h"),
        ("R-r", "-r+R", "0 | r-R"),
        ("3", r"\log_2 8 | \log_{2}{8} | e^{\ln 3} | \lfloor \pi \rfloor", r"\log 8"),
        (r"\frac12", r"\sin 30^\circ | \cos 60^\circ | \sin\frac{\pi}{6}", r"\sin 30 | \sin 60^\circ"),
        ("4500", r"4.5\times10^3 | 4.5 \cdot 10^{3} | 4.5e3", r"4.5\times10^4"),
        ("1", r"\sin^2 x+\cos^2 x", r"\sin^2 x-\cos^2 x"),
        ("|x|", r"\sqrt{x^2}", "x | -x"),
        (r"\infty", "infinity | ∞", r"-\infty | 0"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1 & 2 \\ 3 & 4\end{bmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix} | (1,2,3,4)"),
        ("0.5x", r"\frac{x}{2} | x/2", "0.5 | 0.5y"),
    ],
}  # fmt: skip
REFERENCES = [(kind, *row) for kind, rows in RULES.items() for row in rows]


def judged(answer: str, reference: str) -> Verdict:
    return mathematics.verify_boxed(rf"So it is $\boxed{{{answer}}}$.", reference, "stop")


def listed(answers: str) -> list[str]:
    return [answer.replace("\\u200b", "\u200b").replace("\\u2009", "\u2009") for answer in answers.split(" | ")]


@pytest.mark.parametrize(
    ("kind", "reference", "right", "wrong"), REFERENCES, ids=[f"{row[0]}: {row[1]}" for row in REFERENCES]
)
def test_rules_of_equality_hold_both_ways(kind: str, reference: str, right: str, wrong: str) -> None:
    for expected, answers in ((True, [reference, *listed(right)]), (False, listed(wrong))):
        for answer in answers:
            assert judged(answer, reference).correct is expected, (answer, reference)
            assert judged(reference, answer).correct is expected, (reference, answer)


@pytest.mark.parametrize(
    ("kind", "reference", "right", "wrong"), REFERENCES, ids=[f"{row[0]}: {row[1]}" for row in REFERENCES]
)
def test_right_answers_are_one_vote_and_wrong_ones_another(kind: str, reference: str, right: str, wrong: str) -> None:
    votes = {judged(answer, reference).answer for answer in [reference, *listed(right)]}
    assert len(votes) == 1
    assert votes.isdisjoint(judged(answer, reference).answer for answer in listed(wrong))


@pytest.mark.parametrize(
    "spellings",
    [
        [r"\frac12", "0.5", "1/2", r"\dfrac{1}{2}", "0.50", "x = 1/2", r"\frac{2}{4}"],
        ["(1,2)", "(1, 2)", r"\left(1,2\right)"],
        ["1, 2", "2, 1", r"\{1,2\}", "1 and 2"],
        ["1234", "1,234", "1{,}234", "1 234", r"1234\text{ cm}", r"\$1234"],
        [r"\frac{1}{\sqrt3}", r"\frac{\sqrt{3}}{3}"],
        ["(x+1)^2", "x^2+2x+1"],
        ["6:30 p.m.", "6:30 PM", r"6:30\text{ pm}"],
        ["Tuesday", r"\text{tuesday}", "**Tuesday**"],
        ["B", "(B)", "Option B", "(B) 12"],
        ["1010_2", r"1010_{\text{two}}"],
    ],
)
def test_equal_wrong_answers_vote_together(spellings: list[str]) -> None:
    verdicts = [judged(spelling, "977") for spelling in spellings]
    assert not any(verdict.correct for verdict in verdicts)
    assert len({verdict.answer for verdict in verdicts}) == 1


def test_long_answers_keep_their_differences() -> None:
    answers = [judged("7" * 500 + last, "5").answer for last in "123"]
    assert len(set(answers)) == 3
    assert max(map(len, answers)) <= mathematics.MAX_SHOWN_CHARACTERS


@pytest.mark.parametrize(
    "response",
    [
        "Answer: **42**.", "**Answer: 42**.", "#### **42**.", "Answer: **42 apples**.", "Answer: **42** apples.", "Answer: __42__",
        "__Answer: 42__.", "__Answer__: 42", "Answer: ***42***", "_Answer: 42_", "**Final Answer:** $42$.", "**Answer: $$42$$**.",
        "Answer:\n\n$$\n42\n$$", "Answer:\n\\[\n42\n\\]", "Answer:\n\\(\n42\n\\)", "Answer:\n```\n42\n```", "Answer:\n- 42",
        "Answer:\n* **42**.", "Answer:\n1. 42", "Answer: $$\n42\n$$", "####\n$$\n42\n$$", "#### \\[\n42\n\\]", "Answer:\n$$\n\\boxed{42}\n$$",
        "Answer:\n```text\n42\n```\nDone.", "Answer:\n$$\nx = 42.\n$$", "<answer>Answer: 42</answer>", "#### 42</answer>",
        "Answer: <answer>42</answer>", "Answer: 42</think>", "Answer:\n<answer>\n42\n</answer>", "<answer>#### 42</answer>",
        "Answer：42", "Final Answer： 42。", "#### Answer: 42", "Answer: exactly 42", "Answer: 42 (forty-two)",
    ],
)  # fmt: skip
def test_where_answers_stand_and_what_surrounds_them(response: str) -> None:
    assert mathematics.verify(response, "42", "stop").correct
    assert not mathematics.verify(response.replace("42", "43"), "42", "stop").correct
    assert not mathematics.verify(response.replace("42", "42, 43"), "42", "stop").correct


def test_an_answer_over_several_lines_is_read_to_its_end() -> None:
    matrix = "\\begin{pmatrix}\n1 & 2 \\\\\n3 & 4\n\\end{pmatrix}"
    for response in (f"Answer:\n$$\n{matrix}\n$$", f"Answer: {matrix}\nDone.", f"Answer:\n{matrix}"):
        assert mathematics.verify(response, matrix, "stop").correct
        assert not mathematics.verify(response.replace("3", "5"), matrix, "stop").correct
    assert mathematics.verify("Answer:\n- 1\n- 2\n", "1, 2", "stop").correct
    assert not mathematics.verify("Answer:\n- 1\n- 2\n", "1", "stop").correct


# ---------------------------------------------------------------------------------------------------------------- laws

SEPARATORS = [
    ", ", ",", " ", ";", "; ", " and ", " or ", r"\text{ and }", r"\text{ or }", " & ", r"\&", r"\lor ", r"\vee ", r"\land ",
    r"\wedge ", r"\to ", r"\Rightarrow ", r"\implies ", r"\iff ", "=", "<", ">", r"\le ", r"\ge ", r"\ne ", r"\approx ", r"\sim ",
    r"\equiv ", r"\in ", r"\subset ", ":", "::", "/", "|", r"\|", r"\mid ", r"\\", "\n", "\t", r"\quad ", "~", r"\,", r"\;", r"\ ",
    "...", r"\ldots ", r", \ldots, ", " to ", " then ", " not ", " but ", " except ", " vs ", r"\cup ", r"\cap ", r"\setminus ",
    r"\oplus ", r"\circ ", r"\star ", "*", "**", "^", "!", "?", "'", '"', "@", "#", "%", r"\%", "$", r"\$", "$$", "{}", "()", "[]",
    r"\{\}", r"\text{}", r"\boxed{}", "-", "--", "+", r"\pm ", r"\mp ", r"\times ", r"\cdot ", r"\div ", "->", "=>", "<->", "e", "x",
    r"\mapsto ", ".", ". ", ": ", "; or ", "(or ", "(not ", "≠", "→", "、", "，", "｜", "•", "‖", "\u2003", "\u200b", "\u2028",
]  # fmt: skip
WRAPPERS = [
    "%s", "$%s$", r"\(%s\)", "(%s)", "[%s]", r"\{%s\}", "{%s}", "**%s**", r"\text{%s}", r"\textbf{%s}", r"\mathrm{%s}",
    r"\boxed{%s}", "x=%s", r"x \in \{%s\}", "`%s`", "|%s|", r"\left(%s\right)", "-%s", r"%s\%%", "%s cm", r"\$%s",
    r"\color{red}{%s}", "(A) %s", "Answer: %s",
]  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(SEPARATORS), st.sampled_from(WRAPPERS), st.integers(2, 99), st.integers(100, 3000))
def test_no_answer_equals_two_integers(separator: str, wrapper: str, first: int, second: int) -> None:
    answer = wrapper % f"{first}{separator}{second}"
    assert not (judged(answer, str(first)).correct and judged(answer, str(second)).correct), answer


SPELLINGS = [
    "%s", "$%s$", r"\(%s\)", "**%s**", "%s.", r"\boldsymbol{%s}", r"\color{red}{%s}", "x = %s", r"\displaystyle %s", "{%s}", "(%s)",
    r"\text{%s}", " %s ", "%s,", "\u200b%s",
]  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.fractions(), st.sampled_from(SPELLINGS), st.sampled_from(SPELLINGS))
def test_a_number_equals_itself_in_every_spelling_and_no_other(value: Fraction, one: str, other: str) -> None:
    texts = [f"{value.numerator}/{value.denominator}", rf"\frac{{{value.numerator}}}{{{value.denominator}}}"]
    assert judged(one % texts[0], other % texts[1]).correct
    assert judged(one % texts[1], texts[0]).answer == judged(other % texts[0], texts[0]).answer
    neighbour = value + Fraction(1, value.denominator)
    assert not judged(one % texts[0], other % f"{neighbour.numerator}/{neighbour.denominator}").correct


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(REFERENCES), st.sampled_from(REFERENCES), st.data())
def test_equality_is_symmetric(first: tuple[str, ...], second: tuple[str, ...], data: st.DataObject) -> None:
    answers = [data.draw(st.sampled_from([row[1], *listed(row[2]), *listed(row[3])])) for row in (first, second)]
    assert judged(answers[0], answers[1]).correct is judged(answers[1], answers[0]).correct, answers


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (r"\frac{1}{2}\text{ if } x>0", "words between mathematics"),
        (r"n \equiv 3 \pmod 7", "a command that the parser reads as a product"),
        (r"\begin{cases} 1 & x>0 \\ 2 & x<0 \end{cases}", "of which the parser keeps one branch"),
        ("3 4", "which the parser adds"),
        (r"\triangle ABC \sim \triangle DEF", "a relation between names"),
        ("f'(x)", "whose prime the parser drops"),
        ("2 + 1010_2", "whose base the parser drops"),
    ],
)  # fmt: skip
def test_what_the_parser_would_drop_is_compared_as_text(text: str, why: str) -> None:
    assert judged(text, text).correct
    for other in (r"\frac12", "3", "1", "2", "7", "f(x)", "1012", r"n \equiv 4 \pmod 7", "-2"):
        assert not judged(text, other).correct, why
        assert not judged(other, text).correct, why


def test_without_the_exact_rules_the_laws_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: at a fixed small precision, and with text left out, the tables above would be contradicted."""
    monkeypatch.setattr(algebra, "MOST_DIGITS", algebra.FEWEST_DIGITS)
    assert algebra.equal(algebra.parse(r"\pi-2^{-3000}"), algebra.parse(r"\pi"))
    monkeypatch.setattr(units.Unit, "agrees_with", lambda unit, other: True)
    assert judged("5 km", "5 m").correct is False  # kept from before
    mathematics._compared.cache_clear()
    assert judged("5 km", "5 m").correct
    monkeypatch.undo()
    mathematics._compared.cache_clear()
    assert not judged("5 km", "5 m").correct
    assert not algebra.equal(algebra.parse(r"\pi-2^{-3000}"), algebra.parse(r"\pi"))


# -------------------------------------------------------------------------------------------------- hostile answers

HOSTILE = {
    "digits": "Answer: " + "7" * TEN_MEGABYTES,
    "open boxes": "\\boxed{" * (TEN_MEGABYTES // 7),
    "braces": "{" * TEN_MEGABYTES,
    "boxes in boxes": "\\boxed{" * 20_000 + "5" + "}" * 20_000,
    "answers": "Answer: 1\n" * (TEN_MEGABYTES // 10),
    "empty answers": "answer:\n" * (TEN_MEGABYTES // 8),
    "line feeds": "Answer:" + "\n" * TEN_MEGABYTES,
    "spaces": "answer" + " " * TEN_MEGABYTES + ":5",
    "tags": "<answer>" * (TEN_MEGABYTES // 8),
    "fractions in fractions": "\\boxed{" + "\\frac{1}{" * 300 + "1" + "}" * 300 + "}",
    "parentheses": "\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "tower": "\\boxed{9^{9^{9^{9}}}}",
    "Python's tower": "Answer: 9**9**9",
    "tower in brackets": "\\boxed{(9^{9})^{(9^9)}}",
    "tower of brackets": "\\boxed{(((9^{5000})^{5000})^{5000})^{5000}}",
    "exponent": "\\boxed{2^{99999999999}}",
    "scientific": "Answer: 9e999999999",
    "factorial": "\\boxed{99999999!}",
    "binomial": "\\boxed{\\binom{99999999}{49999999}}",
    "expansion": "\\boxed{(x+y+z)^{4999}}",
    "integral": "\\boxed{\\int_0^1 \\sin(\\sin(\\sin(x^x))) dx}",
    "exponentials": "\\boxed{\\exp(\\exp(\\exp(100)))}",
    "factorials of factorials": "\\boxed{((99!)!)!}",
    "import": "Answer: __import__('os').system('touch pwned')",
    "surrogate": "Answer: \x00\ud800",
}


def test_hostile_answers_are_wrong_and_leave_their_neighbours_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = [
        VerifierJob("math", text, "5000000") for hostile in HOSTILE.values() for text in (hostile, "Answer: 5000000")
    ]
    with VerifierPool(num_workers=2, timeout_s=60.0, verifiers=["math"]) as pool:
        verdicts = pool.judge_all(jobs)
    # An error would mean that a worker was killed.
    assert [verdict.error for verdict in verdicts] == [""] * len(jobs)
    assert {name for name, verdict in zip(HOSTILE, verdicts[0::2], strict=True) if verdict.correct} == set()
    assert all(verdict.correct for verdict in verdicts[1::2])
    assert max(len(verdict.answer) for verdict in verdicts) <= mathematics.MAX_SHOWN_CHARACTERS
    assert list(tmp_path.iterdir()) == []


def test_without_the_limits_a_hostile_answer_costs_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the answers above are as hostile as they look, and the pool survives them even so."""
    (tmp_path / "careless.py").write_text(
        "from megatron_fipo.rl.verifiers import mathematics\n"
        "from megatron_fipo.rl.verifiers.answers import algebra\n"
        "mathematics.is_computable = algebra.is_computable = lambda text: True\n"
        "verify = mathematics.verify\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    jobs = [VerifierJob("careless:verify", text, "7") for text in (HOSTILE["binomial"], "Answer: 7")]
    with VerifierPool(timeout_s=3.0, memory_gib=2.0, verifiers=["careless:verify"]) as pool:
        hostile, honest = pool.judge_all(jobs)
    assert "took longer than verifier.timeout_s=3" in hostile.error
    assert honest.correct


@pytest.mark.parametrize(
    ("text", "computable"),
    [
        ("2^{2024}", True),
        ("x^{2^{10}}", True),
        ("e^{x^{2}}", True),
        (r"\left(\frac{2}{3}\right)^{2024}", True),
        ("(x+1)^{10}", True),
        ("20!", True),
        ("2^{2^{13}}", False),
        ("2^{5001}", False),
        ("5001!", False),
        (r"\binom{5001}{2}", False),
        ("(2^{1000})^{1000}", False),
        ("(" * 25 + ")" * 25, False),
    ],
)
def test_what_is_computable(text: str, computable: bool) -> None:
    assert is_computable(text) is computable


def test_markers_are_looked_for_near_the_end_only() -> None:
    filler = "." * (MAX_SEARCHED_CHARACTERS - 9)
    assert last_boxed("x" + r"\boxed{1}" + filler) == (1, "1")
    assert last_boxed("x" + r"\boxed{1}." + filler) is None
    assert last_answer_tag("<answer>1</answer>" + filler) is None
    assert last_line("1\n" + filler + "\n2\n\n") == "2"
    assert last_boxed(r"\boxed{\boxed{1} and \{ \boxed{2}}") == (0, r"\boxed{1} and \{ \boxed{2}")


# ------------------------------------------------------------------------------------------------------- CPU limit


def spin() -> Iterator[None]:
    while True:
        yield


def test_cpu_limit_interrupts_and_cleans_up() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(CpuLimitError), cpu_limit(0.05):
        for _ in spin():
            pass
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    with cpu_limit(60.0):
        result = sum(range(1000))
    assert result == 499500


def test_cpu_limit_comes_through_code_that_swallows_exceptions() -> None:
    swallowed = []

    def stubborn() -> None:
        for _ in spin():
            try:
                for _ in spin():
                    pass
            except CpuLimitError as error:
                swallowed.append(error)
                if len(swallowed) == 3:
                    raise

    with pytest.raises(CpuLimitError), cpu_limit(0.05):
        stubborn()
    assert len(swallowed) == 3


def test_cpu_limit_is_not_for_other_threads() -> None:
    results: list[int] = []

    def work() -> None:
        with cpu_limit(0.001):
            results.append(sum(range(10**6)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [499999500000]
