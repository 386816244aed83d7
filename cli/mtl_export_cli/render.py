"""What people see: results on stdout, messages and progress bars on stderr.

stdout carries the command's result and nothing else, so it can be piped; with
``--json`` it is one JSON object. Bars are drawn only on a terminal; elsewhere each
step is one plain line. NO_COLOR is obeyed (by rich).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TextIO

from mtl_export.api.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

# Where output is piped, lines are as long as their content, up to this.
PIPE_COLUMNS = 400
# What moves the cursor, recolours, begins a line or turns the order of letters around.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def print_json(document: Mapping[str, object]) -> None:
    """Print ``document`` on stdout."""
    lines = json.dumps(document, indent=2, ensure_ascii=False).split("\n")
    sys.stdout.write("\n".join(map(_plain, lines)) + "\n")


def print_error(message: str) -> None:
    """Print the one message of a failed command on stderr."""
    console = _console(sys.stderr)
    console.print("error:", style="bold red", end=" ")
    console.print(_plain(message), markup=False, soft_wrap=True)


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    right: Sequence[str] = (),
) -> None:
    """Print a table on stdout.

    Args:
        columns: Headings.
        rows: Cells, one text per column.
        title: A line above it.
        right: Headings of the columns with numbers, aligned to the right.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = _console(sys.stdout)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        side: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(_plain(column), justify=side, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_plain(cell)) for cell in row))
    if title:
        console.print(_plain(title), style="bold", markup=False, soft_wrap=True)
    with console.capture() as capture:
        console.print(table)
    # rich pads every line to the table's width; pipes and READMEs are better off without.
    lines = [line.rstrip() for line in capture.get().splitlines()]
    sys.stdout.write("\n".join(line for line in lines if line) + "\n")


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print ``name  value`` lines on stdout, values aligned."""
    console = _console(sys.stdout)
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        console.print(_plain(f"{name:<{width}}"), style="bold", end="  ", markup=False)
        console.print(_plain(value), markup=False, soft_wrap=True)


def print_line(text: str) -> None:
    """Print one line on stdout."""
    _console(sys.stdout).print(_plain(text), markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Messages:
    """Says on stderr what is going on, as loudly as the settings allow.

    Attributes:
        verbosity: As in ``Settings``.
        bars: Draw progress bars.
    """

    verbosity: int
    bars: bool

    @classmethod
    def from_settings(cls, settings: Settings) -> Messages:
        """Return the messages of one command."""
        if settings.verbosity > 0:
            _show_log(settings.verbosity)
        quiet = settings.json or settings.verbosity < 0
        return cls(settings.verbosity, bars=not quiet and sys.stderr.isatty())

    def note(self, text: str) -> None:
        """Say what the user should know."""
        if self.verbosity >= 0:
            _console(sys.stderr).print(_plain(text), markup=False, soft_wrap=True)

    def detail(self, text: str) -> None:
        """Say what only ``-v`` wants to know."""
        if self.verbosity > 0:
            _console(sys.stderr).print(_plain(text), style="dim", markup=False, soft_wrap=True)

    @contextmanager
    def steps(self, total: int = 0) -> Iterator[Steps]:
        """Show the progress of ``total`` steps during the block."""
        if not self.bars:
            yield Steps(total, self)
            return
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("eta"),
            progress.TimeRemainingColumn(),
        )
        # Whoever writes to stdout during a step writes to stdout: nothing is redirected.
        with progress.Progress(
            *columns, console=_console(sys.stderr), transient=True,
            redirect_stdout=False, redirect_stderr=False,
        ) as bar:  # fmt: skip
            yield Steps(total, self, bar=bar, bar_id=bar.add_task("", total=float(total)))


class Steps:
    """The steps of one command: a bar, or a line for each.

    Args:
        total: How many there are; ``expect`` and ``at`` may say so later.
        messages: How loud they are.
        bar: Where to draw; None for lines.
        bar_id: The bar's row.
    """

    def __init__(
        self,
        total: int,
        messages: Messages,
        *,
        bar: Progress | None = None,
        bar_id: TaskID | None = None,
    ) -> None:
        self._total, self._messages = total, messages
        self._bar, self._bar_id = bar, bar_id
        self._begun = 0

    def note(self, text: str) -> None:
        """Say what the user should know, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(_plain(text), markup=False, soft_wrap=True)
        else:
            self._messages.note(text)

    def detail(self, text: str) -> None:
        """Say what only ``-v`` wants to know."""
        if self._bar is None:
            self._messages.detail(text)
        elif self._messages.verbosity > 0:
            self.note(text)

    def expect(self, total: int) -> None:
        """Begin to count ``total`` steps anew."""
        self._begun, self._total = 0, total
        if self._bar is not None and self._bar_id is not None:
            self._bar.update(self._bar_id, total=float(total), completed=0.0)

    def begin(self, name: str, *, is_beside: bool = False) -> None:
        """Begin the next step, which ends the one before, unless it goes on beside it."""
        name = _plain(name)
        self._begun += 1
        if self._bar is not None and self._bar_id is not None:
            completed = None if is_beside else float(self._begun - 1)
            self._bar.update(self._bar_id, description=name, completed=completed)
        elif self._messages.verbosity >= -1:
            line = f"[{self._begun}/{self._total}] {name}"
            _console(sys.stderr).print(line, markup=False, soft_wrap=True)

    def at(self, name: str, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` steps are over and ``name`` is next, if any is left."""
        self._begun, self._total = done, total
        if self._bar is not None and self._bar_id is not None:
            self._bar.update(self._bar_id, total=float(total))
        if done < total:
            self.begin(name)
        elif self._bar is not None and self._bar_id is not None:
            self._bar.update(self._bar_id, completed=float(total))

    def reached(self, share: float) -> None:
        """Say what share of all steps is done, where they go on beside each other."""
        if self._bar is not None and self._bar_id is not None:
            self._bar.update(self._bar_id, completed=share * self._total)

    def within(self, done: int, total: int) -> None:
        """Say how much of the current step is done."""
        if self._bar is not None and self._bar_id is not None and total:
            before = max(self._begun - 1, 0)
            self._bar.update(self._bar_id, completed=before + min(done / total, 1.0))


def _show_log(verbosity: int) -> None:
    """Send our log, and the builders' that it carries, to stderr: -v notes, -vv all."""
    import logging

    logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
    logging.getLogger("mtl_export").setLevel(logging.DEBUG if verbosity > 1 else logging.INFO)


def size_text(size_bytes: int) -> str:
    """Return a size for people, in decimal units."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _plain(text: str) -> str:
    """Return ``text``, parts of which come out of files, as no terminal obeys it.

    Escapes are JSON's too.
    """
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    options: dict[str, Any] = {} if stream.isatty() else {"width": PIPE_COLUMNS}
    return Console(file=stream, highlight=False, **options)
