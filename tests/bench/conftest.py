"""The exports that runners are tried on are those of ``tests.runtime``."""

from tests.runtime.conftest import exported, language

__all__ = ["exported", "language"]
