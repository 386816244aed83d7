"""Read every layer before complaining, so that one message lists all that is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from mtl_export.errors import (
    BaseModelError,
    CheckpointError,
    HyperparameterError,
    shortened,
)

Value = TypeVar("Value")


def read_all(
    where: str,
    names: Iterable[str],
    load: Callable[[str], Value],
    earlier: CheckpointError | None = None,
) -> dict[str, Value]:
    """Return ``load(name)`` of every name.

    Args:
        where: What is read, for a message about several names.
        names: In the order of the result.
        load: Raises ``CheckpointError`` or ``BaseModelError`` for one that is broken.
        earlier: What was found wrong before; raised with the rest.

    Raises:
        HyperparameterError: At the first one: it is missing for all.
        CheckpointError: Something is broken: a single error as it is, several as one.
        BaseModelError: The same, where the base is to blame for the first.
    """
    values: dict[str, Value] = {}
    errors: list[CheckpointError | BaseModelError] = [earlier] if earlier else []
    texts = [error.problem for error in errors]
    for name in names:
        try:
            values[name] = load(name)
        except HyperparameterError:
            if not errors:
                raise
        except (CheckpointError, BaseModelError) as error:
            errors.append(error)
            is_named = name in error.problem.rpartition(": ")[0]
            texts.append(error.problem if is_named else f"{name}: {error.problem}")
    if not errors:
        return values
    first = errors[0]
    if len(errors) == 1:
        raise first
    causes = {error.problem.rpartition(": ")[2] for error in errors}
    if isinstance(first, BaseModelError) and len(causes) == 1:
        raise first  # one cause: the base was not given
    raise type(first)(
        f"{where}: {len(errors)} problems: {shortened(texts, 6)}",
        expected=first.expected,
        fix=first.fix,
    )
