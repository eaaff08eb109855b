r"""Converts mathematics in Unicode into LaTeX: "1½ ≤ x²" becomes "1\frac{1}{2} \le x^{2}"."""

from __future__ import annotations

import re
import unicodedata

_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi "
    "psi omega"
)
_NAMED = {
    **{chr(0x3B1 + index + (index > 16)): name for index, name in enumerate(_GREEK.split())},
    **dict(
        zip(
            "ΓΔΘΛΞΠΣΥΦΨΩ",
            ["Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega"],
            strict=True,
        )
    ),
    **dict.fromkeys("ϕ", "phi"),
    **dict.fromkeys("ϵ", "epsilon"),
    **dict.fromkeys("ϑ", "theta"),
    **dict.fromkeys("×✕✖⨯", "times"),
    **dict.fromkeys("·⋅∙•", "cdot"),
    **dict.fromkeys("÷", "div"),
    **dict.fromkeys("≤≦⩽", "le"),
    **dict.fromkeys("≥≧⩾", "ge"),
    **dict.fromkeys("≠≢", "ne"),
    **dict.fromkeys("≈≃≅≒", "approx"),
    **dict.fromkeys("→⟶", "to"),
    **dict.fromkeys("⇒⟹", "Rightarrow"),
    **dict.fromkeys("⇔⟺", "iff"),
    **dict.fromkeys("∅⌀", "emptyset"),
    **dict.fromkeys("⟨〈", "langle"),
    **dict.fromkeys("⟩〉", "rangle"),
    **dict.fromkeys("…⋯", "ldots"),
    **dict.fromkeys("△∆", "triangle"),
    **dict.fromkeys("∖", "setminus"),
    **dict(
        zip(
            "∞±∓∈∉∪∩⊂⊆⊃⊇∀∃¬∨∧≡∼∝∑∏∫∂∇∠⊥∥⌊⌋⌈⌉",
            [
                "infty",
                "pm",
                "mp",
                "in",
                "notin",
                "cup",
                "cap",
                "subset",
                "subseteq",
                "supset",
                "supseteq",
                "forall",
                "exists",
                "neg",
                "lor",
                "land",
                "equiv",
                "sim",
                "propto",
                "sum",
                "prod",
                "int",
                "partial",
                "nabla",
                "angle",
                "perp",
                "parallel",
                "lfloor",
                "rfloor",
                "lceil",
                "rceil",
            ],
            strict=True,
        )
    ),
}
_PLAIN = {
    **dict.fromkeys("−–—‐‑‒―﹣－", "-"),
    **dict.fromkeys("⁄∕", "/"),
    **dict.fromkeys("“”„‟«»″", '"'),
    **dict.fromkeys("‘’‚‛′", "'"),
    **dict.fromkeys("、，", ","),
    **dict.fromkeys("。", "."),
    "\u2236": ":",
    **dict.fromkeys("°º˚", r"^{\circ}"),
    "℃": r"^{\circ}C",
    "℉": r"^{\circ}F",
    "¢": r"\text{ cents}",
    **{letter: rf"\mathbb{{{plain}}}" for letter, plain in zip("ℝℕℤℚℂ", "RNZQC", strict=True)},
}
_CHARACTERS = str.maketrans({**{character: f"\\{name} " for character, name in _NAMED.items()}, **_PLAIN})

_OVERLINED = re.compile("(?:\\d[\u0304\u0305])+")
_RING_BEHIND_NUMBER = re.compile("(?<=[0-9}])\\s*\u2218")  # elsewhere it composes functions
_DOTTED = re.compile("(\\d)\u0307")
_FRACTION = re.compile("([\u2070-\u2079¹²³]+)[\u2044/]([\u2080-\u2089]+)")
_ROOT = re.compile(r"([√∛∜])\s*")
_DEGREES = {"√": "", "∛": "[3]", "∜": "[4]"}
_MAX_ROOTS = 100


def as_latex(text: str) -> str:
    """Replace Unicode symbols, scripts, fractions and roots by LaTeX or ASCII; other characters stay."""
    if text.isascii():
        return text
    text = _RING_BEHIND_NUMBER.sub(r"^{\\circ}", text)
    text = _OVERLINED.sub(lambda run: rf"\overline{{{re.sub('[^0-9]', '', run[0])}}}", text)
    text = _DOTTED.sub(r"\\dot{\1}", text)
    text = _FRACTION.sub(lambda parts: rf"\frac{{{_plain(parts[1])}}}{{{_plain(parts[2])}}}", text)
    text = _with_scripts(text).translate(_CHARACTERS)
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    text = "".join(character for character in text if unicodedata.category(character) not in {"Cf", "Co", "Cs"})
    return _with_roots(text)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(_CHARACTERS)


def _with_scripts(text: str) -> str:
    """Write out superscripts, subscripts and fractions that are single characters."""
    pieces: list[str] = []
    kind = ""
    for character in text:
        decomposition = "" if character in "º™" else unicodedata.decomposition(character)
        here = decomposition[1:4] if decomposition.startswith(("<super>", "<sub>")) else ""
        if here != kind and kind:
            pieces.append("}")
        if here and here != kind:
            pieces.append("^{" if here == "sup" else "_{")
        kind = here
        if decomposition.startswith("<fraction>"):
            top, _, bottom = unicodedata.normalize("NFKC", character).partition("\u2044")
            pieces.append(rf"\frac{{{top}}}{{{bottom}}}" if bottom else character)
        else:
            pieces.append(_plain(character) if here else character)
    return "".join(pieces) + ("}" if kind else "")


def _with_roots(text: str) -> str:
    """Write out root signs; each covers the bracket, number, letter or command that follows it."""
    for _ in range(_MAX_ROOTS):
        sign = None
        for sign in _ROOT.finditer(text):  # noqa: B007 - the innermost comes last
            pass
        if sign is None:
            return text
        end = argument_end(text, sign.end())
        argument = text[sign.end() : end]
        if argument[:1] in "({" and argument[-1:] in ")}":
            argument = argument[1:-1]
        text = f"{text[: sign.start()]}\\sqrt{_DEGREES[sign[1]]}{{{argument}}}{text[end:]}"
    return text


_ARGUMENT = re.compile(r"\d+(?:\.\d+)?|\\[A-Za-z]+|[A-Za-z]")


def argument_end(text: str, start: int) -> int:
    """End of the argument that begins at `start`: a bracket with its content, a number, a letter or a command."""
    if text[start : start + 1] in ("(", "{"):
        opening, depth = text[start], 0
        closing = {"(": ")", "{": "}"}[opening]
        for position in range(start, len(text)):
            depth += (text[position] == opening) - (text[position] == closing)
            if depth == 0:
                return position + 1
        return len(text)
    simple = _ARGUMENT.match(text, start)
    return simple.end() if simple else start
