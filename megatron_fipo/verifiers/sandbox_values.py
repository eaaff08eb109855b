"""Exchanges values between two processes, one of them untrusted: plain data by value, everything else by reference.

A message is JSON. Numbers that JSON holds exactly, texts, True, False and None stand for themselves; any other value is
a list that begins with a tag. Lists, dictionaries and other mutable containers are in a table next to the values, which
refer to them by index: so one list that is referenced twice stays one, a list may contain itself, and a reply can say
which containers of the request were changed.

Values that arrive have Python's own types, whatever the sender says: a result with its own == is compared as data.
"""

from __future__ import annotations

import json
import os
import sys
from types import BuiltinFunctionType, FunctionType, ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

ATOMS = {int, float, str, bool, type(None)}
_LARGEST = 1 << 62
"""Integers from here on are sent in hexadecimal, since converting decimal digits takes quadratic time."""

SHARED_MODULES = frozenset(
    [
        "builtins", "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq",
        "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "typing",
    ]
)  # fmt: skip
"""Modules whose functions and classes the program's process may name; the tests' process uses its own."""


class ProtocolError(BaseException):
    """The other process sent a malformed message or has ended. It is no Exception, so that tests do not catch it."""


class Pipe:
    """Messages over two descriptors: eight bytes of length, then JSON."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message, separators=(",", ":"), check_circular=False).encode()
        rest = memoryview(len(data).to_bytes(8, "big") + data)
        try:
            while rest:
                rest = rest[os.write(self._write_fd, rest) :]
        except OSError as error:
            raise ProtocolError("the other side has ended") from error

    def receive(self) -> dict[str, Any]:
        data = self._read(int.from_bytes(self._read(8), "big"))
        try:
            message = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ProtocolError("no message") from error
        if not isinstance(message, dict):
            raise ProtocolError("no message")
        return message

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            chunk = os.read(self._read_fd, min(count - len(data), 1 << 20))
            if not chunk:
                raise ProtocolError("the other side has ended")
            data += chunk
        return bytes(data)


def container_kind(value: Any) -> str:
    """The tag of a mutable container; empty for anything else."""
    cls = type(value)
    kind = _BUILTIN_CONTAINERS.get(cls, "")
    if not kind and cls.__module__ == "collections" and cls is getattr(sys.modules[cls.__module__], cls.__name__, None):
        kind = _COLLECTIONS.get(cls.__name__, "")
    return kind


_BUILTIN_CONTAINERS: dict[type, str] = {list: "list", dict: "dict", set: "set", bytearray: "bytearray"}
_COLLECTIONS = {"deque": "deque", "Counter": "Counter", "OrderedDict": "OrderedDict", "defaultdict": "defaultdict"}


class Encoder:
    """Encodes the values of one message.

    Args:
        by_reference: encodes values that are not plain data.
        known: containers that the other process's table has already, in its order.
    """

    def __init__(self, by_reference: Callable[[Any], list[Any]], known: Sequence[Any] = ()) -> None:
        self._by_reference = by_reference
        self.objects: list[Any] = list(known)
        self._place = {id(value): place for place, value in enumerate(self.objects)}
        self._num_known = len(self.objects)

    def encode(self, value: Any) -> Any:
        """Encode one value; `table` gives the contents of its containers."""
        cls = type(value)
        if cls in ATOMS:
            return ["int", hex(value)] if cls is int and not -_LARGEST < value < _LARGEST else value
        if container_kind(value):
            place = self._place.get(id(value))
            if place is None:
                place = self._place[id(value)] = len(self.objects)
                self.objects.append(value)
            return ["at", place]
        if cls is tuple or cls is frozenset:
            return [cls.__name__, self._items(value)]
        if cls is bytes:
            return ["bytes", value.decode("latin-1")]
        if cls is complex:
            return ["complex", value.real, value.imag]
        if cls is range or cls is slice:
            return [cls.__name__, [self.encode(part) for part in (value.start, value.stop, value.step)]]
        if value is Ellipsis:
            return ["..."]
        if cls is _DICT_KEYS or cls is _DICT_ITEMS:
            return ["keys" if cls is _DICT_KEYS else "items", self._items(value)]
        parts = _standard_parts(value)
        if parts is not None:
            return [cls.__name__, [self.encode(part) for part in parts]]
        return self._by_reference(value)

    def contents(self, value: Any) -> list[Any]:
        """Encode a container: its tag, then its encoded items."""
        kind = container_kind(value)
        if kind == "bytearray":
            return [kind, value.decode("latin-1")]
        if kind == "deque":
            return [kind, self._items(value), value.maxlen]
        if kind in ("list", "set"):
            return [kind, self._items(value)]
        return [kind, self._items(part for item in value.items() for part in item)]

    def table(self) -> list[list[Any]]:
        """The contents of the containers encoded so far and, recursively, of those in them."""
        rows: list[list[Any]] = []
        while self._num_known + len(rows) < len(self.objects):
            rows.append(self.contents(self.objects[self._num_known + len(rows)]))
        return rows

    def _items(self, values: Any) -> list[Any]:
        items = list(values)
        types = set(map(type, items))
        if types <= ATOMS and (int not in types or all(-_LARGEST < i < _LARGEST for i in items if type(i) is int)):
            return items
        return [self.encode(item) for item in items]


class Decoder:
    """Decodes the values of one message.

    Args:
        rows: the message's table.
        by_reference: decodes values that are not plain data; raises ProtocolError for unknown ones.
        known: containers with the first indices, before those of the table.
    """

    def __init__(self, rows: Any, by_reference: Callable[[list[Any]], Any], known: Sequence[Any] = ()) -> None:
        self._by_reference = by_reference
        self.objects: list[Any] = list(known)
        first = len(self.objects)
        try:
            self.objects += [_empty(row) for row in rows]
            for value, row in zip(self.objects[first:], rows, strict=True):
                self.fill(value, row)
        except (TypeError, ValueError, IndexError, LookupError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"a malformed message: {error}") from error

    def decode(self, coded: Any) -> Any:
        """Decode one value.

        Raises:
            ProtocolError: if it is malformed.
        """
        if not isinstance(coded, list):
            return coded
        try:
            return self._tagged(coded)
        except (TypeError, ValueError, IndexError, LookupError, ArithmeticError, RecursionError) as error:
            raise ProtocolError(f"a malformed value: {error}") from error

    def fill(self, value: Any, row: list[Any]) -> None:
        """Replace a container's contents by a row's."""
        kind = row[0]
        if kind == "bytearray":
            value[:] = row[1].encode("latin-1")
            return
        items = [self.decode(item) for item in row[1]]
        if kind == "list":
            value[:] = items
            return
        value.clear()
        if kind == "deque":
            value.extend(items)
        elif kind == "set":
            # A set's order depends on how it was built, and most are built from a constant. Keep the sender's order if
            # building from a frozenset or item by item gives it.
            value.update(frozenset(items))
            if any(a is not b for a, b in zip(value, items, strict=True)):
                value.clear()
                value.update(items)
        else:
            for key, item in zip(items[::2], items[1::2], strict=True):
                value[key] = item

    def _tagged(self, coded: list[Any]) -> Any:
        tag = coded[0]
        if tag == "at":
            return self.objects[coded[1]]
        if tag in ("tuple", "frozenset"):
            return (tuple if tag == "tuple" else frozenset)(self.decode(item) for item in coded[1])
        if tag == "int":
            return int(coded[1], 16)
        if tag == "bytes":
            return coded[1].encode("latin-1")
        if tag == "complex":
            return complex(coded[1], coded[2])
        if tag in ("range", "slice"):
            return (range if tag == "range" else slice)(*(self.decode(part) for part in coded[1]))
        if tag == "...":
            return ...
        if tag == "keys":
            return dict.fromkeys(self.decode(item) for item in coded[1]).keys()
        if tag == "items":
            return dict(self.decode(item) for item in coded[1]).items()
        if tag in _STANDARD:
            return _standard_value(tag, [self.decode(part) for part in coded[1]])
        return self._by_reference(coded)


_DICT_KEYS: type = type({}.keys())
_DICT_ITEMS: type = type({}.items())

_STANDARD = {
    "Decimal": "decimal",
    "Fraction": "fractions",
    "datetime": "datetime",
    "date": "datetime",
    "time": "datetime",
    "timedelta": "datetime",
}
"""Classes of the standard library whose objects are sent as constructor arguments, with their modules."""


def _standard_parts(value: Any) -> list[Any] | None:
    """Arguments from which an object of a `_STANDARD` class can be made again; None for anything else."""
    cls = type(value)
    module = _STANDARD.get(cls.__name__)
    if module is None or cls.__module__ != module or cls is not getattr(sys.modules.get(module), cls.__name__, None):
        return None
    if cls.__name__ == "Decimal":
        return [str(value)]
    if cls.__name__ == "Fraction":
        return [value.numerator, value.denominator]
    if cls.__name__ == "timedelta":
        return [value.days, value.seconds, value.microseconds]
    return [value.isoformat()]


def _standard_value(name: str, parts: list[Any]) -> Any:
    if not all(type(part) in (int, str) for part in parts):
        raise ProtocolError(f"a malformed {name}")
    cls = getattr(__import__(_STANDARD[name]), name)
    return cls.fromisoformat(*parts) if name in ("datetime", "date", "time") else cls(*parts)


def _empty(row: list[Any]) -> Any:
    kind = row[0]
    for cls, name in _BUILTIN_CONTAINERS.items():
        if name == kind:
            return cls()
    import collections

    if kind == "deque":
        return collections.deque(maxlen=row[2])
    return getattr(collections, _COLLECTIONS[kind])()


def standard_name(value: Any) -> list[Any] | None:
    """Encode a module of the standard library, or a function or class in one, by name; None for anything else."""
    if isinstance(value, ModuleType):
        return ["module", value.__name__] if value.__name__ in sys.stdlib_module_names else None
    if not isinstance(value, type | FunctionType | BuiltinFunctionType):
        name = getattr(value, "_name", None)  # objects of typing such as List
        if type(value).__module__ != "typing" or not isinstance(name, str):
            return None
        return ["named", "typing", name] if getattr(sys.modules["typing"], name, None) is value else None
    module = {"_operator": "operator", "_heapq": "heapq", "_bisect": "bisect", "_functools": "functools"}.get(
        str(value.__module__), str(value.__module__)
    )
    if module.partition(".")[0] not in sys.stdlib_module_names and module != "builtins":
        return None
    name = str(value.__name__)
    return ["named", module, name] if getattr(sys.modules.get(module), name, None) is value else None


def standard_object(coded: list[Any], modules: frozenset[str]) -> Any:
    """Find the module, function or class that `standard_name` encoded.

    Args:
        coded: the encoded value.
        modules: modules that may be named; otherwise the program's process could have any module imported here.

    Raises:
        ProtocolError: for another module.
        AttributeError: for a name that is not in the module.
    """
    module = coded[1]
    if module not in modules:
        raise ProtocolError(f"a value of the module {module!r}")
    imported = __import__(module)
    if coded[0] == "module":
        return imported
    return getattr(imported, coded[2])
