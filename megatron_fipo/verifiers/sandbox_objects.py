"""The program's process after the program has run: answers requests of the tests' process (`sandbox_tests`)."""

from __future__ import annotations

import builtins
import io
import operator
import sys
from types import CoroutineType, ModuleType

from megatron_fipo.verifiers.sandbox_values import (
    SHARED_MODULES,
    Decoder,
    Encoder,
    Pipe,
    container_kind,
    standard_name,
    standard_object,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PLAIN_BASES = (int, float, str, tuple, bytes, frozenset)
_AWAITED_OF_GENERATORS = ("async_generator_asend", "async_generator_athrow")
_ALL_STANDARD = frozenset(sys.stdlib_module_names)


class _Callback:
    """A function in the tests' process, with its __name__ and the like, which decorators copy."""

    def __init__(self, server: _Server, number: int, names: dict[str, Any]) -> None:
        self._server, self.number = server, number
        vars(self).update(names)

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self._server.call_back(self, arguments, settings)


class _Server:
    """Holds the program's objects that the tests' process refers to by number, and does what it asks with them."""

    def __init__(self, module: ModuleType, pipe: Pipe) -> None:
        self._module = module
        self._pipe = pipe
        self._objects: list[Any] = []
        self._number_of: dict[int, int] = {}
        self._loop: Any = None

    # ------------------------------------------------------------------------------------------------------- encoding

    def reference(self, value: Any) -> list[Any]:
        """Encode a value that is not plain data: by its name, by its number and class, or by its number alone."""
        if isinstance(value, _Callback):
            return ["yours", value.number]
        named = standard_name(value)
        if named is not None and named[1] in SHARED_MODULES:
            return named
        number = self._number(value)
        if isinstance(value, type):
            return ["class", number] if self._is_own(value) else ["object", number, -1]
        if isinstance(value, CoroutineType) or type(value).__name__ in _AWAITED_OF_GENERATORS:
            return ["coroutine", number]
        cls = type(value)
        class_number = self._number(cls) if self._is_own(cls) else -1
        if isinstance(value, BaseException):
            return ["exception", number, class_number, self._exception_name(cls), self._exception_arguments(value)]
        if class_number >= 0:
            for base in _PLAIN_BASES:
                if isinstance(value, base):
                    return ["value", number, class_number, Encoder(self.reference).encode(_plain(base, value))]
        return ["object", number, class_number]

    def _number(self, value: Any) -> int:
        number = self._number_of.get(id(value))
        if number is None:
            number = self._number_of[id(value)] = len(self._objects)
            self._objects.append(value)  # keeps the object alive, so that its id is not used again
        return number

    @staticmethod
    def _is_own(cls: type) -> bool:
        return cls.__module__.partition(".")[0] not in _ALL_STANDARD

    @staticmethod
    def _exception_name(cls: type) -> str:
        return next(base.__name__ for base in cls.__mro__ if base.__module__ == "builtins")

    def _exception_arguments(self, error: BaseException) -> list[Any]:
        """The arguments of an exception; those that are not plain data become text."""
        plain = (int, float, str, bool, type(None))
        return [argument if type(argument) in plain else str(argument) for argument in error.args]

    # ------------------------------------------------------------------------------------------------------- requests

    def serve(self) -> None:
        """Answer requests until the tests' process ends, which raises ProtocolError."""
        while True:
            self._pipe.send(self._answer(self._pipe.receive()))

    def call_back(self, callback: _Callback, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        """Call a function in the tests' process, answering the requests that it makes meanwhile."""
        encoder = Encoder(self.reference)
        request: dict[str, Any] = {
            "do": "call",
            "target": callback.number,
            "arguments": [encoder.encode(argument) for argument in arguments],
            "settings": {name: encoder.encode(value) for name, value in settings.items()},
        }
        self._pipe.send({**request, "table": encoder.table()})
        while True:
            message = self._pipe.receive()
            if "do" not in message:
                break
            self._pipe.send(self._answer(message))
        decoder = Decoder(message["table"], self._referred, encoder.objects)
        if "error" in message:
            raise decoder.decode(message["error"])
        return decoder.decode(message["value"])

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        decoder = Decoder(request["table"], self._referred)
        printed, stdout = io.StringIO(), sys.stdout
        sys.stdout = printed
        try:
            result, outcome = self._do(request, decoder), "value"
        except BaseException as error:  # noqa: BLE001 - whatever the program raises is its answer
            result, outcome = error, "error"
        finally:
            sys.stdout = stdout
        encoder = Encoder(self.reference, decoder.objects)
        reply: dict[str, Any] = {outcome: encoder.encode(result)}
        rows = ((place, encoder.contents(value)) for place, value in enumerate(decoder.objects))
        reply["changed"] = [[place, row] for place, row in rows if row != request["table"][place]]
        return {**reply, "table": encoder.table(), "printed": printed.getvalue()}

    def _do(self, request: dict[str, Any], decoder: Decoder) -> Any:
        what = request["do"]
        arguments = [decoder.decode(argument) for argument in request["arguments"]]
        if what == "names":
            return [name for name in vars(self._module) if not name.startswith("__")]
        if what == "get":
            return getattr(self._module, *arguments)
        if what == "call":
            settings = {name: decoder.decode(value) for name, value in request["settings"].items()}
            return arguments[0](*arguments[1:], **settings)
        if what == "class":
            return self._describe(arguments[0])
        if what == "plain":
            return _plain_container(arguments[0])
        if what == "await":
            return self._awaited(arguments[0])
        return (getattr(operator, what, None) or getattr(builtins, what))(*arguments)

    def _awaited(self, awaitable: Any) -> Any:
        """Await in one event loop for all requests, since asynchronous generators and locks outlive a request."""
        import asyncio

        async def run() -> Any:
            return await awaitable

        self._loop = self._loop or asyncio.new_event_loop()
        return self._loop.run_until_complete(run())

    def _describe(self, cls: type) -> list[Any]:
        """Describe a class.

        Returns:
            Its name, qualified name and module; the name of its plain or exception base, or ""; its bases among the
            program's classes; its docstring; and whether a call makes a new object.
        """
        bases = [base for base in cls.__bases__ if self._is_own(base)]
        built_in = next((base.__name__ for base in cls.__mro__ if base in _PLAIN_BASES), "")
        if issubclass(cls, BaseException):
            built_in = self._exception_name(cls)
        enum = sys.modules.get("enum")
        looks_up = enum is not None and issubclass(cls, enum.Enum)
        return [cls.__name__, cls.__qualname__, cls.__module__, built_in, bases, cls.__doc__, not looks_up]

    def _referred(self, coded: list[Any]) -> Any:
        if coded[0] == "yours":
            return self._objects[coded[1]]
        if coded[0] == "callback":
            return _Callback(self, coded[1], coded[2])
        if coded[0] == "exception":
            return getattr(builtins, coded[1])(*coded[2])
        return standard_object(coded, _ALL_STANDARD)


def _plain(base: type, value: Any) -> Any:
    """Convert a value to its plain base type, bypassing methods that its subclass overrides."""
    if base is tuple:
        return tuple(tuple.__iter__(value))
    if base is frozenset:
        return frozenset(frozenset.__iter__(value))
    if base is int:
        return int.__index__(value)
    if base is float:
        return float.__float__(value)
    return str.__str__(value) if base is str else bytes.__getitem__(value, slice(None))


def _plain_container(value: Any) -> Any:
    """Convert an object of a subclass of list, dict or set to the plain type; None for anything else."""
    if container_kind(value):
        return None
    if isinstance(value, dict):
        return dict(dict.items(value))
    if isinstance(value, list):
        return list(list.__iter__(value))
    return set(set.__iter__(value)) if isinstance(value, set) else None


def serve(module: ModuleType, requests_fd: int, replies_fd: int) -> None:
    """Answer the requests of the tests' process until it ends, which raises ProtocolError."""
    _Server(module, Pipe(requests_fd, replies_fd)).serve()
