"""Numbers and lists that callers pass -> whole numbers and lists, or one clear error."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Set
from typing import Any

from mtl_export.errors import UsageError


def whole_number(value: Any) -> int | None:
    """Return ``value`` if it is a whole number, of numpy or torch too; None if not.

    ``True`` is an int in Python and none here; neither is 1.0, which may have been 0.9.
    """
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def listed(value: Any) -> list[Any] | None:
    """Return the entries of ``value`` in their order, of numpy or torch too; None if it has none.

    Texts and bytes have none here, nor have sets; those of a mapping are its names.
    """
    if isinstance(value, str | bytes | bytearray | Set | Mapping):
        return None
    try:
        return list(value)
    except TypeError:
        return None


def count_of(name: str, value: Any, most: int | None = None, why: str = "") -> int:
    """Return the argument ``name`` as a whole number of at least 1.

    Args:
        name: The argument, for the message.
        value: What was passed.
        most: The largest that can be; None: any.
        why: Why no more than that.

    Raises:
        UsageError: It is none, less than 1 or more than ``most``.
    """
    count = whole_number(value)
    if count is None or count < 1 or (most is not None and count > most):
        raise UsageError(
            f"{name}: {value!r}",
            expected="a whole number, "
            + ("1 or more" if most is None else f"1 to {most}, because {why}"),
            fix=f"Pass another {name}",
        )
    return count
