from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr

import pytest

from mtl_export.api.settings import Settings
from mtl_export_cli import render


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Give the variables of a common terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return monkeypatch


def on_terminal(function: Callable[..., object], *arguments: object) -> str:
    """Return what ``function`` writes to a stderr that is a terminal."""
    with redirect_stderr(Terminal()) as stream:
        function(*arguments)
    return stream.getvalue()


def run_steps(settings: Settings) -> None:
    """Run two steps, the first with something to report inside."""
    with render.Messages.from_settings(settings).steps(2) as steps:
        steps.begin("merge: a")
        steps.within(1, 2)
        steps.begin("merge: [b]")


def test_steps_are_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A log file gets one line per step on stderr, and stdout nothing."""
    run_steps(Settings())
    assert capsys.readouterr() == ("", "[1/2] merge: a\n[2/2] merge: [b]\n")


@pytest.mark.usefixtures("environment")
def test_steps_are_a_bar_on_a_terminal() -> None:
    """A terminal gets a bar with the share done and an estimate."""
    written = on_terminal(run_steps, Settings())
    assert "merge: [b]" in written
    assert "eta" in written
    assert "%" in written


@pytest.mark.parametrize("settings", [Settings(json=True), Settings(verbosity=-1)])
def test_no_bar_with_json_or_quiet(settings: Settings) -> None:
    """Programs and -q get plain lines even on a terminal."""
    assert on_terminal(run_steps, settings) == "[1/2] merge: a\n[2/2] merge: [b]\n"


def test_quiet_twice_says_nothing() -> None:
    """-qq leaves only errors."""
    assert on_terminal(run_steps, Settings(verbosity=-2)) == ""


def test_a_callers_count_of_steps_is_followed(capsys: pytest.CaptureFixture[str]) -> None:
    """A stage that counts for itself says done and total; its last call ends no new step."""
    with render.Messages.from_settings(Settings()).steps(0) as steps:
        for done, name in enumerate(("oracle", "merged a", "done")):
            steps.at(name, done, 2)
    assert capsys.readouterr().err == "[1/2] oracle\n[2/2] merged a\n"


def test_notes_obey_verbosity(capsys: pytest.CaptureFixture[str]) -> None:
    """Notes go away with -q, details come with -v, both on stderr."""
    for verbosity in (-1, 0, 1):
        talk = render.Messages(verbosity, bars=False)
        talk.note(f"note {verbosity}")
        talk.detail(f"detail {verbosity}")
    assert capsys.readouterr() == ("", "note 0\nnote 1\ndetail 1\n")


def test_errors_are_coloured_unless_no_color_is_set(environment: pytest.MonkeyPatch) -> None:
    """NO_COLOR is obeyed."""
    assert "\x1b[1;31merror:" in on_terminal(render.print_error, "x")
    environment.setenv("NO_COLOR", "1")
    assert "[31m" not in on_terminal(render.print_error, "x")


def test_a_long_message_is_one_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """Grep finds the whole message."""
    render.print_error("word " * 200)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_table_in_a_pipe_is_whole_and_has_no_padding(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every cell is there in one piece, markup is text, and no line ends in blanks."""
    path = "/".join(["folder"] * 20)
    render.print_table(("path", "size"), [(path, "1"), ("[red]x", "10")], right=("size",))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith(path)
    assert lines[3].startswith("[red]x ")
    assert lines[3].endswith(" 10")
    assert all(line == line.rstrip() for line in lines)


def test_json_is_one_object_with_its_letters(capsys: pytest.CaptureFixture[str]) -> None:
    """Names keep their umlauts."""
    render.print_json({"name": "größe"})
    out = capsys.readouterr().out
    assert "größe" in out
    assert json.loads(out) == {"name": "größe"}


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (90_900_000, "90.9 MB"),
     (2 * 10**12, "2000.0 GB")],
)  # fmt: skip
def test_sizes_are_readable(size_bytes: int, text: str) -> None:
    """Decimal units, one place."""
    assert render.size_text(size_bytes) == text


HOSTILE = "x\x1b]0;owned\x07\x1b[2J\u009b31m\n::error::fake\r\u202e\u2028y"


@pytest.mark.parametrize(
    "say",
    [
        render.print_error,
        render.print_line,
        lambda text: render.print_facts([(text, text)]),
        lambda text: render.print_table([text], [[text]], title=text),
        lambda text: render.print_json({text: text}),
        render.Messages(1, bars=False).note,
        render.Messages(1, bars=False).detail,
        lambda text: render.Steps(1, render.Messages(0, bars=False)).begin(text),
    ],
)
@pytest.mark.usefixtures("environment")
def test_no_name_out_of_a_file_commands_the_terminal(
    capsys: pytest.CaptureFixture[str], say: Callable[[str], object]
) -> None:
    """Control characters are shown, and no line begins with what a name says."""
    say(HOSTILE)
    written = "".join(capsys.readouterr())
    assert written.replace("\n", "").isprintable()
    assert not any(line.lstrip().startswith("::") for line in written.splitlines())
    assert "[2J" in written
    assert "fake" in written


def test_json_keeps_what_it_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    """A reader of the JSON gets the name that the file has."""
    render.print_json({"name": HOSTILE})
    assert json.loads(capsys.readouterr().out) == {"name": HOSTILE}
