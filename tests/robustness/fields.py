"""Documents changed value by value: JSON, JSON lines, TOML and ONNX."""

from __future__ import annotations

import json
from copy import deepcopy
from random import Random
from typing import Any

from tests.robustness.damage import DEEP, NUMBERS, PLAIN, TEXTS, damaged


def json_values(content: bytes, random: Random) -> bytes:
    """Change a value at a random path, or a key."""
    try:
        return _json_values(content, random)
    except RecursionError:  # nested by an earlier change, as deep as can just be read
        return damaged(content, random)


def _json_values(content: bytes, random: Random) -> bytes:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return damaged(content, random)
    places = list(_places(document))
    if not places:
        return json.dumps(random.choice(PLAIN)).encode()
    holder, key = random.choice(places)
    kind = random.randrange(12)
    if kind < 6:
        holder[key] = random.choice(PLAIN)
    elif kind == 6:
        other_holder, other = random.choice(places)
        holder[key] = deepcopy(other_holder[other])
    elif kind == 7:
        holder[key] = [holder[key]]
    elif kind == 8 and isinstance(holder, dict):
        holder[random.choice(TEXTS)] = holder.pop(key)
    elif kind == 9 and isinstance(holder, dict):
        del holder[key]
    elif kind == 10 and isinstance(holder, dict):
        holder[random.choice(TEXTS)] = random.choice(PLAIN)
    elif kind == 11 and isinstance(holder[key], list):
        holder[key] = holder[key] * random.choice((0, 2, 50))
    else:
        document = random.choice(PLAIN)
    text = json.dumps(document, ensure_ascii=random.random() < 0.7)
    if random.random() < 0.03:
        text = text.replace("{", '{"type": 1, ', 1)  # perhaps a key that comes twice
    depth = random.choice((50, 900, 20_000, 200_000))
    text = text.replace(f'"{DEEP}"', "[" * depth + "]" * depth)
    return text.encode("utf-8", "surrogatepass")


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Return every holder with a key or index of it, outer ones first."""
    found, pending = [], [document]
    while pending:
        holder = pending.pop()
        keys = (
            list(holder)
            if isinstance(holder, dict)
            else range(len(holder))
            if isinstance(holder, list)
            else ()
        )
        for key in keys:
            found.append((holder, key))
            pending.append(holder[key])
    return found


def json_lines(content: bytes, random: Random) -> bytes:
    """Change one line as JSON."""
    lines = content.split(b"\n")
    place = random.randrange(len(lines))
    lines[place] = json_values(lines[place], random)
    return b"\n".join(lines)


def toml(content: bytes, random: Random) -> bytes:
    """Change the value of a line, or its key."""
    lines = content.split(b"\n")
    places = [place for place, line in enumerate(lines) if b"=" in line]
    if not places:
        return damaged(content, random)
    place = random.choice(places)
    key, _, value = lines[place].partition(b"=")
    literals = ("''", "1", "-1", "0", "0.0", "1e400", "inf", "nan", "9" * 400, "9" * 5000, "true",
                "[]", "{}", "[1, 'x']",
                "{ x = 1 }", "{ x = [1, 2] }", "1979-05-27T07:32:00Z", "07:32:00", "'~nobody/x'",
                "'\\\\'", '"\\u0000"',
                "'package:os/x'", "'package:'", "'package:a.b/c'", "'a/b'", "'../../outside/bait'",
                "'/'", "'x' * 2",
                "'" + "x" * 5000 + "'", "[" * 5000 + "]" * 5000, "{a=" * 3000 + "1" + "}" * 3000,
                "0x" + "f" * 5000)  # fmt: skip
    kind = random.randrange(5)
    if kind < 3:
        value = random.choice(literals).encode()
    elif kind == 3:
        value = b"[" + value + b"]"
    else:
        key = random.choice(list(lines)).partition(b"=")[0]
    lines[place] = key + b"= " + value
    return b"\n".join(lines)


def protobuf(content: bytes, random: Random) -> bytes:
    """Change a field of an ONNX model at a random depth."""
    import onnx

    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception:  # DecodeError, of one of protobuf's two implementations
        return damaged(content, random)
    message: Any = model
    for _ in range(random.choice((1, 2, 2, 3, 3, 4, 5))):
        inner = [one for field, value in message.ListFields() if field.message_type
                 for one in (value if _is_list(value) else [value])]  # fmt: skip
        tables = [one for one in inner if one.DESCRIPTOR.name == "StringStringEntryProto"]
        message = random.choice(tables if tables and random.random() < 0.3 else inner or [message])
    try:
        _set_field(message, random)
    except ValueError:  # a number that an enumeration does not have
        return damaged(content, random)
    return bytes(model.SerializeToString())


def _is_list(value: Any) -> bool:
    return hasattr(value, "extend")


def _set_field(message: Any, random: Random) -> None:
    fields = [field for field, _ in message.ListFields()] or list(message.DESCRIPTOR.fields)
    field = random.choice(fields if random.random() < 0.8 else list(message.DESCRIPTOR.fields))
    kind, value = field.cpp_type, getattr(message, field.name)
    text = random.choice(TEXTS).replace("\ud800", "")
    if (
        message.DESCRIPTOR.name == "StringStringEntryProto"
        and field.name == "value"
        and random.random() < 0.8
    ):
        whole = message.value.encode("utf-8", "surrogatepass")
        changed = (
            json_values(whole, random) if whole[:1] in (b"[", b"{") else damaged(whole, random)
        )
        message.value = changed.decode("utf-8", "replace")
    elif _is_list(value) and len(value) and random.random() < 0.7:
        place = random.randrange(len(value))
        if field.message_type:
            del value[place : random.choice((place + 1, len(value)))]
        else:
            value[place] = _value_for(field, kind, text, random)
    elif field.message_type and _is_list(value):
        value.add()
    elif field.message_type or random.random() < 0.1:
        message.ClearField(field.name)
    elif _is_list(value):
        value.append(_value_for(field, kind, text, random))
    else:
        setattr(message, field.name, _value_for(field, kind, text, random))


def _value_for(field: Any, kind: Any, text: str, random: Random) -> Any:
    return text.encode() if field.type == field.TYPE_BYTES else _scalar(kind, text, random)


def _scalar(kind: int, text: str, random: Random) -> Any:
    """Return a value for a field whose ``cpp_type`` is ``kind``: a number, a float or a text."""
    if kind in {5, 6}:
        return random.choice((0.0, float("nan"), float("inf"), 1e38))
    if kind in {1, 8}:
        return random.choice((0, 1, 2, 3, 7, 8, 9, 10, 16, 17, 20, 23, 99, -1, 2**31 - 1))
    number = random.choice(NUMBERS)
    return text if kind == 9 else number if -(2**63) <= number < 2**63 else 2**63 - 1
