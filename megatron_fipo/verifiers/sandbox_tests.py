"""The tests' process: runs tests out of the program's reach, with stand-ins for the program's objects.

Plain data arrives by value, so the program cannot decide how it compares. Anything else is a `StandIn`: what the tests
do with it is done in the program's process, under one rule. An object that the program returns is never asked about a
value that the tests hold: if f returns an object of the program's own class, `f(2) == 4` is False and `f(2) - 4` a
TypeError, since such an object could give any answer. Objects that the tests make themselves, by calling a class of the
program that they use as a class (`sandbox_classes`), are what is tested, and are asked (`Money(3) == 3`).
"""

from __future__ import annotations

import builtins
import sys
from types import CodeType, FunctionType, ModuleType

from megatron_fipo.verifiers.sandbox_classes import names_meant_as_classes
from megatron_fipo.verifiers.sandbox_program import completed
from megatron_fipo.verifiers.sandbox_values import (
    ATOMS,
    SHARED_MODULES,
    Decoder,
    Encoder,
    Pipe,
    ProtocolError,
    standard_name,
    standard_object,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_PLAIN_BASES = {base.__name__: base for base in (int, float, str, tuple, bytes, frozenset)}
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_ARITHMETIC = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift",
    "divmod",
)  # fmt: skip
_NAMES_OF_FUNCTIONS = ("__name__", "__qualname__", "__doc__", "__module__")
_ENDINGS = (SystemExit, KeyboardInterrupt, GeneratorExit)


class ProgramEndedError(Exception):
    """A function of the program raised an exception, such as SystemExit, that would end the tests."""


class _Link:
    """The connection to the program's process, and the stand-ins made so far."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._classes: dict[int, _StandInType] = {}
        self._callbacks: list[Any] = []
        self._stand_ins: dict[int, StandIn] = {}
        self._made: dict[int | None, StandIn] = {}
        self.meant_as_classes: frozenset[str] = frozenset()
        self._under_test: set[int | None] = set()

    def request(self, what: str, *arguments: Any, settings: dict[str, Any] | None = None) -> Any:
        """Do something in the program's process, and apply its changes to the containers among the arguments here.

        Raises:
            ProtocolError: if that process has ended or sends something malformed.
            Exception: what the program raised.
        """
        encoder = Encoder(self._reference)
        message: dict[str, Any] = {
            "do": what,
            "arguments": [encoder.encode(argument) for argument in arguments],
            "settings": {name: encoder.encode(value) for name, value in (settings or {}).items()},
        }
        self._pipe.send({**message, "table": encoder.table()})
        while True:
            reply = self._pipe.receive()
            if "do" not in reply:
                break
            self._pipe.send(self._call_here(reply))
        return self._result(reply, encoder)

    def _result(self, reply: dict[str, Any], encoder: Encoder) -> Any:
        try:
            decoder = Decoder(reply["table"], self._referred, encoder.objects)
            for place, row in reply["changed"]:
                decoder.fill(encoder.objects[place], row)
            printed = reply["printed"]
            if printed and sys.stdout is not sys.__stdout__:
                sys.stdout.write(printed)
            failed = "error" in reply
            value = decoder.decode(reply["error" if failed else "value"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(f"a malformed reply: {error}") from error
        if failed:
            raise value if isinstance(value, Exception) else ProgramEndedError(str(value))
        return value

    def _call_here(self, request: dict[str, Any]) -> dict[str, Any]:
        """Call a function that the tests passed to the program, the only thing that the program may ask for."""
        try:
            decoder = Decoder(request["table"], self._referred)
            function = self._callbacks[request["target"]]
            arguments = [decoder.decode(argument) for argument in request["arguments"]]
            settings = {name: decoder.decode(value) for name, value in request["settings"].items()}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(f"a malformed request: {error}") from error
        encoder = Encoder(self._reference, decoder.objects)
        try:
            reply = {"value": encoder.encode(function(*arguments, **settings))}
        except Exception as error:  # noqa: BLE001 - the program may have to handle what a callback raises
            reply = {"error": encoder.encode(error)}
        return {**reply, "table": encoder.table()}

    # ------------------------------------------------------------------------------------------------------- encoding

    def _reference(self, value: Any) -> list[Any]:
        number = _number(value)
        if number is not None:
            return ["yours", number]
        named = standard_name(value)
        if named is not None:
            return named
        if isinstance(value, Exception) and type(value).__module__ == "builtins":
            arguments = [argument if type(argument) in ATOMS else str(argument) for argument in value.args]
            return ["exception", type(value).__name__, arguments]
        if isinstance(value, FunctionType) or (callable(value) and not isinstance(value, type)):
            self._callbacks.append(value)
            names = {name: getattr(value, name, None) for name in _NAMES_OF_FUNCTIONS}
            return ["callback", len(self._callbacks) - 1, {n: v for n, v in names.items() if isinstance(v, str)}]
        raise TypeError(f"tests cannot pass a {type(value).__name__} of their own to the program")

    def _referred(self, coded: list[Any]) -> Any:
        tag, number = coded[0], coded[1]
        if tag == "yours":
            return self._callbacks[number]
        if tag == "class":
            return self.stand_in_class(number)
        if tag == "object":
            return self._stand_in(number, coded[2])
        if tag == "value":
            return self._value(number, coded[2], Decoder([], self._referred).decode(coded[3]))
        if tag == "coroutine":
            return self._coroutine(number)
        if tag == "exception":
            return self._exception(*coded[1:])
        return standard_object(coded, SHARED_MODULES)

    def _stand_in(self, number: int, class_number: int) -> StandIn:
        """The stand-in of an object, always the same one, so that `is` works for the program's objects."""
        found = self._stand_ins.get(number)
        if found is None:
            cls = StandIn if class_number < 0 else self.stand_in_class(class_number)
            found = self._stand_ins[number] = _new(cls, self, number)
        return found

    def named(self, name: str, value: Any) -> Any:
        """Return a named value unchanged; a class that the tests use as a class counts as under test from now on."""
        if isinstance(value, _StandInType) and name in self.meant_as_classes:
            self._under_test.add(_number(value))
        return value

    def made_of(self, cls: _StandInType, value: Any) -> Any:
        """Mark the result of calling a class as made by the tests, if that class is under test."""
        makes_new = type.__getattribute__(cls, "_makes_new")
        return self.made_by_tests(value) if makes_new and _number(cls) in self._under_test else value

    def made_by_tests(self, value: Any) -> Any:
        """A separate stand-in for an object that the tests made; the program's own use of it gives an unmarked one."""
        if not isinstance(value, StandIn):
            return value
        number = _number(value)
        made = self._made.get(number)
        if made is None:
            made = self._made[number] = _new(type(value), self, number)
            object.__setattr__(made, "_made_by_tests", True)
        return made

    def _value(self, number: int, class_number: int, plain: Any) -> Any:
        cls: Any = self.stand_in_class(class_number)
        base = next((base for base in _PLAIN_BASES.values() if issubclass(cls, base)), None)
        if base is None or type(plain) is not base:
            raise ProtocolError("a value that is not of its class's plain type")
        value: Any = base.__new__(cls, plain)
        value.__dict__.update(_link=self, _number=number)
        return value

    def _exception(self, number: int, class_number: int, name: str, arguments: list[Any]) -> Any:
        cls: Any = self.stand_in_class(class_number) if class_number >= 0 else _exception_class(name)
        error = cls.__new__(cls)
        error.args = tuple(arguments)
        if name == "StopIteration":
            error.value = arguments[0] if arguments else None
        error.__dict__.update(_link=self, _number=number)
        return error

    def _coroutine(self, number: int) -> Any:
        async def run() -> Any:
            return self.request("await", _new(StandIn, self, number))

        return run()

    def stand_in_class(self, number: int) -> _StandInType:
        """The class that stands in for one of the program's; its bases are stand-ins, too."""
        found = self._classes.get(number)
        if found is None:
            reply = self.request("class", _Numbered(number))
            name, qualified_name, module, built_in, bases, documentation, makes_new = reply
            if not all(isinstance(base, _StandInType) for base in bases):
                raise ProtocolError("a class with bases that are no classes")
            own: tuple[type, ...] = tuple(bases)
            if not own:
                own = (_Answering,) if built_in else (StandIn,)
            if built_in and not any(issubclass(base, _Answering) and base is not _Answering for base in own):
                own = (*own, _PLAIN_BASES.get(built_in) or _exception_class(built_in))
            body = {"__qualname__": qualified_name, "__module__": module, "__doc__": documentation}
            found = _StandInType.__new__(_StandInType, str(name), own, body)
            type.__setattr__(found, "_link", self)
            type.__setattr__(found, "_class_number", number)
            type.__setattr__(found, "_makes_new", makes_new)
            self._classes[number] = found
        return found


class _Numbered:
    """A reference to an object of the program, by its number alone."""

    def __init__(self, number: int) -> None:
        self._number = number


def _number(value: Any) -> int | None:
    """The number of the program's object that a value stands for; None for other values."""
    holder: Any = None
    if isinstance(value, _StandInType):
        return type.__getattribute__(value, "__dict__").get("_class_number")
    if isinstance(value, StandIn | _Answering | _Numbered | Exception):
        holder = object.__getattribute__(value, "__dict__")
    return holder.get("_number") if holder is not None else None


def _new(cls: type, link: _Link, number: int | None) -> Any:
    stand_in: Any = object.__new__(cls)
    object.__setattr__(stand_in, "_link", link)
    object.__setattr__(stand_in, "_number", number)
    object.__setattr__(stand_in, "_made_by_tests", False)
    return stand_in


def _exception_class(name: str) -> type[BaseException]:
    """A built-in exception by name; ProgramEndedError in place of one that would end the tests."""
    found = getattr(builtins, name, None)
    if not isinstance(found, type) or not issubclass(found, BaseException):
        raise ProtocolError(f"not an exception: {name!r}")
    return ProgramEndedError if issubclass(found, _ENDINGS) or not issubclass(found, Exception) else found


class _StandInType(type):
    """The type of classes that stand in for the program's: attributes, calls and iteration go to its process."""

    def __call__(cls, *arguments: Any, **settings: Any) -> Any:
        link: _Link = type.__getattribute__(cls, "_link")
        return link.made_of(cls, link.request("call", cls, *arguments, settings=settings))

    def __getattr__(cls, name: str) -> Any:
        if "_link" not in cls.__dict__:
            raise AttributeError(name)
        link: _Link = type.__getattribute__(cls, "_link")
        return link.named(name, link.request("getattr", cls, name))

    def __setattr__(cls, name: str, value: Any) -> None:
        type.__getattribute__(cls, "_link").request("setattr", cls, name, value)

    def __iter__(cls) -> Any:
        return type.__getattribute__(cls, "_link").request("iter", cls)

    def __len__(cls) -> int:
        return int(type.__getattribute__(cls, "_link").request("len", cls))

    def __getitem__(cls, key: Any) -> Any:
        return type.__getattribute__(cls, "_link").request("getitem", cls, key)


class _Answering(metaclass=_StandInType):
    """Base of stand-ins that are plain data or exceptions here; the program's process gives their other attributes."""

    def __getattr__(self, name: str) -> Any:
        attributes = object.__getattribute__(self, "__dict__")
        if name.startswith("__") or "_link" not in attributes:
            raise AttributeError(name)
        return attributes["_link"].request("getattr", self, name)


class StandIn(metaclass=_StandInType):
    """Stands in for an object of the program that is not plain data."""

    _link: _Link
    _made_by_tests: bool

    def __getattr__(self, name: str) -> Any:
        return self._link.request("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.request("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._link.request("delattr", self, name)

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self._link.request("call", self, *arguments, settings=settings)

    def __iter__(self) -> Any:
        return self._link.request("iter", self)

    def __contains__(self, item: Any) -> bool:
        if self._made_by_tests or _number(item) is not None:
            return bool(self._link.request("contains", self, item))
        return any(held is item or held == item for held in self)

    def __reduce__(self) -> Any:
        raise TypeError("objects of the program cannot be pickled by tests")

    def __copy__(self) -> Any:
        return self._copied("copy")

    def __deepcopy__(self, memo: Any) -> Any:
        return self._copied("deepcopy")

    def _copied(self, how: str) -> Any:
        import copy

        copied = self._link.request("call", getattr(copy, how), self)
        return self._link.made_by_tests(copied) if self._made_by_tests else copied


def _forwarded(what: str) -> Callable[..., Any]:
    """A special method that may always be forwarded, since its operands are keys, indices or formats."""

    def method(self: StandIn, *operands: Any) -> Any:
        return self._link.request(what, self, *operands)

    return method


def _by_name(name: str) -> Callable[..., Any]:
    """A special method that looks up the method of that name on the program's object and calls it."""

    def method(self: StandIn, *operands: Any) -> Any:
        return self._link.request("getattr", self, name)(*operands)

    return method


def _exit(self: StandIn, error_type: Any, error: Any, traceback: Any) -> Any:
    """__exit__ without the traceback, which holds the tests' own frames."""
    return self._link.request("getattr", self, "__exit__")(error_type, error, None)


async def _exit_async(self: StandIn, error_type: Any, error: Any, traceback: Any) -> Any:
    return await self._link.request("getattr", self, "__aexit__")(error_type, error, None)


def _fetched(name: str) -> property:
    """An attribute that the stand-in's class has, too, and that must come from the program's object instead."""
    return property(lambda self: self._link.request("getattr", self, name))


def _in_place(what: str) -> Callable[..., Any]:
    ask = _binary(what, reflected=False)

    def method(self: StandIn, other: Any) -> Any:
        result = ask(self, other)
        return self if result is not NotImplemented and _number(result) == _number(self) else result

    return method


def _binary(what: str, reflected: bool) -> Callable[..., Any]:
    """An operator, forwarded only if the tests made the object or the other operand is the program's, too."""

    def method(self: StandIn, other: Any) -> Any:
        if not self._made_by_tests and _number(other) is None:
            return NotImplemented
        operands = (other, self) if reflected else (self, other)
        result = self._link.request(what, *operands)
        return self._link.made_by_tests(result) if self._made_by_tests else result

    return method


def _compared(what: str) -> Callable[..., Any]:
    ask = _binary(what, reflected=False)

    def method(self: StandIn, other: Any) -> Any:
        result = ask(self, other)
        if result is not NotImplemented:
            return result
        plain = self._link.request("plain", self)  # contents of an object of a subclass of list, dict or set
        if plain is None:
            return NotImplemented
        return getattr(plain, f"__{what}__")(other)

    return method


def _define_special_methods() -> None:
    methods: dict[str, Any] = {}
    for what in ("len", "next", "str", "repr", "hash", "bool", "int", "float", "index", "round", "abs", "neg", "pos",
                 "invert", "format", "getitem", "setitem", "delitem", "reversed", "dir", "complex"):  # fmt: skip
        methods[what] = _forwarded(what)
    for what in ("enter", "missing", "trunc", "floor", "ceil", "aenter", "aiter", "anext"):
        methods[what] = _by_name(f"__{what}__")
    methods["exit"], methods["aexit"] = _exit, _exit_async
    for what in ("doc", "annotations"):
        methods[what] = _fetched(f"__{what}__")
    for what in _COMPARISONS:
        methods[what] = _compared(what)
    for what in _ARITHMETIC:
        operation = f"{what}_" if what in ("and", "or") else what
        methods[what] = _binary(operation, reflected=False)
        methods[f"r{what}"] = _binary(operation, reflected=True)
        if what != "divmod":
            methods[f"i{what}"] = _in_place(f"i{what}")
    for name, method in methods.items():
        type.__setattr__(StandIn, f"__{name}__", method)


_define_special_methods()


# ------------------------------------------------------------------------------------------------------ running tests


class _Program(ModuleType):
    """Stands in for the program's module, for tests that import it."""

    _link: _Link

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.named(name, self._link.request("get", name))


def run(tests: dict[str, Any], replies_fd: int, requests_fd: int) -> bool:
    """Run tests to their end.

    Args:
        tests: source, name (of the program's module), prompt and entry_point.
        replies_fd: read end of the pipe from the program's process.
        requests_fd: write end of the pipe to it.

    Returns:
        Whether they passed: they ended without an exception, or as unittest.main() does after success.

    Raises:
        ProtocolError: if the program's process ended first.
    """
    link = _Link(Pipe(replies_fd, requests_fd))
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    program = _Program(tests["name"])
    program._link = link
    sys.modules[tests["name"]] = program
    code = compile(tests["source"], "tests.py", "exec", dont_inherit=True)
    link.meant_as_classes = names_meant_as_classes(
        tests["source"], completed(tests["prompt"]) or "", tests["entry_point"]
    )
    try:
        held = set(link.request("names"))
        given = _given_by_the_prompt(tests["prompt"], tests["entry_point"])
        for name in sorted((_names_in(code) | _names_in(given)) & held):
            setattr(module, name, link.named(name, link.request("get", name)))
        exec(given, vars(module))
        exec(code, vars(module))
    except SystemExit as end:  # unittest.main() raises it
        return end.code in (None, 0, False)
    except Exception:  # noqa: BLE001 - a test that fails
        return False
    return True


def _names_in(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_in(constant)
    return names


def _given_by_the_prompt(prompt: str, entry_point: str) -> CodeType:
    """Code of the prompt's imports and finished functions, which tests use in place of the program's of that name."""
    import ast

    tree = ast.parse(completed(prompt) or "")
    given = [
        node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) or _is_finished(node, entry_point)
    ]
    return compile(ast.Module(given, []), "prompt.py", "exec", dont_inherit=True)


def _is_finished(node: Any, entry_point: str) -> bool:
    import ast

    if not isinstance(node, ast.FunctionDef) or node.name == entry_point:
        return False
    return not all(
        isinstance(statement, ast.Pass | ast.Raise)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in node.body
    )
