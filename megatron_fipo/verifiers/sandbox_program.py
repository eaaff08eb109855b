"""Runs a program as plain Python does, in the process that `sandbox_child` has prepared.

A program is a module in sys.modules, compiled without our __future__ imports. Its source is available to `inspect`, it
has exit() and quit(), and it can open the standard streams and the null device by their paths, although the protection
refuses to open them for writing.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
from types import CodeType, ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FILE_NAME = "solution.py"

_NULL_FD = 63
"""Descriptor of the null device, above the small numbers that a program's own files get."""

_STREAMS = {
    f"{folder}{name}": fd
    for fd, stream in ((1, "stdout"), (2, "stderr"))
    for folder, name in (("/dev/", stream), ("/dev/fd/", fd), ("/proc/self/fd/", fd))
}


class _Source:
    """A loader for the program's module that gives `linecache` its source."""

    def __init__(self, texts: dict[str, str]) -> None:
        self._texts = texts

    def get_source(self, name: str) -> str:
        return self._texts[name]


def prepare() -> None:
    """Add the built-ins that are missing without `site`, and open the devices that programs may use."""
    import _sitebuiltins

    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    builtins.help = _sitebuiltins._Helper()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, _NULL_FD, inheritable=False)
    os.close(null)
    _open_devices_by_duplicating({**_STREAMS, os.devnull: _NULL_FD})
    sys.dont_write_bytecode = True


def _open_devices_by_duplicating(devices: dict[str, int]) -> None:
    """Make open() and os.open() duplicate a descriptor that is open already, for the paths of these devices."""
    open_file, open_descriptor = io.open, os.open

    def device(path: Any) -> int | None:
        try:
            name = os.fspath(path)
        except TypeError:
            return None
        return devices.get(os.fsdecode(name))

    def open(file: Any, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
        fd = None if isinstance(file, int) else device(file)
        return open_file(file if fd is None else os.dup(fd), mode, *arguments, **settings)

    def os_open(path: Any, flags: int, *arguments: Any, **settings: Any) -> int:
        fd = device(path)
        return open_descriptor(path, flags, *arguments, **settings) if fd is None else os.dup(fd)

    open.__doc__, os_open.__doc__ = open_file.__doc__, open_descriptor.__doc__
    os_open.__name__ = "open"
    builtins.open = io.open = open
    os.open = os_open


def run(order: dict[str, Any]) -> ModuleType:
    """Run the program to its end; its exceptions propagate, as in plain Python.

    Args:
        order: the order of `sandbox_child`.

    Returns:
        The program's module.

    Raises:
        SyntaxError: if the program compiles neither alone nor appended to the prompt.
    """
    name = order["name"]
    module = ModuleType(name)
    sys.modules[name] = module
    text, codes = _compiled(order["prompt"], order["program"])
    vars(module).update(__file__=FILE_NAME, __builtins__=builtins, __loader__=_Source({name: text}), __annotations__={})
    if order["imports"]:
        provide_imports(module, text)
        sys.setrecursionlimit(_JUDGES_RECURSION_LIMIT)
    for code in codes:
        exec(code, vars(module))
    return module


def _compiled(prompt: str, program: str) -> tuple[str, list[CodeType]]:
    """The source of the program's module, and the code objects to run in it.

    A prompt is the beginning of a module. A program that compiles alone runs after the prompt, in the same namespace; a
    program that does not is appended to the prompt's text.
    """
    try:
        code = _compile(program)
    except SyntaxError:
        if not prompt:
            raise
        return prompt + program, [_compile(prompt + program)]
    beginning = completed(prompt)
    return program, [code] if beginning is None else [_compile(beginning), code]


def completed(prompt: str) -> str | None:
    """A prompt that compiles, with `pass` added if it ends with a function that has no body; None if it never does."""
    for text in (prompt, f"{prompt.rstrip()}\n    pass\n", f"{prompt.rstrip()}\n        pass\n"):
        try:
            _compile(text)
        except SyntaxError:
            continue
        return text
    return None


def _compile(text: str) -> CodeType:
    return compile(text, FILE_NAME, "exec", dont_inherit=True)


_JUDGES_IMPORTS = [
    "string",
    "re",
    "datetime",
    "collections",
    "heapq",
    "bisect",
    "copy",
    "math",
    "random",
    "statistics",
    "itertools",
    "functools",
    "operator",
    "io",
    "sys",
    "json",
    "builtins",
    "typing",
]
"""Modules that LiveCodeBench's judge imports before every program, in its order; later ones take precedence."""

_JUDGES_RECURSION_LIMIT = 50_000
"""The recursion limit of LiveCodeBench's judge, which a program may raise; LeetCode's is higher."""


def provide_imports(module: ModuleType, text: str) -> None:
    """Give a program the names that it uses and never binds, if judges would provide them."""
    missing = _free_names(text) - vars(builtins).keys()
    for name in missing & set(_JUDGES_IMPORTS):
        setattr(module, name, __import__(name))
    missing -= set(_JUDGES_IMPORTS)
    for source in reversed(_JUDGES_IMPORTS):
        if not missing:
            return
        imported = __import__(source)
        exported = getattr(imported, "__all__", [name for name in vars(imported) if not name.startswith("_")])
        for name in missing & set(exported):
            setattr(module, name, getattr(imported, name))
            missing.discard(name)


def _free_names(text: str) -> set[str]:
    """Names that a module and its functions look up globally and the module never binds."""
    import _symtable  # type: ignore[import-not-found]

    top = _symtable.symtable(text, FILE_NAME, "exec")
    used: set[str] = set()
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.children
        for name, flags in table.symbols.items():
            scope = flags >> _symtable.SCOPE_OFF & _symtable.SCOPE_MASK
            if scope in (_symtable.GLOBAL_IMPLICIT, _symtable.GLOBAL_EXPLICIT) and flags & _symtable.USE:
                used.add(name)
    bound = _symtable.DEF_BOUND
    return {name for name in used if not top.symbols.get(name, 0) & bound}


def call_function(module: ModuleType, order: dict[str, Any], result_fd: int) -> None:
    """Call the program's function with each list of arguments and write a line of JSON per result, until a call fails.

    The process then exits; this does not return.
    """
    import json

    with os.fdopen(result_fd, "w", encoding="ascii") as results:
        for arguments in order["calls"]:
            try:
                value = _function(module, order["function"])(*arguments)
                if hasattr(value, "__await__"):
                    import asyncio

                    value = asyncio.run(value)
                line = json.dumps({"value": value})
            except Exception as error:  # noqa: BLE001 - whatever the program raises is its result
                results.write(json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}) + "\n")
                break
            results.write(line + "\n")
            results.flush()
    os._exit(0)


def _function(module: ModuleType, name: str) -> Any:
    """The method of that name of a new Solution object, if that class has it; else the module's function."""
    solution = getattr(module, "Solution", None)
    if isinstance(solution, type) and hasattr(solution, name):
        return getattr(solution(), name)
    return getattr(module, name)


def run_tests(module: ModuleType, tests: str) -> None:
    """Run tests in the program's own namespace."""
    exec(compile(tests, "tests.py", "exec", dont_inherit=True), vars(module))
