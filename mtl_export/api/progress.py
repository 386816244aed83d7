"""How a verb says how far it is: to a bar of the command line, a notebook or nobody."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What hears of a verb's steps."""

    def expect(self, total: int) -> None:
        """Hear that ``total`` steps follow, counted anew."""

    def note(self, text: str) -> None:
        """Hear what the user should know."""

    def detail(self, text: str) -> None:
        """Hear what only who wants to know more should hear."""

    def begin(self, name: str, *, is_beside: bool = False) -> None:
        """Hear that the step ``name`` begins, which ends the one before unless it goes on."""

    def at(self, name: str, done: int, total: int) -> None:
        """Hear that ``done`` of ``total`` steps are over and ``name`` is next."""

    def reached(self, share: float) -> None:
        """Hear what share of all steps, 0 to 1, is done."""

    def within(self, done: int, total: int) -> None:
        """Hear how much of the current step is done, in any unit."""


class Silent:
    """Progress that nobody hears."""

    def expect(self, total: int) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def detail(self, text: str) -> None:
        """Say nothing."""

    def begin(self, name: str, *, is_beside: bool = False) -> None:
        """Say nothing."""

    def at(self, name: str, done: int, total: int) -> None:
        """Say nothing."""

    def reached(self, share: float) -> None:
        """Say nothing."""

    def within(self, done: int, total: int) -> None:
        """Say nothing."""


SILENT = Silent()
