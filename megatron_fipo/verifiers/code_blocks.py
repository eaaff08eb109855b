"""Finds the part of a response that is its program.

Blocks between fences, as CommonMark has them: three or more backticks or tildes, closed by as many of the same kind,
indented as one likes; a block that a longer response did not close counts only where no other does. Two things differ
from CommonMark, since models write so: a fence that names a language opens a block even where the one before was left
open, or where text stands before it on its line; and a fence inside a text of the program (in a docstring, say) does
not end the block, which shows by the program being no Python when it is cut there.

Of several blocks the program is the last one that serves the problem; see `extract_program`.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import re
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass

_SEARCHED_CHARACTERS = 200_000
_PARSED_CHARACTERS = 50_000
_MAX_CLOSINGS = 30
"""Fences that are tried as the end of one block."""

_MAX_FENCES = 400
"""Only this many of a response's last fences are looked at."""

_PARSING_BUDGET = 1_000_000
"""Characters that are parsed for one response, two seconds' worth; beyond, nothing counts as Python to look at."""

# Possessive (`*+`), so that a hostile line costs a time that grows with its length and not with its square.
_FENCE = re.compile(r"^([ \t]*+)(`{3,}+|~{3,}+)[ \t]*+([^\n`]*+)$", re.MULTILINE)
_FENCE_BEHIND_TEXT = re.compile(r"(?<=[^\n`])()(`{3,}+)[ \t]*+([A-Za-z][\w+.-]*+)[ \t]*+$", re.MULTILINE)
_PYTHON = re.compile(r"(i?python|py|pypy)[\d.]*", re.IGNORECASE)
_QUOTED_FENCE = re.compile(r"^> ?[ \t]*(`{3}|~{3})", re.MULTILINE)
_QUOTE = re.compile(r"^> ?", re.MULTILINE)
_OPENING_MARK = re.compile(r"^(<(answer|code|python|solution)>|\[(BEGIN|PYTHON)\])[ \t]*$", re.MULTILINE)
_CLOSING_MARK = re.compile(r"^(</(answer|code|python|solution)>|\[(DONE|/PYTHON)\])[ \t]*$", re.MULTILINE)
_FENCE_AT_END = re.compile(r"(?<=[^\s`~])[ \t]*(`{3,}|~{3,})[ \t]*$", re.MULTILINE)
_BUILTINS = frozenset(dir(builtins))


@dataclass(frozen=True)
class Block:
    """The text between two fences.

    Attributes:
        language: first word behind the opening fence, empty if there is none.
        text: the block, moved left by as much as its fence is indented.
        closed: False where the response ends before it.
    """

    language: str
    text: str
    closed: bool

    @property
    def says_python(self) -> bool:
        """Whether its fence calls it Python."""
        return _PYTHON.fullmatch(self.language) is not None


def extract_program(
    response_text: str, names: Collection[str] = (), reads_input: bool = False, prompt: str = ""
) -> str:
    """The response's program; empty if there is none.

    Candidates are the blocks whose fence says Python, and those whose fence says nothing and which are Python to look
    at: they parse, and do more than name values, as sample output does. If there are none, all blocks are; if there are
    no blocks, the whole response is the program, or what stands between marks such as <answer> or [BEGIN]. Of the
    candidates the last is taken that

    - defines one of `names`, where the problem asks for a function: a later block that only calls it is its example;
    - reads the standard input and prints, else prints, where the problem is a matter of input and output.

    If none does, the last one is.

    Args:
        response_text: the response.
        names: the function that the problem asks for, or several of which one will do.
        reads_input: whether the problem is to read an input and print.
        prompt: the beginning of a module that the program may go on from.
    """
    text = response_text[-_SEARCHED_CHARACTERS:].replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")
    if _QUOTED_FENCE.search(text):
        text = _QUOTE.sub("", text)
    parser = _Parser()
    blocks = list(_blocks(text, parser))
    blocks = [block for block in blocks if block.closed] or blocks
    if not blocks:
        return _between_marks(text).strip("\n")
    candidates = [
        block for block in blocks if block.says_python or (not block.language and parser.is_program(block, prompt))
    ]
    if not candidates:
        candidates = [block for block in blocks if parser.is_program(block, prompt)] or blocks
    texts = [block.text for block in candidates]
    if len(texts) > 1 and names:
        texts = (
            [program for program in texts if parser.defines(program, names)]
            or [program for program in texts if parser.imports(program, names)]
            or texts
        )
    elif len(texts) > 1 and reads_input:
        printing = [program for program in texts if _PRINTS.search(program)] or texts
        texts = [program for program in printing if _READS.search(program)] or printing
    return texts[-1]


def _between_marks(text: str) -> str:
    """A response without fences, less its thoughts and the lines that mark the program's ends."""
    text = text.rpartition("</think>")[2]
    opened = list(_OPENING_MARK.finditer(text))
    if opened:
        text = text[opened[-1].end() :]
    closing = _CLOSING_MARK.search(text)
    return text[: closing.start()] if closing else text


_READS = re.compile(r"\b(input\s*\(|stdin\b|raw_input|fileinput|open\s*\(\s*0|os\.read\b|/dev/stdin|/dev/fd/0)")
_PRINTS = re.compile(r"\b(print\b|stdout\b|os\.write\b|open\s*\(\s*1)|/dev/(stdout|fd/1)")


def _blocks(text: str, parser: _Parser) -> Iterator[Block]:
    fences = list(_FENCE.finditer(text))
    ends_of_lines = {fence.end() for fence in fences}
    fences += [fence for fence in _FENCE_BEHIND_TEXT.finditer(text) if fence.end() not in ends_of_lines]
    fences.sort(key=lambda fence: fence.start())
    fences = fences[-_MAX_FENCES:]
    position = 0
    while position < len(fences):
        opening = fences[position]
        places = range(position + 1, len(fences))
        closing_places = (p for p in places if fences[p][3].strip() or _closes(fences[p], opening))
        ends = list(itertools.islice(closing_places, _MAX_CLOSINGS))
        language = _language(opening)
        if not ends:
            yield _unclosed(text[opening.end() :], language, opening, parser)
            return
        end = ends[0]
        if not language or _PYTHON.fullmatch(language):
            end = _end_of_python(text, fences, opening, ends, parser)
        closing = fences[end]
        closed = _closes(closing, opening)
        yield Block(language, _moved_left(text[opening.end() : closing.start()], opening[1]), True)
        position = end + closed


def _unclosed(text: str, language: str, opening: re.Match[str], parser: _Parser) -> Block:
    """The response's rest; up to a fence behind the last line's text, where that leaves a module."""
    for closing in itertools.islice(_FENCE_AT_END.finditer(text), _MAX_CLOSINGS):
        block = _moved_left(text[: closing.start()], opening[1])
        if closing[1][0] == opening[2][0] and parser.parsed(block) is not None:
            return Block(language, block, True)
    return Block(language, _moved_left(text, opening[1]), False)


def _closes(fence: re.Match[str], opening: re.Match[str]) -> bool:
    return not fence[3].strip() and fence[2][0] == opening[2][0] and len(fence[2]) >= len(opening[2])


def _language(opening: re.Match[str]) -> str:
    words = re.findall(r"[\w+#-][\w+#.-]*", opening[3])
    return words[0] if words else ""


def _end_of_python(
    text: str, fences: list[re.Match[str]], opening: re.Match[str], ends: list[int], parser: _Parser
) -> int:
    """The first fence that, as the end of the block, leaves it a module; the first of all if none does.

    A longer block holds its inner fences, which are Python only inside of a text.
    """
    for end in ends:
        if parser.parsed(_moved_left(text[opening.end() : fences[end].start()], opening[1])) is not None:
            return end
    return ends[0]


def _moved_left(text: str, indentation: str) -> str:
    return "\n".join(line.removeprefix(indentation) for line in text.strip("\n").split("\n"))


class _Parser:
    """Parses within a budget: what a response holds must not keep the judge busy."""

    def __init__(self) -> None:
        self._left = _PARSING_BUDGET

    def parsed(self, text: str) -> ast.Module | None:
        """The module, None if it is none."""
        self._left -= len(text) + 500
        if len(text) > _PARSED_CHARACTERS or self._left < 0:
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None

    def is_program(self, block: Block, prompt: str) -> bool:
        """Whether a block that does not say so is Python: it parses, and some statement is more than a value."""
        tree = self.parsed(block.text)
        if tree is not None:
            return any(_does_something(statement) for statement in tree.body)
        return bool(prompt.strip()) and block.text[:1] in (" ", "\t") and self.parsed(prompt + block.text) is not None

    def imports(self, program: str, names: Collection[str]) -> bool:
        """Whether a module takes one of the names from another, as examples of use do: from solution import add."""
        tree = self.parsed(program)
        return tree is not None and any(
            isinstance(node, ast.alias) and (node.asname or node.name) in names for node in ast.walk(tree)
        )

    def defines(self, program: str, names: Collection[str]) -> bool:
        """Whether a module binds one of the names, by itself or as a method."""
        tree = self.parsed(program)
        if tree is None:
            return any(re.search(rf"\b(def|class)\s+{re.escape(name)}\b", program) for name in names)
        return any(_binds(node, names) for node in ast.walk(tree))


def _does_something(statement: ast.stmt) -> bool:
    """False for what sample output looks like: 6, [1, 2], YES, O(n), x = 1."""
    if isinstance(statement, ast.Expr):
        call = statement.value
        return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in _BUILTINS
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        value = statement.value
        return value is not None and any(isinstance(node, ast.Call | ast.Lambda) for node in ast.walk(value))
    return not isinstance(statement, ast.Pass)


def _binds(node: ast.AST, names: Collection[str]) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name in names
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in names
