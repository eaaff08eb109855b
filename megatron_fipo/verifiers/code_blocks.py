"""Finds the program in a response.

Programs stand in CommonMark's fenced blocks: three or more backticks or tildes, closed by at least as many of the same
kind, with any indentation. A block that is never closed counts only if no block is closed. Two rules differ from
CommonMark, because of how models write. A fence that names a language opens a block even if the previous block is still
open, or if text precedes it on its line. A fence inside a string of the program, such as a docstring, does not end the
block: it is recognized because the program cut there does not parse.

If there are several blocks, the program is the last one that fits the problem; see `extract_program`.
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
"""Number of fences that are tried as the end of one block."""

_MAX_FENCES = 400
"""Number of fences that are considered, counted from the response's end."""

_PARSING_BUDGET = 1_000_000
"""Characters that are parsed for one response, about two seconds; after these, no block counts as Python."""

# Possessive quantifiers (`*+`), so that a hostile line costs linear and not quadratic time.
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
        language: first word after the opening fence; empty if there is none.
        text: the block, with the indentation of its fence removed from every line.
        closed: False if the response ends inside the block.
    """

    language: str
    text: str
    closed: bool

    @property
    def says_python(self) -> bool:
        """Whether the fence names Python as the language."""
        return _PYTHON.fullmatch(self.language) is not None


def extract_program(
    response_text: str, names: Collection[str] = (), reads_input: bool = False, prompt: str = ""
) -> str:
    """Return the response's program; empty if there is none.

    Candidates are the blocks whose fence says Python, and those whose fence names no language and whose text looks like
    a program: it parses and, unlike sample output, does more than name values. If there are none, the blocks of other
    languages that look like a program are candidates; failing these, all blocks. Without any block, the whole response
    is the program, or the part between marks such as <answer> or [BEGIN]. The program is

    - if the problem asks for a function, the last candidate that defines one of `names`, else the last that imports
      one: a later block that only calls the function is an example of its use;
    - if the problem is about input and output, the last candidate that reads standard input and prints, else the last
      that prints;
    - otherwise, or if no candidate does, the last candidate.

    Args:
        response_text: the response.
        names: names of the function that the problem asks for; one of them suffices.
        reads_input: whether the program is to read an input and print.
        prompt: the beginning of a module that the program may continue.
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
    """The program in a response without fences: without the reasoning and the lines that mark its beginning and end."""
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
    """The rest of the response as a block; cut at a fence at the end of a line of text if what precedes it parses."""
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
    """Index of the first fence that ends the block so that it parses; of the first fence if none does.

    A block cut at a later fence contains the earlier ones, which are valid Python only inside a string.
    """
    for end in ends:
        if parser.parsed(_moved_left(text[opening.end() : fences[end].start()], opening[1])) is not None:
            return end
    return ends[0]


def _moved_left(text: str, indentation: str) -> str:
    return "\n".join(line.removeprefix(indentation) for line in text.strip("\n").split("\n"))


class _Parser:
    """Parses Python within a budget, so that no response takes the judge long."""

    def __init__(self) -> None:
        self._left = _PARSING_BUDGET

    def parsed(self, text: str) -> ast.Module | None:
        """The module's syntax tree; None if the text is no Python, too long, or the budget is spent."""
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
        """Whether a block looks like a program: it parses, and some statement does more than name a value."""
        tree = self.parsed(block.text)
        if tree is not None:
            return any(_does_something(statement) for statement in tree.body)
        return bool(prompt.strip()) and block.text[:1] in (" ", "\t") and self.parsed(prompt + block.text) is not None

    def imports(self, program: str, names: Collection[str]) -> bool:
        """Whether a module imports one of the names, as examples of use do: from solution import add."""
        tree = self.parsed(program)
        return tree is not None and any(
            isinstance(node, ast.alias) and (node.asname or node.name) in names for node in ast.walk(tree)
        )

    def defines(self, program: str, names: Collection[str]) -> bool:
        """Whether a module binds one of the names, as a function, method, class or variable."""
        tree = self.parsed(program)
        if tree is None:
            return any(re.search(rf"\b(def|class)\s+{re.escape(name)}\b", program) for name in names)
        return any(_binds(node, names) for node in ast.walk(tree))


def _does_something(statement: ast.stmt) -> bool:
    """Whether a statement is unlike those that sample output parses as: 6, [1, 2], YES, O(n), x = 1."""
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
