"""``mtl-export``: a group that imports a command when it is run, and one error boundary.

``mtl-export --help`` is answered from ``COMMANDS`` alone, so it costs click and nothing else.
A test holds the short helps below against the commands' own.

What a human sees is decided here and nowhere else: our errors become one message on
stderr (with ``--json``, an object on stdout) and the exit code of ``EXIT_CODES``; so do
files that the system refuses. Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

import click

from mtl_export.errors import (
    AdapterError,
    BackendError,
    BaseModelError,
    CalibrationError,
    CheckpointError,
    GraphError,
    IntegrityError,
    MtlExportError,
    OutputError,
    ParityError,
    UsageError,
)
from mtl_export.version import VERSION
from mtl_export_cli.system_errors import (
    is_of_stream,
    prepare_streams,
    refusal_of,
    silence,
    unwritable_streams,
)

# name -> module, short help; in the order of the work
COMMANDS: dict[str, tuple[str, str]] = {
    "inspect": ("mtl_export_cli.commands.inspect", "Say what a checkpoint is and holds."),
    "plan": ("mtl_export_cli.commands.plan", "Say what each way to deploy costs."),
    "merge": ("mtl_export_cli.commands.merge", "Fold tasks into standalone model folders."),
    "onnx": ("mtl_export_cli.commands.onnx", "Export one routed graph, or one per task."),
    "tasks": ("mtl_export_cli.commands.tasks", "Add, remove or rename a task of a single graph."),
    "calibrate": (
        "mtl_export_cli.commands.calibrate",
        "Quantise exported graphs, by calibration data.",
    ),
    "trt": ("mtl_export_cli.commands.trt", "Build TensorRT engines."),
    "parity": ("mtl_export_cli.commands.parity", "Prove that exports still match PyTorch."),
    "verify": (
        "mtl_export_cli.commands.verify",
        "Check a finished folder again, also on the device.",
    ),
    "bench": ("mtl_export_cli.commands.bench", "Measure latency, throughput and memory."),
    "doctor": ("mtl_export_cli.commands.doctor", "Say what is installed and what is missing."),
}
EXIT_DONE, EXIT_BUG, EXIT_USAGE, EXIT_PARITY_FAILED = 0, 1, 2, 3
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # what a shell reports for SIGINT and SIGPIPE
EXIT_CODES: dict[type[MtlExportError], int] = {
    UsageError: EXIT_USAGE,
    CheckpointError: 5,
    BaseModelError: 5,
    AdapterError: 5,
    GraphError: 5,
    # Both are about data and limits that the user chose for this command, not about the
    # checkpoint: another --inputs or --data mends them, as another option value would.
    CalibrationError: EXIT_USAGE,
    ParityError: EXIT_USAGE,
    BackendError: 6,
    IntegrityError: 7,
}


class LazyGroup(click.Group):
    """The commands of ``COMMANDS``, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command ``cmd_name``."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands without importing one."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, short) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that ``args`` begin with, or name the nearest."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], COMMANDS, n=1)
            raise UsageError(
                f"command {args[0]!r}: there is none of that name",
                expected=f"one of {', '.join(COMMANDS)}",
                fix=f"Type mtl-export {near[0]}" if near else "See mtl-export --help",
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; where its reader has gone, click would end this with code 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _leave_broken_pipe()

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit with its code."""
        prepare_streams()
        arguments = list(sys.argv[1:] if args is None else args)
        run = super().main

        def result() -> Any:
            _refuse_blank(arguments)
            with warnings.catch_warnings():
                if not sys.warnoptions:
                    # Libraries warn developers; python -W default shows it to those.
                    warnings.simplefilter("ignore")
                return run(arguments, "mtl-export", complete_var, standalone_mode=False, **extra)

        try:
            code = _code_of(result, arguments)
            sys.stdout.flush()
        except BrokenPipeError:
            _leave_broken_pipe()
        except SystemExit as end:
            # rich exits 1 then, and 1 means a bug.
            if isinstance(end.__context__, BrokenPipeError):
                _leave_broken_pipe()
            raise
        except OSError as error:
            _leave_unwritable(error)
        sys.exit(code)


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="In a folder with an mtl-export.toml (base, checkpoint, output) the commands need"
    " no more than: mtl-export merge --task NAME.",
)
@click.version_option(VERSION, prog_name="mtl-export")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Deploy multi-task LoRA checkpoints.

    Merge tasks into standalone models, or export one ONNX graph in which every row
    picks its own task; build TensorRT engines; prove that the numbers still match.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(EXIT_USAGE)


def exit_code(error: MtlExportError) -> int:
    """Return the exit code of the nearest class in ``EXIT_CODES``."""
    return next(EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES)


def main() -> NoReturn:
    """Run ``mtl-export``; the console script."""
    sys.exit(cli())


def _code_of(run: Callable[[], Any], arguments: list[str]) -> int:
    """Return the exit code of ``run``; what it raises is said and has one too."""
    try:
        code = run()
    except MtlExportError as error:
        return _fail(error, arguments)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except click.ClickException as error:
        return _fail(_translated(error), arguments)
    except click.Abort:
        click.echo("Interrupted.", err=True)
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) or is_of_stream(error):
            raise
        refusal = refusal_of(error)
        return _report_bug(error, arguments) if refusal is None else _fail(refusal, arguments)
    return code if isinstance(code, int) else EXIT_DONE


def _refuse_blank(arguments: Sequence[str]) -> None:
    """Refuse empty words and variables: ``-o "$UNSET"`` would name the current folder.

    Raises:
        UsageError: One is empty, or blank, or has a null byte.
    """
    blank = [name for name, value in os.environ.items()
             if name.startswith("MTL_EXPORT_") and not value.strip()]  # fmt: skip
    for before, word in zip(("mtl-export", *arguments), arguments, strict=False):
        option, equals, value = word.partition("=")
        if not word.strip() or "\0" in word:
            blank.append(before if before.startswith("-") else f"the word after {before}")
        elif equals and option.startswith("--") and not value.strip():
            blank.append(option)
    if blank:
        raise UsageError(
            f"{blank[0]}: its value is empty, or has a null byte",
            expected="a value, because an empty path is the current folder, which nobody means",
            fix="Give one, or leave it out; a shell variable in it may be unset",
        )


def _leave_broken_pipe() -> NoReturn:
    """Exit as what is killed by the pipe: a reader that has gone is nobody's fault."""
    for stream in (sys.stdout, *unwritable_streams().values()):
        silence(stream)
    sys.exit(EXIT_BROKEN_PIPE)


def _leave_unwritable(error: OSError) -> NoReturn:
    """Exit as after any place that cannot be written; say so where somebody can read it."""
    closed = unwritable_streams()
    for stream in closed.values():
        silence(stream)
    refusal = OutputError(
        f"{' and '.join(closed) or 'stdout, stderr or a temporary file'}: it cannot be written ("
        f"{error.strerror})",
        expected="a file or device that takes the result",
        fix="Send it elsewhere",
    )
    with suppress(OSError):
        click.echo(f"error: {refusal}", err=True)
    sys.exit(exit_code(refusal))


def _wants_json(arguments: list[str]) -> bool:
    # Read here as well as by the option: the error may be that the arguments do not parse.
    asked = os.environ.get("MTL_EXPORT_JSON", "").lower() in {"1", "true", "yes", "on", "t", "y"}
    return asked or "--json" in arguments


def _translated(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "mtl-export"
    return UsageError(f"{path}: {error.format_message().rstrip('.')}", fix=f"See {path} --help")


def _fail(error: MtlExportError, arguments: list[str]) -> int:
    from mtl_export_cli import render

    code = exit_code(error)
    if _wants_json(arguments):
        render.print_json({"ok": False, "error": error.as_dict(), "exit_code": code})
    else:
        render.print_error(str(error))
    return code


def _report_bug(error: Exception, arguments: list[str]) -> int:
    traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)
    fix = "Please report it with the lines above"
    click.echo(f"This is a bug in mtl-export {VERSION}. {fix}.", err=True)
    if _wants_json(arguments):
        from mtl_export_cli import render

        problem = f"mtl-export: {type(error).__name__}: {error}"
        report = {"error": "Bug", "problem": problem, "expected": "", "fix": "Please report it"}
        render.print_json({"ok": False, "error": report, "exit_code": EXIT_BUG})
    return EXIT_BUG
