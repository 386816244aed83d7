"""A JSON file, or JSON text from elsewhere -> a value of the shape that its reader expects.

The one place that parses JSON. A shape looks like the value:

    str, bool, None      a value of that type
    int, float           a whole number of 64 bits; any finite number, whole ones too
    Real                 any number, NaN and infinity too
    object               anything
    {"a", "b"}           one of these texts
    [S]                  a list, each entry of shape S
    {str: S}             an object, each value of shape S
    {"k": S, "k?": S}    an object with these keys, those with ``?`` absent or null at will; other
                         keys may hold anything
    (S, S)               one or the other

>>> misfit({"r": True}, {"r": int, "alpha?": float})
('r is True', 'a whole number')
>>> misfit({"weights": {"a": [1, None]}}, {"weights": {str: [int]}})
('weights.a.1 is None', 'a whole number')

``NaN`` and ``Infinity``, which transformers writes into some configs, are read and are no
``float``. Of two equal keys the last counts, as for the libraries that wrote the files.
"""

from __future__ import annotations

import json
import re
import reprlib
from numbers import Real
from pathlib import Path
from typing import Any

from mtl_export.checkpoint.files.small_file import (
    DAMAGED,
    HUGE,
    MOST_BYTES,
    MOST_CONTAINERS,
    Refusal,
    decoded,
    nested,
    refuse_nesting,
    text_of,
)
from mtl_export.errors import CheckpointError, MtlExportError

Shape = Any
OBJECT: Shape = {}
_LARGEST = float.fromhex("0x1.fffffffffffffp+1023")
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_WORDS = {
    str: "a text", bool: "true or false", int: "a whole number", float: "a finite number",
    Real: "a number", None: "null", object: "anything",
}  # fmt: skip


def read_json(
    path: Path,
    shape: Shape = OBJECT,
    *,
    error: type[MtlExportError] = CheckpointError,
    expected: str = "",
    fix: str = DAMAGED,
) -> Any:
    """Return the value in the file ``path``.

    Args:
        path: The file.
        shape: What it must look like; an object by default.
        error: Class of what is raised.
        expected: The file that should be there, for messages; the shape says it where empty.
        fix: What to do about another one.

    Raises:
        UsageError: The system does not let this user read it.
        MtlExportError: Of class ``error``: it is too large, no UTF-8, no JSON, or of another shape.
    """

    def refused(found: str) -> MtlExportError:
        return error(f"{path}: {found}", expected=expected or _word(shape), fix=fix)

    return _fitting(_parsed(text_of(path, refused), refused), str(path), shape, error, fix)


def parse_json(
    text: str | bytes,
    where: str,
    shape: Shape = OBJECT,
    *,
    error: type[MtlExportError] = CheckpointError,
    fix: str = DAMAGED,
) -> Any:
    """Return the value of JSON text.

    Args:
        text: The text, or its bytes in UTF-8.
        where: Where it comes from, for messages.
        shape: As for ``read_json``.
        error: Likewise.
        fix: Likewise.

    Raises:
        MtlExportError: Of class ``error``: it is too large, no UTF-8, no JSON, or of another shape.
    """

    def refused(found: str) -> MtlExportError:
        return error(f"{where}: {found}", expected=_word(shape), fix=fix)

    if len(text) > MOST_BYTES:
        raise refused(f"{len(text):,} bytes, more than {MOST_BYTES:,}")
    known = text if isinstance(text, str) else decoded(text, refused)
    return _fitting(_parsed(known, refused), where, shape, error, fix)


def json_or_none(path: Path, shape: Shape = OBJECT) -> Any:
    """Return the value in the file ``path``; None where there is none of this shape to be read."""
    try:
        return read_json(path, shape)
    except MtlExportError:
        return None


def checked(
    value: Any,
    where: str,
    shape: Shape,
    *,
    error: type[MtlExportError] = CheckpointError,
    fix: str = DAMAGED,
) -> Any:
    """Return ``value``, which came out of JSON, if it is of the shape.

    Raises:
        MtlExportError: Of class ``error``: it is not.
    """
    return _fitting(value, where, shape, error, fix)


def misfit(value: Any, shape: Shape, at: str = "") -> tuple[str, str] | None:
    """Return where ``value`` is not of the shape and what was expected there; None if it is."""
    if isinstance(shape, tuple):
        found = [misfit(value, one, at) for one in shape]
        inner = [one for one in found if one and not one[0].startswith(f"{at} is ")]
        if None in found:
            return None
        return inner[0] if inner else (_said(at, value, shape), _word(shape))
    if isinstance(shape, dict) and isinstance(value, dict):
        return _misfit_inside(value, shape, at)
    if isinstance(shape, list) and isinstance(value, list):
        prefix = f"{at}." if at else "entry "
        parts = (misfit(one, shape[0], f"{prefix}{place}") for place, one in enumerate(value))
        return next(filter(None, parts), None)
    return None if _fits(value, shape) else (_said(at, value, shape), _word(shape))


def shown(value: object) -> str:
    """Return ``value`` for a message, however large it is."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    return _SHORT.repr(value)


def _parsed(text: str, refused: Refusal) -> Any:
    if not text.strip():
        raise refused("an empty file" if not text else "nothing but blanks")
    if text.count("[") + text.count("{") > MOST_CONTAINERS:
        raise refused(f"more than {MOST_CONTAINERS:,} lists and objects")
    try:
        value = json.loads(text)
        if _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise refused(nested()) from error
    except json.JSONDecodeError as error:
        raise refused(f"not JSON ({error})") from error
    except UnicodeEncodeError as error:
        raise refused("a text with half of a surrogate pair, which is no UTF-8") from error
    except ValueError as error:  # Python's limit, 4,300 digits
        raise refused(HUGE) from error
    refuse_nesting(value, refused)
    return value


def _fitting(value: Any, where: str, shape: Shape, error: type[MtlExportError], fix: str) -> Any:
    problem = misfit(value, shape)
    if problem is None:
        return value
    found, expected = problem
    raise error(f"{where}: {found}", expected=expected, fix=fix)


def _misfit_inside(
    value: dict[str, Any], shape: dict[Any, Shape], at: str
) -> tuple[str, str] | None:
    prefix = f"{at}." if at else ""
    for key, one in shape.items():
        if key is str:
            parts = (misfit(child, one, f"{prefix}{name}") for name, child in value.items())
            found = next(filter(None, parts), None)
        elif key.endswith("?"):
            child = value.get(key[:-1])
            found = None if child is None else misfit(child, one, prefix + key[:-1])
        elif key not in value:
            found = (f"no {key!r}" + (f" in {at}" if at else ""), _word(one))
        else:
            found = misfit(value[key], one, prefix + key)
        if found:
            return found
    return None


def _fits(value: Any, shape: Shape) -> bool:
    if shape is object:
        return True
    if isinstance(shape, set | frozenset):
        return isinstance(value, str) and value in shape
    if shape is int:
        return type(value) is int and -(2**63) <= value < 2**63
    if shape is Real and type(value) is float:
        return True
    if shape in (float, Real):
        return type(value) in {int, float} and -_LARGEST <= value <= _LARGEST
    return value is None if shape is None else type(value) is shape


def _said(at: str, value: Any, shape: Shape) -> str:
    if at:
        return f"{at} is {shown(value)}"
    return f"no {_word(shape).removeprefix('a ')}, but {shown(value)}"


def _word(shape: Shape) -> str:
    if isinstance(shape, tuple):
        return " or ".join(dict.fromkeys(map(_word, shape)))
    if isinstance(shape, set | frozenset):
        return " or ".join(sorted(map(repr, shape)))
    if isinstance(shape, dict):
        return "a JSON object"
    return "a list" if isinstance(shape, list) else _WORDS[shape]
