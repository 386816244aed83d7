"""The options of ``options.FORM`` as one keyword of a command."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mtl_export.api.graph_form import form_of

NAMES = ("task_input", "pooling", "normalize", "inline", "opset")


def with_form(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with the options of ``options.FORM`` as one keyword, ``form``.

    Raises:
        UsageError: ``--normalize`` without ``--pooling``.
    """

    @functools.wraps(function)
    def with_record(*positional: Any, **values: Any) -> Any:
        form = form_of(**{name: values.pop(name) for name in NAMES})
        return function(*positional, form=form, **values)

    return with_record
