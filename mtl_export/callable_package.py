"""A package that is also a function: ``mtl_export.parity(...)`` beside ``mtl_export.parity.run``.

Importing a submodule sets its package as an attribute of ``mtl_export``, whatever stood there
under that name. So a verb that is called like a package is that package, made callable.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """A package whose call is that of the function of the same name in ``mtl_export.api``."""

    def __call__(self, *values: Any, **options: Any) -> Any:
        """Call the verb."""
        return _verb(self)(*values, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        """Return the verb's parameters, for ``help`` and editors."""
        return inspect.signature(_verb(self))


def make_callable(package: str) -> None:
    """Let ``package``, such as ``mtl_export.parity``, be called as the verb of that name.

    Args:
        package: The package's ``__name__``; the verb is imported when it is first called.
    """
    sys.modules[package].__class__ = _CallablePackage


def _verb(package: ModuleType) -> Callable[..., Any]:
    parent, _, name = package.__name__.rpartition(".")
    verb: Callable[..., Any] = getattr(import_module(f"{parent}.api.{name}"), name)
    return verb
