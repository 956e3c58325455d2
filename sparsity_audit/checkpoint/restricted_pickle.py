"""Read a pickle as data: nothing it names is imported, called or built.

Contract: an interpreter of the opcodes that pickle protocols 2 to 5 use for plain data. A global becomes a
`Global`, two strings; it must stand in the caller's vocabulary or the pickle is refused where it is named. A
call runs the caller's function of inert arguments. Time and memory are linear in the size of the pickle and
bounded by `MAX_PICKLE_BYTES` and `MAX_OPERATIONS`: no length is believed before the bytes are there, the memo
is a dict (a huge index costs nothing), only flat keys are hashed (a nested tuple that shares its parts takes
exponential time to hash) and no large number (many can share one hash, which makes a dict quadratic), and
copies are charged to the same budget.

Source: the opcodes of CPython's `pickletools`; the idea of a closed vocabulary is that of
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from sparsity_audit.errors import CorruptCheckpointError, UnsafePickleError

__all__ = [
    "LEAF",
    "MAX_OPERATIONS",
    "MAX_PICKLE_BYTES",
    "Call",
    "Global",
    "Leaf",
    "MalformedError",
    "Record",
    "load_pickle",
]

MAX_PICKLE_BYTES = 32_000_000
"""A tensor takes about 110 bytes of pickle."""

MAX_OPERATIONS = 6_000_000
"""A tensor takes about 45 operations; an operation adds at most about 100 bytes of objects."""

_MAX_INTEGER_BYTES = 16


class MalformedError(Exception):
    """A value in the pickle is not what its place demands; becomes a CorruptCheckpointError."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle refers to, never resolved.

    Args:
        path: Module and qualified name, joined by a dot.
    """

    path: str


class Leaf:
    """Something that was in the pickle, that we do not need, and that was not built."""

    __slots__ = ()


LEAF: Final = Leaf()


class Record:
    """An object of a class that the pickle names: its arguments and its state; the class stays a name.

    It is hashed by identity, so that it can be a key and costs what a key costs.

    Args:
        path: Module and qualified name of the class.
        arguments: What it was called with.
    """

    __slots__ = ("arguments", "path", "state")

    def __init__(self, path: str, arguments: tuple[object, ...]) -> None:
        self.path, self.arguments = path, arguments
        self.state: object = None

    def get(self, name: str) -> object:
        """An attribute, as the state or the slots of the state have it; None where there is none."""
        parts = self.state if type(self.state) is tuple else (self.state,)
        return next((p[name] for p in parts if isinstance(p, dict) and name in p), None)


Call = Callable[[tuple[object, ...]], object]


def load_pickle(
    data: bytes,
    *,
    subject: str,
    calls: Mapping[str, Call],
    constants: frozenset[str],
    persistent: Callable[[object], object],
    inert: tuple[str, ...] = (),
    limits: tuple[int, int] = (MAX_PICKLE_BYTES, MAX_OPERATIONS),
) -> object:
    """The value a pickle describes, made of dicts, lists, tuples, scalars and what `calls` return.

    Args:
        data: The pickle.
        subject: What messages call it.
        calls: What a call of a global becomes, by path, as a function of the arguments. It raises
            `MalformedError` for arguments it does not expect.
        constants: Paths that may be named, but not called.
        persistent: What a persistent id becomes; raises like `calls`.
        inert: What paths may begin with whose objects become a `Record`.
        limits: Most bytes and most operations.

    Raises:
        UnsafePickleError: A global outside the vocabulary, or an opcode that would run code.
        CorruptCheckpointError: Not a pickle of plain data, truncated, or beyond the bounds.
    """
    if len(data) > limits[0]:
        raise CorruptCheckpointError(subject, f"pickle of {len(data)} bytes", expected=f"at most {limits[0]}")
    machine = _Machine(
        data,
        subject=subject,
        calls=calls,
        constants=constants,
        persistent=persistent,
        inert=inert,
        budget=limits[1],
    )
    try:
        return machine.run()
    except MalformedError as error:
        raise machine.corrupt(str(error)) from error
    except (IndexError, KeyError) as error:
        raise machine.corrupt("uses a value that it never made") from error
    except (struct.error, UnicodeDecodeError) as error:
        raise machine.corrupt(f"cannot be decoded ({type(error).__name__})") from error


class _Machine:
    """Stack, marks and memo of one run."""

    def __init__(
        self,
        data: bytes,
        *,
        subject: str,
        calls: Mapping[str, Call],
        constants: frozenset[str],
        persistent: Callable[[object], object],
        inert: tuple[str, ...],
        budget: int,
    ) -> None:
        self.data, self.subject = data, subject
        self.calls, self.constants, self.persistent = calls, constants, persistent
        self.position, self.inert = 0, inert
        self.budget = self.allowed = budget
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        data, operations = self.data, _OPERATIONS
        size = len(data)
        while True:
            if self.position >= size:
                raise MalformedError("ends without a result")
            code = data[self.position]
            self.position += 1
            if code == _STOP:
                return self.stack.pop()
            self.budget -= 1
            if self.budget < 0:
                raise MalformedError(f"takes more than {self.allowed} operations")
            operation = operations.get(code)
            if operation is None:
                raise MalformedError(f"uses opcode {bytes([code])!r}, which plain data does not need")
            operation(self)

    def corrupt(self, found: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            self.subject,
            f"pickle {found}, near byte {self.position}",
            remedy="the file is damaged or was not written by torch.save; make or download it again",
        )

    def take(self, count: int) -> bytes:
        stop = self.position + count
        if stop > len(self.data):
            raise MalformedError("is truncated")
        taken = self.data[self.position : stop]
        self.position = stop
        return taken

    def number(self, layout: struct.Struct) -> int:
        return layout.unpack(self.take(layout.size))[0]

    def line(self) -> str:
        stop = self.data.find(b"\n", self.position)
        if stop < 0:
            raise MalformedError("is truncated")
        line = self.data[self.position : stop]
        self.position = stop + 1
        return line.decode("utf-8")

    def to_mark(self) -> list[object]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def find(self, module: str, name: str) -> Global:
        path = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if path not in self.calls and path not in self.constants and not self._is_inert(path):
            raise UnsafePickleError(
                self.subject,
                f"pickle asks for {path[:120]!r}; nothing was executed",
                expected="tensors, numbers and text only",
                remedy="if you trust the file: torch.load it, torch.save its state dict alone",
            )
        return Global(path)

    def call(self, function: object, arguments: object) -> object:
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise MalformedError("calls something that is not a function")
        call = self.calls.get(function.path)
        if call is None and self._is_inert(function.path):
            return Record(function.path, arguments)
        if call is None:
            raise MalformedError(f"calls {function.path}, which is not a function")
        self.budget -= sum(len(a) for a in arguments if isinstance(a, (list, dict, tuple)))
        return call(arguments)

    def _is_inert(self, path: str) -> bool:
        return bool(self.inert) and path.startswith(self.inert)

    def set_items(self, target: object, items: list[object]) -> None:
        if isinstance(target, Leaf | Record):
            return
        if type(target) is not dict or len(items) % 2:
            raise MalformedError("sets items of something that is not a dict")
        for i in range(0, len(items), 2):
            key = items[i]
            if type(key) is tuple:
                if len(key) > 16 or not all(_is_cheap_key(k) for k in key):
                    raise MalformedError("uses a nested tuple as a key")
            elif not _is_cheap_key(key):
                kind = "large number" if isinstance(key, int) else type(key).__name__
                raise MalformedError(f"uses a {kind} as a key")
            target[key] = items[i + 1]

    def extend(self, target: object, items: list[object]) -> None:
        if isinstance(target, Leaf | Record):
            return
        if type(target) is not list:
            raise MalformedError("appends to something that is not a list")
        target.extend(items)


_RANDOMLY_HASHED = (str, bytes, type(None), Global, Record)
_MAX_INTEGER_KEY = 2**31
_STOP = ord(".")
_U1, _U2, _U4, _U8 = (struct.Struct(code) for code in ("<B", "<H", "<I", "<Q"))
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")

Operation = Callable[[_Machine], None]
_OPERATIONS: dict[int, Operation] = {}


def _operation(*codes: str) -> Callable[[Operation], Operation]:
    def register(function: Operation) -> Operation:
        for code in codes:
            _OPERATIONS[ord(code)] = function
        return function

    return register


def _register_pushes() -> None:
    # Each entry makes a fresh value: two uses of EMPTY_DICT are two dicts.
    makers: dict[str, Callable[[_Machine], object]] = {
        "N": lambda _: None,
        "\x88": lambda _: True,
        "\x89": lambda _: False,
        ")": lambda _: (),
        "]": lambda _: [],
        "}": lambda _: {},
        "\x8f": lambda _: LEAF,
        "J": lambda u: u.number(_I4),
        "K": lambda u: u.number(_U1),
        "M": lambda u: u.number(_U2),
        "G": lambda u: _F8.unpack(u.take(8))[0],
        "\x8a": lambda u: _integer(u.take(u.number(_U1))),
        "\x8b": lambda u: _integer(u.take(u.number(_U4))),
        "X": lambda u: u.take(u.number(_U4)).decode("utf-8"),
        "\x8c": lambda u: u.take(u.number(_U1)).decode("utf-8"),
        "\x8d": lambda u: u.take(u.number(_U8)).decode("utf-8"),
        # Python 2 strings, which held names.
        "U": lambda u: u.take(u.number(_U1)).decode("utf-8"),
        "T": lambda u: u.take(u.number(_U4)).decode("utf-8"),
        "C": lambda u: u.take(u.number(_U1)),
        "B": lambda u: u.take(u.number(_U4)),
        "\x8e": lambda u: u.take(u.number(_U8)),
        "\x96": lambda u: u.take(u.number(_U8)),
        "h": lambda u: u.memo[u.number(_U1)],
        "j": lambda u: u.memo[u.number(_U4)],
        "c": lambda u: u.find(u.line(), u.line()),
        "t": lambda u: tuple(u.to_mark()),
        "l": lambda u: u.to_mark(),
        "Q": lambda u: u.persistent(u.stack.pop()),
    }
    for code, make in makers.items():
        _OPERATIONS[ord(code)] = _push(make)


def _push(make: Callable[[_Machine], object]) -> Operation:
    def operation(u: _Machine) -> None:
        # First the value: making a tuple exchanges the stack.
        value = make(u)
        u.stack.append(value)

    return operation


def _is_cheap_key(key: object) -> bool:
    return isinstance(key, _RANDOMLY_HASHED) or (isinstance(key, int) and abs(key) < _MAX_INTEGER_KEY)


def _integer(raw: bytes) -> object:
    if len(raw) > _MAX_INTEGER_BYTES:
        return LEAF
    return int.from_bytes(raw, "little", signed=True)


@_operation("\x80")
def _protocol(u: _Machine) -> None:
    if not 2 <= u.number(_U1) <= 5:
        raise MalformedError("has an unknown protocol")


@_operation("\x95")
def _frame(u: _Machine) -> None:
    u.take(8)


@_operation("(")
def _mark(u: _Machine) -> None:
    u.marks.append(u.stack)
    u.stack = []


@_operation("0")
def _pop(u: _Machine) -> None:
    u.stack.pop()


@_operation("1")
def _pop_mark(u: _Machine) -> None:
    u.to_mark()


@_operation("\x85")
def _tuple1(u: _Machine) -> None:
    u.stack[-1] = (u.stack[-1],)


@_operation("\x86")
def _tuple2(u: _Machine) -> None:
    u.stack[-2:] = [(u.stack[-2], u.stack[-1])]


@_operation("\x87")
def _tuple3(u: _Machine) -> None:
    u.stack[-3:] = [(u.stack[-3], u.stack[-2], u.stack[-1])]


@_operation("q")
def _put1(u: _Machine) -> None:
    u.memo[u.number(_U1)] = u.stack[-1]


@_operation("r")
def _put4(u: _Machine) -> None:
    u.memo[u.number(_U4)] = u.stack[-1]


@_operation("\x94")
def _memoize(u: _Machine) -> None:
    u.memo[len(u.memo)] = u.stack[-1]


@_operation("a")
def _append(u: _Machine) -> None:
    item = u.stack.pop()
    u.extend(u.stack[-1], [item])


@_operation("e")
def _appends(u: _Machine) -> None:
    items = u.to_mark()
    u.extend(u.stack[-1], items)


@_operation("\x90")
def _add_items(u: _Machine) -> None:
    u.to_mark()
    if not isinstance(u.stack[-1], Leaf):
        raise MalformedError("adds to something that is not a set")


@_operation("\x91")
def _frozen_set(u: _Machine) -> None:
    u.to_mark()
    u.stack.append(LEAF)


@_operation("s")
def _set_item(u: _Machine) -> None:
    value, key = u.stack.pop(), u.stack.pop()
    u.set_items(u.stack[-1], [key, value])


@_operation("u")
def _set_items(u: _Machine) -> None:
    items = u.to_mark()
    u.set_items(u.stack[-1], items)


@_operation("\x93")
def _stack_global(u: _Machine) -> None:
    name, module = u.stack.pop(), u.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise MalformedError("names a global that is not text")
    u.stack.append(u.find(module, name))


@_operation("R", "\x81")
def _reduce(u: _Machine) -> None:
    arguments, function = u.stack.pop(), u.stack.pop()
    u.stack.append(u.call(function, arguments))


@_operation("b")
def _build(u: _Machine) -> None:
    # Attributes (`_metadata` of a state dict, tags on a parameter) are not values of tensors: dropped.
    state = u.stack.pop()
    if isinstance(u.stack[-1], Record):
        u.stack[-1].state = state
        return
    if isinstance(u.stack[-1], (str, int, float, list, tuple, Global, type(None))):
        raise MalformedError("sets attributes of something that has none")


@_operation("i")
def _instance(u: _Machine) -> None:
    u.find(u.line(), u.line())
    raise MalformedError("uses opcode b'i', which plain data does not need")


@_operation("\x82", "\x83", "\x84")
def _extension(u: _Machine) -> None:
    raise UnsafePickleError(
        u.subject,
        "pickle asks for a registered extension; nothing was executed",
        expected="tensors, numbers and text only",
    )


_register_pushes()
