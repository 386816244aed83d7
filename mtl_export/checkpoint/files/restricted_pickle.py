"""A pickle -> plain values, by a machine that has no instruction to import or call.

A pickle is a program for a stack machine. ``pickletools`` reads its instructions; this file
carries out those that build numbers, texts, lists and dictionaries. What Python's own
unpickler would import is looked up in a table that the caller gives, of stand-ins that are
ours; a name that is not in it, and an instruction that ``torch.save`` has no use for, is an
``IntegrityError``.

Python's ``pickle.Unpickler`` with the same table runs no code either, but a few bytes make it
take all memory (a memo index of 2**31) or end the process (hashing tuples nested a million
deep). Here the instructions are counted, memo and stack grow only by what was read, and
keys are numbers or texts.

Source: ``pickletools.opcodes`` of the standard library, where each instruction is described.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from mtl_export.errors import IntegrityError

# 2 million instructions make at most 0.5 GB of objects, in about 3 seconds; a checkpoint of
# 10,000 tensors has half a million.
MAX_OPCODES = 2_000_000
MAX_PICKLE_BYTES = 32 << 20
# The first number in a stream of torch.save has 77 bits.
_MAX_BITS = 128
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], object]] = {
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set,
}  # fmt: skip
_NUMBERS = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
})  # fmt: skip
_TEXTS = frozenset({
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES",
    "BINBYTES8",
})  # fmt: skip
_OLD_TEXTS = frozenset({"STRING", "SHORT_BINSTRING", "BINSTRING"})  # Python 2's
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GET = frozenset({"GET", "BINGET", "LONG_BINGET"})

# What a name stands for: called with the tuple of arguments, or a value of its own.
Known = Mapping[str, object]


class BrokenPickleError(Exception):
    """The pickle is no program that any pickler writes."""


def unpickled(
    stream: io.BytesIO,
    known: Known,
    persistent: Callable[[object], object],
    *,
    where: str,
    max_opcodes: int = MAX_OPCODES,
) -> Any:
    """Return what the next pickle in ``stream`` builds; the stream stands behind it then.

    Args:
        stream: Begins with a pickle.
        known: For each "module name" that may be asked for, our stand-in.
        persistent: Returns the object for a persistent id: a storage.
        where: The file, for messages.
        max_opcodes: How many instructions are carried out.

    Raises:
        IntegrityError: It asks for something that is not known, or for too much.
        BrokenPickleError: It breaks off or contradicts itself.
    """
    machine = _Machine(known, persistent, where)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count >= max_opcodes:
                raise machine.refusal(f"more than {max_opcodes:,} instructions")
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, Warning) as error:
        # pickletools raises ValueError at the end of the file and for broken arguments, and
        # warns of broken escapes, which is an error where warnings are.
        raise BrokenPickleError(str(error).splitlines()[0][:200] if str(error) else "") from error
    raise BrokenPickleError("it has no end")


def is_key(value: object) -> bool:
    """Return whether ``value`` may be a key: of bounded cost to hash and to compare."""
    if isinstance(value, int):
        return value.bit_length() <= 64
    return value is None or isinstance(value, str | bytes | float)


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, known: Known, persistent: Callable[[object], object], where: str) -> None:
        self._known, self._persistent, self._where = known, persistent, where
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # what lies below each mark
        self._memo: dict[int, Any] = {}

    def refusal(self, found: str) -> IntegrityError:
        """Return the error for a pickle that asks for ``found``."""
        return IntegrityError(
            f"{self._where}: a pickle that asks for {found}",
            expected=(
                "only what a dictionary of tensors needs, because loading a pickle runs whatever "
                "it imports"
            ),
            fix="Do not load it; ask its author for safetensors",
        )

    def pop(self) -> Any:
        """Return the uppermost value."""
        return self._stack.pop()

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        if name in _PUT:
            self._memo[argument] = self._stack[-1]
        elif name in _GET:
            self._stack.append(self._memo[argument])
        elif name in _TEXTS:
            self._stack.append(argument)
        elif name in _OLD_TEXTS:
            self._stack.append(argument.encode("latin-1").decode("ascii"))
        elif name in _NUMBERS:
            self._stack.append(self._number(argument))
        elif name in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[name])]
            self._stack.append(tuple(reversed(items)))
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self._stack.append(_EMPTY[name]())
        elif (method := getattr(self, f"_{name.lower()}", None)) is not None:
            method(argument)
        elif name not in {"PROTO", "FRAME"}:
            raise self.refusal(f"the instruction {name}, which torch.save does not use")

    def _number(self, number: float) -> float:
        if isinstance(number, int) and number.bit_length() > _MAX_BITS:
            raise self.refusal(f"a number of {number.bit_length():,} bits")
        return number

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _items(self) -> list[Any]:
        """Return what was pushed since the last mark."""
        items, self._stack = self._stack, self._below.pop()
        return items

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._items()

    def _pop_mark(self, _: Any) -> None:
        self._items()

    def _tuple(self, _: Any) -> None:
        items = self._items()
        self._stack.append(tuple(items))

    def _list(self, _: Any) -> None:
        items = self._items()
        self._stack.append(items)

    def _dict(self, _: Any) -> None:
        items = self._items()
        self._stack.append({})
        self._set_items(items)

    def _append(self, _: Any) -> None:
        self._extend([self.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._items())

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise BrokenPickleError(f"it appends to a {type(self._stack[-1]).__name__}")
        self._stack[-1].extend(items)

    def _setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._set_items([key, value])

    def _setitems(self, _: Any) -> None:
        self._set_items(self._items())

    def _set_items(self, items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        if not isinstance(self._stack[-1], dict) or len(keys) != len(values):
            raise BrokenPickleError(f"it sets items of a {type(self._stack[-1]).__name__}")
        self._check_keys(keys)
        self._stack[-1].update(zip(keys, values, strict=True))

    def _additems(self, _: Any) -> None:
        items = self._items()
        if not isinstance(self._stack[-1], set):
            raise BrokenPickleError(f"it adds items to a {type(self._stack[-1]).__name__}")
        self._check_keys(items)
        self._stack[-1].update(items)

    def _frozenset(self, _: Any) -> None:
        items = self._items()
        self._check_keys(items)
        self._stack.append(frozenset(items))

    def _check_keys(self, keys: list[Any]) -> None:
        bad = next((key for key in keys if not is_key(key)), None)
        if bad is not None:
            raise self.refusal(f"a {type(bad).__name__} as a key")

    def _global(self, argument: str) -> None:
        if argument not in self._known:
            raise self.refusal(argument[:200])
        self._stack.append(self._known[argument])

    def _inst(self, argument: str) -> None:
        raise self.refusal(f"{argument[:200]} (INST)")

    def _stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self.refusal("a name that is no text")
        self._global(f"{module} {name}")

    def _reduce(self, _: Any) -> None:
        arguments, target = self.pop(), self.pop()
        if not callable(target) or not isinstance(arguments, tuple):
            raise self.refusal(f"a call of a {type(target).__name__}")
        self._stack.append(target(arguments))

    _newobj = _reduce

    def _build(self, _: Any) -> None:
        """Forget the attributes of a dictionary: OrderedDict's metadata, CfgNode's flags."""
        self.pop()
        if not isinstance(self._stack[-1], dict):
            raise self.refusal(f"attributes of a {type(self._stack[-1]).__name__}")

    def _binpersid(self, _: Any) -> None:
        self._stack.append(self._persistent(self.pop()))
