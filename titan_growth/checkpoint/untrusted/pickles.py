"""Parses pickles without executing them.

A pickle is a program for a small stack machine, and two of its instructions call what the program names. Python's
unpickler can restrict the names, but not the rest: twenty bytes make it allocate gigabytes (a far index into the memo),
set attributes on admitted classes, or hash a tuple for longer than the age of the universe (nested in itself fifty
times). So this is a machine of its own. It knows only the instructions that data needs. The caller decides what an
admitted name stands for. Classes become inert `Record`s: a name, and the state the program wanted to put into an
instance. The result is larger than the program by at most a small factor, and nothing is traversed, compared or hashed
on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct, error
from typing import Any

MAX_DEPTH = 100
"""Of marks, that is of containers open at the same time."""
BYTES_PER_OBJECT = 6
"""Least bytes of program per container that it builds; DCP's have 11."""


class RefusedError(ValueError):
    """Untrusted input is not what it should be. The message says why, without naming the checkpoint."""


class Record:
    """Stands in for an instance of a class."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = None


@dataclass(frozen=True, eq=False, slots=True)
class Symbol:
    """What an admitted name stands for."""

    name: str
    call: Callable[[tuple[Any, ...]], Any] | None = None
    """Takes the arguments of a call; must be fast and must not keep or change them."""
    is_class: bool = False
    """Whether instances may be made, as records."""


Find = Callable[[str, str], Any]
"""(module, name) -> a `Symbol`, or a plain value. Raises RefusedError for names that are not admitted."""


def read_pickle(data: bytes, find: Find, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The value that a pickle (protocol 2 to 5) describes.

    Args:
        find: resolves global names.
        persistent: resolves persistent ids; None if there are none.

    Raises:
        RefusedError: if it is damaged, names a global that is not admitted, or uses an instruction data does not need.
    """
    machine = _Machine(data, find, persistent)
    try:
        return machine.run()
    except RefusedError:
        raise
    except (IndexError, error):
        raise RefusedError("is cut off or damaged") from None
    except (ValueError, TypeError) as problem:  # text that is not UTF-8, a dict instead of a list
        raise RefusedError(f"is damaged ({problem})") from None


_U1, _U2, _U4, _U8, _I4, _F8 = Struct("<B"), Struct("<H"), Struct("<I"), Struct("<Q"), Struct("<i"), Struct(">d")


class _Machine:
    """One method per instruction; `data[position]` is the next byte to read."""

    def __init__(self, data: bytes, find: Find, persistent: Callable[[Any], Any] | None) -> None:
        self.data = data
        self.find = find
        self.persistent = persistent
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: list[Any] = []
        self.budget = len(data) // BYTES_PER_OBJECT + 100
        """Containers it may still build."""

    def run(self) -> Any:
        data, steps = self.data, _STEPS
        while True:
            code = data[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                break
            step = steps[code]
            if step is None:
                raise RefusedError(f"holds the instruction {bytes([code])!r}, which data does not need")
            step(self)
            if self.budget < 0:
                raise RefusedError("builds more than its size accounts for")
        value = self.stack.pop()
        if self.stack or self.marks:
            raise RefusedError("is damaged (it ends before it is finished)")
        return value

    # ---- bytes ---------------------------------------------------------------------------------------------------

    def number(self, form: Struct) -> Any:
        (value,) = form.unpack_from(self.data, self.position)
        self.position += form.size
        return value

    def text(self, length: int) -> str:
        begin, end = self.position, self.position + length
        if end > len(self.data):
            raise RefusedError("is cut off or damaged")
        self.position = end
        return self.data[begin:end].decode()

    def line(self) -> str:
        text = self.text(self.data.index(b"\n", self.position) - self.position)
        self.position += 1
        return text

    # ---- instructions --------------------------------------------------------------------------------------------

    def protocol(self) -> None:
        version = self.data[self.position]
        self.position += 1
        if not 2 <= version <= 5:
            raise RefusedError(f"is a pickle of protocol {version}")

    def frame(self) -> None:
        self.number(_U8)  # a hint for reading ahead

    def byte(self) -> None:
        self.stack.append(self.data[self.position])
        self.position += 1

    def long1(self) -> None:
        length = self.data[self.position]
        begin = self.position + 1
        self.position = begin + length
        if length > 16 or self.position > len(self.data):
            raise RefusedError(f"holds a number of {length} bytes")
        self.stack.append(int.from_bytes(self.data[begin : self.position], "little", signed=True))

    def short_text(self) -> None:
        length = self.data[self.position]
        self.position += 1
        self.stack.append(self.text(length))

    def memoize(self) -> None:
        self.memo.append(self.stack[-1])

    def put(self, index: int) -> None:
        # Picklers number memo entries consecutively; a far index would only allocate memory.
        if index > len(self.memo):
            raise RefusedError(f"skips to the memo's place {index}")
        if index == len(self.memo):
            self.memo.append(self.stack[-1])
        else:
            self.memo[index] = self.stack[-1]

    def byte_get(self) -> None:
        self.stack.append(self.memo[self.data[self.position]])
        self.position += 1

    def mark(self) -> None:
        if len(self.marks) == MAX_DEPTH:
            raise RefusedError(f"is nested more than {MAX_DEPTH} times")
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def new(self, container: Any) -> None:
        self.budget -= 1
        self.stack.append(container)

    def top(self, length: int) -> list[Any]:
        items = self.stack[-length:]
        del self.stack[-length:]
        return items

    def tuple_of(self, items: list[Any], length: int | None = None) -> None:
        if length is not None and len(items) != length:
            raise RefusedError("is damaged (a tuple of more than there is)")
        self.new(tuple(items))

    def appends(self, items: list[Any]) -> None:
        _of(list, self.stack[-1]).extend(items)

    def set_items(self, items: list[Any]) -> None:
        table = _of(dict, self.stack[-1])
        if len(items) % 2:
            raise RefusedError("is damaged (a key without a value)")
        for position in range(0, len(items), 2):
            table[_key(items[position])] = items[position + 1]

    def global_(self) -> None:
        module = self.line()
        self.stack.append(self.find(module, self.line()))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise RefusedError("names something by what is no text")
        self.stack.append(self.find(module, name))

    def new_object(self) -> None:
        arguments, symbol = self.stack.pop(), self.stack.pop()
        if type(symbol) is not Symbol or not symbol.is_class or arguments != ():
            raise RefusedError("makes an instance of what is no class of its own")
        self.new(Record(symbol.name))

    def reduce(self) -> None:
        arguments, symbol = self.stack.pop(), self.stack.pop()
        if type(symbol) is not Symbol or symbol.call is None or type(arguments) is not tuple:
            raise RefusedError("calls what cannot be called")
        self.stack.append(symbol.call(arguments))

    def build(self) -> None:
        state, record = self.stack.pop(), self.stack[-1]
        if type(record) is not Record or record.state is not None:
            raise RefusedError("changes what is not its own, or is finished")
        record.state = state

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise RefusedError("refers to something outside")
        self.stack.append(self.persistent(self.stack.pop()))


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise RefusedError(f"is damaged (a {type(value).__name__} where a {kind.__name__} should be)")
    return value


def _key(key: Any) -> Any:
    # A tuple's hash walks all it holds, every time; numbers can be chosen to collide.
    if type(key) not in (str, Record):
        raise RefusedError(f"has a {type(key).__name__} for a key")
    return key


def _push(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


_STEPS: list[Callable[[_Machine], Any] | None] = [None] * 256
for _code, _step in {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"N": _push(None),
    b"\x88": _push(True),
    b"\x89": _push(False),
    b")": _push(()),
    b"K": _Machine.byte,
    b"M": lambda machine: machine.stack.append(machine.number(_U2)),
    b"J": lambda machine: machine.stack.append(machine.number(_I4)),
    b"G": lambda machine: machine.stack.append(machine.number(_F8)),
    b"\x8a": _Machine.long1,
    b"\x8c": _Machine.short_text,
    b"X": lambda machine: machine.stack.append(machine.text(machine.number(_U4))),
    b"\x94": _Machine.memoize,
    b"q": lambda machine: machine.put(machine.number(_U1)),
    b"r": lambda machine: machine.put(machine.number(_U4)),
    b"h": _Machine.byte_get,
    b"j": lambda machine: machine.stack.append(machine.memo[machine.number(_U4)]),
    b"(": _Machine.mark,
    b"0": lambda machine: machine.stack.pop(),
    b"]": lambda machine: machine.new([]),
    b"}": lambda machine: machine.new({}),
    b"\x85": lambda machine: machine.tuple_of(machine.top(1), 1),
    b"\x86": lambda machine: machine.tuple_of(machine.top(2), 2),
    b"\x87": lambda machine: machine.tuple_of(machine.top(3), 3),
    b"t": lambda machine: machine.tuple_of(machine.since_mark()),
    b"a": lambda machine: machine.appends(machine.top(1)),
    b"e": lambda machine: machine.appends(machine.since_mark()),
    b"s": lambda machine: machine.set_items(machine.top(2)),
    b"u": lambda machine: machine.set_items(machine.since_mark()),
    b"c": _Machine.global_,
    b"\x93": _Machine.stack_global,
    b"\x81": _Machine.new_object,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
    b"Q": _Machine.persistent_id,
}.items():
    _STEPS[_code[0]] = _step
